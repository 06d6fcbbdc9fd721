"""Figures of a run with rewards: of a step, of a validation, of the judge; and a detector of reward hacking."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from uniref_fast.rewards.types import Failure
from uniref_fast.training.rl.generator import Batch
from uniref_fast.training.rl.grpo import Advantages, StepLoss
from uniref_fast.training.rl.recipes import MSGRPO

__all__ = [
    "RewardHackingDetector", "UpdateStatistics", "judge_metrics", "mean", "nothing_to_learn", "step_metrics",
    "validation_metrics",
]  # fmt: skip

Scores = Mapping[Any, Mapping[str, float]]  # scores by axis of each member that has scores
Total = Callable[[Mapping[str, float]], float]  # weighted mean over the axes
SIGNIFICANT = 3.0  # standard errors by which quality must have fallen


@dataclass
class UpdateStatistics:
    """Statistics of the updates of one step on one rank.

    Attributes:
        loss: Mean loss of the updates.
        ratios: Probability ratio of every trained noisy step.
        clipped: Number of them whose gradient clipping stopped.
        kl: Divergence from the reference policy of every trained noisy step.
    """

    loss: float = 0.0
    ratios: list[float] = field(default_factory=list)
    clipped: int = 0
    kl: list[float] = field(default_factory=list)

    def count(self, one: StepLoss) -> None:
        """Count one noisy step of one member."""
        self.ratios.append(one.ratio)
        self.clipped += one.clipped
        if one.kl is not None:
            self.kl.append(one.kl)

    def add(self, update: UpdateStatistics, share: float) -> None:
        """Add the statistics of one update, whose loss counts with a share."""
        self.loss += share * update.loss
        self.ratios += update.ratios
        self.clipped += update.clipped
        self.kl += update.kl


def step_metrics(
    batch: Batch,
    results: Mapping[Any, Any],
    scores: Scores,
    advantage: Advantages,
    updates: Sequence[UpdateStatistics],
    total: Total,
) -> dict[str, float]:
    """Return the figures of a step.

    Args:
        batch: Rollouts of the step.
        results: Scores or failure of every member.
        scores: Scores of the members that have scores.
        advantage: Advantages of the step.
        updates: Statistics of one rank of each group of ranks that share packs.
        total: Function that returns the weighted mean over the axes.
    """
    ratios = [ratio for part in updates for ratio in part.ratios] or [1.0]
    kl = [value for part in updates for value in part.kl]
    totals = [total(axes) for axes in scores.values()]
    metrics = {
        "reward": mean(totals),
        "reward_std": _std(totals),
        "group_std": advantage.group_std,
        "ratio": mean(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "clip_fraction": sum(part.clipped for part in updates) / len(ratios),
        "zero_spread": advantage.zero_spread / len(batch.groups),
        "too_few": advantage.too_few / len(batch.groups),
        "failures": sum(isinstance(result, Failure) for result in results.values()) / len(results),
        "rollout/tokens_per_second": batch.tokens / batch.seconds,
    }
    for axis, values in _by_axis(scores).items():
        metrics |= {f"reward/{axis}": mean(values), f"reward_std/{axis}": _std(values)}
    if kl:
        metrics["kl"] = mean(kl)
    return metrics


def nothing_to_learn(advantage: Advantages, config: MSGRPO) -> str:
    """Return the reason, in words, why no group of a step is trained on.

    Args:
        advantage: Advantages of the step.
        config: Configuration of the run.
    """
    reasons = []
    if count := advantage.zero_spread:
        groups = "a group" if count == 1 else f"each of {count} groups"
        equal = "equal" if config.advantage == "sum" else "equal, or their axes cancel each other"
        reasons.append(f"all {config.group} rewards of {groups} are {equal}")
    if count := advantage.too_few:
        groups = "a group has" if count == 1 else f"{count} groups have"
        reasons.append(f"{groups} fewer than min_members = {config.min_members} rollouts with scores")
    return "; ".join(reasons)


def validation_metrics(name: str, results: Mapping[Any, Any], total: Total) -> dict[str, float]:
    """Return the mean scores of a held-out file, as "eval/<name>", "eval/<name>/<axis>" and "eval/<name>/failures".

    Args:
        name: Name of the file.
        results: Scores or failure of every member.
        total: Function that returns the weighted mean over the axes.
    """
    scores = {key: result for key, result in results.items() if not isinstance(result, Failure)}
    if not scores:
        return {}
    metrics = {f"eval/{name}": mean([total(axes) for axes in scores.values()])}
    metrics |= {f"eval/{name}/{axis}": mean(values) for axis, values in _by_axis(scores).items()}
    if len(scores) < len(results):
        metrics[f"eval/{name}/failures"] = 1 - len(scores) / len(results)
    return metrics


def judge_metrics(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the statistics of all ranks' judges as one.

    Counts are summed, shares are weighed by calls, and seconds by the calls that were not replayed.
    """
    parts = [part for part in parts if part.get("calls")]
    if not parts:
        return {}
    counts = ("calls", "retries", "replayed")
    metrics = {f"judge/{name}": sum(part[name] for part in parts) for name in counts}
    for name in sorted({name for part in parts for name in part} - {*counts}):
        weights = [part["calls"] - part["replayed"] * name.startswith("seconds") for part in parts]
        weighted = sum(part.get(name, 0.0) * weight for part, weight in zip(parts, weights, strict=True))
        metrics[f"judge/{name}"] = weighted / max(sum(weights), 1.0)
    return metrics


def _by_axis(scores: Scores) -> dict[str, list[float]]:
    axes = sorted({axis for values in scores.values() for axis in values})
    return {axis: [values[axis] for values in scores.values() if axis in values] for axis in axes}


def mean(values: Sequence[float]) -> float:
    """Return the mean; NaN without values."""
    return math.fsum(values) / len(values) if values else math.nan


def _std(values: Sequence[float]) -> float:
    centre = mean(values)
    return math.sqrt(mean([(value - centre) ** 2 for value in values])) if values else math.nan


class RewardHackingDetector:
    """Detects that the reward rises while the quality axis falls: the policy exploits what the rewards do not measure.

    Args:
        steps: Number of latest steps that are compared; 0 turns the detector off.
        state: Return value of `state()` to continue from.
    """

    def __init__(self, steps: int, state: Sequence[Sequence[float]] | None = None) -> None:
        self.steps = steps
        self._past: list[tuple[float, float, float]] = [(s, reward, quality) for s, reward, quality in state or ()]

    def state(self) -> list[list[float]]:
        """Return (stage, reward, quality) of the latest steps, for JSON."""
        return [list(one) for one in self._past]

    def add(self, stage: int, reward: float, quality: float) -> str:
        """Add the means of a step.

        The second half of the compared steps is compared with the first half. A new stage has other prompts, so the
        comparison starts again.

        Returns:
            A warning, or an empty string.
        """
        past = [one for one in self._past if one[0] == stage]
        self._past = [*past, (stage, reward, quality)][-self.steps :] if self.steps else []
        if len(self._past) < self.steps or self.steps < 4:
            return ""
        half = self.steps // 2
        before, after = self._past[:half], self._past[-half:]
        rise, _ = _change([one[1] for one in before], [one[1] for one in after])
        fall, error = _change([one[2] for one in before], [one[2] for one in after])
        if rise <= 0 or fall >= -SIGNIFICANT * error:
            return ""
        self._past = []  # warn once, then compare later steps only
        return (
            f"over {self.steps} steps the reward rose by {rise:.2f} while its quality axis fell by {-fall:.2f}: look "
            "at the sample grids; a lower lr, a kl weight or more weight on quality hold it back"
        )


def _change(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Return the difference of the means, and its standard error."""

    def moments(values: Sequence[float]) -> tuple[float, float]:
        centre = math.fsum(values) / len(values)
        return centre, math.fsum((value - centre) ** 2 for value in values) / max(len(values) - 1, 1) / len(values)

    (first, error1), (second, error2) = moments(before), moments(after)
    return second - first, math.sqrt(error1 + error2)
