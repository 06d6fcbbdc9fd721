"""Pictures, an engine that tests control, and clients of the server without a socket."""

import base64
import contextlib
import io
import socket
import threading
from concurrent.futures import Future

import httpx
from PIL import Image

from uniref_fast.engine import EditProgress, EngineStats, QueueFullError
from uniref_fast.layout import Sample
from uniref_fast.request import Geometry
from uniref_fast.serve.app import create_app
from uniref_fast.serve.config import ServeConfig
from uniref_fast.serve.server import Server
from uniref_fast.serve.service import EditService


def picture(color="red", width=60, height=40, form="PNG", mode="RGB"):
    """Return the encoded bytes of a picture."""
    image = Image.new(mode, (width, height), color)
    image.paste("white", (width // 4, height // 4, width // 2, height // 2))
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def opened(entry):
    """Return the image of an entry of a response."""
    return Image.open(io.BytesIO(base64.b64decode(entry["b64_json"])))


class StubEngine:
    """An engine whose edits end when a test ends them."""

    def __init__(self, max_waiting=None):
        self.max_waiting, self.jobs = max_waiting, []
        self.failed = self.closed = False
        self.fixed_steps = None  # of a model with its own number of steps
        self.mode = "RGB"  # of results

    def check(self, request):
        size = (request.width or 64, request.height or 64)
        return Geometry((size[0] // 8 * 8, size[1] // 8 * 8), (), (), 8)

    def submit(self, request, on_progress=None):
        if self.max_waiting is not None and self.stats().waiting >= self.max_waiting:
            raise QueueFullError("full")
        future = Future()
        self.jobs.append((request, on_progress, future))
        return future

    def step(self, number, steps):
        request, on_progress, _ = self.jobs[number]
        sample = Sample(5, (1, 8, 8), ((1, 2, 3),))
        total = self.fixed_steps or request.num_inference_steps
        on_progress(EditProgress(steps, total, sample, 75, 0.5, lambda: image_of(request, self.mode)))

    def end(self, number, error=None):
        request, _, future = self.jobs[number]
        if error is None:
            future.set_result(image_of(request, self.mode))
        else:
            future.set_exception(error)

    def stats(self):
        waiting = sum(not future.done() for *_, future in self.jobs)
        return EngineStats(waiting, 0, 0, 75 * waiting, 0, 0, 0, 0, 0.0, self.failed)

    def close(self, drain=True):
        self.closed = True


def image_of(request, mode="RGB"):
    """Return an image of one colour; in RGBA it is half transparent."""
    colour = (request.seed % 256, 0, 0, 128)[: len(mode)]
    return Image.new(mode, (request.width or 64, request.height or 64), colour)


def client_of(engine, base="http://testserver", headers=None, **fields):
    """Return an asynchronous client of a server over an engine; its `service` is the server's."""
    config = ServeConfig(**{"model": "builtin", "steps": 2, "guidance": 1.0} | fields)
    app = create_app(EditService(engine, config))
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=base, headers=headers, timeout=60)
    client.service = app.state.service
    return client


@contextlib.contextmanager
def served(engine, **fields):
    """Serve an engine on a socket in a thread, and yield the address."""
    config = ServeConfig(**{"model": "builtin", "steps": 4, "guidance": 1.0} | fields)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(EditService(engine, config))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            thread.join(30)
