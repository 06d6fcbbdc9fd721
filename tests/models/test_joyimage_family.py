"""edit and estimate of JoyImage-Edit-Plus against the pipeline of diffusers."""

import copy
import dataclasses

import joyimage
import numpy as np
import pytest
import torch
from diffusers.pipelines.joyimage.image_processor import BUCKETS, JoyImageEditImageProcessor
from PIL import Image

import uniref_fast
from uniref_fast import EditRequest, Engine, edit, estimate
from uniref_fast.encode import encoded_prompt
from uniref_fast.models import joyimage_family
from uniref_fast.models.families import family_of, find_transformer
from uniref_fast.random_models import joyimage as random_models
from uniref_fast.request import geometry, request_geometry
from uniref_fast.testing import max_relative_error

RELATIVE = 2e-5
"""Largest relative error, in float32, of the latents after the steps of an edit."""


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


WIDE, TALL, SQUARE = picture(80, 40, 1), picture(40, 90, 2), picture(64, 64, 3)
REQUESTS = [
    EditRequest("a cup", seed=1, height=32, width=64, num_inference_steps=2, true_cfg_scale=1.0),
    EditRequest("make it night", [WIDE], seed=2, num_inference_steps=3, true_cfg_scale=3.0),
    EditRequest("put the cup on the table", [TALL, SQUARE], seed=3, num_inference_steps=2, true_cfg_scale=1.0),
    EditRequest("x", [SQUARE, WIDE, TALL], "ugly", true_cfg_scale=2.0, seed=4, height=96, width=32,
                num_inference_steps=2),
    EditRequest("another cup", seed=5, height=48, width=48, num_inference_steps=2, true_cfg_scale=4.0),
    EditRequest("all", [WIDE, TALL, SQUARE, WIDE, TALL, SQUARE], seed=6, num_inference_steps=2, true_cfg_scale=4.0),
]  # fmt: skip
ONE = REQUESTS[1]


@pytest.fixture(scope="module")
def pipe():
    return joyimage.pipeline()


def stock(pipe, request, **options):
    """Return the latents of diffusers' own pipeline as tokens, `[1, n, 64]`, or its image."""
    given = {"images": [*request.images] or None, "prompt": request.prompt, "output_type": "latent"} | options
    result = pipe(
        height=request.height, width=request.width, num_inference_steps=request.num_inference_steps,
        negative_prompt=request.negative_prompt, guidance_scale=request.true_cfg_scale,
        generator=torch.Generator().manual_seed(request.seed), **given,
    ).images  # fmt: skip
    if given["output_type"] != "latent":
        return result[0]
    return result[:, : request_geometry(pipe, request).target_tokens].flatten(2)


def edited(pipe, requests, **options):
    return edit(pipe, requests, **{"output_type": "latent", "progress": False} | options)


def test_a_batch_of_the_pipeline_equals_a_pack(pipe):
    """The pipeline pads the samples of its batch, and masks the padding."""
    one, other = (dataclasses.replace(REQUESTS[i], height=64, width=64, num_inference_steps=2, true_cfg_scale=3.0)
                  for i in (1, 2))  # fmt: skip
    expected = pipe(
        images=[[*one.images], [*other.images]], prompt=[one.prompt, other.prompt], height=64, width=64,
        num_inference_steps=2, guidance_scale=3.0, output_type="latent",
        generator=[torch.Generator().manual_seed(each.seed) for each in (one, other)],
    ).images  # fmt: skip
    for result, wanted in zip(edited(pipe, [one, other]), expected, strict=True):
        assert max_relative_error(result[0], wanted[:16].flatten(1)) < RELATIVE


def test_images_of_the_pipeline(pipe):
    for form in ("pt", "pil"):
        for request, result in zip(REQUESTS[:2], edited(pipe, REQUESTS[:2], output_type=form), strict=True):
            expected = stock(pipe, request, output_type=form)
            if form == "pt":
                assert max_relative_error(result, expected) < RELATIVE
            else:
                assert np.abs(np.asarray(result, int) - np.asarray(expected, int)).max() <= 1


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="bfloat16 products without instructions for them")
def test_an_engine_gives_the_same_bits():
    pipe = joyimage.pipeline(torch.bfloat16)
    expected = [np.asarray(image) for image in edited(pipe, REQUESTS[1:4], output_type="pil")]
    with Engine(pipe) as engine:
        futures = [engine.submit(request) for request in REQUESTS[1:4]]
        assert all(np.array_equal(f.result(), image) for f, image in zip(futures, expected, strict=True))


def test_latents_in_bfloat16_are_those_of_the_pipeline():
    """References have the same bits, also with a VAE in float32: the pipeline rounds pixels to the other dtype."""
    pipe = joyimage.pipeline(torch.bfloat16)
    pipe.vae.float()
    request = dataclasses.replace(ONE, images=[WIDE, TALL], height=64, width=64)
    sizes = request_geometry(pipe, request)
    images = [family_of(pipe).convert_image(image) for image in request.images]
    arguments = pipe, request, sizes, images, torch.bfloat16, torch.Generator().manual_seed(3)
    ours = family_of(pipe).starting_latents(*arguments, True)
    theirs = family_of(pipe).starting_latents(*arguments[:-1], torch.Generator().manual_seed(3), False)
    assert all(map(torch.equal, ours, theirs)) and ours[1].shape == (2 * 15, 64)


@pytest.mark.parametrize("negative", [None, " ", ""])
def test_negative_prompts(pipe, negative):
    """The pipeline has guidance with a scale above 1, with a space as negative prompt unless there is another."""
    request = dataclasses.replace(ONE, negative_prompt=negative)
    (result,) = edited(pipe, [request])
    assert max_relative_error(result, stock(pipe, request)) < RELATIVE
    (other,) = edited(pipe, [dataclasses.replace(ONE, negative_prompt="green")])
    assert max_relative_error(other, result) > 100 * RELATIVE


def test_adapters_of_peft_are_named_in_the_error(pipe):
    """diffusers loads no adapters into this transformer; those of peft's own function work."""
    with pytest.raises(ValueError, match="inject_adapter_in_model"):
        edit(pipe, [dataclasses.replace(ONE, lora={"a": 0.8})])


def test_sizes_of_the_pipeline():
    """Those of its list, for references of any size; a side that a request gives is used."""
    pipe = joyimage.pipeline()
    pipe.image_processor = JoyImageEditImageProcessor(vae_scale_factor=8)
    sizes = geometry(pipe, [(4000, 2000), (100, 300)])
    assert sizes.reference_sizes == sizes.condition_sizes == ((1408, 704), (576, 1728))
    assert sizes.size == (576, 1728) and sizes.patch == 16
    assert geometry(pipe, []).size == (1024, 1024) and geometry(pipe, [(100, 300)], width=330).size == (320, 1728)


def test_small_pipelines_leave_the_sizes_of_others_alone():
    before = copy.deepcopy(BUCKETS)
    small = random_models.pipeline(layers=1, grid=64)
    assert geometry(small, [(4000, 2000), (100, 300)]).reference_sizes == ((1536, 512), (1008, 1040))
    assert before == BUCKETS and random_models.listed_sizes(1) == [(16, 16)]


def test_a_joint_budget_resizes_references(pipe):
    request = REQUESTS[3]
    sizes = request_geometry(pipe, request, 64)
    assert sum(w * h for w, h in sizes.reference_sizes) <= 64 * 64
    assert any((h, w) not in joyimage.SIZES for w, h in sizes.reference_sizes)
    (result,) = edited(pipe, [request], budget=64)
    assert result.isfinite().all()


def test_given_latents(pipe):
    noise = torch.randn(1, 3 * 5, 64, generator=torch.Generator().manual_seed(0))
    (result,) = edited(pipe, [dataclasses.replace(ONE, latents=noise)])
    pixels = noise.view(1, 3, 5, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(1, 16, 1, 6, 10)
    assert max_relative_error(result, stock(pipe, ONE, latents=pixels)) < RELATIVE


def test_embeddings_replace_prompts(pipe):
    """The pipeline has arguments for them and raises an error; masked rows are not seen."""
    images, sizes = [WIDE], request_geometry(pipe, ONE).condition_sizes
    embeds, negative = (encoded_prompt(pipe, text, images, sizes)[0] for text in (ONE.prompt, " "))
    request = dataclasses.replace(ONE, prompt=None, prompt_embeds=embeds, negative_prompt_embeds=negative)
    with pytest.raises(TypeError):
        pipe(images=images, prompt_embeds=embeds[None], negative_prompt_embeds=negative[None])
    (expected,) = edited(pipe, [ONE])
    assert torch.equal(edited(pipe, [request])[0], expected)
    mask = torch.ones(len(embeds) + 3)
    mask[5:8] = 0
    padded = torch.cat([embeds[:5], torch.randn(3, 48), embeds[5:]])
    (masked,) = edited(pipe, [dataclasses.replace(request, prompt_embeds=padded, prompt_embeds_mask=mask)])
    assert max_relative_error(masked, expected) < RELATIVE


def test_text_without_running_the_encoder(pipe, monkeypatch):
    for limit in (4096, 40):  # the pipeline drops the first tokens of a longer text
        monkeypatch.setattr(joyimage_family, "TEXT_LENGTH", limit)
        for request in REQUESTS[:4]:
            sizes = request_geometry(pipe, request).condition_sizes
            embeds, text = encoded_prompt(pipe, request.prompt, request.images, sizes)
            assert text == len(embeds) == family_of(pipe).prompt_text(pipe, request.prompt, sizes)
    (result,) = edited(pipe, REQUESTS[2:3])
    assert max_relative_error(result, stock(pipe, REQUESTS[2], max_sequence_length=40)) < RELATIVE


def test_schedulers(pipe):
    """One whose timesteps do not depend on the size of the result, and that takes no shift of them."""
    from diffusers import FlowMatchHeunDiscreteScheduler

    before = pipe.scheduler
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=4.0)
    try:
        request = dataclasses.replace(ONE, true_cfg_scale=1.0)
        (result,) = edited(pipe, [request])
        assert max_relative_error(result, stock(pipe, request)) < RELATIVE
    finally:
        pipe.scheduler = before


def test_a_method_of_the_user(pipe):
    """A replaced method for latents is called as the pipeline calls it."""
    seen, own = [], pipe.prepare_latents

    def prepare(*args, **options):
        seen.append(args)
        return own(*args, **options)

    pipe.prepare_latents = prepare
    try:
        (result,) = edited(pipe, [ONE])
    finally:
        del pipe.prepare_latents
    assert len(seen) == 1 and max_relative_error(result, stock(pipe, ONE)) < RELATIVE


def test_keep_references_by_a_schedule(pipe):
    report = uniref_fast.EditReport()
    request = dataclasses.replace(ONE, num_inference_steps=5)
    edited(pipe, [request], keep_references=2, report=report)
    assert {each.refreshed for each in report.references} == {(0, 2, 4)}


@pytest.mark.parametrize("visibility", ["full", "reference_causal"])
def test_estimate(pipe, visibility):
    """Operations of Linears equal those that PyTorch counts in the packed forward."""
    from torch.utils.flop_counter import FlopCounterMode

    request = dataclasses.replace(REQUESTS[3], true_cfg_scale=1.0, negative_prompt=None)
    found = estimate(pipe, [request], visibility=visibility)
    assert found.tokens["target"] == 12 and found.tokens["reference"] == 16 + 15 + 15
    family, transformer = family_of(pipe), find_transformer(pipe)
    model = family.packed(transformer, impl="dense", visibility=visibility)
    layout = model.layout([request_geometry(pipe, request).sample(found.tokens["text"])])
    streams = torch.zeros(layout.image_length, 64), torch.zeros(layout.text_length, 48)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*streams, torch.ones(1), layout)
    linear, attention = family.transformer_flops(transformer.config, layout, visibility)
    assert linear == counter.get_total_flops()
    if visibility == "full":
        assert attention == 4 * 256 * layout.joint_length * (2 * layout.joint_length + 12)
    assert all(stage.flops > 0 and stage.activation_bytes > 0 for stage in found.stages)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": [1, 1, 1]}, r"patch_size = \[1, 1, 1\], which is not supported \(it must be \[1, 2, 2\]\)"),
        ({"rope_dim_list": [16, 56, 40]}, "three numbers that add up to the width of a head, 128"),
        ({"text_dim": 96}, "text_dim = 96, but its text encoder gives 48"),
        ({"in_channels": 48}, "in_channels = 48, but its VAE gives 16"),
    ],
)
def test_models_that_cannot_run(pipe, changes, message):
    before = {name: pipe.transformer.config[name] for name in changes}
    pipe.transformer.register_to_config(**changes)
    try:
        for call in (edit, estimate):
            with pytest.raises(ValueError, match=message):
                call(pipe, [ONE])
    finally:
        pipe.transformer.register_to_config(**before)


def test_the_pipeline_of_one_image_is_refused_with_the_nearest_class():
    from diffusers import JoyImageEditPipeline

    with pytest.raises(TypeError, match="nearest class that is supported is JoyImageEditPlusPipeline"):
        edit(object.__new__(JoyImageEditPipeline), [ONE])
