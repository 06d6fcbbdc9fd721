"""edit and estimate of FLUX.2 pipelines against the pipelines of diffusers."""

import dataclasses
import warnings

import flux2
import pytest
import torch

from uniref_fast import EditRequest, Engine, edit, engine, estimate
from uniref_fast.edit_session import EditSession
from uniref_fast.models.families import family_of, find_transformer
from uniref_fast.request import request_geometry
from uniref_fast.schedule import shift_time
from uniref_fast.testing import max_relative_error

KINDS = ["klein", "klein-kv", "dev"]
RELATIVE = 5e-5
"""Largest relative error, in float32, after the steps of an edit and the VAE."""

PICTURES = [flux2.picture(96, 64, 1), flux2.picture(80, 112, 2), flux2.picture(70, 90, 3)]
STEPS = 2


@pytest.fixture(scope="module")
def pipes(make_flux2):
    return {kind: flux2.pipeline(make_flux2(kind, layers=1, single_layers=1), kind) for kind in KINDS}


def requests(kind, scale=1.0):
    """Return four requests that differ: K = 0..3 references, other sizes, guidance scales and numbers of steps."""
    made = [
        EditRequest("a red cat", width=64, height=96, seed=1),
        EditRequest("make it blue", PICTURES[:1], seed=2),
        EditRequest("put both on a table", PICTURES[1:], width=80, height=64, seed=3, num_inference_steps=2),
        EditRequest("", PICTURES, seed=4) if kind == "dev" else EditRequest("three of them", PICTURES, seed=4),
    ]
    if kind == "dev":  # without text encoder; unlike lengths of text
        generator = torch.Generator().manual_seed(0)
        texts = [torch.randn(n, 96, generator=generator) for n in (5, 9, 1, 17)]
        made = [dataclasses.replace(r, prompt=None, prompt_embeds=x) for r, x in zip(made, texts, strict=True)]
    steps = [min(each.num_inference_steps or STEPS, STEPS) for each in made]
    return [
        dataclasses.replace(each, num_inference_steps=n, true_cfg_scale=scale + i / 2 if kind == "dev" else scale)
        for i, (each, n) in enumerate(zip(made, steps, strict=True))
    ]


def stock(pipe, request, **more):
    """Return the result of diffusers' own pipeline, `[3, H, W]`."""
    options = {} if "KV" in type(pipe).__name__ else {"guidance_scale": request.true_cfg_scale}
    if request.prompt_embeds is not None:
        options["prompt_embeds"] = request.prompt_embeds[None]
    return pipe(
        prompt=request.prompt,
        image=list(request.images) or None,
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="pt",
        **options,
        **more,
    ).images[0]


def test_guidance_of_klein_has_an_empty_negative_prompt(pipes):
    pipe = pipes["klein"]
    request = dataclasses.replace(requests("klein")[1], true_cfg_scale=3.0)
    expected = stock(pipe, request)
    for negative in (None, " "):
        given = dataclasses.replace(request, negative_prompt=negative)
        assert max_relative_error(edit(pipe, [given], output_type="pt", progress=False)[0], expected) < RELATIVE
    (other,) = edit(pipe, [dataclasses.replace(request, negative_prompt="green")], output_type="pt", progress=False)
    assert max_relative_error(other, expected) > 100 * RELATIVE


def test_a_distilled_model_ignores_the_scale_and_refuses_a_negative_prompt(pipes, make_flux2):
    distilled = flux2.pipeline(make_flux2("klein"), "klein", distilled=True)
    request = dataclasses.replace(requests("klein")[1], true_cfg_scale=4.0)
    expected = stock(distilled, request)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (result,) = edit(distilled, [request], output_type="pt", progress=False)
    assert max_relative_error(result, expected) < RELATIVE
    for pipe in (distilled, pipes["klein-kv"]):
        with pytest.raises(ValueError, match="takes no negative prompt"):
            edit(pipe, [dataclasses.replace(request, negative_prompt="green")])


def test_the_scale_of_dev_is_embedded_without_a_warning(pipes):
    first, second = (requests("dev", scale)[1] for scale in (1.5, 4.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = edit(pipes["dev"], [first, second], output_type="pt", progress=False)
    assert max_relative_error(results[0], results[1]) > 100 * RELATIVE
    assert max_relative_error(results[1], stock(pipes["dev"], second)) < RELATIVE


def test_large_references_are_scaled_and_cropped_as_in_the_pipeline(pipes):
    """A picture of over 1024 x 1024 pixels; its size is that of the result too."""
    pipe, request = pipes["klein"], EditRequest("x", [flux2.picture(1500, 1100, 5), PICTURES[2]])
    sizes = request_geometry(pipe, request)
    assert sizes.reference_sizes == ((1184, 864), (64, 80)) and sizes.size == (1184, 864)
    seen = []

    def stop(module, args):
        seen.append(args[0])
        raise StopIteration

    hook = pipe.vae.encoder.register_forward_pre_hook(stop)
    try:
        for image, size in zip(request.images, sizes.reference_sizes, strict=True):
            with pytest.raises(StopIteration):
                family_of(pipe).encode_image(pipe, image, size)
            with pytest.raises(StopIteration):
                pipe(image=image, prompt="x", width=64, height=64, num_inference_steps=1, guidance_scale=1.0)
    finally:
        hook.remove()
    assert len(seen) == 4 and all(torch.equal(ours, theirs) for ours, theirs in zip(seen[::2], seen[1::2], strict=True))


def test_a_joint_budget_resizes_references(pipes):
    request = requests("klein")[3]
    sizes = request_geometry(pipes["klein"], request, 96)
    assert sum(w * h for w, h in sizes.reference_sizes) <= 96 * 96
    (result,) = edit(pipes["klein"], [request], budget=96, output_type="latent", progress=False)
    assert result.isfinite().all()


def test_given_latents(pipes):
    pipe, request = pipes["klein"], requests("klein")[1]
    noise = torch.randn(1, 4 * 6, 128)
    (result,) = edit(pipe, [dataclasses.replace(request, latents=noise)], output_type="pt", progress=False)
    expected = stock(pipe, request, latents=noise.transpose(1, 2).reshape(1, 128, 4, 6))
    assert max_relative_error(result, expected) < RELATIVE


def test_klein_kv_computes_references_once(pipes):
    from uniref_fast import EditReport

    report = EditReport()
    edit(pipes["klein-kv"], requests("klein-kv")[1:2], output_type="latent", progress=False, report=report)
    (references,) = report.references
    assert references.refreshed == (0,) and references.steps == STEPS


def test_the_engine_plans_memory_for_kept_references(pipes, monkeypatch):
    """klein-KV keeps keys and values of both kinds of block, also without the option keep_references."""

    class OnGpu(EditSession):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.device = torch.device("cuda")

    free, each = 1 << 40, {}
    monkeypatch.setattr(engine, "EditSession", OnGpu)
    monkeypatch.setattr(engine, "_free_bytes", lambda session: free)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for kind in KINDS:
        with Engine(pipes[kind]) as running:
            model = running._session.model
            for kept in (False, True):
                each[kept] = engine.MEMORY_SHARE * free / engine.tokens_in_memory(model, free, kept=kept)
            assert running.max_tokens == engine.tokens_in_memory(model, free, kept=kind == "klein-kv")
        assert each[True] - each[False] == pytest.approx(2 * (1 + 1) * 256 * 4, abs=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": [flux2.picture(40, 80)]}, "request 1: image 1: Image too small"),
        ({"images": [flux2.picture(64, 640)]}, "request 1: image 1: Aspect ratio"),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(4, 96), "prompt_embeds_mask": torch.tensor([1, 1, 0, 0])},
            "prompt_embeds_mask masks tokens",
        ),
    ],
)
def test_requests_that_cannot_run(pipes, changes, message):
    with pytest.raises(ValueError, match=message):
        edit(pipes["klein"], [dataclasses.replace(requests("klein")[1], **changes)])


def test_models_that_cannot_run(make_flux2, pipes):
    pipe = flux2.pipeline(make_flux2("klein"), "klein")
    pipe.transformer.register_to_config(joint_attention_dim=128)
    with pytest.raises(ValueError, match="joint_attention_dim = 128, but its text encoder gives 96"):
        edit(pipe, requests("klein")[:1])


def test_a_transformer_that_another_kind_of_pipeline_has_changed(make_flux2):
    """A klein-KV pipeline replaces the attention processors of the transformer that it shares."""
    klein = flux2.pipeline(make_flux2("klein"), "klein")
    own = klein.transformer.attn_processors
    kv = flux2.pipeline(klein.transformer, "klein-kv")
    for call in (edit, estimate):
        with pytest.raises(ValueError, match="the attention processor Flux2KVAttnProcessor, which is that of another"):
            call(klein, requests("klein")[:1])
    assert estimate(kv, requests("klein-kv")[:1])
    klein.transformer.set_attn_processor(own)
    assert estimate(klein, requests("klein")[:1])
    with pytest.raises(ValueError, match=r"set the attention processors Flux2KVAttnProcessor \(blocks with two"):
        edit(kv, requests("klein-kv")[:1])


def test_schedulers_that_choose_their_noise_levels(make_flux2):
    from diffusers import UniPCMultistepScheduler

    pipe, request = flux2.pipeline(make_flux2("klein"), "klein"), requests("klein")[1]
    pipe.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        use_dynamic_shifting=True,
        time_shift_type="exponential",
    )
    (result,) = edit(pipe, [request], output_type="pt", progress=False)
    assert max_relative_error(result, stock(pipe, request)) < RELATIVE


def test_decoding_rounds_as_the_pipeline(make_flux2, monkeypatch):
    """The square root of the variance is taken in the dtype of the VAE, and rounded to that of the latents."""
    pipe = flux2.pipeline(make_flux2("klein"), "klein")
    seen, vae = [], pipe.vae
    monkeypatch.setattr(vae, "decode", lambda latents, return_dict: seen.append(latents) or [latents[:, :3]])
    latents = torch.randn(1, 24, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    family_of(pipe).decode(pipe, latents, (96, 64), "pt")
    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).bfloat16()
    image = latents.transpose(1, 2).unflatten(2, (4, 6)) * std + vae.bn.running_mean.view(1, -1, 1, 1).bfloat16()
    assert torch.equal(seen[0], pipe._unpatchify_latents(image).to(vae.dtype))


def test_estimate_with_sizes_of_images(pipes):
    """The guidance scale of dev is embedded there too."""
    request = requests("dev")[3]
    sizes = [[image.size for image in request.images]]
    found = estimate(pipes["dev"], [dataclasses.replace(request, images=[])], image_sizes=sizes)
    assert found.stages == estimate(pipes["dev"], [request]).stages


@pytest.mark.parametrize("kind", KINDS)
def test_estimate(pipes, kind):
    """Operations of Linears equal those that PyTorch counts in the packed forward."""
    from torch.utils.flop_counter import FlopCounterMode

    pipe, given = pipes[kind], requests(kind)[3:]
    found = estimate(pipe, given)
    text = 17 if kind == "dev" else 512
    assert found.tokens == {"text": text, "target": 24, "reference": 24 + 35 + 20, "together": text + 24 + 79}
    family, transformer = family_of(pipe), find_transformer(pipe)
    model = family.packed(transformer, impl="dense")
    layout = model.layout([request_geometry(pipe, given[0]).sample(text)])
    streams = torch.zeros(layout.image_length, 128), torch.zeros(layout.text_length, 96)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*streams, torch.ones(1), layout)
    linear, attention = family.transformer_flops(transformer.config, layout, model.visibility)
    assert linear == counter.get_total_flops()
    if kind != "klein-kv":
        assert attention == 4 * 256 * layout.joint_length * (layout.joint_length + 24)
    (transformer_stage,) = (stage for stage in found.stages if stage.name == "transformer")
    assert transformer_stage.activation_bytes > 0 and (found.kept_bytes > 0) == (kind == "klein-kv")
    assert found.computed_references == ((1,) if kind == "klein-kv" else (STEPS,))


# ---- training ----


@pytest.mark.parametrize("distilled, steps", [(False, 50), (True, 4)])
def test_times_of_training_have_the_shift_of_the_pipeline(make_flux2, distilled, steps):
    """Noise levels of a sampling schedule with the usual number of steps are evenly spaced times, shifted as here."""
    pipe = flux2.pipeline(make_flux2("klein"), "klein", distilled)
    family = family_of(pipe)
    for tokens in (16, 4096, 8000):
        shift = family.training_shift(pipe, tokens)
        sigmas = family.schedule(pipe, tokens, steps, "cpu").sigmas[:-1].tolist()
        assert sigmas == pytest.approx([shift_time(1 - i / steps, shift) for i in range(steps)], rel=1e-5)


def test_guidance_of_training(make_flux2):
    found = [family_of(model).training_guidance(model.config) for model in map(make_flux2, KINDS)]
    assert found == [None, None, 3.5]
