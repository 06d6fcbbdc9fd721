"""Parts of small models with random weights that several families share.

Functions without a seed draw weights from PyTorch's global generator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

__all__ = [
    "CHAT",
    "batch_norm_vae",
    "draw_norms",
    "image_vae",
    "language_config",
    "random_model",
    "scheduler",
    "vision_language_encoder",
]

CHAT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"
"""Template of messages that are texts."""

CHAT_OF_PARTS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
)
"""Template of messages that are lists of texts and images."""


def draw_norms(model: nn.Module, also: tuple[str, ...] = ()) -> None:
    """Draw the parameters with one dimension, whose initial values would hide faults; weights of norms are around 1.

    Args:
        model: The model.
        also: Parts of the names of further parameters that are drawn.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or any(part in name for part in also):
            nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.2)


def random_model(
    kind: Any, dtype: torch.dtype, seed: int, draw: Callable[[Any], Any] = draw_norms, **config: Any
) -> Any:
    """Return a model with random weights; the same arguments give the same weights.

    Args:
        kind: Class of the model.
        dtype: Data type of the weights.
        seed: Seed of the weights.
        draw: Function that draws parameters again whose initial values would hide faults.
        config: Configuration of the model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = kind(**config)
        draw(model)
    return nn.Module.to(model.eval(), dtype)  # without the warning of diffusers


def scheduler(shift: float = 3.0) -> Any:
    """Return a scheduler with a shift that depends on the size of the result."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=shift)


def image_vae(dtype: torch.dtype, **config: Any) -> Any:
    """Return a VAE with the latents of FLUX.1: 16 channels for 8 x 8 pixels; `config` changes its configuration."""
    from diffusers import AutoencoderKL

    sizes: dict[str, Any] = {
        "block_out_channels": (8, 8, 8, 8), "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 16,
        "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1159, "scaling_factor": 0.3611,
    }  # fmt: skip
    vae: Any = AutoencoderKL(**sizes | config)
    return nn.Module.to(vae.eval(), dtype)


def batch_norm_vae(dtype: torch.dtype) -> Any:
    """Return a VAE of FLUX.2, whose batch norm has random statistics."""
    from diffusers import AutoencoderKLFlux2

    vae: Any = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, sample_size=64
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return nn.Module.to(vae.eval(), dtype)


def language_config(kind: Any, vocabulary: int, width: int, hidden: int, layers: int, **config: Any) -> Any:
    """Return the configuration of a language model with two heads for queries and one for keys and values.

    Args:
        kind: Class of the configuration.
        vocabulary: Number of tokens.
        width: Width of the embeddings, a multiple of 2.
        hidden: Width of the feed-forwards.
        layers: Number of layers.
        config: Further options.
    """
    sizes = {
        "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": width // 2, "max_position_embeddings": 1024,
    }  # fmt: skip
    return kind(**sizes | config)


def vision_language_encoder(
    width: int, text: Mapping[str, Any] | None = None, vision: Mapping[str, Any] | None = None, chat: str | None = None
) -> tuple[Any, Any]:
    """Return a small Qwen3-VL and its processor.

    Args:
        width: Width of its embeddings, a multiple of 2.
        text: Changes of the configuration of the language model.
        vision: Changes of that of the vision model.
        chat: Template of messages; None takes one of messages that are lists of texts and images.
    """
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    from uniref_fast.builtin import components
    from uniref_fast.builtin.processor import BuiltinProcessor, Qwen2VLImageProcessorPil

    tokenizer = components.tokenizer()
    images = Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, min_pixels=32 * 32, max_pixels=512 * 512)
    processor = BuiltinProcessor(images, tokenizer, chat_template=chat or CHAT_OF_PARTS)
    axes: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [width // 12] * 3}
    language = language_config(dict, components.VOCAB_SIZE, width, 64, 2, **{"rope_parameters": axes, **(text or {})})
    sizes: dict[str, Any] = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": width,
        "patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
           for name in ("image_pad", "video_pad", "vision_start", "vision_end")}  # fmt: skip
    encoder: Any = Qwen3VLForConditionalGeneration(Qwen3VLConfig(
        text_config=language, vision_config=sizes | dict(vision or {}), image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"], vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    ))  # fmt: skip
    return encoder.eval(), processor
