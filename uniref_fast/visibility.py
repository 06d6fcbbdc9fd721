"""Attention visibility: a rule over pairs of segments, compiled to intervals.

A rule is a function `sees(query, key) -> bool` of two `Segment`s. `plan(layout, visibility)` compiles it to an
`AttentionPlan`: ranges of query rows and, for each range, the sorted intervals of key rows that these queries see.
There is no mask tensor. For one sample with text `t`, target `x` and references `a`, `b` the policies are

              full             reference_causal    reference_isolated
          keys t x a b             t x a b              t x a b
        t      # # # #             # # # #              # # # #
        x      # # # #             # # # #              # # # #
        a      # # # #             . . # #              . . # .
        b      # # # #             . . # #              . . . #

`group_shared` is `reference_causal` for a group of samples that share one copy of their references. Results are then
equal bit for bit between a group alone and the same group in any pack, but not between a group and its samples alone:
the first sample of a group has the references next to it in the joint sequence, the others have not.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from uniref_fast.layout import Kind, Segment, SelfLayout
from uniref_fast.memo import memo

__all__ = ["POLICIES", "AttentionPlan", "Rule", "plan", "query_plan", "rule_of", "target_plan"]

Rule = Callable[[Segment, Segment], bool]


def full(query: Segment, key: Segment) -> bool:
    """Every token sees every token of its sample (the paper's visibility, and diffusers')."""
    return query.sample == key.sample and key.kind is not Kind.PADDING


def reference_causal(query: Segment, key: Segment) -> bool:
    """Text and target see the whole sample; references see only references.

    The keys and values of the references then depend on the references alone.
    """
    return full(query, key) and (query.kind is not Kind.REFERENCE or key.kind is Kind.REFERENCE)


def reference_isolated(query: Segment, key: Segment) -> bool:
    """Text and target see the whole sample; each reference sees only itself.

    The keys and values of a reference can then be reused by every request with this reference.
    """
    return full(query, key) and (query.kind is not Kind.REFERENCE or query == key)


def group_shared(query: Segment, key: Segment) -> bool:
    """Each sample sees itself and its group's one copy of the references; references see only references."""
    if query.kind is Kind.REFERENCE or key.kind is Kind.REFERENCE:
        return query.group == key.group and key.kind is Kind.REFERENCE
    return full(query, key)


POLICIES: dict[str, Rule] = {
    "full": full,
    "reference_causal": reference_causal,
    "reference_isolated": reference_isolated,
    "group_shared": group_shared,
}


@dataclass(frozen=True)
class AttentionPlan:
    """Query ranges and the key intervals that each of them sees, as half-open `[start, end)` rows.

    Attributes:
        ranges: Query ranges in ascending order, which cover every query row once.
        intervals: Key intervals of each range, ascending and disjoint; may be empty. Intervals that touch belong to
            different samples (in a transpose, to different ranges).
        num_queries: Rows of q.
        num_keys: Rows of k and v.
    """

    ranges: tuple[tuple[int, int], ...]
    intervals: tuple[tuple[tuple[int, int], ...], ...]
    num_queries: int
    num_keys: int

    @functools.cached_property
    def area(self) -> int:
        """Number of (query, key) pairs that are computed, per head."""
        return sum(
            (end - start) * sum(b - a for a, b in keys)
            for (start, end), keys in zip(self.ranges, self.intervals, strict=True)
        )

    @functools.cached_property
    def transpose(self) -> AttentionPlan:
        """The same relation read from the keys: for each key range the query intervals that see it (dK, dV)."""
        # One sweep over the interval edges that keeps the set of ranges which see the current keys. Its cost is linear
        # in the size of the result.
        opened: dict[int, list[int]] = {0: [], self.num_keys: []}
        closed: dict[int, list[int]] = {}
        for index, keys in enumerate(self.intervals):
            for start, end in keys:
                if start < end:
                    opened.setdefault(start, []).append(index)
                    closed.setdefault(end, []).append(index)
        rows = []
        seen_by: set[int] = set()
        for a, b in itertools.pairwise(sorted({*opened, *closed})):
            seen_by.difference_update(closed.get(a, ()))
            seen_by.update(opened.get(a, ()))
            rows.append(((a, b), tuple(self.ranges[index] for index in sorted(seen_by))))
        return _make_plan(rows, self.num_keys, self.num_queries)

    def tensors(self, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the plan on a device: `q_ranges` int32 [R, 2], `kv_ptr` int32 [R + 1], `kv_ranges` int32 [M, 2]."""
        return memo(self, _plan_tensors, torch.device(device))

    def tiles(self, block: int, device: torch.device | str) -> torch.Tensor:
        """Return query tiles of `block` rows, int32 [T, 2] of (range, first row), longest work first, then by row.

        A tile starts at the start of a range or after another tile of this range, so it never crosses ranges. That
        makes results independent of the rest of a pack.
        """
        return memo(self, _plan_tiles, block, torch.device(device))


def rule_of(visibility: str | Rule) -> Rule:
    """Return the rule of a visibility.

    Args:
        visibility: One of `POLICIES`, or a function `sees(query_segment, key_segment) -> bool`.

    Raises:
        ValueError: If the name is unknown, or the object cannot be called.
    """
    rule = POLICIES.get(visibility) if isinstance(visibility, str) else visibility
    if not callable(rule):
        raise ValueError(f"unknown visibility {visibility!r}; known: {', '.join(POLICIES)}, or pass a function")
    return rule


def plan(layout: SelfLayout, visibility: str | Rule = "full") -> AttentionPlan:
    """Compile a visibility over a layout; the plan is stored with the layout.

    Args:
        layout: Layout of the pack; rows of the plan are rows of its joint sequence.
        visibility: One of `POLICIES`, or a function `sees(query_segment, key_segment) -> bool`.

    Raises:
        ValueError: If the visibility is unknown, or cannot be used with shared references.
    """
    return memo(layout, _compile, visibility)


def _compile(layout: SelfLayout, visibility: str | Rule) -> AttentionPlan:
    rule = rule_of(visibility)
    if isinstance(visibility, str) and visibility != "group_shared" and layout.shares_references:
        raise ValueError(
            f"samples of this layout share references, which only the first of a group sees under {visibility!r}; "
            'use "group_shared", a rule of your own, or a layout with shared_references=False'
        )
    rows: list[tuple[tuple[int, int], tuple[tuple[int, int], ...]]] = []
    owners: list[int] = []
    for query in layout.segments:
        span = (query.joint_start, query.joint_end)
        keys = _intervals([key for key in layout.segments if rule(query, key)])
        # Neighbours of one sample that see the same keys become one range. Samples are never joined, neither here nor
        # in the intervals, so that tiles do not depend on the other samples of a pack.
        if rows and owners[-1] == query.sample and rows[-1][1] == keys and rows[-1][0][1] == span[0]:
            rows[-1] = ((rows[-1][0][0], span[1]), keys)
        else:
            rows.append((span, keys))
            owners.append(query.sample)
    return _make_plan(rows, layout.joint_length, layout.joint_length)


def target_plan(layout: SelfLayout, visibility: str | Rule = "full") -> AttentionPlan:
    """Return the plan of the targets' queries alone, in sample order; keys are the whole joint sequence.

    The last block of a model needs no other queries, because only the targets' rows of its output are used.
    """
    return memo(layout, _target_plan, visibility)


def _target_plan(layout: SelfLayout, visibility: str | Rule) -> AttentionPlan:
    return query_plan(layout, visibility, layout.targets)


def query_plan(layout: SelfLayout, visibility: str | Rule, segments: Sequence[Segment]) -> AttentionPlan:
    """Return the plan of the queries of some segments; keys are the whole joint sequence.

    Segments that are neighbours in one range of the whole plan stay one range, so that their queries are divided into
    the same tiles as there.

    Args:
        layout: Layout of the pack.
        visibility: One of `POLICIES`, or a function `sees(query_segment, key_segment) -> bool`.
        segments: Segments of the layout, in the order of the queries.
    """
    whole = plan(layout, visibility)
    rows: list[tuple[tuple[int, int], tuple[tuple[int, int], ...]]] = []
    at, last, end = 0, -1, -1
    for segment in segments:
        index = bisect.bisect_right(whole.ranges, segment.joint_start, key=lambda span: span[0]) - 1
        span = (at, at + segment.length)
        if index == last and end == segment.joint_start:
            rows[-1] = ((rows[-1][0][0], span[1]), whole.intervals[index])
        else:
            rows.append((span, whole.intervals[index]))
        at, last, end = span[1], index, segment.joint_end
    return _make_plan(rows, at, layout.joint_length)


def _make_plan(rows: list, num_queries: int, num_keys: int) -> AttentionPlan:
    return AttentionPlan(tuple(span for span, _ in rows), tuple(keys for _, keys in rows), num_queries, num_keys)


def _intervals(keys: list[Segment]) -> tuple[tuple[int, int], ...]:
    """Return the spans of segments in joint order; spans of one sample that touch become one."""
    merged: list[tuple[int, int]] = []
    for i, key in enumerate(keys):
        if i and keys[i - 1].sample == key.sample and merged[-1][1] == key.joint_start:
            merged[-1] = (merged[-1][0], key.joint_end)
        else:
            merged.append((key.joint_start, key.joint_end))
    return tuple(merged)


def _plan_tensors(plan: AttentionPlan, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    pointers = [0]
    flat: list[tuple[int, int]] = []
    for keys in plan.intervals:
        flat += keys
        pointers.append(len(flat))
    q_ranges = torch.tensor(plan.ranges, dtype=torch.int32, device="cpu").reshape(-1, 2)
    kv_ranges = torch.tensor(flat, dtype=torch.int32, device="cpu").reshape(-1, 2)
    kv_ptr = torch.tensor(pointers, dtype=torch.int32, device="cpu")
    return q_ranges.to(device), kv_ptr.to(device), kv_ranges.to(device)


def _plan_tiles(plan: AttentionPlan, block: int, device: torch.device) -> torch.Tensor:
    tiles = []
    for index, ((start, end), keys) in enumerate(zip(plan.ranges, plan.intervals, strict=True)):
        work = sum(b - a for a, b in keys)
        tiles += [(-work, index, row) for row in range(start, end, block)]
    tiles.sort()
    table = torch.tensor([tile[1:] for tile in tiles], dtype=torch.int32, device="cpu")
    return table.reshape(-1, 2).to(device)
