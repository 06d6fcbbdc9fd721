"""The packed FLUX.2 against diffusers, sample by sample."""

import warnings
from dataclasses import replace

import pytest
import torch
from patching import ROUNDING

from uniref_fast import native
from uniref_fast.layout import Kind, Sample, SelfLayout
from uniref_fast.models.flux2 import FLUX2, PackedFlux2
from uniref_fast.models.kept_references import KeptReferences, dependence
from uniref_fast.testing import assert_within_budget, max_relative_error
from uniref_fast.training.core.adapter import add_adapter

SIZES = [(1, 4, 6), (1, 3, 5), (1, 1, 1), (1, 2, 9), (1, 7, 7), (1, 1, 8), (1, 5, 2)]  # target, then references 1..6
IMPLS = ["reference", pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason="not built"))]
KINDS = ["klein", "dev", "klein-kv"]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


RELATIVE = 1e-5
"""Largest relative error, in float32, between the packed model and diffusers."""


def split(grids):
    return grids[0], tuple(grids[1:])


def inputs(model, grids, text=7, seed=1):
    """Return image tokens (target first), text, time and guidance scale of one sample; None without guidance."""
    generator = torch.Generator().manual_seed(seed)
    dtype, config = model.dtype, model.config
    tokens = sum(f * h * w for f, h, w in grids)
    image = torch.randn(1, tokens, config.in_channels, generator=generator).to(dtype)
    prompt = torch.randn(1, text, config.joint_attention_dim, generator=generator).to(dtype)
    t, scale = torch.rand(1, generator=generator), 1 + 4 * torch.rand(1, generator=generator)
    return image, prompt, t, scale if config.guidance_embeds else None


def ids(grids, text):
    """Return the position ids that the pipeline makes: of the text, of the target and of the references."""
    from diffusers import Flux2Pipeline

    maps = [torch.empty(1, 1, h, w) for _, h, w in grids]
    references = Flux2Pipeline._prepare_image_ids(maps[1:]) if maps[1:] else torch.empty(1, 0, 4, dtype=torch.int64)
    target = Flux2Pipeline._prepare_latent_ids(maps[0])
    return Flux2Pipeline._prepare_text_ids(torch.empty(1, text, 1)), target, references


def stock(model, grids, image, text, timestep, guidance=None):
    """Return the target's part of diffusers' forward, called as the pipeline of the model calls it."""
    txt_ids, target, references = ids(grids, text.shape[1])
    common = {"encoder_hidden_states": text, "timestep": timestep, "guidance": guidance, "txt_ids": txt_ids}
    n = target.shape[1]
    if not is_kv(model) or len(grids) == 1:
        whole = torch.cat([target, references], dim=1)
        return model(hidden_states=image, img_ids=whole, return_dict=False, **common)[0][0, :n]
    out, _ = model(
        hidden_states=torch.cat([image[:, n:], image[:, :n]], dim=1),
        img_ids=torch.cat([references, target], dim=1),
        kv_cache_mode="extract",
        num_ref_tokens=references.shape[1],
        return_dict=False,
        **common,
    )
    return out[0]


def is_kv(model):
    return type(model.transformer_blocks[0].attn.processor).__name__ == "Flux2KVAttnProcessor"


def guided(samples, guidance):
    return [
        replace(each, guidance=None if scale is None else scale.item())
        for each, scale in zip(samples, guidance, strict=True)
    ]


def packed(model, samples, images, texts, timesteps, guidance, **options):
    run = PackedFlux2(model, **options)
    layout = run.layout(guided(samples, guidance))
    streams = torch.cat([x[0] for x in images]), torch.cat([x[0] for x in texts])
    return layout.split_targets(run(*streams, torch.cat(timesteps), layout))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("references", range(7))
def test_equals_diffusers(make_flux2, references, kind, impl):
    model = make_flux2(kind)
    grids = SIZES[: references + 1]
    data = inputs(model, grids)
    (out,) = packed(model, [Sample(7, *split(grids))], *([x] for x in data), impl=impl)
    assert max_relative_error(out, stock(model, grids, *data)) < RELATIVE


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_within_the_budget(make_flux2, kind, impl):
    model, wide = make_flux2(kind, dtype=torch.bfloat16), make_flux2(kind).to(torch.bfloat16).double()
    grids = SIZES[:3]
    image, text, t, scale = inputs(model, grids)
    (out,) = packed(model, [Sample(7, *split(grids))], [image], [text], [t], [scale], impl=impl)
    t, scale = (None if x is None else x.bfloat16().double() for x in (t, scale))
    oracle = stock(wide, grids, image.double(), text.double(), t, scale)
    assert_within_budget(out, stock(model, grids, *inputs(model, grids)), oracle)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_ragged_pack_equals_each_sample_alone(make_flux2, kind, impl):
    """Every sample has its own time, guidance scale, text length and references."""
    model = make_flux2(kind)
    pack = [(SIZES[:1], 3), (SIZES[1:5], 11), (SIZES[2:4], 1), (SIZES, 20)]
    data = [(grids, *inputs(model, grids, text, seed=i)) for i, (grids, text) in enumerate(pack)]
    samples = [Sample(text, *split(grids)) for grids, text in pack]
    together = packed(model, samples, *zip(*[d[1:] for d in data], strict=True), impl=impl)
    for (grids, *one), out in zip(data, together, strict=True):
        assert max_relative_error(out, stock(model, grids, *one)) < RELATIVE


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="bfloat16 products without instructions for them")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_in_packs_in_bfloat16(make_flux2, kind, impl):
    model = make_flux2(kind, dtype=torch.bfloat16)
    pack = [(SIZES[:1], 3), (((1, 1, 1),), 1), (SIZES[1:5], 11), (((1, 16, 16), (1, 9, 11)), 33), (SIZES, 20)]
    data = [(Sample(text, *split(grids)), *inputs(model, grids, text, seed=i)) for i, (grids, text) in enumerate(pack)]
    alone = [packed(model, *([x] for x in one), impl=impl)[0] for one in data]
    for order in ((0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (1, 0), (3, 1)):
        together = packed(model, *zip(*(data[i] for i in order), strict=True), impl=impl)
        assert all(torch.equal(out, alone[i]) for i, out in zip(order, together, strict=True)), order


# ---- positions ----


@pytest.mark.parametrize("references", range(7))
def test_positions_and_tables_are_those_of_the_pipeline(references):
    """Tables equal those of diffusers to the last bit; offsets of references begin again in every sample of a pack."""
    from diffusers.models.transformers.transformer_flux2 import Flux2PosEmbed

    axes, rope = (32, 32, 32, 32), Flux2PosEmbed(theta=2000, axes_dim=[32, 32, 32, 32])
    pack = [(SIZES[: references + 1], 5), (SIZES[::-1][: references + 1], 0), (SIZES[2:4], 9)]
    layout = SelfLayout.pack([Sample(text, *split(grids)) for grids, text in pack], FLUX2, clean_references=False)
    expected = torch.cat([torch.cat(ids(grids, text), dim=1)[0] for grids, text in pack])
    assert torch.equal(layout.positions("cpu").long(), expected)
    for ours, theirs in zip(layout.rotary(axes, "cpu", 2000, torch.float64), rope(expected), strict=True):
        assert torch.equal(ours, theirs[:, ::2])


def test_text_keeps_its_positions_around_padding():
    layout = SelfLayout.pack([Sample(((3, True), (2, False), (4, True)), (1, 1, 1))], FLUX2, clean_references=False)
    assert layout.positions("cpu")[:9].tolist() == [[0, 0, 0, n] for n in range(9)]


def test_no_position_is_used_twice():
    """Two images of a sample share no position, though they have one size, nor does the text; only the first does."""
    layout = SelfLayout.pack([Sample(9, (1, 3, 3), ((1, 3, 3),) * 6)], FLUX2, clean_references=False)
    positions = [tuple(row) for row in layout.positions("cpu").tolist()]
    # Text token 0 and the first token of the target are both at the origin, in diffusers too.
    assert len({*positions}) == len(positions) - 1 == 9 + 7 * 9 - 1
    assert positions[0] == positions[9] == (0, 0, 0, 0)


# ---- references ----


@pytest.mark.parametrize("kind", KINDS)
def test_references_are_not_moved(make_flux2, kind):
    """The result has the targets' rows alone, so that a sampler cannot move the rows of references."""
    model = make_flux2(kind)
    grids = SIZES[:4]
    run = PackedFlux2(model)
    scales = [2.0, 3.0] if kind == "dev" else [None, None]
    samples = Sample(7, *split(grids), guidance=scales[0]), Sample(2, *split(grids[1:]), guidance=scales[1])
    layout = run.layout(samples)
    first, second = inputs(model, grids), inputs(model, grids[1:], 2)
    image = torch.cat([first[0][0], second[0][0]])
    before = image.clone()
    with torch.no_grad():
        out = run(image, torch.cat([first[1][0], second[1][0]]), torch.cat([first[2], second[2]]), layout)
    assert torch.equal(image, before) and len(out) == 24 + 15
    layout.write_targets(image, [x + y for x, y in zip(layout.split_targets(out), (1, 2), strict=True)])
    moved = (image != before).any(dim=1)
    kinds = torch.cat([torch.full((s.length,), s.kind is Kind.TARGET) for s in layout.image_segments])
    assert torch.equal(moved, kinds)


def steps(model, run, samples, count):
    """Yield the arguments of the model for each step of an edit: only targets and times change."""
    generator = torch.Generator().manual_seed(0)
    layout = run.layout(samples)
    image = torch.randn(layout.image_length, model.config.in_channels, generator=generator).to(model.dtype)
    text = torch.randn(layout.text_length, model.config.joint_attention_dim, generator=generator).to(model.dtype)
    targets = layout.target_rows("cpu")
    for _ in range(count):
        image[targets] = torch.randn(len(targets), model.config.in_channels, generator=generator).to(model.dtype)
        yield image.clone(), text, torch.rand(len(samples), generator=generator), layout


KV_SAMPLES = [Sample(7, (1, 4, 6), ((1, 3, 5), (1, 2, 9))), Sample(3, (1, 3, 3)), Sample(11, (1, 2, 2), ((1, 9, 12),))]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_references_of_klein_kv_have_the_same_bits(make_flux2, linear_by_row, nan_memory, dtype, impl):
    model = make_flux2("klein-kv", dtype=dtype)
    run, kept = PackedFlux2(model, impl=impl), [KeptReferences() for _ in KV_SAMPLES]
    assert run.visibility == "reference_causal" and dependence(run.layout(KV_SAMPLES), run.visibility) is None
    with torch.no_grad():
        for arguments in steps(model, run, KV_SAMPLES, 3):
            assert torch.equal(run(*arguments, kept), run(*arguments))
    assert [store.refreshed for store in kept] == [[0], [], [0]], "references were computed again"


def test_kept_references_equal_the_cache_of_diffusers(make_flux2):
    """Steps after the first use `kv_cache_mode="cached"` in diffusers, with the tokens of text and target alone."""
    model = make_flux2("klein-kv")
    run, kept, cache = PackedFlux2(model), [KeptReferences()], None
    sample = KV_SAMPLES[0]
    txt_ids, target, references = ids([sample.target, *sample.references], 7)
    n = target.shape[1]
    for image, text, t, layout in steps(model, run, [sample], 3):
        common = {"encoder_hidden_states": text[None], "timestep": t, "txt_ids": txt_ids, "return_dict": False}
        with torch.no_grad():
            ours = run(image, text, t, layout, kept)
            if cache is None:
                order = torch.cat([image[n:], image[:n]])[None]
                everything = {"img_ids": torch.cat([references, target], dim=1), "num_ref_tokens": references.shape[1]}
                theirs, cache = model(hidden_states=order, kv_cache_mode="extract", **everything, **common)
            else:
                more = {"img_ids": target, "kv_cache": cache, "kv_cache_mode": "cached"}
                (theirs,) = model(hidden_states=image[None, :n], **more, **common)
        assert max_relative_error(ours, theirs[0]) < RELATIVE
    assert kept[0].refreshed == [0]


def test_references_of_other_kinds_depend_on_the_step(make_flux2):
    for kind, reason in (("klein", "attend to text and target"), ("dev", "attend to text and target")):
        run = PackedFlux2(make_flux2(kind))
        assert reason in dependence(run.layout(KV_SAMPLES), run.visibility)
    run = PackedFlux2(make_flux2("klein"), visibility="reference_causal")
    assert "modulated with the time t" in dependence(run.layout(KV_SAMPLES), run.visibility)


# ---- options ----


def test_fused_projections_are_called(make_flux2):
    model, grids = make_flux2("klein"), SIZES[:3]
    data = inputs(model, grids)
    model.fuse_qkv_projections()
    try:
        with torch.no_grad():
            model.transformer_blocks[0].attn.to_qkv.weight.mul_(1.5)  # a change that only the fused weight has
            model.transformer_blocks[1].attn.to_added_qkv.weight.mul_(1.5)
        (out,) = packed(model, [Sample(7, *split(grids))], *([x] for x in data))
        assert max_relative_error(out, stock(model, grids, *data)) < RELATIVE
    finally:
        model.unfuse_qkv_projections()


@pytest.mark.parametrize("kind", ["dev", "dev-kv"])
def test_guidance_embedding(make_flux2, kind):
    """Every sample has its own scale, its clean references too."""
    model, grids = make_flux2(kind), SIZES[:2]
    image, text, t, scale = inputs(model, grids)
    sample = Sample(7, *split(grids))
    outs = packed(model, [sample] * 2, [image] * 2, [text] * 2, [t] * 2, [scale, scale + 3])
    for out, own in zip(outs, (scale, scale + 3), strict=True):
        assert max_relative_error(out, stock(model, grids, image, text, t, own)) < RELATIVE
    assert max_relative_error(outs[0], outs[1]) > 100 * ROUNDING
    with pytest.raises(ValueError, match="the samples have no guidance scales"):
        packed(model, [sample], [image], [text], [t], [None])


def test_text_is_embedded_once_for_all_steps(make_flux2):
    model = make_flux2("klein")
    run = PackedFlux2(model)
    constants = run.step_constants()
    with torch.no_grad():
        for arguments in steps(model, run, KV_SAMPLES, 3):
            assert torch.equal(run(*arguments, None, constants), run(*arguments))
    assert constants.computed == 1


def test_rows_of_every_module(make_flux2):
    """The kind of rows by name is that of the stream that a module gets, fused projections included."""
    model, found = make_flux2("klein"), {}

    def record(name, rows):
        found[name] = rows

    image, text, t, _ = inputs(model, SIZES[:2])
    layout = (run := PackedFlux2(model)).layout([Sample(7, *split(SIZES[:2]))])
    rows = {"image": layout.image_length, "text": layout.text_length, "joint": layout.joint_length, "table": 1}
    model.fuse_qkv_projections()
    try:
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda _, args, out, name=name: record(name, len(args[0])))
        run(image[0], text[0], t, layout)
        for name, count in found.items():
            kind = next(kind for part, kind in run.row_kinds if part in name)
            if "proj_out" not in name and "blocks.2" not in name:  # of the target alone
                assert count == rows[kind], name
        assert found["transformer_blocks.0.attn.to_added_qkv"] == 7
    finally:
        model.unfuse_qkv_projections()


def test_refusals(make_flux2):
    model = make_flux2("klein")
    image, text, t, _ = inputs(model, SIZES[:2])
    run = PackedFlux2(model)
    layout = run.layout([Sample(7, *split(SIZES[:2]))])
    with pytest.raises(ValueError, match="no guidance embeddings"):
        run(image[0], text[0], t, run.layout([Sample(7, *split(SIZES[:2]), guidance=4.0)]))
    with pytest.raises(ValueError, match="1 of 2 samples have a guidance scale"):
        run.layout([Sample(1, SIZES[0]), Sample(1, SIZES[0], guidance=4.0)])
    with pytest.raises(ValueError, match=r"text has shape \[6, 96\]"):
        run(image[0], text[0, 1:], t, layout)
    clean = SelfLayout.pack([Sample(7, *split(SIZES[:2]))], FLUX2, clean_references=True)
    with pytest.raises(ValueError, match="clean_references=True, the model has False"):
        run(image[0], text[0], t, clean)


@pytest.mark.slow
@pytest.mark.skipif(not native.available(), reason="not built")
@pytest.mark.parametrize("kind", ["dev", "klein-kv"])
def test_compiled_blocks_equal_diffusers(make_flux2, kind):
    """Two graphs at most for each of the first blocks of both kinds, the last block and the others."""
    model = make_flux2(kind)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model.compile_repeated_blocks(fullgraph=True)
    try:
        run = PackedFlux2(model, impl="native")
        packs = [
            [(SIZES[:2], 3)],
            [(SIZES[1:4], 11), (SIZES[:1], 2)],
            [(SIZES[2:4], 1), (SIZES[:3], 5), (SIZES[3:5], 6)],
        ]
        outs = []
        for pack in packs:
            data = [inputs(model, grids, text, seed=i) for i, (grids, text) in enumerate(pack)]
            samples = guided([Sample(text, *split(grids)) for grids, text in pack], [each[3] for each in data])
            layout = run.layout(samples)
            streams = (torch.cat([each[i][0] for each in data]) for i in (0, 1))
            outs.append(layout.split_targets(run(*streams, torch.cat([each[2] for each in data]), layout)))
        assert counters["stats"]["unique_graphs"] <= 2 * 5
    finally:
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            block._compiled_call_impl = None
    for pack, out in zip(packs, outs, strict=True):
        for i, ((grids, text), ours) in enumerate(zip(pack, out, strict=True)):
            assert max_relative_error(ours, stock(model, grids, *inputs(model, grids, text, seed=i))) < ROUNDING


# ---- gradients ----

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "linear_in",
                "linear_out", "to_qkv_mlp_proj", "to_out")  # fmt: skip
CASES = [(SIZES[:3], 7), (SIZES[:1], 1), (SIZES[1:6], 5)]
"""Sizes of target and references, and text tokens of samples with 2, 0 and 4 references."""


def velocity_loss(model, data, run=None):
    """Return the mean over samples of the error of their velocities, one by one in diffusers or packed by `run`."""
    if run is None:
        outs = [stock(model, grids, *one) for (grids, _), one in zip(CASES, data, strict=True)]
    else:
        samples = [Sample(text, *split(grids)) for grids, text in CASES]
        layout = run.layout(guided(samples, [one[3] for one in data]))
        streams = (torch.cat([one[i][0] for one in data]) for i in (0, 1))
        outs = layout.split_targets(run(*streams, torch.cat([one[2] for one in data]), layout))
    generator = torch.Generator().manual_seed(3)
    return sum((out - torch.randn(out.shape, generator=generator)).square().mean() for out in outs) / len(outs)


def loss_and_gradients(model, run=None):
    """Return the loss, and the gradients of all trained parameters and of the inputs by name."""
    data = [inputs(model, grids, text, seed=i) for i, (grids, text) in enumerate(CASES)]
    leaves = [x.requires_grad_() for one in data for x in one[:2]]
    model.zero_grad()
    with torch.enable_grad():
        loss = velocity_loss(model, data, run)
        loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found, **{f"input {i}": leaf.grad for i, leaf in enumerate(leaves)}}


def add_lora(model):
    """Add a LoRA with random factors to all Linears of the blocks."""
    add_adapter(model.requires_grad_(False), 4, 4.0, LORA_TARGETS)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["dev", "klein-kv"])
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
def test_loss_and_gradients_equal_diffusers(make_flux2, lora, kind, impl):
    """A pack equals diffusers one by one: gradients of all weights, or of the factors of a LoRA, and of the inputs."""
    model = make_flux2(kind)
    if lora:
        add_lora(model)
    theirs = loss_and_gradients(model)
    all_ours = [
        loss_and_gradients(model, PackedFlux2(model, impl=impl, for_training=True, checkpointing=checkpointing))
        for checkpointing in (False, True, "inputs", "host")
    ]
    assert sum("lora" in name for name in theirs) == 2 * (2 * 12 + 3 * 2) * lora
    for ours in all_ours:
        assert not any(theirs[name].any() for name in theirs.keys() - ours.keys())
        assert all(max_relative_error(grad, theirs[name]) < RELATIVE for name, grad in ours.items())
    for other in all_ours[2:]:  # recomputed with the attention kept or not, and from host memory
        assert all(torch.equal(other[name], grad) for name, grad in all_ours[1].items())


@pytest.mark.slow
@pytest.mark.skipif(not native.available(), reason="not built")
def test_gradients_of_compiled_blocks(make_flux2):
    model = make_flux2("klein-kv")
    add_lora(model)
    theirs, run = loss_and_gradients(model), PackedFlux2(model, impl="native", for_training=True)
    torch._dynamo.reset()
    run.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the packed forward ran its blocks uncompiled")
        ours = loss_and_gradients(model, run)
    assert ours.keys() == theirs.keys()
    assert all(max_relative_error(grad, theirs[name]) < RELATIVE for name, grad in ours.items())
