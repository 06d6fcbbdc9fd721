"""LayerNorm with modulation by a row of a table per token, alone or after a gated residual; forward and backward.

    norm_modulate                 out = norm(x) * (1 + scale[r]) + shift[r]
    gate_residual                 x'  = x + gate[r] * y
    gate_residual_norm_modulate   x'  = x + gate[r] * y,  out = norm_modulate(x')

`r = mod_index[i]` is the modulation row of token i (`SelfLayout.modulation_rows`): the sampled timestep of its sample,
or the clean t = 0 of references in Qwen-Image-Edit-2511. Each op reads its inputs once and writes its outputs once: 2,
3 and 4 passes over `[N, C]`, where eager PyTorch takes 5 to 12. The backward passes take 3, 3 and 6; mean and deviation
are recomputed, not saved. Gradients of shift, scale and gate are sums over the tokens of a row, in float32 and in an
order that does not depend on the rest of the pack.

Blocks with norms before and after a branch multiply by a factor (`add_one=False`), and add a normalised branch
(`branch_eps`). The backward of these is a sequence of the kernels above, which takes a few passes more.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from uniref_fast import native
from uniref_fast.ops._dispatch import Rounding, choose, define_op, first_order_only, module, observed, one_of, upstream

__all__ = [
    "gate_residual",
    "gate_residual_norm_modulate",
    "gate_residual_norm_modulate_reference",
    "gate_residual_reference",
    "norm_modulate",
    "norm_modulate_reference",
]

Norm = Literal["layer", "rms"]


def norm_modulate(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    mod_index: Tensor | None = None,
    eps: float = 1e-6,
    *,
    norm: Norm = "layer",
    add_one: bool = True,
    rounding: Rounding = "once",
    impl: str | None = None,
) -> Tensor:
    """Normalise without affine parameters, then apply `* (1 + scale[r]) + shift[r]`: adaLN of DiT (arXiv 2212.09748).

    Args:
        x: `[N, C]`, float32, bfloat16, float16 (float64 with the reference).
        shift, scale: `[R, C]`, same dtype; rows may be strided (chunks of a wider table). shift may be None.
        mod_index: Modulation row r of each token, int32 `[N]` with values in 0..R-1. None means row 0 for all.
        eps: Number added to the variance (to the mean square).
        norm: "layer" is `(x - mean) / sqrt(var + eps)`, "rms" is `x / sqrt(mean(x^2) + eps)`.
        add_one: Multiply by `1 + scale[r]`; False multiplies by `scale[r]`, whose small values then keep their digits.
        rounding: "once" computes in float32 and rounds the result, "eager" rounds to x's dtype wherever eager PyTorch
            does, after each operation. The reference always does the latter.
        impl: "reference", "native", "triton"; None picks by device.

    Returns:
        `[N, C]`, dtype of x. Differentiable in x, shift and scale.
    """
    _check(x, mod_index, shift=shift, scale=scale)
    rms, eager = one_of("norm", norm, "layer", "rms"), one_of("rounding", rounding, "once", "eager")
    impl = _possible(choose(impl, x), not add_one)
    if impl == "reference":
        return norm_modulate_reference(x, shift, scale, mod_index, eps, rms, add_one)
    run = torch.ops.uniref_fast.norm_modulate if observed(x, shift, scale) else _norm_modulate
    return run(x, shift, scale, mod_index, eps, rms, eager, impl, add_one)


def gate_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    mod_index: Tensor | None = None,
    *,
    branch_eps: float | None = None,
    rounding: Rounding = "once",
    impl: str | None = None,
) -> Tensor:
    """Compute `x + gate[r] * y` of x, y `[N, C]` and gate `[R, C]`; returns `[N, C]`.

    With `branch_eps`, `y / sqrt(mean(y^2) + branch_eps)` takes the place of y. `mod_index`, `rounding` and `impl` mean
    the same as in `norm_modulate`. Differentiable in x, y and gate.
    """
    _check(x, mod_index, y=y, gate=gate)
    eager = one_of("rounding", rounding, "once", "eager")
    impl = _possible(choose(impl, x), branch_eps is not None)
    if impl == "reference":
        return gate_residual_reference(x, y, gate, mod_index, branch_eps)
    run = torch.ops.uniref_fast.gate_residual if observed(x, y, gate) else _gate_residual
    return run(x, y, gate, mod_index, eager, impl, branch_eps)


def gate_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    mod_index: Tensor | None = None,
    eps: float = 1e-6,
    *,
    norm: Norm = "layer",
    add_one: bool = True,
    branch_eps: float | None = None,
    rounding: Rounding = "once",
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `x' = x + gate[r] * y`, rounded to x's dtype, and `norm_modulate(x')` in one pass.

    The arguments are those of `norm_modulate` and `gate_residual`. Returns `(x', normed)`, both `[N, C]`, which are
    differentiable in all tensors but mod_index.
    """
    _check(x, mod_index, y=y, gate=gate, shift=shift, scale=scale)
    rms, eager = one_of("norm", norm, "layer", "rms"), one_of("rounding", rounding, "once", "eager")
    impl = _possible(choose(impl, x), not add_one or branch_eps is not None)
    if impl == "reference":
        tables = gate, shift, scale
        return gate_residual_norm_modulate_reference(x, y, *tables, mod_index, eps, rms, add_one, branch_eps)
    seen = observed(x, y, gate, shift, scale)
    run = torch.ops.uniref_fast.gate_residual_norm_modulate if seen else _gate_residual_norm_modulate
    return run(x, y, gate, shift, scale, mod_index, eps, rms, eager, impl, add_one, branch_eps)


def _possible(impl: str, new: bool) -> str:
    """Return the implementation, or "reference" for what a native library of an older version does not have."""
    return "reference" if new and impl == "native" and not native.has_branch_norm() else impl


# ---- reference: the specification, the oracle (in float64) and the baseline ----


def norm_modulate_reference(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    mod_index: Tensor | None = None,
    eps: float = 1e-6,
    rms: bool = False,
    add_one: bool = True,
) -> Tensor:
    normed = (F.rms_norm if rms else F.layer_norm)(x, x.shape[-1:], eps=eps)
    factor = _select(scale, mod_index)
    normed = normed * (1 + factor if add_one else factor)
    return normed if shift is None else normed + _select(shift, mod_index)


def gate_residual_reference(
    x: Tensor, y: Tensor, gate: Tensor, mod_index: Tensor | None = None, branch_eps: float | None = None
) -> Tensor:
    y = y if branch_eps is None else F.rms_norm(y, y.shape[-1:], eps=branch_eps)
    return x + _select(gate, mod_index) * y


def gate_residual_norm_modulate_reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    mod_index: Tensor | None = None,
    eps: float = 1e-6,
    rms: bool = False,
    add_one: bool = True,
    branch_eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    x = gate_residual_reference(x, y, gate, mod_index, branch_eps)
    return x, norm_modulate_reference(x, shift, scale, mod_index, eps, rms, add_one)


def _select(table: Tensor, mod_index: Tensor | None) -> Tensor:
    return table[:1] if mod_index is None else table[mod_index.long()]


def _check(x: Tensor, mod_index: Tensor | None, **others: Tensor | None) -> None:
    shape, dtype, device, rows = x.shape, x.dtype, x.device, 0
    if len(shape) != 2:
        raise ValueError(f"x must be [N, C], got {list(shape)}")
    _check_channels("x", x)
    for name, other in others.items():
        if other is None:
            continue
        expected: tuple[int, ...] = shape
        if name != "y":
            rows = rows or other.shape[0]
            expected = rows, shape[1]
        if other.shape != expected or not (rows or name == "y"):
            raise ValueError(
                f"{name} has shape {list(other.shape)}, expected {'[N, C]' if name == 'y' else '[R, C], one R >= 1'} "
                f"for x of {list(shape)}"
            )
        if other.dtype != dtype or other.device != device:
            raise ValueError(f"{name} is {other.dtype} on {other.device}, x is {dtype} on {device}")
        _check_channels(name, other)
    if mod_index is not None and (
        mod_index.shape != shape[:1] or mod_index.dtype != torch.int32 or not mod_index.is_contiguous()
    ):
        raise ValueError(f"mod_index must be contiguous int32 [{shape[0]}], got {mod_index.dtype} {[*mod_index.shape]}")


def _check_channels(name: str, x: Tensor) -> None:
    if not x.is_contiguous() and x.numel() and x.stride(-1) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension, its strides are {x.stride()}")


# ---- torch.library ops ----


@define_op
def _norm_modulate(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    mod_index: Tensor | None,
    eps: float,
    rms: bool,
    eager_rounding: bool,
    impl: str,
    add_one: bool,
) -> Tensor:
    return module(impl, "norm_modulate").norm_modulate(x, shift, scale, mod_index, eps, rms, eager_rounding, add_one)


@define_op
def _norm_modulate_backward(
    grad: Tensor, x: Tensor, scale: Tensor, mod_index: Tensor | None, eps: float, rms: bool, row_grads: bool, impl: str
) -> list[Tensor]:
    grads = module(impl, "norm_modulate_backward").norm_modulate_backward(
        grad, x, scale, mod_index, eps, rms, row_grads
    )
    return [g for g in grads if g is not None]


@define_op
def _gate_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    mod_index: Tensor | None,
    eager_rounding: bool,
    impl: str,
    branch_eps: float | None,
) -> Tensor:
    return module(impl, "norm_modulate").gate_residual(x, y, gate, mod_index, eager_rounding, branch_eps)


@define_op
def _gate_residual_backward(
    grad: Tensor, y: Tensor, gate: Tensor, mod_index: Tensor | None, row_grads: bool, impl: str
) -> list[Tensor]:
    grads = module(impl, "norm_modulate_backward").gate_residual_backward(grad, y, gate, mod_index, row_grads)
    return [g for g in grads if g is not None]


@define_op
def _gate_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    mod_index: Tensor | None,
    eps: float,
    rms: bool,
    eager_rounding: bool,
    impl: str,
    add_one: bool,
    branch_eps: float | None,
) -> tuple[Tensor, Tensor]:
    options = mod_index, eps, rms, eager_rounding, add_one, branch_eps
    return module(impl, "norm_modulate").gate_residual_norm_modulate(x, y, gate, shift, scale, *options)


@define_op
def _gate_residual_norm_modulate_backward(
    grad_x_out: Tensor,
    grad_normed: Tensor,
    x_out: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    mod_index: Tensor | None,
    eps: float,
    rms: bool,
    row_grads: bool,
    impl: str,
) -> list[Tensor]:
    grads = module(impl, "norm_modulate_backward").gate_residual_norm_modulate_backward(
        grad_x_out, grad_normed, x_out, y, gate, scale, mod_index, eps, rms, row_grads
    )
    return [g for g in grads if g is not None]


@torch.library.register_fake("uniref_fast::norm_modulate")
def _(x, shift, scale, mod_index, eps, rms, eager_rounding, impl, add_one):
    return x.new_empty(x.shape)


@torch.library.register_fake("uniref_fast::gate_residual")
def _(x, y, gate, mod_index, eager_rounding, impl, branch_eps):
    return x.new_empty(x.shape)


@torch.library.register_fake("uniref_fast::gate_residual_norm_modulate")
def _(x, y, gate, shift, scale, mod_index, eps, rms, eager_rounding, impl, add_one, branch_eps):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.register_fake("uniref_fast::norm_modulate_backward")
def _(grad, x, scale, mod_index, eps, rms, row_grads, impl):
    return [x.new_empty(x.shape), *(scale.new_empty(scale.shape) for _ in range(2 * row_grads))]


@torch.library.register_fake("uniref_fast::gate_residual_backward")
def _(grad, y, gate, mod_index, row_grads, impl):
    return [y.new_empty(y.shape), *(gate.new_empty(gate.shape) for _ in range(row_grads))]


@torch.library.register_fake("uniref_fast::gate_residual_norm_modulate_backward")
def _(grad_x_out, grad_normed, x_out, y, gate, scale, mod_index, eps, rms, row_grads, impl):
    return [
        x_out.new_empty(x_out.shape),
        y.new_empty(y.shape),
        *(gate.new_empty(gate.shape) for _ in range(3 * row_grads)),
    ]


# ---- autograd ----


def _save_norm_modulate(ctx, inputs, output) -> None:
    x, shift, scale, mod_index, ctx.eps, ctx.rms, _, ctx.impl, ctx.add_one = inputs
    ctx.shifted = shift is not None
    ctx.save_for_backward(x, scale, mod_index)


def _differentiate_norm_modulate(ctx, grad):
    x, scale, mod_index = ctx.saved_tensors
    row_grads = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    dx, dshift, dscale = _norm_gradients(ctx, upstream(grad), x, scale, mod_index, row_grads)
    return dx, dshift if ctx.shifted else None, dscale, *[None] * 6


def _norm_gradients(ctx, grad, x, scale, mod_index, row_grads):
    """Return the gradients of x, shift and scale of `norm_modulate`; None for tables without `row_grads`."""
    op, options = torch.ops.uniref_fast.norm_modulate_backward, (ctx.eps, ctx.rms)
    if ctx.add_one:
        dx, *tables = op(grad, x, scale, mod_index, *options, row_grads, ctx.impl)
        return dx, *(tables or (None, None))
    # The gradients of shift and scale do not depend on the scale. That of x is the one of the norm alone.
    tables = (
        op(grad, x, torch.zeros_like(scale), mod_index, *options, True, ctx.impl)[1:] if row_grads else (None, None)
    )
    (incoming,) = torch.ops.uniref_fast.gate_residual_backward(grad, grad, scale, mod_index, False, ctx.impl)
    return _norm_gradient(incoming, x, *options, ctx.impl), *tables


def _norm_gradient(grad, x, eps, rms, impl):
    """Return the gradient of a norm without modulation."""
    zero = x.new_zeros(1, x.shape[1])
    return torch.ops.uniref_fast.norm_modulate_backward(grad, x, zero, None, eps, rms, False, impl)[0]


def _branch(ctx, y):
    """Return the branch that `gate_residual` adds, which is not saved."""
    if ctx.branch_eps is None:
        return y
    zero = y.new_zeros(1, y.shape[1])
    op = torch.ops.uniref_fast.norm_modulate  # not the kernel itself: a compiler may trace the backward
    return op(y, None, zero, None, ctx.branch_eps, True, ctx.eager_rounding, ctx.impl, True)


def _branch_gradient(ctx, grad, y):
    """Return the gradient of y for that of the branch."""
    return grad if ctx.branch_eps is None else _norm_gradient(grad, y, ctx.branch_eps, True, ctx.impl)


def _save_gate_residual(ctx, inputs, output) -> None:
    _, y, gate, mod_index, ctx.eager_rounding, ctx.impl, ctx.branch_eps = inputs
    ctx.save_for_backward(y, gate, mod_index)


def _differentiate_gate_residual(ctx, grad):
    y, gate, mod_index = ctx.saved_tensors
    op, branch = torch.ops.uniref_fast.gate_residual_backward, _branch(ctx, y)
    dy, *dgate = op(upstream(grad), branch, gate, mod_index, ctx.needs_input_grad[2], ctx.impl)
    return grad, _branch_gradient(ctx, dy, y), dgate[0] if dgate else None, *[None] * 4


def _save_gate_residual_norm_modulate(ctx, inputs, output) -> None:
    _, y, gate, shift, scale, mod_index, ctx.eps, ctx.rms, ctx.eager_rounding, ctx.impl, *more = inputs
    ctx.add_one, ctx.branch_eps = more
    ctx.shifted = shift is not None
    ctx.save_for_backward(output[0], y, gate, scale, mod_index)


def _differentiate_gate_residual_norm_modulate(ctx, grad_x_out, grad_normed):
    x_out, y, gate, scale, mod_index = ctx.saved_tensors
    row_grads = any(ctx.needs_input_grad[2:5])
    branch, incoming = _branch(ctx, y), upstream(grad_x_out)
    if ctx.add_one:
        op, options = torch.ops.uniref_fast.gate_residual_norm_modulate_backward, (ctx.eps, ctx.rms, row_grads)
        tensors = x_out, branch, gate, scale, mod_index
        dx, dy, *tables = op(incoming, upstream(grad_normed), *tensors, *options, ctx.impl)
        dgate, dshift, dscale = tables or (None, None, None)
    else:
        dx, dshift, dscale = _norm_gradients(ctx, upstream(grad_normed), x_out, scale, mod_index, row_grads)
        dx = dx + incoming
        op = torch.ops.uniref_fast.gate_residual_backward
        dy, *found = op(dx, branch, gate, mod_index, row_grads, ctx.impl)
        dgate = found[0] if found else None
    return dx, _branch_gradient(ctx, dy, y), dgate, dshift if ctx.shifted else None, dscale, *[None] * 7


torch.library.register_autograd(
    "uniref_fast::norm_modulate", _differentiate_norm_modulate, setup_context=_save_norm_modulate
)
torch.library.register_autograd(
    "uniref_fast::gate_residual", _differentiate_gate_residual, setup_context=_save_gate_residual
)
torch.library.register_autograd(
    "uniref_fast::gate_residual_norm_modulate",
    _differentiate_gate_residual_norm_modulate,
    setup_context=_save_gate_residual_norm_modulate,
)
first_order_only("norm_modulate_backward", "gate_residual_backward", "gate_residual_norm_modulate_backward")
