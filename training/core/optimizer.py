"""The optimizers of a run: AdamW of PyTorch, and AdamW with moments in 8 bits of bitsandbytes.

Moments in 8 bits have a scale for each block of 256 values of this rank's part of a weight. A checkpoint of them could
not be read by another number of ranks, so that they are for runs of one rank. This module imports PyTorch where it is
used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from uniref_fast.training.core.model_size import BYTES
from uniref_fast.training.core.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["EightBitAdamW", "PlainAdamW", "check_optimizer", "make_optimizer", "moment_bytes", "update_bytes"]


def moment_bytes(config: Recipe, trained: int) -> int:
    """Return the bytes of the moments of `trained` parameters.

    The two moments of a parameter have the dtype of the trained weights, or 8 bits and two scales for 256 values.
    """
    if config.optimizer == "adamw":
        return 2 * BYTES[config.weight_dtype] * trained
    return 2 * trained + trained // 32


def update_bytes(config: Recipe, trained: int) -> int:
    """Return the bytes that the update of `trained` parameters needs for a moment: one copy, or none in 8 bits."""
    return 4 * trained if config.optimizer == "adamw" else 0


def check_optimizer(config: Recipe, ranks: int) -> None:
    """Check that the optimizer of a run is possible; `check_suitability` checks that its library is installed.

    Args:
        config: Configuration of the run.
        ranks: Number of ranks.

    Raises:
        ValueError: Moments in 8 bits on several ranks, or for trained weights that are not float32.
    """
    if config.optimizer == "adamw":
        return
    if ranks > 1:
        raise ValueError(
            f"optimizer = {config.optimizer} keeps the scales of moments for the parts of one rank, and this run has "
            f"{ranks} ranks; give --optimizer adamw, whose moments are shared by the ranks"
        )
    if config.weight_dtype != "float32":
        raise ValueError(f"optimizer = {config.optimizer} needs --weight-dtype float32, got {config.weight_dtype}")


def make_optimizer(config: Recipe, parameters: Mapping[str, Tensor]) -> PlainAdamW | EightBitAdamW:
    """Return the optimizer of a run for its trained parameters by name."""
    return (PlainAdamW if config.optimizer == "adamw" else EightBitAdamW)(config, parameters)


class PlainAdamW:
    """AdamW with moments in the dtype of the parameters, `weight_dtype`, and sharded as they are.

    Args:
        config: Configuration of the run.
        parameters: Trained parameters by name.

    Attributes:
        groups: Parameter groups, whose learning rate a step sets.
    """

    def __init__(self, config: Recipe, parameters: Mapping[str, Tensor]) -> None:
        import torch

        self.parameters = parameters
        self._inner = torch.optim.AdamW(
            [*parameters.values()], lr=1.0, betas=config.betas, weight_decay=config.weight_decay, foreach=True
        )
        self.groups = self._inner.param_groups

    def step(self) -> None:
        """Update the parameters that have a gradient."""
        self._inner.step()

    def zero_grad(self) -> None:
        """Free the gradients."""
        self._inner.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """Return the moments by name, for a checkpoint; they are zeros before the first update."""
        import torch

        found: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            state = self._inner.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(parameter) for _ in range(2))
            found |= {f"{part}.{name}": state[part] for part in ("exp_avg", "exp_avg_sq")}
        return found

    def updates(self) -> list[int]:
        """Return the number of updates of each parameter."""
        states = [self._inner.state[parameter] for parameter in self.parameters.values()]
        return [int(state["step"]) if state else 0 for state in states]

    def set_updates(self, updates: list[int]) -> None:
        """Set the number of updates of each parameter, after its moments were loaded."""
        for parameter, count in zip(self.parameters.values(), updates, strict=True):
            self._inner.state[parameter]["step"].fill_(count)


class EightBitAdamW:
    """AdamW of bitsandbytes with moments in 8 bits, except of parameters with fewer than 4096 values.

    Arguments and attributes are those of `PlainAdamW`.
    """

    def __init__(self, config: Recipe, parameters: Mapping[str, Tensor]) -> None:
        from bitsandbytes.optim import AdamW8bit
        from torch import nn

        from uniref_fast.training.core.distributed import local

        self.parameters = parameters
        # bitsandbytes takes plain tensors: those of this rank, which share the memory of the sharded ones
        self._own = {name: nn.Parameter(local(p.detach())) for name, p in parameters.items()}
        self._inner: Any = AdamW8bit(
            [*self._own.values()], lr=1.0, betas=config.betas, weight_decay=config.weight_decay
        )
        self.groups = self._inner.param_groups
        self._inner.check_overrides()
        self._inner.initialized = True  # a step would do the rest again
        for number, own in enumerate(self._own.values()):
            self._inner.init_state(self.groups[0], own, 0, number)

    def step(self) -> None:
        """Update the parameters that have a gradient."""
        from uniref_fast.training.core.distributed import local

        for name, parameter in self.parameters.items():
            gradient = parameter.grad
            self._own[name].grad = None if gradient is None else local(gradient)
        self._inner.step()
        for own in self._own.values():
            own.grad = None

    def zero_grad(self) -> None:
        """Free the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the moments and their scales by name, for a checkpoint; they are zeros before the first update."""
        names = {"state1": "exp_avg", "state2": "exp_avg_sq", "absmax1": "exp_avg_scale", "absmax2": "exp_avg_sq_scale"}
        return {
            f"{names[part]}.{name}": state[part]
            for name, own in self._own.items()
            for state in (self._inner.state[own],)
            for part in names
            if part in state
        }

    def updates(self) -> list[int]:
        """Return the number of updates of each parameter."""
        return [int(self._inner.state[own]["step"]) for own in self._own.values()]

    def set_updates(self, updates: list[int]) -> None:
        """Set the number of updates of each parameter, after its moments were loaded."""
        for own, count in zip(self._own.values(), updates, strict=True):
            self._inner.state[own]["step"] = count
