"""Patched attention of models whose blocks torch.compile traces as they are in diffusers.

A family derives its processors from `StreamsAttention`, and says which calls it accelerates and how.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from uniref_fast.patch.processors import PatchedAttention, checkable, outside_compiler
from uniref_fast.patch.replay import Calls, StandIn

__all__ = ["TRACED", "StreamsAttention"]

TRACED = "torch.compile traces the code of diffusers"

Choice = tuple[str, str]
"""Implementation of attention, and the reason of the choice."""


class StreamsAttention(PatchedAttention):
    """A processor of one or more streams `[B, N, C]`.

    Subclasses have the signature of the original, by which diffusers filters arguments, and call `_call`.
    """

    def _call(self, attn: Any, streams: tuple[Any, ...], *others: Any, **kv: Any) -> Any:
        """Return what the original returns for the same arguments.

        Args:
            attn: Attention module.
            streams: First arguments of the original, its streams.
            others: Its other positional arguments.
            kv: Its keyword arguments.
        """
        if torch.compiler.is_compiling():
            self.record_trace(TRACED)
            return self._pass_on()(attn, *self._arguments(streams, others), **kv)
        result = outside_compiler()(self._attend, attn, streams, others, kv)
        return result if len(result) > 1 else result[0]

    def _attend(self, attn: Any, streams: tuple[Any, ...], others: tuple, kv: dict[str, Any]) -> tuple[Tensor, ...]:
        def original(instead: Any = attn) -> tuple[Tensor, ...]:
            result = self._pass_on()(instead, *self._arguments(streams, others), **kv)
            return result if isinstance(result, tuple) else (result,)

        if reason := self._reason(attn, streams, *others):
            return self._refuse(reason, original)
        comparable = checkable(self.site, streams[0])
        calls = Calls(attn, inputs=comparable)
        fused = self._computed(calls, streams, others, kv)
        if isinstance(fused, str):
            return self._refuse(fused, functools.partial(original, StandIn(calls)))
        outs, choice = fused

        def check() -> float:
            stand_in = StandIn(calls)
            stand_in.compare(outs, original(stand_in))
            return stand_in.max_rel_error

        return self.state.accept(self.site, outs, streams[0], original, check if comparable else None, choice)

    def _arguments(self, streams: tuple[Any, ...], others: tuple) -> tuple[Any, ...]:
        """Return the positional arguments of the original after the attention module."""
        return *streams, *others

    def _reason(self, attn: Any, streams: tuple[Any, ...], *others: Any) -> str | None:
        """Return the reason why a call must run the original, or None."""
        raise NotImplementedError

    def _computed(
        self, calls: Calls, streams: tuple[Any, ...], others: tuple, kv: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], Choice] | str:
        """Return (streams, (implementation, reason of the choice)), or the reason why this is not possible."""
        raise NotImplementedError
