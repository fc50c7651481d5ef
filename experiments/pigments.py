"""Generated eyes, and how well the amounts of pigment in them are predicted from spectra or from an encoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mmmae
from mmmae.data import Sample, Subjects
from mmmae.phantom import Phantom

SIZE, PATCH = 64, (3, 8, 8)
SPECTRA = ("mean spectrum", "logarithm of it", "all values")
PIGMENTS = ("melanin", "xanthophyll", "lipofuscin", "artery", "vein")
PENALTIES = torch.logspace(-6, 2, 17, dtype=torch.float64)  # over the number of patches


class Remembered(Subjects):
    """Generated eyes that are rendered once and kept in memory."""

    def __init__(self, phantom: Phantom, indices: Sequence[int]) -> None:
        self.names, self.bands, self.modalities = [phantom.names[i] for i in indices], phantom.bands, phantom.modalities
        self.samples = [phantom[index] for index in indices]

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


class Eyes:
    """The generated eyes of a seed: those to pretrain on, and those to predict the pigments of, by patch.

    P patches of an eye are P places; n eyes are the labelled ones, followed by the held-out ones.

    Args:
        seed: of the run, which the eyes depend on.
        count: number of eyes to pretrain on.
        labelled: number of eyes with known pigments to fit on, the first ones of those.
        held_out: number of other eyes to evaluate.

    Attributes:
        seed: of the run, not of the eyes.
        unlabelled: the eyes to pretrain on.
        labelled: number of eyes to fit on, the first ones of `hsi`.
        hsi: `[n, 1, T, H, W]`, normalised.
        reflectance: `[n, T, H, W]`.
        inside: `[n, P]` bool, whether a patch is within the field of view.
        amounts: `[n, P, pigments]`, the means over patches.
    """

    def __init__(self, seed: int, count: int, labelled: int, held_out: int) -> None:
        phantom = Phantom(count + held_out, SIZE, seed=seed + 1)  # 0 has the eyes that normalise all
        self.unlabelled = Remembered(phantom, range(count))
        self.seed, self.labelled = seed, labelled
        chosen = [*range(labelled), *range(count, count + held_out)]
        samples = [self.unlabelled[index] if index < count else phantom[index] for index in chosen]
        self.hsi = torch.stack([sample.hsi for sample in samples])
        self.reflectance = torch.stack([phantom.normalization.invert("hsi", cube[0]) for cube in self.hsi])
        self.inside = by_patch(torch.stack([sample.valid for sample in samples])[:, None].float())[..., 0] == 1
        maps = [phantom.pigments(index) for index in chosen]
        self.amounts = by_patch(torch.stack([torch.stack([amount[name] for name in PIGMENTS]) for amount in maps]))


def by_patch(maps: Tensor) -> Tensor:
    """Return the means of maps `[n, C, H, W]` over patches, `[n, P, C]`."""
    return F.avg_pool2d(maps, PATCH[1:]).flatten(2).transpose(1, 2)


def spectra(method: str, eyes: Eyes) -> Tensor:
    """Return the features `[n, P, C]` of a baseline."""
    if method == "mean spectrum":
        return by_patch(eyes.hsi[:, 0])
    if method == "logarithm of it":
        return by_patch(eyes.reflectance).clamp(min=1e-3).log()
    return F.unfold(eyes.hsi[:, 0], PATCH[1:], stride=PATCH[1:]).transpose(1, 2)


@torch.no_grad()
def encode(model: mmmae.FastModel, eyes: Eyes) -> Tensor:
    """Return the tokens of all eyes, `[n, N, D]`."""
    encoder = model.hsi_encoder()
    return torch.cat([encoder(some) for some in eyes.hsi.split(16)])


def by_place(tokens: Tensor, config: mmmae.MMMAEConfig) -> Tensor:
    """Join the tokens `[n, N, D]` of all spectral groups at a place, `[n, P, groups * D]`."""
    return tokens.unflatten(1, (config.grid[0], -1)).transpose(1, 2).flatten(2)  # type: ignore[no-untyped-call,no-any-return]


def regress(features: Tensor, eyes: Eyes) -> dict[str, float]:
    """Predict amounts of pigment from features `[n, P, C]` by ridge regression; return R2 on the held-out eyes.

    The penalty of each pigment is the one with the least error if each labelled eye is left out in turn.
    """
    patches = [
        (own[inside].double(), amounts[inside].double())
        for own, inside, amounts in zip(features, eyes.inside, eyes.amounts, strict=True)
    ]
    labelled, held_out = patches[: eyes.labelled], join(patches[eyes.labelled :])
    errors = torch.zeros(len(PENALTIES), len(PIGMENTS), dtype=torch.float64)
    for left_out in range(eyes.labelled):
        x, y = labelled[left_out]
        fitted = ridge(*join([*labelled[:left_out], *labelled[left_out + 1 :]]), x)
        errors += (fitted - y).square().sum(1)
    x, y = held_out
    return score(ridge(*join(labelled), x)[errors.argmin(0), :, range(len(PIGMENTS))].T, y)


def fine_tune(encoder: mmmae.HSIEncoder, eyes: Eyes, steps: int, learning_rate: float) -> dict[str, float]:
    """Train an encoder, and a linear layer from its tokens to amounts, on the labelled eyes; return R2 on the others.

    Each step sees all labelled eyes, turned or mirrored at random. The last step is evaluated.
    """
    labelled, side = eyes.labelled, SIZE // PATCH[1]
    known = eyes.amounts[:labelled][eyes.inside[:labelled]]
    centre, scale = known.mean(0), known.std(0)
    maps = ((eyes.amounts[:labelled] - centre) / scale).transpose(1, 2).unflatten(2, (side, side))
    inside = eyes.inside[:labelled].unflatten(1, (side, side))
    layer = nn.Linear(encoder.config.grid[0] * encoder.config.dim, len(PIGMENTS))
    nn.init.zeros_(layer.weight)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *layer.parameters()], weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    draw = np.random.default_rng(eyes.seed)
    for _ in range(steps):
        turn = int(draw.integers(8))
        fitted = layer(by_place(encoder(turned(eyes.hsi[:labelled], turn)), encoder.config))
        errors = fitted - turned(maps, turn).flatten(2).transpose(1, 2)
        optimizer.zero_grad()
        errors[turned(inside, turn).flatten(1)].square().mean().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        tokens = torch.cat([by_place(encoder(some), encoder.config) for some in eyes.hsi[labelled:].split(16)])
        fitted = layer(tokens) * scale + centre
    return score(fitted[eyes.inside[labelled:]].double(), eyes.amounts[labelled:][eyes.inside[labelled:]].double())


def turned(maps: Tensor, turn: int) -> Tensor:
    """Return maps `[..., H, W]` in one of the eight ways in which a square can lie."""
    maps = maps.rot90(turn % 4, (-2, -1))
    return (maps.flip(-1) if turn >= 4 else maps).contiguous()


def score(fitted: Tensor, amounts: Tensor) -> dict[str, float]:
    """Return R2 of each pigment from `[patches, pigments]`."""
    r2 = 1 - (fitted - amounts).square().sum(0) / (amounts - amounts.mean(0)).square().sum(0)
    return dict(zip(PIGMENTS, r2.tolist(), strict=True))


def join(patches: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Concatenate the features and the amounts of several eyes."""
    features, amounts = zip(*patches, strict=True)
    return torch.cat(features), torch.cat(amounts)


def ridge(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """Fit `y [n, q]` to `x [n, C]` with each of `PENALTIES`; return predictions at `at [m, C]`, `[penalties, m, q]`."""
    centre, scale = x.mean(0), x.std(0).clamp(min=1e-6)
    u, s, vt = torch.linalg.svd((x - centre) / scale, full_matrices=False)
    shrunk = s / (s.square() + len(x) * PENALTIES[:, None])  # [penalties, C]
    weights = vt.T @ (shrunk[:, :, None] * (u.T @ (y - y.mean(0))))
    return y.mean(0) + ((at - centre) / scale) @ weights
