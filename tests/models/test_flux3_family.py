"""edit and estimate of FLUX.3 pipelines against the modular pipelines of diffusers."""

import dataclasses
from types import SimpleNamespace

import flux3
import pytest
import torch
from PIL import Image

from uniref_fast import EditRequest, edit, estimate
from uniref_fast.models.families import family_of
from uniref_fast.models.flux3_family import SIDE, _canvas, _fitted, _leaves
from uniref_fast.models.image_sizes import at_most
from uniref_fast.request import geometry
from uniref_fast.testing import max_relative_error

KINDS = [False, True]
RELATIVE = 5e-5
"""Largest relative error, in float32, after the steps of an edit and the VAE."""

PICTURES = [flux3.picture(96, 64, 1), flux3.picture(80, 112, 2), flux3.picture(70, 90, 3)]


@pytest.fixture(scope="module")
def pipes(make_flux3):
    return {flow_map: flux3.pipeline(make_flux3(flow_map=flow_map)) for flow_map in KINDS}


def requests(flow_map):
    """Return four requests that differ: K = 0..3 references, other sizes, guidance scales and numbers of steps.

    The only reference of the second one is padded to whole tokens, and its result is cropped.
    """
    scale, negative = (1.0, None) if flow_map else (3.0, "green")
    return [
        EditRequest("a red cat", width=64, height=96, seed=1, num_inference_steps=3, true_cfg_scale=1.0),
        EditRequest("make it blue", PICTURES[2:], seed=2, num_inference_steps=2, true_cfg_scale=1.0),
        EditRequest("both on a table", PICTURES[1:], negative, scale, 64, 80, num_inference_steps=2, seed=3),
        EditRequest("three of them", PICTURES, seed=4, num_inference_steps=3, true_cfg_scale=scale),
    ]


def test_results_are_cropped_to_the_reference(pipes):
    images = {
        form: edit(pipes[True], requests(True)[1:2], output_type=form, progress=False)[0] for form in ("pil", "np")
    }
    assert images["pil"].size == (70, 90) and images["np"].shape == (90, 70, 3)


def test_sizes_are_those_of_the_image_processor(pipes):
    """The only reference is kept whole, up to 4 megapixels; several are cut, up to 1 megapixel each."""
    pipe, patch = pipes[False], 16
    processor = pipe.image_processor
    for size in ((64, 64), (30, 20), (70, 90), (1023, 1025), (1500, 1100), (2047, 2049), (3000, 1500), (5000, 400)):
        image = Image.new("RGB", size)
        whole, placed = processor.preprocess(image, resize_mode="fill")
        assert _canvas(_fitted(size, patch), patch) == whole.shape[:1:-1], size
        sizes = geometry(pipe, [size])
        box = placed["reference_crop"]
        assert sizes.result_size == (box[2] - box[0], box[3] - box[1]) and sizes.crop in (box, None)
        if min(size) >= patch:
            cropped = processor.preprocess(image, resize_mode="crop")[0].shape[:1:-1]
            assert at_most(size, SIDE**2, patch) == cropped, size
    assert geometry(pipe, [(70, 90)], width=64).crop is None
    assert geometry(pipe, []).size == (1024, 1024)
    assert geometry(pipe, [(200, 300)] * 2, budget=128).reference_sizes != geometry(pipe, [(200, 300)] * 2).size


def test_the_text_has_the_length_to_which_the_pipeline_pads_it(pipes):
    pipe = pipes[False]
    for prompt in ("x", "a long prompt " * 30):
        embeds, length = family_of(pipe).encode_prompt(pipe, prompt, (), ())
        assert length == len(embeds) == family_of(pipe).prompt_text(pipe, prompt, ()) and length % 80 == 0
    request = EditRequest(None, [], prompt_embeds=embeds[:7], width=64, height=64, num_inference_steps=1, seed=1)
    result, other = edit(pipe, [request, dataclasses.replace(request, prompt_embeds=embeds)], progress=False)
    assert result.tobytes() != other.tobytes()


def test_given_latents(pipes):
    pipe, request = pipes[False], requests(False)[0]
    noise = torch.randn(1, 128, 6, 4, generator=torch.Generator().manual_seed(1)).flatten(2).transpose(1, 2)
    given = dataclasses.replace(request, latents=noise, seed=None)
    expected, found = (edit(pipe, [each], output_type="latent", progress=False)[0] for each in (request, given))
    assert torch.equal(expected, found)


def test_models_and_requests_that_cannot_run(pipes, make_flux3):
    import diffusers

    with pytest.raises(ValueError, match="takes no negative prompt"):
        edit(pipes[True], [{"prompt": "x", "negative_prompt": "green"}])
    with pytest.raises(ValueError, match="masks tokens"):
        mask = torch.tensor([True, False])
        edit(pipes[False], [{"prompt_embeds": torch.zeros(2, 128), "prompt_embeds_mask": mask}])
    pipe = flux3.pipeline(make_flux3(), blocks=diffusers.Flux3AutoBlocks())
    with pytest.raises(ValueError, match=r"rewrites prompts with its block .*pop\('prompt_upsampler'\)"):
        edit(pipe, [{"prompt": "x"}])
    pipe = flux3.pipeline(make_flux3())
    pipe.update_components(transformer=make_flux3(flow_map=True))
    with pytest.raises(ValueError, match="flow_map = True, which belongs to a Flux3DistilledModularPipeline"):
        edit(pipe, [{"prompt": "x"}])
    pipe = flux3.pipeline(make_flux3())
    pipe.update_components(guider=pipe.guider.new(guidance_rescale=0.5))
    with pytest.raises(ValueError, match=r"guider ClassifierFreeGuidance with .*; use it, or call the pipeline"):
        edit(pipe, [{"prompt": "x"}])


def test_changed_settings_are_refused(make_flux3, monkeypatch):
    """Attributes of the guider and of the blocks, which their configuration does not show."""
    import diffusers

    pipe = flux3.pipeline(make_flux3())
    pipe.guider.disable()
    with pytest.raises(ValueError, match=r"guider .* with .*'enabled': False"):
        edit(pipe, [{"prompt": "x"}])
    pipe.guider.enable()
    pipe.guider.guidance_rescale = 0.7
    with pytest.raises(ValueError, match=r"guider .* with .*'guidance_rescale': 0.7"):
        edit(pipe, [{"prompt": "x"}])
    pipe.guider.guidance_rescale = 0.0
    with pytest.raises(ValueError, match=r"request 1: true_cfg_scale must be 1 .* or above, got 0.5"):
        edit(pipe, [{"prompt": "x", "true_cfg_scale": 0.5}])
    blocks = diffusers.Flux3AutoBlocks()
    blocks.sub_blocks.pop("prompt_upsampler")
    pipe = flux3.pipeline(make_flux3(), blocks=blocks)
    for _, block in _leaves(pipe._blocks):
        if hasattr(block, "image_rope_scale"):
            monkeypatch.setattr(block, "image_rope_scale", 1.0)  # pipelines share it
    with pytest.raises(ValueError, match=r"with image_rope_scale=1.0, and edit\(\) computes with 0.5"):
        edit(pipe, [{"prompt": "x"}])


def test_a_pipeline_without_the_block_that_encodes_prompts(pipes, make_flux3):
    import diffusers

    blocks = diffusers.Flux3AutoBlocks()
    for name in ("prompt_upsampler", "text_encoder"):
        blocks.sub_blocks.pop(name)
    pipe, whole = flux3.pipeline(make_flux3(), blocks=blocks), pipes[False]
    assert "text_encoder" not in pipe.components
    with pytest.raises(ValueError, match="no text encoder; give prompt_embeds"):
        edit(pipe, [{"prompt": "x"}])
    embeds, _ = family_of(whole).encode_prompt(whole, "x", (), ())
    request = EditRequest(None, [], prompt_embeds=embeds, width=64, height=64, num_inference_steps=1, seed=1)
    with pytest.raises(ValueError, match="guidance needs negative_prompt_embeds"):
        edit(pipe, [dataclasses.replace(request, true_cfg_scale=2.0)])
    request = dataclasses.replace(request, true_cfg_scale=1.0)
    results = [edit(each, [request], output_type="latent", progress=False)[0] for each in (pipe, whole)]
    assert torch.equal(*results)


def test_transparent_references_are_those_of_the_pipeline(pipes):
    image = PICTURES[0].convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    request = dataclasses.replace(requests(False)[1], images=[image])
    (result,) = edit(pipes[False], [request], output_type="pt", progress=False)
    assert max_relative_error(result, flux3.stock(pipes[False], request)[0]) < RELATIVE


def test_a_large_budget_leaves_references_that_the_pipeline_allows(pipes, monkeypatch):
    """Allow up to 4 megapixels for the only reference, up to 1 for several; the latents have the layout's size."""
    pipe, found = pipes[False], []

    def encode(pixels):  # without the time of the VAE
        latents = torch.zeros(1, pipe.vae.config.latent_channels, *(side // 8 for side in pixels.shape[2:]))
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latents))

    monkeypatch.setattr(pipe.vae, "encode", encode)
    for sizes, budget in (([(1490, 1000)], 2048), ([(3000, 2000)], 2048), ([(1490, 1000)] * 2, 2048)):
        size = geometry(pipe, sizes, budget=budget).reference_sizes[0]
        latents = family_of(pipe).encode_image(pipe, Image.new("RGB", sizes[0]), size)
        assert len(latents) == size[0] * size[1] // 256
        found.append(size[0] * size[1])
    assert 2**20 < found[0] < found[1] <= 2**22 and found[2] <= 2**20


def test_a_block_of_your_own_is_refused(make_flux3):
    import diffusers
    from diffusers.modular_pipelines.flux3.decoders import Flux3DecodeStep

    class Decode(Flux3DecodeStep):
        pass

    blocks = diffusers.Flux3AutoBlocks()
    blocks.sub_blocks.pop("prompt_upsampler")
    blocks.sub_blocks["decode"] = Decode()
    with pytest.raises(ValueError, match=r"has the block 'decode', which is not diffusers' own.*call the pipeline"):
        edit(flux3.pipeline(make_flux3(), blocks=blocks), [{"prompt": "x"}])


@pytest.mark.parametrize("flow_map", KINDS)
def test_estimate(pipes, flow_map):
    """Operations equal those that PyTorch counts in the packed forward."""
    from torch.utils.flop_counter import FlopCounterMode

    pipe = pipes[flow_map]
    model = family_of(pipe).packed(pipe.transformer, impl="reference")
    given = requests(flow_map)[1:3]
    layout = model.layout([geometry(pipe, [x.size for x in each.images]).sample(80) for each in given])
    image = torch.zeros(layout.image_length, 128)
    text = torch.zeros(layout.text_length, pipe.transformer.config.joint_attention_dim)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image, text, torch.rand(2, 2) if flow_map else torch.rand(2), layout)
    linear, _ = family_of(pipe).transformer_flops(pipe.transformer.config, layout, "full")
    counted = sum(
        n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op) and "bmm" not in str(op)
    )
    assert linear == counted
    found = estimate(pipe, given)
    assert found.results[0] == (70, 90) and found.peak_bytes > 0
