"""Patched attention of models with streams of other kinds than those of Qwen-Image-Edit.

A family derives its processors from `StreamsAttention`, and says which calls it accelerates and how. torch.compile
traces the same code, with tables that are computed from sizes (`uniref_fast.patch.traced`).
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from uniref_fast import ops
from uniref_fast.patch.processors import PatchedAttention, checkable, outside_compiler, untraceable
from uniref_fast.patch.replay import Calls, StandIn
from uniref_fast.visibility import AttentionPlan

__all__ = ["MASKED", "StreamsAttention", "plan_of_valid"]

MASKED = "an attention mask inside torch.compile, which cannot plan from its values"

Choice = tuple[str, str]
"""Implementation of attention, and the reason of the choice."""


@functools.lru_cache(maxsize=8)  # equal in all steps of an edit, whose masks may be new tensors
def plan_of_valid(valid: tuple[tuple[bool, ...], ...]) -> AttentionPlan:
    """Return the plan of samples of one length whose queries see the valid keys of their sample.

    Args:
        valid: Whether each key of each sample is visible, in joint order.
    """
    length = len(valid[0])
    ranges, intervals = [], []
    for sample, flags in enumerate(valid):
        at = sample * length
        ranges.append((at, at + length))
        found = []
        for state, group in itertools.groupby(flags):
            start, at = at, at + len(list(group))
            if state:
                found.append((start, at))
        intervals.append(tuple(found))
    return AttentionPlan(tuple(ranges), tuple(intervals), len(valid) * length, len(valid) * length)


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
        if ops.is_traced() or torch.compiler.is_exporting():
            return self._trace_streams(attn, streams, others, kv)
        result = outside_compiler()(self._attend, attn, streams, others, kv)
        return result if len(result) > 1 else result[0]

    def _trace_streams(self, attn: Any, streams: tuple[Any, ...], others: tuple, kv: dict[str, Any]) -> Any:
        """Run a call as torch.compile traces it: the fused operators, or the original, in the graph."""
        reason = untraceable(self.state) or self._untraced(others, kv) or self._call_reason(attn, streams, *others)
        reason = reason or self.traced_refusal(str(streams[0].dtype), str(streams[0].device))
        if reason is None:
            fused = self._computed(Calls(attn, self.state, inputs=False), streams, others, kv)
            if not isinstance(fused, str):
                self.record_trace(None)
                return fused[0] if len(fused[0]) > 1 else fused[0][0]
            reason = fused
        self.record_trace(reason)
        return self._pass_on()(attn, *self._arguments(streams, others), **kv)

    def _untraced(self, others: tuple, kv: dict[str, Any]) -> str | None:
        """Return the reason why torch.compile traces the original for these arguments, or None.

        Args:
            others: Positional arguments of the original after its streams.
            kv: Its keyword arguments.
        """
        raise NotImplementedError

    def _attend(self, attn: Any, streams: tuple[Any, ...], others: tuple, kv: dict[str, Any]) -> tuple[Tensor, ...]:
        def original(instead: Any = attn) -> tuple[Tensor, ...]:
            result = self._pass_on()(instead, *self._arguments(streams, others), **kv)
            return result if isinstance(result, tuple) else (result,)

        if reason := self._call_reason(attn, streams, *others) or self._code_refusal(
            streams[0].dtype, streams[0].device
        ):
            return self._refuse(reason, original)
        comparable = checkable(self.site, streams[0])
        calls = Calls(attn, self.state, inputs=comparable)
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

    def _call_reason(self, attn: Any, streams: tuple[Any, ...], *others: Any) -> str | None:
        """Return the reason why the arguments of a call need the original, or None; torch.compile traces it."""
        raise NotImplementedError

    def _code_refusal(self, dtype: torch.dtype, device: torch.device) -> str | None:
        """Return the reason why the code of this place needs the original, or None."""
        raise NotImplementedError

    def _computed(
        self, calls: Calls, streams: tuple[Any, ...], others: tuple, kv: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], Choice] | str:
        """Return (streams, (implementation, reason of the choice)), or the reason why this is not possible."""
        raise NotImplementedError
