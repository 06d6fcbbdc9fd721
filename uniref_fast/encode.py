"""Encode prompts and images for the transformer, and decode its result, with the pipeline's own components."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from uniref_fast.quantised import compute_dtype
from uniref_fast.request import EditRequest, Geometry

__all__ = [
    "condition_tokens",
    "decode_image",
    "encoded_prompt",
    "image_latents",
    "prompt_embeddings",
    "prompt_tokens",
    "text_lengths",
    "text_runs",
    "to_rgb",
]


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB; transparent pixels become white.

    Raises:
        ValueError: If the pixels of an opened file cannot be decoded; the message names the file.
    """
    try:
        image.load()
    except Exception as error:  # decoders raise any kind of error for damaged bytes
        name = getattr(image, "filename", "") or "an image"
        raise ValueError(f"{name} cannot be decoded: {error or type(error).__name__}") from error
    if image.mode.startswith("I;16"):  # 16 bit grey: PIL's own conversion would clip it to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def prompt_embeddings(
    pipe: Any, prompt: str, images: Sequence[Image.Image], sizes: Sequence[tuple[int, int]], device: Any = None
) -> Tensor:
    """Encode a prompt and its references, `[n, joint_attention_dim]` without padding.

    Args:
        pipe: A `QwenImageEditPlusPipeline`.
        prompt: The instruction.
        images: RGB references, in order.
        sizes: Width and height in pixels at which the text encoder sees each reference.
        device: Device of the pipeline. None finds it, which visits each of the pipeline's modules.

    Raises:
        ValueError: If the pipeline masks tokens inside a prompt.
    """
    embeds, text = encoded_prompt(pipe, prompt, images, sizes, device=device)
    if not isinstance(text, int):
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
) -> tuple[Tensor, int | tuple[tuple[int, bool], ...]]:
    """Encode a prompt with the pipeline's `encode_prompt`, or pass given embeddings through it.

    Args:
        pipe: A `QwenImageEditPlusPipeline`.
        prompt: The instruction; None with `embeds`.
        images: RGB references, in order.
        sizes: Width and height in pixels at which the text encoder sees each reference.
        embeds: Embeddings `[L, C]` or `[1, L, C]` instead of a prompt.
        mask: Valid rows of `embeds`, `[L]` or `[1, L]`; None for all.
        device: Device of the pipeline; None finds it.
        cast: Cast `embeds` to the dtype of the transformer.

    Returns:
        Embeddings `[n, joint_attention_dim]` without the padding at their end, and n or, if some of the rows are
        masked, their (length, valid) runs.
    """
    device = device or pipe._execution_device
    if embeds is None:
        resized = [
            pipe.image_processor.resize(image, h, w) for image, (w, h) in zip(images, sizes, strict=True)
        ] or None
    else:
        resized = None
        embeds = embeds.reshape(1, *embeds.shape[-2:]).to(device, compute_dtype(pipe.transformer) if cast else None)
        mask = None if mask is None else mask.reshape(1, -1).to(device)
    embeds, mask = pipe.encode_prompt(
        prompt=prompt, image=resized, device=device, num_images_per_prompt=1, prompt_embeds=embeds,
        prompt_embeds_mask=mask, max_sequence_length=512,
    )  # fmt: skip
    text = text_runs(embeds.shape[1], mask)
    return embeds[0, : text if isinstance(text, int) else sum(length for length, _ in text)], text


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
        pipe: A `QwenImageEditPlusPipeline`.
        image: RGB image, which is resized to `size`.
        size: Width and height in pixels.
        device: Device of the pipeline; None finds it.
    """
    width, height = size
    pixels = pipe.image_processor.preprocess(image, height, width).unsqueeze(2)
    latents = pipe._encode_vae_image(pixels.to(device or pipe._execution_device, pipe.vae.dtype), None)
    rows, columns = latents.shape[3:]
    return pipe._pack_latents(latents, 1, latents.shape[1], rows, columns)[0]


def decode_image(pipe: Any, latents: Tensor, size: tuple[int, int], output_type: str = "pil") -> Any:
    """Decode packed latents to an image; the reverse of `image_latents`.

    Args:
        pipe: A `QwenImageEditPlusPipeline`.
        latents: Packed latents, `[1, tokens, channels]`.
        size: Width and height in pixels.
        output_type: "pil", "np" or "pt", as for the pipeline.
    """
    vae = pipe.vae
    width, height = size
    latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor).to(vae.dtype)
    mean, std = (
        torch.tensor(values).view(1, vae.config.z_dim, 1, 1, 1).to(latents.device, latents.dtype)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    image = vae.decode(latents / (1.0 / std) + mean, return_dict=False)[0][:, :, 0]
    return pipe.image_processor.postprocess(image, output_type=output_type)[0]


def prompt_tokens(pipe: Any, prompt: str, sizes: Sequence[tuple[int, int]]) -> int:
    """Return the length of `prompt_embeddings` without running the encoder."""
    pictures = "".join(f"Picture {i + 1}: <|vision_start|><|image_pad|><|vision_end|>" for i in range(len(sizes)))
    tokens = pipe.tokenizer(pipe.prompt_template_encode.format(pictures + prompt))["input_ids"]
    seen = sum(condition_tokens(pipe, size) for size in sizes)
    return len(tokens) + seen - len(sizes) - pipe.prompt_template_encode_start_idx


def condition_tokens(pipe: Any, size: tuple[int, int]) -> int:
    """Return the number of tokens of a reference of (width, height) pixels in the text encoder."""
    processor = pipe.processor.image_processor
    return processor.get_number_of_image_patches(size[1], size[0], {}) // processor.merge_size**2


def text_lengths(pipe: Any, request: EditRequest, sizes: Geometry) -> list[int]:
    """Return the numbers of text tokens of the prompt and, with guidance, of the negative prompt, without encoding.

    Args:
        pipe: Pipeline of the request.
        request: A checked request.
        sizes: Sizes of the request.
    """
    lengths = []
    for text, embeds, mask in request.texts:
        runs = prompt_tokens(pipe, text or "", sizes.condition_sizes) if embeds is None else (
            text_runs(embeds.shape[-2], mask))  # fmt: skip
        lengths.append(runs if isinstance(runs, int) else sum(length for length, _ in runs))
    return lengths
