"""The adapters to PyTorch's own operators: signatures, versions that are refused, and what differs by platform."""

import contextlib

import pytest
import torch

from mmmae_kernels import attention, concat_attention, counting, explain
from mmmae_kernels.attention.backends import sdpa, torch_cpu, torch_cudnn, torch_efficient, torch_flash, torch_operators
from mmmae_kernels.attention.backends.flash import flash_backend
from mmmae_kernels.attention.op import ATTENTION
from tests.cases.case import draw
from tests.kernels.attention_stand_ins import STAND_INS

GPU_BACKENDS = ("torch_cudnn", "torch_flash", "torch_efficient")

# The arguments that the adapters give, as PyTorch 2.10, 2.11, 2.13 and 2.14 declare them.
SIGNATURES = {
    torch_flash.FORWARD: "query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool, "
    "return_debug_mask: bool, scale: Optional[float]",
    torch_flash.BACKWARD: "grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, "
    "logsumexp: Tensor, cum_seq_q: Tensor, cum_seq_k: Tensor, max_q: int, max_k: int, dropout_p: float, "
    "is_causal: bool, philox_seed: Tensor, philox_offset: Tensor, scale: Optional[float]",
    torch_cudnn.FORWARD: "query: Tensor, key: Tensor, value: Tensor, attn_bias: Optional[Tensor], "
    "compute_log_sumexp: bool, dropout_p: float, is_causal: bool, return_debug_mask: bool, scale: Optional[float]",
    torch_cudnn.BACKWARD: "grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, "
    "logsumexp: Tensor, philox_seed: Tensor, philox_offset: Tensor, attn_bias: Tensor, cum_seq_q: Tensor, "
    "cum_seq_k: Tensor, max_q: int, max_k: int, dropout_p: float, is_causal: bool, scale: Optional[float]",
    torch_efficient.FORWARD: "query: Tensor, key: Tensor, value: Tensor, attn_bias: Optional[Tensor], "
    "compute_log_sumexp: bool, dropout_p: float, is_causal: bool, scale: Optional[float]",
    torch_efficient.BACKWARD: "grad_out_: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor, "
    "out: Tensor, logsumexp: Tensor, philox_seed: Tensor, philox_offset: Tensor, dropout_p: float, "
    "grad_input_mask: List[bool], is_causal: bool, scale: Optional[float]",
    torch_cpu.FORWARD: "query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool, "
    "attn_mask: Optional[Tensor], scale: Optional[float]",
    torch_cpu.BACKWARD: "grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, "
    "dropout_p: float, is_causal: bool, attn_mask: Optional[Tensor], scale: Optional[float]",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_pytorch_declares_its_operators_as_the_adapters_call_them(name):
    arguments = torch_operators.operator(name)._schema.arguments
    assert ", ".join(f"{argument.name}: {argument.type}" for argument in arguments) == SIGNATURES[name]


def test_a_pytorch_without_an_operator_is_refused(monkeypatch):
    assert torch_operators.missing(*SIGNATURES) is None
    reason = torch_operators.missing(torch_flash.FORWARD, "_no_such_attention")
    assert reason == f"PyTorch {torch.__version__} has no operator _no_such_attention"
    monkeypatch.setattr(torch_cpu, "BACKWARD", "_no_such_attention")
    ATTENTION.reset()
    assert explain("attention")["torch_cpu"] == reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert torch_operators.gpu_missing("_no_such_attention") == reason


def test_what_a_build_of_pytorch_lacks_is_the_reason(on_gpu, monkeypatch):
    on_gpu("sm90", *GPU_BACKENDS)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    reasons = explain("attention")
    assert reasons["torch_cudnn"] == "cuDNN is 9.10.2, expected 9.15.1 or newer"
    assert reasons["torch_flash"] == reasons["torch_efficient"] == "serves"
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
    assert explain("attention")["torch_cudnn"] == "PyTorch was built without cuDNN"
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91501)
    assert explain("attention")["torch_cudnn"] == "serves"
    monkeypatch.setenv(torch_cudnn.RAGGED, "1")
    assert "TORCH_CUDNN_SDPA_AVOID_RECOMPILE is set" in explain("attention")["torch_cudnn"]
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    reasons = explain("attention")
    assert reasons["torch_flash"] == reasons["torch_cudnn"] == "PyTorch was built without flash attention"


@pytest.mark.parametrize(("queries", "keys"), [(1, 5), (5, 1), (1, 1), (5, 5)])
def test_single_queries_and_keys_are_left_to_the_flash_kernel(on_gpu, queries, keys):
    on_gpu("sm90", "torch_cudnn")
    q, kv = draw(2, queries, 2, 32).half().requires_grad_(), draw(2, keys, 2, 2, 32, seed=1).half().requires_grad_()
    attention(q, kv, backend="torch_cudnn").sum().backward()
    single = 1 in (queries, keys)
    assert [len(STAND_INS[name].calls) for name in ("torch_cudnn", "torch_flash")] == ([0, 2] if single else [2, 0])


def test_cudnn_gets_no_gradient_whose_samples_share_memory(on_gpu):
    on_gpu("sm90", "torch_cudnn")
    qkv, grad = draw(2, 5, 3, 2, 32).half().requires_grad_(), draw(1, 5, 2, 32, seed=1).half().expand(2, -1, -1, -1)
    attention(qkv, backend="torch_cudnn").backward(grad)
    assert qkv.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["torch_flash", "torch_efficient"])
@pytest.mark.parametrize("target", ["sm90", "gfx942"])
def test_each_platform_gets_log_sum_exps_and_states_of_dropout_as_it_takes_them(on_gpu, target, backend):
    """As the stand-ins demand."""
    on_gpu(target, backend)
    dtype = torch.float32 if backend == "torch_efficient" else torch.float16
    for tokens in (5, 32, 33):
        qkv = draw(2, tokens, 3, 2, 32).to(dtype).requires_grad_()
        vectors = draw(2, 3, 2, 2, 32, seed=1).to(dtype).requires_grad_()
        present = torch.tensor([[True, False, True], [False] * 3])
        results = []
        for name in (backend, "eager"):
            out = concat_attention(qkv, vectors, present, backend=name)
            results.append([out, *torch.autograd.grad(out, (qkv, vectors), torch.ones_like(out))])
        tolerance = 1e-5 if dtype == torch.float32 else 5e-3
        torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


def test_packed_gradients_are_written_in_one_launch(on_gpu):
    on_gpu("sm80", "torch_flash")
    q, kv = draw(2, 5, 2, 32).half().requires_grad_(), draw(2, 7, 2, 2, 32, seed=1).half().requires_grad_()
    qkv = draw(2, 5, 3, 2, 32).half().requires_grad_()
    for leaves in ([qkv], [q, kv], [q, *kv.detach().unbind(2)]):
        out = attention(*leaves, backend="torch_flash")
        leaves = [leaf for leaf in leaves if leaf.requires_grad]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            torch.autograd.grad(out, leaves, torch.ones_like(out))
        stacked = [event for event in profile.events() if event.name == "aten::stack"]
        assert len(stacked) == (max(leaf.dim() for leaf in leaves) == 5)


@pytest.mark.parametrize(("version", "first"), [(91002, "FLASH_ATTENTION"), (91501, "CUDNN_ATTENTION")])
def test_sdpa_prefers_no_cudnn_that_accesses_memory_out_of_bounds(on_gpu, monkeypatch, version, first):
    on_gpu("sm90")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    orders = []

    def record(order, set_priority):
        orders.append([kernel.name for kernel in order])
        return contextlib.nullcontext()

    monkeypatch.setattr(sdpa, "target_of", lambda device, index: "sm90")
    monkeypatch.setattr(sdpa, "sdpa_kernel", record)
    attention(draw(1, 5, 3, 2, 32).half(), backend="sdpa")
    assert [order[0] for order in orders] == [first]


@pytest.mark.parametrize("backend", STAND_INS)
def test_packing_is_counted_as_a_launch_of_the_backends_that_return_gradients(on_gpu, backend):
    on_gpu("sm90", backend)
    qkv = draw(2, 5, 3, 2, 32).half()
    gradients, module = torch.empty_like(qkv), flash_backend(backend)
    out, lse = module.attention_forward(*qkv.unbind(2), None)
    given = module.attention_backward(out, qkv.unbind(2), None, out, lse, gradients.unbind(2))
    for projected, packing in (([qkv], given is not None), (qkv.unbind(2), False)):
        arguments = (out, projected, None, out, lse, backend)
        assert counting.launches_of("mmmae::attention_backward", arguments) == 1 + packing
