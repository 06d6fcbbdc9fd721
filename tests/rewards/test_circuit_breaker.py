"""Tests of the circuit breaker: when it opens and closes, who probes, how long requests wait."""

import asyncio
import itertools

import pytest

from uniref_fast.rewards.circuit_breaker import FAILURES, CircuitBreaker, EndpointAwayError
from uniref_fast.rewards.config import JudgeConfig


def breaker_of(**fields):
    """Return a breaker with short waits, and the list of its notifications."""
    events = []
    config = JudgeConfig(**{"backoff": 0.02, "backoff_limit": 0.16, "patience": 5.0, **fields})
    return CircuitBreaker(config, lambda kind, **details: events.append((kind, details))), events


def opened(**fields):
    breaker, events = breaker_of(**fields)
    for _ in range(FAILURES):
        breaker.record_failure("connection refused", probe=False)
    return breaker, events


async def pass_through(breaker, succeed, log=None, submitted=None):
    """Send one request through the breaker; `succeed(probe)` is its outcome. Return True if it was a probe."""
    submitted = asyncio.get_running_loop().time() if submitted is None else submitted
    async with breaker.turn(submitted) as probe:
        if log is not None:
            log.append((asyncio.get_running_loop().time(), probe))
        if succeed(probe):
            breaker.record_success()
        else:
            breaker.record_failure("connection refused", probe)
        return probe


def test_the_breaker_opens_after_consecutive_failures_only():
    async def run():
        breaker, events = breaker_of()
        for _ in range(3):
            for _ in range(FAILURES - 1):
                breaker.record_failure("refused", probe=False)
            breaker.record_success()
        assert not breaker.is_open and events == []
        for _ in range(FAILURES):
            assert not breaker.is_open
            breaker.record_failure("refused", probe=False)
        assert breaker.is_open and events == [("judge down", {"reason": "refused"})]
        breaker.record_failure("refused again", probe=False)
        assert len(events) == 1, "one notification for an outage"

    asyncio.run(run())


def test_while_closed_all_requests_pass_at_once():
    async def run():
        breaker, _ = breaker_of()
        assert await asyncio.gather(*(pass_through(breaker, lambda probe: True) for _ in range(20))) == [False] * 20

    asyncio.run(run())


def test_one_request_at_a_time_probes_with_growing_waits_and_a_success_lets_all_through():
    async def run():
        breaker, events = opened()
        running, most, log, answers = 0, 0, [], iter([False] * 4 + [True])

        async def request():
            nonlocal running, most
            while True:
                async with breaker.turn(0.0) as probe:
                    log.append((asyncio.get_running_loop().time(), probe))
                    running, most = running + probe, max(most, running + probe)
                    await asyncio.sleep(0.005)
                    running -= probe
                    if not probe or next(answers):
                        breaker.record_success()
                        return probe
                    breaker.record_failure("still away", probe)

        probes = await asyncio.gather(*(request() for _ in range(6)))
        assert most == 1 and sum(probes) == 1, "one probe closed the breaker, the others passed without one"
        times = [time for time, probe in log if probe]
        gaps = [b - a for a, b in itertools.pairwise(times)]
        assert len(times) == 5 and breaker.probes == 4
        assert all(gap >= wait for gap, wait in zip(gaps, (0.04, 0.08, 0.16, 0.16), strict=True)), gaps
        assert [kind for kind, _ in events] == ["judge down", "judge back"] and events[1][1]["seconds"] > 0.4
        assert not breaker.is_open and breaker.last_success > 0

    asyncio.run(run())


def test_the_endpoint_may_ask_for_a_longer_wait():
    async def run():
        breaker, _ = breaker_of()
        for _ in range(FAILURES):
            breaker.record_failure("HTTP 503", probe=False, retry_after=0.3)
        began, log = asyncio.get_running_loop().time(), []
        await pass_through(breaker, lambda probe: True, log)
        assert log[0][0] - began >= 0.3

    asyncio.run(run())


def test_requests_fail_after_the_patience_and_later_ones_have_it_whole():
    async def run():
        breaker, _ = opened(patience=0.2)
        loop = asyncio.get_running_loop()
        began = loop.time()

        async def waiting():
            while True:
                await pass_through(breaker, lambda probe: False, submitted=began)

        with pytest.raises(EndpointAwayError, match=r"away for \d s, \d+ probes failed; connection refused"):
            await waiting()
        assert 0.2 <= loop.time() - began < 2
        later = loop.time()
        assert await pass_through(breaker, lambda probe: True) is True, "a later request probes again"
        assert loop.time() - later < 0.2 and not breaker.is_open

    asyncio.run(run())


def test_a_cancelled_request_gives_its_turn_to_the_next():
    async def run():
        breaker, _ = opened(backoff=0.1)
        first = asyncio.create_task(pass_through(breaker, lambda probe: True))
        await asyncio.sleep(0.02)  # it holds the turn, and waits for the time of the probe
        second = asyncio.create_task(pass_through(breaker, lambda probe: True))
        first.cancel()
        assert await asyncio.wait_for(second, 5) is True

    asyncio.run(run())
