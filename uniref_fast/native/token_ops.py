"""`norm_modulate`, `gate_residual`, both at once, and their gradients."""

from typing import Any

import torch
from torch import Tensor

from uniref_fast.native.library import DTYPES, check, int32, leading, pointers, raise_for, strides, use_level


def _modulation_rows(names: tuple[str, ...], tables: tuple[Tensor | None, ...], like: Tensor) -> int:
    """Return the number of rows of the tables (gate, shift, scale) that are given."""
    rows = 0
    for name, table in zip(names, tables, strict=True):
        if table is not None:
            rows = rows or table.shape[0]
            check(name, table, (rows, like.shape[1]), like.dtype)
    return rows


def _token_op(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    mod_index: Tensor | None,
    eps: float,
    rms: bool,
    eager_rounding: bool,
    level: str | None,
    add_one: bool = True,
    branch_eps: float | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return x_out (None without a gate) and normed (None without a scale)."""
    lib, level_id = use_level(level)
    dtype, shape = leading("x", x, "NC")
    if y is not None:
        check("y", y, shape, dtype)
    n_rows = _modulation_rows(("gate", "shift", "scale"), (gate, shift, scale), x)
    if mod_index is not None:
        mod_index = int32("mod_index", mod_index, shape[:1])
    x_out = None if gate is None else torch.empty(shape, dtype=dtype, device="cpu")
    normed = None if scale is None else torch.empty(shape, dtype=dtype, device="cpu")
    views: list[int | None] = []
    for t in (x, y, gate, shift, scale):
        views += (None, 0) if t is None else (t.data_ptr(), t.stride(0))
    run: Any = lib.uf_token_rows
    more: tuple[float, ...] = ()
    if not add_one or branch_eps is not None:
        run, more = lib.uf_token_rows_of, (-1.0 if branch_eps is None else branch_eps, float(add_one))
    status = run(
        level_id, torch.get_num_threads(), DTYPES[dtype], *views,
        None if mod_index is None else mod_index.data_ptr(), n_rows, *shape, eps, rms, eager_rounding,
        None if x_out is None else x_out.data_ptr(), None if normed is None else normed.data_ptr(), *more,
    )  # fmt: skip
    raise_for(status)
    return x_out, normed


def norm_modulate(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    mod_index: Tensor | None,
    eps: float,
    rms: bool = False,
    eager_rounding: bool = False,
    add_one: bool = True,
    *,
    level: str | None = None,
) -> Tensor:
    """Compute `norm(x) * (1 + scale[r]) + shift[r]`: x [N, C]; shift, scale [R, C]; r from mod_index int32 [N], or 0.

    The norm is LayerNorm, or with `rms` division by the root of the mean square; shift=None adds nothing; add_one=False
    multiplies by scale[r]. eager_rounding rounds norm, 1 + scale and product to x's dtype, as PyTorch does one
    operation at a time.
    """
    normed = _token_op(x, None, None, shift, scale, mod_index, eps, rms, eager_rounding, level, add_one)[1]
    assert normed is not None
    return normed


def gate_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    mod_index: Tensor | None,
    eps: float,
    rms: bool = False,
    eager_rounding: bool = False,
    add_one: bool = True,
    branch_eps: float | None = None,
    *,
    level: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `x_out = x + gate[r] * y`, rounded, and `norm_modulate(x_out)`: x, y [N, C]; others [R, C].

    A branch_eps divides y by the root of its mean square before, as in `gate_residual`.
    """
    x_out, normed = _token_op(x, y, gate, shift, scale, mod_index, eps, rms, eager_rounding, level, add_one, branch_eps)
    assert x_out is not None and normed is not None
    return x_out, normed


def gate_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    mod_index: Tensor | None,
    eager_rounding: bool = False,
    branch_eps: float | None = None,
    *,
    level: str | None = None,
) -> Tensor:
    """Compute `x + gate[r] * y`: x, y [N, C]; gate [R, C]. eager_rounding rounds the product.

    A branch_eps divides y by the root of its mean square before, with this number added to the mean square.
    """
    x_out = _token_op(x, y, gate, None, None, mod_index, 0.0, False, eager_rounding, level, branch_eps=branch_eps)[0]
    assert x_out is not None
    return x_out


def _token_op_backward(
    grad_x: Tensor | None,
    grad_normed: Tensor | None,
    x: Tensor | None,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    mod_index: Tensor | None,
    eps: float,
    rms: bool,
    row_grads: bool,
    level: str | None,
) -> tuple[Tensor | None, ...]:
    """Return dx, dy, dgate, dshift, dscale: dx, dshift and dscale need a scale, dy and dgate a gate."""
    lib, level_id = use_level(level)
    tensors = {"grad_x_out": grad_x, "grad_normed": grad_normed, "x": x, "y": y}
    present = [(name, t) for name, t in tensors.items() if t is not None]
    dtype, (tokens, channels) = leading(*present[0], "NC")
    for name, t in present:
        check(name, t, (tokens, channels), dtype)
    n_rows = _modulation_rows(("gate", "scale"), (gate, scale), present[0][1])
    if mod_index is not None:
        mod_index = int32("mod_index", mod_index, (tokens,))
    shapes = ((tokens, channels), (n_rows, channels))
    wanted = (scale is not None, gate is not None)
    dx, dy = (torch.empty(shapes[0], dtype=dtype, device="cpu") if part else None for part in wanted)
    dgate, dshift, dscale = (
        torch.empty(shapes[1], dtype=dtype, device="cpu") if row_grads and wanted[part] else None for part in (1, 0, 0)
    )
    inputs = (grad_x, grad_normed, x, y, gate, scale)
    outs = (dx, dy, dgate, dshift, dscale)
    status = lib.uf_token_rows_backward(
        level_id, torch.get_num_threads(), DTYPES[dtype], pointers(inputs), strides(inputs, 1),
        None if mod_index is None else mod_index.data_ptr(), n_rows, tokens, channels, eps, rms, pointers(outs),
    )  # fmt: skip
    raise_for(status)
    return outs


def norm_modulate_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    mod_index: Tensor | None,
    eps: float,
    rms: bool = False,
    row_grads: bool = True,
    *,
    level: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of `norm_modulate`: dx [N, C], dshift and dscale [R, C], all in x's dtype.

    The gradients of shift and scale are summed in float32, a row's over its own tokens in their order, and 0 for a row
    that no token has; row_grads=False leaves them out.
    """
    outs = _token_op_backward(None, grad, x, None, None, scale, mod_index, eps, rms, row_grads, level)
    assert outs[0] is not None
    return outs[0], outs[3], outs[4]


def gate_residual_backward(
    grad: Tensor,
    y: Tensor,
    gate: Tensor,
    mod_index: Tensor | None,
    row_grads: bool = True,
    *,
    level: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `gate_residual` for y [N, C] and gate [R, C] (as in `norm_modulate_backward`); x's is `grad`."""
    outs = _token_op_backward(grad, None, None, y, gate, None, mod_index, 0.0, False, row_grads, level)
    assert outs[1] is not None
    return outs[1], outs[2]


def gate_residual_norm_modulate_backward(
    grad_x_out: Tensor,
    grad_normed: Tensor,
    x_out: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    mod_index: Tensor | None,
    eps: float,
    rms: bool = False,
    row_grads: bool = True,
    *,
    level: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `gate_residual_norm_modulate`: dx, dy [N, C], dgate, dshift, dscale [R, C], as in its parts."""
    outs = _token_op_backward(grad_x_out, grad_normed, x_out, y, gate, scale, mod_index, eps, rms, row_grads, level)
    dx, dy, dgate, dshift, dscale = outs
    assert dx is not None and dy is not None
    return dx, dy, dgate, dshift, dscale
