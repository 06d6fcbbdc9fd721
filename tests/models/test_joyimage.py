"""The packed JoyImage-Edit-Plus against diffusers, which pads the samples of a batch and masks the padding."""

import math

import joyimage
import pytest
import torch
from patching import ROUNDING

from uniref_fast import native
from uniref_fast.layout import Sample
from uniref_fast.models import PackedJoyImage
from uniref_fast.models.kept_references import KeptReferences, RefreshSchedule, dependence
from uniref_fast.testing import assert_within_budget, max_relative_error

SIZES = [(1, 4, 6), (1, 3, 5), (1, 1, 1), (1, 2, 9), (1, 7, 7), (1, 1, 8), (1, 5, 2)]  # target, then references 1..6
PACK = [(3, SIZES[:1]), (11, SIZES[1:5]), (1, SIZES[2:4]), (20, SIZES)]  # text length and grids of each sample
IMPLS = ["reference", pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason="not built"))]
RELATIVE = 1e-5
"""Largest relative error, in float32, between the packed model and diffusers."""


@pytest.fixture(scope="module")
def model():
    return joyimage.transformer()


@pytest.fixture(scope="module")
def model16():
    return joyimage.transformer(torch.bfloat16)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def streams(samples, given):
    """Return image stream, text stream and layout samples of the padded arguments of diffusers."""
    counts = [sum(map(math.prod, grids)) for _, grids in samples]
    image = [x[:n].flatten(1) for x, n in zip(given["hidden_states"], counts, strict=True)]
    text = [x[:n] for x, (n, _) in zip(given["encoder_hidden_states"], samples, strict=True)]
    return torch.cat(image), torch.cat(text), [Sample(n, grids[0], tuple(grids[1:])) for n, grids in samples]


def packed(model, samples, given, run=None, **options):
    run = run or PackedJoyImage(model, **options)
    image, text, found = streams(samples, given)
    layout = run.layout(found)
    return layout.split_targets(run(image, text, run.times([*given["timestep"]], image.dtype), layout))


def one_of(given, i):
    return {name: x[i : i + 1] if name != "return_dict" else x for name, x in given.items()}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("references", range(7))
def test_equals_diffusers(model, references, impl):
    samples = [(7, SIZES[: references + 1])]
    given = joyimage.inputs(samples)
    (expected,) = joyimage.targets(model(**given)[0], samples)
    (out,) = packed(model, samples, given, impl=impl)
    assert max_relative_error(out, expected) < RELATIVE


@pytest.mark.parametrize("impl", IMPLS)
def test_a_ragged_pack_equals_a_padded_batch(model, impl):
    """Every sample has its own time, text length and references."""
    given = joyimage.inputs(PACK)
    expected = joyimage.targets(model(**given)[0], PACK)
    for out, wanted in zip(packed(model, PACK, given, impl=impl), expected, strict=True):
        assert max_relative_error(out, wanted) < RELATIVE


@pytest.mark.parametrize("impl", IMPLS)
def test_bfloat16_within_the_budget(model16, impl):
    samples = PACK[1:2]
    wide = joyimage.transformer(torch.bfloat16).double()
    given = joyimage.inputs(samples, torch.bfloat16)
    double = {
        name: x.double() if name in ("hidden_states", "encoder_hidden_states") else x for name, x in given.items()
    }
    (out,) = packed(model16, samples, given, impl=impl)
    (oracle,) = joyimage.targets(wide(**double)[0], samples)
    (eager,) = joyimage.targets(model16(**given)[0], samples)
    assert_within_budget(out, eager, oracle)


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="bfloat16 products without instructions for them")
@pytest.mark.parametrize("impl", IMPLS)
def test_same_bits_in_packs_in_bfloat16(model16, impl):
    pack = [*PACK, (33, [(1, 16, 16), (1, 9, 11)])]
    given = [joyimage.inputs([sample], torch.bfloat16, seed=i) for i, sample in enumerate(pack)]
    alone = [packed(model16, [sample], one, impl=impl)[0] for sample, one in zip(pack, given, strict=True)]
    run = PackedJoyImage(model16, impl=impl)
    for order in ((0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (1, 0), (3, 1)):
        parts = [streams([pack[i]], given[i]) for i in order]
        layout = run.layout([part[2][0] for part in parts])
        t = run.times([given[i]["timestep"][0] for i in order], torch.bfloat16)
        out = run(torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]), t, layout)
        together = layout.split_targets(out)
        assert all(torch.equal(out, alone[i]) for i, out in zip(order, together, strict=True)), order


def test_masked_text(model):
    """Masked tokens inside the text are not seen, and move nothing, because text has no positions."""
    samples = [(9, SIZES[:3])]
    given = joyimage.inputs(samples)
    given["encoder_hidden_states_mask"][0, 3:5] = 0
    (expected,) = joyimage.targets(model(**given)[0], samples)
    run = PackedJoyImage(model)
    image, text, _ = streams(samples, given)
    layout = run.layout([Sample(((3, True), (2, False), (4, True)), SIZES[0], tuple(SIZES[1:3]))])
    assert max_relative_error(run(image, text, given["timestep"] / 1000, layout), expected) < RELATIVE
    assert max_relative_error(packed(model, samples, given)[0], expected) > 100 * RELATIVE


def test_positions_and_tables_are_those_of_diffusers(model):
    """The numbers of references begin again in every sample; text is not rotated."""
    run = PackedJoyImage(model)
    layout = run.layout([Sample(2, SIZES[0], tuple(SIZES[1:4])), Sample(1, SIZES[4], (SIZES[0],))])
    cos, sin = layout.rotary(model.config.rope_dim_list, "cpu", model.config.theta)
    at = 0
    for text, grids in ((2, SIZES[:4]), (1, [SIZES[4], SIZES[0]])):
        assert (cos[at : at + text] == 1).all() and (sin[at : at + text] == 0).all()
        at += text
        for frame, (_, height, width) in enumerate(grids):
            tables = model._get_rotary_pos_embed_for_range((frame, 0, 0), (frame + 1, height, width))
            for ours, theirs in zip((cos, sin), tables, strict=True):
                assert (ours[at : at + height * width] - theirs[:, ::2]).abs().max() < 2e-7
            at += height * width
    assert at == layout.joint_length


def test_timesteps_reach_the_model_without_rounding(model16):
    """The pipeline passes float32; in bfloat16 a time would have 8 significant bits."""
    seen = []
    hook = model16.condition_embedder.timesteps_proj.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    try:
        for t in torch.linspace(1000, 0.1, 40):
            samples = [(1, SIZES[2:3])]
            packed(model16, samples, joyimage.inputs(samples, torch.bfloat16) | {"timestep": t[None]})
            assert seen[-1].dtype == torch.float32 and seen[-1].item() == t.item()
    finally:
        hook.remove()


def test_text_is_embedded_once_for_all_steps(model):
    run, given = PackedJoyImage(model), joyimage.inputs(PACK)
    constants = run.step_constants()
    image, text, samples = streams(PACK, given)
    layout = run.layout(samples)
    for t in (0.9, 0.2):
        arguments = image, text, torch.full((len(PACK),), t), layout
        assert torch.equal(run(*arguments, None, constants), run(*arguments))
    assert constants.computed == 1


def test_kept_references(model):
    """They depend on the step, so only a schedule is possible; a kept step leaves out their rows."""
    run, given = PackedJoyImage(model), joyimage.inputs(PACK)
    image, text, samples = streams(PACK, given)
    layout = run.layout(samples)
    assert "attend to text and target" in dependence(layout, run.visibility)
    rows = []
    hook = model.img_in.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    kept = [KeptReferences(RefreshSchedule(every=2)) for _ in PACK]
    t = torch.full((len(PACK),), 0.5)
    try:
        first, second = run(image, text, t, layout, kept), run(image, text, t, layout, kept)
    finally:
        hook.remove()
    assert torch.equal(first, run(image, text, t, layout)) and max_relative_error(second, first) < RELATIVE
    assert rows == [layout.image_length, sum(math.prod(grids[0]) for _, grids in PACK)]


def test_rows_of_every_module(model):
    """The kind of rows by name is that of the stream that a module gets."""
    found, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv3d)):
            hooks.append(
                module.register_forward_hook(lambda _, args, out, name=name: found.update({name: len(args[0])}))
            )
    samples = PACK[1:2]
    try:
        packed(model, samples, joyimage.inputs(samples), run := PackedJoyImage(model))
    finally:
        for hook in hooks:
            hook.remove()
    layout = run.layout(streams(samples, joyimage.inputs(samples))[2])
    rows = {"image": layout.image_length, "text": layout.text_length, "table": 1}
    assert len(set(rows.values()) | {15}) == 4 and len(found) == 7 + 8 * 3 - 3  # the last block has no text output
    for name, count in found.items():
        kind = next(kind for part, kind in run.row_kinds if part in name)
        targets = name == "proj_out" or (name.startswith("double_blocks.2") and ".img_" in name and "qkv" not in name)
        assert count == (15 if targets else rows[kind]), name


def test_gradients_equal_diffusers(model):
    """The gradients of all weights, with and without recomputation."""
    samples = PACK[1:3]
    given = joyimage.inputs(samples)
    found = []
    with torch.enable_grad():
        for checkpointing in (None, False, True, "inputs"):
            model.zero_grad()
            if checkpointing is None:
                outs = joyimage.targets(model(**given)[0], samples)
            else:
                outs = packed(model, samples, given, checkpointing=checkpointing)
            sum(out.square().mean() for out in outs).backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    largest = max(grad.abs().max().item() for grad in found[0].values())
    for name, grad in found[2].items():
        scale = max(grad.abs().max().item(), 1e-3 * largest)
        assert all((other[name] - grad).abs().max().item() < 1e-4 * scale for other in found[:2]), name
        assert torch.equal(found[3][name], grad), "recomputed with the output of attention kept or not"
    unused = {name for name in found[0] if name not in found[1] and found[0][name].abs().max() > 0}
    assert not unused


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_offloading(kind):
    model, options = joyimage.transformer(), {"num_blocks_per_group": 1} if kind == "block_level" else {}
    given = joyimage.inputs(PACK)
    expected = packed(model, PACK, given)
    model.enable_group_offload(torch.device("cpu"), offload_type=kind, **options)
    for _ in range(2):
        assert all(map(torch.equal, packed(model, PACK, given), expected))


def test_layerwise_casting():
    model, given = joyimage.transformer(), joyimage.inputs(PACK)
    before = packed(model, PACK, given)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    expected = joyimage.targets(model(**given)[0], PACK)
    for out, wanted, other in zip(packed(model, PACK, given), expected, before, strict=True):
        assert max_relative_error(out, wanted) < RELATIVE < max_relative_error(out, other)


@pytest.mark.slow
def test_compiled_blocks():
    """One graph for the first block, one for the last and one for the others, for packs of all sizes."""
    from torch._dynamo.testing import CompileCounter

    model, counter = joyimage.transformer(layers=4), CompileCounter()
    run = PackedJoyImage(model, impl="native" if native.available() else None)
    plain = PackedJoyImage(model, impl=run.impl)
    torch.compiler.reset()
    run.compile_repeated_blocks(fullgraph=True, dynamic=True, backend=counter)
    for samples in (PACK[1:], PACK, PACK[3:], PACK[:1]):
        given = joyimage.inputs(samples)
        for out, wanted in zip(packed(model, samples, given, run), packed(model, samples, given, plain), strict=True):
            assert max_relative_error(out, wanted) < ROUNDING
    assert counter.frame_count == 3


def test_refusals(model):
    run = PackedJoyImage(model)
    image, text, samples = streams(PACK, joyimage.inputs(PACK))
    layout = run.layout(samples)
    with pytest.raises(ValueError, match=r"image has shape \[\d+, 16\], the layout expects \[\d+, 64\]"):
        run(image[:, :16], text, torch.ones(len(PACK)), layout)
    run.parallel = object()
    with pytest.raises(ValueError, match="parallelism is not supported for JoyImageEditPlusTransformer3DModel"):
        run(image, text, torch.ones(len(PACK)), layout)
