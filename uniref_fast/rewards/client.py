"""Client of a judge: an OpenAI-compatible endpoint that may be slow, crowded, broken, or away for a while."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import email.utils
import functools
import logging
import random
import ssl
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING, Any, TypeVar

import httpx2

from uniref_fast.rewards.api_key import ApiKey
from uniref_fast.rewards.circuit_breaker import CircuitBreaker, EndpointAwayError, Notify
from uniref_fast.rewards.reply import Reply, excerpt, parse_json, read_completion, shown
from uniref_fast.rewards.request import FORMATS
from uniref_fast.rewards.types import Failure

if TYPE_CHECKING:
    from uniref_fast.rewards.config import JudgeConfig

__all__ = ["Answer", "Body", "Exchange", "JudgeClient"]

T = TypeVar("T")
Body = Callable[[str], Awaitable[bytes]]  # JSON to post, for a JSON mode
AWAY = (502, 503, 504)  # statuses of a proxy without its server, or of a server that still loads its model
LOCAL = ("all://localhost", "all://127.0.0.1", "all://[::1]")  # addresses that never go through a proxy
LOGGERS = ("httpx2", *(f"httpcore2.{name}" for name in ("connection", "http11", "http2", "proxy", "socks")))
LIMIT = 2**21  # largest answer in bytes, compressed or not; a reply of 32,000 tokens with its thinking has 1 MB
# Content codings that are accepted although not asked for, with their formats for zlib; one at a time, since data that
# is compressed twice has no bound.
CODINGS = {"gzip": (31,), "deflate": (15, -15)}


@dataclass(frozen=True)
class Answer:
    """Answer of a server to one request; the key is removed from it.

    Attributes:
        status: HTTP status.
        reason: Status and start of the body, on one line.
        reply: Reply, or the reason why it cannot be used; None if the status is no success.
        wait: Seconds that the server asks to wait before the next attempt; None if it does not ask.
    """

    status: int
    reason: str
    reply: Reply | Failure | None
    wait: float | None = None


@dataclass(frozen=True)
class Exchange:
    """Result of a call with all its attempts.

    Attributes:
        result: Reply, or the reason why there is none.
        attempts: Number of requests sent.
        status: HTTP status of the last answer; None without an answer.
    """

    result: Reply | Failure
    attempts: int
    status: int | None


@dataclass(frozen=True)
class _FailedAttempt:
    """An attempt that may be repeated; a free one is not counted."""

    kind: str
    reason: str
    free: bool = False
    wait: float | None = None


class JudgeClient:
    """Sends requests to one endpoint. Its methods belong to one asyncio loop.

    Requests are repeated after connection errors, timeouts, 408, 429 and 5xx, and after nothing else. An endpoint that
    cannot be reached, answers 502 to 504, or answers no request while one times out, several times in a row, is away:
    see `CircuitBreaker`. Attempts that were probes are not counted, nor those that could not connect in an outage.

    Args:
        config: Configuration of the judge.
        key: API key.
        notify: Function that is called with outages and changes of the JSON mode.

    Attributes:
        breaker: Circuit breaker of the endpoint.
        json_mode: Way in which JSON is requested.
        json_reason: Reason why it is weaker than configured; empty if it is not.
    """

    def __init__(self, config: JudgeConfig, key: ApiKey, notify: Notify) -> None:
        self.config = config
        self.key = key
        self.json_mode: str = config.json_mode
        self.json_reason = ""
        self._json_proven = False
        self._notify = notify
        self.breaker = CircuitBreaker(config, notify)
        for name in LOGGERS:
            logging.getLogger(name).addFilter(key)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="judge-read")  # parses answers outside the loop
        self._client = httpx2.AsyncClient(
            headers={**key.headers, "Accept-Encoding": "identity"},
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            verify=_tls(),
            timeout=httpx2.Timeout(None, connect=min(config.timeout / 2, 10.0)),  # _post limits the whole request
            limits=httpx2.Limits(max_connections=None, keepalive_expiry=2.0),  # uvicorn drops idle ones after 5 s
            mounts=dict.fromkeys(LOCAL),
        )

    async def close(self) -> None:
        await self._client.aclose()
        self._reader.shutdown()
        for name in LOGGERS:
            logging.getLogger(name).removeFilter(self.key)

    async def ask(self, body: Body, content: str, submitted: float) -> Exchange:
        """Make a call, with as many attempts as it needs.

        Args:
            body: Function that makes the JSON to post.
            content: Digest of the call, which seeds the jitter of its waits.
            submitted: Time of the loop at which the call began to wait.
        """
        mode, complaint, jitter = self.json_mode, "", random.Random(content)
        sent = used = 0
        status = None
        while True:
            try:
                outcome = await self._attempt(await body(mode), submitted)
            except EndpointAwayError as error:
                return Exchange(Failure("connection", str(error)), sent, status)
            sent += 1
            if isinstance(outcome, Answer):
                status = outcome.status
                if outcome.reply is not None:
                    self._settle(mode, complaint)
                    return Exchange(outcome.reply, sent, status)
                if (weaker := self._weaker(mode, status)) is not None:
                    mode, complaint = weaker, complaint or outcome.reason
                    continue
                if not (status in (408, 429) or status >= 500):
                    return Exchange(Failure("status", outcome.reason), sent, status)
                outcome = _FailedAttempt("overloaded", outcome.reason, wait=outcome.wait)
            used += not outcome.free
            if used >= self.config.attempts:
                reason = f"{outcome.reason} (the last of {used} attempts)"
                return Exchange(Failure(outcome.kind, reason), sent, status)
            if self.breaker.is_open:
                continue  # the breaker makes it wait
            wait = self.config.wait(used) * jitter.uniform(0.5, 1.0) if outcome.wait is None else outcome.wait
            if wait > self.config.patience:
                reason = f"{outcome.reason}; the server asks to wait {wait:g} s, more than the patience"
                return Exchange(Failure(outcome.kind, reason), sent, status)
            await asyncio.sleep(wait)

    async def once(self, body: Body) -> Answer:
        """Make one request; it is repeated only with a weaker JSON mode, if the server refuses one.

        Raises:
            asyncio.TimeoutError: If there is no answer within the timeout.
            httpx2.RequestError: If there is no connection.
        """
        mode, complaint = self.json_mode, ""
        while True:
            answer = await self._post(await body(mode))
            weaker = self._weaker(mode, answer.status)
            if weaker is None:
                if answer.reply is not None:
                    self._settle(mode, complaint)
                return answer
            mode, complaint = weaker, complaint or answer.reason

    async def models(self) -> list[str]:
        """Return the names of the models that the endpoint lists; an empty list if it lists none."""
        with contextlib.suppress(asyncio.TimeoutError, httpx2.RequestError, ValueError, KeyError, TypeError):
            work = self._exchange(_listed, "GET", f"{self.config.base}/models")
            return [shown(self.key.hide(name)) for name in await asyncio.wait_for(work, self.config.timeout)]
        return []

    async def _attempt(self, body: bytes, submitted: float) -> Answer | _FailedAttempt:
        """Make one request when the breaker lets it through, which may raise EndpointAwayError."""
        async with self.breaker.turn(submitted) as probe:
            began = asyncio.get_running_loop().time()
            try:
                answer = await self._post(body)
            except httpx2.RequestError as error:
                refused = isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError))
                reason = f"{type(error).__name__}: {shown(self.key.hide(str(error))) or 'no answer'}"
                self.breaker.record_failure(reason, probe)
                return _FailedAttempt("connection", reason, free=probe or (refused and self.breaker.is_open))
            except asyncio.TimeoutError:
                reason = f"no answer within {self.config.timeout:g} s"
                if probe or self.breaker.last_success < began:  # else it is alive, and slow with this request
                    self.breaker.record_failure(reason, probe)
                return _FailedAttempt("timeout", reason, free=probe)
            if answer.status in AWAY:
                self.breaker.record_failure(answer.reason, probe, answer.wait or 0.0)
                return _FailedAttempt("overloaded", answer.reason, free=probe or self.breaker.is_open, wait=answer.wait)
            self.breaker.record_success()
            return answer

    async def _post(self, body: bytes) -> Answer:
        url, headers = f"{self.config.base}/chat/completions", {"Content-Type": "application/json"}
        work = self._exchange(self._read, "POST", url, content=body, headers=headers)
        return await asyncio.wait_for(work, self.config.timeout)

    async def _exchange(self, read: Callable[[_Response], T], method: str, url: str, **request: Any) -> T:
        """Make one request, and return what a function reads from its answer of at most `LIMIT` bytes.

        Raises:
            httpx2.RequestError: If no answer came, or one that breaks off or does not follow HTTP.
        """
        try:
            async with self._client.stream(method, url, **request) as response:
                codings = response.headers.get_list("content-encoding", split_commas=True)
                wait, (data, fault) = _retry_after(response.headers), await _body(response)
        except httpx2.RequestError:
            raise
        except Exception as error:  # the HTTP library raises other errors too for odd headers
            raise httpx2.RemoteProtocolError(f"{type(error).__name__}: {error}") from None
        codings = [coding for one in codings if (coding := one.strip().lower()) not in ("", "identity")]
        answer = _Response(response.status_code, data, fault, wait)
        return await asyncio.get_running_loop().run_in_executor(
            self._reader, lambda: read(self._unpacked(answer, codings) if codings else answer)
        )

    def _unpacked(self, response: _Response, codings: Sequence[str]) -> _Response:
        """Return the response with its body decompressed up to `LIMIT` bytes, or with the failure of that."""
        if response.fault is not None:
            return response
        data, fault = b"", None
        if len(codings) > 1 or codings[0] not in CODINGS:
            given = shown(self.key.hide(", ".join(codings)))
            what = f"the answer is packed as {given}; accepted is one of {', '.join(CODINGS)}, or none"
            fault = Failure("malformed", what)
        else:
            try:
                data = _inflated(response.data, CODINGS[codings[0]])
            except ValueError as error:
                fault = Failure("malformed", f"the answer cannot be unpacked: {error}")
        if len(data) > LIMIT:
            data, fault = data[:LIMIT], _oversized()
        return dataclasses.replace(response, data=data, fault=fault)

    def _read(self, response: _Response) -> Answer:
        reason = f"HTTP {response.status}: {excerpt(response.data, self.key.hide) or 'no body'}"
        reply: Reply | Failure | None = None
        if response.status < 300:
            reply = response.fault or read_completion(response.data, self.key.hide)
        return Answer(response.status, reason, reply, response.wait)

    def _weaker(self, mode: str, status: int) -> str | None:
        """Return the next weaker JSON mode after a refusal; None if the JSON mode cannot be its reason."""
        if status not in (400, 422):
            return None
        weaker = [*FORMATS][[*FORMATS].index(mode) + 1 :]
        if self._json_proven:  # another call found a mode meanwhile
            return self.json_mode if self.json_mode in weaker else None
        return weaker[0] if weaker else None

    def _settle(self, mode: str, complaint: str) -> None:
        """Keep the JSON mode of the first success for all later calls."""
        if not self._json_proven:
            self._json_proven = True
            if mode != self.json_mode:
                self.json_reason = f"{self.json_mode!r} was refused: {complaint}"
                self.json_mode = mode
                self._notify("judge format", json_mode=mode, reason=self.json_reason)


@dataclass(frozen=True)
class _Response:
    """An answer as it was sent: its body, or the start of one, and the reason why the body cannot be used."""

    status: int
    data: bytes
    fault: Failure | None
    wait: float | None


async def _body(response: httpx2.Response) -> tuple[bytes, Failure | None]:
    """Return at most `LIMIT` bytes of a body as they were sent, and a failure if the body is longer."""
    data = bytearray()
    async with contextlib.aclosing(response.aiter_raw()) as pieces:
        async for piece in pieces:
            data += piece
            if len(data) > LIMIT:
                return bytes(data[:LIMIT]), _oversized()
    return bytes(data), None


def _oversized() -> Failure:
    return Failure("oversized", f"the answer has more than {LIMIT} bytes")


def _inflated(data: bytes, formats: Sequence[int]) -> bytes:
    """Return data decompressed in one of the formats of zlib, but no more than one byte over `LIMIT`.

    Raises:
        ValueError: If the data have none of the formats, or end too early.
    """
    problem = ""
    for wbits in formats:
        inflater = zlib.decompressobj(wbits)
        try:
            found = inflater.decompress(data, LIMIT + 1)
        except zlib.error as error:
            problem = problem or str(error)
            continue
        if inflater.eof or len(found) > LIMIT:
            return found
        problem = "it ends too early"
    raise ValueError(problem)


def _listed(response: _Response) -> list[str]:
    """Return the names in a list of models, or raise ValueError, KeyError or TypeError for anything else."""
    names = [model["id"] for model in parse_json(response.data.decode("utf-8"))["data"]]
    return [name for name in names if isinstance(name, str)]


@functools.cache
def _tls() -> ssl.SSLContext:
    """Return the certificates, read once: that takes longer than anything else here."""
    return httpx2.create_ssl_context()


def _retry_after(headers: Mapping[str, Any]) -> float | None:
    """Return the seconds of a Retry-After header; a date is compared with the server's own clock."""
    given = headers.get("Retry-After", "").strip()
    if given.isascii() and given.replace(".", "", 1).isdigit():
        return float(given)
    with contextlib.suppress(ValueError, TypeError, OverflowError, IndexError):  # of odd dates
        when, now = (email.utils.parsedate_to_datetime(date) for date in (given, headers.get("Date", "")))
        return max((when - now).total_seconds(), 0.0)
    return None
