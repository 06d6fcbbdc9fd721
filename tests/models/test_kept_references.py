"""References kept across steps: exact where they depend on nothing that changes, and otherwise exactly the old ones."""

import pytest
import torch
from patching import ROUNDING

from uniref_fast import native
from uniref_fast.layout import Kind, Sample
from uniref_fast.models import PackedQwenImage, qwen_image
from uniref_fast.models.kept_references import KeptReferences, RefreshSchedule, dependence
from uniref_fast.testing import max_relative_error
from uniref_fast.visibility import POLICIES

IMPLS = ["reference", pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason="not built"))]
# The reference of the last sample is larger than its target, so that it sets the rotary positions of the text.
SAMPLES = [Sample(7, (1, 4, 6), ((1, 3, 5), (1, 2, 9))), Sample(3, (1, 3, 3)), Sample(11, (1, 2, 2), ((1, 9, 12),))]


def steps(run, samples, count, seed=0):
    """Yield the arguments of the model for each step of an edit: only the targets and the times change."""
    generator = torch.Generator().manual_seed(seed)
    dtype, layout = run.transformer.dtype, run.layout(samples)
    image = torch.randn(layout.image_length, 64, generator=generator).to(dtype)
    text = torch.randn(layout.text_length, 48, generator=generator).to(dtype)
    targets = layout.target_rows("cpu")
    for _ in range(count):
        image[targets] = torch.randn(len(targets), 64, generator=generator).to(dtype)
        yield image.clone(), text, torch.rand(layout.num_samples, generator=generator).to(dtype), layout


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("visibility", ["reference_causal", "reference_isolated"])
def test_kept_equals_computed_bit_for_bit(make_transformer, linear_by_row, nan_memory, visibility, impl):
    run = PackedQwenImage(make_transformer(True), visibility=visibility, impl=impl)
    kept = [KeptReferences() for _ in SAMPLES]
    with torch.no_grad():
        for arguments in steps(run, SAMPLES, 3):
            assert torch.equal(run(*arguments, kept), run(*arguments))
    assert [store.refreshed for store in kept] == [[0], [], [0]], "references were computed again"
    assert kept[0].steps == 3


@pytest.mark.parametrize("impl", IMPLS)
def test_group_shared_keeps_one_copy(make_transformer, linear_by_row, impl):
    run = PackedQwenImage(make_transformer(True), visibility="group_shared", impl=impl)
    samples = [Sample(7, (1, 4, 6), ((1, 3, 5),), 0), Sample(5, (1, 4, 6), ((1, 3, 5),), 0), Sample(3, (1, 2, 2))]
    shared, kept = run.layout(samples, shared_references=True), [KeptReferences() for _ in samples]
    with torch.no_grad():
        for image, text, t, _ in steps(run, [*samples[:1], *(Sample(s.text, s.target) for s in samples[1:])], 2):
            assert torch.equal(run(image, text, t, shared, kept), run(image, text, t, shared))
    assert [store.refreshed for store in kept] == [[0], [], []]
    assert kept[1].nbytes == 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_a_kept_step_attends_to_the_old_keys_and_values(make_transformer, monkeypatch, zero_cond_t, impl):
    """The oracle is a whole forward in which old keys and values replace those of the references."""
    run = PackedQwenImage(make_transformer(zero_cond_t), impl=impl)
    first, second = steps(run, SAMPLES, 2)
    layout = first[3]
    rows = torch.cat([torch.arange(s.joint_start, s.joint_end) for s in layout.segments if s.kind is Kind.REFERENCE])
    old, joint_qkv = {}, qwen_image.joint_qkv

    def remember(attn, *args):
        q, k, v = joint_qkv(attn, *args)
        old[attn] = k[rows], v[rows]
        return q, k, v

    def replace(attn, *args):
        q, k, v = joint_qkv(attn, *args)
        k[rows], v[rows] = old[attn]
        return q, k, v

    kept = [KeptReferences() for _ in SAMPLES]
    with torch.no_grad():
        run(*first, kept)
        ours = run(*second, kept)
        new = run(*second)
        monkeypatch.setattr(qwen_image, "joint_qkv", remember)
        run(*first)
        monkeypatch.setattr(qwen_image, "joint_qkv", replace)
        expected = run(*second)
    assert max_relative_error(ours, expected) < ROUNDING
    assert max_relative_error(new, expected) > 20 * ROUNDING, "old and new references must differ"


def test_each_sequence_has_its_own_schedule(make_transformer, linear_by_row):
    """A sequence computes its references while another one of the pack keeps them; both equal their own run."""
    run = PackedQwenImage(make_transformer(True), impl="reference")
    together = [KeptReferences(RefreshSchedule(every=n)) for n in (2, 1, 3)]
    outs = [run_step(run, arguments, together) for arguments in steps(run, SAMPLES, 4)]
    assert [store.refreshed for store in together] == [[0, 2], [], [0, 3]]
    for i, sample in enumerate(SAMPLES):
        alone = KeptReferences(RefreshSchedule(every=(2, 1, 3)[i]))
        for out, (image, text, t, layout) in zip(outs, steps(run, SAMPLES, 4), strict=True):
            mine = [own_rows(x, part, i) for x, part in ((image, layout.image_segments), (text, layout.text_segments))]
            single = run_step(run, (*mine, t[i : i + 1], run.layout([sample])), [alone])
            assert torch.equal(layout.split_targets(out)[i], single)
        assert alone.drifts == together[i].drifts


def own_rows(x, segments, sample):
    return torch.cat([x[s.stream_start : s.stream_start + s.length] for s in segments if s.sample == sample])


def run_step(run, arguments, kept):
    with torch.no_grad():
        return run(*arguments, kept)


def test_drift_is_the_relative_change_of_keys_and_values(make_transformer, monkeypatch):
    run = PackedQwenImage(make_transformer(True))
    kept, seen, joint_qkv = KeptReferences(RefreshSchedule(every=1)), [], qwen_image.joint_qkv
    monkeypatch.setattr(qwen_image, "joint_qkv", lambda *args: seen.append(joint_qkv(*args)) or seen[-1])
    for arguments in steps(run, SAMPLES[:1], 2):
        run_step(run, arguments, [kept])
    start = 7 + 4 * 6
    changes = [
        ((new[start:] - old[start:]).norm() / new[start:].norm()) ** 2
        for before, after in zip(seen[:3], seen[3:], strict=True)
        for old, new in zip(before[1:], after[1:], strict=True)
    ]
    assert kept.drifts == pytest.approx([float(torch.stack(changes).mean().sqrt())], rel=1e-4)


def test_drift_is_zero_where_nothing_changes(make_transformer, linear_by_row):
    run = PackedQwenImage(make_transformer(True), visibility="reference_causal")
    kept = KeptReferences(RefreshSchedule(every=1))
    for arguments in steps(run, SAMPLES[:1], 2):
        run_step(run, arguments, [kept])
    assert kept.drifts == [0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bits(make_transformer, dtype):
    """They take a quarter of the memory of float32, scales aside, and add an error of less than 1 %."""
    run = PackedQwenImage(make_transformer(True, dtype=dtype), visibility="reference_causal")
    kept, small = KeptReferences(), KeptReferences(dtype="int8")
    for arguments in steps(run, SAMPLES[:1], 3):
        exact, rounded = run_step(run, arguments, [kept]), run_step(run, arguments, [small])
    assert 0 < max_relative_error(rounded, exact) < 0.01
    elements = kept.nbytes // dtype.itemsize
    assert small.nbytes == elements + elements // 32 * dtype.itemsize, "one scale for each row and head of 32 channels"


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_a_refresh_replaces_what_is_stored(dtype):
    kept, attn, new = KeptReferences(dtype=dtype), torch.nn.Identity(), torch.randn(2, 3, 2, 8)
    for k, v in (torch.randn(2, 3, 2, 8), new):
        kept.store(attn, k, v)
    loaded = torch.empty_like(new)
    kept.load(attn, *loaded)
    assert max_relative_error(loaded, new) <= (0 if dtype is None else 0.01)


def test_8_bits_of_zeros_and_of_an_outlier():
    """A row of zeros stays zero; a large row costs the other rows nothing."""
    k = torch.randn(3, 2, 8)
    k[0], k[1] = 0, 6e4
    kept, attn = KeptReferences(dtype="int8"), torch.nn.Identity()
    kept.store(attn, k, k)
    loaded = torch.empty_like(k), torch.empty_like(k)
    kept.load(attn, *loaded)
    for x in loaded:
        assert (x[0] == 0).all() and max_relative_error(x[1], k[1]) < 0.01 and max_relative_error(x[2], k[2]) < 0.01


def test_what_references_depend_on(make_transformer):
    clean, moving = (PackedQwenImage(make_transformer(zero_cond_t)).layout(SAMPLES) for zero_cond_t in (True, False))
    for name in set(POLICIES) - {"full"}:
        assert dependence(clean, name) is None
        assert "modulated with the time t" in dependence(moving, name)
    assert "visibility 'full'" in dependence(clean, "full")
    without = PackedQwenImage(make_transformer(False)).layout([SAMPLES[1]])
    assert dependence(without, "full") is None, "nothing depends without references"

    def to_text(query, key):
        return query.sample == key.sample and (query.kind is not Kind.REFERENCE or key.kind is not Kind.TARGET)

    assert "'to_text'" in dependence(clean, to_text)


@pytest.mark.parametrize(
    ("keep", "drift", "error"),
    [
        (True, None, "would not be exact: it moves. Use"),
        (0, None, "at least 1 step, got 0"),
        ("often", None, "False, True, a number of steps or \"auto\", got 'often'"),
        (2.0, None, "got 2.0"),
        (3, 0.1, 'drift is the tolerance of keep_references="auto", got keep_references=3'),
        ("auto", 0, "drift must be above 0, got 0"),
        ("auto", "1", "drift must be a number, got '1'"),
    ],
)
def test_values_that_are_refused(keep, drift, error):
    with pytest.raises((ValueError, TypeError), match=error.replace("(", r"\(")):
        RefreshSchedule.of(keep, drift, "it moves")


def test_schedules():
    assert RefreshSchedule.of(False, None, None) is None
    assert RefreshSchedule.of(True, None, None) == RefreshSchedule() == RefreshSchedule.of("auto", None, None)
    assert RefreshSchedule.of(3, None, "it moves") == RefreshSchedule(every=3)
    auto = RefreshSchedule.of("auto", 0.2, "it moves")
    assert [auto.interval([0], [], total) for total in (None, 4, 11, 12, 50)] == [1, 1, 1, 2, 2]
    assert auto.interval([0, 2], [0.1], None) == 4, "0.05 a step"
    assert auto.interval([0, 2], [0.1], 12) == 4, "10 steps in 3 parts"
    assert auto.interval([0, 2, 6], [0.1, 0.2], 12) == 3, "6 steps in 2 parts, not 4 and 2"
    assert auto.interval([0, 2], [0.001], None) == 6, "at most three times the last interval"
    assert auto.interval([0, 2], [9.0], 12) == 1
    assert auto.interval([0, 11], [0.1], 12) == 1


def test_a_forward_with_gradients_is_refused(make_transformer):
    run = PackedQwenImage(make_transformer(True))
    (arguments,) = steps(run, SAMPLES, 1)
    with pytest.raises(ValueError, match=r"torch\.no_grad"):
        run(*arguments, [KeptReferences() for _ in SAMPLES])
    with torch.no_grad(), pytest.raises(ValueError, match="kept has 1 entries, the layout has 3 samples"):
        run(*arguments, [KeptReferences()])
