"""Triton kernels with everything that the project's kernels use, small enough to run a whole grid in a test."""

import triton
import triton.language as tl


@triton.jit
def scale_where_positive(
    x_ptr,  # [n]
    y_ptr,  # [n]
    out_ptr,  # [n]
    n,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    y = tl.load(y_ptr + offsets, mask=mask & (offsets % 3 != 0), other=2.5)
    tl.store(out_ptr + offsets, tl.where(x > y, x * y + 1.0, tl.exp(x) - y), mask=mask)


@triton.jit
def row_distance(
    prediction_ptr,  # [K, D]
    target_ptr,  # [N, D]
    ids_ptr,  # [K] int64
    out_ptr,  # [K]
    D,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0)
    token = tl.load(ids_ptr + row)
    columns = tl.arange(0, BLOCK_D)
    mask = columns < D
    prediction = tl.load(prediction_ptr + row * D + columns, mask=mask, other=0.0).to(tl.float32)
    target = tl.load(target_ptr + token * D + columns, mask=mask, other=0.0).to(tl.float32)
    difference = prediction - target
    tl.store(out_ptr + row, tl.sum(difference * difference) / D)


@triton.jit
def gather_matmul(
    a_ptr,  # [R, K]
    b_ptr,  # [K, N]
    out_ptr,  # [M, N] float32
    ids_ptr,  # [M] int64, < R
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    ids = tl.load(ids_ptr + rows, mask=rows < M, other=0)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        inner = start + tl.arange(0, BLOCK_K)
        a_mask = (rows[:, None] < M) & (inner[None, :] < K)
        a = tl.load(a_ptr + ids[:, None] * K + inner[None, :], mask=a_mask, other=0.0)
        b_mask = (inner[:, None] < K) & (columns[None, :] < N)
        b = tl.load(b_ptr + inner[:, None] * N + columns[None, :], mask=b_mask, other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(out_ptr + rows[:, None] * N + columns[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def embed_integers(
    volume_ptr,  # [M, K] uint8 or int16
    weight_ptr,  # [N, K]
    out_ptr,  # [M, N] of weight's dtype
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        volume_mask = (rows[:, None] < M) & (inner[None, :] < K)
        volume = tl.load(volume_ptr + rows[:, None] * K + inner[None, :], mask=volume_mask, other=0)
        weight_mask = (inner[:, None] < K) & (columns[None, :] < N)
        weight = tl.load(weight_ptr + columns[None, :] * K + inner[:, None], mask=weight_mask, other=0.0)
        total = tl.dot(volume.to(weight.dtype), weight, total, input_precision="ieee")
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(out_ptr + rows[:, None] * N + columns[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def layer_norm(
    x_ptr,  # [M, D]
    weight_ptr,  # [D] or None
    bias_ptr,  # [D] or None
    out_ptr,  # [M, D]
    stride,
    D,
    eps,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK_D)
    mask = columns < D
    x = tl.load(x_ptr + row * stride + columns, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x) / D
    centred = tl.where(mask, x - mean, 0.0)
    y = centred * tl.rsqrt(tl.sum(centred * centred) / D + eps)
    if weight_ptr is not None:
        y = y * tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * D + columns, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sort_rows(
    x_ptr,  # [M, N] int64
    out_ptr,  # [M, N] int64
    N: tl.constexpr,
):
    offsets = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out_ptr + offsets, tl.sort(tl.load(x_ptr + offsets)))


@triton.jit
def random_words(
    out_ptr,  # [4 * n] int32
    seed,
    n,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    zero = offsets * 0
    a, b, c, d = tl.philox(seed, offsets.to(tl.uint32), zero.to(tl.uint32), zero.to(tl.uint32), zero.to(tl.uint32))
    words = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (4 * BLOCK,))
    flat = tl.program_id(0) * 4 * BLOCK + tl.arange(0, 4 * BLOCK)
    tl.store(out_ptr + flat, words.to(tl.int32, bitcast=True), mask=flat < 4 * n)


@triton.jit
def softmax_columns(
    x_ptr,  # [M, N]
    out_ptr,  # [M, N]
    M: tl.constexpr,
    N: tl.constexpr,
):
    offsets = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + offsets)
    e = tl.exp(x - tl.max(x, axis=0)[None, :])
    tl.debug_barrier()
    tl.store(out_ptr + offsets, e / tl.sum(e, axis=0)[None, :])


@triton.jit
def special_functions(
    x_ptr,  # [n] float32, > 0
    out_ptr,  # [7, n]
    n,
    BLOCK: tl.constexpr,
):
    tl.assume(n > 0)
    offsets = tl.multiple_of(tl.program_id(0) * BLOCK, BLOCK) + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask, other=1.0)
    tl.store(out_ptr + offsets, tl.erf(x), mask=mask)
    tl.store(out_ptr + n + offsets, tl.rsqrt(x), mask=mask)
    tl.store(out_ptr + 2 * n + offsets, tl.sqrt_rn(x), mask=mask)
    tl.store(out_ptr + 3 * n + offsets, tl.div_rn(1.0 + x, x), mask=mask)
    tl.store(out_ptr + 4 * n + offsets, tl.log(x) + tl.exp2(-x), mask=mask)
    tl.store(out_ptr + 5 * n + offsets, tl.sigmoid(x) + tl.cos(x) * tl.sin(x), mask=mask)
    tl.store(out_ptr + 6 * n + offsets, tl.floor(x * 3.0) - tl.ceil(x) + tl.abs(-x), mask=mask)


@triton.jit
def integer_functions(
    x_ptr,  # [n] int64
    y_ptr,  # [n] int64, not 0
    out_ptr,  # [8, n] int64
    n,
    BLOCK: tl.constexpr,
):
    for block in range(tl.cdiv(n, BLOCK)):
        offsets = block * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < n
        x = tl.load(x_ptr + offsets, mask=mask, other=1)
        y = tl.load(y_ptr + offsets, mask=mask, other=1)
        tl.store(out_ptr + offsets, x * y, mask=mask)
        tl.store(out_ptr + n + offsets, x // y, mask=mask)
        tl.store(out_ptr + 2 * n + offsets, x % y, mask=mask)
        tl.store(out_ptr + 3 * n + offsets, tl.umulhi(x.to(tl.uint64), y.to(tl.uint64)).to(tl.int64), mask=mask)
        tl.store(out_ptr + 4 * n + offsets, (x >> 3) ^ (y << 5), mask=mask)
        tl.store(out_ptr + 5 * n + offsets, (x.to(tl.int32) // 7 + y.to(tl.int32) % 13).to(tl.int64), mask=mask)
        tl.store(out_ptr + 6 * n + offsets, tl.minimum(x, y) + tl.cdiv(x, 7), mask=mask)
        tl.store(out_ptr + 7 * n + offsets, (x.to(tl.uint32) // (y.to(tl.uint32) | 1)).to(tl.int64), mask=mask)


@triton.jit
def half_dot_half(
    a_ptr,  # [64, 64] float16
    b_ptr,  # [64, 64] float16
    out_ptr,  # [64, 64] float16
):
    i = tl.arange(0, 64)
    offsets = i[:, None] * 64 + i[None, :]
    product = tl.dot(tl.load(a_ptr + offsets), tl.load(b_ptr + offsets))
    tl.store(out_ptr + i[:, None] + i[None, :] * 64, product.to(tl.float16))


@triton.jit
def histogram(
    ids_ptr,  # [n] int64, < B
    counts_ptr,  # [B] int32
    sums_ptr,  # [B] float32
    n,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    ids = tl.load(ids_ptr + offsets, mask=mask, other=0)
    tl.atomic_add(counts_ptr + ids, 1, mask=mask)
    tl.atomic_add(sums_ptr + ids, 0.5, mask=mask)


@triton.jit
def running_total(
    x_ptr,  # [M, N] float32
    out_ptr,  # [M, N] float32
    last_ptr,  # [M] int64
    N: tl.constexpr,
):
    columns = tl.arange(0, N)
    x = tl.load(x_ptr + tl.program_id(0) * N + columns)
    tl.store(out_ptr + tl.program_id(0) * N + columns, tl.cumsum(x))
    tl.store(last_ptr + tl.program_id(0), tl.argmax(x, axis=0).to(tl.int64))


@triton.jit
def attention(
    q_ptr,  # [N, D]
    k_ptr,  # [N, D]
    v_ptr,  # [N, D]
    out_ptr,  # [N, D]
    N,
    scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D)
    q = tl.load(q_ptr + rows[:, None] * D + d[None, :], mask=rows[:, None] < N, other=0.0)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    denominator = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M, D), tl.float32)
    for start in range(0, N, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k = tl.load(k_ptr + columns[None, :] * D + d[:, None], mask=columns[None, :] < N, other=0.0)
        logits = tl.where(columns[None, :] < N, tl.dot(q, k) * scale, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        p = tl.exp(logits - new_largest[:, None])
        shrink = tl.exp(largest - new_largest)
        denominator = denominator * shrink + tl.sum(p, 1)
        v = tl.load(v_ptr + columns[:, None] * D + d[None, :], mask=columns[:, None] < N, other=0.0)
        total = tl.dot(p.to(v.dtype), v, total * shrink[:, None])
        largest = new_largest
    out = (total / denominator[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * D + d[None, :], out, mask=rows[:, None] < N)


@triton.jit
def count_down(
    n_ptr,  # [n] int32
    out_ptr,  # [n] int32
):
    i = tl.program_id(0)
    n = tl.load(n_ptr + i)
    steps = 0
    while n > 0:
        n = n // 2
        steps += 1
    tl.store(out_ptr + i, steps)


@triton.jit
def ragged_matmul(
    a_ptr,  # [B, 16, K]
    b_ptr,  # [K, 16]
    out_ptr,  # [B, 16, 16] float32
    lengths_ptr,  # [B] int32, how many blocks of K are multiplied
    K,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.arange(0, 16)
    a_ptr += tl.program_id(0) * 16 * K
    total = tl.zeros((16, 16), tl.float32)
    for block in tl.range(0, tl.load(lengths_ptr + tl.program_id(0)), num_stages=STAGES):
        inner = block * BLOCK_K + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + row[:, None] * K + inner[None, :])
        b = tl.load(b_ptr + inner[:, None] * 16 + row[None, :])
        total = tl.dot(a, b, total)
    tl.store(out_ptr + tl.program_id(0) * 256 + row[:, None] * 16 + row[None, :], total)


@triton.jit
def copy(
    x_ptr,  # [n] any strides
    out_ptr,  # [n] any strides
    x_stride,
    out_stride,
    n,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(out_ptr + offsets * out_stride, tl.load(x_ptr + offsets * x_stride, mask=mask), mask=mask)


@triton.jit
def add_scalars(
    out_ptr,  # [1] float64
    i,
    j,
    flag,
    x,
    half: tl.bfloat16,
    nothing,
    DOUBLE: tl.constexpr,
    offset=3,
):
    total = (i + offset + tl.where(flag, 100, 0)).to(tl.float64) + j.to(tl.float64) + x + half
    if nothing is None:
        total = total * DOUBLE
    tl.store(out_ptr, total)


@triton.jit
def scatter(
    ids_ptr,  # [n] int64
    values_ptr,  # [n]
    out_ptr,
    n,
    BLOCK: tl.constexpr,
):
    offsets = tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + offsets, mask=offsets < n, other=0)
    tl.store(out_ptr + ids, tl.load(values_ptr + offsets, mask=offsets < n, other=0), mask=offsets < n)


@triton.jit
def activation(
    x_ptr,  # [n]
    out_ptr,  # [n]
    n,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n, other=0.0).to(tl.float32)
    y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476)) + tl.clamp(x, -1.0, 1.0)
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=offsets < n)


@triton.jit
def small_product(
    a_ptr,  # [32, 64]
    b_ptr,  # [64, 32]
    out_ptr,  # [32, 32]
):
    narrow, wide = tl.arange(0, 32), tl.arange(0, 64)
    a = tl.load(a_ptr + narrow[:, None] * 64 + wide[None, :])
    b = tl.load(b_ptr + wide[:, None] * 32 + narrow[None, :])
    product = tl.dot(a, b, out_dtype=out_ptr.dtype.element_ty)
    tl.store(out_ptr + narrow[:, None] * 32 + narrow[None, :], product)
