"""Packed models: the parameters of diffusers transformers, run over a `SelfLayout`."""

from uniref_fast.models.qwen_image import PackedQwenImage, find_transformer

__all__ = ["PackedQwenImage", "find_transformer"]
