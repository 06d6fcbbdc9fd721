"""Choice of the implementation of an op, and helpers that all ops share."""

from __future__ import annotations

import functools
import importlib
import os
import re
from collections.abc import Callable
from importlib import metadata
from types import ModuleType
from typing import Any, Literal, NoReturn, TypeVar

import torch
from torch.autograd import forward_ad

from uniref_fast import native
from uniref_fast.kernels.segment_attention_config import HEAD_DIMS

__all__ = [
    "ATTENTION_LIBRARIES",
    "IMPLEMENTATIONS",
    "Rounding",
    "choose",
    "define_op",
    "explain",
    "first_order_only",
    "inside_transform",
    "is_traced",
    "module",
    "not_batched",
    "observed",
    "one_of",
    "unavailable",
    "unit_stride",
    "upstream",
]

Rounding = Literal["once", "eager"]
"""Rounding of a fused op: of the result only, or wherever eager PyTorch rounds."""
IMPLEMENTATIONS = ("reference", "native", "triton")
ATTENTION_LIBRARIES = ("dense", "flash", "cudnn_flex")
"""Implementations of attention alone: PyTorch's fused attention, FlashAttention, cuDNN's flex attention."""
TRITON_FLOOR = (3, 6)
CAPABILITY_FLOOR = (8, 0)
Kernel = TypeVar("Kernel", bound=Callable[..., Any])
LIBRARY = torch.library.Library("uniref_fast", "FRAGMENT")
PLAIN = (torch.Tensor, torch.nn.Parameter)
"""Classes of tensors whose operators are PyTorch's own."""


def _triton_missing() -> str | None:
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "the triton package is not installed"
    found = re.match(r"(\d+)\.(\d+)", version)
    older = found is None or tuple(map(int, found.groups())) < TRITON_FLOOR
    return f"triton {version} is installed, at least 3.6 is needed" if older else None


def inside_transform() -> str | None:
    """Return the reason why no fused kernel can run inside an active transform of functions, or None outside of all.

    PyTorch gives plain tensors to a kernel. The tangents of forward-mode differentiation and the gradients and batch
    dimensions of `torch.func` would be lost without an error.
    """
    active = None
    if torch._C._are_functorch_transforms_active():
        active = "a torch.func transform (grad, vjp, jvp, vmap and what is built on them)"
    elif forward_ad._current_level >= 0:
        active = "forward-mode differentiation"
    return f"inside {active}, which fused kernels do not support; impl='reference' does" if active else None


TRITON_MISSING = _triton_missing()  # once: torch.compile cannot trace it


def unavailable(impl: str, tensor: torch.Tensor, head_dim: int | None = None) -> str | None:
    """Return the reason why `impl` cannot take this tensor, or None; attention also gives its `head_dim`."""
    device, dtype = tensor.device.type, tensor.dtype
    if impl == "reference" or device == "meta":  # nothing is computed on meta tensors
        return None
    if why := inside_transform():
        return why
    if impl == "native":
        if device != "cpu":
            return f"native kernels run on CPU tensors, this one is on {tensor.device}"
        if not native.available():
            return native.reason()
        if dtype not in (torch.float32, torch.bfloat16):
            return f"native kernels take float32 and bfloat16, got {dtype}"
        if head_dim is not None and head_dim % 8:
            return f"native attention takes head dimensions that are multiples of 8, got {head_dim}"
        return None
    if TRITON_MISSING:
        return TRITON_MISSING
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton kernels need a CUDA device (or TRITON_INTERPRET=1 for tests), this tensor is on {tensor.device}"
    if device != "cuda" and dtype not in (torch.float32, torch.float16):
        return f"the Triton interpreter computes float32 and float16 only, got {dtype}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"Triton kernels take float32, float16 and bfloat16, got {dtype}"
    if device == "cuda" and torch.cuda.get_device_capability(tensor.device) < CAPABILITY_FLOOR:
        return "Triton kernels need compute capability 8.0 or newer"
    if head_dim is not None and head_dim not in HEAD_DIMS:
        return f"Triton attention takes head dimensions {', '.join(map(str, HEAD_DIMS))}, got {head_dim}"
    return None


def choose(impl: str | None, tensor: torch.Tensor, head_dim: int | None = None) -> str:
    """Return the implementation to use: an explicit `impl` is checked, None picks the fastest for the tensor.

    A library of attention leaves the choice of the other ops free, as None does.
    """
    if impl is None or impl in ATTENTION_LIBRARIES:
        first = _first(tensor)
        return first if unavailable(first, tensor, head_dim) is None else "reference"
    one_of("impl", impl, *IMPLEMENTATIONS, *ATTENTION_LIBRARIES)
    if why := unavailable(impl, tensor, head_dim):
        raise ValueError(f"impl={impl!r} is not possible here: {why}")
    return impl


def _first(tensor: torch.Tensor) -> str:
    return "triton" if tensor.device.type == "cuda" else "native"


def explain(tensor: torch.Tensor, head_dim: int | None = None) -> tuple[str, str]:
    """Return the implementation picked for a tensor, and the reason in words."""
    first = _first(tensor)
    why = unavailable(first, tensor, head_dim)
    if why is None:
        return first, f"{tensor.device.type} tensor" + (f"; {native.reason()}" if first == "native" else "")
    return "reference", why


def module(impl: str, name: str) -> ModuleType:
    """Return the module with the functions of `impl` ("native" or "triton"); Triton is imported at the first use."""
    return native if impl == "native" else _kernels(name)


@functools.cache
def _kernels(name: str) -> ModuleType:
    return importlib.import_module(f"uniref_fast.kernels.{name}")


def define_op(function: Kernel) -> Kernel:
    """Register a function as the op `torch.ops.uniref_fast.<name>` on every device, and return the function.

    The name is that of the function without its leading underscore, and the annotations give the schema. Results must
    be new tensors. `torch.library.custom_op` registers the same op, in a wrapper that takes more time in every call.
    """
    name = function.__name__.lstrip("_")
    LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()), tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, torch.compiler.disable(function), "CompositeExplicitAutograd")  # not compiled piece by piece
    return function


is_traced = torch.compiler.is_dynamo_compiling
"""Return True where torch.compile traces this call. It is PyTorch's own function and not one that calls it: Dynamo
would compile a function of this package, with True as its result, also where it runs the caller uncompiled after a
graph break. `torch.compiler.is_compiling` is also true in other threads of the process while one of them compiles.
torch.export without Dynamo has a flag of its own, `torch.compiler.is_exporting`.
"""


def observed(*tensors: torch.Tensor | None) -> bool:
    """Return True if a call must go through the dispatcher of PyTorch: something besides the kernel has to see it.

    That is autograd, torch.compile, tracing, a torch mode, a tensor subclass, the profiler, and the meta device. All
    other calls can run the kernel itself, which saves more time than a small kernel takes.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    ):
        return True
    grad = torch.is_grad_enabled()
    for x in tensors:  # noqa: SIM110 (a generator would take twice the time)
        if x is not None and (type(x) not in PLAIN or x.is_meta or (grad and x.requires_grad)):
            return True
    return False


def one_of(name: str, value: str, *known: str) -> bool:
    """Return True if `value` is the last of the known values.

    Raises:
        ValueError: The value is not known.
    """
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
    return value == known[-1]


def first_order_only(*names: str) -> None:
    """Make backward ops raise an error when second derivatives or batches of gradients are taken through them."""
    for name in names:
        torch.library.register_autograd(f"uniref_fast::{name}", lambda ctx, *grads: _refuse("second derivatives"))
    not_batched(*names)


def not_batched(*names: str) -> None:
    """Make ops raise an error under vmap, of `torch.func` and of `torch.autograd.grad(is_grads_batched=True)`."""
    what = "batches of gradients (vmap over a backward)"
    for name in names:
        torch.library.register_vmap(f"uniref_fast::{name}", lambda info, in_dims, *args: _refuse(what))
        LIBRARY.impl(name, lambda *args: _refuse(what), "Batched")


def _refuse(what: str) -> NoReturn:
    raise NotImplementedError(
        f"fused kernels have no {what}: use impl='reference' in the forward, or unpatch() a patched model first"
    )


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """Return x, or a copy if its last dimension is not contiguous (an expanded gradient, for example)."""
    return x if x.stride(-1) == 1 or x.numel() == 0 else x.contiguous()


def upstream(grad: torch.Tensor) -> torch.Tensor:
    """Return an upstream gradient in the form that a fused backward takes.

    Raises:
        NotImplementedError: A transform is active that the forward was not part of; it would be lost.
    """
    if inside_transform():
        _refuse("backward inside a transform of torch.func or forward mode")
    return unit_stride(grad)
