"""Small models of FLUX.1 with random weights, whose parts fit each other as those of the released checkpoints do.

The builders of transformer and VAE also serve LongCat-Image and FIBO, which have the same blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["PIPELINES", "image_vae", "pipeline", "pipeline_of", "scheduler", "transformer", "transformer_of"]

PIPELINES = ("FluxKontextPipeline",)
"""Pipeline classes that `pipeline` builds."""


def transformer_of(kind: Any, dtype: torch.dtype, seed: int, **config: Any) -> Any:
    """Return a transformer with random weights.

    Args:
        kind: Its class.
        dtype: Data type of the weights.
        seed: Seed of the weights.
        config: Configuration; heads have the width and the rotary axes of the released models.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = kind(attention_head_dim=128, axes_dims_rope=(16, 56, 56), **config)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter, mean=float("norm_" in name and "weight" in name), std=0.2)
    return nn.Module.to(model.eval(), dtype)  # without the warning of diffusers


def transformer(
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    layers: int = 2,
    single_layers: int = 3,
    heads: int = 2,
    **config: Any,
) -> Any:
    """Return a `FluxTransformer2DModel` with random weights.

    Args:
        dtype: Data type of the weights.
        seed: Seed of the weights.
        layers: Number of blocks with two streams.
        single_layers: Number of blocks with one stream.
        heads: Number of attention heads.
        config: Changes of the configuration.
    """
    from diffusers import FluxTransformer2DModel

    widths = {"in_channels": 64, "joint_attention_dim": 48, "pooled_projection_dim": 24, "guidance_embeds": True}
    counts = {"num_layers": layers, "num_single_layers": single_layers, "num_attention_heads": heads}
    return transformer_of(FluxTransformer2DModel, dtype, seed, **widths | counts | config)


def pipeline(name: str, dtype: torch.dtype = torch.float32, *, layers: int = 2, heads: int = 2, grid: int = 8) -> Any:
    """Return a small pipeline with random weights, which takes references as they are.

    Args:
        name: Pipeline class, one of `PIPELINES`.
        dtype: Data type of the weights.
        layers: Number of blocks of each of the two kinds.
        heads: Number of attention heads.
        grid: Side in tokens of the square result of a request that gives no size.
    """
    pipe = pipeline_of(transformer(dtype, layers=layers, single_layers=layers, heads=heads))
    pipe.auto_resize, pipe.default_sample_size = False, 2 * grid
    return pipe


def pipeline_of(transformer: Any, name: str = PIPELINES[0], **more: Any) -> Any:
    """Return a pipeline of FLUX.1 around a transformer.

    Args:
        transformer: Transformer of `transformer`.
        name: Class of the pipeline.
        more: Further parts.
    """
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from uniref_fast.builtin import components

    config, dtype = transformer.config, transformer.dtype
    first, second = components.tokenizer(), components.tokenizer()
    first.model_max_length = 77
    clip = CLIPTextConfig(
        vocab_size=len(first), hidden_size=config.pooled_projection_dim, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=config.pooled_projection_dim,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=len(second), d_model=config.joint_attention_dim, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        encoders = CLIPTextModel(clip).eval().to(dtype), T5EncoderModel(t5).eval().to(dtype)
        vae = image_vae(dtype)
    return getattr(diffusers, name)(
        scheduler=scheduler(), vae=vae, text_encoder=encoders[0], tokenizer=first, text_encoder_2=encoders[1],
        tokenizer_2=second, transformer=transformer, **more,
    )  # fmt: skip


def scheduler() -> Any:
    """Return a scheduler with a shift that depends on the size of the result."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)


def image_vae(dtype: torch.dtype) -> Any:
    """Return a VAE with the latents of FLUX.1: 16 channels for 8 x 8 pixels."""
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, norm_num_groups=4, latent_channels=16,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159, scaling_factor=0.3611,
    )  # fmt: skip
    return nn.Module.to(vae.eval(), dtype)
