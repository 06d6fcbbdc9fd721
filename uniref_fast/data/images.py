"""Sources of images, and safe decoding: the size from the header, the pixels as RGB, damage as an error.

Every command opens images through `ImageSource`. Damaged metadata never prevents an image from being read: without a
readable orientation it is used as it is stored.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

__all__ = ["MAX_PIXELS", "ImageSource"]

Result = TypeVar("Result")

# Pillow warns about damaged EXIF data and TIFF tags, which `_orientation` handles. The filter is global, because
# `warnings.catch_warnings` may not be used while several threads decode.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")

MAX_PIXELS = 178_956_970
"""Largest number of pixels of an image; larger ones are refused before decoding (Pillow's own limit for an error)."""

# Formats of photographs and artworks. Others are excluded on purpose: EPS starts a program, ICO and PSD hold several
# images, and they are not used for training data.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "JPEG2000", "GIF", "BMP", "TIFF", "PPM")

UPRIGHT = {  # EXIF orientation -> transposition that turns the stored pixels upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class ImageSource:
    """An image that has not been read yet: a file, a part of a file (a tar member), or bytes in memory (a column).

    Every method, and `digest`, raises ValueError, beginning with `name`, if the bytes cannot be read or are not a
    complete image.

    Attributes:
        name: Name in messages.
        path: File that holds the image; None for bytes in memory.
        offset: First byte in that file.
        length: Number of bytes; None means the whole file.
        data: The encoded bytes in memory, or None.
    """

    name: str
    path: Path | None = None
    offset: int = 0
    length: int | None = None
    data: bytes | None = field(default=None, repr=False)

    def read(self) -> bytes:
        """Return the encoded bytes."""
        try:
            with self._file() as file:
                content = file.read()
        except OSError as error:
            raise ValueError(f"{self.name}: cannot be read: {error}") from error
        if self.length is not None and len(content) != self.length:
            raise ValueError(f"{self.name}: {self.path} is truncated: it holds {len(content)} bytes of {self.length}")
        return content

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the encoded bytes in hex, which does not depend on the place of the image; computed once."""
        return hashlib.sha256(self.read()).hexdigest()

    def size(self) -> tuple[int, int]:
        """Return (width, height) in pixels of the upright image, from the header alone."""
        return self._with(_size)

    def suffix(self) -> str:
        """Return the suffix of a file of its format, with the dot."""
        return self._with(_suffix)

    def load(self, mode: Literal["RGB", "RGBA", "original"] = "RGB") -> Image.Image:
        """Return the upright image.

        Args:
            mode: "RGB" puts transparent pixels on white, "RGBA" gives every image a transparency channel, and
                "original" returns RGBA for an image with transparency and RGB for others.
        """
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            raise ValueError(
                f"{self.name}: PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on in this process, so damaged images would "
                "pass with grey parts; set it to False"
            )
        return self._with(functools.partial(_upright, mode=mode))

    def load_mask(self) -> np.ndarray:
        """Return the upright image as weights of its pixels, float32 `[height, width]` from 0 to 1.

        White is 1 and black is 0; colours count by their brightness (ITU-R BT.601). If a pixel is transparent, the
        alpha channel is the mask instead: opaque is 1, and colours do not count.
        """
        return self._with(_weights)

    def _with(self, use: Callable[[Image.Image], Result]) -> Result:
        """Return the result of `use` on the opened image; if that fails, on a PNG without its metadata."""
        try:
            with self._opened(self._file) as image:
                return use(image)
        except ValueError:
            with contextlib.suppress(ValueError):
                if (bare := _without_metadata(self.read())) is not None:
                    with self._opened(lambda: io.BytesIO(bare)) as image:
                        return use(image)
            raise

    @contextlib.contextmanager
    def _opened(self, content: Callable[[], BinaryIO]) -> Iterator[Image.Image]:
        """Yield the image with its header parsed and its size checked."""
        try:
            with content() as file, Image.open(file, formats=_formats()) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ValueError(f"{width} x {height} pixels are more than the limit of {MAX_PIXELS:,}")
                yield image
        except UnidentifiedImageError:
            with content() as file:
                if not file.read(1):
                    raise ValueError(f"{self.name}: not an image: the file is empty (0 bytes)") from None
            known = ", ".join(_formats())
            raise ValueError(f"{self.name}: not an image of a known format ({known}), or damaged") from None
        except (MemoryError, Image.DecompressionBombError) as error:
            raise ValueError(f"{self.name}: too large to decode: {error}") from error
        except Exception as error:  # a decoder may raise anything on damaged bytes
            raise ValueError(f"{self.name}: {error or type(error).__name__}") from error

    def _file(self) -> BinaryIO:
        if self.data is not None:
            return io.BytesIO(self.data)
        if self.path is None:
            raise ValueError(f"{self.name}: has neither a path nor bytes")
        if self.length is None:
            return open(self.path, "rb")
        return io.BufferedReader(_Window(self.path, self.offset, self.length))


class _Window(io.RawIOBase):
    """A part of a file as a read-only file."""

    def __init__(self, path: Path, offset: int, length: int) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  # closed by close()
        self._offset, self._length, self._at = offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError(f"cannot seek to {base + offset}")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]  # a buffer; its type has no name in 3.10
        count = max(min(len(buffer), self._length - self._at), 0)
        self._file.seek(self._offset + self._at)
        content = self._file.read(count) or b""
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return the formats of IMAGE_FORMATS that this Pillow was built with."""
    Image.init()
    return tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)


def _size(image: Image.Image) -> tuple[int, int]:
    turn = _orientation_in_header(image)
    if image.format == "TIFF" and turn in (5, 6, 7, 8):
        image.load()  # Pillow turns TIFFs itself, some versions already on opening, so the size is known after loading
        return image.size
    return (image.height, image.width) if turn in (5, 6, 7, 8) else image.size


def _suffix(image: Image.Image) -> str:
    form = str(image.format)
    return {"JPEG": ".jpg", "MPO": ".jpg", "JPEG2000": ".jp2", "TIFF": ".tif"}.get(form, f".{form.lower()}")


def _upright(image: Image.Image, mode: str) -> Image.Image:
    image.load()
    turn = _orientation(image)  # after decoding: a PNG may hold it behind its pixels, and Pillow turns TIFFs itself
    keeps = mode == "original" and image.has_transparency_data and not _is_16_bit_grey(image)
    upright = image.convert("RGBA") if mode == "RGBA" or keeps else _rgb(image)
    return upright.transpose(UPRIGHT[turn]) if turn in UPRIGHT else upright


def _weights(image: Image.Image) -> np.ndarray:
    image.load()
    turn = _orientation(image)
    if _is_16_bit_grey(image):
        values = np.asarray(image).astype(np.float32) / 65535
    else:
        values = np.asarray(_alpha(image) or _rgb(image).convert("L")).astype(np.float32) / 255
    weights = Image.fromarray(values)
    return np.asarray(weights.transpose(UPRIGHT[turn]) if turn in UPRIGHT else weights)


def _alpha(image: Image.Image) -> Image.Image | None:
    """Return the alpha channel of an image with a transparent pixel; None for other images."""
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return alpha if np.asarray(alpha).min() < 255 else None


def _without_metadata(content: bytes) -> bytes | None:
    """Return a PNG with only the chunks that its pixels need and an intact orientation; None for other formats.

    Pillow refuses a PNG whose texts or profiles are damaged, or unpack to more than a megabyte.
    """
    signature = b"\x89PNG\r\n\x1a\n"
    if not content.startswith(signature):
        return None
    kept, at = [signature], len(signature)
    while at + 12 <= len(content):
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        chunk = content[at : at + 12 + length]
        whole = len(chunk) == 12 + length and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if kind[:1].isupper() or kind == b"tRNS" or (kind == b"eXIf" and whole):
            kept.append(chunk)
        at += len(chunk)
    return b"".join(kept)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) if it is missing or the metadata cannot be read."""
    try:
        # the base class's: PngImageFile's own decodes the image to read behind the pixels
        return int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    except Exception:  # parsers of damaged metadata raise anything
        return 1


def _orientation_in_header(image: Image.Image) -> int:
    if image.format == "PNG" and _metadata_behind_pixels(getattr(image, "fp", None)):
        image.load()
    return _orientation(image)


def _metadata_behind_pixels(file: BinaryIO | None) -> bool:
    """Return True if a PNG has chunks behind its pixels that can hold an orientation; reads the chunk headers only."""
    if file is None:
        return False
    before = file.tell()
    try:
        file.seek(8)
        pixels = False
        while len(header := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", header)
            if kind == b"IEND":
                return False
            if pixels and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
                return True
            pixels = pixels or kind == b"IDAT"
            file.seek(length + 4, io.SEEK_CUR)  # content and checksum
        return False
    finally:
        file.seek(before)


def _is_16_bit_grey(image: Image.Image) -> bool:
    # Pillow before 12 opens grey PNGs and PGMs of 16 bits as "I"
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _rgb(image: Image.Image) -> Image.Image:
    if _is_16_bit_grey(image):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")  # convert alone would clip
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode!r} has no defined range; store 8 or 16 bits a channel")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    return image.convert("RGB")
