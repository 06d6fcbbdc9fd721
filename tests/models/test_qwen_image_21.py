"""The packed Qwen-Image-2.1 against diffusers, sample by sample."""

import functools
from dataclasses import replace

import pytest
import torch
from patching import ROUNDING
from qwen_image_21 import case, run_packed, run_stock, transformer

from uniref_fast import native
from uniref_fast.layout import REFERENCE_PLACE as PLACE
from uniref_fast.layout import Kind, Sample, SelfLayout
from uniref_fast.models import PackedQwenImage21
from uniref_fast.models.kept_references import KeptReferences, RefreshSchedule, dependence, kept_bytes
from uniref_fast.models.qwen_image_21 import interleaved_layout
from uniref_fast.testing import assert_within_budget, max_relative_error

EXACT = 1e-5  # largest relative error in float32 against diffusers
IMPLS = ["reference", pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason="not built"))]
GRIDS = [(1, 2, 6), (1, 8, 2), (1, 2, 2), (1, 6, 6), (1, 4, 10), (1, 2, 14)]  # of references 1..6
LENGTHS = (5, 3, 1, 4, 2, 7, 6)

make = functools.cache(transformer)


def with_references(count, **options):
    return case(LENGTHS[: count + 1], GRIDS[:count], **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("references", range(7))
def test_equals_diffusers(references, impl):
    one = with_references(references)
    (out,) = run_packed(make(), [one], impl=impl)
    assert max_relative_error(out, run_stock(make(), one)) < EXACT


@pytest.mark.parametrize("lengths", [(0, 0, 0), (4, 0, 3), (0, 2, 0), (1, 0, 0)])
def test_images_next_to_each_other_do_not_attend_forwards(lengths):
    """Images without text between them are separate, also at the beginning of the sequence."""
    one = case(lengths, GRIDS[:2])
    (out,) = run_packed(make(), [one])
    assert max_relative_error(out, run_stock(make(), one)) < EXACT


def test_a_model_without_causal_condition():
    """All tokens are then modulated with the time of the step."""
    model = make(causal_condition=False)
    one = with_references(2)
    (out,) = run_packed(model, [one])
    assert max_relative_error(out, run_stock(model, one)) < EXACT
    (clean,) = run_packed(make(), [one])
    assert max_relative_error(out, clean) > 1e-3, "the two models compute the same"


@pytest.mark.parametrize("impl", IMPLS)
def test_bfloat16_within_the_budget(impl):
    model, wide = make(dtype=torch.bfloat16), transformer().to(torch.bfloat16).double()
    one = with_references(3, dtype=torch.bfloat16)
    (out,) = run_packed(model, [one], impl=impl)
    assert_within_budget(out, run_stock(model, one), run_stock(wide, one, dtype=torch.float64))


@pytest.mark.parametrize("mask", [[1, 1, 1, 1, 1, 1, 1, 0, 0], [1, 0, 0, 1, 1, 0, 1, 1, 0]])  # padded; with holes
def test_masked_text(mask):
    one = case((5, 3, 1), GRIDS[:2], mask=mask)
    (out,) = run_packed(make(), [one])
    assert max_relative_error(out, run_stock(make(), one)) < EXACT


def test_padding_at_the_end_may_be_left_out_but_for_the_position_of_the_target():
    """Diffusers places the target behind the padding, so the packed sample keeps it as padding."""
    one = case((6,), mask=[1, 1, 1, 1, 0, 0])
    (out,) = run_packed(make(), [one])
    short = case((6,))
    short.sample, short.text = Sample(4, one.sample.target), short.text[:4]
    (without,) = run_packed(make(), [short])
    assert max_relative_error(out, run_stock(make(), one)) < EXACT
    assert max_relative_error(without, out) > EXACT


def pack(dtype=torch.float32):
    """Five samples of K = 0 to 6 references, a text of one token, and an image of one row."""
    return [
        case((3,), target=(1, 2, 2), dtype=dtype, seed=1),
        case((1,), target=(1, 4, 1), dtype=dtype, seed=2),
        case((5, 3, 2), GRIDS[2:4], target=(1, 2, 6), dtype=dtype, seed=3),
        case((33, 2), [(1, 16, 16)], target=(1, 10, 12), dtype=dtype, seed=4),
        case(LENGTHS, GRIDS, dtype=dtype, seed=5),
    ]


@pytest.mark.parametrize("impl", IMPLS)
def test_a_ragged_pack_equals_each_sample_alone(impl):
    cases = pack()
    for one, out in zip(cases, run_packed(make(), cases, impl=impl), strict=True):
        assert max_relative_error(out, run_packed(make(), [one], impl=impl)[0]) < ROUNDING
        assert max_relative_error(out, run_stock(make(), one)) < EXACT


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="bfloat16 products without instructions for them")
@pytest.mark.parametrize("impl", IMPLS)
def test_same_bits_in_packs_in_bfloat16(impl):
    model, cases = make(dtype=torch.bfloat16), pack(torch.bfloat16)
    alone = [run_packed(model, [one], impl=impl)[0] for one in cases]
    for order in ((0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (1, 0), (3, 1)):
        together = run_packed(model, [cases[i] for i in order], impl=impl)
        assert all(torch.equal(out, alone[i]) for i, out in zip(order, together, strict=True)), order


def test_gradients_of_a_pack_are_the_sum_of_single_ones():
    """Gradients of every parameter and of the inputs equal those of diffusers one by one."""
    model = transformer()
    cases = [with_references(2, seed=1), with_references(0, seed=2), case((1, 1), GRIDS[:1], seed=3)]
    found = []
    for use_pack in (False, True):
        model.zero_grad()
        leaves = [(one.image.clone().requires_grad_(), one.text.clone().requires_grad_()) for one in cases]
        if use_pack:
            run = PackedQwenImage21(model, checkpointing=True)
            layout = run.layout([one.sample for one in cases])
            image, text = (torch.cat(parts) for parts in zip(*leaves, strict=True))
            out = run(image, text, torch.cat([one.timestep for one in cases]), layout)
        else:
            out = torch.cat([_stock_of_leaves(model, one, *leaf) for one, leaf in zip(cases, leaves, strict=True)])
        out.square().sum().backward()
        named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append(named | {f"input {i}.{j}": leaf[j].grad for i, leaf in enumerate(leaves) for j in (0, 1)})
    stock, ours = found
    assert stock.keys() == ours.keys()
    largest = max(grad.abs().max().item() for grad in stock.values())
    for name, grad in ours.items():
        scale = max(stock[name].abs().max().item(), 1e-3 * largest)
        assert (grad - stock[name]).abs().max().item() < 1e-4 * scale, name


def _stock_of_leaves(model, one, image, text):
    given, slots = dict(one.stock), one.stock["img_mask"][0, : one.stock["encoder_hidden_states"].shape[1]]
    given["encoder_hidden_states"] = one.stock["encoder_hidden_states"].index_copy(
        1, (~slots).nonzero()[:, 0], text[None]
    )
    n = one.target_tokens
    given["hidden_states"] = torch.cat([image[n:], image[:n]])[None]
    return model(**given)[0][0, -n:]


@pytest.mark.parametrize("checkpointing", [True, "inputs", "host"])
def test_recomputed_blocks_have_the_same_gradients(checkpointing):
    model, one = transformer(), with_references(1)
    found = []
    for how in (False, checkpointing):
        model.zero_grad()
        run = PackedQwenImage21(model, checkpointing=how)
        run(one.image, one.text, one.timestep, run.layout([one.sample])).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in found[0].items():
        assert max_relative_error(found[1][name], grad) < ROUNDING, name


def test_positions_are_those_of_diffusers():
    """The rotary tables have the same bits, also for odd sides, which diffusers does not centre."""
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21Rope

    sample = Sample(((2, True), PLACE, PLACE, (7, True)), (1, 5, 3), ((1, 3, 7), (1, 4, 4)))
    layout = interleaved_layout([Sample(3, (1, 2, 2)), sample])
    rows = [segment for segment in layout.segments if segment.sample == 1]
    is_image = torch.cat([torch.full((s.length,), not s.kind.is_text) for s in rows])
    expected = QwenImage21Rope(10000, [16, 56, 56])([*sample.references, sample.target], is_image, "cpu")
    cos, sin = layout.rotary((16, 56, 56), "cpu")
    assert torch.equal(cos[7:], expected.real) and torch.equal(sin[7:], expected.imag)


def test_the_layout_places_images_between_the_text():
    runs = ((1, True), PLACE, (2, True), (2, False), (1, True), PLACE, (3, True))
    sample = Sample(runs, (1, 2, 2), ((1, 2, 3), (1, 1, 4)))
    layout = interleaved_layout([sample, sample])
    kinds = [(s.kind, s.length) for s in layout.segments if s.sample == 0]
    text, padding, reference, target = Kind.TEXT, Kind.PADDING, Kind.REFERENCE, Kind.TARGET
    assert kinds == [
        (text, 1), (reference, 6), (text, 2), (padding, 2), (text, 1), (reference, 4), (text, 3), (target, 4),
    ]  # fmt: skip
    # streams: text in order; of each sample the target, then its references
    assert [s.length for s in layout.text_segments] == [1, 2, 2, 1, 3] * 2
    assert [(s.kind, s.index, s.length) for s in layout.image_segments] == [
        (target, 0, 4),
        (reference, 1, 6),
        (reference, 2, 4),
    ] * 2
    image = layout.image_stream([torch.full((4, 1), -1.0)] * 2, [torch.arange(10.0)[:, None]] * 2)
    joint = torch.zeros(layout.joint_length).index_copy(0, layout.joint_index("image", "cpu").long(), image[:, 0])
    assert joint[1:7].tolist() == [0, 1, 2, 3, 4, 5] and joint[12:16].tolist() == [6, 7, 8, 9]
    assert joint[19:23].tolist() == [-1] * 4


def test_references_without_a_place_follow_the_text():
    """References of a text of which only the length is known are placed likewise."""
    found = [interleaved_layout([Sample(text, (1, 2, 2), ((1, 1, 2), (1, 1, 3)))]) for text in (5, ((5, True), PLACE))]
    for layout in found:
        assert [s.length for s in layout.segments] == [5, 2, 3, 4]


@pytest.mark.parametrize(
    ("sample", "error"),
    [
        (
            Sample((PLACE, (4, True), PLACE), (1, 2, 2), ((1, 2, 2),)),
            "has 1 places more than the sample has references",
        ),
        (Sample(4, (2, 2, 2)), r"one frame, got the grid \(2, 2, 2\)"),
    ],
)
def test_samples_that_are_refused(sample, error):
    with pytest.raises(ValueError, match=error):
        interleaved_layout([sample])


@pytest.mark.slow
def test_compiled_blocks():
    """Compiled blocks need at most two graphs for each kind of block, and give the results of uncompiled ones."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter, plain, compiled = CompileCounterWithBackend("eager"), PackedQwenImage21(make()), PackedQwenImage21(make())
    compiled.compile_repeated_blocks(backend=counter, fullgraph=True)
    cases = pack()
    for some in (cases[3:4], cases[2:4], cases, cases[:3], cases[4:]):
        pairs = zip(run_packed(None, some, run=compiled), run_packed(None, some, run=plain), strict=True)
        assert all(max_relative_error(*pair) < ROUNDING for pair in pairs)
    assert 3 <= counter.frame_count <= 6
    torch._dynamo.reset()


# ---- keys and values of text and references, kept over steps ----


def steps(run, cases, count, kept=None):
    """Return the outputs of an edit: only the targets and the times change from step to step."""
    generator, outs = torch.Generator().manual_seed(9), []
    layout = run.layout([one.sample for one in cases])
    image, text = (torch.cat([getattr(one, name) for one in cases]) for name in ("image", "text"))
    targets = layout.target_rows("cpu")
    for _ in range(count):
        image[targets] = torch.randn(len(targets), image.shape[1], generator=generator).to(image.dtype)
        t = torch.rand(len(cases), generator=generator).to(image.dtype)
        with torch.no_grad():
            outs.append(run(image, text, t, layout, kept))
    return outs


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="bfloat16 products without instructions for them")
@pytest.mark.parametrize("impl", IMPLS)
def test_kept_equals_computed_bit_for_bit(nan_memory, impl):
    run, cases = PackedQwenImage21(make(dtype=torch.bfloat16), impl=impl), pack(torch.bfloat16)
    assert dependence(run.layout([one.sample for one in cases]), run.visibility) is None
    kept = [KeptReferences() for _ in cases]
    kept[2] = None  # computed in every step, next to samples whose prefix is kept
    for computed, out in zip(steps(run, cases, 3), steps(run, cases, 3, kept), strict=True):
        assert torch.equal(computed, out)
    assert [store.refreshed for store in kept if store is not None] == [[0]] * 4


def test_a_kept_step_computes_the_targets_alone():
    model, cases, rows = transformer(), pack(), []
    model.transformer_blocks[0].attn.to_q.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    model.txt_in.register_forward_hook(lambda module, args, out: rows.append(-len(out)))
    steps(PackedQwenImage21(model), cases, 3, [KeptReferences() for _ in cases])
    texts, targets = sum(len(one.text) for one in cases), sum(one.target_tokens for one in cases)
    assert rows == [-texts, texts + sum(len(one.image) for one in cases), targets, targets]


def test_kept_keys_own_their_storage_and_have_the_estimated_size():
    run, cases = PackedQwenImage21(make(dtype=torch.bfloat16)), pack(torch.bfloat16)
    kept = [KeptReferences() for _ in cases]
    steps(run, cases, 1, kept)
    stored = [part.values for store in kept for pair in store._blocks.values() for part in pair]
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in stored)
    assert len({x.untyped_storage().data_ptr() for x in stored}) == len(stored) == 2 * 3 * len(cases)
    layout = run.layout([one.sample for one in cases])
    size = kept_bytes(run.sizes(run.transformer.config), layout, torch.bfloat16, None)
    assert sum(store.nbytes for store in kept) == size


def test_kept_keys_belong_to_a_text():
    """The two predictions of guidance have the same references and different texts: each needs its own store."""
    run = PackedQwenImage21(make())
    cases = [case((5, 3), GRIDS[:1], seed=1), case((5, 3), GRIDS[:1], seed=1)]
    cases[1].text = torch.randn_like(cases[1].text)
    kept = [KeptReferences() for _ in cases]
    first = steps(run, cases, 1, kept)[0]
    assert max_relative_error(steps(run, cases, 1, kept)[0], first) < ROUNDING
    assert max_relative_error(steps(run, cases, 1, kept[::-1])[0], first) > 1e-3


@pytest.mark.parametrize("keep", [False, True])
def test_samples_of_a_group_share_text_and_references(keep):
    """Three outputs of one request, next to another one, from one copy of the prefix."""
    run, other = PackedQwenImage21(make()), case((2,), seed=7)
    one = with_references(2)
    outputs = [case(LENGTHS[:3], GRIDS[:2], seed=1) for _ in range(3)]
    for number, each in enumerate(outputs):
        each.image[: each.target_tokens] = torch.randn(each.target_tokens, 64) * number
    samples = [replace(each.sample, group=5) for each in outputs]
    layout = run.layout([*samples, other.sample], shared_references=True)
    n = one.target_tokens
    references = [each.image[n:] for each in outputs]
    image = layout.image_stream([*(each.image[:n] for each in outputs), other.image], [*references, other.image[:0]])
    text, t = torch.cat([one.text, other.text]), torch.tensor([0.3, 0.5, 0.9, 0.2])
    kept = [KeptReferences() for _ in range(4)] if keep else None
    with torch.no_grad():
        for _ in range(1 + keep):
            outs = layout.split_targets(run(image, text, t, layout, kept))
    for each, time in zip([*outputs, other], t, strict=True):
        each.timestep = time[None]
    expected = run_packed(make(), [*outputs, other])
    assert max(map(max_relative_error, outs, expected)) < ROUNDING
    if keep:
        assert [store.nbytes > 0 for store in kept] == [True, False, False, True]


def test_a_group_with_different_texts_is_refused():
    samples = [Sample(n, (1, 2, 2), group=0) for n in (3, 4)]
    with pytest.raises(ValueError, match="samples 0 and 1 of group 0 share text and references but list different"):
        interleaved_layout(samples, shared_references=True)


def test_keeping_is_approximate_without_causal_condition():
    run = PackedQwenImage21(make(causal_condition=False))
    reason = dependence(run.layout([pack()[4].sample]), run.visibility)
    assert "modulated with the time t" in reason
    with pytest.raises(ValueError, match="would not be exact"):
        RefreshSchedule.of(True, None, reason)


def test_refusals():
    with pytest.raises(ValueError, match='use "full", which is its own visibility'):
        PackedQwenImage21(make(), visibility="reference_causal")
    one = with_references(0)
    run = PackedQwenImage21(make())
    with pytest.raises(ValueError, match="one of another model"):
        run(one.image, one.text, one.timestep, SelfLayout.qwen([one.sample]))
    with pytest.raises(ValueError, match=r"text has shape \[4, 48\]"):
        run(one.image, one.text[1:], one.timestep, run.layout([one.sample]))
    with pytest.raises(ValueError, match="at least one sample"):
        run.layout([])
