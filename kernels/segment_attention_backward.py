"""The gradients of `segment_attention`: dq over the query tiles, dk and dv over the key tiles of the transposed plan.

    P = exp(scale * q k^T - lse)      dP = dO v^T      delta = rowsum(dO * out)      dS = P * (dP - delta)
    dv = P^T dO                       dk = scale * dS^T q                            dq = scale * dS k

Flops: 14 * D * H * (visible pairs), since both kernels compute P and dP. Bytes: as the forward, q and dO once per key
tile that they see, k and v once per query tile.

Each tile of dq, dk or dv is summed by one program in a fixed order: no atomics, so two runs agree to the bit. Tiles
start at range starts, and the tiles that a program loops over start at interval starts: a sample's gradients are the
same bits alone and in any pack.

A causal interval (`segment_attention.py`) is masked in every tile, and tiles without a visible pair are left out. A
plan without causal intervals is compiled without any of this (CAUSAL).

The loops mask the loads of every tile and do not handle the last tile of an interval apart: by the compiler's report,
two copies of the loop body spill registers, and comparing row numbers does not.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from uniref_fast.kernels.launch_metadata import attention_products, moved_bytes
from uniref_fast.kernels.segment_attention_config import HEAD_DIMS, AttentionTables

DELTA_ROWS = 32


# Like s_lse below: not specialised, so that one binary serves every pack.
@triton.jit(do_not_specialize=["num_queries"], launch_metadata=moved_bytes)
def delta_kernel(
    p_out, s_on, s_oh,  # [Nq, H, D]
    p_do, s_gn, s_gh,  # [Nq, H, D]
    p_lse,  # [H, Nq]
    p_lse2,  # [H, Nq]
    p_delta,  # [H, Nq]
    num_queries,
    D: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    """Compute the statistics of each query that both kernels need: delta, and lse in base 2."""
    row = tl.program_id(0).to(tl.int64) * BM
    i_h = tl.program_id(1).to(tl.int64)
    o_m = tl.arange(0, BM)
    o_d = tl.arange(0, D)
    m_m = o_m < num_queries - row
    p_out += row * s_on + i_h * s_oh
    p_do += row * s_gn + i_h * s_gh
    o_stat = i_h * num_queries + row + o_m
    b_out = tl.load(p_out + o_m[:, None] * s_on + o_d[None, :], mask=m_m[:, None], other=0.0)  # [BM, D]
    b_do = tl.load(p_do + o_m[:, None] * s_gn + o_d[None, :], mask=m_m[:, None], other=0.0)  # [BM, D]
    b_lse = tl.load(p_lse + o_stat, mask=m_m, other=0.0)
    b_delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)
    tl.store(p_lse2 + o_stat, b_lse * 1.4426950408889634, mask=m_m)
    tl.store(p_delta + o_stat, b_delta, mask=m_m)


@triton.jit(
    do_not_specialize=["s_lse"],
    launch_metadata=attention_products(4, "p_k_ranges", "p_q_ptr", "p_q_spans"),
)
def dkdv_kernel(
    p_q, s_qn, s_qh,  # [Nq, H, D]
    p_k, s_kn, s_kh,  # [Nk, H, D]
    p_v, s_vn, s_vh,  # [Nk, H, D]
    p_do, s_gn, s_gh,  # [Nq, H, D]
    p_lse2, p_delta, s_lse,  # [H, Nq]
    p_dk, p_dv, s_dn, s_dh,  # [Nk, H, D]
    p_k_ranges,  # [R, 2]
    p_q_ptr,  # [R + 1]
    p_q_spans,  # [M, 2]
    p_tiles,  # [T, 2]
    scale,
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
    last_row = tl.load(p_k_ranges + 2 * i_r + 1)
    first_span = tl.load(p_q_ptr + i_r)
    last_span = tl.load(p_q_ptr + i_r + 1)
    if CAUSAL:
        first_of_range = tl.load(p_k_ranges + 2 * i_r)

    o_m = tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, D)
    row = first_row.to(tl.int64)
    p_q += i_h * s_qh
    p_k += i_h * s_kh + row * s_kn
    p_v += i_h * s_vh + row * s_vn
    p_do += i_h * s_gh
    p_lse2 += i_h * s_lse
    p_delta += i_h * s_lse
    m_n = o_n[:, None] < last_row - first_row
    b_k = tl.load(p_k + o_n[:, None] * s_kn + o_d[None, :], mask=m_n, other=0.0)  # [BN, D]
    b_v = tl.load(p_v + o_n[:, None] * s_vn + o_d[None, :], mask=m_n, other=0.0)  # [BN, D]
    b_dk = tl.zeros([BN, D], dtype=tl.float32)
    b_dv = tl.zeros([BN, D], dtype=tl.float32)
    for i in range(first_span, last_span):
        start = tl.load(p_q_spans + 2 * i)
        end = tl.load(p_q_spans + 2 * i + 1)
        if CAUSAL:
            causal = start < 0
            # The first query that sees a key of the tile is aligned with its first key.
            start = tl.where(causal, -1 - start + first_row - first_of_range, start)
            first_sees = tl.where(causal, start, start - BN)  # key n is seen from this query + n on
        for i_m in range(start, end, BM):
            query = tl.cast(i_m, tl.int64)  # an int, which has no `.to`, when interpreted
            m_m = o_m < end - i_m
            p_q_i = p_q + query * s_qn
            p_do_i = p_do + query * s_gn
            # A row past the span belongs to other segments and is loaded as 0: it adds 1 * 0 to dv and to dk.
            b_q = tl.load(p_q_i + o_m[:, None] * s_qn + o_d[None, :], mask=m_m[:, None], other=0.0)  # [BM, D]
            b_do = tl.load(p_do_i + o_m[:, None] * s_gn + o_d[None, :], mask=m_m[:, None], other=0.0)  # [BM, D]
            # Keys down, queries across: P and dS are then the left operands of dv and dk as they lie in registers.
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")  # [BN, BM]
            # Read after S, and delta after dv, they take no registers while the products before them run.
            b_lse2 = tl.load(p_lse2 + query + o_m, mask=m_m, other=0.0)
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")  # [BN, BM]
            if CAUSAL:
                b_s = tl.where(o_n[:, None] <= i_m - first_sees + o_m[None, :], b_s, float("-inf"))
            b_p = tl.exp2(b_s * qk_scale - b_lse2[None, :])  # [BN, BM]
            b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")  # [BN, D]
            b_delta = tl.load(p_delta + query + o_m, mask=m_m, other=0.0)
            b_ds = b_p * (b_dp - b_delta[None, :])  # [BN, BM]
            b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")  # [BN, D]

    # Not the mask of the loads, which would stay in registers throughout the loops.
    m_n = first_row + o_n[:, None] < last_row
    o_dk = row * s_dn + i_h * s_dh + o_n[:, None] * s_dn + o_d[None, :]
    tl.store(p_dv + o_dk, b_dv.to(p_dv.dtype.element_ty), mask=m_n)
    tl.store(p_dk + o_dk, (b_dk * scale).to(p_dk.dtype.element_ty), mask=m_n)


@triton.jit(
    do_not_specialize=["s_lse"],
    launch_metadata=attention_products(3, "p_q_ranges", "p_kv_ptr", "p_kv_ranges"),
)
def dq_kernel(
    p_q, s_qn, s_qh,  # [Nq, H, D]
    p_k, s_kn, s_kh,  # [Nk, H, D]
    p_v, s_vn, s_vh,  # [Nk, H, D]
    p_do, s_gn, s_gh,  # [Nq, H, D]
    p_lse2, p_delta, s_lse,  # [H, Nq]
    p_dq, s_dn, s_dh,  # [Nq, H, D]
    p_q_ranges,  # [R, 2]
    p_kv_ptr,  # [R + 1]
    p_kv_ranges,  # [M, 2]
    p_tiles,  # [T, 2]
    scale,
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
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, D)
    row = first_row.to(tl.int64)
    p_q += i_h * s_qh + row * s_qn
    p_k += i_h * s_kh
    p_v += i_h * s_vh
    p_do += i_h * s_gh + row * s_gn
    o_stat = i_h * s_lse + row + o_m
    m_m = o_m < last_row - first_row
    b_q = tl.load(p_q + o_m[:, None] * s_qn + o_d[None, :], mask=m_m[:, None], other=0.0)  # [BM, D]
    b_do = tl.load(p_do + o_m[:, None] * s_gn + o_d[None, :], mask=m_m[:, None], other=0.0)  # [BM, D]
    b_lse2 = tl.load(p_lse2 + o_stat, mask=m_m, other=0.0)
    b_delta = tl.load(p_delta + o_stat, mask=m_m, other=0.0)
    b_dq = tl.zeros([BM, D], dtype=tl.float32)
    for i in range(first_interval, last_interval):
        start = tl.load(p_kv_ranges + 2 * i)
        end = tl.load(p_kv_ranges + 2 * i + 1)
        if CAUSAL:
            causal = start < 0
            start = tl.where(causal, -1 - start, start)
            # The first query of the tile sees the keys before this one, each next query sees one more.
            unseen = tl.where(causal, start + first_row - first_of_range + 1, end)
            end = tl.minimum(end, unseen + BM - 1)
        for i_n in range(start, end, BN):
            key = tl.cast(i_n, tl.int64)
            m_n = o_n < end - i_n
            p_k_i = p_k + key * s_kn
            p_v_i = p_v + key * s_vn
            b_k = tl.load(p_k_i + o_n[:, None] * s_kn + o_d[None, :], mask=m_n[:, None], other=0.0)  # [BN, D]
            b_v = tl.load(p_v_i + o_n[:, None] * s_vn + o_d[None, :], mask=m_n[:, None], other=0.0)  # [BN, D]
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BM, BN]
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")  # [BM, BN]
            b_p = tl.exp2(b_s * qk_scale - b_lse2[:, None])  # [BM, BN]
            # Past the interval s is 0, and P may be inf: dS is selected, not multiplied by 0.
            b_ds = tl.where(m_n[None, :], b_p * (b_dp - b_delta[:, None]), 0.0)  # [BM, BN]
            if CAUSAL:
                # In this form, registers do not spill; with the sum on the side of o_m they do on 8.9.
                b_ds = tl.where((o_n + (i_n - unseen))[None, :] < o_m[:, None], b_ds, 0.0)
            b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")  # [BM, D]

    m_m = first_row + o_m < last_row
    o_dq = row * s_dn + i_h * s_dh + o_m[:, None] * s_dn + o_d[None, :]
    tl.store(p_dq + o_dq, (b_dq * scale).to(p_dq.dtype.element_ty), mask=m_m[:, None])


def segment_attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    by_query: AttentionTables,
    by_key: AttentionTables,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of `segment_attention` for `grad_out` [Nq, H, D], last dimension contiguous.

    Args:
        q, k, v, scale: Arguments of the forward.
        out, lse: Results of the forward, [Nq, H, D] and float32 [H, Nq].
        by_query: `AttentionTables.by_query` of the plan, cut for the launch of `dq_kernel`.
        by_key: `AttentionTables.by_key` of the plan, cut for the launch of `dkdv_kernel`: ranges that together cover
            every row of k once, and for each the query rows that see it.

    Returns:
        Gradients dq [Nq, H, D], dk and dv [Nk, H, D], contiguous, in q's dtype; 0 for rows without visible pairs.
    """
    num_queries, heads, head_dim = q.shape
    assert head_dim in HEAD_DIMS, f"head_dim {head_dim}, supported: {HEAD_DIMS}"
    assert grad_out.shape == out.shape == q.shape, f"grad_out {grad_out.shape}, out {out.shape}, q {q.shape}"
    assert k.shape == v.shape == (k.shape[0], heads, head_dim), "k, v [Nk, H, D] with the heads and head_dim of q"
    assert len({x.dtype for x in (grad_out, q, k, v, out)}) == 1, "grad_out, q, k, v and out have one dtype"
    assert all(x.stride(2) == 1 for x in (grad_out, q, k, v, out)), "the head dimension must be contiguous"
    assert lse.shape == (heads, num_queries) and lse.dtype == torch.float32 and lse.is_contiguous(), "lse fp32 [H, Nq]"
    (q_tiles, dq_config), (k_tiles, dkdv_config) = by_query.launch(q.device), by_key.launch(q.device)
    block = max(dq_config.BLOCK_M, dq_config.BLOCK_N, dkdv_config.BLOCK_M, dkdv_config.BLOCK_N)
    assert max(x.stride(0) for x in (grad_out, q, k, v, out)) * block < 2**31, "row stride too big"

    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=q.dtype, device=q.device)
    dv = torch.empty(k.shape, dtype=q.dtype, device=q.device)
    lse2, delta = torch.empty(2, heads, num_queries, dtype=torch.float32, device=q.device)
    operands = (
        q, q.stride(0), q.stride(1),
        k, k.stride(0), k.stride(1),
        v, v.stride(0), v.stride(1),
        grad_out, grad_out.stride(0), grad_out.stride(1),
        lse2, delta, lse2.stride(0),
    )  # fmt: skip
    scales = (scale, scale * math.log2(math.e))
    with torch.cuda.device_of(q):
        if dq.numel():
            delta_kernel[(triton.cdiv(num_queries, DELTA_ROWS), heads)](
                out, out.stride(0), out.stride(1), grad_out, grad_out.stride(0), grad_out.stride(1),
                lse, lse2, delta, num_queries, D=head_dim, BM=DELTA_ROWS, num_warps=4,
            )  # fmt: skip
            dq_kernel[(q_tiles.shape[0], heads)](
                *operands, dq, dq.stride(0), dq.stride(1),
                *by_query.plan_tensors, q_tiles, *scales,
                D=head_dim, BM=dq_config.BLOCK_M, BN=dq_config.BLOCK_N, CAUSAL=by_query.causal,
                num_warps=dq_config.num_warps, num_stages=dq_config.num_stages,
            )  # fmt: skip
        if dk.numel():
            dkdv_kernel[(k_tiles.shape[0], heads)](
                *operands, dk, dv, dk.stride(0), dk.stride(1),
                *by_key.plan_tensors, k_tiles, *scales,
                D=head_dim, BM=dkdv_config.BLOCK_M, BN=dkdv_config.BLOCK_N, CAUSAL=by_key.causal,
                num_warps=dkdv_config.num_warps, num_stages=dkdv_config.num_stages,
            )  # fmt: skip
    return dq, dk, dv
