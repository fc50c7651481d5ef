"""Functions of the compiled CPU library.

A tensor is passed by its address, `Tensor.data_ptr()`, 0 for none. Where its strides, in elements, may be any, they are
passed too; the last axis of floats lies in one piece even then. Tensors lie on the CPU and hold float32 unless said
otherwise. Outputs are contiguous and wholly written. None of this is checked here: the public functions have checked
what they were given, and the modules `cpu.py` allocate what is written.

`threads` is OpenMP's number of threads, `torch.get_num_threads()`; a result is the same for any. Each function raises
ValueError for less than one, and for a token number out of range, before anything is written.
"""

def team_size(threads: int) -> int:
    """Return how many threads OpenMP gives to a call that asks for `threads`."""

def gather_patches_float32(
    volume: int,
    volume_strides: tuple[int, ...],
    volume_sizes: tuple[int, ...],
    ids: int,
    ids_strides: tuple[int, ...],
    keep: int,
    patch: tuple[int, int, int],
    out: int,
    threads: int,
) -> None:
    """Write the 3D patches of `volume` that `ids` names into `out`, one row a patch, in the order (c, t, h, w).

    Args:
        volume: `[B, C, T, H, W]`, any strides.
        ids: `[B, K]` int64 token numbers, row-major over (t, h, w), any strides.
        keep: K.
        patch: sizes along T, H, W, which divide those of the volume.
        out: `[B*K, C*pt*ph*pw]`.
    """

def gather_patches_int16(
    volume: int,
    volume_strides: tuple[int, ...],
    volume_sizes: tuple[int, ...],
    ids: int,
    ids_strides: tuple[int, ...],
    keep: int,
    patch: tuple[int, int, int],
    out: int,
    threads: int,
) -> None:
    """Do the same for a volume of int16."""

def gather_patches_uint8(
    volume: int,
    volume_strides: tuple[int, ...],
    volume_sizes: tuple[int, ...],
    ids: int,
    ids_strides: tuple[int, ...],
    keep: int,
    patch: tuple[int, int, int],
    out: int,
    threads: int,
) -> None:
    """Do the same for a volume of uint8."""

def scatter_patches(
    grad_rows: int,
    grad_rows_strides: tuple[int, ...],
    ids: int,
    ids_strides: tuple[int, ...],
    keep: int,
    patch: tuple[int, int, int],
    out_volume: int,
    volume_sizes: tuple[int, ...],
    threads: int,
) -> None:
    """Add row after row into the patches of `out_volume` that `ids` names: the transpose of `gather_patches_float32`.

    The sum over a repeated id is taken in the order of `ids`.

    Args:
        grad_rows: `[B*K, C*pt*ph*pw]`, any strides.
        ids, keep, patch: as there.
        out_volume: `[B, C, T, H, W]`, contiguous; zeros for a gradient.
    """

def add_position(
    tokens: int,
    ids: int,
    ids_strides: tuple[int, ...],
    position: int,
    position_stride: int,
    sizes: tuple[int, int, int],
    positions: int,
    threads: int,
) -> None:
    """Add the position of each token to it in place.

    Args:
        tokens: `[B, K, D]`, contiguous.
        ids: `[B, K]` int64 token numbers, any strides.
        position: `[N, D]`.
        sizes: B, K and D.
        positions: N.
    """

def embedding_gradients(
    grad: int,
    grad_strides: tuple[int, ...],
    ids: int,
    ids_strides: tuple[int, ...],
    grad_position: int,
    grad_bias: int,
    sizes: tuple[int, int, int],
    tokens: int,
    threads: int,
) -> None:
    """Sum a gradient by token number, in the order of `ids`, and over all tokens.

    Args:
        grad: `[B, K, D]`.
        ids: `[B, K]` int64 token numbers, any strides.
        grad_position: `[N, D]`, the output; zero where no id names the token.
        grad_bias: `[D]`, an output too, or none.
        sizes: B, K and D.
        tokens: N.
    """

def sum_of_rows(grad: int, grad_strides: tuple[int, ...], out: int, sizes: tuple[int, int, int], threads: int) -> None:
    """Sum `grad [B, K, D]` over tokens into `out [D]`; `sizes` are B, K and D."""

def random_masking(
    seed: int,
    first_sample: int,
    ids_keep: int,
    ids_masked: int,
    ids_restore: int,
    sizes: tuple[int, int, int],
    threads: int,
) -> None:
    """Write the tables of `random_masking_reference` for the samples from `first_sample` on.

    Args:
        seed: as a signed 64-bit integer.
        first_sample: number of the first sample.
        ids_keep, ids_masked, ids_restore: `[B, K]`, `[B, N-K]` and `[B, N]` int64, the outputs.
        sizes: B, N and K.

    Raises:
        ValueError: N is 2^32 or more, or a sample number is outside 0..2^63-1.
    """

def decoder_tokens(
    visible: int,
    visible_strides: tuple[int, ...],
    mask_token: int,
    ids_restore: int,
    ids_strides: tuple[int, ...],
    position: int,
    position_stride: int,
    out: int,
    sizes: tuple[int, int, int, int],
    threads: int,
) -> None:
    """Write the decoder's input.

    Args:
        visible: `[B, K, D]`.
        mask_token: `[D]`.
        ids_restore: `[B, N]` int64, any strides; below K it names a visible row, else the token is masked.
        position: `[N, D]`.
        out: `[B, N, D]`, the output.
        sizes: B, K, N and D.
    """

def decoder_tokens_backward(
    grad: int,
    grad_strides: tuple[int, ...],
    ids_restore: int,
    ids_strides: tuple[int, ...],
    grad_visible: int,
    grad_mask_token: int,
    grad_position: int,
    sizes: tuple[int, int, int, int],
    threads: int,
) -> None:
    """Write the gradients of the decoder's input in one pass over `grad`.

    Args:
        grad: `[B, N, D]`.
        ids_restore: `[B, N]` int64, any strides, no permutation needed.
        grad_visible: `[B, K, D]`, the sum over the tokens that name a row, in their order.
        grad_mask_token, grad_position: `[D]` and `[N, D]`.
        sizes: B, K, N and D.
    """

def masked_l2_loss(
    prediction: int,
    prediction_strides: tuple[int, ...],
    target: int,
    target_strides: tuple[int, ...],
    ids: int,
    ids_strides: tuple[int, ...],
    weights: int,
    weights_strides: tuple[int, ...],
    epsilon: float | None,
    factor: float,
    out: int,
    sizes: tuple[int, int, int, int],
    threads: int,
) -> float:
    """Return the sum over tokens of weight times squared error; write `factor * weight * (prediction - target)`.

    Args:
        prediction: `[B, M, D]`.
        target: `[B, N, D]`, or `[B, M, D]` without ids.
        ids: `[B, M]` int64 token number of each prediction, any strides; none means row by row.
        weights: `[B, M]`, any strides; none means 1 each.
        epsilon: of the variance, to normalise each target row first; None for no normalisation.
        factor: of the gradient.
        out: `[B, M, D]`, the gradient; none if it is not wanted.
        sizes: B, M, N and D.
    """

def l2_loss_of_difference(
    difference: int,
    bias: int,
    weights: int,
    weights_strides: tuple[int, ...],
    factor: float,
    sizes: tuple[int, int, int],
    threads: int,
) -> float:
    """Return the same sum of a difference that is there, less a bias; the difference becomes the gradient.

    Args:
        difference: `[B, M, D]`, contiguous; multiplied by `factor * weight` once the bias is subtracted.
        bias: `[D]`; none for zero.
        weights: `[B, M]`, any strides; none means 1 each.
        factor: of the gradient.
        sizes: B, M and D.
    """

def add_layer_norm(
    x: int,
    x_strides: tuple[int, int],
    residual: int,
    residual_strides: tuple[int, int],
    residual_bias: int,
    weight: int,
    bias: int,
    epsilon: float,
    total: int,
    norm: int,
    mean: int,
    rstd: int,
    sizes: tuple[int, int, int],
    threads: int,
) -> None:
    """Add and normalise.

    Args:
        x, residual: `[A, B, D]`; no residual for no addition.
        residual_bias: `[D]`, added too; none for zero.
        weight, bias: `[D]`.
        epsilon: added to the variance.
        total: `[A, B, D]`, the sum; none without residual.
        norm: `[A, B, D]`.
        mean, rstd: `[A*B]`, mean and reciprocal deviation of each row of the sum.
        sizes: A, B and D.
    """

def add_layer_norm_backward(
    grad_total: int,
    grad_total_strides: tuple[int, int],
    grad_norm: int,
    grad_norm_strides: tuple[int, int],
    total: int,
    total_strides: tuple[int, int],
    weight: int,
    bias: int,
    mean: int,
    rstd: int,
    grad_x: int,
    grad_weight: int,
    grad_bias: int,
    row_sum: int,
    norm: int,
    sizes: tuple[int, int, int],
    threads: int,
) -> None:
    """Write the gradients of `add_layer_norm`, and its norm again.

    Args:
        grad_total, grad_norm: `[A, B, D]`; no `grad_total` for zero.
        total, weight, mean, rstd: as in `add_layer_norm`.
        bias: `[D]` if the norm is wanted, else none.
        grad_x: `[A, B, D]`, the gradient of x and residual alike.
        grad_weight, grad_bias: `[D]`.
        row_sum: `[D]`, the sum of `grad_x` over rows, the gradient of `residual_bias`; none if it is not wanted.
        norm: `[A, B, D]`; none without bias.
        sizes: A, B and D.
    """

def attention_forward(
    q: int,
    q_strides: tuple[int, ...],
    k: int,
    k_strides: tuple[int, ...],
    v: int,
    v_strides: tuple[int, ...],
    key_present: int,
    key_present_strides: tuple[int, ...],
    out: int,
    lse: int,
    sizes: tuple[int, int, int, int, int],
    threads: int,
    level: int = 0,
) -> None:
    """Write `softmax(q k^T / sqrt(d)) v` of each head, and the logarithm of the sum of each row's exponentials.

    Args:
        q: `[B, Nq, h, d]`, d at most 256.
        k, v: `[B, Nk, h, d]`.
        key_present: `[B, Nk]` bool, any strides; none for all. Nothing is read of absent keys.
        out: `[B, Nq, h, d]`; zeros without keys.
        lse: `[B, h, Nq]`; minus infinity without keys.
        sizes: B, Nq, Nk, h and d.
        level: a place in `attention_levels()`.
    """

def attention_backward(
    grad: int,
    grad_strides: tuple[int, ...],
    q: int,
    q_strides: tuple[int, ...],
    k: int,
    k_strides: tuple[int, ...],
    v: int,
    v_strides: tuple[int, ...],
    key_present: int,
    key_present_strides: tuple[int, ...],
    out: int,
    out_strides: tuple[int, ...],
    lse: int,
    grad_q: int,
    grad_q_strides: tuple[int, ...],
    grad_k: int,
    grad_k_strides: tuple[int, ...],
    grad_v: int,
    grad_v_strides: tuple[int, ...],
    sizes: tuple[int, int, int, int, int],
    threads: int,
    level: int = 0,
) -> None:
    """Write the gradients of `attention_forward`.

    Args:
        grad: `[B, Nq, h, d]`.
        q, k, v, key_present, sizes: as there.
        out, lse: what it gave, or that of more keys than these, of whose gradients this is then the share. A row with
            minus infinity gets and gives none.
        grad_q, grad_k, grad_v: like q, k and v, of any strides but for the last axis; zeros for absent keys.
        level: a place in `attention_levels()`.
    """

def attention_levels() -> list[str]:
    """Return the instruction sets that attention was compiled for and this CPU has, best first."""

def gelu(
    hidden: int,
    hidden_strides: tuple[int, int],
    bias: int,
    activated: int,
    sizes: tuple[int, int, int],
    threads: int,
) -> None:
    """Write `gelu(hidden + bias)`, the exact GELU.

    Args:
        hidden: `[A, B, H]`.
        bias: `[H]`; none for zero.
        activated: `[A, B, H]`, the output.
        sizes: A, B and H.
    """

def gelu_backward(
    grad: int,
    hidden: int,
    hidden_strides: tuple[int, int],
    bias: int,
    activated: int,
    grad_bias: int,
    sizes: tuple[int, int, int],
    threads: int,
) -> None:
    """Turn `grad` into `grad * gelu'(hidden + bias)`, and write the activation again.

    Args:
        grad: `[A, B, H]`, contiguous, read and overwritten.
        hidden: `[A, B, H]`.
        bias: `[H]`; none for zero.
        activated: `[A, B, H]`, an output.
        grad_bias: `[H]`, an output too, the sum of the gradient over rows; none without bias.
        sizes: A, B and H.
    """
