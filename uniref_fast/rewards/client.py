"""The way to a judge: an OpenAI-compatible endpoint that may be slow, crowded, broken, or away for a while."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import email.utils
import functools
import html
import logging
import os
import random
import re
import ssl
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING, Any, TypeVar

import httpx2

from uniref_fast.rewards.reply import Reply, excerpt, parse_json, read_completion, shown
from uniref_fast.rewards.request import FORMATS
from uniref_fast.rewards.types import Failure

if TYPE_CHECKING:
    from uniref_fast.rewards.config import JudgeConfig

__all__ = ["Answer", "AwayError", "Exchange", "Key", "Link", "Notify"]

T = TypeVar("T")
Notify = Callable[..., object]  # notify(kind, **details)
Body = Callable[[str], Awaitable[bytes]]  # the JSON to post, by the way JSON is asked for
AWAY = (502, 503, 504)  # what a proxy, or a server that still loads its model, says
MISSES = 3  # in a row are an outage
LOCAL = ("all://localhost", "all://127.0.0.1", "all://[::1]")  # never through a proxy
LOGGERS = ("httpx2", *(f"httpcore2.{name}" for name in ("connection", "http11", "http2", "proxy", "socks")))
LIMIT = 2**21  # bytes of an answer, as sent and when unpacked; a reply of 32,000 tokens with its thinking has 1 MB
# Accepted although not asked for, with their formats for zlib; one at a time, since packing twice has no bound.
CODINGS = {"gzip": (31,), "deflate": (15, -15)}


class Key:
    """The API key, from the environment: given to the server and to nobody else.

    Raises:
        ValueError: For a key that cannot be sent; the message does not show it.
    """

    def __init__(self, variable: str) -> None:
        self.variable = variable
        key = os.environ.get(variable, "").strip()
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise ValueError(f"the environment variable {variable} holds no key: it has spaces or unusual characters")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._pattern = re.compile("".join(map(_forms, key)), re.IGNORECASE) if key else None

    def hide(self, value: Any) -> Any:
        """Return a text, or a value of JSON with all its texts, without the key, which some servers repeat.

        Whatever is logged, printed or raised passes this function. The key is found as it is and as JSON, URLs, HTML
        and Python's repr escape it, any of its characters or all of them, in upper or lower case.
        """
        if isinstance(value, str):
            return self._pattern.sub("[the key]", value) if self._pattern is not None else value
        if isinstance(value, Mapping):
            return {self.hide(name): self.hide(item) for name, item in value.items()}
        return [self.hide(item) for item in value] if isinstance(value, (list, tuple)) else value

    def filter(self, record: logging.LogRecord) -> bool:
        """Hide the key in what the HTTP library logs, response headers among it when debugging."""
        record.msg, record.args = self.hide(record.getMessage()), ()
        return True

    def __repr__(self) -> str:
        return f"Key({self.variable})"


def _forms(character: str) -> str:
    """Return a regular expression for a character of the key and its escaped forms, each of bounded length."""
    code, plain = ord(character), re.escape(character)
    backslash = rf"\\{{0,8}}(?:{plain}|u00{code:02x}|x{code:02x})"  # a text in JSON in JSON has several of them
    entities = [f"&#x0{{0,4}}{code:x};", f"&#0{{0,4}}{code};"]
    if (named := html.escape(character)) != character:
        entities.append(named)
    return f"(?:{backslash}|%(?:25){{0,4}}{code:02x}|{'|'.join(entities)})"


@dataclass(frozen=True)
class Answer:
    """What a server answered to one request; nothing in it has the key.

    Attributes:
        status: Status of HTTP.
        reason: The status and the start of the body, on one line.
        reply: The reply, or why it cannot be used; None where the status is no success.
        wait: Seconds that the server asks to wait before the next try; None where it does not.
    """

    status: int
    reason: str
    reply: Reply | Failure | None
    wait: float | None = None


@dataclass(frozen=True)
class Exchange:
    """A call to its end.

    Attributes:
        result: the reply, or why there is none.
        attempts: requests sent.
        status: of the last answer; None without any.
    """

    result: Reply | Failure
    attempts: int
    status: int | None


@dataclass(frozen=True)
class _Miss:
    """An attempt that may be made again; a free one is not counted."""

    kind: str
    reason: str
    free: bool = False
    wait: float | None = None


class AwayError(Exception):
    """The endpoint was away for longer than the patience."""


class Link:
    """Sends requests to one endpoint. Its methods belong to one asyncio loop.

    Connection errors, timeouts, 408, 429 and 5xx are tried again, nothing else is. An endpoint that `MISSES` times in a
    row cannot be reached, answers 502 to 504, or answers nobody while a request times out, is away: then one waiting
    call at a time, in turn, probes it with its own request. Attempts that were probes are not counted, nor those that
    could not connect in an outage.

    Attributes:
        json_mode: the way JSON is asked for.
        json_reason: why it is weaker than configured; empty where it is not.
    """

    def __init__(self, config: JudgeConfig, key: Key, notify: Notify) -> None:
        self.config = config
        self.key = key
        self.json_mode: str = config.json_mode
        self.json_reason = ""
        self._json_proven = False
        self._notify = notify
        self._gate = _Gate(config, notify)
        for name in LOGGERS:
            logging.getLogger(name).addFilter(key)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="judge-read")  # parses answers beside the loop
        self._client = httpx2.AsyncClient(
            headers={**key.headers, "Accept-Encoding": "identity"},
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            verify=_tls(),
            timeout=httpx2.Timeout(None, connect=min(config.timeout / 2, 10.0)),  # the whole has a limit in _post
            limits=httpx2.Limits(max_connections=None, keepalive_expiry=2.0),  # uvicorn drops idle ones after 5 s
            mounts=dict.fromkeys(LOCAL),
        )

    async def close(self) -> None:
        await self._client.aclose()
        self._reader.shutdown()
        for name in LOGGERS:
            logging.getLogger(name).removeFilter(self.key)

    async def ask(self, body: Body, content: str, submitted: float) -> Exchange:
        """Make a call to its end.

        Args:
            body: makes the JSON to post.
            content: digest of the call; spreads the waits of several calls.
            submitted: time of the loop when the call began to wait.
        """
        mode, complaint, spread = self.json_mode, "", random.Random(content)
        sent = used = 0
        status = None
        while True:
            try:
                outcome = await self._attempt(await body(mode), submitted)
            except AwayError as error:
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
                outcome = _Miss("overloaded", outcome.reason, wait=outcome.wait)
            used += not outcome.free
            if used >= self.config.attempts:
                reason = f"{outcome.reason} (the last of {used} attempts)"
                return Exchange(Failure(outcome.kind, reason), sent, status)
            if self._gate.away:
                continue  # waits there
            wait = self.config.wait(used) * spread.uniform(0.5, 1.0) if outcome.wait is None else outcome.wait
            if wait > self.config.patience:
                reason = f"{outcome.reason}; the server asks to wait {wait:g} s, more than the patience"
                return Exchange(Failure(outcome.kind, reason), sent, status)
            await asyncio.sleep(wait)

    async def once(self, body: Body) -> Answer:
        """One request, with the weaker ways to ask for JSON where the server refuses one, whatever else happens.

        Raises:
            asyncio.TimeoutError, httpx2.RequestError: when there is no answer.
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
        """Return the names of the models that the endpoint lists; none where it lists none."""
        with contextlib.suppress(asyncio.TimeoutError, httpx2.RequestError, ValueError, KeyError, TypeError):
            work = self._exchange(_listed, "GET", f"{self.config.base}/models")
            return [shown(self.key.hide(name)) for name in await asyncio.wait_for(work, self.config.timeout)]
        return []

    async def _attempt(self, body: bytes, submitted: float) -> Answer | _Miss:
        """One request, when its turn has come. Raises AwayError when that takes longer than the patience."""
        async with self._gate.turn(submitted) as probe:
            began = asyncio.get_running_loop().time()
            try:
                answer = await self._post(body)
            except httpx2.RequestError as error:
                refused = isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError))
                reason = f"{type(error).__name__}: {shown(self.key.hide(str(error))) or 'no answer'}"
                self._gate.missed(reason, probe)
                return _Miss("connection", reason, free=probe or (refused and self._gate.away))
            except asyncio.TimeoutError:
                reason = f"no answer within {self.config.timeout:g} s"
                if probe or self._gate.heard < began:  # else it is alive, and slow with this one
                    self._gate.missed(reason, probe)
                return _Miss("timeout", reason, free=probe)
            if answer.status in AWAY:
                self._gate.missed(answer.reason, probe, answer.wait or 0.0)
                return _Miss("overloaded", answer.reason, free=probe or self._gate.away, wait=answer.wait)
            self._gate.answered()
            return answer

    async def _post(self, body: bytes) -> Answer:
        url, headers = f"{self.config.base}/chat/completions", {"Content-Type": "application/json"}
        work = self._exchange(self._read, "POST", url, content=body, headers=headers)
        return await asyncio.wait_for(work, self.config.timeout)

    async def _exchange(self, read: Callable[[_Response], T], method: str, url: str, **request: Any) -> T:
        """Make one request, and have its answer, of at most `LIMIT` bytes, read by a function beside the loop.

        Raises:
            httpx2.RequestError: Where no answer came, or one that breaks off or does not follow HTTP.
        """
        try:
            async with self._client.stream(method, url, **request) as response:
                codings = response.headers.get_list("content-encoding", split_commas=True)
                wait, (data, fault) = _retry_after(response.headers), await _body(response)
        except httpx2.RequestError:
            raise
        except Exception as error:  # the HTTP library has more than its own errors for odd headers
            raise httpx2.RemoteProtocolError(f"{type(error).__name__}: {error}") from None
        codings = [coding for one in codings if (coding := one.strip().lower()) not in ("", "identity")]
        answer = _Response(response.status_code, data, fault, wait)
        return await asyncio.get_running_loop().run_in_executor(
            self._reader, lambda: read(self._unpacked(answer, codings) if codings else answer)
        )

    def _unpacked(self, response: _Response, codings: Sequence[str]) -> _Response:
        """Return the response with its body unpacked, up to `LIMIT` bytes, or with the failure of that."""
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
        """The next way to ask for JSON after a server refused one; None where that cannot be the matter."""
        if status not in (400, 422):
            return None
        weaker = [*FORMATS][[*FORMATS].index(mode) + 1 :]
        if self._json_proven:  # another call found the way meanwhile
            return self.json_mode if self.json_mode in weaker else None
        return weaker[0] if weaker else None

    def _settle(self, mode: str, complaint: str) -> None:
        """The first success says how JSON is asked for from now on."""
        if not self._json_proven:
            self._json_proven = True
            if mode != self.json_mode:
                self.json_reason = f"{self.json_mode!r} was refused: {complaint}"
                self.json_mode = mode
                self._notify("judge format", json_mode=mode, reason=self.json_reason)


@dataclass(frozen=True)
class _Response:
    """An answer as it came: its body, or the start of one, and why the body cannot be used."""

    status: int
    data: bytes
    fault: Failure | None
    wait: float | None


async def _body(response: httpx2.Response) -> tuple[bytes, Failure | None]:
    """Return at most `LIMIT` bytes of a body as they were sent, and the failure where that is not all of it."""
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
    """Return packed data unpacked in one of the formats of zlib, but no more than one byte over `LIMIT`.

    Raises:
        ValueError: for data of none of them, or that ends too early.
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
    """Return the names in a list of models. Raises ValueError, KeyError or TypeError for anything else."""
    names = [model["id"] for model in parse_json(response.data.decode("utf-8"))["data"]]
    return [name for name in names if isinstance(name, str)]


class _Gate:
    """Lets requests pass, and one at a time while the endpoint is away."""

    def __init__(self, config: JudgeConfig, notify: Notify) -> None:
        self.away = False
        self.heard = 0.0  # time of the last answer
        self._config = config
        self._notify = notify
        self._turn = asyncio.Lock()  # first come, first served: no call can stand before the others for long
        self._back = asyncio.Event()
        self._misses = self._probes = 0
        self._reason = ""
        self._since = self._next = self._deadline = 0.0

    @contextlib.asynccontextmanager
    async def turn(self, submitted: float) -> AsyncIterator[bool]:
        """Waits for a request's turn; True for a probe. Raises AwayError after the patience."""
        probe = await self._enter(submitted)
        try:
            yield probe
        finally:
            if probe:
                self._turn.release()

    async def _enter(self, submitted: float) -> bool:
        loop = asyncio.get_running_loop()
        while self.away:
            if submitted > self._deadline:  # who comes after the others gave up has the whole patience
                self._deadline = loop.time() + self._config.patience
            left = self._deadline - loop.time()
            if left <= 0:
                away = loop.time() - self._since
                raise AwayError(f"the judge was away for {away:.0f} s, {self._probes} probes failed; {self._reason}")
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._turn.acquire(), left)
                if await self._probes_now():
                    return True
                self._turn.release()
        return False

    async def _probes_now(self) -> bool:
        """Waits, as the holder of the turn, for the time of the next probe; False when none is needed or worth it."""
        loop = asyncio.get_running_loop()
        try:
            until = min(self._next, self._deadline)
            await asyncio.wait_for(self._back.wait(), max(until - loop.time(), 0))
        except asyncio.TimeoutError:
            return self.away and loop.time() < self._deadline
        except BaseException:
            self._turn.release()
            raise
        return False

    def missed(self, reason: str, probe: bool, least: float = 0.0) -> None:
        """A request did not reach the endpoint, which asks for at least so many seconds of peace."""
        loop = asyncio.get_running_loop()
        self._reason, self._misses = reason, self._misses + 1
        if probe:
            self._probes += 1
            self._next = loop.time() + max(self._config.wait(self._probes + 1), least)
        elif not self.away and self._misses >= MISSES:
            self.away, self._probes = True, 0
            self._back.clear()
            self._since = loop.time()
            self._next = self._since + max(self._config.wait(1), least)
            self._deadline = self._since + self._config.patience
            self._notify("judge down", reason=reason)

    def answered(self) -> None:
        self._misses, self.heard = 0, asyncio.get_running_loop().time()
        if self.away:
            self.away = False
            self._back.set()
            self._notify("judge back", seconds=asyncio.get_running_loop().time() - self._since)


@functools.cache
def _tls() -> ssl.SSLContext:
    """The certificates, read once: that takes longer than all else here."""
    return httpx2.create_ssl_context()


def _retry_after(headers: Mapping[str, Any]) -> float | None:
    """Seconds; a date counts from the server's own clock."""
    given = headers.get("Retry-After", "").strip()
    if given.isascii() and given.replace(".", "", 1).isdigit():
        return float(given)
    with contextlib.suppress(ValueError, TypeError, OverflowError, IndexError):  # of odd dates
        when, now = (email.utils.parsedate_to_datetime(date) for date in (given, headers.get("Date", "")))
        return max((when - now).total_seconds(), 0.0)
    return None
