"""Small Fibo 2 models with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from uniref_fast.random_models.qwen_image_21 import vision_language_encoder
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

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = BriaFibo2Transformer2DModel(
            dim=128 * heads, n_layers=layers, n_refiner_layers=1, n_heads=heads, cap_feat_dim=BUNDLE,
            injection_layer_ids=(layers - 2, layers - 1), perceiver_num_layers=1, min_num_gist_tokens=8,
            max_num_gist_tokens=24, gist_step=8, gist_min_text_len=8, gist_max_text_len=200,
        )  # fmt: skip
        randomised(model)
    return nn.Module.to(model.eval(), dtype)  # without the warning of diffusers


def pipeline(
    name: str = PIPELINES[0],
    dtype: torch.dtype = torch.float32,
    *,
    layers: int = 3,
    heads: int = 2,
    grid: int = 4,
) -> Any:
    """Return a small pipeline with random weights.

    Args:
        name: Pipeline class, one of `PIPELINES`.
        dtype: Data type of the weights.
        layers: Number of blocks of the whole sequence.
        heads: Number of attention heads.
        grid: Side in tokens of a square with the area of a reference and of a result.
    """
    return pipeline_of(transformer(dtype, layers=layers, heads=heads), grid)


def pipeline_of(transformer: Any, grid: int = 4) -> Any:
    """Return a pipeline around a transformer.

    Args:
        transformer: Transformer of `transformer`.
        grid: Side in tokens of a square with the area of a reference and of a result.
    """
    from diffusers import AutoencoderKLFlux2, BriaFibo2Pipeline, FlowMatchEulerDiscreteScheduler

    dtype = transformer.dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        encoder, processor = vision_language_encoder(WIDTH)
        vae: Any = AutoencoderKLFlux2(
            block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, sample_size=64
        )
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2)
    pipe: Any = BriaFibo2Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), nn.Module.to(vae.eval(), dtype),
        encoder.to(dtype), processor,
    )  # fmt: skip
    pipe.text_encoder_out_layers = ((0, 1, 2), (2, 1, 0), (1, 1, 2))
    pipe.default_sample_size = grid * PATCH // pipe.vae_scale_factor
    return pipe
