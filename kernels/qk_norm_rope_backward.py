"""Gradients of `qk_norm_rope`: the scatter back to two streams, the inverse rotation and the norm, in one pass.

    (g0, g1) <- (g0 c + g1 s, -g0 s + g1 c)              of joint dq, dk, per pair
    dn = g * w,  dx = rstd * (dn - n * mean(dn * n))     per head over D, n = x * rstd
    dw = sum g * n                                       over the tokens and heads of the stream
    dv of the stream = joint dv

Bytes: joint dq, dk, dv and the streams' q, k read once, their six gradients written once. All arithmetic in float32.
A None weight means no norm; its q or k is not read.

One program takes q, k or v: all three together would fill its registers. Weight gradients without atomics, so
deterministic: a program goes through TOKENS tokens and keeps its sums in registers, and PyTorch adds the sums of all
programs. Without weight gradients a program takes one token, as in the forward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from uniref_fast.kernels.launch_metadata import moved_bytes
from uniref_fast.kernels.token_common import check_heads

TOKENS = 8  # a program's sums are then 1/300 of its traffic, at 24 heads and 16 bits


@triton.jit
def _rotate_back(b_g, b_cos, b_sin):
    """Rotate the heads of one token back, [BH, D] to [BH, D] in float32."""
    BH: tl.constexpr = b_g.shape[0]
    D: tl.constexpr = b_g.shape[1]
    b_g0, b_g1 = tl.split(tl.reshape(b_g.to(tl.float32), [BH, D // 2, 2]))  # [BH, D/2]
    b_x0 = b_g0 * b_cos[None, :] + b_g1 * b_sin[None, :]
    b_x1 = b_g1 * b_cos[None, :] - b_g0 * b_sin[None, :]
    return tl.reshape(tl.join(b_x0, b_x1), [BH, D])


@triton.jit
def _norm_back(b_g, b_x, p_w, eps):
    """Return the gradient of the heads b_x and their terms of the weight's gradient, both [BH, D] float32."""
    D: tl.constexpr = b_x.shape[1]
    b_x = b_x.to(tl.float32)
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)[:, None]  # [BH, 1]
    b_n = b_x * b_rstd
    b_dn = b_g * tl.load(p_w + tl.arange(0, D)).to(tl.float32)[None, :]
    b_mean = tl.sum(b_dn * b_n, 1) / D  # this order needs fewer registers than one product by rstd at the end
    return b_rstd * b_dn - b_n * (b_rstd * b_mean[:, None]), b_g * b_n


@triton.jit
def _tokens(
    i_program, num_tokens,
    p_x, s_xn, s_xh, p_w,  # [., H, D] of the stream and [D]; without p_w there is no norm
    p_g, s_gn, s_gh,  # [N, H, D], joint
    p_dx, p_sums,  # [., H, D] of the stream, contiguous; [programs, D] or None
    p_index, p_cos, p_sin, s_cos,
    eps,
    ROTATED: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Process q, k or v of the tokens of one program; i_program counts from the first program of the stream."""
    o_h = tl.arange(0, BH)[:, None]
    o_d = tl.arange(0, D)[None, :]
    o_half = tl.arange(0, D // 2)
    m_h = o_h < H
    b_dw = tl.zeros([BH, D], tl.float32)
    first = i_program * BT
    count = 1 if BT == 1 else tl.minimum(num_tokens - first, BT)  # 1: no loop
    for i in tl.range(0, count, num_stages=STAGES):
        i_n = (first + i).to(tl.int64)
        i_joint = tl.load(p_index + first + i).to(tl.int64)
        b_g = tl.load(p_g + i_joint * s_gn + o_h * s_gh + o_d, mask=m_h, other=0.0)  # [BH, D]
        if ROTATED:
            if p_w is not None:
                b_x = tl.load(p_x + i_n * s_xn + o_h * s_xh + o_d, mask=m_h, other=0.0)  # [BH, D]
            b_cos = tl.load(p_cos + i_joint * s_cos + o_half)  # [D/2]
            b_sin = tl.load(p_sin + i_joint * s_cos + o_half)  # [D/2]
            b_dx = _rotate_back(b_g, b_cos, b_sin)
            if p_w is not None:
                b_dx, b_dw_token = _norm_back(b_dx, b_x, p_w, eps)
                b_dw += b_dw_token
            b_g = b_dx.to(p_dx.dtype.element_ty)
        tl.store(p_dx + i_n * (H * D) + o_h * D + o_d, b_g, mask=m_h)
    if p_sums is not None and p_w is not None:
        tl.store(p_sums + i_program.to(tl.int64) * D + tl.arange(0, D), tl.sum(b_dw, 0))


@triton.jit
def _stream(
    part, i_program, num_tokens,
    p_q, s_qn, s_qh, p_wq,
    p_k, s_kn, s_kh, p_wk,
    p_dq, s_dqn, s_dqh, p_dk, s_dkn, s_dkh, p_dv, s_dvn, s_dvh,  # joint
    p_d_q, p_wq_sums, p_d_k, p_wk_sums, p_d_v,
    p_index, p_cos, p_sin, s_cos,
    eps,
    H: tl.constexpr, D: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    if part == 0:
        _tokens(
            i_program, num_tokens, p_q, s_qn, s_qh, p_wq, p_dq, s_dqn, s_dqh, p_d_q, p_wq_sums,
            p_index, p_cos, p_sin, s_cos, eps, True, H, D, BH, BT, STAGES,
        )  # fmt: skip
    elif part == 1:
        _tokens(
            i_program, num_tokens, p_k, s_kn, s_kh, p_wk, p_dk, s_dkn, s_dkh, p_d_k, p_wk_sums,
            p_index, p_cos, p_sin, s_cos, eps, True, H, D, BH, BT, STAGES,
        )  # fmt: skip
    else:
        _tokens(
            i_program, num_tokens, None, 0, 0, None, p_dv, s_dvn, s_dvh, p_d_v, None,
            p_index, p_cos, p_sin, s_cos, eps, False, H, D, BH, BT, STAGES,
        )  # fmt: skip


# The numbers of tokens are not specialised: another length of the prompt must not compile a new binary.
@triton.jit(do_not_specialize=["num_txt", "num_img"], launch_metadata=moved_bytes)
def qk_norm_rope_backward_kernel(
    num_txt, num_img,
    p_txt_q, s_tqn, s_tqh, p_txt_wq,  # [Nt, H, D], [D] or None
    p_txt_k, s_tkn, s_tkh, p_txt_wk,
    p_txt_index, p_d_txt_q, p_d_txt_k, p_d_txt_v,  # [Nt], [Nt, H, D] contiguous
    p_img_q, s_iqn, s_iqh, p_img_wq,  # [Ni, H, D], [D] or None
    p_img_k, s_ikn, s_ikh, p_img_wk,
    p_img_index, p_d_img_q, p_d_img_k, p_d_img_v,  # [Ni], [Ni, H, D] contiguous
    p_dq, s_dqn, s_dqh,  # [N, H, D]
    p_dk, s_dkn, s_dkh,
    p_dv, s_dvn, s_dvh,
    p_cos, p_sin, s_cos,  # [N, D/2]
    p_txt_wq_sums, p_txt_wk_sums, p_img_wq_sums, p_img_wk_sums,  # [programs of the stream, D] float32, or None
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    BH: tl.constexpr,
    BT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    # q, k and v of the same tokens are neighbours, so that the second reads cos and sin from L2.
    part = tl.program_id(0) % 3
    i_program = tl.program_id(0) // 3
    programs_txt = tl.cdiv(num_txt, BT)
    if i_program < programs_txt:
        _stream(
            part, i_program, num_txt, p_txt_q, s_tqn, s_tqh, p_txt_wq, p_txt_k, s_tkn, s_tkh, p_txt_wk,
            p_dq, s_dqn, s_dqh, p_dk, s_dkn, s_dkh, p_dv, s_dvn, s_dvh,
            p_d_txt_q, p_txt_wq_sums, p_d_txt_k, p_txt_wk_sums, p_d_txt_v,
            p_txt_index, p_cos, p_sin, s_cos, eps, H, D, BH, BT, STAGES,
        )  # fmt: skip
    else:
        _stream(
            part, i_program - programs_txt, num_img, p_img_q, s_iqn, s_iqh, p_img_wq, p_img_k, s_ikn, s_ikh, p_img_wk,
            p_dq, s_dqn, s_dqh, p_dk, s_dkn, s_dkh, p_dv, s_dvn, s_dvh,
            p_d_img_q, p_img_wq_sums, p_d_img_k, p_img_wk_sums, p_d_img_v,
            p_img_index, p_cos, p_sin, s_cos, eps, H, D, BH, BT, STAGES,
        )  # fmt: skip


def launch_parameters(values: int, weight_grads: bool, dtype: torch.dtype) -> tuple[int, int]:
    """Return warps and pipeline stages for tokens of so many values, chosen from the compiler's report, not timed.

    16 values of a tensor a thread, as in the forward. With the sums for a weight that leaves at most 128 registers, two
    programs on a multiprocessor, and the next tokens are on their way to shared memory while one is computed.
    """
    pipelined = weight_grads and values <= 8192  # 100 KiB of shared memory at most
    return min(max(values // 512, 1), 16), (3 if dtype.itemsize == 2 else 2) if pipelined else 1


def qk_norm_rope_backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    txt_q: torch.Tensor,
    txt_k: torch.Tensor,
    img_q: torch.Tensor,
    img_k: torch.Tensor,
    txt_wq: torch.Tensor | None,
    txt_wk: torch.Tensor | None,
    img_wq: torch.Tensor | None,
    img_wk: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    txt_index: torch.Tensor,
    img_index: torch.Tensor,
    eps: float,
    weight_grads: bool = True,
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of the streams and of the weights of the norms.

    Args:
        dq, dk, dv: Joint gradients [N, H, D] with any token and head strides and a contiguous last dimension.
        txt_q to eps: Arguments of `qk_norm_rope`.
        weight_grads: Compute the gradients of the weights; otherwise they are None.

    Returns:
        Gradients d_txt_q, d_txt_k, d_txt_v [Nt, H, D], d_img_q, d_img_k, d_img_v [Ni, H, D], contiguous, in the dtype
        of the streams, and d_txt_wq, d_txt_wk, d_img_wq, d_img_wk [D] in the dtype of the weight, None if it is None.
    """
    weights = (txt_wq, txt_wk, img_wq, img_wk)
    num_txt, total, heads, head_dim = check_heads(
        (txt_q, txt_k), (img_q, img_k), (dq, dk, dv), weights, (cos, sin), txt_index, img_index
    )
    counts = (num_txt, total - num_txt)

    def new(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=txt_q.device)

    streams = [new(count, heads, head_dim, dtype=txt_q.dtype) for count in counts for _ in range(3)]
    weight_grads = weight_grads and any(weight is not None for weight in weights)
    tokens = TOKENS if weight_grads else 1
    programs = [triton.cdiv(count, tokens) for count in counts]
    sums = [
        new(programs[i // 2], head_dim, dtype=torch.float32) if weight_grads and weight is not None else None
        for i, weight in enumerate(weights)
    ]
    if total and heads:
        block = triton.next_power_of_2(heads)
        num_warps, num_stages = launch_parameters(block * head_dim, weight_grads, dq.dtype)
        with torch.cuda.device_of(dq):
            qk_norm_rope_backward_kernel[(3 * sum(programs),)](
                *counts,
                txt_q, txt_q.stride(0), txt_q.stride(1), txt_wq,
                txt_k, txt_k.stride(0), txt_k.stride(1), txt_wk,
                txt_index, *streams[:3],
                img_q, img_q.stride(0), img_q.stride(1), img_wq,
                img_k, img_k.stride(0), img_k.stride(1), img_wk,
                img_index, *streams[3:],
                dq, dq.stride(0), dq.stride(1),
                dk, dk.stride(0), dk.stride(1),
                dv, dv.stride(0), dv.stride(1),
                cos, sin, cos.stride(0),
                *sums,
                eps,
                H=heads, D=head_dim, BH=block, BT=tokens, STAGES=num_stages,
                num_warps=num_warps,
            )  # fmt: skip
    dw = [
        None if part is None or weight is None else part.sum(0).to(weight.dtype)
        for part, weight in zip(sums, weights, strict=True)
    ]
    return *streams, *dw
