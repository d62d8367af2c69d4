"""The kernels of `hgprompt.kernels.attention`, which says what their sequences and segments are.

No two programs write one element: dQ comes from programs that own rows of queries, dK and dV from programs that own
rows of keys.

Letters in shapes: M prompts, B images, T queries, S keys, H heads, D head width; 1 and 2 number the segments.
"""

from __future__ import annotations

from hgprompt.kernels.compiler import jit, tl


@jit
def _rows(first, second, i, length, stride1, stride2, TWO: tl.constexpr):
    """Pointers to rows i of two segments side by side; `length` is the first's."""
    if TWO:
        # The choice hides from the compiler that rows are aligned; the launcher has seen to it that they are.
        return tl.multiple_of(tl.where(i < length, first + i * stride1, second + (i - length) * stride2), 16)
    return first + i * stride1


@jit
def forward(
    q1, q2,  # [M, B, T1, H, D], [M, B, T2, H, D]
    k1, k2,  # [M, B, S1, H, D], [M, B, S2, H, D]
    v1, v2,  # as k1, k2, and with their strides
    out,  # [M, B, T, H, D]
    lse,  # [M, B, H, T] float32: log2 of the sum of 2^scores
    q1_m, q1_b, q1_t, q2_m, q2_b, q2_t, k1_m, k1_b, k1_t, k2_m, k2_b, k2_t,
    B, T1, T2, S1, S2,
    scale,  # times log2(e)
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    TWO_Q: tl.constexpr, TWO_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile of queries of one sequence and head, over all keys."""
    T, S = T1 + T2, S1 + S2
    tiles = tl.cdiv(T, BLOCK_T)
    pid = tl.program_id(0)
    tile, h, n = pid % tiles, (pid // tiles) % H, (pid // (tiles * H)).to(tl.int64)
    m, b = n // B, n % B
    d = tl.arange(0, BLOCK_D)
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    in_d = d < D
    q_rows = _rows(q1 + m * q1_m + b * q1_b + h * D, q2 + m * q2_m + b * q2_b + h * D, t, T1, q1_t, q2_t, TWO_Q)
    q = tl.load(q_rows[:, None] + d[None, :], mask=(t < T)[:, None] & in_d[None, :], other=0.0)
    k_first, k_second = k1 + m * k1_m + b * k1_b + h * D, k2 + m * k2_m + b * k2_b + h * D
    v_first, v_second = v1 + m * k1_m + b * k1_b + h * D, v2 + m * k2_m + b * k2_b + h * D

    best = tl.full([BLOCK_T], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    mixed = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        in_keys = (s < S)[:, None] & in_d[None, :]
        k = tl.load(_rows(k_first, k_second, s, S1, k1_t, k2_t, TWO_K)[:, None] + d[None, :], mask=in_keys, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where((s < S)[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        p = tl.exp2(scores - new_best[:, None])
        rescale = tl.exp2(best - new_best)
        total = total * rescale + tl.sum(p, 1)
        v = tl.load(_rows(v_first, v_second, s, S1, k1_t, k2_t, TWO_K)[:, None] + d[None, :], mask=in_keys, other=0.0)
        mixed = tl.dot(p.to(v.dtype), v, mixed * rescale[:, None], input_precision=PRECISION)
        best = new_best
    mixed = mixed / total[:, None]
    rows = out + n * T * H * D + t * (H * D) + h * D
    tl.store(rows[:, None] + d[None, :], mixed.to(out.dtype.element_ty), mask=(t < T)[:, None] & in_d[None, :])
    tl.store(lse + (n * H + h) * T + t, best + tl.log2(total), mask=t < T)


@jit
def delta(out, dout, delta, rows, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """delta[n, h, t] = Σ_d out · dout: what the softmax's derivative takes off. rows = T."""
    tiles = tl.cdiv(rows, BLOCK)
    pid = tl.program_id(0)
    tile, h, n = pid % tiles, (pid // tiles) % H, (pid // (tiles * H)).to(tl.int64)
    t = tile * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    place = n * rows * H * D + (t * (H * D))[:, None] + h * D + d[None, :]
    inside = (t < rows)[:, None] & (d < D)[None, :]
    product = tl.load(out + place, mask=inside, other=0.0).to(tl.float32)
    product *= tl.load(dout + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(delta + (n * H + h) * rows + t, tl.sum(product, 1), mask=t < rows)


@jit
def backward_keys(
    q1, q2, k1, k2, v1, v2,  # as in the forward pass
    dout,  # [M, B, T, H, D]
    lse, delta,  # [M, B, H, T] float32
    dk1, dk2, dv1, dv2,  # as k1 … v2, each sequence of its own; rows before first_key are not written
    dq1, dq2,  # as q1, q2, each sequence of its own; written where WHOLE
    q1_m, q1_b, q1_t, q2_m, q2_b, q2_t, k1_m, k1_b, k1_t, k2_m, k2_b, k2_t,
    dk1_n, dk1_t, dk2_n, dk2_t, dq1_n, dq1_t, dq2_n, dq2_t,
    B, T1, T2, S1, S2, first_key,
    scale,  # without log2(e)
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    TWO_Q: tl.constexpr, TWO_K: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile of keys, from first_key on, of one sequence and head, over all queries.

    WHOLE: the tile holds all keys, so the queries' gradient is complete in each step, and delta is the row sum of
    p · dp: dQ, dK and dV come out of one program, and neither `out` nor delta is read.
    """
    T, S = T1 + T2, S1 + S2
    tiles = tl.cdiv(S - first_key, BLOCK_S)
    pid = tl.program_id(0)
    tile, h, n = pid % tiles, (pid // tiles) % H, (pid // (tiles * H)).to(tl.int64)
    m, b = n // B, n % B
    d = tl.arange(0, BLOCK_D)
    in_d = d < D
    s = first_key + tile * BLOCK_S + tl.arange(0, BLOCK_S)
    in_keys = (s < S)[:, None] & in_d[None, :]
    k_rows = _rows(k1 + m * k1_m + b * k1_b + h * D, k2 + m * k2_m + b * k2_b + h * D, s, S1, k1_t, k2_t, TWO_K)
    v_rows = _rows(v1 + m * k1_m + b * k1_b + h * D, v2 + m * k2_m + b * k2_b + h * D, s, S1, k1_t, k2_t, TWO_K)
    k = tl.load(k_rows[:, None] + d[None, :], mask=in_keys, other=0.0)
    v = tl.load(v_rows[:, None] + d[None, :], mask=in_keys, other=0.0)
    q_first, q_second = q1 + m * q1_m + b * q1_b + h * D, q2 + m * q2_m + b * q2_b + h * D
    log2e: tl.constexpr = 1.4426950408889634

    dk_sum = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    dv_sum = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for start in range(0, T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        in_queries = (t < T)[:, None] & in_d[None, :]
        q = tl.load(
            _rows(q_first, q_second, t, T1, q1_t, q2_t, TWO_Q)[:, None] + d[None, :], mask=in_queries, other=0.0
        )
        place = n * T * H * D + (t * (H * D))[:, None] + h * D + d[None, :]
        do = tl.load(dout + place, mask=in_queries, other=0.0)
        # Rows past the end get an infinite normaliser: p = 0.
        norm = tl.load(lse + (n * H + h) * T + t, mask=t < T, other=float("inf"))
        # Keys along the rows: p and ds are then left operands of the products that follow, and stay in registers.
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * log2e)
        p = tl.exp2(scores - norm[None, :])
        p = tl.where((s < S)[:, None], p, 0.0)
        dv_sum = tl.dot(p.to(do.dtype), do, dv_sum, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        if WHOLE:
            taken = tl.sum(p * dp, 0)
        else:
            taken = tl.load(delta + (n * H + h) * T + t, mask=t < T, other=0.0)
        ds = (p * (dp - taken[None, :]) * scale).to(q.dtype)
        dk_sum = tl.dot(ds, q, dk_sum, input_precision=PRECISION)
        if WHOLE:
            dq_t = tl.dot(tl.trans(k), ds, input_precision=PRECISION).to(dq1.dtype.element_ty)
            dq_rows = _rows(dq1 + n * dq1_n + h * D, dq2 + n * dq2_n + h * D, t, T1, dq1_t, dq2_t, TWO_Q)
            tl.store(dq_rows[None, :] + d[:, None], dq_t, mask=(t < T)[None, :] & in_d[:, None])
    dk_rows = _rows(dk1 + n * dk1_n + h * D, dk2 + n * dk2_n + h * D, s, S1, dk1_t, dk2_t, TWO_K)
    dv_rows = _rows(dv1 + n * dk1_n + h * D, dv2 + n * dk2_n + h * D, s, S1, dk1_t, dk2_t, TWO_K)
    tl.store(dk_rows[:, None] + d[None, :], dk_sum.to(dk1.dtype.element_ty), mask=in_keys)
    tl.store(dv_rows[:, None] + d[None, :], dv_sum.to(dv1.dtype.element_ty), mask=in_keys)


@jit
def backward_queries(
    q1, q2, k1, k2, v1, v2,  # as in the forward pass
    dout,  # [M, B, T, H, D]
    lse, delta,  # [M, B, H, T] float32
    dq1, dq2,  # as q1, q2, each sequence of its own; rows before first_query are not written
    q1_m, q1_b, q1_t, q2_m, q2_b, q2_t, k1_m, k1_b, k1_t, k2_m, k2_b, k2_t,
    dq1_n, dq1_t, dq2_n, dq2_t,
    B, T1, T2, S1, S2, first_query,
    scale,  # without log2(e)
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    TWO_Q: tl.constexpr, TWO_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile of queries, from first_query on, of one sequence and head, over all keys."""
    T, S = T1 + T2, S1 + S2
    tiles = tl.cdiv(T - first_query, BLOCK_T)
    pid = tl.program_id(0)
    tile, h, n = pid % tiles, (pid // tiles) % H, (pid // (tiles * H)).to(tl.int64)
    m, b = n // B, n % B
    d = tl.arange(0, BLOCK_D)
    in_d = d < D
    t = first_query + tile * BLOCK_T + tl.arange(0, BLOCK_T)
    in_queries = (t < T)[:, None] & in_d[None, :]
    q_rows = _rows(q1 + m * q1_m + b * q1_b + h * D, q2 + m * q2_m + b * q2_b + h * D, t, T1, q1_t, q2_t, TWO_Q)
    q = tl.load(q_rows[:, None] + d[None, :], mask=in_queries, other=0.0)
    do = tl.load(dout + n * T * H * D + (t * (H * D))[:, None] + h * D + d[None, :], mask=in_queries, other=0.0)
    norm = tl.load(lse + (n * H + h) * T + t, mask=t < T, other=float("inf"))
    taken = tl.load(delta + (n * H + h) * T + t, mask=t < T, other=0.0)
    k_first, k_second = k1 + m * k1_m + b * k1_b + h * D, k2 + m * k2_m + b * k2_b + h * D
    v_first, v_second = v1 + m * k1_m + b * k1_b + h * D, v2 + m * k2_m + b * k2_b + h * D
    log2e: tl.constexpr = 1.4426950408889634

    dq_sum = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        in_keys = (s < S)[:, None] & in_d[None, :]
        k = tl.load(_rows(k_first, k_second, s, S1, k1_t, k2_t, TWO_K)[:, None] + d[None, :], mask=in_keys, other=0.0)
        v = tl.load(_rows(v_first, v_second, s, S1, k1_t, k2_t, TWO_K)[:, None] + d[None, :], mask=in_keys, other=0.0)
        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * log2e) - norm[:, None])
        p = tl.where((s < S)[None, :], p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = (p * (dp - taken[:, None]) * scale).to(k.dtype)
        dq_sum = tl.dot(ds, k, dq_sum, input_precision=PRECISION)
    dq_rows = _rows(dq1 + n * dq1_n + h * D, dq2 + n * dq2_n + h * D, t, T1, dq1_t, dq2_t, TWO_Q)
    tl.store(dq_rows[:, None] + d[None, :], dq_sum.to(dq1.dtype.element_ty), mask=in_queries)
