"""Attention over a ragged, segmented sequence: `softmax(scale * q k^T | visible) v` without a mask tensor.

An `AttentionPlan` says which key intervals each query range sees; work and memory follow the visible area only. Reads
q, k, v once per query tile that needs them and writes `out` once. Packing-invariant: a sample's rows are bit-identical
alone and inside any pack, under the same implementation.
"""

from __future__ import annotations

import math
from typing import overload

import torch
from torch import Tensor

from uniref_fast import native
from uniref_fast.ops._dispatch import choose
from uniref_fast.visibility import AttentionPlan

__all__ = ["segment_attention", "segment_attention_reference"]

REFERENCE_ROWS = 512
"""Query rows that the reference computes at a time: bounds its logits to that many rows."""


@overload
def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, scale: float | None = None, impl: str | None = None
) -> Tensor: ...


@overload
def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = None,
    return_lse: bool,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention under a plan.

    For a pack of two samples of 2 and 3 tokens the plan of `visibility="full"` computes

        # # . . .
        # # . . .
        . . # # #
        . . # # #
        . . # # #

    Args:
        q: `[Nq, H, D]`; float32, bfloat16, float16 (float64 with the reference).
        k, v: `[Nk, H, D]`, same dtype and device. Tokens and heads may be strided; a last dimension that is not
            contiguous is copied.
        plan: from `uniref_fast.visibility.plan`; `plan.num_queries == Nq`, `plan.num_keys == Nk`.
        scale: positive factor on the logits, `1 / sqrt(D)` by default.
        return_lse: also return the log-sum-exp of the scaled logits, float32 `[H, Nq]` (natural logarithm).
        impl: "reference", "native", "triton"; None picks by device.

    Returns:
        out `[Nq, H, D]`, dtype of q; with `return_lse`, `(out, lse)`. A query that sees no key gives 0 and -inf.
    """
    if q.ndim != 3 or k.shape != v.shape or q.shape[1:] != k.shape[1:]:
        raise ValueError(
            f"q must be [Nq, H, D] and k, v [Nk, H, D]; got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if (q.shape[0], k.shape[0]) != (plan.num_queries, plan.num_keys):
        raise ValueError(
            f"the plan is for {plan.num_queries} queries and {plan.num_keys} keys, got {q.shape[0]} and {k.shape[0]}"
        )
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        raise ValueError(f"q, k, v differ: {q.dtype} {q.device}, {k.dtype} {k.device}, {v.dtype} {v.device}")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    impl = choose(impl, q, q.shape[-1])
    q, k, v = (x if x.stride(-1) == 1 or x.numel() == 0 else x.contiguous() for x in (q, k, v))
    tiles = plan.tiles(_triton_config(q).BLOCK_M, q.device) if impl == "triton" else None
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    out, lse = torch.ops.uniref_fast.segment_attention(q, k, v, *plan.tensors(q.device), tiles, scale, impl)
    return (out, lse) if return_lse else out


def segment_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, q_ranges: Tensor, kv_ptr: Tensor, kv_ranges: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The specification: a dense softmax per query range, in float64 for float64 inputs and float32 otherwise."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full((q.shape[1], q.shape[0]), -math.inf, dtype=torch.float32, device=q.device)
    pointers, intervals = kv_ptr.tolist(), kv_ranges.tolist()
    for r, (start, end) in enumerate(q_ranges.tolist()):
        visible = [slice(a, b) for a, b in intervals[pointers[r] : pointers[r + 1]]]
        if not visible:
            continue
        keys = torch.cat([k[s] for s in visible]).to(compute)
        values = torch.cat([v[s] for s in visible]).to(compute)
        for rows in torch.arange(start, end, device=q.device).split(REFERENCE_ROWS):
            logits = torch.einsum("qhd,khd->hqk", q[rows].to(compute), keys) * scale
            out[rows] = torch.einsum("hqk,khd->qhd", logits.softmax(-1), values).to(q.dtype)
            lse[:, rows] = logits.logsumexp(-1).to(torch.float32)
    return out, lse


def _triton_config(q: Tensor):
    from uniref_fast.kernels import segment_attention as kernels

    capability = torch.cuda.get_device_capability(q.device) if q.device.type == "cuda" else (8, 0)
    return kernels.pick_config(q.shape[-1], q.dtype, capability)


@torch.library.custom_op("uniref_fast::segment_attention", mutates_args=())
def _segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_ranges: Tensor,
    kv_ptr: Tensor,
    kv_ranges: Tensor,
    tiles: Tensor | None,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    if impl == "triton":
        from uniref_fast.kernels import segment_attention as kernels

        assert tiles is not None, "the Triton kernel needs the plan's tiles"
        return kernels.segment_attention(q, k, v, q_ranges, kv_ptr, kv_ranges, tiles, scale, _triton_config(q))
    if impl == "native":
        return native.segment_attention(q, k, v, q_ranges, kv_ptr, kv_ranges, scale)
    return segment_attention_reference(q, k, v, q_ranges, kv_ptr, kv_ranges, scale)


@_segment_attention.register_fake
def _(q, k, v, q_ranges, kv_ptr, kv_ranges, tiles, scale, impl):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
