"""Patched places of each family, by its name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from uniref_fast.models.family import Family

__all__ = ["FamilyPatch", "Place", "family_patch"]

_PATCHES = {
    "qwen-image-edit": "uniref_fast.patch.qwen_image:PATCH",
    "qwen-image-2.1": "uniref_fast.patch.qwen_image_21:PATCH",
    "z-image": "uniref_fast.patch.sandwich:Z_IMAGE",
    "fibo-2": "uniref_fast.patch.sandwich:FIBO_2",
    "flux2": "uniref_fast.patch.flux2:PATCH",
    "flux3": "uniref_fast.patch.flux3:PATCH",
    "joyimage-edit-plus": "uniref_fast.patch.joyimage:PATCH",
    "flux1": "uniref_fast.patch.flux1:FLUX_1",
    "longcat-image-edit": "uniref_fast.patch.flux1:LONGCAT",
    "fibo-edit": "uniref_fast.patch.flux1:FIBO",
}
"""`FamilyPatch` of each family, as "module:name". A module is imported when it is first needed."""


class Place(Protocol):
    """A patched place: it replaces a forward or a processor when it is constructed.

    Attributes:
        site: Counters of this place, a `uniref_fast.patch.report.Site`.
    """

    site: Any

    def locate(self) -> Any:
        """Raise RuntimeError if other code has wrapped or replaced the place since."""
        ...

    def remove(self) -> None:
        """Put the original back."""
        ...


@dataclass(frozen=True)
class FamilyPatch:
    """Functions with which `patch` changes the models of a family.

    Attributes:
        install: Function of (transformer, state) that installs the places and yields each `Place`, or a note on one
            that runs unchanged.
        changes: Function of the transformer that yields a phrase for each change of its code or settings that a packed
            forward would skip, and that `Family.replaced` does not describe.
        refuse_processors: Function of (transformer, visibility) that raises ValueError if a block has a processor that
            does not support the visibility.
    """

    install: Callable[[Any, Any], Iterator[Place | str]]
    changes: Callable[[Any], Iterator[str]]
    refuse_processors: Callable[[Any, Any], None]


def family_patch(family: Family) -> FamilyPatch | None:
    """Return the functions with which `patch` changes the models of a family; None if there are none."""
    if family.name not in _PATCHES:
        return None
    module, _, name = _PATCHES[family.name].partition(":")
    return getattr(importlib.import_module(module), name)
