"""Servers of the load: `uniref_fast.Engine`, and the stock pipeline behind the same HTTP code."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import queue
import re
import signal
import socket
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

PAGE = os.sysconf("SC_PAGE_SIZE")
LIMIT = 120  # seconds in which a server starts


class StockQueue:
    """The stock pipeline, one edit after another in order of arrival, with the methods of `Engine` that a server uses.

    Args:
        pipe: A `QwenImageEditPlusPipeline`.
    """

    max_waiting = None

    def __init__(self, pipe: Any) -> None:
        pipe.set_progress_bar_config(disable=True)
        self._pipe, self._ended, self._running = pipe, 0, 0
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def check(self, request: Any) -> Any:
        """Return the sizes of a request."""
        from uniref_fast.request import request_geometry

        return request_geometry(self._pipe, request)

    def submit(self, request: Any, on_progress: Any = None) -> Future:
        """Queue a request and return the future of its image."""
        job = (request, on_progress, Future(), time.monotonic())
        self._jobs.put(job)
        return job[2]

    def stats(self) -> Any:
        """Return the state as an `EngineStats`."""
        from uniref_fast.engine import EngineStats

        nothing = dict.fromkeys((field.name for field in dataclasses.fields(EngineStats)), 0)
        state = {"waiting": self._jobs.qsize(), "running": self._running, "finished": self._ended}
        return EngineStats(**nothing | state | {"step_seconds": 0.0, "has_failed": False})

    def close(self, drain: bool = True) -> None:
        """Stop the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            request, on_progress, future, submitted = job
            if not future.set_running_or_notify_cancel():
                continue
            self._running = 1
            try:
                future.set_result(self._edit(request, on_progress, time.monotonic() - submitted))
            except Exception as error:
                future.set_exception(error)
            self._running = 0
            self._ended += 1

    def _edit(self, request: Any, on_progress: Any, waited: float) -> Image.Image:
        import torch

        from uniref_fast.engine import EditProgress

        sample = self.check(request).sample(1)

        def follow(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
            on_progress(EditProgress(step + 1, request.num_inference_steps, sample, sample.length, waited, None))
            return tensors

        return self._pipe(
            image=list(request.images),
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            true_cfg_scale=request.true_cfg_scale,
            width=request.width,
            height=request.height,
            num_inference_steps=request.num_inference_steps,
            generator=torch.Generator().manual_seed(request.seed),
            callback_on_step_end=follow,
        ).images[0]


def serve(backend: str, dtype: str, threads: int, listener: socket.socket, profile: str | None) -> None:
    """Serve the built-in model until SIGTERM, in a process of its own.

    Args:
        backend: "engine" or "stock".
        dtype: Dtype of the model.
        threads: Number of threads of PyTorch.
        listener: Socket to listen on.
        profile: File for the profile of the worker thread, or None.
    """
    import torch

    from uniref_fast import Engine, builtin
    from uniref_fast.serve.config import ServeConfig, limit_cached_products
    from uniref_fast.serve.server import Server
    from uniref_fast.serve.service import EditService

    limit_cached_products()
    torch.set_num_threads(threads)
    pipe = builtin.load(getattr(torch, dtype))
    if profile:
        _profile_worker(Engine if backend == "engine" else StockQueue, profile)
    engine: Any = Engine(pipe, max_waiting=64) if backend == "engine" else StockQueue(pipe)
    server = Server(EditService(engine, ServeConfig(model="builtin", steps=8, guidance=1.0)))
    server.run(sockets=[listener])
    engine.close()


def _profile_worker(kind: type, path: str) -> None:
    import cProfile

    work = kind._work

    def profiled(engine: Any) -> None:
        profile = cProfile.Profile()
        try:
            profile.runcall(work, engine)
        finally:
            profile.dump_stats(path)

    kind._work = profiled


class ServerProcess:
    """A server in a process of its own, as a context manager."""

    def __init__(self, backend: str, dtype: str, threads: int, profile: str | None = None) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._process = multiprocessing.get_context("spawn").Process(
            target=serve, args=(backend, dtype, threads, self._listener, profile), daemon=True
        )
        self._process.start()

    def __enter__(self) -> ServerProcess:
        until = time.monotonic() + LIMIT
        while time.monotonic() < until and self._process.is_alive():
            try:
                if httpx.get(f"{self.url}/ready", timeout=1).status_code == 200:
                    return self
            except httpx.TransportError:
                time.sleep(0.2)
        raise RuntimeError("the server does not start")

    def __exit__(self, *_: object) -> None:
        if self._process.is_alive():
            os.kill(self._process.pid, signal.SIGTERM)
        self._process.join(60)
        if self._process.is_alive():
            self._process.kill()
        self._listener.close()

    def resident_bytes(self) -> int:
        """Return the resident memory of the server."""
        return int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * PAGE

    def counts(self) -> dict[str, float]:
        """Return the metrics of the server by name."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        return {name: float(value) for name, value in re.findall(r"^(\w+(?:\{[^}]*\})?) (\S+)$", text, flags=re.M)}
