"""Patched places of a `QwenImageTransformer2DModel`, and changes of its code that a packed forward would skip."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from uniref_fast.models.qwen_image import qk_norm_eps
from uniref_fast.patch.families import FamilyPatch, Place
from uniref_fast.patch.guards import attention_change, stock_forward
from uniref_fast.patch.processors import PatchedAttention, PatchedBlock, register_processor
from uniref_fast.patch.report import Site
from uniref_fast.patch.state import PatchState
from uniref_fast.patch.stock import found_modules, processor_changes
from uniref_fast.visibility import Rule

__all__ = ["PATCH"]

_BLOCK, _ATTN = "transformer_blocks.*", "transformer_blocks.*.attn"
_ROTARY_THETA = 10000.0


def install(transformer: Any, state: PatchState) -> Iterator[Place | str]:
    """Install the places of all blocks, and yield each place, or a note on one that runs unchanged."""
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

    register_processor()
    for name, block in transformer.transformer_blocks.named_children():
        where = f"transformer_blocks.{name}"
        if _has_stock_processor(block):
            yield PatchedAttention(block.attn, state, Site(f"{where}.attn"))
        else:
            yield f"{where}.attn has its own {_processor(block)}, which runs unchanged"
        if stock_forward(block, QwenImageTransformerBlock):
            yield PatchedBlock(block, state, Site(where))
        else:
            yield f"{where} has its own forward, which runs unchanged"


def refuse_processors(transformer: Any, visibility: str | Rule) -> None:
    """Raise ValueError if a block has another processor: it does not know the visibility."""
    for name, block in transformer.transformer_blocks.named_children():
        if not _has_stock_processor(block):
            raise ValueError(
                f"transformer_blocks.{name}.attn has its own {_processor(block)}, which does not support visibility "
                f"{visibility!r}; set diffusers' own processor first"
            )


def _stock_processor() -> Any:
    from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0

    return QwenDoubleStreamAttnProcessor2_0


def _has_stock_processor(block: Any) -> bool:
    return type(getattr(getattr(block, "attn", None), "processor", None)) is _stock_processor()


def _processor(block: Any) -> str:
    return type(getattr(getattr(block, "attn", None), "processor", None)).__name__


def changes(transformer: Any) -> Iterator[str]:
    """Describe replaced functions, other processors, and settings that differ from the configuration."""
    if reason := attention_change():
        yield reason
    if not len(transformer.transformer_blocks):
        yield "transformer_blocks is empty"
    rope, axes = transformer.pos_embed, tuple(transformer.config.axes_dims_rope)
    if type(rope).__name__ == "QwenEmbedRope":
        positive, negative = _rotary_tables(axes)
        n = len(positive)  # longer tables hold more positions of the same frequencies
        same = tuple(rope.axes_dim) == axes and rope.scale_rope
        for ours, theirs in ((positive, rope.pos_freqs[:n]), (negative, rope.neg_freqs[-n:])):
            same = same and not theirs.is_meta and torch.equal(ours, theirs.cpu())
        if not same:
            yield "pos_embed has other frequencies than those of the model's configuration"
    zero_cond_t = bool(transformer.config.zero_cond_t)
    for name, module in (("the transformer", transformer), *found_modules(transformer, _BLOCK)):
        if bool(getattr(module, "zero_cond_t", zero_cond_t)) != zero_cond_t:
            yield f"{name} has zero_cond_t={module.zero_cond_t}, the configuration has {zero_cond_t}"
    for name, attn in found_modules(transformer, _ATTN):
        try:
            qk_norm_eps(attn)
        except ValueError as error:
            yield f"{name}: {error}"
        yield from processor_changes(name, attn.processor, (_stock_processor(),))


@functools.lru_cache(maxsize=4)
def _rotary_tables(axes: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

    with torch.device("cpu"), torch.inference_mode(False):
        rope = QwenEmbedRope(theta=_ROTARY_THETA, axes_dim=list(axes), scale_rope=True)  # type: ignore[arg-type]
    return rope.pos_freqs, rope.neg_freqs


PATCH = FamilyPatch(install, changes, refuse_processors)
