"""A judge of edited images: a vision-language model behind an OpenAI-compatible endpoint (vLLM, SGLang, hosted ones).

    with Judge(JudgeConfig(model="Qwen/Qwen3-VL-32B-Instruct"), log=folder / "judge-0.jsonl") as judge:
        print(judge.check())
        futures = [judge.submit(candidate, step) for candidate in candidates]  # returns at once
        scores = [future.result() for future in futures]  # Scores, or a Failure: never a substitute score

The judge sees every reference in order, the result, and the instruction. The API key is read from the environment and
goes to the server alone.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx2
from PIL import Image

from uniref_fast.rewards.api_key import ApiKey
from uniref_fast.rewards.circuit_breaker import Notify
from uniref_fast.rewards.client import Answer, Body, Exchange, JudgeClient
from uniref_fast.rewards.config import JudgeConfig
from uniref_fast.rewards.log import CallStatistics, Replay, RewardLog
from uniref_fast.rewards.reply import Reply, read_scores
from uniref_fast.rewards.request import Picture, Request, encode
from uniref_fast.rewards.types import AXES, Candidate, Failure, Scores

__all__ = ["Judge"]

CACHED = 64  # encoded images that are kept, for the references that the members of a group share


class Judge:
    """Scores candidates; a context manager. Each process (rank) has its own judge and its own log.

    Requests are made by one background thread, at most `config.concurrency` at once. When the endpoint is away, calls
    wait until it answers again, for up to `config.patience`.

    Args:
        config: Settings of the judge.
        log: File that gets a record of every call, see `RewardLog`; an existing file is continued. None keeps no log.
        notify: Function that is called as notify(kind, **details) from the judge's thread: "judge down" (reason),
            "judge back" (seconds), "judge format" (json_mode, and the reason why it is weaker than configured). An
            exception that it raises is raised by the futures it concerns.
        earlier: Reward logs that answer calls as `config.replay` does, such as those of a run that is resumed; `log`
            may be one of them.

    Raises:
        ValueError: If the key cannot be sent, or a log cannot be read.
    """

    def __init__(
        self,
        config: JudgeConfig,
        log: Path | None = None,
        notify: Notify | None = None,
        earlier: Sequence[Path] = (),
    ) -> None:
        self.config = config
        self._key = ApiKey(config.key_variable)
        self._replay = Replay([*earlier, *([] if config.replay is None else [config.replay])])
        self._log = None if log is None else RewardLog(log, self._key.hide)
        self._logs_replays = log is not None and log.resolve() not in [path.resolve() for path in self._replay.paths]
        self._listener = notify
        self._statistics = CallStatistics()
        self._pictures: OrderedDict[int, tuple[Image.Image, asyncio.Future[Picture]]] = OrderedDict()
        self._encoders = ThreadPoolExecutor(2, thread_name_prefix="judge-png")
        self._submitting = threading.Lock()  # held while a call is given to the loop, so that none comes after `close`
        self._closed = False
        self._loop: asyncio.AbstractEventLoop
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), name="judge", daemon=True)
        self._thread.start()
        try:
            ready.result()
        except BaseException:
            if self._log is not None:
                self._log.close()
            raise

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def json_mode(self) -> str:
        """Way in which JSON is requested now."""
        return self.client.json_mode

    @property
    def json_reason(self) -> str:
        """Reason why `json_mode` is weaker than configured; empty if it is not."""
        return self.client.json_reason

    def submit(self, candidate: Candidate, step: int) -> Future[Scores | Failure]:
        """Ask for a candidate's scores; returns at once.

        The future holds `Scores`, or the `Failure` of its first reply if no reply could be read. It raises OSError if
        the log could not be written, and CancelledError if the judge was closed first. Kinds of failures:

            "timeout", "connection", "overloaded" (408, 429, 5xx)   after all attempts, or an outage
            "status"                                                another HTTP status; the reason has the body's start
            "oversized"                                             an answer of more than 2 MiB, decompressed
            "error", "refused", "empty", "truncated", "malformed", "schema"
                                                                    see `read_completion` and `read_scores`
            "replay"                                                not in the log to replay, and there is no url

        Args:
            candidate: Candidate, whose images must be RGB.
            step: Step of the training, for the log.

        Raises:
            ValueError: If an image is not RGB.
            RuntimeError: If the judge is closed.
        """
        for name, image in _named(candidate):
            if image.mode != "RGB":
                raise ValueError(
                    f"{name} of candidate {candidate.key} has mode {image.mode}; the judge needs RGB images"
                )
        with self._submitting:
            if self._closed:
                raise RuntimeError("the judge is closed")
            return asyncio.run_coroutine_threadsafe(self._judge(candidate, step), self._loop)

    def check(self) -> str:
        """Ask for the scores of a tiny image, before a run; return a message that says who answered and how fast.

        The request is not repeated, so this does not wait for a server that is still loading.

        Raises:
            ValueError: If there are no scores; the message says what to do.
            RuntimeError: If the judge is closed.
        """
        if not self.config.url:
            return f"no judge is asked: answers come from {self.config.replay}"
        with self._submitting:
            if self._closed:
                raise RuntimeError("the judge is closed")
            future = asyncio.run_coroutine_threadsafe(self._check(), self._loop)
        return future.result()

    def statistics(self) -> dict[str, float]:
        """Return the statistics of the calls since the last time that they were taken; a call asks for one reply.

        Returns:
            Number of "calls", of "retries" (requests after the first of a call) and of "replayed" calls; the share of
            calls that "failed", and of each kind as "failed/<kind>"; "seconds_mean" and "seconds_p95" of the calls
            that were made, with their retries.
        """
        return self._statistics.take()

    def void(self, step: int) -> None:
        """Mark the failures of a step, so that they are asked again when the run is resumed."""
        if self._log is not None:
            self._log.void(step)

    def close(self) -> None:
        """Cancel the waiting calls, and end the thread. A second call does nothing."""
        with self._submitting:
            if self._closed:
                return
            self._closed = True
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._encoders.shutdown()
        if self._log is not None:
            self._log.close()

    # ---- in the thread ----

    async def _serve(self, ready: Future[None]) -> None:
        try:
            self._loop = asyncio.get_running_loop()
            self._stop = asyncio.Event()
            self._slots = asyncio.Semaphore(self.config.concurrency)
            self.client = JudgeClient(self.config, self._key, self._notify)
        except BaseException as error:
            ready.set_exception(error)
            return
        ready.set_result(None)
        await self._stop.wait()
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=1.0)  # repeated: a task may have been about to start another one
        await self.client.close()

    async def _judge(self, candidate: Candidate, step: int) -> Scores | Failure:
        submitted = self._loop.time()
        calls = (self._call(candidate, step, sample, submitted) for sample in range(self.config.samples))
        results = await asyncio.gather(*calls)
        scores = [result.axes for result in results if isinstance(result, Scores)]
        if not scores:
            return results[0]
        return Scores({axis: fmean(axes[axis] for axes in scores) for axis in AXES})

    async def _call(self, candidate: Candidate, step: int, sample: int, submitted: float) -> Scores | Failure:
        """Return the result of one reply, from a replayed log or from the server; it is logged and counted."""
        async with self._slots:
            began = self._loop.time()
            pictures = [await self._picture(image) for image in candidate.references]
            pictures.append(await self._encoded(candidate.image))
            options, side = self.config.options(sample), self.config.max_side
            request = Request(options, candidate.instruction, tuple(pictures), sample, side)
            content = request.content
            record: dict[str, Any] = {
                "step": step, "key": list(candidate.key), "content": content, "sample": sample,
                "attempts": 0, "seconds": 0.0, "status": None, "reply": None, "finish_reason": None,
            }  # fmt: skip
            old = self._replay.find(content, step, candidate.key, passing=not self.config.url)
            if old:
                result = Replay.result(old)
                kept = ("status", "reply", "finish_reason", "refusal", "usage")
                record |= {name: old[name] for name in kept if name in old} | {"replayed": True}
            elif not self.config.url:
                result = Failure("replay", f"no call of this content in {self.config.replay}, and there is no url")
            else:
                exchange = await self.client.ask(self._body(request), content, submitted)
                result = _result(exchange, record)
                record["seconds"] = round(self._loop.time() - began, 3)
            if isinstance(result, Failure):
                result = Failure(result.kind, self._key.hide(result.reason))
            self._statistics.add(result, record["attempts"], record["seconds"], replayed=bool(old))
            if self._log is not None and (self._logs_replays or not old):
                self._log.append(record, result)
            return result

    async def _picture(self, image: Image.Image) -> Picture:
        """Return an encoded reference; it is encoded once for all candidates that share it."""
        if id(image) not in self._pictures:
            self._pictures[id(image)] = image, asyncio.ensure_future(self._encoded(image))
            if len(self._pictures) > CACHED:
                self._pictures.popitem(last=False)
        self._pictures.move_to_end(id(image))
        return await asyncio.shield(self._pictures[id(image)][1])

    async def _encoded(self, image: Image.Image) -> Picture:
        return await self._loop.run_in_executor(self._encoders, encode, image, self.config.max_side)

    def _body(self, request: Request) -> Body:
        """Return a function that writes the JSON of a request, some megabytes, outside the loop."""
        return lambda mode: self._loop.run_in_executor(self._encoders, request.body, mode)

    def _notify(self, kind: str, **details: Any) -> None:
        if self._listener is not None:
            self._listener(kind, **self._key.hide(details))

    async def _check(self) -> str:
        try:
            return self._key.hide(await self._checked())
        except ValueError as error:
            reason = self._key.hide(str(error))
        raise ValueError(reason)  # outside the handler, so that it does not keep the first error with its text

    async def _checked(self) -> str:
        config, began = self.config, self._loop.time()
        picture = encode(Image.new("RGB", (64, 64), (200, 40, 40)), config.max_side)
        request = Request(config.options(0), "Keep the picture as it is.", (picture, picture), 0, config.max_side)
        tried = f"the judge {config.model!r} at {config.url}"
        try:
            answer = await self.client.once(self._body(request))
        except (httpx2.RequestError, asyncio.TimeoutError) as error:
            what = f"no answer within {config.timeout:g} s"
            if isinstance(error, httpx2.RequestError):
                what = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{tried} does not answer: {what}; start a server there, such as `vllm serve {config.model}`, or set "
                "the judge's url"
            ) from None
        if (reply := answer.reply) is None:
            raise ValueError(f"{tried} refused a first call: {answer.reason}; {await self._remedy(answer)}")
        result = read_scores(reply) if isinstance(reply, Reply) else reply
        if isinstance(result, Failure):
            raise ValueError(
                f"{tried} answers, but gives no scores: {result.kind}: {result.reason}; use a model that "
                "reads several images and follows instructions, or raise max_tokens if its thinking is long"
            )
        weaker = f" ({self.json_reason})" if self.json_reason else ""
        seconds = self._loop.time() - began
        return f"{tried} answers in {seconds:.1f} s, JSON is asked for by {self.json_mode!r}{weaker}"

    async def _remedy(self, answer: Answer) -> str:
        variable = self.config.key_variable
        if answer.status in (401, 403):
            if variable in os.environ:
                return f"the key in the environment variable {variable} may be wrong or not valid for this model"
            return f"put the API key into the environment variable {variable}, which is not set"
        models = await self.client.models()
        if models:
            listed = ", ".join(models[:20]) + (", ..." if len(models) > 20 else "")
            return f"models listed at {self.config.base}/models: {listed}"
        return f"{self.config.base}/models lists no models: check that the url goes as far as /v1, and the model's name"


def _result(exchange: Exchange, record: dict[str, Any]) -> Scores | Failure:
    """Return the result of an exchange, and write its facts into the record."""
    record["attempts"], record["status"] = exchange.attempts, exchange.status
    reply = exchange.result
    if isinstance(reply, Failure):
        return reply
    record["reply"], record["finish_reason"] = reply.text, reply.finish_reason
    record |= {name: value for name in ("refusal", "usage") if (value := getattr(reply, name)) is not None}
    return read_scores(reply)


def _named(candidate: Candidate) -> list[tuple[str, Image.Image]]:
    pictures = [(f"picture {number}", image) for number, image in enumerate(candidate.references, start=1)]
    return [*pictures, ("the result", candidate.image)]
