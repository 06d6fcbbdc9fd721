"""Small LongCat-Image-Edit models with random weights, around the text encoder of the built-in model."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from diffusers import LongCatImageEditPipeline
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit as stock

from uniref_fast.random_models.flux1 import transformer_of
from uniref_fast.random_models.parts import image_vae, scheduler

__all__ = ["PIPELINES", "SmallLongCatImageEditPipeline", "pipeline", "pipeline_of", "transformer"]

PIPELINES = ("LongCatImageEditPipeline",)
"""Pipeline classes that `pipeline` builds."""

PATCH = 16
"""Side of a token in pixels."""


class SmallLongCatImageEditPipeline(LongCatImageEditPipeline):
    """A `LongCatImageEditPipeline` whose images have the area `output_area` instead of a million pixels."""

    output_area: int = 64 * 64

    def __call__(
        self,
        image: Any = None,
        prompt: Any = None,
        negative_prompt: Any = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 4.5,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        latents: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        output_type: str = "pil",
        width: int | None = None,
        height: int | None = None,
    ) -> Any:
        """Run the pipeline; `width` and `height` replace the size that it would compute."""

        def dimensions(area: int, ratio: float, usual: Any = stock.calculate_dimensions) -> tuple[int, int]:
            computed = usual(self.output_area, ratio)
            return width or computed[0], height or computed[1]

        with mock.patch.object(stock, "calculate_dimensions", dimensions):
            return super().__call__(  # type: ignore[misc]
                image=image, prompt=prompt, negative_prompt=negative_prompt, num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale, num_images_per_prompt=num_images_per_prompt, generator=generator,
                latents=latents, prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds,
                output_type=output_type,
            )  # fmt: skip


def transformer(dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: Any) -> Any:
    """Return a `LongCatImageTransformer2DModel`; `sizes` are arguments of `random_models.flux1.transformer_of`."""
    from diffusers import LongCatImageTransformer2DModel

    from uniref_fast.builtin.components import TEXT_DIM

    widths = {"in_channels": 64, "joint_attention_dim": TEXT_DIM, "pooled_projection_dim": TEXT_DIM}
    return transformer_of(LongCatImageTransformer2DModel, dtype, seed, **widths | sizes)


def pipeline(name: str, dtype: torch.dtype = torch.float32, *, layers: int = 2, heads: int = 2, grid: int = 8) -> Any:
    """Return a small pipeline, whose references have the size of the result; arguments as in `random_models`."""
    pipe = pipeline_of(transformer(dtype, layers=layers, single_layers=layers, heads=heads))
    pipe.output_area = (grid * PATCH) ** 2
    return pipe


def pipeline_of(transformer: Any, kind: Any = SmallLongCatImageEditPipeline) -> Any:
    """Return a pipeline of a class around a transformer of `transformer`."""
    from uniref_fast.builtin import components

    parts = components.pipeline(0, transformer.dtype).components
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        vae = image_vae(transformer.dtype)
    return kind(
        scheduler=scheduler(), vae=vae, text_encoder=parts["text_encoder"], tokenizer=parts["tokenizer"],
        text_processor=parts["processor"], transformer=transformer,
    )  # fmt: skip
