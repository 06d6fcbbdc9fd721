"""A plan as one call of cuDNN's flex attention (`cudnn.flex_attention`, nvidia-cudnn-frontend 1.32 or newer).

    mask of a query:   [0, F0) u [F1, F2) u [F3, F4) ...      in rows of its sequence's keys

The library takes packed rows with cumulative lengths and, for each query, the end points of the key intervals that it
sees: an `AttentionPlan`. Ranges that see common keys become one sequence, so a pack under "full" has a sequence for
each sample and a group with shared references is one sequence. Forward and backward are one launch each; no key is
copied and nothing is merged. The library compiles the mask to tiles once for a plan, dtype and shape of the heads.

The library is detected and never required. Forward and backward are deterministic. That a sample has the same bits
alone and in a pack is not promised: the library chooses its tiles from the whole plan.
"""

from __future__ import annotations

import bisect
import functools
import importlib
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from uniref_fast.memo import memo
from uniref_fast.ops._dispatch import define_op, inside_transform
from uniref_fast.ops._library_attention import register_library_attention
from uniref_fast.visibility import AttentionPlan

__all__ = ["Library", "flex_attention", "installed", "load", "operands", "unavailable"]

DTYPES = (torch.float16, torch.bfloat16)
CAPABILITIES = ((9, 0), (10, 0), (10, 3))
INSTALL = "pip install 'nvidia-cudnn-frontend>=1.32'"
KEPT_PLANS = 64
"""Number of compiled masks that are kept; one that was dropped is compiled again at its next use."""


@dataclass(frozen=True)
class Library:
    """The functions of `cudnn.flex_attention` that are used, and its version."""

    version: str
    create_mask_plan: Callable[..., Any]
    flex_attn_func: Callable[..., Any]
    backward: Callable[..., Any]


@functools.cache
def load() -> Library | str:
    """Return the library, or the reason why it cannot be used."""
    try:
        module = importlib.import_module("cudnn.flex_attention")
        functions = module.create_mask_plan, module.flex_attn_func, module.FlexAttentionBwd
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("cudnn"):
            return f"it needs cuDNN's flex attention, which is not installed: {INSTALL}"
        return f"cuDNN's flex attention needs {error.name}, which is not installed"
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"cuDNN's flex attention cannot be used: {' '.join(str(error).split())[:200]}"
    try:
        version = metadata.version("nvidia-cudnn-frontend")
    except metadata.PackageNotFoundError:
        version = "of unknown version"
    return Library(f"nvidia-cudnn-frontend {version}", *functions)


def installed() -> str:
    """Return the installed version in words, or how to install it."""
    library = load()
    if isinstance(library, Library):
        return library.version
    return f"not installed: {INSTALL}" if INSTALL in library else library


def unavailable(x: Tensor) -> str | None:
    """Return the reason why cuDNN's flex attention cannot take tensors like x `[N, H, D]`, or None."""
    if why := inside_transform():
        return why
    capability = _capability(x.device)
    if capability is None:
        return f"cuDNN's flex attention needs a CUDA device, this tensor is on {x.device}"
    if x.dtype not in DTYPES:
        return f"cuDNN's flex attention takes float16 and bfloat16, got {x.dtype}"
    if capability not in CAPABILITIES:
        return f"cuDNN's flex attention needs compute capability 9.0, 10.0 or 10.3, this device has {capability}"
    if x.shape[-1] % 8 or not (8 <= x.shape[-1] <= 128 or x.shape[-1] == 256):
        return f"cuDNN's flex attention takes head dimensions 8, 16, ..., 128 and 256, got {x.shape[-1]}"
    library = load()
    return library if isinstance(library, str) else None


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


# ---- from a plan to sequences with masks ----

_handles = itertools.count()


def operands(plan: AttentionPlan, device: torch.device, backward: bool) -> tuple[list[Tensor], list[int]]:
    """Return the plan as the op takes it.

    Args:
        plan: Plan to execute.
        device: Device of q, k and v.
        backward: Compile the mask for a backward too.

    Returns:
        Tensors on the device: the mask int32 `[1, F, Nq]`, the cumulative lengths of queries and of keys int32
        `[S + 1]`, and the queries that see no key; none if no query sees a key. Numbers: the longest sequence of
        queries and of keys, a number that identifies the plan, and whether a backward will follow.
    """
    tensors, numbers = memo(plan, _tables, device)
    return tensors, [*numbers, int(backward)]


def _tables(plan: AttentionPlan, device: torch.device) -> tuple[list[Tensor], list[int]]:
    ranges = _ranges_with_keys(plan)
    if not any(keys for _, keys in ranges):
        return [], [0, 0, next(_handles)]
    starts_q, starts_k = _sequences(plan)
    causal = {plan.ranges[index]: interval for interval, index in plan.causal_intervals.items()}
    ends: list[list[int]] = []
    blind: list[int] = []
    lengths: list[int] = []
    for (start, end), keys in ranges:
        first = starts_k[bisect.bisect_right(starts_q, start) - 1]
        own = causal.get((start, end))
        lengths += (
            [1] * (end - start) if own else [end - start]
        )  # the queries of a causal interval have masks of their own
        for i in range(end - start if own else 1):
            seen = [(a, a + i + 1) if (a, b) == own else (a, b) for a, b in keys]
            points = [row - first for interval in seen for row in interval]
            ends.append(points[1:] if points and points[0] == 0 else [0, *points])
        if not keys:
            blind += range(start, end)
    width = max(map(len, ends))  # odd, as all lengths are
    padded = torch.tensor([points + points[-1:] * (width - len(points)) for points in ends], dtype=torch.int32)
    tensors = [
        padded.repeat_interleave(torch.tensor(lengths), dim=0).T.contiguous()[None],
        torch.tensor(starts_q, dtype=torch.int32),
        torch.tensor(starts_k, dtype=torch.int32),
        torch.tensor(blind, dtype=torch.int64),
    ]
    longest = [max(b - a for a, b in itertools.pairwise(starts)) for starts in (starts_q, starts_k)]
    return [each.to(device) for each in tensors], [*longest, next(_handles)]


Span = tuple[int, int]


def _ranges_with_keys(plan: AttentionPlan) -> list[tuple[Span, list[Span]]]:
    """Return the ranges of a plan with their intervals, without empty ranges and empty intervals."""
    pairs = zip(plan.ranges, plan.intervals, strict=True)
    return [(span, [(a, b) for a, b in keys if a < b]) for span, keys in pairs if span[0] < span[1]]


def _sequences(plan: AttentionPlan) -> tuple[list[int], list[int]]:
    """Return the first query and the first key of each sequence, and at the end the number of queries and of keys.

    Ranges join if one starts before the last key of another. Queries and keys that nothing claims belong to the
    sequence before them, or to the first one.
    """
    spans: list[tuple[int, int, int]] = []  # first query, first key, end of the keys
    for (start, _), keys in _ranges_with_keys(plan):
        if not keys:
            continue
        first, last = keys[0][0], keys[-1][1]
        while spans and first < spans[-1][2]:
            start, low, high = spans.pop()
            first, last = min(first, low), max(last, high)
        spans.append((start, first, last))
    return [0, *(q for q, _, _ in spans[1:]), plan.num_queries], [0, *(k for _, k, _ in spans[1:]), plan.num_keys]


# ---- compiled masks: found by the number of the plan, or compiled again from its tensors ----


@dataclass
class _Mask:
    plan: Any
    differentiate: Any = None  # the compiled backward


_masks: OrderedDict[tuple, _Mask] = OrderedDict()


def _mask(library: Library, q: Tensor, k: Tensor, v: Tensor, tables: Sequence[Tensor], numbers: Sequence[int]) -> _Mask:
    longest_q, longest_k, handle, backward = numbers
    key = (handle, bool(backward), q.dtype, q.device, *q.shape[1:])
    mask = _masks.get(key)
    if mask is None:
        ends, cu_q, cu_k, _ = tables
        made = library.create_mask_plan(
            ends,
            q,
            k,
            v,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            max_seqlen_q=longest_q,
            max_seqlen_k=longest_k,
            build_backward=bool(backward),
        )
        mask = _masks[key] = _Mask(made)
        if len(_masks) > KEPT_PLANS:
            _masks.popitem(last=False)
    _masks.move_to_end(key)
    return mask


# ---- the op ----


@define_op
def flex_attention(
    q: Tensor, k: Tensor, v: Tensor, tables: Sequence[Tensor], numbers: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    if not tables:
        lse = torch.full((q.shape[1], q.shape[0]), -math.inf, dtype=torch.float32, device=q.device)
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device), lse
    library = _loaded()
    with torch.no_grad():
        q, k, v = (x.detach().contiguous() for x in (q, k, v))
        mask = _mask(library, q, k, v, tables, numbers)
        out, lse = library.flex_attn_func(
            q, k, v, mask_plan=mask.plan, softmax_scale=scale, deterministic=True, return_lse=True
        )
        out, lse, blind = out.contiguous(), lse.to(torch.float32).contiguous(), tables[3]
        if blind.numel():
            out.index_fill_(0, blind, 0)
            lse.index_fill_(1, blind, -math.inf)
        return out, lse


@define_op
def _flex_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tables: Sequence[Tensor],
    numbers: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if not tables:
        return dq, dk, dv
    library = _loaded()
    with torch.no_grad():
        q, k, v, out, grad, lse = (x.detach().contiguous() for x in (q, k, v, out, grad, lse))
        mask = _mask(library, q, k, v, tables, numbers)
        samples = (q, k, v, out, grad, lse, dq, dk, dv, mask.plan)
        if mask.differentiate is None:
            mask.differentiate = library.backward(*samples, deterministic=True)
            mask.differentiate.check_support()
            mask.differentiate.compile()
        workspace = torch.empty(mask.differentiate.workspace_size, dtype=torch.uint8, device=q.device)
        mask.differentiate.execute(*samples, workspace=workspace, softmax_scale=scale)
        if tables[3].numel():
            dq.index_fill_(0, tables[3], 0)
        return dq, dk, dv


register_library_attention("flex_attention")


def _loaded() -> Library:
    library = load()
    if isinstance(library, str):
        raise RuntimeError(library)
    return library
