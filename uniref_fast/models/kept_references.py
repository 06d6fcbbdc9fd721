"""Keys and values of references, kept over the denoising steps of an edit.

A *refresh* step runs the whole model and stores the keys and values of the references of every block. A *kept* step
leaves the rows of these references out: it computes text and target only, and their queries attend to the stored keys
and values next to their own. Each sequence of a pack has its own store and its own schedule, so that a result does not
depend on the other sequences of its pack.

    refresh step   streams  [a a a] [A A A A r r]    queries and keys  a a a A A A A r r
    kept step      streams  [a a a] [A A A A]        queries a a a A A A A,  keys a a a A A A A r r (r stored)

This is exact where the references depend on nothing that changes between the steps (`dependence`): they attend to
references only, and are modulated with t = 0. Elsewhere the stored values are those of an earlier step, and each
refresh measures their relative change since then, the *drift*.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from uniref_fast.layout import Segment, SelfLayout
from uniref_fast.memo import memo
from uniref_fast.models.sequence_parallel import SequenceParallel
from uniref_fast.visibility import AttentionPlan, Rule, plan, query_plan, rule_of, target_plan

__all__ = [
    "DEFAULT_DRIFT",
    "KeepDtype",
    "Kept",
    "KeptReferences",
    "ReferenceRows",
    "RefreshSchedule",
    "TracedReferences",
    "check_keep_dtype",
    "dependence",
    "empty_stores",
    "kept_bytes",
    "kept_step",
    "step_cost",
]

KeepDtype = Literal["int8"]

DEFAULT_DRIFT = 0.15
"""Tolerance of the drift. bench/quality_edit.py measures what the built-in model loses with it."""

LONG_EDIT = 12
"""Number of steps of an edit from which the second refresh, which measures the first drift, comes after two steps."""

GROWTH = 3
"""Largest factor from one interval to the next, since drift does not grow evenly."""


def dependence(layout: SelfLayout, visibility: str | Rule) -> str | None:
    """Return what the references of a layout depend on that changes between steps; None if there is nothing.

    Args:
        layout: Layout of the pack.
        visibility: Visibility of attention.
    """
    rule = rule_of(visibility)
    references = [segment for segment in layout.segments if layout.is_kept(segment)]
    others = [segment for segment in layout.segments if not layout.is_kept(segment)]
    if any(rule(query, key) for query in references for key in others):
        name = visibility if isinstance(visibility, str) else getattr(visibility, "__name__", "custom")
        return f"references attend to text and target under visibility {name!r}"
    if references and not layout.clean_references:
        return "references are modulated with the time t of each step"
    return None


@dataclass(frozen=True)
class RefreshSchedule:
    """When the keys and values of references are computed again. The default is never.

    Attributes:
        every: Number of steps from one refresh to the next; None with `drift` chooses it by the drift, None without
            `drift` keeps them until the end.
        drift: Largest relative change of keys and values that is tolerated.
    """

    every: int | None = None
    drift: float | None = None

    @staticmethod
    def of(keep: bool | int | str, drift: float | None, dependence: str | None) -> RefreshSchedule | None:
        """Return the schedule of a value of `keep_references`; None keeps nothing.

        Args:
            keep: False, True, a number of steps, or "auto".
            drift: Tolerance of "auto"; None takes `DEFAULT_DRIFT`.
            dependence: Dependence of the references on the step (`dependence`), or None if there is none.

        Raises:
            ValueError: If the value is not one of these, or True would not be exact.
            TypeError: If the value or the drift has the wrong type.
        """
        if drift is not None and keep != "auto":
            raise ValueError(f'drift is the tolerance of keep_references="auto", got keep_references={keep!r}')
        if drift is not None and not isinstance(drift, numbers.Real):
            raise TypeError(f"drift must be a number, got {drift!r}")
        if drift is not None and not drift > 0:
            raise ValueError(f"drift must be above 0, got {drift}")
        if keep is False:
            return None
        if keep is True:
            if dependence is not None:
                raise ValueError(
                    f"keep_references=True never computes references again, which would not be exact: {dependence}. "
                    'Use keep_references="auto" or a number of steps'
                )
            return RefreshSchedule()
        if keep == "auto":
            return RefreshSchedule() if dependence is None else RefreshSchedule(drift=drift or DEFAULT_DRIFT)
        if not isinstance(keep, int):
            raise TypeError(f'keep_references must be False, True, a number of steps or "auto", got {keep!r}')
        if keep < 1:
            raise ValueError(f"keep_references must be at least 1 step, got {keep}")
        return RefreshSchedule(every=keep)

    def refreshes(self, total: int) -> int | None:
        """Return the number of refreshes in an edit of `total` steps; None if it depends on the drift."""
        if self.drift is not None:
            return None
        return 1 if self.every is None else math.ceil(total / self.every)

    def interval(self, refreshed: Sequence[int], drifts: Sequence[float], total: int | None) -> float:
        """Return the number of steps from the last refresh to the next one.

        The drift of the last interval predicts how many steps stay within the tolerance. If the number of steps is
        known, the remaining ones are divided evenly, because the last steps suffer most from old values.

        Args:
            refreshed: Steps of the refreshes so far, at least one.
            drifts: Drift that each refresh but the first has measured.
            total: Number of steps of the edit, or None.
        """
        if self.every is not None:
            return self.every
        if self.drift is None:
            return math.inf
        if not drifts:
            return 2 if total is not None and total >= LONG_EDIT else 1
        passed = refreshed[-1] - refreshed[-2]
        longest = max(1, int(passed * min(self.drift / max(drifts[-1], 1e-9), GROWTH)))
        if total is None:
            return longest
        remaining = max(1, total - refreshed[-1])
        return math.ceil(remaining / math.ceil(remaining / longest))


@dataclass(eq=False)
class KeptReferences:
    """Keys and values of the references of one sequence, for one edit.

    Attributes:
        schedule: When they are computed again.
        dtype: "int8" stores them in 8 bits, with a scale for each row and head; None stores them unchanged.
        total: Number of steps of the edit, or None if it is not known.
        steps: Number of steps so far.
        refreshed: Numbers of the steps, from 0, that computed them.
    """

    schedule: RefreshSchedule = RefreshSchedule()
    dtype: KeepDtype | None = None
    total: int | None = None
    steps: int = 0
    refreshed: list[int] = field(default_factory=list)
    _drifts: list[float] = field(default_factory=list, repr=False)
    _unread: list[Tensor] = field(default_factory=list, repr=False)  # squares of the drifts that were not read yet
    _due: bool = field(default=False, repr=False)
    _blocks: dict[nn.Module, tuple[_Stored, _Stored]] = field(default_factory=dict, repr=False)
    _changes: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def drifts(self) -> list[float]:
        """Drift that each refresh but the first has measured.

        It is the root mean square, over blocks, keys and values, of `|new - stored| / |new|`. The first call after a
        refresh waits for the device.
        """
        if self._unread:
            self._drifts += map(math.sqrt, torch.stack(self._unread).tolist())
            self._unread.clear()
        return self._drifts

    @property
    def due(self) -> bool:
        """True if the next step must compute the references."""
        if self._due or not self.refreshed:
            return True
        drifts = self.drifts if self.schedule.drift is not None else ()
        return self.steps - self.refreshed[-1] >= self.schedule.interval(self.refreshed, drifts, self.total)

    def sibling(self) -> KeptReferences:
        """Return a store for another sequence with the same references, where these depend on nothing else.

        Both have one copy of the keys and values.
        """
        return KeptReferences(self.schedule, self.dtype, self.total, _blocks=self._blocks)

    def refresh_now(self) -> None:
        """Make the next step compute the references, whatever the schedule says."""
        self._due = True

    def has(self, attentions: Iterable[nn.Module]) -> bool:
        """Return True if the keys and values of all these attention modules are stored."""
        return all(attn in self._blocks for attn in attentions)

    def clear(self) -> None:
        """Free the stored keys and values; the next step computes them."""
        self._blocks.clear()
        self._due = True

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values."""
        return sum(part.nbytes for pair in self._blocks.values() for part in pair)

    def store(self, attn: nn.Module, k: Tensor, v: Tensor) -> None:
        """Store keys and values `[m, H, D]` of a block, and measure their change since the last refresh.

        Args:
            attn: Attention module of the block, by which they are found again.
            k, v: Keys and values of all references of the sequence.
        """
        pair = self._blocks.get(attn)
        if pair is None:
            self._blocks[attn] = _Stored(k, self.dtype), _Stored(v, self.dtype)
            return
        self._changes += [part.replace(new) for part, new in zip(pair, (k, v), strict=True)]

    def load(self, attn: nn.Module, k: Tensor, v: Tensor) -> None:
        """Write the stored keys and values of a block into k and v, `[m, H, D]` each."""
        for part, out in zip(self._blocks[attn], (k, v), strict=True):
            part.load(out)

    def take_changes(self, parallel: SequenceParallel | None = None) -> Tensor | None:
        """Return the mean square of the changes since the last refresh as a scalar tensor, and forget them.

        Args:
            parallel: Communication between the ranks that each keep some heads; all of them get the same result.
        """
        changes, self._changes = self._changes, []
        if not changes:
            return None
        sums = torch.stack(changes)  # [keys and values of every block, 2]
        if parallel is not None:
            parallel.add(sums)
        return (sums[:, 0] / sums[:, 1].clamp_min(1e-30)).mean()


def empty_stores(stores: Sequence[KeptReferences]) -> list[KeptReferences]:
    """Return empty stores like those of an edit: siblings stay siblings."""
    first: dict[int, KeptReferences] = {}
    empty = []
    for store in stores:
        copied = first.get(id(store._blocks))
        empty.append(KeptReferences(store.schedule, store.dtype, store.total) if copied is None else copied.sibling())
        first.setdefault(id(store._blocks), empty[-1])
    return empty


class _Stored:
    """One tensor `[m, H, D]`, as it is or in 8 bits with a scale for each row and head."""

    def __init__(self, x: Tensor, dtype: KeepDtype | None) -> None:
        self.scale: Tensor | None = None
        if dtype is None:
            self.values = x.clone(memory_format=torch.contiguous_format)
        else:
            self.values, self.scale = _quantised(x)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def load(self, out: Tensor) -> None:
        if self.scale is None:
            out.copy_(self.values)
        else:
            torch.mul(self.values, self.scale, out=out)

    def replace(self, x: Tensor) -> Tensor:
        """Store x instead, and return the sums of the squares of the change and of x, `[2]`."""
        old = self.values if self.scale is None else self.values * self.scale
        wide = x.float()
        change = torch.stack([(wide - old.float()).square().sum(), wide.square().sum()])
        if self.scale is None:
            self.values.copy_(x)
        else:
            values, scale = _quantised(x)
            self.values.copy_(values)
            self.scale.copy_(scale)
        return change


def _quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x `[m, H, D]` in int8 and its scales `[m, H, 1]`, in the dtype of x: `x = values * scale`."""
    scale = (x.abs().amax(-1, keepdim=True).float() / 127).clamp_min(torch.finfo(x.dtype).tiny).to(x.dtype)
    return (x.float() / scale.float()).round().clamp(-127, 127).to(torch.int8), scale


def check_keep_dtype(keep_dtype: str | None) -> None:
    """Raise ValueError unless the value is a `keep_dtype` of `edit`."""
    if keep_dtype not in (None, "int8"):
        raise ValueError(f'keep_dtype must be "int8" or None, got {keep_dtype!r}')


def kept_bytes(sizes: Any, layout: SelfLayout, dtype: torch.dtype, keep_dtype: KeepDtype | None) -> int:
    """Return the bytes of the keys and values of all references of a layout, as they are stored.

    Args:
        sizes: Sizes of the transformer, a `uniref_fast.models.packed.ModelSizes`.
        layout: Layout of the sequences.
        dtype: Dtype of the computation.
        keep_dtype: "int8" for 8 bits with a scale for each row and head, or None.
    """
    rows = sum(segment.length for segment in layout.segments if layout.is_kept(segment))
    head = sizes.attention_head_dim
    row = head * dtype.itemsize if keep_dtype is None else head + dtype.itemsize  # of one head
    return 2 * sizes.blocks * rows * sizes.num_attention_heads * row


def kept_step(layout: SelfLayout) -> ReferenceRows:
    """Return the rows of a step that takes the references of every sample from a store."""
    return ReferenceRows(layout, [KeptReferences(steps=1, refreshed=[0]) for _ in range(layout.num_samples)])


def step_cost(layout: SelfLayout, visibility: str | Rule, kept: bool) -> tuple[SelfLayout, int, int]:
    """Return the layout of the rows that a step computes, and the attended pairs of a block and of the last block.

    Args:
        layout: Layout of the pack.
        visibility: Visibility of attention.
        kept: Count a step that takes the keys and values of the references from a store.
    """
    last = target_plan(layout, visibility).area
    if not kept:
        return layout, plan(layout, visibility).area, last
    step = kept_step(layout)
    return step.layout, step.plan(visibility).area, last


class ReferenceRows:
    """Rows that one forward computes and rows whose keys and values it takes from the store.

    Args:
        layout: Layout of the pack.
        kept: Store of each sample; None for a sample whose references are computed in every step. Where samples share
            references, only the store of the sample that holds them is used.
        counts: Count the step in the stores at the end of the forward. With False the caller calls `count` instead,
            because the forward runs in a CUDA graph and the count on the host.

    Attributes:
        whole: Layout of the pack.
        layout: Layout of the rows that are computed; its rotary positions and modulation rows are those of `whole`.
        reused: Samples whose references are taken from the store.
        changes: Changes that the forward has measured, as `measured` returns them, if `counts` is False.
    """

    def __init__(self, layout: SelfLayout, kept: Sequence[KeptReferences | None], counts: bool = True) -> None:
        if len(kept) != layout.num_samples:
            raise ValueError(f"kept has {len(kept)} entries, the layout has {layout.num_samples} samples")
        holders = memo(layout, _reference_spans)
        self.whole, self._counts = layout, counts
        self.changes: list[Tensor | None] = []
        self._stores = {i: store for i, store in enumerate(kept) if store is not None and i in holders}
        self._refreshed = [i for i, store in self._stores.items() if store.due]
        # Siblings compute the same keys and values, which one of them stores.
        self._storing = [*{id(self._stores[i]._blocks): i for i in reversed(self._refreshed)}.values()]
        self.reused = frozenset(self._stores).difference(self._refreshed)
        self.layout = memo(layout, _without_references, self.reused) if self.reused else layout
        self._joint: tuple[Tensor, Tensor] | None = None

    @property
    def stores(self) -> list[KeptReferences | None]:
        """Store of each sample; None for a sample without one or without references."""
        return [self._stores.get(i) for i in range(self.whole.num_samples)]

    def plan(self, visibility: str | Rule) -> AttentionPlan:
        """Return the plan of the computed rows: queries in the order of `layout`, keys of the whole sequence."""
        return (
            memo(self.whole, _computed_plan, visibility, self.reused) if self.reused else plan(self.whole, visibility)
        )

    def stream(self, stream: str, x: Tensor) -> Tensor:
        """Return the computed rows of the "text" or "image" stream of the pack, `[N_stream, C]`."""
        if not self.reused:
            return x
        return x.index_select(0, memo(self.whole, _computed_rows, stream, self.reused, x.device))

    def rotary(self, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the computed rows of the rotary tables of the pack, `[N, D / 2]` each."""
        if not self.reused:
            return rotary
        rows = memo(self.whole, _computed_rows, "joint", self.reused, rotary[0].device)
        return rotary[0].index_select(0, rows), rotary[1].index_select(0, rows)

    def keys_and_values(self, attn: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of the whole joint sequence, `[N, H, D]` each.

        It stores those of references that this forward computes, and adds the stored ones of all others.

        Args:
            attn: Attention module of the block.
            k, v: Keys and values of the computed rows. If some are taken from the store, the result is overwritten by
                the next block.
        """
        spans = memo(self.layout, _reference_spans)
        for i in self._storing:
            start, end = spans[i]
            self._stores[i].store(attn, k[start:end], v[start:end])
        if not self.reused:
            return k, v
        if self._joint is None:
            shape = self.whole.joint_length, *k.shape[1:]
            self._joint = k.new_empty(shape), v.new_empty(shape)
        rows = memo(self.whole, _computed_rows, "joint", self.reused, k.device)
        for joint, computed in zip(self._joint, (k, v), strict=True):
            joint.index_copy_(0, rows, computed)
        self.before_block(attn)
        return self._joint

    def buffers(self, q: Tensor) -> TracedReferences:
        """Return keys and values of the whole joint sequence for blocks that are compiled, without values yet.

        A compiled block writes the computed rows, between `before_block` and `after_block`.

        Args:
            q: Tensor `[0, H, D]` with the heads, dtype and device of the queries.
        """
        shape = self.whole.joint_length, *q.shape[1:]
        self._joint = q.new_empty(shape), q.new_empty(shape)
        return TracedReferences(memo(self.whole, _computed_rows, "joint", self.reused, q.device), *self._joint)

    def before_block(self, attn: nn.Module) -> None:
        """Write the stored keys and values of a block into `buffers`."""
        for i, k, v in self._buffered(self.reused):
            self._stores[i].load(attn, k, v)

    def after_block(self, attn: nn.Module) -> None:
        """Store the keys and values that a compiled block has written into `buffers`."""
        for i, k, v in self._buffered(self._storing):
            self._stores[i].store(attn, k, v)

    def _buffered(self, samples: Iterable[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield samples with the rows of their references in the buffers."""
        assert self._joint is not None, "call buffers() first"
        spans = memo(self.whole, _reference_spans)
        for i in samples:
            start, end = spans[i]
            yield i, self._joint[0][start:end], self._joint[1][start:end]

    def finish(self, parallel: SequenceParallel | None = None) -> None:
        """Measure the drift of the stores that were refreshed, and count the step; call it at the end of a forward.

        Args:
            parallel: Communication between the ranks that share the pack, or None.
        """
        self.changes = self.measured(parallel)
        if self._counts:
            self.count(self.changes)

    def measured(self, parallel: SequenceParallel | None = None) -> list[Tensor | None]:
        """Return the squared drift of each store that this forward refreshes; None for the first refresh of one."""
        return [self._stores[i].take_changes(parallel) for i in self._refreshed]

    def computed(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the samples whose references are taken from the store, and those whose references are refreshed."""
        return tuple(sorted(self.reused)), tuple(self._refreshed)

    def storage(self) -> tuple[Any, ...]:
        """Return all stores, and the objects that hold their keys and values now."""
        stores = tuple(self._stores.values())
        return *stores, *(pair for store in stores for pair in store._blocks.values())

    def count(self, changes: Sequence[Tensor | None]) -> None:
        """Count the step in every store, and set the drift that its refreshes have measured.

        The drifts that decide the next refresh are read together, which waits for the device; the others are read when
        they are asked for.

        Args:
            changes: Measured changes, as `measured` returns them.
        """
        deciding: list[tuple[KeptReferences, Tensor]] = []
        for i, change in zip(self._refreshed, changes, strict=True):
            store = self._stores[i]
            store._due = False
            store.refreshed.append(store.steps)
            if change is not None and store.schedule.drift is None:
                store._unread.append(change)
            elif change is not None:
                deciding.append((store, change))
        if deciding:
            squares = torch.stack([change for _, change in deciding]).tolist()
            for (store, _), square in zip(deciding, squares, strict=True):
                store._drifts.append(math.sqrt(square))
        for store in self._stores.values():
            store.steps += 1


Kept = Sequence[KeptReferences | None] | ReferenceRows | None
"""Stores of the references of a pack, for `kept` of `PackedModel.forward`."""


@dataclass(frozen=True, eq=False)
class TracedReferences:
    """Keys and values of the whole joint sequence, as a compiled block gets them.

    Attributes:
        rows: Joint rows that are computed, int64 `[n]`.
        keys, values: Buffers `[N, H, D]`. The rows of references that are kept have their values already.
    """

    rows: Tensor
    keys: Tensor
    values: Tensor

    def keys_and_values(self, attn: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the computed rows, `[n, H, D]`, and return keys and values of the whole joint sequence."""
        return self.keys.index_copy_(0, self.rows, k), self.values.index_copy_(0, self.rows, v)


def _reference_spans(layout: SelfLayout) -> dict[int, tuple[int, int]]:
    """Return the joint rows [start, end) of the references of each sample that holds some."""
    spans: dict[int, tuple[int, int]] = {}
    for segment in layout.segments:
        if layout.is_kept(segment):
            start, end = spans.get(segment.sample, (segment.joint_start, segment.joint_start))
            assert end == segment.joint_start, "the references of a sample are not next to each other"
            spans[segment.sample] = start, segment.joint_end
    return spans


def _computed(layout: SelfLayout, reused: frozenset[int]) -> list[Segment]:
    """Return the segments without the references of some samples, in joint order."""
    return [s for s in layout.segments if not layout.is_kept(s) or s.sample not in reused]


def _without_references(layout: SelfLayout, reused: frozenset[int]) -> SelfLayout:
    """Return the layout without the references of some samples; positions and modulation rows stay."""
    left = _computed(layout, reused)
    starts: dict[Segment, int] = {}  # first row in the stream, whose order may differ from the joint one
    stream_at = {True: 0, False: 0}  # by whether the segment is text
    for segment in sorted(left, key=lambda each: each.stream_start):
        starts[segment] = stream_at[segment.kind.is_text]
        stream_at[segment.kind.is_text] += segment.length
    segments: list[Segment] = []
    joint_at = 0
    for segment in left:
        segments.append(replace(segment, joint_start=joint_at, stream_start=starts[segment]))
        joint_at += segment.length
    some = any(map(layout.is_kept, segments))
    return replace(layout, segments=tuple(segments), clean_references=layout.clean_references and some)


def _computed_plan(layout: SelfLayout, visibility: str | Rule, reused: frozenset[int]) -> AttentionPlan:
    return query_plan(layout, visibility, _computed(layout, reused))


def _computed_rows(layout: SelfLayout, what: str, reused: frozenset[int], device: torch.device) -> Tensor:
    """Return the rows of the joint sequence or of a stream that are computed, int64 in their order."""
    if what == "joint":
        starts = [(s.joint_start, s.length) for s in _computed(layout, reused)]
    else:
        of_stream = (s for s in _computed(layout, reused) if s.kind.is_text == (what == "text"))
        starts = sorted((s.stream_start, s.length) for s in of_stream)
    none = torch.arange(0, device=device)
    return torch.cat([none, *(torch.arange(start, start + length, device=device) for start, length in starts)])
