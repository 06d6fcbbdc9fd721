"""Advantages within groups, with failures left out; the clipped objective and its gradient."""

import math

import pytest
import torch

from uniref_fast.training.rl.grpo import FLOOR, advantages, clipped_loss, guarded_log_ratio

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
