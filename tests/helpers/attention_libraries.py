"""Stand-ins for FlashAttention 2, 3, 4 and cuDNN's flex attention: their signatures, computed with PyTorch.

The signatures are those of flash-attn 2.8.3, FlashAttention 3 since `return_attn_probs`, flash-attn-4 4.0.0b36 and
nvidia-cudnn-frontend 1.32.0. Each stand-in asserts what the library requires of its arguments. `install` puts one in
the place of the library and returns the number of its calls.
"""

import sys
import types

import torch

from uniref_fast.ops import flash_attention, flex_attention

NAMES = ("flash 2", "flash 3", "flash 4", "cudnn_flex")


def install(monkeypatch, names, capability=(9, 0)):
    """Make stand-ins the only installed libraries, and every device look like that compute capability.

    Args:
        monkeypatch: The fixture, which restores everything but what the adapters remember (see `forget`).
        names: One of `NAMES`, or several, separated by ", ".
        capability: Compute capability.
    """
    counts = {"forward": 0, "backward": 0}
    modules = {"flash_attn": None, "flash_attn_interface": None, "cudnn": None}
    for missing in ("flash_attn.flash_attn_interface", "flash_attn.cute.interface", "cudnn.flex_attention"):
        modules[missing] = None
    for name in names.split(", "):
        modules |= _BUILD[name](counts)
    for module, content in modules.items():
        monkeypatch.setitem(sys.modules, module, content)
    forget()
    for adapter in (flash_attention, flex_attention):
        monkeypatch.setattr(adapter, "_capability", lambda device: capability)
        monkeypatch.setattr(adapter, "DTYPES", (torch.float16, torch.bfloat16, torch.float32))
    return counts


def forget():
    """Drop what the adapters remember about a stand-in; call it when the test ends."""
    flash_attention.load.cache_clear()
    flex_attention.load.cache_clear()
    flex_attention._masks.clear()


def _module(name, **content):
    module = types.ModuleType(name)
    vars(module).update(content)
    return module


# ---- the mathematics, one sequence at a time ----


def _attend(q, k, v, visible, scale):
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("mhd,nhd->hmn", q.to(wide), k.to(wide)) * scale
    scores = scores.masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    p = (scores - lse[..., None]).exp().nan_to_num(0.0)
    return torch.einsum("hmn,nhd->mhd", p, v.to(wide)).to(q.dtype), lse.to(torch.float32)


def _differentiate(grad, q, k, v, out, lse, visible, scale):
    wide = torch.promote_types(q.dtype, torch.float32)
    dtype = q.dtype
    grad, q, k, v, out = (x.to(wide) for x in (grad, q, k, v, out))
    scores = (torch.einsum("mhd,nhd->hmn", q, k) * scale).masked_fill(~visible, -torch.inf)
    p = (scores - lse.to(wide)[..., None]).exp().masked_fill(~visible, 0.0)
    d = (grad * out).sum(-1).T
    ds = p * (torch.einsum("mhd,nhd->hmn", grad, v) - d[..., None]) * scale
    dq, dk, dv = torch.einsum("hmn,nhd->mhd", ds, k), torch.einsum("hmn,mhd->nhd", ds, q), None
    dv = torch.einsum("hmn,mhd->nhd", p, grad)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def _spans(cu_q, cu_k):
    return [(slice(*q), slice(*k)) for q, k in zip(*(cu.unfold(0, 2, 1).tolist() for cu in (cu_q, cu_k)), strict=True)]


def _visible(q, k, causal):
    """Everything, or, as in the libraries, a causal mask that is aligned with the last query and key."""
    assert type(causal) is bool
    everything = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool, device=q.device)
    return everything.tril(k.shape[0] - q.shape[0]) if causal else everything


# ---- FlashAttention ----


def _check(q, k, v, cu_q, cu_k, max_q, max_k, deterministic):
    assert q.ndim == k.ndim == v.ndim == 3 and k.shape == v.shape and q.shape[1:] == k.shape[1:]
    assert q.dtype == k.dtype == v.dtype and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    for cu, longest, rows in ((cu_q, max_q, len(q)), (cu_k, max_k, len(k))):
        assert cu.dtype == torch.int32 and cu.ndim == 1 and cu.is_contiguous() and cu.device == q.device
        lengths = cu.diff()
        assert cu[0] == 0 and cu[-1] == rows and len(lengths) >= 1
        assert (lengths > 0).all(), "a sequence without queries or keys"
        assert type(longest) is int and longest == lengths.max()
    assert cu_q.shape == cu_k.shape
    assert deterministic is True


def _flash_forward(q, k, v, cu_q, cu_k, scale, causal):
    out, lse = torch.full_like(q, torch.nan), torch.full((q.shape[1], q.shape[0]), torch.nan, device=q.device)
    for rows, keys in _spans(cu_q, cu_k):
        out[rows], lse[:, rows] = _attend(q[rows], k[keys], v[keys], _visible(q[rows], k[keys], causal), scale)
    return out, lse


def _flash_backward(grad, q, k, v, out, lse, cu_q, cu_k, scale, causal):
    assert grad.dtype == out.dtype == q.dtype and grad.shape == out.shape == q.shape
    assert grad.stride(-1) == out.stride(-1) == 1
    assert lse.dtype == torch.float32 and lse.shape == (q.shape[1], q.shape[0]) and lse.is_contiguous()
    grads = [torch.full_like(x, torch.nan, memory_format=torch.contiguous_format) for x in (q, k, v)]
    for rows, keys in _spans(cu_q, cu_k):
        of_rows = (x[rows] for x in (grad, q))
        shares = _differentiate(
            *of_rows, k[keys], v[keys], out[rows], lse[:, rows], _visible(q[rows], k[keys], causal), scale
        )
        for total, share, at in zip(grads, shares, (rows, keys, keys), strict=True):
            total[at] = share
    return grads


def _into(given, computed):
    for tensor, value in zip(given, computed, strict=True):
        assert tensor.is_contiguous() and tensor.shape == value.shape and tensor.dtype == value.dtype
        tensor.copy_(value)


def _flash_2(counts):
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic)
        assert dropout_p == 0 and softmax_scale is not None and not torch.is_grad_enabled()
        counts["forward"] += 1
        out, lse = _flash_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)
        return (out, lse, torch.empty(0)) if return_attn_probs else out

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic)
        assert dropout_p == 0 and window_size_left == window_size_right == -1 and softcap == 0
        counts["backward"] += 1
        grads = _flash_backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)
        _into((dq, dk, dv), grads)
        return torch.empty(0)

    functions = {f.__name__: f for f in (flash_attn_varlen_func, _flash_attn_varlen_backward)}
    interface = _module("flash_attn.flash_attn_interface", **functions)
    return {"flash_attn": _module("flash_attn"), "flash_attn.flash_attn_interface": interface}


def _flash_3(counts):
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic)
        assert seqused_q is seqused_k is None and softmax_scale is not None
        counts["forward"] += 1
        out, lse = _flash_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)
        return (out, lse) if return_attn_probs else out

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic)
        assert sequed_q is sequed_k is None and q.shape[-1] <= 192
        counts["backward"] += 1
        grads = _flash_backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, is_causal)
        _into((dq, dk, dv), grads)
        return torch.empty(0)

    functions = {f.__name__: f for f in (flash_attn_varlen_func, _flash_attn_backward)}
    return {"flash_attn_interface": _module("flash_attn_interface", **functions)}


def _flash_4(counts):
    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
        softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1,
        pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None,
        block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False, scheduler_metadata=None,
        seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False,
        gather_bwd_token_chunk=None,
    ):  # fmt: skip
        _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic)
        assert softmax_scale is not None and q.shape[-1] <= 128
        counts["forward"] += 1
        out, lse = _flash_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)
        return out, (lse if return_lse else None)

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2,
        num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2,
        AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None, score_mod=None,
        score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None, dlse=None,
        learnable_sink=None,
    ):  # fmt: skip
        _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic)
        assert dlse is None
        counts["backward"] += 1
        return tuple(_flash_backward(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal))

    functions = {f.__name__: f for f in (flash_attn_varlen_func, _flash_attn_bwd)}
    modules = {name: _module(name) for name in ("flash_attn", "flash_attn.cute")}
    return modules | {"flash_attn.cute.interface": _module("flash_attn.cute.interface", **functions)}


# ---- cuDNN's flex attention ----


class MaskPlan:
    """Geometry and visible keys of each query, as `create_mask_plan` makes them."""

    def __init__(self, visible, spans, q, k, has_backward):
        self.visible, self.spans, self.has_backward = visible, spans, has_backward
        self.geometry = (q.shape, k.shape, q.dtype, q.device)

    def validate(self, q, k, v):
        assert self.geometry == (q.shape, k.shape, q.dtype, q.device) and k.shape == v.shape
        assert all(x.stride(-1) == 1 for x in (q, k, v))


def _cudnn(counts):
    counts |= {"plans": 0, "compiled": 0}

    def create_mask_plan(
        mask_func, q, k, v, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        pack_gqa=None, build_backward=None, _fwd_variant=None,
    ):  # fmt: skip
        _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, True)
        assert mask_func.dtype == torch.int32 and mask_func.is_contiguous() and mask_func.device == q.device
        heads, points, rows = mask_func.shape
        assert heads == 1 and points % 2 == 1 and rows == len(q) and type(build_backward) is bool
        counts["plans"] += 1
        visible = torch.zeros(len(q), len(k), dtype=torch.bool, device=q.device)
        spans = _spans(cu_seqlens_q, cu_seqlens_k)
        for queries, keys in spans:
            for row in range(queries.start, queries.stop):
                ends = [0, *mask_func[0, :, row].tolist()]
                assert ends == sorted(ends) and ends[-1] <= keys.stop - keys.start, "end points of a query"
                for a, b in zip(ends[::2], ends[1::2], strict=True):
                    visible[row, keys.start + a : keys.start + b] = True
        return MaskPlan(visible, spans, q, k, build_backward)

    def flex_attn_func(
        q, k, v, *, mask_plan, softmax_scale=None, deterministic=False, return_lse=False, return_max_logit=False
    ):
        mask_plan.validate(q, k, v)
        assert type(softmax_scale) is float and deterministic is True and not torch.is_grad_enabled()
        counts["forward"] += 1
        out, lse = torch.empty_like(q), torch.empty(q.shape[1], q.shape[0], device=q.device)
        for rows, keys in mask_plan.spans:
            out[rows], lse[:, rows] = _attend(q[rows], k[keys], v[keys], mask_plan.visible[rows, keys], softmax_scale)
        out[~mask_plan.visible.any(1)] = torch.nan  # nothing is documented about queries without keys
        return (out, lse) if return_lse else out

    class FlexAttentionBwd:
        def __init__(
            self, sample_q, sample_k, sample_v, sample_o, sample_do, sample_lse, sample_dq, sample_dk, sample_dv,
            sample_mask_plan, sample_dlse=None, *, deterministic=False,
        ):  # fmt: skip
            assert sample_mask_plan.has_backward and deterministic is True
            tensors = sample_q, sample_k, sample_v, sample_o, sample_do, sample_lse, sample_dq, sample_dk, sample_dv
            self.layout = self._layout(tensors)
            self.workspace_size, self.state = 0, "made"

        @staticmethod
        def _layout(tensors):
            return [(x.shape, x.stride(), x.dtype, x.device) for x in tensors]

        def check_support(self):
            self.state = "checked"
            return True

        def compile(self):
            assert self.state == "checked"
            counts["compiled"] += 1
            self.state, self.workspace_size = "compiled", 384

        def execute(
            self, q_tensor, k_tensor, v_tensor, o_tensor, do_tensor, lse_tensor, dq_tensor, dk_tensor, dv_tensor,
            mask_plan, dlse_tensor=None, *, workspace, softmax_scale=None, current_stream=None,
        ):  # fmt: skip
            given = q_tensor, k_tensor, v_tensor, o_tensor, do_tensor, lse_tensor, dq_tensor, dk_tensor, dv_tensor
            assert self.state == "compiled" and self._layout(given) == self.layout
            assert workspace.dtype == torch.uint8 and workspace.numel() >= self.workspace_size
            mask_plan.validate(q_tensor, k_tensor, v_tensor)
            counts["backward"] += 1
            for rows, keys in mask_plan.spans:
                shares = _differentiate(
                    *(x[rows] for x in (do_tensor, q_tensor)), k_tensor[keys], v_tensor[keys], o_tensor[rows],
                    lse_tensor[:, rows], mask_plan.visible[rows, keys], softmax_scale,
                )  # fmt: skip
                for total, share, at in zip((dq_tensor, dk_tensor, dv_tensor), shares, (rows, keys, keys), strict=True):
                    total[at] = share

    names = {x.__name__: x for x in (create_mask_plan, flex_attn_func, FlexAttentionBwd)}
    return {"cudnn": _module("cudnn"), "cudnn.flex_attention": _module("cudnn.flex_attention", **names)}


_BUILD = {"flash 2": _flash_2, "flash 3": _flash_3, "flash 4": _flash_4, "cudnn_flex": _cudnn}
