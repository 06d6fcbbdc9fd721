import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interleaved import diffusers_mask, interleaved

from uniref_fast.layout import Kind, Sample, SelfLayout
from uniref_fast.visibility import POLICIES, AttentionPlan, block_causal, plan, query_plan, target_plan

side = st.integers(1, 5)
grids = st.tuples(st.just(1), side, side)
samples = st.builds(
    Sample,
    text=st.one_of(
        st.integers(0, 9), st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=4).map(tuple)
    ),
    target=grids,
    references=st.just(((1, 2, 3), (1, 1, 1))) | st.lists(grids, max_size=4).map(tuple),
    group=st.none(),
)
packs = st.lists(samples, min_size=1, max_size=5)


def odd_even(query, key):
    """A user's rule that no policy has: segments of equal parity see each other across samples."""
    return (query.index + query.sample) % 2 == (key.index + key.sample) % 2


def causal_by_parity(query, key):
    """A user's rule in which also images are causal, and a causal segment sees both of its neighbours."""
    return "causal" if query == key and query.index % 2 else query.sample == key.sample or odd_even(query, key)


def mask_of(plan, transposed=False):
    mask = torch.zeros(plan.num_queries, plan.num_keys, dtype=torch.bool)
    for index, ((start, end), keys) in enumerate(zip(plan.ranges, plan.intervals, strict=True)):
        for at, (a, b) in enumerate(keys):
            assert not mask[start:end, a:b].any(), "intervals overlap"
            mask[start:end, a:b] = True
            if plan.causal and plan.causal[index] == at:
                mask[start:end, a:b] = mask[start:end, a:b].triu() if transposed else mask[start:end, a:b].tril()
    return mask


def mask_of_rule(layout, rule):
    mask = torch.zeros(layout.joint_length, layout.joint_length, dtype=torch.bool)
    for query in layout.segments:
        for key in layout.segments:
            if sight := rule(query, key):
                block = torch.ones(query.length, key.length, dtype=torch.bool)
                block = block.tril() if sight == "causal" else block
                mask[query.joint_start : query.joint_end, key.joint_start : key.joint_end] = block
    return mask


@settings(max_examples=200, deadline=None)
@given(packs, st.sampled_from([*POLICIES, odd_even, causal_by_parity]), st.booleans())
def test_intervals_equal_the_rule(pack, visibility, shared):
    if shared:  # two samples of one group with the same references
        pack = [*pack, Sample(3, (1, 2, 2), ((1, 2, 2),), group=1), Sample(1, (1, 3, 1), ((1, 2, 2),), group=1)]
    layout = SelfLayout.qwen(pack, shared_references=shared)
    if shared and isinstance(visibility, str) and visibility != "group_shared":
        with pytest.raises(ValueError, match=f"{visibility}.*group_shared"):
            plan(layout, visibility)
        return
    compiled = plan(layout, visibility)
    expected = mask_of_rule(layout, POLICIES.get(visibility, visibility) if isinstance(visibility, str) else visibility)
    assert torch.equal(mask_of(compiled), expected)
    assert torch.equal(mask_of(compiled.transpose, transposed=True), expected.T)
    assert compiled.area == compiled.transpose.area == int(expected.sum())
    edges = [edge for span in compiled.ranges for edge in span]
    assert edges[0] == 0 and edges[-1] == layout.joint_length and edges[1:-1:2] == edges[2::2]  # cover, in order
    owner = {edge: s.sample for s in layout.segments for edge in (s.joint_start, -s.joint_end)}
    # Sorted, and merged within a sample: touching intervals belong to two samples, or one is causal.
    for keys, causal in zip(compiled.intervals, compiled.causal or [-1] * len(compiled.ranges), strict=True):
        assert all(a < b for a, b in keys)
        own = keys[causal] if causal >= 0 else None
        assert all(x[1] < y[0] or owner[-x[1]] != owner[y[0]] or own in (x, y) for x, y in itertools.pairwise(keys))
    assert plan(layout, visibility) is compiled


@settings(max_examples=50, deadline=None)
@given(packs, st.sampled_from(list(POLICIES)))
def test_target_plan_is_the_targets_part(pack, visibility):
    layout = SelfLayout.qwen(pack)
    rows = layout.joint_index("image", "cpu").long()[layout.target_rows("cpu")]
    assert torch.equal(mask_of(target_plan(layout, visibility)), mask_of(plan(layout, visibility))[rows])


@settings(max_examples=100, deadline=None)
@given(packs, st.sampled_from(list(POLICIES)), st.integers(1, 70))
def test_tiles_cover_ranges_longest_work_first(pack, visibility, block):
    compiled = plan(SelfLayout.qwen(pack), visibility)
    tiles = compiled.tiles(block, "cpu").tolist()
    covered = sorted(
        row for index, first in tiles for row in range(first, min(first + block, compiled.ranges[index][1]))
    )
    assert covered == list(range(compiled.num_queries))
    work = [sum(b - a for a, b in compiled.intervals[index]) for index, _ in tiles]
    assert work == sorted(work, reverse=True)


def test_ranges_never_join_samples():
    """Two samples that see the same keys stay two ranges, so that tiles do not depend on the pack."""
    layout = SelfLayout.qwen([Sample(2, (1, 1, 2)), Sample(2, (1, 1, 2))])
    everything = plan(layout, lambda query, key: True)
    assert everything.ranges == ((0, 4), (4, 8)) and everything.intervals == (((0, 4), (4, 8)),) * 2


@pytest.mark.parametrize("visibility", list(POLICIES))
def test_plan_of_a_group_does_not_depend_on_its_pack(visibility):
    """Ranges and intervals of a group are the same, moved, whatever surrounds it: what packing invariance rests on."""
    group = [Sample(3 + i, (1, 2, 3), ((1, 2, 2), (1, 1, 5)), group=1) for i in range(3)]
    other = Sample(4, (1, 3, 3), ((1, 2, 2),))
    alone = SelfLayout.qwen(group, shared_references=visibility == "group_shared")
    packed = SelfLayout.qwen([other, *group, other], shared_references=visibility == "group_shared")
    shift = SelfLayout.qwen([other]).joint_length
    for get in (lambda p: p, lambda p: p.transpose):
        a, b = get(plan(alone, visibility)), get(plan(packed, visibility))
        inside = [i for i, (start, _) in enumerate(b.ranges) if shift <= start < shift + alone.joint_length]
        assert [tuple(x - shift for x in b.ranges[i]) for i in inside] == list(a.ranges)
        assert [tuple((x - shift, y - shift) for x, y in b.intervals[i]) for i in inside] == list(a.intervals)


def test_dense_plans_are_few_rectangles():
    """One sample is one rectangle, or two under reference_causal; this makes dense execution possible."""
    layout = SelfLayout.qwen([Sample(5, (1, 4, 4), ((1, 3, 3), (1, 2, 2)))])
    assert len(plan(layout, "full").ranges) == 1 and plan(layout, "full").area == layout.joint_length**2
    assert [len(keys) for keys in plan(layout, "reference_causal").intervals] == [1, 1]
    assert len(plan(layout, "reference_isolated").ranges) == 3


def test_padding_is_seen_by_nothing():
    layout = SelfLayout.qwen([Sample(((2, True), (3, False)), (1, 2, 2))])
    mask = mask_of(plan(layout))
    padding = next(s for s in layout.segments if s.kind is Kind.PADDING)
    assert not mask[:, padding.joint_start : padding.joint_end].any()
    assert mask[padding.joint_start].any()  # it still queries, as in diffusers


def test_unknown_policy_lists_the_known():
    with pytest.raises(ValueError, match="reference_causal"):
        plan(SelfLayout.qwen([Sample(1, (1, 1, 1))]), "casual")


def test_an_empty_interval_is_seen_by_nobody_in_the_transpose():
    compiled = AttentionPlan(((0, 2), (2, 4)), (((1, 1), (3, 4)), ((0, 4),)), 4, 4)
    assert compiled.transpose.ranges == ((0, 3), (3, 4))
    assert compiled.transpose.intervals == (((2, 4),), ((0, 2), (2, 4)))


# ---- causal intervals ----

CAUSAL_SAMPLES = [
    "t5 r2x3 t4 x3x3",
    "t1 r1x1 r2x2 t3 p2 x1x1",  # images next to each other are two blocks; padding is seen by nothing
    "x2x2",
    "t3 t2 r1x2 x1x3",  # two runs of text are one causal sequence
    "r2x2 t7 x2x1",
    "t2 r1x3 t1 r2x1 t1 r1x1 t1 r1x2 t1 r1x4 t1 r3x1 t2 x2x2",  # six images
]


def test_block_causal_is_the_mask_of_diffusers():
    layout = interleaved(*CAUSAL_SAMPLES)
    compiled = plan(layout, block_causal)
    mask = diffusers_mask(layout)
    assert torch.equal(mask_of(compiled), mask) and torch.equal(mask_of(compiled.transpose, transposed=True), mask.T)
    assert compiled.area == compiled.transpose.area == int(mask.sum())
    assert compiled.transpose.causal_intervals.keys() == {
        compiled.ranges[i] for i in compiled.causal_intervals.values()
    }


@pytest.mark.parametrize("sample", CAUSAL_SAMPLES)
def test_a_causal_plan_does_not_depend_on_its_pack(sample):
    alone, packed = interleaved(sample), interleaved("t3 x2x2", sample, "t9 x1x1")
    for get in (lambda p: p, lambda p: p.transpose):
        a, b = get(plan(alone, block_causal)), get(plan(packed, block_causal))
        inside = [i for i, (start, _) in enumerate(b.ranges) if 7 <= start < 7 + alone.joint_length]
        assert [tuple(x - 7 for x in b.ranges[i]) for i in inside] == list(a.ranges)
        assert [tuple((x - 7, y - 7) for x, y in b.intervals[i]) for i in inside] == list(a.intervals)
        assert [b.causal[i] for i in inside] == list(a.causal or [-1] * len(inside))


def test_neighbours_of_a_causal_segment_do_not_join_it():
    """The second text sees the same intervals as the first one, but all of them wholly."""
    layout = interleaved("t4 t4 x1x1")
    compiled = plan(layout, lambda q, k: k.index == 0 and k.kind is Kind.TEXT and ("causal" if q == k else True))
    assert compiled.ranges == ((0, 4), (4, 9)) and compiled.intervals == (((0, 4),),) * 2
    assert compiled.causal == (0, -1)


def test_plans_of_some_queries_keep_their_causal_intervals():
    layout = interleaved(*CAUSAL_SAMPLES)
    mask = mask_of(plan(layout, block_causal))
    for kept in (layout.segments[2:4], layout.segments[1::2], layout.segments[-5:], layout.text_segments):
        rows = [row for segment in kept for row in range(segment.joint_start, segment.joint_end)]
        compiled = query_plan(layout, block_causal, kept)
        assert torch.equal(mask_of(compiled), mask[rows]) and compiled.num_keys == layout.joint_length
        assert torch.equal(mask_of(compiled.transpose, transposed=True), mask[rows].T)
    assert not target_plan(layout, block_causal).causal, "targets see everything, so the kernels need no causal mask"


def test_a_plan_without_causal_intervals_says_so():
    assert AttentionPlan(((0, 2),), (((0, 2),),), 2, 2, (-1,)).causal == ()
    assert plan(interleaved("r1x2 x1x1"), block_causal).causal == ()


@pytest.mark.parametrize(
    "ranges, intervals, causal, message",
    [
        (((0, 3),), (((0, 3),),), (0, -1), "2 entries for 1 ranges"),
        (((0, 3),), (((0, 3),),), (1,), "cannot be number 1"),
        (((0, 3),), (((0, 3),),), (-2,), "cannot be number -2"),
        (((0, 3),), (((0, 4),),), (0,), r"as many rows as its range.*\[0, 4\).*\[0, 3\)"),
        (((0, 0), (0, 3)), (((1, 1),), ()), (0, -1), "at least one"),
        (((0, 3), (3, 6)), (((0, 3),), ((0, 3),)), (0, 0), "of two ranges share keys"),
        (((0, 3), (3, 6)), (((0, 3),), ((2, 5),)), (0, -1), "ends at 2, inside the causal interval"),
        (((0, 3), (3, 6)), (((1, 4),), ((0, 3),)), (0, -1), "ends at 3, inside the causal interval"),
    ],
)
def test_causal_intervals_are_validated(ranges, intervals, causal, message):
    with pytest.raises(ValueError, match=message):
        AttentionPlan(ranges, intervals, 6, 6, causal)


def test_only_a_segment_and_itself_can_be_causal():
    with pytest.raises(ValueError, match="two different segments"):
        plan(interleaved("t2 x1x2"), lambda query, key: "causal")
