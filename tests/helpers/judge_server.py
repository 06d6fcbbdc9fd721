"""A local OpenAI-compatible endpoint for tests, whose answers and faults a test decides.

    with JudgeServer() as server:
        server.plan = [status(500), say("...")]  # the first requests, in order; then `server.default`
        Judge(JudgeConfig(url=server.url, ...))

A behaviour is a function of the handler and the request.
"""

import base64
import contextlib
import io
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

MODEL = "judge-1"


def scores(integration=7, consistency=8, quality=9, reasoning="fine"):
    return json.dumps(
        {"reasoning": reasoning, "integration": integration, "consistency": consistency, "quality": quality}
    )


# ---- behaviours ----


def say(text, finish_reason="stop", **message):
    """Answer with a chat completion that has a text."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish_reason}
    return body({"id": "1", "object": "chat.completion", "choices": [choice], "usage": {"total_tokens": 12}})


def body(content):
    return status(200, content)


def status(code, content=None, **headers):
    """Answer with an HTTP status, and JSON or bytes; headers have underscores for dashes."""
    content = {"error": {"message": f"this is {code}"}} if content is None else content
    data = content if isinstance(content, bytes) else json.dumps(content).encode()

    def behave(handler, request):
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return behave


def slow(seconds, then):
    def behave(handler, request):
        time.sleep(seconds)
        then(handler, request)

    return behave


def cut(handler, request):
    """The connection ends in the middle of the body."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def drop(handler, request):
    """The connection ends without an answer."""
    handler.close_connection = True


def raw(data):
    """These bytes in place of an HTTP answer, then the end of the connection; `data` may be an iterator of pieces."""

    def behave(handler, request):
        handler.close_connection = True
        handler.server.closing.add(handler.connection)
        for piece in [data] if isinstance(data, bytes) else data:
            handler.wfile.write(piece)

    return behave


def echo_authorization(code):
    """An error that repeats the request's Authorization header, in its body and its headers."""

    def behave(handler, request):
        given = handler.headers.get("Authorization", "none")
        status(code, {"error": {"message": f"bad header {given!r}", "header": given}}, X_Given=given)(handler, request)

    return behave


def by_colour(handler, request):
    """Scores made from the result's colour, so that mixed-up replies are noticed."""
    red, green, blue = pictures(request)[-1].getpixel((0, 0))
    say(scores(red % 11, green % 11, blue % 11))(handler, request)


# ---- requests ----


def parts(request):
    """Contents of the user message: texts as they are, pictures decoded."""
    made = []
    for part in request["messages"][1]["content"]:
        if part["type"] == "text":
            made.append(part["text"])
        else:
            head, data = part["image_url"]["url"].split(",")
            assert head == "data:image/png;base64"
            made.append(Image.open(io.BytesIO(base64.b64decode(data))).copy())
    return made


def pictures(request):
    return [part for part in parts(request) if not isinstance(part, str)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        judge = self.server.judge
        judge.gets.append(self.path)
        judge.models(self, None) if self.path == "/v1/models" else status(404)(self, None)

    def do_POST(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/v1/chat/completions":
            return status(404, {"detail": "Not Found"})(self, None)
        request, judge = json.loads(data), self.server.judge
        with judge.lock:
            judge.requests.append(request)
            judge.times.append(time.monotonic())
            judge.headers.append(dict(self.headers))
            behave = judge.plan.pop(0) if judge.plan else judge.default
            judge.busy += 1
            judge.peak = max(judge.peak, judge.busy)
        try:
            behave(self, request)
        finally:
            with judge.lock:
                judge.busy -= 1

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, judge, port):
        self.judge = judge
        self.open, self.closing = set(), set()
        super().__init__(("127.0.0.1", port), Handler)

    def process_request(self, request, address):
        self.open.add(request)
        super().process_request(request, address)

    def shutdown_request(self, request):
        self.open.discard(request)
        super().shutdown_request(request)
        self.closing.discard(request)

    def handle_error(self, request, address):
        pass  # the client went away


class JudgeServer:
    """The endpoint; a context manager.

    Attributes:
        plan: Behaviours for the first requests, in order.
        default: Behaviour for all other requests.
        models: Behaviour of GET /v1/models.
        requests: Chat requests in the order of their arrival.
        headers: Headers of the chat requests.
        times: Times of the chat requests.
        gets: Paths of the other requests.
        peak: Largest number of simultaneous chat requests.
    """

    def __init__(self):
        self.plan, self.default = [], by_colour
        self.models = body({"object": "list", "data": [{"id": MODEL}, {"id": "other"}]})
        self.requests, self.headers, self.times, self.gets = [], [], [], []
        self.busy = self.peak = self.port = 0
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self):
        self._server = Server(self, self.port)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def stop(self):
        """Cut all connections and refuse new ones, until the next start on the same port."""
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._server.open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def wait_closed(self, timeout=20.0):
        """Wait until the connections that `raw` ends are closed, so that the client does not use them again."""
        until = time.monotonic() + timeout
        while self._server.closing and time.monotonic() < until:
            time.sleep(0.001)
        assert not self._server.closing

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.stop()
