"""Fields of an edit request: OpenAI's and our own, checked one by one. Imports neither a server library nor PyTorch.

A field that cannot be honoured is an error with its name. A field that is null or left out takes its default.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from uniref_fast.guidance import is_guided, negative_prompt_for
from uniref_fast.serve.config import ServeConfig
from uniref_fast.serve.errors import ApiError

__all__ = ["EditCall", "parse"]

T = TypeVar("T")

MAX_PROMPT = 32_000
"""Largest number of characters of a prompt, as in OpenAI's API."""

FORMATS = ("png", "jpeg", "webp")

UNSUPPORTED = {
    "mask": "edits apply to the whole picture; say in the prompt what should stay as it is",
    "markup": "the references are edited as they are; draw the markup into a further image and name it in the prompt",
    "input_fidelity": "all references have the same fidelity",
    "complexity": "no computation is spent on planning; give steps for the number of denoising steps",
    "frame_count": "results are single images",
    "frame_duration_ms": "results are single images",
    "svg": "results are images of pixels",
}
"""Fields of OpenAI's API that cannot be honoured, with the reason."""

CALLED = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "true_cfg_scale": "guidance",
    "cfg_scale": "guidance",
    "image_url": "image",
    "width": "size",
    "height": "size",
    "loras": "lora",
    "moderation": None,
    "style": None,
}
"""Our names of fields that other servers call otherwise."""


KNOWN = (
    "image", "prompt", "model", "n", "size", "response_format", "output_format", "output_compression", "background",
    "quality", "stream", "partial_images", "user", "safety_identifier", "steps", "guidance", "negative_prompt", "seed",
    "lora",
)  # fmt: skip
"""Fields that can be honoured."""


@dataclass(frozen=True)
class EditCall:
    """A parsed edit request, whose pictures are not read yet.

    Attributes:
        prompt: The instruction, in the form of the model's prompts.
        images: Pictures in order: encoded bytes, or a URL.
        n: Number of images to make, with the seeds `seed`, `seed + 1`, and so on.
        size: (width, height) of the result in pixels; None lets the pipeline choose.
        steps: Number of denoising steps.
        guidance: True CFG scale.
        negative_prompt: Negative prompt; None without guidance, or for that of the model.
        seed: Seed of the first image; None draws one.
        lora: Scales of adapters by name.
        stream: Send events while the edit runs.
        partial_images: Number of partial images among these events.
        output_format: "png", "jpeg" or "webp".
        output_compression: Quality of JPEG and WebP files, from 0 to 100.
        safety_identifier: Text of the client, which the response repeats.
    """

    prompt: str
    images: tuple[bytes | str, ...]
    n: int = 1
    size: tuple[int, int] | None = None
    steps: int = 50
    guidance: float = 1.0
    negative_prompt: str | None = None
    seed: int | None = None
    lora: Mapping[str, float] = field(default_factory=dict)
    stream: bool = False
    partial_images: int = 0
    output_format: str = "png"
    output_compression: int = 100
    safety_identifier: str | None = None


def parse(pairs: Iterable[tuple[str, Any]], config: ServeConfig) -> EditCall:
    """Return the checked fields of a request.

    Args:
        pairs: Names and values: texts, numbers, mappings (of JSON), and bytes for uploaded files.
        config: Settings of the server.

    Raises:
        ApiError: If a field is unknown, missing, given twice, has a wrong value, or cannot be honoured.
    """
    images, lora, given = _collect(pairs)
    limits = config.limits
    for name in given:
        _check_name(name)
    read = _Reader(given)
    model = read("model", _text)
    if model is not None and model not in (config.model, *config.aliases):
        raise ApiError(400, "model_not_found", f"this server runs {config.model}, not {model!r:.100}", "model")
    prompt = read("prompt", _text)
    if prompt is None or not prompt.strip():
        raise ApiError(400, "missing_required_parameter", "prompt is missing or empty", "prompt")
    if not images:
        raise ApiError(400, "missing_required_parameter", "image is missing: send at least one picture", "image")
    if len(images) > limits.images:
        message = f"{len(images)} images were sent; at most {limits.images} are possible"
        raise ApiError(400, "too_many_images", message, "image")
    read("response_format", _choice("b64_json", url="this server keeps no files; images come as b64_json"))
    read("background", _choice("auto", "opaque", transparent="the model chooses the background; leave it out"))
    read("quality", _choice("auto", rest="the number of denoising steps decides the quality; give steps"))
    user = read("user", _text)
    guidance = read("guidance", _number(1, 100), config.guidance)
    form = read("output_format", _choice(*FORMATS), "png")
    if form == "png" and "output_compression" in given:
        reason = "PNG files are compressed without loss; give output_compression with jpeg or webp"
        raise ApiError(400, "unsupported_parameter", reason, "output_compression")
    stream = read("stream", _boolean, False)
    if not stream and given.get("partial_images") not in (None, 0, "0"):
        raise ApiError(400, "unsupported_parameter", "partial_images needs stream=true", "partial_images")
    return EditCall(
        prompt=config.written(prompt),
        images=tuple(images),
        n=read("n", _integer(1, limits.n), 1),
        size=read("size", _size(limits.result_pixels)),
        steps=read("steps", _integer(1, limits.steps), config.steps),
        guidance=guidance,
        negative_prompt=_negative_prompt(read("negative_prompt", _text), guidance, config.negative_prompt),
        seed=read("seed", _integer(0, 2**63 - 1)),
        lora=_lora(lora, config.loras),
        stream=stream,
        partial_images=read("partial_images", _integer(0, 3), 0),
        output_format=form,
        output_compression=read("output_compression", _integer(0, 100), 100),
        safety_identifier=read("safety_identifier", _text) or user,
    )


def _collect(pairs: Iterable[tuple[str, Any]]) -> tuple[list[bytes | str], list[Any], dict[str, Any]]:
    """Return the images, the values of `lora`, and all other fields by name."""
    images: list[bytes | str] = []
    lora: list[Any] = []
    given: dict[str, Any] = {}
    for name, value in pairs:
        if value is None:
            continue
        if name in ("image", "image[]", "images"):
            images += _images(value)
        elif inner := re.fullmatch(r"lora\[(.+)\]", name):
            lora.append({inner[1]: value})
        elif name == "lora":
            lora.append(value)
        elif name in given:
            raise ApiError(400, "duplicate_parameter", f"{name} was sent twice", name)
        else:
            given[name] = value
    return images, lora, given


def _images(value: Any) -> list[bytes | str]:
    """Return the pictures of a value: uploaded bytes, a URL, an object {"image_url": URL}, or a list of these."""
    if isinstance(value, list):
        return [image for each in value for image in _images(None if isinstance(each, list) else each)]
    if isinstance(value, Mapping) and set(value) == {"image_url"}:
        value = value["image_url"]
    if isinstance(value, bytes) or (isinstance(value, str) and re.match(r"(https?|data):", value, re.I)):
        return [value]
    message = "image must be an uploaded file, or a URL that begins with data: or https:"
    raise ApiError(400, "invalid_image", message, "image")


def _check_name(name: str) -> None:
    if name in UNSUPPORTED or name.partition("[")[0] in UNSUPPORTED:
        name = name.partition("[")[0]
        raise ApiError(400, "unsupported_parameter", f"{name} is not supported: {UNSUPPORTED[name]}", name)
    if name in KNOWN:
        return
    near = CALLED.get(name) or next(iter(difflib.get_close_matches(name[:100], KNOWN, n=1)), None)
    hint = f"; did you mean {near}?" if near else f"; known are {', '.join(sorted(KNOWN))}"
    raise ApiError(400, "unknown_parameter", f"{name[:100]!r} is not a field of this server{hint}", name[:100])


class _Reader:
    """Fields by name, each read with the function that checks it."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given

    def __call__(self, name: str, check: Callable[[str, Any], T], default: Any = None) -> Any:
        value = self._given.get(name)
        return default if value is None else check(name, value)


def _invalid(name: str, value: Any, possible: str) -> ApiError:
    return ApiError(400, "invalid_value", f"{name} must be {possible}, got {value!r:.100}", name)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ApiError(400, "invalid_value", f"{name} must be a text, got {type(value).__name__}", name)
    if len(value) > MAX_PROMPT:
        raise ApiError(
            400, "invalid_value", f"{name} has {len(value)} characters; at most {MAX_PROMPT} are possible", name
        )
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can express
        raise ApiError(400, "invalid_value", f"{name} is not valid Unicode", name) from None
    return value


def _integer(least: int, most: int) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,20}", value):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise _invalid(name, value, f"a whole number from {least} to {most}")
        return value

    return check


def _number(least: float, most: float) -> Callable[[str, Any], float]:
    def check(name: str, value: Any) -> float:
        number = math.nan
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                number = float(value)
            except (ValueError, OverflowError):
                number = math.nan
        if not least <= number <= most:
            raise _invalid(name, value, f"a number from {least:g} to {most:g}")
        return number

    return check


def _boolean(name: str, value: Any) -> bool:
    if value in (True, False) and isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise _invalid(name, value, "true or false")


def _choice(*possible: str, rest: str | None = None, **refused: str) -> Callable[[str, Any], str]:
    """Return a check of one of several texts. `refused` and `rest` say why others of OpenAI's are not possible."""

    def check(name: str, value: Any) -> str:
        if isinstance(value, str) and value in possible:
            return value
        if isinstance(value, str) and (reason := refused.get(value, rest)):
            raise ApiError(400, "unsupported_value", f"{name}={value[:100]} is not supported: {reason}", name)
        raise _invalid(name, value, " or ".join(possible))

    return check


def _size(most: int) -> Callable[[str, Any], tuple[int, int] | None]:
    def check(name: str, value: Any) -> tuple[int, int] | None:
        if value == "auto":
            return None
        found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", value) if isinstance(value, str) else None
        if not found:
            raise _invalid(name, value, '"auto" or WIDTHxHEIGHT in pixels, such as 1024x768')
        width, height = int(found[1]), int(found[2])
        if width * height > most:
            raise ApiError(
                400, "invalid_value", f"size {value} has {width * height} pixels; at most {most} are possible", name
            )
        return width, height

    return check


def _negative_prompt(text: str | None, guidance: float, usual: str | None) -> str | None:
    if text is not None and not is_guided(guidance):
        reason = f"the negative prompt has no effect at guidance {guidance:g}; give guidance above 1"
        raise ApiError(400, "unsupported_parameter", reason, "negative_prompt")
    return negative_prompt_for(guidance, usual) if text is None else text


def _lora(values: Iterable[Any], known: tuple[str, ...]) -> dict[str, float]:
    """Return scales by name from names, "NAME:SCALE", mappings, or JSON texts of mappings."""
    scales: dict[str, float] = {}
    for value in values:
        if isinstance(value, str) and value.lstrip().startswith("{"):
            try:
                value = json.loads(value)
            except ValueError:
                raise _invalid("lora", value, "a JSON object of scales by name") from None
        if isinstance(value, str):
            name, _, scale = value.partition(":")
            value = {name: scale or 1.0}
        if not isinstance(value, Mapping):
            raise _invalid("lora", value, "the name of an adapter, NAME:SCALE, or an object of scales by name")
        for name, scale in value.items():
            if name not in known:
                have = f"it has {', '.join(known)}" if known else "it has none"
                raise ApiError(400, "lora_not_found", f"the server has no adapter {name!r:.100}; {have}", "lora")
            if name in scales:
                raise ApiError(400, "duplicate_parameter", f"the adapter {name} was given twice", "lora")
            scales[name] = _number(-100, 100)("lora", scale)
    return scales
