"""Packed models: the parameters of diffusers transformers, run over a `SelfLayout`."""

from uniref_fast.models.family import find_transformer
from uniref_fast.models.qwen_image import PackedQwenImage

__all__ = ["PackedQwenImage", "find_transformer"]
