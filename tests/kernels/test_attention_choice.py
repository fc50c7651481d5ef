"""Which backend of attention serves a call, why another does not, and what is said of a wrong call."""

import re
import types

import pytest
import torch

from mmmae_kernels import attention, concat_attention, explain
from mmmae_kernels.attention.backends import packages
from mmmae_kernels.attention.backends.sdpa import kernel_for
from mmmae_kernels.attention.call import Call
from mmmae_kernels.attention.op import ATTENTION, BACKENDS, explain_call
from mmmae_kernels.cpu import library as native
from tests.cases.case import draw
from tests.kernels.attention_stand_ins import STAND_INS, flash_attn_3, flash_attn_4

ALL = tuple(STAND_INS)
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


def rows(dtype=SINGLE, width=32, **options):
    return torch.zeros(1, 2, 1, width, dtype=dtype, **options)


def choice(dtype, width=32, backend="auto"):
    return ATTENTION.choose(backend, *[rows(dtype, width)] * 3, None)


@pytest.mark.parametrize(
    ("target", "dtype", "installed", "expected"),
    [
        *(("sm90", BRAIN, ALL[first:], (*ALL, "sdpa")[first]) for first in range(8)),
        ("sm100", BRAIN, ALL, "flash_attn_4"),
        ("sm120", HALF, ALL, "flash_attn_4"),
        ("sm120", HALF, ALL[1:], "flash_attn_2"),
        ("sm120", HALF, ALL[3:], "torch_flash"),
        ("sm100", BRAIN, ALL[3:], "torch_cudnn"),
        ("gfx942", BRAIN, ALL[4:], "torch_flash"),
        ("gfx942", SINGLE, ALL, "torch_efficient"),
        ("sm80", HALF, ALL, "flash_attn_2"),
        ("sm86", BRAIN, ALL[3:], "xformers"),
        ("gfx942", HALF, ALL, "flash_attn_2"),
        ("gfx942", HALF, ALL[3:], "xformers"),
        ("gfx1100", HALF, ALL, "sdpa"),
        ("sm75", HALF, ALL, "sdpa"),
        ("sm90", SINGLE, ALL, "torch_efficient"),
        ("sm90", torch.float64, ALL, "sdpa"),
        ("sm75", SINGLE, ALL, "sdpa"),
        ("mps", HALF, ALL, "sdpa"),
        ("cpu", HALF, ALL, "torch_cpu"),
        ("cpu", torch.float64, ALL, "sdpa"),
    ],
)
def test_the_fastest_that_can_is_chosen(on_gpu, target, dtype, installed, expected):
    on_gpu(target, *installed)
    assert choice(dtype) == expected
    assert choice(dtype, backend=expected) == expected


@pytest.mark.parametrize("dtype", [SINGLE, BRAIN])
def test_on_the_cpu_native_attention_is_chosen_for_float32_and_bfloat16(dtype):
    if native.unavailable_reason() is not None:
        pytest.skip(native.unavailable_reason())
    assert choice(dtype) == "native"
    assert choice(dtype, width=257) == "torch_cpu"


NVIDIA_4, NVIDIA_2, AMD = "compute capability 9 to 12", "compute capability 8.0 to 12.1", "gfx90a, gfx942"
WRONG_TYPE = "the tensors have dtype torch.float32, it takes float16 and bfloat16"


@pytest.mark.parametrize(
    ("backend", "call", "reason"),
    [
        ("flash_attn_4", Call("sm80", HALF, 64), f"its kernels are for {NVIDIA_4}, not sm80"),
        ("flash_attn_4", Call("cpu", HALF, 64), f"its kernels are for {NVIDIA_4}, not cpu"),
        (
            "flash_attn_4",
            Call("sm120", HALF, 64, deterministic=True),
            "its backward is not deterministic on compute capability 12",
        ),
        ("flash_attn_4", Call("sm100", HALF, 136), "the head width is 136, it takes multiples of 8 up to 128"),
        ("flash_attn_4", Call("sm90", SINGLE, 64), WRONG_TYPE),
        ("flash_attn_3", Call("sm100", HALF, 64), "its kernels are for compute capability 9.0, not sm100"),
        (
            "flash_attn_3",
            Call("sm90", HALF, 256, deterministic=True),
            "its backward is not deterministic at a head width of 256",
        ),
        ("flash_attn_3", Call("sm90", HALF, 64, masked=True), "it does not support key_present"),
        (
            "flash_attn_2",
            Call("sm75", HALF, 64),
            f"its kernels are for compute capability 8 and above and for {AMD}, gfx950, not sm75",
        ),
        (
            "flash_attn_2",
            Call("gfx1100", HALF, 64),
            f"its kernels are for compute capability 8 and above and for {AMD}, gfx950, not gfx1100",
        ),
        ("flash_attn_2", Call("gfx942", HALF, 44), "the head width is 44, it takes multiples of 8 up to 256"),
        (
            "xformers",
            Call("sm100", HALF, 64),
            f"its kernels are for compute capability 8 and 9 and for {AMD}, not sm100",
        ),
        ("xformers", Call("sm90", HALF, 64, deterministic=True), "its backward has no deterministic mode"),
        ("native", Call("sm90", SINGLE, 64), "the tensors are on sm90, native kernels run on the CPU"),
        (
            "native",
            Call("cpu", HALF, 64),
            "the tensors have dtype torch.float16, native kernels take float32 and bfloat16",
        ),
        ("native", Call("cpu", SINGLE, 257), "the head width is 257, native kernels take up to 256"),
        ("torch_cudnn", Call("sm80", HALF, 64), "it is for compute capability 9.0, 10.0 and 10.3, not sm80"),
        ("torch_cudnn", Call("sm90", HALF, 136), "the head width is 136, it takes multiples of 8 up to 128"),
        ("torch_cudnn", Call("sm90", HALF, 64, deterministic=True), "its backward has no deterministic mode"),
        ("torch_flash", Call("sm75", HALF, 64), f"its kernels are for {NVIDIA_2} and for {AMD}, gfx950, not sm75"),
        (
            "torch_flash",
            Call("gfx1100", HALF, 64),
            f"its kernels are for {NVIDIA_2} and for {AMD}, gfx950, not gfx1100",
        ),
        (
            "torch_flash",
            Call("sm89", HALF, 208),
            "the head width is 208, its backward on sm89 takes none from 200 to 224",
        ),
        ("torch_flash", Call("sm90", SINGLE, 64), WRONG_TYPE),
        ("torch_flash", Call("sm90", HALF, 64, masked=True), "it does not support key_present"),
        ("torch_efficient", Call("cpu", SINGLE, 64), f"its kernels are for {NVIDIA_2} and for {AMD}, gfx950, not cpu"),
        ("torch_efficient", Call("sm90", SINGLE, 66), "the head width is 66, it takes multiples of 4 up to 256"),
        ("torch_efficient", Call("sm90", HALF, 68), "the head width is 68, it takes multiples of 8 up to 256"),
        ("torch_efficient", Call("sm90", SINGLE, 64, masked=True), "it does not support key_present"),
        (
            "torch_efficient",
            Call("sm90", torch.float64, 64),
            "the tensors have dtype torch.float64, it takes float32, float16 and bfloat16",
        ),
        ("torch_cpu", Call("sm90", HALF, 64), "the tensors are on sm90, it runs on the CPU"),
        ("torch_cpu", Call("cpu", HALF, 64, masked=True), "it does not support key_present"),
    ],
)
def test_a_backend_that_cannot_serve_says_why(on_gpu, backend, call, reason):
    answers = explain_call(call)
    assert list(answers) == list(BACKENDS)
    assert answers[backend] == reason
    assert answers["eager"] is None
    if not (call.masked or call.deterministic or backend == "native"):
        on_gpu(call.target, *ALL)
        message = re.escape(f"attention: backend {backend!r} does not support this call: {reason}")
        with pytest.raises(ValueError, match=f"^{message}$"):
            choice(call.dtype, call.head_width, backend)


FLASH, CUDNN, PLAIN = "the flash kernel", "cuDNN's kernel", "plain products"
EFFICIENT, EFFICIENT_OLD = (
    "the memory-efficient kernel",
    "the memory-efficient kernel, where PyTorch is built for CUDA 12.6",
)


@pytest.mark.parametrize(
    ("call", "kernel"),
    [
        (Call("cpu", SINGLE, 64), "the flash kernel for CPUs"),
        (Call("sm80", HALF, 64), FLASH),
        (Call("sm80", HALF, 256), FLASH),
        (Call("sm80", HALF, 264), EFFICIENT),
        (Call("sm80", HALF, 257), PLAIN),
        (Call("sm80", BRAIN, 64, masked=True), EFFICIENT),
        (Call("sm80", SINGLE, 64), EFFICIENT),
        (Call("sm80", SINGLE, 66), PLAIN),
        (Call("sm80", torch.float64, 64), PLAIN),
        (Call("sm90", BRAIN, 64), CUDNN),
        (Call("sm103", BRAIN, 128), CUDNN),
        (Call("sm100", BRAIN, 64, masked=True), CUDNN),
        (Call("sm90", BRAIN, 64, deterministic=True), FLASH),
        (Call("sm90", BRAIN, 136), FLASH),
        (Call("sm120", BRAIN, 64), FLASH),
        (Call("sm75", HALF, 64), EFFICIENT),
        (Call("sm75", HALF, 60), PLAIN),
        (Call("sm75", SINGLE, 60), EFFICIENT),
        (Call("sm75", BRAIN, 64), PLAIN),
        (Call("sm70", HALF, 64), EFFICIENT_OLD),
        (Call("sm70", BRAIN, 64), PLAIN),
        (Call("sm60", HALF, 60), EFFICIENT_OLD),
        (Call("sm50", SINGLE, 64, masked=True), EFFICIENT_OLD),
        (Call("sm37", SINGLE, 64), PLAIN),
        (Call("gfx942", BRAIN, 64), FLASH),
        (Call("gfx942", BRAIN, 264), PLAIN),
        (Call("gfx90a", SINGLE, 64), EFFICIENT),
        (Call("gfx1100", HALF, 64), "plain products, or an experimental kernel where PyTorch has one"),
    ],
    ids=str,
)
def test_which_of_pytorchs_kernels_a_call_gets(call, kernel):
    assert kernel_for(call) == kernel


def test_what_serves_a_call_by_deterministic_mode(on_gpu, poisoned):
    on_gpu("sm90", *ALL)
    assert choice(HALF) == "flash_attn_4"
    on_gpu("sm120", *ALL)
    assert choice(HALF) == "flash_attn_2"
    on_gpu("sm90", "flash_attn_3", "xformers")
    assert choice(HALF, 256) == "sdpa"
    on_gpu("sm90", *ALL[3:])
    assert choice(HALF) == "torch_flash"
    with pytest.raises(ValueError, match="its backward has no deterministic mode"):
        choice(HALF, backend="xformers")


@pytest.mark.parametrize("backend", ["flash_attn_4", "flash_attn_3", "flash_attn_2"])
@pytest.mark.parametrize("mode", [False, True])
def test_the_backward_is_told_of_deterministic_mode(on_gpu, backend, mode):
    on_gpu("sm90", backend)
    qkv = draw(1, 3, 3, 2, 32).half().requires_grad_()
    torch.use_deterministic_algorithms(mode)
    try:
        attention(qkv, backend=backend).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert [call["deterministic"] for call in STAND_INS[backend].calls if "dout" in call] == [mode]


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("merged", [False, True])
def test_a_library_reads_packed_tensors_where_they_lie_and_writes_packed_gradients(on_gpu, backend, merged):
    on_gpu("sm90", backend)
    qkv = draw(2, 5, 3, 2, 32).half().requires_grad_()
    vectors, present = draw(2, 1, 2, 2, 32, seed=1).half(), torch.tensor([[True], [False]])
    out = concat_attention(qkv, vectors, present, backend=backend) if merged else attention(qkv, backend=backend)
    (gradient,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    forward, backward = STAND_INS[backend].calls
    names = ("q", "k", "v") if backend.startswith("flash_attn") else ("query", "key", "value")
    for call in (forward, backward):
        for place, name in enumerate(names):
            assert call[name].data_ptr() == qkv[:, :, place].data_ptr()
    if backend.startswith("flash_attn"):
        for place, name in enumerate(("dq", "dk", "dv")):
            assert backward[name].data_ptr() == gradient[:, :, place].data_ptr()


@pytest.mark.parametrize(
    ("backend", "outdated", "reason"),
    [
        (
            "flash_attn_4",
            types.SimpleNamespace(_flash_attn_bwd=flash_attn_4.outdated_flash_attn_bwd),
            "this flash-attn-4 is too old: its backward lacks deterministic, dq, dk, dv",
        ),
        ("flash_attn_3", types.SimpleNamespace(), "this flash-attn-3 is too old: it registers no operators"),
        (
            "flash_attn_2",
            types.SimpleNamespace(_flash_attn_backward=None),
            "this flash-attn is too old: it registers no operators, as versions from 2.7.1 on do",
        ),
    ],
)
def test_an_outdated_library_is_refused(on_gpu, monkeypatch, backend, outdated, reason):
    on_gpu("sm90")
    monkeypatch.setattr(packages, "refuses", lambda distribution, module: None)
    monkeypatch.setattr(packages, "load", lambda module: outdated)
    with pytest.raises(ValueError, match=f"backend '{backend}' does not support this call: {reason}"):
        choice(HALF, backend=backend)


def test_an_outdated_operator_is_refused(on_gpu, monkeypatch):
    on_gpu("sm90")
    monkeypatch.setattr(packages, "refuses", lambda distribution, module: None)
    monkeypatch.setattr(packages, "load", lambda module: flash_attn_3)
    if hasattr(torch.ops.flash_attn_3, "bwd"):
        pytest.skip("the real flash-attn-3 is loaded, its operators can't be registered twice")
    with (
        flash_attn_3.registered(backward=flash_attn_3.OUTDATED_BACKWARD),
        pytest.raises(
            ValueError, match="is too old: its backward lacks deterministic, dk, dq, dv, is_causal, softmax_scale"
        ),
    ):
        choice(HALF, backend="flash_attn_3")


KNOWN = (
    "auto, flash_attn_4, flash_attn_3, flash_attn_2, xformers, native, torch_cudnn, torch_flash, torch_efficient, "
    "torch_cpu, sdpa, eager"
)
HEADS = torch.zeros(2, 3, 4, 8)
PACKED, VECTORS, PRESENT = torch.zeros(2, 3, 3, 4, 8), torch.zeros(2, 1, 2, 4, 8), torch.ones(2, 1, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attention(*[torch.zeros(2, 3, 4)] * 3), "q has shape [2, 3, 4], expected [B, Nq, h, d]"),
        (lambda: attention(HEADS), "q has shape [2, 3, 4, 8], expected [B, N, 3, h, d] without k and v"),
        (lambda: attention(PACKED[:, :, :2]), "q has shape [2, 3, 2, 4, 8], expected [2, 3, 3, 4, 8]"),
        (lambda: attention(HEADS, None, HEADS), "v is given without k"),
        (lambda: attention(HEADS, HEADS), "k has shape [2, 3, 4, 8], expected [B, Nk, 2, h, d]"),
        (lambda: attention(HEADS, PACKED), "k has shape [2, 3, 3, 4, 8], expected [2, 3, 2, 4, 8]"),
        (lambda: attention(HEADS, HEADS[:1], HEADS), "k has shape [1, 3, 4, 8], expected [2, 3, 4, 8]"),
        (lambda: attention(HEADS, HEADS, HEADS[:, :2]), "v has shape [2, 2, 4, 8], expected [2, 3, 4, 8]"),
        (lambda: attention(*[HEADS.int()] * 3), "q has dtype torch.int32"),
        (lambda: attention(HEADS, HEADS.half(), HEADS), "k has dtype torch.float16, expected torch.float32 as in q"),
        (lambda: attention(HEADS, HEADS, HEADS.half()), "v has dtype torch.float16, expected torch.float32 as in q"),
        (lambda: attention(HEADS, HEADS.to("meta"), HEADS), "k is on meta, expected cpu"),
        (lambda: attention(*[HEADS] * 3, backend="fast"), f"backend is 'fast', must be one of {KNOWN}"),
        (lambda: attention(*[HEADS] * 3, key_present=torch.ones(2, 3)), "key_present has dtype torch.float32"),
        (lambda: attention(*[HEADS] * 3, key_present=PRESENT), "key_present has shape [2, 1], expected [2, 3]"),
        (lambda: concat_attention(HEADS, VECTORS, PRESENT), "qkv has shape [2, 3, 4, 8], expected [B, N, 3, h, d]"),
        (lambda: concat_attention(PACKED, HEADS, PRESENT), "vectors has shape [2, 3, 4, 8], expected [B, m, 2"),
        (
            lambda: concat_attention(PACKED, VECTORS[:1], PRESENT),
            "vectors has shape [1, 1, 2, 4, 8], expected [2, 1, 2, 4, 8]",
        ),
        (
            lambda: concat_attention(PACKED, VECTORS.half(), PRESENT),
            "vectors has dtype torch.float16, expected torch.float32 as in qkv",
        ),
        (lambda: concat_attention(PACKED, VECTORS, PRESENT[:1]), "present has shape [1, 1], expected [2, 1]"),
        (lambda: concat_attention(PACKED, VECTORS, PRESENT.int()), "present has dtype torch.int32"),
        (lambda: concat_attention(PACKED, VECTORS, PRESENT, backend="no"), f"'no', must be one of {KNOWN}"),
        (
            lambda: concat_attention(PACKED, VECTORS, PRESENT, backend="flash_attn_3"),
            "attention: backend 'flash_attn_3' does not support this call: ",
        ),
    ],
)
def test_a_wrong_argument_is_named_before_any_work(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_the_environment_chooses_and_an_argument_overrides_it(on_gpu, monkeypatch):
    on_gpu("sm90", *ALL)
    qkv = PACKED.half()
    monkeypatch.setenv("MMMAE_ATTENTION", "flash_attn_2")
    attention(qkv)
    attention(qkv, backend="flash_attn_3")
    assert [len(STAND_INS[name].calls) for name in ALL] == [0, 1, 1, 0, 0, 0, 0]
    monkeypatch.setenv("MMMAE_ATTENTION", "flsh")
    with pytest.raises(ValueError, match=f"MMMAE_ATTENTION is 'flsh', must be one of {KNOWN}"):
        attention(qkv)
    attention(qkv, backend="eager")
    monkeypatch.setenv("MMMAE_ATTENTION", "native")
    with pytest.raises(ValueError, match="backend 'native' does not support this call: "):
        attention(qkv)


def test_explain_tells_what_serves(on_gpu):
    on_gpu("sm90", "flash_attn_2")
    answers = explain("attention", *[rows(BRAIN)] * 3, None)
    assert list(answers) == list(BACKENDS)
    assert [name for name, answer in answers.items() if answer == "serves"] == ["flash_attn_2", "sdpa", "eager"]
    assert answers["flash_attn_4"] == "flash-attn-4 is not installed"
    assert answers["flash_attn_3"] == "flash-attn-3 is not installed"
    assert answers["xformers"] == "xformers is not installed"
    assert answers["torch_flash"] == "there is no GPU that torch can use"
