"""Released models whose sizes are known without a download.

The sizes are those of the public configurations: the transformers and VAEs of diffusers, Qwen2.5-VL-7B, Qwen3-VL-8B,
Qwen3-4B, Qwen3-8B and Mistral-Small-3.2-24B as text encoders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from uniref_fast.training.core.flux2_size import Flux2Size
from uniref_fast.training.core.model_size import ModelSize, QwenImage21Size

__all__ = ["KNOWN", "KnownModel"]


@dataclass(frozen=True)
class KnownModel:
    """A released model.

    Attributes:
        size: Sizes of the model.
        index: Entries of its `model_index.json` that the checks of a run read; empty if every run suits the model.
    """

    size: ModelSize
    index: Mapping[str, Any] = field(default_factory=dict)


def _flux2(encoder: int, index: Mapping[str, Any], **sizes: Any) -> KnownModel:
    return KnownModel(Flux2Size(encoders=encoder + 84_046_115, **sizes), index)


_OF_4B: dict[str, Any] = dict(
    num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
)
_OF_9B = _OF_4B | dict(num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288)
_QWEN3_4B, _QWEN3_8B, _MISTRAL = 4_022_468_096, 8_190_735_360, 24_011_361_280
_KLEIN = {"_class_name": "Flux2KleinPipeline", "is_distilled": True}
_BASE = {"_class_name": "Flux2KleinPipeline", "is_distilled": False}

KNOWN: dict[str, KnownModel] = {
    "Qwen/Qwen-Image-Edit-2509": KnownModel(ModelSize()),
    "Qwen/Qwen-Image-Edit-2511": KnownModel(ModelSize()),
    "Qwen/Qwen-Image-2.1": KnownModel(
        QwenImage21Size(encoders=8_767_123_696 + 337_740_404), {"_class_name": "QwenImage21Pipeline"}
    ),
    "black-forest-labs/FLUX.2-klein-4B": _flux2(_QWEN3_4B, _KLEIN, **_OF_4B),
    "black-forest-labs/FLUX.2-klein-9B": _flux2(_QWEN3_8B, _KLEIN, **_OF_9B),
    "black-forest-labs/FLUX.2-klein-9b-kv": _flux2(_QWEN3_8B, {"_class_name": "Flux2KleinKVPipeline"}, **_OF_9B),
    "black-forest-labs/FLUX.2-klein-base-4B": _flux2(_QWEN3_4B, _BASE, **_OF_4B),
    "black-forest-labs/FLUX.2-klein-base-9B": _flux2(_QWEN3_8B, _BASE, **_OF_9B),
    "black-forest-labs/FLUX.2-dev": _flux2(_MISTRAL, {"_class_name": "Flux2Pipeline"}),
}
"""Released models by their hub id."""
