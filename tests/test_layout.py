import dataclasses
import itertools

import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from hypothesis import given, settings
from hypothesis import strategies as st

from uniref_fast.layout import Kind, Sample, SelfLayout

side = st.integers(1, 12)
grids = st.tuples(st.just(1), side, side)
samples = st.builds(
    Sample,
    text=st.one_of(
        st.integers(0, 20),
        st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=4).map(tuple),
    ),
    target=grids,
    references=st.lists(grids, max_size=8).map(tuple),
)
packs = st.lists(samples, min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(packs, st.booleans())
def test_segments_partition_both_orders(pack, zero_cond_t):
    layout = SelfLayout.qwen(pack, zero_cond_t=zero_cond_t)
    at = 0
    for segment in layout.segments:  # joint order: no gap, no overlap, samples in order
        assert segment.joint_start == at and segment.length > 0
        at = segment.joint_end
    assert at == layout.joint_length
    assert [s.sample for s in layout.segments] == sorted(s.sample for s in layout.segments)
    for stream, segments in (("text", layout.text_segments), ("image", layout.image_segments)):
        at = 0
        for segment in segments:
            assert segment.stream_start == at
            at += segment.length
        assert len(layout.joint_index(stream, "cpu")) == at
    joint = torch.cat([layout.joint_index("text", "cpu"), layout.joint_index("image", "cpu")])
    assert torch.equal(joint.sort().values, torch.arange(layout.joint_length, dtype=torch.int32))
    assert SelfLayout.qwen(pack, zero_cond_t=zero_cond_t) is layout  # memoised


@settings(max_examples=200, deadline=None)
@given(packs, st.booleans())
def test_modulation_rows_follow_segments(pack, zero_cond_t):
    layout = SelfLayout.qwen(pack, zero_cond_t=zero_cond_t)
    text, image = layout.modulation_rows("text", "cpu"), layout.modulation_rows("image", "cpu")
    for segment in layout.segments:
        rows = (text if segment.kind.is_text else image)[segment.stream_start :][: segment.length]
        clean = zero_cond_t and segment.kind is Kind.REFERENCE
        assert (rows == segment.sample + len(pack) * clean).all()
    assert layout.num_modulation_rows == len(pack) * (1 + zero_cond_t)


SIDES = [(1, 1), (1, 7), (2, 2), (3, 5), (8, 8), (9, 4), (16, 31), (64, 64)]  # odd, even, degenerate, real


@pytest.mark.parametrize("references", range(9))
def test_positions_are_those_of_diffusers(references):
    """cos and sin equal diffusers' QwenEmbedRope to the last bit, for K = 0..8 and every target size."""
    axes = (16, 56, 56)
    rope = QwenEmbedRope(theta=10000, axes_dim=list(axes), scale_rope=True)
    sizes = itertools.cycle(SIDES)
    for target in SIDES:
        grids = [(1, *target)] + [(1, *next(sizes)) for _ in range(references)]
        image, text = rope([grids], device=torch.device("cpu"), max_txt_seq_len=13)
        layout = SelfLayout.qwen([Sample(13, grids[0], tuple(grids[1:]))])
        cos, sin = layout.rotary(axes, "cpu")
        expected = torch.cat([text, image])
        assert torch.equal(cos, expected.real) and torch.equal(sin, expected.imag)


def test_positions_of_several_frames():
    rope = QwenEmbedRope(theta=10000, axes_dim=[8, 28, 28], scale_rope=True)
    image, _ = rope([[(3, 4, 5), (1, 2, 2)]], device=torch.device("cpu"), max_txt_seq_len=1)
    layout = SelfLayout.qwen([Sample(0, (3, 4, 5), ((1, 2, 2),))])
    assert torch.equal(layout.rotary((8, 28, 28), "cpu")[0], image.real)


def test_positions_of_a_sample_do_not_depend_on_its_pack():
    a, b = Sample(5, (1, 4, 4), ((1, 9, 3),)), Sample(3, (1, 20, 2))
    alone, packed = SelfLayout.qwen([b]), SelfLayout.qwen([a, b])
    assert torch.equal(alone.positions("cpu"), packed.positions("cpu")[-alone.joint_length :])


def test_masked_text_keeps_its_positions():
    """Holes in a text mask leave positions where diffusers has them: the original index counts."""
    runs = ((2, False), (3, True), (1, False), (2, True))
    masked = SelfLayout.qwen([Sample(runs, (1, 4, 4))])
    plain = SelfLayout.qwen([Sample(8, (1, 4, 4))])
    assert torch.equal(masked.positions("cpu"), plain.positions("cpu"))
    assert [s.kind for s in masked.text_segments] == [Kind.PADDING, Kind.TEXT, Kind.PADDING, Kind.TEXT]


def test_shared_references_are_held_once():
    references = ((1, 3, 3), (1, 2, 5))
    pack = [Sample(4 + i, (1, 4, 4), references, group=7) for i in range(3)]
    shared, copied = SelfLayout.qwen(pack, shared_references=True), SelfLayout.qwen(pack)
    assert copied.image_length - shared.image_length == 2 * (9 + 10)
    assert len([s for s in shared.segments if s.kind is Kind.REFERENCE]) == 2
    assert len(shared.targets) == 3
    with pytest.raises(ValueError, match="share references but list different ones"):
        SelfLayout.qwen([pack[0], Sample(1, (1, 4, 4), (), group=7)], shared_references=True)
    alone = SelfLayout.qwen([Sample(1, (1, 4, 4), references), *pack], shared_references=True)
    below = [dataclasses.replace(sample, group=-1) for sample in pack]
    assert (
        SelfLayout.qwen([Sample(1, (1, 4, 4), references), *below], shared_references=True).segments == alone.segments
    )
    assert shared.shares_references and not copied.shares_references
    assert not SelfLayout.qwen(pack[:1], shared_references=True).shares_references


def test_target_rows_point_at_targets():
    layout = SelfLayout.qwen([Sample(1, (1, 2, 2), ((1, 3, 1),)), Sample(0, (1, 1, 3))])
    assert layout.target_rows("cpu").tolist() == [0, 1, 2, 3, 7, 8, 9]


def test_cached_tensors_made_in_inference_mode_still_train():
    layout = SelfLayout.qwen([Sample(2, (1, 3, 7))])
    with torch.inference_mode():
        cos, _ = layout.rotary((8, 28, 28), "cpu")
    weight = torch.ones(1, requires_grad=True)
    (layout.rotary((8, 28, 28), "cpu")[0] * weight).sum().backward()
    assert not cos.is_inference()


def test_lists_are_taken_for_tuples():
    assert Sample([(3, True)], [1, 2, 2], [[1, 1, 1]]) == Sample(((3, True),), (1, 2, 2), ((1, 1, 1),))


def test_device_tensors_go_with_their_layout():
    """A server sees ever new lengths; what was derived from old layouts must not stay."""
    import gc
    import weakref

    layout = SelfLayout.qwen([Sample(3, (1, 2, 2))])
    tensor = weakref.ref(layout.rotary((8, 28, 28), "cpu")[0])
    assert layout.rotary((8, 28, 28), "cpu")[0] is tensor()
    del layout
    for text in range(20):
        SelfLayout.qwen([Sample(text, (1, 5, 5))])
    gc.collect()
    assert tensor() is None


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SelfLayout.qwen([]), "at least one sample"),
        (lambda: Sample(-1, (1, 2, 2)), "must not be negative"),
        (lambda: Sample(1, (1, 0, 2)), "each at least 1"),
        (lambda: SelfLayout.qwen([Sample(1, (1, 2, 2))]).joint_index("audio", "cpu"), '"image" or "joint"'),
        (lambda: SelfLayout.qwen([Sample(1, (1, 2, 2))]).rotary((7, 1, 56), "cpu"), "even numbers"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def rows_of(layout, what, width=2):
    """Return one tensor per sample whose rows name the sample and the row; they are negative for references."""
    lengths = [0] * layout.num_samples
    for segment in layout.image_segments:
        lengths[segment.sample] += segment.length * (segment.kind is what)
    sign = 1 if what is Kind.TARGET else -1
    return [sign * (100_000 * (i + 1) + torch.arange(n)[:, None].expand(n, width)) for i, n in enumerate(lengths)]


@settings(max_examples=100, deadline=None)
@given(packs, st.booleans())
def test_image_stream_follows_the_segments(pack, shared):
    if shared:  # all samples in one group, with the references of the first
        pack = [dataclasses.replace(s, references=pack[0].references, group=0) for s in pack]
    layout = SelfLayout.qwen(pack, shared_references=shared)
    targets, references = rows_of(layout, Kind.TARGET), rows_of(layout, Kind.REFERENCE)
    stream = layout.image_stream(targets, references)
    assert stream.shape == (layout.image_length, 2)
    expected = {Kind.TARGET: iter(targets), Kind.REFERENCE: iter([x for x in references if len(x)])}
    at = 0
    while at < len(stream):  # a sample's references lie one after another
        segment = next(s for s in layout.image_segments if s.stream_start == at)
        rows = next(expected[segment.kind])
        assert torch.equal(stream[at : at + len(rows)], rows)
        at += len(rows)
    parts = layout.split_targets(stream[layout.target_rows("cpu")])
    assert all(torch.equal(part, target) for part, target in zip(parts, targets, strict=True))


@settings(max_examples=50, deadline=None)
@given(packs)
def test_write_targets_leaves_the_references(pack):
    layout = SelfLayout.qwen(pack)
    references = rows_of(layout, Kind.REFERENCE)
    old, new = rows_of(layout, Kind.TARGET), [x + 7 for x in rows_of(layout, Kind.TARGET)]
    stream = layout.image_stream(old, references)
    layout.write_targets(stream, new)
    assert torch.equal(stream, layout.image_stream(new, references))


@settings(max_examples=50, deadline=None)
@given(packs, st.lists(st.floats(0, 1), max_size=3))
def test_split_targets_of_parts(pack, cuts):
    layout = SelfLayout.qwen(pack)
    whole = torch.cat(rows_of(layout, Kind.TARGET))
    bounds = [0, *sorted(round(cut * len(whole)) for cut in cuts), len(whole)]
    parts = [layout.split_targets(whole[a:b], first=a) for a, b in itertools.pairwise(bounds)]
    joined = [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(joined, layout.split_targets(whole), strict=True))


def test_image_stream_refuses_other_numbers_of_rows():
    layout = SelfLayout.qwen([Sample(1, (1, 2, 2), ((1, 1, 3),)), Sample(1, (1, 1, 2))])
    four, three, two = (torch.zeros(n, 5) for n in (4, 3, 2))
    none = four[:0]
    assert len(layout.image_stream([four, two], [three, none])) == 9
    for targets, references in (([four], [three, none]), ([two, four], [three, none]), ([four, two], [two, none]),
                                ([four, two], [])):  # fmt: skip
        with pytest.raises(ValueError, match="the layout expects"):
            layout.image_stream(targets, references)
    with pytest.raises(ValueError, match="the layout expects"):
        layout.write_targets(torch.zeros(9, 5), [four, three])
    with pytest.raises(ValueError, match="row 7 of the targets"):
        layout.split_targets(torch.zeros(7, 5))
