"""Exact counts: the budget, multiply-adds against closed forms, the state dict, and what a training step saves."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import mmmae
from bench.op_cases import CASES
from bench.op_work import BACKENDS, Place, Run
from bench.suite import Suite
from mmmae.cost.components import blank_copy
from mmmae.cost.counting import count
from mmmae.cost.launches import flop_counter

PRESETS = ("base", "vit", "tiny")


def test_base_is_within_its_budget(suite: Suite) -> None:
    base = suite.report("base")
    assert base.out_of_budget == []
    assert 90e6 <= base.pretraining.total.parameters <= 110e6
    assert 10.8e9 <= base.encoder.total.macs <= 13.2e9


def test_vit_costs_what_it_says(suite: Suite) -> None:
    vit = suite.report("vit")
    assert round(vit.pretraining.total.parameters / 1e6) == 151
    assert round(vit.encoder.total.macs / 1e9, 1) == 23.3


@pytest.mark.parametrize("preset", PRESETS)
def test_the_two_counters_and_the_closed_form_agree(suite: Suite, preset: str) -> None:
    """`profile` raises where torch's counter and fvcore's disagree in a component."""
    found = suite.report(preset)
    counted = {row.component: row.macs for row in found.pretraining.rows if row.macs}
    assert counted == fast_macs(found.config)
    everything = {row.component: row.macs for row in found.encoder_all.rows}
    assert everything == encoder_macs(found.config, found.config.tokens)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_references_counters_and_the_closed_form_agree(attention: str) -> None:
    config = mmmae.MMMAEConfig.preset("tiny")
    with torch.device("meta"):
        model = mmmae.ReferenceModel(config, attention)
    counted = {component: cost.macs for component, cost in count(blank_copy(model), 1).items() if cost.macs}
    assert counted == reference_macs(config)


def linear(rows: int, inputs: int, outputs: int) -> int:
    return rows * inputs * outputs


def attention(queries: int, keys: int, dim: int) -> int:
    return 2 * queries * keys * dim  # scores, and the mix of values


def block(tokens: int, dim: int, ratio: float) -> int:
    hidden = round(ratio * dim)
    mlp = linear(tokens, dim, hidden) + linear(tokens, hidden, dim)
    return linear(tokens, dim, 3 * dim) + attention(tokens, tokens, dim) + linear(tokens, dim, dim) + mlp


def encoder_macs(config: mmmae.MMMAEConfig, tokens: int) -> dict[str, int]:
    pt, ph, pw = config.patch
    return {
        "patch_embed": linear(tokens, config.in_channels * pt * ph * pw, config.dim),
        "blocks": config.depth * block(tokens, config.dim, config.mlp_ratio),
    }


def fast_macs(config: mmmae.MMMAEConfig) -> dict[str, int]:
    """Return the multiply-adds of each component, for one sample with all modalities, derived by hand."""
    keep, tokens, dim, width, hidden = config.keep, config.tokens, config.dim, config.decoder_dim, config.aux_dim
    masked, modalities = tokens - keep, len(config.aux)
    pt, ph, pw = config.patch
    macs = Counter(encoder_macs(config, keep))

    patches = (config.image_size // config.aux_patch) ** 2
    for name, channels in config.aux.items():
        macs[f"aux_encoders.{name}"] = linear(patches, channels * config.aux_patch**2, hidden)
        macs[f"aux_encoders.{name}"] += config.aux_depth * block(patches, hidden, 4)

    step = linear(keep, dim, 3 * dim) + linear(modalities, dim, 2 * dim)  # the vectors get no query
    step += attention(keep, keep + modalities, dim) + linear(keep, dim, dim)
    macs["conditioning"] = modalities * linear(1, hidden, dim) + config.conditioning_depth * step

    last = linear(masked, width, width) + linear(tokens, width, 2 * width) + attention(masked, tokens, width)
    last += linear(masked, width, width) + linear(masked, width, 4 * width) + linear(masked, 4 * width, width)
    macs["decoder.embed"] = linear(keep, dim, width)
    macs["decoder.blocks"] = (config.decoder_depth - 1) * block(tokens, width, 4) + last
    macs["decoder.pred"] = linear(masked, width, dim)
    macs["loss"] = linear(masked, config.in_channels * pt * ph * pw, dim)
    macs["contrastive"] = linear(1, dim, hidden) + modalities * hidden
    return dict(macs)


def reference_macs(config: mmmae.MMMAEConfig) -> dict[str, int]:
    """Return the same for the plain model, which does more for the same numbers."""
    keep, tokens, dim, width, modalities = config.keep, config.tokens, config.dim, config.decoder_dim, len(config.aux)
    macs = fast_macs(config)
    del macs["loss"]  # all embeddings exist already
    macs["patch_embed"] = encoder_macs(config, tokens)["patch_embed"]
    joined = keep + modalities
    step = linear(joined, dim, 3 * dim) + attention(joined, joined, dim) + linear(joined, dim, dim)
    macs["conditioning"] = modalities * linear(1, config.aux_dim, dim) + config.conditioning_depth * step
    macs["decoder.blocks"] = config.decoder_depth * block(tokens, width, 4)
    macs["decoder.pred"] = linear(tokens, width, dim)
    macs["contrastive"] = modalities * (linear(1, dim, config.aux_dim) + config.aux_dim)
    return macs


@pytest.mark.parametrize("preset", PRESETS)
def test_fast_and_reference_have_the_same_state_dict(preset: str) -> None:
    config = mmmae.MMMAEConfig.preset(preset)
    with torch.device("meta"):
        fast, reference = mmmae.FastModel(config).state_dict(), mmmae.ReferenceModel(config).state_dict()
    assert {name: tensor.shape for name, tensor in fast.items()} == {
        name: tensor.shape for name, tensor in reference.items()
    }


@pytest.mark.parametrize(("preset", "share"), [("base", 0.70), ("vit", 0.65)])
def test_the_fast_model_saves_less_for_backward_and_launches_less(suite: Suite, preset: str, share: float) -> None:
    step = suite.step_costs(preset)
    assert step["fast"].saved_bytes <= share * step["reference sdpa"].saved_bytes
    assert step["fast"].saved_bytes <= 0.5 * step["reference eager"].saved_bytes
    assert step["fast"].launches <= 0.7 * step["reference eager"].launches
    assert step["fast"].launches < step["reference sdpa"].launches


@pytest.mark.parametrize("op", CASES)
def test_the_formula_of_an_op_gives_what_its_pytorch_code_is_counted_to_have(op: str) -> None:
    """Forward and backward. Eager attention keeps its scores and has six products where the others have seven."""
    setup, (baseline, *_) = CASES[op]
    variants = setup(2, Place()).variants
    counted = {name: macs_of(variants[name]) for name in (baseline, "native", "sdpa", *BACKENDS) if name in variants}
    expected = counted.pop(baseline)
    assert counted
    for name, macs in counted.items():
        if "attention" in op and name == "eager":
            assert 7 * macs == 6 * expected
        else:
            assert macs == expected


def macs_of(run: Run) -> int:
    with flop_counter() as counter:
        run()
    return int(counter.get_total_flops()) // 2


def test_the_fast_model_moves_fewer_bytes() -> None:
    """In a forward pass; the same on every machine, as each launch's inputs and outputs are counted once."""
    config = mmmae.MMMAEConfig()
    with torch.device("meta"):
        models = mmmae.FastModel(config), mmmae.ReferenceModel(config, "sdpa"), mmmae.ReferenceModel(config, "eager")
    fast, sdpa, plain = (sum(cost.bytes for cost in count(blank_copy(model), 1).values()) for model in models)
    assert fast <= 0.95 * sdpa
    assert fast <= 0.55 * plain
