"""The compiled gather and scatter of 3D patches against plain torch, on shapes and strides that hurt."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmmae_kernels import patchify, use_backend
from mmmae_kernels.patch_embed.cpu import gather_patches, gather_rows, scatter_patches
from mmmae_kernels.patch_embed.reference import patchify_reference

pytestmark = pytest.mark.usefixtures("library", "on_threads")
GRID = (2, 3, 4)
TOKENS = math.prod(GRID)
PATCHES = [(3, 16, 16), (1, 8, 8), (5, 7, 7), (4, 14, 14), (1, 1, 1), (2, 3, 32)]
GUARD = -12345.0


def all_rows(volume: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Return every patch of `volume [B, C, T, H, W]` as rows `[B, N, C*pt*ph*pw]`."""
    for dim, size in zip((2, 4, 6), patch, strict=True):
        volume = volume.unflatten(dim, (-1, size))  # [B, C, gt, pt, gh, ph, gw, pw] in the end
    return volume.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(1, 3).flatten(2)


def to_volume(rows: Tensor, patch: tuple[int, int, int], grid: tuple[int, int, int]) -> Tensor:
    """Put rows back into a volume, the inverse of `all_rows`."""
    rows = rows.unflatten(2, (-1, *patch)).unflatten(1, grid)  # [B, gt, gh, gw, C, pt, ph, pw]
    return rows.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6).flatten(4, 5).flatten(2, 3)


def pick(rows: Tensor, ids: Tensor) -> Tensor:
    """Return the rows `[B*K, E]` of `rows [B, N, E]` that `ids [B, K]` selects."""
    return rows.gather(1, ids[..., None].expand(-1, -1, rows.shape[2])).flatten(0, 1)


def make_volume(batch: int, channels: int, patch: tuple[int, int, int], grid: tuple[int, int, int] = GRID) -> Tensor:
    return torch.randn(batch, channels, *(n * size for n, size in zip(grid, patch, strict=True)))


def make_ids(batch: int, keep: int, tokens: int = TOKENS) -> Tensor:
    return torch.rand(batch, tokens).argsort(1)[:, :keep]


def inside_nans(tensor: Tensor) -> Tensor:
    """Return the same values as a view into the middle of a larger buffer of NaN."""
    larger = tensor.new_full([size + 3 for size in tensor.shape], math.nan)
    view = larger[tuple(slice(2, 2 + size) for size in tensor.shape)]
    return view.copy_(tensor)


def gather(volume: Tensor, ids: Tensor, patch: tuple[int, int, int], threads: int = 2) -> Tensor:
    """Gather rows by the library, and check that nothing before or behind the output was written."""
    torch.set_num_threads(threads)
    elements = volume.shape[1] * math.prod(patch)
    buffer = torch.full((ids.numel() + 4, elements), GUARD)
    out = buffer[2:-2]
    out.fill_(math.nan)
    gather_rows(volume, patch, ids, out)
    assert torch.equal(buffer[:2], torch.full((2, elements), GUARD))
    assert torch.equal(buffer[-2:], torch.full((2, elements), GUARD))
    return out


def scatter(rows: Tensor, ids: Tensor, patch: tuple[int, int, int], like: Tensor, threads: int = 2) -> Tensor:
    """Scatter rows by the library into zeros of the shape of `like`."""
    torch.set_num_threads(threads)
    return scatter_patches(rows.unflatten(0, ids.shape), ids, patch, tuple(like.shape))


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
def test_gather_equals_torch_for_volumes_of_any_strides(layout, patch, channels):
    volume = VOLUMES[layout](make_volume(3, channels, patch))
    ids = make_ids(3, 7)
    assert torch.equal(gather(volume, ids, patch), pick(all_rows(volume, patch), ids))


@pytest.mark.parametrize("patch", PATCHES, ids=str)
@pytest.mark.parametrize("layout", IDS)
def test_gather_and_scatter_equal_torch_for_ids_of_any_strides(layout, patch):
    volume = make_volume(3, 2, patch)
    ids = IDS[layout](make_ids(3, 5))
    rows = gather(volume, ids, patch)
    assert torch.equal(rows, pick(all_rows(volume, patch), ids))
    assert torch.equal(scatter(rows, ids, patch, volume), scatter_with_torch(rows, ids, patch, volume))


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
def test_scatter_equals_torch_for_rows_of_any_strides(layout, patch, channels):
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
    assert torch.equal(scatter(rows, ids, patch, volume), scatter_with_torch(rows, ids, patch, volume))


@pytest.mark.parametrize("patch", PATCHES, ids=str)
@pytest.mark.parametrize(("batch", "keep"), [(0, 5), (2, 0), (0, 0), (1, 1), (2, TOKENS)])
def test_nothing_one_and_all_are_kept(batch, keep, patch):
    volume = make_volume(batch, 2, patch)
    ids = make_ids(batch, keep)
    rows = gather(volume, ids, patch)
    assert torch.equal(rows, pick(all_rows(volume, patch), ids))
    assert torch.equal(scatter(rows, ids, patch, volume), scatter_with_torch(rows, ids, patch, volume))


def test_all_tokens_in_order_scatter_back_to_the_volume():
    volume = make_volume(2, 3, (3, 16, 16))
    ids = torch.arange(TOKENS).expand(2, TOKENS)
    rows = gather(volume, ids, (3, 16, 16))
    assert torch.equal(scatter(rows, ids, (3, 16, 16), volume), volume)


def test_a_repeated_id_is_gathered_again_and_its_rows_are_added():
    volume = make_volume(2, 1, (1, 2, 2))
    ids = torch.tensor([[5, 5, 0, 5], [23, 0, 0, 23]])
    rows = gather(volume, ids, (1, 2, 2))
    assert torch.equal(rows, pick(all_rows(volume, (1, 2, 2)), ids))
    added = all_rows(scatter(rows, ids, (1, 2, 2), volume), (1, 2, 2))
    torch.testing.assert_close(added[0, 5], 3 * rows[0])
    torch.testing.assert_close(added[1, 0], 2 * rows[5])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.usefixtures("guarded_allocations")
def test_scatter_writes_nothing_outside_its_volume(threads):
    volume, ids = make_volume(3, 2, (3, 16, 16)), make_ids(3, 7)
    rows = torch.randn(21, 2 * 3 * 16 * 16)
    expected = scatter_with_torch(rows, ids, (3, 16, 16), volume)
    assert torch.equal(scatter(rows, ids, (3, 16, 16), volume, threads), expected)


@pytest.mark.parametrize("patch", [(3, 16, 16), (5, 7, 7)], ids=str)
@pytest.mark.parametrize("batch", [1, 5])
def test_results_are_the_same_for_any_number_of_threads_and_every_time(batch, patch):
    grid = (4, 9, 9)
    volume = make_volume(batch, 1, patch, grid)
    ids = torch.randint(0, math.prod(grid), (batch, 400))  # repeats: the order of a sum shows in its last bits
    gathered = pick(all_rows(volume, patch), ids)
    rows = torch.randn_like(gathered)
    scattered = scatter_with_torch(rows, ids, patch, volume)
    for threads in (1, 2, 3, 7, 2, 2, 2):
        assert torch.equal(gather(volume, ids, patch, threads), gathered)
        assert torch.equal(scatter(rows, ids, patch, volume, threads), scattered)


@pytest.fixture(scope="module")
def huge():
    """More than 2^31 elements, of which the system gives memory only to those that a test touches."""
    try:
        return torch.empty(2**31 + 16)
    except RuntimeError as error:
        pytest.skip(f"no 8 GiB of address space: {error}")


@pytest.mark.parametrize("axis", range(5))
def test_gather_passes_offsets_of_two_to_the_31(huge, axis):
    shape, stride = [1, 1, 1, 1, 8], [0, 0, 0, 0, 1]
    shape[axis], stride[axis] = (2, 2**31) if axis < 4 else (2**31 + 8, 1)
    volume = huge.as_strided(shape, stride)
    huge[-16:-8] = torch.arange(8.0)
    if axis < 2:  # the second sample or channel
        ids, rows = torch.zeros(shape[0], 1, dtype=torch.int64), slice(-8, None)
    else:  # the last token
        ids, rows = torch.tensor([[shape[axis] // (8 if axis == 4 else 1) - 1]]), slice(None)
    assert torch.equal(gather(volume, ids, (1, 1, 8)).flatten()[rows], torch.arange(8.0))


def test_scatter_passes_offsets_of_two_to_the_31(library, huge):
    huge[-8:] = torch.arange(8.0)
    last = torch.tensor([[2**28 + 1]])
    rows = torch.ones(1, 8)
    library.scatter_patches(
        rows.data_ptr(),
        rows.stride(),
        last.data_ptr(),
        last.stride(),
        1,
        (1, 1, 8),
        huge.data_ptr(),
        (1, 1, 1, 1, huge.numel()),
        2,
    )
    assert torch.equal(huge[-8:], torch.arange(1.0, 9.0))


@pytest.mark.parametrize("shape", [(1, 1, 0, 4, 4), (1, 0, 1, 4, 4), (0, 1, 1, 4, 4), (2, 1, 1, 0, 4)], ids=str)
def test_sizes_of_zero_give_what_pytorch_gives(shape):
    shapes = []
    for backend in ("native", "eager"):
        with use_backend(backend):
            volume = torch.zeros(shape, requires_grad=True)
            rows = patchify(volume, (1, 2, 2))
            rows.sum().backward()
            shapes.append((rows.shape, volume.grad.shape))
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(default_dtype, dtype):
    volume, ids = make_volume(2, 1, (1, 2, 2)), make_ids(2, 5)
    default_dtype(dtype)
    rows = gather_patches(volume, ids, (1, 2, 2))
    assert rows.dtype == scatter_patches(rows, ids, (1, 2, 2), tuple(volume.shape)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.bfloat16, torch.float16, torch.float32])
def test_the_operator_gathers_in_the_dtype_of_the_volume(dtype):
    info = torch.iinfo(dtype) if dtype in (torch.uint8, torch.int16) else None
    low, high = (-200, 200) if info is None else (info.min, info.max + 1)
    volume = torch.randint(low, high, (2, 1, 4, 16, 48)).to(dtype)
    ids = make_ids(2, 5, 12)
    for some in (volume, volume.transpose(3, 4).contiguous().transpose(3, 4)):
        rows = torch.ops.mmmae.gather_patches(some, ids, [2, 8, 16], "native")
        assert rows.dtype == dtype
        assert torch.equal(rows, patchify_reference(volume.double(), (2, 8, 16), ids).to(dtype))


@pytest.mark.parametrize(("source", "dtype"), [(torch.float32, torch.int16), (torch.int16, torch.uint8)])
def test_nothing_is_converted_to_integers(source, dtype):
    out = torch.full((1, 16), 7, dtype=dtype)
    with pytest.raises(ValueError, match=r"^dtypes are \d and \d, expected"):
        gather_rows(torch.zeros(1, 1, 1, 4, 4, dtype=source), (1, 4, 4), torch.zeros(1, 1, dtype=torch.int64), out)
    assert bool((out == 7).all())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"volume": torch.zeros(2, 1, 2, 6, 8, dtype=torch.float64)}, "volume .*float64"),
        ({"volume": torch.zeros(2, 1, 2, 6, 8, dtype=torch.uint8)}, "volume .*uint8"),
        ({"volume": torch.zeros(2, 2, 6, 8)}, r"volume has shape \[2, 2, 6, 8\]"),
        ({"volume": torch.zeros(2, 1, 2, 7, 8)}, "volume has H = 7"),
        ({"volume": torch.zeros(3, 1, 2, 6, 8)}, r"ids has shape \[2, 4\]"),
        ({"ids": torch.zeros(2, 4, dtype=torch.int32)}, "ids .*int32"),
        ({"ids": torch.zeros(2, 4, dtype=torch.bool)}, "ids .*bool"),
        ({"ids": torch.zeros(8, dtype=torch.int64)}, r"ids has shape \[8\]"),
        ({"ids": torch.tensor([[0, 1, 2, 3], [4, 5, 6, 24]])}, "ids contains 24"),
        ({"ids": make_ids(2, 4).to("meta")}, "ids .*meta"),
        ({"patch": (1, 0, 2)}, "patch"),
        ({"patch": (1, -2, 2)}, "patch"),
        ({"patch": (4, 2, 2)}, "volume has T = 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_refused(wrong, message):
    right = {"volume": torch.ones(2, 1, 2, 6, 8), "patch": (1, 2, 2), "ids": make_ids(2, 4)}
    with use_backend("native"), pytest.raises(ValueError, match=message):
        patchify(**{**right, **wrong})


@pytest.mark.parametrize("wrong", [24, -1, 2**62])
def test_ids_out_of_range_are_refused_and_nothing_is_written(guarded_allocations, wrong):
    volume, ids = torch.ones(2, 1, 2, 6, 8), make_ids(2, 4)
    ids[1, 3] = wrong
    message = rf"^ids\[1, 3\] is {wrong}, expected 0\.\.23"
    with pytest.raises(ValueError, match=message):
        gather_patches(volume, ids, (1, 2, 2))
    (rows,) = guarded_allocations
    assert bool(rows.isnan().all())
    with pytest.raises(ValueError, match=message):
        scatter_patches(torch.ones(2, 4, 4), ids, (1, 2, 2), tuple(volume.shape))


def test_scatter_refuses_an_id_out_of_range_before_it_adds(library):
    volume, rows, ids = torch.full((1, 1, 1, 1, 8), 7.0), torch.ones(2, 4), torch.tensor([[0, 2]])
    with pytest.raises(ValueError, match=r"^ids\[0, 1\] is 2, expected 0\.\.1"):
        library.scatter_patches(
            rows.data_ptr(), (4, 1), ids.data_ptr(), (2, 1), 2, (1, 1, 4), volume.data_ptr(), (1, 1, 1, 1, 8), 1
        )
    assert bool((volume == 7).all())


def test_a_thread_count_below_one_is_refused(library):
    sizes, ones = (0,) * 5, (1, 1, 1)
    with pytest.raises(ValueError, match=r"^threads is 0, expected"):
        library.gather_patches(0, sizes, sizes, 0, (0, 0), 0, ones, 0, (0, 0), 0)
    with pytest.raises(ValueError, match=r"^threads is 0, expected"):
        library.scatter_patches(0, (0, 0), 0, (0, 0), 0, ones, 0, sizes, 0)
