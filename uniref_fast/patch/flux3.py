"""Patched places of a `Flux3Transformer2DModel`: attention processors and forwards of both kinds of block.

Attention and feed-forward of a block share one input. The blocks of a mode run on the tokens of text, image or
references alone, the others on all tokens. The places keep the code of diffusers under torch.compile, as those of
FLUX.2 do.

Shapes are diffusers': streams `[B, N, C]`, of B samples with N tokens each, and modulation `[B, N, 3 C]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from uniref_fast import ops
from uniref_fast.patch.families import FamilyPatch, Place
from uniref_fast.patch.flux2 import ModulatedBlock
from uniref_fast.patch.guards import unlike
from uniref_fast.patch.joint_streams import (
    OneStreamAttention,
    attention_change,
    attention_changes,
    refuse_visibility,
    rotary_changes,
    stock_places,
)
from uniref_fast.patch.processors import joint_rows, outside_compiler, refusal, register_processor
from uniref_fast.patch.replay import Calls
from uniref_fast.patch.state import PatchState
from uniref_fast.patch.streams import TRACED, Choice

__all__ = ["PATCH"]

MODE_BLOCKS = ("txt_mode_blocks", "mode_blocks.image", "mode_blocks.image_cond")
"""Lists of the blocks of one mode."""

JOINT_BLOCKS = "single_transformer_blocks"
"""List of the blocks of all tokens."""


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

    def _start(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            self.record_trace(TRACED)
            return self.original(*arguments)
        return outside_compiler()(self._run, *arguments)

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
        hidden = calls("ff", normed)
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


def install(transformer: Any, state: PatchState) -> Iterator[Place | str]:
    """Install the places of all blocks, and yield each place, or a note on one that runs unchanged."""
    register_processor()
    stock = _stock()
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
