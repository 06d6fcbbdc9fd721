"""edit and estimate of Z-Image and Fibo 2 pipelines against the pipelines of diffusers."""

import dataclasses
import json

import fibo2
import flux2
import pytest
import torch
import z_image

from uniref_fast import EditRequest, edit, estimate
from uniref_fast.evaluation.model import weights_digest
from uniref_fast.loading import offload
from uniref_fast.models.families import family_of, find_transformer
from uniref_fast.request import request_geometry
from uniref_fast.testing import max_relative_error

NAMES = ["z-image", "fibo-2"]
RELATIVE = 5e-5
"""Largest relative error of latents, in float32, after the steps of an edit."""

PICTURES = [flux2.picture(96, 64, 1), flux2.picture(80, 112, 2), flux2.picture(70, 90, 3)]
STEPS = 2


def make(name, dtype=torch.float32):
    if name == "z-image":
        return z_image.pipeline(z_image.transformer(dtype=dtype))
    return fibo2.pipeline(fibo2.transformer(dtype=dtype))


@pytest.fixture(scope="module")
def pipes():
    return {name: make(name) for name in NAMES}


def requests(scale=1.0):
    """Return requests that differ: K = 0..3 references, other sizes and numbers of steps, and guidance for some."""
    return [
        EditRequest("a red cat", width=64, height=96, seed=1, true_cfg_scale=scale, num_inference_steps=STEPS),
        EditRequest("make it blue", PICTURES[:1], seed=2, true_cfg_scale=3.0, num_inference_steps=STEPS),
        EditRequest("put both on a table, and then the third one under it", PICTURES[1:], width=80, height=64, seed=3,
                    true_cfg_scale=scale, num_inference_steps=1),
        EditRequest("three of them", PICTURES, "green", seed=4, true_cfg_scale=2.0, num_inference_steps=STEPS),
    ]  # fmt: skip


def stock(pipe, request, **more):
    """Return the latents of diffusers' own pipeline as tokens, `[1, n, C]`."""
    guidance = request.true_cfg_scale if request.true_cfg_scale > 1 else 0.0
    latents = pipe(
        prompt=request.prompt, image=list(request.images) or None, negative_prompt=request.negative_prompt,
        width=request.width, height=request.height, num_inference_steps=request.num_inference_steps,
        generator=torch.Generator().manual_seed(request.seed), output_type="latent", guidance_scale=guidance, **more,
    ).images  # fmt: skip
    return family_of(pipe).pack(latents)


def edited(pipe, given, **options):
    return edit(pipe, given, output_type="latent", progress=False, **options)


def test_fibo_2_takes_five_references(pipes):
    with pytest.raises(ValueError, match="request 1: this model edits up to 5 images at once, got 6"):
        edit(pipes["fibo-2"], [dataclasses.replace(requests()[1], images=PICTURES * 2)])


@pytest.mark.parametrize("name", NAMES)
def test_given_latents_and_images_in_pixels(pipes, name):
    pipe, request = pipes[name], requests()[1]
    family, sizes = family_of(pipe), request_geometry(pipe, request)
    noise = torch.randn(1, sizes.target_tokens, family.packed.sizes(pipe.transformer.config).token_channels)
    given = dataclasses.replace(request, latents=noise)
    expected = stock(pipe, request, latents=family.unpack(noise, sizes.grid(sizes.size)[1:]))
    assert torch.equal(family.pack(family.unpack(noise, sizes.grid(sizes.size)[1:])), noise)
    assert max_relative_error(edited(pipe, [given])[0], expected) < RELATIVE
    (image,) = edit(pipe, [given], progress=False)
    assert image.size == sizes.size


def test_large_references_of_z_image_are_scaled_and_cropped_as_in_the_pipeline(pipes):
    """A picture of over 1024 x 1024 pixels; the area of a given size is that of the reference too."""
    pipe, picture, seen = pipes["z-image"], flux2.picture(1500, 1100, 5), []
    for size, expected in ((None, (1195, 876)), ((128, 96), (129, 94))):
        width, height = size or (None, None)
        request = dataclasses.replace(requests()[1], images=[picture], width=width, height=height)
        sizes = request_geometry(pipe, request)
        assert sizes.condition_sizes == (expected,)
        assert sizes.reference_sizes == (tuple(side // 16 * 16 for side in expected),)
        assert sizes.size == (size or sizes.reference_sizes[0])
    hook = pipe.vae.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        resized = picture.resize(sizes.condition_sizes[0], 1)
        family_of(pipe).encode_image(pipe, resized, sizes.reference_sizes[0])
        pipe(image=[picture], prompt="x", width=128, height=96, num_inference_steps=1, guidance_scale=0.0)
    finally:
        hook.remove()
    assert torch.equal(*seen)


def test_captions_of_fibo_2(pipes):
    """JSON captions with and without references, with text to draw, and with embeddings of their own."""
    pipe, base = pipes["fibo-2"], requests()
    caption = {"short_description": "an owl", "objects": [], "text_render": [{"text": "hello"}]}
    edit_prompt = json.dumps({"edit_instruction": "add an owl", "structured_caption": caption})
    asked = dataclasses.replace(base[1], prompt=edit_prompt)
    assert max_relative_error(edited(pipe, [asked])[0], stock(pipe, asked)) < RELATIVE
    with pytest.raises(ValueError, match="text_render the pipeline changes the prompt"):
        edit(pipe, [dataclasses.replace(base[0], prompt=json.dumps(caption))])
    plain = dataclasses.replace(base[0], prompt=json.dumps({"short_description": "an owl", "objects": []}))
    assert max_relative_error(edited(pipe, [plain])[0], stock(pipe, plain)) < RELATIVE
    with pytest.raises(ValueError, match="request 1: To edit an image, `prompt` has to be the edit instruction"):
        edit(pipe, [dataclasses.replace(base[1], prompt=plain.prompt)])
    embeds = pipe.encode_prompt("an owl")[0]
    given = dataclasses.replace(base[0], prompt=None, prompt_embeds=embeds[0].transpose(0, 1).flatten(1))
    expected = stock(pipe, given, prompt_embeds=embeds)
    assert max_relative_error(edited(pipe, [given])[0], expected) < RELATIVE


def test_requests_that_z_image_refuses(pipes):
    pipe, request = pipes["z-image"], requests()[1]
    for changes, message in (
        ({"images": [flux2.picture(40, 80)]}, "request 1: image 1: Image too small"),
        ({"prompt": None, "prompt_embeds": torch.zeros(4, 48)}, "do not record where its references are"),
        ({"true_cfg_scale": 0.5}, "true_cfg_scale must be 0 or 1 \\(no guidance\\) or above 1"),
    ):
        with pytest.raises(ValueError, match=message):
            edit(pipe, [dataclasses.replace(request, **changes)])
    embeds = torch.randn(9, 48, generator=torch.Generator().manual_seed(0))
    given = dataclasses.replace(requests()[0], prompt=None, prompt_embeds=embeds)
    assert max_relative_error(edited(pipe, [given])[0], stock(pipe, given, prompt_embeds=[[embeds]])) < RELATIVE
    text_to_image = z_image.transformer(features=None)
    other = z_image.pipeline(text_to_image)
    with pytest.raises(ValueError, match="without siglip_feat_dim, which is that of a text-to-image model"):
        edit(other, [requests()[0]])


@pytest.mark.parametrize("name", NAMES)
def test_estimate(pipes, name):
    """Operations of Linears equal those that PyTorch counts in the packed forward."""
    from torch.utils.flop_counter import FlopCounterMode

    pipe, given = pipes[name], [dataclasses.replace(requests()[3], negative_prompt=None, true_cfg_scale=1.0)]
    found = estimate(pipe, given, keep_references=2)
    family, transformer = family_of(pipe), find_transformer(pipe)
    sizes = request_geometry(pipe, given[0])
    with torch.no_grad():
        text, runs = family.encode_prompt(pipe, given[0].prompt, PICTURES, sizes.condition_sizes)
    assert family.prompt_text(pipe, given[0].prompt, sizes.condition_sizes) == runs
    assert found.tokens["text"] == len(text) and found.tokens["target"] == sizes.target_tokens
    model = family.packed(transformer, impl="dense")
    layout = model.layout([sizes.sample(runs)])
    image = torch.zeros(layout.image_length, family.packed.sizes(transformer.config).token_channels)
    grads = [parameter.requires_grad_(False) for parameter in transformer.parameters()]  # the counter follows them
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image, text, torch.ones(1), layout)
    linear, attention = family.transformer_flops(transformer.config, layout, model.visibility)
    for parameter in grads:
        parameter.requires_grad_(True)
    counts = counter.get_flop_counts()["Global"]
    assert linear == sum(n for key, n in counts.items() if "attention" not in str(key))
    assert attention > 4 * 256 * layout.joint_length**2
    assert family.transformer_flops(transformer.config, layout, model.visibility, True)[0] < linear
    assert found.kept_bytes > 0 and found.computed_references == (1,)
    (stage,) = (each for each in found.stages if each.name == "transformer")
    assert stage.activation_bytes > 0 and found.stages[0].flops > 0


def test_estimate_of_a_deep_fibo_2():
    """An estimate builds three blocks, of which one in the middle reads the text encoder."""
    pipe = fibo2.pipeline(fibo2.transformer(layers=6))
    (stage,) = (each for each in estimate(pipe, requests()[1:2]).stages if each.name == "transformer")
    assert stage.activation_bytes > 0
    config = {**pipe.transformer.config, "n_layers": 3}
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    with torch.device("meta"):
        built = family_of(pipe).built(config, None)
    assert [getattr(block, "cross_attention", None) is not None for block in built.layers] == [False, True, False]
    assert len(built.config.injection_layer_ids) == 2


@pytest.mark.parametrize("name", NAMES)
def test_references_are_encoded_once_for_both_prompts(name):
    """Z-Image has the features of its references in both; Fibo 2 encodes the negative prompt without references."""
    pipe, request, calls = make(name), requests()[1], []
    vision = pipe.siglip if name == "z-image" else pipe.text_encoder.model.visual
    vision.register_forward_hook(lambda *args: calls.append(1))
    edited(pipe, [request])
    assert len(calls) == 1
    plain = dataclasses.replace(request, true_cfg_scale=1.0)
    without = [dataclasses.replace(each, images=()) for each in (request, plain)]
    flops = [estimate(pipe, [each]).stages[0].flops for each in (request, plain, *without)]
    if name == "fibo-2":  # the negative prompt costs the same with and without references
        assert flops[0] - flops[1] == flops[2] - flops[3] > 0
    else:  # three captions instead of one
        assert flops[0] - flops[1] == 3 * (flops[2] - flops[3]) > 0


@pytest.mark.parametrize("name", NAMES)
def test_arguments_of_the_pipeline(pipes, name):
    """A scale of 1 is no guidance, and embeddings have the form of the pipeline."""
    pipe, (base, request, *_) = pipes[name], requests()
    family, generator = family_of(pipe), torch.Generator().manual_seed(0)
    embeds = torch.randn(2, 9, family.text_channels(pipe.transformer.config), generator=generator)
    given = dataclasses.replace(
        base, prompt=None, prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], true_cfg_scale=2.0
    )
    for one in (dataclasses.replace(request, true_cfg_scale=1.0), given):
        found = pipe(**family.stock_arguments(pipe, one), output_type="latent").images
        assert max_relative_error(edited(pipe, [one])[0], family.pack(found)) < RELATIVE


def test_siglip_of_z_image_is_a_text_encoder():
    """Offload its weights, count them, and have them in the digest."""
    pipe, request = make("z-image"), requests()[1]
    expected, digest = edited(pipe, [request])[0], weights_digest(pipe)
    weights = sum(x.nbytes for part in (pipe.text_encoder, pipe.siglip) for x in (*part.parameters(), *part.buffers()))
    assert estimate(pipe, [request]).stages[0].weight_bytes == weights
    offload(pipe, "block", "cpu")
    assert any("_diffusers_hook" in vars(module) for module in pipe.siglip.modules())
    assert max_relative_error(edited(pipe, [request])[0], expected) < RELATIVE
    next(pipe.siglip.parameters()).data.mul_(2)
    assert weights_digest(pipe) != digest


def test_z_image_without_siglip():
    """Requests without references run, and the others are refused."""
    pipe, (request, other, *_) = make("z-image"), requests()
    pipe.siglip = None
    assert max_relative_error(edited(pipe, [request])[0], stock(pipe, request)) < RELATIVE
    assert estimate(pipe, [request]).stages[0].flops > 0 and weights_digest(pipe)
    for run in (edit, estimate):
        with pytest.raises(ValueError, match="request 1: the pipeline has no siglip or no siglip_processor"):
            run(pipe, [other])
    offload(pipe, "block", "cpu")
    assert max_relative_error(edited(pipe, [request])[0], stock(pipe, request)) < RELATIVE


def test_prompts_of_z_image_have_the_dtype_of_the_transformer():
    """Features are not rounded to that of the text encoder."""
    pipe, request, features = make("z-image"), requests()[1], []
    pipe.text_encoder.to(torch.bfloat16)
    pipe.siglip.register_forward_hook(lambda module, args, out: features.append(out.last_hidden_state))
    sizes = request_geometry(pipe, request)
    with torch.no_grad():
        text, _ = family_of(pipe).encode_prompt(pipe, "an owl", request.images, sizes.condition_sizes)
    assert text.dtype == torch.float32
    values = features[0][features[0].bfloat16().float() != features[0]]
    assert torch.isin(text[-1, : z_image.FEATURES], values).any()
    assert edited(pipe, [request])[0].isfinite().all()
