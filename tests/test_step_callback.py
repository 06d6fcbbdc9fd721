"""`callback_on_step_end` of a request, as in diffusers."""

import dataclasses
import threading

import pytest
import torch
from PIL import Image

import uniref_fast
from uniref_fast import EditReport, EditRequest, Engine

pytestmark = pytest.mark.usefixtures("threads")

STEPS = 4


@pytest.fixture(scope="module")
def pipe():
    return uniref_fast.builtin.load(torch.bfloat16)


def request(seed=1, **fields):
    given = {"images": [Image.new("RGB", (40, 30), "red")], "height": 32, "width": 48, "num_inference_steps": STEPS,
             "true_cfg_scale": 1.0}  # fmt: skip
    return EditRequest("make it night", **(given | {"seed": seed} | fields))


def edit(pipe, requests, **options):
    return uniref_fast.edit(pipe, requests, progress=False, output_type="latent", **options)


def stock(pipe, request, **options):
    return pipe(
        image=list(request.images), prompt=request.prompt, height=request.height, width=request.width,
        true_cfg_scale=request.true_cfg_scale or 4.0, negative_prompt=request.negative_prompt,
        num_inference_steps=STEPS, generator=torch.Generator().manual_seed(request.seed), output_type="latent",
        **options,
    ).images  # fmt: skip


def changed(pipe, step, timestep, tensors):
    """Replace one tensor, change another in place, and interrupt after the third of four steps."""
    if "latents" in tensors:
        tensors["latents"] = tensors["latents"] * 0.9
    if "prompt_embeds" in tensors and step == 0:
        tensors["prompt_embeds"].mul_(-1)
    if step == 2:
        pipe._interrupt = True
    return tensors


@pytest.mark.parametrize("names", [("latents",), ("latents", "prompt_embeds"), ("prompt_embeds",)], ids="+".join)
def test_a_callback_changes_its_edit_as_in_the_stock_pipeline(pipe, names):
    """Stock is exact in float32 only, so the bounds are far apart: equal within bfloat16, or changed."""
    ours = request(callback_on_step_end=changed, callback_on_step_end_tensor_inputs=names)
    plain = request()
    result, other = edit(pipe, [ours, plain])
    (alone,), (unchanged,) = edit(pipe, [ours]), edit(pipe, [plain])
    assert torch.equal(result, alone) and torch.equal(other, unchanged), "the other edit does not see the callback"
    if "prompt_embeds" in names:
        others = [name for name in names if name != "prompt_embeds"]
        without = dataclasses.replace(ours, callback_on_step_end_tensor_inputs=others)
        assert not torch.equal(edit(pipe, [without])[0], result), "the embeddings count from the next step on"
    pipe._interrupt = False
    expected = stock(pipe, plain, callback_on_step_end=changed, callback_on_step_end_tensor_inputs=list(names))
    pipe._interrupt = False
    error = (result - expected).norm() / expected.norm()
    assert error < 0.02 < (unchanged - expected).norm() / expected.norm()


def test_what_a_callback_sees(pipe):
    seen = []

    def callback(given, step, timestep, tensors):
        seen.append((step, timestep.item(), given.num_timesteps, given.guidance_scale, given._interrupt))
        assert given.vae is pipe.vae and given.scheduler is not pipe.scheduler
        assert given.current_timestep == timestep and tensors["latents"].shape == (2, 24, 64)
        assert tensors["prompt_embeds"].shape[0] == 1
        with pytest.raises(AttributeError, match="cannot set 'guidance_scale' of the pipeline, which all running"):
            given.guidance_scale = 1.0

    names = ["latents", "prompt_embeds"]
    edit(pipe, [request(num_images=2, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)])
    assert [each[0] for each in seen] == [0, 1, 2, 3] and {each[2:] for each in seen} == {(STEPS, 1.0, False)}
    assert [each[1] for each in seen] == sorted((each[1] for each in seen), reverse=True)


@pytest.mark.parametrize("in_place", [True, False])
def test_other_embeddings_compute_kept_references_again(pipe, in_place):
    def callback(given, step, timestep, tensors):
        if step == 0:
            embeds = tensors["prompt_embeds"]
            return {"prompt_embeds": embeds.mul_(0.5) if in_place else embeds * 0.5}
        return tensors

    report = EditReport()
    changing = request(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    edit(pipe, [changing, request()], keep_references=3, report=report)
    assert [each.refreshed for each in report.references] == [(0, 1), (0, 3)]


@pytest.mark.parametrize(
    "returned, error, message",
    [
        (5, TypeError, "must return a dict of tensors, got int"),
        ({"latents": 1}, TypeError, "must return a tensor as latents, got int"),
        ({"latents": torch.zeros(2)}, ValueError, r"latents of shape \[2\] instead of \[1, 24, 64\]"),
        ({"sigmas": torch.zeros(2)}, ValueError, "returned 'sigmas'; it can replace latents and prompt_embeds"),
    ],
)
def test_wrong_results_of_a_callback(pipe, returned, error, message):
    bad = request(callback_on_step_end=lambda *_: returned)
    with pytest.raises(error, match=message):
        edit(pipe, [bad])


@pytest.mark.parametrize(
    "fields, error, message",
    [
        ({"callback_on_step_end": 5}, TypeError, "callback_on_step_end must be a function"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, TypeError, "must be a list of names"),
        ({"callback_on_step_end_tensor_inputs": ["image"]}, ValueError, "latents and prompt_embeds, got .'image'"),
    ],
)
def test_wrong_callbacks(pipe, fields, error, message):
    with pytest.raises(error, match=message):
        edit(pipe, [request(**fields)])


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit])
def test_callbacks_in_an_engine(pipe, error):
    """One edit is interrupted, one fails; the third one has the bits of `edit` alone."""
    ready = threading.Event()

    def fails(given, step, timestep, tensors):
        if step == 1:
            raise error

    def waits(progress):
        assert ready.wait(60)

    with Engine(pipe) as engine:
        futures = [
            engine.submit(each, on_progress, output_type="latent")
            for each, on_progress in (
                (request(1), waits),
                (request(2, callback_on_step_end=changed), None),
                (request(3, callback_on_step_end=fails), None),
            )
        ]
        ready.set()
        results = [future.exception(60) or future.result(60) for future in futures]
    assert isinstance(results[2], error) and engine.stats().failed == 1 and engine.stats().finished == 2
    assert torch.equal(results[0], edit(pipe, [request(1)])[0])
    assert torch.equal(results[1], edit(pipe, [request(2, callback_on_step_end=changed)])[0])
