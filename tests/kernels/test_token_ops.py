"""Triton kernels over tokens against float64 oracles: interpreted without a GPU, compiled with one."""

import gc
import importlib.util
from typing import NamedTuple

import oracles
import pytest
import torch
import torch.nn.functional as F

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from uniref_fast.kernels import fp8
from uniref_fast.kernels import norm_modulate as norm
from uniref_fast.kernels import norm_modulate_backward as norm_backward
from uniref_fast.kernels import qk_norm_rope as rope
from uniref_fast.kernels import qk_norm_rope_backward as rope_backward
from uniref_fast.testing import assert_within_budget

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
# The interpreter truncates casts to bfloat16.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=on_gpu)]
LOW_DTYPES = DTYPES[1:]
EPS = 1e-6
TILE = 4

pytestmark = pytest.mark.usefixtures("nan_memory")


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def small_tiles(monkeypatch):
    """Few tokens fill several tiles of a row, and several blocks of tiles."""
    monkeypatch.setattr(norm_backward, "TOKENS", TILE)
    monkeypatch.setattr(norm_backward, "BLOCK_TILES", 2)
    monkeypatch.setattr(norm_backward, "BLOCK_CHANNELS", 16)


def check_gradients(names, actual, formula, inputs, grads):
    """actual within the budget, in the dtype of its input, contiguous."""
    oracle = oracles.gradients(formula, inputs, grads, torch.float64)
    # Eager computes in float32 and rounds once: a tighter budget than low-precision arithmetic would give.
    eager = oracles.gradients(formula, inputs, grads, torch.float32)
    for name, result, x, rounded, exact in zip(names, actual, inputs, eager, oracle, strict=True):
        assert (result is None) == (x is None), name
        if result is not None:
            assert result.dtype == x.dtype and result.is_contiguous(), name
            assert_within_budget(result, rounded.to(result.dtype), exact, name)


def rounding_share(actual, eager, term):
    """Share of equal values. The others are a rounding apart: one of the result, or of the term before the last sum.

    A value of the norm that falls to the other side moves its product by up to two roundings.
    """
    assert actual.dtype == eager.dtype
    allowed = torch.finfo(eager.dtype).eps * (eager.double().abs() + 2 * term.double().abs())
    far = (actual.double() - eager.double()).abs() > allowed
    assert not far.any(), f"{int(far.sum())} of {far.numel()} values are more than a rounding apart"
    return (actual == eager).double().mean().item()


# --- qk_norm_rope


def rope_formula(streams, weights, cos, sin, indices):
    """Joint q, k, v of both streams, computed in their dtype; q or k without a weight is not normalised."""
    order, joint = torch.cat(indices).long(), []
    for i in range(3):
        parts = [stream[i] for stream in streams]
        if i < 2:
            parts = [
                oracles.rms_norm_rope(x, weight, cos[index.long()], sin[index.long()], EPS)
                for x, weight, index in zip(parts, weights[i::2], indices, strict=True)
            ]
        both = torch.cat(parts)
        joint.append(torch.zeros_like(both).index_copy(0, order, both))
    return joint


def rope_tables(num_txt, num_img, head_dim, device):
    """cos, sin and the indices of any joint order, as of a pack."""
    angles = torch.randn(num_txt + num_img, head_dim // 2, device=device) * 10
    order = torch.randperm(num_txt + num_img, device=device).int()
    return angles.cos(), angles.sin(), order[:num_txt].contiguous(), order[num_txt:].contiguous()


ROPE_INPUTS = (
    *("txt_q", "txt_k", "txt_v", "img_q", "img_k", "img_v"),
    *("txt_wq", "txt_wk", "img_wq", "img_wk"),
)  # fmt: skip


def check_rope(txt, img, weights, device):
    cos, sin, *indices = rope_tables(len(txt[0]), len(img[0]), txt[0].shape[2], device)

    def formula(*leaves):
        return rope_formula((leaves[:3], leaves[3:6]), leaves[6:], cos, sin, indices)

    inputs = (*txt, *img, *weights)
    actual = rope.qk_norm_rope(*inputs, cos, sin, *indices, EPS)
    eager, oracle = (formula(*(None if x is None else x.to(t) for x in inputs)) for t in (torch.float, torch.double))
    for name, result, rounded, exact in zip("qkv", actual, eager, oracle, strict=True):
        assert result.is_contiguous() and result.dtype == txt[0].dtype
        assert_within_budget(result, rounded.to(result.dtype), exact, name)
    assert torch.equal(actual[2].double(), oracle[2]), "v is a copy"

    grads = torch.randn(len(cos), *txt[0].shape[1:], 3, device=device).to(txt[0].dtype).movedim(-1, 0)
    grads = [grads[0].contiguous(), *(g.transpose(0, 1).contiguous().transpose(0, 1) for g in grads[1:])]  # any strides
    args = (*grads, txt[0], txt[1], img[0], img[1], *weights, cos, sin, *indices, EPS)
    actual = rope_backward.qk_norm_rope_backward(*args)
    check_gradients(ROPE_INPUTS, actual, formula, inputs, grads)
    frozen = rope_backward.qk_norm_rope_backward(*args, weight_grads=False)
    assert frozen[6:] == (None,) * 4
    check_gradients(ROPE_INPUTS[:6], frozen[:6], lambda *x: formula(*x, *weights), inputs[:6], grads)


# Streams without a row (no text; no image), one token, neither heads nor rows a power of two, and more tokens than the
# backward takes in one program, or exactly as many.
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_txt", "num_img", "heads", "head_dim"),
    [
        (0, 3, 2, 16),
        (1, 0, 1, 32),
        (5, 7, 3, 64),
        (8, 9, 2, 16),
        (2, 3, 24, 128),
        pytest.param(300, 2049, 24, 128, marks=on_gpu),
        pytest.param(30, 70, 40, 128, marks=on_gpu),
        (0, 0, 2, 16),
    ],
)
def test_qk_norm_rope(num_txt, num_img, heads, head_dim, dtype, device):
    txt = torch.randn(3, num_txt, heads, head_dim, device=device).to(dtype).unbind(0)
    img = torch.randn(3, num_img, heads, head_dim, device=device).to(dtype).unbind(0)
    weights = [(1 + 0.1 * torch.randn(head_dim, device=device)).to(dtype) for _ in range(4)]
    check_rope(txt, img, weights, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_qk_norm_rope_strided_without_some_weights(dtype, device):
    txt = torch.randn(4, 3, 2, 16, device=device).to(dtype).unbind(1)  # slices of one projection
    img = torch.randn(3, 2, 9, 16, device=device).to(dtype).transpose(1, 2).unbind(0)  # [H, N, D] memory
    weight = torch.rand(16, device=device)  # float32 weights beside a low-precision stream
    check_rope(txt, img, [None, weight, weight, None], device)
    check_rope(txt, img, [None] * 4, device)


def eager_norm_rope(x, weight, cos, sin):
    """Eager PyTorch with its rounding points: after the norm, after the weight, after a rotation in float32."""
    if weight is not None:
        x = (x.float() * (x.float().square().mean(-1, keepdim=True) + EPS).rsqrt()).to(x.dtype) * weight
    x0, x1 = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[:, None], sin[:, None]
    return torch.stack([x0 * c - x1 * s, x0 * s + x1 * c], -1).flatten(-2).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_qk_norm_rope_eager_rounding(dtype, device):
    x = torch.randn(3, 12, 4, 64, device=device).to(dtype)
    empty, index = x[0, :0], torch.arange(12, device=device, dtype=torch.int32)
    cos, sin, *_ = rope_tables(12, 0, 64, device)
    weight = torch.rand(64, device=device).to(dtype)

    def run(w, eager_rounding):
        streams = (*x, empty, empty, empty)
        return rope.qk_norm_rope(*streams, w, w, w, w, cos, sin, index, index[:0], EPS, eager_rounding)

    q, k, v = run(None, True)  # without a reduction there is one order only
    assert torch.equal(q, eager_norm_rope(x[0], None, cos, sin))
    assert torch.equal(k, eager_norm_rope(x[1], None, cos, sin)) and torch.equal(v, x[2])
    if dtype != torch.float32:
        expected = eager_norm_rope(x[0], weight, cos, sin)
        # A rotation adds two values of any sizes: measure with the larger of the pair.
        pair = expected.unflatten(-1, (-1, 2)).abs().amax(-1, keepdim=True).expand(-1, -1, -1, 2).flatten(-2)
        share, without = (rounding_share(run(weight, eager)[0], expected, pair) for eager in (True, False))
        assert share > 0.99 and without < share - 0.05, (share, without)


# --- norm_modulate, gate_residual


class Modulated(NamedTuple):
    """Inputs of the fused op."""

    x: torch.Tensor
    y: torch.Tensor
    gate: torch.Tensor
    shift: torch.Tensor | None
    scale: torch.Tensor

    def __call__(self, rows, rms=False, residual=True):
        """x_out and normed in plain PyTorch, in the dtype of the inputs; rows int64."""
        x, y, gate, shift, scale = self
        x_out = x + gate[rows] * y if residual else x
        return x_out, oracles.norm_modulate(x_out, shift, scale, rows, EPS, rms)

    def to(self, dtype):
        return Modulated(*(None if t is None else t.to(dtype) for t in self))


def modulated(num_tokens, channels, num_rows, dtype, device):
    x, y = (3 * torch.randn(2, num_tokens, channels, device=device) + 1).to(dtype)
    shift, scale, gate = torch.randn(num_rows, 3 * channels, device=device).to(dtype).chunk(3, 1)  # of one projection
    return Modulated(x, y, gate, shift, scale)


def row_zero(num_tokens, device):
    return torch.zeros(num_tokens, dtype=torch.long, device=device)


def check_forward(inputs, rows, rms=False):
    x, y, gate, shift, scale = inputs
    index = row_zero(len(x), x.device) if rows is None else rows.long()
    x_out, normed = norm.gate_residual_norm_modulate(x, y, gate, shift, scale, rows, EPS, rms)
    eager, oracle = (inputs.to(t)(index, rms)[0] for t in (torch.float32, torch.float64))
    assert_within_budget(x_out, eager.to(x.dtype), oracle, "x_out")
    # The norm is taken of x_out as it was rounded.
    eager, oracle = (
        inputs._replace(x=x_out).to(t)(index, rms, residual=False)[1] for t in (torch.float32, torch.float64)
    )
    assert_within_budget(normed, eager.to(x.dtype), oracle, "normed")
    assert torch.equal(norm.gate_residual(x, y, gate, rows), x_out)
    assert torch.equal(norm.norm_modulate(x_out, shift, scale, rows, EPS, rms), normed)
    return x_out


def check_backward(inputs, rows, rms=False):
    x_out, y, gate, _, scale = inputs  # x plays the residual's result, whatever it came from
    index = row_zero(len(y), y.device) if rows is None else rows.long()
    g_x_out, g_normed = torch.randn(len(y), 2, y.shape[1], device=y.device).to(y.dtype).unbind(1)  # strided

    def normed(x_out, shift, scale):
        return (Modulated(x_out, None, None, shift, scale)(index, rms, residual=False)[1],)

    def residual(y, gate):
        return (gate[index] * y,)

    def both(x, y, gate, shift, scale):
        # x_out is given, x such that it results; the forward must not round on the way.
        lost = x_out.to(x.dtype) - (x + gate[index] * y).detach()
        x_again = x + gate[index] * y + lost
        return x_again, *normed(x_again, shift, scale)

    shift = torch.zeros_like(scale)  # it takes no part in its gradient
    args = (g_x_out, g_normed, x_out, y, gate, scale, rows, EPS, rms)
    fused = norm_backward.gate_residual_norm_modulate_backward(*args)
    inputs = Modulated(x_out, y, gate, shift, scale)
    check_gradients(("dx", "dy", "dgate", "dshift", "dscale"), fused, both, inputs, (g_x_out, g_normed))
    args_norm = (g_normed, x_out, scale, rows, EPS, rms)
    dx, dshift, dscale = norm_backward.norm_modulate_backward(*args_norm)
    check_gradients(("dx", "dshift", "dscale"), (dx, dshift, dscale), normed, (x_out, shift, scale), (g_normed,))
    dy, dgate = norm_backward.gate_residual_backward(g_x_out, y, gate, rows)
    check_gradients(("dy", "dgate"), (dy, dgate), residual, (y, gate), (g_x_out,))
    unused = torch.ones(len(gate), dtype=torch.bool, device=y.device).index_fill(0, index, False)
    for table in (*fused[2:], dshift, dscale, dgate):
        assert not table[unused].any(), "a row that no token uses"

    # Frozen modulation.
    frozen = norm_backward.gate_residual_norm_modulate_backward(*args, row_grads=False)
    assert frozen[2:] == (None,) * 3
    check_gradients(
        ("dx", "dy"), frozen[:2], lambda x, y: both(x, y, *(t.to(x.dtype) for t in inputs[2:])), inputs[:2],
        (g_x_out, g_normed),
    )  # fmt: skip
    dx, *none = norm_backward.norm_modulate_backward(*args_norm, row_grads=False)
    assert none == [None, None]
    check_gradients(("dx",), (dx,), lambda x: normed(x, shift.to(x.dtype), scale.to(x.dtype)), (x_out,), (g_normed,))
    dy, none = norm_backward.gate_residual_backward(g_x_out, y, gate, rows, row_grads=False)
    assert none is None
    check_gradients(("dy",), (dy,), lambda y: residual(y, gate.to(y.dtype)), (y,), (g_x_out,))


# One channel (variance 0), an odd size (rows that no vector load can be aligned to), powers of two and not, the real
# one. One row, and more segments than rows.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "channels"), [(3, 1), (4, 77), (1, 64), (7, 200), (2, 3072), pytest.param(2049, 3072, marks=on_gpu)]
)
def test_norm_modulate_and_gate_residual(num_tokens, channels, with_rows, dtype, device):
    inputs = modulated(num_tokens, channels, 9, dtype, device)
    check_forward(inputs, torch.randint(9, (num_tokens,), device=device).int() if with_rows else None)


# The same sizes, and beyond the channels that three sums of a tile leave room to prefetch for.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "channels"),
    [
        (3, 1),
        (4, 77),
        (1, 64),
        (7, 200),
        pytest.param(2049, 3072, marks=on_gpu),
        pytest.param(600, 6144, marks=on_gpu),
    ],
)
def test_backward(num_tokens, channels, dtype, device):
    if channels == 1 and device == "cuda" and dtype == torch.float32:
        # The compiler fuses a product into the subtraction of the mean: the difference is a rounding instead of 0, and
        # 1 / sqrt(eps) times that rounding reaches dx.
        pytest.skip("without variance, dx is a rounding error times 1 / sqrt(eps)")
    inputs = modulated(num_tokens, channels, 3, dtype, device)
    check_backward(inputs, torch.randint(3, (num_tokens,), device=device).int())


ROWS = {
    "none": (TILE + 1, 1, None),
    "none_of_three": (5, 3, None),  # all tokens take row 0, the other rows are unused
    "sorted": (4 * TILE, 4, lambda n: torch.arange(n) // (2 * TILE + 1)),  # three tiles and two, the last not full
    "full_tiles": (2 * TILE, 2, lambda n: torch.arange(n) // TILE),
    "shuffled": (20, 3, lambda n: torch.randint(3, (n,))),
    "gaps": (9, 9, lambda n: 1 + 3 * torch.randint(3, (n,))),  # rows 0, 2, 3, 5, 6, 8 unused
    "more_rows_than_tokens": (5, 11, lambda n: torch.tensor([10, 0, 7, 10, 6])),
    "runs_of_one": (11, 2, lambda n: torch.arange(n) % 2),
    "a_row_each": (9, 9, lambda n: torch.randperm(n)),
    "one_token": (1, 2, lambda n: torch.ones(n)),
}


@pytest.mark.slow
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_backward_rows(name, rms, device, small_tiles):
    num_tokens, num_rows, make = ROWS[name]
    rows = None if make is None else make(num_tokens).int().to(device)
    check_backward(modulated(num_tokens, 12, num_rows, torch.float16 if rms else torch.float32, device), rows, rms)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_and_no_shift(dtype, device):
    inputs = modulated(5, 77, 3, dtype, device)
    rows = torch.tensor([2, 0, 2, 1, 0], dtype=torch.int32, device=device)
    check_forward(inputs, rows, rms=True)
    check_forward(inputs._replace(shift=None), rows, rms=True)
    check_forward(inputs._replace(shift=None), rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_modulate_strided_with_float32_modulation(dtype, device):
    x, y = torch.randn(5, 2, 48, device=device).to(dtype).unbind(1)
    shift, scale, gate = torch.randn(3, 1, 48, device=device)
    check_forward(Modulated(x, y, gate, shift, scale), None)
    tables = torch.randn(2, 5 * 48, device=device).to(dtype).chunk(5, 1)
    check_backward(Modulated(x, y, tables[4], tables[1], tables[2]), None)


def test_norm_modulate_without_tokens(device):
    x, table = torch.randn(0, 8, device=device), torch.randn(2, 8, device=device)
    rows = torch.zeros(0, dtype=torch.int32, device=device)
    assert norm.norm_modulate(x, table, table, None, EPS).shape == (0, 8)
    assert norm.gate_residual(x, x, table, None).shape == (0, 8)
    for given in (None, rows):
        dx, dy, *tables = norm_backward.gate_residual_norm_modulate_backward(x, x, x, x, table, table, given, EPS)
        assert dx.shape == dy.shape == (0, 8)
        assert all(torch.equal(t, torch.zeros(2, 8, device=device)) for t in tables)
        assert norm_backward.gate_residual_backward(x, x, table, given, row_grads=False)[1] is None


@pytest.mark.parametrize("dtype", [torch.float32, DTYPES[-1]])
def test_row_gradients_are_bit_identical_alone_and_in_any_pack(dtype, device, small_tiles):
    lengths = [3 * TILE + 3, 1, 5]  # of the samples: tiles of a row begin anywhere among the tokens of a pack
    whose = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    streams = torch.randn(4, len(whose), 24, device=device).to(dtype)
    tables = torch.randn(2, len(lengths), 24, device=device).to(dtype)

    def run(tokens, place):
        """Gradients of some tokens; sample s has row place[s]."""
        gate, scale = tables.new_zeros(2, max(place) + 2, 24).index_copy(1, torch.tensor(place, device=device), tables)
        rows = torch.tensor(place, device=device, dtype=torch.int32)[whose[tokens]]
        return norm_backward.gate_residual_norm_modulate_backward(*streams[:, tokens], gate, scale, rows, EPS)

    own = [(whose == sample).nonzero()[:, 0] for sample in range(len(lengths))]
    alone = [run(tokens, [0, 1, 2]) for tokens in own]
    # In order, other samples first, and token by token in turns; the order within a sample stays.
    turns = torch.argsort(torch.cat([torch.arange(n) for n in lengths]), stable=True).to(device)
    for tokens in (torch.arange(len(whose), device=device), torch.cat(own[::-1]), turns):
        packed = run(tokens, [4, 0, 2])
        for sample, row in enumerate([4, 0, 2]):
            for name, a, b in zip(("dgate", "dshift", "dscale"), alone[sample][2:], packed[2:], strict=True):
                assert torch.equal(a[sample], b[row]), f"{name} of sample {sample}"
            for a, b in zip(alone[sample][:2], packed[:2], strict=True):
                assert torch.equal(a, b[whose[tokens] == sample])
    assert all(torch.equal(a, b) for a, b in zip(packed, run(tokens, [4, 0, 2]), strict=True)), "two runs differ"


@pytest.mark.parametrize("weights", [True, False])
def test_qk_norm_rope_backward_is_deterministic(weights, device):
    txt, img, joint = (torch.randn(n, 2, 16, device=device) for n in (3, 10, 13))
    args = (joint, joint, joint, txt, txt, img, img, *torch.rand(4, 16, device=device))
    tables = rope_tables(3, 10, 16, device)
    first, second = (rope_backward.qk_norm_rope_backward(*args, *tables, EPS, weights) for _ in range(2))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_table_of_row_tiles_lives_as_long_as_its_rows(device):
    rows = torch.tensor([1, 0, 1], dtype=torch.int32, device=device)
    gc.collect()
    before = len(norm_backward._tables)
    tiles = norm_backward.row_tiles(rows, 2)
    assert norm_backward.row_tiles(rows, 2) is tiles and tiles.order.tolist() == [1, 0, 2]
    assert tiles.tiles.tolist() == [[0, 1, 0], [1, 2, 1]] and tiles.ptr.tolist() == [0, 1, 2]
    # Other values, or another number of rows, make another table.
    rows[1] = 1
    assert norm_backward.row_tiles(rows, 2).order.tolist() == [0, 1, 2]
    assert norm_backward.row_tiles(rows, 3).ptr.tolist() == [0, 0, 1, 1]
    assert len(norm_backward._tables) == before + 1
    del rows
    gc.collect()
    assert len(norm_backward._tables) == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_residual_eager_rounding(dtype, device):
    inputs = modulated(9, 77, 4, dtype, device)
    rows = torch.randint(4, (9,), device=device).int()
    expected = inputs.x + inputs.gate[rows.long()] * inputs.y
    assert torch.equal(norm.gate_residual(*inputs[:3], rows, eager_rounding=True), expected)
    fused, _ = norm.gate_residual_norm_modulate(*inputs, rows, EPS, eager_rounding=True)
    assert torch.equal(fused, expected)
    if dtype != torch.float32:
        assert not torch.equal(norm.gate_residual(*inputs[:3], rows), expected)


@pytest.mark.parametrize("dtype", LOW_DTYPES)
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_norm_modulate_eager_rounding(shifted, rms, dtype, device):
    inputs = modulated(10, 500, 4, dtype, device)
    inputs = inputs if shifted else inputs._replace(shift=None)
    rows = torch.randint(4, (10,), device=device).int()
    x_out, expected = inputs(rows.long(), rms)
    _, product = inputs._replace(shift=None)(rows.long(), rms)
    shares = []
    for eager in (True, False):
        out = norm.norm_modulate(x_out, inputs.shift, inputs.scale, rows, EPS, rms, eager)
        shares.append(rounding_share(out, expected, product))
    assert shares[0] > 0.99 and shares[1] < shares[0] - 0.05, shares
    fused = norm.gate_residual_norm_modulate(*inputs, rows, EPS, rms, True)
    assert torch.equal(fused[0], x_out) and rounding_share(fused[1], expected, product) > 0.99


# --- fp8


SMALLEST_SCALE = 2.0**-100


def steps(values):
    """e4m3 values as integers that neighbours differ by one in."""
    bits = values.view(torch.uint8).int()
    return torch.where(bits > 127, 128 - bits, bits)


def check_quantised(values, row_scale, oracle):
    """Compare with the output before quantisation in float64."""
    assert values.dtype == torch.float8_e4m3fn and values.is_contiguous() and row_scale.dtype == torch.float32
    largest = oracle.abs().amax(1)
    torch.testing.assert_close(row_scale.double(), (largest / 448).clamp(min=SMALLEST_SCALE), rtol=1e-5, atol=0)
    expected = (oracle / row_scale[:, None]).float().to(torch.float8_e4m3fn)
    difference = (steps(values) - steps(expected)).abs()
    # Only values that float32 puts on the other side of a tie differ.
    assert difference.max() <= 1 and (difference > 0).sum() <= 1 + 0.001 * difference.numel()
    dequantised = values.float() * row_scale[:, None]
    assert_within_budget(dequantised, expected.float() * row_scale[:, None], oracle)


FP8_SIZES = [(3, 1), (4, 77), (5, 256), pytest.param(2049, 3072, marks=on_gpu), pytest.param(70, 12288, marks=on_gpu)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "channels"), FP8_SIZES)
@pytest.mark.parametrize("rms", [False, True])
def test_norm_modulate_fp8(num_tokens, channels, rms, dtype, device, rounded_fp8_casts):
    inputs = modulated(num_tokens, channels, 3, dtype, device)
    for rows in (None, torch.randint(3, (num_tokens,), device=device).int()):
        index = row_zero(num_tokens, device) if rows is None else rows.long()
        for given in (inputs, inputs._replace(shift=None)):
            _, oracle = given.to(torch.float64)(index, rms, residual=False)
            check_quantised(*fp8.norm_modulate_fp8(given.x, given.shift, given.scale, rows, EPS, rms), oracle)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "channels"), FP8_SIZES)
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_gelu_fp8(num_tokens, channels, dtype, device, rounded_fp8_casts):
    x = (4 * torch.randn(num_tokens, 2, channels, device=device)).to(dtype)[:, 1]  # strided rows
    x[0] = 0  # a row of zeros has the smallest scale
    x[1, 0] = 1000.0  # u is in the thousands: the tanh is 1
    values, row_scale = fp8.gelu_fp8(x)
    check_quantised(values, row_scale, F.gelu(x.double(), approximate="tanh"))
    assert row_scale[0] == SMALLEST_SCALE and not values[0].float().any()


def test_fp8_is_the_cast_of_pytorch(device, rounded_fp8_casts):
    # Modulation by -1 leaves the shift, and a row scale that is a power of two divides it exactly: the cast is left.
    shift = torch.cat([torch.linspace(-1, 1, 4095, device=device), torch.ones(1, device=device)])
    shift = torch.stack([shift * 448 / 2**7, shift**5 * 448 * 2**20])
    x, rows = torch.randn(2, 4096, device=device), torch.arange(2, dtype=torch.int32, device=device)
    values, row_scale = fp8.norm_modulate_fp8(x, shift, -torch.ones_like(shift), rows, EPS)
    assert row_scale.tolist() == [2.0**-7, 2.0**20]
    assert torch.equal(values.float(), (shift / row_scale[:, None]).to(torch.float8_e4m3fn).float())


def test_fp8_tiny_and_no_values(device, rounded_fp8_casts):
    x = torch.full((2, 16), 1e-27, device=device)
    x[1] = 1e-38  # the inverse of max / 448 would be infinite, and NaN with a zero
    x[:, 3] = 0
    rows = torch.arange(2, dtype=torch.int32, device=device)
    values, row_scale = fp8.norm_modulate_fp8(x, x, -torch.ones_like(x), rows, EPS)
    assert torch.isfinite(values.float()).all() and (row_scale > 0).all()
    torch.testing.assert_close(values.float() * row_scale[:, None], x, rtol=0.1, atol=SMALLEST_SCALE / 512)
    values, row_scale = fp8.gelu_fp8(x[:0])
    assert values.shape == (0, 16) and row_scale.shape == (0,)


def test_fp8_refuses_older_gpus(monkeypatch):
    class OnOldGpu:
        is_cuda, device = True, "cuda"

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(AssertionError, match="sm_80 has no conversion to e4m3"):
        fp8._outputs(OnOldGpu())
