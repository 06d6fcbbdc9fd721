"""Values derived from an immutable object, computed once, kept with the object and freed with it.

`memo(layout, _joint_index, "text", device)` returns `_joint_index(layout, "text", device)`. A value is stored under the
function that computes it and the arguments of that function, so a search for `memo(` lists everything that an object
can hold. A device, where a value has one, is an argument like any other: each device has its own value.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

__all__ = ["memo", "memoised", "version_of"]

Value = TypeVar("Value")


def memo(owner: Any, function: Callable[..., Value], *arguments: Hashable) -> Value:
    """Return `function(owner, *arguments)`, computed at the first call with these arguments.

    One tensor serves inference and training, so the function runs outside of inference mode. A value that is computed
    inside a transform of `torch.func` is not stored, because its tensors belong to that transform.

    Args:
        owner: Object that the value depends on. It must not change and must have a `__dict__`.
        function: Function that computes the value; it must depend on nothing but its arguments.
        *arguments: Further arguments of the function; they must be hashable.
    """
    values, key = memoised(owner), (function, *arguments)
    if key in values:
        return values[key]
    with torch.inference_mode(False):
        value = function(owner, *arguments)
    if not torch._C._are_functorch_transforms_active():
        values[key] = value
    return value


def version_of(tensor: torch.Tensor) -> int:
    """Return a number that differs after every change of a tensor in place; always 0 for one of inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def memoised(owner: Any) -> dict[tuple[Any, ...], Any]:
    """Return the values stored with an object, by (function, *arguments)."""
    return vars(owner).setdefault("_memo", {})
