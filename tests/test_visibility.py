import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from uniref_fast.layout import Kind, Sample, SelfLayout
from uniref_fast.visibility import POLICIES, AttentionPlan, plan, target_plan

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


def mask_of(plan):
    mask = torch.zeros(plan.num_queries, plan.num_keys, dtype=torch.bool)
    for (start, end), keys in zip(plan.ranges, plan.intervals, strict=True):
        for a, b in keys:
            assert not mask[start:end, a:b].any(), "intervals overlap"
            mask[start:end, a:b] = True
    return mask


def mask_of_rule(layout, rule):
    mask = torch.zeros(layout.joint_length, layout.joint_length, dtype=torch.bool)
    for query in layout.segments:
        for key in layout.segments:
            if rule(query, key):
                mask[query.joint_start : query.joint_end, key.joint_start : key.joint_end] = True
    return mask


@settings(max_examples=200, deadline=None)
@given(packs, st.sampled_from([*POLICIES, odd_even]), st.booleans())
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
    assert torch.equal(mask_of(compiled.transpose), expected.T)
    assert compiled.area == compiled.transpose.area == int(expected.sum())
    edges = [edge for span in compiled.ranges for edge in span]
    assert edges[0] == 0 and edges[-1] == layout.joint_length and edges[1:-1:2] == edges[2::2]  # cover, in order
    owner = {edge: s.sample for s in layout.segments for edge in (s.joint_start, -s.joint_end)}
    for keys in compiled.intervals:  # sorted, and merged within a sample: touching intervals belong to two samples
        assert all(a < b for a, b in keys)
        assert all(x[1] < y[0] or owner[-x[1]] != owner[y[0]] for x, y in itertools.pairwise(keys))
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
