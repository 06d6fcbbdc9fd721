"""Native token operations and their gradients against float64 oracles, at every instruction-set level."""

import math

import oracles
import pytest
import torch
import torch.nn.functional as F

from uniref_fast import native
from uniref_fast.testing import assert_within_budget

pytestmark = [
    pytest.mark.skipif(not native.available(), reason=native.reason()),
    pytest.mark.usefixtures("nan_memory", "threads"),
]

EPS = 1e-6
LEVELS = native.levels()
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=LEVELS)
def level(request):
    return request.param


@pytest.fixture(params=DTYPES, ids=["fp32", "bf16"])
def dtype(request):
    return request.param


def strided(*shape, dtype):
    """Random, with gaps between rows and between heads; the last dimension is contiguous."""
    wide = torch.randn(*(size + 1 for size in shape[:-1]), shape[-1] + 8)
    return wide.to(dtype)[tuple(slice(size) for size in shape)]


# ---- qk_norm_rope ----


def rope_oracle(x, w, cos, sin, index, dtype):
    """One stream of q or k, normalised and rotated by the angles of its joint rows."""
    return oracles.rms_norm_rope(x.to(dtype), w, cos[index.long()], sin[index.long()], EPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("texts", "images", "heads", "dim"),
    [
        (1, 1, 1, 2),  # the smallest
        (5, 0, 2, 16),  # no image tokens
        (0, 9, 3, 64),  # no text tokens
        (33, 70, 24, 128),  # the model's shape
        (3, 4, 2, 40),  # a rest behind whole vectors of 16
    ],
)
def test_qk_norm_rope(texts, images, heads, dim, dtype, level):
    total = texts + images
    txt, img = ([strided(n, heads, dim, dtype=dtype) for _ in range(3)] for n in (texts, images))
    weights = [torch.randn(dim).to(dtype), None, torch.randn(dim), torch.randn(dim).bfloat16()]  # any of both dtypes
    angle = torch.randn(total, dim // 2)
    cos, sin = angle.cos(), angle.sin()
    joint = torch.randperm(total).int()
    index = joint[:texts], joint[texts:]
    q, k, v = native.qk_norm_rope(*txt, *img, *weights, cos, sin, *index, EPS, level=level)
    assert all(x.is_contiguous() and x.dtype == dtype for x in (q, k, v))
    for out, which in ((q, 0), (k, 1)):
        for stream, rows, w in ((txt, index[0], weights[which]), (img, index[1], weights[2 + which])):
            exact = rope_oracle(stream[which], w, cos, sin, rows, torch.float64)
            eager = rope_oracle(stream[which], w, cos, sin, rows, dtype)
            assert_within_budget(out[rows.long()], eager, exact)
    assert torch.equal(v[index[0].long()], txt[2]) and torch.equal(v[index[1].long()], img[2])


def test_qk_norm_rope_errors():
    x, none, table = torch.randn(2, 1, 8), torch.randn(0, 1, 8), torch.randn(2, 4)
    empty_index = torch.zeros(0, dtype=torch.int32)

    def run(index, x=x, cos=table, weight=None):
        index = torch.tensor(index, dtype=torch.int32)
        return native.qk_norm_rope(none, none, none, x, x, x, *[weight] * 4, cos, table, empty_index, index, EPS)

    for index in ([0, 2], [-1, 0], [1, 1]):
        with pytest.raises(ValueError, match="permutation"):
            run(index)
    with pytest.raises(ValueError, match="cos has shape"):
        run([0, 1], cos=table[:1])
    with pytest.raises(ValueError, match=r"cos is .*float64"):
        run([0, 1], cos=table.double())
    with pytest.raises(ValueError, match="wq has shape"):
        run([0, 1], weight=torch.randn(4))
    with pytest.raises(ValueError, match="odd"):
        run([0, 1], x=torch.randn(2, 1, 7))


# ---- gradients of qk_norm_rope ----


def rope_gradients(dtype, grads, streams, weights, cos, sin, index):
    """Autograd through rope_oracle: of txt_q, txt_k, txt_v, img_q, img_k, img_v and the weights in the same order."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in streams]
    wide = [None if w is None else w.to(dtype).detach().requires_grad_() for w in weights]
    outs, incoming = [], []
    for s, rows in enumerate(index):
        for which in (0, 1):
            outs.append(rope_oracle(leaves[3 * s + which], wide[2 * s + which], cos, sin, rows, dtype))
            incoming.append(grads[which][rows.long()].to(dtype))
        outs.append(leaves[3 * s + 2] * 1)
        incoming.append(grads[2][rows.long()].to(dtype))
    wanted = [*leaves, *(w for w in wide if w is not None)]
    found = list(torch.autograd.grad(outs, wanted, incoming))
    return found[:6] + [None if w is None else found.pop(6) for w in wide]


@pytest.mark.parametrize(
    ("texts", "images", "heads", "dim"),
    [
        (5, 1, 1, 2),  # next to the smallest
        (5, 0, 2, 16),  # no image tokens: their weights get 0
        (0, 9, 3, 64),  # no text tokens
        (65, 129, 24, 128),  # the model's shape, one token more than whole chunks of the sums
        (3, 4, 2, 40),  # a rest behind whole vectors of 16
    ],
)
def test_qk_norm_rope_backward(texts, images, heads, dim, dtype, level):
    total = texts + images
    streams = [strided(n, heads, dim, dtype=dtype) for n in (texts, images) for _ in range(3)]
    grads = [strided(total, heads, dim, dtype=dtype) for _ in range(3)]
    weights = [torch.randn(dim).to(dtype), None, torch.randn(dim), torch.randn(dim).bfloat16()]
    angle = torch.randn(total, dim // 2)
    cos, sin = angle.cos(), angle.sin()
    joint = torch.randperm(total).int()
    index = joint[:texts], joint[texts:]
    inputs = (*grads, streams[0], streams[1], streams[3], streams[4], *weights, cos, sin, *index, EPS)
    actual = native.qk_norm_rope_backward(*inputs, level=level)
    exact = rope_gradients(torch.float64, grads, streams, weights, cos, sin, index)
    eager = rope_gradients(dtype, grads, streams, weights, cos, sin, index)
    names = ["txt_q", "txt_k", "txt_v", "img_q", "img_k", "img_v", "txt_wq", "txt_wk", "img_wq", "img_wk"]
    for i, (name, a, e, x) in enumerate(zip(names, actual, eager, exact, strict=True)):
        if x is None:
            assert a is None
            continue
        assert a.is_contiguous() and a.dtype == (dtype if i < 6 else weights[i - 6].dtype)
        assert_within_budget(a, e.to(a.dtype), x, name)
    frozen = native.qk_norm_rope_backward(*inputs, weight_grads=False, level=level)
    assert all(torch.equal(a, b) for a, b in zip(frozen[:6], actual[:6], strict=True)) and frozen[6:] == (None,) * 4


def test_qk_norm_rope_backward_threads(dtype, level, threads):
    streams = [torch.randn(n, 3, 32).to(dtype) for n in (70, 70, 300, 300)]
    grads = [torch.randn(370, 3, 32).to(dtype) for _ in range(3)]
    weights, table = torch.randn(4, 32), torch.randn(2, 370, 16)
    joint = torch.randperm(370).int()
    results = []
    for count in (1, 2, 3, 4):
        threads(count)
        results.append(
            native.qk_norm_rope_backward(*grads, *streams, *weights, *table, joint[:70], joint[70:], EPS, level=level)
        )
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))


def test_qk_norm_rope_backward_errors():
    x, none, table = torch.randn(2, 1, 8), torch.randn(0, 1, 8), torch.randn(2, 4)
    empty_index = torch.zeros(0, dtype=torch.int32)

    def run(index=(0, 1), grad=x, weight=None):
        index = torch.tensor(index, dtype=torch.int32)
        streams = (none, none, x, x)
        return native.qk_norm_rope_backward(grad, x, x, *streams, *[weight] * 4, table, table, empty_index, index, EPS)

    run()
    for index in ([0, 2], [-1, 0], [1, 1]):
        with pytest.raises(ValueError, match="permutation"):
            run(index)
    with pytest.raises(ValueError, match="dq has shape"):
        run(grad=x[:1])
    with pytest.raises(ValueError, match=r"dq is .*bfloat16"):
        run(grad=x.bfloat16())
    with pytest.raises(ValueError, match="wq has shape"):
        run(weight=torch.randn(4))


# ---- gated residual, LayerNorm, modulation ----


def modulation_oracle(x, y, gate, shift, scale, rows, dtype):
    """x + gate y, rounded to the storage dtype, and the modulated norm of that."""
    row = torch.zeros(len(x), dtype=torch.long) if rows is None else rows.long()
    stored = (x.to(dtype) + gate.to(dtype)[row] * y.to(dtype)).to(x.dtype).to(dtype)
    return norm_oracle(stored, shift, scale, row, dtype), x.to(dtype) + gate.to(dtype)[row] * y.to(dtype)


def norm_oracle(x, shift, scale, row, dtype, rms=False):
    return oracles.norm_modulate(x.to(dtype), shift, scale, row, EPS, rms)


@pytest.mark.parametrize(
    ("tokens", "channels"),
    [
        (1, 1),  # the variance is 0
        (5, 7),  # less than a vector
        (3, 200),  # a rest for vectors of 16
        (2, 203),  # a rest for all
        (40, 3072),  # the model's width
        (0, 64),  # no tokens
    ],
)
@pytest.mark.parametrize("with_rows", [False, True])
def test_norm_and_gate(tokens, channels, with_rows, dtype, level):
    x, y = (strided(tokens, channels, dtype=dtype) for _ in range(2))
    shift, scale, gate = torch.randn(4, 3 * channels).to(dtype).chunk(3, 1)  # views into a wider table
    rows = torch.randint(4, (tokens,), dtype=torch.int32) if with_rows else None
    row = torch.zeros(tokens, dtype=torch.long) if rows is None else rows.long()

    normed = native.norm_modulate(x, shift, scale, rows, EPS, level=level)
    eager = norm_oracle(x, shift, scale, row, dtype)
    assert_within_budget(normed, eager, norm_oracle(x, shift, scale, row, torch.float64), "norm_modulate")

    residual = native.gate_residual(x, y, gate, rows, level=level)
    exact = modulation_oracle(x, y, gate, shift, scale, rows, torch.float64)
    eager_pair = modulation_oracle(x, y, gate, shift, scale, rows, dtype)
    assert_within_budget(residual, eager_pair[1], exact[1], "gate_residual")

    both = native.gate_residual_norm_modulate(x, y, gate, shift, scale, rows, EPS, level=level)
    assert torch.equal(both[0], residual)
    assert torch.equal(both[1], native.norm_modulate(residual, shift, scale, rows, EPS, level=level))


@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_norm_of_large_offsets(offset, level):
    """The naive E[x^2] - E[x]^2 loses every digit here."""
    x = torch.randn(4, 3072) + offset
    shift = scale = torch.zeros(1, 3072)
    exact = norm_oracle(x, shift, scale, torch.zeros(4, dtype=torch.long), torch.float64)
    out = native.norm_modulate(x, shift, scale, None, EPS, level=level)
    assert (out - exact).abs().max() < 1e-5


def test_stored_bfloat16(level):
    """Any bit patterns: rounding to nearest even, overflow, infinities and NaN like PyTorch's own conversion."""
    x, y = torch.randint(-(2**15), 2**15, (2, 50, 1000), dtype=torch.int16).view(torch.bfloat16)
    y = y.where(y.isinf() | ~(y.abs() > 1e37), torch.ones_like(y))  # gate * y alone may not overflow: FMA would not
    near = (torch.randn(50, 1000).bfloat16() * 2.0 ** torch.randint(-9, 9, (50, 1000))).bfloat16()  # many ties
    gate = torch.tensor([[1.0, 1.25, -3.0, 0.0078125, math.inf]]).bfloat16().repeat(1, 200)
    for a, b in ((x, y), (near, near.roll(1)), (near, x)):
        expected = (a.float() + gate.float() * b.float()).bfloat16()  # the product is exact in float32
        out = native.gate_residual(a, b, gate, None, level=level)
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.nan_to_num(0, math.inf, -math.inf), expected.nan_to_num(0, math.inf, -math.inf))


def test_token_ops_threads_and_position(dtype, level, threads):
    """A row's bits do not depend on the number of threads or on its place in the pack."""
    x, y = torch.randn(101, 200).to(dtype), torch.randn(101, 200).to(dtype)
    gate, shift, scale = torch.randn(3, 1, 200).to(dtype)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(native.gate_residual_norm_modulate(x, y, gate, shift, scale, None, EPS, level=level))
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))
    alone = native.gate_residual_norm_modulate(x[77:78], y[77:78], gate, shift, scale, None, EPS, level=level)
    assert torch.equal(alone[1], results[0][1][77:78])
    options = (None, EPS, True, False, False, EPS)  # with a factor alone and a norm of the branch
    together = native.gate_residual_norm_modulate(x, y, gate, shift, scale, *options, level=level)
    alone = native.gate_residual_norm_modulate(x[77:78], y[77:78], gate, shift, scale, *options, level=level)
    assert all(torch.equal(a, b[77:78]) for a, b in zip(alone, together, strict=True))


def test_token_ops_errors():
    x, table = torch.randn(3, 8), torch.randn(2, 8)
    for rows in ([0, 1, 2], [-1, 0, 0]):
        with pytest.raises(ValueError, match="mod_index must lie within"):
            native.norm_modulate(x, table, table, torch.tensor(rows, dtype=torch.int32), EPS)
    with pytest.raises(ValueError, match="mod_index has shape"):
        native.norm_modulate(x, table, table, torch.zeros(2, dtype=torch.int32), EPS)
    with pytest.raises(ValueError, match="scale has shape"):
        native.norm_modulate(x, table, table[:1], None, EPS)
    with pytest.raises(ValueError, match=r"shift is .*bfloat16"):
        native.norm_modulate(x, table.bfloat16(), table, None, EPS)
    with pytest.raises(ValueError, match="y has shape"):
        native.gate_residual(x, x[:2], table, None)
    with pytest.raises(ValueError, match=r"expected \[N, C\]"):
        native.gate_residual(x[None], x[None], table, None)


@pytest.mark.parametrize("channels", [1, 7, 200, 3072])
def test_norm_variants(channels, dtype, level):
    """Division by the root of the mean square, and no shift."""
    x, y = (strided(9, channels, dtype=dtype) for _ in range(2))
    scale, gate = torch.randn(2, 4, channels).to(dtype)
    rows = torch.randint(4, (9,), dtype=torch.int32)
    for rms in (False, True):
        out = native.norm_modulate(x, None, scale, rows, EPS, rms, level=level)
        exact, eager = (norm_oracle(x, None, scale, rows.long(), d, rms) for d in (torch.float64, dtype))
        assert_within_budget(out, eager, exact)
        both = native.gate_residual_norm_modulate(x, y, gate, None, scale, rows, EPS, rms, level=level)
        assert torch.equal(both[1], native.norm_modulate(both[0], None, scale, rows, EPS, rms, level=level))


@pytest.mark.parametrize("channels", [7, 200, 3072])
@pytest.mark.parametrize("rms", [False, True])
def test_eager_rounding(channels, rms, dtype, level):
    """The rounding points of PyTorch in 16 bits; in float32 there is only their order."""
    x, y = (strided(40, channels, dtype=dtype) for _ in range(2))
    shift, scale, gate = torch.randn(3, 4, channels).to(dtype)
    rows = torch.randint(4, (40,), dtype=torch.int32)
    row = rows.long()
    residual = native.gate_residual(x, y, gate, rows, True, level=level)
    assert torch.equal(residual, x + gate[row] * y)
    eager = stepwise_norm(x, rms) * (1 + scale[row]) + shift[row]
    out = native.norm_modulate(x, shift, scale, rows, EPS, rms, True, level=level)
    # Statistics summed in another order move a value across a rounding boundary now and then.
    assert (out != eager).float().mean() < (0.002 if dtype == torch.bfloat16 else 1)
    assert (out - eager).abs().max() <= torch.finfo(dtype).eps * 4 * eager.abs().max()
    both = native.gate_residual_norm_modulate(x, y, gate, shift, scale, rows, EPS, rms, True, level=level)
    assert torch.equal(both[0], residual)
    assert torch.equal(both[1], native.norm_modulate(residual, shift, scale, rows, EPS, rms, True, level=level))


def stepwise_norm(x, rms):
    wide = x.float()
    if rms:
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)
    return F.layer_norm(x, x.shape[1:], eps=EPS)


def test_eager_rounding_of_rope(level):
    """x rstd, times weight, then the rotation in float32: the order of diffusers' RMSNorm and rotary embedding."""
    streams = [torch.randn(n, 3, 32).bfloat16() for n in (5, 5, 5, 30, 30, 30)]
    weights, angle = torch.randn(4, 32).bfloat16(), torch.randn(35, 16)
    joint = torch.randperm(35).int()
    cos, sin = angle.cos(), angle.sin()
    q, k, _ = native.qk_norm_rope(
        *streams, *weights, cos, sin, joint[:5], joint[5:], EPS, eager_rounding=True, level=level
    )
    for out, which in ((q, 0), (k, 1)):
        for s, rows in enumerate((joint[:5].long(), joint[5:].long())):
            normed = stepwise_norm(streams[3 * s + which], True) * weights[2 * s + which]
            eager = rope_oracle(normed.float(), None, cos, sin, rows, torch.float32).bfloat16()
            assert (out[rows] != eager).float().mean() < 0.005


def test_results_larger_than_the_caches(dtype, level):
    """Big results are stored past the caches, on another path than small ones: the same bits."""
    tokens, channels = (5000, 512) if dtype == torch.float32 else (9000, 512)
    x, y = (torch.randn(tokens, channels).to(dtype) for _ in range(2))
    gate, shift, scale = torch.randn(3, 2, channels).to(dtype)
    rows = torch.randint(2, (tokens,), dtype=torch.int32)
    some = slice(tokens - 50, tokens)
    big = native.gate_residual_norm_modulate(x, y, gate, shift, scale, rows, EPS, level=level)
    small = native.gate_residual_norm_modulate(x[some], y[some], gate, shift, scale, rows[some], EPS, level=level)
    assert all(torch.equal(a[some], b) for a, b in zip(big, small, strict=True))
    assert not any(a.isnan().any() for a in big)
    args = (gate, scale)
    big = native.gate_residual_norm_modulate_backward(x, y, x, y, *args, rows, EPS, level=level)
    parts = (x[some], y[some], x[some], y[some])
    small = native.gate_residual_norm_modulate_backward(*parts, *args, rows[some], EPS, level=level)
    assert all(torch.equal(a[some], b) for a, b in zip(big[:2], small[:2], strict=True))

    q, v = (t.view(-1, 8, 64) for t in (x, y))
    none, table, index = q[:0], torch.randn(2, len(q), 32), torch.arange(len(q), dtype=torch.int32)
    weights = torch.randn(4, 64)
    big = native.qk_norm_rope(*[none] * 3, q, v, q, *weights, *table, index[:0], index, EPS, level=level)
    few = index[:50]
    cut = [t[some] for t in (q, v, q)]
    table = table[:, some]
    small = native.qk_norm_rope(*[none] * 3, *cut, *weights, *table, index[:0], few, EPS, level=level)
    assert all(torch.equal(a[some], b) for a, b in zip(big, small, strict=True))


# ---- gradients of the modulation ----


def modulation_gradients(dtype, grad_x, grad_normed, x, y, gate, scale, rows, rms):
    """Autograd through `stored = x + gate y` (given, as x) and its modulated norm: dx, dy, dgate, dshift, dscale.

    The gradients of x_out are those of the norm plus grad_x, then passed on to x and gate y, as the chain rule says;
    None stands for the part that is missing.
    """
    leaves = [t.to(dtype).detach().requires_grad_() for t in (x if x is not None else grad_x, scale, scale)]
    stored, factor, shift = leaves
    row = torch.zeros(len(stored), dtype=torch.long) if rows is None else rows.long()
    g, dshift, dscale = torch.zeros_like(stored), None, None
    if grad_normed is not None:
        out = norm_oracle(stored, shift, factor, row, dtype, rms)
        g, dscale, dshift = torch.autograd.grad(out, (stored, factor, shift), grad_normed.to(dtype))
    if gate is None:
        return g, None, None, dshift, dscale
    g = g + grad_x.to(dtype)
    branch, gates = y.to(dtype).detach().requires_grad_(), gate.to(dtype).detach().requires_grad_()
    dy, dgate = torch.autograd.grad(gates[row] * branch, (branch, gates), g)
    return g, dy, dgate, dshift, dscale


def check_gradients(actual, exact, eager, dtype):
    for name, a, x, e in zip(("dx", "dy", "dgate", "dshift", "dscale"), actual, exact, eager, strict=True):
        if a is not None:
            assert a.is_contiguous() and a.dtype == dtype
            assert_within_budget(a, e, x, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "channels"),
    [
        (5, 7),  # less than a vector
        (3, 200),  # a rest for vectors of 16
        (131, 203),  # a rest for all; more than two chunks of tokens
        (300, 64),  # rows of several chunks
        (70, 3072),  # the model's width
        (0, 64),  # no tokens: all row gradients are 0
    ],
)
@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize("rms", [False, True])
def test_modulation_backward(tokens, channels, with_rows, rms, dtype, level):
    grad_x, grad, x, y = (strided(tokens, channels, dtype=dtype) for _ in range(4))
    scale, gate = torch.randn(4, 2 * channels).to(dtype).chunk(2, 1)
    rows = torch.randint(3, (tokens,), dtype=torch.int32) if with_rows else None  # nobody has row 3

    def reference(*args):
        return (modulation_gradients(d, *args, rows, rms) for d in (torch.float64, dtype))

    dx, dshift, dscale = native.norm_modulate_backward(grad, x, scale, rows, EPS, rms, level=level)
    check_gradients((dx, None, None, dshift, dscale), *reference(None, grad, x, None, None, scale), dtype)
    dy, dgate = native.gate_residual_backward(grad_x, y, gate, rows, level=level)
    check_gradients((None, dy, dgate, None, None), *reference(grad_x, None, None, y, gate, scale), dtype)
    both = native.gate_residual_norm_modulate_backward(grad_x, grad, x, y, gate, scale, rows, EPS, rms, level=level)
    check_gradients(both, *reference(grad_x, grad, x, y, gate, scale), dtype)
    for row_gradient in (dgate, dshift, dscale, *both[2:]):
        assert (row_gradient[3] == 0).all()

    frozen = native.norm_modulate_backward(grad, x, scale, rows, EPS, rms, False, level=level)
    assert torch.equal(frozen[0], dx) and frozen[1:] == (None, None)
    frozen = native.gate_residual_backward(grad_x, y, gate, rows, False, level=level)
    assert torch.equal(frozen[0], dy) and frozen[1] is None
    frozen = native.gate_residual_norm_modulate_backward(
        grad_x, grad, x, y, gate, scale, rows, EPS, rms, False, level=level
    )
    assert all(torch.equal(a, b) for a, b in zip(frozen[:2], both[:2], strict=True)) and frozen[2:] == (None,) * 3


def test_modulation_backward_packing(dtype, level, threads):
    """A row's gradient has the same bits whatever stands between its tokens, and for any number of threads."""
    grad_x, grad, x, y = (torch.randn(500, 40).to(dtype) for _ in range(4))
    gate, scale = torch.randn(2, 3, 40).to(dtype)
    rows = torch.randint(3, (500,), dtype=torch.int32)
    results = []
    for count in (1, 2, 3, 4):
        threads(count)
        tensors = (grad_x, grad, x, y, gate, scale)
        results.append(native.gate_residual_norm_modulate_backward(*tensors, rows, EPS, level=level))
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))
    mine = rows == 1
    tensors = [t[mine] for t in (grad_x, grad, x, y)] + [t[1:2] for t in (gate, scale)]
    alone = native.gate_residual_norm_modulate_backward(*tensors, None, EPS, level=level)
    assert all(torch.equal(a, b[mine]) for a, b in zip(alone[:2], results[0][:2], strict=True))
    assert all(torch.equal(a[0], b[1]) for a, b in zip(alone[2:], results[0][2:], strict=True))


def test_every_token_its_own_row(dtype, level):
    grad, y = torch.randn(2, 300, 24).to(dtype)
    gate, rows = torch.randn(300, 24).to(dtype), torch.randperm(300).int()
    dgate = native.gate_residual_backward(grad, y, gate, rows, level=level)[1]
    assert torch.equal(dgate[rows.long()], (grad.float() * y.float()).to(dtype))


def test_modulation_backward_errors():
    x, table = torch.randn(3, 8), torch.randn(2, 8)
    for rows in ([0, 1, 2], [-1, 0, 0]):
        rows = torch.tensor(rows, dtype=torch.int32)
        with pytest.raises(ValueError, match="mod_index must lie within"):
            native.norm_modulate_backward(x, x, table, rows, EPS)
        with pytest.raises(ValueError, match="mod_index must lie within"):
            native.gate_residual_backward(x, x, table, rows)
    with pytest.raises(ValueError, match="mod_index must lie within"):
        native.norm_modulate_backward(x, x, table[:0], None, EPS)
    with pytest.raises(ValueError, match="x has shape"):
        native.norm_modulate_backward(x, x[:2], table, None, EPS)
    with pytest.raises(ValueError, match=r"scale is .*bfloat16"):
        native.norm_modulate_backward(x, x, table.bfloat16(), None, EPS)
    with pytest.raises(ValueError, match="grad_normed has stride"):
        native.norm_modulate_backward(torch.randn(3, 16)[:, ::2], x, table, None, EPS)


# ---- gelu ----


def tanh_gelu(x, grad):
    """Return GELU and its gradient, by PyTorch."""
    x = x.detach().requires_grad_()
    out = F.gelu(x, approximate="tanh")
    return out.detach(), torch.autograd.grad(out, x, grad)[0]


@pytest.mark.parametrize("size", [0, 1, 21, 8192 + 37])
def test_gelu(size, dtype, level):
    x, grad = torch.randn(2, size).to(dtype) * 4
    got = native.gelu(x, level=level), native.gelu_backward(grad, x, level=level)
    eager, exact = tanh_gelu(x, grad), tanh_gelu(x.double(), grad.double())
    for ours, theirs, oracle in zip(got, eager, exact, strict=True):
        assert ours.dtype == dtype and ours.shape == x.shape
        assert_within_budget(ours, theirs, oracle)


def test_gelu_of_extreme_values(dtype, level):
    x = torch.tensor([0.0, -0.0, 9.0, -9.0, -60.0, -100.0, 1e4, -1e4, 1e19, -1e19, 3e38, -3e38, 1e-40]).to(dtype)
    out, slope = native.gelu(x, level=level), native.gelu_backward(torch.ones_like(x), x, level=level)
    torch.testing.assert_close(out, F.gelu(x, approximate="tanh"), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(slope[6:12], (x[6:12] > 0).to(dtype), rtol=0, atol=0)
    assert native.gelu(torch.tensor([math.nan, math.inf]).to(dtype), level=level).isnan().tolist() == [True, False]


def test_gelu_threads_and_position(dtype, level, threads):
    """An element's bits do not depend on the number of threads, on its place or on how many others there are."""
    x, grad = torch.randn(2, 3 * 8192 + 5).to(dtype)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append((native.gelu(x, level=level), native.gelu_backward(grad, x, level=level)))
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))
    for start, end in ((0, 1), (3, 40), (8190, 8200), (3 * 8192, 3 * 8192 + 5)):
        assert torch.equal(native.gelu(x[start:end], level=level), results[0][0][start:end])
        assert torch.equal(native.gelu_backward(grad[start:end], x[start:end], level=level), results[0][1][start:end])


def test_gelu_of_strided_inputs(dtype):
    x, grad = torch.randn(2, 5, 12).to(dtype)
    assert torch.equal(native.gelu(x.t()), native.gelu(x).t())
    assert torch.equal(native.gelu_backward(grad.t(), x.t()), native.gelu_backward(grad, x).t())


def test_gelu_errors():
    with pytest.raises(ValueError, match=r"x is torch.float64 on cpu"):
        native.gelu(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="grad has shape"):
        native.gelu_backward(torch.zeros(2), torch.zeros(3))
