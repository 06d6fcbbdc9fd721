"""Circuit breaker: while an endpoint is away, one request at a time probes it and all others wait."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uniref_fast.rewards.config import JudgeConfig

__all__ = ["FAILURES", "CircuitBreaker", "EndpointAwayError", "Notify"]

Notify = Callable[..., object]  # notify(kind, **details)
FAILURES = 3  # consecutive failures that count as an outage


class EndpointAwayError(Exception):
    """The endpoint was away for longer than the patience."""


class CircuitBreaker:
    """Let requests through, and only one at a time while the endpoint is away.

    The breaker opens after `FAILURES` consecutive failures. Then one waiting request at a time, in order of arrival,
    probes the endpoint; the time between probes grows with `config.wait`. The first success closes the breaker.
    Requests that waited for `config.patience` fail. The methods belong to one asyncio loop.

    Args:
        config: Configuration of the judge; `wait` and `patience` are used.
        notify: Function that is called as notify("judge down", reason=...) and notify("judge back", seconds=...).

    Attributes:
        is_open: True while the endpoint is away.
        last_success: Time of the loop at which the endpoint last answered.
        probes: Number of failed probes of the current or latest outage.
    """

    def __init__(self, config: JudgeConfig, notify: Notify) -> None:
        self.is_open = False
        self.last_success = 0.0
        self.probes = 0
        self._config = config
        self._notify = notify
        self._turn = asyncio.Lock()  # first come, first served: no request can be overtaken for long
        self._closed = asyncio.Event()
        self._failures = 0
        self._reason = ""
        self._since = self._next = self._deadline = 0.0

    @contextlib.asynccontextmanager
    async def turn(self, submitted: float) -> AsyncIterator[bool]:
        """Wait until a request may be sent; the context's value is True if the request is a probe.

        Args:
            submitted: Time of the loop at which the request began to wait.

        Raises:
            EndpointAwayError: After the patience.
        """
        probe = await self._enter(submitted)
        try:
            yield probe
        finally:
            if probe:
                self._turn.release()

    async def _enter(self, submitted: float) -> bool:
        loop = asyncio.get_running_loop()
        while self.is_open:
            if submitted > self._deadline:  # a request that comes after the others failed has the whole patience
                self._deadline = loop.time() + self._config.patience
            left = self._deadline - loop.time()
            if left <= 0:
                away = loop.time() - self._since
                raise EndpointAwayError(
                    f"the judge was away for {away:.0f} s, {self.probes} probes failed; {self._reason}"
                )
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._turn.acquire(), left)
                if await self._probe_is_due():
                    return True
                self._turn.release()
        return False

    async def _probe_is_due(self) -> bool:
        """Wait, as the holder of the turn, for the time of the next probe; return False if no probe is needed."""
        loop = asyncio.get_running_loop()
        try:
            until = min(self._next, self._deadline)
            await asyncio.wait_for(self._closed.wait(), max(until - loop.time(), 0))
        except asyncio.TimeoutError:
            return self.is_open and loop.time() < self._deadline
        except BaseException:
            self._turn.release()
            raise
        return False

    def record_failure(self, reason: str, probe: bool, retry_after: float = 0.0) -> None:
        """Record that a request did not reach the endpoint.

        Args:
            reason: Description of the failure on one line.
            probe: True if the request was a probe.
            retry_after: Seconds that the endpoint asks to wait.
        """
        loop = asyncio.get_running_loop()
        self._reason, self._failures = reason, self._failures + 1
        if probe:
            self.probes += 1
            self._next = loop.time() + max(self._config.wait(self.probes + 1), retry_after)
        elif not self.is_open and self._failures >= FAILURES:
            self.is_open, self.probes = True, 0
            self._closed.clear()
            self._since = loop.time()
            self._next = self._since + max(self._config.wait(1), retry_after)
            self._deadline = self._since + self._config.patience
            self._notify("judge down", reason=reason)

    def record_success(self) -> None:
        """Record that the endpoint answered."""
        self._failures, self.last_success = 0, asyncio.get_running_loop().time()
        if self.is_open:
            self.is_open = False
            self._closed.set()
            self._notify("judge back", seconds=self.last_success - self._since)
