"""Attention by every backend against its definition in float64: outputs and all gradients.

Backends that run here run; those whose libraries need a GPU run on it, or by stand-ins that keep their call contracts.
This file is the one command that checks all backends on a machine with a GPU.
"""

import dataclasses

import pytest
import torch

from mmmae_kernels import attention, concat_attention, explain
from mmmae_kernels.attention.op import BACKENDS, FLASH
from mmmae_kernels.cpu import library as native
from tests.cases.attention import CASES, MASKED, presence
from tests.cases.case import check, draw

GPU = torch.cuda.is_available()


@dataclasses.dataclass(frozen=True)
class Runner:
    """A backend and the type and device it is tried with; with a target its stand-in serves, on that claimed GPU."""

    backend: str
    dtype: torch.dtype
    device: str = "cpu"
    target: str = ""

    def __str__(self):
        place = f"stand-in on {self.target}" if self.target else self.device
        return f"{self.backend} in {str(self.dtype).removeprefix('torch.')}, {place}"

    def reason(self):
        """Return why the backend can't run, or None."""
        rows = torch.zeros(1, 2, 1, 32, dtype=self.dtype, device=self.device)
        answer = explain("attention", rows, rows, rows, None)[self.backend]
        return None if answer == "serves" else answer


HERE = [
    *(Runner("native", dtype) for dtype in (torch.float32, torch.bfloat16) if native.unavailable_reason() is None),
    *(Runner("torch_cpu", dtype) for dtype in (torch.float32, torch.bfloat16)),
    *(Runner("sdpa", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)),
    *(Runner("eager", dtype) for dtype in (torch.float32, torch.bfloat16)),
]
STAND_IN = [
    Runner("flash_attn_4", torch.float16, target="sm100"),
    Runner("flash_attn_4", torch.bfloat16, target="sm90"),
    Runner("flash_attn_3", torch.float16, target="sm90"),
    Runner("flash_attn_3", torch.bfloat16, target="sm90"),
    Runner("flash_attn_2", torch.float16, target="sm80"),
    Runner("flash_attn_2", torch.bfloat16, target="gfx942"),
    Runner("xformers", torch.float16, target="sm80"),
    Runner("xformers", torch.bfloat16, target="sm90"),
    Runner("torch_cudnn", torch.bfloat16, target="sm90"),
    Runner("torch_flash", torch.float16, target="sm80"),
    Runner("torch_efficient", torch.float32, target="sm90"),
]
ON_GPU = [Runner(name, t, "cuda") for name in BACKENDS for t in (torch.float32, torch.float16, torch.bfloat16) if GPU]
MASKING = ("native", "sdpa", "eager")  # the backends that take a mask of present keys
RUNNERS = [*HERE, *(runner for runner in ON_GPU if runner.reason() is None), *STAND_IN]


@pytest.fixture(autouse=True)
def one_thread(on_threads):
    """The calls are small: where the cores are shared, threads that wait for each other take five times as long."""
    on_threads(1)


@pytest.fixture
def start(on_gpu, monkeypatch):
    """Makes a runner's backend the one that serves."""

    def force(runner):
        if runner.target:
            on_gpu(runner.target, runner.backend)
        monkeypatch.setenv("MMMAE_ATTENTION", runner.backend)

    return force


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_attention_and_its_gradients_are_those_of_the_definition(start, runner, case):
    start(runner)
    check(case, runner.dtype, device=runner.device)


@pytest.mark.parametrize("case", MASKED, ids=str)
@pytest.mark.parametrize("runner", [runner for runner in RUNNERS if runner.backend in MASKING], ids=str)
def test_what_absent_keys_hold_does_not_matter(start, runner, case):
    start(runner)
    check(case, runner.dtype, device=runner.device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backend_was_tried_on_a_gpu(backend):
    """By the tests above; a backend that is skipped here was not, for the reason given."""
    reasons = [runner.reason() for runner in ON_GPU if runner.backend == backend]
    if None not in reasons:
        pytest.skip(f"{backend}: {reasons[-1] if reasons else 'needs a GPU that torch can use'}")
    assert any(runner in RUNNERS for runner in ON_GPU if runner.backend == backend)


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_a_sample_without_keys_gets_zeros_and_gives_none(start, runner):
    start(runner)
    q, k, v = (draw(2, 5, 2, 32, seed=seed).to(runner.device, runner.dtype) for seed in range(3))
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    present = torch.tensor([[False] * 5, [True] * 5], device=runner.device)
    if runner.backend not in MASKING:
        with pytest.raises(ValueError, match=f"'{runner.backend}' does not support this call: .*key_present"):
            attention(*leaves, key_present=present)
        return
    out = attention(*leaves, key_present=present)
    out.backward(torch.ones_like(out))
    assert not out[0].any()
    assert out[1].any()
    for leaf in leaves:
        assert not leaf.grad[0].any()
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("runner", [runner for runner in RUNNERS if runner.backend in FLASH], ids=str)
def test_a_sample_without_vectors_gets_bitwise_what_attention_gives(start, runner):
    start(runner)
    qkv = draw(8, 21, 3, 2, 32).to(runner.device, runner.dtype).requires_grad_()
    vectors = draw(8, 2, 2, 2, 32, seed=1).to(runner.device, runner.dtype).requires_grad_()
    present = presence(2).to(runner.device)
    guided, plain = concat_attention(qkv, vectors, present), attention(qkv)
    grad = draw(*guided.shape, seed=2).to(guided)
    without = ~present.any(1)
    assert torch.equal(guided[without], plain[without])
    assert not torch.equal(guided[~without], plain[~without])
    by_guided, by_vectors = torch.autograd.grad(guided, (qkv, vectors), grad)
    (by_plain,) = torch.autograd.grad(plain, qkv, grad)
    assert torch.equal(by_guided[without], by_plain[without])
    assert not by_vectors[~present].any()


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_a_call_without_samples_or_tokens_is_served(on_gpu, runner):
    if runner.target:
        on_gpu(runner.target, runner.backend)
    for shape in ((0, 5, 3, 2, 32), (2, 0, 3, 2, 32)):
        qkv = torch.zeros(shape, dtype=runner.dtype, device=runner.device, requires_grad=True)
        out = attention(qkv)
        out.sum().backward()
        assert out.shape == (*shape[:2], 2, 32)
        assert qkv.grad.shape == shape


@pytest.mark.parametrize("runner", RUNNERS, ids=str)
def test_repeats_are_bitwise_equal_in_deterministic_mode(start, runner, poisoned):
    """And no element of a gradient is left as memory was."""
    if runner.backend in ("xformers", "torch_cudnn"):
        pytest.skip("it is refused in deterministic mode")
    start(runner)
    qkv = draw(8, 21, 3, 2, 32).to(runner.device, runner.dtype).requires_grad_()
    vectors = draw(8, 3, 2, 2, 32, seed=1).to(runner.device, runner.dtype).requires_grad_()
    present = presence(3).to(runner.device)

    def run():
        out = concat_attention(qkv, vectors, present)
        return out, *torch.autograd.grad(out, (qkv, vectors), torch.ones_like(out))

    first = run()
    assert all(result.isfinite().all() for result in first)
    for _ in range(3):
        assert all(map(torch.equal, run(), first))
