"""Linears in float32 that are computed by oneDNN instead of MKL; both libraries are part of PyTorch.

PyTorch computes a Linear in float32 on a CPU with MKL. On a CPU of AMD, MKL uses vectors of 256 bits only. Since Zen 5,
whose units compute 512 bits at once, oneDNN needs half the time for a Linear of many rows. Both sum in float32, in
another order. The weights stay where they are and as they are.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uniref_fast import ops
from uniref_fast.models.module_hooks import code_module, has_global_hooks, runs_class_forward

__all__ = ["FEWEST_PRODUCTS", "onednn_is_faster", "onednn_linear", "runs_onednn"]

FEWEST_PRODUCTS = 1 << 21
"""Smallest Linear, in rows * inputs * outputs: below, a call of oneDNN takes longer than the Linear. Measured on a CPU
with Zen 5, from 64 to 3072 channels."""

_PLAIN = (Tensor, nn.Parameter)
_ZEN_5 = 26


def runs_onednn(linear: Any, x: Any, impl: str | None) -> bool:
    """Return True if a call of a module is computed by `onednn_linear`.

    That is so for a Linear in float32 on a CPU where oneDNN is faster, outside torch.compile and without gradients, if
    a call of it runs no hook and no replaced code, and nothing asks PyTorch for another precision.

    Args:
        linear: The module.
        x: Its input.
        impl: Implementation forced on every op, or None.
    """
    if torch.compiler.is_compiling() or type(linear) is not nn.Linear or type(x) not in _PLAIN:
        return False
    if x.dtype is not torch.float32 or not x.is_cpu or not onednn_is_faster() or impl in ("reference", "triton"):
        return False
    own = vars(linear)["_parameters"]  # quicker than attributes of a module
    weight, bias = own.get("weight"), own.get("bias")
    if not _is_plain(weight) or weight.ndim != 2 or "bias" not in own:
        return False
    outputs, inputs = weight.shape
    if x.numel() * outputs < FEWEST_PRODUCTS or x.shape[-1] != inputs or not x.is_contiguous():
        return False
    # oneDNN reads the bias as one value after the other, without a check
    if bias is not None and not (_is_plain(bias) and bias.shape == (outputs,)):
        return False
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (x, weight, bias)):
        return False
    if not runs_class_forward(linear) or has_global_hooks() or _is_replaced() or _is_forbidden():
        return False
    return ops.unavailable("native", x) is None


def onednn_linear(linear: nn.Linear, x: Tensor) -> Tensor:
    """Compute `x @ weight.T + bias` by oneDNN, `[..., K]` to `[..., N]`.

    The bits of a row do not depend on the other rows, unless there is only one row.
    """
    return torch.ops.mkldnn._linear_pointwise.default(x, linear.weight, linear.bias, "none", [], "")


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


def _is_plain(weight: Any) -> bool:
    return (
        type(weight) in _PLAIN
        and weight.dtype is torch.float32
        and weight.is_cpu
        and weight.layout is torch.strided
        and weight.is_contiguous()
    )


def _is_forbidden() -> bool:
    """Return True if oneDNN is off, a lower precision is allowed, or a torch mode watches the operators of PyTorch."""
    return (
        not torch._C._get_mkldnn_enabled()
        or _fp32_precision("mkldnn", "matmul") not in ("none", "ieee")
        or torch._C._len_torch_dispatch_stack() > 0
    )


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
