"""Which implementation serves an op, and why."""

from __future__ import annotations

import functools
import os
from importlib import metadata

import torch

from uniref_fast import native

__all__ = ["IMPLEMENTATIONS", "choose", "explain", "unavailable"]

IMPLEMENTATIONS = ("reference", "native", "triton")
TRITON_FLOOR = (3, 6)


@functools.cache
def _triton_missing() -> str | None:
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "the triton package is not installed"
    older = tuple(int(part) for part in version.split(".")[:2]) < TRITON_FLOOR
    return f"triton {version} is installed, at least 3.6 is needed" if older else None


def unavailable(impl: str, tensor: torch.Tensor) -> str | None:
    """Why `impl` cannot take this tensor, or None when it can."""
    device, dtype = tensor.device.type, tensor.dtype
    if impl == "reference":
        return None
    if impl == "native":
        if device != "cpu":
            return f"native kernels run on CPU tensors, this one is on {tensor.device}"
        if not native.available():
            return native.reason()
        if dtype not in (torch.float32, torch.bfloat16):
            return f"native kernels take float32 and bfloat16, got {dtype}"
        return None
    if missing := _triton_missing():
        return missing
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton kernels need a CUDA device (or TRITON_INTERPRET=1 for tests), this tensor is on {tensor.device}"
    if device != "cuda" and dtype not in (torch.float32, torch.float16):
        return f"the Triton interpreter computes float32 and float16 only, got {dtype}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"Triton kernels take float32, float16 and bfloat16, got {dtype}"
    return None


def choose(impl: str | None, tensor: torch.Tensor) -> str:
    """Resolve `impl`: an explicit choice is checked, None picks the fastest that can take the tensor."""
    if impl is None:
        return explain(tensor)[0]
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"unknown impl {impl!r}; known: {', '.join(IMPLEMENTATIONS)}")
    if why := unavailable(impl, tensor):
        raise ValueError(f"impl={impl!r} is not possible here: {why}")
    return impl


def explain(tensor: torch.Tensor) -> tuple[str, str]:
    """The implementation picked for a tensor, and the reason in words."""
    first = "triton" if tensor.device.type == "cuda" else "native"
    why = unavailable(first, tensor)
    if why is None:
        return first, f"{tensor.device.type} tensor" + (f"; {native.reason()}" if first == "native" else "")
    return "reference", why
