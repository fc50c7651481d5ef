"""The models that are compared on a task: ours, the reference in its variants, and peers from PyPI, by name."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import mmmae

OURS = ("fast", "fast, compiled")
REFERENCES = ("reference, plain", "reference, SDPA", "reference, SDPA, compiled")
PEERS = ("ViTMAE, SDPA", "VideoMAE, SDPA")
CONTENDERS = (*OURS, *REFERENCES, *PEERS)
COMPILED = ("fast, compiled", "reference, SDPA, compiled")


@dataclasses.dataclass(frozen=True)
class Task:
    """Work that can be given to each contender.

    Args:
        kind: `training step`, forward and backward without the optimizer, or `encoding` of all tokens.
        preset: name of the model's config.
        batch: number of samples.
        aux: whether samples come with all auxiliary images.
        overrides: fields of the config to change, and their values.
        device: `cpu` or `cuda`.
        dtype: `float32`, or the type that autocast computes in.
    """

    kind: str
    preset: str = "base"
    batch: int = 4
    aux: bool = False
    overrides: tuple[tuple[str, Any], ...] = ()
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def config(self) -> mmmae.MMMAEConfig:
        """The config of the model."""
        overrides = dict(self.overrides)
        return mmmae.MMMAEConfig.preset(self.preset, **(overrides if self.aux else {"aux": {}, **overrides}))

    @property
    def title(self) -> str:
        """The task in words, without its kind: `base, batch 4, all auxiliary images`."""
        parts = [self.preset, f"batch {self.batch}", *(["all auxiliary images"] if self.aux else [])]
        parts += [f"{field} {value}" for field, value in self.overrides]
        return ", ".join(parts if self.dtype == "float32" else [*parts, self.dtype])


class Work:
    """A contender with its model and data in memory.

    Args:
        contender: one of `CONTENDERS`.
        task: the work to do.

    Raises:
        ValueError: if the contender can't do the task; the message says why.
    """

    def __init__(self, contender: str, task: Task) -> None:
        torch.manual_seed(0)
        self.contender, self.task = contender, task
        self.model, self.forward = MAKERS[contender](task)
        self.model.requires_grad_(task.kind != "encoding")
        self.parameters = dict(self.model.named_parameters())

    def run(self, dtype: str | None = None) -> dict[str, Tensor]:
        """Do the work once, in the task's type or in `dtype`, and return the outputs and the parameters' gradients."""
        dtype = dtype or self.task.dtype
        autocast = nullcontext() if dtype == "float32" else torch.autocast(self.task.device, getattr(torch, dtype))
        if self.task.kind == "encoding":
            with torch.inference_mode(), autocast:
                return {"tokens": self.forward()}
        self.model.zero_grad(set_to_none=True)
        with autocast:
            loss = self.forward()
        torch.autograd.backward(loss)
        gradients = {name: parameter.grad for name, parameter in self.parameters.items() if parameter.grad is not None}
        return {"loss": loss.detach(), **gradients}

    @property
    def held_bytes(self) -> int:
        """Bytes of parameters, their gradients and the data, which stay between two runs."""
        parameters = list(self.parameters.values())
        tensors = [*parameters, *(parameter.grad for parameter in parameters if parameter.grad is not None)]
        hsi, aux = _data(self.task)
        return sum(tensor.nbytes for tensor in (*tensors, hsi, *aux.values()))


def _data(task: Task) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the volume `[B, C, T, H, W]` and the auxiliary images, the same for every contender."""
    config = task.config
    generator = torch.Generator().manual_seed(1)
    size = (config.image_size, config.image_size)
    hsi = torch.randn(task.batch, config.in_channels, config.bands, *size, generator=generator)
    aux = {name: torch.randn(task.batch, count, *size, generator=generator) for name, count in config.aux.items()}
    return hsi.to(task.device), {name: image.to(task.device) for name, image in aux.items()}


Model = mmmae.FastModel | mmmae.ReferenceModel
Made = tuple[nn.Module, Callable[[], Tensor]]


def _ours(make: Callable[[mmmae.MMMAEConfig], Model], compiled: bool, task: Task) -> Made:
    hsi, aux = _data(task)
    model = make(task.config).to(task.device)
    if task.kind == "encoding":
        encoder: nn.Module = model.hsi_encoder().eval()
        call = torch.compile(encoder) if compiled else encoder
        return encoder, lambda: call(hsi)
    if compiled:
        model.compile()
    return model, lambda: model(hsi, aux, seed=0).loss


def _vit_mae(task: Task) -> Made:
    """Make ViTMAE on images with a channel a band, in smaller patches: as many tokens of as many numbers."""
    config = task.config
    groups, rows, _ = config.grid
    split = _root(groups)
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    hsi = _data(task)[0].flatten(1, 2)
    peer: nn.Module = ViTMAEForPreTraining(
        ViTMAEConfig(
            **_same_blocks(config),
            image_size=config.image_size,
            patch_size=config.image_size // (rows * split),
            num_channels=hsi.shape[1],
            mask_ratio=config.mask_ratio,
        )
    )
    peer.to(task.device)
    noise = torch.rand(task.batch, config.tokens, device=task.device)
    return peer, lambda: peer(hsi, noise=noise).loss


def _video_mae(task: Task) -> Made:
    """Make VideoMAE on grey videos, two frames a tubelet: as many tokens, of two thirds as many numbers."""
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    config = task.config
    groups, _, _ = config.grid
    video = torch.randn(task.batch, 2 * groups, 1, config.image_size, config.image_size, device=task.device)
    peer: nn.Module = VideoMAEForPreTraining(
        VideoMAEConfig(
            **_same_blocks(config),
            image_size=config.image_size,
            patch_size=config.patch[1],
            num_frames=2 * groups,
            tubelet_size=2,
            num_channels=1,
            norm_pix_loss=True,
        )
    )
    peer.to(task.device)
    masked = torch.ones(task.batch, config.tokens, dtype=torch.bool, device=task.device)
    for row in masked:
        row[torch.randperm(config.tokens)[: config.keep]] = False
    return peer, lambda: peer(video, bool_masked_pos=masked).loss


def _same_blocks(config: mmmae.MMMAEConfig) -> dict[str, Any]:
    """Return what both peers have in common with our model, by transformers' names."""
    return {
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": round(config.dim * config.mlp_ratio),
        "decoder_hidden_size": config.decoder_dim,
        "decoder_num_hidden_layers": config.decoder_depth,
        "decoder_num_attention_heads": config.decoder_heads,
        "decoder_intermediate_size": round(config.decoder_dim * config.plain_mlp_ratio),
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "attn_implementation": "sdpa",
    }


def _root(groups: int) -> int:
    root = math.isqrt(groups)
    if root * root != groups:
        raise ValueError(f"ViTMAE: {groups} groups of bands can't become smaller patches, expected a square such as 4")
    return root


def _reference(attention: str) -> Callable[[mmmae.MMMAEConfig], Model]:
    return functools.partial(mmmae.reference_model, attention=attention)


def refuses(contender: str) -> str | None:
    """Return None where a contender can run here, or which package it lacks."""
    if contender in PEERS and importlib.util.find_spec("transformers") is None:
        return f"{contender} needs transformers: pip install '.[peers]'"
    return None


MAKERS: dict[str, Callable[[Task], Made]] = {
    "fast": functools.partial(_ours, mmmae.fast_model, False),
    "fast, compiled": functools.partial(_ours, mmmae.fast_model, True),
    "reference, plain": functools.partial(_ours, _reference("eager"), False),
    "reference, SDPA": functools.partial(_ours, _reference("sdpa"), False),
    "reference, SDPA, compiled": functools.partial(_ours, _reference("sdpa"), True),
    "ViTMAE, SDPA": _vit_mae,
    "VideoMAE, SDPA": _video_mae,
}
