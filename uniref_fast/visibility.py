"""Attention visibility: a rule over pairs of segments, compiled to intervals.

A rule is a function `sees(query, key)` of two `Segment`s that returns True, False or, for a segment and itself,
"causal": each token of the segment then sees itself and the tokens before it. `plan(layout, visibility)` compiles the
rule to an `AttentionPlan`: ranges of query rows and, for each range, the sorted intervals of key rows that these
queries see. There is no mask tensor. For one sample with text `t`, target `x` and references `a`, `b` the policies are

              full             reference_causal    reference_isolated
          keys t x a b             t x a b              t x a b
        t      # # # #             # # # #              # # # #
        x      # # # #             # # # #              # # # #
        a      # # # #             . . # #              . . # .
        b      # # # #             . . # #              . . . #

`group_shared` is `reference_causal` for a group of samples that share one copy of their references. Results are then
equal bit for bit between a group alone and the same group in any pack, but not between a group and its samples alone:
the first sample of a group has the references next to it in the joint sequence, the others have not.

`block_causal` is a rule for models whose text and images alternate in one causal sequence (Qwen-Image-2.1). It is no
policy, because the models of the policies put the references behind the target. For text `t`, image `a`, text `u` and
target `x`, where `/` is a block in which each token sees itself and the tokens before it:

          keys t a u x
        t      / . . .
        a      # # . .
        u      # # / .
        x      # # # #
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from uniref_fast.layout import Kind, Segment, SelfLayout
from uniref_fast.memo import memo

__all__ = ["POLICIES", "AttentionPlan", "Rule", "block_causal", "plan", "query_plan", "rule_of", "target_plan"]

Rule = Callable[[Segment, Segment], bool | Literal["causal"]]


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


def block_causal(query: Segment, key: Segment) -> bool | Literal["causal"]:
    """Each segment sees the segments of its sample up to itself, an image all of itself and a text itself causally.

    The mask of diffusers' `build_qwenimage21_block_causal_mask`, for segments in the order of the sequence. Samples of
    a group that share their text and references see that one copy.
    """
    if query.group != key.group or key.kind is Kind.PADDING or key.joint_start > query.joint_start:
        return False
    if key.kind is Kind.TARGET:  # the last segment of its sample
        return query == key
    return "causal" if query == key and query.kind.is_text else True


POLICIES: dict[str, Rule] = {
    "full": full,
    "reference_causal": reference_causal,
    "reference_isolated": reference_isolated,
    "group_shared": group_shared,
}


Span = tuple[int, int]
"""Half-open range of rows `[start, end)`."""


@dataclass(frozen=True)
class AttentionPlan:
    """Query ranges and the key intervals that each of them sees, as half-open `[start, end)` rows.

    Attributes:
        ranges: Query ranges in ascending order, which cover every query row once.
        intervals: Key intervals of each range, ascending and disjoint; may be empty. Intervals that touch belong to
            different samples (in a transpose, to different ranges), or one of them is causal.
        num_queries: Rows of q.
        num_keys: Rows of k and v.
        causal: Position of the causal interval of each range in its list of intervals, or -1; empty if no range has
            one. The causal interval `[t, t + n)` of a range `[s, s + n)` has as many rows as the range, and query
            `s + i` sees its key `t + j` for `j <= i`. Every other interval of the plan holds all keys of a causal
            interval or none.

    Raises:
        ValueError: If a causal interval does not fit its range, or another interval ends between its keys.
    """

    ranges: tuple[Span, ...]
    intervals: tuple[tuple[Span, ...], ...]
    num_queries: int
    num_keys: int
    causal: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.causal:
            _check_causal(self)
            if max(self.causal) < 0:
                object.__setattr__(self, "causal", ())

    def causal_at(self, index: int) -> int:
        """Return the position of the causal interval of a range, or -1."""
        return self.causal[index] if self.causal else -1

    @functools.cached_property
    def causal_intervals(self) -> dict[Span, int]:
        """The causal intervals, and the number of the range that each belongs to."""
        return {self.intervals[index][at]: index for index, at in enumerate(self.causal) if at >= 0}

    @functools.cached_property
    def area(self) -> int:
        """Number of (query, key) pairs that are computed, per head."""
        rectangles = sum(
            (end - start) * sum(b - a for a, b in keys)
            for (start, end), keys in zip(self.ranges, self.intervals, strict=True)
        )
        return rectangles - sum((b - a) * (b - a - 1) // 2 for a, b in self.causal_intervals)

    @functools.cached_property
    def transpose(self) -> AttentionPlan:
        """The same relation read from the keys: for each key range the query intervals that see it (dK, dV).

        A causal interval becomes a range with a causal interval of queries, in which key j is seen by the queries
        `i >= j`: in a transpose, the condition of `causal` is the other way around.
        """
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
            seen = sorted(seen_by)
            owner = self.causal_intervals.get((a, b))
            rows.append(((a, b), tuple(self.ranges[i] for i in seen), -1 if owner is None else seen.index(owner)))
        return _make_plan(rows, self.num_keys, self.num_queries)

    def tensors(self, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the plan on a device: `q_ranges` int32 [R, 2], `kv_ptr` int32 [R + 1], `kv_ranges` int32 [M, 2].

        A causal interval is stored with the start `-1 - start`.
        """
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
        visibility: One of `POLICIES`, or a function `sees(query_segment, key_segment)` that returns True, False or, for
            a segment and itself, "causal".

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
        visibility: One of `POLICIES`, or a function `sees(query_segment, key_segment)` that returns True, False or, for
            a segment and itself, "causal".

    Raises:
        ValueError: If the visibility is unknown, cannot be used with shared references, or is "causal" between two
            segments.
    """
    return memo(layout, _compile, visibility)


def _compile(layout: SelfLayout, visibility: str | Rule) -> AttentionPlan:
    rule = rule_of(visibility)
    if isinstance(visibility, str) and visibility != "group_shared" and layout.shares_references:
        raise ValueError(
            f"samples of this layout share references, which only the first of a group sees under {visibility!r}; "
            'use "group_shared", a rule of your own, or a layout with shared_references=False'
        )
    rows: list[_Row] = []
    owners: list[int] = []
    for query in layout.segments:
        row = _row(layout, rule, query)
        # Neighbours of one sample that see the same keys become one range. Samples are never joined, neither here nor
        # in the intervals, so that tiles do not depend on the other samples of a pack.
        if rows and owners[-1] == query.sample and rows[-1][1:] == (row[1], -1) and rows[-1][0][1] == row[0][0]:
            rows[-1] = ((rows[-1][0][0], row[0][1]), *row[1:])
        else:
            rows.append(row)
            owners.append(query.sample)
    return _make_plan(rows, layout.joint_length, layout.joint_length)


def _row(layout: SelfLayout, rule: Rule, query: Segment) -> _Row:
    """Return what the queries of one segment see."""
    seen = [(key, sight) for key in layout.segments if (sight := rule(query, key))]
    causal = [key for key, sight in seen if sight == "causal"]
    if any(key != query for key in causal):
        raise ValueError(
            f'a rule returned "causal" for two different segments, {query} and {causal[0]}; only a segment and itself '
            "can be causal"
        )
    own = (query.joint_start, query.joint_end)
    intervals = _intervals([key for key, _ in seen], query if causal else None)
    return own, intervals, intervals.index(own) if causal and query.length else -1


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
        visibility: One of `POLICIES`, or a function `sees(query_segment, key_segment)` that returns True, False or, for
            a segment and itself, "causal".
        segments: Segments of the layout, in the order of the queries.
    """
    whole = plan(layout, visibility)
    rows: list[_Row] = []
    at, last, end = 0, -1, -1
    for segment in segments:
        index = bisect.bisect_right(whole.ranges, segment.joint_start, key=lambda span: span[0]) - 1
        span = (at, at + segment.length)
        seen = whole.intervals[index], whole.causal_at(index)
        if index == last and end == segment.joint_start:
            rows[-1] = ((rows[-1][0][0], span[1]), *seen)
        else:
            rows.append((span, *seen))
        at, last, end = span[1], index, segment.joint_end
    return _make_plan(rows, at, layout.joint_length)


_Row = tuple[Span, tuple[Span, ...], int]
"""Range of queries, its key intervals, and which of them is causal or -1."""


def _make_plan(rows: list[_Row], num_queries: int, num_keys: int) -> AttentionPlan:
    ranges, intervals, causal = zip(*rows, strict=True) if rows else ((), (), ())
    return AttentionPlan(ranges, intervals, num_queries, num_keys, causal)


def _check_causal(plan: AttentionPlan) -> None:
    if len(plan.causal) != len(plan.ranges):
        raise ValueError(f"causal has {len(plan.causal)} entries for {len(plan.ranges)} ranges; it needs one for each")
    found: list[Span] = []
    for (start, end), keys, at in zip(plan.ranges, plan.intervals, plan.causal, strict=True):
        if not -1 <= at < len(keys):
            raise ValueError(f"range [{start}, {end}) has {len(keys)} intervals, its causal one cannot be number {at}")
        if at >= 0:
            a, b = keys[at]
            if b - a != end - start or a == b:
                raise ValueError(
                    f"a causal interval has as many rows as its range, at least one; got [{a}, {b}) for the range "
                    f"[{start}, {end})"
                )
            found.append((a, b))
    found.sort()
    for (a, b), (c, d) in itertools.pairwise(found):
        if b > c:
            raise ValueError(f"the causal intervals [{a}, {b}) and [{c}, {d}) of two ranges share keys")
    for keys in plan.intervals:
        for edge in itertools.chain.from_iterable(span for span in keys if span[0] < span[1]):
            at = bisect.bisect_left(found, (edge, edge)) - 1  # the last one that starts before the edge
            if at >= 0 and edge < found[at][1]:
                raise ValueError(
                    f"an interval starts or ends at {edge}, inside the causal interval [{found[at][0]}, {found[at][1]})"
                )


def _intervals(keys: list[Segment], causal: Segment | None) -> tuple[Span, ...]:
    """Return the spans of segments in joint order; spans of one sample that touch become one, except a causal one."""
    merged: list[Span] = []
    for i, key in enumerate(keys):
        joins = i and keys[i - 1].sample == key.sample and merged[-1][1] == key.joint_start
        if joins and causal not in (key, keys[i - 1]):
            merged[-1] = (merged[-1][0], key.joint_end)
        else:
            merged.append((key.joint_start, key.joint_end))
    return tuple(merged)


def _plan_tensors(plan: AttentionPlan, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    pointers = [0]
    flat: list[Span] = []
    for index, keys in enumerate(plan.intervals):
        flat += keys
        if (at := plan.causal_at(index)) >= 0:
            start, end = keys[at]
            flat[pointers[-1] + at] = (-1 - start, end)
        pointers.append(len(flat))
    q_ranges = torch.tensor(plan.ranges, dtype=torch.int32, device="cpu").reshape(-1, 2)
    kv_ranges = torch.tensor(flat, dtype=torch.int32, device="cpu").reshape(-1, 2)
    kv_ptr = torch.tensor(pointers, dtype=torch.int32, device="cpu")
    return q_ranges.to(device), kv_ptr.to(device), kv_ranges.to(device)


def _plan_tiles(plan: AttentionPlan, block: int, device: torch.device) -> torch.Tensor:
    tiles = []
    for index, ((start, end), keys) in enumerate(zip(plan.ranges, plan.intervals, strict=True)):
        work = sum(b - a for a, b in keys)
        if plan.causal_at(index) >= 0:
            work -= (end - start) // 2  # on average
        tiles += [(-work, index, row) for row in range(start, end, block)]
    tiles.sort()
    table = torch.tensor([tile[1:] for tile in tiles], dtype=torch.int32, device="cpu")
    return table.reshape(-1, 2).to(device)
