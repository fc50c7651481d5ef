"""Every operator as torch.library wants it, and the ops under torch.compile, torch.export and autocast."""

import dataclasses

import pytest
import torch

import mmmae
import mmmae_kernels
from mmmae_kernels import use_backend
from mmmae_kernels.cpu import library as native
from tests.cases.case import check, draw_ids
from tests.cases.ops import CASES

pytestmark = pytest.mark.xdist_group("compile")  # one process loads the compiler
needs_library = pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason()))


def rand(*shape, grad=False):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).requires_grad_(grad)


ops = torch.ops.mmmae
IDS, MASKED = draw_ids(2, 3, 8), draw_ids(2, 5, 8)
PRESENT = torch.tensor([[True, False, True], [False, False, False]])
OPERATORS = {
    "philox_noise": (ops.philox_noise, (torch.tensor(7), torch.arange(3), 10, 1)),
    "random_masking": (ops.random_masking, (2, 10, 4, torch.tensor(7), torch.device("cpu"), 0, "native")),
    "patch_embed": (
        ops.patch_embed,
        (rand(2, 1, 6, 16, 16), rand(5, 1, 3, 8, 8), rand(5), IDS, rand(8, 5), "native"),
    ),
    "patch_embed_backward": (
        ops.patch_embed_backward,
        (
            rand(2, 3, 5),
            rand(2, 1, 6, 16, 16),
            rand(5, 1, 3, 8, 8),
            IDS,
            [True, True, True, True],
            "native",
        ),
    ),
    "gather_patches": (ops.gather_patches, (rand(2, 1, 6, 16, 16), IDS, [3, 8, 8], "native")),
    "scatter_patches": (
        ops.scatter_patches,
        (rand(2, 3, 192), IDS, [3, 8, 8], [2, 1, 6, 16, 16], "native"),
    ),
    "masked_l2_loss": (
        ops.masked_l2_loss,
        (rand(2, 5, 6), rand(2, 8, 6), MASKED, torch.ones(2, 5), True, True, "native"),
    ),
    "patch_l2_loss": (
        ops.patch_l2_loss,
        (
            rand(2, 5, 6),
            rand(2, 1, 6, 16, 16),
            rand(6, 1, 3, 8, 8),
            rand(6),
            MASKED,
            None,
            False,
            True,
            "native",
        ),
    ),
    "decoder_tokens": (ops.decoder_tokens, (rand(2, 3, 6), rand(6), draw_ids(2, 8, 8), rand(8, 6), "native")),
    "decoder_tokens_backward": (
        ops.decoder_tokens_backward,
        (rand(2, 8, 6), draw_ids(2, 8, 8), 3, "native"),
    ),
    "add_layer_norm": (
        ops.add_layer_norm,
        (rand(2, 3, 6), rand(2, 3, 6), rand(6), rand(6), rand(6), 1e-6, torch.float32, "native"),
    ),
    "add_layer_norm_backward": (
        ops.add_layer_norm_backward,
        (
            None,
            rand(2, 3, 6),
            rand(2, 3, 6),
            rand(6),
            rand(6),
            torch.ones(2, 6),
            torch.zeros(32, dtype=torch.int32),
            torch.float32,
            torch.bfloat16,
            "native",
        ),
    ),
    "attention": (ops.attention, ([rand(2, 5, 3, 2, 8)], None, "native")),
    "attention_backward": (
        ops.attention_backward,
        (
            rand(2, 5, 2, 8),
            [rand(2, 5, 2, 8), rand(2, 7, 2, 2, 8)],
            torch.arange(7).expand(2, 7) < 4,
            rand(2, 5, 2, 8),
            rand(2, 2, 5),
            "native",
        ),
    ),
    "merge_vectors": (
        ops.merge_vectors,
        (rand(2, 5, 2, 8), rand(2, 5, 2, 8), rand(2, 2, 5), rand(2, 3, 2, 2, 8), PRESENT, "native"),
    ),
    "merge_vectors_backward": (
        ops.merge_vectors_backward,
        (
            rand(2, 5, 2, 8),
            rand(2, 5, 2, 8),
            rand(2, 5, 2, 8),
            rand(2, 2, 5),
            rand(2, 3, 2, 2, 8),
            PRESENT,
            rand(2, 5, 2, 8),
            "native",
        ),
    ),
    "gelu": (ops.gelu, (rand(2, 3, 6), rand(6), "native")),
    "gelu_backward": (
        ops.gelu_backward,
        (rand(2, 3, 6), rand(2, 3, 6), rand(6), torch.zeros(32, dtype=torch.int32), "native"),
    ),
}


@needs_library
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_is_well_formed(name):
    operator, arguments = OPERATORS[name]
    torch.library.opcheck(operator.default, arguments)


def test_every_operator_is_checked():
    names = torch._C._dispatch_get_all_op_names()
    assert set(OPERATORS) == {name.removeprefix("mmmae::") for name in names if name.startswith("mmmae::")}


def floats(case):
    return {name: t.float() if t is not None and t.is_floating_point() else t for name, t in case.make().items()}


def leaves_of(case, inputs):
    """Set requires_grad on the inputs that get a gradient, and return them."""
    return {
        name: tensor.requires_grad_()
        for name, tensor in inputs.items()
        if tensor is not None and tensor.is_floating_point() and name not in case.constant
    }


def gradients(outputs, leaves):
    return torch.autograd.grad(sum(output.square().sum() for output in outputs), leaves, allow_unused=True)


@pytest.mark.parametrize("case", [case for case in CASES if case.small and case.op != "patchify"], ids=str)
def test_the_definitions_gradients_are_those_of_finite_differences(case):
    inputs = case.make()  # in float64
    leaves = leaves_of(case, inputs)

    def function(*tensors):
        return tuple(case.define({**inputs, **dict(zip(leaves, tensors, strict=True))}))

    # One random direction instead of every element: a wrong gradient shows all the same.
    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


COMPILED = {case.op: case for case in reversed(CASES) if case.small}
# The conditioning step is compiled with the model, tests/model/test_compile.py.
each_op = pytest.mark.parametrize("op", [op for op in COMPILED if op != "conditioning"])
BATCHED = {"volume", "ids", "prediction", "target", "weights", "visible", "ids_restore", "x", "residual"}


@each_op
def test_an_op_compiles_in_one_graph_for_any_batch(op):
    check_compiled(op)


def check_compiled(op, dynamic=None):
    """Compile an op for batches of any size, with `dynamic` for any size of all tensors; compare with eager mode."""
    case = COMPILED[op]
    inputs = floats(case)
    torch._dynamo.reset()  # the cases share code, and each compiles anew
    graph = torch.compile(lambda given: case.call(given), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for copies in (1, 2, 3):
        given = dict(inputs)
        for name in BATCHED & {name for name, tensor in inputs.items() if tensor is not None}:
            given[name] = torch.cat([inputs[name]] * copies)
            torch._dynamo.mark_dynamic(given[name], 0)  # a graph for one size alone is an error
        leaves = list(leaves_of(case, given).values())
        ours, eager = graph(given), case.call(given)
        torch.testing.assert_close(list(ours), list(eager))
        if leaves:
            torch.testing.assert_close(gradients(ours, leaves), gradients(eager, leaves))


@pytest.mark.parametrize("kernels", ["auto", "eager"])
def test_the_encoder_is_exported(kernels):
    encoder = mmmae.fast_model("tiny", kernels=kernels).hsi_encoder().eval()
    hsi = torch.randn(2, 1, 12, 224, 224)
    exported = torch.export.export(encoder, (hsi,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with torch.no_grad():
        for batch in (hsi, torch.randn(3, 1, 12, 224, 224)):
            torch.testing.assert_close(exported.module()(batch), encoder(batch))


@pytest.mark.parametrize("op", COMPILED)
def test_autocast_gives_results_the_dtypes_of_the_definition(op):
    """In whatever runs here; how much kernels may err is tested in test_equality_of_ops.py and test_emulated.py."""
    case = COMPILED[op]
    inputs = floats(case)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, theirs in zip(case.call(inputs), case.define(inputs), strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@needs_library
@pytest.mark.parametrize("op", COMPILED)
def test_a_hundred_repeats_are_bitwise_equal(op):
    case = COMPILED[op]
    inputs = floats(case)
    leaves = list(leaves_of(case, inputs).values())

    def run():
        outputs = list(case.call(inputs))
        return [*outputs, *gradients(outputs, leaves)] if leaves else outputs

    with use_backend("native"):
        first = run()
        assert all(all(map(torch.equal, run(), first)) for _ in range(99))


def test_a_wrong_op_does_not_pass_and_none_is_left_out(monkeypatch):
    others = {"random_masking", "attention", "concat_attention", "conditioning"}
    # Stacked blocks are no public function; the kernels under them are those of others.
    assert {case.op for case in CASES} - {"stacked_blocks"} | others == set(mmmae_kernels.explain())
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda hidden: hidden)
    case = next(case for case in CASES if case.op == "gelu_linear")
    wrong = dataclasses.replace(case, define=lambda i: [2 * i["x"] @ i["weight"].T + i["bias"]])
    with pytest.raises(AssertionError, match="gelu_linear: odd: result 0 is off"):
        check(wrong, torch.float32)
