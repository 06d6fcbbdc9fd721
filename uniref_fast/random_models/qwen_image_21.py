"""Small Qwen-Image-2.1 models with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from uniref_fast.random_models.parts import random_model, vision_language_encoder

__all__ = ["CHANNELS", "CONTEXT", "PIPELINES", "pipeline", "transformer"]

PIPELINES = ("QwenImage21Pipeline",)
"""Pipeline classes that `pipeline` builds."""

CHANNELS, CONTEXT = 64, 48  # of the latents, and of the prompt embeddings
PATCH = 16
"""Side of a token in pixels."""


def transformer(dtype: torch.dtype = torch.float32, layers: int = 3, seed: int = 0, **config: Any) -> Any:
    """Return a transformer with the head dimension, rotary axes and MLP ratio of the released one, norms random too.

    Args:
        dtype: Data type of the weights.
        layers: Number of blocks.
        seed: Seed of the weights.
        config: Further options of its configuration.
    """
    from diffusers import QwenImage21Transformer2DModel

    return random_model(
        QwenImage21Transformer2DModel, dtype, seed, _draw, in_channels=CHANNELS, out_channels=CHANNELS,
        num_layers=layers, context_in_dim=CONTEXT, **{"num_attention_heads": 2, **config},
    )  # fmt: skip


def _draw(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # the RMSNorm of the text is stored around 0
            mean = float("norm" in name and "weight" in name and "text_norm" not in name)
            nn.init.normal_(parameter, mean=mean, std=0.2)
        elif "modulation" in name or "timestep_embedder" in name or "norm_out" in name:
            nn.init.normal_(parameter, std=0.15)


def pipeline(
    name: str = "QwenImage21Pipeline",
    dtype: torch.dtype = torch.float32,
    *,
    layers: int = 3,
    heads: int = 2,
    grid: int = 4,
    **config: Any,
) -> Any:
    """Return a small pipeline; `config` are further options of its transformer, the others as in `random_models`."""
    from diffusers import AutoencoderKLQwenImage21, FlowMatchEulerDiscreteScheduler, QwenImage21Pipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder, processor = vision_language_encoder(CONTEXT)
        vae: Any = AutoencoderKLQwenImage21(base_dim=4, decoder_base_dim=4, dim_mult=[1, 2, 2, 2, 2], num_res_blocks=1)
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=1.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192,
        shift_terminal=0.02,
    )  # fmt: skip
    model = transformer(dtype, layers, num_attention_heads=heads, **config)
    pipe: Any = QwenImage21Pipeline(scheduler, nn.Module.to(vae.eval(), dtype), encoder.to(dtype), processor, model)
    pipe.output_area = (grid * PATCH) ** 2
    return pipe
