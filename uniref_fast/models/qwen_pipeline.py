"""The part of a pipeline that Qwen-Image-Edit and Qwen-Image-2.1 share: latents and prompt embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from uniref_fast.guidance import EMPTY_PROMPT
from uniref_fast.models.family import Family, SizedImages, Sizes, Text, prepared_references
from uniref_fast.models.latents import vae_statistics
from uniref_fast.request import EditRequest, Geometry

__all__ = ["QwenFamily"]


class QwenFamily(Family):
    """A family whose VAE is one of videos, and whose text encoder is a Qwen-VL that sees the references."""

    def usual_negative_prompt(self) -> str:
        return EMPTY_PROMPT  # the pipelines have none, and then no guidance

    # ---- what differs between the families ----

    def latent_channels(self, config: Any) -> int:
        """Return the channels of the latents of a transformer with a configuration, as `prepare_latents` takes them."""
        raise NotImplementedError

    def unnormalised(self, latents: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Return latents in the scale of the VAE, rounded as in the pipeline."""
        raise NotImplementedError

    # ---- latents ----

    def encode_image(self, pipe: Any, image: Image.Image, size: tuple[int, int], device: Any = None) -> Tensor:
        width, height = size
        pixels = pipe.image_processor.preprocess(self.convert_image(image), height, width).unsqueeze(2)
        latents = pipe._encode_vae_image(pixels.to(device or pipe._execution_device, pipe.vae.dtype), None)
        rows, columns = latents.shape[3:]
        return pipe._pack_latents(latents, 1, latents.shape[1], rows, columns)[0]

    def prepared_latents(
        self, pipe: Any, request: EditRequest, sizes: Geometry, images: SizedImages, dtype: torch.dtype, generator: Any
    ) -> tuple[Tensor, Tensor | None]:
        pixels: Any = None
        if images:
            pixels = [pipe.image_processor.preprocess(image, h, w).unsqueeze(2) for image, (w, h) in images]
            pixels = self.prepared_pixels(pipe, pixels)
        width, height = sizes.size
        latents, packed = pipe.prepare_latents(
            pixels, request.num_images, self.latent_channels(pipe.transformer.config), height, width, dtype,
            pipe._execution_device, generator, request.latents,
        )  # fmt: skip
        return latents, prepared_references(latents, packed, images)

    def prepared_pixels(self, pipe: Any, pixels: list[Tensor]) -> Any:
        """Return the pixels `[1, C, 1, H, W]` of references as `prepare_latents` of the pipeline takes them."""
        return pixels

    def vae_latents(self, pipe: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
        latents = pipe._unpack_latents(latents, size[1], size[0], pipe.vae_scale_factor).to(pipe.vae.dtype)
        return self.unnormalised(latents, *vae_statistics(pipe.vae, latents))

    # ---- prompt embeddings ----

    def encoded(
        self, pipe: Any, prompt: str, images: Sequence[Image.Image], sizes: Sizes, device: Any
    ) -> tuple[Tensor, Text]:
        pairs = zip(images, sizes, strict=True)
        resized = [pipe.image_processor.resize(image, h, w) for image, (w, h) in pairs] or None
        return self._rows(pipe, {"prompt": prompt, "image": resized, "device": device}, sizes)

    def given(self, pipe: Any, embeds: Tensor, mask: Tensor | None, device: Any) -> tuple[Tensor, Text]:
        """Pass given embeddings through the pipeline's `encode_prompt`; arguments as in `Family.given`."""
        return self._rows(pipe, {"prompt_embeds": embeds, "prompt_embeds_mask": mask, "device": device}, ())

    def _rows(self, pipe: Any, given: dict[str, Any], sizes: Sizes) -> tuple[Tensor, Text]:
        missing = dict.fromkeys(("prompt", "image", "prompt_embeds", "prompt_embeds_mask"))
        return self.encoded_rows(pipe, {**missing, "num_images_per_prompt": 1, **given}, sizes)

    def encoded_rows(self, pipe: Any, arguments: dict[str, Any], sizes: Sizes) -> tuple[Tensor, Text]:
        """Return the result of the pipeline's `encode_prompt` as `Family.encode_prompt` does.

        Args:
            pipe: The pipeline.
            arguments: Arguments of its `encode_prompt`; the references, resized, are its `image`, which is None without
                references and with given embeddings.
            sizes: Width and height in pixels at which the text encoder sees each reference.
        """
        raise NotImplementedError
