"""Pictures of a request, decoded within limits, and results as files."""

from __future__ import annotations

import base64
import binascii
import io
import re
import warnings
from collections.abc import Sequence

from PIL import Image

from uniref_fast.data.images import ImageSource
from uniref_fast.encode import saveable
from uniref_fast.serve.config import Limits
from uniref_fast.serve.errors import ApiError

__all__ = ["background_of", "check_pictures", "data_url", "decode", "encode"]

# Pillow warns about sizes that `Limits.pixels` decides about; the filter is global, because threads share the filters.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

MAX_SCANS = 100
"""Largest number of scans of a JPEG file. Each is decoded for all pixels, and a few bytes are enough for one."""

MAX_SEGMENTS = 10_000
"""Largest number of segments of a JPEG file."""

SEGMENT = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]", re.S)
"""Marker of a segment of a JPEG file. The markers that are left out have no length."""

FORMATS = ("PNG", "JPEG", "WEBP")
"""Formats of pictures that the server reads, as OpenAI's."""


def check_pictures(pictures: Sequence[bytes], limits: Limits) -> None:
    """Check the formats and sizes in the headers of pictures, before anything is decoded.

    Raises:
        ApiError: If one is not a picture, or all have too many pixels.
    """
    total = 0
    for number, content in enumerate(pictures, start=1):
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                width, height = image.size
        except Image.DecompressionBombError:
            raise _too_large(number, "more pixels than any picture may have", limits) from None
        except Exception:  # parsers of damaged files raise anything
            empty = ": it has 0 bytes" if not content else ""
            message = f"image {number} is not a readable picture of the format PNG, JPEG or WebP{empty}"
            raise ApiError(400, "invalid_image", message, "image") from None
        if content.startswith(b"\xff\xd8") and _has_many_scans(content):
            message = f"image {number} is a JPEG file of more than {MAX_SCANS} scans or {MAX_SEGMENTS} segments"
            raise ApiError(400, "invalid_image", message, "image")
        total += width * height
        if total > limits.pixels:
            raise _too_large(number, f"{width} x {height} pixels", limits)


def _has_many_scans(content: bytes) -> bool:
    """Return whether a JPEG file has more than `MAX_SCANS` scans, or more than `MAX_SEGMENTS` segments."""
    scans, place = 0, 2
    for _ in range(MAX_SEGMENTS):
        marker = SEGMENT.search(content, place)
        if marker is None or marker[0] == b"\xff\xd9":  # the end of the picture; other data may follow it
            return False
        scans += marker[0] == b"\xff\xda"
        if scans > MAX_SCANS:
            return True
        place = marker.end() + max(int.from_bytes(content[marker.end() : marker.end() + 2], "big"), 2)
    return True


def _too_large(number: int, size: str, limits: Limits) -> ApiError:
    message = f"image {number} has {size}; all images together may have {limits.pixels:,} pixels"
    return ApiError(400, "image_too_large", message, "image")


def decode(pictures: Sequence[bytes]) -> list[Image.Image]:
    """Decode checked pictures as `uniref-fast edit` does: upright, and with their transparency if they have one.

    Raises:
        ApiError: If one is damaged.
    """
    images = []
    for number, content in enumerate(pictures, start=1):
        try:
            images.append(ImageSource(f"image {number}", data=content).load("original"))
        except ValueError as error:
            raise ApiError(400, "invalid_image", str(error), "image") from error
    return images


def data_url(url: str) -> bytes:
    """Return the content of a URL such as "data:image/png;base64,...".

    Raises:
        ApiError: If it has another form.
    """
    header, found, content = url.partition(",")
    if not found or not re.fullmatch(r"data:image/[a-z0-9.+-]+;base64", header, re.I):
        message = "a data URL of a picture has the form data:image/png;base64,..."
        raise ApiError(400, "invalid_image", message, "image")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, "invalid_image", "a data URL of a picture is not valid base64", "image") from None


def encode(image: Image.Image, output_format: str, quality: int) -> str:
    """Return a result as a file in base64.

    Args:
        image: The result.
        output_format: "png", "jpeg" or "webp".
        quality: Quality of JPEG and WebP, from 0 to 100.
    """
    file = io.BytesIO()
    image = saveable(image, output_format.upper())
    image.save(file, output_format.upper(), **({} if output_format == "png" else {"quality": quality}))
    return base64.b64encode(file.getvalue()).decode()


def background_of(image: Image.Image, output_format: str) -> str:
    """Return "transparent" if the file of `encode` has a pixel that is not opaque, otherwise "opaque"."""
    bands = saveable(image, output_format.upper())
    lowest = bands.getchannel("A").getextrema()[0] if bands.mode == "RGBA" else 255
    return "opaque" if lowest == 255 else "transparent"
