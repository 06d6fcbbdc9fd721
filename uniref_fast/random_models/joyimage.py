"""Small JoyImage-Edit-Plus models with random weights."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from uniref_fast.random_models.parts import draw_norms, random_model, vision_language_encoder

__all__ = ["PIPELINES", "TEXT", "listed_sizes", "pipeline", "transformer"]

PIPELINES = ("JoyImageEditPlusPipeline",)
"""Pipeline classes that `pipeline` builds."""

TEXT = 48
"""Width of the prompt embeddings."""

PATCH = 16
"""Side of a token in pixels."""


def listed_sizes(grid: int) -> list[tuple[int, int]]:
    """Return the (height, width) in pixels that a small pipeline gives references of several aspect ratios.

    Args:
        grid: Side in tokens of the square, which has the area of the other sizes or less.
    """
    sides = (grid, grid), (grid - 1, grid + 1), (grid + 1, grid - 1), (grid // 2, grid * 3 // 2)
    return [(PATCH * height, PATCH * width) for height, width in sides if height and width]


def transformer(dtype: torch.dtype = torch.float32, layers: int = 3, heads: int = 2, seed: int = 0) -> Any:
    """Return a transformer with the head dimension, rotary axes and MLP ratio of the released one, norms random too.

    Args:
        dtype: Data type of the weights; those of the embedding of the time stay in float32, as in a loaded model.
        layers: Number of blocks.
        heads: Number of attention heads.
        seed: Seed of the weights.
    """
    from diffusers import JoyImageEditPlusTransformer3DModel

    model = random_model(
        JoyImageEditPlusTransformer3DModel, dtype, seed, functools.partial(draw_norms, also=("modulate_table",)),
        hidden_size=128 * heads, num_attention_heads=heads, num_layers=layers, text_dim=TEXT,
        rope_dim_list=[16, 56, 56],
    )  # fmt: skip
    model.condition_embedder.time_embedder.float()
    return model


def pipeline(
    name: str = PIPELINES[0], dtype: torch.dtype = torch.float32, *, layers: int = 3, heads: int = 2, grid: int = 4
) -> Any:
    """Return a small pipeline, whose references have `listed_sizes`; arguments as in `random_models`."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, JoyImageEditPlusPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        encoder, processor = vision_language_encoder(TEXT)
        vae: Any = AutoencoderKLWan(base_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    pipe: Any = JoyImageEditPlusPipeline(
        FlowMatchEulerDiscreteScheduler(shift=4.0), nn.Module.to(vae.eval(), dtype), encoder.to(dtype),
        processor.tokenizer, transformer(dtype, layers, heads), processor,
    )  # fmt: skip
    pipe.image_processor = _image_processor(pipe.vae_scale_factor_spatial, grid)
    return pipe


def _image_processor(vae_scale_factor: int, grid: int) -> Any:
    """Return the image processor of the pipeline with `listed_sizes` instead of the list of diffusers."""
    from diffusers.pipelines.joyimage.image_processor import JoyImageEditImageProcessor

    sizes = listed_sizes(grid)

    class Listed(JoyImageEditImageProcessor):
        def get_default_height_width(self, image: Any, height: Any = None, width: Any = None) -> tuple[int, int]:
            if height is None or width is None:
                first = image[0] if isinstance(image, list) else image
                width, height = (PATCH * grid,) * 2 if first is None else first.size
            return min(sizes, key=lambda size: abs(size[0] / size[1] - height / width))

    return Listed(vae_scale_factor=vae_scale_factor, basesize=PATCH * grid)
