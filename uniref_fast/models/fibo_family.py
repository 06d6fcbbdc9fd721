"""FIBO-Edit as a family: the pipeline around the transformer, and what it costs.

The packed model is in `uniref_fast.models.flux1`. Prompts are JSON. A prompt embedding has the outputs of the last two
layers of the text encoder, as the pipeline concatenates them, and after them those of the layers that the blocks of the
transformer get, one after the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from uniref_fast.budget import fit_to_budget
from uniref_fast.layout import SelfLayout
from uniref_fast.models.family import SizedImages, Sizes, Text
from uniref_fast.models.family_checks import check_widths, with_negative_prompt
from uniref_fast.models.flux1 import PackedFibo
from uniref_fast.models.flux1_family import AREA, Flux1Family, replaced_parts
from uniref_fast.models.image_sizes import whole_tokens
from uniref_fast.models.latents import vae_statistics
from uniref_fast.models.text_encoder_costs import language_cost
from uniref_fast.request import EditRequest, Geometry

__all__ = ["FIBO_EDIT", "FiboEdit"]

TEXT_LENGTH = 3000
"""Largest number of text tokens."""

_MODELS = "diffusers.models.transformers."
_MODEL = f"{_MODELS}transformer_bria_fibo"


class FiboEdit(Flux1Family):
    """FIBO-Edit, and `patch` of FIBO."""

    name = "fibo-edit"
    models = ("briaai/Fibo-Edit", "briaai/Fibo-Edit-1.5-base", "briaai/Fibo-Edit-1.5-turbo")
    transformer = "BriaFiboTransformer2DModel"
    pipelines = ("BriaFiboEditPipeline",)
    other_pipelines: ClassVar[Mapping[str, str]] = {
        "BriaFiboPipeline": "a text-to-image model, which takes no references",
    }
    replaced = replaced_parts(
        _MODEL, transformer, "BriaFibo", "BriaFiboEmbedND",
        (f"{_MODEL}:BriaFiboAttention", "diffusers.models.attention_processor:Attention"),
        ("torch.nn:RMSNorm", "diffusers.models.normalization:RMSNorm"), PackedFibo.ends,
    )  # fmt: skip
    packed = PackedFibo
    drops_transparency = True
    random_models = "uniref_fast.random_models.fibo"

    def defaults(self, index: Mapping[str, Any]) -> tuple[int, float]:
        return 30, 5.0

    def written(self, text: str) -> str:
        """Return JSON with the instruction, or a text that is such JSON as it is."""
        return text if _is_prompt(text) else json.dumps({"edit_instruction": text}, ensure_ascii=False)

    def check_parts(self, pipe: Any, given: str) -> None:
        widths = [("in_channels", "VAE", pipe.vae.config.z_dim)]
        if pipe.text_encoder is not None:
            width = pipe.text_encoder.config.hidden_size
            widths += [("text_encoder_dim", "text encoder", width), ("joint_attention_dim", "text encoder", 2 * width)]
        check_widths(given, pipe.transformer.config, widths)

    def check_request(self, pipe: Any, request: EditRequest, where: str) -> EditRequest:
        """Refuse a prompt that the pipeline refuses, and set the negative prompt that it would use."""
        if request.prompt is not None and not _is_prompt(request.prompt):
            raise ValueError(
                f'{where}: a BriaFiboEditPipeline takes JSON with the key "edit_instruction" as its prompt, got '
                f"{request.prompt!r:.80}; for example "
                'json.dumps({"edit_instruction": "make it night"})'
            )
        if not request.images and (request.width is None or request.height is None):
            raise ValueError(f"{where}: give width and height for a request without images")
        return with_negative_prompt(pipe, request, where, self.usual_negative_prompt())

    def token_side(self, pipe: Any) -> int:
        return pipe.vae_scale_factor

    def image_areas(self, pipe: Any) -> tuple[int, int, int]:
        return AREA, AREA, AREA

    def geometry(
        self, pipe: Any, sizes: Sizes, width: int | None = None, height: int | None = None, budget: int | None = None
    ) -> Geometry:
        from diffusers.pipelines.bria_fibo import pipeline_bria_fibo_edit as stock

        patch = self.token_side(pipe)
        alone = [stock._vae_safe_dims(*size) for size in sizes]
        if width is None or height is None:  # as the pipeline, which then ignores the other one
            w, h = alone[0] if alone else (1, 1)
            width, height = min(stock.PREFERRED_RESOLUTION[AREA], key=lambda size: abs(size[0] / size[1] - w / h))
        references = alone if budget is None else [_capped(size) for size in fit_to_budget(sizes, budget)]
        return Geometry(whole_tokens((width, height), patch), (), tuple(references), patch)

    def encoded(
        self, pipe: Any, prompt: str, images: Sequence[Image.Image], sizes: Sizes, device: Any
    ) -> tuple[Tensor, Text]:
        embeds, _, _, mask, _, layers, _ = pipe.encode_prompt(
            prompt=prompt, device=device, guidance_scale=1.0, max_sequence_length=TEXT_LENGTH
        )
        rows = torch.cat([embeds, *_layers_of_blocks(pipe.transformer.config, layers)], dim=-1)
        return self.valid_rows(rows[0], mask)

    def encode_image(self, pipe: Any, image: Image.Image, size: tuple[int, int], device: Any = None) -> Tensor:
        from diffusers.pipelines.bria_fibo.pipeline_bria_fibo_edit import _vae_safe_dims

        if size != _vae_safe_dims(*image.size):  # of a joint budget
            image = image.resize(size, Image.Resampling.LANCZOS)
        latents, _ = pipe.prepare_reference_latents(
            image=image, num_channels_latents=pipe.transformer.config.in_channels, dtype=pipe.vae.dtype,
            device=device or pipe._execution_device,
        )  # fmt: skip
        return latents[0]

    def prepared_latents(
        self, pipe: Any, request: EditRequest, sizes: Geometry, images: SizedImages, dtype: torch.dtype, generator: Any
    ) -> tuple[Tensor, Tensor | None]:
        width, height = sizes.size
        latents, _ = pipe.prepare_latents(
            request.num_images, pipe.transformer.config.in_channels, height, width, dtype, pipe._execution_device,
            generator, request.latents,
        )  # fmt: skip
        return latents, None

    def vae_latents(self, pipe: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
        latents = pipe._unpack_latents_no_patch(latents, size[1], size[0], pipe.vae_scale_factor).unsqueeze(2)
        mean, std = vae_statistics(pipe.vae, latents)
        return latents / (1.0 / std) + mean

    # ---- what an edit costs ----

    def prompt_text(self, pipe: Any, prompt: str, sizes: Sizes) -> int:
        return min(len(pipe.tokenizer(prompt)["input_ids"]), TEXT_LENGTH) if prompt else 1

    def embedding_flops(self, config: Any, layout: SelfLayout) -> int:
        blocks, width = (
            config.num_layers + config.num_single_layers,
            config.num_attention_heads * config.attention_head_dim,
        )
        return layout.text_length * blocks * config.text_encoder_dim * (width // 2)

    def text_encoder_cost(self, pipe: Any, sizes: list[Geometry], texts: list[list[int]]) -> tuple[int, int]:
        return language_cost(pipe.text_encoder, [length for lengths in texts for length in lengths])


def _capped(size: tuple[int, int]) -> tuple[int, int]:
    """Return a size that the pipeline does not reduce, which it may do again after it has rounded the sides up."""
    from diffusers.pipelines.bria_fibo.pipeline_bria_fibo_edit import _vae_safe_dims

    while (smaller := _vae_safe_dims(*size)) != size:
        size = smaller
    return size


def _layers_of_blocks(config: Any, layers: Sequence[Tensor]) -> list[Tensor]:
    """Return the layer of the text encoder for each block: the last ones, or all of them and the last one repeated."""
    blocks = config.num_layers + config.num_single_layers
    return [*layers[max(len(layers) - blocks, 0) :], *[layers[-1]] * max(blocks - len(layers), 0)]


def _is_prompt(text: str) -> bool:
    """Return True for JSON that the pipeline takes as a prompt."""
    from diffusers.pipelines.bria_fibo.pipeline_bria_fibo_edit import is_valid_edit_json

    return is_valid_edit_json(text)


FIBO_EDIT = FiboEdit()
