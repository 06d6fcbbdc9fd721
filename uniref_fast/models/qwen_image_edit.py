"""Qwen-Image-Edit as a family: the pipeline around the transformer, and what it costs.

The packed model is in `uniref_fast.models.qwen_image`. `QwenImageEditPlusPipeline` takes any number of references; the
first generation, `QwenImageEditPipeline`, takes one, which the text encoder and the VAE see at the same size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from uniref_fast.budget import fit_to_budget
from uniref_fast.builtin.store import AREAS, recorded_areas
from uniref_fast.guidance import guide
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.models.family import Sizes, Text
from uniref_fast.models.family_checks import check_options, check_rotary_axes, check_widths
from uniref_fast.models.image_sizes import result_size
from uniref_fast.models.kept_references import step_cost
from uniref_fast.models.qwen_image import PackedQwenImage
from uniref_fast.models.qwen_pipeline import QwenFamily
from uniref_fast.models.replaced import (
    CONTINUOUS_NORM,
    NORMS,
    PROJECTIONS,
    QK_NORMS,
    Replaced,
    layer_norms,
    rms_norms,
)
from uniref_fast.models.text_encoder_costs import condition_tokens, vision_language_cost
from uniref_fast.request import Geometry
from uniref_fast.visibility import Rule

__all__ = ["QWEN_IMAGE_EDIT", "QwenImageEdit"]

DEFAULT_OUTPUT_AREA = 1024 * 1024
FIRST = "QwenImageEditPipeline"

LAYOUT = {
    "patch_size": 2,
    "guidance_embeds": False,
    "use_additional_t_cond": False,
    "use_layer3d_rope": False,
}
"""Options of the transformer that change its layout or its inputs, with the values that the packed model supports."""

_QWEN = "diffusers.models.transformers.transformer_qwenimage"
_BLOCK, _ATTN = "transformer_blocks.*", "transformer_blocks.*.attn"

REPLACED = (
    Replaced(
        "", f"{_QWEN}:QwenImageTransformer2DModel",
        calls=("img_in", "txt_norm", "txt_in", "time_text_embed", "proj_out"), reads=("config",), onloaded=True,
    ),
    Replaced("pos_embed", f"{_QWEN}:QwenEmbedRope", ("forward", "_compute_video_freqs")),
    *CONTINUOUS_NORM,
    Replaced(
        _BLOCK, f"{_QWEN}:QwenImageTransformerBlock", ("forward", "_modulate"),
        calls=("img_mod", "txt_mod", "img_mlp", "txt_mlp"), onloaded=True,
    ),
    *layer_norms(_BLOCK, ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2")),
    Replaced(
        _ATTN, "diffusers.models.attention_processor:Attention", calls=PROJECTIONS, reads=("heads", "inner_dim"),
    ),
    *rms_norms(_ATTN, QK_NORMS, f"{NORMS}:RMSNorm", optional=True),
)  # fmt: skip


class QwenImageEdit(QwenFamily):
    """Qwen-Image-Edit of all generations, and the models that share its modules."""

    name = "qwen-image-edit"
    models = (
        "Qwen/Qwen-Image-Edit-2511",
        "Qwen/Qwen-Image-Edit-2509",
        "FireRedTeam/FireRed-Image-Edit-1.1",
        "FireRedTeam/FireRed-Image-Edit-1.0",
        "Qwen/Qwen-Image-Edit",
    )
    transformer = "QwenImageTransformer2DModel"
    pipelines = ("QwenImageEditPlusPipeline", FIRST)
    other_pipelines: ClassVar[Mapping[str, str]] = {
        "QwenImageEditInpaintPipeline": "the first generation of Qwen-Image-Edit, for inpainting",
        "QwenImagePipeline": "a text-to-image model, which takes no references",
        "QwenImageImg2ImgPipeline": "a text-to-image model, which starts from an image instead of taking references",
        "QwenImageInpaintPipeline": "a text-to-image model for inpainting, which takes no references",
        "QwenImageControlNetPipeline": "a text-to-image model with a ControlNet, which takes no references",
        "QwenImageControlNetInpaintPipeline": "a text-to-image model with a ControlNet, which takes no references",
        "QwenImageLayeredPipeline": "a model that splits one image into layers",
    }
    untrained: ClassVar[Mapping[str, str]] = {FIRST: "it takes exactly one reference; train on 2511 or 2509"}
    replaced = REPLACED
    packed = PackedQwenImage
    exact_references = 'visibility="reference_causal" or "reference_isolated", and zero_cond_t (2511)'
    random_models = "uniref_fast.random_models.qwen_image_edit"

    # ---- the packed model ----

    def layout(self, config: Any, samples: Sequence[Sample]) -> SelfLayout:
        return SelfLayout.qwen(samples, zero_cond_t=bool(config.zero_cond_t))

    def check_config(self, given: str, config: Mapping[str, Any], instead: str) -> None:
        check_options(given, config, LAYOUT, instead)
        check_rotary_axes(given, config, (16, 56, 56), instead)

    # ---- the pipeline around the transformer ----

    def check_parts(self, pipe: Any, given: str) -> None:
        config, parts = pipe.transformer.config, pipe.components
        widths = [("in_channels", "VAE", parts["vae"].config.z_dim * config.patch_size**2)]
        if (encoder := parts["text_encoder"]) is not None:
            widths.append(("joint_attention_dim", "text encoder", encoder.config.get_text_config().hidden_size))
        check_widths(given, config, widths)

    def image_areas(self, pipe: Any) -> tuple[int, int, int]:
        """Return the areas from the pipeline's attributes, else its transformer's configuration, else diffusers."""
        if _is_first(pipe):
            return (DEFAULT_OUTPUT_AREA,) * 3
        stock = _stock()
        usual = zip(AREAS, (stock.CONDITION_IMAGE_SIZE, stock.VAE_IMAGE_SIZE, DEFAULT_OUTPUT_AREA), strict=True)
        recorded = recorded_areas({}, pipe.transformer.config)
        condition, vae, output = (getattr(pipe, name, recorded.get(name, area)) for name, area in usual)
        return condition, vae, output

    def geometry(
        self, pipe: Any, sizes: Sizes, width: int | None = None, height: int | None = None, budget: int | None = None
    ) -> Geometry:
        condition_area, vae_area, output_area = self.image_areas(pipe)
        dimensions = getattr(pipe, "calculate_dimensions", _stock().calculate_dimensions)
        if _is_first(pipe):
            if len(sizes) != 1:
                raise ValueError(f"a {FIRST} takes exactly one image per request, got {len(sizes)}")
            dimensions = _first_dimensions
        elif recorded_areas({}, pipe.transformer.config):  # small, of which diffusers would round a short side to 0
            from uniref_fast.builtin.pipeline import small_dimensions as dimensions
        ratio = sizes[-1][0] / sizes[-1][1] if sizes else 1.0
        computed = dimensions(output_area, ratio)
        patch = self.token_side(pipe)
        condition = [dimensions(condition_area, w / h) for w, h in sizes]
        alone = [dimensions(vae_area, w / h) for w, h in sizes]
        references = alone if budget is None else fit_to_budget(sizes, budget)
        return Geometry(result_size(width, height, computed, patch), tuple(condition), tuple(references), patch)

    def encoded_rows(self, pipe: Any, arguments: dict[str, Any], sizes: Sizes) -> tuple[Tensor, Text]:
        embeds, mask = pipe.encode_prompt(max_sequence_length=512, **arguments)
        return self.valid_rows(embeds[0], mask)

    def latent_channels(self, config: Any) -> int:
        return config.in_channels // 4

    def prepared_pixels(self, pipe: Any, pixels: list[Tensor]) -> Any:
        return pixels[0] if _is_first(pipe) else pixels

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        return guide(positive, negative, scale)

    def unnormalised(self, latents: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return latents / (1.0 / std) + mean

    # ---- what an edit costs ----

    def prompt_text(self, pipe: Any, prompt: str, sizes: Sizes) -> int:
        pictures = "".join(f"Picture {i + 1}: <|vision_start|><|image_pad|><|vision_end|>" for i in range(len(sizes)))
        if _is_first(pipe):  # its template has the image
            pictures = ""
        tokens = pipe.tokenizer(pipe.prompt_template_encode.format(pictures + prompt))["input_ids"]
        seen = sum(condition_tokens(pipe, size) for size in sizes)
        return len(tokens) + seen - len(sizes) - pipe.prompt_template_encode_start_idx

    def transformer_flops(
        self, config: Any, layout: SelfLayout, visibility: str | Rule, kept: bool = False
    ) -> tuple[int, int]:
        layout, area, last = step_cost(layout, visibility, kept)
        width = config.num_attention_heads * config.attention_head_dim
        text, image, targets = layout.text_length, layout.image_length, sum(s.length for s in layout.targets)
        rows, samples = layout.num_modulation_rows, layout.num_samples
        blocks = config.num_layers
        out = config.patch_size**2 * config.out_channels
        qkv, rest = 3 * width**2, 9 * width**2  # output projection and the 4x feed-forward
        linear = blocks * qkv * (text + image) + (blocks - 1) * rest * (text + image) + rest * targets
        linear += blocks * 6 * width**2 * (rows + samples)  # modulation of both streams
        linear += rows * (256 * width + width**2) + rows * 2 * width**2  # timestep embedding, last modulation
        linear += image * config.in_channels * width + text * config.joint_attention_dim * width + targets * width * out
        return 2 * linear, 4 * ((blocks - 1) * area + last) * width

    def text_encoder_cost(self, pipe: Any, sizes: list[Geometry], texts: list[list[int]]) -> tuple[int, int]:
        prefix = pipe.prompt_template_encode_start_idx
        return vision_language_cost(pipe, sizes, [[length + prefix for length in lengths] for lengths in texts])


def _is_first(pipe: Any) -> bool:
    from diffusers import QwenImageEditPipeline

    return isinstance(pipe, QwenImageEditPipeline)


def _first_dimensions(area: int, ratio: float) -> tuple[int, int]:
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit

    width, height, _ = pipeline_qwenimage_edit.calculate_dimensions(area, ratio)
    return width, height


def _stock() -> Any:
    """Return diffusers' module of the pipeline, imported when first needed."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus

    return pipeline_qwenimage_edit_plus


QWEN_IMAGE_EDIT = QwenImageEdit()
