"""Attention over a ragged, segmented sequence: `softmax(scale * q k^T | visible) v` without a mask tensor.

An `AttentionPlan` lists the key intervals that each query range sees; work and memory depend on the visible area only.
The kernels read q, k, v once per query tile that needs them and write `out` once. The backward recomputes the scores
from the saved log-sum-exp. Attention is packing-invariant: the output of a sample and its gradients are bit-identical
alone and inside any pack, under the same implementation.

Ragged plans run in our kernels, in one launch; a few big rectangles run in PyTorch's own fused attention ("dense"). The
libraries FlashAttention ("flash") and cuDNN's flex attention ("cudnn_flex") serve on request where they are installed.
A measured table of the device decides (`uniref_fast.tuning`), about these two as well if they were installed when it
was measured; `explain_attention` returns the choice and the reason.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from uniref_fast import native, tuning
from uniref_fast.kernels import segment_attention_config as configs
from uniref_fast.kernels.segment_attention_config import AttentionTables
from uniref_fast.memo import memo
from uniref_fast.ops import flash_attention, flex_attention
from uniref_fast.ops._dispatch import (
    ATTENTION_LIBRARIES,
    IMPLEMENTATIONS,
    choose,
    define_op,
    first_order_only,
    inside_transform,
    observed,
    one_of,
    unavailable,
    unit_stride,
    upstream,
)
from uniref_fast.ops.dense_attention import backend, dense_attention, rectangles_of
from uniref_fast.visibility import AttentionPlan

__all__ = [
    "PreparedPlan",
    "attention_unavailable",
    "checked_scale",
    "explain_attention",
    "launch_numbers",
    "prepare_plan",
    "segment_attention",
    "segment_attention_reference",
]

DENSE_RECTANGLES, DENSE_PAIRS = 4, 1024 * 1024
"""Largest number of rectangles, and smallest mean number of pairs, for which the library is chosen on a GPU without a
table. From published figures of fused library attention against Triton kernels."""

NUMBERS = len(dataclasses.fields(configs.AttentionConfig)) + 1
"""Integers that describe one launch in the arguments of the op: its parameters, and whether some interval is causal."""

REFERENCE_ROWS = 512
"""Number of query rows that the reference computes at a time, which limits the memory of its logits."""


@overload
def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan | PreparedPlan,
    *,
    scale: float | None = None,
    impl: str | None = None,
    backward: bool | None = None,
) -> Tensor: ...


@overload
def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan | PreparedPlan,
    *,
    scale: float | None = None,
    return_lse: bool,
    impl: str | None = None,
    backward: bool | None = None,
) -> tuple[Tensor, Tensor]: ...


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan | PreparedPlan,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str | None = None,
    backward: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute attention under a plan.

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
        plan: Plan from `uniref_fast.visibility.plan`, with `plan.num_queries == Nq` and `plan.num_keys == Nk`, or a
            plan that `prepare_plan` has prepared for one of our kernels, with `impl` and `backward`.
        scale: Positive factor on the logits, `1 / sqrt(D)` by default.
        return_lse: Also return the log-sum-exp of the scaled logits, float32 `[H, Nq]` (natural logarithm).
        impl: "reference", "native", "triton", or a library: "dense" (PyTorch's fused attention, one call per
            rectangle), "flash" (FlashAttention 2, 3 or 4), "cudnn_flex" (cuDNN's flex attention). None picks by device,
            plan, size and `backward`; for bit-equal results under different packs give one explicitly.
        backward: Count the time of a backward in the choice. None counts it if gradients will be taken. With True, a
            forward without gradients has the same bits as a forward with gradients.

    Returns:
        The output `[Nq, H, D]` in the dtype of q; with `return_lse`, `(out, lse)`. A query without keys gives 0 and
        -inf. Differentiable in q, k and v; lse carries no gradient outside of `torch.func` and forward mode.
    """
    scale = checked_scale(q, k, v, plan, scale)
    if isinstance(plan, PreparedPlan):
        impl, tables = plan.impl, plan.operands
    else:
        needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        impl, tables = _prepare(q.detach(), plan, impl, needs_grad, backward)
    q, k, v = (unit_stride(x) for x in (q, k, v))
    if impl == "reference":
        assert isinstance(plan, AttentionPlan), "only plans for our kernels are prepared"
        out, lse = segment_attention_reference(q, k, v, plan, scale)
    elif impl == "dense":
        dense = torch.ops.uniref_fast.dense_attention if observed(q, k, v) else dense_attention
        out, lse = dense(q, k, v, tables[3], scale)
    elif impl == "flash":
        flash = torch.ops.uniref_fast.flash_attention if observed(q, k, v) else flash_attention.flash_attention
        out, lse = flash(q, k, v, tables[0], tables[3], scale)
    elif impl == "cudnn_flex":
        flex = torch.ops.uniref_fast.flex_attention if observed(q, k, v) else flex_attention.flex_attention
        out, lse = flex(q, k, v, tables[0], tables[3], scale)
    else:
        ours: Any = torch.ops.uniref_fast.segment_attention if observed(q, k, v) else _segment_attention
        out, lse = ours(q, k, v, *tables, scale, impl)
    return (out, lse) if return_lse else out


def checked_scale(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan | PreparedPlan, scale: float | None) -> float:
    """Return the factor on the logits, `1 / sqrt(D)` for None.

    Raises:
        ValueError: If the scale is not positive, or q, k, v and the plan do not fit together.
    """
    if q.ndim != 3 or k.shape != v.shape or q.shape[1:] != k.shape[1:]:
        raise ValueError(
            f"q must be [Nq, H, D] and k, v [Nk, H, D]; got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if not isinstance(plan, PreparedPlan) and (q.shape[0], k.shape[0]) != (plan.num_queries, plan.num_keys):
        raise ValueError(
            f"the plan is for {plan.num_queries} queries and {plan.num_keys} keys, got {q.shape[0]} and {k.shape[0]}"
        )
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        raise ValueError(f"q, k, v differ: {q.dtype} {q.device}, {k.dtype} {k.device}, {v.dtype} {v.device}")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)


def explain_attention(
    q: Tensor, plan: AttentionPlan, impl: str | None = None, *, backward: bool = False
) -> tuple[str, str]:
    """Return the implementation that serves a plan for queries like q `[Nq, H, D]`, and the reason in words.

    Raises:
        ValueError: The given `impl` is unknown or not possible here.
    """
    if impl is not None:
        one_of("impl", impl, *IMPLEMENTATIONS, *ATTENTION_LIBRARIES)
        if impl not in ATTENTION_LIBRARIES:
            return choose(impl, q, q.shape[-1]), "asked for"
        if why := attention_unavailable(impl, q):
            raise ValueError(f"impl={impl!r} is not possible here: {why}")
        return impl, "asked for"
    if why := inside_transform():
        return "reference", why
    return memo(plan, _choose, q.device, q.dtype, *q.shape[1:], backward)


def attention_unavailable(impl: str, q: Tensor) -> str | None:
    """Return the reason why an implementation cannot compute attention for tensors like q `[N, H, D]`, or None."""
    if impl not in ATTENTION_LIBRARIES:
        return unavailable(impl, q, q.shape[-1])
    if impl == "flash":
        return flash_attention.unavailable(q)
    if impl == "cudnn_flex":
        return flex_attention.unavailable(q)
    return inside_transform() or (
        None if backend(q) else f"PyTorch's fused attention does not take {q.dtype} on {q.device}"
    )


def _choose(
    plan: AttentionPlan, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, backward: bool
) -> tuple[str, str]:
    """Return the implementation that serves a plan without an explicit `impl`, and the reason in words."""
    # The libraries are asked with a few rows, as their answer depends on the number of rows only below 2.
    q = torch.empty(min(plan.num_queries, 64), heads, head_dim, dtype=dtype, device=device)
    if q.dtype == torch.float64:
        return "reference", "float64: the others keep a log-sum-exp in float32"
    ours = "triton" if q.device.type == "cuda" else "native"
    dense = backend(q)
    if why := unavailable(ours, q, head_dim):
        return ("dense", f"{dense}; {why}") if dense else ("reference", why)
    if dense is None:
        return ours, f"PyTorch's fused attention does not take {q.dtype} on {q.device.type}"
    name = tuning.device_name(q.device)
    seconds = {
        impl: tuning.attention_seconds(name, impl, q.dtype, plan, heads, head_dim, backward) for impl in (ours, "dense")
    }
    if all(seconds.values()):
        for impl in ("flash", "cudnn_flex"):  # a library is only imported if the table says what it costs
            cost = tuning.attention_seconds(name, impl, q.dtype, plan, heads, head_dim, backward)
            if cost and attention_unavailable(impl, q) is None:
                seconds[impl] = cost
        best, other = sorted(seconds, key=lambda impl: seconds[impl] or 0.0)[:2]
        ratio = (seconds[other] or 0.0) / (seconds[best] or 1.0)
        return best, f"table of {name}: {ratio:.2f} times as fast as {other}"
    count = sum(len(keys) for keys in plan.intervals)
    if ours == "triton" and 0 < count <= DENSE_RECTANGLES and plan.area >= count * DENSE_PAIRS:
        return "dense", f"{dense}; no table of {name}, {count} big rectangles"
    return ours, f"no table of {name}"


Operands = tuple[list[Tensor], list[Tensor], list[Tensor], list[int]]
"""Tables of the forward, of dq and of dk and dv as the op takes them, and the launch parameters of all three; of a
library, its tables in the first place and its numbers in the last."""


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedPlan:
    """A plan as the operands of one of our kernels, so that torch.compile can trace attention under any plan.

    Attributes:
        impl: The kernel, "native" or "triton".
        operands: Its tables and launch parameters.
    """

    impl: str
    operands: Operands


def prepare_plan(q: Tensor, plan: AttentionPlan, impl: str, *, backward: bool) -> PreparedPlan:
    """Prepare a plan before code that uses it is traced.

    Args:
        q: Tensor `[N, H, D]` with the head dimension, dtype and device of the queries.
        plan: The plan.
        impl: "native" or "triton".
        backward: Prepare the backward as well.
    """
    return memo(plan, _prepared, q.device, q.dtype, q.shape[-1], impl, backward)


def _prepared(
    plan: AttentionPlan, device: torch.device, dtype: torch.dtype, head_dim: int, impl: str, backward: bool
) -> PreparedPlan:
    from torch._dynamo.decorators import mark_unbacked  # slow to import

    q = torch.empty(0, 1, head_dim, dtype=dtype, device=device)
    *tables, numbers = _operands(q, plan, impl, backward)
    # Copies, because a graph would also depend on the sizes of the tensors that the tables are views of.
    of_forward, of_dq, of_dkdv = ([table.clone() for table in each] for each in tables)
    for table in (*of_forward, *of_dq, *of_dkdv):
        mark_unbacked(table, 0)  # only the operator reads a table, so its size is no reason to compile again
    return PreparedPlan(impl, (of_forward, of_dq, of_dkdv, numbers))


@torch.compiler.disable  # work on the host, kept with the plan: the only graph break of a compiled caller
def _prepare(
    q: Tensor, plan: AttentionPlan, impl: str | None, needs_grad: bool, backward: bool | None
) -> tuple[str, Operands]:
    """Return the implementation and the tables and numbers that its op takes."""
    impl = explain_attention(q, plan, impl, backward=needs_grad if backward is None else backward)[0]
    return impl, _operands(q, plan, impl, needs_grad)


def _operands(q: Tensor, plan: AttentionPlan, impl: str, backward: bool) -> Operands:
    """Return the operands of an implementation on q's device; those of the backward are empty without one."""
    if impl == "reference":
        return [], [], [], []
    if impl == "dense":
        return [], [], [], rectangles_of(plan)
    if impl == "flash":
        library = flash_attention.serving(q)
        assert isinstance(library, flash_attention.Library), library
        sequences, described = flash_attention.operands(plan, q.device, library.generation)
        return sequences, [], [], described
    if impl == "cudnn_flex":
        sequences, described = flex_attention.operands(plan, q.device, backward)
        return sequences, [], [], described
    if impl == "native":
        tables = [AttentionTables.uncut(plan, q.device)]
        tables += [tables[0], AttentionTables.uncut(plan.transpose, q.device)] if backward else []
    else:
        tables = [AttentionTables.by_query(plan, q.device, _triton_config(q))]
        if backward:
            config = _triton_backward_config(q, bool(plan.causal))
            tables.append(AttentionTables.by_query(plan, q.device, config.dq))
            tables.append(AttentionTables.by_key(plan, q.device, config.dkdv))
    operands = [each.operands() for each in tables]
    tensors = [tensors for tensors, _ in operands] + [[]] * (3 - len(tables))
    return tensors[0], tensors[1], tensors[2], [number for _, numbers in operands for number in numbers]


def segment_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute the specification, a dense softmax per query range, in float64 for float64 inputs and else in float32."""
    compute = torch.promote_types(q.dtype, torch.float32)
    outs, lses = [q[:0]], [q.new_empty(q.shape[1], 0, dtype=torch.float32)]
    for index, ((start, end), intervals) in enumerate(zip(plan.ranges, plan.intervals, strict=True)):
        if not intervals:
            outs.append(torch.zeros_like(q[start:end]))
            lses.append(torch.full((q.shape[1], end - start), -math.inf, device=q.device))
            continue
        keys, values = (torch.cat([x[a:b] for a, b in intervals]).to(compute) for x in (k, v))
        for first in range(0, end - start, REFERENCE_ROWS):
            rows = q[start + first : min(start + first + REFERENCE_ROWS, end)]
            logits = torch.einsum("qhd,khd->hqk", rows.to(compute), keys) * scale
            if plan.causal_at(index) >= 0:
                hidden = causally_hidden(plan, index, first, rows.shape[0], q.device)
                logits = logits.masked_fill(hidden, -math.inf)
            outs.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), values).to(q.dtype))
            # No gradient, as in the other implementations, except where a missing derivative would silently be zero.
            lses.append((logits if inside_transform() else logits.detach()).logsumexp(-1).to(torch.float32))
    return torch.cat(outs), torch.cat(lses, dim=1)


def causally_hidden(plan: AttentionPlan, index: int, first: int, count: int, device: torch.device) -> Tensor:
    """Return which keys of a range some of its queries do not see, bool `[count, keys of all its intervals]`.

    Args:
        plan: Plan with causal intervals.
        index: Number of a range with a causal interval.
        first: First of the queries, counted from the start of the range.
        count: Number of the queries.
        device: Device of the result.
    """
    lengths = [b - a for a, b in plan.intervals[index]]
    before, own = sum(lengths[: plan.causal[index]]), lengths[plan.causal[index]]
    query = torch.arange(first, first + count, device=device)[:, None]
    hidden = torch.arange(own, device=device) > query
    return torch.nn.functional.pad(hidden, (before, sum(lengths) - before - own))


def _triton_config(q: Tensor) -> configs.AttentionConfig:
    tuned = tuning.attention_config(tuning.device_name(q.device), q.dtype, q.shape[-1], "forward")
    return configs.AttentionConfig(**tuned) if tuned else configs.pick_config(q.shape[-1], q.dtype, _capability(q))


def _triton_backward_config(q: Tensor, causal: bool = False) -> configs.BackwardConfig:
    tuned = tuning.attention_config(tuning.device_name(q.device), q.dtype, q.shape[-1], "backward")
    if tuned and not causal:  # the table was measured on plans without causal intervals
        return configs.BackwardConfig(**{name: configs.AttentionConfig(**of) for name, of in tuned.items()})
    return configs.pick_backward_config(q.shape[-1], q.dtype, _capability(q), causal)


@torch.compiler.assume_constant_result  # traced code gives it names, and gets what the tables of the device say
def launch_numbers(dtype: str, head_dim: int, device: str, backward: bool) -> tuple[list[int], list[int]]:
    """Return the rows of a tile and the launch numbers of the Triton kernels: forward, then dq and dkdv.

    The numbers are those of a plan without causal intervals.

    Args:
        dtype: Name of the dtype, such as "torch.bfloat16".
        head_dim: Head dimension.
        device: Name of the device.
        backward: Also return those of the backward.
    """
    q = torch.empty(0, 1, head_dim, dtype=getattr(torch, dtype.removeprefix("torch.")), device=device)
    forward = _triton_config(q)
    launches, rows = [forward], [forward.BLOCK_M]
    if backward:
        both = _triton_backward_config(q)
        launches += [both.dq, both.dkdv]
        rows += [both.dq.BLOCK_M, both.dkdv.BLOCK_N]
    return rows, [number for launch in launches for number in (*dataclasses.astuple(launch), 0)]


def _capability(q: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(q.device) if q.device.type == "cuda" else (8, 0)


# ---- torch.library ops: the native and the Triton kernels ----


@define_op
def _segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Sequence[Tensor],
    dq_tables: Sequence[Tensor],
    dkdv_tables: Sequence[Tensor],
    launches: Sequence[int],
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    forward = AttentionTables.from_operands(tables, launches[:NUMBERS])
    if impl == "native":
        return native.segment_attention(q, k, v, *forward.plan_tensors, scale)
    from uniref_fast.kernels import segment_attention as kernels

    return kernels.segment_attention(q, k, v, forward, scale)


@define_op
def _segment_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq_tables: Sequence[Tensor],
    dkdv_tables: Sequence[Tensor],
    launches: Sequence[int],
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    by_query = AttentionTables.from_operands(dq_tables, launches[NUMBERS : 2 * NUMBERS])
    by_key = AttentionTables.from_operands(dkdv_tables, launches[2 * NUMBERS :])
    if impl == "native":
        tables = *by_query.plan_tensors, *by_key.plan_tensors
        return native.segment_attention_backward(grad, q, k, v, out, lse, *tables, scale)
    from uniref_fast.kernels import segment_attention_backward as kernels

    return kernels.segment_attention_backward(grad, q, k, v, out, lse, by_query, by_key, scale)


@torch.library.register_fake("uniref_fast::segment_attention")
def _(q, k, v, tables, dq_tables, dkdv_tables, launches, scale, impl):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.register_fake("uniref_fast::segment_attention_backward")
def _(grad, q, k, v, out, lse, dq_tables, dkdv_tables, launches, scale, impl):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    q, k, v, tables, dq_tables, dkdv_tables, ctx.launches, ctx.scale, ctx.impl = inputs
    ctx.counts = len(tables), len(dq_tables), len(dkdv_tables)
    ctx.save_for_backward(q, k, v, *output, *dq_tables, *dkdv_tables)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad, _):
    q, k, v, out, lse, *rest = ctx.saved_tensors  # read once: activation checkpointing recomputes them at each access
    dq_tables, dkdv_tables = rest[: ctx.counts[1]], rest[ctx.counts[1] :]
    op = torch.ops.uniref_fast.segment_attention_backward
    grads = op(upstream(grad), q, k, v, out, lse, dq_tables, dkdv_tables, ctx.launches, ctx.scale, ctx.impl)
    no_launches = None if ctx.launches else []  # PyTorch takes an empty list for a list of tensors
    return *grads, *([None] * count for count in ctx.counts), no_launches, None, None


torch.library.register_autograd("uniref_fast::segment_attention", _differentiate, setup_context=_save)
first_order_only("segment_attention_backward")
