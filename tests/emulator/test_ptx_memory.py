"""The PTX emulator works on the tensors' own memory and nowhere else, with arguments specialised as by the JIT."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from tests.emulator import kernels
from tests.emulator.ptx import Misaligned, OutOfBounds, TooMuchSharedMemory, UnsupportedKernel, execute
from tests.emulator.ptx.compilation import compile_kernel

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET: nothing is compiled")


def copy(x: torch.Tensor, out: torch.Tensor, n: int | None = None, **options) -> None:
    n = len(x) if n is None else n
    arguments = {"x_ptr": x, "out_ptr": out, "x_stride": x.stride(0), "out_stride": out.stride(0), "n": n, "BLOCK": 128}
    execute(kernels.copy, (-(-n // 128),), arguments, **options)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize(("stride", "offset"), [(1, 0), (1, 1), (3, 2), (16, 5)])
def test_strided_views_are_written_in_place(dtype, stride, offset):
    source, target = torch.randint(0, 100, (4000,)).to(dtype), torch.full((4000,), 7).to(dtype)
    before = target.clone()
    copy(source[offset : offset + 200 * stride : stride], target[1::2][:200])
    before[1::2][:200] = source[offset : offset + 200 * stride : stride]
    assert torch.equal(target, before)


def test_an_argument_may_be_given_twice():
    x = torch.arange(300)
    copy(x[:200], x[100:], 50)
    assert x[100:150].tolist() == list(range(50))
    copy(x, x)
    assert x[100:150].tolist() == list(range(50))


def test_an_enormous_tensor_is_touched_only_where_the_kernel_does():
    n = 2**31 + 1000
    x, out = torch.empty(n, dtype=torch.bfloat16), torch.zeros(1000, dtype=torch.bfloat16)
    x[-1000:] = torch.arange(1000)
    arguments = {"x_ptr": x[-1000:], "out_ptr": out, "x_stride": 1, "out_stride": 1, "n": 1000, "BLOCK": 128}
    execute(kernels.copy, (8,), arguments)
    assert torch.equal(out, x[-1000:])
    last = n // 128
    big = torch.empty(n, dtype=torch.bfloat16)
    execute(kernels.copy, (last + 1,), arguments | {"x_ptr": x, "out_ptr": big, "n": n}, blocks=[(last,), (last - 1,)])
    assert torch.equal(big[last * 128 :], x[last * 128 :])


@pytest.mark.parametrize("empty", [torch.empty(0), torch.empty(5)[:0], torch.empty(3, 0)[0]])
def test_an_empty_tensor_is_no_memory(empty):
    out = torch.zeros(4)
    arguments = {"x_ptr": empty, "out_ptr": out, "x_stride": 1, "out_stride": 1, "BLOCK": 128}
    execute(kernels.copy, (1,), arguments | {"n": 0})
    if empty.untyped_storage().nbytes() == 0:
        with pytest.raises(OutOfBounds):
            execute(kernels.copy, (1,), arguments | {"n": 4})


def test_memory_of_any_alignment_can_be_an_argument():
    buffer = bytearray(1000)
    for at in range(1, 8):
        x = torch.frombuffer(buffer, dtype=torch.uint8, offset=at, count=100)
        x[:] = torch.arange(100)
        out = torch.zeros(100, dtype=torch.uint8)
        copy(x, out)
        assert torch.equal(x, out)


def test_an_access_outside_says_who_where_and_of_what():
    x, out = torch.zeros(200), torch.zeros(300)
    with pytest.raises(OutOfBounds) as error:
        copy(x, out, 201)
    assert str(error.value).startswith("copy: thread 72 of block (1, 0, 0), address ")
    assert "ld.global" in str(error.value)
    assert "ends 4 bytes after the memory of x_ptr" in str(error.value)
    with pytest.raises(OutOfBounds, match=r"st\.global.*after the memory of out_ptr"):
        copy(out, x)
    with pytest.raises(OutOfBounds, match="bytes before the memory of x_ptr"):
        execute(kernels.copy, (1,), {"x_ptr": x, "out_ptr": out, "x_stride": -1, "out_stride": 1, "n": 2, "BLOCK": 128})


def test_bounds_of_the_view_are_tighter_than_those_of_the_storage():
    storage, out = torch.zeros(200), torch.zeros(300)
    copy(storage[10:100], out, 100)
    with pytest.raises(OutOfBounds, match="ends 4 bytes after the memory of x_ptr"):
        copy(storage[10:100], out, 91, bounds="view")
    copy(storage[10:100], out, 90, bounds="view")
    copy(storage[::3], out, bounds="view")
    with pytest.raises(ValueError, match="bounds"):
        copy(storage, out, bounds="page")


def test_a_wrong_alignment_is_reported():
    x = torch.frombuffer(bytearray(1000), dtype=torch.uint8)
    start = x.data_ptr() % 8
    halves = x[(9 - start) % 8 : (9 - start) % 8 + 400]
    with pytest.raises(Misaligned, match=r"copy: thread 0 of block \(0, 0, 0\)"):
        copy(halves.untyped_storage() and Reinterpreted(halves, torch.float32), torch.zeros(100), 100)


class Reinterpreted(torch.Tensor):
    """A tensor that says it has another type, as `triton.reinterpret` lets one say."""

    @staticmethod
    def __new__(cls, base: torch.Tensor, dtype: torch.dtype) -> "Reinterpreted":
        tensor = base.as_subclass(cls)
        tensor.pretended = dtype
        return tensor

    dtype = property(lambda self: self.pretended)


def compiled(kernel, **arguments):
    return compile_kernel(kernel, arguments, "sm80", {"num_warps": 4, "num_stages": 3})[0]


def test_arguments_are_specialised_as_by_the_jit():
    x = torch.zeros(1000)
    arguments = {"x_ptr": x, "out_ptr": x, "x_stride": 1, "out_stride": 2, "n": 100, "BLOCK": 128}
    one = compiled(kernels.copy, **arguments)
    assert one.signature == {
        "x_ptr": "*fp32",
        "out_ptr": "*fp32",
        "x_stride": "constexpr",
        "out_stride": "i32",
        "n": "i32",
        "BLOCK": "constexpr",
    }
    assert compiled(kernels.copy, **arguments) is one
    assert compiled(kernels.copy, **arguments | {"n": 99, "out_stride": 3}) is one
    assert compiled(kernels.copy, **arguments | {"x_ptr": x[1:]}) is not one
    assert "ld.global.v4" in compiled(kernels.copy, **arguments | {"n": 128, "BLOCK": 512}).ptx
    assert "ld.global.v4" not in compiled(kernels.copy, **arguments | {"x_ptr": x[1:], "n": 128, "BLOCK": 512}).ptx
    for value, kind in ((2**31 - 1, "i32"), (2**31, "i64"), (-(2**63), "i64"), (2**63, "u64"), (1, "constexpr")):
        assert compiled(kernels.copy, **arguments | {"n": value}).signature["n"] == kind


def test_numbers_of_all_types_arrive():
    out = torch.zeros(1, dtype=torch.float64)
    arguments = {"out_ptr": out, "i": -7, "j": 2**40, "flag": True, "x": 0.1, "half": 1.5, "nothing": None, "DOUBLE": 2}
    execute(kernels.add_scalars, (1,), arguments)
    x = torch.tensor(0.1).double().item()
    assert out.item() == 2 * (-7 + 3 + 100 + 2**40 + x + 1.5)
    execute(kernels.add_scalars, (1,), arguments | {"i": 1, "j": -(2**40), "flag": False, "nothing": out, "offset": 5})
    assert out.item() == 1 + 5 - 2**40 + x + 1.5


def test_a_launch_that_cannot_be_is_refused():
    x = torch.zeros(4)
    arguments = {"x_ptr": x, "out_ptr": x, "x_stride": 1, "out_stride": 1, "n": 4, "BLOCK": 128}
    with pytest.raises(UnsupportedKernel, match=r"copy needs n\b"):
        execute(kernels.copy, (1,), {name: value for name, value in arguments.items() if name != "n"})
    with pytest.raises(UnsupportedKernel, match="no parameter m"):
        execute(kernels.copy, (1,), arguments | {"m": 1})
    with pytest.raises(UnsupportedKernel, match=r"no @triton\.jit function"):
        execute(print, (1,), {})
    with pytest.raises(UnsupportedKernel, match="on meta"):
        execute(kernels.copy, (1,), arguments | {"x_ptr": x.to("meta")})
    with pytest.raises(UnsupportedKernel, match="sm80"):
        execute(kernels.copy, (1,), arguments, target="gfx90a")


def test_shared_memory_is_limited_as_on_the_target():
    a, b, ids, out = torch.zeros(64, 512).half(), torch.zeros(512, 128).half(), torch.arange(64), torch.zeros(64, 128)
    arguments = {"a_ptr": a, "b_ptr": b, "out_ptr": out, "ids_ptr": ids, "M": 64, "N": 128, "K": 512}
    arguments |= {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128, "PRECISION": "ieee", "STAGES": 4}
    assert execute(kernels.gather_matmul, (1, 1), arguments, target="sm80", num_stages=4).shared_bytes > 99 * 1024
    with pytest.raises(TooMuchSharedMemory, match=re.escape("sm_86 has 101376")):
        execute(kernels.gather_matmul, (1, 1), arguments, target="sm86", num_stages=4)


def test_an_interpreted_kernel_is_refused():
    program = (
        "import torch\n"
        "from tests.emulator import kernels, ptx\n"
        "try: ptx.execute(kernels.count_down, (1,), dict(n_ptr=torch.zeros(1), out_ptr=torch.zeros(1)))\n"
        "except ptx.UnsupportedKernel as error: print(error)"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    output = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert "count_down is interpreted" in output.stdout


def test_a_kernel_that_is_no_interpreted_one_is_compiled_whatever_the_environment(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, out = torch.randn(3, 64), torch.zeros(3, 64)
    arguments = {
        "x_ptr": x,
        "weight_ptr": None,
        "bias_ptr": None,
        "out_ptr": out,
        "stride": 64,
        "D": 64,
        "eps": 0.25,
        "BLOCK_D": 64,
    }
    execute(kernels.layer_norm, (3,), arguments)
    assert torch.allclose(out, torch.nn.functional.layer_norm(x, (64,), eps=0.25), atol=1e-6)
