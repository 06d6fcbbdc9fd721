"""Plain PyTorch formulas that the tests of ops, kernels and native code compare with.

A test computes a formula in float64 as the oracle, and in the dtype under test as the baseline of the error budget
(`uniref_fast.testing.assert_within_budget`). None of them calls code of the package.
"""

import itertools
import math

import torch
import torch.nn.functional as F

from uniref_fast.testing import assert_within_budget


def visible_keys(plan):
    """Yield ((first query, end), key rows, hidden) for each range of an `AttentionPlan` or of its three tables.

    `hidden`, bool [queries, keys], is True where a query does not see a key of a causal interval; None without one.
    """
    if isinstance(plan, tuple):
        ranges, pointers, flat = (table.tolist() for table in plan)
        spans = [(a, b, False) if a >= 0 else (-1 - a, b, True) for a, b in flat]
        seen = [spans[first:last] for first, last in itertools.pairwise(pointers)]
    else:
        causal = plan.causal or [-1] * len(plan.ranges)
        ranges = plan.ranges
        seen = [[(*s, n == at) for n, s in enumerate(keys)] for keys, at in zip(plan.intervals, causal, strict=True)]
    for (start, end), intervals in zip(ranges, seen, strict=True):
        rows = [row for a, b, _ in intervals for row in range(a, b)]
        # The query that is aligned with a key, and that is the first to see it.
        first = [row - a if causal else 0 for a, b, causal in intervals for row in range(a, b)]
        hidden = torch.arange(end - start)[:, None] < torch.tensor(first)
        if rows and start < end:
            yield (start, end), rows, hidden if hidden.any() else None


def attention(q, k, v, plan, scale=None):
    """Return out [Nq, H, D] and lse [H, Nq] of a dense softmax for each range, computed in the dtype of q."""
    scale = q.shape[2] ** -0.5 if scale is None else scale
    out = torch.zeros_like(q)
    lse = torch.full((q.shape[1], q.shape[0]), -math.inf, dtype=q.dtype, device=q.device)
    for (start, end), rows, hidden in visible_keys(plan):
        scores = torch.einsum("mhd,nhd->hmn", q[start:end], k[rows]) * scale
        if hidden is not None:
            scores = scores.masked_fill(hidden.to(q.device), -math.inf)
        out[start:end] = torch.einsum("hmn,nhd->mhd", scores.softmax(-1), v[rows])
        lse[:, start:end] = scores.logsumexp(-1)
    return out, lse


def library_attention(q, k, v, plan, scale=None):
    """Return out and lse as `attention`, out by PyTorch's own attention in the dtype of q, lse at least in float32."""
    scale = q.shape[2] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros_like(q)
    lse = torch.full((q.shape[1], q.shape[0]), -math.inf, dtype=wide, device=q.device)
    for (start, end), rows, hidden in visible_keys(plan):
        part = [x.transpose(0, 1) for x in (q[start:end], k[rows], v[rows])]
        mask = None if hidden is None else ~hidden.to(q.device)
        result = F.scaled_dot_product_attention(*(x[None] for x in part), attn_mask=mask, scale=scale)
        out[start:end] = result[0].transpose(0, 1)
        scores = part[0].to(wide) @ part[1].to(wide).transpose(1, 2) * scale
        lse[:, start:end] = (scores if mask is None else scores.masked_fill(~mask, -math.inf)).logsumexp(-1)
    return out, lse


def assert_attention_within_budget(actual, eager, oracle, name=""):
    """Compare (out, lse) pairs; -inf must be at the same places."""
    assert_within_budget(actual[0], eager[0].to(actual[0].dtype), oracle[0], f"{name} out")
    empty = oracle[1] == -math.inf
    assert torch.equal(actual[1] == -math.inf, empty), f"{name} lse of queries without keys"
    assert_within_budget(actual[1][~empty], eager[1][~empty], oracle[1][~empty], f"{name} lse")


def rms_norm_rope(x, weight, cos, sin, eps):
    """Return heads [N, H, D] after the RMSNorm (none for a weight of None) and the rotation by cos, sin [N, D/2]."""
    if weight is not None:
        x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(x.dtype)
    x0, x1 = x.unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    return torch.stack([x0 * c - x1 * s, x0 * s + x1 * c], -1).flatten(-2)


def norm_modulate(x, shift, scale, row, eps, rms=False):
    """Return the norm of x [N, C], modulated by the rows of shift (None: 0) and scale, computed in the dtype of x."""
    if rms:
        square = (x.float() if x.element_size() < 4 else x).square().mean(-1, keepdim=True)
        n = (x * (square + eps).rsqrt()).to(x.dtype)
    else:
        n = F.layer_norm(x, x.shape[1:], eps=eps)
    out = n * (1 + scale.to(x.dtype)[row])
    return out if shift is None else out + shift.to(x.dtype)[row]


def gradients(formula, inputs, grads, dtype):
    """Return the gradients of `formula(*inputs)`, computed in dtype, for every input; None for an input of None."""
    leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in inputs]
    wanted = [x for x in leaves if x is not None]
    outs = formula(*leaves)
    outs = outs if isinstance(outs, (tuple, list)) else (outs,)
    if not any(out.requires_grad for out in outs):  # no query sees a key
        return [None if x is None else torch.zeros_like(x) for x in leaves]
    found = iter(torch.autograd.grad(outs, wanted, [g.to(dtype) for g in grads], materialize_grads=True))
    return [None if x is None else next(found) for x in leaves]
