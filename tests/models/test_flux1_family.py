"""edit and estimate of FLUX.1 Kontext, LongCat-Image-Edit and FIBO-Edit against the pipelines of diffusers."""

import dataclasses
import json

import flux1
import pytest
import torch
from peft import LoraConfig
from PIL import Image

from uniref_fast import EditRequest, edit, estimate
from uniref_fast.adapters import Adapter, apply_adapters
from uniref_fast.family_demo import stock_edit
from uniref_fast.models.families import family_of, find_transformer
from uniref_fast.request import geometry, request_geometry
from uniref_fast.testing import max_relative_error

KINDS = list(flux1.CLASSES)
RELATIVE = 5e-5
"""Largest relative error, in float32, after the steps of an edit and the VAE."""

PICTURES = [flux1.picture(96, 64, 1), flux1.picture(80, 112, 2), flux1.picture(64, 80, 3)]


@pytest.fixture(scope="module")
def pipes():
    return {kind: flux1.pipeline(flux1.transformer(kind, layers=1, single_layers=1), kind) for kind in KINDS}


def requests(kind):
    """Return requests that differ: references, sizes, prompts, scales and numbers of steps."""
    counts = {"kontext": (1, 0, 1), "longcat": (1, 1), "fibo": (1, 0, 3)}[kind]
    sizes, texts = [(96, 64), (64, 80), (80, 80)], ["make it blue", "a red cat", "a longer text about two owls"]
    return [
        EditRequest(
            flux1.prompt(kind, text), PICTURES[3 - count :] if count else (), width=width, height=height, seed=i,
            true_cfg_scale=2.0 + i, num_inference_steps=2 + i % 2,
        )
        for i, (count, text, (width, height)) in enumerate(zip(counts, texts, sizes, strict=False))
    ]  # fmt: skip


def stock(pipe, request):
    return stock_edit(family_of(pipe), pipe, request)


def test_a_lora_of_the_text_encoder_is_refused(tmp_path):
    """Refuse an adapter that would change the prompts of all requests, also of those without it."""
    from peft import inject_adapter_in_model
    from safetensors.torch import save_file

    pipe, request = flux1.pipeline(flux1.transformer("kontext"), "kontext"), requests("kontext")[0]
    names = ("transformer.x_embedder", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj")
    save_file(
        {f"{name}.lora_{side}.weight": torch.zeros(1, 1) for name in names for side in "AB"},
        tmp_path / "pytorch_lora_weights.safetensors",
    )
    adapter = Adapter.parse(str(tmp_path))
    with pytest.raises(ValueError, match="2 of its 4 tensors are an adapter of the text encoder"):
        apply_adapters(pipe, [adapter], None, (), torch.float32)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj"]), pipe.text_encoder, "clip")
    with pytest.raises(ValueError, match=r"request 1: lora chooses .*, and clip also changes the text encoder"):
        edit(pipe, [dataclasses.replace(request, lora={})])
    tokens, length = family_of(pipe).encode_prompt(pipe, "an owl", (), ())
    given = dataclasses.replace(request, prompt=None, prompt_embeds=tokens[:length], lora={})
    edit(pipe, [given], output_type="latent", progress=False)


# ---- guidance and prompts ----


@pytest.mark.parametrize("kind", ["longcat", "fibo"])
def test_guidance_has_an_empty_negative_prompt(pipes, kind):
    pipe, request = pipes[kind], dataclasses.replace(requests(kind)[0], num_inference_steps=1)
    expected = stock(pipe, request)
    for negative, equal in ((None, True), ("green", False)):
        given = dataclasses.replace(request, negative_prompt=negative)
        (result,) = edit(pipe, [given], output_type="pt", progress=False)
        assert (max_relative_error(result, expected) < RELATIVE) == equal
        assert max_relative_error(result, stock(pipe, given)) < RELATIVE
    plain = dataclasses.replace(request, true_cfg_scale=1.0)
    assert max_relative_error(edit(pipe, [plain], output_type="pt", progress=False)[0], stock(pipe, plain)) < RELATIVE


def test_kontext_without_embedded_guidance_has_classifier_free_guidance():
    pipe = flux1.pipeline(flux1.transformer(guidance_embeds=False))
    request = dataclasses.replace(requests("kontext")[0], negative_prompt="green")
    (result,) = edit(pipe, [request], output_type="pt", progress=False)
    assert max_relative_error(result, stock(pipe, request)) < RELATIVE
    assert max_relative_error(result, stock(pipe, dataclasses.replace(request, true_cfg_scale=1.0))) > 100 * RELATIVE


@pytest.mark.parametrize("kind", KINDS)
def test_given_embeddings(pipes, kind):
    """The embeddings of `Family.encode_prompt`, also without a text encoder."""
    pipe, request = pipes[kind], dataclasses.replace(requests(kind)[0], true_cfg_scale=1.0)
    family = family_of(pipe)
    images = [family.convert_image(image) for image in request.images]
    sizes = request_geometry(pipe, request).condition_sizes
    with torch.no_grad():
        embeds, _ = family.encode_prompt(pipe, request.prompt, images, sizes)
    given = dataclasses.replace(request, prompt=None, prompt_embeds=embeds)
    expected = edit(pipe, [request], output_type="pt", progress=False)[0]
    assert torch.equal(edit(pipe, [given], output_type="pt", progress=False)[0], expected)
    if kind == "kontext":  # as `docs/editing.md` writes it, and as the pipeline takes them
        with torch.no_grad():
            tokens, pooled, _ = pipe.encode_prompt(request.prompt)
        assert torch.equal(embeds, torch.cat([tokens, pooled[:, None].expand(-1, 512, -1)], -1)[0])
        assert max_relative_error(stock(pipe, given), expected) < RELATIVE


# ---- sizes ----


def test_references_of_kontext_have_the_preferred_sizes_of_the_pipeline():
    pipe = flux1.pipeline(flux1.transformer())
    pipe.auto_resize = True
    seen = []

    def stop(module, args):
        seen.append(args[0])
        raise StopIteration

    pipe.vae.encoder.register_forward_pre_hook(stop)
    image = flux1.picture(300, 200)
    sizes = geometry(pipe, [image.size])
    assert sizes.size == (1024, 1024) and sizes.reference_sizes == ((1248, 832),)
    with pytest.raises(StopIteration):
        family_of(pipe).encode_image(pipe, image, sizes.reference_sizes[0])
    with pytest.raises(StopIteration):
        pipe(image=image, prompt="x", num_inference_steps=1, max_sequence_length=16)
    assert torch.equal(*seen)
    assert geometry(pipe, [image.size], width=100, height=70).size == (96, 64)
    for size in ((10, 300), (16, 16)):
        assert min(geometry_or_zero(pipe, size)) in (0, 1024)


def geometry_or_zero(pipe, size):
    try:
        return geometry(pipe, [size]).reference_sizes[0]
    except ValueError:
        return 0, 0


def test_sizes_of_longcat_and_fibo(pipes):
    from diffusers.pipelines.longcat_image.pipeline_longcat_image_edit import calculate_dimensions

    pipe = flux1.MODULES["longcat"].pipeline_of(pipes["longcat"].transformer)
    pipe.output_area = 1024 * 1024
    sizes = geometry(pipe, [(300, 200)])
    assert sizes.size == calculate_dimensions(1024 * 1024, 1.5) == sizes.reference_sizes[0]
    assert sizes.condition_sizes == ((sizes.size[0] // 2, sizes.size[1] // 2),)
    for count in (0, 2):
        with pytest.raises(ValueError, match=f"exactly one image per request, got {count}"):
            geometry(pipe, [(300, 200)] * count)
    with pytest.raises(ValueError, match="budget is not possible"):
        geometry(pipe, [(300, 200)], budget=512)
    sizes = geometry(pipes["fibo"], [(300, 200), (3000, 2000)])
    assert sizes.size == (1264, 816) and sizes.reference_sizes == ((304, 192), (1248, 832))
    assert geometry(pipes["fibo"], [(300, 200)], width=64).size == (1264, 816), "the pipeline needs both sides"


@pytest.mark.parametrize("kind", ["kontext", "fibo"])
def test_a_joint_budget_resizes_references(pipes, kind):
    request = requests(kind)[2]
    sizes = request_geometry(pipes[kind], request, 96)
    assert sum(w * h for w, h in sizes.reference_sizes) <= 96 * 96
    (result,) = edit(pipes[kind], [request], budget=96, output_type="latent", progress=False)
    assert result.isfinite().all()


def test_transparent_references_of_fibo(pipes):
    pipe, image = pipes["fibo"], PICTURES[0].convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    request = dataclasses.replace(requests("fibo")[0], images=[image])
    (result,) = edit(pipe, [request], output_type="pt", progress=False)
    assert max_relative_error(result, stock(pipe, request)) < RELATIVE


def test_a_large_budget_of_fibo(pipes):
    """References are not larger than the pipeline makes them, and their latents have the size of the layout."""
    pipe = pipes["fibo"]
    (size,) = geometry(pipe, [(2000, 1500)], budget=2048).reference_sizes
    latents = family_of(pipe).encode_image(pipe, Image.new("RGB", (2000, 1500)), size)
    assert len(latents) == size[0] * size[1] // pipe.vae_scale_factor**2 and size[0] * size[1] <= 1024**2


@pytest.mark.parametrize("kind", KINDS)
def test_given_latents(pipes, kind):
    pipe, request = pipes[kind], requests(kind)[0]
    noise = torch.randn(1, 4 * 6, pipe.transformer.config.in_channels)
    (result,) = edit(pipe, [dataclasses.replace(request, latents=noise)], output_type="pt", progress=False)
    expected = pipe(**family_of(pipe).stock_arguments(pipe, request), latents=noise, output_type="pt").images[0]
    assert max_relative_error(result, expected) < RELATIVE


# ---- requests and models that cannot run ----


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("kontext", {"images": PICTURES[:2]}, r"request 1: a FluxKontextPipeline takes at most one image.*is a batch"),
        ("kontext", {"negative_prompt": "green"}, "request 1: edit takes no negative prompt"),
        ("longcat", {"images": PICTURES[:2]}, "request 1: a LongCatImageEditPipeline takes exactly one image"),
        ("longcat", {"images": []}, "takes exactly one image per request, got 0"),
        ("longcat", {"prompt": "'" + "a" * 600 + "'"}, "the prompt has 602 tokens, and the pipeline takes at most 512"),
        ("fibo", {"prompt": "make it blue"}, "takes JSON with the key .* for example json.dumps"),
        ("fibo", {"images": [], "width": None}, "give width and height for a request without images"),
    ],
)
def test_requests_that_cannot_run(pipes, kind, changes, message):
    for call in (edit, estimate):
        with pytest.raises(ValueError, match=message):
            call(pipes[kind], [dataclasses.replace(requests(kind)[0], **changes)])


@pytest.mark.parametrize("kind", ["kontext", "longcat"])
def test_masks_of_embeddings_are_refused(pipes, kind):
    width = flux1.CLASSES[kind].prompt_channels(pipes[kind].transformer.config)
    given = {"prompt": None, "prompt_embeds": torch.zeros(4, width), "prompt_embeds_mask": torch.tensor([1, 1, 0, 0])}
    with pytest.raises(ValueError, match="prompt_embeds_mask masks tokens"):
        edit(pipes[kind], [dataclasses.replace(requests(kind)[0], **given)])


def test_masks_of_fibo(pipes):
    """Masked rows of embeddings have no effect."""
    pipe = pipes["fibo"]
    width = flux1.CLASSES["fibo"].prompt_channels(pipe.transformer.config)
    embeds, mask = torch.randn(6, width), torch.tensor([1, 1, 0, 1, 0, 0])
    given = {"prompt": None, "true_cfg_scale": 1.0}
    one = dataclasses.replace(requests("fibo")[0], prompt_embeds=embeds, prompt_embeds_mask=mask, **given)
    other = dataclasses.replace(requests("fibo")[0], prompt_embeds=embeds[mask.bool()], **given)
    results = edit(pipe, [one, other], output_type="latent", progress=False)
    assert max_relative_error(*results) < RELATIVE


@pytest.mark.parametrize(
    ("kind", "option", "part"),
    [
        ("kontext", "pooled_projection_dim", "text encoder"),
        ("kontext", "joint_attention_dim", "second text encoder"),
        ("longcat", "in_channels", "VAE"),
        ("fibo", "text_encoder_dim", "text encoder"),
    ],
)
def test_parts_of_different_models(kind, option, part):
    pipe = flux1.pipeline(flux1.transformer(kind), kind)
    pipe.transformer.register_to_config(**{option: 80})
    with pytest.raises(ValueError, match=f"{option} = 80, but its {part} gives"):
        edit(pipe, requests(kind)[:1])


# ---- estimates ----


@pytest.mark.parametrize("kind", KINDS)
def test_estimate(pipes, kind):
    """Operations equal those that PyTorch counts in the packed forward; the text has the tokens of the edit."""
    from torch.utils.flop_counter import FlopCounterMode

    pipe, given = pipes[kind], dataclasses.replace(requests(kind)[0], true_cfg_scale=1.0)
    found = estimate(pipe, [given])
    family, transformer = family_of(pipe), find_transformer(pipe)
    text = found.tokens["text"]
    if kind == "kontext":
        assert text == 512
    model = family.packed(transformer, impl="dense")
    layout = model.layout([request_geometry(pipe, given).sample(text)])
    streams = (
        torch.zeros(layout.image_length, transformer.config.in_channels),
        torch.zeros(layout.text_length, model.prompt_channels(transformer.config)),
    )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*streams, torch.ones(1), layout)
    linear, attention = family.transformer_flops(transformer.config, layout, model.visibility)
    assert linear == counter.get_total_flops()
    assert attention == 4 * 256 * layout.joint_length * (layout.joint_length + 24)
    encoders = [part for name, part in pipe.components.items() if name.startswith("text_encoder")]
    weights = sum(p.numel() * 4 for part in encoders for p in {*part.parameters()})
    assert len(encoders) == (2 if kind == "kontext" else 1)
    (encoder,) = (stage for stage in found.stages if stage.name == "text encoder")
    assert encoder.weight_bytes >= weights * 0.99 and encoder.flops > 0 and encoder.activation_bytes > 0


@pytest.mark.parametrize("kind", ["kontext", "fibo"])
def test_operations_of_the_text_encoders(pipes, kind):
    """Products of Linears and of attention, as PyTorch counts them."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    pipe, prompt = pipes[kind], flux1.prompt(kind, "a red cat")
    family = family_of(pipe)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        _, text = family.encode_prompt(pipe, prompt, (), ())
    flops, _ = family.text_encoder_cost(pipe, [None], [[text]])
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert json.loads(family.written("x")) if kind == "fibo" else family.written("x") == "x"
