"""Attention in 8 bits: the emulation against float64, the Triton kernel against the emulation."""

import importlib.util

import pytest
import torch
from oracles import attention as attention_oracle

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from uniref_fast import ops, tuning
from uniref_fast.kernels import segment_attention_fp8 as kernels
from uniref_fast.kernels.segment_attention_config import AttentionConfig, AttentionTables
from uniref_fast.ops.attention_fp8 import attention_fp8_reference, launch_config
from uniref_fast.visibility import AttentionPlan

CUDA = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
SMALL = AttentionConfig(BLOCK_M=16, BLOCK_N=32, num_warps=4, num_stages=2)  # 32 keys: an 8-bit product needs that many

pytestmark = pytest.mark.usefixtures("nan_memory", "rounded_fp8_casts")


def qkv(num_queries, num_keys, heads=2, head_dim=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(num_queries, heads, head_dim, generator=generator)
    k, v = torch.randn(2, num_keys, heads, head_dim, generator=generator)
    q = q / q.square().mean(-1, keepdim=True).sqrt()  # as after the QK norm
    k = k / k.square().mean(-1, keepdim=True).sqrt()
    return [x.to(DEVICE, DTYPE) for x in (q, k, v)]


def kernel(q, k, v, plan, config=SMALL):
    tables = AttentionTables.by_query(plan, q.device, config)
    return kernels.segment_attention_fp8(q, k, v, tables, q.shape[2] ** -0.5)


def test_launch_of_the_table(monkeypatch):
    """A measured launch is taken, but for a plan with causal intervals or another head dimension."""
    measured = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    table = {"attention_configs": {"float8_e4m3fn/64/forward": measured}}
    monkeypatch.setattr(tuning, "table", lambda name: table)
    spans = ((0, 8),), (((0, 8),),), 8, 8
    for dim, causal, taken in ((64, (-1,), True), (64, (0,), False), (128, (-1,), False)):
        config = launch_config(torch.empty(8, 2, dim, device=DEVICE), AttentionPlan(*spans, causal))
        assert (config == AttentionConfig(**measured)) == taken


def emulation(q, k, v, plan):
    return attention_fp8_reference(q, k, v, plan, q.shape[2] ** -0.5)


def relative(actual, expected):
    assert actual.isfinite().all()
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def one_range(queries, keys):
    return AttentionPlan(((0, queries),), (((0, keys),),), queries, keys)


PLANS = {
    "one_token": one_range(1, 1),  # softmax of one score: out is v
    "tile_borders": one_range(17, 33),  # a row and a key past a tile
    "two_intervals": AttentionPlan(((0, 20), (20, 49)), (((0, 20), (40, 49)), ((3, 4), (20, 49))), 49, 49),
    "no_keys": AttentionPlan(((0, 3), (3, 20)), (((0, 5),), ()), 20, 20),
    # Causal over several tiles, between two intervals that all of its queries see.
    "causal": AttentionPlan(((0, 37), (37, 49)), (((2, 7), (7, 44), (44, 49)), ((2, 7), (7, 44))), 49, 49, (1, -1)),
    "no_key_at_all": AttentionPlan(((0, 2),), ((),), 2, 0),
}


@pytest.mark.parametrize("attend", [emulation, kernel])
@pytest.mark.parametrize("name", PLANS)
def test_against_float64(name, attend):
    """The error of the whole attention in 8 bits is that of values with 4 significant bits."""
    plan = PLANS[name]
    q, k, v = qkv(plan.num_queries, plan.num_keys)
    out, (expected, _) = attend(q, k, v, plan), attention_oracle(*(x.double() for x in (q, k, v)), plan)
    assert out.shape == q.shape and out.dtype == q.dtype
    if plan.area:
        assert relative(out, expected) < 0.06
    assert not out[expected.abs().amax((1, 2)) == 0].any()


@pytest.mark.parametrize("name", PLANS)
def test_kernel_against_the_emulation(name):
    """They differ by the order of sums in float32, and rarely by a value that this order rounds to another P.

    The first key of each list of intervals has the largest score, because P is relative to the largest one so far.
    """
    plan = PLANS[name]
    q, k, v = qkv(plan.num_queries, plan.num_keys)
    q = q + 2
    for intervals in filter(None, plan.intervals):
        k[intervals[0][0]] = 2.0
        v[intervals[0][0]] *= 3  # not all of the result
    out, expected = kernel(q, k, v, plan), emulation(q, k, v, plan)
    if expected.any():
        assert relative(out, expected) < 2e-3
    else:
        assert not out.any()


def test_scales_of_single_tokens_and_heads():
    """Tokens and heads of very different sizes keep the precision of their own largest value."""
    plan = one_range(24, 70)
    q, k, v = qkv(24, 70)
    v = v * torch.logspace(-4, 4, 70, device=DEVICE)[torch.randperm(70)][:, None, None].to(DTYPE)
    v[:, 1] *= 1e-3
    k = k * torch.logspace(-2, 0, 70, device=DEVICE)[:, None, None].to(DTYPE)
    expected, _ = attention_oracle(*(x.double() for x in (q, k, v)), plan)
    for out in (emulation(q, k, v, plan), kernel(q, k, v, plan)):
        for head in range(2):
            assert relative(out[:, head], expected[:, head]) < 0.06


@pytest.mark.parametrize("attend", [emulation, kernel])
def test_an_outlier_costs_the_others_nothing(attend):
    """A value of 6e4 that no query attends to changes no result."""
    q, k, v = qkv(20, 40)
    q, k[5] = q.abs(), -50.0
    before = attend(q, k, v, one_range(20, 40))
    v[5, :, 3] = 6e4
    assert relative(attend(q, k, v, one_range(20, 40)), before) < 1e-6


@pytest.mark.parametrize("attend", [emulation, kernel])
def test_values_of_zero(attend):
    """Keys whose values are all zero take part with their weight, and no scale of zero gives NaN."""
    plan = one_range(20, 40)
    q, k, v = qkv(20, 40, seed=1)
    v[:20] = 0
    expected, _ = attention_oracle(*(x.double() for x in (q, k, v)), plan)
    assert relative(attend(q, k, v, plan), expected) < 0.06
    assert not attend(q, k, torch.zeros_like(v), plan).any()
    q[:], k[:] = 0, 0
    assert relative(attend(q, k, v, plan), v.mean(0).expand_as(q)) < 0.05


def test_many_small_weights_are_not_lost():
    """The sum over thousands of keys with about equal weights, and one with a large one, keeps its size."""
    plan = one_range(4, 3000)
    q, k, v = qkv(4, 3000, heads=1, head_dim=16)
    k, v = 0.1 * k, v.abs()
    k[1234] = 2 * q[0]
    expected, _ = attention_oracle(*(x.double() for x in (q, k, v)), plan)
    assert relative(emulation(q, k, v, plan), expected) < 0.02


@pytest.mark.parametrize("attend", [emulation, kernel])
def test_the_same_bits_alone_and_in_a_pack(attend):
    """Scales belong to single tokens, and tiles begin where intervals begin."""
    lengths = (5, 33, 18)
    samples = [qkv(n, n, seed=i) for i, n in enumerate(lengths)]
    spans = [(sum(lengths[:i]), sum(lengths[: i + 1])) for i in range(3)]
    pack = AttentionPlan(tuple(spans), tuple((span,) for span in spans), sum(lengths), sum(lengths))
    together = attend(*(torch.cat(parts) for parts in zip(*samples, strict=True)), pack)
    for (start, end), sample in zip(spans, samples, strict=True):
        assert torch.equal(together[start:end], attend(*sample, one_range(end - start, end - start)))


def test_strided_inputs():
    q, k, v = (torch.stack([x, x], 2).flatten(1, 2)[:, ::2] for x in qkv(20, 20))
    plan = one_range(20, 20)
    assert not q.is_contiguous()
    assert torch.equal(kernel(q, k, v, plan), kernel(q.contiguous(), k.contiguous(), v.contiguous(), plan))


def test_the_op_chooses_and_refuses():
    plan = one_range(6, 6)
    q, k, v = qkv(6, 6)
    expected = emulation(q, k, v, plan)
    assert torch.equal(ops.attention_fp8(q, k, v, plan, impl="reference"), expected)
    assert relative(ops.attention_fp8(q, k, v, plan, impl="triton"), expected) < 2e-3
    with pytest.raises(ValueError, match="the plan is for 6 queries and 6 keys"):
        ops.attention_fp8(q[:5], k, v, plan)
    with pytest.raises(ValueError, match="a reference and a Triton kernel"):
        ops.attention_fp8(q, k, v, plan, impl="native")
    with pytest.raises(ValueError, match="scale must be positive"):
        ops.attention_fp8(q, k, v, plan, scale=0.0)
    with pytest.raises(ValueError, match="no gradient"):
        ops.attention_fp8(q.requires_grad_(), k, v, plan, impl="reference")
