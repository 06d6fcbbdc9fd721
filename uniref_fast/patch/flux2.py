"""Patched places of a `Flux2Transformer2DModel`: attention processors and forwards of both kinds of block.

They keep the code of diffusers under torch.compile, whose graphs have these operators already. The attention of
klein-KV fills and reads the cache of its pipeline as the original does.

Shapes are diffusers': streams `[B, N, C]`, of B samples with N tokens each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from uniref_fast import ops
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.models.eight_bit import attend
from uniref_fast.models.flux2 import FLUX2, split_projection
from uniref_fast.models.packed import ForwardContext
from uniref_fast.models.qwen_image import Modulation, has_fused_projections, joint_qkv, qk_norm_eps, stream_rows
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
    PatchedBlock,
    fused_streams,
    joint_rows,
    outside_compiler,
    refusal,
    register_processor,
    whole_stream,
)
from uniref_fast.patch.replay import Calls
from uniref_fast.patch.report import Site
from uniref_fast.patch.state import PatchState
from uniref_fast.patch.stock import found_modules, processor_changes
from uniref_fast.patch.streams import TRACED, StreamsAttention
from uniref_fast.visibility import AttentionPlan, Rule

__all__ = ["PATCH"]

_PROCESSORS = ("Flux2AttnProcessor", "Flux2KVAttnProcessor")
_SINGLE_PROCESSORS = ("Flux2ParallelSelfAttnProcessor", "Flux2KVParallelSelfAttnProcessor")


def _stock() -> Any:
    from diffusers.models.transformers import transformer_flux2

    return transformer_flux2


def _attention_change() -> str | None:
    """Describe a replaced function that the attention of diffusers calls by name; None if none is replaced."""
    from diffusers.models import attention_dispatch, embeddings

    stock = _stock()
    homes = {"dispatch_attention_fn": attention_dispatch, "apply_rotary_emb": embeddings}
    homes |= dict.fromkeys(("_get_qkv_projections", "_flux2_kv_causal_attention"), stock)
    return replaced_attention(stock, homes, _PROCESSORS + _SINGLE_PROCESSORS)


# ---- attention ----


class _Attention(StreamsAttention):
    """A processor of FLUX.2."""

    def _reason(self, attn: Any, streams: tuple[Any, ...], *others: Any) -> str | None:
        mask, rotary = others
        if rotary is None or mask is not None or any(stream is None for stream in streams):
            return "called without text or rotary embedding, or with an external mask"
        if reason := refusal(self.state, self.site, attn.head_dim, *streams):
            return reason
        if any(x.ndim != 3 or len(x) != len(streams[0]) or not x.shape[1] for x in streams):
            return f"called with streams of shapes {[list(x.shape) for x in streams]}"
        if reason := self.settings_refusal():
            return reason
        shape = sum(x.shape[1] for x in streams), attn.head_dim
        if len(rotary) != 2 or any(
            not is_plain(x) or x.dtype != torch.float32 or x.device != streams[0].device or x.shape != shape
            for x in rotary
        ):
            return "the rotary embedding does not have one float32 value per token and channel of a head"
        first = streams[0]
        return _attention_change() or changed_qk_norm(self.attn, first.dtype, first.device, torch.nn.RMSNorm)

    def _joint(
        self, q: Tensor, k: Tensor, v: Tensor, context: ForwardContext, batch: int, text: int, kv: dict[str, Any]
    ) -> tuple[Tensor, tuple[str, str]]:
        """Return the attention of all queries `[B * N, H, D]`, and the implementation with the reason of its choice.

        Args:
            q, k, v: Queries, keys and values, `[B * N, H, D]` each.
            context: Context of the call.
            batch: Number of samples B.
            text: Number of text tokens of each sample.
            kv: Arguments of the cache of klein-KV.
        """
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
        needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        choice = ops.explain_attention(q.detach(), plan, context.impl, backward=needs_grad)
        return attend(q, k, v, plan, choice[0], False, ""), choice


class _TwoStreams(_Attention):
    """Joint attention of diffusers' `Flux2AttnProcessor`."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        return self._call(attn, (hidden_states, encoder_hidden_states), attention_mask, image_rotary_emb)

    def _computed(
        self, calls: Calls, streams: tuple[Any, ...], others: tuple, kv: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], tuple[str, str]] | str:
        attn: Any = calls.module
        image, text = streams
        qkv: list[Tensor] = []
        for stream, fused, names in (
            (image, "to_qkv", ("to_q", "to_k", "to_v")),
            (text, "to_added_qkv", ("add_q_proj", "add_k_proj", "add_v_proj")),
        ):
            one = (fused,) if has_fused_projections(attn) else names
            for name in one:
                out = calls(name, stream)
                width = attn.inner_dim * (3 // len(one))
                if reason := unlike(out, (*stream.shape[:2], width), stream, name):
                    return reason
                qkv += out.chunk(3 // len(one), dim=-1)
        calls.release()
        context = _context(self.state, others[1], len(image), text.shape[1], image.shape[1])
        heads = [joint_rows(x).unflatten(-1, (-1, attn.head_dim)) for x in qkv]
        del qkv, out
        q, k, v = joint_qkv(attn, (heads[0], heads[1], heads[2]), (heads[3], heads[4], heads[5]), context)
        del heads
        joint, choice = self._joint(q, k, v, context, len(image), text.shape[1], kv)
        del q, k, v
        image_out, text_out = (
            stream_rows(joint, context.layout, name).flatten(1).unflatten(0, stream.shape[:2])
            for name, stream in (("image", image), ("text", text))
        )
        text_out = calls("to_add_out", text_out)
        return (calls("to_out.1", calls("to_out.0", image_out)), text_out), choice


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
    ) -> tuple[tuple[Tensor, ...], tuple[str, str]] | str:
        attn: Any = calls.module
        (x,) = streams
        fused = calls("to_qkv_mlp_proj", x)
        width = 3 * attn.inner_dim + attn.mlp_hidden_dim * attn.mlp_mult_factor
        if reason := unlike(fused, (*x.shape[:2], width), x, "to_qkv_mlp_proj"):
            return reason
        qkv, mlp = split_projection(attn, joint_rows(fused))
        mlp = calls("mlp_act_fn", mlp.unflatten(0, x.shape[:2]))
        if reason := unlike(mlp, (*x.shape[:2], attn.mlp_hidden_dim), x, "mlp_act_fn"):
            return reason
        context = _context(self.state, others[1], len(x), 0, x.shape[1])
        q, k, v = (part.unflatten(-1, (-1, attn.head_dim)) for part in qkv.chunk(3, dim=-1))
        q, k, v = joint_qkv(attn, (q, k, v), None, context)
        joint, choice = self._joint(q, k, v, context, len(x), kv.get("num_txt_tokens", 0), kv)
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


def _context(state: PatchState, rotary: Any, batch: int, text: int, image: int) -> ForwardContext:
    """Return the context of a call; blocks of a kind share it in one forward.

    Args:
        state: State of the patched transformer.
        rotary: Tables cos and sin of text and image, float32 `[N, D]` each, with every value twice.
        batch: Number of samples.
        text: Text tokens of each sample; 0 for a stream of all tokens.
        image: Image tokens of each sample, or all tokens.
    """
    key, saved = (batch, text, image), state.calls.context
    if saved and saved[0] == key and saved[1] is rotary[0] and saved[2] is rotary[1]:
        return saved[3]
    with torch.inference_mode(False), torch.no_grad():
        layout = SelfLayout.pack([Sample(text, (1, 1, image))] * batch, FLUX2, clean_references=False)
        cos, sin = (table[:, ::2].repeat(batch, 1) for table in rotary)
        context = ForwardContext(layout=layout, visibility="full", rotary=(cos, sin), impl=state.impl, rounding="eager")
    state.calls.context = (key, *rotary, context)  # holding the tensors keeps their identity unambiguous
    return context


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


class _Block(PatchedBlock):
    """Forward of a block of FLUX.2."""

    norms: tuple[str, ...]

    def _methods(self) -> tuple[Any, ...]:
        return type(self.block).forward, _stock().Flux2Modulation.split

    def traced_refusal(self) -> str | None:
        if self._methods() != self.methods:
            return f"forward of {type(self.block).__name__} or Flux2Modulation.split was replaced"
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


class _TwoStreamBlock(_Block):
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
        if torch.compiler.is_compiling():
            self.record_trace(TRACED)
            return self.original(*arguments)
        return outside_compiler()(self._run, *arguments)

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


class _OneStreamBlock(_Block):
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
        if torch.compiler.is_compiling():
            self.record_trace(TRACED)
            return self.original(*arguments)
        return outside_compiler()(self._run, *arguments)

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
    kinds = {
        "transformer_blocks": ("Flux2TransformerBlock", _TwoStreamBlock, _PROCESSORS, (_TwoStreams, _TwoStreamsKV)),
        "single_transformer_blocks": (
            "Flux2SingleTransformerBlock", _OneStreamBlock, _SINGLE_PROCESSORS, (_OneStream, _OneStreamKV)
        ),
    }  # fmt: skip
    for group, (block_class, block_place, processors, places) in kinds.items():
        by_class: dict[Any, Callable[..., Place]] = {
            getattr(_stock(), name): place for name, place in zip(processors, places, strict=True)
        }
        for name, block in getattr(transformer, group).named_children():
            where, processor = f"{group}.{name}", getattr(getattr(block, "attn", None), "processor", None)
            if type(processor) in by_class:
                yield by_class[type(processor)](block.attn, state, Site(f"{where}.attn"))
            else:
                yield f"{where}.attn has its own {type(processor).__name__}, which runs unchanged"
            if stock_forward(block, getattr(_stock(), block_class)):
                yield block_place(block, state, Site(where))
            else:
                yield f"{where} has its own forward, which runs unchanged"


def refuse_processors(transformer: Any, visibility: str | Rule) -> None:
    """Raise ValueError: calls of this transformer do not say which tokens are those of a reference."""
    raise ValueError(
        f"patch supports visibility='full' only for {type(transformer).__name__}, whose calls have no image sizes, got "
        f"{visibility!r}; use edit(), whose packed forward supports it"
    )


def changes(transformer: Any) -> Iterator[str]:
    """Describe replaced functions, other processors, and settings that differ from the configuration."""
    if reason := _attention_change():
        yield reason
    rope, config = transformer.pos_embed, transformer.config
    if (rope.theta, tuple(rope.axes_dim)) != (config.rope_theta, tuple(config.axes_dims_rope)):
        yield "pos_embed has other frequencies than those of the model's configuration"
    for path, processors in (
        ("transformer_blocks.*.attn", _PROCESSORS),
        ("single_transformer_blocks.*.attn", _SINGLE_PROCESSORS),
    ):
        kinds = tuple(getattr(_stock(), name) for name in processors)
        found = [*found_modules(transformer, path)]
        if len({type(getattr(attn.processor, "stock", attn.processor)) for _, attn in found}) > 1:
            yield f"{path} has processors of different classes"
        for name, attn in found:
            try:
                qk_norm_eps(attn)
            except ValueError as error:
                yield f"{name}: {error}"
            yield from processor_changes(name, attn.processor, kinds)


PATCH = FamilyPatch(install, changes, refuse_processors)
