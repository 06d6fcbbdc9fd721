"""Small FLUX.3 models with random weights, whose parts fit each other as those of the released checkpoints do."""

from __future__ import annotations

from typing import Any

import torch

from uniref_fast.random_models.parts import CHAT, batch_norm_vae, random_model, vision_language_encoder

__all__ = ["PIPELINES", "pipeline", "pipeline_of", "transformer"]

PIPELINES = ("Flux3ModularPipeline", "Flux3DistilledModularPipeline")
"""Pipeline classes that `pipeline` builds, without the block that rewrites prompts."""

STACKED, WIDTH = 8, 16
"""Number of layers of the text encoder whose outputs are stacked, and its width."""


def transformer(
    dtype: torch.dtype = torch.float32,
    flow_map: bool = False,
    seed: int = 0,
    *,
    layers: int = 2,
    single_layers: int = 3,
    heads: int = 2,
) -> Any:
    """Return a transformer with random weights.

    Args:
        dtype: Data type of the weights.
        flow_map: Make it the one of the step-distilled model.
        seed: Seed of the weights.
        layers: Number of blocks of each mode.
        single_layers: Number of blocks of all tokens.
        heads: Number of attention heads.
    """
    from diffusers import Flux3Transformer2DModel

    return random_model(
        Flux3Transformer2DModel, dtype, seed, in_channels=128, cond_in_channels=128, num_layers=layers,
        num_single_layers=single_layers, attention_head_dim=128, num_attention_heads=heads,
        joint_attention_dim=WIDTH * STACKED, axes_dims_rope=(32, 32, 32, 32), flow_map=flow_map,
    )  # fmt: skip


def pipeline(name: str, dtype: torch.dtype = torch.float32, *, layers: int = 2, heads: int = 2, grid: int = 8) -> Any:
    """Return a small pipeline, which takes references as they are; arguments as in `random_models`."""
    flow_map = name == "Flux3DistilledModularPipeline"
    return pipeline_of(transformer(dtype, flow_map, layers=layers, single_layers=layers, heads=heads))


def pipeline_of(transformer: Any, blocks: Any = None) -> Any:
    """Return a modular pipeline around a transformer; that of a flow map is the distilled one.

    Args:
        transformer: Transformer of `transformer`.
        blocks: Blocks of the pipeline; None takes those of diffusers without the one that rewrites prompts.
    """
    import diffusers

    kind = "Distilled" if transformer.config.flow_map else ""
    dtype = transformer.proj_out.weight.dtype
    axes = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]}
    text = {"intermediate_size": 24, "num_hidden_layers": 32, "rope_parameters": axes}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_position_embeddings": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        encoder, processor = vision_language_encoder(WIDTH, text, vision, CHAT)
        vae = batch_norm_vae(dtype)
    if blocks is None:
        blocks = getattr(diffusers, f"Flux3{kind}AutoBlocks")()
        blocks.sub_blocks.pop("prompt_upsampler")
    pipe = getattr(diffusers, f"Flux3{kind}ModularPipeline")(blocks)
    pipe.update_components(
        transformer=transformer, vae=vae, text_encoder=torch.nn.Module.to(encoder, dtype), tokenizer=processor
    )
    return pipe
