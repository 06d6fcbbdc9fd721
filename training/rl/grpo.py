"""From scores to gradients: advantages within groups, and the clipped objective against the rollout's own policy.

A member without scores (`Failure`) is in no mean and no standard deviation and is not trained on. A group whose
members all score alike says nothing: it is dropped, and counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Advantages", "advantages", "guarded_log_ratio", "objective"]

Key = tuple[int, ...]
SAME = 1e-6  # scores of 0..10 that differ less are alike
CANCELLED = 0.01  # of their standard deviations, that axes may leave of each other: the floor makes them uneven
FLOOR = 1e-4  # keeps a tiny spread from becoming a large advantage


@dataclass(frozen=True)
class Advantages:
    """What is trained on, and what is not.

    Attributes:
        values: of each member that is trained on, clipped.
        zero_spread: groups whose members scored alike.
        too_few: groups with too few scored members.
        spread: mean standard deviation of the total within the groups that are left; 0 without any.
    """

    values: Mapping[Key, float]
    zero_spread: int
    too_few: int
    spread: float


def advantages(
    scores: Mapping[Any, Mapping[str, float]],
    groups: Sequence[Sequence[Any]],
    weights: Mapping[str, float],
    *,
    kind: Literal["sum", "per_axis"] = "sum",
    spread: Literal["group", "batch"] = "group",
    min_members: int = 2,
    clip: float = 5.0,
) -> Advantages:
    """Advantages of a step's rollouts.

    Args:
        scores: of each member that has them, by axis.
        groups: keys of all members, by group.
        weights: of the axes; one that is not named weighs 1.
        kind: "sum": deviation of the weighted sum from its group's mean over its standard deviation. "per_axis"
            (GDPO, arXiv 2601.05242): that for each axis alone, summed with weights and divided by its root mean square
            over the step, so that an axis with a small range counts as much as one with a large one.
        spread: "group": a group's own (population) standard deviation; "batch": that of all groups' deviations.
        min_members: a group with fewer scored members is left out.
        clip: largest size.

    Raises:
        ValueError: for members that are scored on unlike axes.
    """
    axes = sorted({axis for values in scores.values() for axis in values})
    for member, scored_on in scores.items():
        if len(scored_on) < len(axes):
            has = ", ".join(scored_on) or "none"
            raise ValueError(f"every rollout must be scored on the same axes, {', '.join(axes)}; {member} has {has}")
    kept: list[list[Key]] = []
    zero = few = 0
    for group in groups:
        scored = [key for key in group if key in scores]
        if len(scored) < min_members:
            few += 1
        elif not any(_std([scores[k][a] for k in scored]) > SAME for a in axes if weights.get(a, 1.0)):
            zero += 1
        else:
            kept.append(scored)
    totals = {key: sum(weights.get(a, 1.0) * scores[key][a] for a in axes) for group in kept for key in group}
    values = totals
    if kind == "per_axis":
        values = {key: 0.0 for group in kept for key in group}
        for axis in axes:
            one = _normalised(kept, {key: scores[key][axis] for group in kept for key in group}, spread)
            values = {key: value + weights.get(axis, 1.0) * one[key] for key, value in values.items()}
    least = SAME if kind == "sum" else CANCELLED
    left = [group for group in kept if _std([values[key] for key in group]) > least]
    zero += len(kept) - len(left)
    if kind == "sum":
        values = _normalised(left, totals, spread)
    else:
        values = {key: values[key] for group in left for key in group}
        size = math.sqrt(sum(value**2 for value in values.values()) / max(len(values), 1))
        values = {key: value / max(size, FLOOR) for key, value in values.items()}
    inside = [_std([totals[key] for key in group]) for group in left]
    return Advantages(
        {key: min(max(value, -clip), clip) for key, value in values.items()},
        zero,
        few,
        sum(inside) / len(inside) if inside else 0.0,
    )


def _normalised(groups: Sequence[Sequence[Key]], values: Mapping[Key, float], spread: str) -> dict[Key, float]:
    means = [sum(values[key] for key in group) / len(group) for group in groups]
    deviations = {key: values[key] - mean for group, mean in zip(groups, means, strict=True) for key in group}
    if spread == "batch":
        size = math.sqrt(sum(d**2 for d in deviations.values()) / max(len(deviations), 1))
        return {key: d / (size + FLOOR) for key, d in deviations.items()}
    sizes = [_std([values[key] for key in group]) for group in groups]
    return {key: deviations[key] / (size + FLOOR) for group, size in zip(groups, sizes, strict=True) for key in group}


def _std(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def objective(log_ratio: Tensor, advantage: float, clip: float, clip_high: float) -> tuple[Tensor, bool]:
    """Loss of one step of one member, a scalar, and whether clipping holds its gradient back.

    Args:
        log_ratio: log-probability of the step now, less that of the rollout; a scalar.
        advantage: of the member.
        clip, clip_high: the ratio counts from 1 - clip to 1 + clip_high.
    """
    ratio = log_ratio.exp()
    free, held = advantage * ratio, advantage * ratio.clamp(1 - clip, 1 + clip_high)
    return -torch.minimum(free, held), bool(held < free)


def guarded_log_ratio(log_ratio: Tensor, mean: Tensor, rollout_mean: Tensor, std: float) -> Tensor:
    """GRPO-Guard (arXiv 2510.22319): without the ratio's bias below 1, and on one scale for steps of unlike noise.

    Args:
        log_ratio: as `objective` has it.
        mean, rollout_mean: of the step's Gaussian now, and in the rollout.
        std: of the Gaussian.
    """
    shift = (mean - rollout_mean).square().mean() / (2 * std**2)
    return (log_ratio + shift) * std
