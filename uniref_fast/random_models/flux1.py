"""Small models of FLUX.1 with random weights, whose parts fit each other as those of the released checkpoints do.

`transformer_of` also builds the transformers of LongCat-Image and FIBO, which have the same blocks.
"""

from __future__ import annotations

from typing import Any

import torch

from uniref_fast.random_models.parts import image_vae, random_model, scheduler

__all__ = ["PIPELINES", "pipeline", "pipeline_of", "transformer", "transformer_of"]

PIPELINES = ("FluxKontextPipeline",)
"""Pipeline classes that `pipeline` builds."""


def transformer_of(
    kind: Any, dtype: torch.dtype, seed: int, *, layers: int = 2, single_layers: int = 3, heads: int = 2, **config: Any
) -> Any:
    """Return a transformer with random weights, whose heads are those of the released models.

    Args:
        kind: Class of the transformer.
        dtype: Data type of the weights.
        seed: Seed of the weights.
        layers: Number of blocks with two streams.
        single_layers: Number of blocks with one stream.
        heads: Number of attention heads.
        config: Further options of its configuration.
    """
    return random_model(
        kind, dtype, seed, attention_head_dim=128, axes_dims_rope=(16, 56, 56), num_layers=layers,
        num_single_layers=single_layers, num_attention_heads=heads, **config,
    )  # fmt: skip


def transformer(dtype: torch.dtype = torch.float32, seed: int = 0, **sizes: Any) -> Any:
    """Return a `FluxTransformer2DModel`; `sizes` are arguments of `transformer_of`."""
    from diffusers import FluxTransformer2DModel

    widths = {"in_channels": 64, "joint_attention_dim": 48, "pooled_projection_dim": 24, "guidance_embeds": True}
    return transformer_of(FluxTransformer2DModel, dtype, seed, **widths | sizes)


def pipeline(name: str, dtype: torch.dtype = torch.float32, *, layers: int = 2, heads: int = 2, grid: int = 8) -> Any:
    """Return a small pipeline, which takes references as they are; arguments as in `uniref_fast.random_models`."""
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
