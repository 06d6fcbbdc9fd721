"""FlashAttention and cuDNN's flex attention as implementations of a plan, against float64.

Without a GPU the adapters run against stand-ins that have the signatures of the libraries and check their arguments.
"""

import dataclasses
import sys

import attention_libraries
import oracles
import pytest
import torch
from interleaved import interleaved

from uniref_fast import doctor, ops, tuning
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.models import PackedQwenImage
from uniref_fast.ops import flash_attention, flex_attention
from uniref_fast.testing import assert_within_budget
from uniref_fast.visibility import POLICIES, AttentionPlan, block_causal, plan, query_plan, target_plan

# Ragged on purpose: no text, one token of text, 1 x 1 images, no references, text with masked positions in the middle.
PACK = [
    Sample(0, (1, 1, 1)),
    Sample(1, (1, 5, 7), ((1, 1, 1), (1, 3, 2))),
    Sample(((3, True), (2, False), (1, True)), (1, 4, 6), ((1, 4, 2),)),
]
# Targets that share one copy of their references, in two groups; text with masked positions in one of them.
REFERENCES = ((1, 3, 3), (1, 1, 2)), ((1, 2, 3),)
GROUPS = [
    Sample(((2, True), (1, False), (1, True)), (1, 4, 5), REFERENCES[0], group=0),
    *(Sample(2 + i, (1, 2, 5), REFERENCES[0], group=0) for i in range(2)),
    *(Sample(1 + i, (1, 2, 2), REFERENCES[1], group=1) for i in range(2)),
]
GROUPED = SelfLayout.qwen(GROUPS, shared_references=True)
PLANS = {name: plan(GROUPED if name == "group_shared" else SelfLayout.qwen(PACK), name) for name in POLICIES}
CAUSAL = interleaved("t5 r2x3 t4 x3x3", "t1 r1x1 r2x2 t3 p2 x1x1", "x2x2", "t3 t2 r1x2 x1x3")
PLANS |= {
    "block_causal": plan(CAUSAL, block_causal),
    "text of block_causal": query_plan(CAUSAL, block_causal, CAUSAL.text_segments),
    # The causal interval lies before, between and behind intervals of other ranges, which are causal or not.
    "causal anywhere": AttentionPlan(
        ((0, 4), (4, 7), (7, 9)), (((0, 3), (3, 7), (7, 12)), ((0, 3), (3, 7)), ((3, 7), (8, 10))), 9, 12, (1, 0, -1)
    ),
    "targets only": target_plan(SelfLayout.qwen(PACK), "full"),
    "targets of groups": target_plan(GROUPED, "group_shared"),
    # Queries without keys at both ends and in the middle, keys without queries, an empty range and an empty interval,
    # key intervals that overlap in part, and a range whose keys lie before those of the range before it.
    "irregular": AttentionPlan(
        ((0, 2), (2, 5), (5, 5), (5, 6), (6, 9), (9, 11), (11, 12)),
        ((), ((4, 9), (12, 15)), ((0, 1),), ((2, 2),), ((6, 13), (14, 14)), ((1, 3), (16, 17)), ()),
        12,
        19,
    ),
    # Each range sees one interval with its left and one with its right neighbour: three shares of some queries.
    "chain": AttentionPlan(
        ((0, 3), (3, 5), (5, 9)), (((0, 4), (4, 6)), ((0, 4), (6, 9), (9, 11)), ((4, 6), (6, 9))), 9, 11
    ),
}
DTYPES = [torch.float32, torch.bfloat16]
LIBRARIES = attention_libraries.NAMES


def inputs(compiled, dtype, heads=2, dim=16, device="cpu"):
    def rand(rows):
        return torch.randn(rows, heads, dim, device=device).to(dtype)

    torch.manual_seed(0)
    q, k, v, g = (rand(n) for n in (compiled.num_queries, *[compiled.num_keys] * 2, compiled.num_queries))
    return [x.requires_grad_() for x in (q, k, v)], g


@pytest.fixture
def library(monkeypatch):
    """A function that installs a stand-in by name and returns (impl, number of its calls)."""

    def install(name, **options):
        return name.split()[0], attention_libraries.install(monkeypatch, name, **options)

    yield install
    attention_libraries.forget()


def check(impl, compiled, dtype, device="cpu", dim=16):
    """Compare out, lse and gradients of an implementation with float64, by the error budget of the dtype."""
    x, g = inputs(compiled, dtype, dim=dim, device=device)
    out, lse = ops.segment_attention(*x, compiled, return_lse=True, impl=impl)
    grads = torch.autograd.grad(out, x, g)
    eager, eager_lse = oracles.library_attention(*x, compiled)
    eager_grads = torch.autograd.grad(eager, x, g)
    wide = [t.detach().double().requires_grad_() for t in x]
    oracle, oracle_lse = oracles.attention(*wide, compiled)
    oracle_grads = torch.autograd.grad(oracle, wide, g.double())
    oracles.assert_attention_within_budget((out, lse), (eager, eager_lse), (oracle, oracle_lse), impl)
    for name, got, theirs, expected in zip("qkv", grads, eager_grads, oracle_grads, strict=True):
        assert_within_budget(got, theirs, expected, f"{impl} gradient of {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PLANS)
@pytest.mark.parametrize("name", LIBRARIES)
def test_forward_and_backward(library, name, case, dtype):
    impl, counts = library(name)
    check(impl, PLANS[case], dtype)
    assert counts["forward"] and counts["backward"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", PLANS)
@pytest.mark.parametrize("impl", ["flash", "cudnn_flex"])
def test_on_a_gpu(impl, case, dtype, dim):
    """The installed library itself; of several generations of FlashAttention, the preferred one."""
    adapter = flash_attention if impl == "flash" else flex_attention
    if why := adapter.unavailable(torch.empty(1, 2, dim, dtype=dtype, device="cuda")):
        pytest.skip(why)
    check(impl, PLANS[case], dtype, "cuda", dim)
    x, g = inputs(PLANS[case], dtype, dim=dim, device="cuda")
    first, second = (torch.autograd.grad(ops.segment_attention(*x, PLANS[case], impl=impl), x, g) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "the backward is not deterministic"


@pytest.mark.parametrize(
    "case, calls",
    [
        *(("full", 1), ("reference_causal", 2), ("reference_isolated", 2), ("group_shared", 2)),
        *(("targets only", 1), ("targets of groups", 2), ("block_causal", 4)),
    ],
)
def test_number_of_calls(library, case, calls):
    """The policies need one or two calls of FlashAttention for any pack, and one of cuDNN."""
    for name, expected in (("flash 2", calls), ("cudnn_flex", 1)):
        impl, counts = library(name)
        x, g = inputs(PLANS[case], torch.float32)
        torch.autograd.grad(ops.segment_attention(*x, PLANS[case], impl=impl), x, g)
        assert (counts["forward"], counts["backward"]) == (expected, expected)


def test_no_rows_are_copied_for_one_sample():
    """All sequences of one sample without masked text are contiguous; calls then take slices."""
    compiled = plan(SelfLayout.qwen(PACK[1:2]), "reference_causal")
    tensors, numbers = flash_attention.operands(compiled, torch.device("cpu"), 2)
    assert [len(t) for t in tensors[1::2]] == [0] * 4 and -1 not in numbers
    assert numbers[1:3] == [0, 1]  # no query is in both calls, the references' keys are


@pytest.mark.parametrize("name", LIBRARIES)
def test_packed_equals_alone(library, name):
    """The adapters add nothing that depends on the rest of a pack."""
    impl, _ = library(name)
    for visibility in ("full", "reference_causal"):
        alone, packed = SelfLayout.qwen(PACK[1:2]), SelfLayout.qwen([PACK[2], PACK[0], PACK[1]])
        x, g = inputs(plan(packed, visibility), torch.float32)
        tail = slice(-alone.joint_length, None)
        own = [t.detach()[tail].requires_grad_() for t in x]
        out = ops.segment_attention(*x, plan(packed, visibility), impl=impl)
        out_alone = ops.segment_attention(*own, plan(alone, visibility), impl=impl)
        assert torch.equal(out[tail], out_alone)
        for a, b in zip(torch.autograd.grad(out, x, g), torch.autograd.grad(out_alone, own, g[tail]), strict=True):
            assert torch.equal(a[tail], b)


@pytest.mark.parametrize("name", LIBRARIES)
def test_strided_inputs_and_expanded_gradients(library, name):
    """q, k, v as slices of one projection; the gradient of a sum, which has stride 0."""
    impl, _ = library(name)
    compiled = PLANS["reference_causal"]
    torch.manual_seed(0)
    qkv = torch.randn(compiled.num_queries, 3, 2, 16).requires_grad_()
    ops.segment_attention(*qkv.unbind(1), compiled, impl=impl).sum().backward()
    expected = qkv.detach().double().requires_grad_()
    oracles.attention(*expected.unbind(1), compiled)[0].sum().backward()
    torch.testing.assert_close(qkv.grad.double(), expected.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LIBRARIES)
def test_plan_without_any_key(library, name):
    impl, counts = library(name)
    compiled = AttentionPlan(((0, 3),), ((),), 3, 4)
    x, g = inputs(compiled, torch.float32)
    out, lse = ops.segment_attention(*x, compiled, return_lse=True, impl=impl)
    assert not out.any() and (lse == -torch.inf).all()
    assert not any(grad.any() for grad in torch.autograd.grad(out, x, g))
    assert counts["forward"] == counts["backward"] == 0


def test_masks_are_compiled_once_and_again_when_dropped(library, monkeypatch):
    """A mask belongs to a plan, dtype and shape of heads; one that is no longer kept is compiled again."""
    impl, counts = library("cudnn_flex")

    def run(case, **options):
        x, g = inputs(PLANS[case], torch.float32, **options)
        out = ops.segment_attention(*x, PLANS[case], impl=impl)
        return out, x, g

    for _ in range(3):
        out, x, g = run("full")
        torch.autograd.grad(out, x, g)
    assert counts["plans"] == counts["compiled"] == 1
    run("full", heads=3)
    run("group_shared")
    assert counts["plans"] == 3
    with torch.no_grad():
        run("full")  # without a backward
    assert counts["plans"] == 4
    monkeypatch.setattr(flex_attention, "KEPT_PLANS", 4)
    out, x, g = run("reference_causal")
    for case in ("reference_isolated", "targets only", "irregular", "chain"):  # between forward and backward
        run(case)
    grads = torch.autograd.grad(out, x, g)
    assert counts["plans"] == 10 and len(flex_attention._masks) == 4
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.slow
@pytest.mark.parametrize("name", LIBRARIES)
def test_torch_library_contract(library, name):
    """Schema, fake, autograd and dispatch agree with what the op does (torch.library.opcheck)."""
    library(name)
    compiled = PLANS["reference_causal"]
    x, _ = inputs(compiled, torch.float32, heads=1)
    if name == "cudnn_flex":
        op, operands = torch.ops.uniref_fast.flex_attention, flex_attention.operands(compiled, x[0].device, True)
    else:
        op, operands = (
            torch.ops.uniref_fast.flash_attention,
            flash_attention.operands(compiled, x[0].device, int(name[-1])),
        )
    torch.library.opcheck(op.default, (*x, *operands, 0.2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flash 2", "cudnn_flex"])
def test_under_torch_compile(library, name):
    """The library is one op of the graph, whose plan changes between calls."""
    impl, _ = library(name)
    plans = [plan(SelfLayout.qwen([Sample(3, (1, 4, n), ((1, 2, 2),))]), "reference_causal") for n in (4, 5)]

    def attend(q, k, v, compiled):
        return ops.segment_attention(q * 1.5, k, v, compiled, impl=impl).sin()

    compiled_attend = torch.compile(attend, backend="aot_eager")
    for each in plans * 2:
        x, g = inputs(each, torch.float32)
        out, expected = compiled_attend(*x, each), attend(*x, each)
        assert torch.equal(out, expected)
        for a, b in zip(torch.autograd.grad(out, x, g), torch.autograd.grad(expected, x, g), strict=True):
            assert torch.equal(a, b)


# ---- which one serves, and why not ----


def refusal(impl, x):
    with pytest.raises(ValueError, match=f"impl='{impl}' is not possible here") as error:
        ops.explain_attention(x, PLANS["full"], impl)
    return str(error.value)


@pytest.mark.parametrize("impl, package", [("flash", "flash-attn"), ("cudnn_flex", "nvidia-cudnn-frontend")])
def test_a_missing_library_is_named_with_its_installation(library, impl, package):
    other = "cudnn_flex" if impl == "flash" else "flash 2"
    library(other)
    assert f"pip install {package}" in refusal(impl, torch.zeros(4, 2, 64)).replace("'", "")


@pytest.mark.parametrize("impl", ["flash", "cudnn_flex"])
def test_a_cpu_is_refused(impl):
    assert "needs a CUDA device" in refusal(impl, torch.zeros(4, 2, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "name, capability, dim, dtype, reason",
    [
        ("flash 2", (9, 0), 64, torch.float64, "float16 and bfloat16"),
        ("flash 2", (7, 5), 64, torch.float16, "compute capability 7.5"),
        ("flash 2", (8, 0), 20, torch.float16, "multiples of 8"),
        ("flash 2", (8, 0), 512, torch.float16, "up to 256"),
        ("flash 3", (8, 0), 64, torch.float16, "compute capability 8.0"),
        ("flash 3", (9, 0), 256, torch.float16, "up to 192"),
        ("flash 4", (10, 0), 192, torch.float16, "up to 128"),
        ("flash 4", (12, 0), 64, torch.float16, "compute capability 12.0"),
        ("cudnn_flex", (8, 0), 64, torch.float16, "compute capability 9.0, 10.0 or 10.3"),
        ("cudnn_flex", (9, 0), 192, torch.float16, "head dimensions"),
        ("cudnn_flex", (9, 0), 64, torch.float64, "float16 and bfloat16"),
    ],
)
def test_limits(library, name, capability, dim, dtype, reason):
    impl, _ = library(name, capability=capability)
    assert reason in refusal(impl, torch.zeros(4, 2, dim, dtype=dtype))


def test_a_build_without_log_sum_exp_is_refused(library, monkeypatch):
    """FlashAttention 3 before `return_attn_probs`."""
    library("flash 3")
    monkeypatch.setattr(sys.modules["flash_attn_interface"], "flash_attn_varlen_func", lambda q, deterministic: None)
    flash_attention.load.cache_clear()
    assert "has no argument return_attn_probs" in refusal("flash", torch.zeros(4, 2, 64))


@pytest.mark.parametrize("name", LIBRARIES)
def test_doctor_lists_the_libraries(library, name):
    impl, _ = library(name)
    facts = doctor.facts()
    assert set(facts["libraries"]) == {"flash", "cudnn_flex"}
    for each, text in facts["libraries"].items():
        assert (each == impl) != text.startswith("not installed: pip install")
        assert text in doctor.report(facts)


def test_generation_of_the_table_is_used(library, monkeypatch):
    """The measured generation serves if several are installed; without a table, 3 on Hopper."""
    library("flash 2, flash 3, flash 4")
    x = torch.zeros(4, 2, 64)
    monkeypatch.setattr(tuning, "table", lambda name: None)
    assert flash_attention.serving(x).generation == 3
    for generation in (2, 3, 4):
        monkeypatch.setattr(tuning, "table", lambda name, number=generation: {"flash_generation": number})
        assert flash_attention.serving(x).generation == generation
    monkeypatch.setattr(flash_attention, "_capability", lambda device: (12, 0))
    assert flash_attention.serving(x).generation == 2


@pytest.mark.parametrize("name", ["flash 2", "cudnn_flex"])
def test_a_table_decides(library, monkeypatch, name):
    """A library is chosen where the table of the device measured it as fastest and it is installed, and never else."""
    impl, _ = library(name)
    probe = torch.zeros(4, 2, 64)
    ours = ops.choose(None, probe, 64)
    if ours == "reference":
        pytest.skip("none of our kernels")

    def costs(seconds):
        return {"float32": {"forward": [seconds, 0, 0, 0], "backward": [seconds, 0, 0, 0]}}

    def choice(**seconds):
        table = {"attention": {name: costs(each) for name, each in seconds.items()}}
        monkeypatch.setattr(tuning, "table", lambda name: table)
        fresh = dataclasses.replace(PLANS["full"])  # a plan without a stored choice
        return ops.explain_attention(probe, fresh)

    chosen, reason = choice(**{ours: 2.0, "dense": 3.0, impl: 1.0})
    assert chosen == impl and f"2.00 times as fast as {ours}" in reason
    assert choice(**{ours: 2.0, "dense": 3.0, impl: 2.5})[0] == ours
    assert choice(**{ours: 2.0, "dense": 3.0})[0] == ours
    attention_libraries.install(monkeypatch, "flash 2" if impl == "cudnn_flex" else "cudnn_flex")
    assert choice(**{ours: 2.0, "dense": 3.0, impl: 1.0})[0] == ours  # measured, but no longer installed


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["flash 3", "cudnn_flex"])
def test_a_packed_model_with_a_library(library, make_transformer, name, checkpointing):
    """The library serves attention in forward and backward, the other ops are chosen by device; results are equal."""
    model = make_transformer()
    samples = [Sample(3, (1, 4, 3), ((1, 2, 3),)), Sample(2, (1, 2, 5))]
    grads, calls = [], {}
    impl, counts = library(name)
    for each in ("reference", impl):
        packed = PackedQwenImage(model, impl=each, checkpointing=checkpointing)
        layout = packed.layout(samples)
        torch.manual_seed(0)
        image = torch.randn(layout.image_length, 64, requires_grad=True)
        out = packed(image, torch.randn(layout.text_length, 48), torch.tensor([0.3, 0.7]), layout)
        grads.append((out, torch.autograd.grad(out.square().sum(), image)[0]))
        calls[each] = (counts["forward"], counts["backward"])
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    assert calls["reference"] == (0, 0) and calls[impl] == (3, 3)  # blocks that are computed again keep the attention
