"""Functions of the compiled CPU library: tensors lie on the CPU and do not require gradients."""

from torch import Tensor

def team_size(threads: int) -> int:
    """How many threads OpenMP gives to a call that asks for `threads`."""

def gather_patches(volume: Tensor, ids: Tensor, patch: tuple[int, int, int], out: Tensor, threads: int) -> None:
    """Write the 3D patches of `volume` that `ids` names into `out`, one row a patch, in the order (c, t, h, w).

    Args:
        volume: `[B, C, T, H, W]` float32, any strides.
        ids: `[B, K]` int64 token numbers, row-major over (t, h, w), any strides.
        patch: sizes along T, H, W.
        out: `[B*K, C*pt*ph*pw]` float32, contiguous.
        threads: of OpenMP, `torch.get_num_threads()`.

    Raises:
        ValueError: a device, dtype, shape or stride is another, T, H or W is no multiple of the patch, or an id is
            outside 0..N-1. Nothing has been written then.
    """

def scatter_patches(
    grad_rows: Tensor, ids: Tensor, patch: tuple[int, int, int], out_volume: Tensor, threads: int
) -> None:
    """Add row after row into the patches of `out_volume` that `ids` names: the transpose of `gather_patches`.

    The sum over a repeated id is taken in the order of `ids`, whatever the number of threads.

    Args:
        grad_rows: `[B*K, C*pt*ph*pw]` float32, any strides.
        ids: `[B, K]` int64 token numbers, row-major over (t, h, w), any strides.
        patch: sizes along T, H, W.
        out_volume: `[B, C, T, H, W]` float32, contiguous; zeros for a gradient.
        threads: of OpenMP, `torch.get_num_threads()`.

    Raises:
        ValueError: as in `gather_patches`.
    """
