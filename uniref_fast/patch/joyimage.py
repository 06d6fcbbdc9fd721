"""Patched places of a `JoyImageEditPlusTransformer3DModel`: attention, blocks, and the tables of its rotary embedding.

The tables, which diffusers computes on the CPU in every forward, are kept from one forward to the next.

Shapes are diffusers': streams `[B, N, C]`, of B samples that are padded to N tokens each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from uniref_fast import ops
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.memo import version_of
from uniref_fast.models.joyimage import JOYIMAGE
from uniref_fast.models.packed import ForwardContext
from uniref_fast.models.qwen_image import Modulation, joint_qkv, qk_norm_eps, stream_rows
from uniref_fast.patch.families import FamilyPatch, Place
from uniref_fast.patch.guards import (
    changed_norm,
    changed_qk_norm,
    is_from,
    is_plain,
    norm_change,
    replaced_attention,
    stock_forward,
    unlike,
)
from uniref_fast.patch.processors import (
    PatchedBlock,
    PatchedMethod,
    fused_streams,
    joint_rows,
    refusal,
    register_processor,
)
from uniref_fast.patch.replay import Calls
from uniref_fast.patch.report import Site
from uniref_fast.patch.state import PatchState
from uniref_fast.patch.stock import found_modules, processor_changes
from uniref_fast.patch.streams import MASKED, StreamsAttention, plan_of_valid
from uniref_fast.patch.traced import TracedStreams
from uniref_fast.visibility import AttentionPlan, Rule, plan

__all__ = ["PATCH"]

_TABLES = "_get_rotary_pos_embed_for_range"
_KEPT_TABLES = 32
_NORMS = ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2")


def _stock() -> Any:
    from diffusers.models.transformers import transformer_joyimage_edit_plus

    return transformer_joyimage_edit_plus


def _attention_change() -> str | None:
    """Describe a replaced function that the attention of diffusers calls by name; None if none is replaced."""
    from diffusers.models import attention_dispatch

    stock = _stock()
    homes = {"dispatch_attention_fn": attention_dispatch, "_apply_rotary_emb_batched": stock}
    return replaced_attention(stock, homes, ("JoyImageEditPlusAttnProcessor",))


class _Attention(StreamsAttention):
    """Joint attention of diffusers' `JoyImageEditPlusAttnProcessor`."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return self._call(attn, (hidden_states, encoder_hidden_states), image_rotary_emb, attention_mask)

    def _untraced(self, others: tuple, kv: dict[str, Any]) -> str | None:
        return MASKED if others[1] is not None else None

    def _call_reason(self, attn: Any, streams: tuple[Any, ...], *others: Any) -> str | None:
        rotary, mask = others
        image, text = streams
        if rotary is None or text is None:
            return "called without text or rotary embedding"
        if reason := refusal(self.state, self.site, attn.head_dim, *streams, attention=True):
            return reason
        if any(x.ndim != 3 or len(x) != len(image) or not x.shape[1] for x in streams):
            return f"called with streams of shapes {[list(x.shape) for x in streams]}"
        if reason := self.settings_refusal():
            return reason
        shape = *image.shape[:2], attn.head_dim
        if len(rotary) != 2 or any(
            not is_plain(x) or x.dtype != torch.float32 or x.device != image.device or x.shape != shape for x in rotary
        ):
            return "the rotary embedding does not have one float32 value per image token and channel of a head"
        keys = len(image), 1, 1, image.shape[1] + text.shape[1]
        if mask is not None and not (is_plain(mask) and mask.dtype == torch.bool and mask.shape == keys):
            return "the mask is not a boolean tensor with one value per key"
        return None

    def _code_refusal(self, dtype: torch.dtype, device: torch.device) -> str | None:
        return _attention_change() or changed_qk_norm(self.attn, dtype, device, torch.nn.RMSNorm)

    def _computed(
        self, calls: Calls, streams: tuple[Any, ...], others: tuple, kv: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], tuple[str, str]] | str:
        attn: Any = calls.module
        image, text = streams
        heads: list[tuple[Tensor, Tensor, Tensor]] = []
        for name, stream in (("img_attn_qkv", image), ("txt_attn_qkv", text)):
            out = calls(name, stream)
            if reason := unlike(out, (*stream.shape[:2], 3 * attn.heads * attn.head_dim), stream, name):
                return reason
            q, k, v = (x.unflatten(-1, (-1, attn.head_dim)) for x in joint_rows(out).chunk(3, dim=-1))
            heads.append((q, k, v))
        calls.release()
        rotary, mask = others
        context, seen = self._tables(rotary, mask, text.shape[1], image, q)
        del out, q, k, v
        q, k, v = joint_qkv(attn, heads[0], heads[1], context)
        del heads
        joint, choice = self.attention(q, k, v, seen)
        del q, k, v
        outs = tuple(
            calls(name, stream_rows(joint, context.layout, kind).flatten(1).unflatten(0, stream.shape[:2]))
            for name, kind, stream in (("img_attn_proj", "image", image), ("txt_attn_proj", "text", text))
        )
        return outs, choice

    def _tables(self, rotary: Any, mask: Tensor | None, text: int, image: Tensor, like: Tensor) -> tuple[Any, Any]:
        """Return the context of a call and its plan, see `_context`; inside a graph a `TracedStreams` and its plan."""
        batch, length = image.shape[:2]
        if not (ops.is_traced() or torch.compiler.is_exporting()):
            return _context(self.state, rotary, mask, batch, text, length)
        context = TracedStreams(batch, text, length, _joint_tables(rotary, text), self.state.impl, like)
        return context, context.plan


def _joint_tables(rotary: Any, text: int) -> tuple[Tensor, Tensor]:
    """Return the tables cos and sin of all tokens, text first, which is not turned, float32 `[B * N, D / 2]` each."""
    halves = [table[:, :, ::2] for table in rotary]
    shape = (halves[0].shape[0], text, halves[0].shape[2])
    unturned = [halves[0].new_full(shape, value) for value in (1.0, 0.0)]
    cos, sin = (torch.cat(pair, dim=1).flatten(0, 1) for pair in zip(unturned, halves, strict=True))
    return cos, sin


def _context(
    state: PatchState, rotary: Any, mask: Tensor | None, batch: int, text: int, image: int
) -> tuple[ForwardContext, AttentionPlan]:
    """Return the context of a forward and its plan; the first block builds them.

    Args:
        state: State of the patched transformer.
        rotary: Tables cos and sin of the images, float32 `[B, N_image, D]` each, with every value twice.
        mask: Visible keys, bool `[B, 1, 1, N_image + N_text]`, or None for all. It is read on the host.
        batch: Number of samples.
        text: Text tokens of each sample.
        image: Image tokens of each sample.
    """
    key, saved = (batch, text, image, None if mask is None else version_of(mask)), state.calls.context
    if saved and saved[0] == key and saved[1] is mask and saved[2] is rotary[0] and saved[3] is rotary[1]:
        return saved[4]
    with torch.inference_mode(False), torch.no_grad():
        layout = SelfLayout.pack([Sample(text, (1, 1, image))] * batch, JOYIMAGE, clean_references=False)
        tables = _joint_tables(rotary, text)
        context = ForwardContext(layout=layout, visibility="full", rotary=tables, impl=state.impl, rounding="eager")
        seen = plan(layout, "full")
        if mask is not None:
            keys = mask.flatten(1)
            valid = torch.cat([keys[:, image:], keys[:, :image]], dim=1).tolist()
            if not all(map(all, valid)):
                seen = plan_of_valid(tuple(map(tuple, valid)))
    state.calls.context = (key, mask, *rotary, (context, seen))  # holding the tensors keeps their identity unambiguous
    return context, seen


class _Block(PatchedBlock):
    """Forward of one `JoyImageEditPlusTransformerBlock` with fused norms, modulation and residuals."""

    def _methods(self) -> tuple[Any, ...]:
        return (type(self.block).forward,)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return self._start(hidden_states, encoder_hidden_states, temb, image_rotary_emb, attention_mask)

    def call_refusal(self, image, text, temb, rotary, mask) -> str | None:  # type: ignore[override]
        if reason := refusal(self.state, self.site, self.block.attention_head_dim, image, text, temb):
            return reason
        if image.ndim != 3 or text.ndim != 3 or len(image) != len(text) or image.shape[2] != text.shape[2]:
            return f"called with streams of shapes {list(image.shape)} and {list(text.shape)}"
        if temb.shape != (len(image), 6, image.shape[2]):
            return f"modulation of shape {list(temb.shape)} for streams of {list(image.shape)}"
        return None

    def _code_refusal(self, dtype: torch.dtype, device: torch.device) -> str | None:
        from diffusers.models import normalization

        if self._methods() != self.methods:
            return f"forward of {type(self.block).__name__} was replaced"
        kind = normalization.FP32LayerNorm
        if not is_from(kind.forward, normalization):
            return "FP32LayerNorm.forward was replaced"
        for name in _NORMS:
            if reason := changed_norm(self.block._modules.get(name), self.block.dim, kind):
                return reason
        return norm_change()

    def _fused(self, calls: Calls, impl: str, image, text, temb, rotary, mask) -> Any:  # type: ignore[override]
        block, mods = self.block, []
        for name in ("img_mod", "txt_mod"):
            parts = calls(name, temb)
            if not isinstance(parts, (list, tuple)) or len(parts) != 6:
                return f"{name} did not return six tensors"
            for part in parts:
                if reason := unlike(part, (len(image), image.shape[2]), image, name):
                    return reason
            mods.append(Modulation(*(part if part.stride(-1) == 1 else part.contiguous() for part in parts)))
        rows = tuple(self.state.modulation_rows(None, len(x), x.shape[1], x.device) for x in (image, text))
        norms = (block.img_norm1, block.txt_norm1), (block.img_norm2, block.txt_norm2)
        attention = {"image_rotary_emb": rotary, "attention_mask": mask}
        fused = fused_streams(
            calls, self.state, impl, (image, text), mods, (rows[0], rows[1]), norms, ("img_mlp", "txt_mlp"), attention,
            clip=False,
        )  # fmt: skip
        return fused if isinstance(fused, str) else fused[::-1]


class _Tables(PatchedMethod):
    """Rotary tables of one image, kept from one forward to the next.

    Args:
        transformer: Transformer whose method the constructor replaces.
        site: Counters of this place.
    """

    def __init__(self, transformer: Any, site: Site) -> None:
        self.transformer, self.site, self.original = transformer, site, getattr(transformer, _TABLES)
        self._kept: dict[tuple, tuple[Tensor, Tensor]] = {}
        setattr(transformer, _TABLES, self.tables)

    def locate(self) -> None:
        """Raise RuntimeError if other code has replaced the method since."""
        if vars(self.transformer).get(_TABLES) != self.tables:
            raise RuntimeError(f"{_TABLES} was replaced after patching; undo that first, then unpatch")

    def remove(self) -> None:
        """Put the original back."""
        delattr(self.transformer, _TABLES)

    def tables(self, start: tuple[int, int, int], stop: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Return cos and sin of the tokens of an image, float32 `[N, D]` each, on the CPU."""
        if ops.is_traced() or torch.compiler.is_exporting():
            self.record_trace("torch.compile traces the code of diffusers")
            return self.original(start, stop)
        config = self.transformer.config
        key = (*start, *stop, config.theta, tuple(config.rope_dim_list or ()), torch.get_default_device())
        found = self._kept.pop(key, None)
        if found is None:
            with torch.inference_mode(False):
                found = self.original(start, stop)
            if len(self._kept) >= _KEPT_TABLES:
                self._kept.pop(next(iter(self._kept)))
            self.site.max_rel_error = 0.0  # a kept table is one that the original has computed
        else:
            self.site.calls["kept"] += 1
        self._kept[key] = found  # the last used one is the last to leave
        return found


def install(transformer: Any, state: PatchState) -> Iterator[Place | str]:
    """Install the places, and yield each place, or a note on one that runs unchanged."""
    register_processor()
    kinds = _stock()
    if _TABLES in vars(transformer):
        yield f"{_TABLES} was replaced, and runs unchanged"
    else:
        yield _Tables(transformer, Site(_TABLES))
    for name, block in transformer.double_blocks.named_children():
        where, processor = f"double_blocks.{name}", getattr(getattr(block, "attn", None), "processor", None)
        if type(processor) is kinds.JoyImageEditPlusAttnProcessor:
            yield _Attention(block.attn, state, Site(f"{where}.attn"))
        else:
            yield f"{where}.attn has its own {type(processor).__name__}, which runs unchanged"
        if stock_forward(block, kinds.JoyImageEditPlusTransformerBlock):
            yield _Block(block, state, Site(where))
        else:
            yield f"{where} has its own forward, which runs unchanged"


def refuse_processors(transformer: Any, visibility: str | Rule) -> None:
    """Raise ValueError: the patched places have the visibility of the model only."""
    raise ValueError(
        f"patch supports visibility='full' only for {type(transformer).__name__}, got {visibility!r}; use edit(), "
        "whose packed forward supports it"
    )


def changes(transformer: Any) -> Iterator[str]:
    """Describe replaced functions and other processors."""
    if reason := _attention_change():
        yield reason
    if not len(transformer.double_blocks):
        yield "double_blocks is empty"
    for name, attn in found_modules(transformer, "double_blocks.*.attn"):
        try:
            qk_norm_eps(attn)
        except ValueError as error:
            yield f"{name}: {error}"
        yield from processor_changes(name, attn.processor, (_stock().JoyImageEditPlusAttnProcessor,))


PATCH = FamilyPatch(install, changes, refuse_processors)
