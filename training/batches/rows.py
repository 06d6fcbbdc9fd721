"""The rows of a run in their shuffled order, and a record of the rows that could not be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from uniref_fast.data.dataset import BrokenRowsError, Dataset
from uniref_fast.training.batches.order import ShuffledOrder
from uniref_fast.training.batches.packing import PackKey
from uniref_fast.training.core.recipe import Recipe

__all__ = ["TrainingRows", "check_same_rows", "row_weights"]


class TrainingRows:
    """Gives out the keys of rows in order; all ranks make the same calls and get the same keys.

    Args:
        dataset: Dataset of the run.
        config: Configuration of the run: its seed, the weights of its data, and how many broken rows it allows.
        state: Result of `state()`, to continue from there; None starts at the first row.

    Attributes:
        scheduled: Number of rows that come at all; rows of weight 0 never come.
        broken: Places of the rows that could not be used.

    Raises:
        ValueError: The state belongs to other data.
    """

    def __init__(self, dataset: Dataset, config: Recipe, state: Mapping[str, Any] | None = None) -> None:
        self.dataset, self.config = dataset, config
        weights = row_weights(config, dataset)
        self.scheduled = len(dataset) if weights is None else sum(weight > 0 for weight in weights)
        if state is None:
            self._order, self.broken = ShuffledOrder(len(dataset), config.seed, weights), set[str]()
            return
        if state["data"] != dataset.fingerprint:
            raise ValueError(
                "this run was trained on other data so far; give the same files, or start another "
                "run with another --out"
            )
        self._order = ShuffledOrder.from_state(len(dataset), config.seed, state["stream"], weights)
        self.broken = set(state["broken"])

    def state(self) -> dict[str, Any]:
        """Return what determines the rows that come next, for JSON."""
        return {"data": self.dataset.fingerprint, "stream": self._order.state(), "broken": sorted(self.broken)}

    def take(self, count: int) -> list[PackKey]:
        """Return the keys (epoch, index) of the next rows."""
        return self._order.take(count)

    def count_broken(self, rows: Sequence[tuple[str, str]], new: int | None = None) -> None:
        """Count rows that could not be used; a row that comes again in another epoch counts once.

        Args:
            rows: (place, reason) of each row.
            new: Number of rows, at the end of `rows`, that are not counted yet; None counts all of them.

        Raises:
            BrokenRowsError: There are more broken rows than the run allows, or no other rows.
        """
        first = 0 if new is None else len(rows) - new
        self.broken.update(where for where, _ in rows[first:])
        most = self.config.max_broken
        if len(self.broken) > most or len(self.broken) == self.scheduled:
            last = "; ".join(f"{where}: {reason}" for where, reason in rows[-3:])
            limit = f"over max_broken = {most}" if len(self.broken) > most else "all of them"
            raise BrokenRowsError(
                f"{len(self.broken)} rows could not be used, {limit}; the last: {last}. `uniref-fast data check` lists "
                "all"
            )


def check_same_rows(planned: Sequence[tuple[Sequence[PackKey], Sequence[tuple[str, str]]]]) -> None:
    """Check that all ranks have planned the same rows: one rank may fail to read a file that others can read.

    Args:
        planned: One entry per rank: the keys of its rows, and (place, reason) of the rows that it left out.

    Raises:
        BrokenRowsError: The ranks have planned different rows.
    """
    if any(list(keys) != list(planned[0][0]) for keys, _ in planned):
        broken = [f"rank {rank}: {': '.join(row)}" for rank, (_, rows) in enumerate(planned) for row in rows]
        raise BrokenRowsError(
            "the ranks read different rows; every rank needs the same files. "
            f"Broken rows of this step: {'; '.join(broken[:6]) or 'none; an earlier step had one'}"
        )


def row_weights(config: Recipe, dataset: Dataset) -> list[float] | None:
    """Return the occurrences per epoch of each row of the dataset, `[len(dataset)]`; None if each row comes once."""
    if not config.weights:
        return None
    lengths = dataset.path_lengths
    return [weight for weight, length in zip(config.weights, lengths, strict=True) for _ in range(length)]
