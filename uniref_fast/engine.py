"""`Engine(pipe)` runs edits that arrive over time in one packed denoising loop, which they join and leave.

    with uniref_fast.Engine(pipe, max_tokens=32768) as engine:
        future = engine.submit(EditRequest("make it night", [street], seed=1))
        image = future.result()

One worker thread owns the pipeline. Between two denoising steps, finished edits leave the loop and waiting ones join
it. An image equals the image of `edit` for the same request alone, with the same implementation of each operation,
whatever else was running (docs/numerics.md).
"""

from __future__ import annotations

import atexit
import logging
import math
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from uniref_fast.costs import transformer_peak, weight_bytes
from uniref_fast.edit_loop import Edit, EditLoop
from uniref_fast.edit_session import EditSession, check_output_type, warn_of_guidance
from uniref_fast.encode import text_lengths
from uniref_fast.engine_queue import EditProgress, Job, Queue
from uniref_fast.layout import Sample
from uniref_fast.models.kept_references import KeepDtype, empty_stores
from uniref_fast.models.module_hooks import free_model_hooks, is_offloaded
from uniref_fast.models.packed import PackedModel
from uniref_fast.patch.install import patched_parts
from uniref_fast.quantised import compute_dtype, row_dependence
from uniref_fast.request import EditRequest, Geometry
from uniref_fast.visibility import Rule

__all__ = ["EditProgress", "Engine", "EngineClosedError", "EngineStats", "QueueFullError", "tokens_in_memory"]

MAX_FAILURES = 16
"""Number of steps that may fail, without an edit that finishes between them, until the running edits fail."""

MEMORY_SHARE = 0.8
"""Part of the free memory that packs are planned for; encoding and decoding need some of the rest."""

log = logging.getLogger(__name__)


class QueueFullError(RuntimeError):
    """Error of `submit`: as many requests are waiting as `max_waiting` allows."""


class EngineClosedError(RuntimeError):
    """Error of `submit`: the engine was closed or has failed."""


@dataclass(frozen=True)
class EngineStats:
    """State of an engine.

    Attributes:
        waiting: Requests that wait.
        running: Edits in the denoising loop.
        tokens: Tokens of these edits.
        waiting_tokens: Tokens of the requests that wait, without those that have arrived since the last step.
        finished: Edits that have a result.
        failed: Edits that ended with an error.
        cancelled: Edits that were cancelled.
        steps: Steps of the denoising loop.
        step_seconds: Seconds that these steps took, without encoding and decoding.
        has_failed: True if the engine itself has failed, after which it takes no requests.
    """

    waiting: int
    running: int
    tokens: int
    waiting_tokens: int
    finished: int
    failed: int
    cancelled: int
    steps: int
    step_seconds: float
    has_failed: bool


class Engine:
    """Run edits that arrive over time in one packed denoising loop.

    Its methods may be called from any thread. In asyncio use `await asyncio.wrap_future(engine.submit(request))`.

    Args:
        pipe: A pipeline of a supported family, patched or not. Nothing else may use it until the engine is closed.
        max_tokens: Largest number of tokens of the edits that run together. A request with more tokens runs alone.
            None takes what fits the free memory of a CUDA device (`tokens_in_memory`), and has no limit on a CPU.
        max_waiting: Largest number of requests that wait; None has no limit.
        budget, visibility, impl, keep_references, drift, keep_dtype, mode, modules_to_not_convert: Options of
            `uniref_fast.edit`, for all requests. The mode "fast" quantises the weights until the engine is closed.

    Raises:
        ValueError: If the pipeline or an option cannot be used; the message says why.
        TypeError: If the pipeline has a class that is not supported.
    """

    def __init__(
        self,
        pipe: Any,
        max_tokens: int | None = None,
        *,
        max_waiting: int | None = None,
        budget: int | None = None,
        visibility: str | Rule = "full",
        impl: str | None = None,
        keep_references: bool | int | Literal["auto"] = False,
        drift: float | None = None,
        keep_dtype: KeepDtype | None = None,
        mode: str = "exact",
        modules_to_not_convert: Sequence[str] | None = None,
    ) -> None:
        for name, value in (("max_tokens", max_tokens), ("max_waiting", max_waiting)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number from 1, or None, got {value!r}")
        self._session = EditSession(
            pipe,
            budget=budget,
            visibility=visibility,
            impl=impl,
            keep_references=keep_references,
            drift=drift,
            keep_dtype=keep_dtype,
            mode=mode,
            modules_to_not_convert=modules_to_not_convert,
        )
        if reason := row_dependence(self._session.model.transformer):
            warnings.warn(f"each result depends a little on the edits that run beside it: {reason}", stacklevel=2)
        if max_tokens is None and self._session.device.type == "cuda":
            free = _free_bytes(self._session)
            # klein-KV and Qwen-Image-2.1 keep references without the option
            max_tokens = tokens_in_memory(self._session.model, free, kept=self._session.keep_references is not False)
        self.max_tokens, self.max_waiting = max_tokens, max_waiting
        self._loop = EditLoop(self._session.model, max_tokens)
        self._running: dict[Edit, Job] = {}
        self._queue = Queue()
        self._joining: list[Job] = []  # the request that is being encoded
        self._ended = {"finished": 0, "failed": 0, "cancelled": 0}
        self._steps = self._failures = 0
        self._step_seconds = 0.0
        self._most_edits: int | None = None  # encoding ran out of memory beside so many: wait until one has left
        self._changed = threading.Condition()  # guards the queue, the counts and what follows
        self._closing = False
        self._failure: BaseException | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._work, name="uniref_fast.Engine", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            raise self._failure
        atexit.register(self.close, drain=False)

    # ---- the caller's side ----

    def submit(
        self,
        request: EditRequest | Mapping[str, Any],
        on_progress: Callable[[EditProgress], object] | None = None,
        *,
        priority: int = 0,
        output_type: str = "pil",
    ) -> Future[Any]:
        """Queue a request and return the future of its result.

        `future.cancel()` works until the result is there: a running edit leaves the loop after the current step.

        Args:
            request: An `EditRequest`, or a mapping of its fields.
            on_progress: Function that the worker thread calls after each step of this edit. All edits wait for it. An
                exception that it raises ends this edit and becomes the exception of the future.
            priority: Whole number. Requests of a higher priority start first, those of one priority in their order of
                arrival.
            output_type: "pil", "np", "pt" or "latent", as for `uniref_fast.edit`.

        Raises:
            ValueError: If the request cannot run; the message says why.
            TypeError: If the request or a field has the wrong type, likewise.
            QueueFullError: If `max_waiting` requests are waiting.
            EngineClosedError: If the engine was closed or has failed.
        """
        check_output_type(output_type)
        if not isinstance(priority, int):
            raise TypeError(f"priority must be a whole number, got {priority!r}")
        if on_progress is not None and not callable(on_progress):
            raise TypeError(f"on_progress must be a function, got {on_progress!r}")
        (checked,) = self._session.check([request])
        warn_of_guidance({1: checked})
        job = Job(checked, output_type, Future(), on_progress, priority)
        with self._changed:
            if self._failure is not None:
                raise EngineClosedError(f"the engine has failed: {self._failure}") from self._failure
            if self._closing:
                raise EngineClosedError("the engine is closed")
            if self.max_waiting is not None and self._waiting() >= self.max_waiting:
                raise QueueFullError(f"{self.max_waiting} requests are waiting, as many as max_waiting allows")
            self._queue.add(job)
            self._changed.notify_all()
        return job.future

    def check(self, request: EditRequest | Mapping[str, Any]) -> Geometry:
        """Return the sizes of a request, without running a model.

        Args:
            request: An `EditRequest`, or a mapping of its fields.

        Raises:
            ValueError: If the request cannot run; the message says why.
            TypeError: If the request or a field has the wrong type, likewise.
        """
        (checked,) = self._session.check([request])
        return checked.geometry

    def stats(self) -> EngineStats:
        """Return the numbers of waiting, running and ended edits."""
        with self._changed:
            return EngineStats(
                waiting=self._waiting(),
                running=len(self._running),
                tokens=sum(edit.tokens for edit in self._running),
                waiting_tokens=sum(job.tokens or 0 for job in self._queue.jobs),
                steps=self._steps,
                step_seconds=self._step_seconds,
                has_failed=self._failure is not None,
                **self._ended,
            )

    def close(self, drain: bool = True) -> None:
        """Stop taking requests, and return when no edit is left. It may be called again.

        In `on_progress` and in a callback of a future, which the worker thread runs, it returns at once.

        Args:
            drain: Finish all requests that were submitted. False cancels them, the running ones after the current step.
        """
        with self._changed:
            self._closing = True
            jobs = [] if drain else self._unfinished()
            self._changed.notify_all()
        for job in jobs:  # without the lock, because callbacks of a future may call the engine
            job.future.cancel()
        if threading.current_thread() is self._thread:
            return
        self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(drain=kind is None)

    def _waiting(self) -> int:
        return sum(not job.future.cancelled() for job in (*self._joining, *self._queue.jobs))

    def _unfinished(self) -> list[Job]:
        return [*self._queue.jobs, *self._joining, *self._running.values()]

    # ---- the worker's side ----

    def _work(self) -> None:
        try:
            if self._session.device.type == "cuda":  # the current device belongs to a thread
                torch.cuda.set_device(self._session.device)
            with self._session.computing():
                self._started.set()
                while self._wait():
                    self._remove_cancelled()
                    self._admit()
                    self._step()
        except BaseException as error:  # a fault of the engine itself: nobody waits for a result that never comes
            if self._started.is_set():
                log.exception("the engine has failed")
            with self._changed:
                self._failure = error
                left = self._unfinished()
                self._queue.jobs, self._joining = [], []
                self._running.clear()
            self._loop.leave(list(self._loop.edits))
            for job in left:
                self._end(job, error=error)
            self._started.set()

    def _wait(self) -> bool:
        """Wait until there is something to run. Return False if the engine is closed and has nothing left."""
        if not self._loop.edits:
            with self._changed:
                idle = not self._queue.jobs
            if idle:
                free_model_hooks(self._session.pipe)
        with self._changed:
            while not self._loop.edits and not self._queue.jobs:
                if self._closing:
                    return False
                self._changed.wait()
        return True

    def _remove_cancelled(self) -> None:
        with self._changed:
            waiting = [job for job in self._queue.jobs if job.future.cancelled()]
            self._queue.jobs = [job for job in self._queue.jobs if job not in waiting]
            running = [edit for edit, job in self._running.items() if job.future.cancelled()]
            jobs = waiting + [self._running.pop(edit) for edit in running]
        self._loop.leave(running)
        for job in jobs:
            self._end(job)

    def _admit(self) -> None:
        """Encode waiting requests that fit, and add them to the loop."""
        self._count_tokens()
        if self._most_edits is not None and len(self._loop.edits) >= self._most_edits:
            return
        self._most_edits = None
        while True:
            self._remove_cancelled()
            used = sum(edit.tokens for edit in self._loop.edits)
            room = math.inf if not used or self.max_tokens is None else self.max_tokens - used
            with self._changed:
                job = self._queue.take(room)
                if job is None:
                    return
                self._joining = [job]
            job.started = time.monotonic()
            states = [(each, each.get_state()) for each in job.checked.request.generators]
            try:
                if self._loop.edits and is_offloaded(self._session.model.transformer, whole=True):
                    free_model_hooks(self._session.pipe)  # encoders and transformer are not loaded together
                edit = self._session.encode(job.checked)
                job.first = edit.copy()
            except Exception as error:
                waits = isinstance(error, torch.OutOfMemoryError) and bool(self._loop.edits)
                with self._changed:
                    self._joining = []
                    if waits:
                        for generator, state in states:
                            generator.set_state(state)
                        self._queue.put_back(job)
                if not waits:
                    self._end(job, error=error)
                    continue
                self._most_edits = len(self._loop.edits)
                self._free_memory(error)
                return
            self._loop.join(edit)
            with self._changed:
                self._joining = []
                self._running[edit] = job

    def _count_tokens(self) -> None:
        """Count the tokens of waiting requests. A request whose prompt cannot be encoded fails."""
        with self._changed:
            uncounted = [job for job in self._queue.jobs if job.tokens is None]
        for job in uncounted:
            request, sizes = job.checked.request, job.checked.geometry
            try:
                job.tokens = request.num_images * sum(
                    sizes.sample(length).length for length in text_lengths(self._session.pipe, request, sizes)
                )
            except Exception as error:
                with self._changed:
                    self._queue.jobs.remove(job)
                self._end(job, error=error)

    def _step(self) -> None:
        """Run a step, and end the edits that have finished or failed."""
        edits = list(self._loop.edits)
        if not edits:
            return
        before = {edit: edit.steps for edit in edits}
        failed: dict[Edit, BaseException] = {}
        start = time.monotonic()
        try:
            self._loop.step()
        except Exception as error:
            failed = self._recover(error, edits)
            before |= {edit: 0 for edit in edits if edit.steps < before[edit]}  # restarted
        with self._changed:
            self._steps += 1
            self._step_seconds += time.monotonic() - start
        failed |= self._errors(edits)
        for edit in edits:
            if edit in failed or edit.steps <= before[edit]:
                continue
            job = self._running[edit]
            try:
                self._report(job, edit)
                if edit.is_finished:
                    edit.kept = None  # decoding needs the memory
                    result = self._decode(edit, job.output_type)
                    self._remove(edit)
                    self._end(job, result=result)
                    self._failures = 0
            except BaseException as error:  # `on_progress` may raise anything
                failed[edit] = error
        for edit, reason in failed.items():
            self._end(self._remove(edit), error=reason)

    def _decode(self, edit: Edit, output_type: str) -> Any:
        try:
            return self._session.decode(edit, output_type)
        except torch.OutOfMemoryError as error:
            self._free_memory(error)
        return self._session.decode(edit, output_type)

    def _recover(self, error: Exception, edits: Sequence[Edit]) -> dict[Edit, BaseException]:
        """Continue after a step that has failed, in smaller packs or without the edits that fail alone.

        Args:
            error: The error of the step.
            edits: Edits that have not made the step.

        Returns:
            Edits that have failed, with their errors.
        """
        self._free_memory(error)
        self._failures += 1
        if self._failures > MAX_FAILURES:
            self._failures = 0
            return dict.fromkeys(edits, error)
        failed: dict[Edit, BaseException] = {}
        if not (isinstance(error, torch.OutOfMemoryError) and self._halve_packs()):
            failed = self._step_alone(edits)
            if failed:
                self._failures = 0
            elif sum(len(edit.sequences) for edit in edits) > 1:
                log.warning("a step has failed that works for each edit alone; each runs alone from now on: %s", error)
                self._loop.set_pack_tokens(1)
        for edit in edits:
            if edit not in failed and edit.error is None and edit.kept is not None:  # its stores may be half written
                self._restart(edit)
        return failed

    def _errors(self, edits: Sequence[Edit]) -> dict[Edit, BaseException]:
        """Return the edits whose own step has failed, with their errors.

        An edit whose scheduler has failed starts again, because its state may have changed, and fails the next time.
        """
        failed: dict[Edit, BaseException] = {}
        for edit in edits:
            error, edit.error = edit.error, None
            if error is None:
                continue
            job = self._running[edit]
            if isinstance(error, Exception) and edit.is_interrupted and not job.is_restarted:
                self._free_memory(error)
                job.is_restarted = True
                self._restart(edit)
                self._loop.join(edit)
            else:
                failed[edit] = error
        return failed

    def _halve_packs(self) -> bool:
        """Halve the size of packs after an out-of-memory error. Return False if the largest pack is one sequence."""
        largest = self._loop.largest_pack
        if largest is None:
            return False
        limit = max(largest // 2, 1)
        log.warning("out of memory with a pack of %d tokens; packs have at most %d tokens from now on", largest, limit)
        self._loop.set_pack_tokens(limit)
        self.max_tokens = limit if self.max_tokens is None else min(limit, self.max_tokens)
        return True

    def _free_memory(self, error: Exception) -> None:
        """Free what the calls that have raised an error hold, and what PyTorch keeps for later tensors."""
        traceback.clear_frames(error.__traceback__)
        if self._session.device.type == "cuda":
            torch.cuda.empty_cache()

    def _step_alone(self, edits: Sequence[Edit]) -> dict[Edit, BaseException]:
        """Run the step of each edit alone, in packs of one sequence, and return those that fail."""
        failed: dict[Edit, BaseException] = {}
        for edit in edits:
            alone = EditLoop(self._session.model, pack_tokens=1)
            alone.join(edit)
            try:
                alone.step()
            except Exception as error:
                self._free_memory(error)
                failed[edit] = error
            if edit.error is not None:
                self._loop.leave([edit])
        return failed

    def _restart(self, edit: Edit) -> None:
        """Run an edit from its first step again, because a step that failed may have changed its state."""
        first = self._running[edit].first
        assert first is not None
        fresh = first.copy()
        edit.latents, edit.scheduler, edit.step_options = fresh.latents, fresh.scheduler, fresh.step_options
        edit.prompts, edit.is_stopped = fresh.prompts, False
        if edit.kept is not None:
            edit.kept = empty_stores(edit.kept)
        edit.steps, edit.is_interrupted = 0, False
        self._loop.rebuild()

    def _report(self, job: Job, edit: Edit) -> None:
        if job.on_progress is not None:

            def preview() -> Any:
                return self._decode(replace(edit, latents=edit.predicted_latents()), "pil")

            waited = job.started - job.submitted
            job.on_progress(
                EditProgress(edit.steps, len(edit.timesteps), edit.samples[0], edit.tokens, waited, preview)
            )

    def _remove(self, edit: Edit) -> Job:
        self._loop.leave([edit])
        with self._changed:
            return self._running.pop(edit)

    def _end(self, job: Job, result: Any = None, error: BaseException | None = None) -> None:
        """Give the future of a job its result or its error, unless it was cancelled."""
        kept = job.future.set_running_or_notify_cancel()
        kind = "cancelled" if not kept else "finished" if error is None else "failed"
        with self._changed:
            self._ended[kind] += 1
        try:
            if kept and error is not None:
                job.future.set_exception(error)
            elif kept:
                job.future.set_result(result)
        except BaseException:  # of a callback; the future has its result
            log.exception("a callback of a future has failed")


def _free_bytes(session: EditSession) -> int:
    """Return the bytes that packs can use of a CUDA device, without those of weights that are not there yet."""
    device, transformer = session.device, session.model.transformer
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    absent = sum(parameter.nbytes for parameter in transformer.parameters() if parameter.device.type != device.type)
    if session.parts is not None and patched_parts(transformer) is None:
        absent += weight_bytes(transformer) // 2  # the weights in 8 bits
    return max(free - absent, 0)


def tokens_in_memory(model: PackedModel, free: int, *, kept: bool = False) -> int:
    """Return the number of tokens of a pack whose forward fits the free memory of a device.

    Args:
        model: The packed transformer, whose weights are on the device already.
        free: Free bytes.
        kept: Keys and values of references are kept over steps; any token may be one of a reference.
    """
    side = 64
    config = model.transformer.config
    sample = Sample(1, (1, side, side), guidance=1.0 if getattr(config, "guidance_embeds", False) else None)
    bytes_each = transformer_peak(model.transformer, model.layout([sample])) / sample.length
    if kept:
        sizes = model.sizes(config)
        bytes_each += 2 * sizes.blocks * sizes.width * compute_dtype(model.transformer).itemsize
    return max(int(free * MEMORY_SHARE / bytes_each), 1)
