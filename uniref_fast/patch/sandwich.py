"""Patched places of `ZImageTransformer2DModel` and `BriaFibo2Transformer2DModel`, whose blocks are nearly the same.

The blocks normalise before and after each branch and have a scale and a tanh gate for each. A noise mask selects the
modulation of the sampled t or that of clean tokens for every token. Blocks of Fibo 2 may read the text encoder between
both branches; that attention, those of the perceiver and the feed-forwards are called as they are.

Shapes are diffusers': the stream is `[B, N, C]`, of B samples with N tokens each.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uniref_fast import ops
from uniref_fast.layout import Kind, Segment, SelfLayout
from uniref_fast.memo import version_of
from uniref_fast.models.eight_bit import feed_forward
from uniref_fast.models.packed import ForwardContext
from uniref_fast.models.qwen_image import joint_qkv, qk_norm_eps
from uniref_fast.models.sandwich import add, add_and_normalise, branch_of, normalise
from uniref_fast.patch.families import FamilyPatch, Place
from uniref_fast.patch.guards import (
    changed_qk_norm,
    changed_rms_norm,
    innermost_forward,
    is_plain,
    replaced_attention,
    unlike,
)
from uniref_fast.patch.processors import (
    PatchedBlock,
    joint_rows,
    refusal,
    register_processor,
)
from uniref_fast.patch.replay import Calls
from uniref_fast.patch.report import Site
from uniref_fast.patch.state import PatchState, batch_rows
from uniref_fast.patch.stock import processor_changes
from uniref_fast.patch.streams import MASKED, Choice, StreamsAttention
from uniref_fast.patch.traced import TracedStreams
from uniref_fast.visibility import Rule

__all__ = ["FIBO_2", "Z_IMAGE", "head_width"]


@dataclass(frozen=True)
class _Model:
    """Names in diffusers of one of the models.

    Attributes:
        module: Module of its transformer.
        block: Class of its blocks.
        processor: Class of the attention processors.
        lists: Lists of blocks of the transformer; one may be None.
        reads_text: Blocks take the states and the mask of the text encoder.
    """

    module: str
    block: str
    processor: str
    lists: tuple[str, ...]
    reads_text: bool = False

    @functools.cached_property
    def stock(self) -> Any:
        """Module of the transformer, imported when it is first needed."""
        import importlib

        return importlib.import_module(f"diffusers.models.transformers.{self.module}")

    def attention_change(self) -> str | None:
        """Describe a replaced function that the attention of diffusers calls by name; None if none is replaced."""
        from diffusers.models import attention_dispatch

        return replaced_attention(self.stock, {"dispatch_attention_fn": attention_dispatch}, (self.processor,))

    def blocks(self, transformer: Any) -> Iterator[tuple[str, Any]]:
        """Yield the name and the module of every block."""
        for group in self.lists:
            for name, block in (getattr(transformer, group) or torch.nn.ModuleList()).named_children():
                yield f"{group}.{name}", block


_Z_IMAGE = _Model(
    "transformer_z_image", "ZImageTransformerBlock", "ZSingleStreamAttnProcessor",
    ("noise_refiner", "context_refiner", "siglip_refiner", "layers"),
)  # fmt: skip
_FIBO_2 = _Model(
    "transformer_bria_fibo2", "BriaFibo2TransformerBlock", "BriaFibo2AttnProcessor", ("noise_refiner", "layers"), True
)


def head_width(attn: Any) -> int:
    """Return the channels of a head."""
    return attn.to_q.out_features // attn.heads


class SandwichAttention(StreamsAttention):
    """Self-attention of diffusers' `ZSingleStreamAttnProcessor` and `BriaFibo2AttnProcessor` on fused operators."""

    def __init__(self, attn: Any, state: PatchState, site: Site, model: _Model) -> None:
        self.model, self.head_dim = model, head_width(attn)
        super().__init__(attn, state, site)

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        return self._call(attn, (hidden_states,), encoder_hidden_states, attention_mask, freqs_cis)

    def _untraced(self, others: tuple, kv: dict[str, Any]) -> str | None:
        return None if others[1] is None else MASKED

    def _call_reason(self, attn: Any, streams: tuple[Any, ...], *others: Any) -> str | None:
        (x,), (text, mask, freqs) = streams, others
        if text is not None or freqs is None:
            return "called for another sequence, or without rotary embedding"
        if reason := refusal(self.state, self.site, self.head_dim, x, attention=True):
            return reason
        if x.ndim != 3 or not x.numel():
            return f"called with a stream of shape {list(x.shape)}"
        if reason := self.settings_refusal():
            return reason
        batch, length = x.shape[:2]
        if (
            not is_plain(freqs) or freqs.dtype != torch.complex64 or freqs.device != x.device or freqs.ndim != 3
            or freqs.shape[0] not in (1, batch) or freqs.shape[1:] != (length, self.head_dim // 2)
        ):  # fmt: skip
            return "the rotary embedding does not have one complex value per token and pair of channels"
        if mask is not None and not (is_plain(mask) and mask.dtype == torch.bool and mask.shape == (batch, length)):
            return "the mask of keys is not a boolean tensor with one value per key"
        return None

    def _code_refusal(self, dtype: torch.dtype, device: torch.device) -> str | None:
        return self.model.attention_change() or changed_qk_norm(self.attn, dtype, device)

    def _computed(
        self, calls: Calls, streams: tuple[Any, ...], others: tuple, kv: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], Choice] | str:
        attn: Any = calls.module
        (x,), (_, mask, freqs) = streams, others
        qkv: list[Tensor] = []
        shared = self.shared_input(attn.to_q, x)
        for name in ("to_q", "to_k", "to_v"):
            out = calls(name, shared)
            if reason := unlike(out, (*x.shape[:2], attn.heads * self.head_dim), x, name):
                return reason
            qkv.append(joint_rows(out).unflatten(-1, (attn.heads, -1)))
        del shared
        calls.release()
        context = _context(self.state, x, mask, freqs, qkv[0])
        q, k, v = joint_qkv(attn, (qkv[0], qkv[1], qkv[2]), None, context)
        del qkv, out
        out, choice = self.attention(q, k, v, context.plan)
        del q, k, v
        out = out.flatten(1).unflatten(0, x.shape[:2])
        for i in range(len(attn.to_out)):  # the second, if there is one, is a dropout
            out = calls(f"to_out.{i}", out)
        return (out,), choice


def _context(state: PatchState, x: Tensor, mask: Tensor | None, freqs: Tensor, like: Tensor) -> Any:
    """Return the context of a call; blocks that are called with the same tables share it.

    Args:
        state: State of the patched transformer.
        x: Stream.
        mask: Keys that are visible, bool `[B, N]`, or None for all.
        freqs: Complex rotary table, `[B or 1, N, D / 2]`.
        like: Queries, `[B * N, H, D]`.

    Returns:
        A `ForwardContext`, or inside a graph a `TracedStreams`, which has the attributes that attention reads.
    """
    batch, length = x.shape[:2]
    if ops.is_traced() or torch.compiler.is_exporting():
        cos, sin = torch.view_as_real(freqs).flatten(0, 1).unbind(-1)
        return TracedStreams(batch, 0, length, (cos, sin), state.impl, like)
    saved = state.calls.context
    key = batch, length, None if mask is None else version_of(mask)
    if saved and saved[0] == key and saved[1] is mask and saved[2] is freqs:
        return saved[3]
    with torch.inference_mode(False), torch.no_grad():
        valid = None if mask is None else tuple(map(tuple, mask.tolist()))
        table = freqs.expand(batch, -1, -1).flatten(0, 1)
        context = ForwardContext(
            layout=_layout(batch, length, valid), visibility="full", impl=state.impl, rounding="eager",
            rotary=(table.real.contiguous(), table.imag.contiguous()),
        )  # fmt: skip
    state.calls.context = (key, mask, freqs, context)  # holding the tensors keeps their identity
    return context


@functools.lru_cache(maxsize=16)
def _layout(batch: int, length: int, valid: tuple[tuple[bool, ...], ...] | None) -> SelfLayout:
    """Return a layout of samples of one length for attention alone; keys that are not valid are padding."""
    found: list[Segment] = []
    at = 0
    for sample in range(batch):
        seen = (True,) * length if valid is None else valid[sample]
        for state, group in itertools.groupby(seen):
            tokens = len(list(group))
            kind, grid = (Kind.TARGET, (1, 1, tokens)) if state else (Kind.PADDING, (tokens, 1, 1))
            found.append(Segment(kind, sample, sample, 0, grid, at, at, sample, (0, 0, 0)))
            at += tokens
    return SelfLayout(tuple(found), batch, False)


class SandwichBlock(PatchedBlock):
    """Forward of a block of both models with fused norms, modulation and residuals."""

    def __init__(self, block: Any, state: PatchState, site: Site, model: _Model) -> None:
        self.model = model
        super().__init__(block, state, site)

    def _methods(self) -> tuple[Any, ...]:
        return type(self.block).forward, self.model.stock.select_per_token

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        attn_mask: Tensor | None,
        freqs_cis: Tensor,
        adaln_input: Tensor | None = None,
        noise_mask: Tensor | None = None,
        adaln_noisy: Tensor | None = None,
        adaln_clean: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        arguments: tuple[Any, ...] = x, attn_mask, freqs_cis, adaln_input, noise_mask, adaln_noisy, adaln_clean
        if self.model.reads_text:
            arguments += encoder_hidden_states, encoder_attention_mask
        return self._start(*arguments)

    def call_refusal(self, x: Tensor, *others: Any) -> str | None:  # type: ignore[override]
        _, _, shared, noise_mask, noisy, clean = others[:6]
        tables = () if not self._modulated else (shared,) if noise_mask is None else (noisy, clean)
        head_dim = head_width(self.block.attention)
        if any(table is None for table in tables):
            return "called without an embedding of the time"
        if reason := refusal(self.state, self.site, head_dim, x, *tables):
            return reason
        if x.ndim != 3 or not x.numel():
            return f"called with a stream of shape {list(x.shape)}"
        if any(table.ndim != 2 or len(table) != len(x) for table in tables):
            return f"embeddings of the time of shapes {[list(table.shape) for table in tables]} for {len(x)} samples"
        if noise_mask is not None and not (is_plain(noise_mask) and noise_mask.shape == x.shape[:2]):
            return "noise_mask does not have one value per token"
        return None

    def _code_refusal(self, dtype: torch.dtype, device: torch.device) -> str | None:
        if self._methods() != self.methods:
            return f"forward of {type(self.block).__name__} or select_per_token was replaced"
        names = (*_NORMS, *(_CROSS_NORMS if self._has_text else ()))
        for norm in map(self.block._modules.get, names):
            if reason := changed_rms_norm(norm, dtype, device, "norm of a block"):
                return reason
        return None

    @property
    def _modulated(self) -> bool:
        return getattr(self.block, "modulation", True)

    @property
    def _has_text(self) -> bool:
        return getattr(self.block, "cross_attention", None) is not None

    def _fused(self, calls: Calls, impl: str, x: Tensor, mask: Any, freqs: Tensor, *others: Any) -> Any:  # type: ignore[override]
        """Return the stream, `[B, N, C]`, computed by one implementation, or the reason why that is not possible."""
        shared, noise_mask, noisy, clean = others[:4]
        block, shape = self.block, tuple(x.shape)
        found = self._modulation(calls, x, shared, noise_mask, noisy, clean)
        if isinstance(found, str):
            return found
        (scale1, gate1, scale2, gate2), rows = found
        options: Any = {"impl": impl, "rounding": "eager"}
        stream = joint_rows(x)
        hidden = normalise(stream, block.attention_norm1, scale1, rows, **options).view(shape)
        out = calls("attention", hidden, attention_mask=mask, freqs_cis=freqs)
        if reason := unlike(out, shape, x, "attention"):
            return reason
        branch = branch_of(joint_rows(out), block.attention_norm2, gate1)
        if self._has_text:
            stream, hidden = add_and_normalise(stream, branch, block.cross_attn_norm1, None, rows, **options)
            text = {"encoder_hidden_states": others[4], "attention_mask": others[5]}
            out = calls("cross_attention", hidden.view(shape), **text)
            if reason := unlike(out, shape, x, "cross-attention"):
                return reason
            branch = branch_of(joint_rows(out), block.cross_attn_norm2, block.cross_attn_gate.tanh()[None])
        stream, hidden = add_and_normalise(stream, branch, block.ffn_norm1, scale2, rows, **options)
        if self.state.parts is None:
            out = calls.by_parts("feed_forward", hidden.view(shape))
        else:
            out = calls("feed_forward", hidden.view(shape), run=functools.partial(feed_forward, impl=self.state.impl))
        if reason := unlike(out, shape, x, "the feed-forward"):
            return reason
        stream = add(stream, branch_of(joint_rows(out), block.ffn_norm2, gate2), rows, **options)
        return torch.ops.aten._unsafe_view(stream, shape)  # for autograd not a view: nothing else refers to the rows

    def _modulation(self, calls: Calls, x: Tensor, shared: Any, noise_mask: Any, noisy: Any, clean: Any) -> Any:
        """Return scale, gate, scale and gate, `[R, C]` each, and the row of every token; or a reason."""
        if not self._modulated:
            return (None,) * 4, None
        batch, length, channels = x.shape
        tables = []
        for embedding in (shared,) if noise_mask is None else (noisy, clean):
            tables.append(calls("adaLN_modulation", embedding))
            if reason := unlike(tables[-1], (batch, 4 * channels), x, "adaLN_modulation"):
                return reason
        scale1, gate1, scale2, gate2 = torch.cat(tables).chunk(4, dim=1)
        table = 1.0 + scale1, gate1.tanh(), 1.0 + scale2, gate2.tanh()
        return table, self._rows_of(noise_mask, batch, length, x.device)

    def _rows_of(self, noise_mask: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
        """Return the row of the table for every token, int32 `[B * N]`; the rows of clean tokens are the last B."""
        if noise_mask is None or ops.is_traced() or torch.compiler.is_exporting():
            return self.state.modulation_rows(None if noise_mask is None else noise_mask != 1, batch, length, device)
        saved = self.state.calls.rows
        if saved and saved[0] is noise_mask and saved[1] == (batch, version_of(noise_mask)):
            return saved[2]
        rows = batch_rows(batch, length, device).view(batch, length)
        rows = (rows + (noise_mask != 1).to(torch.int32) * batch).reshape(-1)
        self.state.calls.rows = (noise_mask, (batch, version_of(noise_mask)), rows)
        return rows


_NORMS = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")
_CROSS_NORMS = ("cross_attn_norm1", "cross_attn_norm2")


# ---- installation, and changes of the code ----


def _install(model: _Model, transformer: Any, state: PatchState) -> Iterator[Place | str]:
    """Install the places of all blocks, and yield each place, or a note on one that runs unchanged."""
    register_processor()
    kind, processor_kind = getattr(model.stock, model.block), getattr(model.stock, model.processor)
    for name, block in model.blocks(transformer):
        processor = getattr(getattr(block, "attention", None), "processor", None)
        if type(processor) is processor_kind:
            yield SandwichAttention(block.attention, state, Site(f"{name}.attention"), model)
        else:
            yield f"{name}.attention has its own {type(processor).__name__}, which runs unchanged"
        forward = getattr(*innermost_forward(block))
        if isinstance(block, kind) and getattr(forward, "__func__", None) is kind.forward:
            yield SandwichBlock(block, state, Site(name), model)
        else:
            yield f"{name} has its own forward, which runs unchanged"


def _refuse_processors(transformer: Any, visibility: str | Rule) -> None:
    """Raise ValueError: the patched places have the visibility of the model only."""
    raise ValueError(
        f"patch supports visibility='full' only for {type(transformer).__name__}, whose calls have no image sizes, got "
        f"{visibility!r}"
    )


def _changes(model: _Model, transformer: Any) -> Iterator[str]:
    """Describe replaced functions, other processors, and settings that differ from the configuration."""
    if reason := model.attention_change():
        yield reason
    rope, config = transformer.rope_embedder, transformer.config
    if (rope.theta, tuple(rope.axes_dims)) != (config.rope_theta, tuple(config.axes_dims)):
        yield "rope_embedder has other frequencies than those of the model's configuration"
    kind = getattr(model.stock, model.processor)
    for name, block in model.blocks(transformer):
        attn: Any = getattr(block, "attention", None)
        try:
            qk_norm_eps(attn)
        except ValueError as error:
            yield f"{name}.attention: {error}"
        yield from processor_changes(f"{name}.attention", attn.processor, (kind,))


def _family_patch(model: _Model) -> FamilyPatch:
    return FamilyPatch(functools.partial(_install, model), functools.partial(_changes, model), _refuse_processors)


Z_IMAGE, FIBO_2 = _family_patch(_Z_IMAGE), _family_patch(_FIBO_2)
