"""Patched places of FLUX.1, LongCat-Image and FIBO: attention processors and forwards of both kinds of block.

The three models have the same blocks. FIBO passes one stream to its blocks with one stream, and a mask of the padded
text tokens to attention, which torch.compile traces as it is in diffusers.

Shapes are diffusers': streams `[B, N, C]`, of B samples with N tokens each.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from uniref_fast import ops
from uniref_fast.models.qwen_image import Modulation
from uniref_fast.models.tanh_gelu import runs_native_activation
from uniref_fast.patch.families import FamilyPatch, Place
from uniref_fast.patch.guards import changed_adaptive_norm, changed_norm, norm_change, unlike
from uniref_fast.patch.joint_streams import (
    OneStreamAttention,
    TwoStreamAttention,
    attention_change,
    attention_changes,
    refuse_visibility,
    rotary_changes,
    stock_places,
)
from uniref_fast.patch.processors import (
    PatchedBlock,
    fused_streams,
    joint_rows,
    refusal,
    register_processor,
    whole_stream,
)
from uniref_fast.patch.replay import Calls
from uniref_fast.patch.state import PatchState

__all__ = ["FIBO", "FLUX_1", "LONGCAT"]


def _attention_change(processor: Any) -> str | None:
    """Describe a replaced function that a processor of diffusers calls by name; None if none is replaced."""
    return attention_change(sys.modules[processor.__module__], (processor.__name__,))


# ---- attention ----


class _TwoStreams(TwoStreamAttention):
    """Joint attention of a block with two streams."""

    takes_mask = True

    def code_change(self) -> str | None:
        return _attention_change(type(self.stock))


class _OneStream(OneStreamAttention):
    """Attention of a block with one stream."""

    takes_mask = True

    def code_change(self) -> str | None:
        return _attention_change(type(self.stock))


class _OneStreamFibo(_OneStream):
    """Attention of a block of FIBO with one stream, whose QK norms are those of diffusers."""

    qk_norm = None


# ---- blocks ----


class _Block(PatchedBlock):
    """Forward of a block with adaptive norms, whose inner LayerNorm, modulation and residuals are fused."""

    adaptive: ClassVar[str]
    adaptive_norms: ClassVar[tuple[str, ...]]
    norms: ClassVar[tuple[str, ...]] = ()

    def _methods(self) -> tuple[Any, ...]:
        return (type(self.block).forward,)

    def _code_refusal(self, dtype: torch.dtype, device: torch.device) -> str | None:
        if self._methods() != self.methods:
            return f"forward of {type(self.block).__name__} was replaced"
        children, channels = self.block._modules, self.block.attn.query_dim
        for name in self.adaptive_norms:
            if reason := changed_adaptive_norm(children.get(name), self.adaptive, channels):
                return reason
        for name in self.norms:
            if reason := changed_norm(children.get(name), channels):
                return reason
        return norm_change()

    def call_refusal(self, image, text, temb, rotary, attention_kwargs) -> str | None:  # type: ignore[override]
        return self._call_refusal(temb, image, text)

    def _call_refusal(self, temb: Tensor, *streams: Tensor) -> str | None:
        attn, first = self.block.attn, streams[0]
        if reason := refusal(self.state, self.site, attn.inner_dim // attn.heads, *streams, temb):
            return reason
        if any(x.ndim != 3 or len(x) != len(first) or x.shape[2] != first.shape[2] for x in streams):
            return f"called with streams of shapes {[list(x.shape) for x in streams]}"
        if temb.ndim != 2 or len(temb) != len(first):
            return f"a timestep embedding of shape {list(temb.shape)} for a batch of {len(first)}"
        return None

    def _table(self, calls: Calls, name: str, temb: Tensor, stream: Tensor, parts: int) -> tuple[Tensor, ...] | str:
        """Return the parts of the modulation table of an adaptive norm, `[B, C]` each, or a reason.

        Args:
            calls: Recorder of the calls of the block.
            name: Name of the Linear of the norm.
            temb: Timestep embedding after its activation, `[B, C]`.
            stream: Stream of the norm.
            parts: Number of parts.
        """
        table = calls(name, temb)
        if reason := unlike(table, (len(stream), parts * stream.shape[2]), stream, name):
            return reason
        return (table if table.stride(-1) == 1 else table.contiguous()).chunk(parts, dim=-1)


class _TwoStreamBlock(_Block):
    """Forward of one block with two streams."""

    adaptive = "AdaLayerNormZero"
    adaptive_norms = ("norm1", "norm1_context")
    norms = ("norm2", "norm2_context")

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return self._start(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)

    def _fused(self, calls: Calls, impl: str, image, text, temb, rotary, attention_kwargs) -> Any:  # type: ignore[override]
        block, mods, rows, temb = self.block, [], [], F.silu(temb)
        for name, stream in (("norm1.linear", image), ("norm1_context.linear", text)):
            parts = self._table(calls, name, temb, stream, 6)
            if isinstance(parts, str):
                return parts
            mods.append(Modulation(*parts))
            rows.append(self.state.modulation_rows(None, len(stream), stream.shape[1], stream.device))
        attention = {"image_rotary_emb": rotary, **(attention_kwargs or {})}
        norms = (block.norm1.norm, block.norm1_context.norm), (block.norm2, block.norm2_context)
        return fused_streams(
            calls, self.state, impl, (image, text), mods, (rows[0], rows[1]), norms, ("ff", "ff_context"), attention
        )


class _OneStreamBlock(_Block):
    """Forward of one block with one stream, which gets and returns text and image apart."""

    adaptive = "AdaLayerNormZeroSingle"
    adaptive_norms = ("norm",)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:  # its own code, as torch.compile keeps the graphs of a function together and limits their number
        return self._start(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)

    def _fused(self, calls: Calls, impl: str, image, text, temb, rotary, attention_kwargs) -> Any:  # type: ignore[override]
        out = self._stream(calls, impl, torch.cat([text, image], dim=1), temb, rotary, attention_kwargs)
        return out if isinstance(out, str) else (out[:, : text.shape[1]], out[:, text.shape[1] :])

    def _stream(self, calls: Calls, impl: str, x: Tensor, temb: Tensor, rotary: Any, kwargs: Any) -> Tensor | str:
        """Return the stream after the block, `[B, N, C]`, or the reason why that is not possible."""
        parts = self._table(calls, "norm.linear", F.silu(temb), x, 3)
        if isinstance(parts, str):
            return parts
        shift, scale, gate = parts
        rows = self.state.modulation_rows(None, len(x), x.shape[1], x.device)
        options: Any = {"rounding": "eager", "impl": impl}
        flat = joint_rows(x)
        normed = ops.norm_modulate(flat, shift, scale, rows, self.block.norm.norm.eps, **options).view(x.shape)
        mlp = calls("proj_mlp", normed)
        if reason := unlike(mlp, (*x.shape[:2], self.block.mlp_hidden_dim), x, "proj_mlp"):
            return reason
        mlp = ops.gelu(mlp) if runs_native_activation(self.block.act_mlp, mlp, impl) else calls("act_mlp", mlp)
        branch = calls("attn", hidden_states=normed, image_rotary_emb=rotary, **(kwargs or {}))
        del normed
        for what, out, width in (
            ("the feed-forward", mlp, self.block.mlp_hidden_dim),
            ("attention", branch, x.shape[2]),
        ):
            if reason := unlike(out, (*x.shape[:2], width), x, what):
                return reason
        branch = calls("proj_out", torch.cat([branch, mlp], dim=2))
        if reason := unlike(branch, tuple(x.shape), x, "proj_out"):
            return reason
        return whole_stream(ops.gate_residual(flat, joint_rows(branch), gate, rows, **options), x.shape)


class _OneStreamBlockFibo(_OneStreamBlock):
    """Forward of one block of FIBO with one stream."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return self._start(hidden_states, temb, image_rotary_emb, joint_attention_kwargs)

    def call_refusal(self, x, temb, rotary, attention_kwargs) -> str | None:  # type: ignore[override]
        return self._call_refusal(temb, x)

    def _fused(self, calls: Calls, impl: str, x, temb, rotary, attention_kwargs) -> Any:  # type: ignore[override]
        return self._stream(calls, impl, x, temb, rotary, attention_kwargs)


# ---- the families ----


@dataclass(frozen=True)
class _Family:
    """Places of one family.

    Attributes:
        module: Module of the transformer in diffusers.
        blocks: Names of its blocks with two streams and with one.
        processors: Their attention processors, as "module:name".
        attention: Place of attention in a block with one stream.
        single: Place of a block with one stream.
    """

    module: str
    blocks: tuple[str, str]
    processors: tuple[str, str]
    attention: Any = _OneStream
    single: Any = _OneStreamBlock

    def parts(self) -> Iterator[tuple[str, Any, Any, Any, Any]]:
        """Yield the name of each list of blocks, their class, processor, and the places of both."""
        stock = importlib.import_module(self.module)
        groups, places = ("transformer_blocks", "single_transformer_blocks"), (_TwoStreamBlock, self.single)
        for group, block, processor, place, attention in zip(
            groups, self.blocks, self.processors, places, (_TwoStreams, self.attention), strict=True
        ):
            module, name = processor.split(":")
            yield group, getattr(stock, block), getattr(importlib.import_module(module), name), place, attention

    def install(self, transformer: Any, state: PatchState) -> Iterator[Place | str]:
        """Install the places of all blocks, and yield each place, or a note on one that runs unchanged."""
        register_processor()
        for group, block, processor, place, attention in self.parts():
            yield from stock_places(transformer, group, (block, place), {processor: attention}, state)

    def changes(self, transformer: Any) -> Iterator[str]:
        """Describe replaced functions, other processors, and settings that differ from the configuration."""
        yield from rotary_changes(transformer)
        stock = importlib.import_module(self.module)
        for group, _, processor, _, _ in self.parts():
            if reason := _attention_change(processor):
                yield reason
            yield from attention_changes(transformer, stock, {f"{group}.*.attn": (processor,)})

    @property
    def patch(self) -> FamilyPatch:
        """Functions with which `patch` changes the models of the family."""
        return FamilyPatch(self.install, self.changes, refuse_visibility)


_MODELS = "diffusers.models.transformers."

FLUX_1 = _Family(
    f"{_MODELS}transformer_flux",
    ("FluxTransformerBlock", "FluxSingleTransformerBlock"),
    (f"{_MODELS}transformer_flux:FluxAttnProcessor",) * 2,
).patch
LONGCAT = _Family(
    f"{_MODELS}transformer_longcat_image",
    ("LongCatImageTransformerBlock", "LongCatImageSingleTransformerBlock"),
    (f"{_MODELS}transformer_longcat_image:LongCatImageAttnProcessor",) * 2,
).patch
FIBO = _Family(
    f"{_MODELS}transformer_bria_fibo",
    ("BriaFiboTransformerBlock", "BriaFiboSingleTransformerBlock"),
    (f"{_MODELS}transformer_bria_fibo:BriaFiboAttnProcessor", f"{_MODELS}transformer_bria:BriaAttnProcessor"),
    _OneStreamFibo,
    _OneStreamBlockFibo,
).patch
