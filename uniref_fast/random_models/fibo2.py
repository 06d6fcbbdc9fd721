"""Small Fibo 2 models with random weights."""

from __future__ import annotations

from typing import Any

import torch

from uniref_fast.random_models.parts import batch_norm_vae, random_model, scheduler, vision_language_encoder
from uniref_fast.random_models.z_image import randomised

__all__ = ["BUNDLE", "PIPELINES", "pipeline", "pipeline_of", "transformer"]

PIPELINES = ("BriaFibo2Pipeline",)
"""Pipeline classes that `pipeline` builds."""

WIDTH = 48  # of the text encoder
BUNDLE = 3 * WIDTH
"""Width of a bundle of three layers of the text encoder."""

PATCH = 16
"""Side of a token in pixels."""


def transformer(dtype: torch.dtype = torch.float32, seed: int = 0, *, layers: int = 3, heads: int = 2) -> Any:
    """Return a transformer with the head dimension, rotary axes and ratios of the released one, norms random too.

    Args:
        dtype: Data type of the weights.
        seed: Seed of the weights.
        layers: Number of blocks of the whole sequence, of which the last two read the text encoder.
        heads: Number of attention heads.
    """
    from diffusers import BriaFibo2Transformer2DModel

    return random_model(
        BriaFibo2Transformer2DModel, dtype, seed, randomised, dim=128 * heads, n_layers=layers, n_refiner_layers=1,
        n_heads=heads, cap_feat_dim=BUNDLE, injection_layer_ids=(layers - 2, layers - 1), perceiver_num_layers=1,
        min_num_gist_tokens=8, max_num_gist_tokens=24, gist_step=8, gist_min_text_len=8, gist_max_text_len=200,
    )  # fmt: skip


def pipeline(
    name: str = PIPELINES[0], dtype: torch.dtype = torch.float32, *, layers: int = 3, heads: int = 2, grid: int = 4
) -> Any:
    """Return a small pipeline; arguments as in `random_models`."""
    return pipeline_of(transformer(dtype, layers=layers, heads=heads), grid)


def pipeline_of(transformer: Any, grid: int = 4) -> Any:
    """Return a pipeline around a transformer.

    Args:
        transformer: Transformer of `transformer`.
        grid: Side in tokens of a square with the area of a reference and of a result.
    """
    from diffusers import BriaFibo2Pipeline

    dtype = transformer.dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        encoder, processor = vision_language_encoder(WIDTH)
        vae = batch_norm_vae(dtype)
    pipe: Any = BriaFibo2Pipeline(transformer, scheduler(1.0), vae, encoder.to(dtype), processor)
    pipe.text_encoder_out_layers = ((0, 1, 2), (2, 1, 0), (1, 1, 2))
    pipe.default_sample_size = grid * PATCH // pipe.vae_scale_factor
    return pipe
