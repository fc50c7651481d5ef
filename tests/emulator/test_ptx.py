"""The PTX emulator against torch, for every kind of kernel and every target."""

import pytest
import torch
import triton

from mmmae_kernels.gpu.config import Config
from tests.emulator import kernels
from tests.emulator.ptx import Statistics, execute
from tests.emulator.ptx.compilation import compile_kernel

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET: nothing is compiled")

TARGETS = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120")
HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALVES)


def nearly(a: torch.Tensor, b: torch.Tensor, error: float) -> bool:
    return bool(((a.double() - b.double()).abs() <= error * (1 + b.double().abs())).all())


def is_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether `out` is a @ b, within the error of float32 sums in any order and of rounding to out's dtype."""
    a, b = a.double(), b.double()
    error = a.shape[1] * 2.0**-24 * (a.abs() @ b.abs()) + torch.finfo(out.dtype).eps * (a @ b).abs()
    return bool(((out.double() - a @ b).abs() <= error).all())


def multiply(a, b, ids, *, blocks=(32, 32, 32), precision="ieee", stages=3, **options) -> torch.Tensor:
    out = torch.full((len(ids), b.shape[1]), float("nan"))
    block_m, block_n, block_k = blocks
    arguments = {
        "a_ptr": a,
        "b_ptr": b,
        "out_ptr": out,
        "ids_ptr": ids,
        "M": len(ids),
        "N": b.shape[1],
        "K": a.shape[1],
    }
    arguments |= {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "PRECISION": precision, "STAGES": stages}
    execute(kernels.gather_matmul, (-(-len(ids) // block_m), -(-b.shape[1] // block_n)), arguments, **options)
    return out


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("n", [1, 255, 257, 5003])
def test_elements_equal_torch(target, n):
    x, y, out = torch.randn(n), torch.randn(n), torch.full((n + 7,), 7.0)
    arguments = {"x_ptr": x, "y_ptr": y, "out_ptr": out, "n": n, "BLOCK": 256}
    statistics = execute(kernels.scale_where_positive, (-(-n // 256),), arguments, target=target)
    masked = torch.where(torch.arange(n) % 3 != 0, y, torch.tensor(2.5))
    assert nearly(out[:n], torch.where(x > masked, x * masked + 1, torch.exp(x) - masked), 1e-6)
    assert (out[n:] == 7).all()
    assert isinstance(statistics, Statistics)
    assert statistics.instructions > 0
    assert statistics.blocks == -(-n // 256)


def test_multiply_adds_are_fused_as_in_our_launches_whatever_the_default(monkeypatch):
    monkeypatch.setattr(triton.knobs.language, "default_fp_fusion", False)
    x = torch.randn(8)
    arguments = {"x_ptr": x, "y_ptr": x, "out_ptr": x, "n": 8, "BLOCK": 256}
    launched = Config({"BLOCK": 256}).options("sm80")
    for options, fused in ((launched, True), ({}, True), ({"enable_fp_fusion": False}, False)):
        compiled, _ = compile_kernel(kernels.scale_where_positive, arguments, "sm80", {"num_warps": 4, **options})
        assert ("fma.rn.f32" in compiled.ptx) == fused


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("num_warps", [1, 4, 8])
def test_rows_reduce_over_all_warps(target, num_warps):
    prediction, rows, ids, out = torch.randn(5, 301), torch.randn(11, 301), torch.randperm(11)[:5], torch.zeros(5)
    arguments = {
        "prediction_ptr": prediction,
        "target_ptr": rows,
        "ids_ptr": ids,
        "out_ptr": out,
        "D": 301,
        "BLOCK_D": 512,
    }
    execute(kernels.row_distance, (5,), arguments, target=target, num_warps=num_warps)
    assert nearly(out, ((prediction - rows[ids]) ** 2).mean(1), 1e-6)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_a_product_of_halves_equals_torch(target, dtype, stages):
    a, b, ids = torch.randn(50, 96).to(dtype), torch.randn(96, 40).to(dtype), torch.randperm(50)[:37]
    out = multiply(a, b, ids, stages=stages, target=target)
    assert is_product(out, a[ids], b)


@pytest.mark.parametrize("target", ["sm80", "sm120"])
@pytest.mark.parametrize("precision", ["tf32", "tf32x3", "ieee"])
@pytest.mark.parametrize("stages", [1, 3])
def test_a_product_of_floats_is_as_precise_as_asked(target, precision, stages):
    a, b, ids = torch.randn(50, 96), torch.randn(96, 40), torch.randperm(50)[:37]
    out = multiply(a, b, ids, precision=precision, stages=stages, target=target)
    assert is_product(out, a[ids], b) == (precision != "tf32")
    by_tf32 = 2.0**-10 * a[ids].abs() @ b.abs()  # both factors lose at most one part in 2**11
    assert ((out - a[ids] @ b).abs() <= by_tf32 + 1e-4).all()


@pytest.mark.parametrize("blocks", [(16, 16, 16), (64, 32, 16), (16, 128, 64)])
@pytest.mark.parametrize("num_warps", [1, 2, 8])
def test_a_product_does_not_depend_on_its_blocks(blocks, num_warps):
    a, b, ids = torch.randn(23, 77).half(), torch.randn(77, 129).half(), torch.arange(23)
    out = multiply(a, b, ids, blocks=blocks, num_warps=num_warps)
    assert is_product(out, a, b)


@pytest.mark.parametrize("target", ["sm80", "sm120"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("integer", [torch.uint8, torch.int16])
def test_integers_are_converted_before_a_product(target, dtype, integer):
    volume, weight = torch.randint(0, 200, (33, 50)).to(integer), torch.randn(17, 50).to(dtype)
    out = torch.zeros(33, 17, dtype=dtype)
    arguments = {"volume_ptr": volume, "weight_ptr": weight, "out_ptr": out, "M": 33, "N": 17, "K": 50}
    execute(kernels.embed_integers, (2, 1), arguments | {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32}, target=target)
    assert is_product(out, volume, weight.T)


@pytest.mark.parametrize("target", ["sm80", "sm90", "sm120"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_layer_norm_equals_torch(target, dtype):
    x, weight, bias = torch.randn(5, 400).to(dtype)[:, :299], torch.randn(299).to(dtype), torch.randn(299).to(dtype)
    for scale, shift in ((weight, bias), (weight, None), (None, None)):
        out = torch.zeros(5, 299, dtype=dtype)
        arguments = {
            "x_ptr": x,
            "weight_ptr": scale,
            "bias_ptr": shift,
            "out_ptr": out,
            "stride": 400,
            "D": 299,
            "eps": 1e-5,
        }
        execute(kernels.layer_norm, (5,), arguments | {"BLOCK_D": 512}, target=target)
        parts = [None if part is None else part.float() for part in (scale, shift)]
        expected = torch.nn.functional.layer_norm(x.float(), (299,), *parts)
        assert nearly(out, expected, max(torch.finfo(dtype).eps, 1e-6))


@pytest.mark.parametrize("target", ["sm80", "sm120"])
def test_sorted_rows_equal_torch(target):
    x = torch.randint(-(2**62), 2**62, (3, 1024))
    out = torch.zeros_like(x)
    execute(kernels.sort_rows, (3,), {"x_ptr": x, "out_ptr": out, "N": 1024}, target=target)
    assert torch.equal(out, x.sort(1).values)


def test_a_long_row_is_sorted():
    x = torch.randint(-5, 2**40, (1, 4096))
    out = torch.zeros_like(x)
    execute(kernels.sort_rows, (1,), {"x_ptr": x, "out_ptr": out, "N": 4096}, num_warps=8)
    assert torch.equal(out, x.sort(1).values)


def philox(seed: int, counter: int) -> list[int]:
    """Return four words, by the definition of Philox4x32-10."""
    words, key = [counter, 0, 0, 0], [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [
            second >> 32 ^ words[1] ^ key[0],
            second & 0xFFFFFFFF,
            first >> 32 ^ words[3] ^ key[1],
            first & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return words


@pytest.mark.parametrize("target", ["sm80", "sm120"])
def test_random_words_are_those_of_philox(target):
    seed, n = 2**40 + 12345, 301
    out = torch.zeros(4 * n, dtype=torch.int32)
    execute(kernels.random_words, (2,), {"out_ptr": out, "seed": seed, "n": n, "BLOCK": 256}, target=target)
    words = (out.to(torch.int64) & 0xFFFFFFFF).view(n, 4).tolist()
    # tl.join puts the last joined innermost: a, c, b, d.
    expected = [[w[0], w[2], w[1], w[3]] for w in (philox(seed, i) for i in range(n))]
    assert words == expected


@pytest.mark.parametrize("target", ["sm80", "sm120"])
def test_columns_reduce_over_warps(target):
    x = torch.randn(64, 32)
    out = torch.zeros_like(x)
    execute(kernels.softmax_columns, (1,), {"x_ptr": x, "out_ptr": out, "M": 64, "N": 32}, target=target)
    assert nearly(out, x.softmax(0), 1e-6)


@pytest.mark.parametrize("target", ["sm80", "sm120"])
def test_special_functions_equal_torch(target):
    x = torch.cat([torch.rand(100) * 4 + 0.01, torch.tensor([1e-20, 1e5, 3e7])])  # the last ones for the range of cos
    n = len(x)
    out = torch.zeros(7, n)
    execute(kernels.special_functions, (1,), {"x_ptr": x, "out_ptr": out, "n": n, "BLOCK": 128}, target=target)
    x = x.double()
    expected = [torch.erf(x), x.rsqrt(), x.sqrt(), (1 + x) / x, x.log() + torch.exp2(-x)]
    expected += [torch.sigmoid(x) + x.cos() * x.sin(), (x * 3).floor() - x.ceil() + x]
    for got, value in zip(out[:6], expected[:6], strict=True):
        assert nearly(got, value, 2e-6)
    assert nearly(out[6, :-2], expected[6][:-2], 1e-6)


@pytest.mark.parametrize("target", ["sm80", "sm120"])
def test_integer_functions_equal_pythons(target):
    n = 77
    x, y = torch.randint(0, 2**62, (n,)), torch.randint(1, 2**40, (n,))
    x[::3], y[::2] = x[::3] >> 40, y[::2] >> 35
    y[y == 0] = 1
    out = torch.zeros(8, n, dtype=torch.int64)
    execute(
        kernels.integer_functions, (1,), {"x_ptr": x, "y_ptr": y, "out_ptr": out, "n": n, "BLOCK": 32}, target=target
    )

    def wrap(value: int, bits: int = 64) -> int:
        return (value + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)

    def divided(a: int, b: int) -> int:
        return abs(a) // b * (1 if a >= 0 else -1)

    for got, a, b in zip(out.T.tolist(), x.tolist(), y.tolist(), strict=True):
        a32, b32 = wrap(a, 32), wrap(b, 32)
        unsigned = (a & 0xFFFFFFFF) // (b & 0xFFFFFFFF | 1)
        narrow = wrap(divided(a32, 7) + (b32 - 13 * divided(b32, 13)), 32)
        expected = [wrap(a * b), a // b, a % b, a * b >> 64, (a >> 3) ^ wrap(b << 5), narrow]
        assert got == [*expected, min(a, b) + -(-a // 7), unsigned]


@pytest.mark.parametrize("target", ["sm80", "sm90", "sm100", "sm120"])
def test_a_transposed_product_equals_torch(target):
    a, b, out = torch.randn(64, 64).half(), torch.randn(64, 64).half(), torch.zeros(64, 64).half()
    execute(kernels.half_dot_half, (1,), {"a_ptr": a, "b_ptr": b, "out_ptr": out}, target=target)
    assert is_product(out.T, a, b)


@pytest.mark.parametrize("target", ["sm80", "sm90", "sm120"])
@pytest.mark.parametrize("dtype", HALVES)
def test_attention_equals_torch(target, dtype):
    q, k, v = (torch.randn(53, 32).to(dtype) for _ in range(3))
    out = torch.zeros_like(q)
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "out_ptr": out,
        "N": 53,
        "scale": 0.2,
        "D": 32,
        "BLOCK_M": 32,
        "BLOCK_N": 16,
    }
    execute(kernels.attention, (2,), arguments, target=target)
    expected = (q.double() @ k.double().T * 0.2).softmax(1) @ v.double()
    assert nearly(out, expected, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("target", ["sm80", "sm120"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_of_floats_are_sorted(target, dtype):
    x = torch.randn(3, 512).to(dtype)
    out = torch.zeros_like(x)
    execute(kernels.sort_rows, (3,), {"x_ptr": x, "out_ptr": out, "N": 512}, target=target)
    assert torch.equal(out, x.sort(1).values)


@pytest.mark.parametrize("target", ["sm80", "sm90", "sm120"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_activations_equal_torch(target, dtype):
    x = torch.randn(700).to(dtype)
    out = torch.zeros_like(x)
    execute(kernels.activation, (3,), {"x_ptr": x, "out_ptr": out, "n": 700, "BLOCK": 256}, target=target)
    x = x.double()
    assert nearly(out, torch.nn.functional.gelu(x) + x.clamp(-1, 1), 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "sum_type"), [(torch.int8, torch.int32), (torch.float16, torch.float16)])
def test_products_may_be_summed_in_other_types(target, dtype, sum_type):
    a, b = (torch.randint(-5, 5, shape).to(dtype) for shape in ((32, 64), (64, 32)))
    out = torch.zeros(32, 32, dtype=sum_type)
    execute(kernels.small_product, (1,), {"a_ptr": a, "b_ptr": b, "out_ptr": out}, target=target)
    assert torch.equal(out.double(), a.double() @ b.double())


@pytest.mark.parametrize("target", ["sm80", "sm90"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_atomics_of_many_blocks_add_up(target, dtype):
    ids = torch.randint(0, 9, (1000,))
    # Ten sums: before sm_90 an atomic on bfloat16 is a loop over the 32 bits that it lies in.
    counts, sums = torch.zeros(9, dtype=torch.int32), torch.zeros(10, dtype=dtype)
    execute(
        kernels.histogram,
        (4,),
        {"ids_ptr": ids, "counts_ptr": counts, "sums_ptr": sums, "n": 1000, "BLOCK": 256},
        target=target,
    )
    assert torch.equal(counts.long(), torch.bincount(ids, minlength=9))
    assert torch.equal(sums[:9], counts.to(dtype) * 0.5)


@pytest.mark.parametrize("target", ["sm80", "sm120"])
def test_running_totals_equal_torch(target):
    x = torch.randn(3, 512)
    out, last = torch.zeros_like(x), torch.zeros(3, dtype=torch.int64)
    execute(kernels.running_total, (3,), {"x_ptr": x, "out_ptr": out, "last_ptr": last, "N": 512}, target=target)
    assert nearly(out, x.double().cumsum(1), 1e-5)
    assert torch.equal(last, x.argmax(1))


def test_blocks_that_run_together_may_loop_as_long_as_each_needs():
    n = torch.arange(40, dtype=torch.int32)
    out = torch.full_like(n, -1)
    execute(kernels.count_down, (40,), {"n_ptr": n, "out_ptr": out})
    assert out.tolist() == [i.bit_length() for i in range(40)]


@pytest.mark.parametrize("stages", [1, 3])
def test_blocks_with_barriers_may_loop_as_long_as_each_needs(stages):
    lengths = torch.tensor([0, 1, 5, 2, 0, 3], dtype=torch.int32)
    a, b, out = torch.randn(6, 16, 80).half(), torch.randn(80, 16).half(), torch.zeros(6, 16, 16)
    arguments = {
        "a_ptr": a,
        "b_ptr": b,
        "out_ptr": out,
        "lengths_ptr": lengths,
        "K": 80,
        "BLOCK_K": 16,
        "STAGES": stages,
    }
    execute(kernels.ragged_matmul, (6,), arguments, num_stages=stages)
    for i, length in enumerate(lengths.tolist()):
        assert is_product(out[i], a[i, :, : 16 * length], b[: 16 * length])


def test_chosen_blocks_run_and_no_others():
    n = torch.arange(8, dtype=torch.int32)
    out = torch.full_like(n, -1)
    statistics = execute(kernels.count_down, (8,), {"n_ptr": n, "out_ptr": out}, blocks=[(3,), (5, 0, 0)])
    assert out.tolist() == [-1, -1, -1, 2, -1, 3, -1, -1]
    assert statistics.blocks == 2
    with pytest.raises(ValueError, match="outside the grid"):
        execute(kernels.count_down, (8,), {"n_ptr": n, "out_ptr": out}, blocks=[(8,)])
    assert execute(kernels.count_down, (8,), {"n_ptr": n, "out_ptr": out}, blocks=[]).instructions == 0
