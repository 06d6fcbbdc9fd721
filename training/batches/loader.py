"""Step after step of packs: rows in the stream's order, prepared, packed, their images read ahead.

All ranks plan the same packs from the same rows, so they need not speak. What decides the packs of all later steps is
where the stream stands and which samples wait: a state of a few hundred integers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from uniref_fast.data.dataset import BrokenRowsError, Dataset
from uniref_fast.training.batches.order import ShuffledOrder
from uniref_fast.training.batches.packing import CostModel, Pack, Packer, PackKey
from uniref_fast.training.batches.samples import Encoder, Prepared
from uniref_fast.training.core.memory import MemoryPlan
from uniref_fast.training.core.recipe import Recipe, stage_at

__all__ = ["PackLoader", "StepPacks", "agree", "coming", "refuse_broken", "row_weights"]


@dataclass(frozen=True)
class StepPacks:
    """The packs of one step.

    Attributes:
        packs: of all ranks.
        mine: numbers of those that this rank runs, in order.
        prepared: rows of this rank's packs, by key.
        images: their images, being read, by key.
        broken: (place, reason) of rows that were passed over while planning.
    """

    packs: list[Pack]
    mine: list[int]
    prepared: dict[PackKey, Prepared]
    images: dict[PackKey, Future]
    broken: list[tuple[str, str]]


class PackLoader:
    """Plans steps one ahead of their use.

    Args:
        dataset, encoder: of the run.
        config: of the run.
        plans: of each stage.
        cost_model: prices samples; the same on all ranks.
        assign: takes the packs and the stage's number, gives the numbers of this rank's packs.
        state: of `state()`, to go on from; None starts at the first row.

    Raises:
        ValueError: for a state of other data.
    """

    def __init__(
        self,
        dataset: Dataset,
        encoder: Encoder,
        config: Recipe,
        plans: list[MemoryPlan],
        cost_model: CostModel,
        assign: Callable[[list[Pack], int], list[int]],
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.dataset, self.encoder, self.config, self.plans = dataset, encoder, config, plans
        self.cost_model, self.assign = cost_model, assign
        self._threads = ThreadPoolExecutor(config.workers)
        self._waiting: list[PackKey] = []
        weights = row_weights(config)
        self._stream = ShuffledOrder(len(dataset), config.seed, weights)
        self._coming = coming(dataset, weights)
        self._broken: set[str] = set()  # places of the rows that could not be used
        if state is not None:
            if state["data"] != dataset.fingerprint:
                raise ValueError(
                    "the data is not what this run was trained on so far; give the same files, or start another run in "
                    "a folder of its own"
                )
            self._stream = ShuffledOrder.from_state(len(dataset), config.seed, state["stream"], weights)
            self._waiting = [tuple(key) for key in state["waiting"]]  # type: ignore[misc]
            self._broken = set(state["broken"])
        self._prepared: dict[PackKey, Prepared] = {}
        self._packer: Packer | None = None
        self._stage = -1
        self._ahead: tuple[dict[str, Any], int, StepPacks] | None = None

    def state(self) -> dict[str, Any]:
        """What decides all steps that `next` has not given yet; for JSON."""
        if self._ahead is None:
            return self._state()
        return {**self._ahead[0], "broken": sorted(self._broken)}

    def next(self, step: int) -> StepPacks:
        """The packs of a step; steps must be asked for in order. Images of the step after it start to be read."""
        ready = self._ahead
        packs = ready[2] if ready and ready[1] == step else self._plan(step)
        self._ahead = None
        if step + 1 < self.config.total_steps:
            self._ahead = (self._state(), step + 1, self._plan(step + 1))
        return packs

    @property
    def broken(self) -> int:
        """Rows that could not be used so far; one that comes again in every epoch counts once."""
        return len(self._broken)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _state(self) -> dict[str, Any]:
        return {
            "data": self.dataset.fingerprint,
            "stream": self._stream.state(),
            "waiting": [list(key) for key in self._waiting],
            "broken": sorted(self._broken),
        }

    def _plan(self, step: int) -> StepPacks:
        number, _ = stage_at(self.config, step)
        broken: list[tuple[str, str]] = []
        if number != self._stage:  # other sizes: what waits is prepared anew, in the same order
            self._stage, waiting = number, self._waiting
            self._waiting, self._prepared = [], {}
            self._packer = Packer(self.plans[number].pack_tokens, self.config.packs, self.cost_model)
            for key in waiting:
                self._add(key, broken)
        packer = self._packer
        assert packer is not None
        while wanted := packer.need():
            for key in self._stream.take(wanted):
                self._add(key, broken)
        packs = packer.pack()
        mine = self.assign(packs, number)
        taken = {item.key for pack in packs for item in pack.items}
        own = [item.key for i in mine for item in packs[i].items]
        prepared = {key: self._prepared[key] for key in own}
        images = {key: self._threads.submit(row.load) for key, row in prepared.items()}
        self._waiting = [key for key in self._waiting if key not in taken]
        for key in taken:
            del self._prepared[key]
        return StepPacks(packs, mine, prepared, images, broken)

    def _add(self, key: PackKey, broken: list[tuple[str, str]]) -> None:
        """Prepare and queue a row; one that cannot be used is counted and named."""
        stage = self.config.stages[self._stage]
        assert self._packer is not None
        where = self.dataset.where(key[1])
        try:
            prepared = self.encoder.prepare(self.dataset[key[1]], key, stage.side, stage.target_side)
            self._packer.push(self._packer.pending(key, prepared.sample))
        except (ValueError, OSError) as error:
            broken.append((where, str(error).removeprefix(f"{where}: ")))
            self.count_broken(1, broken)
            return
        self._prepared[key] = prepared
        self._waiting.append(key)

    def count_broken(self, count: int, rows: list[tuple[str, str]]) -> None:
        """Count rows that could not be used, each once.

        Args:
            count: how many of the rows, the last ones, are not counted yet.
            rows: (place, reason) of each.

        Raises:
            BrokenRowsError: for more than the run allows, or all there are.
        """
        self._broken.update(where for where, _ in rows[len(rows) - count :])
        refuse_broken(self._broken, self.config.max_broken, self._coming, rows)


def agree(planned: Sequence[tuple[Sequence[PackKey], Sequence[tuple[str, str]]]]) -> None:
    """Raise BrokenRowsError unless all ranks have planned the same rows: one may not read what others can.

    Args:
        planned: of each rank the keys of the rows, and (place, reason) of those that were passed over.
    """
    if any(list(keys) != list(planned[0][0]) for keys, _ in planned):
        told = [f"rank {rank}: {': '.join(row)}" for rank, (_, rows) in enumerate(planned) for row in rows]
        raise BrokenRowsError(
            "the ranks do not read the same rows, so each would train on others; every rank needs the same files. "
            f"Not usable in this step: {'; '.join(told[:6]) or 'none, but in one before it'}"
        )


def refuse_broken(broken: Collection[str], most: int, total: int, rows: list[tuple[str, str]]) -> None:
    """Raise BrokenRowsError for more broken rows than a run allows, or all there are; `rows` are the last of them."""
    if len(broken) > most or len(broken) == total:
        last = "; ".join(f"{where}: {reason}" for where, reason in rows[-3:])
        limit = f"over max_broken = {most}" if len(broken) > most else "all of them"
        raise BrokenRowsError(
            f"{len(broken)} rows could not be used, {limit}; the last: {last}. `uniref-fast data check` lists all"
        )


def coming(dataset: Dataset, weights: Sequence[float] | None) -> int:
    """Rows that come at all."""
    return len(dataset) if weights is None else sum(weight > 0 for weight in weights)


def row_weights(config: Recipe) -> list[float] | None:
    """Occurrences per epoch of each row of the data, or None when each comes once."""
    if not config.weights:
        return None
    lengths = [len(Dataset(path, config.image_folder, columns=config.columns)) for path in config.data]
    return [weight for weight, length in zip(config.weights, lengths, strict=True) for _ in range(length)]
