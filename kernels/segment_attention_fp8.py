"""Attention over ragged ranges in 8 bits: q, k, v and P in e4m3, sums in float32; forward only.

The formula and the reason for its scales are in `uniref_fast/ops/attention_fp8.py`, tiles, tables and causal intervals
are those of `segment_attention.py`. The largest P of a query is relative to the largest score so far, as in every
online softmax.

Bytes: q, k, v are read once in 16 bits and written once in 8 bits with a scale per token and head; attention then reads
half of what it reads in 16 bits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from uniref_fast.kernels.fp8 import quantize_heads_fp8
from uniref_fast.kernels.launch_metadata import attention_products
from uniref_fast.kernels.segment_attention_config import HEAD_DIMS, AttentionTables

__all__ = ["segment_attention_fp8"]

LARGEST_POWER = tl.constexpr(8.0)  # P is at most 2^8, below the 448 of e4m3


@triton.jit
def _attend(
    b_acc, b_max, b_sum, b_q, b_q_scale,
    p_k, s_kn, p_k_scale, p_v, s_vn, p_v_scale, length,
    ahead,
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
        b_k = tl.load(p_k + o_n[:, None] * s_kn + o_d[None, :], mask=o_n[:, None] < length, other=0.0)  # [BN, D]
        b_k_scale = tl.load(p_k_scale + o_n, mask=o_n < length, other=1.0)  # [BN]
        b_v_scale = tl.load(p_v_scale + o_n, mask=o_n < length, other=1.0)  # [BN]
    else:
        b_k = tl.load(p_k + o_n[:, None] * s_kn + o_d[None, :])  # [BN, D]
        b_k_scale = tl.load(p_k_scale + o_n)  # [BN]
        b_v_scale = tl.load(p_v_scale + o_n)  # [BN]
    b_t = tl.dot(b_q, tl.trans(b_k))  # [BM, BN]
    b_t = b_t * b_k_scale[None, :] * b_q_scale[:, None] + tl.log2(b_v_scale)[None, :]
    if TAIL:
        b_t = tl.where(o_n[None, :] < length, b_t, float("-inf"))
        if CAUSAL:
            b_t = tl.where(o_n[None, :] <= ahead + tl.arange(0, BM)[:, None], b_t, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_t, 1))  # [BM]
    b_p = tl.exp2(b_t - (b_new - LARGEST_POWER)[:, None])  # [BM, BN]
    b_alpha = tl.exp2(b_max - b_new)  # [BM], 0 at the first tile
    b_sum = b_sum * b_alpha + tl.sum(b_p * (1.0 / b_v_scale)[None, :], 1)
    b_acc = b_acc * b_alpha[:, None]
    if TAIL:
        b_v = tl.load(p_v + o_n[:, None] * s_vn + o_d[None, :], mask=o_n[:, None] < length, other=0.0)  # [BN, D]
    else:
        b_v = tl.load(p_v + o_n[:, None] * s_vn + o_d[None, :])  # [BN, D]
    # Tensor cores of Hopper add products of 8 bits with fewer bits than float32; across tiles the sum is in float32.
    b_acc = tl.dot(b_p.to(tl.float8e4nv), b_v, b_acc, max_num_imprecise_acc=BN)  # [BM, D]
    return b_acc, b_new, b_sum


# The numbers of queries and keys are not specialised, so that one binary serves every pack.
@triton.jit(
    do_not_specialize=["num_queries", "num_keys"],
    launch_metadata=attention_products(2, "p_q_ranges", "p_kv_ptr", "p_kv_ranges"),
)
def segment_attention_fp8_kernel(
    p_q, s_qn, s_qh,  # [Nq, H, D] float8
    p_k, s_kn, s_kh,  # [Nk, H, D] float8
    p_v, s_vn, s_vh,  # [Nk, H, D] float8
    p_q_scale, num_queries,  # [H, Nq] float32
    p_k_scale, p_v_scale, num_keys,  # [H, Nk] float32
    p_out, s_on, s_oh,  # [Nq, H, D]
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
    row = first_row.to(tl.int64)
    p_q += row * s_qn + i_h * s_qh
    p_k += i_h * s_kh
    p_v += i_h * s_vh
    p_q_scale += i_h * num_queries + row
    p_k_scale += i_h * num_keys
    p_v_scale += i_h * num_keys
    b_q = tl.load(p_q + o_m[:, None] * s_qn + o_d[None, :], mask=m_m[:, None], other=0.0)  # [BM, D]
    b_q_scale = tl.load(p_q_scale + o_m, mask=m_m, other=0.0) * qk_scale  # [BM]

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
                b_acc, b_max, b_sum, b_q, b_q_scale, p_k + key * s_kn, s_kn, p_k_scale + key,
                p_v + key * s_vn, s_vn, p_v_scale + key, BN, 0, False, False, BN,
            )  # fmt: skip
        if CAUSAL:
            for i_n in range(tail, last, BN):
                key = tl.cast(i_n, tl.int64)
                b_acc, b_max, b_sum = _attend(
                    b_acc, b_max, b_sum, b_q, b_q_scale, p_k + key * s_kn, s_kn, p_k_scale + key,
                    p_v + key * s_vn, s_vn, p_v_scale + key, end - i_n, start + first_sees - 1 - i_n, True, True, BN,
                )  # fmt: skip
        elif tail < end:
            key = tail.to(tl.int64)
            b_acc, b_max, b_sum = _attend(
                b_acc, b_max, b_sum, b_q, b_q_scale, p_k + key * s_kn, s_kn, p_k_scale + key,
                p_v + key * s_vn, s_vn, p_v_scale + key, end - tail, 0, True, False, BN,
            )  # fmt: skip

    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)  # a range without keys: out 0
    b_out = (b_acc / b_sum[:, None]).to(p_out.dtype.element_ty)  # [BM, D]
    # Not the mask of the load, which would stay in registers throughout the loops.
    m_m = first_row + o_m < last_row
    p_out += row * s_on + i_h * s_oh
    tl.store(p_out + o_m[:, None] * s_on + o_d[None, :], b_out, mask=m_m[:, None])


def segment_attention_fp8(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tables: AttentionTables, scale: float
) -> torch.Tensor:
    """Quantise q [Nq, H, D] and k, v [Nk, H, D], and compute attention; D one of 16, 32, 64, 128, contiguous.

    Args:
        tables: `AttentionTables.by_query` of the plan; the kernel is launched with their `config`.
        scale: Positive factor of the scores, usually `D ** -0.5`.

    Returns:
        The output [Nq, H, D] in q's dtype, 0 for a query without visible keys.
    """
    num_queries, heads, head_dim = q.shape
    assert head_dim in HEAD_DIMS, f"head_dim {head_dim}, supported: {HEAD_DIMS}"
    assert k.shape == v.shape == (k.shape[0], heads, head_dim), "k, v [Nk, H, D] with the heads and head_dim of q"
    assert scale > 0, "the running maximum needs a positive scale"
    tiles, config = tables.launch(q.device)
    assert heads * head_dim * max(config.BLOCK_M, config.BLOCK_N) < 2**31, "row stride too big"
    out = torch.empty(num_queries, heads, head_dim, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    (q8, q_scale), (k8, k_scale), (v8, v_scale) = (quantize_heads_fp8(x) for x in (q, k, v))
    with torch.cuda.device_of(q):
        segment_attention_fp8_kernel[(tiles.shape[0], heads)](
            q8, q8.stride(0), q8.stride(1),
            k8, k8.stride(0), k8.stride(1),
            v8, v8.stride(0), v8.stride(1),
            q_scale, num_queries, k_scale, v_scale, len(k8),
            out, out.stride(0), out.stride(1),
            *tables.plan_tensors, tiles,
            scale * math.log2(math.e),
            D=head_dim, BM=config.BLOCK_M, BN=config.BLOCK_N, CAUSAL=tables.causal,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out
