"""RMSNorm of q and k per head, rotary embedding, and the gather of both streams into one joint q, k, v: one pass.

    x' = x * rsqrt(mean(x^2) + eps) * w                  per head over D, w [D] of the stream
    (y0, y1) = (x0 c - x1 s, x0 s + x1 c)                interleaved pairs of x', c and s [N, D/2] by joint row
    q, k [joint row] = y;  v [joint row] = v             all arithmetic in float32, one rounding at the end

Bytes: q, k, v of both streams read once, joint q, k, v written once, cos and sin once: no concatenation and no complex
numbers. Use it between the QKV projections of a double-stream block and its joint attention. The gradients are in
`qk_norm_rope_backward.py`.

One program takes all heads of one token, so that its cos and sin are loaded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from uniref_fast.kernels.launch_metadata import moved_bytes
from uniref_fast.kernels.token_common import check_heads, stored

__all__ = ["qk_norm_rope"]


@triton.jit
def _norm_rope(b_x, p_w, b_cos, b_sin, eps, EAGER: tl.constexpr):
    """Normalise and rotate the heads of one token, [BH, D] to [BH, D] in float32."""
    BH: tl.constexpr = b_x.shape[0]
    D: tl.constexpr = b_x.shape[1]
    dtype: tl.constexpr = b_x.dtype
    b_x = b_x.to(tl.float32)
    if p_w is not None:
        b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)  # [BH]
        b_w = stored(tl.load(p_w + tl.arange(0, D)).to(tl.float32), dtype, EAGER)
        b_x = stored(stored(b_x * b_rstd[:, None], dtype, EAGER) * b_w[None, :], dtype, EAGER)
    # A thread holds whole pairs, so splitting and joining them moves nothing between threads.
    b_x0, b_x1 = tl.split(tl.reshape(b_x, [BH, D // 2, 2]))  # [BH, D/2]
    b_y0 = b_x0 * b_cos[None, :] - b_x1 * b_sin[None, :]
    b_y1 = b_x0 * b_sin[None, :] + b_x1 * b_cos[None, :]
    return tl.reshape(tl.join(b_y0, b_y1), [BH, D])


@triton.jit
def _token(
    i_n,
    p_q, s_qn, s_qh, p_wq,  # [H, D] of token 0
    p_k, s_kn, s_kh, p_wk,
    p_v, s_vn, s_vh,
    p_index, p_cos, p_sin, s_cos, p_q_out, p_k_out, p_v_out,
    eps,
    EAGER: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Process token i_n of one stream."""
    i_n = i_n.to(tl.int64)
    i_joint = tl.load(p_index + i_n).to(tl.int64)
    o_h = tl.arange(0, BH)[:, None]
    o_d = tl.arange(0, D)[None, :]
    o_half = tl.arange(0, D // 2)
    m_h = o_h < H
    # All loads before the first store: the compiler may not move a load over a store that could alias it.
    b_q = tl.load(p_q + i_n * s_qn + o_h * s_qh + o_d, mask=m_h, other=0.0)  # [BH, D]
    b_k = tl.load(p_k + i_n * s_kn + o_h * s_kh + o_d, mask=m_h, other=0.0)  # [BH, D]
    b_v = tl.load(p_v + i_n * s_vn + o_h * s_vh + o_d, mask=m_h, other=0.0)  # [BH, D]
    b_cos = tl.load(p_cos + i_joint * s_cos + o_half)  # [D/2]
    b_sin = tl.load(p_sin + i_joint * s_cos + o_half)  # [D/2]
    b_q_out = _norm_rope(b_q, p_wq, b_cos, b_sin, eps, EAGER)  # [BH, D]
    b_k_out = _norm_rope(b_k, p_wk, b_cos, b_sin, eps, EAGER)  # [BH, D]
    o_out = i_joint * (H * D) + o_h * D + o_d
    tl.store(p_q_out + o_out, b_q_out.to(p_q_out.dtype.element_ty), mask=m_h)
    tl.store(p_k_out + o_out, b_k_out.to(p_k_out.dtype.element_ty), mask=m_h)
    tl.store(p_v_out + o_out, b_v, mask=m_h)


# num_txt is not specialised: another length of the prompt must not compile a new binary.
@triton.jit(do_not_specialize=["num_txt"], launch_metadata=moved_bytes)
def qk_norm_rope_kernel(
    num_txt,
    p_txt_q, s_tqn, s_tqh, p_txt_wq,  # [Nt, H, D], [D] or None
    p_txt_k, s_tkn, s_tkh, p_txt_wk,
    p_txt_v, s_tvn, s_tvh,
    p_txt_index,  # [Nt]
    p_img_q, s_iqn, s_iqh, p_img_wq,  # [Ni, H, D], [D] or None
    p_img_k, s_ikn, s_ikh, p_img_wk,
    p_img_v, s_ivn, s_ivh,
    p_img_index,  # [Ni]
    p_cos, p_sin, s_cos,  # [N, D/2]
    p_q, p_k, p_v,  # [N, H, D] contiguous
    eps,
    EAGER: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BH: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0)
    if i_n < num_txt:
        _token(
            i_n, p_txt_q, s_tqn, s_tqh, p_txt_wq, p_txt_k, s_tkn, s_tkh, p_txt_wk, p_txt_v, s_tvn, s_tvh,
            p_txt_index, p_cos, p_sin, s_cos, p_q, p_k, p_v, eps, EAGER, H, D, BH,
        )  # fmt: skip
    else:
        _token(
            i_n - num_txt, p_img_q, s_iqn, s_iqh, p_img_wq, p_img_k, s_ikn, s_ikh, p_img_wk, p_img_v, s_ivn, s_ivh,
            p_img_index, p_cos, p_sin, s_cos, p_q, p_k, p_v, eps, EAGER, H, D, BH,
        )  # fmt: skip


def qk_norm_rope(
    txt_q: torch.Tensor,
    txt_k: torch.Tensor,
    txt_v: torch.Tensor,
    img_q: torch.Tensor,
    img_k: torch.Tensor,
    img_v: torch.Tensor,
    txt_wq: torch.Tensor | None,
    txt_wk: torch.Tensor | None,
    img_wq: torch.Tensor | None,
    img_wk: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    txt_index: torch.Tensor,
    img_index: torch.Tensor,
    eps: float,
    eager_rounding: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return joint q, k, v [N, H, D], contiguous, of a text and an image stream [Nt, H, D] and [Ni, H, D], N = Nt + Ni.

    Args:
        txt_q, txt_k, txt_v, img_q, img_k, img_v: Streams with any token and head strides and a contiguous last
            dimension; D is a power of two from 16; Nt or Ni may be 0.
        txt_wq, txt_wk, img_wq, img_wk: Weights of the norms [D], or None for no norm.
        cos, sin: Tables by joint row, float32 [N, D/2].
        txt_index, img_index: Joint row of each token, int32 [Nt] and [Ni]; together a permutation of the N rows.
        eager_rounding: Round to the streams' dtype where eager PyTorch does: after the norm and after the weight.
    """
    num_txt, total, heads, head_dim = check_heads(
        (txt_q, txt_k, txt_v), (img_q, img_k, img_v), (), (txt_wq, txt_wk, img_wq, img_wk), (cos, sin),
        txt_index, img_index,
    )  # fmt: skip
    shape = (total, heads, head_dim)
    q, k, v = (torch.empty(shape, dtype=txt_q.dtype, device=txt_q.device) for _ in range(3))
    if q.numel() == 0:
        return q, k, v
    block = triton.next_power_of_2(heads)
    with torch.cuda.device_of(q):
        qk_norm_rope_kernel[(total,)](
            num_txt,
            txt_q, txt_q.stride(0), txt_q.stride(1), txt_wq,
            txt_k, txt_k.stride(0), txt_k.stride(1), txt_wk,
            txt_v, txt_v.stride(0), txt_v.stride(1),
            txt_index,
            img_q, img_q.stride(0), img_q.stride(1), img_wq,
            img_k, img_k.stride(0), img_k.stride(1), img_wk,
            img_v, img_v.stride(0), img_v.stride(1),
            img_index,
            cos, sin, cos.stride(0),
            q, k, v,
            eps,
            EAGER=eager_rounding, H=heads, D=head_dim, BH=block,
            # 16 values of each tensor a thread: in a 16-bit dtype two 128-bit loads each.
            num_warps=min(max(block * head_dim // 512, 1), 16),
            enable_fp_fusion=not eager_rounding,
        )  # fmt: skip
    return q, k, v
