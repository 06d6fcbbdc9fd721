"""Patched places of a `Flux2Transformer2DModel`: attention processors and forwards of both kinds of block.

The attention of klein-KV fills and reads the cache of its pipeline as the original does; torch.compile traces the
original of such calls.

Shapes are diffusers': streams `[B, N, C]`, of B samples with N tokens each.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from uniref_fast import ops
from uniref_fast.models.flux2 import split_projection
from uniref_fast.models.packed import ForwardContext
from uniref_fast.models.qwen_image import Modulation, joint_qkv
from uniref_fast.patch.families import FamilyPatch, Place
from uniref_fast.patch.guards import changed_norm, norm_change, unlike
from uniref_fast.patch.joint_streams import (
    TextImageAttention,
    TwoStreamAttention,
    attention_change,
    attention_changes,
    refuse_visibility,
    rotary_changes,
    stock_places,
    stream_context,
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
from uniref_fast.patch.streams import Choice
from uniref_fast.visibility import AttentionPlan

__all__ = ["PATCH", "ModulatedBlock"]

_PROCESSORS = ("Flux2AttnProcessor", "Flux2KVAttnProcessor")
_SINGLE_PROCESSORS = ("Flux2ParallelSelfAttnProcessor", "Flux2KVParallelSelfAttnProcessor")


def _stock() -> Any:
    from diffusers.models.transformers import transformer_flux2

    return transformer_flux2


def _attention_change() -> str | None:
    """Describe a replaced function that the attention of diffusers calls by name; None if none is replaced."""
    return attention_change(_stock(), _PROCESSORS + _SINGLE_PROCESSORS, ("_flux2_kv_causal_attention",))


# ---- attention ----


class _Attention(TextImageAttention):
    """A processor of FLUX.2. The processors of klein-KV fill and read the cache of its pipeline."""

    def code_change(self) -> str | None:
        return _attention_change()

    def _joint(
        self, q: Tensor, k: Tensor, v: Tensor, context: ForwardContext, batch: int, text: int, mask: Any, kv: dict
    ) -> tuple[Tensor, Choice]:
        plan, n = context.plan, len(q) // batch
        cache, mode, references = kv.get("kv_cache"), kv.get("kv_cache_mode"), kv.get("num_ref_tokens", 0)
        if mode == "extract" and references:
            if cache is not None:
                rows = slice(text, text + references)
                cache.store(*(x.unflatten(0, (batch, n))[:, rows].clone() for x in (k, v)))
            plan = _plan_of_extraction(batch, n, text, references)
        elif mode == "cached" and cache is not None:
            k, v = (
                torch.cat([x[:, :text], kept, x[:, text:]], dim=1).flatten(0, 1)
                for x, kept in zip((k.unflatten(0, (batch, n)), v.unflatten(0, (batch, n))), cache.get(), strict=True)
            )
            plan = _plan_of_cache(batch, n, len(k) // batch)
        return self.attention(q, k, v, plan)


class _TwoStreams(_Attention, TwoStreamAttention):
    """Joint attention of diffusers' `Flux2AttnProcessor`."""


class _TwoStreamsKV(_TwoStreams):
    """Joint attention of diffusers' `Flux2KVAttnProcessor`."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        kv_cache: Any = None,
        kv_cache_mode: str | None = None,
        num_ref_tokens: int = 0,
    ) -> Any:
        streams = hidden_states, encoder_hidden_states
        kv = {"kv_cache": kv_cache, "kv_cache_mode": kv_cache_mode, "num_ref_tokens": num_ref_tokens}
        return self._call(attn, streams, attention_mask, image_rotary_emb, **kv)


class _OneStream(_Attention):
    """Attention and feed-forward of diffusers' `Flux2ParallelSelfAttnProcessor`."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        return self._call(attn, (hidden_states,), attention_mask, image_rotary_emb)

    def _computed(
        self, calls: Calls, streams: tuple[Any, ...], others: tuple, kv: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], Choice] | str:
        attn: Any = calls.module
        mask, rotary = others
        (x,) = streams
        fused = calls("to_qkv_mlp_proj", x)
        width = 3 * attn.inner_dim + attn.mlp_hidden_dim * attn.mlp_mult_factor
        if reason := unlike(fused, (*x.shape[:2], width), x, "to_qkv_mlp_proj"):
            return reason
        qkv, mlp = split_projection(attn, joint_rows(fused))
        mlp = calls("mlp_act_fn", mlp.unflatten(0, x.shape[:2]))
        if reason := unlike(mlp, (*x.shape[:2], attn.mlp_hidden_dim), x, "mlp_act_fn"):
            return reason
        q, k, v = (part.unflatten(-1, (-1, attn.head_dim)) for part in qkv.chunk(3, dim=-1))
        context = stream_context(self.state, rotary, len(x), 0, x.shape[1], q)
        q, k, v = joint_qkv(attn, (q, k, v), None, context)
        joint, choice = self._joint(q, k, v, context, len(x), kv.get("num_txt_tokens", 0), mask, kv)
        del q, k, v, qkv, fused
        joint = joint.flatten(1).unflatten(0, x.shape[:2])
        return (calls("to_out", torch.cat([joint, mlp], dim=-1)),), choice


class _OneStreamKV(_OneStream):
    """Attention and feed-forward of diffusers' `Flux2KVParallelSelfAttnProcessor`."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        kv_cache: Any = None,
        kv_cache_mode: str | None = None,
        num_txt_tokens: int = 0,
        num_ref_tokens: int = 0,
    ) -> Any:
        kv = {"kv_cache": kv_cache, "kv_cache_mode": kv_cache_mode}
        kv |= {"num_txt_tokens": num_txt_tokens, "num_ref_tokens": num_ref_tokens}
        return self._call(attn, (hidden_states,), attention_mask, image_rotary_emb, **kv)


@functools.lru_cache(maxsize=8)
def _plan_of_extraction(batch: int, length: int, text: int, references: int) -> AttentionPlan:
    """Return the plan of samples of text, references and target, in which references see references only."""
    ranges, intervals = [], []
    for start in range(0, batch * length, length):
        a, b, end = start + text, start + text + references, start + length
        for span, keys in (((start, a), (start, end)), ((a, b), (a, b)), ((b, end), (start, end))):
            if span[0] < span[1]:
                ranges.append(span)
                intervals.append((keys,))
    return AttentionPlan(tuple(ranges), tuple(intervals), batch * length, batch * length)


@functools.lru_cache(maxsize=8)
def _plan_of_cache(batch: int, queries: int, keys: int) -> AttentionPlan:
    """Return the plan of samples whose queries see all keys of their sample."""
    ranges = tuple((i * queries, (i + 1) * queries) for i in range(batch))
    intervals = tuple((((i * keys, (i + 1) * keys)),) for i in range(batch))
    return AttentionPlan(ranges, intervals, batch * queries, batch * keys)


# ---- blocks ----


class ModulatedBlock(PatchedBlock):
    """Forward of a block whose modulation comes as a table of the call, such as those of FLUX.2.

    Attributes:
        norms: Names of its LayerNorms.
    """

    norms: tuple[str, ...]

    def _methods(self) -> tuple[Any, ...]:
        return type(self.block).forward, _stock().Flux2Modulation.split

    def _code_refusal(self, dtype: torch.dtype, device: torch.device) -> str | None:
        if self._methods() != self.methods:
            return f"forward of {type(self.block).__name__} or a function that it calls was replaced"
        for name in self.norms:
            if reason := changed_norm(self.block._modules.get(name), self.block.attn.query_dim):
                return reason
        return norm_change()

    def _table(self, table: Tensor, stream: Tensor, parts: int) -> tuple[tuple[Tensor, ...], Tensor] | str:
        """Return the parts of a modulation table, and its row for every token of a stream, or a reason."""
        batch, length, channels = stream.shape
        if table.ndim == 3 and table.shape[1] == 1:
            table = table[:, 0]
        samples = batch
        if table.ndim == 3 and table.shape[:2] == stream.shape[:2]:  # references of klein-KV have another t
            table, samples, length = table.flatten(0, 1), batch * length, 1
        if table.ndim != 2 or table.shape != (samples, parts * channels):
            return f"modulation of shape {list(table.shape)} for a stream of shape {list(stream.shape)}"
        table = table if table.stride(-1) == 1 else table.contiguous()
        return table.chunk(parts, dim=-1), self.state.modulation_rows(None, samples, length, stream.device)


class _TwoStreamBlock(ModulatedBlock):
    """Forward of one `Flux2TransformerBlock` with fused norms, modulation and residuals."""

    norms = ("norm1", "norm1_context", "norm2", "norm2_context")

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb_mod_img: Tensor,
        temb_mod_txt: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        arguments = (
            hidden_states,
            encoder_hidden_states,
            temb_mod_img,
            temb_mod_txt,
            image_rotary_emb,
            joint_attention_kwargs,
        )
        return self._start(*arguments)

    def call_refusal(self, image, text, image_table, text_table, rotary, attention_kwargs) -> str | None:  # type: ignore[override]
        if reason := refusal(self.state, self.site, self.block.attn.head_dim, image, text, image_table, text_table):
            return reason
        if image.ndim != 3 or text.ndim != 3 or len(image) != len(text) or image.shape[2] != text.shape[2]:
            return f"called with streams of shapes {list(image.shape)} and {list(text.shape)}"
        return None

    def _fused(self, calls: Calls, impl: str, image, text, image_table, text_table, rotary, attention_kwargs) -> Any:  # type: ignore[override]
        block, mods, rows = self.block, [], []
        for table, stream in ((image_table, image), (text_table, text)):
            found = self._table(table, stream, 6)
            if isinstance(found, str):
                return found
            mods.append(Modulation(*found[0]))
            rows.append(found[1])
        attention = {"image_rotary_emb": rotary, **(attention_kwargs or {})}
        norms = (block.norm1, block.norm1_context), (block.norm2, block.norm2_context)
        return fused_streams(
            calls, self.state, impl, (image, text), mods, (rows[0], rows[1]), norms, ("ff", "ff_context"), attention
        )


class _OneStreamBlock(ModulatedBlock):
    """Forward of one `Flux2SingleTransformerBlock` with fused norm, modulation and residual."""

    norms = ("norm",)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        temb_mod: Tensor,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        split_hidden_states: bool = False,
        text_seq_len: int | None = None,
    ) -> Any:
        arguments = (
            hidden_states,
            encoder_hidden_states,
            temb_mod,
            image_rotary_emb,
            joint_attention_kwargs,
            split_hidden_states,
            text_seq_len,
        )
        return self._start(*arguments)

    def call_refusal(self, x, text, table, rotary, attention_kwargs, split, length) -> str | None:  # type: ignore[override]
        if text is not None or split:
            return "called with two streams, or to return two"
        if reason := refusal(self.state, self.site, self.block.attn.head_dim, x, table):
            return reason
        return None if x.ndim == 3 else f"called with a stream of shape {list(x.shape)}"

    def _fused(self, calls: Calls, impl: str, x, text, table, rotary, attention_kwargs, split, length) -> Any:  # type: ignore[override]
        found = self._table(table, x, 3)
        if isinstance(found, str):
            return found
        (shift, scale, gate), rows = found
        options: Any = {"rounding": "eager", "impl": impl}
        flat = joint_rows(x)
        normed = ops.norm_modulate(flat, shift, scale, rows, self.block.norm.eps, **options)
        branch = calls("attn", hidden_states=normed.view(x.shape), image_rotary_emb=rotary, **(attention_kwargs or {}))
        del normed
        if reason := unlike(branch, tuple(x.shape), x, "attention"):
            return reason
        return whole_stream(ops.gate_residual(flat, joint_rows(branch), gate, rows, **options), x.shape)


# ---- the family ----


def install(transformer: Any, state: PatchState) -> Iterator[Place | str]:
    """Install the places of all blocks, and yield each place, or a note on one that runs unchanged."""
    register_processor()
    stock = _stock()
    for group, block, processors, places in (
        ("transformer_blocks", (stock.Flux2TransformerBlock, _TwoStreamBlock), _PROCESSORS,
         (_TwoStreams, _TwoStreamsKV)),
        ("single_transformer_blocks", (stock.Flux2SingleTransformerBlock, _OneStreamBlock), _SINGLE_PROCESSORS,
         (_OneStream, _OneStreamKV)),
    ):  # fmt: skip
        attention = {getattr(stock, name): place for name, place in zip(processors, places, strict=True)}
        yield from stock_places(transformer, group, block, attention, state)


def changes(transformer: Any) -> Iterator[str]:
    """Describe replaced functions, other processors, and settings that differ from the configuration."""
    if reason := _attention_change():
        yield reason
    yield from rotary_changes(transformer)
    processors = {"transformer_blocks.*.attn": _PROCESSORS, "single_transformer_blocks.*.attn": _SINGLE_PROCESSORS}
    yield from attention_changes(transformer, _stock(), processors)


PATCH = FamilyPatch(install, changes, refuse_visibility)
