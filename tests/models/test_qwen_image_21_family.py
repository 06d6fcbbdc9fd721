"""edit() and estimate() of Qwen-Image-2.1 against the pipeline of diffusers, request by request."""

import numpy as np
import pytest
import torch
from patching import ROUNDING
from PIL import Image
from qwen_image_21 import pipeline

import uniref_fast
from uniref_fast import EditRequest
from uniref_fast.encode import encoded_prompt
from uniref_fast.models.families import family_of
from uniref_fast.models.qwen_image_21_family import _text_of
from uniref_fast.request import geometry
from uniref_fast.testing import max_relative_error


def picture(width, height, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


WIDE, TALL, CLEAR = picture(80, 40, seed=1), picture(40, 90, seed=2), picture(64, 64, "RGBA", seed=3)
REQUESTS = [
    EditRequest("a cup", seed=1, height=32, width=64, num_inference_steps=2),
    EditRequest("make it night", [WIDE], seed=2, num_inference_steps=3),
    EditRequest("put the cup of picture 1 on picture 2", [TALL, CLEAR], seed=3, num_inference_steps=2),
    EditRequest("x", [CLEAR, WIDE, TALL], negative_prompt=" ", true_cfg_scale=3.0, seed=4, height=96, width=32,
                num_inference_steps=2),
    EditRequest("make it day, please", [TALL], negative_prompt="ugly", true_cfg_scale=2.0, seed=5,
                num_inference_steps=2),
    EditRequest("all", [WIDE, TALL, CLEAR, WIDE, TALL, CLEAR], seed=6, num_inference_steps=2),
]  # fmt: skip


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


def stock(pipe, request, **options):
    """Return the result of the pipeline of diffusers for one request."""
    with torch.no_grad():
        return pipe(
            prompt=request.prompt, image=[*request.images] or None, negative_prompt=request.negative_prompt,
            true_cfg_scale=request.true_cfg_scale or 1.0, height=request.height, width=request.width,
            num_inference_steps=request.num_inference_steps, generator=torch.Generator().manual_seed(request.seed),
            output_resolution=64, **{"output_type": "latent", "use_kv_cache": False, **options},
        ).images[0]  # fmt: skip


def edit(pipe, requests, **options):
    return uniref_fast.edit(pipe, requests, **{"output_type": "latent", "progress": False, **options})


pytestmark = pytest.mark.filterwarnings("ignore:request .*guidance is off")


@pytest.mark.parametrize("keep_references", [False, 1])
def test_six_unlike_requests_equal_the_pipeline_one_by_one(pipe, keep_references):
    """Numbers and sizes of references, sizes of results, numbers of steps and guidance differ."""
    results = edit(pipe, REQUESTS, keep_references=keep_references)
    for request, result in zip(REQUESTS, results, strict=True):
        assert max_relative_error(result[0], stock(pipe, request)) < ROUNDING, request.prompt


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="bfloat16 products without instructions for them")
def test_kept_references_have_the_same_bits_in_bfloat16():
    pipe = pipeline(torch.bfloat16)
    together = edit(pipe, REQUESTS[1:4])
    every_step = edit(pipe, REQUESTS[1:4], keep_references=1)
    assert all(torch.equal(*pair) for pair in zip(every_step, together, strict=True))


def test_references_are_computed_once_as_in_the_pipeline(pipe):
    """A model without causal_condition cannot keep them exactly, and computes them in every step."""
    report = uniref_fast.EditReport()
    edit(pipe, REQUESTS[1:2], report=report)
    (references,) = report.references
    assert references.refreshed == (0,) and references.steps == 3
    pipe.transformer.register_to_config(causal_condition=False)
    try:
        assert uniref_fast.estimate(pipe, REQUESTS[1:2]).computed_references == (3,)
        (result,) = edit(pipe, REQUESTS[1:2])
        assert max_relative_error(result[0], stock(pipe, REQUESTS[1])) < ROUNDING
    finally:
        pipe.transformer.register_to_config(causal_condition=True)


def test_decoded_results_equal_the_pipeline(pipe):
    for request in REQUESTS[:2]:
        (result,) = edit(pipe, [request], output_type="pil")
        expected = stock(pipe, request, output_type="pil")
        assert result.size == expected.size and result.mode == expected.mode == "RGBA"
        assert np.abs(np.asarray(result, int) - np.asarray(expected, int)).max() <= 1


def test_transparent_references_are_white_for_the_text_encoder_and_keep_alpha_for_the_vae(pipe, monkeypatch):
    seen = []
    processor, encode = type(pipe.processor).__call__, pipe.vae.encode

    def watched(self, images=None, **options):
        seen.append([np.asarray(image) for image in images])
        return processor(self, images=images, **options)

    monkeypatch.setattr(type(pipe.processor), "__call__", watched)
    monkeypatch.setattr(pipe.vae, "encode", lambda pixels: seen.append(pixels) or encode(pixels))
    pixels = np.zeros((64, 64, 4), dtype=np.uint8)
    pixels[..., 0] = 200  # red, of which the left half is transparent
    pixels[:, 32:, 3] = 255
    request = EditRequest("x", [Image.fromarray(pixels, "RGBA")], seed=1, num_inference_steps=1)
    pipe.scheduler.register_to_config(shift_terminal=None)
    try:
        edit(pipe, [request])
        ours, seen[:] = [*seen], []
        stock(pipe, request)
    finally:
        pipe.scheduler.register_to_config(shift_terminal=0.02)
    for run in (ours, seen):
        (text,), vae = run
        assert text.shape == (64, 64, 3)
        assert (text[:, :31] == 255).all() and (text[:, 33:] == [200, 0, 0]).all()
        assert vae.shape == (1, 4, 1, 64, 64)
        assert (vae[0, 3, 0, :, :31] == -1).all() and (vae[0, 3, 0, :, 33:] == 1).all() and (vae[0, 0] > 0).all()
    assert torch.equal(ours[1], seen[1])


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_a_scale_of_0_is_no_missing_scale(pipe, scale):
    """Guidance is then off in the pipeline, as with 1, although there is a negative prompt."""
    request = EditRequest("make it night", [WIDE], "ugly", true_cfg_scale=scale, seed=2, num_inference_steps=2)
    (result,) = edit(pipe, [request])
    assert max_relative_error(result[0], stock(pipe, request)) < ROUNDING
    guided = EditRequest("make it night", [WIDE], "ugly", true_cfg_scale=4.0, seed=2, num_inference_steps=2)
    assert max_relative_error(result, edit(pipe, [guided])[0]) > 1e-3


def test_sigmas_of_the_checkpoint_set_the_number_of_steps(pipe):
    """The Turbo checkpoint has sigmas in its configuration; the number of steps of a request has then no effect."""
    request = EditRequest("make it night", [WIDE], seed=2, num_inference_steps=40)
    pipe.register_to_config(sample_sigmas=[1.0, 0.7, 0.2])
    try:
        (result,), expected = edit(pipe, [request]), stock(pipe, request)
        assert uniref_fast.estimate(pipe, [request]).computed_references == (1,)
    finally:
        pipe.register_to_config(sample_sigmas=None)
    assert max_relative_error(result[0], expected) < ROUNDING
    assert max_relative_error(result, edit(pipe, [request])[0]) > 1e-3


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda each: str(len(each.images)))
def test_text_without_running_the_encoder(pipe, request_):
    family = family_of(pipe)
    images = [family.convert_image(image) for image in request_.images]
    sizes = geometry(pipe, [image.size for image in images]).condition_sizes
    embeds, text = encoded_prompt(pipe, request_.prompt, images, sizes)
    expected = family.prompt_text(pipe, request_.prompt, sizes)
    assert text == expected
    assert len(embeds) == (text if isinstance(text, int) else sum(length for length, _ in text))
    assert isinstance(text, int) or text.count((0, False)) == len(images)


def test_a_joint_budget_gives_sides_of_whole_positions_of_the_encoder(pipe):
    sizes = geometry(pipe, [(200, 100), (90, 300), (31, 33)], budget=128)
    assert sizes.condition_sizes == sizes.reference_sizes
    assert all(side % 32 == 0 and side for size in sizes.reference_sizes for side in size)
    assert sum(w * h for w, h in sizes.reference_sizes) <= 128 * 128
    (result,) = edit(pipe, [EditRequest("x", [WIDE, TALL], seed=1, num_inference_steps=2)], budget=64)
    assert result.isfinite().all()


def test_embeddings_of_a_prompt_without_references(pipe):
    request = REQUESTS[0]
    embeds, _ = encoded_prompt(pipe, request.prompt, [], [])
    given = EditRequest(prompt_embeds=embeds, seed=1, height=32, width=64, num_inference_steps=2)
    assert torch.equal(edit(pipe, [given])[0], edit(pipe, [request])[0])


@pytest.mark.parametrize("masked", [slice(7, 12), slice(2, 5)])
def test_masked_embeddings_equal_the_pipeline(pipe, masked):
    """Padding at the end is not seen, but the target is placed after it."""
    embeds = torch.randn(12, pipe.transformer.config.context_in_dim, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(12, dtype=torch.bool)
    mask[masked] = False
    request = EditRequest(
        prompt_embeds=embeds, prompt_embeds_mask=mask, seed=1, height=32, width=64, num_inference_steps=2
    )
    expected = stock(pipe, request, prompt_embeds=embeds[None], prompt_embeds_mask=mask[None])
    assert max_relative_error(edit(pipe, [request])[0][0], expected) < ROUNDING
    assert uniref_fast.estimate(pipe, [request]).tokens["text"] == 12


def test_refusals(pipe, monkeypatch):
    embeds = torch.zeros(4, pipe.transformer.config.context_in_dim)
    with pytest.raises(ValueError, match="request 1: embeddings of a prompt do not record where its references are"):
        edit(pipe, [EditRequest(prompt_embeds=embeds, images=[WIDE])])
    with pytest.raises(ValueError, match='use "full", which is its own visibility'):
        edit(pipe, REQUESTS, visibility="reference_causal")
    monkeypatch.setattr(pipe.processor.image_processor, "size", {"shortest_edge": 256 * 256, "longest_edge": 512**2})
    with pytest.raises(ValueError, match=r"positions for references, which need 7: .* check its min_pixels"):
        edit(pipe, REQUESTS[2:3])


@pytest.mark.parametrize("slots, counts", [("..##", [3]), ("##.", [1]), ("...", [1]), ("#.#", [1])])
def test_positions_that_are_not_those_of_the_references(slots, counts):
    with pytest.raises(ValueError, match=r"has . positions for references, which need"):
        _text_of([each == "#" for each in slots], counts)


def test_changed_code_of_diffusers_is_refused(pipe, monkeypatch):
    block = pipe.transformer.transformer_blocks[1]
    monkeypatch.setattr(type(block), "_modulate", lambda *args: None)
    with pytest.raises(ValueError, match="_modulate"):
        edit(pipe, REQUESTS)


def test_the_estimate_counts_the_operations_of_the_forward(pipe):
    from torch.utils.flop_counter import FlopCounterMode

    request = REQUESTS[2]
    found = uniref_fast.estimate(pipe, [request], keep_references=1)
    assert found.tokens["reference"] == sum(w // 16 * (h // 16) for w, h in geometry(
        pipe, [image.size for image in request.images]).reference_sizes)  # fmt: skip
    family, model = family_of(pipe), family_of(pipe).packed(pipe.transformer)
    layout = found.layout
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(layout.image_length, 64), torch.zeros(layout.text_length, 48), torch.zeros(1), layout)
    linear, attention = family.transformer_flops(pipe.transformer.config, layout, "full")
    assert counter.get_total_flops() == linear
    stage = next(stage for stage in found.stages if stage.name == "transformer")
    assert stage.flops == 2 * (linear + attention)
    kept = uniref_fast.estimate(pipe, [request])
    assert next(stage for stage in kept.stages if stage.name == "transformer").flops < stage.flops
    assert kept.computed_references == (1,)
