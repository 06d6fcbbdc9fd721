"""Routes of the server: results, limits, access, errors, and what happens to edits that nobody waits for."""

import asyncio
import base64
import contextlib
import io
import json
import struct
import threading
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from serving import StubEngine, client_of, opened, picture
from starlette.datastructures import UploadFile

import uniref_fast
from uniref_fast import EditRequest
from uniref_fast.data.images import ImageSource
from uniref_fast.request import Geometry
from uniref_fast.serve import app as routes
from uniref_fast.serve import service as services
from uniref_fast.serve.config import Limits
from uniref_fast.serve.errors import ApiError
from uniref_fast.serve.fields import EditCall
from uniref_fast.serve.pictures import check_pictures
from uniref_fast.serve.server import Server

PATH = "/v1/images/edits"
TWO = [("image[]", ("a.png", picture("red"))), ("image[]", ("b.jpg", picture("blue", 30, 50, "JPEG")))]
ONE = [("image", ("a.png", picture("red")))]


def run(work):
    """Run a coroutine with a limit of its time."""
    return asyncio.run(asyncio.wait_for(work, 60))


def post(client, files=ONE, headers=None, **fields):
    return client.post(PATH, data={"prompt": "make it night", **fields}, files=files, headers=headers)


def refused(response, status, code, param=None):
    """Assert that a response is this error."""
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param), error["message"]
    return error["message"]


def events(text):
    """Return (name, data) of the events of a stream."""
    blocks = [block.split("\n") for block in text.split("\n\n") if block and not block.startswith(":")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)


# ---- results ----


def alone(pipe, seed, images, **fields):
    given = {"true_cfg_scale": 1.0, "num_inference_steps": 2} | fields
    request = EditRequest("make it night", images, seed=seed, **given)
    return np.asarray(uniref_fast.edit(pipe, [request], progress=False)[0])


def test_images_are_those_of_edit(pipe, engine):
    images = [ImageSource("", data=file[1]).load() for _, file in TWO]

    async def work():
        async with client_of(engine) as client:
            return await asyncio.gather(
                post(client, TWO, seed=3, n=2, size="48x32"), post(client, TWO, seed=4, guidance=2, steps=3)
            )

    several, guided = run(work())
    body = several.json()
    assert [entry["seed"] for entry in body["data"]] == [3, 4] and body["size"] == "48x32"
    for entry in body["data"]:
        image = opened(entry)
        assert image.format == "PNG"
        assert np.array_equal(image, alone(pipe, entry["seed"], images, width=48, height=32))
    expected = alone(pipe, 4, images, true_cfg_scale=2.0, negative_prompt=" ", num_inference_steps=3)
    assert np.array_equal(opened(guided.json()["data"][0]), expected)
    usage = body["usage"]
    assert usage["output_tokens"] == 2 * 6 * 4 and usage["input_tokens_details"]["image_tokens"] > 0
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert all(entry["seconds_run"] > 0 <= entry["seconds_waited"] for entry in body["data"])


def test_formats_seeds_and_what_responses_repeat(stub):
    async def work():
        async with client_of(stub) as client:
            asked = [
                post(client, output_format="jpeg", output_compression=50, user="u1"),
                post(client, output_format="webp", safety_identifier="s1"),
            ]
            tasks = [asyncio.ensure_future(each) for each in asked]
            await until(lambda: len(stub.jobs) == 2)
            stub.end(0)
            stub.end(1)
            return [response.json() for response in await asyncio.gather(*tasks)]

    found = run(work())
    assert sorted((body["output_format"], body["safety_identifier"]) for body in found) == [
        ("jpeg", "u1"),
        ("webp", "s1"),
    ]
    assert {opened(body["data"][0]).format for body in found} == {"JPEG", "WEBP"}
    seeds = [body["data"][0]["seed"] for body in found]
    assert seeds[0] != seeds[1], "without a seed, each request draws one"


def test_the_size_is_that_of_the_result_and_not_of_what_is_decoded(stub, monkeypatch):
    """FLUX.3 crops the image that it decodes for one reference."""
    monkeypatch.setattr(stub, "check", lambda request: Geometry((64, 64), (), (), 8, crop=(0, 8, 64, 56)))

    async def work():
        async with client_of(stub) as client:
            task = asyncio.ensure_future(post(client))
            await until(lambda: stub.jobs)
            stub.end(0)
            return (await task).json()["size"]

    assert run(work()) == "64x48"


def test_json_requests_with_data_urls(engine):
    url = "data:image/png;base64," + base64.b64encode(picture("red")).decode()

    async def work():
        async with client_of(engine) as client:
            fields = {"prompt": "make it night", "seed": 3, "size": "48x32"}
            form = await post(client, seed=3, size="48x32")
            return form, await client.post(PATH, json=fields | {"images": [{"image_url": url}]})

    form, found = run(work())
    assert found.json()["data"][0]["b64_json"] == form.json()["data"][0]["b64_json"]


def test_models_and_the_state_of_the_server(stub):
    async def work():
        async with client_of(stub, aliases=("gpt-image",)) as client:
            models = (await client.get("/v1/models")).json()["data"]
            one = await client.get("/v1/models/gpt-image")
            none = await client.get("/v1/models/other/model")
            states = [(await client.get(path)).status_code for path in ("/", "/health", "/ready")]
            client.service.is_draining = True
            stopping = [(await client.get(path)).status_code for path in ("/health", "/ready")]
            stub.failed = True
            failed = [(await client.get(path)).status_code for path in ("/health", "/ready")]
            missing, wrong = await client.get("/nothing"), await client.get(PATH)
            return models, one, none, states, stopping, failed, missing, wrong

    models, one, none, states, stopping, failed, missing, wrong = run(work())
    assert [model["id"] for model in models] == ["builtin", "gpt-image"] and one.json() == models[1]
    assert models[0]["defaults"] == {"steps": 2, "guidance": 1.0} and models[0]["limits"]["images"] == 16
    refused(none, 404, "model_not_found", "model")
    assert (states, stopping, failed) == ([200, 200, 200], [200, 503], [503, 503])
    refused(missing, 404, "not_found")
    refused(wrong, 405, "method_not_allowed")


# ---- streams ----


def test_a_stream_has_progress_partial_images_and_the_result(engine):
    async def work():
        async with client_of(engine) as client:
            plain = await post(client, seed=3, steps=4, n=2)
            return plain, await post(client, seed=3, steps=4, n=2, stream="true", partial_images=1)

    plain, response = run(work())
    assert response.headers["content-type"].startswith("text/event-stream")
    found = events(response.text)
    assert all(name == data["type"] for name, data in found)
    for index, expected in enumerate(plain.json()["data"]):
        own = [(name.partition(".")[2], data) for name, data in found if data["image_index"] == index]
        names = [name for name, _ in own]
        assert names == [*["progress"] * 3, "partial_image", "progress", "progress", "completed"]
        assert [data["step"] for name, data in own if name == "progress"] == [0, 1, 2, 3, 4]
        partial, completed = own[3][1], own[-1][1]
        assert partial["partial_image_index"] == 0 and partial["step"] == 2
        assert opened(partial).size == opened(completed).size and partial["b64_json"] != completed["b64_json"]
        assert completed["b64_json"] == expected["b64_json"] and completed["seed"] == expected["seed"]
        assert completed["usage"]["output_tokens"] == 64
        assert {"created_at", "size", "quality", "background", "output_format"} <= {*partial, *completed}


def test_a_model_with_its_own_number_of_steps_reports_that_number(stub):
    stub.fixed_steps = 4

    async def work():
        async with client_of(stub) as client:
            task = asyncio.ensure_future(post(client, stream="true", steps=20, partial_images=1))
            await until(lambda: len(stub.jobs) == 1)
            for step in range(1, 5):
                stub.step(0, step)
            stub.end(0)
            return await task

    found = [data for _, data in events(run(work()).text)]
    assert {data["steps"] for data in found[1:]} == {4}
    (partial,) = (data for data in found if data["type"] == "image_edit.partial_image")
    assert partial["step"] == 2 and found[-1]["type"] == "image_edit.completed"


@pytest.mark.parametrize("form, background", [("png", "transparent"), ("webp", "transparent"), ("jpeg", "opaque")])
def test_results_with_transparency(stub, form, background):
    """JPEG has none: its images are over white."""
    stub.mode = "RGBA"

    async def work():
        async with client_of(stub) as client:
            task = asyncio.ensure_future(post(client, output_format=form, seed=0))
            await until(lambda: len(stub.jobs) == 1)
            stub.end(0)
            return await task

    body = run(work()).json()
    image = opened(body["data"][0])
    assert body["background"] == background
    assert image.mode == ("RGB" if form == "jpeg" else "RGBA")
    assert abs(image.getpixel((0, 0))[0] - (127 if form == "jpeg" else 0)) <= 2


def test_a_stream_ends_with_an_error_event(stub):
    async def work():
        async with client_of(stub) as client:
            task = asyncio.ensure_future(post(client, stream="true", n=2))
            await until(lambda: len(stub.jobs) == 2)
            stub.step(0, 1)
            stub.end(0, torch.OutOfMemoryError())
            response = await task
            assert client.service.active == 0
            return response

    found = events(run(work()).text)
    assert [name for name, _ in found[-2:]] == ["image_edit.progress", "error"]
    assert found[-1][1]["error"]["code"] == "out_of_memory" and stub.jobs[1][2].cancelled()


def test_a_stream_without_events_sends_comments(stub, monkeypatch):
    monkeypatch.setattr(services, "KEEP_ALIVE", 0.02)

    async def work():
        async with client_of(stub, limits=Limits(seconds=0.3)) as client:
            return await post(client, stream="true")

    text = run(work()).text
    assert text.count(": waiting\n\n") > 2 and events(text)[-1][1]["error"]["code"] == "deadline_exceeded"
    assert stub.jobs[0][2].cancelled()


# ---- limits ----


def test_a_full_queue_is_429_with_a_time_to_come_back():
    stub = StubEngine(max_waiting=2)

    async def work():
        async with client_of(stub) as client:
            task = asyncio.ensure_future(post(client))
            await until(lambda: stub.jobs)
            several = await post(client, n=2)  # one fits
            await until(lambda: len(stub.jobs) == 2)
            second = asyncio.ensure_future(post(client))
            await until(lambda: stub.stats().waiting == 2)
            full = await post(client)
            for number in (0, 2):
                stub.end(number)
            return several, full, await task, await second

    several, full, *accepted = run(work())
    assert [response.status_code for response in accepted] == [200, 200]
    for response in (several, full):
        assert "2 edits are waiting" in refused(response, 429, "queue_full")
        assert 1 <= int(response.headers["retry-after"]) <= 60
    assert stub.jobs[1][2].cancelled(), "all edits of a request are queued, or none"


def test_the_deadline_cancels_the_edits(stub):
    async def work():
        async with client_of(stub, limits=Limits(seconds=0.2)) as client:
            return await post(client, n=2)

    response = run(work())
    refused(response, 504, "deadline_exceeded")
    assert response.headers["x-should-retry"] == "false" and all(job[2].cancelled() for job in stub.jobs)


def test_bodies_are_limited_with_and_without_a_length(stub):
    async def chunks():
        yield b'--x\r\ncontent-disposition: form-data; name="image"; filename="a"\r\n\r\n'
        for _ in range(40):
            yield b"x" * 100

    async def work():
        async with client_of(stub, limits=Limits(body_bytes=2000)) as client:
            form = {"content-type": "multipart/form-data; boundary=x"}
            return [
                await post(client, [("image", ("a.png", bytes(3000)))]),
                await client.post(PATH, content=chunks(), headers=form),
                await client.post(PATH, content=chunks(), headers={"content-type": "application/json"}),
            ]

    for response in run(work()):
        refused(response, 413, "request_too_large")
    assert not stub.jobs


def bomb(width, height):
    """Return a PNG of a few bytes whose header claims a size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    parts = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("contents", "code", "words"),
    [
        ([picture(), picture()], "image_too_large", "image 2 has 60 x 40 pixels"),
        ([bomb(9000, 9000)], "image_too_large", "image 1 has 9000 x 9000 pixels"),
        ([bomb(60000, 60000)], "image_too_large", "image 1 has more pixels"),
        ([bomb(50, 50)], "invalid_image", "image 1"),  # less content than its header claims
        ([picture()[:90]], "invalid_image", "image 1"),
        ([b"no picture"], "invalid_image", "image 1 is not a readable picture"),
        ([b""], "invalid_image", "it has 0 bytes"),
        ([picture(form="GIF")], "invalid_image", "PNG, JPEG or WebP"),
        ([picture(width=2000, height=1)], "invalid_request", "too elongated"),
    ],
    ids=["sum", "bomb", "larger bomb", "short", "truncated", "text", "empty", "format", "elongated"],
)
def test_pictures_are_checked_before_they_are_decoded(engine, monkeypatch, contents, code, words):
    if code == "image_too_large":
        monkeypatch.setattr(services, "decode", lambda _: pytest.fail("decoded"))

    async def work():
        async with client_of(engine, limits=Limits(pixels=4000)) as client:
            return await post(client, [("image[]", ("a", content)) for content in contents])

    assert words in refused(run(work()), 400, code, "image")


def test_jpeg_files_of_many_scans_are_refused(stub):
    """Each scan costs the decoder as much as a picture, and has a few bytes."""
    file = io.BytesIO()
    Image.new("L", (64, 64), 128).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    scan = content[content.rfind(b"\xff\xda") : -2]
    scans = content.count(b"\xff\xda")
    metadata = b"\xff\xe5\xff\xff" + b"\xff\xda" * 32766 + b"x"  # a segment whose content is no scan
    files = [content[:2] + metadata + content[2:-2] + scan * (100 - scans) + content[-2:] + scan * 200]
    files += [
        content[:-2] + scan * (101 - scans) + content[-2:],
        content[:2] + b"\xff\xe5\x00\x02" * 10_001 + content[2:],
    ]
    for content, is_refused in zip(files, (False, True, True), strict=True):
        with pytest.raises(ApiError, match="more than 100 scans") if is_refused else contextlib.nullcontext():
            check_pictures([content], Limits())
    assert files[0].count(b"\xff\xda") > 100


def test_more_images_than_can_wait_are_a_wrong_value():
    async def work():
        async with client_of(StubEngine(max_waiting=2)) as client:
            return await post(client, n=3), (await client.get("/v1/models")).json()

    response, models = run(work())
    assert "from 1 to 2" in refused(response, 400, "invalid_value", "n") and models["data"][0]["limits"]["n"] == 2


@pytest.fixture
def decoder(monkeypatch):
    """A decoder that waits until the event is set."""
    opened, decode = threading.Event(), services.decode

    def waiting(contents):
        assert opened.wait(60)
        return decode(contents)

    monkeypatch.setattr(services, "decode", waiting)
    yield opened
    opened.set()


def test_requests_that_are_decoded_count_as_waiting(decoder):
    async def work():
        stub = StubEngine(max_waiting=2)
        async with client_of(stub) as client:
            tasks = [asyncio.ensure_future(post(client)) for _ in range(2)]
            await until(lambda: client.service.reading == 2)
            await asyncio.sleep(0.1)
            full = await post(client)
            decoder.set()
            await until(lambda: len(stub.jobs) == 2)
            stub.end(0)
            stub.end(1)
            return full, await asyncio.gather(*tasks), client.service.reading

    full, accepted, reading = run(work())
    refused(full, 429, "queue_full")
    assert [response.status_code for response in accepted] == [200, 200] and reading == 0


def test_decoding_is_under_the_deadline(stub, decoder):
    async def work():
        async with client_of(stub, limits=Limits(seconds=0.2)) as client:
            return await post(client), client.service.reading, client.service.active

    response, *counts = run(work())
    refused(response, 504, "deadline_exceeded")
    assert counts == [0, 0] and not stub.jobs


def test_edits_of_a_request_that_is_cancelled_while_they_are_submitted(stub):
    entered, opened, submit = threading.Event(), threading.Event(), stub.submit

    def waiting(*args):
        entered.set()
        assert opened.wait(60)
        return submit(*args)

    stub.submit = waiting

    async def work():
        async with client_of(stub) as client:
            task = asyncio.ensure_future(post(client, n=2))
            await until(entered.is_set)
            task.cancel()
            await asyncio.wait([task])
            opened.set()
            await until(lambda: stub.jobs and stub.jobs[0][2].cancelled())
            await asyncio.sleep(0.05)

    run(work())
    assert len(stub.jobs) == 1


def test_an_edit_that_cannot_be_submitted_cancels_the_others(stub):
    submit = stub.submit
    stub.submit = lambda *args: submit(*args) if not stub.jobs else 1 / 0

    async def work():
        with pytest.raises(ZeroDivisionError):
            await client_of(stub).service.submit(services.Batch(EditCall("x", (b"",), n=2)), [])

    run(work())
    assert stub.jobs[0][2].cancelled()


def test_a_stream_whose_client_does_not_read_ends_after_the_deadline(stub, monkeypatch):
    monkeypatch.setattr(routes, "STALLED_SECONDS", 0.1)
    service = client_of(stub).service

    async def receive():
        await asyncio.sleep(60)

    async def send(message):
        await asyncio.sleep(60)

    async def work():
        batch = services.Batch(EditCall("x", (b"",), stream=True))
        await service.submit(batch, [])
        await routes._EventStream(service, batch, time.monotonic() + 0.1)({"type": "http"}, receive, send)

    run(work())
    assert service.active == 0 and stub.jobs[0][2].cancelled()
    assert Server(service).config.timeout_graceful_shutdown


def test_sizes_that_the_model_cannot_make(engine):
    async def work():
        async with client_of(engine, limits=Limits(result_pixels=2000)) as client:
            return await post(client, size="44x30"), await post(client), await post(client, size="8x8")

    rounded, automatic, small = run(work())
    assert "next smaller size is 40x24" in refused(rounded, 400, "invalid_value", "size")
    assert "give size" in refused(automatic, 400, "invalid_value", "size")
    refused(small, 400, "invalid_request", "size")


# ---- access ----


def test_the_key_protects_everything_under_v1(stub):
    async def work():
        async with client_of(stub, api_key="secret") as client:
            found = {}
            for key in (None, "Bearer wrong", "Basic secret", "Bearer sécret", "Bearer secret"):
                headers = {} if key is None else {"authorization": key.encode("latin-1")}
                found[key] = [
                    (await client.get("/v1/models", headers=headers)).status_code,
                    (await client.get("/metrics", headers=headers)).status_code,
                    (await post(client, headers=headers, n="wrong")).status_code,
                ]
            return found, [(await client.get(path)).status_code for path in ("/health", "/ready", "/")]

    found, opened_routes = run(work())
    assert found.pop("Bearer secret") == [200, 200, 400]
    assert all(statuses == [401, 401, 401] for statuses in found.values()) and opened_routes == [200, 200, 200]
    assert not stub.jobs


def test_pages_of_other_origins_and_other_host_names_are_refused(stub):
    async def work():
        async with client_of(stub, hosts=("localhost", "::1"), origins=("https://ok.example",)) as client:
            found = {}
            for host, origin in (
                ("localhost:8000", None), ("[::1]:8000", None), ("localhost:8000", "http://localhost:8000"),
                ("localhost", "https://ok.example"), ("evil.example", None), ("localhost", "https://evil.example"),
                ("localhost", "null"), ("localhost", "http://[::1"),
            ):  # fmt: skip
                headers = {"host": host} | ({"origin": origin} if origin else {})
                found[host, origin] = await client.get("/v1/models", headers=headers)
            return found

    *accepted, host, origin, null, broken = run(work()).values()
    assert [response.status_code for response in accepted] == [200] * 4
    refused(host, 403, "host_not_allowed")
    for response in (origin, null, broken):
        refused(response, 403, "origin_not_allowed")


def test_urls_of_images_are_refused(stub):
    async def work():
        async with client_of(stub) as client:
            fields = {"prompt": "x", "images": [{"image_url": "http://169.254.169.254/latest"}]}
            return await client.post(PATH, json=fields)

    refused(run(work()), 400, "image_url_not_allowed", "image")


# ---- errors ----


@pytest.mark.parametrize(
    ("content", "kind", "status", "code"),
    [
        (b"{", "application/json", 400, "invalid_json"),
        (b"[1]", "application/json", 400, "invalid_json"),
        (b"[" * 100_000, "application/json", 400, "invalid_json"),
        (b'{"prompt": "\xff"}', "application/json", 400, "invalid_json"),
        (b"", "application/json", 400, "invalid_json"),
        (b"--x\r\n", "multipart/form-data", 400, "invalid_multipart"),
        (b"nonsense", "multipart/form-data; boundary=x", 400, "invalid_multipart"),
        (b"prompt=x", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
        (b"prompt", "", 415, "unsupported_media_type"),
    ],
)
def test_bodies_that_cannot_be_read(stub, content, kind, status, code):
    async def work():
        async with client_of(stub) as client:
            return await client.post(PATH, content=content, headers={"content-type": kind})

    refused(run(work()), status, code)


def test_errors_of_edits(stub):
    async def work():
        async with client_of(stub) as client:
            tasks = [asyncio.ensure_future(post(client)) for _ in range(2)]
            await until(lambda: len(stub.jobs) == 2)
            stub.end(0, torch.OutOfMemoryError("details"))
            stub.end(1, KeyError("details"))
            found = sorted(await asyncio.gather(*tasks), key=lambda response: response.status_code)
            stub.check = lambda request: 1 / 0  # a fault of the server
            return [*found, await post(client)]

    failed, memory, internal = run(work())
    refused(failed, 500, "edit_failed")
    refused(memory, 503, "out_of_memory")
    refused(internal, 500, "internal_error")
    assert all("details" not in response.text for response in (failed, memory, internal))


@pytest.mark.parametrize("stream", ["false", "true"])
def test_an_engine_that_is_closed_while_a_client_waits(stub, stream):
    async def work():
        async with client_of(stub) as client:
            task = asyncio.ensure_future(post(client, n=2, stream=stream))
            await until(lambda: len(stub.jobs) == 2)
            for job in stub.jobs:
                job[2].cancel()
            return await task

    response = run(work())
    if stream == "false":
        refused(response, 503, "shutting_down")
    else:
        error = events(response.text)[-1][1]["error"]
        assert (error["code"], error["status"]) == ("shutting_down", 503)


def test_finished_edits_keep_no_tensors(stub):
    async def work():
        service, batch = client_of(stub).service, services.Batch(EditCall("x", (b"",)))
        await service.submit(batch, [])
        stub.step(0, 1)
        return batch.edits[0].progress

    progress = run(work())
    assert progress.waited == 0.5 and progress.preview() is None


def test_errors_of_any_text_and_route(stub):
    async def work():
        async with client_of(stub, origins=("https://ok.example",)) as client:
            surrogate = await client.post(PATH, content=b'{"\\ud800": 1}', headers={"content-type": "application/json"})
            headers = {"origin": "https://ok.example", "host": "["}
            return surrogate, await client.get(PATH), await client.get("/nothing", headers=headers)

    surrogate, method, missing = run(work())
    refused(surrogate, 400, "unknown_parameter", "\ud800")
    refused(method, 405, "method_not_allowed")
    assert method.headers["allow"] == "POST"
    assert "GET /nothing" in refused(missing, 404, "not_found")
    assert "retry-after" in missing.headers["access-control-expose-headers"].lower()


def test_files_of_a_refused_form_are_closed(stub, monkeypatch):
    closed = []
    monkeypatch.setattr(UploadFile, "close", lambda file: asyncio.sleep(0, closed.append(file.filename)))

    async def work():
        async with client_of(stub) as client:
            return await post(client, [("image", ("a.png", picture())), ("prompt2", ("b.png", picture()))])

    refused(run(work()), 400, "invalid_value", "prompt2")
    assert closed == ["a.png", "b.png"]


def test_a_stopping_server_finishes_and_refuses(stub):
    async def work():
        async with client_of(stub) as client:
            task = asyncio.ensure_future(post(client))
            await until(lambda: stub.jobs)
            client.service.is_draining = True
            assert client.service.active == 1
            late = await post(client)
            stub.end(0)
            return late, await task, client.service.active

    late, finished, active = run(work())
    refused(late, 503, "shutting_down")
    assert int(late.headers["retry-after"]) >= 1 and finished.status_code == 200 and active == 0


@pytest.mark.parametrize("stream", [False, True])
def test_edits_of_a_client_that_leaves_are_cancelled(stub, stream):
    """httpx's transport without a socket cannot leave, so the application is called itself."""
    fields = {"prompt": "make it night", "images": [{"image_url": "data:image/png;base64,"}], "stream": stream}
    fields["images"][0]["image_url"] += base64.b64encode(picture()).decode()

    async def work():
        async with client_of(stub) as client:
            gone, messages = asyncio.Event(), [{"type": "http.request", "body": json.dumps(fields).encode()}]

            async def receive():
                if messages:
                    return messages.pop()
                await gone.wait()
                return {"type": "http.disconnect"}

            async def send(message):
                pass

            scope = {
                "type": "http", "method": "POST", "path": PATH, "query_string": b"", "root_path": "",
                "headers": [(b"content-type", b"application/json")], "asgi": {"spec_version": "2.3"},
            }  # fmt: skip
            task = asyncio.ensure_future(client._transport.app(scope, receive, send))
            await until(lambda: stub.jobs)
            assert not stub.jobs[0][2].cancelled()
            gone.set()
            await task
            return client.service.active

    assert run(work()) == 0 and stub.jobs[0][2].cancelled()


def test_metrics(engine):
    async def work():
        async with client_of(engine) as client:
            await post(client, n=2)
            await post(client, n=0)
            return (await client.get("/metrics")).text

    found = dict(line.rsplit(" ", 1) for line in run(work()).splitlines() if not line.startswith("#"))
    assert found['uniref_fast_responses_total{code="",status="200"}'] == "1.0"
    assert found['uniref_fast_responses_total{code="invalid_value",status="400"}'] == "1.0"
    assert found["uniref_fast_images_total"] == found["uniref_fast_wait_seconds_count"] == "2.0"
    assert float(found["uniref_fast_run_seconds_sum"]) > 0 < float(found["uniref_fast_step_seconds_total"])
    assert found["uniref_fast_waiting"] == found["uniref_fast_running"] == "0.0"
    assert float(found["uniref_fast_steps_total"]) >= 2


def test_nothing_is_read_after_the_limit_of_a_refused_body(stub):
    """A client that never ends its body is not read for ever."""
    read = 0

    async def receive():
        nonlocal read
        read += 100
        return {"type": "http.request", "body": bytes(100), "more_body": True}

    run(routes._Body(receive, 1000).discard())
    assert read <= 1000
