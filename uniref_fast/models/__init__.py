"""Packed models: the parameters of diffusers transformers, run over a `SelfLayout`."""

from uniref_fast.models.families import find_transformer
from uniref_fast.models.fibo2 import PackedFibo2
from uniref_fast.models.flux1 import PackedFibo, PackedFlux1, PackedLongCat
from uniref_fast.models.flux2 import PackedFlux2
from uniref_fast.models.flux3 import PackedFlux3
from uniref_fast.models.joyimage import PackedJoyImage
from uniref_fast.models.qwen_image import PackedQwenImage
from uniref_fast.models.qwen_image_21 import PackedQwenImage21
from uniref_fast.models.z_image import PackedZImage

__all__ = [
    "PackedFibo",
    "PackedFibo2",
    "PackedFlux1",
    "PackedFlux2",
    "PackedFlux3",
    "PackedJoyImage",
    "PackedLongCat",
    "PackedQwenImage",
    "PackedQwenImage21",
    "PackedZImage",
    "find_transformer",
]
