"""Registration that the ops of all attention libraries share."""

from __future__ import annotations

import torch

from uniref_fast.ops._dispatch import first_order_only, upstream

__all__ = ["register_library_attention"]


def register_library_attention(name: str) -> None:
    """Register the shapes of a library's op and of its backward, and the one as the gradient of the other.

    Args:
        name: Name of an op `(q, k, v, tables, numbers, scale) -> (out [N, H, D], lse [H, N])`. Its backward has the
            name `<name>_backward` and the arguments `(grad, q, k, v, out, lse, tables, numbers, scale)`.
    """
    op = f"uniref_fast::{name}"

    @torch.library.register_fake(op)
    def _(q, k, v, tables, numbers, scale):
        return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)

    @torch.library.register_fake(f"{op}_backward")
    def _(grad, q, k, v, out, lse, tables, numbers, scale):
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def save(ctx, inputs, output) -> None:
        q, k, v, tables, ctx.numbers, ctx.scale = inputs
        ctx.save_for_backward(q, k, v, *output, *tables)
        ctx.mark_non_differentiable(output[1])

    def differentiate(ctx, grad, _):
        q, k, v, out, lse, *tables = ctx.saved_tensors
        backward = getattr(torch.ops.uniref_fast, f"{name}_backward")
        grads = backward(upstream(grad).contiguous(), q, k, v, out, lse, tables, ctx.numbers, ctx.scale)
        return *grads, [None] * len(tables), None, None

    torch.library.register_autograd(op, differentiate, setup_context=save)
    first_order_only(f"{name}_backward")
