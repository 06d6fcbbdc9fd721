"""Memory of GPUs: the sizes that are sold, the share that can be planned for, and sizes in bytes as text."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["SIZES", "USABLE", "fits", "fits_text", "size_text"]

SIZES = (16, 24, 32, 48, 80, 96, 141, 192)
"""Memory of GPUs in GB, as their makers name it; PyTorch reports the same number of GiB within 2 %."""

USABLE = 0.9
"""Share of a GPU's memory that can be planned for; libraries and the reserve of the allocator need the rest."""


def fits(needed: int, gigabytes: float) -> bool:
    """Return True if `needed` bytes fit the usable share of a GPU of that size."""
    return needed <= gigabytes * 2**30 * USABLE


def fits_text(needed: int, gigabytes: float | None = None, sizes: Sequence[int] = SIZES) -> str:
    """Return whether bytes fit a GPU, in words: the given one, else the smallest of `sizes` that they fit."""
    if gigabytes is not None:
        verb = "fits" if fits(needed, gigabytes) else "does not fit"
        return f"{verb} a GPU of {gigabytes:g} GB, of which {gigabytes * USABLE:.1f} are planned for"
    found = next((size for size in sizes if fits(needed, size)), None)
    return f"fits a GPU of {found} GB or more" if found else f"fits no GPU of up to {sizes[-1]} GB"


def size_text(count: float) -> str:
    """Return a number of bytes with a unit, such as "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
