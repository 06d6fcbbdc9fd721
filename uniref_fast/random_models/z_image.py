"""Small Z-Image models with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from uniref_fast.random_models.parts import image_vae, language_config, random_model, scheduler

__all__ = ["CAPTION", "FEATURES", "PIPELINES", "pipeline", "pipeline_of", "randomised", "transformer"]

PIPELINES = ("ZImageOmniPipeline",)
"""Pipeline classes that `pipeline` builds."""

CAPTION, FEATURES = 48, 32
"""Widths of the embeddings of captions and of the features of references."""


def transformer(
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    features: int | None = FEATURES,
    layers: int = 2,
    heads: int = 2,
) -> Any:
    """Return a transformer with the head dimension, rotary axes and ratios of the released ones, norms random too.

    Args:
        dtype: Data type of the weights.
        seed: Seed of the weights.
        features: Width of the features of references; None for a text-to-image model.
        layers: Number of blocks of the whole sequence.
        heads: Number of attention heads.
    """
    from diffusers import ZImageTransformer2DModel

    return random_model(
        ZImageTransformer2DModel, dtype, seed, randomised, dim=128 * heads, n_layers=layers, n_refiner_layers=1,
        n_heads=heads, n_kv_heads=heads, cap_feat_dim=CAPTION, siglip_feat_dim=features,
    )  # fmt: skip


def randomised(model: nn.Module) -> nn.Module:
    """Draw the parameters whose initial values would hide faults: norms, filling, gates and modulation."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "pad_token" in name:
            nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.3)
        elif "adaLN" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def pipeline(
    name: str = PIPELINES[0], dtype: torch.dtype = torch.float32, *, layers: int = 2, heads: int = 2, grid: int = 8
) -> Any:
    """Return a small pipeline, which takes references as they are; arguments as in `random_models`."""
    return pipeline_of(transformer(dtype, layers=layers, heads=heads), name)


def pipeline_of(transformer: Any, name: str = PIPELINES[0]) -> Any:
    """Return a pipeline around a transformer.

    `ZImageOmniPipeline` gives its VAE pixels in bfloat16; here they are cast to its dtype, for comparisons in float32.

    Args:
        transformer: Transformer of `transformer`.
        name: Any pipeline class of Z-Image.
    """
    import diffusers

    dtype = transformer.dtype
    parts: dict[str, Any] = {"scheduler": scheduler(1.0), "transformer": transformer}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        parts |= _text_encoder(dtype)
        parts["vae"] = vae = image_vae(
            dtype, sample_size=64, scaling_factor=0.36, shift_factor=0.12, mid_block_add_attention=False
        )
        if "Omni" in name:
            vae.encoder.register_forward_pre_hook(lambda module, args: (args[0].to(dtype),))
            parts |= _siglip(dtype)
        if "ControlNet" in name:
            parts["controlnet"] = _controlnet(33 if "Inpaint" in name else 16, dtype)
    return getattr(diffusers, name)(**parts)


def _text_encoder(dtype: torch.dtype) -> dict[str, Any]:
    from transformers import Qwen3Config, Qwen3Model

    from uniref_fast.builtin import components

    tokenizer = components.tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{% endfor %}"
    config = language_config(Qwen3Config, len(tokenizer), CAPTION, 64, 2)
    return {"text_encoder": Qwen3Model(config).eval().to(dtype), "tokenizer": tokenizer}


def _siglip(dtype: torch.dtype) -> dict[str, Any]:
    from transformers import Siglip2VisionConfig, Siglip2VisionModel
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    config = Siglip2VisionConfig(
        hidden_size=FEATURES, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_patches=64,
        patch_size=16,
    )  # fmt: skip
    processor: Any = Siglip2ImageProcessorPil(patch_size=16, max_num_patches=64)
    return {"siglip": Siglip2VisionModel(config).eval().to(dtype), "siglip_processor": processor}


def _controlnet(channels: int, dtype: torch.dtype) -> Any:
    from diffusers import ZImageControlNetModel

    controlnet: Any = ZImageControlNetModel(
        control_layers_places=[0, 1], control_refiner_layers_places=[0], control_in_dim=channels, dim=256,
        n_refiner_layers=1, n_heads=2, n_kv_heads=2, add_control_noise_refiner="control_noise_refiner",
    )  # fmt: skip
    return nn.Module.to(randomised(controlnet).eval(), dtype)
