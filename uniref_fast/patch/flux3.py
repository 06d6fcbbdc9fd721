"""Patched places of a `Flux3Transformer2DModel`: attention, both kinds of block, modulation and output norm.

Attention and feed-forward of a block share one input. The blocks of a mode run on the tokens of text, image or
references alone, the others on all tokens. diffusers computes the modulation of every token, although all tokens of a
sample and mode have the same time; the patched places compute one row for each sample. torch.compile traces the
modulation and the output norm as they are in diffusers, because a graph cannot compare the times.

Shapes are diffusers': streams `[B, N, C]`, of B samples with N tokens each, and modulation `[B, N, 3 C]`.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules import activation as nn_activation
from torch.nn.modules import linear as nn_linear

from uniref_fast import ops
from uniref_fast.patch.families import FamilyPatch, Place
from uniref_fast.patch.flux2 import ModulatedBlock
from uniref_fast.patch.guards import (
    changed_norm,
    has_hooks,
    innermost_forward,
    is_from,
    is_plain,
    norm_change,
    stock_forward,
    unlike,
)
from uniref_fast.patch.joint_streams import (
    OneStreamAttention,
    attention_change,
    attention_changes,
    refuse_visibility,
    rotary_changes,
    stock_places,
)
from uniref_fast.patch.processors import PatchedBlock, joint_rows, outside_compiler, refusal, register_processor
from uniref_fast.patch.replay import Calls
from uniref_fast.patch.report import Site
from uniref_fast.patch.state import PatchState
from uniref_fast.patch.streams import Choice

__all__ = ["PATCH"]

MODE_BLOCKS = ("txt_mode_blocks", "mode_blocks.image", "mode_blocks.image_cond")
"""Lists of the blocks of one mode."""

JOINT_BLOCKS = "single_transformer_blocks"
"""List of the blocks of all tokens."""

MODULATIONS = ("early_stream_modulations", "single_stream_modulations")
"""Modulations of the blocks of one mode, and of the blocks of all tokens, by mode."""


_UNTRACED = "modulation inside torch.compile, which cannot compare the times of single tokens"


def _stock() -> Any:
    from diffusers.models.transformers import transformer_flux3

    return transformer_flux3


def _attention_change() -> str | None:
    """Describe a replaced function that the attention of diffusers calls by name; None if none is replaced."""
    return attention_change(_stock(), ("Flux3AttnProcessor",))


class _Attention(OneStreamAttention):
    """Attention of diffusers' `Flux3AttnProcessor`, whose QK norm and rotary embedding round once, at the end."""

    rounding: ClassVar[ops.Rounding] = "once"

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        return self._call(attn, (hidden_states,), attention_mask, image_rotary_emb)

    def _arguments(self, streams: tuple[Any, ...], others: tuple) -> tuple[Any, ...]:
        return *streams, *others

    def code_change(self) -> str | None:
        return _attention_change()

    def _qk_norm_change(self, dtype: torch.dtype, device: torch.device) -> str | None:
        reason = super()._qk_norm_change(dtype, device)
        # diffusers loads the weights of these norms in float32, whatever the dtype of the model
        return reason and super()._qk_norm_change(torch.float32, device) and reason

    def _computed(
        self, calls: Calls, streams: tuple[Any, ...], others: tuple, kv: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], Choice] | str:
        found = super()._computed(calls, streams, others, kv)
        if isinstance(found, str):
            return found
        (out,), choice = found
        return (calls("to_out.1", calls("to_out.0", out)),), choice  # the second is a dropout


class _Block(ModulatedBlock):
    """Forward of a block of FLUX.3."""

    norms = ("norm",)

    def _methods(self) -> tuple[Any, ...]:
        return (type(self.block).forward,)

    def call_refusal(self, x: Tensor, *others: Any) -> str | None:  # type: ignore[override]
        tensors = x, *others[:-1]  # the last argument is the rotary embedding
        if reason := refusal(self.state, self.site, self.block.attn.head_dim, *tensors):
            return reason
        if any(each.ndim != 3 or len(each) != len(x) or not each.shape[1] for each in tensors):
            return f"called with tensors of shapes {[list(each.shape) for each in tensors]}"
        return None

    def _table(self, table: Tensor, stream: Tensor, parts: int) -> tuple[tuple[Tensor, ...], Tensor] | str:
        if table.stride(1) == 0 and table.shape[1] == stream.shape[1]:  # the same row for all tokens of a sample
            table = table[:, :1]
        return super()._table(table, stream, parts)

    def _branches(self, calls: Calls, normed: Tensor, rotary: Any) -> Tensor | str:
        """Return the sum of attention and feed-forward of the modulated input, `[B, N, C]`, or a reason."""
        attention = calls("attn", hidden_states=normed, image_rotary_emb=rotary)
        if reason := unlike(attention, tuple(normed.shape), normed, "attention"):
            return reason
        hidden = calls.by_parts("ff", normed)
        if reason := unlike(hidden, tuple(normed.shape), normed, "the feed-forward"):
            return reason
        return attention + hidden

    def _modulated(self, x: Tensor, table: Tensor, impl: str) -> tuple[Tensor, Tensor, Tensor] | str:
        """Return the modulated norm of a stream, `[B, N, C]`, its gates and their rows, or a reason."""
        found = self._table(table, x, 3)
        if isinstance(found, str):
            return found
        (shift, scale, gate), rows = found
        normed = ops.norm_modulate(joint_rows(x), shift, scale, rows, self.block.norm.eps, rounding="eager", impl=impl)
        return normed.view(x.shape), gate, rows


class _ModeBlock(_Block):
    """Forward of one `Flux3ModeTransformerBlock` with fused norm, modulation and residual."""

    def forward(self, hidden_states: Tensor, temb_mod: Tensor, image_rotary_emb: Any) -> Any:  # type: ignore[override]
        return self._start(hidden_states, temb_mod, image_rotary_emb)

    def _fused(self, calls: Calls, impl: str, x: Tensor, table: Tensor, rotary: Any) -> Any:  # type: ignore[override]
        found = self._modulated(x, table, impl)
        if isinstance(found, str):
            return found
        branch = self._branches(calls, found[0], rotary)
        return branch if isinstance(branch, str) else _gated(x, branch, *found[1:], impl)


class _JointBlock(_Block):
    """Forward of one `Flux3SingleTransformerBlock` with fused norms, modulation and residuals."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb_mod: Tensor,
        temb_mod_context: Tensor,
        image_rotary_emb: Any,
    ) -> Any:
        return self._start(hidden_states, encoder_hidden_states, temb_mod, temb_mod_context, image_rotary_emb)

    def _fused(self, calls: Calls, impl: str, x, text, table, text_table, rotary) -> Any:  # type: ignore[override]
        streams = (text, text_table), (x, table)
        found = []
        for stream, its_table in streams:
            modulated = self._modulated(stream, its_table, impl)
            if isinstance(modulated, str):
                return modulated
            found.append(modulated)
        normed = torch.cat([each[0] for each in found], dim=1)
        branch = self._branches(calls, normed, rotary)
        if isinstance(branch, str):
            return branch
        parts = branch.split([text.shape[1], x.shape[1]], dim=1)
        return tuple(
            _gated(stream, part, gate, rows, impl)
            for (stream, _), part, (_, gate, rows) in zip(streams, parts, found, strict=True)
        )


def _gated(x: Tensor, branch: Tensor, gate: Tensor, rows: Tensor, impl: str) -> Tensor:
    """Return `x + gate * branch`, `[B, N, C]`."""
    out = ops.gate_residual(joint_rows(x), joint_rows(branch), gate, rows, rounding="eager", impl=impl)
    return torch.ops.aten._unsafe_view(out, x.shape)  # for autograd not a view: nothing else refers to the rows


# ---- modulation ----


class _PerSample(PatchedBlock):
    """Forward of a module whose Linear gets the embedding of the time of every token.

    It calls the Linear with one token of each sample if all tokens of a sample have equal embeddings, which is known
    of an expanded tensor, and compared on a CPU. The Linear is called a second time for the self-check; so it must be
    one of PyTorch, without hooks that could notice.
    """

    def _methods(self) -> tuple[Any, ...]:
        return (type(self.block).forward,)

    def _start(self, temb: Tensor, *arguments: Any) -> Any:
        if ops.is_traced() or torch.compiler.is_exporting():
            self.record_trace(_UNTRACED)
        elif not isinstance(temb, Tensor) or temb.ndim == 3:
            return outside_compiler()(self._run, *arguments)
        return self.original(*arguments)  # packed forwards have one row for each sample

    def call_refusal(self, *tensors: Tensor) -> str | None:  # type: ignore[override]
        if reason := refusal(self.state, self.site, tensors[-1].shape[-1], *tensors):
            return reason
        if any(each.ndim != 3 or len(each) != len(tensors[0]) or not each.numel() for each in tensors):
            return f"called with tensors of shapes {[list(each.shape) for each in tensors]}"
        return None

    def _code_refusal(self, dtype: torch.dtype, device: torch.device) -> str | None:
        if self._methods() != self.methods:
            return f"forward of {type(self.block).__name__} was replaced"
        return "a modulation has hooks" if has_hooks(self.block) else _changed_linear(self.block.linear)

    def _one_token(self, temb: Tensor) -> Tensor | str:
        """Return the embedding of one token of each sample, `[B, 1, C]`, or the reason why it may not be that of all.

        Args:
            temb: Embeddings of all tokens, `[B, N, C]`.
        """
        one = temb[:, :1]
        if temb.stride(1) == 0 or temb.shape[1] == 1:
            return one
        if not temb.is_cpu or (temb.requires_grad and torch.is_grad_enabled()):
            return "embeddings of the time of single tokens are compared on a CPU and without gradients only"
        return one if torch.equal(temb, one.expand_as(temb)) else "tokens of a sample have different times"


class _Modulation(_PerSample):
    """Forward of one `Flux3Modulation`; its result is expanded, so that blocks see that the rows are equal."""

    def forward(self, temb: Tensor) -> Tensor:  # type: ignore[override]
        return self._start(temb, temb)

    def _fused(self, calls: Calls, impl: str, temb: Tensor) -> Any:  # type: ignore[override]
        one = self._one_token(temb)
        if isinstance(one, str):
            return one
        table = self.block.linear(one)
        reason = unlike(table, (*one.shape[:2], self.block.linear.out_features), temb, "the Linear of a modulation")
        return reason or table.expand(-1, temb.shape[1], -1)


class _OutputNorm(_PerSample):
    """Forward of the `Flux3AdaLayerNorm` before the output projection, with fused norm and modulation."""

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:  # type: ignore[override]
        return self._start(temb, hidden_states, temb)

    def _code_refusal(self, dtype: torch.dtype, device: torch.device) -> str | None:
        if reason := super()._code_refusal(dtype, device):
            return reason
        act = self.block.act_fn
        if type(act) is not nn.SiLU or has_hooks(act) or not _runs_own(act, nn_activation):
            return "the activation of the output norm was changed"
        return changed_norm(self.block.norm, self.block.linear.in_features) or norm_change()

    def _fused(self, calls: Calls, impl: str, x: Tensor, temb: Tensor) -> Any:  # type: ignore[override]
        if temb.shape[1] not in (1, x.shape[1]):
            return f"embeddings of the time of {temb.shape[1]} tokens for {x.shape[1]} tokens"
        one = self._one_token(temb)
        if isinstance(one, str):
            return one
        table = self.block.linear(self.block.act_fn(one))
        if reason := unlike(table, (len(x), 1, 2 * x.shape[2]), x, "the Linear of the output norm"):
            return reason
        scale, shift = table[:, 0].chunk(2, dim=-1)
        rows = self.state.modulation_rows(None, len(x), x.shape[1], x.device)
        options: Any = {"rounding": "eager", "impl": impl}
        return ops.norm_modulate(joint_rows(x), shift, scale, rows, self.block.norm.eps, **options).view(x.shape)


def _changed_linear(linear: Any) -> str | None:
    """Return the reason why a Linear must be called with the tokens that diffusers calls it with, or None."""
    from diffusers.hooks import layerwise_casting as casting

    if type(linear) is not nn.Linear:
        return f"the Linear of a modulation is a {type(linear).__module__}.{type(linear).__name__}"
    registry = vars(linear).get("_diffusers_hook")
    harmless = (casting._LAYERWISE_CASTING_HOOK, casting._PEFT_AUTOCAST_DISABLE_HOOK)
    if "_hf_hook" in vars(linear) or (registry is not None and any(hook not in harmless for hook in registry.hooks)):
        return "the Linears of modulations have hooks of diffusers or accelerate (offloaded by layer)"
    if has_hooks(linear) or not is_plain(linear.weight) or not _runs_own(linear, nn_linear):
        return "the Linear of a modulation has hooks, its own forward, or a weight of another class"
    return None


def _runs_own(module: nn.Module, home: types.ModuleType) -> bool:
    """Return True if a module runs the forward of its class, which PyTorch defines in `home`, below hooks."""
    forward: Any = type(module).forward
    return is_from(forward, home) and getattr(getattr(*innermost_forward(module)), "__func__", None) is forward


# ---- the family ----


def install(transformer: Any, state: PatchState) -> Iterator[Place | str]:
    """Install all places, and yield each place, or a note on one that runs unchanged."""
    register_processor()
    stock = _stock()
    heads = {f"{group}.{name}": head for group in MODULATIONS for name, head in getattr(transformer, group).items()}
    for name, module in (*heads.items(), ("norm_out", transformer.norm_out)):
        kind, place = (stock.Flux3Modulation, _Modulation) if name in heads else (stock.Flux3AdaLayerNorm, _OutputNorm)
        if stock_forward(module, kind):
            yield place(module, state, Site(name))
        else:
            yield f"{name} has its own forward, which runs unchanged"
    mode, joint = (stock.Flux3ModeTransformerBlock, _ModeBlock), (stock.Flux3SingleTransformerBlock, _JointBlock)
    for group in (*MODE_BLOCKS, JOINT_BLOCKS):
        block = joint if group == JOINT_BLOCKS else mode
        yield from stock_places(transformer, group, block, {stock.Flux3AttnProcessor: _Attention}, state)


def changes(transformer: Any) -> Iterator[str]:
    """Describe replaced functions, other processors, and settings that differ from the configuration."""
    if reason := _attention_change():
        yield reason
    yield from rotary_changes(transformer)
    paths = {f"{name}.*.attn": ("Flux3AttnProcessor",) for name in (*MODE_BLOCKS, JOINT_BLOCKS)}
    yield from attention_changes(transformer, _stock(), paths)


PATCH = FamilyPatch(install, changes, refuse_visibility)
