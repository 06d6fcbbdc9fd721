"""Operations and peak memory of text encoders that are language models, some of which see the references."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from uniref_fast.models.families import family_of
from uniref_fast.quantised import compute_dtype
from uniref_fast.request import Geometry

__all__ = ["condition_tokens", "language_cost", "vision_language_cost"]


def language_cost(encoder: Any, lengths: Sequence[int]) -> tuple[int, int]:
    """Return operations and peak bytes of a language model that keeps the output of every layer.

    Its head counts too, because diffusers calls it, unless the model has none.

    Args:
        encoder: The language model.
        lengths: Tokens of each text, which run one after the other.
    """
    config = encoder.config.get_text_config()
    width, layers, hidden = config.hidden_size, config.num_hidden_layers, config.intermediate_size
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    layer = 2 * width * q + 2 * width * kv + 3 * width * hidden
    vocabulary = 0 if encoder.get_output_embeddings() is None else config.vocab_size
    flops = sum(layers * (2 * layer * n + 4 * n**2 * q) + 2 * width * vocabulary * n for n in lengths)
    states = (layers + 1) * width + vocabulary + 3 * hidden
    return flops, max(lengths, default=0) * states * compute_dtype(encoder).itemsize


def condition_tokens(pipe: Any, size: tuple[int, int]) -> int:
    """Return the number of tokens of a reference of (width, height) pixels in a Qwen-VL text encoder."""
    processor = _image_processor(pipe)
    return processor.get_number_of_image_patches(size[1], size[0], {}) // processor.merge_size**2


def vision_language_cost(pipe: Any, sizes: list[Geometry], tokens: list[list[int]]) -> tuple[int, int]:
    """Return operations and peak bytes of a Qwen-VL text encoder.

    Args:
        pipe: Pipeline of the requests.
        sizes: Sizes of each request.
        tokens: Tokens of each text that is encoded, by request: with the template and the references.
    """
    vision, family = pipe.text_encoder.config.vision_config, family_of(pipe)
    merge = _image_processor(pipe).merge_size ** 2
    layer = 4 * vision.hidden_size**2 + 3 * vision.hidden_size * vision.intermediate_size
    flops, peak = language_cost(pipe.text_encoder, [length for lengths in tokens for length in lengths])
    for size, lengths in zip(sizes, tokens, strict=True):
        for _, seen in zip(lengths, size.seen(family), strict=False):
            patches = [condition_tokens(pipe, each) * merge for each in seen]
            flops += vision.depth * sum(2 * layer * n + 4 * n**2 * vision.hidden_size for n in patches)
    return flops, peak


def _image_processor(pipe: Any) -> Any:
    """Return the processor of images of a pipeline's Qwen-VL; LongCat-Image-Edit has it under another name."""
    return (pipe.text_processor if hasattr(pipe, "text_processor") else pipe.processor).image_processor
