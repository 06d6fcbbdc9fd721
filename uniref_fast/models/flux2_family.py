"""FLUX.2 as a family: the pipelines around the transformer, and what they cost.

The packed model is in `uniref_fast.models.flux2`. Text always has the 512 tokens to which the pipelines pad it, since
their transformers attend to the padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from uniref_fast.budget import fit_to_budget
from uniref_fast.layout import SelfLayout
from uniref_fast.models.family import UNMARKED_REFERENCES, Family, SizedImages, Sizes, Text
from uniref_fast.models.family_checks import (
    check_options,
    check_rotary_axes,
    check_widths,
    refuse_masks,
    refuse_negative_prompt,
    refused_image,
    with_negative_prompt,
)
from uniref_fast.models.flux2 import PackedFlux2, has_clean_references
from uniref_fast.models.image_sizes import at_most, result_size
from uniref_fast.models.kept_references import step_cost
from uniref_fast.models.latents import batch_statistics
from uniref_fast.models.replaced import CONTINUOUS_NORM, PROJECTIONS, QK_NORMS, Replaced, layer_norms, rms_norms
from uniref_fast.models.text_encoder_costs import language_cost
from uniref_fast.request import EditRequest, Geometry
from uniref_fast.schedule import denoising_schedule, resolution_shift
from uniref_fast.visibility import Rule

__all__ = ["AREA", "FLUX_2", "Flux2"]

AREA = 1024 * 1024
"""Largest area of a reference in pixels."""

TEXT_LENGTH = 512
"""Number of text tokens, padding included."""

TEXT_LAYERS = 3
"""Number of layers of the text encoder whose outputs are concatenated."""

GUIDANCE = 3.5
"""Guidance scale that a transformer with guidance embeddings gets in training unless a run gives another."""

_MODEL = "diffusers.models.transformers.transformer_flux2"
_BLOCK, _SINGLE = "transformer_blocks.*", "single_transformer_blocks.*"

REPLACED = (
    Replaced("", f"{_MODEL}:Flux2Transformer2DModel", calls=PackedFlux2.ends, reads=("config",), onloaded=True),
    Replaced("pos_embed", f"{_MODEL}:Flux2PosEmbed"),
    *CONTINUOUS_NORM,
    Replaced(_BLOCK, f"{_MODEL}:Flux2TransformerBlock", calls=("ff", "ff_context"), onloaded=True),
    Replaced(_SINGLE, f"{_MODEL}:Flux2SingleTransformerBlock", onloaded=True),
    *layer_norms(_BLOCK, ("norm1", "norm1_context", "norm2", "norm2_context")),
    *layer_norms(_SINGLE, ("norm",)),
    Replaced(f"{_BLOCK}.attn", f"{_MODEL}:Flux2Attention", calls=PROJECTIONS, reads=("heads", "inner_dim")),
    Replaced(
        f"{_SINGLE}.attn", f"{_MODEL}:Flux2ParallelSelfAttention", calls=("to_qkv_mlp_proj", "mlp_act_fn", "to_out"),
        reads=("heads", "head_dim", "inner_dim", "mlp_hidden_dim", "mlp_mult_factor"),
    ),
    *rms_norms(f"{_BLOCK}.attn", QK_NORMS),
    *rms_norms(f"{_SINGLE}.attn", QK_NORMS[:2]),
)  # fmt: skip


class Flux2(Family):
    """FLUX.2 dev, klein and klein-KV."""

    name = "flux2"
    models = (
        "black-forest-labs/FLUX.2-klein-4B",
        "black-forest-labs/FLUX.2-klein-9B",
        "black-forest-labs/FLUX.2-klein-9b-kv",
        "black-forest-labs/FLUX.2-klein-base-4B",
        "black-forest-labs/FLUX.2-klein-base-9B",
        "black-forest-labs/FLUX.2-dev",
    )
    transformer = "Flux2Transformer2DModel"
    pipelines = ("Flux2KleinPipeline", "Flux2KleinKVPipeline", "Flux2Pipeline")
    other_pipelines: ClassVar[Mapping[str, str]] = {
        "Flux2KleinInpaintPipeline": "a pipeline for inpainting, which starts from an image and a mask",
    }
    missing: ClassVar[Mapping[str, str]] = {
        "patch_keep_references": UNMARKED_REFERENCES,
    }
    replaced = REPLACED
    packed = PackedFlux2
    exact_references = "Flux2KleinKVPipeline: always; the others: never"
    random_models = "uniref_fast.random_models.flux2"
    loads_lokr = True

    def defaults(self, index: Mapping[str, Any]) -> tuple[int, float]:
        """Return the defaults of the pipeline; a distilled model needs 4 steps, and guidance is part of it."""
        distilled = index.get("is_distilled") or index.get("_class_name") == "Flux2KleinKVPipeline"
        return (4, 1.0) if distilled else (50, 4.0)

    # ---- the packed model ----

    def check_config(self, given: str, config: Mapping[str, Any], instead: str) -> None:
        check_options(given, config, {"patch_size": 1}, instead)
        check_rotary_axes(given, config, (32, 32, 32, 32), instead)

    def built(self, config: dict[str, Any], layout: SelfLayout) -> Any:
        transformer = super().built(config, layout)
        return _of_klein_kv(transformer) if layout.clean_references else transformer

    def adopted(self, pipe: Any, transformer: Any) -> Any:
        return _of_klein_kv(transformer) if has_clean_references(pipe.transformer) else transformer

    def keeps_references(self, transformer: Any) -> bool:
        return has_clean_references(transformer)

    # ---- the pipeline around the transformer ----

    def check_parts(self, pipe: Any, given: str) -> None:
        from diffusers import Flux2KleinKVPipeline

        is_clean = has_clean_references(pipe.transformer)
        if is_clean != isinstance(pipe, Flux2KleinKVPipeline):
            kind = ("Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor")
            kind_kv = ("Flux2KVAttnProcessor", "Flux2KVParallelSelfAttnProcessor")
            (found, _), (first, second) = (kind_kv, kind) if is_clean else (kind, kind_kv)
            raise ValueError(
                f"{given} has a transformer with the attention processor {found}, which is that of another pipeline: a "
                f"Flux2KleinKVPipeline sets its own on every pipeline that shares its transformer. Load {given} again, "
                f"or set the attention processors {first} (blocks with two streams) and {second} (the others)"
            )
        widths = [("in_channels", "VAE", pipe.vae.config.latent_channels * 4)]
        if pipe.text_encoder is not None:
            width = pipe.text_encoder.config.get_text_config().hidden_size * TEXT_LAYERS
            widths.append(("joint_attention_dim", "text encoder", width))
        check_widths(given, pipe.transformer.config, widths)

    def image_refusal(self, pipe: Any, sizes: Sizes) -> str | None:
        return refused_image(pipe, sizes)

    def check_request(self, pipe: Any, request: EditRequest, where: str) -> EditRequest:
        """Set the negative prompt and the scale that the pipeline would use."""
        refuse_masks(request, where)
        if reason := self._no_negative_prompt(pipe):
            refuse_negative_prompt(pipe, request, where, reason)
            scale = request.true_cfg_scale if pipe.transformer.config.guidance_embeds else 1.0
            return replace(request, negative_prompt=None, true_cfg_scale=scale)
        request = with_negative_prompt(pipe, request, where, self.usual_negative_prompt())
        is_blank = request.negative_prompt is not None and not request.negative_prompt.strip()
        return replace(request, negative_prompt="") if is_blank else request

    def embedded_guidance(self, pipe: Any, request: EditRequest) -> float | None:
        return request.true_cfg_scale if pipe.transformer.config.guidance_embeds else None

    def _no_negative_prompt(self, pipe: Any) -> str | None:
        """Return the reason why a pipeline predicts for one prompt only; None if it has classifier-free guidance."""
        return _EMBEDDED if pipe.transformer.config.guidance_embeds else _one_prompt(self.index(pipe))

    def image_areas(self, pipe: Any) -> tuple[int, int, int]:
        return AREA, AREA, (pipe.default_sample_size * pipe.vae_scale_factor) ** 2

    def geometry(
        self, pipe: Any, sizes: Sizes, width: int | None = None, height: int | None = None, budget: int | None = None
    ) -> Geometry:
        patch = self.token_side(pipe)
        alone = [at_most(size, AREA, patch) for size in sizes]
        usual = alone[0] if alone else (pipe.default_sample_size * pipe.vae_scale_factor,) * 2
        references = alone if budget is None else fit_to_budget(sizes, budget)
        return Geometry(result_size(width, height, usual, patch), (), tuple(references), patch)

    def schedule(self, pipe: Any, tokens: int, steps: int, device: torch.device | str) -> Any:
        scheduler, mu = pipe.scheduler, _stock().compute_empirical_mu(tokens, steps)
        is_own = bool(scheduler.config.get("use_flow_sigmas"))
        return denoising_schedule(scheduler, tokens, steps, device, mu=mu, own_sigmas=is_own)

    def encoded(
        self, pipe: Any, prompt: str, images: Sequence[Image.Image], sizes: Sizes, device: Any
    ) -> tuple[Tensor, Text]:
        embeds, _ = pipe.encode_prompt(
            prompt=prompt, device=device, num_images_per_prompt=1, max_sequence_length=TEXT_LENGTH
        )
        return embeds[0], embeds.shape[1]

    def encode_image(self, pipe: Any, image: Image.Image, size: tuple[int, int], device: Any = None) -> Tensor:
        width, height = size
        processor = pipe.image_processor
        if size != at_most(image.size, AREA, self.token_side(pipe)):  # of a joint budget
            image = image.resize(size, Image.Resampling.LANCZOS)
        elif image.width * image.height > AREA:
            image = processor._resize_to_target_area(image, AREA)
        pixels = processor.preprocess(image, height=height, width=width, resize_mode="crop")
        latents, _ = pipe.prepare_image_latents(
            images=[pixels], batch_size=1, generator=None, device=device or pipe._execution_device, dtype=pipe.vae.dtype
        )
        return latents[0]

    def prepared_latents(
        self, pipe: Any, request: EditRequest, sizes: Geometry, images: SizedImages, dtype: torch.dtype, generator: Any
    ) -> tuple[Tensor, Tensor | None]:
        width, height = sizes.size
        channels, given = pipe.transformer.config.in_channels, request.latents
        if given is not None:
            given = given.transpose(1, 2).unflatten(2, self.token_grid(pipe, sizes.size))
        latents, _ = pipe.prepare_latents(
            batch_size=request.num_images, num_latents_channels=channels // 4, height=height, width=width, dtype=dtype,
            device=pipe._execution_device, generator=generator, latents=given,
        )  # fmt: skip
        return latents, None

    def vae_latents(self, pipe: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
        latents = latents.transpose(1, 2).unflatten(2, self.token_grid(pipe, size))
        mean, std = batch_statistics(pipe.vae, latents)
        return pipe._unpatchify_latents(latents * std + mean)

    # ---- training ----

    def training_guidance(self, config: Any) -> float | None:
        return GUIDANCE if config.guidance_embeds else None

    def training_shift(self, pipe: Any, tokens: int) -> float:
        """Return the shift that the pipeline has with its usual number of steps, on which its shift depends too."""
        mu = _stock().compute_empirical_mu(tokens, self.defaults(self.index(pipe))[0])
        return resolution_shift(pipe.scheduler.config, tokens, mu)

    def unguided(self, index: Mapping[str, Any]) -> str | None:
        return _EMBEDDED if index.get("_class_name") == "Flux2Pipeline" else _one_prompt(index)

    def prompt_template(self, pipe: Any) -> Any:
        return [pipe.tokenizer.chat_template, getattr(pipe, "system_message", None), TEXT_LENGTH]

    # ---- what an edit costs ----

    def prompt_text(self, pipe: Any, prompt: str, sizes: Sizes) -> int:
        return TEXT_LENGTH

    def transformer_flops(
        self, config: Any, layout: SelfLayout, visibility: str | Rule, kept: bool = False
    ) -> tuple[int, int]:
        layout, area, last = step_cost(layout, visibility, kept)
        width = config.num_attention_heads * config.attention_head_dim
        tokens, targets, rows = layout.joint_length, sum(s.length for s in layout.targets), layout.num_modulation_rows
        double, single, mlp = config.num_layers, config.num_single_layers, int(width * config.mlp_ratio)
        first, second = (3 * width + 2 * mlp) * width, (width + mlp) * width  # of both kinds of block
        linear = double * (first + second) * tokens + single * first * tokens
        linear += second * ((single - 1) * tokens + targets)
        embeddings = 1 + bool(layout.guidance)
        linear += rows * (
            embeddings * (config.timestep_guidance_channels + width) * width + 15 * width**2 + 2 * width**2
        )
        linear += (layout.image_length * config.in_channels + layout.text_length * config.joint_attention_dim) * width
        linear += targets * width * (config.out_channels or config.in_channels)
        return 2 * linear, 4 * ((double + single - 1) * area + last) * width

    def text_encoder_cost(self, pipe: Any, sizes: list[Geometry], texts: list[list[int]]) -> tuple[int, int]:
        return language_cost(pipe.text_encoder, [TEXT_LENGTH for lengths in texts for _ in lengths])


def _of_klein_kv(transformer: Any) -> Any:
    """Set the attention processors of klein-KV on a transformer, and return it."""
    from diffusers import Flux2KleinKVPipeline

    Flux2KleinKVPipeline._set_kv_attn_processors(SimpleNamespace(transformer=transformer))
    return transformer


_EMBEDDED = "true_cfg_scale is the guidance scale that its transformer embeds"


def _one_prompt(index: Mapping[str, Any]) -> str | None:
    """Return the reason why a pipeline without guidance embeddings predicts for one prompt only, or None."""
    if not str(index.get("_class_name")).endswith("KleinPipeline"):
        return "it has no classifier-free guidance"
    return "the model is distilled, and guidance is part of it" if index.get("is_distilled") else None


def _stock() -> Any:
    """Return diffusers' module of the pipeline, imported when first needed."""
    from diffusers.pipelines.flux2 import pipeline_flux2

    return pipeline_flux2


FLUX_2 = Flux2()
