"""The CPU kernels against float64 oracles, at every instruction-set level that this machine can run."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from uniref_fast import native
from uniref_fast.testing import assert_within_budget

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason())

EPS = 1e-6
LEVELS = native.levels()
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=LEVELS)
def level(request):
    return request.param


@pytest.fixture(params=DTYPES, ids=["fp32", "bf16"])
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def threads():
    """One thread unless a test asks for more: hundreds of tiny oracle calls spend their time waking threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel fails to write shows up as NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(math.nan))
    torch.manual_seed(0)


def strided(*shape, dtype):
    """Random, with gaps between rows and between heads; the last dimension is contiguous."""
    wide = torch.randn(*(size + 1 for size in shape[:-1]), shape[-1] + 8)
    return wide.to(dtype)[tuple(slice(size) for size in shape)]


# ---- attention ----


def make_plan(*ranges):
    """(first query, last query, [key intervals]) -> q_ranges, kv_ptr, kv_ranges."""
    ptr, intervals = [0], []
    for _, _, keys in ranges:
        intervals += keys
        ptr.append(len(intervals))
    return (
        torch.tensor([r[:2] for r in ranges], dtype=torch.int32).reshape(-1, 2),
        torch.tensor(ptr, dtype=torch.int32),
        torch.tensor(intervals, dtype=torch.int32).reshape(-1, 2),
    )


def attention_oracle(q, k, v, plan, scale, dtype=torch.float64):
    """A dense softmax per range. In float32 or bfloat16, PyTorch's own attention serves as eager."""
    q_ranges, ptr, intervals = (x.tolist() for x in plan)
    out = torch.zeros(q.shape, dtype=dtype)
    lse = torch.full((q.shape[1], q.shape[0]), -math.inf, dtype=torch.promote_types(dtype, torch.float32))
    for (begin, end), first, last in zip(q_ranges, ptr[:-1], ptr[1:], strict=True):
        rows = torch.tensor([row for a, b in intervals[first:last] for row in range(a, b)], dtype=torch.long)
        if len(rows) == 0 or begin == end:
            continue
        qr, kr, vr = (x.to(dtype).transpose(0, 1) for x in (q[begin:end], k[rows], v[rows]))
        out[begin:end] = F.scaled_dot_product_attention(qr[None], kr[None], vr[None], scale=scale)[0].transpose(0, 1)
        wide = torch.promote_types(dtype, torch.float32)
        lse[:, begin:end] = (qr.to(wide) @ kr.to(wide).transpose(1, 2) * scale).logsumexp(-1)
    return out, lse


def check_attention(q, k, v, plan, level, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = native.segment_attention(q, k, v, *plan, scale, level=level)
    exact, exact_lse = attention_oracle(q, k, v, plan, scale)
    eager, eager_lse = attention_oracle(q, k, v, plan, scale, q.dtype)
    assert_within_budget(out, eager, exact, "out")
    assert torch.equal(torch.isinf(lse), torch.isinf(exact_lse))
    seen = ~torch.isinf(exact_lse)
    assert_within_budget(lse[seen], eager_lse[seen], exact_lse[seen], "lse")


@pytest.mark.parametrize("dim", [8, 16, 24, 32, 64, 128])  # 8 and 24: less than a vector of 16, and a rest of one
@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        (1, 1),  # one text token
        (7, 3),  # less than a vector, less than a register block
        (24, 64),  # exactly one panel of queries (AVX2), one tile of keys
        (49, 65),  # one more than a panel of 48 (AVX-512), than a tile of keys
        (203, 113),  # more than a tile of queries
        (5, 199),  # few queries, three full tiles of keys and a rest
    ],
)
def test_attention_sizes(queries, keys, dim, dtype, level):
    heads = max(3, 300 // queries)  # the budget rests on eager's largest error, which few values do not show
    q, k, v = (strided(n, heads, dim, dtype=dtype) for n in (queries, keys, keys))
    check_attention(q, k, v, make_plan((0, queries, [(0, keys)])), level)


def test_attention_many_segments(dtype, level):
    """37 ragged samples, tiny ones among them, each seeing itself and a shared prefix: two intervals per range."""
    lengths = [1 + (7 * i) % 40 for i in range(37)]
    starts = [9 + sum(lengths[:i]) for i in range(37)]
    total = starts[-1] + lengths[-1]
    q, k, v = (strided(total, 2, 64, dtype=dtype) for _ in range(3))
    ranges = [(0, 9, [(0, 9)])]
    ranges += [(s, s + n, [(0, 5), (s, s + n)]) for s, n in zip(starts, lengths, strict=True)]
    check_attention(q, k, v, make_plan(*ranges), level)


def test_attention_without_keys(level, dtype):
    """Ranges without keys, with empty intervals only, and rows in no range give 0 and -inf; ranges may be unsorted."""
    q, k, v = (strided(30, 2, 16, dtype=dtype) for _ in range(3))
    plan = make_plan((20, 26, []), (2, 9, [(0, 4), (11, 12), (12, 30)]), (9, 9, []), (12, 15, [(3, 3)]))
    check_attention(q, k, v, plan, level)
    out, lse = native.segment_attention(q, k, v, *plan, 0.25, level=level)
    assert (out[20:26] == 0).all() and (out[9:12] == 0).all() and (lse[:, 12:15] == -math.inf).all()


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_attention_of_nothing(queries, keys):
    q, k, v = (torch.randn(n, 2, 16) for n in (queries, keys, keys))
    out, lse = native.segment_attention(q, k, v, *make_plan((0, queries, [(0, keys)])), 0.25)
    assert (out == 0).all() and (lse == -math.inf).all() and out.shape == q.shape


def test_attention_large_logits(level):
    """Logits of +-2000, all negative in some rows: nothing overflows, and padding rows do not enter the maximum."""
    q = torch.randn(33, 1, 16) * 40
    k = torch.cat([torch.randn(130, 1, 16) * 40, -q[:3] * 2])
    check_attention(q, k, torch.randn(133, 1, 16), make_plan((0, 30, [(0, 133)]), (30, 33, [(130, 133)])), level, 1.0)


def test_attention_negative_scale(level):
    check_attention(*(torch.randn(30, 20, 16) * 2 for _ in range(3)), make_plan((0, 30, [(0, 30)])), level, -2.0)


def test_attention_nan_stays_in_its_row(level):
    q, k, v = (torch.randn(40, 1, 16) for _ in range(3))
    q[5] = math.nan
    out, _ = native.segment_attention(q, k, v, *make_plan((0, 40, [(0, 40)])), 0.25, level=level)
    bad = torch.isnan(out).flatten(1)
    assert bad[5].all() and bad.sum() == 16


def test_attention_packing_invariance(dtype, level):
    """A sample alone, and in the middle of a pack: the same bits, though tiles and threads fall differently."""
    heads, dim, alone = 3, 64, 150
    q, k, v = (torch.randn(700, heads, dim).to(dtype) for _ in range(3))
    mine = slice(301, 301 + alone)
    packed = make_plan((0, 301, [(0, 301)]), (301, 451, [(301, 330), (333, 451)]), (451, 700, [(0, 20), (451, 700)]))
    out, lse = native.segment_attention(q, k, v, *packed, 0.1, level=level)
    single = make_plan((0, alone, [(0, 29), (32, alone)]))
    out1, lse1 = native.segment_attention(q[mine], k[mine], v[mine], *single, 0.1, level=level)
    assert torch.equal(out[mine], out1) and torch.equal(lse[:, mine], lse1)
    # and a single query of it, which lands in another lane of another vector width
    one = make_plan((0, 1, [(0, 29), (32, alone)]))
    for row in (301, 327, 450):
        single_row, _ = native.segment_attention(q[row : row + 1], k[mine], v[mine], *one, 0.1, level=level)
        assert torch.equal(out[row : row + 1], single_row)


def test_attention_threads(dtype, level, threads):
    q, k, v = (torch.randn(333, 5, 32).to(dtype) for _ in range(3))
    plan = make_plan((0, 200, [(0, 200)]), (200, 333, [(10, 50), (200, 333)]))
    results = []
    for count in (1, 2, 3, 8):
        threads(count)
        results.append(native.segment_attention(q, k, v, *plan, 0.2, level=level))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


def test_attention_bad_plans():
    q = torch.randn(10, 1, 8)

    def run(*ranges):
        return native.segment_attention(q, q, q, *make_plan(*ranges), 1.0)

    for ranges in ([(0, 11, [])], [(-1, 3, [])], [(5, 3, [])], [(0, 5, []), (4, 9, [])]):
        with pytest.raises(ValueError, match="q_ranges"):
            run(*ranges)
    for keys in ([(0, 11)], [(-1, 2)], [(4, 3)], [(0, 5), (4, 6)], [(4, 6), (0, 2)]):
        with pytest.raises(ValueError, match="kv_ranges"):
            run((0, 10, keys))
    q_ranges, ptr, intervals = make_plan((0, 10, [(0, 10)]))
    with pytest.raises(ValueError, match="kv_ptr"):
        native.segment_attention(q, q, q, q_ranges, ptr * 2, intervals, 1.0)


def test_attention_bad_tensors():
    q = torch.randn(10, 1, 8)
    plan = make_plan((0, 10, [(0, 10)]))
    run = native.segment_attention
    with pytest.raises(ValueError, match="multiple of 8"):
        run(*(torch.randn(10, 1, 12) for _ in range(3)), *plan, 1.0)
    with pytest.raises(ValueError, match="v has shape"):
        run(q, q, q[:9], *plan, 1.0)
    with pytest.raises(ValueError, match=r"k is .*bfloat16, expected .*float32"):
        run(q, q.bfloat16(), q, *plan, 1.0)
    with pytest.raises(ValueError, match="float32 and bfloat16"):
        run(q.double(), q.double(), q.double(), *plan, 1.0)
    with pytest.raises(ValueError, match="contiguous"):
        run(torch.randn(10, 1, 16)[..., ::2], q, q, *plan, 1.0)
    with pytest.raises(ValueError, match=r"q_ranges is .*int64"):
        run(q, q, q, plan[0].long(), *plan[1:], 1.0)
    with pytest.raises(ValueError, match="meta"):
        run(q.to("meta"), q, q, *plan, 1.0)


# ---- qk_norm_rope ----


def rope_oracle(x, w, cos, sin, index, dtype):
    """One stream of q or k: norm, weight, rotation, at the stream's joint rows."""
    x = x.to(dtype)
    if w is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * w.to(dtype)
    c, s = (t[index.long()][:, None].to(dtype) for t in (cos, sin))
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2)


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


# ---- gated residual, LayerNorm, modulation ----


def modulation_oracle(x, y, gate, shift, scale, rows, dtype):
    """x + gate y, rounded to the storage dtype, and the modulated norm of that."""
    row = torch.zeros(len(x), dtype=torch.long) if rows is None else rows.long()
    stored = (x.to(dtype) + gate.to(dtype)[row] * y.to(dtype)).to(x.dtype).to(dtype)
    return norm_oracle(stored, shift, scale, row, dtype), x.to(dtype) + gate.to(dtype)[row] * y.to(dtype)


def norm_oracle(x, shift, scale, row, dtype):
    return F.layer_norm(x.to(dtype), x.shape[1:], eps=EPS) * (1 + scale.to(dtype)[row]) + shift.to(dtype)[row]


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


def test_token_ops_errors():
    x, table = torch.randn(3, 8), torch.randn(2, 8)
    for rows in ([0, 1, 2], [-1, 0, 0]):
        with pytest.raises(ValueError, match="rows must lie within"):
            native.norm_modulate(x, table, table, torch.tensor(rows, dtype=torch.int32), EPS)
    with pytest.raises(ValueError, match="rows has shape"):
        native.norm_modulate(x, table, table, torch.zeros(2, dtype=torch.int32), EPS)
    with pytest.raises(ValueError, match="scale has shape"):
        native.norm_modulate(x, table, table[:1], None, EPS)
    with pytest.raises(ValueError, match=r"shift is .*bfloat16"):
        native.norm_modulate(x, table.bfloat16(), table, None, EPS)
    with pytest.raises(ValueError, match="y has shape"):
        native.gate_residual(x, x[:2], table, None)
    with pytest.raises(ValueError, match=r"expected \[N, C\]"):
        native.gate_residual(x[None], x[None], table, None)


# ---- pack, unpack ----


def pack_oracle(latents):
    return torch.cat(
        [
            x.reshape(c, f, h // 2, 2, w // 2, 2).permute(1, 2, 4, 0, 3, 5).reshape(-1, 4 * c)
            for x in latents
            for c, f, h, w in [x.shape]
        ]
    )


@pytest.mark.parametrize("channels", [1, 3, 16])
def test_pack_unpack(channels, dtype):
    # one patch; two frames; a row longer than the kernel's block of 32 tokens, with a rest
    shapes = [(1, 2, 2), (2, 6, 4), (1, 4, 70)]
    latents = [torch.randn(channels, *shape).to(dtype) for shape in shapes]
    latents[1] = latents[1].transpose(2, 3).contiguous().transpose(2, 3)  # columns strided, rows contiguous
    grids = [(f, h // 2, w // 2) for f, h, w in shapes]
    lengths = [math.prod(grid) for grid in grids]
    starts = [sum(lengths[:i]) for i in range(3)]
    stream = native.pack(latents, starts, sum(lengths))
    assert torch.equal(stream, pack_oracle(latents))
    for x, back in zip(latents, native.unpack(stream, starts, grids, channels), strict=True):
        assert torch.equal(x, back) and back.is_contiguous()


def test_pack_with_gaps_and_any_order():
    a, b = torch.randn(2, 1, 2, 4), torch.randn(2, 1, 4, 2)
    stream = native.pack([a, b], [4, 1], 7)
    assert torch.equal(stream[4:6], pack_oracle([a])) and torch.equal(stream[1:3], pack_oracle([b]))
    assert (stream[[0, 3, 6]] == 0).all()


def test_pack_errors():
    x = torch.randn(2, 1, 2, 4)
    with pytest.raises(ValueError, match="overlap"):
        native.pack([x, x], [0, 1], 4)
    with pytest.raises(ValueError, match="leave the 3 rows"):
        native.pack([x], [2], 3)
    with pytest.raises(ValueError, match="expected"):
        native.pack([x[..., :3]], [0], 2)
    with pytest.raises(ValueError, match=r"latents\[1\] is torch.bfloat16"):
        native.pack([x, x.bfloat16()], [0, 2], 4)
    with pytest.raises(ValueError, match="at least one"):
        native.pack([], [], 0)
    with pytest.raises(ValueError, match="leave the stream"):
        native.unpack(torch.randn(3, 8), [2], [(1, 1, 2)], 2)


# ---- the library ----


def test_levels():
    assert "generic" in LEVELS and native.levels()[0] in native.reason()
    with pytest.raises(ValueError, match=r"supported: .*generic"):
        native.norm_modulate(*[torch.randn(1, 8)] * 3, None, EPS, level="sse9")


def test_one_openmp_runtime():
    """Two would mean two thread pools fighting over the cores."""
    native.norm_modulate(*[torch.randn(64, 8)] * 3, None, EPS)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    runtimes = {
        path
        for path in maps.read_text().split()
        if path.startswith("/") and any(name in path for name in ("libgomp", "libomp"))
    }
    assert len(runtimes) <= 1, runtimes


def test_missing_library(monkeypatch, tmp_path):
    """Without a compiler at install time: no library, a reason, and a clear error on use."""
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    for cached in (native._load, native.levels):
        cached.cache_clear()
    try:
        assert not native.available() and native.levels() == [] and "compiler" in native.reason()
        with pytest.raises(RuntimeError, match="compiler"):
            native.gate_residual(*[torch.randn(1, 8)] * 3, None)
        (tmp_path / "_native.so").write_bytes(b"not a library")
        native._load.cache_clear()
        assert "does not load" in native.reason()
    finally:
        monkeypatch.undo()
        for cached in (native._load, native.levels):
            cached.cache_clear()
