"""Functions of the compiled CPU library.

Tensors lie on the CPU and hold float32 unless said otherwise; DLPack capsules of them do too, which is what
`cpu.library.call` passes. Inputs may have any strides but for the last axis, which lies in one piece; outputs
are contiguous and wholly written. A result is the same for any number of `threads`. Each function raises ValueError
for a device, dtype, shape or stride that does not fit and for an id out of range, before anything is written.
"""

from torch import Tensor

def team_size(threads: int) -> int:
    """How many threads OpenMP gives to a call that asks for `threads`."""

def gather_patches(volume: Tensor, ids: Tensor, patch: tuple[int, int, int], out: Tensor, threads: int) -> None:
    """Write the 3D patches of `volume` that `ids` names into `out`, one row a patch, in the order (c, t, h, w).

    Args:
        volume: `[B, C, T, H, W]` float32, int16 or uint8, any strides.
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

def add_position(tokens: Tensor, ids: Tensor, position: Tensor, threads: int) -> None:
    """Add the position of each token to it in place.

    Args:
        tokens: `[B, K, D]`, contiguous.
        ids: `[B, K]` int64 token numbers, any strides.
        position: `[N, D]`.
        threads: of OpenMP, `torch.get_num_threads()`.
    """

def embedding_gradients(
    grad: Tensor, ids: Tensor, grad_position: Tensor, grad_bias: Tensor | None, threads: int
) -> None:
    """Sum a gradient by token number, in the order of `ids`, and over all tokens.

    Args:
        grad: `[B, K, D]`.
        ids: `[B, K]` int64 token numbers, any strides.
        grad_position: `[N, D]`, the output; zero where no id names the token.
        grad_bias: `[D]`, an output too, or None.
        threads: of OpenMP, `torch.get_num_threads()`.
    """

def sum_of_rows(grad: Tensor, out: Tensor, threads: int) -> None:
    """Sum `grad [B, K, D]` over tokens into `out [D]`."""

def random_masking(
    seed: int, first_sample: int, ids_keep: Tensor, ids_masked: Tensor, ids_restore: Tensor, threads: int
) -> None:
    """Write the tables of `random_masking_reference` for the samples from `first_sample` on.

    Args:
        seed: as a signed 64-bit integer.
        first_sample: number of the first sample.
        ids_keep, ids_masked, ids_restore: `[B, K]`, `[B, N-K]` and `[B, N]` int64, the outputs.
        threads: of OpenMP, `torch.get_num_threads()`.
    """

def decoder_tokens(
    visible: Tensor, mask_token: Tensor, ids_restore: Tensor, position: Tensor, out: Tensor, threads: int
) -> None:
    """Write the decoder's input.

    Args:
        visible: `[B, K, D]`.
        mask_token: `[D]`.
        ids_restore: `[B, N]` int64, any strides; below K it names a visible row, else the token is masked.
        position: `[N, D]`.
        out: `[B, N, D]`, the output.
        threads: of OpenMP, `torch.get_num_threads()`.
    """

def decoder_tokens_backward(
    grad: Tensor,
    ids_restore: Tensor,
    grad_visible: Tensor,
    grad_mask_token: Tensor,
    grad_position: Tensor,
    threads: int,
) -> None:
    """Write the gradients of the decoder's input in one pass over `grad`.

    Args:
        grad: `[B, N, D]`.
        ids_restore: `[B, N]` int64, any strides, no permutation needed.
        grad_visible: `[B, K, D]`, the sum over the tokens that name a row, in their order.
        grad_mask_token, grad_position: `[D]` and `[N, D]`.
        threads: of OpenMP, `torch.get_num_threads()`.
    """

def masked_l2_loss(
    prediction: Tensor,
    target: Tensor,
    ids: Tensor | None,
    weights: Tensor | None,
    epsilon: float | None,
    factor: float,
    out: Tensor | None,
    threads: int,
) -> float:
    """The sum over tokens of weight times squared error, and `factor * weight * (prediction - target)`.

    Args:
        prediction: `[B, M, D]`.
        target: `[B, N, D]`, or `[B, M, D]` without ids.
        ids: `[B, M]` int64 token number of each prediction, any strides; None means row by row.
        weights: `[B, M]`, any strides; None means 1 each.
        epsilon: of the variance, to normalise each target row first; None for no normalisation.
        factor: of the gradient.
        out: `[B, M, D]`, the gradient; None if it is not wanted.
        threads: of OpenMP, `torch.get_num_threads()`.
    """

def l2_loss_of_difference(
    difference: Tensor, bias: Tensor | None, weights: Tensor | None, factor: float, threads: int
) -> float:
    """The same sum of a difference that is there, less a bias; the difference becomes the gradient.

    Args:
        difference: `[B, M, D]`, contiguous; multiplied by `factor * weight` once the bias is subtracted.
        bias: `[D]`; None for zero.
        weights: `[B, M]`, any strides; None means 1 each.
        factor: of the gradient.
        threads: of OpenMP, `torch.get_num_threads()`.
    """

def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    residual_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    total: Tensor | None,
    norm: Tensor,
    mean: Tensor,
    rstd: Tensor,
    threads: int,
) -> None:
    """Add and normalise.

    Args:
        x, residual: `[A, B, D]`; no residual for no addition.
        residual_bias: `[D]`, added too; None for zero.
        weight, bias: `[D]`.
        epsilon: added to the variance.
        total: `[A, B, D]`, the sum; None without residual.
        norm: `[A, B, D]`.
        mean, rstd: `[A*B]`, mean and reciprocal deviation of each row of the sum.
        threads: of OpenMP, `torch.get_num_threads()`.
    """

def add_layer_norm_backward(
    grad_total: Tensor | None,
    grad_norm: Tensor,
    total: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    grad_x: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    row_sum: Tensor | None,
    norm: Tensor | None,
    threads: int,
) -> None:
    """Write the gradients of `add_layer_norm`, and its norm again.

    Args:
        grad_total, grad_norm: `[A, B, D]`; None for zero.
        total, weight, mean, rstd: as in `add_layer_norm`.
        bias: `[D]` if the norm is wanted, else None.
        grad_x: `[A, B, D]`, the gradient of x and residual alike.
        grad_weight, grad_bias: `[D]`.
        row_sum: `[D]`, the sum of `grad_x` over rows, the gradient of `residual_bias`; None if it is not wanted.
        norm: `[A, B, D]`; None without bias.
        threads: of OpenMP, `torch.get_num_threads()`.
    """

def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_present: Tensor | None,
    out: Tensor,
    lse: Tensor,
    threads: int,
    level: str = "",
) -> None:
    """Write `softmax(q k^T / sqrt(d)) v` of each head, and the logarithm of the sum of each row's exponentials.

    Args:
        q: `[B, Nq, h, d]`, d at most 256.
        k, v: `[B, Nk, h, d]`.
        key_present: `[B, Nk]` bool, any strides; None for all. Nothing is read of absent keys.
        out: `[B, Nq, h, d]` with the last axis in one piece, whatever the strides of the others; zeros without keys.
        lse: `[B, h, Nq]`; minus infinity without keys.
        threads: of OpenMP, `torch.get_num_threads()`.
        level: one of `attention_levels()`; empty for the best.
    """

def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_present: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    threads: int,
    level: str = "",
) -> None:
    """Write the gradients of `attention_forward`.

    Args:
        grad: `[B, Nq, h, d]`.
        q, k, v, key_present: as there.
        out, lse: what it gave, or that of more keys than these, of whose gradients this is then the share. A row with
            minus infinity gets and gives none.
        grad_q, grad_k, grad_v: like q, k and v, the last axis in one piece; zeros for absent keys.
        threads: of OpenMP, `torch.get_num_threads()`.
        level: one of `attention_levels()`; empty for the best.
    """

def attention_levels() -> list[str]:
    """The instruction sets that attention was compiled for and this CPU has, best first."""

def gelu(hidden: Tensor, bias: Tensor | None, activated: Tensor, threads: int) -> None:
    """Write `gelu(hidden + bias)`, the exact GELU.

    Args:
        hidden: `[A, B, H]`.
        bias: `[H]`; None for zero.
        activated: `[A, B, H]`, the output.
        threads: of OpenMP, `torch.get_num_threads()`.
    """

def gelu_backward(
    grad: Tensor, hidden: Tensor, bias: Tensor | None, activated: Tensor, grad_bias: Tensor | None, threads: int
) -> None:
    """Turn `grad` into `grad * gelu'(hidden + bias)`, and write the activation again.

    Args:
        grad: `[A, B, H]`, contiguous, read and overwritten.
        hidden: `[A, B, H]`.
        bias: `[H]`; None for zero.
        activated: `[A, B, H]`, an output.
        grad_bias: `[H]`, an output too, the sum of the gradient over rows; None without bias.
        threads: of OpenMP, `torch.get_num_threads()`.
    """
