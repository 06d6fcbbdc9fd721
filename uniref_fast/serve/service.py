"""Edits of a request: submitted to the engine, followed, and turned into the bodies of responses."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image

from uniref_fast.engine import EditProgress, Engine, EngineClosedError, QueueFullError
from uniref_fast.request import EditRequest
from uniref_fast.serve.config import ServeConfig
from uniref_fast.serve.errors import NO_RETRY, ApiError
from uniref_fast.serve.fields import EditCall
from uniref_fast.serve.metrics import Metrics
from uniref_fast.serve.pictures import background_of, check_pictures, data_url, decode, encode
from uniref_fast.serve.remote import fetch

__all__ = ["Batch", "EditService", "OneEdit"]

log = logging.getLogger(__name__)

KEEP_ALIVE = 15.0
"""Seconds without an event after which a stream sends a comment, so that no proxy takes it for dead."""

RETRY_AFTER = (1, 60)
"""Least and largest number of seconds of the header Retry-After."""

PARAMS = {
    "num_inference_steps": "steps",
    "true_cfg_scale": "guidance",
    "height": "size",
    "width": "size",
    "the result": "size",
    "image": "image",
}
"""Fields by words of the messages of `Engine.check`."""

DECODING = 4
"""Number of requests whose pictures are decoded at the same time."""

FETCHING = 4
"""Number of pictures behind URLs that are read at the same time."""


@dataclass(eq=False)
class OneEdit:
    """An edit of a request, from its submission to its image.

    Attributes:
        index: Its place among the images of the request.
        request: The request of the engine.
        size: (width, height) of the result.
        future: Future of the result.
        progress: Latest progress; None before the first step.
        started: When it was submitted, in seconds of `time.monotonic`.
        ended: When its future ended, likewise.
        background: "transparent" if its latest image has pixels that are not opaque, otherwise "opaque".
    """

    index: int
    request: EditRequest
    size: tuple[int, int]
    future: Future[Any] = field(default_factory=Future)
    progress: EditProgress | None = None
    started: float = field(default_factory=time.monotonic)
    ended: float = 0.0
    background: str = "opaque"

    @property
    def steps(self) -> int:
        """Number of its denoising steps; before the first one the number that was asked for."""
        if self.progress:
            return self.progress.num_inference_steps
        assert self.request.num_inference_steps is not None  # the server has a default
        return self.request.num_inference_steps

    @property
    def waited(self) -> float:
        """Seconds until it was encoded."""
        return self.progress.waited if self.progress else 0.0

    @property
    def ran(self) -> float:
        """Seconds from then to its image."""
        return max(self.ended - self.started - self.waited, 0.0)

    def usage(self) -> dict[str, Any]:
        """Return its numbers of tokens as OpenAI's API names them."""
        sample = self.progress.sample if self.progress else None
        output = math.prod(sample.target) if sample else 0
        images = sum(map(math.prod, sample.references)) if sample else 0
        text = sample.length - output - images if sample else 0
        return {
            "input_tokens": text + images,
            "input_tokens_details": {"text_tokens": text, "image_tokens": images},
            "output_tokens": output,
            "total_tokens": text + images + output,
        }


@dataclass(eq=False)
class Batch:
    """The edits of one request.

    Attributes:
        call: The fields of the request.
        edits: Its edits.
        events: Events for a stream: the edit, its steps so far (None when it has ended), and a partial image or None.
        is_cancelled: True if edits that are submitted from now on are cancelled at once.
    """

    call: EditCall
    edits: list[OneEdit] = field(default_factory=list)
    events: asyncio.Queue[tuple[OneEdit, int | None, Image.Image | None]] = field(default_factory=asyncio.Queue)
    is_cancelled: bool = False

    def add(self, edit: OneEdit) -> None:
        """Add an edit that was submitted. `cancel` may run in another thread at the same time."""
        self.edits.append(edit)
        if self.is_cancelled:
            edit.future.cancel()

    def cancel(self) -> None:
        """Cancel the edits that have no image yet."""
        self.is_cancelled = True
        for edit in list(self.edits):
            edit.future.cancel()


class EditService:
    """Implementation of the routes: checks requests, runs their edits, and describes the server.

    Args:
        engine: Engine of the edits.
        config: Settings of the server.

    Attributes:
        active: Number of edit requests between their arrival and the end of their response.
        is_draining: True after a signal to stop: new edits are refused.
    """

    def __init__(self, engine: Engine, config: ServeConfig) -> None:
        if engine.max_waiting is not None and engine.max_waiting < config.limits.n:  # more could never be queued
            config = replace(config, limits=replace(config.limits, n=engine.max_waiting))
        self.engine, self.config = engine, config
        self.metrics = Metrics(engine)
        self.active = 0
        self.is_draining = False
        self.reading = 0  # requests whose body and pictures are being read
        self._created = int(time.time())
        self._recent: deque[float] = deque(maxlen=32)  # seconds of the last edits
        self._decoders = ThreadPoolExecutor(DECODING, "uniref_fast.decode")
        self._fetchers = ThreadPoolExecutor(FETCHING, "uniref_fast.fetch")

    # ---- admission ----

    @contextlib.contextmanager
    def admitted(self) -> Any:
        """Count a request while the block runs.

        Raises:
            ApiError: If the server is stopping, its engine has failed, or its queue is full.
        """
        if self.is_draining:
            raise ApiError(503, "shutting_down", "the server is stopping", headers=self._retry_after())
        if self.engine.stats().has_failed:
            raise ApiError(503, "engine_failed", "the engine has failed; the server has to be started again")
        self.check_queue()
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1

    def check_queue(self) -> None:
        """Raise ApiError if no request can wait, counting those that are being read."""
        most = self.engine.max_waiting
        if most is not None and self.engine.stats().waiting + self.reading >= most:
            raise self._queue_full()

    def _queue_full(self) -> ApiError:
        message = f"{self.engine.max_waiting} edits are waiting, as many as this server allows; try again later"
        return ApiError(429, "queue_full", message, headers=self._retry_after())

    def _retry_after(self) -> dict[str, str]:
        seconds = sum(self._recent) / len(self._recent) if self._recent else 0
        return {"retry-after": str(min(max(math.ceil(seconds), RETRY_AFTER[0]), RETRY_AFTER[1]))}

    # ---- edits ----

    async def pictures(self, call: EditCall) -> list[Image.Image]:
        """Return the decoded pictures of a request."""
        sources: list[bytes | str] = []
        loop, limits = asyncio.get_running_loop(), self.config.limits
        for source in call.images:
            if isinstance(source, str) and source[:5].lower() != "data:":
                left = limits.body_bytes - sum(map(len, sources))
                source = await loop.run_in_executor(self._fetchers, fetch, source, self.config.image_hosts, left)
            sources.append(source)
        return await loop.run_in_executor(self._decoders, self._decode, sources)

    def _decode(self, sources: Sequence[bytes | str]) -> list[Image.Image]:
        """Return the pictures of files and data URLs."""
        contents = [data_url(source) if isinstance(source, str) else source for source in sources]
        check_pictures(contents, self.config.limits)
        return decode(contents)

    async def submit(self, batch: Batch, images: Sequence[Image.Image]) -> None:
        """Submit the edits of a request to the engine: all, or none if one cannot be queued.

        Args:
            batch: The request, without edits. Cancel it if this coroutine is cancelled, because the thread that
                submits the edits continues.
            images: Its decoded pictures.

        Raises:
            ApiError: If the model cannot run the request, or the engine does not take it.
        """
        await asyncio.to_thread(self._submit, batch, images, asyncio.get_running_loop())

    def _submit(self, batch: Batch, images: Sequence[Image.Image], loop: asyncio.AbstractEventLoop) -> None:
        call = batch.call
        seed = secrets.randbelow(2**31) if call.seed is None else call.seed
        requests = [self._request(call, images, seed + number) for number in range(call.n)]
        size = self._check(requests[0], call)
        try:
            for number, request in enumerate(requests):
                if batch.is_cancelled:
                    return
                edit = OneEdit(number, request, size)
                edit.future = self.engine.submit(request, self._follow(edit, batch, loop))
                batch.add(edit)
                edit.future.add_done_callback(functools.partial(self._ended, edit, batch, loop))
        except BaseException as error:
            batch.cancel()
            if isinstance(error, QueueFullError):
                raise self._queue_full() from None
            if isinstance(error, EngineClosedError):
                raise self._closed(error) from error
            raise

    def _request(self, call: EditCall, images: Sequence[Image.Image], seed: int) -> EditRequest:
        width, height = call.size or (None, None)
        lora = dict.fromkeys(self.config.active_loras, 1.0) | dict(call.lora) if self.config.loras else None
        return EditRequest(
            call.prompt,
            images,
            negative_prompt=call.negative_prompt,
            true_cfg_scale=call.guidance,
            width=width,
            height=height,
            num_inference_steps=call.steps,
            seed=seed,
            lora=lora,
        )

    def _check(self, request: EditRequest, call: EditCall) -> tuple[int, int]:
        """Return the size of the result. Raises ApiError for a request that the model cannot run."""
        try:
            size = self.engine.check(request).result_size
        except (ValueError, TypeError) as error:
            message = str(error).removeprefix("request 1").lstrip(": ")
            raise ApiError(400, "invalid_request", message, _param_of(message)) from error
        if call.size not in (None, size):
            asked, given = ("x".join(map(str, each)) for each in (call.size or (), size))
            message = f"the model makes no image of {asked} pixels; the next smaller size is {given}"
            raise ApiError(400, "invalid_value", message, "size")
        most = self.config.limits.result_pixels
        if math.prod(size) > most:
            message = f"the result would have {size[0]} x {size[1]} pixels; at most {most} are possible; give size"
            raise ApiError(400, "invalid_value", message, "size")
        return size

    def _follow(self, edit: OneEdit, batch: Batch, loop: asyncio.AbstractEventLoop) -> Callable[[EditProgress], None]:
        """Return the function that the engine calls after each step of an edit."""
        partial = batch.call.partial_images

        def follow(progress: EditProgress) -> None:
            edit.progress = replace(progress, _preview=_no_preview)  # which would keep the tensors of the edit
            if batch.call.stream:
                total = edit.steps  # a model may have its own number
                shown = {total * number // (partial + 1) for number in range(1, partial + 1)} - {0, total}
                preview = progress.preview() if progress.steps in shown else None
                _put(batch, loop, (edit, progress.steps, preview))

        return follow

    def _ended(self, edit: OneEdit, batch: Batch, loop: asyncio.AbstractEventLoop, _: Any) -> None:
        edit.ended = time.monotonic()
        if batch.call.stream:
            _put(batch, loop, (edit, None, None))
        if edit.future.cancelled() or edit.future.exception() is not None:
            return
        self.metrics.images.inc()
        self.metrics.waited.observe(edit.waited)
        self.metrics.ran.observe(edit.ran)
        self._recent.append(edit.waited + edit.ran)

    async def result(self, batch: Batch) -> dict[str, Any]:
        """Wait for all edits of a request, and return the body of the response.

        Raises:
            ApiError: If an edit has failed; the others are then cancelled.
        """
        images = await self._gathered([asyncio.wrap_future(edit.future) for edit in batch.edits], batch)
        data = [await self.image(edit, image, batch.call) for edit, image in zip(batch.edits, images, strict=True)]
        return self.describe(batch, batch.edits) | {"created": int(time.time()), "data": data}

    async def _gathered(self, futures: Sequence[asyncio.Future[Any]], batch: Batch) -> list[Any]:
        try:
            done, _ = await asyncio.wait(futures, return_when=asyncio.FIRST_EXCEPTION)
        except asyncio.CancelledError:
            batch.cancel()
            raise
        for future in done:
            closed = EngineClosedError("the engine was closed") if future.cancelled() else None  # it cancels its edits
            if error := closed or future.exception():
                batch.cancel()
                raise self.failure(error) from error
        return [future.result() for future in futures]

    async def image(self, edit: OneEdit, image: Image.Image, call: EditCall) -> dict[str, Any]:
        """Return the entry of an image in a response."""
        return {
            "b64_json": await self._encoded(edit, image, call),
            "seed": edit.request.seed,
            "seconds_waited": round(edit.waited, 4),
            "seconds_run": round(edit.ran, 4),
        }

    async def _encoded(self, edit: OneEdit, image: Image.Image, call: EditCall) -> str:
        """Return an image of an edit as a file in base64, and record its background."""
        edit.background = await asyncio.to_thread(background_of, image, call.output_format)
        return await asyncio.to_thread(encode, image, call.output_format, call.output_compression)

    def describe(self, batch: Batch, edits: Sequence[OneEdit]) -> dict[str, Any]:
        """Return the entries that a response and an event share, after the images are encoded."""
        usages = [edit.usage() for edit in edits]
        total: dict[str, Any] = {
            name: sum(usage[name] for usage in usages) for name in ("input_tokens", "output_tokens", "total_tokens")
        }
        total["input_tokens_details"] = {
            name: sum(usage["input_tokens_details"][name] for usage in usages)
            for name in ("text_tokens", "image_tokens")
        }
        found = {
            "background": max(edit.background for edit in edits),  # transparent if one of them is
            "output_format": batch.call.output_format,
            "size": "x".join(map(str, edits[0].size)),
            "steps": edits[0].steps,
            "usage": total,
        }
        if batch.call.safety_identifier:
            found["safety_identifier"] = batch.call.safety_identifier
        return found

    def failure(self, error: BaseException) -> ApiError:
        """Return the error of the response for an error of an edit."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, torch.OutOfMemoryError):
            message = "the edit does not fit the memory of the device; give fewer or smaller images, or a smaller size"
            return ApiError(503, "out_of_memory", message, headers=NO_RETRY)
        if isinstance(error, EngineClosedError) or self.engine.stats().has_failed:
            return self._closed(error)
        log.error("an edit has failed", exc_info=error)
        message = f"the edit has failed ({type(error).__name__}); the log of the server says why"
        return ApiError(500, "edit_failed", message, headers=NO_RETRY)

    def _closed(self, error: BaseException) -> ApiError:
        if self.engine.stats().has_failed:
            return ApiError(503, "engine_failed", "the engine has failed; the server has to be started again")
        return ApiError(503, "shutting_down", "the server is stopping", headers=self._retry_after())

    def deadline(self) -> ApiError:
        """Return the error of a request that took too long."""
        seconds = self.config.limits.seconds
        message = f"the request took more than {seconds:g} seconds, the limit of this server, and was cancelled"
        return ApiError(504, "deadline_exceeded", message, headers=NO_RETRY)

    # ---- events ----

    async def events(self, batch: Batch, until: float) -> AsyncIterator[dict[str, Any] | None]:
        """Yield the events of a request until all its images are there, and None after some time without one.

        Args:
            batch: Its edits.
            until: Time of `time.monotonic` at which they are cancelled.

        Raises:
            ApiError: If an edit has failed or the time is over.
        """
        left, partials = len(batch.edits), dict.fromkeys(batch.edits, 0)
        stats = self.engine.stats()
        try:
            for edit in batch.edits:
                yield self._event("progress", edit, batch) | {"step": 0, "waiting": stats.waiting}
            while left:
                try:
                    seconds = min(max(until - time.monotonic(), 0), KEEP_ALIVE)
                    edit, steps, preview = await asyncio.wait_for(batch.events.get(), seconds)
                except asyncio.TimeoutError:
                    if time.monotonic() >= until:
                        raise self.deadline() from None
                    yield None
                    continue
                if steps is None:
                    left -= 1
                    (done,) = await self._gathered([asyncio.wrap_future(edit.future)], batch)
                    body = await self.image(edit, done, batch.call)
                    yield self._event("completed", edit, batch) | self.describe(batch, [edit]) | body
                    continue
                yield self._event("progress", edit, batch) | {"step": steps}
                if preview is not None:
                    content = await self._encoded(edit, preview, batch.call)
                    yield self._event("partial_image", edit, batch) | {
                        "b64_json": content, "partial_image_index": partials[edit], "step": steps,
                    }  # fmt: skip
                    partials[edit] += 1
        finally:
            batch.cancel()

    def _event(self, kind: str, edit: OneEdit, batch: Batch) -> dict[str, Any]:
        return {
            "type": f"image_edit.{kind}",
            "created_at": int(time.time()),
            "image_index": edit.index,
            "size": "x".join(map(str, edit.size)),
            "quality": "auto",
            "background": edit.background,
            "output_format": batch.call.output_format,
            "steps": edit.steps,
        }

    # ---- description ----

    def models(self) -> dict[str, Any]:
        """Return the list of models, with the defaults and limits of this server."""
        config = self.config
        names = (config.model, *config.aliases)
        more = {
            "defaults": {"steps": config.steps, "guidance": config.guidance},
            "loras": list(config.loras),
            "limits": {
                "images": config.limits.images, "pixels": config.limits.pixels, "n": config.limits.n,
                "result_pixels": config.limits.result_pixels, "steps": config.limits.steps,
                "body_bytes": config.limits.body_bytes, "seconds": config.limits.seconds,
            },
        }  # fmt: skip
        data = [
            {"id": name, "object": "model", "created": self._created, "owned_by": "uniref_fast", **more}
            for name in names
        ]
        return {"object": "list", "data": data}


def _no_preview() -> None:
    """Return nothing: a preview is possible in the thread of the engine only."""


def _put(batch: Batch, loop: asyncio.AbstractEventLoop, event: tuple[OneEdit, int | None, Image.Image | None]) -> None:
    """Add an event from any thread."""
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
        loop.call_soon_threadsafe(batch.events.put_nowait, event)


def _param_of(message: str) -> str | None:
    """Return the field that a message of `Engine.check` is about."""
    for words, name in PARAMS.items():
        if words in message:
            return name
    return None
