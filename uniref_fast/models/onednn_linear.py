"""Linears in float32 that are computed by oneDNN instead of MKL; both libraries are part of PyTorch.

PyTorch computes a Linear in float32 on a CPU with MKL. On a CPU of AMD, MKL uses vectors of 256 bits only. Since Zen 5,
whose units compute 512 bits at once, oneDNN needs half the time for a Linear of many rows. Both sum in float32, in
another order. The weights stay where they are and as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uniref_fast import ops
from uniref_fast.models.module_hooks import (
    code_module,
    device_of_hooks,
    has_global_hooks,
    may_have_hooks,
    onloaded,
    runs_class_forward,
)

__all__ = [
    "FEWEST_PRODUCTS",
    "FEWEST_WEIGHTS",
    "CallLinear",
    "call_linear",
    "forward_by_parts",
    "onednn_is_faster",
    "onednn_linear",
    "row_by_row_linear",
    "runs_by_parts",
    "runs_onednn",
]

FEWEST_PRODUCTS = 1 << 21
"""Smallest Linear, in rows * inputs * outputs: below, a call of oneDNN takes longer than the Linear. Measured on a CPU
with Zen 5, from 64 to 3072 channels."""

FEWEST_WEIGHTS = 1 << 15
"""Smallest weight of a Linear that oneDNN computes for any number of rows, see `row_by_row_linear`."""

CallLinear = Callable[[Any, Tensor], Tensor]
"""Function that calls a Linear, or any module in its place, with an input `[n, K]`."""

_PLAIN = (Tensor, nn.Parameter)
_ZEN_5 = 26


def runs_onednn(linear: Any, x: Any, impl: str | None, packed: bool = False) -> bool:
    """Return True if a call of a module is computed by `onednn_linear`.

    That is so for a Linear in float32 on a CPU where oneDNN is faster, outside torch.compile and without gradients, if
    a call of it runs no hook and no replaced code, and nothing asks PyTorch for another precision.

    Args:
        linear: The module.
        x: Its input.
        impl: Implementation forced on every op, or None.
        packed: Decide for a packed forward: by the size of the weight, whatever the number of rows, also if a mode of
            PyTorch watches its operators, and also for a Linear with hooks of diffusers and accelerate, which that
            forward runs itself.
    """
    if ops.is_traced() or type(linear) is not nn.Linear or type(x) not in _PLAIN:
        return False
    if x.dtype is not torch.float32 or not x.is_cpu or not onednn_is_faster() or impl in ("reference", "triton"):
        return False
    own = vars(linear)["_parameters"]  # quicker than attributes of a module
    weight, bias = own.get("weight"), own.get("bias")
    hooked = packed and may_have_hooks(linear)
    onloaded_here = hooked and device_of_hooks(linear) == x.device
    if not _is_plain(weight, onloaded_here) or weight.ndim != 2 or "bias" not in own:
        return False
    outputs, inputs = weight.shape
    large = weight.numel() >= FEWEST_WEIGHTS if packed else x.numel() * outputs >= FEWEST_PRODUCTS
    if not large or not x.numel() or x.shape[-1] != inputs or not x.is_contiguous():
        return False
    # oneDNN reads the bias as one value after the other, without a check
    if bias is not None and not (_is_plain(bias, onloaded_here) and bias.shape == (outputs,)):
        return False
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, weight, bias)):
        return False
    if not runs_class_forward(linear, below_hooks=hooked) or has_global_hooks() or _is_replaced() or _is_forbidden():
        return False
    if not packed and torch._C._len_torch_dispatch_stack() > 0:  # a mode watches the operators of PyTorch
        return False
    return ops.unavailable("native", x) is None


def onednn_linear(linear: nn.Linear, x: Tensor) -> Tensor:
    """Compute `x @ weight.T + bias` by oneDNN, `[..., K]` to `[..., N]`.

    The bits of a row do not depend on the other rows, unless there is only one row.
    """
    return torch.ops.mkldnn._linear_pointwise.default(x, linear.weight, linear.bias, "none", [], "")


def row_by_row_linear(linear: nn.Module, x: Any, impl: str | None) -> Tensor:
    """Call a Linear of a packed forward, or compute it by oneDNN so that the bits of a row do not depend on the others.

    Args:
        linear: The Linear, or any module that stands for it.
        x: Its input, `[n, K]`.
        impl: Implementation forced on every op, or None.
    """
    if not runs_onednn(linear, x, impl, packed=True):
        return linear(x)
    assert isinstance(linear, nn.Linear)
    with onloaded(linear):
        if len(x) == 1:  # the library has another function for one row
            return onednn_linear(linear, x.expand(2, -1).contiguous())[:1]
        return onednn_linear(linear, x)


def call_linear(linear: Any, x: Tensor) -> Tensor:
    """Call a Linear as PyTorch does."""
    return linear(x)


def runs_by_parts(module: Any, x: Any) -> bool:
    """Return True if Linears in the forward of a module, such as a feed-forward, may be computed by oneDNN.

    Only code of diffusers runs by parts: other code may need the module itself, for example to call `super().forward`.
    """
    return (
        not ops.is_traced() and onednn_is_faster() and isinstance(x, Tensor) and x.is_cpu
        and x.dtype is torch.float32 and not has_global_hooks() and runs_class_forward(module)
        and _is_from_diffusers(type(module))
    )  # fmt: skip


def _is_from_diffusers(kind: Any) -> bool:
    """Return True if a call of a module of this class runs a forward that diffusers defines, and nothing else."""
    called = code_module(kind.__call__) == nn.Module.__module__
    return called and code_module(kind.forward).startswith("diffusers.")


def forward_by_parts(module: Any, call: Callable[[str, nn.Module], Callable], x: Tensor) -> Any:
    """Run the forward of a module's class with other functions in the place of its children.

    Args:
        module: The module.
        call: Function of the name of a child and the child, which returns the function.
        x: Input of the module.
    """
    return type(module).forward(_Parts(module, call), x)


class _Parts:
    """Replacement of a module in its forward: its children are other functions, all other attributes its own."""

    def __init__(self, module: Any, call: Callable[[str, nn.Module], Callable]) -> None:
        self.module, self.call = module, call

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.module, name)
        if isinstance(value, nn.ModuleList):
            return [self.call(f"{name}.{i}", each) for i, each in enumerate(value)]
        return self.call(name, value) if isinstance(value, nn.Module) else value


@functools.cache
def onednn_is_faster() -> bool:
    """Return True if this CPU computes vectors of 512 bits at once, and PyTorch's MKL does not use them."""
    capable = torch.backends.cpu.get_cpu_capability().startswith("AVX512") and torch.backends.mkl.is_available()
    vendor, family = _vendor_and_family()
    return capable and hasattr(torch.ops.mkldnn, "_linear_pointwise") and vendor == "AuthenticAMD" and family >= _ZEN_5


def _vendor_and_family() -> tuple[str, int]:
    """Return the vendor and the family of this CPU as Linux describes them; empty and 0 if it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return "", 0
    values = dict(line.replace("\t", "").split(": ", 1) for line in lines if ": " in line)
    return values.get("vendor_id", ""), int(values.get("cpu family", 0))


def _is_plain(weight: Any, onloaded_here: bool) -> bool:
    """Return True for an ordinary tensor in float32 that is on the CPU, or that hooks bring there."""
    return (
        type(weight) in _PLAIN
        and weight.dtype is torch.float32
        and (weight.is_cpu or onloaded_here)
        and weight.layout is torch.strided
        and weight.is_contiguous()
    )


def _is_forbidden() -> bool:
    """Return True if oneDNN is off, or a lower precision is allowed, which PyTorch's own Linear then uses."""
    return not torch._C._get_mkldnn_enabled() or _fp32_precision("mkldnn", "matmul") not in ("none", "ieee")


_fp32_precision = torch._C._get_fp32_precision_getter  # quicker than torch.backends.mkldnn.matmul.fp32_precision
_CODE = nn.Linear.forward, nn.Linear.__call__


def _is_replaced() -> bool:
    """Return True if code that a call of a Linear runs was replaced in this process."""
    return (
        F.linear is not torch._C._nn.linear
        or nn.Linear.forward is not _CODE[0]
        or nn.Linear.__call__ is not _CODE[1]
        or _is_replaced_before()
    )


@functools.cache
def _is_replaced_before() -> bool:
    """Return True if that was so when this module was imported."""
    homes = nn.Linear.__module__, nn.Module.__module__
    return any(code_module(code) != home for code, home in zip(_CODE, homes, strict=True))
