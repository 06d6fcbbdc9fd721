"""JoyImage-Edit-Plus as a family: the pipeline around the transformer, and what it costs.

The packed model is in `uniref_fast.models.joyimage`. Every reference gets the size of the pipeline's list whose aspect
ratio is nearest; text encoder and VAE see it at that size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from uniref_fast.budget import fit_to_budget
from uniref_fast.guidance import EMPTY_PROMPT
from uniref_fast.layout import SelfLayout
from uniref_fast.models.family import EDIT_ONLY, Family, SizedImages, Sizes, Text, prepared_references
from uniref_fast.models.family_checks import check_options, check_widths, with_negative_prompt
from uniref_fast.models.image_sizes import result_size
from uniref_fast.models.joyimage import PackedJoyImage
from uniref_fast.models.kept_references import step_cost
from uniref_fast.models.latents import from_tokens, to_tokens, vae_statistics
from uniref_fast.models.replaced import NORMS, Replaced, layer_norms, rms_norms
from uniref_fast.models.text_encoder_costs import condition_tokens, vision_language_cost
from uniref_fast.quantised import compute_dtype
from uniref_fast.request import EditRequest, Geometry
from uniref_fast.visibility import Rule

__all__ = ["JOYIMAGE_EDIT_PLUS", "JoyImageEditPlus"]

SIDE = 1024
"""Width and height of a result without references, unless the request has others."""

TEXT_LENGTH = 4096
"""Largest number of text tokens; the pipeline drops the first ones of a longer text."""

PATCH = (1, 2, 2)

_MODEL = "diffusers.models.transformers.transformer_joyimage_edit_plus"
_BLOCK, _ATTN = "double_blocks.*", "double_blocks.*.attn"

REPLACED = (
    Replaced(
        "", f"{_MODEL}:JoyImageEditPlusTransformer3DModel", ("forward", "_get_rotary_pos_embed_for_range"),
        calls=("img_in", "norm_out", "proj_out"), reads=("config",), onloaded=True,
    ),
    Replaced(
        "condition_embedder", f"{_MODEL}:JoyImageEditPlusTimeTextImageEmbedding",
        calls=("timesteps_proj", "time_embedder", "act_fn", "time_proj", "text_embedder"),
    ),
    Replaced(
        _BLOCK, f"{_MODEL}:JoyImageEditPlusTransformerBlock", calls=("img_mod", "txt_mod", "img_mlp", "txt_mlp"),
        onloaded=True,
    ),
    *layer_norms(_BLOCK, ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2"), f"{NORMS}:FP32LayerNorm"),
    Replaced(
        _ATTN, f"{_MODEL}:JoyImageEditPlusAttention",
        calls=("img_attn_qkv", "txt_attn_qkv", "img_attn_proj", "txt_attn_proj"), reads=("heads", "head_dim"),
    ),
    *rms_norms(_ATTN, ("img_attn_q_norm", "img_attn_k_norm", "txt_attn_q_norm", "txt_attn_k_norm")),
)  # fmt: skip


class JoyImageEditPlus(Family):
    """JoyImage-Edit-Plus."""

    name = "joyimage-edit-plus"
    models = ("jdopensource/JoyAI-Image-Edit-Plus-Diffusers",)
    transformer = "JoyImageEditPlusTransformer3DModel"
    pipelines = ("JoyImageEditPlusPipeline",)
    missing: ClassVar[Mapping[str, str]] = {
        "patch_keep_references": "its pipeline also takes a denoising step for the latents of the references, for "
        "which a kept step has no prediction",
        **EDIT_ONLY,
    }
    replaced = REPLACED
    packed = PackedJoyImage
    exact_references = "never"
    random_models = "uniref_fast.random_models.joyimage"

    def defaults(self, index: Mapping[str, Any]) -> tuple[int, float]:
        return 30, 4.0

    def usual_negative_prompt(self) -> str:
        return EMPTY_PROMPT

    def stock_arguments(self, pipe: Any, request: EditRequest) -> dict[str, Any]:
        return {**super().stock_arguments(pipe, request), "images": list(request.images) or None}

    # ---- the packed model ----

    def check_config(self, given: str, config: Mapping[str, Any], instead: str) -> None:
        check_options(given, config, {"patch_size": [*PATCH]}, instead)
        axes, heads = config.get("rope_dim_list", (16, 56, 56)), config.get("num_attention_heads", 24)
        width = config.get("hidden_size", 3072) // heads
        if axes is None or len(axes) != 3 or sum(axes) != width:
            raise ValueError(
                f"{given} has a transformer with rope_dim_list = {axes}, which must be three numbers that add up to "
                f"the width of a head, {width}; {instead}"
            )

    # ---- the pipeline around the transformer ----

    def check_parts(self, pipe: Any, given: str) -> None:
        widths = [("in_channels", "VAE", pipe.vae.config.z_dim)]
        if pipe.text_encoder is not None:
            widths.append(("text_dim", "text encoder", pipe.text_encoder.config.get_text_config().hidden_size))
        check_widths(given, pipe.transformer.config, widths)

    def check_request(self, pipe: Any, request: EditRequest, where: str) -> EditRequest:
        """Set the negative prompt that the pipeline would use."""
        return with_negative_prompt(pipe, request, where, self.usual_negative_prompt())

    def token_side(self, pipe: Any) -> int:
        return pipe.vae_scale_factor_spatial * PATCH[1]

    def image_areas(self, pipe: Any) -> tuple[int, int, int]:
        area = pipe.image_processor.config.basesize**2
        return area, area, area

    def geometry(
        self, pipe: Any, sizes: Sizes, width: int | None = None, height: int | None = None, budget: int | None = None
    ) -> Geometry:
        patch = self.token_side(pipe)
        alone = [_listed_size(pipe, size) for size in sizes]
        usual = alone[-1] if alone else (SIDE, SIDE)
        references = tuple(alone if budget is None else fit_to_budget(sizes, budget))
        return Geometry(result_size(width, height, usual, patch), references, references, patch)

    def schedule(self, pipe: Any, tokens: int, steps: int, device: torch.device | str) -> Any:
        from diffusers.pipelines.joyimage.pipeline_joyimage_edit_plus import retrieve_timesteps

        scheduler = copy.deepcopy(pipe.scheduler)
        retrieve_timesteps(scheduler, steps, device)
        scheduler.set_begin_index(0)
        return scheduler

    def encoded(
        self, pipe: Any, prompt: str, images: Sequence[Image.Image], sizes: Sizes, device: Any
    ) -> tuple[Tensor, Text]:
        resized = [_resized(pipe, image, size) for image, size in zip(images, sizes, strict=True)]
        embeds, mask = pipe.encode_prompt_multiple_images(
            [_user_message(prompt, len(resized))], device, resized or None, TEXT_LENGTH
        )
        return self.valid_rows(embeds[0], mask)

    def encode_image(self, pipe: Any, image: Image.Image, size: tuple[int, int], device: Any = None) -> Tensor:
        vae, processor, dtype = pipe.vae, pipe.image_processor, compute_dtype(pipe.transformer)
        resized = _resized(pipe, image, size)
        if _listed_size(pipe, size) == size:
            pixels = processor.preprocess(resized)
        else:  # of a joint budget; `preprocess` would give it a size of the list
            pixels = processor.normalize(processor.numpy_to_pt(processor.pil_to_numpy(resized)))
        pixels = pixels.to(device or pipe._execution_device, dtype).unsqueeze(2)  # rounded as in the pipeline
        latents = vae.encode(pixels.to(vae.dtype)).latent_dist.mode().to(dtype)
        mean, std = vae_statistics(vae, latents)
        return to_tokens(((latents - mean) / std)[:, :, 0])[0]

    def prepared_latents(
        self, pipe: Any, request: EditRequest, sizes: Geometry, images: SizedImages, dtype: torch.dtype, generator: Any
    ) -> tuple[Tensor, Tensor | None]:
        given = request.latents
        if given is not None:
            given = from_tokens(given, self.token_grid(pipe, sizes.size)).unsqueeze(2)
        width, height = sizes.size
        resized = [[_resized(pipe, *pair) for pair in images]] * request.num_images if images else None
        patches, _, _ = pipe.prepare_latents(
            request.num_images, pipe.transformer.config.in_channels, height, width, dtype, pipe._execution_device,
            generator, resized, given,
        )  # fmt: skip
        latents, packed = patches.flatten(2).split_with_sizes(
            [sizes.target_tokens, patches.shape[1] - sizes.target_tokens], dim=1
        )
        return latents, prepared_references(latents, packed, images)

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Combine both velocities, and give each latent pixel the norm that it has for the positive prompt."""
        combined, wanted = (
            x.unflatten(-1, (-1, math.prod(PATCH))) for x in (super().guide(positive, negative, scale), positive)
        )
        norms = [torch.norm(x, dim=-2, keepdim=True) for x in (wanted, combined)]
        return (combined * (norms[0] / norms[1].clamp_min(1e-6))).flatten(-2)

    def vae_latents(self, pipe: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
        latents = from_tokens(latents, self.token_grid(pipe, size)).unsqueeze(2)
        mean, std = vae_statistics(pipe.vae, latents)
        return latents * std + mean

    def decode(self, pipe: Any, latents: Tensor, size: tuple[int, int], output_type: str = "pil") -> Any:
        """Decode latents as other families do, but compute the values of the pixels in float32."""
        latents = self.vae_latents(pipe, latents, size).to(pipe.vae.dtype)
        image = pipe.vae.decode(latents, return_dict=False)[0][:, :, 0].float()
        return pipe.image_processor.postprocess(image, output_type=output_type)[0]

    # ---- what an edit costs ----

    def prompt_text(self, pipe: Any, prompt: str, sizes: Sizes) -> int:
        message = _user_message(prompt, len(sizes)).replace("<image>\n", "<|vision_start|><|image_pad|><|vision_end|>")
        template = pipe.prompt_template_encode["multiple_images"]
        tokens = len(pipe.processor.tokenizer(template.format(message))["input_ids"])
        tokens += sum(condition_tokens(pipe, size) - 1 for size in sizes)
        return min(tokens - pipe.prompt_template_encode_start_idx["multiple_images"], TEXT_LENGTH)

    def transformer_flops(
        self, config: Any, layout: SelfLayout, visibility: str | Rule, kept: bool = False
    ) -> tuple[int, int]:
        layout, area, last = step_cost(layout, visibility, kept)
        width, blocks = config.hidden_size, config.num_layers
        patch = self.packed.sizes(config).token_channels
        tokens, targets = layout.joint_length, sum(segment.length for segment in layout.targets)
        qkv, rest = 3 * width**2, width**2 + 2 * width * int(width * config.mlp_width_ratio)
        linear = blocks * qkv * tokens + rest * ((blocks - 1) * tokens + targets)
        linear += layout.num_modulation_rows * (256 * width + 7 * width**2)  # embedding of the time, modulation
        linear += layout.image_length * patch * width + layout.text_length * (config.text_dim * width + width**2)
        linear += targets * width * patch
        return 2 * linear, 4 * ((blocks - 1) * area + last) * width

    def text_encoder_cost(self, pipe: Any, sizes: list[Geometry], texts: list[list[int]]) -> tuple[int, int]:
        prefix = pipe.prompt_template_encode_start_idx["multiple_images"]
        tokens = []
        for size, lengths in zip(sizes, texts, strict=True):
            seen = sum(condition_tokens(pipe, each) for each in size.condition_sizes)  # the encoder drops none of them
            tokens.append([max(length, seen) + prefix for length in lengths])
        return vision_language_cost(pipe, sizes, tokens)


def _listed_size(pipe: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Return the (width, height) of the pipeline's list that has the aspect ratio nearest to that of an image."""
    height, width = pipe.image_processor.get_default_height_width(None, size[1], size[0])
    return width, height


def _resized(pipe: Any, image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return an image that is resized to cover (width, height) pixels, and cropped to them at its centre."""
    return pipe.image_processor.resize_center_crop(image, (size[1], size[0]))


def _user_message(prompt: str, references: int) -> str:
    """Return the message that the pipeline makes of a prompt."""
    return "<|im_start|>user\n" + "<image>\n" * references + f"{prompt}<|im_end|>\n"


JOYIMAGE_EDIT_PLUS = JoyImageEditPlus()
