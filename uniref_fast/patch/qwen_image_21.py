"""Patched places of a `QwenImage21Transformer2DModel`, and changes of its code that a packed forward would skip.

The places serve both kinds of steps of the pipeline: the first one, which computes the whole sequence and stores the
keys and values of text and references, and the others, which compute the target and read them.

Shapes are diffusers': the stream is `[B, N, C]`, of B samples with N tokens each, text and images in one sequence.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from uniref_fast import ops
from uniref_fast.layout import Kind, Segment, SelfLayout
from uniref_fast.models.eight_bit import feed_forward
from uniref_fast.models.packed import ForwardContext, clipped
from uniref_fast.models.qwen_image import joint_qkv, qk_norm_eps
from uniref_fast.patch.families import FamilyPatch, Place
from uniref_fast.patch.guards import (
    changed_norm,
    changed_qk_norm,
    is_plain,
    norm_change,
    replaced_attention,
    stock_forward,
    unlike,
)
from uniref_fast.patch.processors import (
    PatchedAttention,
    PatchedBlock,
    checkable,
    joint_rows,
    outside_compiler,
    refusal,
    register_processor,
)
from uniref_fast.patch.replay import Calls, StandIn
from uniref_fast.patch.report import Site
from uniref_fast.patch.state import PatchState, batch_rows
from uniref_fast.patch.stock import found_modules, processor_changes
from uniref_fast.visibility import Rule, block_causal, plan, target_plan

__all__ = ["PATCH"]

_UNTRACED = "attention inside torch.compile, which cannot plan from the segments of a call"

Segments = tuple[tuple[int, int, bool], ...]
"""(start, end, whether it is text) of each part of the sequence before the target."""


class PatchedAttention21(PatchedAttention):
    """Attention of diffusers' `QwenImage21AttnProcessor` on fused operators, in one call for all segments."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Any = None,
        rotary_emb: Tensor | None = None,
        layer_cache: Any = None,
        kv_cache_mode: str | None = None,
        cache_write_slice: slice | None = None,
        segments: list[tuple[int, int, bool]] | None = None,
        key_valid: Tensor | None = None,
    ) -> Tensor:
        arguments = (
            hidden_states, attention_mask, rotary_emb, layer_cache, kv_cache_mode, cache_write_slice, segments,
            key_valid,
        )  # fmt: skip
        if ops.is_traced() or torch.compiler.is_exporting():
            self.record_trace(_UNTRACED)
            return self._pass_on()(attn, *arguments)
        return outside_compiler()(self._run, attn, *arguments)

    def _run(self, attn: Any, *arguments: Any) -> Any:  # type: ignore[override]
        def original(instead: Any = attn) -> Any:
            return self._pass_on()(instead, *arguments)

        if reason := self.refusal(attn, *arguments):
            return self.state.refuse(self.site, reason, original)
        x, cache = arguments[0], arguments[3]
        checked = checkable(self.site, x)
        calls = Calls(attn, self.state, inputs=checked)
        fused = self._fused(calls, *arguments)  # type: ignore[call-arg]
        if isinstance(fused, str):
            return self.state.refuse(self.site, fused, lambda: original(StandIn(calls)))
        out, choice = fused  # type: ignore[misc]

        def check() -> float:
            stand_in = StandIn(calls)
            stored = None if cache is None else (cache.k, cache.v)
            stand_in.compare([out], [original(stand_in)])
            if stored is not None:
                cache.store(*stored)  # not those of the original
            return stand_in.max_rel_error

        return self.state.accept(self.site, out, x, original, check if checked else None, choice)

    def call_refusal(self, attn: Any, x: Tensor, *others: Any) -> str | None:  # type: ignore[override]
        mask, rotary, cache, mode, _, segments, key_valid = others
        head_dim = attn.inner_dim // attn.heads
        if reason := refusal(self.state, self.site, head_dim, x, attention=True):
            return reason
        if x.ndim != 3:
            return f"called with a stream of shape {list(x.shape)}"
        if reason := self.settings_refusal():
            return reason
        batch, length = x.shape[:2]
        if (
            not is_plain(rotary) or rotary.dtype != torch.complex64 or rotary.device != x.device
            or rotary.shape != (length, head_dim // 2)
        ):  # fmt: skip
            return "the rotary embedding does not have one complex value per token and pair of channels"
        if segments is None:
            if mode != "cached" or cache is None or cache.k is None:
                return "called without segments and without kept keys and values"
            stored = cache.k
            if not is_plain(stored) or stored.dtype != x.dtype or stored.device != x.device or len(stored) != batch:
                return "the kept keys have another dtype, device or number of samples"
            if mask is not None and not _is_mask(mask, (batch, 1, 1, stored.shape[1] + length)):
                return "the mask of keys is not a boolean tensor with one value per key"
            return None
        if key_valid is not None and not _is_mask(key_valid, (batch, length)):
            return "the mask of keys is not a boolean tensor with one value per key"
        edges = [0, *(end for _, end, _ in segments)]
        if [start for start, _, _ in segments] != edges[:-1] or edges[-1] >= length:
            return "the segments do not divide the sequence before the target"
        return None

    def _code_refusal(self, dtype: torch.dtype, device: torch.device) -> str | None:
        return attention_change() or changed_qk_norm(self.attn, dtype, device)

    def _fused(self, calls: Calls, x: Tensor, *others: Any) -> Any:  # type: ignore[override]
        """Return (output, (implementation, reason of the choice)), or the reason why this is not possible."""
        mask, rotary, cache, mode, written, segments, key_valid = others
        attn: Any = calls.module
        head_dim = attn.inner_dim // attn.heads  # the head count stays free: tensor parallel shards it
        batch, length = x.shape[:2]
        qkv: list[Tensor] = []
        shared = self.shared_input(attn.to_q, x)
        for name in ("to_q", "to_k", "to_v"):
            out = calls(name, shared)
            width = out.shape[-1] if not qkv and isinstance(out, Tensor) and out.ndim else qkv[0].shape[-1]
            if reason := unlike(out, (batch, length, width), x, name):
                return reason
            qkv.append(out)
        if qkv[0].shape[-1] % head_dim:
            return f"to_q returned {qkv[0].shape[-1]} channels, heads have {head_dim}"
        calls.release()
        kept = cache.get() if mode == "cached" else None
        if kept is not None:
            segments, key_valid = ((0, kept[0].shape[1], False),), mask
        context, whole = self._context(batch, length, rotary, tuple(segments), key_valid, kept is not None)
        q, k, v = (joint_rows(each).unflatten(-1, (-1, head_dim)) for each in qkv)
        del qkv, out
        q, k, v = joint_qkv(attn, (q, k, v), None, context)
        if kept is not None:
            k, v = (
                torch.cat([old, new.unflatten(0, (batch, length))], dim=1).flatten(0, 1)
                for old, new in zip(kept, (k, v), strict=True)
            )
        elif mode == "extract" and written is not None:
            cache.store(*(each.unflatten(0, (batch, length))[:, written].clone() for each in (k, v)))
        seen = target_plan(whole, block_causal) if kept is not None else plan(whole, block_causal)
        out, choice = self.attention(q, k, v, seen)
        del q, k, v
        out = calls("to_out.0", out.flatten(1).unflatten(0, (batch, length)))
        return calls("to_out.1", out), choice  # the second is a dropout

    def _context(
        self, batch: int, length: int, rotary: Tensor, segments: Segments, key_valid: Tensor | None, is_kept: bool
    ) -> tuple[ForwardContext, SelfLayout]:
        """Return the context of the running forward and the layout of all keys; its first block builds them.

        Args:
            batch: Number of samples.
            length: Tokens of each sample that are computed.
            rotary: Complex rotary table of these tokens, `[length, D / 2]`.
            segments: Segments before the target.
            key_valid: Keys that are visible, bool `[B, all tokens]` or `[B, 1, 1, all tokens]`, or None for all.
            is_kept: True if the segments are not computed.
        """
        key = batch, length, segments, is_kept
        saved = self.state.calls.context
        if saved and saved[0] == key and saved[1] is rotary and saved[2] is key_valid:
            return saved[3]
        with torch.inference_mode(False), torch.no_grad():
            valid = None if key_valid is None else tuple(map(tuple, key_valid.flatten(1).tolist()))
            whole = _layout(batch, segments, segments[-1][1] + length if is_kept else length, valid)
            computed = _layout(batch, (), length, None) if is_kept else whole
            table = rotary.repeat(batch, 1)
            context = ForwardContext(
                layout=computed, visibility=block_causal, rotary=(table.real.contiguous(), table.imag.contiguous()),
                impl=self.state.impl, rounding="eager",
            )  # fmt: skip
        # Holding the tensors keeps their identity unambiguous.
        self.state.calls.context = (key, rotary, key_valid, (context, whole))
        return context, whole


@functools.lru_cache(maxsize=16)
def _layout(batch: int, segments: Segments, length: int, valid: tuple[tuple[bool, ...], ...] | None) -> SelfLayout:
    """Return a layout of `batch` samples whose segments before the target are given, for attention alone."""
    found: list[Segment] = []
    for sample in range(batch):
        first = sample * length
        end_of_prefix = segments[-1][1] if segments else 0
        parts: list[tuple[int, int, Kind]] = []
        for start, end, is_text in segments:
            kind, at = Kind.TEXT if is_text else Kind.REFERENCE, start
            seen = (True,) * (end - start) if valid is None else valid[sample][start:end]
            for state, group in itertools.groupby(seen):
                parts.append((at, at := at + len(list(group)), kind if state else Kind.PADDING))
        for start, end, kind in (*parts, (end_of_prefix, length, Kind.TARGET)):
            grid = (end - start, 1, 1) if kind.is_text else (1, 1, end - start)
            found.append(Segment(kind, sample, sample, 0, grid, first + start, first + start, sample, (0, 0, 0)))
    return SelfLayout(tuple(found), batch, False, causal_prefix=True)


def _is_mask(mask: Any, shape: tuple[int, ...]) -> bool:
    return is_plain(mask) and mask.dtype == torch.bool and mask.shape == shape


class PatchedBlock21(PatchedBlock):
    """Forward of one `QwenImage21TransformerBlock` with fused norms, modulation and residuals."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        modulation: Tensor,
        rotary_emb: Tensor | None = None,
        attention_mask: Any = None,
        target_token_mask: Tensor | None = None,
        layer_cache: Any = None,
        kv_cache_mode: str | None = None,
        cache_write_slice: slice | None = None,
        segments: list[tuple[int, int, bool]] | None = None,
        key_valid: Tensor | None = None,
    ) -> Tensor:
        arguments = (
            hidden_states, modulation, rotary_emb, attention_mask, target_token_mask, layer_cache, kv_cache_mode,
            cache_write_slice, segments, key_valid,
        )  # fmt: skip
        return self._start(*arguments)

    def call_refusal(self, x: Tensor, *others: Any) -> str | None:  # type: ignore[override]
        modulation, _, _, mask = others[:4]
        attn = self.block.attn
        if reason := refusal(self.state, self.site, attn.inner_dim // attn.heads, x, modulation):
            return reason
        if x.ndim != 3:
            return f"called with a stream of shape {list(x.shape)}"
        batch, length, channels = x.shape
        expected = batch + (mask is not None), 4 * channels
        if modulation.shape != expected:
            return f"modulation has shape {list(modulation.shape)} instead of {list(expected)}"
        if mask is not None and not _is_mask(mask, (length,)):
            return "target_token_mask is not a boolean tensor with one value per token"
        return None

    def _code_refusal(self, dtype: torch.dtype, device: torch.device) -> str | None:
        block = self.block
        if self._methods() != self.methods:
            return f"forward or _modulate of {type(block).__name__} was replaced"
        for name in ("img_norm1", "img_norm2"):
            if reason := changed_norm(block._modules.get(name), block.attn.to_q.in_features):
                return reason
        return norm_change()

    def _fused(self, calls: Calls, impl: str, x: Tensor, modulation: Tensor, *others: Any) -> Any:  # type: ignore[override]
        """Return the stream, `[B, N, C]`, computed by one implementation, or the reason why that is not possible."""
        rotary, attention_mask, mask, cache, mode, written, segments, key_valid = others
        block, shape = self.block, x.shape
        scale1, gate1, scale2, gate2 = modulation.chunk(4, dim=-1)
        gate1, gate2 = gate1.tanh(), gate2.tanh()
        rows = self._rows_of(mask, shape[0], shape[1], x.device)
        options: Any = {"rounding": "eager", "impl": impl}
        stream = joint_rows(x)
        normed = ops.norm_modulate(stream, None, scale1, rows, block.img_norm1.eps, **options)
        branch = calls(
            "attn", hidden_states=normed.view(shape), attention_mask=attention_mask, rotary_emb=rotary,
            layer_cache=cache, kv_cache_mode=mode, cache_write_slice=written, segments=segments, key_valid=key_valid,
        )  # fmt: skip
        del normed
        if reason := unlike(branch, tuple(shape), x, "attention"):
            return reason
        stream, hidden = ops.gate_residual_norm_modulate(
            stream, joint_rows(branch), gate1, None, scale2, rows, block.img_norm2.eps, **options
        )
        if self.state.parts is None:
            branch = calls.by_parts("img_mlp", hidden.view(shape))
        else:
            branch = calls("img_mlp", hidden.view(shape), run=functools.partial(feed_forward, impl=self.state.impl))
        if reason := unlike(branch, tuple(shape), x, "the feed-forward"):
            return reason
        stream = ops.gate_residual(stream, joint_rows(branch), gate2, rows, **options)
        # for autograd not a view: nothing else refers to the rows
        return clipped(torch.ops.aten._unsafe_view(stream, shape))

    def _rows_of(self, mask: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
        """Return the row of the modulation table for every token, int32 `[B * N]`; the last row is that of t = 0."""
        if mask is None:
            return self.state.modulation_rows(None, batch, length, device)
        if ops.is_traced() or torch.compiler.is_exporting():
            rows = self.state.modulation_rows(None, batch, length, device).view(batch, length)
            return torch.where(mask, rows, batch).to(torch.int32).reshape(-1)
        saved = self.state.calls.rows
        if saved and saved[0] is mask and saved[1] == batch:
            return saved[2]
        rows = torch.where(mask, batch_rows(batch, length, device).view(batch, length), batch)
        self.state.calls.rows = (mask, batch, rows.to(torch.int32).reshape(-1))
        return self.state.calls.rows[2]


# ---- installation, and changes of the code ----


def install(transformer: Any, state: PatchState) -> Iterator[Place | str]:
    """Install the places of all blocks, and yield each place, or a note on one that runs unchanged."""
    register_processor()
    kinds = _stock()
    for name, block in transformer.transformer_blocks.named_children():
        where = f"transformer_blocks.{name}"
        if type(block.attn.processor) is kinds.QwenImage21AttnProcessor:
            yield PatchedAttention21(block.attn, state, Site(f"{where}.attn"))
        else:
            yield f"{where}.attn has its own {type(block.attn.processor).__name__}, which runs unchanged"
        if stock_forward(block, kinds.QwenImage21TransformerBlock):
            yield PatchedBlock21(block, state, Site(where))
        else:
            yield f"{where} has its own forward, which runs unchanged"


def refuse_processors(transformer: Any, visibility: str | Rule) -> None:
    """Raise ValueError: the patched places have the visibility of the model only."""
    raise ValueError(
        f'{type(transformer).__name__} has one causal sequence: patch supports its own visibility, "full", and not '
        f"{visibility!r}"
    )


def attention_change() -> str | None:
    """Describe a replaced function that the attention of diffusers calls by name; None if none is replaced."""
    from diffusers.models import attention_dispatch

    stock = _stock()
    names = ("apply_rotary_emb_qwen", "_qwenimage21_prepare_qkv", "_select_modulation_rows")
    homes = {"dispatch_attention_fn": attention_dispatch} | dict.fromkeys(names, stock)
    return replaced_attention(stock, homes, ("QwenImage21AttnProcessor",))


def changes(transformer: Any) -> Iterator[str]:
    """Describe replaced functions, other processors, and settings that differ from the configuration."""
    if reason := attention_change():
        yield reason
    if not len(transformer.transformer_blocks):
        yield "transformer_blocks is empty"
    rope, axes = transformer.pos_embed, tuple(transformer.config.axes_dims_rope)
    kinds = _stock().QwenImage21AttnProcessor, _stock().QwenImage21FlexAttnProcessor
    if type(rope).__name__ == "QwenImage21Rope" and not all(
        not ours.is_meta and torch.equal(ours.cpu(), theirs)
        for ours, theirs in zip(rope.freqs, _rotary_tables(axes), strict=True)
    ):
        yield "pos_embed has other frequencies than those of the model's configuration"
    for name, attn in found_modules(transformer, "transformer_blocks.*.attn"):
        try:
            qk_norm_eps(attn)
        except ValueError as error:
            yield f"{name}: {error}"
        yield from processor_changes(name, attn.processor, kinds)


@functools.lru_cache(maxsize=4)
def _rotary_tables(axes: tuple[int, ...]) -> list[Tensor]:
    with torch.device("cpu"), torch.inference_mode(False):
        return _stock().QwenImage21Rope(theta=10000, axes_dim=list(axes)).freqs


def _stock() -> Any:
    """Return diffusers' module of the transformer, imported when first needed."""
    from diffusers.models.transformers import transformer_qwenimage21

    return transformer_qwenimage21


PATCH = FamilyPatch(install, changes, refuse_processors)
