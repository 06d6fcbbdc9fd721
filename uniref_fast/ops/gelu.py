"""GELU in the tanh approximation, as the feed-forwards of diffusers compute it; forward and backward.

On a CPU, PyTorch needs several times as long for the tanh as for reading and writing. The native kernel computes the
same function from one exponential and one division. On other devices, this is PyTorch's own operator.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from uniref_fast import native
from uniref_fast.ops._dispatch import (
    choose,
    define_op,
    first_order_only,
    observed,
    unavailable,
    upstream,
)

__all__ = ["gelu"]


def gelu(x: Tensor, *, impl: str | None = None) -> Tensor:
    """Compute `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))` elementwise (arXiv 1606.08415).

    Args:
        x: Tensor of any shape, float32 or bfloat16 (any floating dtype with the reference).
        impl: "reference" (`torch.nn.functional.gelu`) or "native" (CPU); None picks by device.

    Returns:
        Shape and dtype of x. Computed in float32 and rounded once. Differentiable.

    Raises:
        ValueError: If `impl` is not possible here.
    """
    if _choose(impl, x) == "reference":
        return F.gelu(x, approximate="tanh")
    return (torch.ops.uniref_fast.gelu if observed(x) else _gelu)(x)


def _choose(impl: str | None, x: Tensor) -> str:
    if impl is None:
        possible = x.is_cpu and unavailable("native", x) is None and native.has_gelu()
        return "native" if possible else "reference"
    if impl == "native" and native.available() and not native.has_gelu():
        raise ValueError("impl='native' is not possible here: the native library is older than this op: reinstall")
    if impl not in ("reference", "native"):
        raise ValueError(f"gelu has the implementations 'reference' and 'native', got impl={impl!r}")
    return choose(impl, x)


@define_op
def _gelu(x: Tensor) -> Tensor:
    return native.gelu(x)


@define_op
def _gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return native.gelu_backward(grad, x)


@torch.library.register_fake("uniref_fast::gelu")
def _(x):
    return x.new_empty(x.shape)


@torch.library.register_fake("uniref_fast::gelu_backward")
def _(grad, x):
    return x.new_empty(x.shape)


def _save_gelu(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0])


def _differentiate_gelu(ctx, grad):
    return torch.ops.uniref_fast.gelu_backward(upstream(grad).contiguous(), *ctx.saved_tensors)


torch.library.register_autograd("uniref_fast::gelu", _differentiate_gelu, setup_context=_save_gelu)
first_order_only("gelu_backward")
