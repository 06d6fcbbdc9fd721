"""Small FIBO-Edit models with random weights, whose parts fit each other as those of the released checkpoints do."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from uniref_fast.random_models.flux1 import transformer_of
from uniref_fast.random_models.parts import language_config, scheduler

__all__ = ["PIPELINES", "pipeline", "pipeline_of", "transformer"]

PIPELINES = ("BriaFiboEditPipeline",)
"""Pipeline classes that `pipeline` builds."""

TEXT_DIM = 32
VOCAB_SIZE = 128001  # the pipeline encodes an empty prompt as token 128000


def transformer(dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: Any) -> Any:
    """Return a `BriaFiboTransformer2DModel`; `sizes` are arguments of `random_models.flux1.transformer_of`."""
    from diffusers import BriaFiboTransformer2DModel

    widths = {"in_channels": 48, "joint_attention_dim": 2 * TEXT_DIM, "text_encoder_dim": TEXT_DIM}
    return transformer_of(BriaFiboTransformer2DModel, dtype, seed, **widths | sizes)


def pipeline(name: str, dtype: torch.dtype = torch.float32, *, layers: int = 2, heads: int = 2, grid: int = 8) -> Any:
    """Return a small pipeline, which takes references as they are; arguments as in `random_models`."""
    return pipeline_of(transformer(dtype, layers=layers, single_layers=layers, heads=heads), name)


def pipeline_of(transformer: Any, name: str = PIPELINES[0]) -> Any:
    """Return a pipeline of a class around a transformer of `transformer`."""
    import diffusers
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    from uniref_fast.builtin import components

    config = language_config(SmolLM3Config, VOCAB_SIZE, TEXT_DIM, 48, 3, pad_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        encoder = SmolLM3ForCausalLM(config).eval().to(transformer.dtype)
        vae: Any = diffusers.AutoencoderKLWan(
            base_dim=8, decoder_base_dim=8, z_dim=48, dim_mult=[1, 1, 1, 1], num_res_blocks=1, is_residual=True,
            in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16,
            latents_mean=[0.1] * 48, latents_std=[1.5] * 48,
        )  # fmt: skip
    return getattr(diffusers, name)(
        transformer=transformer, scheduler=scheduler(), vae=nn.Module.to(vae.eval(), transformer.dtype),
        text_encoder=encoder, tokenizer=components.tokenizer(),
    )  # fmt: skip
