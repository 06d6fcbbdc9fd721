"""Attention over ragged ranges: each query range sees its own list of key intervals, in one launch, without a mask.

    out[i] = softmax_j(scale * q[i] . k[j]) v[j],   j in the intervals of the range that holds i
    lse[i] = log sum_j exp(scale * q[i] . k[j])

        keys      0..3  4....9  10..12          kv_ptr    = 0 1 3          (range 0: one interval, range 1: two)
        range 0   ####  ......  ......          kv_ranges = (0,4) (0,4) (10,13)
        range 1   ####  ......  ######

Flops: 4 * D * H * (visible pairs). Bytes: q, out and lse once; k and v of an interval once per query tile that sees it,
served by L2, because the tiles of one head run side by side.

Use this kernel for packs of many samples, reference-aware visibility and group-shared references. A dense library
kernel is better for a plan of one or two big rectangles.

Query tiles start at range starts and key tiles at interval starts, and only the last key tile of an interval is
masked. So the arithmetic of a range depends on its own lengths alone: a sample is bit-identical alone and in any pack.

A causal interval has as many rows as its range, and query i of the range sees its keys j <= i. Key tiles that all
queries of a tile see are as above, those that only some see are masked, the others are not read. A plan without causal
intervals is compiled without any of this (CAUSAL).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from uniref_fast.kernels.launch_metadata import attention_products
from uniref_fast.kernels.segment_attention_config import HEAD_DIMS, AttentionTables

__all__ = ["segment_attention"]


@triton.jit
def _attend(
    b_acc, b_max, b_sum, b_q, p_k, s_kn, p_v, s_vn, length, ahead, qk_scale,
    TAIL: tl.constexpr, CAUSAL: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Add one key tile to the online softmax in base 2; if TAIL, only the first `length` keys are visible.

    If also CAUSAL, query m of the tile sees the keys n <= ahead + m of them.
    """
    D: tl.constexpr = b_q.shape[1]
    BM: tl.constexpr = b_q.shape[0]
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, D)
    if TAIL:
        # Rows past the interval belong to other segments: not loaded, since 0 * inf would reach the sum through v.
        b_k = tl.load(p_k + o_n[:, None] * s_kn + o_d[None, :], mask=o_n[:, None] < length, other=0.0)  # [BN, D]
    else:
        b_k = tl.load(p_k + o_n[:, None] * s_kn + o_d[None, :])  # [BN, D]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BM, BN]
    if TAIL:
        b_s = tl.where(o_n[None, :] < length, b_s, float("-inf"))
        if CAUSAL:
            b_s = tl.where(o_n[None, :] <= ahead + tl.arange(0, BM)[:, None], b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * qk_scale)  # [BM], finite: each query sees a key of its first tile
    b_p = tl.exp2(b_s * qk_scale - b_new[:, None])  # [BM, BN]
    b_alpha = tl.exp2(b_max - b_new)  # [BM], 0 at the first tile
    b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
    b_acc = b_acc * b_alpha[:, None]
    if TAIL:
        b_v = tl.load(p_v + o_n[:, None] * s_vn + o_d[None, :], mask=o_n[:, None] < length, other=0.0)  # [BN, D]
    else:
        b_v = tl.load(p_v + o_n[:, None] * s_vn + o_d[None, :])  # [BN, D]
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")  # [BM, D]
    return b_acc, b_new, b_sum


# s_lse is the number of queries: not specialised, so that one binary serves every pack.
@triton.jit(
    do_not_specialize=["s_lse"],
    launch_metadata=attention_products(2, "p_q_ranges", "p_kv_ptr", "p_kv_ranges"),
)
def segment_attention_kernel(
    p_q, s_qn, s_qh,  # [Nq, H, D]
    p_k, s_kn, s_kh,  # [Nk, H, D]
    p_v, s_vn, s_vh,  # [Nk, H, D]
    p_out, s_on, s_oh,  # [Nq, H, D]
    p_lse, s_lse,  # [H, Nq]
    p_q_ranges,  # [R, 2]
    p_kv_ptr,  # [R + 1]
    p_kv_ranges,  # [M, 2]
    p_tiles,  # [T, 2]
    qk_scale,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    # The tile index runs fastest: programs in flight share one head, whose keys and values then stay in L2.
    i_tile = tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64)
    i_r = tl.load(p_tiles + 2 * i_tile)
    first_row = tl.load(p_tiles + 2 * i_tile + 1)
    last_row = tl.load(p_q_ranges + 2 * i_r + 1)
    first_interval = tl.load(p_kv_ptr + i_r)
    last_interval = tl.load(p_kv_ptr + i_r + 1)
    if CAUSAL:
        first_of_range = tl.load(p_q_ranges + 2 * i_r)

    o_m = tl.arange(0, BM)
    o_d = tl.arange(0, D)
    m_m = o_m < last_row - first_row
    # Row index times stride in int64 as a scalar, offsets within a tile in int32: safe for any N, and cheap.
    row = first_row.to(tl.int64)
    p_q += row * s_qn + i_h * s_qh
    p_k += i_h * s_kh
    p_v += i_h * s_vh
    b_q = tl.load(p_q + o_m[:, None] * s_qn + o_d[None, :], mask=m_m[:, None], other=0.0)  # [BM, D]

    b_acc = tl.zeros([BM, D], dtype=tl.float32)
    b_max = tl.full([BM], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BM], dtype=tl.float32)
    for i in range(first_interval, last_interval):
        start = tl.load(p_kv_ranges + 2 * i)
        end = tl.load(p_kv_ranges + 2 * i + 1)
        if CAUSAL:
            causal = start < 0
            start = tl.where(causal, -1 - start, start)
            # Keys that the first query of the tile sees, and keys that one of its queries sees.
            first_sees = tl.where(causal, first_row - first_of_range + 1, end - start)
            length = tl.minimum(end - start, first_sees + BM - 1)
            tail = start + tl.minimum(first_sees, length) // BN * BN
            last = start + length
        else:
            tail = start + (end - start) // BN * BN
        for i_n in range(start, tail, BN):
            key = tl.cast(i_n, tl.int64)  # an int, which has no `.to`, when interpreted
            b_acc, b_max, b_sum = _attend(
                b_acc, b_max, b_sum, b_q, p_k + key * s_kn, s_kn, p_v + key * s_vn, s_vn, BN, 0, qk_scale,
                False, False, BN,
            )  # fmt: skip
        if CAUSAL:
            for i_n in range(tail, last, BN):
                key = tl.cast(i_n, tl.int64)
                b_acc, b_max, b_sum = _attend(
                    b_acc, b_max, b_sum, b_q, p_k + key * s_kn, s_kn, p_v + key * s_vn, s_vn, end - i_n,
                    start + first_sees - 1 - i_n, qk_scale, True, True, BN,
                )  # fmt: skip
        elif tail < end:
            key = tail.to(tl.int64)
            b_acc, b_max, b_sum = _attend(
                b_acc, b_max, b_sum, b_q, p_k + key * s_kn, s_kn, p_v + key * s_vn, s_vn, end - tail, 0, qk_scale,
                True, False, BN,
            )  # fmt: skip

    # A range without keys has sum 0 and maximum -inf: out 0, lse -inf.
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_out = (b_acc / b_sum[:, None]).to(p_out.dtype.element_ty)  # [BM, D]
    b_lse = b_max * 0.6931471805599453 + tl.log(b_sum)  # [BM], from base 2 to natural
    # Not the mask of the load, which would stay in registers throughout the loops.
    m_m = first_row + o_m < last_row
    p_out += row * s_on + i_h * s_oh
    tl.store(p_out + o_m[:, None] * s_on + o_d[None, :], b_out, mask=m_m[:, None])
    tl.store(p_lse + i_h * s_lse + row + o_m, b_lse, mask=m_m)


def segment_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tables: AttentionTables, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention of q [Nq, H, D] over k, v [Nk, H, D], D one of 16, 32, 64, 128, last dimension contiguous.

    Args:
        tables: `AttentionTables.by_query` of the plan; the kernel is launched with their `config`.
        scale: Positive factor of the scores, usually `D ** -0.5`.

    Returns:
        The output [Nq, H, D] in q's dtype and the log-sum-exp float32 [H, Nq] (natural logarithm); 0 and -inf for a
        query without visible keys.
    """
    num_queries, heads, head_dim = q.shape
    assert head_dim in HEAD_DIMS, f"head_dim {head_dim}, supported: {HEAD_DIMS}"
    assert k.shape == v.shape == (k.shape[0], heads, head_dim), "k, v [Nk, H, D] with the heads and head_dim of q"
    assert q.dtype == k.dtype == v.dtype, f"dtypes differ: q {q.dtype}, k {k.dtype}, v {v.dtype}"
    assert q.stride(2) == k.stride(2) == v.stride(2) == 1, "the head dimension must be contiguous"
    tiles, config = tables.launch(q.device)
    assert scale > 0, "the running maximum is scaled after the fact, which needs a positive scale"
    assert max(x.stride(0) for x in (q, k, v)) * max(config.BLOCK_M, config.BLOCK_N) < 2**31, "row stride too big"

    out = torch.empty(num_queries, heads, head_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(heads, num_queries, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    with torch.cuda.device_of(q):
        segment_attention_kernel[(tiles.shape[0], heads)](
            q, q.stride(0), q.stride(1),
            k, k.stride(0), k.stride(1),
            v, v.stride(0), v.stride(1),
            out, out.stride(0), out.stride(1),
            lse, lse.stride(0),
            *tables.plan_tensors, tiles,
            scale * math.log2(math.e),
            D=head_dim, BM=config.BLOCK_M, BN=config.BLOCK_N, CAUSAL=tables.causal,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out, lse
