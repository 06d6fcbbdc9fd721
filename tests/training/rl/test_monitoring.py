"""The alarm for reward hacking."""

import pytest

from uniref_fast.training.rl.monitoring import Alarm


def told(alarm, totals, qualities):
    return [bool(alarm.add(0, *pair)) for pair in zip(totals, qualities, strict=True)]


def test_rising_sum_and_falling_quality():
    alarm = Alarm(10)
    flags = told(alarm, [5 + 0.1 * i for i in range(10)], [8 - 0.2 * i for i in range(10)])
    assert flags == [False] * 9 + [True]
    assert not alarm.add(0, 7.0, 5.0), "told once"


def test_a_stage_is_not_compared_with_another():
    """Prompts of another kind are worth more, and look worse."""
    alarm = Alarm(10)
    told(alarm, [5.0] * 20, [8.0] * 20)
    assert not any(alarm.add(1, 6.5, 7.6) for _ in range(20))
    flags = [bool(alarm.add(2, 5 + 0.1 * i, 8 - 0.2 * i)) for i in range(10)]
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
def test_silent_otherwise(totals, qualities):
    assert not any(told(Alarm(10), totals, qualities))


def test_goes_on_from_its_state():
    values = [(5 + 0.1 * i, 8 - 0.2 * i) for i in range(10)]
    first = Alarm(10)
    told(first, *zip(*values[:6], strict=True))
    second = Alarm(10, first.state())
    assert told(second, *zip(*values[6:], strict=True)) == [False] * 3 + [True]


def test_off():
    assert not any(told(Alarm(0), range(20), range(20, 0, -1)))
