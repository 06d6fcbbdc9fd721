"""An exponential moving average of the trained weights, sharded like the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from uniref_fast.training.core.distributed import local

__all__ = ["MovingAverage"]


class MovingAverage:
    """The average of each trained parameter, in float32.

    Args:
        parameters: Trained parameters by name.
        decay: Share of the old average that a step keeps; smaller in the first steps, at most (1 + step) / (10 + step).
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.average = {name: p.detach().clone().float() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after a step to the average.

        Args:
            step: Number of the step, from 0.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = [local(self.average[name]) for name in self.parameters]
        torch._foreach_lerp_(averages, [local(p.detach()).float() for p in self.parameters.values()], 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights within the block, and its own weights, bit for bit, after it."""
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
