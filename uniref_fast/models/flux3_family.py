"""FLUX.3 as a family: the modular pipelines around the transformer, and what they cost.

A modular pipeline is a list of blocks of code. `edit` replaces all of them, so it takes those of diffusers only, with
their settings. It encodes prompts as they are given: the block that rewrites them has to be removed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from uniref_fast.budget import fit_to_budget
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.models.family import NOT_TRAINED, UNMARKED_REFERENCES, Family, SizedImages, Sizes, Text
from uniref_fast.models.family_checks import (
    check_rotary_axes,
    check_widths,
    refuse_masks,
    refuse_negative_prompt,
    with_negative_prompt,
)
from uniref_fast.models.flux3 import MODES, PackedFlux3, flux3_layout, mode_layout
from uniref_fast.models.image_sizes import at_most, result_size
from uniref_fast.models.kept_references import step_cost
from uniref_fast.models.latents import batch_statistics
from uniref_fast.models.replaced import QK_NORMS, Replaced, layer_norms, rms_norms
from uniref_fast.models.text_encoder_costs import language_cost
from uniref_fast.request import EditRequest, Geometry
from uniref_fast.visibility import Rule, plan

__all__ = ["FLUX_3", "Flux3"]

SIDE = 1024
"""Side in pixels of a result without references, and of the largest area of one of several references."""

ONE_AREA = 4 * 1024 * 1024
"""Largest area in pixels of the only reference of a request."""

SHORTEST, LONGEST = 64, 4096
"""Shortest and longest side in pixels of the only reference of a request."""

MAX_TEXT = 8192
"""Largest number of text tokens; longer prompts are cut."""

_SETTINGS = {"image_rope_scale": 0.5, "default_height": SIDE, "default_width": SIDE}
"""Settings of the blocks of the pipeline that `edit` does not read, and their values."""

_PLAIN = {"guidance_rescale": 0.0, "use_original_formulation": False, "start": 0.0, "stop": 1.0, "enabled": True}
"""Settings of the guider with which it is the classifier-free guidance of `edit`."""

_MODEL = "diffusers.models.transformers.transformer_flux3"
_BLOCKS = (*(f"{blocks}.*" for _, blocks in MODES.values()), "single_transformer_blocks.*")

REPLACED = (
    Replaced(
        "", f"{_MODEL}:Flux3Transformer2DModel", calls=(*PackedFlux3.ends, "time_proj"), reads=("config",),
        onloaded=True,
    ),
    Replaced("pos_embed", f"{_MODEL}:Flux3PosEmbed"),
    Replaced("norm_out", f"{_MODEL}:Flux3AdaLayerNorm", calls=("linear",)),
    *layer_norms("norm_out", ("norm",)),
    *(Replaced(name, f"{_MODEL}:Flux3ModeTransformerBlock", calls=("ff",), onloaded=True) for name in _BLOCKS[:-1]),
    Replaced(_BLOCKS[-1], f"{_MODEL}:Flux3SingleTransformerBlock", calls=("ff",), onloaded=True),
    *(norm for name in _BLOCKS for norm in layer_norms(name, ("norm",))),
    *(Replaced(
        f"{name}.attn", f"{_MODEL}:Flux3Attention", calls=("to_q", "to_k", "to_v", "to_qkv", "to_out"),
        reads=("heads", "head_dim", "inner_dim"),
    ) for name in _BLOCKS),
    *(norm for name in _BLOCKS for norm in rms_norms(f"{name}.attn", QK_NORMS[:2])),
)  # fmt: skip


class Flux3(Family):
    """FLUX.3 and its step-distilled flow map."""

    name = "flux3"
    models = ("black-forest-labs/flux-3-image-klein", "black-forest-labs/flux-3-image-klein-base")
    transformer = "Flux3Transformer2DModel"
    pipelines = ("Flux3ModularPipeline", "Flux3DistilledModularPipeline")
    missing: ClassVar[Mapping[str, str]] = {
        "patch_keep_references": UNMARKED_REFERENCES,
        "sft": f"{NOT_TRAINED}; its text and references have blocks of their own",
        "msgrpo": f"{NOT_TRAINED}; its text and references have blocks of their own",
    }
    replaced = REPLACED
    packed = PackedFlux3
    drops_transparency = True
    random_models = "uniref_fast.random_models.flux3"

    def defaults(self, index: Mapping[str, Any]) -> tuple[int, float]:
        return (16, 1.0) if index.get("_class_name") == "Flux3DistilledModularPipeline" else (50, 3.5)

    def call_defaults(self, pipe: Any) -> tuple[int, float]:
        """Return the steps of the blocks of the pipeline, and the scale of its guider."""
        scale = float(pipe.guider.guidance_scale) if pipe.requires_unconditional_embeds else 1.0
        return pipe.default_call_parameters["num_inference_steps"], scale

    # ---- the packed model ----

    def layout(self, config: Any, samples: Sequence[Sample]) -> SelfLayout:
        return flux3_layout(tuple(samples))

    def check_config(self, given: str, config: Mapping[str, Any], instead: str) -> None:
        check_rotary_axes(given, config, (32, 32, 32, 32), instead)
        if (channels := config.get("cond_in_channels", 128)) != config.get("in_channels", 128):
            raise ValueError(
                f"{given} has a transformer with cond_in_channels = {channels}, which must be its in_channels, "
                f"{config.get('in_channels', 128)}; {instead}"
            )

    # ---- the pipeline around the transformer ----

    def check_parts(self, pipe: Any, given: str) -> None:
        config, widths = pipe.transformer.config, [("in_channels", "VAE", pipe.vae.config.latent_channels * 4)]
        if (encoder := pipe.components.get("text_encoder")) is not None:
            width = encoder.config.get_text_config().hidden_size * len(_text_layers(pipe))
            widths.append(("joint_attention_dim", "text encoder", width))
        check_widths(given, config, widths)
        if config.flow_map != _is_distilled(pipe):
            raise ValueError(
                f"{given} has a transformer with flow_map = {config.flow_map}, which belongs to a "
                f"{self.pipelines[bool(config.flow_map)]}"
            )
        for name, block in _leaves(pipe.blocks):
            if "prompt_upsampler" in name:
                raise ValueError(
                    f"{given} rewrites prompts with its block {name!r}, and edit() encodes them as they are given; "
                    "remove the block before the pipeline is made: blocks.sub_blocks.pop('prompt_upsampler')"
                )
            if not type(block).__module__.startswith("diffusers.modular_pipelines.flux3."):
                raise ValueError(
                    f"{given} has the block {name!r}, which is not diffusers' own and would be skipped; "
                    "remove it, or call the pipeline"
                )
            for setting, used in _SETTINGS.items():
                if (found := getattr(block, setting, None)) not in (None, used):
                    raise ValueError(
                        f"{given} has the block {name!r} with {setting}={found}, and edit() computes with {used}; "
                        "call the pipeline"
                    )
        guider = getattr(pipe, "guider", None)
        if guider is not None and not _is_plain(guider):
            raise ValueError(
                f"{given} has the guider {type(guider).__name__} with {_guider_settings(guider)}; edit() computes "
                "ClassifierFreeGuidance with start=0, stop=1, guidance_rescale=0, use_original_formulation=False and "
                "enabled=True only; use it, or call the pipeline"
            )

    def check_request(self, pipe: Any, request: EditRequest, where: str) -> EditRequest:
        """Set the negative prompt and the scale that the pipeline would use."""
        scale = request.true_cfg_scale
        if not _is_distilled(pipe) and scale is not None and scale < 1:
            raise ValueError(
                f"{where}: true_cfg_scale must be 1 (no guidance) or above, got {scale}. Smaller scales work only in "
                "the pipeline itself"
            )
        refuse_masks(request, where)
        if _is_distilled(pipe):
            refuse_negative_prompt(pipe, request, where, "guidance is part of it")
            return replace(request, negative_prompt=None, true_cfg_scale=1.0)
        return with_negative_prompt(pipe, request, where, self.usual_negative_prompt())

    def image_areas(self, pipe: Any) -> tuple[int, int, int]:
        return SIDE**2, SIDE**2, SIDE**2

    def geometry(
        self, pipe: Any, sizes: Sizes, width: int | None = None, height: int | None = None, budget: int | None = None
    ) -> Geometry:
        patch, crop = self.token_side(pipe), None
        if len(sizes) == 1:
            inside = _fitted(sizes[0], patch)
            usual = _canvas(inside, patch)
            alone = [usual]
            if width is None and height is None and inside != usual:
                left, top = (usual[0] - inside[0]) // 2, (usual[1] - inside[1]) // 2
                crop = (left, top, left + inside[0], top + inside[1])
        else:
            alone = [at_most(size, SIDE**2, patch) for size in sizes]
            usual = alone[0] if alone else (SIDE, SIDE)
        references = alone
        if budget is not None:  # no larger than the pipeline makes them
            references = fit_to_budget(sizes, budget)
            references = [
                size if math.prod(size) <= SIDE**2 else
                _canvas(_fitted(size, patch), patch) if len(sizes) == 1 else at_most(size, SIDE**2, patch)
                for size in references
            ]  # fmt: skip
        return Geometry(result_size(width, height, usual, patch), (), tuple(references), patch, crop=crop)

    def encoded(
        self, pipe: Any, prompt: str, images: Sequence[Image.Image], sizes: Sizes, device: Any
    ) -> tuple[Tensor, Text]:
        step = _text_step(pipe)
        embeds = step._get_qwen3_vl_prompt_embeds(
            pipe.text_encoder, pipe.tokenizer, prompt, device, MAX_TEXT, step.pad_multiple, _text_layers(pipe)
        )
        return embeds[0], embeds.shape[1]

    def encode_image(self, pipe: Any, image: Image.Image, size: tuple[int, int], device: Any = None) -> Tensor:
        processor, patch = pipe.image_processor, self.token_side(pipe)
        if size == _canvas(_fitted(image.size, patch), patch):  # the only reference of a request
            pixels, _ = processor.preprocess(image, resize_mode="fill")
        else:
            if size != at_most(image.size, SIDE**2, patch):  # of a joint budget
                image = image.resize(size, Image.Resampling.LANCZOS)
            # the processor changes neither size: the area up to which it keeps an image depends on the mode
            pixels, _ = processor.preprocess(image, resize_mode="crop" if math.prod(size) <= SIDE**2 else "fill")
        vae, device = pipe.vae, device or pipe._execution_device
        latents = pixel_unshuffle(vae.encode(pixels.to(device, vae.dtype)).latent_dist.mode(), 2)
        mean, std = batch_statistics(vae, latents.to(vae.dtype))
        return ((latents - mean) / std).flatten(2).transpose(1, 2)[0]

    def prepared_latents(
        self, pipe: Any, request: EditRequest, sizes: Geometry, images: SizedImages, dtype: torch.dtype, generator: Any
    ) -> tuple[Tensor, Tensor | None]:
        from diffusers.utils.torch_utils import randn_tensor

        device, latents = pipe._execution_device, request.latents
        if latents is None:
            shape = (request.num_images, pipe.transformer.config.in_channels, *self.token_grid(pipe, sizes.size))
            # always drawn in float32, as the pipeline does
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
            latents = latents.flatten(2).transpose(1, 2)
        return latents.to(device, dtype), None

    def vae_latents(self, pipe: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
        latents = latents.transpose(1, 2).unflatten(2, self.token_grid(pipe, size))
        mean, std = batch_statistics(pipe.vae, latents)
        return pixel_shuffle(latents * std + mean, 2)

    def stock_arguments(self, pipe: Any, request: EditRequest) -> dict[str, Any]:
        """Return the arguments, and set the scale of the pipeline's guider, which is no argument."""
        if (guider := getattr(pipe, "guider", None)) is not None and request.true_cfg_scale is not None:
            guider.guidance_scale = request.true_cfg_scale
        known = {param.name for param in pipe.blocks.inputs}
        names = ("prompt", "negative_prompt", "height", "width", "num_inference_steps")
        given: dict[str, Any] = {name: getattr(request, name) for name in names}
        given["image"] = list(request.images) or None
        given["generator"] = torch.Generator().manual_seed(request.seed)  # type: ignore[arg-type]
        return {name: value for name, value in given.items() if name in known and value is not None}

    # ---- what an edit costs ----

    def prompt_text(self, pipe: Any, prompt: str, sizes: Sizes) -> Text:
        text = pipe.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        length = min(len(pipe.tokenizer.tokenizer(text)["input_ids"]), MAX_TEXT)
        multiple = _text_step(pipe).pad_multiple
        return min(math.ceil(length / multiple) * multiple, MAX_TEXT)

    def transformer_flops(
        self, config: Any, layout: SelfLayout, visibility: str | Rule, kept: bool = False
    ) -> tuple[int, int]:
        layout, area, last = step_cost(layout, visibility, kept)
        width = config.num_attention_heads * config.attention_head_dim
        tokens, targets = layout.joint_length, sum(s.length for s in layout.targets)
        early, joint, mlp = config.num_layers, config.num_single_layers, int(width * config.mlp_ratio)
        inputs, rest = 3 * width**2, width**2 + 3 * mlp * width
        linear = (early + joint) * inputs * tokens + rest * ((early + joint - 1) * tokens + targets)
        modes = 1 + (layout.text_length > 0) + (layout.image_length > targets)
        embeddings = (2 + bool(config.flow_map)) * (config.timestep_channels + width) * width
        linear += layout.num_samples * (embeddings + (3 + modes) * 3 * width**2 + 2 * width**2)
        linear += (layout.image_length * config.in_channels + layout.text_length * config.joint_attention_dim) * width
        linear += targets * width * config.in_channels
        own = sum(plan(mode_layout(layout, kind), visibility).area for kind in MODES)
        return 2 * linear, 4 * (early * own + (joint - 1) * area + last) * width

    def text_encoder_cost(self, pipe: Any, sizes: list[Geometry], texts: list[list[int]]) -> tuple[int, int]:
        return language_cost(pipe.text_encoder, [length for lengths in texts for length in lengths])


def _fitted(size: tuple[int, int], patch: int) -> tuple[int, int]:
    """Return the size to which the pipeline scales the only reference of a request, so that its canvas is allowed."""
    width, height = size
    scale = min(1.0, math.sqrt(ONE_AREA / (width * height)), LONGEST / max(size))
    while True:
        width, height = (max(1, round(side * scale)) for side in size)
        if math.prod(_canvas((width, height), patch)) <= ONE_AREA:
            return width, height
        scale *= 0.995


def _canvas(size: tuple[int, int], patch: int) -> tuple[int, int]:
    """Return the size to which the pipeline pads the only reference of a request: whole tokens."""
    width, height = (min(LONGEST, max(SHORTEST, math.ceil(side / patch) * patch)) for side in size)
    return width, height


def _is_distilled(pipe: Any) -> bool:
    return "Distilled" in FLUX_3.index(pipe)["_class_name"]


def _is_plain(guider: Any) -> bool:
    """Return True if a guider is classifier-free guidance as `edit` computes it, whatever its scale."""
    return type(guider).__name__ == "ClassifierFreeGuidance" and _guider_settings(guider) == _PLAIN


def _guider_settings(guider: Any) -> dict[str, Any]:
    """Return the settings of a guider: its attributes, which may have changed after its configuration."""
    own = vars(guider)  # other attributes are read from the configuration
    return {name: own.get(name, own.get(f"_{name}")) for name in _PLAIN}


def _leaves(blocks: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the blocks of code of a modular pipeline that have no blocks inside, with their names."""
    inside = getattr(blocks, "sub_blocks", None)
    if not inside:
        yield name, blocks
        return
    for key, block in inside.items():
        yield from _leaves(block, f"{name}.{key}" if name else key)


def _text_step(pipe: Any) -> Any:
    """Return the block that encodes prompts; a pipeline of parts may not have it."""
    from diffusers.modular_pipelines.flux3.encoders import Flux3TextEncoderStep

    found = next((block for _, block in _leaves(pipe.blocks) if isinstance(block, Flux3TextEncoderStep)), None)
    if found is None:
        raise ValueError(f"the {type(pipe).__name__} has no block that encodes prompts; give prompt_embeds")
    return found


def _text_layers(pipe: Any) -> tuple[int, ...]:
    """Return the layers of the text encoder whose outputs are stacked."""
    (layers,) = (param.default for param in _text_step(pipe).inputs if param.name == "text_encoder_out_layers")
    return tuple(layers)


FLUX_3 = Flux3()
