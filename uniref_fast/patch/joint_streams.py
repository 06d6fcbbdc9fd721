"""Patched attention of transformers with blocks of two streams, text and image, and blocks of one stream of both.

The attention of a block gets the rotary tables of all its tokens, text first. Families derive their processors from
these classes.

Shapes are diffusers': streams `[B, N, C]`, of B samples with N tokens each.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from uniref_fast import ops
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.memo import version_of
from uniref_fast.models.flux2 import FLUX2
from uniref_fast.models.packed import ForwardContext
from uniref_fast.models.qwen_image import has_fused_projections, joint_qkv, qk_norm_eps, stream_rows
from uniref_fast.patch.families import Place
from uniref_fast.patch.guards import changed_qk_norm, is_plain, replaced_attention, stock_forward, unlike
from uniref_fast.patch.processors import joint_rows, refusal
from uniref_fast.patch.replay import Calls
from uniref_fast.patch.report import Site
from uniref_fast.patch.state import PatchState
from uniref_fast.patch.stock import found_modules, processor_changes
from uniref_fast.patch.streams import MASKED, Choice, StreamsAttention, plan_of_valid
from uniref_fast.patch.traced import TracedStreams
from uniref_fast.visibility import AttentionPlan, Rule

__all__ = [
    "OneStreamAttention",
    "TextImageAttention",
    "TwoStreamAttention",
    "attention_change",
    "attention_changes",
    "projected",
    "refuse_visibility",
    "rotary_changes",
    "stock_places",
    "stream_context",
]


class TextImageAttention(StreamsAttention):
    """A processor whose subclasses have the signature of the original, by which diffusers filters arguments.

    Attributes:
        takes_mask: True if a mask of padded tokens, bool `[B, 1, 1, N]`, runs on fused operators.
        qk_norm: Class of the QK norms; None is diffusers' `RMSNorm`.
        rounding: Rounding of QK norm and rotary embedding, see `ops.qk_norm_rope`.
    """

    takes_mask: ClassVar[bool] = False
    qk_norm: ClassVar[Any] = torch.nn.RMSNorm
    rounding: ClassVar[ops.Rounding] = "eager"

    def code_change(self) -> str | None:
        """Describe a replaced function that the attention of diffusers calls by name; None if none is replaced."""
        raise NotImplementedError

    def _untraced(self, others: tuple, kv: dict[str, Any]) -> str | None:
        if others[0] is not None:
            return MASKED
        return "a cache of keys and values inside torch.compile" if kv.get("kv_cache") is not None else None

    def _call_reason(self, attn: Any, streams: tuple[Any, ...], *others: Any) -> str | None:
        mask, rotary = others
        if rotary is None or any(stream is None for stream in streams) or (mask is not None and not self.takes_mask):
            return "called without text or rotary embedding, or with an external mask"
        head_dim = attn.inner_dim // attn.heads
        if reason := refusal(self.state, self.site, head_dim, *streams, attention=True):
            return reason
        if any(x.ndim != 3 or len(x) != len(streams[0]) or not x.shape[1] for x in streams):
            return f"called with streams of shapes {[list(x.shape) for x in streams]}"
        if reason := self.settings_refusal():
            return reason
        first, length = streams[0], sum(x.shape[1] for x in streams)
        if len(rotary) != 2 or any(
            not is_plain(x) or x.dtype != torch.float32 or x.device != first.device or x.shape != (length, head_dim)
            for x in rotary
        ):
            return "the rotary embedding does not have one float32 value per token and channel of a head"
        if mask is not None and not (
            is_plain(mask) and mask.dtype == torch.bool and mask.shape == (len(first), 1, 1, length)
        ):
            return "the attention mask is not a boolean tensor with one value per token"
        return None

    def _code_refusal(self, dtype: torch.dtype, device: torch.device) -> str | None:
        return self.code_change() or self._qk_norm_change(dtype, device)

    def _qk_norm_change(self, dtype: torch.dtype, device: torch.device) -> str | None:
        """Describe how the QK norms differ from those that the fused operator takes, or return None.

        Args:
            dtype, device: Dtype and device of the streams.
        """
        return changed_qk_norm(self.attn, dtype, device, self.qk_norm)

    def _joint(
        self, q: Tensor, k: Tensor, v: Tensor, context: ForwardContext, batch: int, text: int, mask: Any, kv: dict
    ) -> tuple[Tensor, Choice]:
        """Return the attention of all queries `[B * N, H, D]`, and the implementation with the reason of its choice.

        Args:
            q, k, v: Queries, keys and values, `[B * N, H, D]` each.
            context: Context of the call.
            batch: Number of samples B.
            text: Number of text tokens of each sample.
            mask: Valid tokens, bool `[B, 1, 1, N]`, or None for all.
            kv: Arguments of a cache of keys and values.
        """
        plan = context.plan if mask is None else _masked_plan(self.state, mask)
        return self.attention(q, k, v, plan)


class TwoStreamAttention(TextImageAttention):
    """Joint attention of a block with two streams."""

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
    ) -> tuple[tuple[Tensor, ...], Choice] | str:
        attn: Any = calls.module
        mask, rotary = others
        image, text = streams
        qkv: list[Tensor] = []
        for stream, fused, names in (
            (image, "to_qkv", ("to_q", "to_k", "to_v")),
            (text, "to_added_qkv", ("add_q_proj", "add_k_proj", "add_v_proj")),
        ):
            parts = projected(calls, self.shared_input(getattr(attn, names[0], None), stream), fused, names)
            if isinstance(parts, str):
                return parts
            qkv += parts
            del parts
        calls.release()
        head_dim = attn.inner_dim // attn.heads
        heads = [joint_rows(x).unflatten(-1, (-1, head_dim)) for x in qkv]
        del qkv
        lengths = text.shape[1], image.shape[1]
        context = stream_context(self.state, rotary, len(image), *lengths, heads[0], self.rounding)
        q, k, v = joint_qkv(attn, (heads[0], heads[1], heads[2]), (heads[3], heads[4], heads[5]), context)
        del heads
        joint, choice = self._joint(q, k, v, context, len(image), text.shape[1], mask, kv)
        del q, k, v
        image_out, text_out = (
            stream_rows(joint, context.layout, name).flatten(1).unflatten(0, stream.shape[:2])
            for name, stream in (("image", image), ("text", text))
        )
        text_out = calls("to_add_out", text_out)
        return (calls("to_out.1", calls("to_out.0", image_out)), text_out), choice


class OneStreamAttention(TextImageAttention):
    """Attention of a block with one stream of text and image, without output projection."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        streams = (hidden_states,) if encoder_hidden_states is None else (hidden_states, encoder_hidden_states)
        return self._call(attn, streams, attention_mask, image_rotary_emb)

    def _arguments(self, streams: tuple[Any, ...], others: tuple) -> tuple[Any, ...]:
        return (*streams, *[None] * (2 - len(streams)), *others)

    def _call_reason(self, attn: Any, streams: tuple[Any, ...], *others: Any) -> str | None:
        return "called with two streams" if len(streams) > 1 else super()._call_reason(attn, streams, *others)

    def _computed(
        self, calls: Calls, streams: tuple[Any, ...], others: tuple, kv: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], Choice] | str:
        attn: Any = calls.module
        mask, rotary = others
        (x,) = streams
        parts = projected(calls, self.shared_input(attn.to_q, x), "to_qkv", ("to_q", "to_k", "to_v"))
        if isinstance(parts, str):
            return parts
        calls.release()
        head_dim = attn.inner_dim // attn.heads
        q, k, v = (joint_rows(part).unflatten(-1, (-1, head_dim)) for part in parts)
        del parts
        context = stream_context(self.state, rotary, len(x), 0, x.shape[1], q, self.rounding)
        q, k, v = joint_qkv(attn, (q, k, v), None, context)
        joint, choice = self._joint(q, k, v, context, len(x), 0, mask, kv)
        return (joint.flatten(1).unflatten(0, x.shape[:2]),), choice


def projected(calls: Calls, stream: Tensor, fused: str, names: tuple[str, ...]) -> list[Tensor] | str:
    """Return the projections q, k and v of a stream, `[B, N, H * D]` each, or the reason why they cannot be used.

    Args:
        calls: Recorder of the calls of an attention module.
        stream: The stream.
        fused: Name of the Linear that `fuse_qkv_projections` makes of them.
        names: Names of their own Linears.
    """
    attn: Any = calls.module
    linears = (fused,) if has_fused_projections(attn) else names
    parts: list[Tensor] = []
    for name in linears:
        out = calls(name, stream)
        if reason := unlike(out, (*stream.shape[:2], attn.inner_dim * (3 // len(linears))), stream, name):
            return reason
        parts += out.chunk(3 // len(linears), dim=-1)
    return parts


def stream_context(
    state: PatchState,
    rotary: Any,
    batch: int,
    text: int,
    image: int,
    like: Tensor,
    rounding: ops.Rounding = "eager",
) -> Any:
    """Return the context of a call; blocks of a kind share it in one forward.

    Args:
        state: State of the patched transformer.
        rotary: Tables cos and sin of text and image, float32 `[N, D]` each, with every value twice.
        batch: Number of samples.
        text: Text tokens of each sample; 0 for a stream of all tokens.
        image: Image tokens of each sample, or all tokens.
        like: Tensor `[..., D]` with the device, dtype and head dimension of the queries.
        rounding: Rounding of QK norm and rotary embedding.

    Returns:
        A `ForwardContext`, or inside a graph a `TracedStreams`, which has the attributes that attention reads.
    """
    if ops.is_traced() or torch.compiler.is_exporting():
        cos, sin = (table[:, ::2] for table in rotary)
        return TracedStreams(batch, text, image, (cos, sin), state.impl, like, rounding)
    key, saved = (batch, text, image), state.calls.context
    if saved and saved[0] == key and saved[1] is rotary[0] and saved[2] is rotary[1]:
        return saved[3]
    with torch.inference_mode(False), torch.no_grad():
        layout = SelfLayout.pack([Sample(text, (1, 1, image))] * batch, FLUX2, clean_references=False)
        cos, sin = (table[:, ::2].repeat(batch, 1) for table in rotary)
        context = ForwardContext(
            layout=layout, visibility="full", rotary=(cos, sin), impl=state.impl, rounding=rounding
        )
    state.calls.context = (key, *rotary, context)  # holding the tensors keeps their identity unambiguous
    return context


def _masked_plan(state: PatchState, mask: Tensor) -> AttentionPlan:
    """Return the plan of samples whose queries see the valid tokens of their sample; it reads a mask on the host once.

    Args:
        state: State of the patched transformer.
        mask: Valid tokens, bool `[B, 1, 1, N]`.
    """
    saved = state.calls.masked
    if saved and saved[0] is mask and saved[1] == version_of(mask):
        return saved[2]
    plan = plan_of_valid(tuple(map(tuple, mask[:, 0, 0].tolist())))
    state.calls.masked = mask, version_of(mask), plan
    return plan


# ---- installation ----


def stock_places(
    transformer: Any,
    group: str,
    block: tuple[Any, Callable[..., Place]],
    attention: Mapping[Any, Callable[..., Place]],
    state: PatchState,
) -> Iterator[Place | str]:
    """Install the places of a list of blocks, and yield each place, or a note on one that runs unchanged.

    Args:
        transformer: The transformer.
        group: Name of the list.
        block: Class of its blocks in diffusers, and the place that replaces their forward.
        attention: Place by the class of the attention processor in diffusers that it replaces.
        state: State of the patched transformer.
    """
    for name, each in transformer.get_submodule(group).named_children():
        where, processor = f"{group}.{name}", getattr(getattr(each, "attn", None), "processor", None)
        if type(processor) in attention:
            yield attention[type(processor)](each.attn, state, Site(f"{where}.attn"))
        else:
            yield f"{where}.attn has its own {type(processor).__name__}, which runs unchanged"
        kind, place = block
        if stock_forward(each, kind):
            yield place(each, state, Site(where))
        else:
            yield f"{where} has its own forward, which runs unchanged"


def attention_change(stock: types.ModuleType, processors: tuple[str, ...], own: tuple[str, ...] = ()) -> str | None:
    """Describe a replaced function that attention processors of diffusers call by name; None if none is replaced.

    Args:
        stock: Module of the model in diffusers.
        processors: Names of its attention processors.
        own: Further functions of the module that they call.
    """
    from diffusers.models import attention_dispatch, embeddings

    homes = {"dispatch_attention_fn": attention_dispatch, "apply_rotary_emb": embeddings}
    homes |= dict.fromkeys(("_get_qkv_projections", *own), stock)
    return replaced_attention(stock, homes, processors)


def refuse_visibility(transformer: Any, visibility: str | Rule) -> None:
    """Raise ValueError: calls of this transformer do not say which tokens are those of a reference."""
    raise ValueError(
        f"patch supports visibility='full' only for {type(transformer).__name__}, whose calls have no image sizes, got "
        f"{visibility!r}; use edit(), whose packed forward supports it"
    )


def rotary_changes(transformer: Any) -> Iterator[str]:
    """Describe other rotary frequencies than those of the configuration of a transformer of FLUX."""
    rope, config = transformer.pos_embed, transformer.config
    if (rope.theta, tuple(rope.axes_dim)) != (config.get("rope_theta", 10000), tuple(config.axes_dims_rope)):
        yield "pos_embed has other frequencies than those of the model's configuration"


def attention_changes(transformer: Any, stock: types.ModuleType, processors: Mapping[str, tuple]) -> Iterator[str]:
    """Describe other processors, and QK norms that the fused operator does not take.

    Args:
        transformer: The transformer.
        stock: Its module in diffusers.
        processors: Classes of processors in diffusers, or their names in `stock`, by the path of the attention.
    """
    for path, names in processors.items():
        kinds = tuple(getattr(stock, name) if isinstance(name, str) else name for name in names)
        found = [*found_modules(transformer, path)]
        if len({type(getattr(attn.processor, "stock", attn.processor)) for _, attn in found}) > 1:
            yield f"{path} has processors of different classes"
        for name, attn in found:
            try:
                qk_norm_eps(attn)
            except ValueError as error:
                yield f"{name}: {error}"
            yield from processor_changes(name, attn.processor, kinds)
