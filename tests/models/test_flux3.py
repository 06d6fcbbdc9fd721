"""The packed FLUX.3 against diffusers, sample by sample."""

import pytest
import torch

from uniref_fast import native
from uniref_fast.layout import Sample
from uniref_fast.models.flux3 import FLUX3, PackedFlux3
from uniref_fast.models.kept_references import KeptReferences, RefreshSchedule, dependence
from uniref_fast.testing import assert_within_budget, max_relative_error

SIZES = [(1, 4, 6), (1, 3, 5), (1, 1, 1), (1, 2, 9), (1, 7, 7), (1, 1, 8), (1, 5, 2)]  # target, then references 1..6
IMPLS = ["reference", pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason="not built"))]
KINDS = [False, True]
"""Without and with a flow map, which also embeds the time to which a step jumps."""

RELATIVE = 1e-5
"""Largest relative error, in float32, between the packed model and diffusers."""


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def ids(grids, text):
    """Return the position ids that the pipeline makes: of the text, of the target and of the references."""
    from diffusers.modular_pipelines.flux3.before_denoise import Flux3TextRoPEInputsStep, _prepare_image_ids

    target, *references = [_prepare_image_ids(h, w, 0.5, -i) for i, (_, h, w) in enumerate(grids)]
    return Flux3TextRoPEInputsStep._prepare_text_ids(torch.empty(1, text, 1)), target, references


def inputs(model, grids, text=7, seed=1):
    """Return (sample, target, references, text, time) of one sample; a flow map has the time of the next step too."""
    generator = torch.Generator().manual_seed(seed)
    target, *references = [f * h * w for f, h, w in grids]
    parts = [(target, 128), (sum(references), 128), (text, model.config.joint_attention_dim)]
    streams = [torch.randn(size, generator=generator).to(model.proj_out.weight.dtype) for size in parts]
    times = torch.rand(1, 2, generator=generator)
    sample = Sample(text, grids[0], tuple(grids[1:]))
    return sample, *streams, times if model.config.flow_map else times[:, 0]


def stock(model, sample, target, references, text, times):
    """Return diffusers' forward, called as the modular pipeline calls it, `[n, C]`."""
    grids = (sample.target, *sample.references)
    txt_ids, img_ids, reference_ids = ids(grids, len(text))
    conditions = {}
    if reference_ids:
        conditions = {"image_cond_hidden_states": references[None], "image_cond_ids": torch.cat(reference_ids)}
    if model.config.flow_map:
        times, conditions["target_timestep"] = times[:, 0], times[:, 1]
    return model(
        hidden_states=target[None], encoder_hidden_states=text[None], timestep=times, img_ids=img_ids, txt_ids=txt_ids,
        return_dict=False, **conditions,
    )[0][0]  # fmt: skip


def packed(run, data, kept=None, constants=None, streams=None):
    """Return the velocity of every target of a pack of `inputs`."""
    samples, targets, references, texts, times = zip(*data, strict=True)
    layout = run.layout(samples)
    image, text = streams or (layout.image_stream(targets, references), torch.cat(texts))
    layout.write_targets(image, targets)
    return layout.split_targets(run(image, text, torch.cat(times), layout, kept, constants))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("references", [0, 1, 3, 6])
def test_equals_diffusers(make_flux3, references, impl):
    for flow_map in KINDS:
        model = make_flux3(flow_map=flow_map)
        one = inputs(model, SIZES[: references + 1])
        (out,) = packed(PackedFlux3(model, impl=impl), [one])
        assert max_relative_error(out, stock(model, *one)) < RELATIVE


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("flow_map", KINDS)
def test_bfloat16_within_the_budget(make_flux3, flow_map, impl):
    """The weights of the QK norms are those that diffusers keeps in float32."""
    model, wide = (make_flux3(torch.bfloat16, flow_map) for _ in range(2))
    for each in (model, wide.double()):
        for name, parameter in each.named_parameters():
            if ".norm_q" in name or ".norm_k" in name:
                parameter.data = parameter.data.to(torch.float64 if each is wide else torch.float32)
    one = inputs(model, SIZES[:3])
    (out,) = packed(PackedFlux3(model, impl=impl), [one])
    sample, *tensors = one
    oracle = stock(wide, sample, *(x.to(torch.bfloat16).double() for x in tensors))
    assert_within_budget(out, stock(model, *one), oracle)


PACK = [(SIZES[:1], 3), (SIZES[1:5], 11), (SIZES[2:4], 1), (SIZES, 20), (((1, 16, 16), (1, 9, 11)), 33)]


@pytest.mark.parametrize("impl", IMPLS)
def test_a_ragged_pack_equals_each_sample_alone(make_flux3, impl):
    for flow_map in KINDS:
        model = make_flux3(flow_map=flow_map)
        data = [inputs(model, grids, text, seed=i) for i, (grids, text) in enumerate(PACK[:4])]
        for one, out in zip(data, packed(PackedFlux3(model, impl=impl), data), strict=True):
            assert max_relative_error(out, stock(model, *one)) < RELATIVE


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="bfloat16 products without instructions for them")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("flow_map", KINDS)
def test_same_bits_in_packs_in_bfloat16(make_flux3, flow_map, impl):
    model = make_flux3(torch.bfloat16, flow_map)
    run = PackedFlux3(model, impl=impl)
    data = [inputs(model, grids, text, seed=i) for i, (grids, text) in enumerate(PACK)]
    alone = [packed(run, [one])[0] for one in data]
    for order in ((0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (1, 0)):
        together = packed(run, [data[i] for i in order])
        assert all(torch.equal(out, alone[i]) for i, out in zip(order, together, strict=True)), order


def test_tables_are_those_of_the_pipeline():
    """Tables equal those of diffusers to the last bit; positions begin again in every sample of a pack."""
    from diffusers.models.transformers.transformer_flux3 import Flux3PosEmbed

    from uniref_fast.layout import SelfLayout
    from uniref_fast.models.flux3 import SCALES

    axes = (32, 32, 32, 32)
    layout = SelfLayout.pack(
        [Sample(text, grids[0], tuple(grids[1:])) for grids, text in PACK], FLUX3, clean_references=True
    )
    expected = []
    for grids, text in PACK:
        txt, target, references = ids(grids, text)
        expected += [txt, target, *references]
    theirs = Flux3PosEmbed(theta=10000, axes_dim=[*axes])(torch.cat(expected))
    for ours, other in zip(layout.rotary(axes, "cpu", 10000, torch.float64, SCALES), theirs, strict=True):
        assert torch.equal(ours, other[:, ::2])


# ---- what is equal in all steps ----


def moved(one, step):
    """Return the inputs of another step: another target and another time."""
    sample, target, references, text, times = one
    return sample, target + step, references, text, times - step / 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_and_references_run_the_blocks_of_their_modes_once(make_flux3, linear_by_row, nan_memory, dtype):
    """The kept streams have the bits of computing them in every step."""
    model = make_flux3(dtype)
    run, ran = PackedFlux3(model), []
    for path in ("txt_mode_blocks", "mode_blocks.image", "mode_blocks.image_cond"):
        ff = model.get_submodule(path)[0].ff
        ff.register_forward_pre_hook(lambda *_, path=path: ran.append(path))
    data = [inputs(model, grids, text, seed=i) for i, (grids, text) in enumerate(PACK[:3])]
    steps = [[moved(one, step) for one in data] for step in range(3)]
    every = [packed(run, step) for step in steps]
    for path in ("txt_mode_blocks", "mode_blocks.image", "mode_blocks.image_cond"):
        model.get_submodule(path)[0].ff._forward_pre_hooks.clear()
    assert len(ran) == 9

    constants, layout = run.step_constants(), run.layout([one[0] for one in data])
    streams = layout.image_stream([d[1] for d in data], [d[2] for d in data]), torch.cat([d[3] for d in data])
    for step, expected in zip(steps, every, strict=True):
        found = packed(run, step, constants=constants, streams=streams)
        assert all(map(torch.equal, found, expected))
    assert constants.computed == constants.references.computed == 1
    with torch.no_grad():
        model.mode_blocks["image_cond"][0].ff.linear_in.weight.mul_(1.5)
    assert not torch.equal(packed(run, steps[2], constants=constants, streams=streams)[1], every[2][1])
    assert (constants.computed, constants.references.computed) == (1, 2)


def test_a_flow_map_computes_text_and_references_in_every_step(make_flux3):
    """Text and references of a flow map depend on the time to which a step jumps."""
    model = make_flux3(flow_map=True)
    run, one = PackedFlux3(model), inputs(model, SIZES[:3])
    constants, layout = run.step_constants(), run.layout([one[0]])
    streams = layout.image_stream([one[1]], [one[2]]), one[3]
    for step in range(2):
        (out,) = packed(run, [moved(one, step)], constants=constants, streams=streams)
        assert max_relative_error(out, stock(model, *moved(one, step))) < RELATIVE
    assert constants.computed == constants.references.computed == 0 == run.constant_rows(layout)


def test_kept_references_depend_on_the_step(make_flux3):
    """References see the noise in the blocks of all tokens, so keeping their keys and values there is not exact."""
    model = make_flux3()
    run, one = PackedFlux3(model), inputs(model, SIZES[:4])
    assert "attend to text and target" in dependence(run.layout([one[0]]), "full")
    store = KeptReferences(RefreshSchedule(every=2))
    outs = [packed(run, [moved(one, step)], kept=[store])[0] for step in range(3)]
    errors = [max_relative_error(out, stock(model, *moved(one, step))) for step, out in enumerate(outs)]
    assert errors[0] < RELATIVE and errors[2] < RELATIVE and 3 * RELATIVE < errors[1] < 0.1
    assert store.refreshed == [0, 2] and store.drifts[0] > 0


def test_fused_projections_are_called(make_flux3):
    model = make_flux3()
    one = inputs(model, SIZES[:3])
    expected = stock(model, *one)
    model.fuse_qkv_projections()
    for block in model.single_transformer_blocks:
        block.attn.to_q.weight.data.zero_()
    assert max_relative_error(packed(PackedFlux3(model), [one])[0], expected) < RELATIVE


def test_rows_of_every_module(make_flux3):
    """Each Linear gets rows of the kind that its name says, by which adapters of single samples find their rows."""
    model = make_flux3()
    run = PackedFlux3(model)
    data = [inputs(model, grids, text, seed=i) for i, (grids, text) in enumerate(PACK[:3])]
    layout, counted = run.layout([one[0] for one in data]), {}
    targets = sum(segment.length for segment in layout.targets)
    rows = {
        "text": {layout.text_length}, "image": {targets}, "references": {layout.image_length - targets},
        "joint": {layout.joint_length, targets}, "table": {layout.num_samples},
    }  # fmt: skip
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: counted.update({name: len(args[0])}))
    packed(run, data)
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(counted) == linears
    for name, count in counted.items():
        kind = next(kind for part, kind in run.row_kinds if part in name)
        assert count in rows[kind], f"{name}: {count} rows of the kind {kind}"


def test_refusals(make_flux3):
    from uniref_fast.layout import SelfLayout
    from uniref_fast.models.flux2 import FLUX2

    model = make_flux3(flow_map=True)
    run, (sample, target, _, text, times) = PackedFlux3(model), inputs(model, SIZES[:1])
    with pytest.raises(ValueError, match="time to which its step jumps"):
        run(target, text, times[:, 0], run.layout([sample]))
    other = SelfLayout.pack([sample], FLUX2, clean_references=True)
    with pytest.raises(ValueError, match="layout is that of another model"):
        run(target, text, times, other)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_of_a_pack_are_the_sum_of_single_ones(make_flux3, impl):
    model = make_flux3().train()
    run = PackedFlux3(model, impl=impl, checkpointing=True)
    data = [inputs(model, grids, text, seed=i) for i, (grids, text) in enumerate(PACK[:3])]
    found = []
    with torch.enable_grad():
        for groups in ([data], [[one] for one in data]):
            model.zero_grad()
            for group in groups:
                sum(out.square().sum() for out in packed(run, group)).backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
        sum(stock(model, *one).square().sum() for one in data).backward()
    assert all(p.grad is not None for p in model.parameters()) and len(found[0]) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        for grads in found:
            assert (grads[name] - parameter.grad).abs().max() < 1e-4 * parameter.grad.abs().max().clamp_min(1e-2), name
