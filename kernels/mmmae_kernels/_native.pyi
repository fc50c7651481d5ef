"""Functions of the compiled CPU library.

A tensor is passed as its address, `Tensor.data_ptr()`, or 0 for none, and with its strides (in elements) if they may be
arbitrary; the last axis of a float tensor is always contiguous. Tensors are on the CPU and are float32 unless stated
otherwise. An argument `dtype` or `dtypes` has the numbers in `library.DTYPES` of the tensors that may be bfloat16 or
float16 too; the number of a missing tensor is that of float32 or of another one. All computation is in float32. Outputs
are contiguous and completely written. The functions check none of this: the public functions check their arguments, and
the modules `cpu.py` allocate the outputs.

`threads` is the number of OpenMP threads, `torch.get_num_threads()`; results do not depend on it. Each function raises
ValueError if it is less than one, or if a token number is out of range, before it writes anything.
"""

def team_size(threads: int) -> int:
    """Return how many threads OpenMP provides when asked for `threads`."""

def gather_patches(
    volume: int,
    volume_strides: tuple[int, ...],
    volume_sizes: tuple[int, ...],
    ids: int,
    ids_strides: tuple[int, ...],
    keep: int,
    patch: tuple[int, int, int],
    out: int,
    dtypes: tuple[int, int],
    threads: int,
) -> None:
    """Write the 3D patches `ids` of `volume` into `out`, one row a patch, elements in the order (c, t, h, w).

    Args:
        volume: `[B, C, T, H, W]`, any strides.
        ids: `[B, K]` int64 token numbers, row-major over (t, h, w), any strides.
        keep: K.
        patch: sizes (pt, ph, pw), which divide T, H and W.
        out: output, `[B*K, C*pt*ph*pw]`.
        dtypes: of volume and out; out may be of an integer dtype only if volume is of the same.
    """

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
    """Add each row to the patch of `out_volume` that `ids` names: the transpose of `gather_patches`.

    Rows with the same id are added in the order of `ids`.

    Args:
        grad_rows: `[B*K, C*pt*ph*pw]`, any strides.
        ids, keep, patch: see `gather_patches`.
        out_volume: input and output, `[B, C, T, H, W]`, contiguous.
    """

def add_position(
    tokens: int,
    ids: int,
    ids_strides: tuple[int, ...],
    position: int,
    position_stride: int,
    out: int,
    dtypes: tuple[int, int, int],
    sizes: tuple[int, int, int],
    positions: int,
    threads: int,
) -> None:
    """Write tokens plus the position embedding of each.

    Args:
        tokens: `[B, K, D]`, contiguous.
        ids: `[B, K]` int64 token numbers, any strides.
        position: `[N, D]`.
        out: output, `[B, K, D]`; may be `tokens`.
        dtypes: of tokens, position and out.
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
    dtype: int,
    sizes: tuple[int, int, int],
    tokens: int,
    threads: int,
) -> None:
    """Write the gradients of position and bias: `grad` summed by token number, in the order of `ids`, and in total.

    Args:
        grad: `[B, K, D]`.
        ids: `[B, K]` int64 token numbers, any strides.
        grad_position: output, `[N, D]`; zero for a token that is not in `ids`.
        grad_bias: output, `[D]`, or none.
        dtype: of grad and grad_position.
        sizes: B, K and D.
        tokens: N.
    """

def sum_of_rows(
    rows: int, rows_strides: tuple[int, ...], out: int, dtype: int, sizes: tuple[int, int, int], threads: int
) -> None:
    """Write the sum of `rows [A, B, D]`, of `dtype`, over A and B into `out [D]`; `sizes` are A, B and D."""

def random_masking(
    seed: int,
    first_sample: int,
    ids_keep: int,
    ids_masked: int,
    ids_restore: int,
    sizes: tuple[int, int, int],
    threads: int,
) -> None:
    """Write the tables of `random_masking_reference` for samples `first_sample`, `first_sample + 1`, ...

    Args:
        seed: signed 64-bit integer.
        first_sample: number of the first sample.
        ids_keep, ids_masked, ids_restore: outputs, `[B, K]`, `[B, N-K]` and `[B, N]` int64.
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
    dtypes: tuple[int, int, int],
    sizes: tuple[int, int, int, int],
    threads: int,
) -> None:
    """Write the input sequence of the decoder.

    Args:
        visible: `[B, K, D]`.
        mask_token: `[D]`.
        ids_restore: `[B, N]` int64, any strides; a number below K is a row of `visible`, others are masked tokens.
        position: `[N, D]`.
        out: output, `[B, N, D]`.
        dtypes: of visible, position and out.
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
    dtype: int,
    sizes: tuple[int, int, int, int],
    threads: int,
) -> None:
    """Write the gradients of visible tokens, mask token and position in one pass over `grad`.

    Args:
        grad: `[B, N, D]`.
        ids_restore: `[B, N]` int64, any strides, not necessarily a permutation.
        grad_visible: output, `[B, K, D]`, for each row the sum over the tokens that refer to it, in order.
        grad_mask_token, grad_position: outputs, `[D]` and `[N, D]`.
        dtype: of grad, grad_visible and grad_position.
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
    dtypes: tuple[int, int, int],
    sizes: tuple[int, int, int, int],
    threads: int,
) -> float:
    """Return the sum of weight times squared error; write the gradient `factor * weight * (prediction - target)`.

    Args:
        prediction: `[B, M, D]`.
        target: `[B, N, D]`, or `[B, M, D]` without ids.
        ids: `[B, M]` int64 token number of each prediction, any strides; none means that the orders are the same.
        weights: `[B, M]`, any strides; none means 1.
        epsilon: added to the variance when target rows are normalised; None means no normalisation.
        factor: factor of the gradient.
        out: output, the gradient `[B, M, D]`, or none.
        dtypes: of prediction, target and out.
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
    """Return the sum of weight times `(difference - bias)**2`; overwrite `difference` with the gradient.

    Args:
        difference: input `[B, M, D]`, contiguous; output `factor * weight * (difference - bias)`.
        bias: `[D]`; none for zero.
        weights: `[B, M]`, any strides; none means 1.
        factor: factor of the gradient.
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
    dtypes: tuple[int, int, int, int],
    sizes: tuple[int, int, int],
    threads: int,
) -> None:
    """Write `x + residual + residual_bias` and its layer norm.

    Args:
        x, residual: `[A, B, D]`; none for `residual` means no addition.
        residual_bias: `[D]`; none for zero.
        weight, bias: `[D]`.
        epsilon: added to the variance.
        total: output, the sum `[A, B, D]`; none without residual.
        norm: output, `[A, B, D]`.
        mean, rstd: outputs `[A*B]`, mean and 1 / standard deviation of each row of the sum.
        dtypes: of x, residual, total and norm.
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
    grad_residual: int,
    grad_weight: int,
    grad_bias: int,
    row_sum: int,
    norm: int,
    dtypes: tuple[int, int, int, int],
    sizes: tuple[int, int, int],
    threads: int,
) -> None:
    """Write the gradients of `add_layer_norm`, and compute its norm again.

    Args:
        grad_total, grad_norm: `[A, B, D]`; none for `grad_total` means zero.
        total, weight, mean, rstd: see `add_layer_norm`.
        bias: `[D]` to compute the norm, or none.
        grad_x: output `[A, B, D]`, the gradient of x.
        grad_residual: output like `grad_x`, the same in another dtype; or none.
        grad_weight, grad_bias: outputs, `[D]`.
        row_sum: output `[D]`, the sum of `grad_x` over rows, which is the gradient of residual_bias; or none.
        norm: output, `[A, B, D]`; none without bias.
        dtypes: of grad_total; of grad_norm and norm; of total and grad_x; and of grad_residual.
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
    """Write `softmax(q k^T / sqrt(d)) v` of each head, and the log-sum-exp of each row of scores.

    Args:
        q: `[B, Nq, h, d]`, d at most 256.
        k, v: `[B, Nk, h, d]`.
        key_present: `[B, Nk]` bool, any strides; none means all. Absent keys and values are not read.
        out: output, `[B, Nq, h, d]`; zero without keys.
        lse: output, `[B, h, Nq]`; minus infinity without keys.
        sizes: B, Nq, Nk, h and d.
        level: index into `attention_levels()`.
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
        q, k, v, key_present, sizes: see `attention_forward`.
        out, lse: outputs of `attention_forward`, or those of a softmax over more keys, see `flash.py`. The gradients of
            a row with lse minus infinity are zero.
        grad_q, grad_k, grad_v: outputs like q, k and v, any strides with a contiguous last axis; zero for absent keys.
        level: index into `attention_levels()`.
    """

def attention_levels() -> list[str]:
    """Return the instruction sets that attention was compiled for and that this CPU has, best first."""

# The same for tensors in bfloat16; lse is float32.
attention_forward_bfloat16 = attention_forward
attention_backward_bfloat16 = attention_backward

def attention_levels_bfloat16() -> list[str]:
    """Return the levels of attention in bfloat16; the last is a model of AMX in plain C++, for the tests."""

def gelu(
    hidden: int,
    hidden_strides: tuple[int, int],
    bias: int,
    activated: int,
    dtype: int,
    sizes: tuple[int, int, int],
    threads: int,
) -> None:
    """Write `gelu(hidden + bias)`, the exact GELU.

    Args:
        hidden: `[A, B, H]`.
        bias: `[H]`; none for zero.
        activated: output, `[A, B, H]`.
        dtype: of hidden and activated.
        sizes: A, B and H.
    """

def gelu_backward(
    grad: int,
    hidden: int,
    hidden_strides: tuple[int, int],
    bias: int,
    activated: int,
    grad_bias: int,
    dtype: int,
    sizes: tuple[int, int, int],
    threads: int,
) -> None:
    """Multiply `grad` in place by `gelu'(hidden + bias)`, and compute the activation again.

    Args:
        grad: input and output, `[A, B, H]`, contiguous.
        hidden: `[A, B, H]`.
        bias: `[H]`; none for zero.
        activated: output, `[A, B, H]`.
        grad_bias: output `[H]`, the sum of the gradient over rows; none without bias.
        dtype: of grad, hidden and activated.
        sizes: A, B and H.
    """
