"""GELU in the tanh approximation, and its gradient."""

import torch
from torch import Tensor

from uniref_fast.native.library import DTYPES, check, raise_for, use_level


def gelu(x: Tensor, *, level: str | None = None) -> Tensor:
    """Compute `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))`: x of any shape; contiguous result.

    An element's bits depend on its value only.
    """
    return _gelu(x, None, level)


def gelu_backward(grad: Tensor, x: Tensor, *, level: str | None = None) -> Tensor:
    """Return the gradient of `gelu` for x: grad and x of one shape and dtype; contiguous result."""
    return _gelu(x, check("grad", grad.contiguous(), x.shape, x.dtype), level)


def _gelu(x: Tensor, grad: Tensor | None, level: str | None) -> Tensor:
    lib, level_id = use_level(level)
    if x.dtype not in DTYPES or not x.is_cpu:
        raise ValueError(f"x is {x.dtype} on {x.device}; native kernels take float32 and bfloat16 on the CPU")
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    status = lib.uf_gelu(
        level_id, torch.get_num_threads(), DTYPES[x.dtype], x.data_ptr(), None if grad is None else grad.data_ptr(),
        x.numel(), out.data_ptr(),
    )  # fmt: skip
    raise_for(status)
    return out
