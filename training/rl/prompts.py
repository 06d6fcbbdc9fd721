"""Prompts of rollouts: the rows with as many references as a stage uses, in shuffled order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from uniref_fast.data.dataset import BrokenRowsError, Dataset
from uniref_fast.training.batches.encoding import RowForms
from uniref_fast.training.batches.packing import PackKey
from uniref_fast.training.batches.rows import TrainingRows
from uniref_fast.training.batches.samples import Encoder, Form, Prepared
from uniref_fast.training.core.recipe import stage_at
from uniref_fast.training.rl.recipes import MSGRPO, RLStage

__all__ = ["Prompts"]

NAMES = {"multi": "two references or more", "single": "one reference", "any": "any number of references"}


class Prompts:
    """Rows for the rollouts of a run. All ranks take the same rows.

    Args:
        dataset: Dataset of the run.
        encoder: Encoder of the run.
        config: Configuration of the run.
        state: Return value of `state()` to continue from; None starts at the first row.

    Raises:
        ValueError: If the state belongs to other data.
    """

    def __init__(
        self, dataset: Dataset, encoder: Encoder, config: MSGRPO, state: Mapping[str, Any] | None = None
    ) -> None:
        self.dataset, self.encoder, self.config = dataset, encoder, config
        self.rows = TrainingRows(dataset, config, state)

    def state(self) -> dict[str, Any]:
        """Return the state that decides the next rows, for JSON."""
        return self.rows.state()

    def take(
        self,
        count: int,
        stage: RLStage,
        check: Callable[[PackKey, Prepared], None] = lambda key, prepared: None,
        read: bool = True,
    ) -> tuple[list[tuple[PackKey, Prepared]], list[tuple[str, str]]]:
        """Return the next rows with their sizes, and (place, reason) of broken rows that were skipped.

        Args:
            count: Number of rows to return.
            stage: Stage that decides which rows are used, and their sizes.
            check: Function that raises ValueError, with the reason, for a row that cannot be used.
            read: Read the references too, and pass over rows whose references are damaged.

        Raises:
            BrokenRowsError: If more rows are broken than the run allows, or all of them.
            ValueError: If no row can be used.
        """
        taken: list[tuple[PackKey, Prepared]] = []
        broken: list[tuple[str, str]] = []
        unfit: set[int] = set()
        while len(taken) < count:
            (key,) = self.rows.take(1)
            where = self.dataset.where(key[1])
            try:
                row = self.dataset[key[1]]
                if stage.uses(len(row.references)):
                    prepared = self.encoder.prepare(row, key, stage.budget, stage.target_side, rollout=True)
                    check(key, prepared)
                    if read:
                        prepared.load_references()  # damaged pictures too are passed over, by all ranks alike
                    taken.append((key, prepared))
                    continue
            except (ValueError, OSError) as error:
                broken.append((where, str(error).removeprefix(f"{where}: ")))
                self.rows.count_broken(broken, new=1)
            unfit.add(key[1])
            if len(unfit) == self.rows.scheduled:  # not counted in epochs: weights make rows rare
                last = f"; the last that could not be used: {': '.join(broken[-1])}" if broken else ""
                raise ValueError(
                    f"the data has no row with {NAMES[stage.references]}, which a stage of references = "
                    f'"{stage.references}" needs{last}'
                )
        return taken, broken

    def upcoming(self, step: int, broken: Mapping[str, str] | None = None) -> list[RowForms]:
        """Return the rows that the steps from `step` on use, in the order in which they are first used.

        It takes the rows of all these steps, without reading their images. Rows that are too large for a pack are not
        recognised.

        Args:
            step: First step.
            broken: Reasons of rows that cannot be encoded, by their place.
        """
        config, wanted = self.config, dict[int, dict[Form, None]]()
        scale = config.rollout_true_cfg_scale

        def check(key: PackKey, prepared: Prepared) -> None:
            if broken and prepared.row.where in broken:
                raise ValueError(broken[prepared.row.where])

        for at in range(step, config.total_steps):
            _, stage = stage_at(config, at)
            try:
                taken, _ = self.take(config.prompts, stage, check, read=False)  # type: ignore[arg-type]
            except BrokenRowsError:  # the run ends there with this error
                break
            for key, _ in taken:
                form = self.encoder.form(key, stage.budget, stage.target_side)
                wanted.setdefault(key[1], {})[form] = None
        return [RowForms(self.dataset, i, tuple(forms), False, scale) for i, forms in wanted.items()]
