"""Small Qwen-Image-2.1 models with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["CHANNELS", "CONTEXT", "PIPELINES", "pipeline", "transformer", "vision_language_encoder"]

PIPELINES = ("QwenImage21Pipeline",)
"""Pipeline classes that `pipeline` builds."""

CHANNELS, CONTEXT = 64, 48  # of the latents, and of the prompt embeddings
PATCH = 16
"""Side of a token in pixels."""

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
)


def transformer(dtype: torch.dtype = torch.float32, layers: int = 3, seed: int = 0, **config: Any) -> Any:
    """Return a transformer with the head dimension, rotary axes and MLP ratio of the released one, norms random too.

    Args:
        dtype: Data type of the weights.
        layers: Number of blocks.
        seed: Seed of the weights.
        config: Further options of its configuration.
    """
    from diffusers import QwenImage21Transformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = QwenImage21Transformer2DModel(
            in_channels=CHANNELS, out_channels=CHANNELS, num_layers=layers, context_in_dim=CONTEXT,
            **{"num_attention_heads": 2, **config},
        )  # fmt: skip
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # the RMSNorm of the text is stored around 0
                mean = float("norm" in name and "weight" in name and "text_norm" not in name)
                nn.init.normal_(parameter, mean=mean, std=0.2)
            elif "modulation" in name or "timestep_embedder" in name or "norm_out" in name:
                nn.init.normal_(parameter, std=0.15)
    return nn.Module.to(model.eval(), dtype)  # without the warning of diffusers


def pipeline(
    name: str = "QwenImage21Pipeline",
    dtype: torch.dtype = torch.float32,
    *,
    layers: int = 3,
    heads: int = 2,
    grid: int = 4,
    **config: Any,
) -> Any:
    """Return a small pipeline with random weights.

    Args:
        name: Pipeline class, one of `PIPELINES`.
        dtype: Data type of the weights.
        layers: Number of blocks.
        heads: Number of attention heads.
        grid: Side in tokens of a square with the area of a reference and of a result.
        config: Further options of the configuration of the transformer.
    """
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


def vision_language_encoder(width: int) -> tuple[Any, Any]:
    """Return a small Qwen3-VL, whose weights are drawn by PyTorch's global generator, and its processor.

    Args:
        width: Width of its embeddings, a multiple of 2.
    """
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    from uniref_fast.builtin import components
    from uniref_fast.builtin.processor import BuiltinProcessor, Qwen2VLImageProcessorPil

    tokenizer = components.tokenizer()
    images = Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, min_pixels=32 * 32, max_pixels=512 * 512)
    processor = BuiltinProcessor(images, tokenizer, chat_template=TEMPLATE)
    text = dict(
        vocab_size=components.VOCAB_SIZE, hidden_size=width, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=24, max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 4, 4]},
    )  # fmt: skip
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=width, patch_size=16,
        num_position_embeddings=64, deepstack_visual_indexes=[0],
    )  # fmt: skip
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
           for name in ("image_pad", "video_pad", "vision_start", "vision_end")}  # fmt: skip
    encoder: Any = Qwen3VLForConditionalGeneration(Qwen3VLConfig(
        text_config=text, vision_config=vision, image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"],
    ))  # fmt: skip
    return encoder.eval(), processor
