"""An exponential moving average of the trained weights, sharded as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from uniref_fast.training.core.distributed import local

__all__ = ["MovingAverage"]


class MovingAverage:
    """Averages in float32.

    Args:
        parameters: the trained parameters by name.
        decay: share of the old average that a step keeps; less in the first steps, as (1 + step) / (10 + step).
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.average = {name: p.detach().clone().float() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = [local(self.average[name]) for name in self.parameters]
        torch._foreach_lerp_(averages, [local(p.detach()).float() for p in self.parameters.values()], 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model has the averaged weights; afterwards its own again, bit for bit."""
        own = {name: local(p.detach()).clone() for name, p in self.parameters.items()}
        try:
            self._write({name: local(average) for name, average in self.average.items()})
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            local(parameter.detach()).copy_(values[name])
