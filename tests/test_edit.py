"""edit(): many different requests in one packed loop, each equal to its own single run."""

import contextlib
import dataclasses
import functools
import inspect
import types
import warnings
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    QwenImageEditPlusPipeline,
    UniPCMultistepScheduler,
    attention_backend,
)
from diffusers.hooks import hooks as diffusers_hooks
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers import transformer_qwenimage as qwen
from PIL import Image
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

import uniref_fast
from uniref_fast import EditReport, EditRequest, Sample, SelfLayout
from uniref_fast.builtin import SmallQwenImageEditPlusPipeline
from uniref_fast.edit_session import EditSession
from uniref_fast.layout import Kind
from uniref_fast.models.qwen_image_edit import REPLACED
from uniref_fast.request import request_geometry, validated
from uniref_fast.testing import max_relative_error

LOOP_ROUNDING = 1e-4
"""Largest relative error, in float32, between two ways to run a denoising loop and to decode its result."""

STEPS = 3


def picture(color, width, height):
    image = Image.new("RGB", (width, height), color)
    image.paste("white", (width // 4, height // 4, width // 2, height // 2))
    return image


def requests():
    """K = 0, 1, 3 references; different sizes, prompts, seeds, guidance and numbers of steps."""
    red, green, blue = picture("red", 60, 40), picture("green", 33, 77), picture("blue", 90, 90)
    common = {"negative_prompt": " "}
    return [
        EditRequest("a sunflower", seed=1, height=64, width=96, num_inference_steps=STEPS),
        EditRequest("make it night", [red], seed=2, true_cfg_scale=2.5, num_inference_steps=STEPS, **common),
        EditRequest("put all in one", [red, green, blue], seed=3, height=80, width=48, num_inference_steps=STEPS - 1),
        EditRequest("swap them", [blue, green], seed=4, num_inference_steps=STEPS, **common),
    ]


def stock_image(pipe, request):
    """The unpatched pipeline on one request."""
    return pipe(
        image=list(request.images),
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        true_cfg_scale=request.true_cfg_scale or 4.0,
        height=request.height,
        width=request.width,
        num_inference_steps=request.num_inference_steps,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="pt",
    ).images[0]


@pytest.fixture
def pipe(builtin_pipe):
    return builtin_pipe


@pytest.mark.slow
def test_each_result_equals_its_own_run(pipe):
    """Results equal edit() of one request, and diffusers' pipeline where it can run (it needs an image)."""
    together = uniref_fast.edit(pipe, requests(), output_type="pt", progress=False)
    for request, image in zip(requests(), together, strict=True):
        alone = uniref_fast.edit(pipe, [request], output_type="pt", progress=False)[0]
        assert image.shape == alone.shape and max_relative_error(image, alone) < LOOP_ROUNDING
        if request.images:
            assert max_relative_error(image, stock_image(pipe, request)) < LOOP_ROUNDING
        if request.height:
            assert image.shape[-2:] == (request.height, request.width)


def test_without_references_equals_a_loop_over_diffusers_transformer(pipe):
    """K = 0 has no stock pipeline call, so the oracle is diffusers' transformer and scheduler by hand."""
    request = requests()[0]
    out = uniref_fast.edit(pipe, [request], output_type="latent", progress=False)[0]
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_shift

    embeds, _ = pipe.encode_prompt(prompt=request.prompt, image=None, device="cpu")
    latents, _ = pipe.prepare_latents(
        None, 1, 16, 64, 96, embeds.dtype, "cpu", torch.Generator().manual_seed(request.seed)
    )
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    config = scheduler.config
    mu = calculate_shift(
        latents.shape[1], config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    scheduler.set_timesteps(sigmas=[1 - i / STEPS * (1 - 1 / STEPS) * STEPS / (STEPS - 1) for i in range(STEPS)], mu=mu)
    for t in scheduler.timesteps:
        with torch.no_grad():
            velocity = pipe.transformer(
                hidden_states=latents,
                encoder_hidden_states=embeds,
                timestep=t[None] / 1000,
                img_shapes=[[(1, 8, 12)]],
                return_dict=False,
            )[0]
        latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
    assert max_relative_error(out, latents) < LOOP_ROUNDING


@pytest.fixture
def layouts(monkeypatch):
    """The layout of every packed forward, as it happens."""
    seen = []
    call = uniref_fast.PackedQwenImage.__call__

    def spy(self, image, text, timestep, layout, *others):
        seen.append(layout)
        return call(self, image, text, timestep, layout, *others)

    monkeypatch.setattr(uniref_fast.PackedQwenImage, "__call__", spy)
    return seen


def test_splitting_into_packs_changes_nothing(pipe, layouts):
    whole = uniref_fast.edit(pipe, requests(), output_type="latent", progress=False)
    assert len(layouts) == STEPS and layouts[0].num_samples == 6 and layouts[-1].num_samples == 5
    layouts.clear()
    split = uniref_fast.edit(pipe, requests(), output_type="latent", progress=False, pack_tokens=500)
    assert len(layouts) > STEPS and all(x.joint_length <= 500 or x.num_samples == 1 for x in layouts)
    assert all(max_relative_error(a, b) < LOOP_ROUNDING for a, b in zip(split, whole, strict=True))


def test_kept_references_do_not_depend_on_the_pack(pipe, layouts):
    """Guidance, different numbers of steps, and jobs that end while others keep their references."""
    batch = [dataclasses.replace(request, num_inference_steps=9 - i) for i, request in enumerate(requests())]
    report = EditReport()
    options = {"output_type": "latent", "progress": False, "keep_references": "auto", "drift": 0.15}
    together = uniref_fast.edit(pipe, batch, report=report, **options)
    steps = {(each.request, each.prediction): each.refreshed for each in report.references}
    assert set(steps) == {(0, "prompt"), (1, "prompt"), (1, "negative prompt"), (2, "prompt"), (3, "prompt"),
                          (3, "negative prompt")}  # fmt: skip
    assert steps[0, "prompt"] == (), "no references"
    assert len(set(steps.values())) > 2, "the requests need different schedules, or this test shows nothing"
    assert any(len(each.refreshed) < each.steps - 1 for each in report.references if each.refreshed)
    layouts.clear()
    split = uniref_fast.edit(pipe, batch, pack_tokens=500, **options)
    assert len(layouts) > 9, "several packs"
    for i, (request, latents) in enumerate(zip(batch, together, strict=True)):
        alone = uniref_fast.edit(pipe, [request], report=report, **options)[0]
        assert max_relative_error(latents, alone) < LOOP_ROUNDING
        assert max_relative_error(split[i], alone) < LOOP_ROUNDING
        assert [each.refreshed for each in report.references] == [steps[key] for key in steps if key[0] == i]
        assert all(each.steps == request.num_inference_steps for each in report.references if each.refreshed)


def test_keep_references_by_number_of_steps(pipe):
    """1 computes them in every step; a larger number changes the result a little, and says so in the report."""
    batch = [dataclasses.replace(request, num_inference_steps=4) for request in requests()[1:2]]
    options = {"output_type": "latent", "progress": False}
    report = EditReport()
    exact, same, kept, small = (
        uniref_fast.edit(pipe, batch, report=report, **options, **more)[0]
        for more in ({}, {"keep_references": 1}, {"keep_references": 2}, {"keep_references": 2, "keep_dtype": "int8"})
    )
    assert torch.equal(same, exact)
    assert 1e-3 < (kept - exact).norm() / exact.norm() < 0.3
    assert 1e-4 < (small - kept).norm() / kept.norm() < 0.03
    assert [each.refreshed for each in report.references] == [(0, 2), (0, 2)]
    assert all(len(each.drift) == 1 and 0 < each.drift[0] < 1 for each in report.references)
    assert report.references[0].kept_bytes == report.references[1].kept_bytes > 0
    assert "references computed in 2 of 4 steps (0, 2); drift at most 0." in str(report)
    uniref_fast.edit(pipe, batch, report=report, **options)
    assert str(report) == "references computed in every step"


@pytest.mark.parametrize("keep", [True, "auto"])
def test_keep_references_once_where_that_is_exact(pipe, keep):
    batch, report = requests(), EditReport()
    options = {"output_type": "latent", "progress": False, "visibility": "reference_causal"}
    exact = uniref_fast.edit(pipe, batch, **options)
    kept = uniref_fast.edit(pipe, batch, keep_references=keep, report=report, **options)
    assert all(max_relative_error(a, b) < LOOP_ROUNDING for a, b in zip(kept, exact, strict=True))
    assert {each.refreshed for each in report.references} == {(), (0,)}


def test_keep_references_is_refused_where_it_would_not_be_exact(pipe, monkeypatch):
    request = requests()[1]
    with pytest.raises(ValueError, match=r"not be exact: references attend to text and target under visibility 'full'"):
        uniref_fast.edit(pipe, [request], keep_references=True)
    with pytest.raises(ValueError, match='keep_dtype must be "int8" or None'):
        uniref_fast.edit(pipe, [request], keep_references=2, keep_dtype="int4")
    (image,) = uniref_fast.edit(pipe, requests()[:1], keep_references=True, output_type="latent", progress=False)
    assert torch.isfinite(image).all(), "exact without references"


def test_patched_or_not_is_the_same(pipe):
    before = uniref_fast.edit(pipe, requests()[:2], output_type="latent", progress=False)
    uniref_fast.patch(pipe)
    after = uniref_fast.edit(pipe, requests()[:2], output_type="latent", progress=False)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_transparent_references_stand_on_white(pipe):
    cut_out = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    cut_out.paste("blue", (10, 10, 30, 30))
    white = Image.new("RGB", (40, 40), "white")
    white.paste("blue", (10, 10, 30, 30))
    fields = {"prompt": "x", "seed": 0, "num_inference_steps": 2}
    a, b = ({**fields, "images": [image]} for image in (cut_out, white))
    a, b = uniref_fast.edit(pipe, [a, b], output_type="pt", progress=False)
    assert torch.allclose(a, b, atol=1e-5)


def test_seeds_reproduce_and_differ(pipe):
    request = requests()[1]
    first, second = (uniref_fast.edit(pipe, [request], output_type="pt", progress=False)[0] for _ in range(2))
    assert torch.equal(first, second)
    other = EditRequest(request.prompt, request.images, seed=9, num_inference_steps=STEPS)
    assert not torch.equal(first, uniref_fast.edit(pipe, [other], output_type="pt", progress=False)[0])


def test_pil_results_and_mappings(pipe, capsys):
    pipe.set_progress_bar_config(disable=False)
    try:
        (image,) = uniref_fast.edit(
            pipe, [{"prompt": "x", "images": [picture("red", 20, 60)], "num_inference_steps": 2, "seed": 0}]
        )
    finally:
        pipe.set_progress_bar_config(disable=True)
    assert isinstance(image, Image.Image)
    assert image.height > image.width, "the last image's aspect ratio decides"
    assert "2/2" in capsys.readouterr().err, "a progress bar"


def test_budget_sizes_references_jointly(pipe, layouts):
    request = EditRequest("x", [picture("red", 400, 200), picture("blue", 300, 600)], num_inference_steps=2, seed=0)
    sizes = request_geometry(pipe, request, 96)
    assert sum(w * h for w, h in sizes.reference_sizes) <= 96 * 96
    out = uniref_fast.edit(pipe, [request], budget=96, output_type="latent", progress=False)[0]
    assert torch.isfinite(out).all()
    references = sum(s.length for s in layouts[0].segments if s.kind is Kind.REFERENCE)
    assert references == sum(w * h for w, h in sizes.reference_sizes) // 8**2


def test_visibility_reaches_the_model(pipe):
    full, causal = (
        uniref_fast.edit(pipe, requests()[1:2], output_type="latent", progress=False, visibility=visibility)[0]
        for visibility in ("full", "reference_causal")
    )
    assert max_relative_error(causal, full) > 1e-3


def test_generator_and_seed_draw_the_same_noise(pipe):
    request = requests()[1]
    seeded = uniref_fast.edit(pipe, [request], output_type="latent", progress=False)[0]
    fields = {"seed": None, "generator": torch.Generator().manual_seed(request.seed)}
    drawn = uniref_fast.edit(pipe, [dataclasses.replace(request, **fields)], output_type="latent", progress=False)[0]
    assert torch.equal(drawn, seeded)


def test_16_bit_grey_is_not_clipped(pipe):
    import numpy as np

    ramp = np.linspace(0, 65535, 40 * 40).reshape(40, 40)
    deep, flat = Image.fromarray(ramp.astype(np.uint16)), Image.fromarray((ramp / 256).astype(np.uint8))
    both = [{"prompt": "x", "seed": 0, "num_inference_steps": 2, "images": [image]} for image in (deep, flat)]
    a, b = uniref_fast.edit(pipe, both, output_type="pt", progress=False)
    assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    "request_, error, message",
    [
        ({"prompt": "  "}, ValueError, "request 1 has no prompt"),
        ({"images": []}, ValueError, "request 1 has no prompt"),
        ({"prompt": "x", "image": []}, ValueError, "unknown fields .'image'.*images"),
        ({"prompt": "x", "images": picture("red", 9, 9)}, TypeError, "must be a list"),
        ({"prompt": "x", "images": ["a.png"]}, TypeError, "image 1 must be a PIL image, got str"),
        ({"prompt": "x", "height": 8}, ValueError, "height must be at least 16"),
        ({"prompt": "x", "num_inference_steps": 0}, ValueError, "at least 1"),
        ({"prompt": "x", "num_inference_steps": 1}, ValueError, "use at least 2"),
        ({"prompt": "x", "seed": 1, "generator": torch.Generator()}, ValueError, "at most one of seed"),
        ({"prompt": "x", "images": [picture("red", 20000, 1)]}, ValueError, "too elongated"),
        ({"prompt": "x", "latents": torch.zeros(1, 5, 64), "num_inference_steps": 2}, ValueError, "latents have shape"),
        (5, TypeError, "must be an EditRequest"),
        ({"prompt": "x", "images": [Image.new("F", (9, 9))]}, ValueError, "mode 'F'"),
        ({"prompt": "x", "height": "64"}, TypeError, "height must be an int"),
        ({"prompt": "x", "width": 10**8}, ValueError, "at most 16384"),
        ({"prompt": "x", "negative_prompt": ["a"]}, TypeError, "negative_prompt must be a text"),
        ({"prompt": "x", "true_cfg_scale": float("nan")}, ValueError, "finite number"),
        ({"prompt": "x", "seed": 2**70}, ValueError, "64 bits"),
        ({"prompt": "x", "seed": "1"}, TypeError, "seed must be an int, or a list with one for each image, got '1'"),
        ({"prompt": "x", "true_cfg_scale": "4"}, TypeError, "request 1: true_cfg_scale must be a number, got '4'"),
        ({"prompt": "x", "num_images": None}, TypeError, "num_images must be an int, got None"),
        ({"prompt": "x", "generator": 5}, TypeError, "generator must be a torch.Generator, or a list .*, got 5"),
        ({"prompt": "x", "latents": [0.0]}, TypeError, "request 1: latents must be a tensor"),
        ({"prompt_embeds": torch.zeros(2, 128), "prompt_embeds_mask": [1, 1]}, TypeError, "prompt_embeds_mask must be"),
    ],
)
def test_bad_requests(pipe, request_, error, message):
    with pytest.raises(error, match=message):
        uniref_fast.edit(pipe, [request_], progress=False)


def test_sessions_and_engines_have_the_options_of_edit():
    """The names, defaults and annotations are equal."""
    options, session, engine = (dict(inspect.signature(each).parameters) for each in (
        uniref_fast.edit, EditSession, uniref_fast.Engine))  # fmt: skip
    of_one_call = {"requests", "pack_tokens", "output_type", "progress", "report", "errors"}
    assert session == {name: option for name, option in options.items() if name not in of_one_call}
    own, not_there = {"max_tokens", "max_waiting"}, {"model", "capture"}  # its packs change at any step
    assert {name: engine[name] for name in engine.keys() - own} == {n: session[n] for n in session.keys() - not_there}


def test_bad_options(pipe):
    for options, message in (({"output_type": "gif"}, "output_type"), ({"pack_tokens": 0}, "pack_tokens")):
        with pytest.raises(ValueError, match=message):
            uniref_fast.edit(pipe, requests(), **options)
    with pytest.raises(ValueError, match="the side of a square in pixels; for 1048576 pixels give 1024"):
        uniref_fast.edit(pipe, requests(), budget=1024**2)
    for options, message in (({"pack_tokens": "9"}, "pack_tokens must be a number"), ({"budget": "9"}, "budget must")):
        with pytest.raises(TypeError, match=message):
            uniref_fast.edit(pipe, requests(), **options)
    with pytest.raises(ValueError, match="no requests"):
        uniref_fast.edit(pipe, [])
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast"):
        uniref_fast.edit(pipe, requests())
    with pytest.raises(TypeError, match="not supported"):
        uniref_fast.edit(object(), requests())
    with pytest.raises(TypeError, match="take a QwenImageEditPlusPipeline"):
        uniref_fast.edit(pipe.transformer, requests())


@pytest.mark.parametrize("part", ["vae", "scheduler"])
def test_a_pipeline_without_a_part_is_refused_by_name(pipe, monkeypatch, part):
    monkeypatch.setattr(pipe, part, None)
    for run in (uniref_fast.edit, uniref_fast.estimate):
        with pytest.raises(ValueError, match=f"has no {part}; load the whole pipeline"):
            run(pipe, requests())


def test_hooks_that_would_be_skipped_are_refused(pipe):
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.05))
    try:
        with pytest.raises(ValueError, match="fbc_leader_block_hook"):
            uniref_fast.edit(pipe, requests()[:1])
    finally:
        pipe.transformer.disable_cache()
    uniref_fast.edit(pipe, [EditRequest("x", num_inference_steps=2)], progress=False)


@pytest.mark.parametrize("place", ["transformer", "block", "attention", "norm", "norm_out"])
def test_forward_hooks_are_refused(pipe, place):
    block = pipe.transformer.transformer_blocks[1]
    module = {"transformer": pipe.transformer, "block": block, "attention": block.attn,
              "norm": block.txt_norm1, "norm_out": pipe.transformer.norm_out}[place]  # fmt: skip
    handle = module.register_forward_hook(lambda module, args, out: None)
    try:
        with pytest.raises(ValueError, match="hook"):
            uniref_fast.edit(pipe, requests()[:1])
    finally:
        handle.remove()


def test_patched_with_another_visibility(pipe):
    """The hook of such a patch is ours."""
    plain = uniref_fast.edit(pipe, requests()[:1], visibility="reference_causal", output_type="latent")
    uniref_fast.patch(pipe, visibility="reference_causal")
    try:
        patched = uniref_fast.edit(pipe, requests()[:1], visibility="reference_causal", output_type="latent")
    finally:
        uniref_fast.unpatch(pipe)
    assert torch.equal(plain[0], patched[0])


def test_offloading_by_layer_and_own_processors_are_refused(pipe):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    attn = pipe.transformer.transformer_blocks[1].attn
    for module in (attn.norm_k, pipe.transformer.transformer_blocks[1]):
        add_hook_to_module(module, ModelHook())
        try:
            with pytest.raises(ValueError, match=r"transformer_blocks\.1.*hooks"):
                uniref_fast.edit(pipe, requests()[:1])
        finally:
            remove_hook_from_module(module)
    stock = attn.processor
    attn.set_processor(type("Own", (type(stock),), {})())
    try:
        with pytest.raises(ValueError, match="own processor Own"):
            uniref_fast.edit(pipe, requests()[:1])
    finally:
        attn.set_processor(stock)


def test_models_are_freed_afterwards(pipe, monkeypatch):
    freed = []
    monkeypatch.setattr(type(pipe), "maybe_free_model_hooks", lambda self: freed.append(self))
    uniref_fast.edit(pipe, [EditRequest("x", num_inference_steps=2)], progress=False)
    assert freed == [pipe]


def test_one_request_may_be_given_alone():
    assert len(validated(EditRequest("x"))) == 1 and len(validated({"prompt": "x"})) == 1


def test_values_that_are_not_given_are_those_of_the_call(pipe):
    """None stands for them; explicit values stay."""
    nothing, some = validated(
        [{"prompt": "x"}, {"prompt": "x", "num_inference_steps": 3, "true_cfg_scale": None}], pipe
    )
    assert (nothing.num_inference_steps, nothing.true_cfg_scale, nothing.negative_prompt) == (50, 4.0, None)
    assert (some.num_inference_steps, some.true_cfg_scale, some.guided) == (3, 4.0, False)
    every = (
        uniref_fast.estimate(pipe, [{"prompt": "x"}]),
        uniref_fast.estimate(pipe, [EditRequest("x", num_inference_steps=50)]),
    )
    assert every[0].as_dict() == every[1].as_dict()
    (unchanged,) = validated(EditRequest("x"))
    assert unchanged.num_inference_steps is None and not unchanged.guided


def test_model_offload_hook_is_honoured(pipe, monkeypatch):
    """accelerate's model offloading hooks the transformer's forward; the packed loop triggers it itself."""
    from accelerate.hooks import CpuOffload, ModelHook, add_hook_to_module, remove_hook_from_module

    calls = []
    monkeypatch.setattr(CpuOffload, "pre_forward", lambda self, module, *args, **kwargs: calls.append(module))
    for hook, message in (
        (CpuOffload("cpu"), None),
        (type("Own", (ModelHook,), {})(), "the transformer has hooks .Own"),
    ):
        add_hook_to_module(pipe.transformer, hook)
        try:
            with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
                uniref_fast.edit(pipe, [EditRequest("x", num_inference_steps=2, seed=0)], progress=False)
        finally:
            remove_hook_from_module(pipe.transformer)
    assert calls == [pipe.transformer] * 2, "one call for each step, as in the pipeline"


# ---- embeddings instead of prompts, and warnings ----


def embedded(pipe, request, **changes):
    """A request with the embeddings of its prompts."""
    sizes = request_geometry(pipe, request)
    images = [
        pipe.image_processor.resize(i, h, w) for i, (w, h) in zip(request.images, sizes.condition_sizes, strict=True)
    ]
    fields = {}
    for name in ("prompt", "negative_prompt"):
        if getattr(request, name) is not None:
            embeds, _ = pipe.encode_prompt(prompt=getattr(request, name), image=images or None, device="cpu")
            fields |= {f"{name}_embeds": embeds.detach(), name: None}
    return dataclasses.replace(request, **fields, **changes)


@pytest.mark.parametrize("mask", [None, "padding", "hole"])
def test_prompt_embeddings_equal_the_stock_run(pipe, mask):
    """The pipeline has no text encoder; rows that a mask switches off change nothing, wherever they are."""
    request = embedded(pipe, requests()[1])
    before = uniref_fast.edit(pipe, [requests()[1]], output_type="pt", progress=False)[0]
    if mask is not None:
        embeds, junk = request.prompt_embeds, torch.full((1, 3, 128), 7.0)
        parts = (embeds, junk) if mask == "padding" else (embeds[:, :4], junk, embeds[:, 4:])
        rows = torch.cat([torch.full(part.shape[:2], part is not junk) for part in parts], dim=1)
        request = dataclasses.replace(request, prompt_embeds=torch.cat(parts, dim=1), prompt_embeds_mask=rows)
    bare = SmallQwenImageEditPlusPipeline(**{**pipe.components, "text_encoder": None, "processor": None})
    bare.set_progress_bar_config(disable=True)
    made = uniref_fast.edit(bare, [request, requests_of_embeddings(pipe)], output_type="pt", progress=False)[0]
    fields = {
        name: getattr(request, name) for name in ("prompt_embeds", "prompt_embeds_mask", "negative_prompt_embeds")
    }
    stock = bare(image=list(request.images), true_cfg_scale=2.5, num_inference_steps=STEPS, output_type="pt", **fields,
                 generator=torch.Generator().manual_seed(request.seed)).images[0]  # fmt: skip
    assert max_relative_error(made, stock) < LOOP_ROUNDING
    assert (max_relative_error(made, before) < LOOP_ROUNDING) == (mask != "hole"), (
        "a hole moves the rotary positions behind it"
    )
    tokens = uniref_fast.estimate(bare, [request]).tokens["text"]
    rows = [request.prompt_embeds.shape[1] - (3 if mask == "padding" else 0), request.negative_prompt_embeds.shape[1]]
    assert tokens == sum(rows)


def requests_of_embeddings(pipe):
    """Another one for the same pack, given as `[L, C]`."""
    request = embedded(pipe, requests()[0])
    return dataclasses.replace(request, prompt_embeds=request.prompt_embeds[0])


@pytest.mark.parametrize(
    "fields, error, message",
    [
        ({"prompt": "x", "prompt_embeds": torch.zeros(1, 2, 128)}, ValueError, "prompt or prompt_embeds, not both"),
        ({"prompt_embeds": torch.zeros(1, 2, 64)}, ValueError, r"must be .L, 128. or .1, L, 128.*got .1, 2, 64"),
        ({"prompt_embeds": torch.zeros(2, 2, 128)}, ValueError, r"got .2, 2, 128"),
        ({"prompt_embeds": [1.0]}, TypeError, "must be a tensor, got list"),
        ({"prompt": "x", "prompt_embeds_mask": torch.ones(1, 2)}, ValueError, "given without prompt_embeds"),
        ({"prompt_embeds": torch.zeros(2, 128), "prompt_embeds_mask": torch.ones(3)}, ValueError, r"mask must be .2."),
        ({"prompt_embeds": torch.zeros(2, 128), "prompt_embeds_mask": torch.zeros(2)}, ValueError, "one valid row"),
        ({"prompt": "x"}, ValueError, "request 1: the pipeline has no text encoder; give prompt_embeds"),
        ({"prompt_embeds": torch.zeros(2, 128), "negative_prompt": " "}, ValueError, "has no text encoder"),
    ],
)
def test_bad_embeddings(pipe, fields, error, message):
    bare = SmallQwenImageEditPlusPipeline(**{**pipe.components, "text_encoder": None})
    with pytest.raises(error, match=message):
        uniref_fast.edit(bare, [{"num_inference_steps": 2, **fields}], progress=False)


@pytest.mark.parametrize(
    "fields, warning",
    [
        ({"true_cfg_scale": 2.0}, "request 2: true_cfg_scale=2.0 has no effect without a negative prompt"),
        ({"true_cfg_scale": 1.0, "negative_prompt": " "}, "request 2: the negative prompt has no effect at true"),
        ({"true_cfg_scale": 2.0, "negative_prompt": " "}, None),
        ({"true_cfg_scale": 1.0}, None),
    ],
)  # fmt: skip
def test_guidance_that_is_off_is_said_where_stock_says_so(pipe, fields, warning):
    silent, request = {"prompt": "x", "num_inference_steps": 2, "true_cfg_scale": 1.0}, {"prompt": "x", **fields}
    with pytest.warns(UserWarning, match=warning) if warning else warnings.catch_warnings():
        if warning is None:
            warnings.simplefilter("error")
        uniref_fast.edit(pipe, [silent, {"num_inference_steps": 2, **request}], progress=False)


# ---- schedulers: those that take `sigmas` and `mu`, which is what the stock pipeline gives ----

EULER = FlowMatchEulerDiscreteScheduler
SCHEDULERS = {
    "stochastic": lambda config: EULER.from_config(config, stochastic_sampling=True),
    "karras": lambda config: EULER.from_config(config, use_karras_sigmas=True),
    "exponential": lambda config: EULER.from_config(config, use_dynamic_shifting=False, use_exponential_sigmas=True),
    "inverted": lambda config: EULER.from_config(config, invert_sigmas=True),
    "lcm": lambda config: FlowMatchLCMScheduler.from_config(
        {name: value for name, value in config.items() if name != "stochastic_sampling"}),
    "unipc": lambda config: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    "unipc, third order": lambda config: UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=3, flow_shift=3.0),
    "another shift": lambda config: shifted(EULER.from_config(config, use_dynamic_shifting=False)),
}  # fmt: skip


def shifted(scheduler):
    """State that the configuration does not hold."""
    scheduler.set_shift(7.0)
    return scheduler


@pytest.fixture
def with_scheduler(pipe):
    before = pipe.scheduler

    def change(name):
        pipe.scheduler = SCHEDULERS[name](before.config)
        return pipe

    yield change
    pipe.scheduler = before


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_equals_the_stock_run(with_scheduler, name):
    """A request has the same result in a pack with others, with the global generator, and after an earlier run."""
    pipe = with_scheduler(name)
    request = dataclasses.replace(requests()[1], num_inference_steps=4)
    unseeded = dataclasses.replace(request, seed=None)
    torch.manual_seed(5)
    drawn = uniref_fast.edit(pipe, [unseeded], output_type="pt", progress=False)[0]
    before = pipe.scheduler.__dict__.copy()
    first, _, again = uniref_fast.edit(
        pipe, [request, requests()[3], request], output_type="pt", progress=False, pack_tokens=500
    )
    assert pipe.scheduler.__dict__ == before, "the pipeline's scheduler is left as it is"
    assert max_relative_error(again, first) < LOOP_ROUNDING  # float32 sums go by the place in a pack
    torch.manual_seed(5)
    fields = {"image": list(request.images), "prompt": request.prompt, "negative_prompt": " ", "true_cfg_scale": 2.5,
              "num_inference_steps": 4, "output_type": "pt"}  # fmt: skip
    assert max_relative_error(drawn, pipe(**fields).images[0]) < LOOP_ROUNDING
    generator, step = torch.Generator().manual_seed(request.seed), pipe.scheduler.step
    if "generator" in inspect.signature(step).parameters:  # which stock does not pass on
        pipe.scheduler.step = functools.partial(step, generator=generator)
    assert max_relative_error(first, pipe(**fields, generator=generator).images[0]) < LOOP_ROUNDING
    vars(pipe.scheduler).pop("step", None)
    after = uniref_fast.edit(pipe, [request], output_type="pt", progress=False)[0]
    assert max_relative_error(after, first) < LOOP_ROUNDING, "a stock run leaves its state in the scheduler"


def test_given_latents_and_a_seed_for_the_noise_of_the_steps(with_scheduler):
    pipe = with_scheduler("stochastic")
    request = dataclasses.replace(
        requests()[1], latents=torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0))
    )
    one, same, other = uniref_fast.edit(
        pipe, [request, request, dataclasses.replace(request, seed=3)], output_type="latent", progress=False
    )
    assert max_relative_error(same, one) < LOOP_ROUNDING and max_relative_error(other, one) > 1e-2


def test_schedulers_that_stock_refuses_are_refused_before_any_work(pipe, monkeypatch):
    monkeypatch.setattr(pipe, "encode_prompt", None)
    before, pipe.scheduler = pipe.scheduler, FlowMatchHeunDiscreteScheduler()
    try:
        with pytest.raises(ValueError, match="does not support custom"):
            uniref_fast.edit(pipe, requests()[:1], progress=False)
    finally:
        pipe.scheduler = before


# ---- changed models: followed, or refused by name ----


def test_the_list_of_replaced_modules_is_what_a_packed_forward_does(pipe):
    """Modules that a packed forward calls, as PyTorch sees them, against the list that is checked before it."""
    transformer, called = pipe.transformer, set()
    expected = set()
    for part in REPLACED:
        for name in [part.path.replace("*", str(i)) for i in range(len(transformer.transformer_blocks))]:
            module = transformer.get_submodule(name)
            for attribute in part.reads:
                assert hasattr(module, attribute), (name, attribute)
            for child in part.calls:
                held = module.get_submodule(child)
                expected |= {id(m) for m in held.modules() if not isinstance(m, torch.nn.ModuleList)}
    last = transformer.transformer_blocks[-1]  # whose text output nothing uses
    spared = {id(m) for part in (last.attn.to_add_out, last.txt_mlp) for m in part.modules()}
    handle = torch.nn.modules.module.register_module_forward_pre_hook(lambda module, args: called.add(id(module)))
    layout = SelfLayout.qwen([Sample(3, (1, 2, 2))], zero_cond_t=True)
    try:
        with torch.no_grad():
            packed = uniref_fast.PackedQwenImage(transformer)
            packed(torch.zeros(4, 64), torch.zeros(3, 128), torch.ones(1), layout)
    finally:
        handle.remove()
    ours = {id(m) for m in packed.modules()} - {id(m) for m in transformer.modules()}
    names = {id(m): name for name, m in transformer.named_modules()}
    assert {names[i] for i in called - ours} == {names[i] for i in expected - spared}


@contextlib.contextmanager
def attribute(owner, name, value):
    """Set for the block, and afterwards as if it had never been set."""
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if before is missing else setattr(owner, name, before)


@contextlib.contextmanager
def submodule(model, name, module):
    before = model.get_submodule(name)
    model.set_submodule(name, module)
    try:
        yield
    finally:
        model.set_submodule(name, before)


@contextlib.contextmanager
def removed(handle):
    try:
        yield
    finally:
        handle.remove()


class OwnHook(diffusers_hooks.ModelHook):
    """A hook of the kind that caches and guiders are made of."""


@contextlib.contextmanager
def hooked(module, hook=None, name="own_hook"):
    registry = diffusers_hooks.HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(hook or OwnHook(), name)
    try:
        yield
    finally:
        registry.remove_hook(name)


def own_forward(module):
    """A forward bound to the instance that does what the class's does, as caches and adapters set it."""
    original = type(module).forward
    return attribute(module, "forward", types.MethodType(lambda self, *args, **kw: original(self, *args, **kw), module))


def wrapped(owner, name):
    """A method of a class, wrapped as a decorator would."""
    original = getattr(owner, name)
    return attribute(owner, name, functools.wraps(original)(lambda *args, **kwargs: original(*args, **kwargs)))


class OwnMode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class OwnDispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class SubclassedPipeline(SmallQwenImageEditPlusPipeline):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


def rescaled(transformer):
    """Rotary embedding with an NTK-scaled base."""
    config = transformer.config
    return qwen.QwenEmbedRope(theta=40000, axes_dim=list(config.axes_dims_rope), scale_rope=True)


BLOCK = qwen.QwenImageTransformerBlock
GLOBAL_HOOK = torch.nn.modules.module.register_module_forward_hook
CHANGES = {
    "transformer.forward": (lambda t: own_forward(t), "the transformer.forward was replaced"),
    "class of transformer": (lambda t: wrapped(type(t), "forward"), "the transformer.forward was replaced"),
    "hook on transformer": (lambda t: hooked(t), "the transformer has hooks .own_hook"),
    "pos_embed.forward": (lambda t: own_forward(t.pos_embed), "pos_embed.forward was replaced"),
    "pos_embed hook": (lambda t: hooked(t.pos_embed), "pos_embed has hooks .own_hook"),
    "pos_embed forward hook": (
        lambda t: removed(t.pos_embed.register_forward_hook(lambda *args: None)), "pos_embed has hooks .forward hook"),
    "pos_embed theta": (lambda t: submodule(t, "pos_embed", rescaled(t)), "pos_embed has other frequencies"),
    "pos_embed tables": (
        lambda t: attribute(t.pos_embed, "pos_freqs", t.pos_embed.pos_freqs**2), "pos_embed has other frequencies"),
    "pos_embed scheme": (lambda t: attribute(t.pos_embed, "scale_rope", False), "pos_embed has other frequencies"),
    "pos_embed class": (
        lambda t: submodule(t, "pos_embed", type("Own", (type(t.pos_embed),), {})(1e4, [8, 28, 28], True)),
        "pos_embed is a Own"),
    "block.forward": (lambda t: own_forward(t.transformer_blocks[1]), r"transformer_blocks.1.forward was replaced"),
    "class of block": (lambda t: wrapped(BLOCK, "forward"), r"transformer_blocks.0.forward was replaced"),
    "modulation": (lambda t: wrapped(BLOCK, "_modulate"), r"transformer_blocks.0._modulate was replaced"),
    "attn.forward": (lambda t: own_forward(t.transformer_blocks[1].attn), r"blocks.1.attn.forward was replaced"),
    "attn hook": (lambda t: hooked(t.transformer_blocks[1].attn), r"blocks.1.attn has hooks .own_hook"),
    "norm.forward": (lambda t: own_forward(t.transformer_blocks[1].txt_norm2), r"1.txt_norm2.forward was replaced"),
    "class of norm": (lambda t: wrapped(torch.nn.LayerNorm, "forward"), r"torch.nn.LayerNorm.forward was replaced"),
    "qk norm.forward": (lambda t: own_forward(t.transformer_blocks[1].attn.norm_k), r"1.attn.norm_k.forward was repl"),
    "swapped qk norm": (
        lambda t: submodule(t, "transformer_blocks.1.attn.norm_q", torch.nn.LayerNorm(64)),
        r"1.attn.norm_q is a LayerNorm, not a RMSNorm"),
    "swapped norm": (
        lambda t: submodule(t, "transformer_blocks.1.img_norm1", torch.nn.LayerNorm(256)), "1.img_norm1 has a weight"),
    "eps of a qk norm": (
        lambda t: attribute(t.transformer_blocks[1].attn.norm_q, "eps", 1e-2), "1.attn: the QK norms have diff"),
    "class of processor": (
        lambda t: wrapped(qwen.QwenDoubleStreamAttnProcessor2_0, "__call__"), "Processor2_0.__call__ was replaced"),
    "norm_out.forward": (lambda t: own_forward(t.norm_out), "norm_out.forward was replaced"),
    "zero_cond_t": (lambda t: attribute(t, "zero_cond_t", False), "the transformer has zero_cond_t=False"),
    "forward hook on a Linear": (
        lambda t: removed(t.transformer_blocks[1].attn.to_q.register_forward_hook(lambda *args: None)),
        r"transformer_blocks.1.attn.to_q has hooks .forward hook .*all samples as one"),
    "skipped feed-forward": (lambda t: hooked(t.transformer_blocks[1].img_mlp), r"1.img_mlp has hooks .own_hook"),
    "global hook": (lambda t: removed(GLOBAL_HOOK(lambda *args: None)), "global module hook forward hook"),
    "function mode": (lambda t: OwnMode(), "mode OwnMode is active"),
    "dispatch mode": (lambda t: OwnDispatchMode(), "mode OwnDispatchMode is active"),
    "attention function": (
        lambda t: attribute(F, "scaled_dot_product_attention", lambda *args, **kwargs: None),
        "torch.nn.functional.scaled_dot_product_attention was replaced"),
    "layer norm": (lambda t: wrapped(torch.nn.functional, "layer_norm"), "functional.layer_norm was replaced"),
    "dispatcher": (lambda t: wrapped(qwen, "dispatch_attention_fn"), "dispatch_attention_fn was replaced"),
    "attention backend": (
        lambda t: attribute(t.transformer_blocks[0].attn.processor, "_attention_backend", AttentionBackendName.FLEX),
        "backend 'flex'.*reset_attention_backend"),
    "active backend": (lambda t: attention_backend("flex"), "backend 'flex' is active"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changed_models_are_refused_by_name(pipe, change):
    make, message = CHANGES[change]
    with make(pipe.transformer), pytest.raises(ValueError, match=message):
        uniref_fast.edit(pipe, requests()[:1], progress=False)


@pytest.mark.parametrize("change", ["block.forward", "swapped norm", "swapped qk norm", "class of processor"])
def test_changed_models_are_refused_below_a_patch(pipe, change):
    make, message = CHANGES[change]
    with make(pipe.transformer):
        uniref_fast.patch(pipe)
        try:
            with pytest.raises(ValueError, match=message):
                uniref_fast.edit(pipe, requests()[:1], progress=False)
        finally:
            uniref_fast.unpatch(pipe)
    uniref_fast.edit(pipe, [EditRequest("x", num_inference_steps=2)], progress=False)


def test_another_call_of_the_pipeline_is_refused(pipe):
    with pytest.raises(ValueError, match=r"SubclassedPipeline.__call__ is not diffusers' own"):
        uniref_fast.edit(SubclassedPipeline(**pipe.components), requests()[:1])
    with wrapped(QwenImageEditPlusPipeline, "__call__"):
        plain = QwenImageEditPlusPipeline(**pipe.components)
        with pytest.raises(ValueError, match=r"QwenImageEditPlusPipeline.__call__ is not"):
            uniref_fast.edit(plain, requests()[:1])


def pruned(transformer):
    linear = transformer.transformer_blocks[1].attn.to_q
    prune.random_unstructured(linear, "weight", 0.3)
    return lambda: prune.remove(linear, "weight")


def cast(transformer):
    transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    return lambda: None


FOLLOWED = {
    "pruning": pruned,
    "layerwise casting": cast,
    "eps of norms": lambda t: (
        setattr(t.transformer_blocks[1].txt_norm1, "eps", 0.1), setattr(t.transformer_blocks[1].txt_norm2, "eps", 0.2)),
    "longer rotary tables": lambda t: setattr(
        t.pos_embed, "pos_freqs", torch.cat([t.pos_embed.pos_freqs, t.pos_embed.pos_freqs])),
    "a Linear's forward": lambda t: setattr(
        t.proj_out, "forward", lambda x, linear=t.proj_out: 0.5 * F.linear(x, linear.weight, linear.bias)),
    "a compiled forward": lambda t: setattr(t, "forward", torch.compile(t.forward, backend="eager")),
    "a backend of PyTorch": lambda t: t.set_attention_backend("native"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("change", FOLLOWED)
def test_changes_of_what_is_called_or_read_are_followed(pipe, change):
    copy = SmallQwenImageEditPlusPipeline(**{**pipe.components, "transformer": deepcopy(pipe.transformer)})
    copy.set_progress_bar_config(disable=True)
    before = uniref_fast.edit(copy, requests()[1:2], output_type="pt", progress=False)[0]
    FOLLOWED[change](copy.transformer)
    after = uniref_fast.edit(copy, requests()[1:2], output_type="pt", progress=False)[0]
    assert max_relative_error(after, stock_image(copy, requests()[1])) < LOOP_ROUNDING
    if change not in ("longer rotary tables", "a compiled forward", "a backend of PyTorch"):
        assert max_relative_error(after, before) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["encode_prompt", "prepare_latents", "_encode_vae_image", "vae.encode", "vae.decode"]
)
def test_replaced_methods_of_the_pipeline_are_followed(pipe, method):
    """Each result is scaled, so that a method which is not called shows."""
    owner, name = (pipe.vae, method[4:]) if method.startswith("vae.") else (pipe, method)
    original = getattr(owner, name)

    def changed(*args, **kwargs):
        out = original(*args, **kwargs)
        if method == "vae.encode":
            out.latent_dist.mean = out.latent_dist.mean * 0.7
            return out
        if isinstance(out, tuple):
            return tuple(None if part is None else part * 0.7 + 0.1 for part in out)
        return out * 0.7

    before = uniref_fast.edit(pipe, requests()[1:2], output_type="pt", progress=False)[0]
    with attribute(owner, name, changed):
        after = uniref_fast.edit(pipe, requests()[1:2], output_type="pt", progress=False)[0]
        assert max_relative_error(after, stock_image(pipe, requests()[1])) < LOOP_ROUNDING
    assert max_relative_error(after, before) > 1e-3
