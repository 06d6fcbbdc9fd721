"""Each op against what PyTorch users have instead, correctness checked first.

pytest bench/bench_ops.py --benchmark-only
"""

import pytest
import torch
import torch.nn.functional as F

from uniref_fast import ops
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.ops.norm_modulate import gate_residual_norm_modulate_reference, norm_modulate_reference
from uniref_fast.testing import max_relative_error
from uniref_fast.visibility import plan

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
whose = pytest.mark.parametrize("whose", ["eager", "ours"])


def measure(timed, benchmark, whose, eager, ours, group, dtype, moved):
    with torch.no_grad():
        a, b = ours(), eager()
    pairs = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
    assert all(max_relative_error(x, y) < TOLERANCE[dtype] for x, y in pairs)
    benchmark.group = group
    benchmark.extra_info["bytes"] = moved
    timed({"eager": eager, "ours": ours}[whose], eager)


@dtypes
@whose
def test_norm_modulate(benchmark, timed, device, dtype, whose, n=4096, c=3072):
    x = torch.randn(n, c, device=device).to(dtype)
    shift, scale = torch.randn(2, 2 * c, device=device).to(dtype).chunk(2, dim=1)
    rows = (torch.arange(n, device=device) > n // 3).int()
    args = (x, shift, scale, rows)
    moved = 2 * x.nbytes
    measure(timed, benchmark, whose, lambda: norm_modulate_reference(*args), lambda: ops.norm_modulate(*args),
            f"norm_modulate {dtype}", dtype, moved)  # fmt: skip


@dtypes
@whose
def test_gate_residual_norm_modulate(benchmark, timed, device, dtype, whose, n=4096, c=3072):
    x, y = (torch.randn(n, c, device=device).to(dtype) for _ in range(2))
    gate, shift, scale = torch.randn(2, 3 * c, device=device).to(dtype).chunk(3, dim=1)
    rows = (torch.arange(n, device=device) > n // 3).int()
    args = (x, y, gate, shift, scale, rows)
    measure(timed, benchmark, whose, lambda: gate_residual_norm_modulate_reference(*args),
            lambda: ops.gate_residual_norm_modulate(*args), f"gate_residual_norm_modulate {dtype}", dtype,
            4 * x.nbytes)  # fmt: skip


@dtypes
@whose
def test_qk_norm_rope(benchmark, timed, device, dtype, whose, heads=24, dim=128):
    """Eager is what diffusers' processor does: norm per stream, complex rotary, concatenation."""
    from diffusers.models.normalization import RMSNorm
    from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

    layout = SelfLayout.qwen([Sample(256, (1, 32, 32), ((1, 32, 24),))])
    lengths = (layout.text_length, layout.image_length)
    text, image = (tuple(torch.randn(n, heads, dim, device=device).to(dtype) for _ in range(3)) for n in lengths)
    norm = RMSNorm(dim, eps=1e-6).to(device, dtype)
    cos, sin = layout.rotary((16, 56, 56), device)
    turn = torch.complex(cos, sin)
    streams = ((text, turn[: lengths[0]]), (image, turn[lengths[0] :]))

    def eager():
        parts = [[apply_rotary_emb_qwen(norm(s[i][None]), t, use_real=False) for s, t in streams] for i in (0, 1)]
        q, k = (torch.cat(p, dim=1)[0] for p in parts)
        return q, k, torch.cat([text[2], image[2]])

    def ours():
        weights = (norm.weight, norm.weight)
        return ops.qk_norm_rope(text, image, weights, weights, layout, (cos, sin))

    moved = 2 * sum(x.nbytes for x in (*text, *image))
    measure(timed, benchmark, whose, eager, ours, f"qk_norm_rope {dtype}", dtype, moved)


@dtypes
@whose
@pytest.mark.parametrize("case", ["one sample", "ragged pack of 8"])
def test_segment_attention(benchmark, timed, device, dtype, whose, case, heads=4, dim=128):
    """Eager is one SDPA call a sample: what running the requests one by one costs."""
    if case == "one sample":
        samples = [Sample(64, (1, 32, 32), ((1, 32, 24),))]
    else:
        samples = [Sample(20 + i, (1, 8 + i, 8), ((1, 6, 4 + i),) * (i % 4)) for i in range(8)]
    layout = SelfLayout.qwen(samples)
    compiled = plan(layout)
    q, k, v = (torch.randn(layout.joint_length, heads, dim, device=device).to(dtype) for _ in range(3))

    def eager():
        spans = [slice(*span) for span in compiled.ranges]
        parts = [[x[span].transpose(0, 1)[None] for x in (q, k, v)] for span in spans]
        return torch.cat([F.scaled_dot_product_attention(*p)[0].transpose(0, 1) for p in parts])

    benchmark.extra_info["flops"] = 4 * compiled.area * heads * dim
    measure(timed, benchmark, whose, eager, lambda: ops.segment_attention(q, k, v, compiled),
            f"segment_attention, {case}, {dtype}", dtype, 4 * q.nbytes)  # fmt: skip
