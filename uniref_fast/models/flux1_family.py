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
from uniref_fast.layout import SelfLayout
from uniref_fast.models.family import (
    EDIT_ONLY,
    UNMARKED_REFERENCES,
    Family,
    SizedImages,
    Sizes,
    Text,
    prepared_references,
)
from uniref_fast.models.family_checks import check_options, check_rotary_axes, check_widths, refuse_masks
from uniref_fast.models.flux1 import PackedFlux1
from uniref_fast.models.image_sizes import result_size, whole_tokens
from uniref_fast.models.kept_references import step_cost
from uniref_fast.models.replaced import (
    CONTINUOUS_NORM,
    NORMS,
    PROJECTIONS,
    QK_NORMS,
    Replaced,
    layer_norms,
    rms_norms,
)
from uniref_fast.quantised import compute_dtype
from uniref_fast.request import EditRequest, Geometry
from uniref_fast.visibility import Rule

__all__ = ["FLUX_1", "Flux1", "Flux1Family", "FluxVaeFamily", "replaced_parts"]

AREA = 1024 * 1024
"""Area of a result in pixels, and about that of a reference."""

TEXT_LENGTH = 512
"""Number of text tokens, padding included."""

POOLED_LENGTH = 77
"""Number of tokens of the encoder of the whole prompt."""

_BLOCK, _SINGLE = "transformer_blocks.*", "single_transformer_blocks.*"


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
        *CONTINUOUS_NORM,
        Replaced(_BLOCK, f"{module}:{blocks}TransformerBlock", calls=("ff", "ff_context"), onloaded=True),
        Replaced(
            _SINGLE, f"{module}:{blocks}SingleTransformerBlock", calls=("proj_mlp", "act_mlp", "proj_out"),
            onloaded=True,
        ),
        *(Replaced(f"{_BLOCK}.{name}", f"{NORMS}:{ada}", calls=("silu", "linear"))
          for name in ("norm1", "norm1_context")),
        Replaced(f"{_SINGLE}.norm", f"{NORMS}:{ada}Single", calls=("silu", "linear")),
        *layer_norms(_BLOCK, ("norm1.norm", "norm1_context.norm", "norm2", "norm2_context")),
        *layer_norms(_SINGLE, ("norm.norm",)),
        Replaced(f"{_BLOCK}.attn", attention[0], calls=PROJECTIONS, reads=("heads", "inner_dim")),
        Replaced(f"{_SINGLE}.attn", attention[1], calls=PROJECTIONS[:3], reads=("heads", "inner_dim")),
        *rms_norms(f"{_BLOCK}.attn", QK_NORMS, norms[0]),
        *rms_norms(f"{_SINGLE}.attn", QK_NORMS[:2], norms[1]),
    )  # fmt: skip


class Flux1Family(Family):
    """A family whose transformer has the blocks of FLUX.1."""

    packed: type[PackedFlux1]
    missing: ClassVar[Mapping[str, str]] = {"patch_keep_references": UNMARKED_REFERENCES, **EDIT_ONLY}

    # ---- the packed model ----

    def check_config(self, given: str, config: Mapping[str, Any], instead: str) -> None:
        check_options(given, config, {"patch_size": 1}, instead)
        check_rotary_axes(given, config, (16, 56, 56), instead)
        if not config.get("num_single_layers", 1):
            raise ValueError(
                f"{given} has a transformer without blocks with one stream, which is not supported; {instead}"
            )

    # ---- what an edit costs ----

    def embedding_flops(self, config: Any, layout: SelfLayout) -> int:
        """Return the multiplications of the embeddings beside those of latents, text and time."""
        return 0

    def transformer_flops(
        self, config: Any, layout: SelfLayout, visibility: str | Rule, kept: bool = False
    ) -> tuple[int, int]:
        linear = self.embedding_flops(config, layout)
        layout, area, last = step_cost(layout, visibility, kept)
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
        return 2 * linear, 4 * ((double + single - 1) * area + last) * width


class FluxVaeFamily(Flux1Family):
    """A family with the VAE of FLUX.1, and latents of 2 x 2 pixels in a token.

    Attributes:
        latent_arguments: Further arguments of the pipeline's `prepare_latents`, after the dtype.
    """

    latent_arguments: tuple[Any, ...] = ()

    def encode_image(self, pipe: Any, image: Image.Image, size: tuple[int, int], device: Any = None) -> Tensor:
        pixels = self._pixels(pipe, image, size).to(device or pipe._execution_device, pipe.vae.dtype)
        latents = pipe._encode_vae_image(image=pixels, generator=None)
        return pipe._pack_latents(latents, 1, *latents.shape[1:])[0]

    def prepared_latents(
        self, pipe: Any, request: EditRequest, sizes: Geometry, images: SizedImages, dtype: torch.dtype, generator: Any
    ) -> tuple[Tensor, Tensor | None]:
        width, height = sizes.size
        pixels = self._pixels(pipe, *images[0]) if images else None
        latents, packed = pipe.prepare_latents(
            pixels, request.num_images, pipe.transformer.config.in_channels // 4, height, width, dtype,
            *self.latent_arguments, pipe._execution_device, generator, request.latents,
        )[:2]  # fmt: skip
        return latents, prepared_references(latents, packed, images)

    def _pixels(self, pipe: Any, image: Image.Image, size: tuple[int, int]) -> Tensor:
        width, height = size
        processor = pipe.image_processor
        return processor.preprocess(processor.resize(image, height, width), height, width)

    def vae_latents(self, pipe: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
        width, height = size
        latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
        return latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor


_MODEL = "diffusers.models.transformers.transformer_flux"


class Flux1(FluxVaeFamily):
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
        self, pipe: Any, sizes: Sizes, width: int | None = None, height: int | None = None, budget: int | None = None
    ) -> Geometry:
        patch, side = self.token_side(pipe), pipe.default_sample_size * pipe.vae_scale_factor
        if budget is None:
            references = [_reference_size(size, patch, _auto_resize(pipe)) for size in sizes]
        else:
            references = fit_to_budget(sizes, budget)
        return Geometry(result_size(width, height, (side, side), patch), (), tuple(references), patch)

    def encoded(
        self, pipe: Any, prompt: str, images: Sequence[Image.Image], sizes: Sizes, device: Any
    ) -> tuple[Tensor, Text]:
        """Return the embeddings of the tokens with that of the whole prompt after them, in every row."""
        tokens, pooled, _ = pipe.encode_prompt(
            prompt=prompt, prompt_2=None, device=device, num_images_per_prompt=1, max_sequence_length=TEXT_LENGTH
        )
        whole = pooled.to(tokens.dtype).expand(tokens.shape[1], -1)
        return torch.cat([tokens[0], whole], dim=-1), tokens.shape[1]

    # ---- what an edit costs ----

    def prompt_text(self, pipe: Any, prompt: str, sizes: Sizes) -> int:
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

    width, height = whole_tokens(size, patch)
    if auto_resize and width and height:
        ratio = width / height
        _, width, height = min((abs(ratio - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
    return whole_tokens((width, height), patch)


FLUX_1 = Flux1()
