"""Encode prompts and images for the transformer, and decode its result, with the pipeline's own components."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from uniref_fast.models.families import family_of
from uniref_fast.models.family import Text
from uniref_fast.request import EditRequest, Geometry

__all__ = [
    "decode_image",
    "encoded_prompt",
    "image_latents",
    "opaque",
    "prompt_embeddings",
    "prompt_text",
    "prompt_tokens",
    "request_texts",
    "saveable",
    "text_length",
    "text_lengths",
    "text_runs",
    "to_rgb",
    "to_rgba",
]


TRANSPARENT = ("PNG", "WEBP", "AVIF", "TIFF", "JPEG2000")
"""Formats in which a result keeps its transparency channel."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB; transparent pixels become white.

    Raises:
        ValueError: If the pixels of an opened file cannot be decoded; the message names the file.
    """
    image = _decoded(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def saveable(image: Image.Image, form: str | None) -> Image.Image:
    """Return an image that a file format can hold: over white, if the format has no transparency.

    Args:
        image: The image.
        form: Name of the format in Pillow, such as "JPEG"; None for an unknown one.
    """
    return image if form in TRANSPARENT else to_rgb(image)


def to_rgba(image: Image.Image) -> Image.Image:
    """Convert an image to RGBA; errors as for `to_rgb`."""
    return _decoded(image).convert("RGBA")


def opaque(image: Image.Image) -> Image.Image:
    """Convert an image to RGB without its transparency, so that hidden pixels are seen; errors as for `to_rgb`."""
    return _decoded(image).convert("RGB")


def _decoded(image: Image.Image) -> Image.Image:
    try:
        image.load()
    except Exception as error:  # decoders raise any kind of error for damaged bytes
        name = getattr(image, "filename", "") or "an image"
        raise ValueError(f"{name} cannot be decoded: {error or type(error).__name__}") from error
    if image.mode.startswith("I;16"):  # 16 bit grey: PIL's own conversion would clip it to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image


def prompt_embeddings(
    pipe: Any, prompt: str, images: Sequence[Image.Image], sizes: Sequence[tuple[int, int]], device: Any = None
) -> Tensor:
    """Encode a prompt and its references, `[n, text_channels]` without padding.

    Args:
        pipe: A pipeline of a supported family.
        prompt: The instruction.
        images: RGB references, in order.
        sizes: Width and height in pixels at which the text encoder sees each reference.
        device: Device of the pipeline. None finds it, which visits each of the pipeline's modules.

    Raises:
        ValueError: If the pipeline masks tokens inside a prompt.
    """
    embeds, text = encoded_prompt(pipe, prompt, images, sizes, device=device)
    if not isinstance(text, int) and any(length and not valid for length, valid in text):
        raise ValueError(
            "encode_prompt of this pipeline masks tokens inside a prompt; only padding at its end is supported here"
        )
    return embeds


def encoded_prompt(
    pipe: Any,
    prompt: str | None,
    images: Sequence[Image.Image],
    sizes: Sequence[tuple[int, int]],
    embeds: Tensor | None = None,
    mask: Tensor | None = None,
    device: Any = None,
    cast: bool = True,
) -> tuple[Tensor, Text]:
    """Encode a prompt with the pipeline's `encode_prompt`, or pass given embeddings through it.

    Args:
        pipe: A pipeline of a supported family.
        prompt: The instruction; None with `embeds`.
        images: RGB references, in order.
        sizes: Width and height in pixels at which the text encoder sees each reference.
        embeds: Embeddings `[L, C]` or `[1, L, C]` instead of a prompt.
        mask: Valid rows of `embeds`, `[L]` or `[1, L]`; None for all.
        device: Device of the pipeline; None finds it.
        cast: Cast `embeds` to the dtype of the transformer.

    Returns:
        Embeddings `[n, joint_attention_dim]` without the padding at their end (Qwen-Image-2.1 keeps it in `embeds`),
        and n or, if some of the rows are masked, their (length, valid) runs.
    """
    return family_of(pipe).encode_prompt(pipe, prompt, images, sizes, embeds, mask, device, cast)


def text_runs(length: int, mask: Tensor | None) -> int | tuple[tuple[int, bool], ...]:
    """Return the number of rows up to the last valid one, or (length, valid) runs if some of these rows are masked."""
    if mask is None:
        return length
    valid = mask.reshape(-1).bool().tolist()
    while valid and not valid[-1]:
        valid.pop()
    runs = tuple((len(list(run)), state) for state, run in itertools.groupby(valid))
    return len(valid) if len(runs) <= 1 else runs


def image_latents(pipe: Any, image: Image.Image, size: tuple[int, int], device: Any = None) -> Tensor:
    """Encode an RGB image to normalised, packed latents, `[tokens, channels]`.

    Args:
        pipe: A pipeline of a supported family.
        image: RGB image, which is resized to `size`.
        size: Width and height in pixels.
        device: Device of the pipeline; None finds it.
    """
    return family_of(pipe).encode_image(pipe, image, size, device)


def decode_image(pipe: Any, latents: Tensor, size: tuple[int, int], output_type: str = "pil") -> Any:
    """Decode packed latents to an image; the reverse of `image_latents`.

    Args:
        pipe: A pipeline of a supported family.
        latents: Packed latents, `[1, tokens, channels]`.
        size: Width and height in pixels.
        output_type: "pil", "np" or "pt", as for the pipeline.
    """
    return family_of(pipe).decode(pipe, latents, size, output_type)


def prompt_tokens(pipe: Any, prompt: str, sizes: Sequence[tuple[int, int]]) -> int:
    """Return the length of `prompt_embeddings` without running the encoder."""
    return text_length(prompt_text(pipe, prompt, sizes))


def prompt_text(pipe: Any, prompt: str, sizes: Sequence[tuple[int, int]]) -> Text:
    """Return the text of `encoded_prompt` without running the encoder; the arguments are those of `prompt_tokens`."""
    return family_of(pipe).prompt_text(pipe, prompt, sizes)


def text_lengths(pipe: Any, request: EditRequest, sizes: Geometry) -> list[int]:
    """Return the numbers of text tokens of the prompt and, with guidance, of the negative prompt, without encoding.

    Args:
        pipe: Pipeline of the request.
        request: A checked request.
        sizes: Sizes of the request.
    """
    return [text_length(text) for text in request_texts(pipe, request, sizes)]


def request_texts(pipe: Any, request: EditRequest, sizes: Geometry) -> list[Text]:
    """Return the text of `encoded_prompt` of each prompt of a request, without encoding; the arguments are those of
    `text_lengths`."""
    family = family_of(pipe)
    return [
        family.prompt_text(pipe, text or "", seen) if embeds is None else family.given_text(embeds.shape[-2], mask)
        for (text, embeds, mask), seen in zip(request.texts, sizes.seen(family), strict=False)
    ]


def text_length(text: Text) -> int:
    """Return the number of tokens of a text."""
    return text if isinstance(text, int) else sum(length for length, _ in text)
