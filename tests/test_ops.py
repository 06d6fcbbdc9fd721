"""The public operations: each implementation within the budget, torch.library contracts, clear refusals."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

from uniref_fast import native, ops
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.ops.norm_modulate import gate_residual_norm_modulate_reference, norm_modulate_reference
from uniref_fast.ops.qk_norm_rope import qk_norm_rope_reference
from uniref_fast.ops.segment_attention import segment_attention_reference
from uniref_fast.testing import assert_within_budget
from uniref_fast.visibility import POLICIES, plan

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
CASES = [("reference", torch.float32), ("reference", torch.bfloat16)]
CASES += [("triton", torch.float32), ("triton", torch.float16)]
CASES += [("triton", torch.bfloat16)] if CUDA else []
if not CUDA:
    missing = pytest.mark.skipif(not native.available(), reason=f"native: {native.reason()}")
    CASES += [pytest.param("native", dtype, marks=missing) for dtype in (torch.float32, torch.bfloat16)]
each_case = pytest.mark.parametrize("impl, dtype", CASES)

# Ragged on purpose: no text, one token of text, 1 x 1 images, no references, a sample across a tile border of 64.
PACK = [
    Sample(0, (1, 1, 1)),
    Sample(1, (1, 5, 7), ((1, 1, 1), (1, 3, 2))),
    Sample(((3, True), (2, False)), (1, 8, 8), ((1, 4, 2),)),
]


def rand(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@each_case
@pytest.mark.parametrize("visibility", list(POLICIES))
def test_segment_attention(impl, dtype, visibility):
    layout = SelfLayout.qwen(PACK)
    compiled = plan(layout, visibility)
    q, k, v = (rand(layout.joint_length, 2, 64, dtype=dtype) for _ in range(3))
    out, lse = ops.segment_attention(q, k, v, compiled, return_lse=True, impl=impl)
    tensors = compiled.tensors(DEVICE)
    oracle, oracle_lse = segment_attention_reference(q.double(), k.double(), v.double(), *tensors, 64**-0.5)
    eager = torch.empty_like(oracle, dtype=dtype)
    for (start, end), keys in zip(compiled.ranges, compiled.intervals, strict=True):
        rows = torch.cat([torch.arange(a, b, device=DEVICE) for a, b in keys])
        args = (q[start:end], k[rows], v[rows])
        eager[start:end] = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in args)).transpose(0, 1)
    assert_within_budget(out, eager, oracle, f"{impl} out")
    torch.testing.assert_close(lse.double(), oracle_lse.double(), rtol=1e-3, atol=1e-3)


@each_case
def test_segment_attention_is_packing_invariant(impl, dtype):
    """A sample's rows are the same bits alone and at the end of a pack."""
    alone, packed = SelfLayout.qwen(PACK[1:2]), SelfLayout.qwen([PACK[2], PACK[0], PACK[1]])
    q, k, v = (rand(packed.joint_length, 2, 32, dtype=dtype) for _ in range(3))
    out = ops.segment_attention(q, k, v, plan(packed), impl=impl)
    tail = slice(-alone.joint_length, None)
    assert torch.equal(out[tail], ops.segment_attention(q[tail], k[tail], v[tail], plan(alone), impl=impl))


def qk_inputs(layout, dtype, heads=3, dim=32):
    text = tuple(rand(layout.text_length, heads, dim, dtype=dtype) for _ in range(3))
    image = tuple(rand(layout.image_length, heads, dim, dtype=dtype) for _ in range(3))
    weights = [(rand(dim, dtype=dtype), rand(dim, dtype=dtype)) for _ in range(2)]
    return text, image, *weights, layout.rotary((8, 12, 12), DEVICE)


@each_case
def test_qk_norm_rope(impl, dtype):
    layout = SelfLayout.qwen(PACK)
    text, image, text_w, image_w, rotary = qk_inputs(layout, dtype)
    got = ops.qk_norm_rope(text, image, text_w, image_w, layout, rotary, impl=impl)
    index = (layout.joint_index("text", DEVICE), layout.joint_index("image", DEVICE))
    tensors = (*text, *image, *text_w, *image_w)
    eager = qk_norm_rope_reference(*tensors, *rotary, *index, 1e-6)
    oracle = qk_norm_rope_reference(*(x.double() for x in (*tensors, *rotary)), *index, 1e-6)
    for name, a, e, o in zip("qkv", got, eager, oracle, strict=True):
        assert_within_budget(a, e, o, f"{impl} {name}")
    assert torch.equal(got[2], oracle[2].to(dtype)), "v is copied, not computed"


def test_qk_norm_rope_reference_is_what_diffusers_computes():
    layout = SelfLayout.qwen([Sample(4, (1, 3, 5))])
    text, image, text_w, image_w, (cos, sin) = qk_inputs(layout, torch.float32)
    q, _, v = ops.qk_norm_rope(text, image, text_w, image_w, layout, (cos, sin), impl="reference")
    parts = []
    for x, weight, rows in ((text[0], text_w[0], slice(0, 4)), (image[0], image_w[0], slice(4, None))):
        norm = RMSNorm(32, eps=1e-6).to(DEVICE)
        norm.weight.data.copy_(weight)
        parts.append(apply_rotary_emb_qwen(norm(x[None]), torch.complex(cos[rows], sin[rows]), use_real=False)[0])
    torch.testing.assert_close(q, torch.cat(parts))
    assert torch.equal(v, torch.cat([text[2], image[2]]))


def modulated(dtype, n=77, c=96, rows=4):
    table = rand(rows, 6 * c, dtype=dtype)  # strided rows, as the chunks of a modulation layer are
    index = torch.randint(0, rows, (n,), device=DEVICE, dtype=torch.int32)
    x = (rand(n, c) * 3 + 10 * rand(n, 1)).to(dtype)  # rows with large means
    return x, rand(n, c, dtype=dtype), table.chunk(6, dim=-1), index


@each_case
@pytest.mark.parametrize("with_rows", [True, False])
def test_norm_modulate(impl, dtype, with_rows):
    x, _, (shift, scale, *_), rows = modulated(dtype)
    rows = rows if with_rows else None
    out = ops.norm_modulate(x, shift, scale, rows, impl=impl)
    oracle = norm_modulate_reference(x.double(), shift.double(), scale.double(), rows)
    assert_within_budget(out, norm_modulate_reference(x, shift, scale, rows), oracle, impl)


@each_case
def test_gate_residual_norm_modulate(impl, dtype):
    x, y, (shift, scale, gate, *_), rows = modulated(dtype)
    out, normed = ops.gate_residual_norm_modulate(x, y, gate, shift, scale, rows, impl=impl)
    alone = ops.gate_residual(x, y, gate, rows, impl=impl)
    eager, eager_normed = gate_residual_norm_modulate_reference(x, y, gate, shift, scale, rows)
    wide = [t.double() for t in (x, y, gate, shift, scale)]
    oracle, _ = gate_residual_norm_modulate_reference(*wide, rows)
    assert_within_budget(out, eager, oracle, f"{impl} residual")
    assert_within_budget(alone, eager, oracle, f"{impl} residual alone")
    # The norm is of the rounded residual, so its oracle starts from what the op returned.
    oracle_normed = norm_modulate_reference(out.double(), shift.double(), scale.double(), rows)
    eager_normed = norm_modulate_reference(out, shift, scale, rows)
    assert_within_budget(normed, eager_normed, oracle_normed, f"{impl} normed")


@each_case
def test_pack_and_unpack(impl, dtype):
    """Moves bits only, so equality is exact; against diffusers' own packing and back."""
    from diffusers import QwenImageEditPlusPipeline as Pipeline

    latents = [rand(16, 1, h, w, dtype=dtype) for h, w in ((2, 2), (6, 10), (8, 2))]
    stream = ops.pack(latents, impl=impl)
    expected = [Pipeline._pack_latents(x[:, 0][None], 1, 16, *x.shape[2:])[0] for x in latents]
    assert torch.equal(stream, torch.cat(expected))
    back = ops.unpack(stream, [(1, 1, 1), (1, 3, 5), (1, 4, 1)], impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(back, latents, strict=True))
    strided = rand(3, 4, 6, 8, dtype=dtype).transpose(0, 1)  # [C, F, h, w] with F = 3, not contiguous
    assert torch.equal(ops.unpack(ops.pack([strided], impl=impl), [(3, 3, 4)], impl=impl)[0], strided)


@each_case
def test_torch_library_contract(impl, dtype):
    """Schema, fake and dispatch agree with what the op does (torch.library.opcheck)."""
    layout = SelfLayout.qwen(PACK)
    compiled = plan(layout)
    q = rand(layout.joint_length, 1, 32, dtype=dtype)
    text, image, text_w, image_w, rotary = qk_inputs(layout, dtype)
    index = (layout.joint_index("text", DEVICE), layout.joint_index("image", DEVICE))
    x, y, (shift, scale, gate, *_), rows = modulated(dtype)
    tiles = None
    if impl == "triton":
        from uniref_fast.ops.segment_attention import _triton_config

        tiles = compiled.tiles(_triton_config(q).BLOCK_M, DEVICE)
    calls = {
        "segment_attention": (q, q, q, *compiled.tensors(DEVICE), tiles, 0.2, impl),
        "qk_norm_rope": (*text, *image, *text_w, *image_w, *rotary, *index, 1e-6, impl),
        "norm_modulate": (x, shift, scale, rows, 1e-6, impl),
        "gate_residual": (x, y, gate, None, impl),
        "gate_residual_norm_modulate": (x, y, gate, shift, scale, rows, 1e-6, impl),
        "pack": ([rand(4, 1, 2, 4, dtype=dtype)], impl),
        "unpack": (rand(6, 16, dtype=dtype), [1, 2, 1, 1, 2, 2], impl),
    }
    for name, args in calls.items():
        op = getattr(torch.ops.uniref_fast, name).default
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def test_no_backward_is_an_error_not_a_wrong_gradient():
    x, _, (shift, scale, *_), rows = modulated(torch.float32)
    out = ops.norm_modulate(x.requires_grad_(), shift, scale, rows)
    with pytest.raises((RuntimeError, NotImplementedError)):
        out.sum().backward()


def test_head_dimensions_are_those_of_the_kernels():
    from uniref_fast.kernels import segment_attention
    from uniref_fast.ops import _dispatch

    assert _dispatch.TRITON_HEAD_DIMS == segment_attention.HEAD_DIMS


def test_choice_of_implementation():
    half = torch.zeros(1, dtype=torch.float64)
    assert ops.choose(None, half) == "reference"
    with pytest.raises(ValueError, match=r"float32 and bfloat16|not built|native"):
        ops.choose("native", half)
    with pytest.raises(ValueError, match="known: reference, native, triton"):
        ops.choose("cuda", half)
    if not CUDA:
        with pytest.raises(ValueError, match="interpreter computes"):
            ops.choose("triton", torch.zeros(1, dtype=torch.bfloat16))


@pytest.mark.parametrize("version, reason", [("3.5.1", "at least 3.6"), (None, "not installed"), ("3.10.0", None)])
def test_old_or_missing_triton_is_named(monkeypatch, version, reason):
    from uniref_fast.ops import _dispatch

    def look_up(name):
        if version is None:
            raise _dispatch.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(_dispatch.metadata, "version", look_up)
    _dispatch._triton_missing.cache_clear()
    try:
        said = _dispatch._triton_missing()
        assert said is None if reason is None else reason in said
    finally:
        _dispatch._triton_missing.cache_clear()


LAYOUT = SelfLayout.qwen(PACK)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ops.segment_attention(*[rand(5, 2, 8)] * 3, plan(LAYOUT)), "queries"),
        (lambda: ops.segment_attention(rand(5, 2, 8), rand(5, 3, 8), rand(5, 3, 8), plan(LAYOUT)), r"\[Nk, H, D\]"),
        (lambda: ops.norm_modulate(rand(3, 4), rand(1, 5), rand(1, 4)), "shift has shape"),
        (
            lambda: ops.norm_modulate(rand(3, 4), rand(1, 4), rand(1, 4), torch.zeros(3)),
            "rows must be contiguous int32",
        ),
        (lambda: ops.gate_residual(rand(3, 4), rand(2, 4), rand(1, 4)), "y has shape"),
        (lambda: ops.norm_modulate(rand(3, 4), rand(1, 4).double(), rand(1, 4)), "float64"),
        (lambda: ops.gate_residual(rand(3, 4), rand(3, 4), rand(0, 4)), "one R >= 1"),
        (lambda: ops.norm_modulate(rand(3, 4), rand(1, 4), rand(2, 4)), "one R >= 1"),
        (lambda: ops.norm_modulate(rand(4, 3).T, rand(1, 4), rand(1, 4)), "contiguous in its last dimension"),
        (lambda: ops.segment_attention(*[rand(LAYOUT.joint_length, 1, 8)] * 3, plan(LAYOUT), scale=0.0), "positive"),
        (lambda: ops.pack([]), "at least one"),
        (lambda: ops.pack([rand(4, 3, 2)]), "h, w even"),
        (lambda: ops.pack([rand(4, 2, 2), rand(3, 2, 2)]), "3 channels"),
        (lambda: ops.unpack(rand(3, 16), [(1, 2, 2)]), r"\[4, 4 C\]"),
        (
            lambda: ops.qk_norm_rope(*qk_inputs(LAYOUT, torch.float32)[:4], LAYOUT, LAYOUT.rotary((8, 12, 16), DEVICE)),
            "head dimension",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
