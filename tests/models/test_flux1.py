"""The packed FLUX.1, LongCat-Image and FIBO against diffusers, sample by sample."""

from dataclasses import replace

import flux1
import pytest
import torch
from patching import ROUNDING

from uniref_fast import native
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.models.flux1 import PackedFibo, PackedFlux1
from uniref_fast.models.kept_references import KeptReferences, dependence
from uniref_fast.testing import assert_within_budget, max_relative_error

SIZES = [(1, 4, 6), (1, 3, 5), (1, 1, 1), (1, 2, 9), (1, 7, 7), (1, 1, 8), (1, 5, 2)]  # target, then references 1..6
KINDS = list(flux1.CLASSES)
NATIVE = pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason="not built"))
RELATIVE = 1e-5
"""Largest relative error, in float32, between the packed model and diffusers."""


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def models():
    return {kind: flux1.transformer(kind) for kind in KINDS}


def samples_of(grids, texts, scales):
    """Return one sample for each list of grids, target first; a scale may be None."""
    return [
        Sample(text, each[0], tuple(each[1:]), guidance=None if scale is None else scale.item())
        for each, text, scale in zip(grids, texts, scales, strict=True)
    ]


def packed(model, grids, data, **options):
    """Return the velocities of each sample of a pack."""
    run = flux1.packed_class(model)(model, **options)
    images, texts, times, scales = zip(*data, strict=True)
    layout = run.layout(samples_of(grids, map(len, texts), scales))
    return layout.split_targets(run(torch.cat(images), torch.cat(texts), torch.cat(times), layout))


PACK = [(SIZES[:1], 3), (SIZES[1:5], 11), (SIZES[2:4], 1), (SIZES, 20)]


@pytest.mark.parametrize("impl", ["reference", NATIVE])
@pytest.mark.parametrize("kind", KINDS)
def test_a_ragged_pack_equals_diffusers_sample_by_sample(models, kind, impl):
    """Samples have 0, 3, 1 and 6 references, and each its own time, guidance scale and text."""
    model = models[kind]
    data = [flux1.inputs(model, grids, text, seed=i) for i, (grids, text) in enumerate(PACK)]
    together = packed(model, [grids for grids, _ in PACK], data, impl=impl)
    for (grids, _), one, out in zip(PACK, data, together, strict=True):
        assert max_relative_error(out, flux1.stock(model, grids, *one)) < RELATIVE


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_within_the_budget(kind):
    model = flux1.transformer(kind, torch.bfloat16)
    wide = flux1.transformer(kind).to(torch.bfloat16).double()
    image, text, t, scale = flux1.inputs(model, SIZES[:3])
    t = t.bfloat16().float()  # as in the pipelines
    (out,) = packed(model, [SIZES[:3]], [(image, text, t, scale)])
    scale_wide = None if scale is None else scale.bfloat16().double()
    time = (t * 1000).bfloat16().double() / 1000 if kind == "fibo" else t.double()
    oracle = flux1.stock(wide, SIZES[:3], image.double(), text.double(), time, scale_wide)
    assert_within_budget(out, flux1.stock(model, SIZES[:3], image, text, t, scale), oracle)


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="bfloat16 products without instructions for them")
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_in_packs_in_bfloat16(kind):
    model = flux1.transformer(kind, torch.bfloat16)
    pack = [*PACK, (((1, 1, 1),), 1), (((1, 16, 16), (1, 9, 11)), 33)]
    grids = [each for each, _ in pack]
    data = [flux1.inputs(model, each, text, seed=i) for i, (each, text) in enumerate(pack)]
    alone = [packed(model, [each], [one])[0] for each, one in zip(grids, data, strict=True)]
    for order in ((0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0), (1, 0), (3, 1)):
        together = packed(model, [grids[i] for i in order], [data[i] for i in order])
        assert all(torch.equal(out, alone[i]) for i, out in zip(order, together, strict=True)), order


# ---- positions ----


@pytest.mark.parametrize("kind", KINDS)
def test_positions_and_tables_are_those_of_the_pipeline(models, kind):
    """Tables equal those of diffusers to the last bit; offsets begin again in every sample of a pack."""
    model = models[kind]
    layout = flux1.packed_class(model)(model).layout(
        samples_of([each for each, _ in PACK], [text for _, text in PACK], [None] * 4)
    )
    expected = torch.cat([torch.cat(flux1.ids(model, *each)) for each in PACK])
    assert torch.equal(layout.positions("cpu").long(), expected.long())
    tables = layout.rotary(model.config.axes_dims_rope, "cpu", 10000, torch.float64)
    for ours, theirs in zip(tables, model.pos_embed(expected), strict=True):
        assert torch.equal(ours, theirs[:, ::2])


# ---- references ----


@pytest.mark.parametrize("kind", KINDS)
def test_references_kept_by_a_schedule(models, kind):
    """A step that computes them equals one without the option; the next one does not, because they see the target."""
    model = models[kind]
    run, data = flux1.packed_class(model)(model), flux1.inputs(model, SIZES[:3])
    layout = run.layout(samples_of([SIZES[:3]], [7], [data[3]]))
    assert "attend to text and target" in dependence(layout, run.visibility)
    kept = [KeptReferences()]
    image, text, t, _ = data
    with torch.no_grad():
        first = run(image, text, t, layout, kept)
        assert torch.equal(first, run(image, text, t, layout))
        assert max_relative_error(run(image, text, t, layout, kept), first) < RELATIVE  # the step has not changed
        image = image.clone()
        image[:24] += 1
        assert max_relative_error(run(image, text, t, layout, kept), run(image, text, t, layout)) > 100 * RELATIVE
    assert kept[0].refreshed == [0]


# ---- what the models embed beside the time ----


def test_guidance_and_the_vector_of_a_prompt_belong_to_a_sample(models):
    model, grids = models["kontext"], SIZES[:2]
    image, text, t, scale = flux1.inputs(model, grids)
    other = text.clone()
    other[:, 48:] += 1
    data = [(image, text, t, scale), (image, text, t, scale + 3), (image, other, t, scale)]
    outs = packed(model, [grids] * 3, data)
    for out, one in zip(outs, data, strict=True):
        assert max_relative_error(out, flux1.stock(model, grids, *one)) < RELATIVE
    assert all(max_relative_error(outs[0], out) > 100 * ROUNDING for out in outs[1:])
    with pytest.raises(ValueError, match="the samples have no guidance scales"):
        packed(model, [grids], [(image, text, t, None)])


def test_a_model_without_guidance(models):
    model, grids = flux1.transformer("kontext", guidance_embeds=False), SIZES[:2]
    data = flux1.inputs(model, grids)
    (out,) = packed(model, [grids], [data])
    assert data[3] is None and max_relative_error(out, flux1.stock(model, grids, *data)) < RELATIVE
    with pytest.raises(ValueError, match="no guidance embeddings"):
        packed(model, [grids], [(*data[:3], torch.ones(1))])


def test_every_block_of_fibo_has_its_layer_of_the_text_encoder(models):
    model, grids = models["fibo"], SIZES[:2]
    image, text, t, _ = flux1.inputs(model, grids)
    plain = flux1.stock(model, grids, image, text, t)
    for block in range(5):
        other = text.clone()
        other[:, 64 + 32 * block : 96 + 32 * block] += 1
        (out,) = packed(model, [grids], [(image, other, t, None)])
        assert max_relative_error(out, flux1.stock(model, grids, image, other, t)) < RELATIVE
        assert max_relative_error(out, plain) > 100 * RELATIVE


def test_the_times_of_fibo_are_rounded_as_timesteps():
    timesteps = [*torch.linspace(1, 1000, 200)]  # a time in bfloat16 would change many of them
    times = PackedFibo.times(None, timesteps, torch.bfloat16)
    assert torch.equal((times * 1000).bfloat16(), torch.stack(timesteps).bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_embedded_once_for_all_steps(models, kind):
    model = models[kind]
    run, (image, text, t, scale) = flux1.packed_class(model)(model), flux1.inputs(model, SIZES[:2])
    layout, constants = run.layout(samples_of([SIZES[:2]], [7], [scale])), run.step_constants()
    first = run(image, text, t, layout)
    for _ in range(2):
        assert torch.equal(run(image, text, t, layout, None, constants), first)
    assert constants.computed == 1


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_every_module(kind):
    """The kind of rows by name is that of the stream that a module gets, fused projections included."""
    model, found = flux1.transformer(kind), {}
    image, text, t, scale = flux1.inputs(model, SIZES[:2])
    layout = (run := flux1.packed_class(model)(model)).layout(samples_of([SIZES[:2]], [7], [scale]))
    rows = {"image": layout.image_length, "text": layout.text_length, "joint": layout.joint_length, "table": 1}
    if kind != "fibo":
        model.fuse_qkv_projections()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, args, out, name=name: found.update({name: len(args[0])}))
    run(image, text, t, layout)
    for name, count in found.items():
        kind_of_rows = next(rows for part, rows in run.row_kinds if part in name)
        if not name.endswith("proj_out") and "blocks.2.proj_mlp" not in name:  # of the target alone
            assert count == rows[kind_of_rows], name
    assert len(found) >= 5 * 5


def test_fused_projections_are_called():
    model, grids = flux1.transformer("kontext"), SIZES[:3]
    data = flux1.inputs(model, grids)
    model.fuse_qkv_projections()
    model.transformer_blocks[0].attn.to_qkv.weight.mul_(1.5)  # a change that only the fused weight has
    model.single_transformer_blocks[1].attn.to_qkv.weight.mul_(1.5)
    (out,) = packed(model, [grids], [data])
    assert max_relative_error(out, flux1.stock(model, grids, *data)) < RELATIVE


def test_refusals(models):
    model = models["kontext"]
    image, text, t, scale = flux1.inputs(model, SIZES[:2])
    run = PackedFlux1(model)
    layout = run.layout(samples_of([SIZES[:2]], [7], [scale]))
    with pytest.raises(ValueError, match=r"text has shape \[7, 71\], the layout expects \[7, 72\]"):
        run(image, text[:, 1:], t, layout)
    with pytest.raises(ValueError, match="every sample needs at least one text token"):
        run(image, text[:0], t, run.layout(samples_of([SIZES[:2]], [0], [scale])))
    sample = Sample(1, SIZES[0])
    with pytest.raises(ValueError, match="no guidance embeddings"):
        other = models["longcat"]
        one = flux1.packed_class(other)(other)
        data = flux1.inputs(other, SIZES[:1], 1)
        one(*data[:3], one.layout([replace(sample, guidance=2.0)]))


@pytest.mark.slow
@pytest.mark.skipif(not native.available(), reason="not built")
@pytest.mark.parametrize("kind", ["kontext", "fibo"])
def test_compiled_blocks_equal_diffusers(kind):
    """Two graphs at most for each of the first blocks of both kinds, the last block and the others."""
    model = flux1.transformer(kind)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model.compile_repeated_blocks(fullgraph=True)
    packs = [PACK[:1], PACK[1:3], PACK[1:4]]
    data = [[flux1.inputs(model, grids, text, seed=i) for i, (grids, text) in enumerate(pack)] for pack in packs]
    outs = [
        packed(model, [grids for grids, _ in pack], each, impl="native") for pack, each in zip(packs, data, strict=True)
    ]
    assert counters["stats"]["unique_graphs"] <= 2 * 5
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block._compiled_call_impl = None
    for pack, each, out in zip(packs, data, outs, strict=True):
        for (grids, _), one, ours in zip(pack, each, out, strict=True):
            assert max_relative_error(ours, flux1.stock(model, grids, *one)) < ROUNDING


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_pack_are_the_sum_of_single_ones(kind):
    """Gradients of every parameter and of the inputs equal those of diffusers one by one."""
    model = flux1.transformer(kind)
    cases = [PACK[0], (SIZES[1:3], 5)]
    data = [flux1.inputs(model, grids, text, seed=i) for i, (grids, text) in enumerate(cases)]
    results = []
    for pack, checkpointing in ((False, False), (True, False), (True, True)):
        model.zero_grad()
        leaves = [(image.clone().requires_grad_(), text.clone().requires_grad_(), *more) for image, text, *more in data]
        with torch.enable_grad():
            if pack:
                out = torch.cat(packed(model, [grids for grids, _ in cases], leaves, checkpointing=checkpointing))
            else:
                out = torch.cat(
                    [flux1.stock(model, grids, *one) for (grids, _), one in zip(cases, leaves, strict=True)]
                )
            out.square().sum().backward()
        named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        # of the vector of a prompt, which comes in every row, the packed model reads the first one
        results.append(named | {f"input {i}.{j}": leaf[j].grad for i, leaf in enumerate(leaves) for j in (0, 1)})
    theirs, *all_ours = results
    largest = max(g.abs().max().item() for g in theirs.values())
    for ours in all_ours:
        assert not any(theirs[name].any() for name in theirs.keys() - ours.keys())
        for name, grad in ours.items():
            scale = max(theirs[name].abs().max().item(), 1e-3 * largest)
            assert (grad - theirs[name]).abs().max().item() < 1e-4 * scale, name


def test_text_at_one_place():
    """All text tokens of FLUX.1 have the position of the first token of the target."""
    layout = SelfLayout.pack([Sample(((3, True), (2, False)), (1, 1, 1))], PackedFlux1.scheme, clean_references=False)
    assert layout.positions("cpu").tolist() == [[0, 0, 0]] * 6
