"""Routes of the server: OpenAI's for edits and models, and those that watch over it."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any
from urllib.parse import SplitResult, urlsplit

from fastapi import APIRouter, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from uniref_fast.serve import page
from uniref_fast.serve.errors import NO_RETRY, ApiError, error_body
from uniref_fast.serve.fields import parse
from uniref_fast.serve.service import Batch, EditService

__all__ = ["create_app"]

log = logging.getLogger(__name__)
router = APIRouter()

CLIENT_GONE = 499  # as nginx logs it; nobody receives the response
STALLED_SECONDS = 30.0  # from the deadline, after which a stream ends whose client has stopped reading
DISCARD_SECONDS = 5.0  # that the rest of a refused body is read, so that the client reads the response


def create_app(service: EditService) -> FastAPI:
    """Return the application of a service."""
    app = FastAPI(title="uniref-fast serve", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    app.include_router(router)
    app.include_router(page.router)
    app.add_exception_handler(ApiError, _on_api_error)  # type: ignore[arg-type]  # handlers of narrower errors
    app.add_exception_handler(HTTPException, _on_http_error)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _on_error)
    if service.config.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.config.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["retry-after", "x-should-retry"],
        )
    return app


@router.get("/health")
async def health(request: Request) -> Response:
    """Return 200 as long as the engine works."""
    failed = _service(request).engine.stats().has_failed
    return JSONResponse({"status": "failed" if failed else "ok"}, 503 if failed else 200)


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Return 200 if edits are accepted."""
    service = _service(request)
    status = "failed" if service.engine.stats().has_failed else "stopping" if service.is_draining else "ok"
    return JSONResponse({"status": status}, 200 if status == "ok" else 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Return the metrics in the text format of Prometheus."""
    _check_access(request)
    return PlainTextResponse(_service(request).metrics.text(), media_type="text/plain; version=0.0.4")


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """Return the models, with the defaults and limits of this server."""
    _check_access(request)
    return _service(request).models()


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """Return one model."""
    _check_access(request)
    found = next((each for each in _service(request).models()["data"] if each["id"] == name), None)
    if found is None:
        raise ApiError(404, "model_not_found", f"this server has no model {name!r:.100}", "model")
    return found


@router.post("/v1/images/edits")
async def edits(request: Request) -> Response:
    """Run the edits of a request, and return its images or a stream of events."""
    service, body = _service(request), _Body(request.receive, _service(request).config.limits.body_bytes)
    until = time.monotonic() + service.config.limits.seconds
    error: ApiError | None = None
    try:
        _check_access(request)
        with service.admitted():
            response = await _run(request, service, body, until)
    except ApiError as raised:
        error = raised
        await body.discard()
        response = _error_response(raised)
    except ClientDisconnect:
        service.metrics.disconnects.inc()
        return Response(status_code=CLIENT_GONE)
    except Exception as fault:
        log.error("a request has failed", exc_info=fault)
        error = _internal_error()
        response = _error_response(error)
    service.metrics.responses.labels(response.status_code, error.code if error else "").inc()
    return response


async def _run(request: Request, service: EditService, body: _Body, until: float) -> Response:
    service.reading += 1
    try:
        call = parse(await _fields(request, body, until, service), service.config)
        images = await _until(service.pictures(call), body, until, service)
    finally:
        service.reading -= 1
    batch = Batch(call)
    try:
        await _until(service.submit(batch, images), body, until, service)
        if not call.stream:
            return JSONResponse(await _until(service.result(batch), body, until, service))
    except BaseException:
        batch.cancel()
        raise
    return _EventStream(service, batch, until)


async def _until(coroutine: Coroutine[Any, Any, Any], body: _Body, until: float, service: EditService) -> Any:
    """Return the result of a coroutine, which is cancelled if the client leaves or the time is over."""
    work = asyncio.ensure_future(coroutine)
    gone = asyncio.ensure_future(body.disconnected())
    try:
        left = max(until - time.monotonic(), 0)
        done, _ = await asyncio.wait({work, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if work in done:
            return work.result()
        raise ClientDisconnect if gone in done else service.deadline()
    finally:
        gone.cancel()
        work.cancel()


class _Body:
    """The body of a request, of a limited size.

    Args:
        receive: Function of the server that returns the next message.
        limit: Largest number of bytes.
    """

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive, self.limit, self.size, self.is_read = receive, limit, 0, False

    async def receive(self) -> Message:
        """Return the next message. Raises ApiError if the body is too large."""
        message = await self._receive()
        if message["type"] == "http.request":
            self.size += len(message.get("body", b""))
            self.is_read = not message.get("more_body", False)
            self.check(self.size)
        return message

    def check(self, size: int) -> None:
        """Raise ApiError if a size is over the limit."""
        if size > self.limit:
            message = f"the request is larger than {self.limit:,} bytes, the limit of this server"
            raise ApiError(413, "request_too_large", message)

    async def discard(self) -> None:
        """Read a part of what is left: a client that still sends would not read the response."""

        async def read() -> None:
            left = self.limit
            while not self.is_read and left > 0:
                message = await self._receive()
                left -= len(message.get("body", b""))
                self.is_read = message["type"] != "http.request" or not message.get("more_body", False)

        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(read(), DISCARD_SECONDS)

    async def disconnected(self) -> None:
        """Return when the client has left."""
        while (await self._receive())["type"] != "http.disconnect":
            pass


async def _fields(request: Request, body: _Body, until: float, service: EditService) -> list[tuple[str, Any]]:
    """Return the names and values of the fields of a request."""
    length = request.headers.get("content-length", "")
    if length.isdecimal():
        body.check(int(length))
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    limited = Request(request.scope, body.receive)
    try:
        if kind == "multipart/form-data":
            return await asyncio.wait_for(_form(limited), until - time.monotonic())
        if kind == "application/json":
            return _json(await asyncio.wait_for(limited.body(), until - time.monotonic()))
    except asyncio.TimeoutError:
        raise service.deadline() from None
    message = "the request must be multipart/form-data or application/json"
    raise ApiError(415, "unsupported_media_type", f"{message}, got {kind[:100] or 'no content type'!r}")


async def _form(request: Request) -> list[tuple[str, Any]]:
    try:
        form = await request.form(max_files=1000, max_fields=1000)
    except HTTPException as error:  # of a form that cannot be read
        raise ApiError(400, "invalid_multipart", f"the form cannot be read: {error.detail}") from error
    pairs: list[tuple[str, Any]] = []
    try:
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                pairs.append((name, value))
                continue
            if name not in ("image", "image[]", "mask", "markup"):
                raise ApiError(400, "invalid_value", f"{name[:100]!r} must be a text, got a file", name[:100])
            pairs.append((name, await value.read()))
    finally:
        await form.close()
    return pairs


def _json(content: bytes) -> list[tuple[str, Any]]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"the JSON cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ApiError(400, "invalid_json", "the JSON must be an object")
    return [(name, value) for name, value in found.items()]


class _EventStream(StreamingResponse):
    """Server-sent events of a request; its edits are cancelled when the client leaves."""

    def __init__(self, service: EditService, batch: Batch, until: float) -> None:
        self._service, self._batch, self._until = service, batch, until
        super().__init__(
            self._lines(until),
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._service.active += 1
        try:
            left = max(self._until - time.monotonic(), 0) + STALLED_SECONDS
            await asyncio.wait_for(super().__call__(scope, receive, send), left)
        except asyncio.TimeoutError:
            log.warning("a client has stopped reading its stream, which is closed")
        finally:
            self._service.active -= 1
            self._batch.cancel()

    async def _lines(self, until: float) -> AsyncIterator[str]:
        try:
            async for event in self._service.events(self._batch, until):
                yield ": waiting\n\n" if event is None else _line(event["type"], event)
        except ApiError as error:
            self._service.metrics.responses.labels("stream", error.code).inc()
            yield _error_line(error)
        except Exception as error:
            log.error("a stream has failed", exc_info=error)
            yield _error_line(_internal_error())


def _error_line(error: ApiError) -> str:
    """Return the event of an error, with the status that a response would have."""
    return _line("error", {"type": "error", "error": error_body(error)["error"] | {"status": error.status}})


def _line(name: str, data: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


# ---- access ----


def _service(request: Request) -> EditService:
    return request.app.state.service


def _check_access(request: Request) -> None:
    """Raise ApiError for a request without the key, of another web page, or to another host name."""
    config, host = _service(request).config, request.headers.get("host", "")
    if config.hosts and _url(f"//{host}").hostname not in config.hosts:
        message = f"the header Host names {host[:100]!r}, which this server does not answer to (--allow-host)"
        raise ApiError(403, "host_not_allowed", message)
    origin = request.headers.get("origin")
    if origin is not None and _url(origin).netloc != host and origin not in config.origins:
        message = f"web pages of {origin[:100]!r} may not use this server (--allow-origin)"
        raise ApiError(403, "origin_not_allowed", message)
    if config.api_key is not None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), config.api_key.encode()):
            message = "the header Authorization must be 'Bearer' and the key of this server"
            raise ApiError(401, "invalid_api_key", message, headers={"www-authenticate": "Bearer"})


def _url(text: str) -> SplitResult:
    """Return the parts of a URL, which are empty if it cannot be read."""
    try:
        return urlsplit(text)
    except ValueError:
        return urlsplit("")


# ---- errors ----


def _error_response(error: ApiError) -> Response:
    content = json.dumps(error_body(error))  # ASCII, because texts of a client may have half of a surrogate pair
    return Response(content, error.status, error.headers, "application/json")


async def _on_api_error(request: Request, error: ApiError) -> Response:
    return _error_response(error)


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    codes = {404: "not_found", 405: "method_not_allowed"}
    message = f"{request.method} {request.scope['path'][:100]}: {error.detail}"  # its URL may have a wrong host
    code = codes.get(error.status_code, "invalid_request")
    return _error_response(ApiError(error.status_code, code, message, headers=error.headers))


async def _on_error(request: Request, error: Exception) -> Response:
    log.error("a request has failed", exc_info=error)
    return _error_response(_internal_error())


def _internal_error() -> ApiError:
    return ApiError(500, "internal_error", "the server has failed; its log says why", headers=NO_RETRY)
