"""The rows that the remaining steps of a run use, and their forms, before the run starts to train."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from uniref_fast.data.dataset import BrokenRowsError, Dataset
from uniref_fast.layout import Sample
from uniref_fast.progress import running
from uniref_fast.training.batches.encoding import EncodingPass, EncodingReport, RowForms
from uniref_fast.training.batches.loader import PackPlanner
from uniref_fast.training.batches.packing import CostModel, PackKey
from uniref_fast.training.batches.samples import Encoder, Form
from uniref_fast.training.core.distributed import Ranks
from uniref_fast.training.core.memory import largest_sample
from uniref_fast.training.core.recipe import BudgetStage, Recipe, stage_at

__all__ = ["encode_ahead", "pack_token_bounds", "upcoming_rows"]

MARGIN = 0.02  # share of the rows by which the measured costs of samples may move the rows of a stage


@dataclass(frozen=True)
class _Sized:
    sample: Sample


class _Preparing:
    """Sizes of rows, each found once, and a record of the keys that a planner asks for.

    Args:
        dataset: Dataset of the run.
        encoder: Encoder of the run.
        config: Configuration of the run.

    Attributes:
        order: Position of each key, in the order of the rows.
        first: Smallest position that was asked for in each stage.
        last: Largest position that was asked for in each stage.
    """

    def __init__(self, dataset: Dataset, encoder: Encoder, config: Recipe) -> None:
        self.dataset, self.encoder, self.config = dataset, encoder, config
        self.order: dict[PackKey, int] = {}
        self.first: dict[int, int] = {}
        self.last: dict[int, int] = {}
        self._sizes: dict[tuple[int, Form], _Sized | Exception] = {}

    def form(self, key: PackKey, number: int) -> Form:
        stage = self.config.stages[number]
        return self.encoder.form(key, stage.budget, stage.target_side)

    def __call__(self, key: PackKey, number: int) -> _Sized:
        position = self.order.setdefault(key, len(self.order))
        self.first[number] = min(self.first.get(number, position), position)
        self.last[number] = max(self.last.get(number, position), position)
        form = self.form(key, number)
        if (key[1], form) not in self._sizes:
            try:
                found: _Sized | Exception = _Sized(self.encoder.prepare_form(self.dataset[key[1]], form).sample)
            except (ValueError, OSError) as error:
                found = error
            self._sizes[key[1], form] = found
        known = self._sizes[key[1], form]
        if isinstance(known, Exception):
            raise known.with_traceback(None)
        return known


def pack_token_bounds(
    stage: BudgetStage, kept: Mapping[tuple[int | None, int], int], patch: int, reference_area: int
) -> tuple[int, int]:
    """Return the smallest and the largest number of tokens that a pack of a stage may be planned to have.

    Args:
        stage: Stage of the run.
        kept: Tokens of a pack by (budget, target_side), of the run that is resumed.
        patch: Side of a token in pixels.
        reference_area: Pixels of a reference in a stage without a joint budget.
    """
    known = stage.pack_tokens or kept.get((stage.budget, stage.target_side))
    if known:
        return known, known
    largest = largest_sample(stage, patch, reference_area)
    return largest, 4 * largest  # as `plan_memory` plans


def upcoming_rows(
    dataset: Dataset,
    encoder: Encoder,
    config: Recipe,
    step: int,
    bounds: Sequence[tuple[int, int]],
    costs: CostModel,
    state: Mapping[str, Any] | None,
    *,
    exact: bool,
    shown: bool = False,
) -> list[RowForms]:
    """Return the rows that the steps from `step` on train on, in the order in which they are first used.

    The packs of all these steps are planned for it. If the tokens of a pack or the costs of samples are not known yet,
    the result has more rows than the steps use.

    Args:
        dataset: Dataset of the run.
        encoder: Encoder of the run, which decides the forms of rows.
        config: Configuration of the run.
        step: First step.
        bounds: Smallest and largest number of tokens that a pack of each stage may have.
        costs: Costs of samples.
        state: State of the loader at that step; None starts at the first row.
        exact: The costs are those of the run.
        shown: Show progress.
    """
    wanted: dict[int, dict[Form, None]] = {}
    planned = []
    for tokens in dict.fromkeys(zip(*bounds, strict=True)):
        prepare = _Preparing(dataset, encoder, config)
        planner = PackPlanner(dataset, prepare, config, tokens, costs, state)
        planned.append((prepare, planner))
        with running("planning the packs of all steps", config.total_steps - step, "step", shown=shown) as bar:
            try:
                for at in range(step, config.total_steps):
                    number, _ = stage_at(config, at)
                    for key in planner.plan(at)[1]:
                        if exact and len(planned) == 1:
                            wanted.setdefault(key[1], {})[prepare.form(key, number)] = None
                    bar.update()
            except BrokenRowsError:  # the run ends there with this error
                pass
    if (len(planned) > 1 or not exact) and step < config.total_steps:
        _add_ranges(wanted, planned, config, config.total_steps - step)
    return [RowForms(dataset, index, tuple(forms)) for index, forms in wanted.items()]


def _add_ranges(
    wanted: dict[int, dict[Form, None]],
    planned: Sequence[tuple[_Preparing, PackPlanner[_Sized]]],
    config: Recipe,
    steps: int,
) -> None:
    """Add all rows between the first and the last that a stage may use, whatever the sizes of its packs are."""
    longest, planner = max(planned, key=lambda each: len(each[0].order))
    order = list(longest.order)
    margin = math.ceil(len(order) * (MARGIN + 1 / steps)) + config.packs  # and by the rows of a step
    order += planner.rows.take(margin)
    for number in longest.first:
        first = min(prepare.first.get(number, 0) for prepare, _ in planned) - margin
        last = max(prepare.last.get(number, 0) for prepare, _ in planned) + margin
        for key in order[max(first, 0) : last + 1]:
            wanted.setdefault(key[1], {})[longest.form(key, number)] = None


def encode_ahead(encoder: Encoder, ranks: Ranks, config: Recipe, rows: Sequence[RowForms]) -> EncodingReport:
    """Encode rows into the cache of the run before it starts to train.

    Args:
        encoder: Encoder of the run.
        ranks: Ranks of the run.
        config: Configuration of the run.
        rows: Rows that the run uses, the same on all ranks.

    Raises:
        BrokenRowsError: More rows are broken than the run allows.
        ValueError: The disk of the cache is too small.
    """
    report = EncodingPass(encoder, ranks, config.workers).run(rows)
    if len(report.broken) > config.max_broken:
        last = "; ".join(f"{where}: {reason}" for where, reason in report.broken[-3:])
        raise BrokenRowsError(
            f"{len(report.broken)} rows cannot be encoded, over max_broken = {config.max_broken}; the last: {last}. "
            "`uniref-fast data check --decode` lists all"
        )
    return report
