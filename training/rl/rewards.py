"""The rewards of a run: weighted functions, which score candidates while other rollouts are generated.

"scene" is the reward that is computed from the scene of generated data, "judge" the endpoint, and
"package.module:function" a function of your own. It takes a `Candidate` and returns scores from 0 to 10 by axis, with
the same axes for every candidate. If it raises `UnscoredError`, that candidate alone fails; any other exception ends
the run, with one line that names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

from uniref_fast.rewards.functions import reward_function
from uniref_fast.rewards.judge import Judge
from uniref_fast.rewards.types import AXES, Candidate, Failure, Scores
from uniref_fast.training.rl.recipes import MSGRPO

__all__ = ["RewardSet"]


class RewardSet:
    """All rewards of a run.

    Args:
        config: Configuration of the run.
        logs: Folder of the judge's logs, which answer calls that were made before; None turns the judge off.
        rank: Rank of this process, which writes `judge-<rank>.jsonl`.
        notify: Function that is called as notify(kind, **details) with outages of the judge.

    Raises:
        ValueError: If a reward does not exist or is given twice, weights are not valid, or a log cannot be read.
    """

    def __init__(self, config: MSGRPO, logs: Path | None, rank: int, notify: Callable[..., None] | None = None) -> None:
        _check(config)
        self.weights = dict(zip(config.rewards, config.reward_weights or (1.0,) * len(config.rewards), strict=True))
        self._own_weights = dict(zip(AXES, config.axis_weights, strict=True))
        self.shares: dict[
            str, float
        ] = {}  # for each axis seen so far, the sum of the weights of the rewards that score it
        self.judge: Judge | None = None
        self._threads = ThreadPoolExecutor(1)  # the other cores belong to the rollouts
        self._functions = {name: reward_function(name) for name in config.rewards if name != "judge"}
        if "judge" in config.rewards and logs is not None:
            old = sorted(logs.glob("judge-*.jsonl"))
            self.judge = Judge(config.judge, logs / f"judge-{rank}.jsonl", notify, earlier=old)

    def submit(self, candidate: Candidate, step: int) -> dict[str, Future[Scores | Failure]]:
        """Ask every reward for scores; return at once."""
        asked = {name: self._threads.submit(function, candidate) for name, function in self._functions.items()}
        return asked if self.judge is None else {**asked, "judge": self.judge.submit(candidate, step)}

    def combined(self, results: Mapping[str, Scores | Failure]) -> dict[str, float] | Failure:
        """Return the weighted mean over the rewards by axis, or a failure if any reward failed.

        Raises:
            ValueError: If all axes that a reward scores have the weight 0, so that it would have no effect.
        """
        totals: dict[str, list[tuple[float, float]]] = {}
        for name, result in results.items():
            if isinstance(result, Failure):
                return Failure(result.kind, f"{name}: {result.reason}")
            if not any(self._own_weights.get(axis, 1.0) for axis in result.axes):
                self._refuse(name, result.axes)
            for axis, score in result.axes.items():
                totals.setdefault(axis, []).append((self.weights[name], score))
        means = {}
        for axis, parts in totals.items():
            self.shares[axis] = sum(weight for weight, _ in parts)
            means[axis] = sum(weight * score for weight, score in parts) / self.shares[axis]
        return means

    def _refuse(self, name: str, axes: Iterable[str]) -> NoReturn:
        weights = ", ".join(f"{axis} {weight:g}" for axis, weight in self._own_weights.items() if weight)
        raise ValueError(
            f"reward {name!r} has no effect: it scores {', '.join(axes)}, with the weight 0 in axis_weights; the axes "
            f"with a weight are {weights or 'none of ' + ', '.join(AXES)}, and each axis of another name. Raise a "
            "weight, or leave out the reward"
        )

    @property
    def axis_weights(self) -> dict[str, float]:
        """Weight of each axis: its own weight times the weights of the rewards that score it."""
        axes = {**self._own_weights, **self.shares}
        return {axis: self._own_weights.get(axis, 1.0) * self.shares.get(axis, 1.0) for axis in axes}

    def total(self, axes: Mapping[str, float]) -> float:
        """Return the weighted mean over the axes, 0 to 10."""
        weights = self.axis_weights
        total = sum(weights.get(axis, 1.0) for axis in axes)
        if not total > 0:
            raise ValueError(
                f"all axes that were scored have the weight 0: {', '.join(axes)}; raise one of axis_weights"
            )
        return sum(weights.get(axis, 1.0) * score for axis, score in axes.items()) / total

    def void(self, step: int) -> None:
        """Mark the judge's failures of a step, so that they are asked again when the run is resumed."""
        if self.judge is not None:
            self.judge.void(step)

    def statistics(self) -> dict[str, float]:
        """Return the statistics of the judge since the last time that they were taken; empty without a judge."""
        return {} if self.judge is None else self.judge.statistics()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self.judge is not None:
            self.judge.close()


def _check(config: MSGRPO) -> None:
    if twice := sorted({name for name in config.rewards if config.rewards.count(name) > 1}):
        raise ValueError(f"rewards given twice: {', '.join(twice)}; raise its reward_weights entry instead")
    if not all(0 < weight < math.inf for weight in config.reward_weights):
        raise ValueError(
            f"reward_weights must be above 0, got {config.reward_weights}; leave out a reward that is not to count"
        )
    if not all(0 <= weight < math.inf for weight in config.axis_weights):
        raise ValueError(f"axis_weights must be at least 0, got {config.axis_weights}")
