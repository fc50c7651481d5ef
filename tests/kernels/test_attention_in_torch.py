"""Attention under torch.compile, torch.export, autocast and gradcheck, and what it copies."""

import pytest
import torch

from mmmae_kernels import attention, concat_attention
from mmmae_kernels.cpu import library as native
from tests.cases.case import draw
from tests.kernels.attention_stand_ins import STAND_INS

pytestmark = pytest.mark.xdist_group("compile")  # one process loads the compiler
needs_library = pytest.mark.skipif(native.unavailable_reason() is not None, reason=str(native.unavailable_reason()))
HERE = [pytest.param("native", marks=needs_library), "torch_cpu", "sdpa", "eager"]
COPIES = {f"aten::{name}" for name in ("cat", "stack", "copy_", "fill_", "zero_", "clone", "add", "add_")}


def packed(batch=2, tokens=9, dtype=torch.float32, vectors=2, width=8):
    qkv = draw(batch, tokens, 3, 2, width).to(dtype).requires_grad_()
    guides = draw(batch, vectors, 2, 2, width, seed=1).to(dtype).requires_grad_()
    present = torch.arange(vectors) < torch.arange(batch)[:, None]
    return qkv, guides, present


def copies(run):
    """Return name and shapes of every copy, fill and addition of a run, those inside of operators included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        run()
    return [(event.name, event.input_shapes) for event in profile.events() if event.name in COPIES]


@needs_library
def test_native_attention_copies_nothing():
    qkv, _, _ = packed()
    grad = draw(2, 9, 2, 8).float()
    apart = [qkv.detach()[:, :, place].requires_grad_() for place in range(3)]
    keys = draw(2, 5, 2, 2, 8).float().requires_grad_()
    for leaves in ([qkv], [apart[0], keys], apart):
        assert (
            copies(lambda leaves=leaves: torch.autograd.grad(attention(*leaves, backend="native"), leaves, grad)) == []
        )
    views = qkv.unbind(2)  # whose gradients autograd packs
    assert copies(lambda: torch.autograd.grad(attention(*views, backend="native"), qkv, grad)) != []


@needs_library
def test_guidance_copies_nothing_of_the_tokens_and_adds_to_their_queries_in_place():
    qkv, vectors, present = packed(tokens=50)
    grad = draw(2, 50, 2, 8).float()

    def run():
        return torch.autograd.grad(concat_attention(qkv, vectors, present, backend="native"), (qkv, vectors), grad)

    events = copies(run)
    assert [name for name, _ in events].count("aten::cat") == 1  # of the gradients of the vectors' keys and values
    assert not any([2, 50, 3, 2, 8] in shapes for _, shapes in events)
    assert ("aten::add_", [[2, 50, 2, 8], [2, 50, 2, 8], []]) in events


@pytest.mark.parametrize("backend", HERE[:-1])  # `eager` is traced below, by export
def test_a_call_compiles_in_one_graph_for_any_size(backend):
    torch._dynamo.reset()

    def function(qkv, vectors, present):
        return attention(qkv, backend=backend), concat_attention(qkv, vectors, present, backend=backend)

    graph = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, tokens in ((2, 9), (3, 17)):
        arguments = packed(batch, tokens)
        results = []
        for call in (graph, function):
            outputs = call(*arguments)
            gradients = torch.autograd.grad(sum(output.square().sum() for output in outputs), arguments[:2])
            results.append([*outputs, *gradients])
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", [name for name in STAND_INS if name != "torch_efficient"])
def test_a_librarys_call_compiles_in_one_graph(on_gpu, backend):
    on_gpu("sm90", backend)
    torch._dynamo.reset()

    def function(qkv, vectors, present):
        return attention(qkv), concat_attention(qkv, vectors, present)

    arguments = packed(dtype=torch.float16)
    results = []
    for call in (torch.compile(function, fullgraph=True, backend="aot_eager"), function):
        outputs = call(*arguments)
        gradients = torch.autograd.grad(sum(output.float().square().sum() for output in outputs), arguments[:2])
        results.append([*outputs, *gradients])
    torch.testing.assert_close(*results)
    torch._dynamo.reset()


class Both(torch.nn.Module):
    """Calls both, and attention to keys that may be absent."""

    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def forward(self, qkv, vectors, present):
        guided = concat_attention(qkv, vectors, present, backend=self.backend)
        keys = vectors.detach()
        return attention(qkv, backend=self.backend) + guided, attention(
            guided, keys, key_present=present, backend=self.backend
        )


@pytest.mark.parametrize("backend", [HERE[0], *HERE[2:], "auto"])  # those that take absent keys
def test_a_module_is_exported_for_any_size(backend):
    module = Both(backend)
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    shapes = ({0: batch, 1: tokens}, {0: batch}, {0: batch})
    with torch.no_grad():
        exported = torch.export.export(module, packed(3, 7), dynamic_shapes=shapes)
        for arguments in (packed(3, 7), packed(2, 11)):
            torch.testing.assert_close(exported.module()(*arguments), module(*arguments))


@pytest.mark.parametrize("backend", ["sdpa", "eager", "auto"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_decides_the_type(backend, dtype):
    qkv, vectors, present = packed()
    with torch.autocast("cpu", dtype):
        outputs = attention(qkv, backend=backend), concat_attention(qkv, vectors, present, backend=backend)
        assert attention(qkv.detach().double(), backend=backend).dtype == torch.float64
        if dtype == torch.float16:
            with pytest.raises(ValueError, match="backend 'native' does not support this call: "):
                attention(qkv, backend="native")
    for output in outputs:
        assert output.dtype == dtype
    for gradient in torch.autograd.grad(sum(output.sum() for output in outputs), (qkv, vectors)):
        assert gradient.dtype == torch.float32
    plain = attention(qkv.to(dtype), backend=backend)
    torch.testing.assert_close(outputs[0], plain, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", STAND_INS)
def test_autocast_rounds_nothing_of_a_merge_but_its_arguments(on_gpu, backend):
    on_gpu("sm90", backend)
    qkv, vectors, present = packed(width=32)
    halves = qkv.bfloat16(), vectors.bfloat16()
    out = concat_attention(*halves, present)
    grad = torch.ones_like(out)
    expected = torch.autograd.grad(out, halves, grad)
    with torch.autocast("cpu", torch.bfloat16):
        cast = concat_attention(qkv, vectors, present)
        gradients = torch.autograd.grad(cast, (qkv, vectors), grad)
    assert torch.equal(cast, out)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert torch.equal(gradient, wanted.float())


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_finite_differences(backend, masked):
    qkv, vectors, present = packed(tokens=3, dtype=torch.float64, width=4)
    key_present = torch.tensor([[False] * 3, [True, False, True]]) if masked else None

    def plain(qkv):
        return attention(*qkv.unbind(2), key_present=key_present, backend=backend)

    def guided(qkv, vectors):
        return concat_attention(qkv, vectors, present, backend=backend)

    assert torch.autograd.gradcheck(plain, (qkv,))
    assert torch.autograd.gradcheck(guided, (qkv, vectors))


@needs_library
def test_a_second_derivative_is_refused_by_kernels_and_given_by_eager():
    qkv, vectors, present = packed()
    for backend in ("native", "eager"):
        for out in (attention(qkv, backend=backend), concat_attention(qkv, vectors, present, backend=backend)):
            if backend == "eager":
                (gradient,) = torch.autograd.grad(out.sum(), qkv, create_graph=True)
                assert torch.autograd.grad(gradient.sum(), qkv)[0].any()
            else:
                with pytest.raises(RuntimeError, match="can't be differentiated again"):
                    torch.autograd.grad(out.sum(), qkv, create_graph=True)
