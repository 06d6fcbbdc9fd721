"""QwenImageEditPlusPipeline with the image sizes of a small model.

In diffusers the sizes are constants: references have 384^2 pixels for the text encoder and 1024^2 for the VAE, the
result has 1024^2. Here they are attributes of the pipeline. The denoising code is diffusers' own, unchanged, and no
module of diffusers is modified.
"""

import inspect
import json
import types
from pathlib import Path

import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions

from .processor import HUB_OPTIONS, BuiltinProcessor
from .store import AREAS, AREAS_KEY, WEIGHTS_KEY, recorded_areas, weights_status

DEFAULT_AREAS = dict(zip(AREAS, (56 * 56, 64 * 64, 64 * 64), strict=True))

_stock_call = inspect.unwrap(QwenImageEditPlusPipeline.__call__)  # without torch.no_grad, which is put back below


def small_dimensions(area: int, ratio: float) -> tuple[int, int]:
    """Return `calculate_dimensions` of diffusers, (width, height) in multiples of 32, but at least 32 each."""
    width, height = calculate_dimensions(area, ratio)
    return max(width, 32), max(height, 32)


class SmallQwenImageEditPlusPipeline(QwenImageEditPlusPipeline):
    """The stock pipeline with its three image areas (in pixels) as arguments.

    An area that is None comes from the transformer's configuration, else from the built-in model. `save_pretrained`
    writes the areas to `model_index.json` and to the transformer's configuration, so that they are also known when a
    pipeline of the stock class holds the transformer: `uniref_fast.edit`, `estimate` and `--model` use them.
    `DiffusionPipeline.from_pretrained` refuses the folder, because the stock class always uses the sizes of the large
    models.

    Args:
        scheduler: Scheduler, as for the stock pipeline.
        vae: Autoencoder, likewise.
        text_encoder: Text encoder, likewise.
        tokenizer: Tokenizer, likewise.
        processor: Processor of the text encoder, likewise.
        transformer: Transformer, likewise.
        condition_image_area: Area of each reference for the text encoder.
        vae_image_area: Area of each reference for the VAE; the reference has `area / 64` tokens in the transformer.
        output_area: Area of the result if `height` and `width` are not given.
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
        condition_image_area: int | None = None,
        vae_image_area: int | None = None,
        output_area: int | None = None,
    ):
        super().__init__(scheduler, vae, text_encoder, tokenizer, processor, transformer)
        recorded = DEFAULT_AREAS | recorded_areas({}, {} if transformer is None else transformer.config)
        given = dict(zip(AREAS, (condition_image_area, vae_image_area, output_area), strict=True))
        areas = {name: recorded[name] if area is None else area for name, area in given.items()}
        for name, area in areas.items():
            if not isinstance(area, int) or area < 32 * 32:
                raise ValueError(f"{name} is an area in pixels, an int of at least {32 * 32}; got {area!r}")
            setattr(self, name, area)  # before register_to_config: later assignments update the config by themselves
        self.register_to_config(**areas)  # type: ignore[attr-defined]
        self._record_areas()

    def _record_areas(self) -> None:
        """Write the areas into the transformer's configuration."""
        transformer = self.components["transformer"]  # type: ignore[attr-defined]
        if transformer is not None:
            transformer.register_to_config(**{AREAS_KEY: {name: getattr(self, name) for name in AREAS}})

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
        """Run `QwenImageEditPlusPipeline.__call__` with the sizes of this pipeline's areas.

        `height` and `width` (pixels, rounded down to multiples of 16) default to `output_area` with the aspect ratio of
        the last reference. Without references it raises ValueError: the stock loop needs one (`uniref_fast.edit` does
        not).
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
        """Load a pipeline as diffusers does, with a processor that needs no torchvision unless `processor` is given."""
        if "processor" in kwargs:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        pipe = super().from_pretrained(pretrained_model_name_or_path, processor=None, **kwargs)
        where = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        processor = BuiltinProcessor.from_pretrained(
            pretrained_model_name_or_path, **where | {"subfolder": "processor"}
        )
        pipe.register_modules(processor=processor)  # not an argument: diffusers checks the class by its package
        return pipe

    def save_pretrained(self, save_directory, **kwargs):
        """Save a pipeline as diffusers does, or raise ValueError if it holds adapters.

        `from_pretrained` does not know the names of weights below an adapter.
        """
        transformer = self.components["transformer"]
        if transformer is not None and any(".base_layer." in key for key in transformer.state_dict()):
            raise ValueError(
                "the transformer holds LoRA adapters, which a saved pipeline cannot contain: call fuse_lora() and "
                "unload_lora_weights(), or unload_lora_weights() alone and save the adapter with save_lora_weights()"
            )
        self._record_areas()
        super().save_pretrained(save_directory, **kwargs)
        path = Path(save_directory) / self.config_name
        index = json.loads(path.read_text(encoding="utf-8"))
        index.pop("_name_or_path", None)
        index[WEIGHTS_KEY] = weights_status(self)
        if isinstance(self.processor, BuiltinProcessor):
            index["processor"] = ["transformers", "Qwen2VLProcessor"]
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
