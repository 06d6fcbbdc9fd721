"""Segment attention in Triton, forward and backward, against float64: interpreted without a GPU, compiled with one."""

import importlib.util
import itertools
import math
import random

import pytest
import torch
from oracles import assert_attention_within_budget, visible_keys
from oracles import attention as attention_oracle

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from uniref_fast.kernels import segment_attention as attention
from uniref_fast.kernels.segment_attention_backward import segment_attention_backward
from uniref_fast.kernels.segment_attention_config import (
    HEAD_DIMS,
    AttentionConfig,
    AttentionTables,
    BackwardConfig,
    pick_backward_config,
    pick_config,
)
from uniref_fast.testing import assert_within_budget
from uniref_fast.visibility import AttentionPlan

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
# The interpreter multiplies the bit patterns of bfloat16 and truncates casts to it.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=on_gpu)]
SMALL = AttentionConfig(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=2)
SMALL_BACKWARD = BackwardConfig(dq=SMALL, dkdv=SMALL)
GRADIENTS = ("dq", "dk", "dv")

pytestmark = pytest.mark.usefixtures("nan_memory")


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


# --- the kernels, and the formula


def run_attention(q, k, v, plan, config=SMALL):
    tables = AttentionTables.by_query(plan, q.device, config)
    return attention.segment_attention(q, k, v, tables, q.shape[2] ** -0.5)


def run_backward(grad_out, q, k, v, out, lse, plan, config=SMALL_BACKWARD):
    tables = AttentionTables.by_query(plan, q.device, config.dq), AttentionTables.by_key(plan, q.device, config.dkdv)
    return segment_attention_backward(grad_out, q, k, v, out, lse, *tables, q.shape[2] ** -0.5)


def gradient_formula(grad_out, q, k, v, out, lse, plan):
    """Return dq, dk and dv in plain PyTorch in q's dtype, with P recomputed from lse as in the kernels."""
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    scale, delta = q.shape[2] ** -0.5, (grad_out * out).sum(-1).T
    for (start, end), rows, hidden in visible_keys(plan):
        scores = torch.einsum("mhd,nhd->hmn", q[start:end], k[rows]) * scale
        if hidden is not None:
            scores = scores.masked_fill(hidden.to(q.device), -math.inf)
        p = (scores - lse[:, start:end, None]).exp()
        ds = p * (torch.einsum("mhd,nhd->hmn", grad_out[start:end], v[rows]) - delta[:, start:end, None])
        dq[start:end] = scale * torch.einsum("hmn,nhd->mhd", ds, k[rows])
        dk[rows] += scale * torch.einsum("hmn,mhd->nhd", ds, q[start:end])
        dv[rows] += torch.einsum("hmn,mhd->nhd", p, grad_out[start:end])
    return dq, dk, dv


def check_forward(q, k, v, plan, config):
    out, lse = run_attention(q, k, v, plan, config)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    # The eager result computes in float32 and rounds its output: a tighter budget than low-precision scores would give.
    eager, oracle = (attention_oracle(q.to(t), k.to(t), v.to(t), plan) for t in (torch.float32, torch.float64))
    assert_attention_within_budget((out, lse), eager, oracle)
    return out, lse


def check_backward(q, k, v, out, lse, plan, config=SMALL_BACKWARD, grad_out=None):
    if grad_out is None:
        grad_out = torch.randn(q.shape, device=q.device).to(q.dtype)
    gradients = run_backward(grad_out, q, k, v, out, lse, plan, config)
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    result, _ = attention_oracle(*inputs, plan)
    if plan.area == 0:
        assert all(not gradient.any() for gradient in gradients)
        return
    oracles = torch.autograd.grad(result, inputs, grad_out.double())
    # As in the forward, in float32 and then rounded; from the same out and lse, whose errors are not the backward's.
    eager = gradient_formula(*(x.float() for x in (grad_out, q, k, v, out)), lse, plan)
    for name, gradient, rounded, oracle in zip(GRADIENTS, gradients, eager, oracles, strict=True):
        assert gradient.dtype == q.dtype and gradient.is_contiguous()
        if not oracle.any():
            # One key each: dP and delta cancel, up to the rounding of two float32 sums of head_dim products.
            assert name != "dv"
            terms = grad_out.abs().max() * v.abs().max() * max(q.abs().max(), k.abs().max())
            assert gradient.abs().max() <= q.shape[2] * 2**-22 * terms.float() * q.shape[2] ** -0.5, name
        else:
            assert_within_budget(gradient, rounded.to(q.dtype), oracle, name)


def check(q, k, v, plan):
    out, lse = check_forward(q, k, v, plan, SMALL)
    check_backward(q, k, v, out, lse, plan)


def qkv(num_queries, num_keys, heads, head_dim, dtype, device):
    q = torch.randn(num_queries, heads, head_dim, device=device)
    return [x.to(dtype) for x in (q, *torch.randn(2, num_keys, heads, head_dim, device=device))]


# --- plans


def block_diagonal(lengths):
    edges = [0, *itertools.accumulate(lengths)]
    spans = tuple(itertools.pairwise(edges))
    return AttentionPlan(spans, tuple((span,) for span in spans), edges[-1], edges[-1])


def pack_of(plans):
    """One plan for samples behind each other, each with its queries and keys."""
    ranges, intervals, query, key = [], [], 0, 0
    for plan in plans:
        ranges += [(start + query, end + query) for start, end in plan.ranges]
        intervals += [tuple((start + key, end + key) for start, end in spans) for spans in plan.intervals]
        query, key = query + plan.num_queries, key + plan.num_keys
    causal = tuple(itertools.chain.from_iterable(plan.causal or [-1] * len(plan.ranges) for plan in plans))
    return AttentionPlan(tuple(ranges), tuple(intervals), query, key, causal)


def causal(before, length, after=0):
    """Queries that see some keys, then keys up to themselves, then more keys; nobody else sees anything."""
    edges = [0, before, before + length, before + length + after]
    keys = [span for span in itertools.pairwise(edges) if span[0] < span[1]]
    return AttentionPlan(((0, length),), (tuple(keys),), length, edges[-1], (int(before > 0),))


def block_causal(*lengths):
    """Text and images in turn: each part sees all earlier ones, text up to itself, images all of themselves."""
    edges = [0, *itertools.accumulate(lengths)]
    spans = tuple(itertools.pairwise(edges))
    texts = [n % 2 == 0 for n in range(len(spans))]
    keys = tuple(
        ((0, a), (a, b)) if text and a else ((a, b),) if text else ((0, b),)
        for (a, b), text in zip(spans, texts, strict=True)
    )
    flags = tuple(int(a > 0) if text else -1 for (a, _), text in zip(spans, texts, strict=True))
    return AttentionPlan(spans, keys, edges[-1], edges[-1], flags)


def group_shared(references, samples):
    """References that see only themselves, then samples that each see them and themselves."""
    spans = list(itertools.pairwise([references, *itertools.accumulate([references, *samples])][1:]))
    shared = (0, references)
    ranges = (shared, *spans)
    return AttentionPlan(ranges, ((shared,), *((shared, span) for span in spans)), spans[-1][1], spans[-1][1])


def reference_causal(text_and_target, references):
    length = text_and_target + references
    parts = ((0, text_and_target), (text_and_target, length))
    return AttentionPlan(parts, (((0, length),), parts[1:]), length, length)


PLANS = {
    "one_token": block_diagonal([1]),  # softmax of one score: out is v
    "tile_borders": block_diagonal([15, 16, 17, 31, 32, 33]),  # no full tile, no tail, both, one row past a border
    "tiny_segments": block_diagonal([1, 2, 3] * 4),  # every tile mostly masked
    "no_keys": AttentionPlan(((0, 3), (3, 20), (20, 22)), (((0, 5),), (), ((5, 22),)), 22, 22),
    "nobody_sees_anything": AttentionPlan(((0, 2),), ((),), 2, 0),  # k and v have no rows at all
    "nobody_asks": AttentionPlan(((0, 2),), ((),), 2, 18),  # keys, and nobody who sees them: dk and dv are 0
    # A text and target range over everything, references over their own: intervals shared, and gaps between them.
    "several_intervals": AttentionPlan(
        ((0, 18), (18, 35), (35, 52)),
        (((0, 18), (20, 37), (40, 41)), ((18, 35),), ((1, 2), (19, 35), (51, 52))),
        52,
        52,
    ),
    "cross": AttentionPlan(((0, 5),), (((2, 21),),), 5, 40),  # queries of another length than keys, hidden keys
    "group_shared": group_shared(20, [1, 17, 3, 16, 2, 5, 4]),  # one reference tile and a bit, seen by eight ranges
    # One token; key tiles that all, some and no queries see; a row past a tile; keys before, and on both sides.
    "causal": pack_of([causal(0, 1), causal(0, 32), causal(0, 49), causal(17, 33), causal(3, 18, 20)]),
    "block_causal": pack_of([block_causal(5, 20, 17), block_causal(33, 1, 1, 1, 16, 2), block_causal(1)]),
    "reference_causal": pack_of([reference_causal(5, 19), reference_causal(33, 16), reference_causal(1, 2)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PLANS)
def test_plans(name, dtype, device):
    plan = PLANS[name]
    check(*qkv(plan.num_queries, plan.num_keys, 1, 16, dtype, device), plan)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_many_one_token_segments(dtype, device):
    plan = block_diagonal([1] * 100)
    q, k, v = qkv(100, 100, 1, 16, dtype, device)
    out, lse = run_attention(q, k, v, plan)
    assert torch.equal(out, v)
    check_backward(q, k, v, out, lse, plan)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims_and_rectangular_tiles(head_dim, dtype, device):
    # Rows and keys of a tile differ, and differ between the kernels, in both directions.
    wide = AttentionConfig(BLOCK_M=32, BLOCK_N=16, num_warps=4, num_stages=1)
    tall = AttentionConfig(BLOCK_M=16, BLOCK_N=32, num_warps=4, num_stages=1)
    plan = block_diagonal([33, 20])
    q, k, v = qkv(53, 53, 1, head_dim, dtype, device)
    out, lse = check_forward(q, k, v, plan, wide)
    for dq, dkdv in ((wide, tall), (tall, wide)):
        check_backward(q, k, v, out, lse, plan, BackwardConfig(dq=dq, dkdv=dkdv))


@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_intervals_in_rectangular_tiles(dtype, device):
    """A tile of queries ends inside a tile of keys, and in other tiles, the other way around."""
    wide = AttentionConfig(BLOCK_M=32, BLOCK_N=16, num_warps=4, num_stages=1)
    tall = AttentionConfig(BLOCK_M=16, BLOCK_N=32, num_warps=4, num_stages=1)
    plan = block_causal(33, 2, 37)
    q, k, v = qkv(plan.num_queries, plan.num_keys, 1, 16, dtype, device)
    for config in (wide, tall):
        out, lse = check_forward(q, k, v, plan, config)
    for dq, dkdv in ((wide, tall), (tall, wide)):
        check_backward(q, k, v, out, lse, plan, BackwardConfig(dq=dq, dkdv=dkdv))


@pytest.mark.parametrize("dtype", DTYPES)
def test_picked_configs(dtype, device):
    # 130 is a full query tile of 128 and one of two rows; it has full key tiles and a tail of two.
    capability = torch.cuda.get_device_capability() if device == "cuda" else (9, 0)
    plan = block_diagonal([1, 130])
    q, k, v = qkv(131, 131, 1, 64, dtype, device)
    out, lse = check_forward(q, k, v, plan, pick_config(64, dtype, capability))
    check_backward(q, k, v, out, lse, plan, pick_backward_config(64, dtype, capability))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("plan", [block_diagonal([1025]), block_diagonal([4096, 512, 77, 1, 1331])])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_real_sizes(plan, head_dim, dtype, device):
    capability = torch.cuda.get_device_capability()
    config = pick_config(head_dim, dtype, capability)
    q, k, v = qkv(plan.num_queries, plan.num_keys, 3, head_dim, dtype, device)
    out, lse = check_forward(q, k, v, plan, config)
    backward = pick_backward_config(head_dim, dtype, capability)
    check_backward(q, k, v, out, lse, plan, backward)
    grad_out = torch.randn_like(out)
    first, second = (run_backward(grad_out, q, k, v, out, lse, plan, backward) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "two runs differ"


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided(dtype, device):
    fused = torch.randn(20, 4, 2, 16, device=device).to(dtype)  # one projection: rows of q, k, v are 128 apart
    heads_first = torch.randn(4, 2, 20, 16, device=device).to(dtype)  # [H, N, D] memory
    padded = torch.randn(2, 20, 2, 48, device=device).to(dtype)  # heads 48 apart, or 24
    plan = block_diagonal([3, 17])
    for q, k, v, grad_out in (
        fused.unbind(1),
        (heads_first[0].transpose(0, 1), fused[:, 1], padded[0, ..., :16], padded[1].view(20, 4, 24)[:, :2, :16]),
    ):
        out, lse = check_forward(q, k, v, plan, SMALL)
        out = torch.stack([out, out], 2)[:, :, 1]  # strides of its own
        check_backward(q, k, v, out, lse, plan, grad_out=grad_out)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflow in rows and columns that are masked
@pytest.mark.parametrize("sign", [-1, 1])
def test_large_scores(sign, device):
    # All scores near -256 or 256: exp over- and underflows unless lse comes off first, and of rows loaded as 0.
    q, k, v = (0.1 * x for x in qkv(20, 20, 1, 16, torch.float16, device))
    check(q + 8, k + 8 * sign, v, block_diagonal([20]))


# --- promises


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_bit_identical_alone_and_in_any_pack(dtype, device):
    # Samples with tails and without, one token, hidden keys, several intervals, other numbers of queries than keys.
    plans = [block_diagonal([n]) for n in (33, 1)] + [
        PLANS["several_intervals"],
        PLANS["cross"],
        reference_causal(5, 32),
        block_causal(19, 5, 34, 2),
        causal(7, 20),
    ]
    samples = [[*qkv(plan.num_queries, plan.num_keys, 1, 16, dtype, device)] for plan in plans]
    for sample in samples:
        sample.append(torch.randn_like(sample[0]))

    def run(inputs, plan):
        """Everything with a row per query, then everything with a row per key."""
        q, k, v, grad_out = inputs
        out, lse = run_attention(q, k, v, plan)
        dq, *dkdv = run_backward(grad_out, q, k, v, out, lse, plan)
        return [out, lse.T, dq], dkdv

    alone = [run(sample, plan) for sample, plan in zip(samples, plans, strict=True)]
    for order in ([0, 1, 2, 3, 4, 5, 6], [4, 6, 2, 0, 5, 3, 1]):
        inputs = [torch.cat(parts) for parts in zip(*(samples[i] for i in order), strict=True)]
        results = run(inputs, pack_of([plans[i] for i in order]))
        for kind, rows in enumerate(("num_queries", "num_keys")):
            for n, result in enumerate(results[kind]):
                parts = result.split([getattr(plans[i], rows) for i in order])
                for i, part in zip(order, parts, strict=True):
                    assert torch.equal(part, alone[i][kind][n]), f"{rows} {n} of sample {i} in {order}"


def test_two_runs_are_equal(device):
    plan = PLANS["several_intervals"]
    q, k, v = qkv(plan.num_queries, plan.num_keys, 1, 16, torch.float16, device)
    out, lse = run_attention(q, k, v, plan)
    again = run_attention(q, k, v, plan)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
    first, second = (run_backward(out, q, k, v, out, lse, plan) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN in rows that are not stored
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_invisible_rows_may_hold_anything(bad, device):
    # Two samples, and keys around and between the first one's intervals that only the second one sees, or nobody. The
    # rows of both share tiles of 16; one interval is a full tile and a tail, the others are tails.
    plan = AttentionPlan(((0, 20), (20, 24)), (((1, 20), (24, 41)), ((20, 23),)), 24, 50)
    hidden_keys, hidden_queries = [0, *range(20, 24), *range(41, 50)], slice(20, 24)
    inputs = qkv(24, 50, 1, 16, torch.float32, device)
    grad_out = torch.randn_like(inputs[0])
    clean = run_attention(*inputs, plan)
    clean_dq, *clean_dkdv = run_backward(grad_out, *inputs, *clean, plan)

    q, k, v, grad_out, out, lse = (x.clone() for x in (*inputs, grad_out, *clean))
    k[hidden_keys], v[hidden_keys] = bad, -bad
    q[hidden_queries], grad_out[hidden_queries], out[hidden_queries], lse[:, hidden_queries] = bad, bad, -bad, bad
    assert torch.equal(run_attention(q, k, v, plan)[0][:20], clean[0][:20])
    visible = [*range(1, 20), *range(24, 41)]
    dq, *dkdv = run_backward(grad_out, q, k, v, out, lse, plan)
    assert torch.equal(dq[:20], clean_dq[:20])
    for gradient, clean_gradient in zip(dkdv, clean_dkdv, strict=True):
        assert torch.equal(gradient[visible], clean_gradient[visible])
        assert not gradient[[0, 23, *range(41, 50)]].any(), "nobody sees these"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_follows_a_causal_interval_may_be_anything(device):
    """The rows behind the last causal key, which share its tile, and keys behind all queries of a tile."""
    plan, kept = causal(5, 20), slice(None, 10)
    inputs = qkv(20, 40, 1, 16, torch.float32, device)
    wider = AttentionPlan(plan.ranges, plan.intervals, 20, 40, plan.causal)
    clean = run_attention(*inputs, wider)
    q, k, v = (x.clone() for x in inputs)
    k[25:], v[25:] = float("nan"), float("inf")
    assert all(torch.equal(a, b) for a, b in zip(run_attention(q, k, v, wider), clean, strict=True))
    gradients, clean_gradients = (run_backward(clean[0], *x, *clean, wider) for x in ((q, k, v), inputs))
    assert torch.equal(gradients[0], clean_gradients[0])
    assert all(torch.equal(a[:25], b[:25]) for a, b in zip(gradients[1:], clean_gradients[1:], strict=True))
    k[21:25] += 3.0  # keys of later queries only
    v[21:25] -= 2.0
    assert torch.equal(run_attention(q, k, v, wider)[0][kept], clean[0][kept])


def test_offsets_beyond_32_bits(device):
    # 33 rows 2^26 elements apart end past 2^31 elements. Only the pages that are used become resident.
    stride = 2**26
    # empty_strided, as nan_memory would fill what torch.empty gives
    buffer = torch.empty_strided((32 * stride + 96,), (1,), dtype=torch.float16, device=device)
    far = [buffer.as_strided((33, 1, 16), (stride, 16, 1), offset) for offset in range(0, 80, 16)]
    for x in far:
        x.copy_(torch.randn(33, 1, 16, device=device))
    q, k, v, grad_out, out = far
    near = [x.clone(memory_format=torch.contiguous_format) for x in far]
    plan = block_diagonal([33])
    results, expected = (run_attention(*x[:3], plan) for x in (far, near))
    assert torch.equal(results[0], expected[0]) and torch.equal(results[1], expected[1])
    out.copy_(results[0])
    near[4].copy_(results[0])
    gradients = run_backward(grad_out, q, k, v, out, results[1], plan)
    expected = run_backward(near[3], *near[:3], near[4], results[1], plan)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_without_queries(device):
    plan = AttentionPlan((), (), 0, 7)
    q, k, v = qkv(0, 7, 2, 16, torch.float32, device)
    out, lse = run_attention(q, k, v, plan)
    assert out.shape == (0, 2, 16) and lse.shape == (2, 0)
    dq, dk, dv = run_backward(q, q, k, v, out, lse, plan)
    assert dq.shape == (0, 2, 16) and dk.shape == (7, 2, 16) and not dk.any() and not dv.any()


def test_refuses_other_head_dims(device):
    q, k, v = qkv(4, 4, 1, 48, torch.float32, device)
    with pytest.raises(AssertionError, match="head_dim 48"):
        run_attention(q, k, v, block_diagonal([4]))
    with pytest.raises(AssertionError, match="head_dim 48"):
        run_backward(q, q, k, v, q, torch.zeros(1, 4, device=device), block_diagonal([4]))


def test_refuses_tables_without_tiles(device):
    q, k, v = qkv(4, 4, 1, 16, torch.float32, device)
    with pytest.raises(AssertionError, match="not cut into tiles"):
        attention.segment_attention(q, k, v, AttentionTables.uncut(block_diagonal([4]), device), 1.0)


# --- tables


def random_plan(rng):
    ranges, intervals, at = [], [], 0
    num_keys = rng.randrange(60)
    for _ in range(rng.randrange(6)):
        length = rng.randrange(1, 40)
        ranges.append((at, at + length))
        edges = sorted(rng.sample(range(num_keys + 1), min(num_keys + 1, 2 * rng.randrange(4)) // 2 * 2))
        if len(edges) >= 4 and rng.random() < 0.3:
            edges[1] = edges[2]  # intervals that touch, as of two samples
        intervals.append(tuple(zip(edges[::2], edges[1::2], strict=True)))
        at += length
    return AttentionPlan(tuple(ranges), tuple(intervals), at, num_keys)


def mask_of(plan):
    mask = torch.zeros(plan.num_queries, plan.num_keys, dtype=torch.int)
    for (start, end), intervals in zip(plan.ranges, plan.intervals, strict=True):
        for a, b in intervals:
            mask[start:end, a:b] += 1
    return mask


def test_transpose_is_the_same_relation_and_covers_every_key():
    rng = random.Random(0)
    for _ in range(200):
        plan = random_plan(rng)
        assert torch.equal(mask_of(plan.transpose), mask_of(plan).T)
        assert [row for span in plan.transpose.ranges for row in range(*span)] == list(range(plan.num_keys))
        assert all(spans == tuple(sorted(spans)) for spans in plan.transpose.intervals)
