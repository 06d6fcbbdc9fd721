"""Forward mode, torch.func and second derivatives through every op and model: right or refused, never silently zero."""

import pytest
import torch
from torch import func
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import uniref_fast
from uniref_fast import native, ops
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.memo import memoised
from uniref_fast.models import PackedQwenImage
from uniref_fast.visibility import plan

LAYOUT = SelfLayout.qwen([Sample(2, (1, 2, 3), ((1, 1, 2),)), Sample(3, (1, 2, 2))])
PLAN = plan(LAYOUT)
N, TEXT = LAYOUT.joint_length, LAYOUT.text_length
ROWS = torch.tensor([0, 1, 1, 0, 1], dtype=torch.int32)
FUSED = ["triton", pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason="not built"))]


def rand(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).double()


def norm_modulate(impl, x, shift, scale):
    return ops.norm_modulate(x, shift, scale, ROWS, impl=impl)


def gate_residual(impl, x, y, gate):
    return ops.gate_residual(x, y, gate, ROWS, impl=impl)


def gate_residual_norm_modulate(impl, x, y, gate, shift, scale):
    return torch.cat(ops.gate_residual_norm_modulate(x, y, gate, shift, scale, ROWS, norm="rms", impl=impl))


def gelu(impl, x):
    return ops.gelu(x, impl=impl)


def qk_norm_rope(impl, q, k, v, weight):
    text, image = ([x[:TEXT] for x in (q, k, v)], [x[TEXT:] for x in (q, k, v)])
    rotary = LAYOUT.rotary((8, 4, 4), "cpu")
    return torch.cat(ops.qk_norm_rope(text, image, (weight, None), (weight, weight), LAYOUT, rotary, impl=impl))


def segment_attention(impl, q, k, v):
    return ops.segment_attention(q, k, v, PLAN, impl=impl)


OPS = {
    norm_modulate: (rand(5, 8), rand(2, 8), rand(2, 8)),
    gate_residual: (rand(5, 8), rand(5, 8), rand(2, 8)),
    gelu: (rand(5, 8),),
    gate_residual_norm_modulate: (rand(5, 8), rand(5, 8), rand(2, 8), rand(2, 8), rand(2, 8)),
    qk_norm_rope: (rand(N, 1, 16), rand(N, 1, 16), rand(N, 1, 16), rand(16)),
    segment_attention: (rand(N, 2, 16), rand(N, 2, 16), rand(N, 2, 16)),
}
each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def float32(tensors):
    return tuple(t.float() for t in tensors)


def tangents(inputs):
    return tuple(torch.cos(1.7 * x + 0.3) for x in inputs)


def products(op, inputs):
    """The Jacobian of the op in float64, by reverse mode alone, times the tangents."""
    rows = torch.autograd.functional.jacobian(lambda *xs: op("reference", *xs), inputs)
    pairs = zip(rows, tangents(inputs), strict=True)
    return sum((row.flatten(-t.ndim) * t.flatten()).sum(-1) for row, t in pairs)


@each_op
@pytest.mark.parametrize("impl", [None, "reference"])
def test_forward_mode(op, impl):
    expected = products(op, OPS[op]).float()
    inputs, moves = float32(OPS[op]), float32(tangents(OPS[op]))
    assert expected.abs().max() > 0.1
    close(func.jvp(lambda *xs: op(impl, *xs), inputs, moves)[1], expected)
    with forward_ad.dual_level():
        out = op(impl, *(forward_ad.make_dual(x, t) for x, t in zip(inputs, moves, strict=True)))
        close(forward_ad.unpack_dual(out).tangent, expected)
    plain = op(impl, *inputs)  # afterwards, as before
    assert not plain.requires_grad and torch.isfinite(plain).all()


@each_op
@pytest.mark.parametrize("impl", [None, "reference"])
def test_torch_func(op, impl):
    def loss(*xs):
        return op(impl, *xs).square().sum()

    def exact(*xs):
        return op("reference", *xs).square().sum()

    inputs, every = float32(OPS[op]), tuple(range(len(OPS[op])))
    wide = [x.requires_grad_() for x in map(torch.clone, OPS[op])]
    gradients = [g.float() for g in torch.autograd.grad(exact(*wide), wide)]
    for found, expected in zip(func.grad(loss, every)(*inputs), gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    batch = tuple(torch.stack([x, 2 * x, -x]) for x in inputs)
    close(
        func.vmap(lambda *xs: op(impl, *xs))(*batch), torch.stack([op(impl, *(x[i] for x in batch)) for i in range(3)])
    )
    found = func.vmap(func.grad(loss))(*batch)
    close(found[1], func.grad(loss)(*(x[1] for x in batch)))
    hessian = func.jvp(func.grad(loss, every), inputs, float32(tangents(OPS[op])))[1]  # forward over reverse
    by_reverse = torch.autograd.functional.hvp(exact, OPS[op], tangents(OPS[op]))[1]
    for found, expected in zip(hessian, by_reverse, strict=True):
        torch.testing.assert_close(found, expected.float(), rtol=2e-3, atol=2e-3 * expected.abs().max().item() + 1e-6)


@each_op
@pytest.mark.parametrize("impl", [*FUSED, "dense"])
def test_fused_implementations_refuse_transforms(op, impl):
    if impl == "dense" and op is not segment_attention:
        pytest.skip("attention alone has it")
    if impl == "triton" and op is gelu:
        pytest.skip("GELU has no Triton kernel")
    inputs = float32(OPS[op])
    message = rf"impl='{impl}' is not possible here: inside .*; impl='reference' does"
    with pytest.raises(ValueError, match=message):
        func.jvp(lambda *xs: op(impl, *xs), inputs, inputs)
    with pytest.raises(ValueError, match=message), forward_ad.dual_level():
        op(impl, *(forward_ad.make_dual(x, x) for x in inputs))
    with pytest.raises(ValueError, match=message):
        func.grad(lambda *xs: op(impl, *xs).sum())(*inputs)
    with pytest.raises(ValueError, match=message):
        func.vmap(lambda *xs: op(impl, *xs))(*(x[None] for x in inputs))
    assert ops.choose(None, inputs[0]) == ops.explain(inputs[0])[0]
    with forward_ad.dual_level():
        assert ops.choose(None, inputs[0]) == "reference" and "forward-mode" in ops.explain(inputs[0])[1]
        assert ops.explain_attention(rand(N, 2, 8).float(), PLAN)[0] == "reference"


@pytest.mark.slow
@each_op
@pytest.mark.parametrize("impl", [*FUSED, "dense"])
def test_fused_backwards_refuse_what_would_be_lost(op, impl):
    """Second derivatives, batches of gradients, and a backward inside a transform that the forward was outside of."""
    if impl == "dense" and op is not segment_attention:
        pytest.skip("attention alone has it")
    if impl == "triton" and op is gelu:
        pytest.skip("GELU has no Triton kernel")
    inputs = [x.requires_grad_() for x in float32(OPS[op])]
    out = op(impl, *inputs)
    grad = torch.ones_like(out)
    first = torch.autograd.grad(out, inputs, grad.requires_grad_(), create_graph=True)
    for found, expected in zip(first, torch.autograd.grad(op("reference", *inputs), inputs, grad), strict=True):
        close(found, expected)
    with pytest.raises(NotImplementedError, match="second derivatives: use impl='reference' in the forward, or unp"):
        torch.autograd.grad(sum(x.square().sum() for x in first), inputs)
    out, several = op(impl, *inputs), torch.stack([torch.ones_like(out)] * 2)
    with pytest.raises(NotImplementedError, match="batches of gradients"):
        torch.autograd.grad(out, inputs, several, is_grads_batched=True, retain_graph=True)
    with pytest.raises(NotImplementedError, match="use impl='reference'"):
        func.vmap(lambda g: torch.autograd.grad(out, inputs, g, retain_graph=True))(several)
    with pytest.raises(NotImplementedError, match="use impl='reference'"), forward_ad.dual_level():
        torch.autograd.grad(out, inputs, forward_ad.make_dual(several[0], several[1]), retain_graph=True)
    assert torch.isfinite(torch.autograd.grad(out, inputs, several[0])[0]).all()


def test_the_log_sum_exp_has_a_tangent():
    q, k, v = float32(OPS[segment_attention])
    for impl in (None, "reference"):

        def log_sum_exp(q, impl=impl):
            return ops.segment_attention(q, k, v, PLAN, return_lse=True, impl=impl)[1]

        lse, tangent = func.jvp(log_sum_exp, (q,), (q,))
        with torch.no_grad():
            step = ops.segment_attention(q * 1.001, k, v, PLAN, return_lse=True, impl="reference")[1]
        torch.testing.assert_close(tangent, (step - lse) / 0.001, rtol=0.02, atol=0.01)


def test_eight_bit_ops_refuse_transforms():
    x, table = rand(4, 16).float(), rand(1, 16).float()
    for op in (ops.quantize_fp8, ops.gelu_fp8, lambda x: ops.norm_modulate_fp8(x, table, table)):
        with pytest.raises(ValueError, match="8-bit ops have no derivatives"), torch.no_grad(), forward_ad.dual_level():
            op(forward_ad.make_dual(x, x))
        with pytest.raises(ValueError, match="8-bit ops have no derivatives"), torch.no_grad():
            func.jvp(op, (x,), (x,))


def test_what_a_layout_keeps_belongs_to_no_transform():
    """Tables made first inside a transform would be its wrappers for ever after."""
    layout = SelfLayout.qwen([Sample(2, (1, 2, 3), ((1, 1, 2),)), Sample(3, (1, 2, 2))])

    def loss(q):
        tables = [layout.joint_index("text", "cpu"), layout.modulation_rows("image", "cpu"), layout.positions("cpu")]
        tables += [*layout.rotary((4, 2, 2), "cpu"), *plan(layout).tensors("cpu"), plan(layout).tiles(2, "cpu")]
        return q.square().sum() + sum(table.sum() for table in tables)

    close(func.grad(loss)(torch.ones(3)), 2 * torch.ones(3))
    kept = [*memoised(layout).values(), *memoised(plan(layout)).values()]
    tensors = [t for value in kept for t in (value if isinstance(value, tuple) else [value]) if torch.is_tensor(t)]
    assert not [t for t in tensors if torch._C._functorch.is_functorch_wrapped_tensor(t)]
    loss(torch.ones(3))
    assert layout.joint_index("text", "cpu") is layout.joint_index("text", "cpu")


@pytest.mark.parametrize("impl", [None, pytest.param("native", marks=FUSED[1].marks)])
def test_compiled_code_sees_the_same_choice(impl):
    x, shift, scale = float32(OPS[norm_modulate])

    def tangent(x):
        return func.jvp(lambda x: ops.norm_modulate(x, shift, scale, ROWS, impl=impl), (x,), (shift[:1] * x,))[1]

    compiled = torch.compile(tangent, backend="aot_eager", fullgraph=impl is None)
    if impl is None:
        close(compiled(x), tangent(x))
        assert compiled(x).abs().max() > 0.1
    else:
        with pytest.raises(Exception, match=r"not possible here|Unsupported|Observed"):
            compiled(x)
    plain = torch.compile(
        lambda x: ops.norm_modulate(x, shift, scale, ROWS, impl=impl), backend="aot_eager", fullgraph=True
    )
    close(plain(x), ops.norm_modulate(x, shift, scale, ROWS, impl="reference"))
    torch._dynamo.reset()


# ---- models ----

GRIDS = [(1, 2, 3), (1, 1, 2)]
MATH = sdpa_kernel(SDPBackend.MATH)  # of PyTorch's own kernels for a CPU none has a forward mode


def run(model, image, text):
    return model(
        hidden_states=image, encoder_hidden_states=text, timestep=torch.tensor([0.4]), img_shapes=[GRIDS],
        return_dict=False,
    )[0]  # fmt: skip


def model_inputs():
    return rand(1, 8, 64).float(), rand(1, 5, 48).float()


def loss_of(model):
    return lambda image, text: run(model, image, text).square().mean()


def packed_loss(model, **options):
    packed = PackedQwenImage(model, **options)
    layout = SelfLayout.qwen([Sample(5, GRIDS[0], tuple(GRIDS[1:]))], zero_cond_t=bool(model.config.zero_cond_t))
    return lambda image, text: packed(image[0], text[0], torch.tensor([0.4]), layout)


@MATH
def test_a_patched_model(make_transformer):
    """The original runs, and the report says why; before and after it is the fused one."""
    stock, model = make_transformer(True), make_transformer(True)
    report = uniref_fast.patch(model)
    image, text = model_inputs()
    with torch.no_grad():
        close(run(model, image, text), run(stock, image, text))
    assert not report.fallbacks
    every = (0, 1)
    moves = tangents((image, text))
    value, tangent = func.jvp(lambda *xs: run(model, *xs), (image, text), moves)
    expected = func.jvp(lambda *xs: run(stock, *xs), (image, text), moves)[1]
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(tangent, expected, rtol=0, atol=0)
    close(value, run(stock, image, text))
    with forward_ad.dual_level():
        out = run(model, *(forward_ad.make_dual(x, t) for x, t in zip((image, text), moves, strict=True)))
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, expected)
    for found, wanted in zip(*(func.grad(loss_of(m), every)(image, text) for m in (model, stock)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    found, wanted = (
        func.hessian(lambda s, m=m: loss_of(m)(image * s, text))(torch.tensor(1.0)) for m in (model, stock)
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    reasons = " ".join(report.fallbacks)
    assert "forward-mode" in reasons and "torch.func" in reasons
    refused = sum(report.fallbacks.values())
    given = image.requires_grad_()
    (first,) = torch.autograd.grad(loss_of(model)(given, text), given, create_graph=True)
    assert sum(report.fallbacks.values()) == refused
    close(first, torch.autograd.grad(loss_of(stock)(given, text), given)[0])
    with pytest.raises(NotImplementedError, match="unpatch"):
        torch.autograd.grad(first.square().sum(), given)
    uniref_fast.unpatch(model)
    second = [
        torch.autograd.grad(
            torch.autograd.grad(loss_of(m)(given, text), given, create_graph=True)[0].square().sum(), given
        )
        for m in (model, stock)
    ]
    assert torch.equal(second[0][0], second[1][0])


@MATH
def test_a_packed_model(make_transformer):
    model = make_transformer(True).requires_grad_(False)
    image, text = model_inputs()
    moves, target = tangents((image, text)), GRIDS[0][1] * GRIDS[0][2]

    def stock(*xs):
        return run(model, *xs)[0, :target]

    value, expected = func.jvp(stock, (image, text), moves)
    for impl in (None, "reference"):
        found = func.jvp(packed_loss(model, impl=impl), (image, text), moves)
        close(found[0], value)
        close(found[1], expected)
        gradient = func.grad(lambda *xs, impl=impl: packed_loss(model, impl=impl)(*xs).square().sum(), (0, 1))(
            image, text
        )
        for one, other in zip(
            gradient, func.grad(lambda *xs: stock(*xs).square().sum(), (0, 1))(image, text), strict=True
        ):
            close(one, other)
        images = torch.stack([image, -image])
        batch = func.vmap(packed_loss(model, impl=impl), (0, None))(images, text)
        close(batch[1], packed_loss(model, impl=impl)(images[1], text))
    if native.available():
        with pytest.raises(ValueError, match="impl='reference' does"):
            func.jvp(packed_loss(model, impl="native"), (image, text), moves)
