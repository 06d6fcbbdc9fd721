"""segment_attention as users call it: every implementation, forward and backward, against float64; which one serves."""

import dataclasses
import random

import oracles
import pytest
import torch
import torch.nn.functional as F
from interleaved import diffusers_mask, interleaved
from torch.nn.attention import SDPBackend, sdpa_kernel

from uniref_fast import native, ops, tuning
from uniref_fast.kernels.segment_attention_config import AttentionConfig
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.ops import _dispatch, dense_attention
from uniref_fast.ops.segment_attention import NUMBERS, _operands
from uniref_fast.testing import assert_within_budget, max_relative_error
from uniref_fast.visibility import POLICIES, AttentionPlan, block_causal, plan, query_plan

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
CASES = [("reference", torch.float32), ("reference", torch.bfloat16)]
CASES += [("triton", torch.float32), ("triton", torch.float16)]
CASES += [("triton", torch.bfloat16), ("dense", torch.float16), ("dense", torch.bfloat16)] if CUDA else []
if not CUDA:
    missing = pytest.mark.skipif(not native.available(), reason=f"native: {native.reason()}")
    CASES += [pytest.param("native", dtype, marks=missing) for dtype in (torch.float32, torch.bfloat16)]
    CASES += [("dense", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
SERVED = torch.bfloat16 if CUDA else torch.float32  # by our kernels and by the library
each_case = pytest.mark.parametrize("impl, dtype", CASES)

# Ragged on purpose: no text, one token of text, 1 x 1 images, no references, a sample across a tile border of 64.
PACK = [
    Sample(0, (1, 1, 1)),
    Sample(1, (1, 5, 7), ((1, 1, 1), (1, 3, 2))),
    Sample(((3, True), (2, False)), (1, 8, 8), ((1, 4, 2),)),
]
# Three targets that share one copy of two references.
GROUP = [Sample(3 - i, (1, 4, 5), ((1, 3, 3), (1, 1, 2)), group=0) for i in range(3)]


def rand(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def inputs(compiled, dtype, heads=2, dim=64):
    q, g = (rand(compiled.num_queries, heads, dim, dtype=dtype) for _ in range(2))
    k, v = (rand(compiled.num_keys, heads, dim, dtype=dtype) for _ in range(2))
    return [x.requires_grad_() for x in (q, k, v)], g


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.slow
@each_case
@pytest.mark.parametrize("visibility", list(POLICIES))
def test_forward_and_backward(impl, dtype, visibility):
    grouped = visibility == "group_shared"
    compiled = plan(SelfLayout.qwen(GROUP if grouped else PACK, shared_references=grouped), visibility)
    x, g = inputs(compiled, dtype)
    out, lse = ops.segment_attention(*x, compiled, return_lse=True, impl=impl)
    grads = torch.autograd.grad(out, x, g)
    eager, eager_lse = oracles.library_attention(*x, compiled)
    eager_grads = torch.autograd.grad(eager, x, g)
    wide = [t.detach().double().requires_grad_() for t in x]
    oracle, oracle_lse = oracles.attention(*wide, compiled)
    oracle_grads = torch.autograd.grad(oracle, wide, g.double())
    if impl == "dense" and dtype != torch.float32:  # PyTorch sums rounded probabilities, which only its lse shows
        torch.testing.assert_close(lse.double(), oracle_lse, rtol=1e-3, atol=1e-3)
        assert_within_budget(out, eager, oracle, f"{impl} out")
    else:
        oracles.assert_attention_within_budget((out, lse), (eager, eager_lse), (oracle, oracle_lse), impl)
    for name, got, theirs, expected in zip("qkv", grads, eager_grads, oracle_grads, strict=True):
        assert_within_budget(got, theirs, expected, f"{impl} gradient of {name}")


@each_case
def test_packing_invariance(impl, dtype):
    """A sample's rows and their gradients are the same bits alone and at the end of a pack."""
    alone, packed = SelfLayout.qwen(PACK[1:2]), SelfLayout.qwen([PACK[2], PACK[0], PACK[1]])
    x, g = inputs(plan(packed), dtype, dim=32)
    tail = slice(-alone.joint_length, None)
    own = [t.detach()[tail].requires_grad_() for t in x]
    out = ops.segment_attention(*x, plan(packed), impl=impl)
    out_alone = ops.segment_attention(*own, plan(alone), impl=impl)
    assert torch.equal(out[tail], out_alone)
    for a, b in zip(torch.autograd.grad(out, x, g), torch.autograd.grad(out_alone, own, g[tail]), strict=True):
        assert torch.equal(a[tail], b)


@each_case
def test_strided_and_expanded_gradients(impl, dtype):
    """q, k, v as slices of one projection; the gradient of a sum, which has stride 0."""
    compiled = plan(SelfLayout.qwen(PACK))
    qkv = rand(compiled.num_queries, 3, 2, 32, dtype=dtype).requires_grad_()
    ops.segment_attention(*qkv.unbind(1), compiled, impl=impl).sum().backward()
    inputs, ones = qkv.detach().unbind(1), torch.ones_like(qkv[:, 0])
    eager, oracle = (
        oracles.gradients(lambda q, k, v, by=formula: by(q, k, v, compiled)[0], inputs, [ones], each)
        for formula, each in ((oracles.library_attention, dtype), (oracles.attention, torch.float64))
    )
    for name, got, theirs, exact in zip("qkv", qkv.grad.unbind(1), eager, oracle, strict=True):
        assert_within_budget(got, theirs, exact, f"{impl} gradient of {name}")


@each_case
def test_queries_without_keys_and_keys_without_queries(impl, dtype):
    compiled = AttentionPlan(((0, 3), (3, 5)), (((1, 4),), ()), 5, 7)
    x, g = inputs(compiled, dtype, dim=16)
    out, lse = ops.segment_attention(*x, compiled, return_lse=True, impl=impl)
    assert not out[3:].any() and (lse[:, 3:] == float("-inf")).all() and lse[:, :3].isfinite().all()
    dq, dk, dv = torch.autograd.grad(out, x, g)
    assert dq[:3].any() and not dq[3:].any()
    for d in (dk, dv):
        assert d[1:4].any() and not d[:1].any() and not d[4:].any()


# ---- causal intervals ----

# As the model has them, with text of one token, images next to each other, padding, and no text at all.
CAUSAL_PACK = "t5 r3x4 t1 r1x1 r2x5 t20 x5x7", "t1 x1x1", "r2x2 t70 p3 x2x9", "x2x3"


def causal_check(impl, dtype, compiled, mask):
    """Compare out, lse and gradients with one dense softmax under an explicit mask, in float64."""
    x, g = inputs(compiled, dtype, heads=1, dim=64)
    out, lse = ops.segment_attention(*x, compiled, return_lse=True, impl=impl)

    def masked(*x):
        part = [t.transpose(0, 1)[None] for t in x]
        return F.scaled_dot_product_attention(*part, attn_mask=mask.to(DEVICE))[0].transpose(0, 1)

    tensors = [t.detach() for t in x]
    oracle, eager = masked(*(t.double() for t in tensors)), masked(*tensors)
    assert_within_budget(out, eager, oracle, f"{impl} out")
    scores = torch.einsum("mhd,nhd->hmn", *(t.double() for t in tensors[:2])) * x[0].shape[2] ** -0.5
    exact_lse = scores.masked_fill(~mask.to(DEVICE), float("-inf")).logsumexp(-1)
    loose = impl == "dense" and dtype != torch.float32  # as above
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-3 if loose else 1e-5, atol=1e-3 if loose else 1e-5)
    grads = torch.autograd.grad(out, x, g)
    budget = zip(
        "qkv", grads, *(oracles.gradients(masked, tensors, [g], t) for t in (dtype, torch.float64)), strict=True
    )
    for name, got, theirs, expected in budget:
        assert_within_budget(got, theirs, expected, f"{impl} gradient of {name}")


@each_case
def test_causal_forward_and_backward(impl, dtype):
    layout = interleaved(*CAUSAL_PACK)
    causal_check(impl, dtype, plan(layout, block_causal), diffusers_mask(layout))


@each_case
def test_causal_queries_without_the_prefix(impl, dtype):
    """Kept keys: the queries are those of the later segments, the keys are all; the same bits as in the whole."""
    layout = interleaved("t5 r3x4 t20 t3 r2x5 t17 x2x7", "t9 r2x2 t2 x1x3")
    kept = [s for s in layout.segments if s.joint_start >= 17]
    rows = torch.tensor([row for s in kept for row in range(s.joint_start, s.joint_end)], device=DEVICE)
    whole, part = plan(layout, block_causal), query_plan(layout, block_causal, kept)
    assert part.causal and part.num_queries < part.num_keys
    causal_check(impl, dtype, part, diffusers_mask(layout)[rows.cpu()])
    (q, k, v), _ = inputs(whole, dtype, heads=1, dim=32)
    out = ops.segment_attention(q, k, v, whole, impl=impl)
    assert torch.equal(ops.segment_attention(q[rows], k, v, part, impl=impl), out[rows])


@each_case
def test_causal_packing_invariance(impl, dtype):
    """Samples with texts of any length and 0 to 6 images: the same bits alone and in a pack, gradients too."""
    rng = random.Random(0)
    longest, count = (30, 4) if impl == "triton" and not CUDA else (300, 12)  # interpreted kernels are slow
    samples = []
    for images in range(count):
        parts = [f"t{rng.randint(1, longest)} r{rng.randint(1, 7)}x{rng.randint(1, 9)}" for _ in range(images % 7)]
        samples.append(" ".join([*parts, f"t{rng.randint(1, longest)}", f"x{rng.randint(1, 9)}x{rng.randint(1, 9)}"]))
    packed = plan(interleaved(*samples), block_causal)
    x, g = inputs(packed, dtype, heads=1, dim=16)
    results = [out := ops.segment_attention(*x, packed, impl=impl), *torch.autograd.grad(out, x, g)]
    at = 0
    for sample in samples:
        alone = plan(interleaved(sample), block_causal)
        rows = slice(at, at := at + alone.num_queries)
        own = [t.detach()[rows].requires_grad_() for t in x]
        own_results = [out := ops.segment_attention(*own, alone, impl=impl), *torch.autograd.grad(out, own, g[rows])]
        for a, b in zip(results, own_results, strict=True):
            assert torch.equal(a[rows], b), sample


def test_causal_gradients_of_all_orders():
    """gradcheck and gradgradcheck of the reference, and a Jacobian-vector product."""
    compiled = plan(interleaved("t3 r1x2 t2 x1x2"), block_causal)
    q, k, v = (rand(compiled.num_queries, 1, 2, dtype=torch.float64).requires_grad_() for _ in range(3))

    def attend(q, k, v):
        return ops.segment_attention(q, k, v, compiled)

    assert torch.autograd.gradcheck(attend, (q, k, v)) and torch.autograd.gradgradcheck(attend, (q, k, v))
    tangents = [torch.randn_like(q) for _ in range(3)]
    _, change = torch.func.jvp(attend, tuple(x.detach() for x in (q, k, v)), tuple(tangents))
    jacobians = torch.func.jacrev(attend, (0, 1, 2))(*(x.detach() for x in (q, k, v)))
    expected = sum(torch.tensordot(j, t, 3) for j, t in zip(jacobians, tangents, strict=True))
    torch.testing.assert_close(change, expected)


def test_plans_without_causal_intervals_launch_the_kernels_as_before():
    """The flag, which is a constant of the kernels, is the last number of each launch."""
    x = [rand(5, 1, 16, dtype=torch.float16)] * 3
    for rule, flag in ((block_causal, 1), ("full", 0)):
        numbers = _operands(x[0], plan(interleaved("t2 x1x3"), rule), "triton", True)[3]
        assert [numbers[NUMBERS * i - 1] for i in (1, 2, 3)] == [flag] * 3 and len(numbers) == 3 * NUMBERS


LAUNCHES = [{"BLOCK_M": m, "BLOCK_N": n, "num_warps": 4, "num_stages": 1} for m, n in ((16, 16), (32, 16), (16, 32))]


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("change_before", ["forward", "backward"])
def test_a_launch_uses_the_configuration_of_its_tables(monkeypatch, change_before):
    """A table of the device that changes between cutting the tiles and a launch has no effect on that launch."""
    compiled = dataclasses.replace(plan(SelfLayout.qwen(PACK), "reference_causal"))
    x, g = inputs(compiled, torch.float16, heads=1, dim=32)
    asked = []

    def tuned(tile):
        def attention_config(name, dtype, dim, way):
            asked.append((dtype, dim, way))
            return tile if way == "forward" else {"dq": tile, "dkdv": tile}

        monkeypatch.setattr(tuning, "attention_config", attention_config)

    def run(cut_for, launched_under):
        tuned(cut_for)
        operands = _operands(x[0], compiled, "triton", True)
        if change_before == "forward":
            tuned(launched_under)
        out, _ = torch.ops.uniref_fast.segment_attention(*x, *operands, 0.2, "triton")
        tuned(launched_under)
        return [out, *torch.autograd.grad(out, x, g)]

    expected = run(LAUNCHES[0], LAUNCHES[0])
    wanted = ops.segment_attention(*x, compiled, scale=0.2, impl="dense")
    for got, dense in zip(expected, (wanted, *torch.autograd.grad(wanted, x, g)), strict=True):
        torch.testing.assert_close(got, dense, rtol=1e-2, atol=1e-2)
    assert {(torch.float16, 32, way) for way in ("forward", "backward")} == set(asked)
    for launched_under in LAUNCHES[1:]:
        for got, same in zip(run(LAUNCHES[0], launched_under), expected, strict=True):
            assert torch.equal(got, same)


@pytest.mark.slow
@each_case
def test_torch_library_contract(impl, dtype):
    """Schema, fake, autograd and dispatch agree with what the op does (torch.library.opcheck)."""
    if impl == "reference":
        pytest.skip("plain PyTorch, not an op")
    for compiled in (plan(SelfLayout.qwen(PACK), "reference_causal"), plan(interleaved("t9 r2x2 x1x3"), block_causal)):
        x, _ = inputs(compiled, dtype, heads=1, dim=32)
        if impl == "dense":
            op = torch.ops.uniref_fast.dense_attention.default
            args = (*x, dense_attention.rectangles_of(compiled), 0.2)
        else:
            op = torch.ops.uniref_fast.segment_attention.default
            args = (*x, *_operands(x[0], compiled, impl, True), 0.2, impl)
        torch.library.opcheck(op, args)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["reference", "dense", None])
def test_under_torch_compile(impl):
    """Plans change between calls of one compiled function; one graph break, in the planning."""
    plans = [plan(SelfLayout.qwen([Sample(3, (1, 4, n))])) for n in (4, 5)]
    plans.append(plan(interleaved("t3 r1x4 t6 x2x2"), block_causal))

    def attend(q, k, v, compiled):
        return ops.segment_attention(q * 1.5, k, v, compiled, impl=impl).sin()

    compiled_attend = torch.compile(attend, backend="aot_eager")
    for each in plans * 2:
        x, g = inputs(each, SERVED if impl == "dense" else torch.float32, dim=32)
        out, expected = compiled_attend(*x, each), attend(*x, each)
        assert torch.equal(out, expected)
        for a, b in zip(torch.autograd.grad(out, x, g), torch.autograd.grad(expected, x, g), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["cudnn", "flash"])
def test_gpu_libraries_take_our_calls(name, causal):
    """The calls fit the schemas of PyTorch and return the shapes that the merging expects (fake tensors, no GPU)."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k = (torch.empty(1, 3, n, 64, dtype=torch.bfloat16, device="cuda") for n in (40, 56))
        out, lse = dense_attention._FORWARD[name](q, k, k, causal, 0.125)
        assert out.shape == q.shape and lse.shape == (1, 3, 40) and lse.dtype == torch.float32
        grads = dense_attention._BACKWARD[name](q, q, k, k, out, lse, causal, 0.125)
        assert [g.shape for g in grads] == [q.shape, k.shape, k.shape]


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("ours_first", [False, True])
def test_compiled_backward_is_not_shared_with_other_calls(ours_first):
    """PyTorch finds cuDNN's by q, k and v alone; theirs has a gradient that is laid out heads first."""
    compiled = plan(SelfLayout.qwen([Sample(20 + ours_first, (1, 16, 16))]))
    x, g = inputs(compiled, torch.bfloat16)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        theirs = F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in x))
    ours = ops.segment_attention(*x, compiled, impl="dense")
    heads_first = g.transpose(0, 1)[None].contiguous()
    calls = [lambda: torch.autograd.grad(theirs, x, heads_first), lambda: torch.autograd.grad(ours, x, g)]
    wide = [t.detach().double().requires_grad_() for t in x]
    oracle = torch.autograd.grad(oracles.attention(*wide, compiled)[0], wide, g.double())
    for call in reversed(calls) if ours_first else calls:
        for got, expected in zip(call(), oracle, strict=True):
            assert max_relative_error(got, expected) < 0.02


# ---- which one serves ----

ONE_BIG, MANY_SMALL = [Sample(64, (1, 32, 32))], [Sample(2, (1, 2, 2))] * 40


def fresh_plan(samples):
    """A plan without a stored choice."""
    return dataclasses.replace(plan(SelfLayout.qwen(samples)))


def test_a_table_decides(monkeypatch):
    """Ours is given a dear pair and a cheap rectangle, dense the opposite."""
    probe = rand(1, 2, 64, dtype=SERVED)
    ours = "triton" if CUDA else "native"
    if _dispatch.unavailable(ours, probe) or (dense_attention.backend(probe) is None):
        pytest.skip("one implementation only")
    dtype = str(SERVED).removeprefix("torch.")
    costs = {
        ours: {dtype: {"forward": [0, 1e-6, 0, 2e-9], "backward": [0, 1, 0, 0]}},
        "dense": {dtype: {"forward": [0, 1e-4, 0, 1e-9], "backward": [0, 0, 0, 0]}},
    }
    monkeypatch.setattr(tuning, "table", lambda name: {"attention": costs})
    assert ops.explain_attention(probe, fresh_plan(ONE_BIG))[0] == "dense"
    many = fresh_plan(MANY_SMALL)
    impl, reason = ops.explain_attention(probe, many)
    assert impl == ours and "times as fast as dense" in reason
    assert ops.explain_attention(probe, many, backward=True)[0] == "dense"  # its backward is free
    # A forward that is gone backward through and one that must equal it are served alike.
    q, k, v = (rand(plan(SelfLayout.qwen(MANY_SMALL)).num_queries, 2, 64, dtype=SERVED) for _ in range(3))
    free = ops.segment_attention(q, k, v, many)
    alike = ops.segment_attention(q, k, v, many, backward=True)
    trained = ops.segment_attention(q.clone().requires_grad_(), k, v, many)
    assert torch.equal(alike, trained) and torch.equal(alike, ops.segment_attention(q, k, v, many, impl="dense"))
    assert torch.equal(free, ops.segment_attention(q, k, v, many, impl=ours))


def test_without_a_table(monkeypatch):
    monkeypatch.setattr(tuning, "table", lambda name: None)
    probe = rand(1, 2, 64, dtype=SERVED)
    if _dispatch.unavailable("triton" if CUDA else "native", probe):
        pytest.skip("none of our kernels")
    impl, reason = ops.explain_attention(probe, fresh_plan(MANY_SMALL))
    assert impl == ops.choose(None, probe, 64) and "no table" in reason


def test_float64_is_float64():
    probe = torch.zeros(1, 2, 64, dtype=torch.float64)
    assert ops.explain_attention(probe, fresh_plan(MANY_SMALL))[0] == "reference"


def test_without_our_kernels_the_library_serves(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "reason", lambda: "not built")
    impl, reason = ops.explain_attention(torch.zeros(1, 2, 64), fresh_plan(MANY_SMALL))
    assert impl == "dense" and "not built" in reason


@pytest.mark.parametrize("name", [path.stem for path in tuning.FOLDER.glob("*.json")])
def test_committed_tables(name):
    """Every cost is there, finite and not negative; a bigger plan never costs less."""
    made = tuning.table(name)
    assert {"device", "date", "torch", "threads", "command"} <= set(made)
    for impl, dtypes in made["attention"].items():
        for dtype, costs in dtypes.items():
            for direction in ("forward", "backward"):
                assert len(costs[direction]) == len(tuning.FEATURES) and min(costs[direction]) >= 0
                assert sum(costs[direction]) > 0
            kind = getattr(torch, dtype)
            small, big = (
                tuning.attention_seconds(name, impl, kind, fresh_plan(p), 4, 64, True)
                for p in (MANY_SMALL[:1], ONE_BIG)
            )
            assert 0 < small < big


def test_a_table_with_parameters_of_a_removed_kernel_is_read():
    """The table of the H100 was written when launches had `hopper_keys`."""
    assert '"hopper_keys"' in (tuning.FOLDER / "h100-80gb-hbm3.json").read_text()
    for dtype in (torch.bfloat16, torch.float16):
        for head_dim in (64, 128):
            forward, backward = (
                tuning.attention_config("h100-80gb-hbm3", dtype, head_dim, way) for way in ("forward", "backward")
            )
            assert AttentionConfig(**forward).BLOCK_M >= 64
            assert {AttentionConfig(**backward[name]).num_stages for name in ("dq", "dkdv")} <= {2, 3}


LAYOUT = SelfLayout.qwen(PACK)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ops.segment_attention(*[rand(5, 2, 8)] * 3, plan(LAYOUT)), "queries"),
        (lambda: ops.segment_attention(rand(5, 2, 8), rand(5, 3, 8), rand(5, 3, 8), plan(LAYOUT)), r"\[Nk, H, D\]"),
        (lambda: ops.segment_attention(*[rand(LAYOUT.joint_length, 1, 8)] * 3, plan(LAYOUT), scale=0.0), "positive"),
        (
            lambda: ops.segment_attention(*[rand(LAYOUT.joint_length, 1, 8)] * 3, plan(LAYOUT), impl="sdpa"),
            "flash, cudnn_flex",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
