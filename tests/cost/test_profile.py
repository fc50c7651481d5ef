"""The cost report: what it counts, and that the counts are right."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import flop_counter

import mmmae
from mmmae.cost import components, counting, launches, mac_formulas
from mmmae.cost.costs import Cost
from mmmae_kernels import attention, use_backend
from mmmae_kernels.attention import costs as attention_costs
from mmmae_kernels.cpu import library as native

pytestmark = [
    pytest.mark.xdist_group("profile"),  # whose reports are counted once
    pytest.mark.usefixtures("one_counter", "no_backend_from_outside"),
]
needs_library = pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason()))


def rows_of(table) -> dict:
    return {row.component: row for row in table.rows}


def test_parameters_are_the_models_own(tiny):
    with torch.device("meta"):
        model = mmmae.ReferenceModel(tiny.config)
        encoder = model.hsi_encoder()
    assert tiny.pretraining.total.parameters == sum(p.numel() for p in model.parameters())
    for table in (tiny.encoder, tiny.encoder_all):
        assert table.total.parameters == sum(p.numel() for p in encoder.parameters())


def test_the_encoder_table_is_the_encoder_of_visible_tokens_without_guidance():
    """Compare with torch's counter on a real forward pass without guidance."""
    model = mmmae.fast_model("tiny", aux={}, attention="eager")
    report = mmmae.profile(model)
    ids = torch.arange(model.config.keep)[None]
    with torch.no_grad(), flop_counter.FlopCounterMode(display=False) as counter:
        model.encode(model.embed(torch.zeros(1, 1, 12, 224, 224), ids), {}, None)
    assert 2 * report.encoder.total.macs == counter.get_total_flops()


@pytest.mark.parametrize(
    ("make", "attention"),
    [
        (mmmae.fast_model, "sdpa"),
        (mmmae.fast_model, "eager"),
        pytest.param(mmmae.fast_model, "native", marks=needs_library),
        (mmmae.reference_model, "sdpa"),
        (mmmae.reference_model, "eager"),
    ],
)
def test_counting_without_computing_gives_what_computing_gives(make, attention):
    """Compare with the ledger of a pass that computes everything."""
    model = make("tiny", attention=attention)
    counted = counting.count(components.blank_copy(model), 2)
    traced = components.Traced(components.blank_copy(model))
    for parameter in traced.parameters():
        nn.init.normal_(parameter, std=0.02)
    inputs = [torch.randn_like(tensor) for tensor in traced.inputs(2)]
    with torch.no_grad(), launches.Ledger(traced) as ledger:
        traced(*inputs)
    assert dict(ledger.by_component) == counted


def booked(function) -> Cost:
    """Return the cost that the ledger records for a function."""
    with torch.no_grad(), launches.Ledger(SimpleNamespace(running=lambda: "it")) as ledger:
        function()
    return ledger.by_component["it"]


def test_a_linear_layer_is_one_launch_that_reads_and_writes_each_element_once():
    x, weight, bias = torch.ones(2, 3), torch.ones(5, 3), torch.ones(5)
    cost = booked(lambda: F.linear(x, weight, bias))
    assert cost == Cost(macs=2 * 3 * 5, bytes=4 * (6 + 15 + 5 + 10), launches=1)


def test_views_and_allocations_are_no_launches():
    x = torch.ones(2, 6)
    assert booked(lambda: x.view(3, 4).t().unsqueeze(0).expand(7, -1, -1).new_empty(5)) == Cost()


def test_launches_of_a_step_are_counted_like_those_of_a_forward_pass():
    x, weight = torch.ones(2, 6), torch.ones(4, 6)
    with launches.Launches() as counted:
        F.linear(x, weight).view(4, 2).t().unsqueeze(0).new_empty(5)
        torch.empty_like(x).copy_(x)
    assert counted.count == 2


def test_a_repeated_element_is_read_once_and_integers_have_their_own_size():
    row, ids = torch.ones(1, 4), torch.zeros(2, 4, dtype=torch.int64)
    cost = booked(lambda: row.expand(1000, 4).gather(0, ids))
    assert cost == Cost(bytes=4 * 4 + 8 * 8 + 4 * 8, launches=1)


def test_saved_bytes_are_those_of_a_real_step():
    model = mmmae.fast_model("tiny")
    hsi, aux = torch.randn(2, 1, 12, 224, 224), {name: torch.randn(2, 1, 224, 224) for name in model.config.aux}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        model(hsi, aux, seed=0)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    expected = sum(size for pointer, size in sizes.items() if pointer not in parameters)
    assert counting.count_step(components.blank_copy(model), 2).saved_bytes == expected


def test_a_step_launches_more_than_its_forward_pass_and_more_with_scores_in_memory(tiny):
    with torch.device("meta"):
        models = [mmmae.FastModel(tiny.config, attention=attention) for attention in ("sdpa", "eager")]
    steps = [counting.count_step(model, 1) for model in models]
    assert tiny.pretraining.total.launches < steps[0].launches < steps[1].launches


def test_backward_multiplies_twice_what_forward_does_less_the_gradients_of_images(tiny):
    """Attention keeps its scores here, so that backward computes nothing again."""
    config = tiny.config
    with torch.device("meta"):
        models = [mmmae.ReferenceModel(config, "eager") for _ in range(2)]
    forward = counting.count(models[0], 2)
    patches = (config.image_size // config.aux_patch) ** 2
    of_images = forward["patch_embed"].macs + 2 * patches * config.aux_patch**2 * config.aux_dim * len(config.aux)
    step = counting.count_step(models[1], 2)
    assert step.total.macs == 3 * sum(cost.macs for cost in forward.values()) - of_images
    assert step.total.bytes > 2 * sum(cost.bytes for cost in forward.values())


def test_operators_of_a_function_are_listed_in_order_at_any_size():
    x, weight = torch.empty(4, 3, requires_grad=True), torch.empty(5, 3)

    def forward_backward():
        (x @ weight.t()).relu().sum().backward()

    costs = [operator.cost for operator in counting.count_operators(forward_backward)]
    products = [cost for cost in costs if cost.macs]
    assert products == [Cost(60, 4 * (12 + 15 + 20), 1), Cost(60, 4 * (20 + 15 + 12), 1)]
    assert costs[0] == products[0]
    assert costs[1] == Cost(bytes=4 * (20 + 20), launches=1)


def test_an_operator_of_others_without_formula_is_an_error_in_a_step_too():
    x, weight = torch.ones(2, 3), torch.ones(4, 3)
    with pytest.raises(RuntimeError, match=r"multiply-adds of test_profile::mystery are unknown"):
        counting.count_operators(lambda: mystery(x, weight))


def test_attention_is_counted_the_same_with_and_without_scores_in_memory(tiny):
    eager = mmmae.profile(mmmae.fast_model("tiny", attention="eager"))
    sdpa = mmmae.profile(mmmae.fast_model("tiny", attention="sdpa"))
    for ours, theirs in zip(eager.pretraining.rows, sdpa.pretraining.rows, strict=True):
        assert (ours.component, ours.macs, ours.parameters) == (theirs.component, theirs.macs, theirs.parameters)
    blocks, fused = rows_of(eager.pretraining)["blocks"], rows_of(sdpa.pretraining)["blocks"]
    assert blocks.launches > fused.launches
    assert blocks.bytes > fused.bytes
    assert fused.macs - 2 * (4 + 4) * 64**2 * 196 == 2 * 2 * 196**2 * 64  # less two blocks' linear layers


@pytest.mark.parametrize(
    "changes",
    [
        {"aux_encoder": "cnn", "decode_fraction": 0.25, "decoder_depth": 3},
        {"aux": {}, "mask_ratio": 0.0},
        {"aux": {"radar": 2, "elevation": 1}, "conditioning_depth": 2, "symmetric": True, "target": "pixels"},
        {"aux": {"ir": 1}, "conditioning_depth": 0, "in_channels": 2, "bands": 6, "image_size": 64},
        {"activation_checkpointing": True, "target": "pixels", "normalize_target": True},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_both_counters_agree_for_any_config(two_counters, changes):
    config = mmmae.MMMAEConfig.preset("tiny", **changes)
    report = mmmae.profile(config)  # raises if they do not
    names = [row.component for row in report.pretraining.rows]
    assert [name for name in names if name.startswith("aux_encoders.")] == [
        f"aux_encoders.{name}" for name in config.aux
    ]
    assert report.pretraining.total.macs > report.encoder.total.macs > 0


def test_the_reference_computes_all_tokens_where_the_fast_model_computes_some(tiny_reference):
    counterpart = rows_of(tiny_reference.fast)
    ratios = {
        row.component: row.macs / counterpart[row.component].macs for row in tiny_reference.pretraining.rows if row.macs
    }
    config = tiny_reference.config
    assert ratios["patch_embed"] == config.tokens / config.keep
    assert ratios["decoder.pred"] == config.tokens / (config.tokens - config.keep)
    assert ratios["blocks"] == ratios["aux_encoders.ir"] == ratios["decoder.embed"] == 1
    assert ratios["decoder.blocks"] > 1
    assert rows_of(tiny_reference.pretraining)["loss"].macs == 0  # it has all embeddings already
    assert counterpart["loss"].macs == 2 * (config.tokens - config.keep) * 768 * config.dim
    assert any("times the multiply-adds" in note for note in tiny_reference.notes)


@pytest.mark.parametrize("make", [mmmae.FastModel, mmmae.ReferenceModel])
def test_a_decoder_of_a_part_sees_and_predicts_that_part(make):
    """In closed form: its blocks have K + M' tokens, and the last block of the fast model has M' queries."""
    config = mmmae.MMMAEConfig.preset("tiny", decode_fraction=0.5, decoder_depth=2)
    with torch.device("meta"):
        model = make(config)
    rows = rows_of(mmmae.profile(model).pretraining)
    decoded, width = config.decoded, config.decoder_dim
    seen = config.keep + decoded
    of_query, of_key = 10 * width**2 + 2 * seen * width, 2 * width**2  # q, proj, mlp, attention; k, v
    if make is mmmae.FastModel:
        assert rows["decoder.blocks"].macs == (seen + decoded) * of_query + 2 * seen * of_key
        assert rows["decoder.pred"].macs == decoded * width * 64
        assert rows["loss"].macs == decoded * 768 * config.dim
    else:
        assert rows["decoder.blocks"].macs == 2 * seen * (of_query + of_key)
        assert rows["decoder.pred"].macs == seen * width * 64
    assert rows["decoder.embed"].macs == config.keep * config.dim * width


def test_recomputing_blocks_keeps_little_for_backward_and_launches_again():
    """The fast model keeps even less than the reference."""
    config = mmmae.MMMAEConfig.preset("base")
    steps = []
    for recompute in (False, True):
        with torch.device("meta"):
            changed = config.replace(activation_checkpointing=recompute)
            models = [make(changed) for make in (mmmae.FastModel, mmmae.ReferenceModel)]
        steps.append([counting.count_step(model, 1) for model in models])
    for plain, lean in zip(*steps, strict=True):
        assert lean.saved_bytes < 0.3 * plain.saved_bytes
        assert lean.launches > plain.launches
    fast, reference = steps[1]
    assert fast.saved_bytes < 0.7 * reference.saved_bytes


def test_a_batch_multiplies_everything_but_parameters_and_the_contrast_of_its_samples(tiny):
    three = mmmae.profile("tiny", batch=3)
    for tables in ((tiny.encoder, three.encoder), (tiny.encoder_all, three.encoder_all)):
        assert 3 * tables[0].total.macs == tables[1].total.macs
    for one, many in zip(tiny.pretraining.rows, three.pretraining.rows, strict=True):
        assert one.parameters == many.parameters
        if one.component == "contrastive":
            pairs = len(tiny.config.aux) * tiny.config.aux_dim
            assert many.macs - 9 * pairs == 3 * (one.macs - pairs)
        else:
            assert 3 * one.macs == many.macs
        assert one.bytes < many.bytes


def test_the_report_does_not_depend_on_the_backend_but_in_bytes_and_launches():
    native, eager = (mmmae.profile(mmmae.fast_model("tiny", kernels=kernels)) for kernels in ("auto", "eager"))
    assert [(row.component, row.macs) for row in native.pretraining.rows] == [
        (row.component, row.macs) for row in eager.pretraining.rows
    ]
    with use_backend("eager"):
        forced = mmmae.profile("tiny")
    assert forced.pretraining == eager.pretraining
    assert eager.kernels.startswith("eager")
    assert forced.kernels.startswith("eager")


def test_profiling_leaves_the_model_and_the_random_numbers_alone():
    model = mmmae.reference_model("tiny")
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    state, forward = torch.get_rng_state(), model.forward
    mmmae.profile(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.forward == forward
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])


@torch.library.custom_op("test_profile::mystery", mutates_args=())
def mystery(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply matrices by an operator that no counter knows."""
    return x @ weight.T


@mystery.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def mysterious_product(layer: nn.Linear, x: Tensor) -> Tensor:
    return mystery(x, layer.weight)


def test_a_matrix_operator_without_formula_is_an_error(two_counters, monkeypatch):
    monkeypatch.setattr("mmmae.model.fast.project", mysterious_product)
    with pytest.raises(RuntimeError, match=r"multiply-adds of test_profile::mystery are unknown.*MAC_FORMULAS"):
        mmmae.profile("tiny")


def test_a_formula_makes_it_known(two_counters, monkeypatch, tiny):
    monkeypatch.setattr("mmmae.model.fast.project", mysterious_product)

    def formula(x, weight):
        return math.prod(x) * weight[0]

    monkeypatch.setitem(mac_formulas.MAC_FORMULAS, "test_profile::mystery", formula)
    assert mmmae.profile("tiny").pretraining.total.macs == tiny.pretraining.total.macs


@pytest.mark.parametrize(
    ("attention", "wrong"),
    [
        ("sdpa", "aten::_scaled_dot_product_flash_attention_for_cpu"),
        ("sdpa", "aten::scaled_dot_product_attention"),
        pytest.param("native", "mmmae::attention", marks=needs_library),
        pytest.param("native", "aten::scaled_dot_product_attention", marks=needs_library),
    ],
)
def test_counters_that_disagree_are_an_error(two_counters, monkeypatch, attention, wrong):
    """Each formula is used by only one of the counters."""
    monkeypatch.setitem(mac_formulas.MAC_FORMULAS, wrong, lambda *shapes: 1)
    with pytest.raises(RuntimeError, match=r"^aux_encoders\.af: torch counts \d+ multiply-adds and fvcore \d+"):
        mmmae.profile(mmmae.fast_model("tiny", attention=attention))


@needs_library
def test_the_operator_of_attention_is_counted_by_its_products_packed_or_not():
    q, k, v = [2, 5, 3, 7], [2, 11, 3, 7], [2, 11, 3, 7]
    product = 2 * 3 * 5 * 11 * 7
    for projected in ([q, k, v], [q, [2, 11, 2, 3, 7]]):
        assert attention_costs.attention_macs(projected, None, "native") == 2 * product
        assert attention_costs.attention_backward_macs(q, projected) == 5 * product
    qkv = torch.randn(2, 5, 3, 3, 7, requires_grad=True)
    with flop_counter.FlopCounterMode(display=False) as counter:
        attention(qkv, backend="native").sum().backward()
    assert counter.get_total_flops() == 2 * (2 + 5) * (2 * 3 * 5 * 5 * 7)


def test_the_formula_of_attention_is_torchs_own():
    shapes = [2, 3, 5, 7], [2, 3, 11, 7], [2, 3, 11, 13]
    assert 2 * mac_formulas.attention_macs(*shapes) == flop_counter.sdpa_flop_count(*shapes)


def test_the_formula_of_einsum_is_that_of_the_product_it_stands_for():
    assert mac_formulas.einsum_macs("bqhd,bkhd->bhqk", [[2, 3, 5, 7], [2, 11, 5, 7]], None) == 2 * 3 * 5 * 7 * 11
    with pytest.raises(RuntimeError, match="3 operands, expected 2"):
        mac_formulas.einsum_macs("a,b,c->abc", [[2], [3], [4]], None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((12,), "model is 12, expected a config, a preset's name, a FastModel or a ReferenceModel"),
        ((nn.Linear(2, 2),), "model is a Linear, expected a config"),
        (("huge",), "preset is 'huge', must be one of base, vit, tiny"),
        (("tiny", 0), "batch is 0, expected a whole number >= 1"),
        (("tiny", 1.5), "batch is 1.5, expected a whole number >= 1"),
        (("tiny", True), "batch is True, expected a whole number >= 1"),
    ],
)
def test_wrong_arguments_are_refused_with_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        mmmae.profile(*arguments)
