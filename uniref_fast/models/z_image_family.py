"""Z-Image with references as a family: the pipeline around the transformer, and what it costs.

The packed model is in `uniref_fast.models.z_image`. Latents are tokens of 2 x 2 pixels, channels last, in float32, as
the scheduler of the pipeline gets them. `SandwichFamily` has what Fibo 2 shares.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from uniref_fast.budget import fit_to_budget
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.memo import memo
from uniref_fast.models import z_image
from uniref_fast.models.family import EDIT_ONLY, Family, SizedImages, Sizes, Text
from uniref_fast.models.family_checks import (
    check_rotary_axes,
    check_widths,
    refuse_embeddings_of_references,
    refuse_masks,
    refused_image,
    with_negative_prompt,
)
from uniref_fast.models.image_sizes import result_size, scaled_to, whole_tokens
from uniref_fast.models.kept_references import step_cost
from uniref_fast.models.replaced import NORMS, QK_NORMS, Replaced, layer_norms, rms_norms
from uniref_fast.models.sandwich import part_layout
from uniref_fast.models.text_encoder_costs import language_cost
from uniref_fast.quantised import compute_dtype
from uniref_fast.request import EditRequest, Geometry
from uniref_fast.schedule import denoising_schedule
from uniref_fast.visibility import Rule, plan

__all__ = ["Z_IMAGE", "SandwichFamily", "ZImage", "replaced_blocks"]

AREA = 1024 * 1024
"""Largest area of a reference in pixels, and area of a result without references."""

TEXT_LENGTH = 512
"""Tokens to which the pipeline pads each caption for the text encoder."""

TIME = 256, 1024, 256
"""Widths of the embedding of the time: of its frequencies, between its Linears, and of its result."""


def replaced_blocks(module: str, block: str, attention: str, lists: Sequence[str]) -> tuple[Replaced, ...]:
    """Return what a packed forward replaces in the blocks of one of these models.

    Args:
        module: Module of the transformer in diffusers.
        block: Class of the blocks.
        attention: Class of their attention, as "package.module:Class".
        lists: Lists of blocks.
    """
    found: list[Replaced] = []
    kind = f"{NORMS}:RMSNorm"
    for name in lists:
        at = f"{name}.*"
        found.append(Replaced(at, f"{module}:{block}", calls=("feed_forward", "adaLN_modulation"), onloaded=True))
        found.append(Replaced(f"{at}.attention", attention, calls=("to_q", "to_k", "to_v", "to_out"), reads=("heads",)))
        found += rms_norms(at, ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"), kind)
        found += rms_norms(f"{at}.attention", QK_NORMS[:2], kind, optional=True)
    return tuple(found)


class SandwichFamily(Family):
    """A family whose blocks are those of Z-Image: Z-Image itself and Fibo 2."""

    missing: ClassVar[Mapping[str, str]] = {
        **EDIT_ONLY,
        "patch_keep_references": "calls of its blocks do not say which tokens are those of a reference",
    }

    def check_config(self, given: str, config: Mapping[str, Any], instead: str) -> None:
        axes, width = config.get("axes_dims", (32, 48, 48)), config.get("dim", 3840) // config.get("n_heads", 30)
        check_rotary_axes(given, {"axes_dims_rope": axes, "attention_head_dim": width}, (32, 48, 48), instead)

    # ---- latents ----

    def pack(self, latents: Tensor) -> Tensor:
        """Return latents `[B, C, 2 H, 2 W]` as tokens, `[B, H W, 4 C]`."""
        raise NotImplementedError

    def unpack(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return tokens `[B, H W, 4 C]` of a grid (H, W) as latents, `[B, C, 2 H, 2 W]`."""
        raise NotImplementedError

    def noise(self, pipe: Any, request: EditRequest, sizes: Geometry, generator: Any, given: Tensor | None) -> Tensor:
        """Return the starting noise of the pipeline, `[B, C, 2 H, 2 W]` in float32, or what is given instead."""
        raise NotImplementedError

    def prepared_latents(
        self, pipe: Any, request: EditRequest, sizes: Geometry, images: SizedImages, dtype: torch.dtype, generator: Any
    ) -> tuple[Tensor, Tensor | None]:
        given = None if request.latents is None else self.unpack(request.latents, sizes.grid(sizes.size)[1:])
        return self.pack(self.noise(pipe, request, sizes, generator, given)), None

    # ---- what an edit costs ----

    def image_flops(
        self, config: Any, layout: SelfLayout, images: SelfLayout, hidden: int, visibility: str | Rule, kept: bool
    ) -> tuple[SelfLayout, int, int]:
        """Return what a forward computes of images and of the whole sequence; a family adds its text.

        Args:
            config: Configuration of the transformer.
            layout: Layout of the pack.
            images: Layout of the tokens that pass the refiner blocks of images.
            hidden: Width of the feed-forwards.
            visibility: Visibility of attention.
            kept: Count a step that takes the keys and values of the references from a store.

        Returns:
            The layout of the rows that the step computes, half of the operations of its Linears, and the pairs of query
            and key of all its attention.
        """
        layout, area, last = step_cost(layout, visibility, kept)
        images, image_area, _ = step_cost(images, visibility, kept)
        width, time, channels = config.dim, min(config.dim, TIME[2]), 4 * config.in_channels
        targets, samples = sum(s.length for s in layout.targets), layout.num_samples
        refiners, blocks = config.n_refiner_layers, config.n_layers
        linear = refiners * self.block_flops(config, hidden, images.joint_length)
        linear += (blocks - 1) * self.block_flops(config, hidden, layout.joint_length)
        linear += self.block_flops(config, hidden, layout.joint_length, targets)
        linear += 2 * samples * ((refiners + blocks) * 4 * time * width + TIME[0] * TIME[1] + TIME[1] * time)
        linear += samples * time * width + targets * width * channels + layout.image_length * channels * width
        return layout, linear, refiners * image_area + (blocks - 1) * area + last

    def block_flops(self, config: Any, hidden: int, tokens: int, last: int | None = None) -> int:
        """Return half of the operations of the Linears of a block.

        Args:
            config: Configuration of the transformer.
            hidden: Width of the feed-forward.
            tokens: Tokens that it computes.
            last: Number of targets' tokens for the last block of the model.
        """
        width = config.dim
        rest = width**2 + 3 * width * hidden
        return 3 * width**2 * tokens + rest * (tokens if last is None else last)


_MODEL = "diffusers.models.transformers.transformer_z_image"
_LISTS = ("noise_refiner", "context_refiner", "siglip_refiner", "layers")

REPLACED = (
    Replaced(
        "", f"{_MODEL}:ZImageTransformer2DModel",
        ("forward", "patchify_and_embed_omni", "unpatchify", "create_coordinate_grid", "_patchify_image",
         "_pad_with_ids", "_prepare_sequence", "_build_unified_sequence"),
        calls=("all_x_embedder", "t_embedder", "cap_embedder", "siglip_embedder"),
        reads=("config", "t_scale", "rope_embedder", "x_pad_token", "cap_pad_token", "siglip_pad_token"), onloaded=True,
    ),
    Replaced("all_final_layer.*", f"{_MODEL}:FinalLayer", calls=("adaLN_modulation", "linear")),
    *layer_norms("all_final_layer.*", ("norm_final",)),
    *replaced_blocks(_MODEL, "ZImageTransformerBlock", "diffusers.models.attention_processor:Attention", _LISTS),
)  # fmt: skip


class ZImage(SandwichFamily):
    """Z-Image-Omni, which takes references, and `patch` for the other pipelines of Z-Image."""

    name = "z-image"
    models = ()  # no checkpoint with references is named
    transformer = "ZImageTransformer2DModel"
    pipelines = ("ZImageOmniPipeline",)
    other_pipelines: ClassVar[Mapping[str, str]] = {
        "ZImagePipeline": "a text-to-image model, which takes no references",
        "ZImageImg2ImgPipeline": "a text-to-image model, which starts from an image instead of taking references",
        "ZImageInpaintPipeline": "a text-to-image model for inpainting, which takes no references",
        "ZImageControlNetPipeline": "a text-to-image model with a ControlNet, which takes no references",
        "ZImageControlNetInpaintPipeline": "a text-to-image model with a ControlNet, which takes no references",
    }
    replaced = REPLACED
    packed = z_image.PackedZImage
    random_models = "uniref_fast.random_models.z_image"
    loads_lokr = True

    def defaults(self, index: Mapping[str, Any]) -> tuple[int, float]:
        """Return the defaults of the pipeline."""
        return 50, 5.0

    def stock_arguments(self, pipe: Any, request: EditRequest) -> dict[str, Any]:
        given = super().stock_arguments(pipe, request)
        if request.true_cfg_scale is not None and request.true_cfg_scale <= 1:
            given["guidance_scale"] = 0.0  # the pipeline guides with every scale above 0
        for name in {"prompt_embeds", "negative_prompt_embeds"} & given.keys():
            given[name] = [[given[name].flatten(0, -2)]]
        return given

    # ---- the packed model ----

    def text_channels(self, config: Any) -> int:
        return z_image.text_width(config)

    def text_rows(self, layout: SelfLayout) -> int:
        return z_image.text_rows(layout)

    def layout(self, config: Any, samples: Sequence[Sample]) -> SelfLayout:
        return z_image.z_image_layout(samples)

    def check_config(self, given: str, config: Mapping[str, Any], instead: str) -> None:
        super().check_config(given, config, instead)
        if config.get("siglip_feat_dim") is None:
            raise ValueError(
                f"{given} has a transformer without siglip_feat_dim, which is that of a text-to-image model; {instead}"
            )
        if z_image.PATCH not in [f"{a}-{b}" for a, b in zip(
            config.get("all_patch_size", (2,)), config.get("all_f_patch_size", (1,)), strict=False
        )]:  # fmt: skip
            raise ValueError(f"{given} has a transformer without patches of 2 x 2 latent pixels; {instead}")

    # ---- the pipeline around the transformer ----

    def text_encoders(self, pipe: Any) -> tuple[Any, ...]:
        return pipe.text_encoder, pipe.siglip

    def check_parts(self, pipe: Any, given: str) -> None:
        widths = [("in_channels", "VAE", pipe.vae.config.latent_channels)]
        if pipe.text_encoder is not None:
            widths.append(("cap_feat_dim", "text encoder", pipe.text_encoder.config.get_text_config().hidden_size))
        if pipe.siglip is not None:
            siglip = pipe.siglip.config
            widths.append(("siglip_feat_dim", "SigLIP model", getattr(siglip, "vision_config", siglip).hidden_size))
        check_widths(given, pipe.transformer.config, widths)

    def image_refusal(self, pipe: Any, sizes: Sizes) -> str | None:
        return refused_image(pipe, sizes)

    def check_request(self, pipe: Any, request: EditRequest, where: str) -> EditRequest:
        """Refuse embeddings that cannot be used, and set the negative prompt that the pipeline would use."""
        if request.images and (pipe.siglip is None or pipe.siglip_processor is None):
            raise ValueError(
                f"{where}: the pipeline has no siglip or no siglip_processor, which references need; load the "
                "pipeline with both, or give no images"
            )
        refuse_embeddings_of_references(request, where)
        refuse_masks(request, where)
        if request.true_cfg_scale is not None and 0 < request.true_cfg_scale < 1:
            raise ValueError(
                f"{where}: true_cfg_scale must be 0 or 1 (no guidance) or above 1, got {request.true_cfg_scale}. "
                "Scales between 0 and 1 work only in the pipeline itself"
            )
        return with_negative_prompt(pipe, request, where, self.usual_negative_prompt())

    def image_areas(self, pipe: Any) -> tuple[int, int, int]:
        return AREA, AREA, AREA

    def geometry(
        self, pipe: Any, sizes: Sizes, width: int | None = None, height: int | None = None, budget: int | None = None
    ) -> Geometry:
        patch = self.token_side(pipe)
        area = AREA if width is None or height is None else width * height
        seen = [_within(size, area) for size in sizes] if budget is None else fit_to_budget(sizes, budget)
        references = [whole_tokens(size, patch) for size in seen]
        usual = references[-1] if references else (math.isqrt(AREA),) * 2
        return Geometry(result_size(width, height, usual, patch), tuple(seen), tuple(references), patch)

    def schedule(self, pipe: Any, tokens: int, steps: int, device: torch.device | str) -> Any:
        sigmas = torch.linspace(1.0, 1 / steps, steps).tolist()
        return denoising_schedule(pipe.scheduler, tokens, steps, device, sigmas=sigmas)

    def encoded(
        self, pipe: Any, prompt: str, images: Sequence[Image.Image], sizes: Sizes, device: Any
    ) -> tuple[Tensor, Text]:
        return self._encoded(pipe, prompt, self._features(pipe, images, sizes, device), device)

    def encode_prompts(
        self, pipe: Any, request: EditRequest, sizes: Geometry, images: Sequence[Image.Image], cast: bool = True
    ) -> list[tuple[Tensor, Text]]:
        if not images or any(embeds is not None for _, embeds, _ in request.texts):
            return super().encode_prompts(pipe, request, sizes, images, cast)
        device = pipe._execution_device
        features = self._features(pipe, images, sizes.condition_sizes, device)  # the same for both prompts
        return [self._encoded(pipe, text or "", features, device) for text, _, _ in request.texts]

    def _features(self, pipe: Any, images: Sequence[Image.Image], sizes: Sizes, device: Any) -> list[Tensor]:
        """Return the features of references of (width, height) pixels, `[H, W, C]` each."""
        resized = [_resized(image, size) for image, size in zip(images, sizes, strict=True)]
        (features,) = pipe.prepare_siglip_embeds(resized, 1, device, torch.float32)
        return features

    def _encoded(self, pipe: Any, prompt: str, features: Sequence[Tensor], device: Any) -> tuple[Tensor, Text]:
        """Return `encode_prompt` of a prompt with the features of its references."""
        captions = pipe.encode_prompt(
            prompt=[prompt], device=device, do_classifier_free_guidance=False, num_condition_images=len(features),
            max_sequence_length=TEXT_LENGTH,
        )[0][0]  # fmt: skip
        width, dtype = z_image.text_width(pipe.transformer.config), compute_dtype(pipe.transformer)
        rows = [each.to(dtype) for each in (*captions, *map(_feature_rows, features))]
        text = torch.cat([torch.nn.functional.pad(each, (0, width - each.shape[1])) for each in rows])
        grids = [(each.shape[0], each.shape[1]) for each in features]
        return text, self._text([len(each) for each in captions], grids)

    def _text(self, captions: list[int], features: list[tuple[int, int]]) -> Text:
        return z_image.text_of(captions, features) if features else captions[0]

    def encode_image(self, pipe: Any, image: Image.Image, size: tuple[int, int], device: Any = None) -> Tensor:
        width, height = size
        vae, patch = pipe.vae, self.token_side(pipe)
        if whole_tokens(image.size, patch) != tuple(size):
            image = _resized(image, size)
        pixels = pipe.image_processor.preprocess(image, height=height, width=width, resize_mode="crop")
        # rounded to bfloat16, as the pipeline does for a VAE of any dtype
        pixels = pixels.to(device or pipe._execution_device, torch.bfloat16).to(vae.dtype)
        latents = vae.encode(pixels).latent_dist.mode()[0] - vae.config.shift_factor
        return self.pack((latents * vae.config.scaling_factor)[None])[0].to(compute_dtype(pipe.transformer))

    def sized_references(self, images: Sequence[Image.Image], sizes: Geometry) -> SizedImages:
        resized = [_resized(image, size) for image, size in zip(images, sizes.condition_sizes, strict=True)]
        return super().sized_references(resized, sizes)

    def noise(self, pipe: Any, request: EditRequest, sizes: Geometry, generator: Any, given: Tensor | None) -> Tensor:
        width, height = sizes.size
        return pipe.prepare_latents(
            request.num_images, pipe.transformer.config.in_channels, height, width, torch.float32,
            pipe._execution_device, generator, given,
        ).float()  # fmt: skip

    def pack(self, latents: Tensor) -> Tensor:
        tokens = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # [B, C, H, 2, W, 2]
        return tokens.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def unpack(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        parts = tokens.unflatten(1, grid).unflatten(3, (2, 2, -1))  # [B, H, W, 2, 2, C]
        return parts.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Move away from the negative prompt by the scale, where other models do by the scale less 1."""
        return positive + scale * (positive - negative)

    def vae_latents(self, pipe: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
        vae = pipe.vae
        latents = self.unpack(latents, self.token_grid(pipe, size)).to(vae.dtype)
        return latents / vae.config.scaling_factor + vae.config.shift_factor

    # ---- what an edit costs ----

    def prompt_text(self, pipe: Any, prompt: str, sizes: Sizes) -> Text:
        if sizes:
            parts = ["<|im_start|>user\n<|vision_start|>", *["<|vision_end|><|vision_start|>"] * (len(sizes) - 1),
                     f"<|vision_end|>{prompt}<|im_end|>\n<|im_start|>assistant\n<|vision_start|>",
                     "<|vision_end|><|im_end|>"]  # fmt: skip
        else:
            parts = [f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"]
        lengths = [min(len(ids), TEXT_LENGTH) for ids in pipe.tokenizer(parts)["input_ids"]]
        return self._text(lengths, [_feature_grid(pipe.siglip_processor, size) for size in sizes])

    def transformer_flops(
        self, config: Any, layout: SelfLayout, visibility: str | Rule, kept: bool = False
    ) -> tuple[int, int]:
        width, hidden, refiners = config.dim, int(config.dim / 3 * 8), config.n_refiner_layers
        images = memo(layout, part_layout, z_image._is_image)
        layout, linear, attention = self.image_flops(config, layout, images, hidden, visibility, kept)
        for chosen, is_token, channels in (
            (z_image._is_caption, z_image._is_caption_token, config.cap_feat_dim),
            (z_image._is_feature, z_image._is_feature_token, config.siglip_feat_dim),
        ):
            refined = part_layout(layout, chosen)
            linear += sum(s.length for s in refined.segments if is_token(s)) * channels * width
            linear += refiners * self.block_flops(config, hidden, refined.joint_length)
            attention += refiners * plan(refined, visibility).area
        return 2 * linear, 4 * attention * width

    def text_encoder_cost(self, pipe: Any, sizes: list[Geometry], texts: list[list[int]]) -> tuple[int, int]:
        captions = [len(size.condition_sizes) + 2 if size.condition_sizes else 1 for size in sizes]
        runs = [count for count, lengths in zip(captions, texts, strict=True) for _ in lengths]
        flops, one = language_cost(pipe.text_encoder, [TEXT_LENGTH] * sum(runs))
        encoded = [len(size.condition_sizes) for size, lengths in zip(sizes, texts, strict=True) if lengths]
        flops += sum(encoded) * _feature_flops(pipe) if any(encoded) else 0  # once for both prompts
        return flops, max(runs, default=0) * one  # the captions of a prompt are one batch


def _within(size: tuple[int, int], area: int) -> tuple[int, int]:
    """Return the size that the pipeline gives a reference: that of `area` pixels, if it has over 1024 x 1024."""
    return size if size[0] * size[1] <= AREA else scaled_to(size, area)


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def _feature_rows(features: Tensor) -> Tensor:
    """Return features `[H, W, C]` as rows `[H W, C]` in the order in which the transformer of diffusers takes them."""
    height, width, channels = features.shape
    return features.permute(2, 0, 1).reshape(height * width, channels)


def _feature_flops(pipe: Any) -> int:
    """Return the operations that compute the features of one image."""
    config, patches = pipe.siglip.config, pipe.siglip_processor.max_num_patches
    vision = getattr(config, "vision_config", config)
    linear = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    return vision.num_hidden_layers * (2 * linear * patches + 4 * patches**2 * vision.hidden_size)


def _feature_grid(processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Return height and width of the features of an image of (width, height) pixels."""
    module = sys.modules[type(processor).__module__]  # there are two, with and without torchvision
    side = processor.patch_size
    height, width = module.get_image_size_for_max_num_patches(size[1], size[0], side, processor.max_num_patches)
    return height // side, width // side


Z_IMAGE = ZImage()
