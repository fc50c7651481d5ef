"""Fixtures of the kernel tests."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmmae_kernels.attention import call
from mmmae_kernels.attention.backends import packages, torch_operators
from mmmae_kernels.attention.backends.flash import flash_backend
from mmmae_kernels.cpu import library as native
from tests.kernels.attention_stand_ins import PACKAGES, STAND_INS, plain

GUARD = -12345


@pytest.fixture(autouse=True)
def seed():
    """The same numbers every time."""
    torch.manual_seed(0)


@pytest.fixture
def library():
    if native.unavailable_reason() is not None:
        pytest.skip(native.unavailable_reason())
    return native.module()


@pytest.fixture
def guarded() -> Iterator[Callable[..., Tensor]]:
    """Makes outputs that hold NaN (integers: -1) and lie between guards, which are checked when the test ends."""
    buffers = []

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        size = math.prod(shape)
        buffer = torch.full((size + 128,), GUARD, dtype=dtype)
        buffers.append((buffer, size))
        return buffer[64 : 64 + size].view(shape).fill_(math.nan if dtype.is_floating_point else -1)

    yield make
    for buffer, size in buffers:
        for guard in (buffer[:64], buffer[64 + size :]):
            assert torch.equal(guard, torch.full_like(guard, GUARD)), "memory outside an output was written to"


aten = torch.ops.aten
ALLOCATIONS = (aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default)
PRODUCTS = (aten.new_zeros.default, aten.mm.default, aten.addmm.default)


class _Guarded(TorchDispatchMode):
    def __init__(self, make: Callable[..., Tensor]):
        super().__init__()
        self.make, self.outputs = make, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func not in ALLOCATIONS + PRODUCTS:
            return result
        output = self.make(*result.shape, dtype=result.dtype)
        if func in ALLOCATIONS:
            self.outputs.append(output)
            return output
        return output.copy_(result)


@pytest.fixture
def guarded_allocations(guarded) -> Iterator[list[Tensor]]:
    """What an op allocates is `guarded`, and products that it may write to are; yields what was allocated unwritten."""
    with _Guarded(guarded) as mode:
        yield mode.outputs


@pytest.fixture
def inside() -> Callable[[Tensor], Tensor]:
    """The same values as a view into a larger buffer of NaN (integers: a number that is never right)."""

    def make(tensor: Tensor) -> Tensor:
        wrong = math.nan if tensor.dtype.is_floating_point else torch.iinfo(tensor.dtype).max
        larger = tensor.new_full([size + 3 for size in tensor.shape], wrong)
        return larger[tuple(slice(2, 2 + size) for size in tensor.shape)].copy_(tensor)

    return make


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that torch.empty gives is full of NaN or of the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def on_threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads; the one before is back when the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def default_dtype() -> Iterator[Callable[[torch.dtype], None]]:
    """Sets torch's default dtype; the one before is back when the test ends."""
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.fixture
def on_gpu(monkeypatch) -> Iterator[Callable[..., None]]:
    """Claims that tensors lie on a GPU of some architecture and that packages are there: stand-ins are called."""
    with contextlib.ExitStack() as operators:

        def claim(target: str, *installed: str) -> None:
            operators.close()
            if "torch_cudnn" in installed and "torch_flash" not in installed:
                installed = (*installed, "torch_flash")  # which serves single queries and keys
            for name in installed:
                stand_in = STAND_INS[name]
                stand_in.calls.clear()
                if hasattr(stand_in, "registered"):
                    loaded = torch._C._dispatch_get_all_op_names()
                    if name in PACKAGES and any(other.startswith(f"{stand_in.NAMESPACE}::") for other in loaded):
                        pytest.skip(f"the real {name} is loaded, its operators can't be registered twice")
                    operators.enter_context(stand_in.registered())
            modules = {flash_backend(name).PACKAGE[1]: STAND_INS[name] for name in installed if name in PACKAGES}
            built = [flash_backend(name).FORWARD for name in installed if name not in PACKAGES]
            monkeypatch.setattr(call, "target_of", lambda device, index: target)
            monkeypatch.setattr(plain, "target", target)
            monkeypatch.setattr(torch.version, "hip", "6.4" if target.startswith("gfx") else None)
            monkeypatch.setattr(
                packages,
                "refuses",
                lambda distribution, module: None if module in modules else f"{distribution} is not installed",
            )
            monkeypatch.setattr(packages, "load", lambda module: modules[module])
            monkeypatch.setattr(
                torch_operators,
                "gpu_missing",
                lambda forward, backward: None if forward in built else "there is no GPU that torch can use",
            )
            monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
            monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)

        yield claim
    for stand_in in STAND_INS.values():
        stand_in.calls.clear()
