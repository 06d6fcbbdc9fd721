"""Fibo 2 as a family: the pipeline around the transformer, and what it costs.

The packed model is in `uniref_fast.models.fibo2`. Only the prompt is encoded with the references, the negative prompt
without them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image
from torch import Tensor

from uniref_fast.budget import fit_to_budget
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.memo import memo
from uniref_fast.models import fibo2
from uniref_fast.models.family import Sizes, Text
from uniref_fast.models.family_checks import check_options, check_widths, with_negative_prompt
from uniref_fast.models.image_sizes import result_size
from uniref_fast.models.latents import from_tokens, to_tokens
from uniref_fast.models.replaced import NORMS, Replaced, layer_norms, rms_norms
from uniref_fast.models.sandwich import part_layout
from uniref_fast.models.text_encoder_costs import condition_tokens, vision_language_cost
from uniref_fast.models.z_image_family import SandwichFamily, replaced_blocks
from uniref_fast.request import EditRequest, Geometry
from uniref_fast.visibility import Rule

__all__ = ["FIBO_2", "Fibo2"]

_MODEL = "diffusers.models.transformers.transformer_bria_fibo2"

REPLACED = (
    Replaced(
        "", f"{_MODEL}:BriaFibo2Transformer2DModel", ("forward", "_patchify", "create_coordinate_grid"),
        calls=("x_embedder", "t_embedder", "perceiver"), reads=("config", "rope_embedder"), onloaded=True,
    ),
    Replaced("final_layer", f"{_MODEL}:FinalLayer", calls=("adaLN_modulation", "linear")),
    *layer_norms("final_layer", ("norm_final",)),
    *replaced_blocks(_MODEL, "BriaFibo2TransformerBlock", f"{_MODEL}:BriaFibo2Attention", ("noise_refiner", "layers")),
    *rms_norms("layers.*", ("cross_attn_norm1", "cross_attn_norm2"), f"{NORMS}:RMSNorm", optional=True),
)  # fmt: skip


class Fibo2(SandwichFamily):
    """Bria's Fibo 2."""

    name = "fibo-2"
    models = ("briaai/Fibo-2.0-dev",)
    transformer = "BriaFibo2Transformer2DModel"
    pipelines = ("BriaFibo2Pipeline",)
    replaced = REPLACED
    packed = fibo2.PackedFibo2
    random_models = "uniref_fast.random_models.fibo2"
    negative_images = False

    def defaults(self, index: Mapping[str, Any]) -> tuple[int, float]:
        """Return the defaults of the pipeline."""
        return 30, 5.0

    def stock_arguments(self, pipe: Any, request: EditRequest) -> dict[str, Any]:
        given = super().stock_arguments(pipe, request)
        for name in {"prompt_embeds", "negative_prompt_embeds"} & given.keys():
            bundles = given[name].flatten(0, -2).unflatten(1, (-1, pipe.transformer.config.cap_feat_dim))
            given[name] = bundles.transpose(0, 1)[None]  # [1, bundles, L, D]
        for name in {"prompt_embeds_mask", "negative_prompt_embeds_mask"} & given.keys():
            given[name] = given[name].reshape(1, -1).bool()
        return given

    def usual_negative_prompt(self) -> str:
        return _stock().DEFAULT_NEGATIVE_PROMPT

    def most_references(self, pipe: Any) -> int:
        return pipe.max_num_images

    # ---- the packed model ----

    def text_channels(self, config: Any) -> int:
        return fibo2.text_width(config)

    def text_rows(self, layout: SelfLayout) -> int:
        return fibo2.text_rows(layout)

    def layout(self, config: Any, samples: Sequence[Sample]) -> SelfLayout:
        return fibo2.fibo2_layout(samples, config)

    def check_config(self, given: str, config: Mapping[str, Any], instead: str) -> None:
        super().check_config(given, config, instead)
        check_options(given, config, {"patch_size": 2}, instead)

    def built(self, config: dict[str, Any], layout: SelfLayout) -> Any:
        """Return a new transformer; an estimate builds fewer blocks, of which one then reads the text encoder."""
        blocks, numbers = config["n_layers"], config["injection_layer_ids"]
        middle = max(blocks - 2, 0)
        return super().built(
            {**config, "injection_layer_ids": tuple(i if i < blocks else middle for i in numbers)}, layout
        )

    # ---- the pipeline around the transformer ----

    def check_parts(self, pipe: Any, given: str) -> None:
        widths = [("in_channels", "VAE", pipe.vae.config.latent_channels)]
        if pipe.text_encoder is not None:
            width = pipe.text_encoder.config.get_text_config().hidden_size * len(pipe.text_encoder_out_layers[0])
            widths.append(("cap_feat_dim", "text encoder", width))
        check_widths(given, pipe.transformer.config, widths)

    def check_request(self, pipe: Any, request: EditRequest, where: str) -> EditRequest:
        """Refuse what the pipeline refuses, and set the negative prompt that it would use."""
        most = pipe.max_num_images
        if len(request.images) > most:
            raise ValueError(f"{where}: this model edits up to {most} images at once, got {len(request.images)}")
        try:
            pipe.check_inputs(
                request.prompt, None, None, [*request.images] or None, prompt_embeds=request.prompt_embeds
            )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if not request.images and request.prompt is not None and _drawn_texts(pipe, request.prompt):
            raise ValueError(
                f"{where}: for a caption with text_render the pipeline changes the prompt after the first steps, which "
                "edit() does not; leave text_render out, or call the pipeline"
            )
        if request.prompt is not None and not request.images:
            request = replace(request, prompt=_in_trained_form(pipe, request.prompt))
        return with_negative_prompt(pipe, request, where, self.usual_negative_prompt())

    def image_areas(self, pipe: Any) -> tuple[int, int, int]:
        area = (pipe.default_sample_size * pipe.vae_scale_factor) ** 2
        return min(area, pipe.text_encoder_image_size**2), area, area

    def geometry(
        self, pipe: Any, sizes: Sizes, width: int | None = None, height: int | None = None, budget: int | None = None
    ) -> Geometry:
        patch, side = self.token_side(pipe), pipe.default_sample_size * pipe.vae_scale_factor
        trained = [_trained_size(pipe.image_processor.config.vae_scale_factor, w / h, side**2) for w, h in sizes]
        usual = trained[0] if trained and width is None and height is None else (side, side)
        result = result_size(width, height, usual, patch)
        references = [result] if len(sizes) == 1 else trained
        if budget is not None:
            references = fit_to_budget(sizes, budget)
        # The text encoder gets smaller copies of what the VAE encodes.
        return Geometry(result, tuple(references), tuple(references), patch)

    def encoded(
        self, pipe: Any, prompt: str, images: Sequence[Image.Image], sizes: Sizes, device: Any
    ) -> tuple[Tensor, Text]:
        seen = [self._seen(pipe, image, size) for image, size in zip(images, sizes, strict=True)]
        texts = _drawn_texts(pipe, prompt) if seen else []
        found = pipe.encode_prompt(prompt, seen or None, device, text_images=texts or None)
        bundles = found[0][0]  # [bundles, L, D]
        return bundles.transpose(0, 1).flatten(1), bundles.shape[1]

    def valid_rows(self, embeds: Tensor, mask: Tensor | None) -> tuple[Tensor, Text]:
        rows = embeds if mask is None else embeds[mask.reshape(-1).bool()]
        return rows, len(rows)

    def given_text(self, length: int, mask: Tensor | None) -> Text:
        return length if mask is None else int(mask.bool().sum())

    def _seen(self, pipe: Any, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        """Return the copy of a reference that the text encoder gets."""
        copied = pipe.image_processor.resize(image, height=size[1], width=size[0], resize_mode="crop").copy()
        copied.thumbnail((pipe.text_encoder_image_size,) * 2)
        return copied

    def encode_image(self, pipe: Any, image: Image.Image, size: tuple[int, int], device: Any = None) -> Tensor:
        crop = pipe.image_processor.resize(image, height=size[1], width=size[0], resize_mode="crop")
        pixels = _to_tensor(pipe.image_processor, crop)
        device = device or pipe._execution_device
        (latents,) = pipe.prepare_image_latents([pixels], 1, device, pipe.transformer.dtype)
        return self.pack(latents)[0]

    def noise(self, pipe: Any, request: EditRequest, sizes: Geometry, generator: Any, given: Tensor | None) -> Tensor:
        width, height = sizes.size
        return pipe.prepare_latents(
            request.num_images, pipe.transformer.config.in_channels, height, width, pipe._execution_device, generator,
            given,
        )  # fmt: skip

    def pack(self, latents: Tensor) -> Tensor:
        return to_tokens(latents)

    def unpack(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        return from_tokens(tokens, grid)

    def vae_latents(self, pipe: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
        vae = pipe.vae
        latents = pipe._patchify_latents(self.unpack(latents, self.token_grid(pipe, size)))
        mean = vae.bn.running_mean.view(1, -1, 1, 1).to(latents.device, latents.dtype)
        scale = (1 / (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()).view(1, -1, 1, 1)
        return pipe._unpatchify_latents(latents / scale.to(latents.device, latents.dtype) + mean)

    # ---- what an edit costs ----

    def prompt_text(self, pipe: Any, prompt: str, sizes: Sizes) -> Text:
        drawn, text = _drawn_texts(pipe, prompt) if sizes else [], prompt
        if sizes:
            text = pipe._get_edit_prompt(text, len(sizes), text_images=bool(drawn))
        tokens = len(pipe.processor.tokenizer(pipe.prompt_template_encode.format(text))["input_ids"])
        seen = [_thumbnail(size, pipe.text_encoder_image_size) for size in sizes] + [image.size for image in drawn]
        return min(tokens + sum(condition_tokens(pipe, size) - 1 for size in seen), pipe.tokenizer_max_length)

    def transformer_flops(
        self, config: Any, layout: SelfLayout, visibility: str | Rule, kept: bool = False
    ) -> tuple[int, int]:
        width, hidden, blocks = config.dim, config.dim * 8 // 3 // 64 * 64, config.n_layers
        images = memo(layout, part_layout, fibo2._is_image)
        layout, linear, attention = self.image_flops(config, layout, images, hidden, visibility, kept)
        for gist in layout.text_segments:
            text, tokens = gist.index, gist.length
            own = sum(s.length for s in layout.segments if s.sample == gist.sample)
            mine = sum(s.length for s in layout.targets if s.sample == gist.sample)
            for number in config.injection_layer_ids:
                queries = mine if number == blocks - 1 else own
                linear += 2 * width**2 * queries + 2 * text * config.cap_feat_dim * width
                attention += queries * text
            layers = config.perceiver_num_layers
            linear += layers * (6 * width**2 * tokens + 2 * text * config.cap_feat_dim * width)
            linear += layers * 3 * width * hidden * tokens
            attention += layers * tokens * (text + tokens)
        return 2 * linear, 4 * attention * width

    def text_encoder_cost(self, pipe: Any, sizes: list[Geometry], texts: list[list[int]]) -> tuple[int, int]:
        seen = [
            replace(size, condition_sizes=tuple(_thumbnail(each, pipe.text_encoder_image_size) for each in
                                                size.condition_sizes)) for size in sizes
        ]  # fmt: skip
        return vision_language_cost(pipe, seen, texts)


def _in_trained_form(pipe: Any, prompt: str) -> str:
    """Return the prompt of a generation as the pipeline encodes it: a JSON caption in the form of its training."""
    caption, _ = pipe._parse_prompt(prompt)
    if isinstance(caption, str):
        return prompt
    return json.dumps(caption or {}, separators=(",", ":"), ensure_ascii=False)


def _drawn_texts(pipe: Any, prompt: str) -> list[Image.Image]:
    """Return the images of the text that a JSON caption asks for, as the pipeline draws them."""
    caption, _ = pipe._parse_prompt(prompt)
    entries = (caption.get("text_render") or []) if isinstance(caption, dict) else []
    texts = [entry.get("text") for entry in entries if isinstance(entry, dict)]
    return [_stock().draw_text_image(text, []) for text in texts if isinstance(text, str) and text]


def _to_tensor(processor: Any, image: Image.Image) -> Tensor:
    from diffusers.image_processor import VaeImageProcessor

    return VaeImageProcessor.preprocess(processor, image)


@functools.lru_cache(maxsize=256)
def _trained_size(multiple: int, ratio: float, area: int) -> tuple[int, int]:
    """Return (width, height) at which the model was trained for an aspect ratio."""
    from diffusers.pipelines.bria_fibo2.image_processor import BriaFibo2ImageProcessor

    return BriaFibo2ImageProcessor(vae_scale_factor=multiple).get_image_size(ratio, area=area)


def _thumbnail(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return the size of `Image.thumbnail`, at most `side` pixels a side."""
    image = Image.new("1", size)
    image.thumbnail((side, side))
    return image.size


def _stock() -> Any:
    """Return diffusers' module of the pipeline, imported when first needed."""
    from diffusers.pipelines.bria_fibo2 import pipeline_bria_fibo2

    return pipeline_bria_fibo2


FIBO_2 = Fibo2()
