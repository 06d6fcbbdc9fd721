"""A plan as a few dense library calls, one per (query range, key interval), merged by log-sum-exp.

    rectangle i:   out_i, lse_i = attention(q[range], k[interval_i], v[interval_i])
    merged:        lse = log sum_i exp(lse_i),   out = sum_i exp(lse_i - lse) out_i

A causal interval is a square, which the library masks itself (`is_causal`).

The backward gives the merged out and lse to each rectangle, and the library's own backward computes from them that
rectangle's exact share of dq, dk, dv. This is best for a plan of a few big rectangles, which cuDNN and FlashAttention
run at the speed of the machine. On a GPU the library decides whether its backward is deterministic.

The library's functional ops are called below `scaled_dot_product_attention`, because that returns no log-sum-exp.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from uniref_fast.memo import memo
from uniref_fast.ops._dispatch import define_op, first_order_only, upstream
from uniref_fast.visibility import AttentionPlan

__all__ = ["backend", "dense_attention", "rectangles_of"]

aten = torch.ops.aten
CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GPU_DTYPES = (torch.bfloat16, torch.float16)


def rectangles_of(plan: AttentionPlan) -> list[int]:
    """Return (first query, end, first key, end) of every rectangle as one flat list, by query range.

    The first key k of a causal interval is given as -1 - k.
    """
    return memo(plan, _plan_rectangles)


def _plan_rectangles(plan: AttentionPlan) -> list[int]:
    flat = []
    for index, (span, keys) in enumerate(zip(plan.ranges, plan.intervals, strict=True)):
        for at, (start, end) in enumerate(keys):
            flat += [*span, -1 - start if plan.causal_at(index) == at else start, end]
    return flat


def backend(x: Tensor) -> str | None:
    """Return the library for tensors like x: "cpu", "cudnn" (preferred from Hopper on), "flash", or None."""
    if x.device.type == "cpu":
        return "cpu" if x.dtype in CPU_DTYPES else None
    if x.device.type != "cuda" or x.dtype not in GPU_DTYPES:
        return None
    if not x.shape[0]:
        return "flash"
    capability = torch.cuda.get_device_capability(x.device)
    head = _heads_first(x.detach())
    params = torch.backends.cuda.SDPAParams(head, head, head, None, 0.0, False, False)
    can = {"cudnn": torch.backends.cuda.can_use_cudnn_attention, "flash": torch.backends.cuda.can_use_flash_attention}
    order = ("cudnn", "flash") if capability >= (9, 0) else ("flash", "cudnn")
    return next((name for name in order if can[name](params)), None)


# ---- the libraries: forward gives out, lse [1, H, n]; backward takes the merged ones ----

_Grads = tuple[Tensor, Tensor, Tensor]


def _cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _cpu_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> _Grads:
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(
        g, q, k, v, out, lse.to(torch.float64 if q.dtype == torch.float64 else lse.dtype), 0.0, causal, scale=scale
    )


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]


def _flash_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> _Grads:
    backward, unused = aten._scaled_dot_product_flash_attention_backward, _no_dropout(q)
    sizes = (q.shape[2], k.shape[2])
    return backward(g, q, k, v, out, lse, None, None, *sizes, 0.0, causal, unused, unused, scale=scale)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)[:2]
    return out, lse.squeeze(-1)


def _cudnn_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> _Grads:
    backward, unused = aten._scaled_dot_product_cudnn_attention_backward, _no_dropout(q)
    sizes, lse = (q.shape[2], k.shape[2]), lse.unsqueeze(-1)
    return backward(g, q, k, v, out, lse, unused, unused, None, None, None, *sizes, 0.0, causal, scale=scale)


def _no_dropout(q: Tensor) -> Tensor:
    """Return a placeholder of the random state that dropout would need."""
    return torch.zeros(2, dtype=torch.int64, device=q.device)


_FORWARD: dict[str, Callable] = {"cpu": _cpu, "cudnn": _cudnn, "flash": _flash}
_BACKWARD: dict[str, Callable] = {"cpu": _cpu_backward, "cudnn": _cudnn_backward, "flash": _flash_backward}


# ---- the op ----


@define_op
def dense_attention(q: Tensor, k: Tensor, v: Tensor, rectangles: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:
    library = _backend(q)
    rects = list(_rectangles(rectangles))
    if _covered_once(rects, q.shape[0]):
        attend, (_, _, c, d, causal) = _FORWARD[_for_rectangle(library, rects[0])], rects[0]
        out, lse = attend(_heads_first(q), _heads_first(k[c:d]), _heads_first(v[c:d]), causal, scale)
        return _tokens_first(out).contiguous(), lse[0].to(torch.float32).contiguous()
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full((q.shape[1], q.shape[0]), -math.inf, dtype=torch.float32, device=q.device)
    sums: Tensor | None = None
    for i, (a, b, c, d, causal) in enumerate(rects):
        attend = _FORWARD[_for_rectangle(library, rects[i])]
        part, part_lse = attend(_heads_first(q[a:b]), _heads_first(k[c:d]), _heads_first(v[c:d]), causal, scale)
        part, part_lse = _tokens_first(part), part_lse[0].to(torch.float32)
        continues = i + 1 < len(rects) and rects[i + 1][:2] == (a, b)
        if sums is None and not continues:
            out[a:b], lse[:, a:b] = part, part_lse
            continue
        if sums is None:
            sums, lse[:, a:b] = part.to(torch.promote_types(q.dtype, torch.float32)), part_lse
        else:
            merged = torch.logaddexp(lse[:, a:b], part_lse)
            sums = sums * _weight(lse[:, a:b], merged) + part * _weight(part_lse, merged)
            lse[:, a:b] = merged
        if not continues:
            out[a:b], sums = sums, None
    return out, lse


@define_op
def _dense_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rectangles: Sequence[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    library = _backend(q)
    rects = list(_rectangles(rectangles))
    if _covered_once(rects, q.shape[0]) and rects[0][2:4] == (0, k.shape[0]):
        differentiate = _BACKWARD[_for_rectangle(library, rects[0])]
        dense = differentiate(*(_heads_first(x) for x in (grad, q, k, v, out)), lse[None], rects[0][4], scale)
        dq, dk, dv = (_tokens_first(x).contiguous() for x in dense)
        return dq, dk, dv
    # Rows with several shares add them up in float32.
    shared_q = len({rect[:2] for rect in rects}) < len(rects)
    keys = sorted({rect[2:4] for rect in rects})
    shared_k = len(keys) < len(rects) or any(a[1] > b[0] for a, b in itertools.pairwise(keys))
    wide = torch.promote_types(q.dtype, torch.float32)
    dq = torch.zeros(q.shape, dtype=wide if shared_q else q.dtype, device=q.device)
    dk, dv = (torch.zeros(k.shape, dtype=wide if shared_k else k.dtype, device=k.device) for _ in range(2))
    for rect in rects:
        (a, b, c, d, causal), differentiate = rect, _BACKWARD[_for_rectangle(library, rect)]
        queries = (_heads_first(x[a:b]) for x in (grad, q))
        dense = differentiate(
            *queries,
            _heads_first(k[c:d]),
            _heads_first(v[c:d]),
            _heads_first(out[a:b]),
            lse[:, a:b].contiguous()[None],
            causal,
            scale,
        )
        for total, part, rows in zip((dq, dk, dv), dense, (slice(a, b), slice(c, d), slice(c, d)), strict=True):
            total[rows] += _tokens_first(part)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@torch.library.register_fake("uniref_fast::dense_attention")
def _(q, k, v, rectangles, scale):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.register_fake("uniref_fast::dense_attention_backward")
def _(grad, q, k, v, out, lse, rectangles, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    q, k, v, ctx.rectangles, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad, _):
    op = torch.ops.uniref_fast.dense_attention_backward
    return *op(upstream(grad).contiguous(), *ctx.saved_tensors, ctx.rectangles, ctx.scale), None, None


torch.library.register_autograd("uniref_fast::dense_attention", _differentiate, setup_context=_save)
first_order_only("dense_attention_backward")


def _backend(x: Tensor) -> str:
    name = backend(x)
    if name is None:
        raise RuntimeError(f"no fused attention of PyTorch takes {x.dtype} {list(x.shape)} on {x.device}")
    return name


_Rectangle = tuple[int, int, int, int, bool]
"""First query, end, first key, end, and whether query i sees only the keys up to i."""


def _for_rectangle(library: str, rect: _Rectangle) -> str:
    """Return the library for one rectangle: cuDNN gets no single query and no single key, as in PyTorch itself."""
    a, b, c, d, _ = rect
    return "flash" if library == "cudnn" and 1 in (b - a, d - c) else library


def _rectangles(flat: Sequence[int]) -> Iterator[_Rectangle]:
    for i in range(0, len(flat), 4):
        a, b, c, d = flat[i : i + 4]
        yield (a, b, -1 - c, d, True) if c < 0 else (a, b, c, d, False)


def _covered_once(rects: list[_Rectangle], queries: int) -> bool:
    return len(rects) == 1 and rects[0][:2] == (0, queries)


def _weight(part: Tensor, whole: Tensor) -> Tensor:
    """Return exp(part - whole), [H, n] to [n, H, 1]."""
    return (part - whole).exp().T[..., None]


def _heads_first(x: Tensor) -> Tensor:
    """View [n, H, D] as [1, H, n, D], with a batch stride that other code is unlikely to use.

    PyTorch caches the compiled backward of cuDNN by the shapes and strides of q, k and v, and not by those of out and
    the gradient. Other code in the process with equal q, k and v and a gradient of another layout could then get our
    compiled backward, or we theirs, with wrong results (seen on an H100, PyTorch 2.11). The unusual stride keeps the
    two apart; all gradients of our own calls have the same layout.
    """
    n, heads, dim = x.shape
    return x.as_strided((1, heads, n, dim), (2 * max(n * x.stride(0), 1), x.stride(1), x.stride(0), x.stride(2)))


def _tokens_first(x: Tensor) -> Tensor:
    return x[0].transpose(0, 1)
