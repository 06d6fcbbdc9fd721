"""A plan as variable-length calls of FlashAttention, generation 2, 3 or 4, merged by log-sum-exp.

    sequence:   queries that see the same intervals, and the keys of these intervals one after the other
    call:       sequences whose queries and whose keys are disjoint, in one launch of the library
    merged:     lse = log sum_i exp(lse_i),   out = sum_i exp(lse_i - lse) out_i   over the calls i of a query

Causal intervals are one more call, with a sequence for each and the library's own causal mask.

Every visible (query, key) pair is in one sequence of one call, so no key is copied or read twice for queries that share
it. Visibility "full" is one call, "reference_causal", "reference_isolated" and "group_shared" are two. Rows of a call
that are no contiguous part of the pack are gathered first, which costs one copy of these rows.

The backward gives the merged out and lse to the library's own backward of each call. With P = exp(S - lse) and
D = rowsum(grad * out) of the whole row, dS = P * (grad v^T - D) is the exact share of that call in the gradients; the
derivative of the merge itself is contained in it. FlashAttention 2 and 3 have no gradient for a log-sum-exp, so
differentiating the merge of their results would lose that part.

The library is detected and never required. Its backward is asked to be deterministic. The calls of a sample are the
same alone and in any pack, but that its results have the same bits is not promised: the library may choose its launch
from the whole call, and the backward of FlashAttention 2 splits the sum of dq by the number of sequences.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from uniref_fast import tuning
from uniref_fast.memo import memo
from uniref_fast.ops._dispatch import define_op, inside_transform
from uniref_fast.ops._library_attention import register_library_attention
from uniref_fast.ops.dense_attention import _weight
from uniref_fast.visibility import AttentionPlan

__all__ = ["GENERATIONS", "Library", "flash_attention", "installed", "load", "operands", "serving", "unavailable"]

DTYPES = (torch.float16, torch.bfloat16)
INSTALL = "pip install flash-attn (compute capability 8.0 or newer) or flash-attn-4 (9.0, 10.x and 11.0)"


@dataclass(frozen=True)
class Library:
    """One installed generation of FlashAttention.

    Attributes:
        generation: 2, 3 or 4.
        version: Distribution and version, such as "flash-attn 2.8.3".
        forward: Function `(q, k, v, lengths, scale) -> (out, lse [H, Nq])` of one call.
        backward: Function `(grad, q, k, v, out, lse, lengths, scale) -> (dq, dk, dv)` of one call.
    """

    generation: int
    version: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Generation:
    """The limits of one generation of FlashAttention, with a deterministic backward.

    Attributes:
        distribution: Name of the Python distribution.
        majors: Major compute capabilities that it is used on.
        head_dim: Largest head dimension.
        load: Function that imports the library and returns its forward and backward.
    """

    distribution: str
    majors: tuple[int, ...]
    head_dim: int
    load: Callable[[], tuple[Callable, Callable]]


@dataclass(frozen=True)
class Lengths:
    """Cumulative lengths of a call's sequences, int32 on the device, and the longest ones.

    With `causal`, each sequence has as many keys as queries, and query i sees the keys up to i.
    """

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    causal: bool


# ---- the three generations; positions instead of names for arguments whose names differ between versions ----


def _forward(attend: Callable) -> Callable:
    """Return the forward of a call, which the generations 2 and 3 have in common."""

    def forward(q: Tensor, k: Tensor, v: Tensor, n: Lengths, scale: float) -> tuple[Tensor, Tensor]:
        lengths = n.cu_q, n.cu_k, n.max_q, n.max_k
        return attend(
            q, k, v, *lengths, softmax_scale=scale, causal=n.causal, deterministic=True, return_attn_probs=True
        )[:2]

    return forward


def _generation_2() -> tuple[Callable, Callable]:
    module = importlib.import_module("flash_attn.flash_attn_interface")
    attend, differentiate = module.flash_attn_varlen_func, module._flash_attn_varlen_backward

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, n: Lengths, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        differentiate(
            *(grad, q, k, v, out, lse, dq, dk, dv, n.cu_q, n.cu_k, n.max_q, n.max_k),
            dropout_p=0.0,
            softmax_scale=scale,
            causal=n.causal,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=True,
        )
        return dq, dk, dv

    return _forward(attend), backward


def _generation_3() -> tuple[Callable, Callable]:
    module = importlib.import_module("flash_attn_interface")
    attend, differentiate = module.flash_attn_varlen_func, module._flash_attn_backward
    _require(attend, "return_attn_probs", "deterministic")

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, n: Lengths, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        lengths = n.cu_q, n.cu_k, None, None, n.max_q, n.max_k
        differentiate(grad, q, k, v, out, lse, *lengths, dq, dk, dv, scale, n.causal, deterministic=True)
        return dq, dk, dv

    return _forward(attend), backward


def _generation_4() -> tuple[Callable, Callable]:
    module = importlib.import_module("flash_attn.cute.interface")
    attend, differentiate = module.flash_attn_varlen_func, module._flash_attn_bwd
    names = ("softmax_scale", "causal", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "deterministic")
    _require(attend, *names, "return_lse")
    _require(differentiate, *names)

    def options(n: Lengths, scale: float) -> dict[str, Any]:
        return dict(zip(names, (scale, n.causal, n.cu_q, n.cu_k, n.max_q, n.max_k, True), strict=True))

    def forward(q: Tensor, k: Tensor, v: Tensor, n: Lengths, scale: float) -> tuple[Tensor, Tensor]:
        return attend(q, k, v, **options(n, scale), return_lse=True)[:2]

    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, n: Lengths, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = differentiate(q, k, v, out, grad, lse, **options(n, scale))[:3]
        return dq, dk, dv

    return forward, backward


def _require(function: Callable, *names: str) -> None:
    """Raise ImportError if a function of the library does not take all of these arguments."""
    known = inspect.signature(getattr(function, "_init_fn", function)).parameters  # custom_op keeps the function there
    if missing := [name for name in names if name not in known]:
        raise ImportError(f"its {function.__name__} has no argument {', '.join(missing)}; install a newer version")


GENERATIONS = {
    2: Generation("flash-attn", (8, 9, 10, 12), 256, _generation_2),
    3: Generation("flash-attn-3", (9,), 192, _generation_3),  # no deterministic backward for 256
    4: Generation("flash-attn-4", (9, 10, 11), 128, _generation_4),  # no deterministic backward on 12.x
}
PREFERENCE = (3, 4, 2)
"""Order in which installed generations are tried on a device without a table."""


@functools.cache
def load(generation: int) -> Library | str:
    """Return an installed generation of FlashAttention, or the reason why it cannot be used."""
    found = GENERATIONS[generation]
    try:
        forward, backward = found.load()
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("flash_attn"):
            return f"{found.distribution} is not installed"
        return f"{found.distribution} needs {error.name}, which is not installed"
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # a binary of another PyTorch or CUDA, an API
        return f"{found.distribution} cannot be used: {' '.join(str(error).split())[:200]}"
    try:
        version = metadata.version(found.distribution)
    except metadata.PackageNotFoundError:
        version = "of unknown version"
    return Library(generation, f"{found.distribution} {version}", forward, backward)


def installed() -> str:
    """Return the installed generations in words, or how to install one."""
    found = [load(number) for number in GENERATIONS]
    names = [each.version for each in found if isinstance(each, Library)]
    broken = [each for each in found if isinstance(each, str) and not each.endswith("is not installed")]
    return "; ".join(names + broken) or f"not installed: {INSTALL}"


def serving(x: Tensor) -> Library | str:
    """Return the library for tensors like x `[N, H, D]`, or the reason why there is none."""
    if why := inside_transform():
        return why
    capability = _capability(x.device)
    if capability is None:
        return f"FlashAttention needs a CUDA device, this tensor is on {x.device}"
    if x.dtype not in DTYPES:
        return f"FlashAttention takes float16 and bfloat16, got {x.dtype}"
    if x.shape[-1] % 8:
        return f"FlashAttention takes head dimensions that are multiples of 8, got {x.shape[-1]}"
    measured = (tuning.table(tuning.device_name(x.device)) or {}).get("flash_generation")
    order = [*([measured] if measured in GENERATIONS else []), *PREFERENCE]
    reasons = []
    for number in dict.fromkeys(order):
        found = GENERATIONS[number]
        if capability[0] not in found.majors:
            reasons.append(f"{found.distribution} is not used on compute capability {capability[0]}.{capability[1]}")
        elif x.shape[-1] > found.head_dim:
            reasons.append(f"{found.distribution} takes head dimensions up to {found.head_dim}, got {x.shape[-1]}")
        elif isinstance(library := load(number), Library):
            return library
        else:
            reasons.append(library)
    return f"it needs FlashAttention: {INSTALL}; {'; '.join(reasons)}"


def unavailable(x: Tensor) -> str | None:
    """Return the reason why FlashAttention cannot take tensors like x `[N, H, D]`, or None."""
    library = serving(x)
    return library if isinstance(library, str) else None


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


# ---- from a plan to calls ----

Span = tuple[int, int]


@dataclass
class _Call:
    """Sequences of one call: for each the query ranges, by their number in the plan, and the key intervals."""

    sequences: list[tuple[tuple[int, ...], list[Span]]]
    queries: set[int]
    end: int
    causal: bool = False


def _plan_calls(plan: AttentionPlan) -> list[_Call]:
    """Return the calls of a plan. A sample's sequences are in the same calls alone and in any pack."""
    users: dict[Span, list[int]] = {}
    for index, (span, keys) in enumerate(zip(plan.ranges, plan.intervals, strict=True)):
        for interval in keys:
            if span[0] < span[1] and interval[0] < interval[1] and plan.causal_intervals.get(interval) != index:
                users.setdefault(interval, []).append(index)
    sequences: dict[tuple[int, ...], list[Span]] = {}
    for interval, seen_by in users.items():
        sequences.setdefault(tuple(seen_by), []).append(interval)
    calls: list[_Call] = []
    ordered = sorted(((sorted(keys), queries) for queries, keys in sequences.items()), key=_first_and_longest)
    for intervals, queries in ordered:
        for call in calls:
            if call.end <= intervals[0][0] and call.queries.isdisjoint(queries):
                break
        else:
            call = _Call([], set(), 0)
            calls.append(call)
        call.sequences.append((queries, intervals))
        call.queries.update(queries)
        call.end = intervals[-1][1]
    if plan.causal:
        call = _Call([], set(plan.causal_intervals.values()), plan.num_keys, causal=True)
        call.sequences += [((index,), [interval]) for interval, index in sorted(plan.causal_intervals.items())]
        calls.append(call)
    return calls


def _first_and_longest(sequence: tuple[list[Span], tuple[int, ...]]) -> tuple[int, int, tuple[int, ...]]:
    keys, queries = sequence
    return keys[0][0], -keys[-1][1], queries


NUMBERS = 7
"""Integers that describe one call in the arguments of the op: the start and the end of its queries and of its keys, the
start -1 if they are gathered, the longest sequence of both, and whether it is causal."""


def operands(plan: AttentionPlan, device: torch.device, generation: int) -> tuple[list[Tensor], list[int]]:
    """Return the tables of a plan on a device, four of each call, and the numbers, as the op takes them."""
    tensors, numbers = memo(plan, _tables, device)
    return tensors, [generation, *numbers]


def _tables(plan: AttentionPlan, device: torch.device) -> tuple[list[Tensor], list[int]]:
    tensors: list[Tensor] = []
    numbers: list[int] = []
    seen: tuple[list[Span], list[Span]] = [], []  # query ranges and key intervals of all calls
    for call in _plan_calls(plan):
        sides = [[plan.ranges[i] for i in queries] for queries, _ in call.sequences], [k for _, k in call.sequences]
        longest = []
        for sequences, all_spans in zip(sides, seen, strict=True):
            spans = [span for each in sequences for span in each]
            lengths = [sum(b - a for a, b in each) for each in sequences]
            rows = _rows(spans)
            start, end = rows if isinstance(rows, tuple) else (-1, -1)
            tensors.append(_int_tensor([0, *itertools.accumulate(lengths)], torch.int32, device))
            tensors.append(_int_tensor([] if isinstance(rows, tuple) else rows, torch.int64, device))
            numbers += [start, end]
            longest.append(max(lengths))
            all_spans += spans
        numbers += [*longest, int(call.causal)]
    return tensors, [int(_overlap(spans)) for spans in seen] + numbers


def _overlap(spans: list[Span]) -> bool:
    return any(a[1] > b[0] for a, b in itertools.pairwise(sorted(spans)))


def _rows(spans: Sequence[Span]) -> Span | list[int]:
    """Return the rows of the spans in their order: (start, end) if they are contiguous, else a list."""
    if all(a[1] == b[0] for a, b in itertools.pairwise(spans)):
        return spans[0][0], spans[-1][1]
    return [row for span in spans for row in range(*span)]


def _int_tensor(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device="cpu").to(device)


@dataclass(frozen=True)
class _Rows:
    """Rows of a pack that take part in a call, on one side: a slice or an index."""

    start: int
    end: int
    index: Tensor

    def take(self, x: Tensor, dim: int = 0) -> Tensor:
        if self.start < 0:
            return x.index_select(dim, self.index)
        return x.narrow(dim, self.start, self.end - self.start)

    def put(self, x: Tensor, part: Tensor, dim: int = 0) -> None:
        if self.start < 0:
            x.index_copy_(dim, self.index, part.to(x.dtype))
        else:
            x.narrow(dim, self.start, self.end - self.start).copy_(part)

    def add(self, x: Tensor, part: Tensor) -> None:
        if self.start < 0:
            self.put(x, self.take(x) + part)
        else:
            x[self.start : self.end] += part

    def all_of(self, x: Tensor) -> bool:
        return (self.start, self.end) == (0, x.shape[0])


def _calls(tables: Sequence[Tensor], numbers: Sequence[int]) -> Iterator[tuple[_Rows, _Rows, Lengths]]:
    for i in range(len(tables) // 4):
        cu_q, rows_q, cu_k, rows_k = tables[4 * i : 4 * i + 4]
        a, b, c, d, max_q, max_k, causal = numbers[3 + NUMBERS * i : 3 + NUMBERS * (i + 1)]
        yield _Rows(a, b, rows_q), _Rows(c, d, rows_k), Lengths(cu_q, cu_k, max_q, max_k, bool(causal))


# ---- the op ----


@define_op
def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, tables: Sequence[Tensor], numbers: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    attend = _loaded(numbers[0]).forward
    calls, shared = list(_calls(tables, numbers)), bool(numbers[1])
    with torch.no_grad():
        q, k, v = q.detach(), k.detach(), v.detach()
        if len(calls) == 1 and calls[0][0].all_of(q):
            _, keys, lengths = calls[0]
            out, lse = attend(q, keys.take(k), keys.take(v), lengths, scale)
            return out.contiguous(), lse.to(torch.float32).contiguous()
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros(q.shape, dtype=wide if shared else q.dtype, device=q.device)
        lse = torch.full((q.shape[1], q.shape[0]), -math.inf, dtype=torch.float32, device=q.device)
        for i, (queries, keys, lengths) in enumerate(calls):
            part, part_lse = attend(queries.take(q), keys.take(k), keys.take(v), lengths, scale)
            part_lse = part_lse.to(torch.float32)
            if i and shared:  # a query without an earlier call has weight 0 for it
                before = queries.take(lse, dim=1)
                merged = torch.logaddexp(before, part_lse)
                part = queries.take(out) * _weight(before, merged) + part * _weight(part_lse, merged)
                part_lse = merged
            queries.put(out, part)
            queries.put(lse, part_lse, dim=1)
        return out.to(q.dtype), lse


@define_op
def _flash_attention_backward(
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
    differentiate = _loaded(numbers[0]).backward
    calls, (shared_q, shared_k) = list(_calls(tables, numbers)), map(bool, numbers[1:3])
    with torch.no_grad():
        q, k, v = q.detach(), k.detach(), v.detach()
        if len(calls) == 1 and calls[0][0].all_of(q) and calls[0][1].all_of(k):
            dq, dk, dv = differentiate(grad, q, k, v, out, lse, calls[0][2], scale)
            return dq.contiguous(), dk.contiguous(), dv.contiguous()
        wide = torch.promote_types(q.dtype, torch.float32)  # rows with several shares add them up in float32
        dq = torch.zeros(q.shape, dtype=wide if shared_q else q.dtype, device=q.device)
        dk, dv = (torch.zeros(x.shape, dtype=wide if shared_k else x.dtype, device=x.device) for x in (k, v))
        for queries, keys, lengths in calls:
            rows = (queries.take(x) for x in (grad, q))
            shares = differentiate(
                *rows,
                keys.take(k),
                keys.take(v),
                queries.take(out),
                queries.take(lse, dim=1).contiguous(),
                lengths,
                scale,
            )
            for total, share, at in zip((dq, dk, dv), shares, (queries, keys, keys), strict=True):
                at.add(total, share)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


register_library_attention("flash_attention")


def _loaded(generation: int) -> Library:
    library = load(generation)
    if isinstance(library, str):
        raise RuntimeError(library)
    return library
