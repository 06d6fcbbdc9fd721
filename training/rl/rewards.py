"""The rewards of a run: functions in a weighted dict, asked while rollouts go on.

"scene" is the programmatic reward of made data, "judge" the endpoint, and "package.module:function" a function of your
own: it takes a `Candidate` and returns axis -> score, 0 to 10, with any names of axes, the same ones for every
candidate; what it raises as a `UnscoredError` is a failure of that candidate alone, everything else ends the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from uniref_fast.rewards.functions import reward_function
from uniref_fast.rewards.judge import Judge
from uniref_fast.rewards.types import AXES, Candidate, Failure, Scores
from uniref_fast.training.rl.recipes import MSGRPO

__all__ = ["RewardSet"]


class RewardSet:
    """Asks all rewards of a run about a candidate.

    Args:
        config: of the run.
        logs: folder of the judge's logs, which answer what was asked before; None asks no judge whatever the config
            says.
        rank: of this process; its log is `judge-<rank>.jsonl`.
        notify: takes (kind, **details) of the judge's outages.

    Raises:
        ValueError: for a reward that is not there or given twice, weights that give no mean, or a judge's log that
            cannot be read.
    """

    def __init__(self, config: MSGRPO, logs: Path | None, rank: int, notify: Callable[..., None] | None = None) -> None:
        _check(config)
        self.weights = dict(zip(config.rewards, config.reward_weights or (1.0,) * len(config.rewards), strict=True))
        self._own_weights = dict(zip(AXES, config.axis_weights, strict=True))
        self.shares: dict[str, float] = {}  # of each axis seen so far: the weights of the rewards that score it
        self.judge: Judge | None = None
        self._threads = ThreadPoolExecutor(1)  # a core stays with the rollouts
        self._functions = {name: reward_function(name) for name in config.rewards if name != "judge"}
        if "judge" in config.rewards and logs is not None:
            old = sorted(logs.glob("judge-*.jsonl"))
            self.judge = Judge(config.judge, logs / f"judge-{rank}.jsonl", notify, earlier=old)

    def submit(self, candidate: Candidate, step: int) -> dict[str, Future[Scores | Failure]]:
        """Ask every reward; returns at once."""
        asked = {name: self._threads.submit(function, candidate) for name, function in self._functions.items()}
        return asked if self.judge is None else {**asked, "judge": self.judge.submit(candidate, step)}

    def combined(self, results: Mapping[str, Scores | Failure]) -> dict[str, float] | Failure:
        """Axis -> weighted mean over the rewards that score it; a failure where any of them failed."""
        totals: dict[str, list[tuple[float, float]]] = {}
        for name, result in results.items():
            if isinstance(result, Failure):
                return Failure(result.kind, f"{name}: {result.reason}")
            for axis, score in result.axes.items():
                totals.setdefault(axis, []).append((self.weights[name], score))
        made = {}
        for axis, parts in totals.items():
            self.shares[axis] = sum(weight for weight, _ in parts)
            made[axis] = sum(weight * score for weight, score in parts) / self.shares[axis]
        return made

    @property
    def axis_weights(self) -> dict[str, float]:
        """What each axis counts: its own weight times those of the rewards that score it."""
        axes = {**self._own_weights, **self.shares}
        return {axis: self._own_weights.get(axis, 1.0) * self.shares.get(axis, 1.0) for axis in axes}

    def total(self, axes: Mapping[str, float]) -> float:
        """Weighted mean over the axes, 0 to 10."""
        weights = self.axis_weights
        total = sum(weights.get(axis, 1.0) for axis in axes)
        if not total > 0:
            raise ValueError(f"axis_weights leave nothing of what was scored: {', '.join(axes)} weigh 0")
        return sum(weights.get(axis, 1.0) * score for axis, score in axes.items()) / total

    def void(self, step: int) -> None:
        """Have failures of a step asked again when the run is resumed."""
        if self.judge is not None:
            self.judge.void(step)

    def statistics(self) -> dict[str, float]:
        return {} if self.judge is None else self.judge.statistics()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self.judge is not None:
            self.judge.close()


def _check(config: MSGRPO) -> None:
    if twice := sorted({name for name in config.rewards if config.rewards.count(name) > 1}):
        raise ValueError(f"rewards given twice: {', '.join(twice)}; reward_weights make one count more")
    if not all(0 < weight < math.inf for weight in config.reward_weights):
        raise ValueError(f"reward_weights must be above 0, got {config.reward_weights}; leave out what does not count")

    if not all(0 <= weight < math.inf for weight in config.axis_weights):
        raise ValueError(f"axis_weights must be at least 0, got {config.axis_weights}")
