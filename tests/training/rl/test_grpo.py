"""Advantages within groups, with failures left out; the clipped objective and its gradient."""

import math

import pytest
import torch

from uniref_fast.training.rl.grpo import FLOOR, Objective, advantages, clipped_loss, guarded_log_ratio, minibatches
from uniref_fast.training.rl.recipes import MSGRPO, RLStage
from uniref_fast.training.rl.rollout import NoisyStep
from uniref_fast.training.rl.sde import Transition, divergence, log_density

W = {"a": 1.0, "b": 1.0}


def scores(*groups, axis="a", **more):
    """Scores of one axis by group, as (scores, groups); None is a failure."""
    values, keys = {}, []
    for g, group in enumerate(groups):
        keys.append([(0, g, m) for m in range(len(group))])
        values |= {key: {axis: value, **more} for key, value in zip(keys[-1], group, strict=True) if value is not None}
    return values, keys


def test_deviation_over_the_groups_own_spread():
    made = advantages(*scores([1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 7.0, 7.0]), W)
    std = math.sqrt((4 + 1 + 0 + 9) / 4)
    expected = [(x - 3) / (std + FLOOR) for x in (1, 2, 3, 6)] + [x / (1 + FLOOR) for x in (-1, -1, 1, 1)]
    assert list(made.values.values()) == pytest.approx(expected, rel=1e-12)
    assert (made.zero_spread, made.too_few) == (0, 0) and made.group_std == pytest.approx((std + 1) / 2)


def test_batch_spread_is_that_of_all_deviations():
    made = advantages(*scores([0.0, 4.0], [5.0, 5.2]), W, std="batch")
    std = math.sqrt((4 + 4 + 0.01 + 0.01) / 4)
    assert list(made.values.values()) == pytest.approx([d / (std + FLOOR) for d in (-2, 2, -0.1, 0.1)])


def test_groups_without_spread_are_dropped_and_counted():
    made = advantages(*scores([3.0, 3.0, 3.0], [1.0, 2.0, 3.0], [0.0, 0.0, 1e-9]), W)
    assert made.zero_spread == 2 and {key[1] for key in made.values} == {1}
    nothing = advantages(*scores([3.0, 3.0]), W)
    assert nothing.values == {} and nothing.group_std == 0


def test_failures_leave_the_statistics_as_if_they_had_not_been():
    with_failures = advantages(*scores([1.0, None, 2.0, None, 3.0], [4.0, 8.0, 4.0]), W)
    without = advantages(*scores([1.0, 2.0, 3.0], [4.0, 8.0, 4.0]), W)
    assert sorted(with_failures.values.values()) == sorted(without.values.values())
    assert (0, 0, 1) not in with_failures.values and with_failures.group_std == without.group_std


def test_groups_with_too_few_scores():
    made = advantages(*scores([1.0, None, None], [1.0, 2.0, None], [1.0, 2.0, 3.0], [None] * 3), W, min_members=3)
    assert made.too_few == 3 and {key[1] for key in made.values} == {2}


def test_unlike_axes_are_refused():
    with pytest.raises(ValueError, match=r"same axes, mood, quality; \(0, 0, 1\) has mood"):
        advantages({(0, 0, 0): {"quality": 1.0, "mood": 2.0}, (0, 0, 1): {"mood": 3.0}}, [[(0, 0, 0), (0, 0, 1)]], {})


def test_clipped():
    made = advantages(*scores([0.0] * 99 + [1.0]), W, clip=5.0)
    assert max(made.values.values()) == 5.0


def test_sum_of_axes_with_weights():
    values, groups = scores([1.0, 2.0], axis="a")
    values[0, 0, 0]["b"], values[0, 0, 1]["b"] = 5.0, 3.0
    one = advantages(values, groups, {"a": 1.0, "b": 1.0}).values
    two = advantages(values, groups, {"a": 3.0, "b": 1.0}).values
    assert one[0, 0, 0] > 0 > one[0, 0, 1] and two[0, 0, 0] < 0 < two[0, 0, 1]
    cancelled = advantages(values, groups, {"a": 2.0, "b": 1.0})
    assert cancelled.values == {} and cancelled.zero_spread == 1
    assert advantages(values, groups, {"a": 0.0, "b": 0.0}).zero_spread == 1


def test_each_axis_on_its_own_counts_alike_whatever_its_range():
    values, groups = scores([1.0, 2.0, 3.0, 4.0], axis="a")
    for key, small in zip(groups[0], (0.03, 0.01, 0.04, 0.02), strict=True):
        values[key]["b"] = small
    one = advantages(values, groups, W, kind="per_axis").values
    for value in values.values():
        value["b"] *= 100
    assert list(advantages(values, groups, W, kind="per_axis").values.values()) == pytest.approx(
        list(one.values()), abs=2e-2
    )
    assert math.sqrt(sum(v**2 for v in one.values()) / 4) == pytest.approx(1.0)
    only = advantages(values, groups, {"a": 1.0, "b": 0.0}, kind="per_axis").values
    assert sorted(only, key=only.get) == groups[0]


@pytest.mark.parametrize("kind", ["sum", "per_axis"])
@pytest.mark.parametrize("std", ["group", "batch"])
def test_groups_whose_axes_cancel_are_dropped_and_counted(kind, std):
    """The standard deviation is that of the remaining groups."""
    values, groups = scores([1.0, 2.0], [1.0, 3.0], axis="a")
    for key, b in zip([*groups[0], *groups[1]], (5.0, 4.0, 2.0, 2.0), strict=True):
        values[key]["b"] = b
    if kind == "per_axis" and std == "batch":  # there each axis is divided by its own spread over all groups
        values[groups[1][0]]["b"], values[groups[1][1]]["b"] = 4.0, 6.0
    made = advantages(values, groups, W, kind=kind, std=std)
    assert made.zero_spread == 1 and list(made.values) == groups[1]
    alone = advantages({key: values[key] for key in groups[1]}, groups[1:], W, kind=kind, std=std)
    assert made.group_std == alone.group_std and made.values == pytest.approx(alone.values)
    few = [0.1, 0.2], [30.0, 10.0]  # the same order of axes of unlike range
    small, one = scores(few[0], axis="a")
    for key, b in zip(one[0], few[1], strict=True):
        small[key]["b"] = b
    assert (advantages(small, one, W, kind=kind, std=std).zero_spread == 1) == (kind == "per_axis")


def test_one_flat_axis_does_not_matter():
    values, groups = scores([1.0, 2.0], axis="a", b=7.0)
    made = advantages(values, groups, W, kind="per_axis")
    assert made.zero_spread == 0 and made.values[0, 0, 1] == pytest.approx(1.0, abs=1e-3)


# ---- objective ----


@pytest.mark.parametrize(
    ("ratio", "advantage", "held"),
    [(1.0, 1.0, False), (1.3, 1.0, True), (0.5, 1.0, False), (0.5, -1.0, True), (1.3, -1.0, False), (1.15, 1.0, False)],
)
def test_the_gradient_stops_where_the_ratio_has_gone_far_enough(ratio, advantage, held):
    log_ratio = torch.tensor(math.log(ratio), dtype=torch.float64, requires_grad=True)
    loss, clipped = clipped_loss(log_ratio, advantage, clip=0.1, clip_high=0.2)
    loss.backward()
    assert clipped == held
    assert log_ratio.grad.item() == pytest.approx(0.0 if held else -advantage * ratio)
    bound = (1.2 if advantage > 0 else 0.9) if held else ratio
    assert loss.item() == pytest.approx(-advantage * bound)


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
    log_ratio = torch.zeros((), requires_grad=True)
    loss, clipped = clipped_loss(log_ratio, 1.7, 1e-4, 1e-4)
    loss.backward()
    assert not clipped and log_ratio.grad.item() == pytest.approx(-1.7)


def test_the_guarded_ratio_has_no_bias():
    """log-ratio = z shift / std - shift^2 / (2 std^2); guarded: z shift, whose mean over the noise is 0."""
    generator = torch.Generator().manual_seed(0)
    old, new = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    std, total = 0.3, 0.0
    for _ in range(300):
        z = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        x = old + std * z
        log_ratio = ((x - old).square() - (x - new).square()).mean() / (2 * std**2)
        guarded = guarded_log_ratio(log_ratio, new, old, std)
        assert guarded.item() == pytest.approx((z * (new - old)).mean().item(), rel=1e-9, abs=1e-12)
        total += guarded.item()
    assert abs(total / 300) < 0.1


# ---- the objective of a step ----


def noisy_step(shift=0.0, std=0.3, seed=0):
    """A step as the rollout took it, with its noise; and its transition under a policy whose mean has moved."""
    generator = torch.Generator().manual_seed(seed)
    mean, noise, direction = torch.randn(3, 4, 3, generator=generator, dtype=torch.float64)
    after = mean + std * noise
    taken = NoisyStep(mean - 0.1, after, log_density(after, Transition(mean, std)).item())
    now = Transition((mean + shift * direction).requires_grad_(), std)
    return taken, now, noise, Transition(mean, std)


def test_the_loss_is_the_clipped_ratio_times_the_advantage():
    taken, now, _, _ = noisy_step(shift=0.2)
    one = Objective(0.5, 0.5)(now, taken, 1.7)
    ratio = math.exp(log_density(taken.after, now).item() - taken.log_prob)
    assert one.ratio == pytest.approx(ratio) and abs(ratio - 1) > 1e-3 and not one.clipped and one.kl is None
    assert one.loss.item() == pytest.approx(-1.7 * ratio)


@pytest.mark.parametrize(("sign", "bound"), [(1.0, 1 + 3e-4), (-1.0, 1 - 1e-4)])
def test_clip_and_clip_high_bound_the_ratio_on_their_own_sides(sign, bound):
    """The noise is pushed so that the ratio goes the way that the advantage wants."""
    for seed in range(20):
        taken, now, _, _ = noisy_step(shift=0.2, seed=seed)
        one = Objective(1e-4, 3e-4)(now, taken, sign)
        if one.clipped:
            assert one.loss.item() == pytest.approx(-sign * bound, rel=1e-9) and (one.ratio - bound) * sign > 0
            assert torch.autograd.grad(one.loss, now.mean)[0].abs().max() == 0
            return
    raise AssertionError("no ratio was clipped")


def test_without_a_clip_of_its_own_the_upper_side_has_that_of_the_lower():
    stages = (RLStage(64, 1, 1e-3),)
    assert Objective.from_config(MSGRPO(stages, clip=0.2)) == Objective(0.2, 0.2, False, 0.0)
    given = MSGRPO(stages, clip=0.2, clip_high=0.0, ratio_guard=True, kl=0.3, lora_rank=4)
    assert Objective.from_config(given) == Objective(0.2, 0.0, True, 0.3)


def test_the_ratio_guard_uses_the_guarded_ratio_and_weighs_by_the_length_of_the_step():
    taken, now, noise, rollout = noisy_step(shift=0.2)
    one = Objective(10.0, 10.0, ratio_guard=True)(now, taken, 1.3, noise=noise, dt=0.05)
    plain = Objective(10.0, 10.0)(now, taken, 1.3)
    log_ratio = log_density(taken.after, now) - taken.log_prob
    guarded = guarded_log_ratio(log_ratio, now.mean, rollout.mean, now.std)
    assert one.loss.item() == pytest.approx(-1.3 * guarded.exp().item() / 0.05)
    assert one.ratio == plain.ratio, "the ratio that is reported is the plain one"


def test_the_divergence_is_added_with_its_weight():
    taken, now, _, reference = noisy_step(shift=0.2)
    plain = Objective(10.0, 10.0, kl=3.0)(now, taken, 1.0)
    one = Objective(10.0, 10.0, kl=3.0)(now, taken, 1.0, reference=reference)
    kl = divergence(now, reference).item()
    assert one.kl == pytest.approx(kl) and kl > 0
    assert (one.loss - plain.loss).item() == pytest.approx(3.0 * kl)
    pull = torch.autograd.grad(one.loss - plain.loss, now.mean)[0]
    assert (pull * (now.mean - reference.mean)).sum() > 0, "a step against the gradient goes towards the reference"


# ---- minibatches ----


def test_each_update_has_its_share_of_the_noisy_steps_in_a_new_order():
    """All epochs of a step train on the same noisy steps, and other steps of the run on others."""
    drawn = {}
    for step in range(6):
        epochs = [minibatches(8, 4, 2, seed=0, step=step, epoch=epoch) for epoch in range(3)]
        assert all([len(part) for part in parts] == [2, 2] for parts in epochs)
        (drawn[step],) = {tuple(sorted(parts[0] + parts[1])) for parts in epochs}
        assert len(set(drawn[step])) == 4 and len({str(parts) for parts in epochs}) > 1
    assert len(set(drawn.values())) > 1 and set().union(*drawn.values()) == set(range(8))


def test_all_noisy_steps_are_trained_on_once_an_epoch():
    parts = minibatches(7, 7, 3, seed=1, step=0, epoch=0)
    assert sorted(i for part in parts for i in part) == list(range(7)) and sorted(map(len, parts)) == [2, 2, 3]
