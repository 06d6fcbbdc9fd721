"""Tests of the detector of reward hacking, and of the figures of a step."""

import pytest

from uniref_fast.training.rl.grpo import Advantages
from uniref_fast.training.rl.metrics import RewardHackingDetector, nothing_to_learn
from uniref_fast.training.rl.recipes import MSGRPO, RLStage


def warnings(detector, rewards, qualities):
    return [bool(detector.add(0, *pair)) for pair in zip(rewards, qualities, strict=True)]


def test_a_rising_reward_with_falling_quality_is_detected():
    detector = RewardHackingDetector(10)
    flags = warnings(detector, [5 + 0.1 * i for i in range(10)], [8 - 0.2 * i for i in range(10)])
    assert flags == [False] * 9 + [True]
    assert not detector.add(0, 7.0, 5.0), "one warning only"


def test_a_stage_is_not_compared_with_another():
    """Prompts of another kind are worth more, and look worse."""
    detector = RewardHackingDetector(10)
    warnings(detector, [5.0] * 20, [8.0] * 20)
    assert not any(detector.add(1, 6.5, 7.6) for _ in range(20))
    flags = [bool(detector.add(2, 5 + 0.1 * i, 8 - 0.2 * i)) for i in range(10)]
    assert flags == [False] * 9 + [True]


@pytest.mark.parametrize(
    ("totals", "qualities"),
    [
        ([5 + 0.1 * i for i in range(30)], [8 + 0.01 * i for i in range(30)]),
        ([5 - 0.1 * i for i in range(30)], [8 - 0.2 * i for i in range(30)]),
        ([5 + 0.1 * i for i in range(30)], [8 + (-1) ** i for i in range(30)]),
        ([5.0] * 30, [8.0] * 30),
    ],
)
def test_no_warning_for_other_courses(totals, qualities):
    assert not any(warnings(RewardHackingDetector(10), totals, qualities))


def test_the_detector_continues_from_its_state():
    values = [(5 + 0.1 * i, 8 - 0.2 * i) for i in range(10)]
    first = RewardHackingDetector(10)
    warnings(first, *zip(*values[:6], strict=True))
    second = RewardHackingDetector(10, first.state())
    assert warnings(second, *zip(*values[6:], strict=True)) == [False] * 3 + [True]


def test_zero_steps_turn_the_detector_off():
    assert not any(warnings(RewardHackingDetector(0), range(20), range(20, 0, -1)))


@pytest.mark.parametrize(
    ("equal", "too_few", "fields", "text"),
    [
        (1, 0, {}, "all 2 rewards of a group are equal"),
        (3, 0, {}, "all 2 rewards of each of 3 groups are equal"),
        (
            3,
            0,
            {"advantage": "per_axis"},
            "all 2 rewards of each of 3 groups are equal, or their axes cancel each other",
        ),
        (0, 1, {}, "a group has fewer than min_members = 2 rollouts with scores"),
        (1, 2, {}, "all 2 rewards of a group are equal; 2 groups have fewer than min_members = 2 rollouts with scores"),
    ],
)
def test_the_reason_why_there_is_nothing_to_learn(equal, too_few, fields, text):
    config = MSGRPO((RLStage(64, 1, 1e-3),), group=2, **fields)
    assert nothing_to_learn(Advantages({}, equal, too_few, 0.0), config) == text
