"""Prompt embeddings and image latents for the transformer, and its result decoded; by a pipeline's own parts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from uniref_fast.quantised import compute_dtype

__all__ = [
    "condition_tokens",
    "decode_image",
    "encoded_prompt",
    "image_latents",
    "prompt_embeddings",
    "prompt_tokens",
    "text_runs",
    "to_rgb",
]


def to_rgb(image: Image.Image) -> Image.Image:
    """Three channels; what is transparent becomes white.

    Raises:
        ValueError: for an image that was opened but whose pixels cannot be decoded; with its file's name.
    """
    try:
        image.load()
    except Exception as error:  # decoders raise anything on damaged bytes
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
    """Embeddings of a prompt and the pictures it speaks of, `[n, joint_attention_dim]`, without padding.

    Args:
        pipe: a `QwenImageEditPlusPipeline`.
        prompt: the instruction.
        images: RGB references, in order.
        sizes: (width, height) in pixels that the text encoder sees each at.
        device: that the pipeline runs on; None asks it, which takes a look at each of its modules.
    """
    embeds, text = encoded_prompt(pipe, prompt, images, sizes, device=device)
    if not isinstance(text, int):
        raise ValueError(
            "encode_prompt of this pipeline masks tokens inside of a prompt; only padding at its end can be"
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
) -> tuple[Tensor, int | tuple[tuple[int, bool], ...]]:
    """Embeddings of a prompt, by the pipeline's `encode_prompt`, without the padding at their end.

    Args:
        pipe, prompt, images, sizes, device: as for `prompt_embeddings`.
        embeds, mask: given embeddings `[L, C]` or `[1, L, C]` and the mask of their valid rows, instead of a prompt.

    Returns:
        embeddings `[n, joint_attention_dim]`, and n or, where some of these are masked, their (length, valid) runs.
    """
    device = device or pipe._execution_device
    if embeds is None:
        resized = [
            pipe.image_processor.resize(image, h, w) for image, (w, h) in zip(images, sizes, strict=True)
        ] or None
    else:
        resized, dtype = None, compute_dtype(pipe.transformer)
        embeds = embeds.reshape(1, *embeds.shape[-2:]).to(device, dtype)
        mask = None if mask is None else mask.reshape(1, -1).to(device)
    embeds, mask = pipe.encode_prompt(
        prompt=prompt, image=resized, device=device, num_images_per_prompt=1, prompt_embeds=embeds,
        prompt_embeds_mask=mask, max_sequence_length=512,
    )  # fmt: skip
    text = text_runs(embeds.shape[1], mask)
    return embeds[0, : text if isinstance(text, int) else sum(length for length, _ in text)], text


def text_runs(length: int, mask: Tensor | None) -> int | tuple[tuple[int, bool], ...]:
    """Rows of embeddings up to the last valid one: their number, or (length, valid) runs where some are masked."""
    if mask is None:
        return length
    valid = mask.reshape(-1).bool().tolist()
    while valid and not valid[-1]:
        valid.pop()
    runs = tuple((len(list(run)), state) for state, run in itertools.groupby(valid))
    return len(valid) if len(runs) <= 1 else runs


def image_latents(pipe: Any, image: Image.Image, size: tuple[int, int], device: Any = None) -> Tensor:
    """Packed latents of an RGB image at (width, height) pixels, `[tokens, channels]`, normalised; `device` as above."""
    width, height = size
    pixels = pipe.image_processor.preprocess(image, height, width).unsqueeze(2)
    latents = pipe._encode_vae_image(pixels.to(device or pipe._execution_device, pipe.vae.dtype), None)
    rows, columns = latents.shape[3:]
    return pipe._pack_latents(latents, 1, latents.shape[1], rows, columns)[0]


def decode_image(pipe: Any, latents: Tensor, size: tuple[int, int], output_type: str = "pil") -> Any:
    """The image of packed latents `[1, tokens, channels]` at (width, height) pixels; the reverse of `image_latents`.

    `output_type` is "pil", "np" or "pt", as the pipeline's.
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
    """Length of `prompt_embeddings`, without running the encoder."""
    pictures = "".join(f"Picture {i + 1}: <|vision_start|><|image_pad|><|vision_end|>" for i in range(len(sizes)))
    tokens = pipe.tokenizer(pipe.prompt_template_encode.format(pictures + prompt))["input_ids"]
    seen = sum(condition_tokens(pipe, size) for size in sizes)
    return len(tokens) + seen - len(sizes) - pipe.prompt_template_encode_start_idx


def condition_tokens(pipe: Any, size: tuple[int, int]) -> int:
    """Tokens of a picture of (width, height) pixels in the text encoder."""
    processor = pipe.processor.image_processor
    return processor.get_number_of_image_patches(size[1], size[0], {}) // processor.merge_size**2
