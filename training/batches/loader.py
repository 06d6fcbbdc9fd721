"""The data loader: it prepares and packs the rows of each step in their shuffled order, and reads their images ahead.

All ranks plan the same packs from the same rows, without communication. The position in the order and the waiting
samples, a few hundred integers, determine the packs of all later steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from uniref_fast.data.dataset import Dataset
from uniref_fast.layout import Sample
from uniref_fast.training.batches.packing import CostModel, Pack, Packer, PackKey
from uniref_fast.training.batches.rows import TrainingRows
from uniref_fast.training.batches.samples import Encoder, Prepared
from uniref_fast.training.core.memory import MemoryPlan
from uniref_fast.training.core.recipe import Recipe, stage_at

__all__ = ["PackLoader", "PackPlanner", "StepPacks"]

P = TypeVar("P", bound="HasSample")


class HasSample(Protocol):
    """An object with the sizes of a sample."""

    @property
    def sample(self) -> Sample: ...


@dataclass(frozen=True)
class StepPacks:
    """The packs of one step.

    Attributes:
        packs: Packs of all ranks.
        mine: Numbers of the packs that this rank runs, in order.
        prepared: Rows of this rank's packs, by key.
        images: Futures of the images of these rows, by key.
        broken: (place, reason) of rows that were left out while planning.
    """

    packs: list[Pack]
    mine: list[int]
    prepared: dict[PackKey, Prepared]
    images: dict[PackKey, Future]
    broken: list[tuple[str, str]]


class PackPlanner(Generic[P]):
    """Plans the packs of each step from the rows in their order; no image is read.

    Args:
        dataset: Dataset of the run.
        prepare: Function that takes a key and the number of a stage, and returns an object with the sizes of the
            sample as its attribute `sample`; it raises ValueError or OSError for a row that cannot be used.
        config: Configuration of the run.
        pack_tokens: Tokens of a pack in each stage.
        cost_model: Costs of the samples; the same on all ranks.
        state: Result of `state()`, to continue from there; None starts at the first row.

    Attributes:
        rows: Rows of the run in their order.
        waiting: Keys of rows that were taken and are in no pack yet, in order.

    Raises:
        ValueError: The state belongs to other data.
    """

    def __init__(
        self,
        dataset: Dataset,
        prepare: Callable[[PackKey, int], P],
        config: Recipe,
        pack_tokens: Sequence[int],
        cost_model: CostModel,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.dataset, self.prepare, self.config = dataset, prepare, config
        self.pack_tokens, self.cost_model = pack_tokens, cost_model
        self.rows = TrainingRows(dataset, config, state)
        self.waiting: list[PackKey] = [] if state is None else [(epoch, index) for epoch, index in state["waiting"]]
        self._prepared: dict[PackKey, P] = {}
        self._packer: Packer | None = None
        self._stage = -1

    def state(self) -> dict[str, Any]:
        """Return what determines all steps that are not planned yet, for JSON."""
        return {**self.rows.state(), "waiting": [list(key) for key in self.waiting]}

    def plan(self, step: int) -> tuple[list[Pack], dict[PackKey, P], list[tuple[str, str]]]:
        """Plan the packs of a step; steps come in order.

        Returns:
            Packs of all ranks, the prepared rows in them by key, and (place, reason) of rows that were left out.

        Raises:
            BrokenRowsError: There are more broken rows than the run allows, or no other rows.
        """
        number, _ = stage_at(self.config, step)
        broken: list[tuple[str, str]] = []
        if number != self._stage:  # samples that wait are prepared again, with the new sizes and in the same order
            self._stage, waiting = number, self.waiting
            self.waiting, self._prepared = [], {}
            self._packer = Packer(self.pack_tokens[number], self.config.packs, self.cost_model)
            for key in waiting:
                self._add(key, broken)
        packer = self._packer
        assert packer is not None
        while wanted := packer.need():
            for key in self.rows.take(wanted):
                self._add(key, broken)
        packs = packer.pack()
        taken = {item.key: self._prepared.pop(item.key) for pack in packs for item in pack.items}
        self.waiting = [key for key in self.waiting if key not in taken]
        return packs, taken, broken

    def _add(self, key: PackKey, broken: list[tuple[str, str]]) -> None:
        """Prepare a row and give it to the packer; if it cannot be used, count it and add it to `broken`."""
        assert self._packer is not None
        where = self.dataset.where(key[1])
        try:
            prepared = self.prepare(key, self._stage)
            self._packer.push(self._packer.pending(key, prepared.sample))
        except (ValueError, OSError) as error:
            broken.append((where, str(error).removeprefix(f"{where}: ")))
            self.rows.count_broken(broken, new=1)
            return
        self._prepared[key] = prepared
        self.waiting.append(key)


class PackLoader:
    """A data loader that yields the packs of each step, planned one step ahead.

    Args:
        dataset: Dataset of the run.
        encoder: Encoder of the run.
        config: Configuration of the run.
        plans: Memory plan of each stage.
        cost_model: Costs of the samples; the same on all ranks.
        assign: Function that takes the packs and the number of the stage, and returns the numbers of this rank's packs.
        state: Result of `state()`, to continue from there; None starts at the first row.

    Raises:
        ValueError: The state belongs to other data.
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
        self.dataset, self.encoder, self.config = dataset, encoder, config
        self.assign = assign
        self._threads = ThreadPoolExecutor(config.workers)
        pack_tokens = [plan.pack_tokens for plan in plans]
        self._planner = PackPlanner(dataset, self._prepare, config, pack_tokens, cost_model, state)
        self.rows = self._planner.rows
        self._ahead: tuple[dict[str, Any], int, StepPacks] | None = None

    def state(self) -> dict[str, Any]:
        """Return what determines all steps that `next` has not returned yet, for JSON."""
        if self._ahead is None:
            return self._planner.state()
        return {**self._ahead[0], "broken": sorted(self.rows.broken)}

    def next(self, step: int) -> StepPacks:
        """Return the packs of a step, and start to read the images of the next one. Steps come in order.

        Raises:
            BrokenRowsError: There are more broken rows than the run allows, or no other rows.
        """
        ready = self._ahead
        packs = ready[2] if ready and ready[1] == step else self._plan(step)
        self._ahead = None
        if step + 1 < self.config.total_steps:
            self._ahead = (self._planner.state(), step + 1, self._plan(step + 1))
        return packs

    def close(self) -> None:
        """Stop reading images."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _plan(self, step: int) -> StepPacks:
        packs, taken, broken = self._planner.plan(step)
        mine = self.assign(packs, stage_at(self.config, step)[0])
        prepared = {item.key: taken[item.key] for i in mine for item in packs[i].items}
        images = {key: self._threads.submit(row.load) for key, row in prepared.items()}
        return StepPacks(packs, mine, prepared, images, broken)

    def _prepare(self, key: PackKey, number: int) -> Prepared:
        stage = self.config.stages[number]
        return self.encoder.prepare(self.dataset[key[1]], key, stage.budget, stage.target_side)
