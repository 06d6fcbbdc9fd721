"""Packed models: the parameters of diffusers transformers, run over a `SelfLayout`."""

from uniref_fast.models.family import find_transformer
from uniref_fast.models.flux2 import PackedFlux2
from uniref_fast.models.joyimage import PackedJoyImage
from uniref_fast.models.qwen_image import PackedQwenImage
from uniref_fast.models.qwen_image_21 import PackedQwenImage21

__all__ = ["PackedFlux2", "PackedJoyImage", "PackedQwenImage", "PackedQwenImage21", "find_transformer"]
