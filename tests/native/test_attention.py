"""Native attention and its gradients against float64 oracles, at every instruction-set level this machine can run."""

import math
import subprocess
import sys

import oracles
import pytest
import torch
from oracles import assert_attention_within_budget

from uniref_fast import native
from uniref_fast.testing import assert_within_budget
from uniref_fast.visibility import AttentionPlan

pytestmark = [
    pytest.mark.skipif(not native.available(), reason=native.reason()),
    pytest.mark.usefixtures("nan_memory", "threads"),
]

LEVELS = native.levels()
DTYPES = [torch.float32, torch.bfloat16]
# 8 is less than a vector of 16; 24 and 40 leave a rest. Large sizes run with a rest and with the 128 of the model.
DIMS, FEW_DIMS = (8, 16, 24, 40, 64, 128), (40, 128)


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


def make_plan(*ranges):
    """(first query, last query, [key intervals]) -> q_ranges, kv_ptr, kv_ranges; -1 - start is causal."""
    ptr, intervals = [0], []
    for _, _, keys in ranges:
        intervals += keys
        ptr.append(len(intervals))
    return (
        torch.tensor([r[:2] for r in ranges], dtype=torch.int32).reshape(-1, 2),
        torch.tensor(ptr, dtype=torch.int32),
        torch.tensor(intervals, dtype=torch.int32).reshape(-1, 2),
    )


def check_attention(q, k, v, plan, level, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    actual = native.segment_attention(q, k, v, *plan, scale, level=level)
    oracle = oracles.attention(q.double(), k.double(), v.double(), plan, scale)
    assert_attention_within_budget(actual, oracles.library_attention(q, k, v, plan, scale), oracle)


@pytest.mark.parametrize(
    ("queries", "keys", "dims"),
    [
        (1, 1, DIMS),  # one text token
        (7, 3, DIMS),  # less than a vector, less than a register block
        (24, 64, DIMS),  # exactly one panel of queries (AVX2), one tile of keys
        (49, 65, DIMS),  # one more than a panel of 48 (AVX-512), than a tile of keys
        (203, 113, FEW_DIMS),  # more than a tile of queries
        (5, 199, FEW_DIMS),  # few queries, three full tiles of keys and a rest
    ],
)
def test_attention_sizes(queries, keys, dims, dtype, level):
    heads = max(3, 300 // queries)  # the budget rests on eager's largest error, which few values do not show
    for dim in dims:
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


def test_attention_refuses_a_negative_scale():
    with pytest.raises(ValueError, match="scale must not be negative"):
        native.segment_attention(*torch.randn(3, 30, 2, 16), *make_plan((0, 30, [(0, 30)])), -2.0)


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
    # A single query of the sample lands in another lane of another vector width.
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


# ---- causal intervals ----


def causal_sample(at, lengths):
    """Text and images in turn, from row `at`: each part sees the earlier ones, text itself causally."""
    ranges, start = [], at
    for number, length in enumerate(lengths):
        end = start + length
        if number % 2:
            ranges.append((start, end, [(at, end)]))
        else:
            ranges.append((start, end, [*([(at, start)] if start > at else []), (-1 - start, end)]))
        start = end
    return ranges


# Around a panel of 24 or 48 queries, a tile of 64 keys and a block of 192 keys; one token; and panels whose last query
# is aligned with a key in the middle of a tile.
CAUSAL_LENGTHS = ((1,), (2, 3, 1, 1), (24, 5, 25), (48, 1, 47, 64, 49), (65, 9, 63), (191, 3, 193), (300, 20, 100))


def test_causal_sizes(dtype, level):
    for lengths in CAUSAL_LENGTHS:
        n = sum(lengths)
        q, k, v = (strided(n, max(2, 120 // n), 40, dtype=dtype) for _ in range(3))
        check_attention(q, k, v, make_plan(*causal_sample(0, lengths)), level)
        if n > 1:  # a single key has no dq and dk: test_backward_single_tokens
            check_backward(q, k, v, make_plan(*causal_sample(0, lengths)), level)


def test_causal_before_other_intervals(dtype, level):
    """The causal keys lie before and between keys that all queries see, and a later range sees them all."""
    q, k, v = (strided(n, 3, 24, dtype=dtype) for n in (130, 150, 150))
    plan = make_plan((0, 70, [(-1, 70), (130, 150)]), (70, 130, [(0, 70), (-1 - 70, 130)]))
    check_attention(q, k, v, plan, level)
    check_backward(q, k, v, plan, level)


def test_causal_packing_and_threads(dtype, level, threads):
    """Samples of any length alone, and behind others on any number of threads: the same bits."""
    samples = [*CAUSAL_LENGTHS, (300,), (97, 211, 43)]
    starts = [sum(map(sum, samples[:i])) for i in range(len(samples))]
    q, k, v, grad = (torch.randn(sum(map(sum, samples)), 2, 32).to(dtype) for _ in range(4))
    packed = make_plan(*(r for at, lengths in zip(starts, samples, strict=True) for r in causal_sample(at, lengths)))

    def run(rows, plan):
        mine = [x[rows] for x in (q, k, v)]
        out, lse = native.segment_attention(*mine, *plan, 0.2, level=level)
        return [out, lse.T, *backward(grad[rows], *mine, plan, 0.2, level)]

    whole = run(slice(None), packed)
    for count in (2, 5):
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(run(slice(None), packed), whole, strict=True))
    for at, lengths in zip(starts, samples, strict=True):
        rows = slice(at, at + sum(lengths))
        for a, b in zip(run(rows, make_plan(*causal_sample(0, lengths))), whole, strict=True):
            assert torch.equal(a, b[rows])


def test_causal_queries_do_not_see_later_keys(dtype, level):
    """A later key has the probability 0 and not 2^-100, which is the kernel's exponential of -inf."""
    q, k, v = (torch.zeros(100, 1, 16, dtype=dtype), *torch.randn(2, 100, 1, 16).to(dtype))
    v[:60] = 0.0
    plan = make_plan((0, 100, [(-1, 100)]))
    out, _ = native.segment_attention(q, k, v, *plan, 0.25, level=level)
    assert (out[:60] == 0).all() and out[60:].any(-1).all()
    v[60:] = 3e38
    out, _ = native.segment_attention(q, k, v, *plan, 0.25, level=level)
    assert (out[:60] == 0).all()


def test_causal_bad_plans():
    q = torch.randn(10, 1, 8)
    for ranges in ([(0, 6, [(-1, 5)])], [(0, 6, [(0, 3), (-2, 7)])], [(0, 6, [(-6, 11)])]):
        with pytest.raises(ValueError, match="kv_ranges"):
            native.segment_attention(q, q, q, *make_plan(*ranges), 1.0)
    plan = make_plan((0, 6, [(-1, 6)]), (6, 10, [(0, 6)]))
    out, lse = native.segment_attention(q, q, q, *plan, 1.0)
    good = transpose(plan, 10, 10)
    assert good[2].tolist() == [[-1, 6], [6, 10]]
    for spans in ([[0, 6], [6, 10]], [[-1, 6], [-7, 10]]):  # causal on one side only
        with pytest.raises(ValueError, match="transpose"):
            tables = *plan, *good[:2], torch.tensor(spans, dtype=torch.int32)
            native.segment_attention_backward(q, q, q, q, out, lse, *tables, 1.0)


# ---- gradients ----


def transpose(plan, queries, keys):
    """The tables of the same plan read from the keys."""
    q_ranges, ptr, intervals = (x.tolist() for x in plan)
    rows = []
    for span, first, last in zip(q_ranges, ptr[:-1], ptr[1:], strict=True):
        seen = [(a, b) for a, b in intervals[first:last] if a < b]
        causal = next((at for at, (a, _) in enumerate(seen) if a < 0), -1)
        rows.append((tuple(span), tuple((-1 - a if a < 0 else a, b) for a, b in seen), causal))
    spans, seen, causal = zip(*sorted(rows), strict=True)
    return AttentionPlan(spans, seen, queries, keys, causal).transpose.tensors("cpu")


def gradients_of(formula, dtype, grad, q, k, v, plan, scale):
    return oracles.gradients(lambda *leaves: formula(*leaves, plan, scale)[0], (q, k, v), (grad,), dtype)


def backward(grad, q, k, v, plan, scale, level=None):
    out, lse = native.segment_attention(q, k, v, *plan, scale, level=level)
    tables = (*plan, *transpose(plan, len(q), len(k)))
    return native.segment_attention_backward(grad, q, k, v, out, lse, *tables, scale, level=level)


def check_backward(q, k, v, plan, level, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    grad = strided(*q.shape, dtype=q.dtype)
    actual = backward(grad, q, k, v, plan, scale, level)
    exact = gradients_of(oracles.attention, torch.float64, grad, q, k, v, plan, scale)
    eager = gradients_of(oracles.library_attention, q.dtype, grad, q, k, v, plan, scale)
    for name, a, e, x in zip(("dq", "dk", "dv"), actual, eager, exact, strict=True):
        assert a.is_contiguous() and a.dtype == q.dtype
        assert_within_budget(a, e, x, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("queries", "keys", "dims"),
    [
        (1, 2, DIMS),  # almost nothing (a single key has no dq and dk: test_backward_single_tokens)
        (7, 3, DIMS),  # less than a vector, less than a register block
        (48, 192, FEW_DIMS),  # exactly one tile of queries, one block of keys
        (49, 193, DIMS),  # one more than each: dq is a sum over blocks that take turns
        (203, 113, FEW_DIMS),  # several tiles, less than a block
        (30, 399, FEW_DIMS),  # few queries, two full blocks of keys and a rest
    ],
)
def test_backward_sizes(queries, keys, dims, dtype, level):
    heads = max(12, 1800 // queries)  # eager must show its worst: the rounding of lse is an error of a whole row
    for dim in dims:
        q, k, v = (strided(n, heads, dim, dtype=dtype) for n in (queries, keys, keys))
        check_backward(q, k, v, make_plan((0, queries, [(0, keys)])), level)


def test_backward_many_segments(dtype, level):
    """Ragged samples that all see a shared prefix, whose gradients are sums over all of them."""
    lengths = [1 + (7 * i) % 40 for i in range(37)]
    starts = [9 + sum(lengths[:i]) for i in range(37)]
    total = starts[-1] + lengths[-1]
    q, k, v = (strided(total, 2, 64, dtype=dtype) for _ in range(3))
    ranges = [(0, 9, [(0, 9)])]
    ranges += [(s, s + n, [(0, 5), (s, s + n)]) for s, n in zip(starts, lengths, strict=True)]
    check_backward(q, k, v, make_plan(*ranges), level)


def test_backward_single_tokens(dtype, level):
    """300 segments of one token: the softmax is 1, so dq = dk = 0 and dv = grad."""
    q, k, v, grad = (torch.randn(300, 2, 16).to(dtype) for _ in range(4))
    dq, dk, dv = backward(grad, q, k, v, make_plan(*((i, i + 1, [(i, i + 1)]) for i in range(300))), 0.25, level)
    assert torch.equal(dv, grad)
    rounding = torch.finfo(dtype).eps * 16  # of `out`, which delta is made of: grad . (v - out) over 16 channels
    assert dq.abs().max() < rounding and dk.abs().max() < rounding


def test_backward_unseen_rows(dtype, level):
    """Rows without partners get 0, and what they hold, NaN, reaches nobody."""
    q, k, v, grad = (strided(60, 2, 16, dtype=dtype) for _ in range(4))
    plan = make_plan((2, 9, [(0, 4), (11, 12), (12, 30)]), (9, 9, []), (12, 15, [(3, 3)]), (20, 26, []))
    out, lse = native.segment_attention(q, k, v, *plan, 0.25, level=level)
    unseen_q, unseen_k = torch.ones(60, dtype=torch.bool), torch.ones(60, dtype=torch.bool)
    unseen_q[2:9] = unseen_k[0:4] = unseen_k[11:30] = False
    for x, rows in ((q, unseen_q), (grad, unseen_q), (out, unseen_q), (k, unseen_k), (v, unseen_k)):
        x[rows] = math.nan
    lse[:, unseen_q] = math.nan
    tables = (*plan, *transpose(plan, 60, 60))
    dq, dk, dv = native.segment_attention_backward(grad, q, k, v, out, lse, *tables, 0.25, level=level)
    assert (dq[unseen_q] == 0).all() and (dk[unseen_k] == 0).all() and (dv[unseen_k] == 0).all()
    tidy = [x.where(~rows[:, None, None], 0) for x, rows in ((q, unseen_q), (k, unseen_k), (v, unseen_k))]
    exact = gradients_of(oracles.attention, torch.float64, grad.where(~unseen_q[:, None, None], 0), *tidy, plan, 0.25)
    eager = gradients_of(oracles.library_attention, dtype, grad.where(~unseen_q[:, None, None], 0), *tidy, plan, 0.25)
    for a, e, x in zip((dq, dk, dv), eager, exact, strict=True):
        assert_within_budget(a, e, x)


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_backward_of_nothing(queries, keys):
    q, k, v = (torch.randn(n, 2, 16) for n in (queries, keys, keys))
    plan = make_plan((0, queries, [(0, keys)]))
    for grad, like in zip(backward(q, q, k, v, plan, 0.25), (q, k, v), strict=True):
        assert grad.shape == like.shape and (grad == 0).all()


def test_backward_large_logits(level):
    """Logits of +-2000, all negative in some rows: the lanes behind the last key overflow, and stay where they are."""
    q = torch.randn(33, 1, 16) * 40
    k = torch.cat([torch.randn(130, 1, 16) * 40, -q[:3] * 2])
    plan = make_plan((0, 30, [(0, 133)]), (30, 33, [(130, 133)]))
    check_backward(q, k, torch.randn(133, 1, 16), plan, level, 1.0)


def test_backward_of_scale_zero(level):
    """All keys weigh the same, and q and k get no gradient."""
    check_backward(*(torch.randn(60, 4, 16) for _ in range(3)), make_plan((0, 60, [(0, 60)])), level, 0.0)


def test_backward_packing_invariance(dtype, level):
    """A sample of two ranges alone, and in the middle of a pack: the same bits."""
    heads, dim, alone = 3, 64, 250
    q, k, v, grad = (torch.randn(900, heads, dim).to(dtype) for _ in range(4))
    mine = slice(301, 301 + alone)

    def sample(at):
        return (at, at + 150, [(at, at + 29), (at + 32, at + alone)]), (at + 150, at + alone, [(at + 150, at + alone)])

    packed = make_plan((0, 301, [(0, 301)]), *sample(301), (551, 900, [(0, 20), (551, 900)]))
    whole = backward(grad, q, k, v, packed, 0.1, level)
    single = backward(*(x[mine] for x in (grad, q, k, v)), make_plan(*sample(0)), 0.1, level)
    for a, b in zip(whole, single, strict=True):
        assert torch.equal(a[mine], b)


def test_backward_threads(dtype, level, threads):
    """One head and many blocks: threads meet in the same rows of dq, and must wait for their turns."""
    for heads in (1, 3):
        q, k, v, grad = (torch.randn(500, heads, 16).to(dtype) for _ in range(4))
        plan = make_plan((0, 300, [(0, 400)]), (300, 500, [(10, 50), (200, 500)]))
        results = []
        for count in (1, 2, 3, 4):
            threads(count)
            results.append(backward(grad, q, k, v, plan, 0.2, level))
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_backward_bad_plans():
    q = torch.randn(10, 1, 8)
    plan = make_plan((0, 6, [(0, 10)]), (6, 10, [(0, 2), (4, 8)]))
    good = transpose(plan, 10, 10)
    out, lse = native.segment_attention(q, q, q, *plan, 1.0)

    def run(plan=plan, k_ranges=good[0], q_ptr=good[1], q_spans=good[2]):
        return native.segment_attention_backward(q, q, q, q, out, lse, *plan, k_ranges, q_ptr, q_spans, 1.0)

    def changed(x, at, value):
        x = x.clone()
        x[at] = value
        return x

    run()
    with pytest.raises(ValueError, match="q_ranges"):
        run(plan=make_plan((0, 11, [])))
    with pytest.raises(ValueError, match="kv_ranges"):
        run(plan=make_plan((0, 10, [(0, 11)])))
    assert good[0].tolist() == [[0, 2], [2, 4], [4, 8], [8, 10]] and good[1].tolist() == [0, 2, 3, 5, 6]
    bad = [
        {"k_ranges": changed(good[0], (3, 1), 11)},  # outside k
        {"k_ranges": changed(good[0], (0, 0), -1)},
        {"k_ranges": changed(good[0], (1, 0), 1)},  # overlapping
        {"k_ranges": changed(good[0], (1, 0), 3)},  # a seen key is missing
        {"k_ranges": good[0].flip(0)},
        {"q_ptr": good[1] * 2},
        {"q_ptr": changed(good[1], 2, 1)},  # falling
        {"q_ptr": changed(good[1], 0, -1)},
        {"q_spans": changed(good[2], (0, 1), 5)},  # not a query range
        {"q_spans": changed(good[2], (0, 1), 2**31 - 1)},
        {"q_spans": changed(good[2], (0, 0), -5)},
        {"q_spans": good[2][[1, 0, 2, 3, 4, 5]]},  # not ascending
        {"q_spans": changed(good[2], 2, torch.tensor([6, 10]))},  # names queries that do not see the keys
    ]
    for tables in bad:
        with pytest.raises(ValueError, match="transpose"):
            run(**tables)
    halves = make_plan((0, 5, [(0, 5)]), (5, 10, [(5, 10)]))
    with pytest.raises(ValueError, match="transpose"):  # as many pairs, but others
        run(halves, halves[0], halves[1], halves[0].flip(0))
    with pytest.raises(ValueError, match="q_ptr has shape"):
        run(q_ptr=good[1][:-1])
    with pytest.raises(ValueError, match=r"q_spans is .*int64"):
        run(q_spans=good[2].long())


def test_backward_bad_tensors():
    q = torch.randn(10, 1, 8)
    plan = make_plan((0, 10, [(0, 10)]))
    out, lse = native.segment_attention(q, q, q, *plan, 1.0)

    def run(grad=q, out=out, lse=lse):
        return native.segment_attention_backward(grad, q, q, q, out, lse, *plan, *plan, 1.0)

    run()
    with pytest.raises(ValueError, match="grad_out has shape"):
        run(grad=q[:9])
    with pytest.raises(ValueError, match=r"grad_out is .*bfloat16"):
        run(grad=q.bfloat16())
    with pytest.raises(ValueError, match="out has stride"):
        run(out=torch.randn(10, 1, 16)[..., ::2])
    with pytest.raises(ValueError, match="lse has shape"):
        run(lse=lse.mT)


OUT_OF_MEMORY = """
import resource, torch
from uniref_fast import native
torch.set_num_threads(1)
x = torch.randn(1, 1, 32768)  # work buffers of 40 MB, results of 128 KB
plan = [torch.tensor(t, dtype=torch.int32) for t in ([[0, 1]], [0, 1], [[0, 1]])]
out, lse = torch.zeros_like(x), torch.zeros(1, 1)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (8 << 20), resource.RLIM_INFINITY))
for call in (
    lambda: native.segment_attention(x, x, x, *plan, 1.0),
    lambda: native.segment_attention_backward(x, x, x, x, out, lse, *plan, *plan, 1.0),
):
    try:
        call()
    except MemoryError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_out_of_memory():
    """The kernels' work buffers cannot be had: an error, not a crash and not a wrong result."""
    run = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, check=True)
    assert run.stdout.count("no memory for the kernel's work buffers") == 2, run.stdout
