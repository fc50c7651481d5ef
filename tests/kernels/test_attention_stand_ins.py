"""Stand-ins refuse what the libraries refuse, and what these would answer with wrong memory."""

import functools
import itertools

import pytest
import torch

from tests.kernels.attention_stand_ins import (
    STAND_INS,
    flash_attn_2,
    flash_attn_4,
    plain,
    torch_operators,
    xformers,
)
from tests.kernels.attention_stand_ins.plain import Corrupts

SCALE = 32**-0.5
PLAIN = {"dropout_p": 0.0, "softmax_scale": SCALE, **flash_attn_2.PLAIN}
OPERATORS = {
    "torch_cudnn": torch_operators.CUDNN,
    "torch_flash": torch_operators.FLASH,
    "torch_efficient": torch_operators.EFFICIENT,
}


def forward_by_pytorch(library, given, **options):
    masks = () if library == "torch_flash" else (None, True)
    q, k, v = (given[name].transpose(1, 2) for name in "qkv")
    return getattr(torch.ops.aten, OPERATORS[library])(q, k, v, *masks, **options)


def backward_by_pytorch(library, given, **options):
    names = ("dout", "q", "k", "v", *(() if library == "torch_efficient" else ("out",)))
    lse, lengths = given["lse"], {"max_q": given["q"].shape[1], "max_k": given["k"].shape[1]}
    if library == "torch_efficient":
        lse = torch.nn.functional.pad(lse, (0, 27), value=torch.inf)
        lengths = {"attn_bias": None, "out": given["out"].transpose(1, 2), "grad_input_mask": [True, True, True, False]}
    else:
        lengths |= {"cum_seq_q": None, "cum_seq_k": None}
    if library == "torch_cudnn":
        lse, lengths = lse[..., None], {**lengths, "attn_bias": None}
    seed = torch.empty(2, dtype=torch.uint64) if library == "torch_flash" else torch.empty((), dtype=torch.int64)
    offset = torch.empty((), dtype=seed.dtype)
    arguments = {"logsumexp": lse, **lengths, "philox_seed": seed, "philox_offset": offset}
    operator = getattr(torch.ops.aten, f"{OPERATORS[library]}_backward")
    tensors = [given[name].transpose(1, 2) for name in names]
    return operator(*tensors, **{**arguments, "dropout_p": 0.0, "is_causal": False, **options})


FORWARDS = {
    "flash_attn_4": lambda t, **o: flash_attn_4._flash_attn_fwd(t["q"], t["k"], t["v"], **{"return_lse": True, **o}),
    "flash_attn_3": lambda t, **o: torch.ops.flash_attn_3.fwd(t["q"], t["k"], t["v"], **{"num_splits": 1, **o}),
    "flash_attn_2": lambda t, **o: flash_attn_2._wrapped_flash_attn_forward(
        t["q"], t["k"], t["v"], **{"return_softmax": False, **PLAIN, **o}
    ),
    "xformers": lambda t, **o: xformers.memory_efficient_attention_forward_requires_grad(t["q"], t["k"], t["v"], **o),
    **{library: functools.partial(forward_by_pytorch, library) for library in OPERATORS},
}
BACKWARDS = {
    "flash_attn_4": lambda t, **o: flash_attn_4._flash_attn_bwd(**t, **o),
    "flash_attn_3": lambda t, **o: torch.ops.flash_attn_3.bwd(
        t["dout"], t["q"], t["k"], t["v"], t["out"], t["lse"], t["dq"], t["dk"], t["dv"], **o
    ),
    "flash_attn_2": lambda t, **o: flash_attn_2._wrapped_flash_attn_backward(
        *(t[name] for name in ("dout", "q", "k", "v", "out", "lse", "dq", "dk", "dv")),
        **{"deterministic": False, **PLAIN, **o},
    ),
    "xformers": lambda t, **o: xformers.memory_efficient_attention_backward(
        t["dout"], t["out"], t["lse"], t["q"], t["k"], t["v"], **o
    ),
    **{library: functools.partial(backward_by_pytorch, library) for library in OPERATORS},
}
ERRORS = {"flash_attn_4": AssertionError, **dict.fromkeys(("flash_attn_3", "flash_attn_2", *OPERATORS), RuntimeError)}
OF_XFORMERS = (ValueError, NotImplementedError)
RETURNING = ("xformers", *OPERATORS)  # they take no places for gradients
GIVEN = ("q", "k", "v", "out", "dout")
WRITTEN = ("dq", "dk", "dv")


def tensors(width=32, dtype=torch.float16, batch=2, queries=5, keys=7):
    """Return arguments that every library takes."""
    rows = {"q": queries, "k": keys, "v": keys, "out": queries, "dout": queries, "dq": queries, "dk": keys, "dv": keys}
    given = {name: torch.randn(batch, count, 2, width).to(dtype) for name, count in rows.items()}
    return {**given, "lse": torch.randn(batch, 2, queries)}


def shifted(tensor):
    """Return a tensor of the same shape whose memory is not aligned to 16 bytes."""
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)


def with_gaps(tensor):
    """Return a tensor of the same shape whose strides are no multiples of 16 bytes."""
    return torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1, dtype=tensor.dtype)[..., :-1].copy_(tensor)


def spread(tensor):
    """Return a tensor of the same shape whose last axis is not contiguous."""
    return torch.zeros(*tensor.shape, 2, dtype=tensor.dtype)[..., 0].copy_(tensor)


def refused(call, arguments, error, **options):
    with pytest.raises(error):
        call(arguments, **options)


@pytest.fixture(params=STAND_INS)
def library(request, on_gpu):
    on_gpu("sm90", request.param)
    return request.param


def test_a_right_call_is_served(library):
    for width in (8, 32, 128 if library == "torch_cudnn" else 256):
        given = tensors(width=width)
        FORWARDS[library](given)
        BACKWARDS[library](given)


def test_views_of_one_packed_tensor_are_served_and_written(library):
    qkv, dqkv = torch.randn(2, 5, 3, 2, 32).half(), torch.full((2, 5, 3, 2, 32), torch.nan).half()
    (q, k, v), (dq, dk, dv) = qkv.unbind(2), dqkv.unbind(2)
    given = {**tensors(keys=5), "q": q, "k": k, "v": v, "dq": dq, "dk": dk, "dv": dv}
    FORWARDS[library](given)
    BACKWARDS[library](given)
    assert library in RETURNING or dqkv.isfinite().all()


@pytest.mark.parametrize("name", GIVEN)
def test_wrong_inputs_are_refused(library, name):
    error = ERRORS.get(library, OF_XFORMERS)
    good = tensors()
    calls = [BACKWARDS[library], *([FORWARDS[library]] if name in "qkv" else [])]
    for call in calls:
        for wrong in (good[name].float(), good[name].bfloat16(), good[name][0], good[name][..., :1, :]):
            refused(call, {**good, name: wrong}, error)
        if library not in OPERATORS:  # which compute nothing for tensors on meta
            refused(call, {**good, name: good[name].to("meta")}, error)
        copied = library in RETURNING and (name == "dout" or (name == "out" and library in OPERATORS))  # with gaps
        for wrong in (shifted(good[name]), *([] if copied else [with_gaps(good[name])])):
            refused(call, {**good, name: wrong}, Corrupts)
        if library not in OPERATORS:  # whose gradients PyTorch knows
            refused(call, {**good, name: good[name].clone().requires_grad_()}, Corrupts)
        with torch.no_grad():
            call({**good, name: good[name].clone().requires_grad_()})


@pytest.mark.parametrize("name", WRITTEN)
def test_wrong_places_for_gradients_are_refused(library, name):
    if library in RETURNING:
        pytest.skip("it takes none")
    good = tensors()
    for wrong in (good[name].float(), good[name][:, 1:], spread(good[name])):
        refused(BACKWARDS[library], {**good, name: wrong}, ERRORS[library])
    for wrong in (shifted(good[name]), with_gaps(good[name]), good[{"dq": "q", "dk": "k", "dv": "v"}[name]]):
        refused(BACKWARDS[library], {**good, name: wrong}, Corrupts)
    if library != "flash_attn_4":  # which then gives its own
        refused(BACKWARDS[library], {**good, name: None}, Corrupts)
    overlapping = {**good, "dk": good["dv"]}
    refused(BACKWARDS[library], overlapping, Corrupts)


@pytest.mark.parametrize("width", [12, 264, 0])
def test_head_widths_are_refused(library, width):
    errors = Corrupts if width == 0 else ERRORS.get(library, OF_XFORMERS)
    for call in (FORWARDS[library], BACKWARDS[library]):
        refused(call, tensors(width=width), errors)


def test_tensors_without_elements_are_refused(library):
    for sizes in ({"batch": 0}, {"queries": 0}, {"keys": 0}):
        for call in (FORWARDS[library], BACKWARDS[library]):
            refused(call, tensors(**sizes), Corrupts)


def test_wrong_log_sum_exps_are_refused(library):
    good = tensors()
    lse = good["lse"]
    shapes = {"flash_attn_4": AssertionError, "xformers": ValueError}.get(library, Corrupts)
    refused(BACKWARDS[library], {**good, "lse": lse[..., :-1].contiguous()}, shapes)
    refused(BACKWARDS[library], {**good, "lse": lse[0]}, shapes)
    types = AssertionError if library == "flash_attn_4" else Corrupts
    refused(BACKWARDS[library], {**good, "lse": lse.double()}, types)
    if library != "torch_efficient":
        refused(BACKWARDS[library], {**good, "lse": lse.transpose(0, 1).contiguous().transpose(0, 1)}, Corrupts)
    longer = {**good, "lse": torch.nn.functional.pad(lse, (0, 3), value=torch.inf)}
    if library == "xformers":
        BACKWARDS[library](longer)
    else:
        refused(BACKWARDS[library], longer, shapes)


def test_unknown_and_missing_options_are_refused(library):
    good = tensors()
    for call in (FORWARDS[library], BACKWARDS[library]):
        refused(call, good, (TypeError, RuntimeError), window_size=(-1, -1))
        refused(call, good, NotImplementedError, **FIRST_OPTION.get(library, {"is_causal": True}))
    if library == "flash_attn_2":
        refused(FORWARDS[library], good, RuntimeError, softmax_scale=None)
        with pytest.raises(RuntimeError, match="missing value for argument"):
            flash_attn_2._wrapped_flash_attn_forward(good["q"], good["k"], good["v"])


FIRST_OPTION = {"flash_attn_4": {"causal": True}, "flash_attn_2": {"causal": True}, "xformers": {"p": 0.1}}


@pytest.mark.parametrize(
    ("library", "target", "forward", "backward"),
    [
        ("flash_attn_4", "sm80", None, AssertionError),
        ("flash_attn_4", "sm75", AssertionError, AssertionError),
        ("flash_attn_3", "sm100", RuntimeError, RuntimeError),
        ("flash_attn_3", "sm80", RuntimeError, RuntimeError),
        ("flash_attn_2", "sm75", RuntimeError, RuntimeError),
        ("flash_attn_2", "gfx1100", RuntimeError, RuntimeError),
        ("flash_attn_2", "gfx942", None, Corrupts),  # it reads a state of dropout
        ("xformers", "sm100", NotImplementedError, NotImplementedError),
        ("torch_flash", "sm75", RuntimeError, RuntimeError),
        ("torch_flash", "gfx942", None, Corrupts),  # it takes another state of dropout
        ("torch_efficient", "gfx942", None, Corrupts),  # it takes no more log-sum-exps than rows
    ],
)
def test_other_gpus_are_refused(on_gpu, library, target, forward, backward):
    on_gpu(target, library)
    for call, error in ((FORWARDS[library], forward), (BACKWARDS[library], backward)):
        if error is None:
            call(tensors())
        else:
            refused(call, tensors(), error)


def test_deterministic_calls_are_refused_where_there_are_none(on_gpu):
    for target, library, width in (("sm120", "flash_attn_4", 32), ("sm90", "flash_attn_3", 256)):
        on_gpu(target, library)
        BACKWARDS[library](tensors(width))
        refused(BACKWARDS[library], tensors(width), ERRORS[library], deterministic=True)


def test_wide_heads_are_refused_by_architecture(on_gpu):
    on_gpu("sm100", "flash_attn_4")
    for width, target in itertools.product((136, 192), ("sm100", "sm120")):
        plain.target = target
        refused(FORWARDS["flash_attn_4"], tensors(width), AssertionError)


def test_log_sum_exps_come_as_each_library_gives_them(library):
    results = FORWARDS[library](tensors())
    lse = results[1]
    assert lse.dtype == torch.float32
    counts = {"flash_attn_4": 5, "flash_attn_3": 4, "flash_attn_2": 4, "xformers": 2, "torch_efficient": 4}
    assert len(results) == counts.get(library, 9)
    if library == "torch_cudnn":
        lse = lse.squeeze(3)
    assert lse.shape == (2, 2, 32 if library in ("xformers", "torch_efficient") else 5)
    assert (lse[..., 5:] == torch.inf).all()
    if library == "flash_attn_4":
        assert FORWARDS[library](tensors(), return_lse=False)[1] is None


def test_every_call_is_kept(library):
    FORWARDS[library](tensors())
    BACKWARDS[library](tensors())
    assert len(STAND_INS[library].calls) == 2


@pytest.mark.parametrize("library", OPERATORS)
def test_results_are_laid_out_as_pytorch_says_that_they_are(on_gpu, library):
    on_gpu("sm90", library)
    given = {**tensors(keys=5), **dict(zip("qkv", torch.randn(2, 5, 3, 2, 32).half().unbind(2), strict=True))}
    on_meta = {name: tensor.to("meta") for name, tensor in given.items()}
    for calls in (FORWARDS, BACKWARDS):
        for result, expected in zip(calls[library](given), calls[library](on_meta), strict=True):
            if isinstance(expected, torch.Tensor) and expected.numel():
                assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
            if isinstance(expected, torch.Tensor) and expected.dim() == 4 and expected.shape[3] > 1:
                assert result.stride() == expected.stride()
