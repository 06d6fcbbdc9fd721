"""FLUX.1 Kontext as a family, and what it shares with LongCat-Image-Edit and FIBO-Edit.

The packed models are in `uniref_fast.models.flux1`. Text always has the 512 tokens to which the pipeline pads it, since
its transformer attends to the padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from uniref_fast.budget import fit_to_budget
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.models.family import NOT_TRAINED, Family, Replaced, Text
from uniref_fast.models.family_checks import (
    check_patch_size,
    check_rotary_axes,
    check_widths,
    given_embeddings,
    refuse_masks,
)
from uniref_fast.models.flux1 import PackedFlux1
from uniref_fast.models.kept_references import kept_step
from uniref_fast.quantised import compute_dtype
from uniref_fast.request import EditRequest, Geometry
from uniref_fast.schedule import denoising_schedule
from uniref_fast.visibility import Rule, plan, target_plan

__all__ = ["FLUX_1", "Flux1", "Flux1Family", "ImageLatents", "replaced_parts"]

AREA = 1024 * 1024
"""Area of a result in pixels, and about that of a reference."""

TEXT_LENGTH = 512
"""Number of text tokens, padding included."""

POOLED_LENGTH = 77
"""Number of tokens of the encoder of the whole prompt."""

_NORMS = "diffusers.models.normalization"
_BLOCK, _SINGLE = "transformer_blocks.*", "single_transformer_blocks.*"
_PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out", "to_add_out")


def replaced_parts(
    module: str, model: str, blocks: str, rope: str, attention: tuple[str, str], norms: tuple[str, str], ends: tuple
) -> tuple[Replaced, ...]:
    """Return `Family.replaced` of a transformer.

    Args:
        module: Module of the transformer in diffusers.
        model: Name of its class.
        blocks: First part of the names of the classes of its blocks.
        rope: Name of the class of its positional embedding.
        attention: Classes of attention in blocks with two streams and with one, as "module:name".
        norms: Classes of the QK norms in both, likewise.
        ends: Modules that are called outside of the blocks.
    """
    ada = "AdaLayerNormZero"
    return (
        Replaced("", f"{module}:{model}", calls=ends, reads=("config",), onloaded=True),
        Replaced("pos_embed", f"{module}:{rope}"),
        Replaced("norm_out", f"{_NORMS}:AdaLayerNormContinuous", calls=("silu", "linear")),
        Replaced("norm_out.norm", "torch.nn:LayerNorm", reads=("eps",)),
        Replaced(_BLOCK, f"{module}:{blocks}TransformerBlock", calls=("ff", "ff_context"), onloaded=True),
        Replaced(
            _SINGLE, f"{module}:{blocks}SingleTransformerBlock", calls=("proj_mlp", "act_mlp", "proj_out"),
            onloaded=True,
        ),
        *(Replaced(f"{_BLOCK}.{name}", f"{_NORMS}:{ada}", calls=("silu", "linear"))
          for name in ("norm1", "norm1_context")),
        Replaced(f"{_SINGLE}.norm", f"{_NORMS}:{ada}Single", calls=("silu", "linear")),
        *(Replaced(name, "torch.nn:LayerNorm", reads=("eps",)) for name in (
            f"{_BLOCK}.norm1.norm", f"{_BLOCK}.norm1_context.norm", f"{_BLOCK}.norm2", f"{_BLOCK}.norm2_context",
            f"{_SINGLE}.norm.norm",
        )),
        Replaced(f"{_BLOCK}.attn", attention[0], calls=_PROJECTIONS, reads=("heads", "inner_dim")),
        Replaced(f"{_SINGLE}.attn", attention[1], calls=_PROJECTIONS[:3], reads=("heads", "inner_dim")),
        *(Replaced(f"{_BLOCK}.attn.{name}", norms[0], reads=("weight", "eps"), onloaded=True)
          for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")),
        *(Replaced(f"{_SINGLE}.attn.{name}", norms[1], reads=("weight", "eps"), onloaded=True)
          for name in ("norm_q", "norm_k")),
    )  # fmt: skip


class Flux1Family(Family):
    """A family whose transformer has the blocks of FLUX.1."""

    packed: type[PackedFlux1]
    missing: ClassVar[Mapping[str, str]] = {
        "patch_keep_references": "calls of its transformer do not say which tokens are those of a reference",
        "fast": "its blocks were not measured in 8 bits",
        "sft": NOT_TRAINED,
        "msgrpo": NOT_TRAINED,
    }

    # ---- the packed model ----

    def layout(self, config: Any, samples: Sequence[Sample]) -> SelfLayout:
        return SelfLayout.pack(samples, self.packed.scheme, clean_references=False)

    def check_config(self, given: str, config: Mapping[str, Any], instead: str) -> None:
        check_patch_size(given, config, instead)
        check_rotary_axes(given, config, (16, 56, 56), instead)
        if not config.get("num_single_layers", 1):
            raise ValueError(
                f"{given} has a transformer without blocks with one stream, which is not supported; {instead}"
            )

    # ---- the pipeline around the transformer ----

    def schedule(self, pipe: Any, tokens: int, steps: int, device: torch.device | str) -> Any:
        return denoising_schedule(pipe.scheduler, tokens, steps, device)

    # ---- what an edit costs ----

    def embedding_flops(self, config: Any, layout: SelfLayout) -> int:
        """Return the multiplications of the embeddings beside those of latents, text and time."""
        return 0

    def transformer_flops(
        self, config: Any, layout: SelfLayout, visibility: str | Rule, kept: bool = False
    ) -> tuple[int, int]:
        whole, last = plan(layout, visibility), target_plan(layout, visibility)
        linear = self.embedding_flops(config, layout)
        if kept:
            computed = kept_step(layout)
            layout, whole = computed.layout, computed.plan(visibility)
        width = config.num_attention_heads * config.attention_head_dim
        tokens, targets, rows = layout.joint_length, sum(s.length for s in layout.targets), layout.num_modulation_rows
        double, single = config.num_layers, config.num_single_layers
        # projections, output and the 4x feed-forward; the last block has only the projections of tokens that are no
        # targets
        linear += width**2 * (12 * (double + single - 1) * tokens + 3 * tokens + 9 * targets)
        linear += width**2 * rows * (12 * double + 3 * single + 2)  # modulation of the blocks and of the output
        linear += rows * (256 + width) * width  # of the time
        linear += (layout.image_length * config.in_channels + layout.text_length * config.joint_attention_dim) * width
        linear += targets * width * (config.get("out_channels") or config.in_channels)
        return 2 * linear, 4 * ((double + single - 1) * whole.area + last.area) * width


class ImageLatents(Flux1Family):
    """A family with the VAE of FLUX.1, and latents of 2 x 2 pixels in a token."""

    def prepared_latents(
        self, pipe: Any, pixels: Tensor | None, size: tuple[int, int], dtype: torch.dtype, generator: Any,
        latents: Tensor | None, count: int,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Return the starting noise `[count, n, C]` and the latents of a reference `[count, m, C]`, or None for none.

        Args:
            pipe: The pipeline, whose `prepare_latents` is called.
            pixels: Reference, `[1, 3, H, W]`, or None for none.
            size: Width and height of the result in pixels.
            dtype: Dtype of the noise.
            generator: Generator of the noise, or None.
            latents: Given noise, or None.
            count: Number of images.
        """
        width, height = size
        channels = pipe.transformer.config.in_channels // 4
        return pipe.prepare_latents(
            pixels, count, channels, height, width, dtype, pipe._execution_device, generator, latents
        )[:2]

    def encode_image(self, pipe: Any, image: Image.Image, size: tuple[int, int], device: Any = None) -> Tensor:
        pixels = self._pixels(pipe, image, size).to(device or pipe._execution_device, pipe.vae.dtype)
        latents = pipe._encode_vae_image(image=pixels, generator=None)
        return pipe._pack_latents(latents, 1, *latents.shape[1:])[0]

    def starting_latents(
        self,
        pipe: Any,
        request: EditRequest,
        sizes: Geometry,
        images: Sequence[Image.Image],
        dtype: torch.dtype,
        generator: Any,
        own: bool,
    ) -> tuple[Tensor, Tensor]:
        pairs = list(zip(images, sizes.reference_sizes, strict=True))
        pixels = self._pixels(pipe, *pairs[0]) if pairs and not own else None
        latents, packed = self.prepared_latents(
            pipe, pixels, sizes.size, dtype, generator, request.latents, request.num_images
        )
        if not own:
            return latents, latents[0, :0] if packed is None else packed[0].to(latents.dtype)
        # diffusers' own method would pass the image to the VAE in the transformer's dtype, which may not be the VAE's
        parts = [self.encode_image(pipe, *pair).to(latents.dtype) for pair in pairs]
        return latents, torch.cat([latents[0, :0], *parts])

    def _pixels(self, pipe: Any, image: Image.Image, size: tuple[int, int]) -> Tensor:
        width, height = size
        processor = pipe.image_processor
        return processor.preprocess(processor.resize(image, height, width), height, width)

    def decode(self, pipe: Any, latents: Tensor, size: tuple[int, int], output_type: str = "pil") -> Any:
        vae = pipe.vae
        width, height = size
        latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
        latents = (latents / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)
        return pipe.image_processor.postprocess(vae.decode(latents, return_dict=False)[0], output_type=output_type)[0]


_MODEL = "diffusers.models.transformers.transformer_flux"


class Flux1(ImageLatents):
    """FLUX.1 Kontext, and `patch` of the other pipelines of FLUX.1."""

    name = "flux1"
    models = ("black-forest-labs/FLUX.1-Kontext-dev",)
    transformer = "FluxTransformer2DModel"
    pipelines = ("FluxKontextPipeline",)
    other_pipelines: ClassVar[Mapping[str, str]] = {
        "FluxKontextInpaintPipeline": "a pipeline for inpainting, which starts from an image and a mask",
        "FluxPipeline": "a text-to-image model, which takes no references",
        "FluxImg2ImgPipeline": "a text-to-image model, which starts from an image instead of taking references",
        "FluxInpaintPipeline": "a text-to-image model for inpainting, which takes no references",
        "FluxFillPipeline": "a model for inpainting, whose latents have the image and the mask as more channels",
        "FluxControlPipeline": "a model whose latents have a control image as more channels",
        "FluxControlImg2ImgPipeline": "a model whose latents have a control image as more channels",
        "FluxControlInpaintPipeline": "a model whose latents have a control image as more channels",
        "FluxControlNetPipeline": "a text-to-image model with a ControlNet, which takes no references",
        "FluxControlNetImg2ImgPipeline": "a text-to-image model with a ControlNet, which takes no references",
        "FluxControlNetInpaintPipeline": "a text-to-image model with a ControlNet, which takes no references",
    }
    replaced = replaced_parts(
        _MODEL, "FluxTransformer2DModel", "Flux", "FluxPosEmbed", (f"{_MODEL}:FluxAttention",) * 2,
        ("torch.nn:RMSNorm",) * 2, PackedFlux1.ends,
    )  # fmt: skip
    packed = PackedFlux1
    random_models = "uniref_fast.random_models.flux1"

    def defaults(self, index: Mapping[str, Any]) -> tuple[int, float]:
        return 28, 3.5

    def scale_argument(self, pipe: Any) -> str:
        return "guidance_scale" if pipe.transformer.config.guidance_embeds else "true_cfg_scale"

    def usual_negative_prompt(self) -> None:
        return None

    def most_references(self, pipe: Any) -> int:
        return 1

    def text_encoders(self, pipe: Any) -> tuple[Any, ...]:
        return pipe.text_encoder, pipe.text_encoder_2

    def stock_arguments(self, pipe: Any, request: EditRequest) -> dict[str, Any]:
        given = super().stock_arguments(pipe, request)
        if pipe.transformer.config.guidance_embeds:
            given.pop("negative_prompt", None)
        width = pipe.transformer.config.joint_attention_dim
        for name, pooled in (("prompt_embeds", "pooled_prompt_embeds"),
                             ("negative_prompt_embeds", "negative_pooled_prompt_embeds")):  # fmt: skip
            if name in given:
                given[name], given[pooled] = given[name][..., :width], given[name][:, 0, width:]
        sizes = self.geometry(pipe, [image.size for image in request.images], request.width, request.height)
        width, height = sizes.size
        return given | {
            "width": width, "height": height, "max_area": width * height, "_auto_resize": _auto_resize(pipe)
        }  # fmt: skip

    def check_parts(self, pipe: Any, given: str) -> None:
        widths = [("in_channels", "VAE", pipe.vae.config.latent_channels * 4)]
        if pipe.text_encoder is not None:
            widths.append(("pooled_projection_dim", "text encoder", pipe.text_encoder.config.hidden_size))
        if pipe.text_encoder_2 is not None:
            widths.append(("joint_attention_dim", "second text encoder", pipe.text_encoder_2.config.d_model))
        check_widths(given, pipe.transformer.config, widths)

    def check_request(self, pipe: Any, request: EditRequest, where: str) -> EditRequest:
        """Refuse more than one image, and a negative prompt where the transformer embeds the guidance scale."""
        if len(request.images) > 1:
            raise ValueError(
                f"{where}: a FluxKontextPipeline takes at most one image per request, got {len(request.images)}; in "
                "diffusers a list of images is a batch of edits. Give a request for each image, or put the images side "
                "by side into one"
            )
        refuse_masks(request, where)
        if pipe.text_encoder_2 is None and any(embeds is None for _, embeds, _ in request.texts):
            raise ValueError(f"{where}: the pipeline has no second text encoder; give prompt_embeds")
        if not pipe.transformer.config.guidance_embeds:
            return request
        if (request.negative_prompt or "").strip() or request.negative_prompt_embeds is not None:
            raise ValueError(
                f"{where}: edit takes no negative prompt for this model: true_cfg_scale is the guidance scale that its "
                "transformer embeds. For classifier-free guidance in addition, call the pipeline, patched or not"
            )
        return replace(request, negative_prompt=None)

    def embedded_guidance(self, pipe: Any, request: EditRequest) -> float | None:
        return request.true_cfg_scale if pipe.transformer.config.guidance_embeds else None

    def image_areas(self, pipe: Any) -> tuple[int, int, int]:
        return AREA, AREA, (pipe.default_sample_size * pipe.vae_scale_factor) ** 2

    def geometry(
        self,
        pipe: Any,
        sizes: Sequence[tuple[int, int]],
        width: int | None = None,
        height: int | None = None,
        budget: int | None = None,
    ) -> Geometry:
        patch, side = pipe.vae_scale_factor * 2, pipe.default_sample_size * pipe.vae_scale_factor
        result = (width or side) // patch * patch, (height or side) // patch * patch
        if budget is None:
            references = [_reference_size(size, patch, _auto_resize(pipe)) for size in sizes]
        else:
            references = fit_to_budget(sizes, budget)
        return Geometry(result, (), tuple(references), patch)

    def encode_prompt(
        self,
        pipe: Any,
        prompt: str | None,
        images: Sequence[Image.Image],
        sizes: Sequence[tuple[int, int]],
        embeds: Tensor | None = None,
        mask: Tensor | None = None,
        device: Any = None,
        cast: bool = True,
    ) -> tuple[Tensor, Text]:
        """Return the embeddings of the tokens with that of the whole prompt after them, in every row."""
        device = device or pipe._execution_device
        given, _ = given_embeddings(pipe, embeds, None, device, cast)
        if given is not None:
            return given[0], given.shape[1]
        tokens, pooled, _ = pipe.encode_prompt(
            prompt=prompt, prompt_2=None, device=device, num_images_per_prompt=1, max_sequence_length=TEXT_LENGTH
        )
        whole = pooled.to(tokens.dtype).expand(tokens.shape[1], -1)
        return torch.cat([tokens[0], whole], dim=-1), tokens.shape[1]

    # ---- what an edit costs ----

    def prompt_text(self, pipe: Any, prompt: str, sizes: Sequence[tuple[int, int]]) -> int:
        return TEXT_LENGTH

    def embedding_flops(self, config: Any, layout: SelfLayout) -> int:
        width = config.num_attention_heads * config.attention_head_dim
        rows = config.pooled_projection_dim + width + bool(layout.guidance) * (256 + width)
        return layout.num_samples * rows * width

    def text_encoder_cost(self, pipe: Any, sizes: list[Geometry], texts: list[list[int]]) -> tuple[int, int]:
        clip, t5 = pipe.text_encoder.config, pipe.text_encoder_2.config
        pooled = 4 * clip.hidden_size**2 + 2 * clip.hidden_size * clip.intermediate_size
        flops = clip.num_hidden_layers * 2 * POOLED_LENGTH * (pooled + 2 * POOLED_LENGTH * clip.hidden_size)
        inner, linears = t5.num_heads * t5.d_kv, 3 if t5.is_gated_act else 2
        layer = 4 * t5.d_model * inner + linears * t5.d_model * t5.d_ff
        flops += t5.num_layers * 2 * TEXT_LENGTH * (layer + 2 * TEXT_LENGTH * inner)
        states = 2 * t5.d_model + linears * t5.d_ff + t5.num_heads * TEXT_LENGTH  # attention keeps its scores
        element = compute_dtype(pipe.text_encoder_2).itemsize
        return sum(map(len, texts)) * flops, TEXT_LENGTH * states * element


def _auto_resize(pipe: Any) -> bool:
    """Return False if references keep their sizes: the attribute `auto_resize` of the pipeline."""
    return getattr(pipe, "auto_resize", True)


def _reference_size(size: tuple[int, int], patch: int, auto_resize: bool) -> tuple[int, int]:
    """Return the size that the pipeline gives a reference: the preferred one with the most similar aspect ratio."""
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

    width, height = (side - side % patch for side in size)
    if auto_resize and width and height:
        ratio = width / height
        _, width, height = min((abs(ratio - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
    return width // patch * patch, height // patch * patch


FLUX_1 = Flux1()
