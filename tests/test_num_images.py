"""Several images of one request, which share its encoding."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import FlowMatchLCMScheduler, UniPCMultistepScheduler
from PIL import Image

import uniref_fast
from uniref_fast import EditReport, EditRequest, Engine
from uniref_fast.edit_loop import EditLoop
from uniref_fast.models.kept_references import KeptReferences, empty_stores
from uniref_fast.testing import max_relative_error

pytestmark = pytest.mark.usefixtures("threads")

SEEDS = [3, 8, 5]


@pytest.fixture(scope="module")
def pipe():
    return uniref_fast.builtin.load(torch.bfloat16)


def request(**fields):
    images = [Image.new("RGB", size, color) for size, color in (((40, 30), "red"), ((30, 50), "blue"))]
    given = {"images": images, "height": 32, "width": 48, "num_inference_steps": 3, "seed": SEEDS}
    given |= {"num_images": 3, "negative_prompt": " ", "true_cfg_scale": 2.0} | fields
    return EditRequest("put both on a table", **given)


def edit(pipe, requests, **options):
    return uniref_fast.edit(pipe, requests, **({"progress": False, "output_type": "latent"} | options))


def single(seed, **fields):
    return request(**({"num_images": 1} | fields | {"seed": seed}))


@pytest.mark.parametrize("options", [
    {}, {"pack_tokens": 150}, {"keep_references": "auto"}, {"mode": "fast", "impl": "reference"},
    {"visibility": "reference_causal", "keep_references": True},
], ids=["default", "small packs", "kept references", "8 bits", "exact kept references"])  # fmt: skip
def test_images_equal_those_of_separate_requests(pipe, options):
    """Bit for bit in bfloat16, beside another request."""
    separate = edit(pipe, [single(seed) for seed in SEEDS], **options)
    images, other = edit(pipe, [request(), single(1, negative_prompt=None, true_cfg_scale=1.0)], **options)
    assert len(images) == 3 and all(torch.equal(a, b) for a, b in zip(images, separate, strict=True))
    assert other.shape == images[0].shape == (1, 24, 64)
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize("scheduler", [FlowMatchLCMScheduler, UniPCMultistepScheduler])
def test_images_of_other_schedulers(pipe, monkeypatch, scheduler):
    """A stochastic one draws the noise of each image from its seed; one with several stages keeps its state."""
    extra = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if "UniPC" in scheduler.__name__ else {}
    monkeypatch.setattr(pipe, "scheduler", scheduler.from_config(pipe.scheduler.config, **extra))
    separate = edit(pipe, [single(seed) for seed in SEEDS])
    (images,) = edit(pipe, [request()])
    assert all(torch.equal(a, b) for a, b in zip(images, separate, strict=True))


@pytest.mark.parametrize("seeds", [7, SEEDS], ids=["one generator", "a generator for each image"])
def test_noise_is_drawn_as_for_num_images_per_prompt(builtin_pipe, seeds):
    """The images equal those of the stock pipeline within the float32 tolerance."""
    generator = [torch.Generator().manual_seed(seed) for seed in seeds] if isinstance(seeds, list) else (
        torch.Generator().manual_seed(seeds))  # fmt: skip
    ours = request(seed=seeds)
    expected = builtin_pipe(
        image=list(ours.images), prompt=ours.prompt, negative_prompt=" ", true_cfg_scale=2.0, height=32, width=48,
        num_inference_steps=3, num_images_per_prompt=3, generator=generator, output_type="pt",
    ).images  # fmt: skip
    (images,) = edit(builtin_pipe, [ours], output_type="pt")
    assert all(max_relative_error(a, b) < 1e-4 for a, b in zip(images, expected, strict=True))
    assert max_relative_error(images[0], expected[1]) > 1e-2


def test_generators_and_latents_of_each_image(pipe):
    (images,) = edit(pipe, [request()])
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    (drawn,) = edit(pipe, [request(seed=None, generator=generators)])
    assert all(torch.equal(a, b) for a, b in zip(images, drawn, strict=True))
    noise = torch.randn(3, 24, 64, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    (given,) = edit(pipe, [request(latents=noise)])
    separate = edit(pipe, [single(0, latents=noise[i : i + 1]) for i in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(given, separate, strict=True))


def test_a_request_is_encoded_once(pipe, monkeypatch):
    calls = []
    for name in ("encode_prompt", "_encode_vae_image"):
        original = getattr(pipe, name)
        monkeypatch.setattr(
            pipe, name, lambda *args, original=original, name=name, **kw: calls.append(name) or original(*args, **kw)
        )
    edit(pipe, [request()])
    assert sorted(calls) == ["_encode_vae_image"] * 2 + ["encode_prompt"] * 2


def test_the_report_names_the_images(pipe):
    report = EditReport(compare=True)
    edit(pipe, [single(1), request()], report=report, keep_references=2)
    names = [(each.request, each.prediction) for each in report.references]
    assert names == [(0, "prompt"), (0, "negative prompt"), *(
        (1, f"{name} of image {i}") for i in (1, 2, 3) for name in ("prompt", "negative prompt"))]  # fmt: skip
    assert len(report.latent_errors) == 2


@pytest.mark.parametrize("pack_tokens", [None, 150])
def test_images_share_the_keys_of_their_references_where_that_is_exact(pipe, monkeypatch, pack_tokens):
    """Each prompt has one copy, also in the next steps and after a restart of the engine."""
    stores, step = [], EditLoop.step

    def seen(loop):
        stores.append([edit.kept for edit in loop.edits])
        return step(loop)

    monkeypatch.setattr(EditLoop, "step", seen)
    report = EditReport()
    options = {"visibility": "reference_causal", "keep_references": True, "pack_tokens": pack_tokens}
    edit(pipe, [request()], report=report, **options)
    assert {each.refreshed for each in report.references} == {(0,)} and len(report.references) == 6
    assert {each.steps for each in report.references} == {3}
    ((kept,), *_) = stores
    planned = {name: value for name, value in options.items() if name != "pack_tokens"}
    assert uniref_fast.estimate(pipe, [request()], **planned).kept_bytes == sum(
        each.kept_bytes for each in report.references[:2]
    )
    for each in (kept, empty_stores(kept)):
        copies = [id(store._blocks) for store in each]
        assert copies == copies[:2] * 3 and copies[0] != copies[1]
    assert len({id(store._blocks) for store in empty_stores([KeptReferences(), KeptReferences()])}) == 2
    stores.clear()
    edit(pipe, [request()], keep_references=2, pack_tokens=pack_tokens)
    assert len({id(store._blocks) for store in stores[0][0]}) == 6, "not exact: each sequence has its own"


def test_an_engine_gives_the_same_images(pipe):
    previews = []
    with Engine(pipe) as engine:
        future = engine.submit(request(), lambda progress: previews.append(progress.preview()))
        latents = engine.submit(request(), output_type="latent")
        images = future.result(60)
        assert all(torch.equal(a, b) for a, b in zip(latents.result(60), edit(pipe, [request()])[0], strict=True))
    expected = edit(pipe, [single(seed) for seed in SEEDS], output_type="pil")
    assert all(np.array_equal(a, b) for a, b in zip(images, expected, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(previews[-1], images, strict=True)) and len(previews) == 3


def test_an_engine_counts_the_tokens_of_all_images(pipe):
    """Two requests of three images each are more tokens than fit, and run one after the other."""
    tokens = uniref_fast.estimate(pipe, [request()]).tokens["together"]
    assert tokens == 3 * uniref_fast.estimate(pipe, [single(1)]).tokens["together"]
    order = []
    with Engine(pipe, max_tokens=tokens * 3 // 2) as engine:
        futures = [engine.submit(request(), lambda _, i=i: order.append(i)) for i in range(2)]
        assert all(future.result(60) for future in futures)
    assert order == [0] * 3 + [1] * 3


@pytest.mark.parametrize(
    "fields, error, message",
    [
        ({"num_images": 0}, ValueError, "request 1: num_images must be at least 1"),
        ({"num_images": 2.0}, TypeError, "num_images must be an int, got 2.0"),
        ({"num_images": None}, TypeError, "num_images must be an int"),
        ({"seed": [1, 2]}, ValueError, "seed has 2 items for num_images=3"),
        ({"seed": [1, 2, "3"]}, TypeError, "seed must be an int, or a list with one for each image"),
        ({"seed": [1, 2, 2**70]}, ValueError, "64 bits"),
        ({"seed": [1, 2, None]}, TypeError, "seed must be an int"),
        ({"seed": None, "generator": [torch.Generator()]}, ValueError, "generator has 1 items for num_images=3"),
        ({"latents": torch.zeros(1, 24, 64)}, ValueError, r"needs \[3, 24, 64\]"),
    ],
)
def test_wrong_numbers(pipe, fields, error, message):
    with pytest.raises(error, match=message):
        edit(pipe, [request(**fields)])


def test_the_estimate_counts_every_image(pipe):
    one, three = (uniref_fast.estimate(pipe, [each]) for each in (single(1), request()))
    costs = {stage.name: stage.flops for stage in one.stages}
    factors = {stage.name: stage.flops / costs[stage.name] for stage in three.stages}
    assert factors["text encoder"] == factors["VAE encode"] == 1
    assert factors["transformer"] == factors["VAE decode"] == 3 and len(three.results) == 3
    assert dataclasses.replace(request(), num_images=1, seed=1) == single(1)
