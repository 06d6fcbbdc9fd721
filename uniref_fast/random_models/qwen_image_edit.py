"""Small Qwen-Image-Edit models with random weights, around the components of the built-in model."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["PIPELINES", "pipeline"]

PIPELINES = ("QwenImageEditPlusPipeline",)
"""Pipeline classes that `pipeline` builds; the others take images of about one million pixels only."""

PATCH = 8
"""Side of a token in pixels."""


def pipeline(name: str, dtype: torch.dtype = torch.float32, *, layers: int = 2, heads: int = 2, grid: int = 8) -> Any:
    """Return a small pipeline; arguments as in `random_models`."""
    from diffusers import QwenImageTransformer2DModel

    from uniref_fast.builtin import components
    from uniref_fast.builtin.pipeline import SmallQwenImageEditPlusPipeline

    parts = components.pipeline(0, dtype).components
    config = components.TRANSFORMER | {
        "num_layers": layers, "num_attention_heads": heads, "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56),
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        transformer: Any = QwenImageTransformer2DModel(**config)
    components.initialise(transformer, 0, "transformer")
    for parameter in transformer.parameters():  # not transformer.to(dtype): rotary tables stay float32
        parameter.data = parameter.data.to(dtype)
    area = (grid * PATCH) ** 2
    return SmallQwenImageEditPlusPipeline(
        **parts | {"transformer": transformer.eval()}, vae_image_area=area, output_area=area
    )
