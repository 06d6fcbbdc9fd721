"""Group relative policy optimisation: advantages within groups, and the clipped objective of one noisy step.

A member without scores (`Failure`) is in no mean and no standard deviation and is not trained on. A group whose members
all have the same score carries no information: it is dropped and counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from uniref_fast.keyed_random import draw
from uniref_fast.training.rl.recipes import MSGRPO
from uniref_fast.training.rl.rollout import NoisyStep
from uniref_fast.training.rl.sde import Transition, divergence, log_density

__all__ = ["Advantages", "Objective", "StepLoss", "advantages", "clipped_loss", "guarded_log_ratio", "minibatches"]

MemberKey = tuple[int, ...]  # (epoch, index of the row, number of the member)
Groups = Sequence[Sequence[MemberKey]]
Values = Mapping[MemberKey, float]
Scale = Literal["group", "batch"]

SAME = 1e-6  # scores of 0..10 whose standard deviation is below this count as equal
CANCELLED = 0.01  # smallest standard deviation left after axes cancel each other; FLOOR makes cancelling inexact
FLOOR = 1e-4  # added to a standard deviation, so that a tiny one does not give a large advantage


# ---- advantages ----


@dataclass(frozen=True)
class Advantages:
    """Advantages of one step, and counts of the groups that are not trained on.

    Attributes:
        values: Advantage of each member that is trained on, clipped.
        zero_spread: Number of groups whose members all have the same score.
        too_few: Number of groups with too few scored members.
        group_std: Mean over the remaining groups of the standard deviation of the weighted sum; 0 if none remains.
    """

    values: Values
    zero_spread: int
    too_few: int
    group_std: float


def advantages(
    scores: Mapping[Any, Mapping[str, float]],
    groups: Sequence[Sequence[Any]],
    weights: Mapping[str, float],
    *,
    kind: Literal["sum", "per_axis"] = "sum",
    std: Scale = "group",
    min_members: int = 2,
    clip: float = 5.0,
) -> Advantages:
    """Return the advantages of one step's rollouts.

    The order is: drop the groups that carry no information, centre each group on its own mean (the prompt's difficulty
    is no merit of the policy), scale to unit size, and clip.

    Args:
        scores: Scores by axis of each member that has scores.
        groups: Keys of all members, group by group.
        weights: Weight of each axis; an axis without an entry weighs 1.
        kind: "sum" centres and scales the weighted sum of the axes. "per_axis" (GDPO, arXiv 2601.05242) centres and
            scales each axis alone, sums the results with their weights, and divides by the root mean square over the
            step, so that an axis with a small range counts as much as one with a large range.
        std: Standard deviation to divide by. "group": the (population) standard deviation of the member's own group;
            "batch": the standard deviation of the centred values of all groups.
        min_members: Smallest number of scored members of a group that is trained on.
        clip: Largest absolute value of an advantage.

    Raises:
        ValueError: If members are scored on different axes.
    """
    axes = _common_axes(scores)
    weigh = {axis: weights.get(axis, 1.0) for axis in axes}
    scored, too_few = _with_enough_scores(groups, scores, min_members)
    # A group is dropped before the scale is computed: zeros would shrink the standard deviation of the batch.
    valid = [group for group in scored if any(_varies(group, scores, axis) for axis in axes if weigh[axis])]
    totals = {key: sum(weigh[axis] * scores[key][axis] for axis in axes) for group in valid for key in group}
    if kind == "sum":
        remaining = [group for group in valid if _std_of(group, totals) > SAME]
        values = _normalised(remaining, totals, std)
    else:
        parts = {axis: _normalised(valid, _axis_scores(valid, scores, axis), std) for axis in axes}
        sums = {key: 0.0 for group in valid for key in group}
        for axis in axes:
            sums = {key: value + weigh[axis] * parts[axis][key] for key, value in sums.items()}
        remaining = [group for group in valid if _std_of(group, sums) > CANCELLED]
        values = _unit_size({key: sums[key] for group in remaining for key in group})
    stds = [_std_of(group, totals) for group in remaining]
    return Advantages(
        {key: min(max(value, -clip), clip) for key, value in values.items()},
        len(scored) - len(remaining),
        too_few,
        sum(stds) / len(stds) if stds else 0.0,
    )


def _common_axes(scores: Mapping[Any, Mapping[str, float]]) -> list[str]:
    axes = sorted({axis for values in scores.values() for axis in values})
    for member, scored_on in scores.items():
        if len(scored_on) < len(axes):
            has = ", ".join(scored_on) or "none"
            raise ValueError(f"every rollout must be scored on the same axes, {', '.join(axes)}; {member} has {has}")
    return axes


def _with_enough_scores(groups: Groups, scores: Mapping[Any, Any], least: int) -> tuple[list[list[MemberKey]], int]:
    """Return the scored members of each group that has enough of them, and the number of the other groups."""
    scored = [[key for key in group if key in scores] for group in groups]
    enough = [group for group in scored if len(group) >= least]
    return enough, len(scored) - len(enough)


def _axis_scores(groups: Groups, scores: Mapping[Any, Mapping[str, float]], axis: str) -> dict[MemberKey, float]:
    return {key: scores[key][axis] for group in groups for key in group}


def _varies(group: Sequence[MemberKey], scores: Mapping[Any, Mapping[str, float]], axis: str) -> bool:
    return _std([scores[key][axis] for key in group]) > SAME


def _normalised(groups: Groups, values: Values, std: Scale) -> dict[MemberKey, float]:
    """Return the values, centred on the mean of their group and divided by a standard deviation."""
    centred = _centred(groups, values)
    if std == "batch":
        size = _root_mean_square(centred.values())
        return {key: value / (size + FLOOR) for key, value in centred.items()}
    return {key: centred[key] / (_std_of(group, values) + FLOOR) for group in groups for key in group}


def _centred(groups: Groups, values: Values) -> dict[MemberKey, float]:
    means = [sum(values[key] for key in group) / len(group) for group in groups]
    return {key: values[key] - mean for group, mean in zip(groups, means, strict=True) for key in group}


def _unit_size(values: Values) -> dict[MemberKey, float]:
    size = _root_mean_square(values.values())
    return {key: value / max(size, FLOOR) for key, value in values.items()}


def _root_mean_square(values: Any) -> float:
    return math.sqrt(sum(value**2 for value in values) / max(len(values), 1))


def _std_of(group: Sequence[MemberKey], values: Values) -> float:
    return _std([values[key] for key in group])


def _std(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


# ---- the objective ----


@dataclass(frozen=True)
class StepLoss:
    """Loss of one noisy step of one member.

    Attributes:
        loss: Scalar with a gradient.
        ratio: Probability of the step under the current policy, divided by its probability in the rollout.
        clipped: True if clipping stops the gradient of this step.
        kl: Divergence from the reference policy; None without a reference.
    """

    loss: Tensor
    ratio: float
    clipped: bool
    kl: float | None


@dataclass(frozen=True)
class Objective:
    """The clipped objective against the policy of the rollouts.

    Attributes:
        clip: The ratio counts down to 1 - clip.
        clip_high: The ratio counts up to 1 + clip_high.
        ratio_guard: If True, ratios are normalised as GRPO-Guard does, and steps are weighed by their noise.
        kl: Weight of the divergence from the reference policy.
    """

    clip: float
    clip_high: float
    ratio_guard: bool = False
    kl: float = 0.0

    @classmethod
    def from_config(cls, config: MSGRPO) -> Objective:
        """Return the objective of a run; without `clip_high` the clip is symmetric."""
        return cls(
            config.clip, config.clip if config.clip_high is None else config.clip_high, config.ratio_guard, config.kl
        )

    def __call__(
        self,
        step: Transition,
        taken: NoisyStep,
        advantage: float,
        *,
        noise: Tensor | None = None,
        dt: float = 1.0,
        reference: Transition | None = None,
    ) -> StepLoss:
        """Return the loss of one noisy step.

        Args:
            step: Transition of the step under the current policy, with gradients.
            taken: Step as the rollout took it.
            advantage: Advantage of the member.
            noise: Standard normal noise of the step in the rollout, `[N, C]`; used with `ratio_guard` only.
            dt: Length of the step, t - t_next, above 0; used with `ratio_guard` only.
            reference: Transition of the step under the reference policy; None adds no divergence.
        """
        log_ratio = log_density(taken.after, step) - taken.log_prob
        ratio, weight = log_ratio.exp().item(), 1.0
        if self.ratio_guard:
            assert noise is not None
            log_ratio = guarded_log_ratio(log_ratio, step.mean, taken.after - step.std * noise, step.std)
            weight = 1.0 / dt
        loss, clipped = clipped_loss(log_ratio, advantage, self.clip, self.clip_high)
        loss = weight * loss
        if reference is None:
            return StepLoss(loss, ratio, clipped, None)
        kl = divergence(step, reference)
        return StepLoss(loss + self.kl * kl, ratio, clipped, kl.item())


def clipped_loss(log_ratio: Tensor, advantage: float, clip: float, clip_high: float) -> tuple[Tensor, bool]:
    """Return the loss of one step of one member, a scalar, and True if clipping stops its gradient.

    Args:
        log_ratio: Log-probability of the step now minus that in the rollout; a scalar.
        advantage: Advantage of the member.
        clip: The ratio counts down to 1 - clip.
        clip_high: The ratio counts up to 1 + clip_high.
    """
    ratio = log_ratio.exp()
    free, held = advantage * ratio, advantage * ratio.clamp(1 - clip, 1 + clip_high)
    return -torch.minimum(free, held), bool(held < free)


def guarded_log_ratio(log_ratio: Tensor, mean: Tensor, rollout_mean: Tensor, std: float) -> Tensor:
    """Return the normalised log-ratio of GRPO-Guard (arXiv 2510.22319).

    It has no bias below 0, and the same scale for steps with different noise.

    Args:
        log_ratio: Log-probability of the step now minus that in the rollout; a scalar.
        mean: Mean of the step's Gaussian under the current policy, `[N, C]`.
        rollout_mean: Mean of the step's Gaussian in the rollout, `[N, C]`.
        std: Standard deviation of both Gaussians.
    """
    shift = (mean - rollout_mean).square().mean() / (2 * std**2)
    return (log_ratio + shift) * std


# ---- minibatches ----


def minibatches(
    noisy_steps: int, trained_steps: int, updates: int, *, seed: int, step: int, epoch: int
) -> list[list[int]]:
    """Return the numbers of the noisy steps that each update of an inner epoch trains on.

    All epochs of a step train on the same noisy steps, drawn for the step, and divide them among their updates in an
    order of their own. Any rank count gives the same result.

    Args:
        noisy_steps: Number of noisy steps of a rollout.
        trained_steps: Number of them that a step of the run trains on.
        updates: Number of optimizer steps of an epoch.
        seed: Seed of the run.
        step: Number of the step of the run.
        epoch: Number of the inner epoch.
    """
    drawn = torch.randperm(noisy_steps, generator=draw(seed, "timesteps", (step,)))
    chosen = sorted(drawn[:trained_steps].tolist())
    order = torch.randperm(len(chosen), generator=draw(seed, "slots", (step, epoch))).tolist()
    return [[chosen[i] for i in order[part::updates]] for part in range(updates)]
