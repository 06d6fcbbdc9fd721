"""The rewards of a run: functions in a weighted dict, asked while rollouts go on.

"scene" is the programmatic reward of made data, "judge" the endpoint, and "package.module:function" a function of your
own: it takes a `Candidate` and returns axis -> score, 0 to 10, with any names of axes, the same ones for every
candidate; what it raises as a `UnscoredError` is a failure of that candidate alone, everything else ends the run.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from uniref_fast.training.judge import Judge
from uniref_fast.training.rewards import AXES, Candidate, Failure, Scores
from uniref_fast.training.rl_recipes import MSGRPO
from uniref_fast.training.scene_reward import scene_reward

__all__ = ["RewardSet", "UnscoredError", "reward_function"]

Reward = Callable[[Candidate], "Scores | Failure"]


class UnscoredError(Exception):
    """A candidate that a reward of your own cannot score."""


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


def reward_function(name: str) -> Reward:
    """The reward of that name: "scene", or a function of your own as "package.module:function".

    Raises:
        ValueError: for one that is not there.
    """
    if name == "scene":
        return scene_reward
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f'unknown reward {name!r}; possible: scene, judge, or "package.module:function"')
    if os.getcwd() not in sys.path:  # torchrun puts the folder of its script there alone
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {name!r}: {error}") from error
    if not callable(function):
        raise ValueError(f"reward {name!r} is not a function but {function!r:.80}")
    return lambda candidate: _own(function, name, candidate)


def _own(function: Callable[[Candidate], Any], name: str, candidate: Candidate) -> Scores | Failure:
    try:
        axes = function(candidate)
    except UnscoredError as error:
        return Failure("refused", str(error))
    if not isinstance(axes, Mapping) or not axes or not all(_is_score(value) for value in axes.values()):
        raise ValueError(f"reward {name!r} must return axis -> score from 0 to 10, got {axes!r}")
    return Scores({str(axis): float(value) for axis, value in axes.items()})


def _is_score(value: Any) -> bool:
    if isinstance(value, (str, bytes)):  # float() takes them
        return False
    try:
        return 0 <= float(value) <= 10
    except (TypeError, ValueError):
        return False
