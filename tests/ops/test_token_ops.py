"""The public operations: each implementation within the budget, torch.library contracts, clear refusals."""

import oracles
import pytest
import torch
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

from uniref_fast import native, ops
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.ops.norm_modulate import (
    gate_residual_norm_modulate_reference,
    gate_residual_reference,
    norm_modulate_reference,
)
from uniref_fast.ops.qk_norm_rope import qk_norm_rope_reference
from uniref_fast.testing import assert_within_budget

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
CASES = [("reference", torch.float32), ("reference", torch.bfloat16)]
CASES += [("triton", torch.float32), ("triton", torch.float16)]
CASES += [("triton", torch.bfloat16)] if CUDA else []
if not CUDA:
    missing = pytest.mark.skipif(not native.available(), reason=f"native: {native.reason()}")
    CASES += [pytest.param("native", dtype, marks=missing) for dtype in (torch.float32, torch.bfloat16)]
each_case = pytest.mark.parametrize("impl, dtype", CASES)
each_op_case = pytest.mark.parametrize("impl, dtype", CASES[2:])  # the reference is plain PyTorch, not an op

# Ragged on purpose: no text, one token of text, 1 x 1 images, no references, a text with padding.
PACK = [
    Sample(0, (1, 1, 1)),
    Sample(1, (1, 3, 5), ((1, 1, 1), (1, 3, 2))),
    Sample(((3, True), (2, False)), (1, 2, 4), ((1, 4, 1),)),
]


def rand(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def qk_inputs(layout, dtype, heads=3, dim=32):
    text = tuple(rand(layout.text_length, heads, dim, dtype=dtype) for _ in range(3))
    image = tuple(rand(layout.image_length, heads, dim, dtype=dtype) for _ in range(3))
    weights = [(rand(dim, dtype=dtype), rand(dim, dtype=dtype)) for _ in range(2)]
    return text, image, *weights, layout.rotary((8, 12, 12), DEVICE)


def gradients(outputs, inputs, upstream):
    """Return the gradients of sum(outputs * upstream), for tuples of outputs, in the dtype of the inputs."""
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, upstream, strict=True)]
    return torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs])


def check_op(op, reference, tensors, impl, names, outputs):
    """Outputs and all gradients of `op` within the budget of `reference`, which runs in the dtype and in float64."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    results = [f if isinstance(f, tuple) else (f,) for f in (op(*tensors), reference(*tensors), reference(*wide))]
    upstream = [rand(*o.shape) for o in results[0]]
    grads = [gradients(r, x, upstream) for r, x in zip(results, (tensors, tensors, wide), strict=True)]
    for name, got, eager, oracle in zip(outputs, *results, strict=True):
        assert_within_budget(got, eager, oracle, f"{impl} {name}")
    for name, got, eager, oracle in zip(names, *grads, strict=True):
        assert got.dtype == eager.dtype
        assert_within_budget(got, eager, oracle, f"{impl} gradient of {name}")


@pytest.mark.slow
@each_case
def test_qk_norm_rope(impl, dtype):
    layout = SelfLayout.qwen(PACK)
    text, image, text_w, image_w, rotary = qk_inputs(layout, dtype)
    index = (layout.joint_index("text", DEVICE), layout.joint_index("image", DEVICE))

    def op(*t):
        return ops.qk_norm_rope(t[:3], t[3:6], t[6:8], t[8:10], layout, rotary, impl=impl)

    def reference(*t):
        tables = [x.to(torch.promote_types(t[0].dtype, torch.float32)) for x in rotary]
        return qk_norm_rope_reference(*t, *tables, *index, 1e-6)

    names = [f"{s} {x}" for s in ("text", "image") for x in "qkv"] + ["txt_wq", "txt_wk", "img_wq", "img_wk"]
    check_op(op, reference, (*text, *image, *text_w, *image_w), impl, names, "qkv")
    v = op(*text, *image, *text_w, *image_w)[2]
    assert torch.equal(v, reference(*text, *image, *text_w, *image_w)[2]), "v is copied, not computed"


def check_gradients(fused, formula, inputs, upstream):
    """Compare the gradients of a fused op with those of its formula, in float64 and in the dtype of the inputs."""
    dtype = inputs[0].dtype
    got = oracles.gradients(fused, inputs, upstream, dtype)
    eager, oracle = (oracles.gradients(formula, inputs, upstream, each) for each in (dtype, torch.float64))
    for i, (ours, theirs, exact) in enumerate(zip(got, eager, oracle, strict=True)):
        assert_within_budget(ours, theirs, exact, f"gradient of input {i}")


@each_case
def test_qk_norm_rope_with_frozen_or_absent_weights(impl, dtype):
    layout = SelfLayout.qwen(PACK)
    text, image, text_w, _, rotary = qk_inputs(layout, dtype)
    index = (layout.joint_index("text", DEVICE), layout.joint_index("image", DEVICE))
    weights = (text_w[0], None, None, None)  # one stays frozen, three are not there
    upstream = [rand(layout.joint_length, *text[0].shape[1:], dtype=dtype) for _ in range(3)]
    streams = (*text, *image)

    def fused(*t):
        return ops.qk_norm_rope(t[:3], t[3:], weights[:2], weights[2:], layout, rotary, impl=impl)

    def formula(*t):
        return qk_norm_rope_reference(*t, *weights, *rotary, *index, 1e-6)

    check_gradients(fused, formula, streams, upstream)


@each_case
def test_qk_norm_rope_of_one_stream(impl, dtype):
    """All tokens in joint order, with q, k and v as views of one projection."""
    layout = SelfLayout.qwen(PACK)
    cos, sin = layout.rotary((8, 12, 12), DEVICE)
    weights = rand(32, dtype=dtype), rand(32, dtype=dtype)
    inputs = rand(layout.joint_length, 4, 3 * 32, dtype=dtype), *weights
    upstream = [rand(layout.joint_length, 4, 32, dtype=dtype) for _ in range(3)]

    def fused(qkv, *weights):
        return ops.qk_norm_rope(None, qkv.chunk(3, -1), (None, None), weights, layout, (cos, sin), impl=impl)

    def formula(qkv, *weights):
        q, k, v = qkv.chunk(3, -1)
        return *(oracles.rms_norm_rope(x, w, cos, sin, 1e-6) for x, w in zip((q, k), weights, strict=True)), v

    wide = formula(*(x.double() for x in inputs))
    for name, ours, eager, oracle in zip("qkv", fused(*inputs), formula(*inputs), wide, strict=True):
        assert_within_budget(ours, eager, oracle, name)
    check_gradients(fused, formula, inputs, upstream)


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


@pytest.mark.slow
@each_case
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("with_rows", [True, False])
def test_norm_modulate(impl, dtype, with_rows, norm):
    x, _, (shift, scale, *_), rows = modulated(dtype)
    rows = rows if with_rows else None
    check_op(
        lambda *t: ops.norm_modulate(*t, rows, norm=norm, impl=impl),
        lambda *t: norm_modulate_reference(*t, rows, rms=norm == "rms"),
        (x, shift, scale),
        impl,
        ("x", "shift", "scale"),
        ["out"],
    )


@each_case
def test_norm_modulate_without_shift(impl, dtype):
    x, _, (_, scale, *_), rows = modulated(dtype)
    check_op(
        lambda x, scale: ops.norm_modulate(x, None, scale, rows, norm="rms", impl=impl),
        lambda x, scale: norm_modulate_reference(x, None, scale, rows, rms=True),
        (x, scale),
        impl,
        ("x", "scale"),
        ["out"],
    )


@each_case
def test_frozen_modulation_gets_no_gradient(impl, dtype):
    """Only the streams carry gradients, as in LoRA training."""
    x, y, (shift, scale, gate, *_), rows = modulated(dtype)

    def fused(x, y):
        return ops.gate_residual_norm_modulate(x, y, gate, shift, scale, rows, impl=impl)

    def formula(x, y):
        return gate_residual_norm_modulate_reference(x, y, *(t.to(x.dtype) for t in (gate, shift, scale)), rows)

    check_gradients(fused, formula, (x, y), [rand(*x.shape, dtype=dtype) for _ in range(2)])


@each_case
def test_gate_residual(impl, dtype):
    x, y, (_, _, gate, *_), rows = modulated(dtype)
    check_op(
        lambda *t: ops.gate_residual(*t, rows, impl=impl),
        lambda *t: gate_residual_reference(*t, rows),
        (x, y, gate),
        impl,
        ("x", "y", "gate"),
        ["out"],
    )


@each_case
def test_gate_residual_norm_modulate(impl, dtype):
    x, y, (shift, scale, gate, *_), rows = modulated(dtype)
    # Rows of moderate mean: the norm is of the *rounded* residual, which float64 does not see.
    x = (x.float() - x.float().mean(1, keepdim=True)).to(dtype)
    check_op(
        lambda *t: ops.gate_residual_norm_modulate(*t, rows, impl=impl),
        lambda *t: gate_residual_norm_modulate_reference(*t, rows),
        (x, y, gate, shift, scale),
        impl,
        ("x", "y", "gate", "shift", "scale"),
        ("x_out", "normed"),
    )
    with torch.no_grad():
        out, normed = ops.gate_residual_norm_modulate(x, y, gate, shift, scale, rows, impl=impl)
        assert torch.equal(out, ops.gate_residual(x, y, gate, rows, impl=impl))
        oracle = norm_modulate_reference(out.double(), shift.double(), scale.double(), rows)
        assert_within_budget(normed, norm_modulate_reference(out, shift, scale, rows), oracle, f"{impl} of the rounded")


@each_case
@pytest.mark.parametrize("add_one", [False, True])
def test_norm_of_a_branch(impl, dtype, add_one):
    """Norms before and after a branch: its norm in the residual, and a factor without 1 + scale."""
    x, y, (shift, scale, gate, *_), rows = modulated(dtype)
    x, y = ((t.float() - t.float().mean(1, keepdim=True)).to(dtype) for t in (x, y * 5))
    options = {"add_one": add_one, "branch_eps": 1e-3}  # an eps that the result depends on
    check_op(
        lambda *t: ops.gate_residual_norm_modulate(*t, rows, norm="rms", impl=impl, **options),
        lambda *t: gate_residual_norm_modulate_reference(*t, rows, rms=True, **options),
        (x, y, gate, shift, scale),
        impl,
        ("x", "y", "gate", "shift", "scale"),
        ("x_out", "normed"),
    )
    check_op(
        lambda *t: ops.gate_residual(*t, rows, branch_eps=1e-3, impl=impl),
        lambda *t: gate_residual_reference(*t, rows, 1e-3),
        (x, y, gate),
        impl,
        ("x", "y", "gate"),
        ["out"],
    )
    with torch.no_grad():
        tables = gate, None, scale
        both = ops.gate_residual_norm_modulate(x, y, *tables, rows, norm="rms", impl=impl, **options)
        assert torch.equal(both[0], ops.gate_residual(x, y, gate, rows, branch_eps=1e-3, impl=impl))
        single = ops.norm_modulate(both[0], None, scale, rows, norm="rms", add_one=add_one, impl=impl)
        assert torch.equal(both[1], single)
        eager = gate_residual_reference(x, y, gate, rows, 1e-3)
        if dtype != torch.float32:  # rounded after the norm and after the product
            ours = ops.gate_residual(x, y, gate, rows, branch_eps=1e-3, rounding="eager", impl=impl)
            assert (ours != eager).float().mean() < 0.01


@each_case
def test_multiplication_keeps_the_digits_of_small_factors(impl, dtype):
    x, _, (_, scale, *_), rows = modulated(dtype)
    small = scale * 2.0**-12
    check_op(
        lambda x, scale: ops.norm_modulate(x, None, scale, rows, add_one=False, impl=impl),
        lambda x, scale: norm_modulate_reference(x, None, scale, rows, add_one=False),
        (x, small),
        impl,
        ("x", "scale"),
        ["out"],
    )


@pytest.mark.skipif(not native.available(), reason="not built")
def test_a_library_of_an_older_version_leaves_norms_of_branches_to_pytorch(monkeypatch):
    x, y, (_, scale, gate, *_), rows = modulated(torch.float32)
    x, y, gate, scale, rows = (t.cpu() for t in (x, y, gate, scale, rows))

    def call():
        options = {"add_one": False, "branch_eps": 1e-6, "norm": "rms", "impl": "native"}
        return ops.gate_residual_norm_modulate(x, y, gate, None, scale, rows, **options)

    expected = call()
    monkeypatch.setattr(native, "has_branch_norm", lambda: False)
    monkeypatch.setattr(native, "gate_residual_norm_modulate", None)  # not called
    for ours, theirs in zip(call(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
@each_case
def test_eager_rounding(impl, dtype):
    """Bit-equal to eager where nothing is summed, closer to it than one rounding where something is."""
    x, y, (shift, scale, gate, *_), rows = modulated(dtype, n=200)
    eager = gate_residual_norm_modulate_reference(x, y, gate, shift, scale, rows)
    ours = ops.gate_residual_norm_modulate(x, y, gate, shift, scale, rows, rounding="eager", impl=impl)
    assert torch.equal(ours[0], eager[0])
    assert torch.equal(ops.gate_residual(x, y, gate, rows, rounding="eager", impl=impl), eager[0])
    if dtype != torch.float32:
        once = ops.norm_modulate(eager[0], shift, scale, rows, impl=impl)
        differing = [(a != eager[1]).float().mean().item() for a in (ours[1], once)]
        assert differing[0] < 0.01 and (impl == "reference" or differing[0] < differing[1] / 4), differing


@pytest.mark.slow
@each_op_case
def test_torch_library_contract(impl, dtype):
    """Schema, fake, autograd and dispatch agree with what the op does (torch.library.opcheck)."""
    layout = SelfLayout.qwen([Sample(1, (1, 1, 2))])
    text, image, text_w, image_w, rotary = qk_inputs(layout, dtype, heads=2)
    index = (layout.joint_index("text", DEVICE), layout.joint_index("image", DEVICE))
    x, y, (shift, scale, gate, *_), rows = modulated(dtype, n=5, c=32)
    for tensor in (x, y, text[0], image[1], text_w[0]):
        tensor.requires_grad_()
    calls = {
        "qk_norm_rope": (*text, *image, *text_w, *image_w, *rotary, *index, 1e-6, False, impl),
        "norm_modulate": (x, shift, scale, rows, 1e-6, False, False, impl, True),
        "gate_residual": (x, y, gate, None, True, impl, None),
        "gate_residual_norm_modulate": (x, y, gate, None, scale, rows, 1e-6, True, False, impl, True, None),
    }
    for name, args in calls.items():
        torch.library.opcheck(getattr(torch.ops.uniref_fast, name).default, args)
    both = torch.ops.uniref_fast.gate_residual_norm_modulate.default
    torch.library.opcheck(both, (x, y, gate, shift, scale, rows, 1e-6, True, False, impl, False, 1e-6))


@pytest.mark.slow
@pytest.mark.parametrize("impl", [None, "reference"])
def test_under_torch_compile(impl):
    """The whole op in one graph, forward and backward."""
    x, y, (shift, scale, gate, *_), rows = modulated(torch.float32)
    tensors = [t.detach().requires_grad_() for t in (x, y, gate, shift, scale)]

    def call(*t):
        return ops.gate_residual_norm_modulate(t[0] * 2, *t[1:], rows, impl=impl)[1].sin()

    out, expected = torch.compile(call, backend="aot_eager", fullgraph=True)(*tensors), call(*tensors)
    assert torch.equal(out, expected)
    for a, b in zip(torch.autograd.grad(out.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True):
        assert torch.equal(a, b)


def test_no_second_derivative_is_an_error_not_a_wrong_gradient():
    x, _, (shift, scale, *_), rows = modulated(torch.float32)
    out = ops.norm_modulate(x.requires_grad_(), shift, scale, rows)
    if ops.choose(None, x) == "reference":
        pytest.skip("the reference is differentiable any number of times")
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        grad.sum().backward()


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


@pytest.mark.parametrize(
    "version, reason",
    [("3.5.1", "at least 3.6"), ("3.6rc1", None), ("main", "at least 3.6"), (None, "not installed"), ("3.10.0", None)],
)
def test_old_or_missing_triton_is_named(monkeypatch, version, reason):
    from uniref_fast.ops import _dispatch

    def look_up(name):
        if version is None:
            raise _dispatch.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(_dispatch.metadata, "version", look_up)
    said = _dispatch._triton_missing()
    assert said is None if reason is None else reason in said
    monkeypatch.setattr(_dispatch, "TRITON_MISSING", said)
    assert said is None or _dispatch.unavailable("triton", torch.zeros(1)) == said


LAYOUT = SelfLayout.qwen(PACK)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ops.norm_modulate(rand(3, 4), rand(1, 5), rand(1, 4)), "shift has shape"),
        (
            lambda: ops.norm_modulate(rand(3, 4), rand(1, 4), rand(1, 4), torch.zeros(3)),
            "mod_index must be contiguous int32",
        ),
        (lambda: ops.gate_residual(rand(3, 4), rand(2, 4), rand(1, 4)), "y has shape"),
        (lambda: ops.norm_modulate(rand(3, 4), rand(1, 4).double(), rand(1, 4)), "float64"),
        (lambda: ops.gate_residual(rand(3, 4), rand(3, 4), rand(0, 4)), "one R >= 1"),
        (lambda: ops.norm_modulate(rand(3, 4), rand(1, 4), rand(2, 4)), "one R >= 1"),
        (lambda: ops.norm_modulate(rand(4, 3).T, rand(1, 4), rand(1, 4)), "contiguous in its last dimension"),
        (lambda: ops.norm_modulate(rand(3, 4), rand(1, 4), rand(1, 4), norm="batch"), "known: layer, rms"),
        (lambda: ops.gate_residual(rand(3, 4), rand(3, 4), rand(1, 4), rounding="up"), "known: once, eager"),
        (
            lambda: ops.qk_norm_rope(*qk_inputs(LAYOUT, torch.float32)[:4], LAYOUT, LAYOUT.rotary((8, 12, 16), DEVICE)),
            "head dimension",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_gradient_of_an_empty_stream():
    """A sum's gradient is expanded: it has no strides of its own."""
    x = torch.zeros(0, 8, requires_grad=True)
    rows, table = torch.zeros(0, dtype=torch.int32), torch.zeros(1, 8)
    ops.norm_modulate(x, table, table, rows).sum().backward()
    assert x.grad.shape == (0, 8)


def test_no_budget_from_what_is_not_finite():
    one, inf = torch.ones(2), torch.tensor([1.0, float("inf")])
    with pytest.raises(AssertionError, match="not finite"):
        assert_within_budget(one, inf, one)
    with pytest.raises(AssertionError, match="not finite"):
        assert_within_budget(one, one, inf)
