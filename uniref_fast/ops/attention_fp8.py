"""Attention in 8 bits over a plan: q, k, v in e4m3 with a scale per token and head, P in e4m3, sums in float32.

    t[i, j] = scale * log2(e) * q_scale[i] * k_scale[j] * (q8[i] . k8[j]) + log2(v_scale[j])
    p[i, j] = 2^(t[i, j] - max_j t[i, j] + 8)
    out[i]  = sum_j e4m3(p[i, j]) v8[j]  /  sum_j p[i, j] / v_scale[j]

The scale of v is part of P, so the 8 bits of P are spent on what a key adds to the output, and a key with large values
costs other keys nothing. The largest P of a query is 2^8, which e4m3 represents exactly.

The scales belong to single tokens, so a sample has the same result alone and in any pack. Forward only, for inference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from uniref_fast import tuning
from uniref_fast.kernels import segment_attention_config as configs
from uniref_fast.kernels.segment_attention_config import AttentionTables
from uniref_fast.ops._dispatch import define_op, observed, unit_stride
from uniref_fast.ops.fp8 import FP8, _choose, _quantize
from uniref_fast.ops.segment_attention import REFERENCE_ROWS, _capability, causally_hidden, checked_scale
from uniref_fast.visibility import AttentionPlan

__all__ = ["attention_fp8", "attention_fp8_reference", "launch_config"]

LARGEST_POWER = 8.0
"""Binary exponent of the largest P of a query, which is at most 256 and so below the 448 of e4m3."""


def attention_fp8(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, scale: float | None = None, impl: str | None = None
) -> Tensor:
    """Compute `segment_attention` in 8 bits.

    Args:
        q: `[Nq, H, D]`; float32, bfloat16, float16.
        k, v: `[Nk, H, D]`, same dtype and device.
        plan: Plan from `uniref_fast.visibility.plan`, with `plan.num_queries == Nq` and `plan.num_keys == Nk`.
        scale: Positive factor on the logits, `1 / sqrt(D)` by default.
        impl: "reference" (any device, emulates the arithmetic) or "triton" (compute capability 8.9 and up, D of 16, 32,
            64 or 128). None picks by device.

    Returns:
        `[Nq, H, D]` in the dtype of q, 0 for a query without keys. It has no gradient.

    Raises:
        ValueError: `impl` is not possible here, q, k, v and the plan do not fit together, or gradients would be taken.
    """
    scale = checked_scale(q, k, v, plan, scale)
    if _choose(impl, q, k, v, head_dim=q.shape[-1]) == "reference":
        return attention_fp8_reference(q, k, v, plan, scale)
    q, k, v = (unit_stride(x) for x in (q, k, v))
    tensors, launch = AttentionTables.by_query(plan, q.device, launch_config(q, plan)).operands()
    run = torch.ops.uniref_fast.attention_fp8 if observed(q, k, v) else _attention_fp8
    return run(q, k, v, tensors, launch, scale)


def launch_config(q: Tensor, plan: AttentionPlan) -> configs.AttentionConfig:
    """Return the launch parameters of the kernel for queries like q `[N, H, D]`.

    They come from the table of the device (`bench/autotune.py`), or for causal intervals and without a table from the
    compiler's report. No table was measured yet.
    """
    tuned = None
    if not plan.causal:
        tuned = tuning.attention_config(tuning.device_name(q.device), FP8, q.shape[-1], "forward")
    if tuned is not None:
        return configs.AttentionConfig(**tuned)
    return configs.pick_fp8_config(q.shape[-1], _capability(q), bool(plan.causal))


def attention_fp8_reference(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """Emulate the arithmetic on any device: products of 8-bit values and sums in float32."""
    (q8, q_scale), (k8, k_scale), (v8, v_scale) = (_quantize(x.flatten(0, 1)) for x in (q, k, v))
    q8, k8, v8 = (x8.view(x.shape).to(torch.float32) for x8, x in ((q8, q), (k8, k), (v8, v)))
    q_scale, k_scale, v_scale = (s.view(x.shape[:2]).T for s, x in ((q_scale, q), (k_scale, k), (v_scale, v)))  # [H, N]
    factors = q_scale * (scale * math.log2(math.e))
    outs = [q[:0]]
    for index, ((start, end), intervals) in enumerate(zip(plan.ranges, plan.intervals, strict=True)):
        if not any(a < b for a, b in intervals):
            outs.append(torch.zeros_like(q[start:end]))
            continue
        keys, values = (torch.cat([x[a:b] for a, b in intervals]) for x in (k8, v8))
        of_key, of_value = (torch.cat([s[:, a:b] for a, b in intervals], 1)[:, None] for s in (k_scale, v_scale))
        for first in range(start, end, REFERENCE_ROWS):
            rows = slice(first, min(first + REFERENCE_ROWS, end))
            logits = torch.einsum("qhd,khd->hqk", q8[rows], keys) * of_key
            logits = logits * factors[:, rows, None] + of_value.log2()
            if plan.causal_at(index) >= 0:
                hidden = causally_hidden(plan, index, first - start, logits.shape[1], q.device)
                logits = logits.masked_fill(hidden, -math.inf)
            p = torch.exp2(logits - logits.amax(-1, keepdim=True) + LARGEST_POWER)
            out = torch.einsum("hqk,khd->hqd", p.to(FP8).to(torch.float32), values)
            outs.append((out / (p / of_value).sum(-1, keepdim=True)).transpose(0, 1).to(q.dtype))
    return torch.cat(outs)


# ---- torch.library op ----


@define_op
def _attention_fp8(
    q: Tensor, k: Tensor, v: Tensor, tables: Sequence[Tensor], launch: Sequence[int], scale: float
) -> Tensor:
    from uniref_fast.kernels import segment_attention_fp8 as kernels

    return kernels.segment_attention_fp8(q, k, v, AttentionTables.from_operands(tables, launch), scale)


@torch.library.register_fake("uniref_fast::attention_fp8")
def _(q, k, v, tables, launch, scale):
    return q.new_empty(q.shape)
