"""RMSNorm and rotary embedding of q and k of both streams, written directly into the joint packed q, k, v.

    q = rope(rms_norm(q_stream) * w_q),   k = rope(rms_norm(k_stream) * w_k),   v = v_stream

with real-valued rotary over interleaved pairs: `(a, b) -> (a cos - b sin, a sin + b cos)`. One read and one write of
q, k, v; no concatenation, no complex numbers. The backward reads the joint gradients and the streams' q and k once and
writes the streams' gradients once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from uniref_fast.layout import SelfLayout
from uniref_fast.ops._dispatch import Rounding, choose, define_op, first_order_only, module, observed, one_of, upstream

__all__ = ["qk_norm_rope", "qk_norm_rope_reference"]

QKV = tuple[Tensor, Tensor, Tensor]
Weights = tuple[Tensor | None, Tensor | None]
_NAMES = ("text q", "text k", "text v", "image q", "image k", "image v")


def qk_norm_rope(
    text: QKV | None,
    image: QKV,
    text_weights: Weights,
    image_weights: Weights,
    layout: SelfLayout,
    rotary: tuple[Tensor, Tensor],
    eps: float = 1e-6,
    *,
    rounding: Rounding = "once",
    impl: str | None = None,
) -> QKV:
    """Normalise and rotate q and k of both streams and write them, with v, into the joint sequence.

    Args:
        text: The tensors q, k, v of the text stream, `[N_text, H, D]` each, one dtype. Tokens and heads may be strided.
            None for a block with one stream of all tokens in joint order, which `image` and `image_weights` then stand
            for.
        image: The tensors q, k, v of the image stream, `[N_image, H, D]` each.
        text_weights, image_weights: RMSNorm weights `[D]` of q and k; None leaves that one unnormalised.
        layout: Layout that gives the joint row of each token of a stream.
        rotary: Tables cos and sin in joint order, float32 `[N, D / 2]` (`SelfLayout.rotary`).
        eps: Number added to the mean square.
        rounding: "once" rounds the result, "eager" also rounds after the norm and after its weight, as diffusers does.
        impl: "reference", "native", "triton"; None picks by device.

    Returns:
        Joint q, k, v, contiguous `[N, H, D]`, N = N_text + N_image. Differentiable in the streams and the weights.
    """
    first = image[0]
    head, dtype, device = first.shape[1:], first.dtype, first.device
    if text is None:
        q, k, v = image
        text, text_weights = (q[:0], k[:0], v[:0]), (None, None)
        shapes = (0, *head), (layout.joint_length, *head)
        joint = layout.joint_index("joint", device)
        index = joint[:0], joint
    else:
        shapes = (layout.text_length, *head), (layout.image_length, *head)
        index = layout.joint_index("text", device), layout.joint_index("image", device)
    tensors = *text, *image
    for i, tensor in enumerate(tensors):
        if tensor.shape != shapes[i // 3]:
            raise ValueError(f"{_NAMES[i]} has shape {[*tensor.shape]}, the layout expects {[*shapes[i // 3]]}")
        if tensor.dtype != dtype or tensor.device != device:
            raise ValueError(f"{_NAMES[i]} is {tensor.dtype} on {tensor.device}, image q is {dtype} on {device}")
        if not tensor.is_contiguous() and tensor.numel() and tensor.stride(-1) != 1:
            raise ValueError(f"{_NAMES[i]} must be contiguous in its last dimension, its strides are {tensor.stride()}")
    expected = layout.joint_length, head[1] // 2
    for table in rotary:
        if table.shape != expected or table.dtype != torch.float32:
            raise ValueError(
                f"rotary tables must be float32 {[*expected]}, got {table.dtype} {[*table.shape]}: axes_dims must sum "
                f"to the head dimension {head[1]}"
            )
    for weight in (*text_weights, *image_weights):
        if weight is not None and (weight.shape != head[1:] or weight.device != device):
            raise ValueError(
                f"norm weights must be [{head[1]}] on {device}, got {list(weight.shape)} on {weight.device}"
            )
    eager = one_of("rounding", rounding, "once", "eager")
    impl = choose(impl, first, head[1])
    arguments = (*tensors, *text_weights, *image_weights, *rotary, *index, eps)
    if impl == "reference":
        return qk_norm_rope_reference(*arguments)
    run = torch.ops.uniref_fast.qk_norm_rope if observed(*tensors, *text_weights, *image_weights) else _qk_norm_rope
    return run(*arguments, eager, impl)


def qk_norm_rope_reference(
    txt_q: Tensor,
    txt_k: Tensor,
    txt_v: Tensor,
    img_q: Tensor,
    img_k: Tensor,
    img_v: Tensor,
    txt_wq: Tensor | None,
    txt_wk: Tensor | None,
    img_wq: Tensor | None,
    img_wk: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    txt_index: Tensor,
    img_index: Tensor,
    eps: float,
) -> QKV:
    """Compute the specification in plain PyTorch; float64 inputs are computed in float64."""
    joint = torch.cat([txt_index, img_index]).long()

    def pack(txt: Tensor, img: Tensor) -> Tensor:
        both = torch.cat([txt, img])
        return torch.empty_like(both).index_copy_(0, joint, both)

    q = pack(_rms_norm(txt_q, txt_wq, eps), _rms_norm(img_q, img_wq, eps))
    k = pack(_rms_norm(txt_k, txt_wk, eps), _rms_norm(img_k, img_wk, eps))
    return _rotate(q, cos, sin), _rotate(k, cos, sin), pack(txt_v, img_v)


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    wide = x if x.dtype == torch.float64 else x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight.to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    a, b = wide.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None].to(wide.dtype), sin[:, None].to(wide.dtype)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


@define_op
def _qk_norm_rope(
    txt_q: Tensor,
    txt_k: Tensor,
    txt_v: Tensor,
    img_q: Tensor,
    img_k: Tensor,
    img_v: Tensor,
    txt_wq: Tensor | None,
    txt_wk: Tensor | None,
    img_wq: Tensor | None,
    img_wk: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    txt_index: Tensor,
    img_index: Tensor,
    eps: float,
    eager_rounding: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return module(impl, "qk_norm_rope").qk_norm_rope(
        txt_q, txt_k, txt_v, img_q, img_k, img_v, txt_wq, txt_wk, img_wq, img_wk, cos, sin, txt_index, img_index, eps,
        eager_rounding,
    )  # fmt: skip


@torch.library.register_fake("uniref_fast::qk_norm_rope")
def _(
    txt_q, txt_k, txt_v, img_q, img_k, img_v, txt_wq, txt_wk, img_wq, img_wk, cos, sin, txt_index, img_index, eps,
    eager_rounding, impl,
):  # fmt: skip
    shape = (txt_q.shape[0] + img_q.shape[0], *img_q.shape[1:])
    return img_q.new_empty(shape), img_q.new_empty(shape), img_q.new_empty(shape)


@define_op
def _qk_norm_rope_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    txt_q: Tensor,
    txt_k: Tensor,
    img_q: Tensor,
    img_k: Tensor,
    txt_wq: Tensor | None,
    txt_wk: Tensor | None,
    img_wq: Tensor | None,
    img_wk: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    txt_index: Tensor,
    img_index: Tensor,
    eps: float,
    weight_grads: bool,
    impl: str,
) -> list[Tensor]:
    """Return six stream gradients, then with weight_grads the gradients of the weights that are not None."""
    grads = module(impl, "qk_norm_rope_backward").qk_norm_rope_backward(
        dq, dk, dv, txt_q, txt_k, img_q, img_k, txt_wq, txt_wk, img_wq, img_wk, cos, sin, txt_index, img_index, eps,
        weight_grads,
    )  # fmt: skip
    return [g for g in grads if g is not None]


@torch.library.register_fake("uniref_fast::qk_norm_rope_backward")
def _(
    dq, dk, dv, txt_q, txt_k, img_q, img_k, txt_wq, txt_wk, img_wq, img_wk, cos, sin, txt_index, img_index, eps,
    weight_grads, impl,
):  # fmt: skip
    streams = (txt_q, txt_q, txt_q, img_q, img_q, img_q)
    weights = [w for w in (txt_wq, txt_wk, img_wq, img_wk) if w is not None and weight_grads]
    return [x.new_empty(x.shape) for x in (*streams, *weights)]


def _save(ctx, inputs, output) -> None:
    txt_q, txt_k, _, img_q, img_k, _, *rest, ctx.eps, _, ctx.impl = inputs
    ctx.save_for_backward(txt_q, txt_k, img_q, img_k, *rest)


def _differentiate(ctx, dq, dk, dv):
    saved = ctx.saved_tensors
    weights = saved[4:8]
    weight_grads = any(ctx.needs_input_grad[6:10])
    grads = [upstream(g) for g in (dq, dk, dv)]
    op = torch.ops.uniref_fast.qk_norm_rope_backward
    (*streams,) = op(*grads, *saved, ctx.eps, weight_grads, ctx.impl)
    of_weights = iter(streams[6:])
    return (
        *streams[:6],
        *(next(of_weights) if weight_grads and w is not None else None for w in weights),
        *[None] * 7,
    )


torch.library.register_autograd("uniref_fast::qk_norm_rope", _differentiate, setup_context=_save)
first_order_only("qk_norm_rope_backward")
