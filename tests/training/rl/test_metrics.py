"""Tests of the detector of reward hacking, and of the figures of a step."""

import pytest

from uniref_fast.training.rl.metrics import RewardHackingDetector


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
