"""Run a module's original forward a second time without calling its children a second time.

The patch calls every child of a block as often as diffusers does, and records inputs and results. The original
forward then runs on a stand-in whose children return the recorded results. So the self-check compares everything that
the fused operators compute with the code of diffusers, without effect on hooks, caches, dropout and random numbers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from uniref_fast.models.onednn_linear import forward_by_parts, onednn_linear, runs_by_parts, runs_onednn

if TYPE_CHECKING:
    from uniref_fast.patch.state import PatchState

__all__ = ["Calls", "StandIn"]

PART = 1 << 22  # elements compared at a time: 128 MiB of copies in float64, and few synchronisations with a GPU


class Calls:
    """Recorder that calls a module's children, each as often as the module does, and keeps their results.

    Linears of float32 are computed by oneDNN where that is faster (`runs_onednn`). The first of these results are
    compared with those of a call.

    Args:
        module: Parent of the children.
        state: State of the patched transformer.
        inputs: Also keep the inputs of the children, for `StandIn.max_rel_error`.

    Attributes:
        max_rel_error: Largest error of the Linears that were compared.
    """

    def __init__(self, module: nn.Module, state: PatchState, inputs: bool) -> None:
        self.module, self.state, self.inputs = module, state, inputs
        self.made: dict[str, list[tuple[list[_Kept], Any]]] = {}
        self.max_rel_error = 0.0

    def __call__(self, name: str, *args: Any, run: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        """Call the child with this name, such as "to_out.0", and record the call.

        Args:
            name: Name of the child.
            *args: Arguments of the child.
            run: Function that computes the child's result, called with the child and the arguments; None calls it.
            **kwargs: Keyword arguments of the child.
        """
        kept = [_Kept(x) for x in _floats((*args, *kwargs.values()))] if self.inputs else []
        child = self.child(name)
        if run is not None:
            result = run(child, *args, **kwargs)
        elif len(args) == 1 and not kwargs and runs_onednn(child, args[0], self.state.impl):
            result = self._linear(child, args[0])
        else:
            result = child(*args, **kwargs)
        self.made.setdefault(name, []).append((kept, result))
        return result

    def by_parts(self, name: str, x: Tensor) -> Any:
        """Call the child with this name, such as a feed-forward, or run its code with recorded calls of its children.

        The latter computes its Linears by oneDNN where that is faster (`forward_by_parts`).
        """
        child = self.child(name)
        if not runs_by_parts(child, x):
            return self(name, x)
        return forward_by_parts(child, lambda part, _: functools.partial(self, f"{name}.{part}"), x)

    def _linear(self, linear: Any, x: Tensor) -> Tensor:
        """Return the result of a Linear by oneDNN."""
        result = onednn_linear(linear, x)
        self.state.count_onednn()
        if self.inputs:
            self.max_rel_error = max(self.max_rel_error, _difference(result, linear(x)))
        return result

    def child(self, name: str) -> nn.Module:
        """Return the child with this name."""
        return functools.reduce(getattr, name.split("."), self.module)

    def release(self) -> None:
        """Free the results if no self-check needs them."""
        if not self.inputs:
            self.made.clear()


class StandIn:
    """Replacement of a module in a run of its original forward.

    Recorded children return their recorded results, in the order of their calls. A child of which only children were
    recorded, such as an adaptive norm, runs the forward of its class in the same way. All other attributes are the
    module's.

    Args:
        calls: Recorder of the calls.
        prefix: Name of the module in the module of `calls`, with a dot at its end; empty for that module itself.
        root: Stand-in of that module; None for itself.

    Attributes:
        max_rel_error: Largest `max|recorded - original| / max|original|` over the inputs of recorded children, and over
            the results of those that oneDNN computed. It is infinite if only one of the two is finite, or if a child
            gets another number of tensors.
    """

    def __init__(self, calls: Calls, prefix: str = "", root: StandIn | None = None) -> None:
        self.calls, self.prefix = calls, prefix
        self.root = root or self
        self.answered: dict[str, int] = {}
        self.max_rel_error = calls.max_rel_error

    def __getattr__(self, name: str) -> Any:
        module = self.calls.module.get_submodule(self.prefix[:-1]) if self.prefix else self.calls.module
        value = getattr(module, name)
        if isinstance(value, nn.ModuleList):
            return [self._child(f"{self.prefix}{name}.{i}", child) for i, child in enumerate(value)]
        return self._child(self.prefix + name, value)

    def _child(self, name: str, value: Any) -> Any:
        if name in self.calls.made:
            return functools.partial(self._answer, name, value)
        if isinstance(value, nn.Module) and any(recorded.startswith(f"{name}.") for recorded in self.calls.made):
            return functools.partial(type(value).forward, StandIn(self.calls, f"{name}.", self.root))
        return value

    def _answer(self, name: str, child: Any, *args: Any, **kwargs: Any) -> Any:
        at = self.answered.get(name, 0)
        if at == len(self.calls.made[name]):  # recorded calls ended before this one
            return child(*args, **kwargs)
        self.answered[name] = at + 1
        recorded, result = self.calls.made[name][at]
        if self.calls.inputs:
            given = _floats((*args, *kwargs.values()))
            if len(recorded) != len(given):
                self.root.max_rel_error = math.inf
            pairs = [(kept.tensor, other) for kept, other in zip(recorded, given, strict=False) if kept.unchanged()]
            self.root.compare([kept for kept, _ in pairs], [other for _, other in pairs])
        return result

    @torch.no_grad()
    def compare(self, recorded: Iterable[Tensor], original: Iterable[Tensor]) -> None:
        """Update `max_rel_error` with the differences of these tensors."""
        recorded, original = list(recorded), list(original)
        same = [a.shape for a in recorded] == [b.shape for b in original]
        errors = map(_difference, recorded, original) if same else [math.inf]
        self.max_rel_error = max(self.max_rel_error, *errors, 0.0)


class _Kept:
    """Input of a child, and whether a hook has changed it in place since."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.clone() if tensor.is_inference() else tensor  # inference tensors have no version
        self.version = None if tensor.is_inference() else tensor._version

    def unchanged(self) -> bool:
        return self.version is None or self.tensor._version == self.version


def _floats(values: Iterable[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def _difference(fused: Tensor, expected: Tensor) -> float:
    """Return the relative error where the original is finite; infinity if only one of the two is finite.

    Parts are compared one after another: float64 copies of whole tensors would raise the peak memory of the first call.
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
