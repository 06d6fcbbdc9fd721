"""Qwen-Image-2.1 as a family: the pipeline around the transformer, and what it costs.

The packed model is in `uniref_fast.models.qwen_image_21`. The text encoder sees the references inside the prompt; its
positions for them are left out of the embeddings, and the text of a sample records their places.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from uniref_fast.budget import fit_to_budget
from uniref_fast.layout import REFERENCE_PLACE, Sample, SelfLayout
from uniref_fast.models.family import Sizes, Text
from uniref_fast.models.family_checks import (
    check_options,
    check_rotary_axes,
    check_widths,
    refuse_embeddings_of_references,
)
from uniref_fast.models.image_sizes import result_size
from uniref_fast.models.kept_references import step_cost
from uniref_fast.models.qwen_image_21 import PackedQwenImage21, interleaved_layout
from uniref_fast.models.qwen_pipeline import QwenFamily
from uniref_fast.models.replaced import NORMS, QK_NORMS, Replaced, layer_norms, rms_norms
from uniref_fast.models.text_encoder_costs import vision_language_cost
from uniref_fast.request import EditRequest, EncodedRequest, Geometry
from uniref_fast.schedule import denoising_schedule
from uniref_fast.visibility import Rule, block_causal

__all__ = ["QWEN_IMAGE_21", "QwenImage21"]

OUTPUT_AREA = 1024 * 1024
"""Area in pixels of references and result, unless the pipeline has an attribute `output_area`."""

SLOT = 32
"""Side in pixels of a position of the text encoder, which stands for 2 x 2 latent tokens."""

_MODEL = "diffusers.models.transformers.transformer_qwenimage21"
_BLOCK, _ATTN = "transformer_blocks.*", "transformer_blocks.*.attn"

REPLACED = (
    Replaced(
        "", f"{_MODEL}:QwenImage21Transformer2DModel", ("forward", "build_token_metadata"),
        calls=("img_in", "txt_in", "time_text_embed", "modulation", "proj_out"), reads=("config",), onloaded=True,
    ),
    Replaced("pos_embed", f"{_MODEL}:QwenImage21Rope", ("forward", "rope_params")),
    Replaced("norm_out", f"{_MODEL}:QwenImage21AdaLayerNormContinuous", calls=("silu", "linear")),
    *layer_norms("norm_out", ("norm",)),
    Replaced(
        _BLOCK, f"{_MODEL}:QwenImage21TransformerBlock", ("forward", "_modulate"), calls=("img_mlp",), onloaded=True
    ),
    *layer_norms(_BLOCK, ("img_norm1", "img_norm2")),
    Replaced(
        _ATTN, f"{_MODEL}:QwenImage21Attention", calls=("to_q", "to_k", "to_v", "to_out"), reads=("heads", "inner_dim")
    ),
    *rms_norms(_ATTN, QK_NORMS[:2], f"{NORMS}:RMSNorm"),
)  # fmt: skip


class QwenImage21(QwenFamily):
    """Qwen-Image-2.1 and 2.1-Turbo."""

    name = "qwen-image-2.1"
    models = ("Qwen/Qwen-Image-2.1", "Qwen/Qwen-Image-2.1-Turbo")
    transformer = "QwenImage21Transformer2DModel"
    pipelines = ("QwenImage21Pipeline",)
    missing: ClassVar[Mapping[str, str]] = {
        "patch_keep_references": "the pipeline of diffusers keeps text and references itself (use_kv_cache=True)",
    }
    replaced = REPLACED
    packed = PackedQwenImage21
    exact_references = "QwenImage21Pipeline with causal_condition (2.1 and Turbo): always"
    random_models = "uniref_fast.random_models.qwen_image_21"
    image_mode = "RGBA"  # the text encoder gets images over white

    def defaults(self, index: Mapping[str, Any]) -> tuple[int, float]:
        """Return the defaults of the pipeline; 2.1-Turbo has sigmas of its own, one for each step."""
        return len(index.get("sample_sigmas") or ()) or 40, 1.0

    # ---- the packed model ----

    def layout(self, config: Any, samples: Sequence[Sample]) -> SelfLayout:
        return interleaved_layout(samples, causal_condition=bool(config.causal_condition))

    def check_config(self, given: str, config: Mapping[str, Any], instead: str) -> None:
        check_options(given, config, {"patch_size": 1}, instead)
        check_rotary_axes(given, config, (16, 56, 56), instead)

    def keeps_references(self, transformer: Any) -> bool:
        return bool(transformer.config.causal_condition)

    def stock_arguments(self, pipe: Any, request: EditRequest) -> dict[str, Any]:
        resolution = round(self.image_areas(pipe)[2] ** 0.5)
        return {**super().stock_arguments(pipe, request), "output_resolution": resolution}

    # ---- the pipeline around the transformer ----

    def check_parts(self, pipe: Any, given: str) -> None:
        widths = [("in_channels", "VAE", pipe.vae.config.z_dim)]
        if pipe.text_encoder is not None:
            widths.append(("context_in_dim", "text encoder", pipe.text_encoder.config.get_text_config().hidden_size))
        check_widths(given, pipe.transformer.config, widths)

    def check_request(self, pipe: Any, request: EditRequest, where: str) -> EditRequest:
        """Refuse embeddings of prompts with references, and take the number of steps of the pipeline's own sigmas."""
        if not isinstance(request, EncodedRequest):
            refuse_embeddings_of_references(request, where)
        sigmas = pipe.config.get("sample_sigmas")
        return request if sigmas is None else replace(request, num_inference_steps=len(sigmas))

    def token_side(self, pipe: Any) -> int:
        return pipe.vae_scale_factor

    def image_areas(self, pipe: Any) -> tuple[int, int, int]:
        area = getattr(pipe, "output_area", OUTPUT_AREA)
        return area, area, area

    def geometry(
        self, pipe: Any, sizes: Sizes, width: int | None = None, height: int | None = None, budget: int | None = None
    ) -> Geometry:
        area = self.image_areas(pipe)[2]
        dimensions = _stock().calculate_dimensions
        computed = dimensions(area, sizes[-1][0] / sizes[-1][1] if sizes else 1.0)
        references = reference_sizes(sizes, area, budget)
        # One resize feeds the text encoder and the VAE.
        result = result_size(width, height, computed, SLOT)
        return Geometry(result, tuple(references), tuple(references), self.token_side(pipe))

    def schedule(self, pipe: Any, tokens: int, steps: int, device: torch.device | str) -> Any:
        return denoising_schedule(pipe.scheduler, tokens, steps, device, sigmas=pipe.config.get("sample_sigmas"))

    def encoded_rows(self, pipe: Any, arguments: dict[str, Any], sizes: Sizes) -> tuple[Tensor, Text]:
        embeds, mask, slots = pipe.encode_prompt(**arguments)
        if arguments["image"] is None:
            return self.valid_rows(embeds[0], mask)
        assert mask is None, "a single prompt has no padding"
        return embeds[0][~slots[0]], _text_of(slots[0].tolist(), [_slots(size) for size in sizes])

    def given_text(self, length: int, mask: Tensor | None) -> Text:
        """Keep padding at the end too: it moves the rotary position of the target, which comes after it."""
        runs = [] if mask is None else itertools.groupby(mask.reshape(-1).bool().tolist())
        found = tuple((len([*group]), valid) for valid, group in runs)
        return length if all(valid for _, valid in found) else found

    def latent_channels(self, config: Any) -> int:
        return config.in_channels

    def unnormalised(self, latents: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return latents * std + mean

    # ---- training ----

    def prompt_template(self, pipe: Any) -> Any:
        return [pipe.prompt_template_t2i, pipe.prompt_template_ti2i]

    # ---- what an edit costs ----

    def prompt_text(self, pipe: Any, prompt: str, sizes: Sizes) -> Text:
        if sizes:
            first, *more = (f"<image{i}><|vision_start|><|image_pad|><|vision_end|>" for i in range(1, len(sizes) + 1))
            template = pipe.prompt_template_ti2i.replace(first, " ".join([first, *more]))
        else:
            template = pipe.prompt_template_t2i
        tokens = pipe.processor.tokenizer(template.format(prompt or " "))["input_ids"][pipe._drop_idx :]
        text = _text_of([token == pipe._img_token_id for token in tokens], [1] * len(sizes))
        return text if sizes else len(tokens)

    def transformer_flops(
        self, config: Any, layout: SelfLayout, visibility: str | Rule, kept: bool = False
    ) -> tuple[int, int]:
        rule = block_causal if visibility == "full" else visibility
        layout, area, last = step_cost(layout, rule, kept)
        width = config.num_attention_heads * config.attention_head_dim
        tokens, targets, rows = layout.joint_length, sum(s.length for s in layout.targets), layout.num_modulation_rows
        blocks = config.num_layers
        rest = width**2 * (1 + 3 * config.mlp_ratio)  # output projection and the SwiGLU feed-forward
        linear = blocks * 3 * width**2 * tokens + rest * ((blocks - 1) * tokens + targets)
        linear += rows * (256 * width + width**2 + 5 * width**2)  # timestep embedding, both modulations
        linear += layout.image_length * config.in_channels * width + targets * width * config.out_channels
        linear += layout.text_length * (config.context_in_dim * width + width**2)
        return 2 * linear, 4 * ((blocks - 1) * area + last) * width

    def text_encoder_cost(self, pipe: Any, sizes: list[Geometry], texts: list[list[int]]) -> tuple[int, int]:
        tokens = [
            [length + sum(map(_slots, size.condition_sizes)) + pipe._drop_idx for length in lengths]
            for size, lengths in zip(sizes, texts, strict=True)
        ]
        return vision_language_cost(pipe, sizes, tokens)


def reference_sizes(sizes: Sizes, area: int, budget: int | None = None) -> list[tuple[int, int]]:
    """Return the (width, height) in pixels that references are scaled to, multiples of 32.

    Args:
        sizes: Sizes of the images.
        area: Pixels of a reference without a joint budget.
        budget: Joint pixel budget, the side of a square in pixels; None scales each reference alone, as diffusers does.
    """
    if budget is None:
        return [_stock().calculate_dimensions(area, w / h)[:2] for w, h in sizes]
    # The sides of half the size are multiples of 16.
    halves = fit_to_budget([(max(w // 2, 1), max(h // 2, 1)) for w, h in sizes], max(budget // 2, 1))
    return [(2 * w, 2 * h) for w, h in halves]


def _slots(size: tuple[int, int]) -> int:
    """Return the number of positions of a reference of (width, height) pixels in the text encoder."""
    return (size[0] // SLOT) * (size[1] // SLOT)


def _text_of(slots: Sequence[bool], counts: Sequence[int]) -> tuple[tuple[int, bool], ...]:
    """Return the text of a sample without the positions of its references, whose places become empty runs.

    Args:
        slots: True for each position of a reference.
        counts: Positions of each reference.

    Raises:
        ValueError: If the positions are not those of these references.
    """
    runs: list[tuple[int, bool]] = []
    left = [*counts]
    for is_slot, group in itertools.groupby(slots):
        length = len(list(group))
        if not is_slot:
            runs.append((length, True))
        while is_slot and length > 0 and left:
            length -= left.pop(0)
            runs.append(REFERENCE_PLACE)
        if is_slot and length:
            left.append(-length)
            break
    if left:
        raise ValueError(
            f"the text encoder has {sum(slots)} positions for references, which need {sum(counts)}: its processor must "
            f"not resize images whose sides are multiples of {SLOT} pixels; check its min_pixels and max_pixels"
        )
    return tuple(runs)


def _stock() -> Any:
    """Return diffusers' module of the pipeline, imported when first needed."""
    from diffusers.pipelines.qwenimage21 import pipeline_qwenimage21

    return pipeline_qwenimage21


QWEN_IMAGE_21 = QwenImage21()
