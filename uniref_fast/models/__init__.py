"""Packed models: the parameters of diffusers transformers, run over a `SelfLayout`."""

from uniref_fast.models.qwen_image import PackedQwenImage

__all__ = ["PackedQwenImage"]
