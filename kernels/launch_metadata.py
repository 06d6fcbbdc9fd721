"""Name, bytes and flops of a launch for profilers such as Proton; evaluated only while a profiler is active.

`bytes` counts every tensor of the launch once, as if each were read or written once. `flops` of attention counts the
visible pairs, which are read from the tables on the device: a synchronisation that no launch without a profiler has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Metadata = Callable[[tuple[int, ...], Any, dict[str, Any]], dict[str, Any]]


def moved_bytes(grid: tuple[int, ...], kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
    """Return the name of a launch and the bytes of its tensors; the signature is that of Triton's `launch_metadata`."""
    tensors = {x.data_ptr(): x for x in args.values() if isinstance(x, torch.Tensor)}
    return {"name": kernel.name, "bytes": sum(x.numel() * x.element_size() for x in tensors.values())}


def attention_products(count: int, ranges: str, pointers: str, intervals: str) -> Metadata:
    """Return the `launch_metadata` of an attention kernel with so many matrix products over the visible pairs.

    Args:
        count: Number of products, each of 2 D flops per head and pair.
        ranges, pointers, intervals: Names of the kernel's arguments with the tables of the plan.
    """

    def metadata(grid: tuple[int, ...], kernel: Any, args: dict[str, Any]) -> dict[str, Any]:
        pairs = visible_pairs(args[ranges], args[pointers], args[intervals])
        q = args["p_q"]
        flops = 2 * count * pairs * q.shape[1] * q.shape[2]
        return {**moved_bytes(grid, kernel, args), f"flops{8 * q.element_size()}": flops}

    return metadata


def visible_pairs(ranges: torch.Tensor, pointers: torch.Tensor, intervals: torch.Tensor) -> int:
    """Return the number of visible (query, key) pairs per head from the tables of a plan."""
    start, end = intervals.long().unbind(1)
    length = end - torch.where(start < 0, -1 - start, start)
    keys = torch.nn.functional.pad(length.cumsum(0), (1, 0))
    seen = keys[pointers.long()].diff()
    hidden = torch.where(start < 0, length * (length - 1) // 2, 0)  # of a causal interval
    return int(((ranges[:, 1] - ranges[:, 0]) * seen).sum() - hidden.sum())
