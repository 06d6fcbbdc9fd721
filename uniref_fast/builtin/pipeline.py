"""QwenImageEditPlusPipeline at a small model's image sizes.

diffusers fixes the sizes as constants: references at 384^2 pixels for the text encoder and 1024^2 for the VAE, the
result at 1024^2. Here they belong to the pipeline; the denoising code is diffusers' own, unchanged, and no module of
diffusers is written to.
"""

import inspect
import json
import os
import types
from pathlib import Path

import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions

from .processor import BuiltinProcessor

STOCK_CLASS = QwenImageEditPlusPipeline.__name__
CONDITION_IMAGE_AREA = 56 * 56
VAE_IMAGE_AREA = 64 * 64
OUTPUT_AREA = 64 * 64

_stock_call = inspect.unwrap(QwenImageEditPlusPipeline.__call__)  # without torch.no_grad, which is put back below


def small_dimensions(area: int, ratio: float) -> tuple[int, int]:
    """`calculate_dimensions` of diffusers, (width, height) in multiples of 32, but never 0 for long thin images."""
    width, height = calculate_dimensions(area, ratio)
    return max(width, 32), max(height, 32)


class SmallQwenImageEditPlusPipeline(QwenImageEditPlusPipeline):
    """The stock pipeline with its three image areas (in pixels) as arguments, kept in `model_index.json`.

    Args:
        condition_image_area: each reference's area as the text encoder sees it.
        vae_image_area: each reference's area as the VAE sees it: its tokens in the transformer are `area / 64`.
        output_area: the area of the result when `height` and `width` are not given.

    `from_pretrained` and `save_pretrained` use a folder that names the stock class, so plain diffusers loads it too
    (with torchvision, or with `processor=BuiltinProcessor.from_pretrained(folder, subfolder="processor")`).
    """

    condition_image_area: int
    vae_image_area: int
    output_area: int
    calculate_dimensions = staticmethod(small_dimensions)

    def __init__(
        self,
        scheduler,
        vae,
        text_encoder,
        tokenizer,
        processor,
        transformer,
        condition_image_area: int = CONDITION_IMAGE_AREA,
        vae_image_area: int = VAE_IMAGE_AREA,
        output_area: int = OUTPUT_AREA,
    ):
        super().__init__(scheduler, vae, text_encoder, tokenizer, processor, transformer)
        areas = dict(condition_image_area=condition_image_area, vae_image_area=vae_image_area, output_area=output_area)
        for name, area in areas.items():
            if not isinstance(area, int) or area < 32 * 32:
                raise ValueError(f"{name} is an area in pixels, an int of at least {32 * 32}; got {area!r}")
            setattr(self, name, area)  # before register_to_config: later assignments update the config by themselves
        self.register_to_config(**areas)  # type: ignore[attr-defined]

    @torch.no_grad()
    def __call__(
        self,
        image=None,
        prompt=None,
        negative_prompt=None,
        true_cfg_scale: float = 4.0,
        height: int | None = None,
        width: int | None = None,
        *args,
        **kwargs,
    ):
        """Arguments and result of `QwenImageEditPlusPipeline.__call__`; sizes come from this pipeline's areas.

        `height` and `width` (pixels, rounded down to multiples of 16) default to `output_area` in the last reference's
        aspect ratio. Raises ValueError without references: the stock loop needs one (`uniref_fast.edit` does not).
        """
        if image is None or (isinstance(image, list) and not image):
            raise ValueError(
                "QwenImageEditPlusPipeline needs at least one reference image; uniref_fast.edit() also takes none"
            )
        size = image[-1].size if isinstance(image, list) else image.size
        if not callable(size):  # a tensor's `size` is a method; the stock code refuses tensors itself
            default_width, default_height = small_dimensions(self.output_area, size[0] / size[1])
            height, width = height or default_height, width or default_width
        constants = {
            "CONDITION_IMAGE_SIZE": self.condition_image_area,
            "VAE_IMAGE_SIZE": self.vae_image_area,
            "calculate_dimensions": small_dimensions,
        }
        call = types.FunctionType(
            _stock_call.__code__,
            {**_stock_call.__globals__, **constants},
            _stock_call.__name__,
            _stock_call.__defaults__,
            _stock_call.__closure__,
        )
        call.__kwdefaults__ = _stock_call.__kwdefaults__
        return call(self, image, prompt, negative_prompt, true_cfg_scale, height, width, *args, **kwargs)

    __call__.__signature__ = inspect.signature(_stock_call)  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As in diffusers, with the processor that needs no torchvision unless `processor` is given."""
        if "processor" not in kwargs and os.path.isdir(os.path.join(pretrained_model_name_or_path, "processor")):
            kwargs["processor"] = BuiltinProcessor.from_pretrained(pretrained_model_name_or_path, subfolder="processor")
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def save_pretrained(self, save_directory, **kwargs):
        """As in diffusers; `model_index.json` names the stock classes."""
        super().save_pretrained(save_directory, **kwargs)
        path = Path(save_directory) / self.config_name
        index = json.loads(path.read_text(encoding="utf-8"))
        index.pop("_name_or_path", None)
        index["_class_name"] = STOCK_CLASS
        if isinstance(self.processor, BuiltinProcessor):
            index["processor"] = ["transformers", "Qwen2VLProcessor"]
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
