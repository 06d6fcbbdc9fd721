"""The part of a pipeline that Qwen-Image-Edit and Qwen-Image-2.1 share: latents and prompt embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from uniref_fast.guidance import EMPTY_PROMPT
from uniref_fast.models.family import Family
from uniref_fast.models.family_checks import given_embeddings
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

    def starting_latents(
        self,
        pipe: Any,
        request: EditRequest,
        sizes: Geometry,
        images: Sequence[Image.Image],
        dtype: torch.dtype,
        generator: Any,
        own: bool,
    ) -> tuple[Tensor, Tensor]:
        pairs = list(zip(images, sizes.reference_sizes, strict=True))
        pixels: Any = None
        if pairs and not own:
            pixels = [pipe.image_processor.preprocess(image, h, w).unsqueeze(2) for image, (w, h) in pairs]
            pixels = self.prepared_pixels(pipe, pixels)
        width, height = sizes.size
        latents, packed = pipe.prepare_latents(
            pixels, request.num_images, self.latent_channels(pipe.transformer.config), height, width, dtype,
            pipe._execution_device, generator, request.latents,
        )  # fmt: skip
        if not own:
            return latents, latents[0, :0] if packed is None else packed[0].to(latents.dtype)
        # diffusers' own method would pass the images to the VAE in the transformer's dtype, which may not be the VAE's
        parts = [self.encode_image(pipe, *pair).to(latents.dtype) for pair in pairs]
        return latents, torch.cat([latents[0, :0], *parts])

    def prepared_pixels(self, pipe: Any, pixels: list[Tensor]) -> Any:
        """Return the pixels `[1, C, 1, H, W]` of references as `prepare_latents` of the pipeline takes them."""
        return pixels

    def decode(self, pipe: Any, latents: Tensor, size: tuple[int, int], output_type: str = "pil") -> Any:
        vae = pipe.vae
        width, height = size
        latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor).to(vae.dtype)
        mean, std = (
            torch.tensor(values).view(1, vae.config.z_dim, 1, 1, 1).to(latents.device, latents.dtype)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        image = vae.decode(self.unnormalised(latents, mean, std), return_dict=False)[0][:, :, 0]
        return pipe.image_processor.postprocess(image, output_type=output_type)[0]

    # ---- prompt embeddings ----

    def prompt_arguments(
        self,
        pipe: Any,
        images: Sequence[Image.Image],
        sizes: Sequence[tuple[int, int]],
        embeds: Tensor | None,
        mask: Tensor | None,
        device: Any,
        cast: bool,
    ) -> dict[str, Any]:
        """Return the arguments of the pipeline's `encode_prompt` besides the prompt; those of `Family.encode_prompt`.

        The references, resized, are its `image`; None without references, or with given embeddings.
        """
        device = device or pipe._execution_device
        resized = None
        if embeds is None:
            pairs = zip(images, sizes, strict=True)
            resized = [pipe.image_processor.resize(image, h, w) for image, (w, h) in pairs] or None
        embeds, mask = given_embeddings(pipe, embeds, mask, device, cast)
        return {
            "image": resized, "device": device, "num_images_per_prompt": 1, "prompt_embeds": embeds,
            "prompt_embeds_mask": mask,
        }  # fmt: skip
