"""Clients of the server: requests, a load with thinking times, and a soak with faults."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx
import numpy as np
from PIL import Image

SIZES = ("64x64", "96x64", "64x96", "80x80")
STEPS = (4, 8, 12, 20)
FAULTY = 0.1  # part of the requests of a soak that are bad or left by their client
LIMIT = 600  # seconds that a client waits for a response


@dataclass(frozen=True)
class Call:
    """A good request: form fields, and its pictures as PNG files."""

    fields: dict[str, str]
    pictures: tuple[bytes, ...]

    def parts(self) -> list[tuple[str, Any]]:
        """Return the files of the form."""
        return [("image[]", (f"{i}.png", content, "image/png")) for i, content in enumerate(self.pictures, start=1)]


def draw_calls(count: int, steps: tuple[int, ...] = STEPS, sizes: tuple[str, ...] = SIZES) -> list[Call]:
    """Return requests of scenes with 1 to 3 references, with mixed sizes, steps and guidance."""
    from uniref_fast.scenes.make import MakeConfig, artworks, sample

    rng, art, calls = random.Random(0), artworks("shipped"), []
    for number in range(count):
        scene = sample("train", number, MakeConfig(art, references=(number % 3 + 1,)))
        guidance = rng.choice(("1", "1", "1", "2"))
        fields = {"prompt": scene.instruction, "size": rng.choice(sizes), "steps": str(rng.choice(steps)),
                  "guidance": guidance, "seed": str(number)}  # fmt: skip
        calls.append(Call(fields, tuple(png(image) for image in scene.references)))
    return calls


def png(image: Image.Image) -> bytes:
    """Return an image as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def pixels(content: str) -> np.ndarray:
    """Return the pixels of a PNG file in base64."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB")).astype(int)


async def post(client: httpx.AsyncClient, call: Call, **more: str) -> httpx.Response:
    """Send a request."""
    return await client.post("/v1/images/edits", data=call.fields | more, files=call.parts())


# ---- load ----


@dataclass
class Load:
    """Measurements of the clients.

    Attributes:
        sent: Time and latency in seconds of each response, from the start.
        images: One image of each request by its number.
    """

    sent: list[tuple[float, float]] = field(default_factory=list)
    images: dict[int, np.ndarray] = field(default_factory=dict)


async def run_clients(url: str, calls: list[Call], clients: int, thinking: float, seconds: float) -> Load:
    """Let clients send requests, each one after its last response and a thinking time.

    Args:
        url: Address of the server.
        calls: Requests to draw from.
        clients: Number of clients.
        thinking: Mean of the exponentially distributed thinking times in seconds.
        seconds: Time after which no new request is sent.
    """
    load, start = Load(), time.perf_counter()
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=LIMIT, limits=limits) as client:

        async def one(number: int) -> None:
            rng = random.Random(number)
            await asyncio.sleep(rng.random() * thinking)
            while time.perf_counter() - start < seconds:
                at = rng.randrange(len(calls))
                pause = rng.expovariate(1 / thinking)
                began = time.perf_counter()
                response = await post(client, calls[at])
                ended = time.perf_counter()
                response.raise_for_status()
                load.sent.append((ended - start, ended - began))
                if at not in load.images:
                    load.images[at] = pixels(response.json()["data"][0]["b64_json"])
                await asyncio.sleep(min(pause, max(seconds - (time.perf_counter() - start), 0)))

        await asyncio.gather(*(one(number) for number in range(clients)))
    return load


def one_after_another(url: str, calls: list[Call]) -> float:
    """Return the mean seconds of requests that are sent one after another, after a first round as a warm-up."""

    async def run() -> float:
        async with httpx.AsyncClient(base_url=url, timeout=LIMIT) as client:
            for call in calls[:4]:
                await post(client, call)
            start = time.perf_counter()
            for call in calls:
                (await post(client, call)).raise_for_status()
            return (time.perf_counter() - start) / len(calls)

    return asyncio.run(run())


# ---- soak ----

LEAVES = ("leaves while it waits", "leaves its stream")


def bad_request(rng: random.Random, call: Call) -> tuple[str, dict[str, Any]]:
    """Return the code of an error, and arguments of a request that has it."""
    damaged = [("image[]", ("1.png", call.pictures[0][: len(call.pictures[0]) // 2], "image/png"))]
    fields_only = [(name, (None, value)) for name, value in call.fields.items()]
    broken = {"content-type": "multipart/form-data; boundary=x"}
    return rng.choice(
        [
            ("invalid_value", {"data": call.fields | {"steps": "0"}, "files": call.parts()}),
            ("unknown_parameter", {"data": call.fields | {"strength": "1"}, "files": call.parts()}),
            ("missing_required_parameter", {"files": fields_only}),
            ("invalid_image", {"data": call.fields, "files": damaged}),
            ("invalid_multipart", {"content": b"--y\r\nbroken", "headers": broken}),
        ]
    )


@dataclass
class Soak:
    """Observations of the clients of a soak.

    Attributes:
        kinds: Number of requests of each kind.
        problems: Lost requests and wrong errors.
        images: Number of the request and PNG file in base64 of each result.
        resident: Seconds from the start, and resident bytes of the server.
    """

    kinds: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("good", "bad", *LEAVES), 0))
    problems: list[str] = field(default_factory=list)
    images: list[tuple[int, str]] = field(default_factory=list)
    resident: list[tuple[float, int]] = field(default_factory=list)


async def _one_soak_request(client: httpx.AsyncClient, rng: random.Random, calls: list[Call], soak: Soak) -> None:
    at = rng.randrange(len(calls))
    kind = rng.choice(("bad", *LEAVES)) if rng.random() < FAULTY else "good"
    soak.kinds[kind] += 1
    call = calls[at]
    if kind == "bad":
        code, arguments = bad_request(rng, call)
        response = await client.post("/v1/images/edits", **arguments)
        if response.status_code != 400 or response.json()["error"]["code"] != code:
            soak.problems.append(f"{code}: status {response.status_code}: {response.text[:200]}")
    elif kind == LEAVES[0]:
        task = asyncio.create_task(post(client, call))
        await asyncio.wait([task], timeout=rng.random() * 0.5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    elif kind == LEAVES[1] or rng.random() < 0.5:
        data = call.fields | {"stream": "true", "partial_images": "1"}
        async with client.stream("POST", "/v1/images/edits", data=data, files=call.parts()) as response:
            async for line in response.aiter_lines():
                event = json.loads(line[5:]) if line.startswith("data:") else {}
                if kind != "good" and event.get("step"):
                    return
                if kind == "good" and event.get("type") == "image_edit.completed":
                    soak.images.append((at, event["b64_json"]))
                    return
        if kind != "good":
            return
        soak.problems.append(f"request {at}: its stream has no image")
    else:
        response = await post(client, call)
        if response.status_code == 200:
            soak.images.append((at, response.json()["data"][0]["b64_json"]))
        else:
            soak.problems.append(f"request {at}: status {response.status_code}: {response.text[:200]}")


class Watched(Protocol):
    """A server whose memory can be read."""

    url: str

    def resident_bytes(self) -> int: ...


async def soak_clients(server: Watched, calls: list[Call], count: int, clients: int) -> Soak:
    """Let clients send requests without a pause, of which one in ten is bad or left by its client.

    Args:
        server: The server.
        calls: Good requests to draw from.
        count: Number of requests.
        clients: Number of clients.
    """
    soak, left, start = Soak(), iter(range(count)), time.perf_counter()

    async def watch() -> None:
        while True:
            soak.resident.append((round(time.perf_counter() - start, 1), server.resident_bytes()))
            await asyncio.sleep(0.5)

    async with httpx.AsyncClient(base_url=server.url, timeout=LIMIT) as client:

        async def one(number: int) -> None:
            rng = random.Random(number)
            for _ in left:
                await _one_soak_request(client, rng, calls, soak)

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(one(number) for number in range(clients)))
        watching.cancel()
    return soak


def edits_alone(pipe: Any, calls: list[Call]) -> list[np.ndarray]:
    """Return the image of `edit` for each request alone."""
    from uniref_fast import EditRequest, edit
    from uniref_fast.guidance import negative_prompt_for

    images = []
    for call in calls:
        width, height = map(int, call.fields["size"].split("x"))
        guidance = float(call.fields["guidance"])
        request = EditRequest(
            call.fields["prompt"],
            [Image.open(io.BytesIO(content)) for content in call.pictures],
            negative_prompt_for(guidance),
            guidance,
            height=height,
            width=width,
            num_inference_steps=int(call.fields["steps"]),
            seed=int(call.fields["seed"]),
        )
        images.append(np.asarray(edit(pipe, [request], progress=False)[0]).astype(int))
    return images
