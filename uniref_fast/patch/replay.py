"""Run a module's original forward a second time without calling its children a second time.

The patch calls every child of a block exactly once, as diffusers does, and keeps inputs and results. The original
forward then runs on a stand-in whose children answer with those results. So the self-check compares all that the fused
operators compute with the code of diffusers, and hooks, caches, dropout and random numbers take no notice of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Calls", "StandIn"]

PART = 1 << 22  # elements that are compared at a time: 128 MiB of copies in float64, and few waits for a GPU


class Calls:
    """Calls a module's children, each once, and keeps what they returned.

    Args:
        module: the children's parent.
        inputs: also keep what the children are given, for `StandIn.max_rel_error`.
    """

    def __init__(self, module: nn.Module, inputs: bool) -> None:
        self.module, self.inputs = module, inputs
        self.made: dict[str, tuple[list[_Kept], Any]] = {}

    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call the child of that name, such as "to_out.0"."""
        kept = [_Kept(x) for x in _floats((*args, *kwargs.values()))] if self.inputs else []
        result = self.module.get_submodule(name)(*args, **kwargs)
        self.made[name] = kept, result
        return result

    def release(self) -> None:
        """Free the results when no self-check needs them."""
        if not self.inputs:
            self.made.clear()


class StandIn:
    """Stands for a module in a run of its original forward: recorded children answer, all else is the module's.

    Attributes:
        max_rel_error: largest `max|recorded - original| / max|original|` over what the recorded children were given;
            infinite where one is finite and the other is not, or where a child is given another number of tensors.
    """

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.max_rel_error = 0.0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.calls.module, name)
        if isinstance(value, nn.ModuleList):
            return [self._child(f"{name}.{i}", child) for i, child in enumerate(value)]
        return self._child(name, value)

    def _child(self, name: str, value: Any) -> Any:
        return functools.partial(self._answer, name) if name in self.calls.made else value

    def _answer(self, name: str, *args: Any, **kwargs: Any) -> Any:
        recorded, result = self.calls.made[name]
        if self.calls.inputs:
            given = _floats((*args, *kwargs.values()))
            if len(recorded) != len(given):
                self.max_rel_error = math.inf
            pairs = [(kept.tensor, other) for kept, other in zip(recorded, given, strict=False) if kept.unchanged()]
            self.compare([kept for kept, _ in pairs], [other for _, other in pairs])
        return result

    @torch.no_grad()
    def compare(self, recorded: Iterable[Tensor], original: Iterable[Tensor]) -> None:
        """Add the difference of these tensors to `max_rel_error`."""
        recorded, original = list(recorded), list(original)
        same = [a.shape for a in recorded] == [b.shape for b in original]
        errors = map(_difference, recorded, original) if same else [math.inf]
        self.max_rel_error = max(self.max_rel_error, *errors, 0.0)


class _Kept:
    """A child's input: a hook may change it in place, which the original's own input does not show."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.clone() if tensor.is_inference() else tensor  # inference tensors have no version
        self.version = None if tensor.is_inference() else tensor._version

    def unchanged(self) -> bool:
        return self.version is None or self.tensor._version == self.version


def _floats(values: Iterable[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def _difference(fused: Tensor, expected: Tensor) -> float:
    """Relative error where the original is finite; infinite where only one of the two is.

    A part at a time: the comparison in float64 of whole tensors would set the peak of the memory of the first call.
    """
    worst, largest = 0.0, 0.0
    parts = (x.flatten().split(PART) for x in (fused, expected))
    for ours, theirs in zip(*parts, strict=True):
        finite = theirs.isfinite()
        if not torch.equal(finite, ours.isfinite()):
            return math.inf
        ours, theirs = ours[finite].double(), theirs[finite].double()
        if theirs.numel():
            worst = max(worst, (ours - theirs).abs().max().item())
            largest = max(largest, theirs.abs().max().item())
    return 0.0 if worst == 0.0 else worst / largest if largest else math.inf
