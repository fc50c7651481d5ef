"""What a GPU would launch in a training step under autocast: bounds for `base`, and that it is counted right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mmmae
from mmmae.cost.components import Traced, components_of
from mmmae.cost.costs import Cost, StepCost, total
from mmmae.cost.counting import count_operators, count_step
from mmmae.cost.gpu import ATTENTION, on_gpu
from mmmae_kernels import explain, gelu_linear, use_backend

pytest.importorskip("triton", reason="needs triton")

# By auxiliary images: launches of forward and backward, and how many of them only convert a dtype. They may only fall.
MOST = {"three images": (832, 35), "no images": (477, 11)}
MOST_OF_UPDATE = 64  # launches of the optimizer with clipping, and of the figures of a step
TARGET, BATCH = "sm90", 8


def model_of(images: str, preset: str = "base") -> mmmae.FastModel:
    with torch.device("meta"):
        fields = {"aux": {}} if images == "no images" else {}
        return mmmae.FastModel(mmmae.MMMAEConfig.preset(preset, **fields), "triton", ATTENTION)


def step_of(images: str, preset: str = "base") -> StepCost:
    return count_step(model_of(images, preset), BATCH, autocast=torch.bfloat16, target=TARGET)


@pytest.mark.parametrize("images", MOST)
def test_a_step_under_autocast_launches_and_casts_no_more_than_before(images):
    step = step_of(images)
    launches, casts = MOST[images]
    assert step.launches <= launches
    assert step.casts <= casts


def test_clipping_and_the_optimizer_add_few_launches_to_a_step():
    model = model_of("three images")
    traced = Traced(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step = mmmae.TrainingStep(model, optimizer, clip=1.0, autocast=torch.bfloat16)
    step._rates = [torch.zeros(()) for _ in optimizer.param_groups]  # read from memory, as on a GPU
    hsi, *images = traced.inputs(BATCH)
    steps = [
        total(count_operators(lambda: step(hsi, dict(zip(model.config.aux, images, strict=True))), traced, TARGET))
        for _ in range(2)  # the first one makes the optimizer's state
    ]
    added = steps[1].launches - step_of("three images").launches
    assert 0 < added <= MOST_OF_UPDATE
    assert steps[1].launches <= 900


def test_every_operator_of_both_passes_belongs_to_a_component():
    model = model_of("three images", "tiny")
    step = count_step(model, 2, autocast=torch.bfloat16, target=TARGET)
    found = {operator.component for operator in step.operators}
    each_encoder = {f"aux_encoders.{name}" for name in model.config.aux}
    assert found == {*components_of(model), "aux_encoders"} - each_encoder  # they are computed as one
    backward = {operator.component for operator in step.operators if operator.name.endswith("backward")}
    assert backward >= {"blocks", "conditioning", "decoder.blocks", "aux_encoders"}


def test_a_batched_product_with_a_bias_copies_the_bias_first():
    bias, a, b = torch.empty(3, 1, 4), torch.empty(3, 5, 6), torch.empty(3, 6, 4)
    (product,) = count_operators(lambda: torch.baddbmm(bias, a, b))
    assert (product.cost.macs, product.cost.launches) == (3 * 5 * 6 * 4, 2)


def test_batched_products_of_half_precision_into_float32_are_counted():
    a, b = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((3, 5, 6), (3, 6, 4)))
    (product,) = count_operators(lambda: torch.bmm(a, b, out_dtype=torch.float32))
    assert product.cost == Cost(3 * 5 * 6 * 4, 3 * (2 * (5 * 6 + 6 * 4) + 4 * 5 * 4), 1)


def test_multiply_adds_are_those_that_a_cpu_is_counted_to_do():
    with torch.device("meta"):
        eager = mmmae.FastModel(mmmae.MMMAEConfig.preset("tiny", aux={}), "eager", "sdpa")
    on_cpu = count_step(eager, BATCH).total
    step = step_of("no images", "tiny")
    assert step.total.macs == on_cpu.macs
    assert step.total.bytes < on_cpu.bytes


def test_launches_of_triton_casts_and_operators_of_torch_are_listed_in_order():
    hidden = torch.empty(4, 8, dtype=torch.bfloat16)
    weight, bias = torch.empty(2, 8), torch.empty(2)

    def function() -> Tensor:
        with use_backend("triton"), torch.autocast("cpu", torch.bfloat16):
            return gelu_linear(hidden, weight, bias)

    *casts, gelu, product = sorted(count_operators(function, target=TARGET), key=lambda operator: not operator.is_cast)
    assert [operator.name for operator in casts] == ["aten::_to_copy"] * 2
    assert sum(operator.cost.bytes for operator in casts) == (4 + 2) * (2 * 8 + 2)
    assert (gelu.name, gelu.cost) == ("_gelu_forward", Cost(0, 2 * 2 * 4 * 8, 1))
    assert (product.name, product.cost) == ("aten::addmm", Cost(2 * 4 * 8, 2 * (4 * 8 + 2 * 8 + 2 + 4 * 2), 1))


def test_autocast_has_the_rules_of_cuda():
    x, norm = torch.empty(4, 8, dtype=torch.bfloat16), nn.LayerNorm(8)
    with on_gpu(TARGET), torch.autocast("cpu", torch.bfloat16):
        found = [x.softmax(-1), x.square(), norm(x), F.cross_entropy(x, torch.zeros(4, dtype=torch.int64)), F.gelu(x)]
    assert [tensor.dtype for tensor in found] == [torch.float32] * 4 + [torch.bfloat16]


def test_tensors_claim_to_be_on_a_gpu_in_backward_too():
    claims = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: claims.append((grad.is_cuda, grad.is_cpu)))
    with on_gpu(TARGET):
        x.sum().backward()
    assert claims == [(True, False)]


def test_the_stand_in_for_a_gpu_leaves_nothing_behind():
    x = torch.ones(2)
    before = explain("attention")
    with on_gpu(TARGET):
        assert x.is_cuda
        assert not x.is_cpu
        assert explain("attention")[ATTENTION] == explain("gelu_linear")["triton"] == "serves"
    assert not x.is_cuda
    assert explain("attention") == before


@pytest.mark.parametrize(
    ("tensors", "elements", "launches"),
    [(1, 8, 1), (64, 8, 1), (65, 8, 2), (128, 8, 2), (1, 65536 * 320, 1), (1, 65536 * 320 + 1, 2), (3, 65536 * 200, 2)],
)
def test_a_copy_of_a_list_launches_a_kernel_for_so_many_tensors_and_elements(tensors, elements, launches):
    """Of two lists, a kernel takes 64 tensors and 320 blocks of 65536 elements."""
    sources = [torch.empty(1).expand(elements) for _ in range(tensors)]
    targets = [torch.empty(1, dtype=torch.bfloat16).expand(elements) for _ in range(tensors)]
    (copy,) = count_operators(lambda: torch._foreach_copy_(targets, sources))
    assert copy.is_cast
    assert copy.cost.launches == launches


def test_operators_that_write_to_their_arguments_compute_nothing():
    x, ids = torch.zeros(3), torch.zeros(3, dtype=torch.int64)

    def function() -> None:
        assert x.add_(1) is x
        torch._foreach_add_([x], 1)
        ids.add_(1)

    operators = count_operators(function)
    assert [operator.cost.bytes for operator in operators] == [2 * 12, 2 * 12, 2 * 24]
    assert (x.tolist(), ids.tolist()) == ([0, 0, 0], [1, 1, 1])
