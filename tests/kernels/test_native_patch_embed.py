"""The compiled gather and scatter of 3D patches against plain torch, on shapes and strides that hurt."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from torch import Tensor

GRID = (2, 3, 4)
TOKENS = math.prod(GRID)
PATCHES = [(3, 16, 16), (1, 8, 8), (5, 7, 7), (4, 14, 14), (1, 1, 1), (2, 3, 32)]
GUARD = -12345.0


def all_rows(volume: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """`[B, N, C*pt*ph*pw]`: every patch of `volume [B, C, T, H, W]`."""
    for dim, size in zip((2, 4, 6), patch, strict=True):
        volume = volume.unflatten(dim, (-1, size))  # [B, C, gt, pt, gh, ph, gw, pw] in the end
    return volume.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(1, 3).flatten(2)


def to_volume(rows: Tensor, patch: tuple[int, int, int], grid: tuple[int, int, int]) -> Tensor:
    """The inverse of `all_rows`."""
    rows = rows.unflatten(2, (-1, *patch)).unflatten(1, grid)  # [B, gt, gh, gw, C, pt, ph, pw]
    return rows.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6).flatten(4, 5).flatten(2, 3)


def pick(rows: Tensor, ids: Tensor) -> Tensor:
    """`[B*K, E]`: those of `rows [B, N, E]` that `ids [B, K]` names."""
    return rows.gather(1, ids[..., None].expand(-1, -1, rows.shape[2])).flatten(0, 1)


def make_volume(batch: int, channels: int, patch: tuple[int, int, int], grid: tuple[int, int, int] = GRID) -> Tensor:
    return torch.randn(batch, channels, *(n * size for n, size in zip(grid, patch, strict=True)))


def make_ids(batch: int, keep: int, tokens: int = TOKENS) -> Tensor:
    return torch.rand(batch, tokens).argsort(1)[:, :keep]


def inside_nans(tensor: Tensor) -> Tensor:
    """The same values as a view into the middle of a larger buffer of NaN."""
    larger = tensor.new_full([size + 3 for size in tensor.shape], math.nan)
    view = larger[tuple(slice(2, 2 + size) for size in tensor.shape)]
    return view.copy_(tensor)


def gather(library, volume: Tensor, ids: Tensor, patch: tuple[int, int, int], threads: int = 2) -> Tensor:
    """What the library gathers, after checking that it wrote nothing before or behind."""
    elements = volume.shape[1] * math.prod(patch)
    buffer = torch.full((ids.numel() + 4, elements), GUARD)
    out = buffer[2:-2]
    out.fill_(math.nan)
    library.gather_patches(volume, ids, patch, out, threads)
    assert torch.equal(buffer[:2], torch.full((2, elements), GUARD))
    assert torch.equal(buffer[-2:], torch.full((2, elements), GUARD))
    return out


def scatter(library, rows: Tensor, ids: Tensor, patch: tuple[int, int, int], like: Tensor, threads: int = 2) -> Tensor:
    """What the library scatters into zeros of the shape of `like`, after the same check."""
    buffer = torch.full((like.numel() + 200,), GUARD)
    out = buffer[100:-100].view(like.shape).zero_()
    library.scatter_patches(rows, ids, patch, out, threads)
    assert torch.equal(buffer[:100], torch.full((100,), GUARD))
    assert torch.equal(buffer[-100:], torch.full((100,), GUARD))
    return out


VOLUMES = {
    "contiguous": lambda v: v,
    "inside NaN": inside_nans,
    "channels last": lambda v: v.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3),
    "bands last": lambda v: v.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
    "rows and columns swapped": lambda v: v.transpose(3, 4).contiguous().transpose(3, 4),
    "every second column": lambda v: v.repeat_interleave(2, 4)[..., 1::2],
    "one sample expanded": lambda v: v[:1].expand(v.shape),
    "one column expanded": lambda v: v[..., :1].expand(v.shape),
    "one pixel expanded": lambda v: v[:, :, :1, :1, :1].expand(v.shape),
}
IDS = {
    "contiguous": lambda i: i,
    "transposed": lambda i: i.t().contiguous().t(),
    "every third": lambda i: i.repeat_interleave(3, 1)[:, 2::3],
    "one sample expanded": lambda i: i[:1].expand(i.shape),
    "one id expanded": lambda i: i[:, :1].expand(i.shape),
}


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("patch", PATCHES, ids=str)
@pytest.mark.parametrize("layout", VOLUMES)
def test_gather_equals_torch_for_volumes_of_any_strides(library, layout, patch, channels):
    volume = VOLUMES[layout](make_volume(3, channels, patch))
    ids = make_ids(3, 7)
    assert torch.equal(gather(library, volume, ids, patch), pick(all_rows(volume, patch), ids))


@pytest.mark.parametrize("patch", PATCHES, ids=str)
@pytest.mark.parametrize("layout", IDS)
def test_gather_and_scatter_equal_torch_for_ids_of_any_strides(library, layout, patch):
    volume = make_volume(3, 2, patch)
    ids = IDS[layout](make_ids(3, 5))
    rows = gather(library, volume, ids, patch)
    assert torch.equal(rows, pick(all_rows(volume, patch), ids))
    assert torch.equal(scatter(library, rows, ids, patch, volume), scatter_with_torch(rows, ids, patch, volume))


def scatter_with_torch(rows: Tensor, ids: Tensor, patch: tuple[int, int, int], like: Tensor) -> Tensor:
    grid = tuple(like.shape[2 + axis] // patch[axis] for axis in range(3))
    sums = torch.zeros(like.shape[0], math.prod(grid), rows.shape[1])
    for b, sample in enumerate(rows.view(*ids.shape, rows.shape[1])):
        for row, token in zip(sample, ids[b].tolist(), strict=True):
            sums[b, token] += row
    return to_volume(sums, patch, grid)


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("patch", PATCHES, ids=str)
@pytest.mark.parametrize(
    "layout", ["contiguous", "inside NaN", "transposed", "one row expanded", "one column expanded"]
)
def test_scatter_equals_torch_for_rows_of_any_strides(library, layout, patch, channels):
    volume = make_volume(3, channels, patch)
    ids = make_ids(3, 7)
    rows = torch.randn(21, channels * math.prod(patch))
    rows = {
        "contiguous": lambda: rows,
        "inside NaN": lambda: inside_nans(rows),
        "transposed": lambda: rows.t().contiguous().t(),
        "one row expanded": lambda: rows[:1].expand(rows.shape),
        "one column expanded": lambda: rows[:, :1].expand(rows.shape),
    }[layout]()
    assert torch.equal(scatter(library, rows, ids, patch, volume), scatter_with_torch(rows, ids, patch, volume))


@pytest.mark.parametrize("patch", PATCHES, ids=str)
@pytest.mark.parametrize(("batch", "keep"), [(0, 5), (2, 0), (0, 0), (1, 1), (2, TOKENS)])
def test_nothing_one_and_all_are_kept(library, batch, keep, patch):
    volume = make_volume(batch, 2, patch)
    ids = make_ids(batch, keep)
    rows = gather(library, volume, ids, patch)
    assert torch.equal(rows, pick(all_rows(volume, patch), ids))
    assert torch.equal(scatter(library, rows, ids, patch, volume), scatter_with_torch(rows, ids, patch, volume))


def test_all_tokens_in_order_scatter_back_to_the_volume(library):
    volume = make_volume(2, 3, (3, 16, 16))
    ids = torch.arange(TOKENS).expand(2, TOKENS)
    rows = gather(library, volume, ids, (3, 16, 16))
    assert torch.equal(scatter(library, rows, ids, (3, 16, 16), volume), volume)


def test_a_repeated_id_is_gathered_again_and_its_rows_are_added(library):
    volume = make_volume(2, 1, (1, 2, 2))
    ids = torch.tensor([[5, 5, 0, 5], [23, 0, 0, 23]])
    rows = gather(library, volume, ids, (1, 2, 2))
    assert torch.equal(rows, pick(all_rows(volume, (1, 2, 2)), ids))
    added = all_rows(scatter(library, rows, ids, (1, 2, 2), volume), (1, 2, 2))
    torch.testing.assert_close(added[0, 5], 3 * rows[0])
    torch.testing.assert_close(added[1, 0], 2 * rows[5])


def test_scatter_adds_to_what_is_there(library):
    volume = make_volume(2, 1, (1, 2, 2))
    ids = make_ids(2, 3)
    rows = torch.randn(6, 4)
    expected = volume + scatter_with_torch(rows, ids, (1, 2, 2), volume)
    library.scatter_patches(rows, ids, (1, 2, 2), volume, 1)
    assert torch.equal(volume, expected)


@pytest.mark.parametrize("patch", [(3, 16, 16), (5, 7, 7)], ids=str)
@pytest.mark.parametrize("batch", [1, 5])
def test_results_are_the_same_for_any_number_of_threads_and_every_time(library, batch, patch):
    grid = (4, 9, 9)
    volume = make_volume(batch, 1, patch, grid)
    ids = torch.randint(0, math.prod(grid), (batch, 400))  # repeats: the order of a sum shows in its last bits
    gathered = pick(all_rows(volume, patch), ids)
    rows = torch.randn_like(gathered)
    scattered = scatter_with_torch(rows, ids, patch, volume)
    for threads in (1, 2, 3, 7, 2, 2, 2):
        assert torch.equal(gather(library, volume, ids, patch, threads), gathered)
        assert torch.equal(scatter(library, rows, ids, patch, volume, threads), scattered)


@pytest.fixture(scope="module")
def huge():
    """More than 2^31 elements, of which the system gives memory only to those that a test touches."""
    try:
        return torch.empty(2**31 + 16)
    except RuntimeError as error:
        pytest.skip(f"no 8 GiB of address space: {error}")


@pytest.mark.parametrize("axis", range(5))
def test_gather_passes_offsets_of_two_to_the_31(library, huge, axis):
    shape, stride = [1, 1, 1, 1, 8], [0, 0, 0, 0, 1]
    shape[axis], stride[axis] = (2, 2**31) if axis < 4 else (2**31 + 8, 1)
    volume = huge.as_strided(shape, stride)
    huge[-16:-8] = torch.arange(8.0)
    if axis < 2:  # the second sample or channel
        ids, rows = torch.zeros(shape[0], 1, dtype=torch.int64), slice(-8, None)
    else:  # the last token
        ids, rows = torch.tensor([[shape[axis] // (8 if axis == 4 else 1) - 1]]), slice(None)
    assert torch.equal(gather(library, volume, ids, (1, 1, 8)).flatten()[rows], torch.arange(8.0))


def test_scatter_passes_offsets_of_two_to_the_31(library, huge):
    huge[-8:] = torch.arange(8.0)
    last = torch.tensor([[2**28 + 1]])
    library.scatter_patches(torch.ones(1, 8), last, (1, 1, 8), huge.view(1, 1, 1, 1, -1), 2)
    assert torch.equal(huge[-8:], torch.arange(1.0, 9.0))


WRONG_GATHERS = [
    ({"volume": torch.zeros(2, 1, 2, 6, 8, dtype=torch.float64)}, r"^volume: dtype is float64, expected is float32"),
    ({"volume": torch.zeros(2, 1, 2, 6, 8, dtype=torch.bfloat16)}, r"^volume: dtype is bfloat16, expected is float32"),
    ({"volume": torch.zeros(2, 2, 6, 8)}, r"^volume: shape is \[2, 2, 6, 8\], expected is \[B, C, T, H, W\]"),
    ({"volume": torch.zeros(2, 1, 2, 7, 8)}, r"^volume: H is 7, expected is a positive multiple of the patch's 2"),
    ({"volume": torch.zeros(2, 1, 2, 6, 0)}, r"^volume: W is 0, expected is a positive multiple of the patch's 2"),
    ({"volume": torch.zeros(2, 0, 2, 6, 8)}, r"^volume: C is 0, expected is at least one channel"),
    ({"volume": torch.zeros(3, 1, 2, 6, 8)}, r"^ids: shape is \[2, 4\], expected is \[3, 4\]"),
    ({"ids": torch.zeros(2, 4, dtype=torch.int32)}, r"^ids: dtype is int32, expected is int64"),
    ({"ids": torch.zeros(2, 4, dtype=torch.bool)}, r"^ids: dtype is bool, expected is int64"),
    ({"ids": torch.zeros(8, dtype=torch.int64)}, r"^ids: shape is \[8\], expected is \[B, K\]"),
    ({"ids": torch.tensor([[0, 1, 2, 3], [4, 5, 6, 24]])}, r"^ids: 24 at \[1, 3\] is outside 0\.\.23"),
    ({"ids": torch.tensor([[0, 1, -1, 3], [4, 5, 6, 7]])}, r"^ids: -1 at \[0, 2\] is outside 0\.\.23"),
    ({"ids": torch.full((2, 4), 2**62)}, r"^ids: 4611686018427387904 at \[0, 0\] is outside 0\.\.23"),
    ({"patch": (1, 0, 2)}, r"^patch: \[1, 0, 2\] given, expected are sizes of at least 1"),
    ({"patch": (1, -2, 2)}, r"^patch: \[1, -2, 2\] given, expected are sizes of at least 1"),
    ({"patch": (4, 2, 2)}, r"^volume: T is 2, expected is a positive multiple of the patch's 4"),
    ({"threads": 0}, r"^threads: 0 given, expected is at least 1"),
]
WRONG_ROWS = [
    (torch.zeros(8, 4, dtype=torch.float16), r"dtype is float16, expected is float32"),
    (torch.zeros(8, 4, dtype=torch.complex64), r"dtype is complex64, expected is float32"),
    (torch.zeros(7, 4), r"shape is \[7, 4\], expected is \[8, 4\]"),
    (torch.zeros(8, 5), r"shape is \[8, 5\], expected is \[8, 4\]"),
    (torch.zeros(2, 4, 4), r"shape is \[2, 4, 4\], expected is \[B\*K, C\*pt\*ph\*pw\]"),
]


def right_arguments() -> dict:
    return {"volume": torch.ones(2, 1, 2, 6, 8), "ids": make_ids(2, 4), "patch": (1, 2, 2), "threads": 2}


@pytest.mark.parametrize(("wrong", "message"), WRONG_GATHERS, ids=lambda value: value if isinstance(value, str) else "")
def test_gather_refuses_wrong_arguments_and_writes_nothing(library, wrong, message):
    out = torch.full((8, 4), GUARD)
    with pytest.raises(ValueError, match=message):
        library.gather_patches(**{**right_arguments(), **wrong}, out=out)
    assert torch.equal(out, torch.full((8, 4), GUARD))


@pytest.mark.parametrize(("wrong", "message"), WRONG_GATHERS, ids=lambda value: value if isinstance(value, str) else "")
def test_scatter_refuses_wrong_arguments_and_writes_nothing(library, wrong, message):
    arguments = {**right_arguments(), **wrong}
    volume = arguments.pop("volume").fill_(7)
    with pytest.raises(ValueError, match=message.replace("volume", "out_volume")):
        library.scatter_patches(torch.ones(8, 4), out_volume=volume, **arguments)
    assert torch.equal(volume, torch.full_like(volume, 7))


@pytest.mark.parametrize(("rows", "message"), WRONG_ROWS)
def test_rows_of_a_wrong_shape_or_dtype_are_refused(library, rows, message):
    arguments = right_arguments()
    with pytest.raises(ValueError, match="^out: " + message):
        library.gather_patches(**arguments, out=rows)
    assert not rows.any()
    volume = arguments.pop("volume")
    with pytest.raises(ValueError, match="^grad_rows: " + message):
        library.scatter_patches(rows, out_volume=volume, **arguments)
    assert torch.equal(volume, torch.ones_like(volume))


def test_strided_outputs_are_refused(library):
    arguments = right_arguments()
    with pytest.raises(
        ValueError, match=r"^out: strides are \[8, 1\] for shape \[8, 4\], expected is contiguous memory"
    ):
        library.gather_patches(**arguments, out=torch.zeros(8, 8)[:, :4])
    arguments["out_volume"] = arguments.pop("volume").transpose(3, 4).contiguous().transpose(3, 4)
    with pytest.raises(ValueError, match=r"^out_volume: strides are \[96, 96, 48, 1, 6\] .* expected is contiguous"):
        library.scatter_patches(torch.ones(8, 4), **arguments)


class OnDevice:
    """A tensor that claims to lie on a device of this number in DLPack's list (1 is the CPU, 2 is CUDA)."""

    def __init__(self, tensor: Tensor, device_type: int):
        self.tensor, self.device_type = tensor, device_type

    def __dlpack__(self, **_):
        capsule = self.tensor.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        device = pointer(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)
        ctypes.c_int32.from_address(device).value = self.device_type
        return capsule


@pytest.mark.parametrize("name", ["volume", "ids", "out"])
def test_a_tensor_of_another_device_is_refused(library, name):
    arguments = {**right_arguments(), "out": torch.zeros(8, 4)}
    arguments[name] = OnDevice(arguments[name], 2)
    with pytest.raises(ValueError, match=f"^{name}: lies on device type 2 of dlpack, expected is the CPU"):
        library.gather_patches(**arguments)


def test_page_locked_memory_is_the_cpu_s(library):
    arguments = right_arguments()
    expected = gather(library, arguments["volume"], arguments["ids"], arguments["patch"])
    out = torch.zeros(8, 4)
    library.gather_patches(**{**arguments, "volume": OnDevice(arguments["volume"], 3)}, out=out)
    assert torch.equal(out, expected)


def test_a_tensor_without_memory_is_refused(library):
    with pytest.raises(TypeError):
        library.gather_patches(**{**right_arguments(), "ids": make_ids(2, 4).to("meta")}, out=torch.zeros(8, 4))
