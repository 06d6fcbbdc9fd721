"""Small FLUX.3 models with random weights, whose parts fit each other as those of the released checkpoints do."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from uniref_fast.random_models.flux2 import CHAT, flux2_vae

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

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = Flux3Transformer2DModel(
            in_channels=128,
            cond_in_channels=128,
            num_layers=layers,
            num_single_layers=single_layers,
            attention_head_dim=128,
            num_attention_heads=heads,
            joint_attention_dim=WIDTH * STACKED,
            axes_dims_rope=(32, 32, 32, 32),
            flow_map=flow_map,
        )
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return nn.Module.to(model.eval(), dtype)  # without the warning of diffusers


def pipeline(name: str, dtype: torch.dtype = torch.float32, *, layers: int = 2, heads: int = 2, grid: int = 8) -> Any:
    """Return a small pipeline with random weights, which takes images of any size.

    Args:
        name: Pipeline class, one of `PIPELINES`.
        dtype: Data type of the weights.
        layers: Number of blocks of each mode, and of blocks of all tokens.
        heads: Number of attention heads.
        grid: Not used: these pipelines take references as they are.
    """
    flow_map = name == "Flux3DistilledModularPipeline"
    return pipeline_of(transformer(dtype, flow_map, layers=layers, single_layers=layers, heads=heads))


def pipeline_of(transformer: Any, blocks: Any = None) -> Any:
    """Return a modular pipeline around a transformer; that of a flow map is the distilled one.

    Args:
        transformer: Transformer of `transformer`.
        blocks: Blocks of the pipeline; None takes those of diffusers without the one that rewrites prompts.
    """
    import diffusers
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    from uniref_fast.builtin import components
    from uniref_fast.builtin.processor import BuiltinProcessor, Qwen2VLImageProcessorPil

    kind = "Distilled" if transformer.config.flow_map else ""
    dtype = transformer.proj_out.weight.dtype
    text = dict(
        vocab_size=components.VOCAB_SIZE, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=32,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
    )  # fmt: skip
    vision = dict(
        depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=WIDTH, patch_size=16,
        num_position_embeddings=16, deepstack_visual_indexes=[0],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        encoder = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision))
        vae = flux2_vae(dtype)
    if blocks is None:
        blocks = getattr(diffusers, f"Flux3{kind}AutoBlocks")()
        blocks.sub_blocks.pop("prompt_upsampler")
    pipe = getattr(diffusers, f"Flux3{kind}ModularPipeline")(blocks)
    images = Qwen2VLImageProcessorPil(patch_size=16, merge_size=2)
    pipe.update_components(
        transformer=transformer, vae=vae, text_encoder=nn.Module.to(encoder.eval(), dtype),
        tokenizer=BuiltinProcessor(images, components.tokenizer(), chat_template=CHAT),
    )  # fmt: skip
    return pipe
