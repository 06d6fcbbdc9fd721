"""Token ops against eager PyTorch, compiled eager, and other libraries' kernels when installed; checked first.

    pytest bench/bench_token_ops.py --benchmark-only [-k "norm_modulate and backward"]

`bytes` counts each input read once and each output written once: what the op must move.
"""

import importlib.util

import pytest
import torch
from torch.func import functional_call

from uniref_fast import ops
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.ops.norm_modulate import (
    gate_residual_norm_modulate_reference,
    gate_residual_reference,
    norm_modulate_reference,
)
from uniref_fast.testing import max_relative_error

CUDA = torch.cuda.is_available()
TOKENS, CHANNELS, HEADS, DIM = (17408, 3072, 24, 128) if CUDA else (4096, 3072, 24, 128)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
each = pytest.mark.parametrize("dtype", [torch.bfloat16] if CUDA else [torch.float32, torch.bfloat16], ids=str)
direction = pytest.mark.parametrize("direction", ["forward", "backward"])
whose = pytest.mark.parametrize("whose", ["eager", "compiled", "liger", "ours"])


def measure(timed, benchmark, name, whose, calls, tensors, direction, dtype, moved):
    """`calls` maps members to functions of `tensors`; the gradient of all of them is what "backward" times."""
    if whose == "compiled":
        calls["compiled"] = torch.compile(calls["eager"], dynamic=False)
    if whose not in calls:
        pytest.skip(f"no {whose} kernel for this op, or not installed")
    results = [call(calls["eager"], tensors, direction)]
    try:
        results.append(call(calls[whose], tensors, direction))
        results[1]()
    except RuntimeError as error:
        if whose in ("eager", "ours"):
            raise
        pytest.skip(f"{whose} fails: {str(error)[:100]}")
    # The check is with eager in float32: PyTorch's own sums over rows are coarse in bfloat16, so a peer's error is kept
    # beside its time and only ours must be small.
    exact = call(calls["eager"], [t.float() for t in tensors], direction)()
    error = max(max_relative_error(a, b) for a, b in zip(_tuple(results[1]()), _tuple(exact), strict=True))
    assert whose != "ours" or error < TOLERANCE[dtype]
    benchmark.extra_info["max_relative_error"] = error
    eager, ours = results
    benchmark.group = f"{name} {direction}, {str(dtype).removeprefix('torch.')}"
    timed(ours, eager, moved=moved)


def call(function, tensors, direction):
    """Return a call without arguments: the op itself, or the gradients of all its tensors."""
    if direction == "forward":
        return torch.no_grad()(lambda: function(*tensors))
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = _tuple(function(*leaves))
    generator = torch.Generator(out[0].device).manual_seed(0)
    upstream = [torch.randn(o.shape, device=o.device, generator=generator).bfloat16().to(o.dtype) for o in out]
    return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)


def _tuple(x):
    return x if isinstance(x, tuple) else (x,)


def tokens(device, dtype, count=1):
    return [torch.randn(TOKENS, CHANNELS, device=device).to(dtype) for _ in range(count)]


def tables(device, dtype, count):
    """Rows of one projection, as a block's modulation makes them; two rows, as one sample with clean references has."""
    made = torch.randn(2, count * CHANNELS, device=device).to(dtype).chunk(count, dim=1)
    return made, (torch.arange(TOKENS, device=device) > TOKENS // 3).int()


@direction
@each
@whose
def test_norm_modulate(benchmark, timed, device, dtype, whose, direction):
    (x,), ((shift, scale), rows) = tokens(device, dtype), tables(device, dtype, 2)
    calls = {
        "eager": lambda *t: norm_modulate_reference(*t, rows),
        "ours": lambda *t: ops.norm_modulate(*t, rows),
    }
    moved = x.nbytes * (3 if direction == "backward" else 2)
    measure(timed, benchmark, "norm_modulate", whose, calls, (x, shift, scale), direction, dtype, moved)


@direction
@each
@whose
def test_rms_norm_modulate(benchmark, timed, device, dtype, whose, direction):
    """RMSNorm with one scale for all tokens, which other libraries have too."""
    (x,), scale = tokens(device, dtype), torch.randn(1, CHANNELS, device=device).to(dtype)
    calls = {
        "eager": lambda x, s: norm_modulate_reference(x, None, s, None, 1e-6, True),
        "ours": lambda x, s: ops.norm_modulate(x, None, s, norm="rms"),
    }
    if CUDA and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        calls["liger"] = lambda x, s: LigerRMSNormFunction.apply(x, s[0], 1e-6, 1.0)
    moved = x.nbytes * (3 if direction == "backward" else 2)
    measure(timed, benchmark, "rms_norm_modulate", whose, calls, (x, scale), direction, dtype, moved)


@direction
@each
@whose
def test_gate_residual(benchmark, timed, device, dtype, whose, direction):
    (x, y), ((gate,), rows) = tokens(device, dtype, 2), tables(device, dtype, 1)
    calls = {
        "eager": lambda *t: gate_residual_reference(*t, rows),
        "ours": lambda *t: ops.gate_residual(*t, rows),
    }
    measure(timed, benchmark, "gate_residual", whose, calls, (x, y, gate), direction, dtype, 3 * x.nbytes)


@direction
@each
@whose
def test_gate_residual_norm_modulate(benchmark, timed, device, dtype, whose, direction):
    (x, y), ((gate, shift, scale), rows) = tokens(device, dtype, 2), tables(device, dtype, 3)
    calls = {
        "eager": lambda *t: gate_residual_norm_modulate_reference(*t, rows),
        "ours": lambda *t: ops.gate_residual_norm_modulate(*t, rows),
    }
    moved = x.nbytes * (6 if direction == "backward" else 4)
    tensors = (x, y, gate, shift, scale)
    measure(timed, benchmark, "gate_residual_norm_modulate", whose, calls, tensors, direction, dtype, moved)


@direction
@each
@whose
def test_qk_norm_rope(benchmark, timed, device, dtype, whose, direction):
    """Eager is what diffusers' processor does: norm per stream, complex rotary, concatenation."""
    from diffusers.models.normalization import RMSNorm
    from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

    side = 64 if CUDA else 32
    layout = SelfLayout.qwen([Sample(256, (1, side, side), ((1, side, side),) * (3 if CUDA else 1))])
    lengths = (layout.text_length, layout.image_length)
    streams = [torch.randn(n, HEADS, DIM, device=device).to(dtype) for n in lengths for _ in range(3)]
    weights = [torch.randn(DIM, device=device).to(dtype) for _ in range(4)]
    norm = RMSNorm(DIM, eps=1e-6).to(device, dtype)
    cos, sin = layout.rotary((16, 56, 56), device)
    turns = torch.complex(cos, sin).split(lengths)

    def eager(*t):
        joint = []
        for i in (0, 1):
            parts = [functional_call(norm, {"weight": t[6 + j]}, t[n][None]) for n, j in ((i, i), (3 + i, 2 + i))]
            turned = [apply_rotary_emb_qwen(x, turn, use_real=False) for x, turn in zip(parts, turns, strict=True)]
            joint.append(torch.cat(turned, dim=1)[0])
        return *joint, torch.cat([t[2], t[5]])

    def ours(*t):
        return ops.qk_norm_rope(t[:3], t[3:6], t[6:8], t[8:], layout, (cos, sin))

    if whose == "compiled":
        pytest.skip("diffusers' complex rotary is not fused by the compiler")
    moved = sum(x.nbytes for x in streams) * 2 + (
        sum(x.nbytes for x in (*streams[:2], *streams[3:5])) if direction == "backward" else 0
    )
    calls = {"eager": eager, "ours": ours}
    measure(timed, benchmark, "qk_norm_rope", whose, calls, (*streams, *weights), direction, dtype, moved)


@each
@pytest.mark.parametrize("whose", ["eager", "ours"])
@pytest.mark.parametrize("op", ["norm_modulate_fp8", "gelu_fp8"])
def test_fp8(benchmark, timed, device, dtype, whose, op):
    """One read and half a write, against the same op with the quantisation after it."""
    if not CUDA or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with e4m3")
    (x,), ((shift, scale), rows) = tokens(device, dtype), tables(device, dtype, 2)

    def eager():
        normed = (
            norm_modulate_reference(x, shift, scale, rows)
            if op == "norm_modulate_fp8"
            else torch.nn.functional.gelu(x, approximate="tanh")
        )
        return ops.quantize_fp8(normed, impl="reference")

    def ours():
        return ops.norm_modulate_fp8(x, shift, scale, rows) if op == "norm_modulate_fp8" else ops.gelu_fp8(x)

    (a, sa), (b, sb) = ours(), eager()
    assert max_relative_error(a.float() * sa[:, None], b.float() * sb[:, None]) < 0.07
    benchmark.group = f"{op} forward, {str(dtype).removeprefix('torch.')}"
    timed({"eager": eager, "ours": ours}[whose], eager, moved=x.nbytes + x.nbytes // 2)
