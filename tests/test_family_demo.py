"""Small pipelines with random weights of every family, and `uniref-fast demo --family`."""

import dataclasses
import inspect
import json

import numpy as np
import pytest
import torch
from PIL import Image

import uniref_fast
from uniref_fast import family_demo
from uniref_fast.cli import main
from uniref_fast.family_demo import demo_requests, run_family_demo, stock_edit
from uniref_fast.models.families import families, family_of
from uniref_fast.request import validated_one
from uniref_fast.testing import max_relative_error

SMALL = [
    pytest.param(family, name, id=name) for family in families() for name in family.random_pipelines()
]  # every class that the demo builds


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_every_family_builds_small_pipelines(family):
    assert family.random_pipelines(), "name a module of uniref_fast/random_models in `Family.random_models`"
    assert set(family.random_pipelines()) <= set(family.pipelines)


@pytest.mark.parametrize("family, name", SMALL)
def test_a_packed_edit_equals_the_calls_of_stock_arguments(family, name):
    state = torch.get_rng_state()
    pipe = family.random_pipeline(name, layers=1, grid=6)
    assert torch.equal(torch.get_rng_state(), state), "the weights do not depend on the global generator"
    assert family_of(pipe) is family
    requests = demo_requests(family, pipe, 6, 2, 2)[1:3]  # K = 1 and the most, with targets of two sizes
    assert len({(request.width, request.height) for request in requests}) == 2
    expected = [stock_edit(family, pipe, request) for request in requests]
    packed = uniref_fast.edit(pipe, requests, output_type="pt", progress=False)
    for result, image, request in zip(packed, expected, requests, strict=True):
        assert max_relative_error(result, image) < 1e-4 and image.std() > 1e-3
        assert image.shape[-2:] == (request.height, request.width)


def two_steps(pipe, patcher):
    """Let a call of a pipeline make two steps by default."""
    if "Modular" in type(pipe).__name__:
        blocks = [pipe._blocks]
        while blocks:
            block = blocks.pop()
            blocks += getattr(block, "sub_blocks", {}).values()
            if hasattr(block, "num_inference_steps"):
                patcher.setattr(block, "num_inference_steps", 2)
        return
    for kind in type(pipe).__mro__:
        call = vars(kind).get("__call__")
        function = inspect.unwrap(call) if call else None
        names = function.__code__.co_varnames[: function.__code__.co_argcount] if function else ()
        if "num_inference_steps" in names:
            values = dict(zip(names[-len(function.__defaults__) :], function.__defaults__, strict=True))
            patcher.setattr(function, "__defaults__", tuple((values | {"num_inference_steps": 2}).values()))
    if "__signature__" in vars(type(pipe).__call__):  # of the built-in model
        patcher.setattr(type(pipe).__call__, "__signature__", inspect.signature(type(pipe).__mro__[1].__call__))


@pytest.mark.parametrize("family, name", SMALL)
def test_a_request_without_settings_equals_the_call_without_them(family, name, monkeypatch):
    """Scale and negative prompt are those that the pipeline has by default, and so is the number of steps."""
    pipe = family.random_pipeline(name, layers=1, grid=6)
    request = demo_requests(family, pipe, 6, 1, 2)[0]
    nothing = {"true_cfg_scale": None, "num_inference_steps": None, "negative_prompt": None}
    request = dataclasses.replace(request, **nothing)
    two_steps(pipe, monkeypatch)
    arguments = family.stock_arguments(pipe, request)
    assert not {"negative_prompt", "num_inference_steps", "guidance_scale", "true_cfg_scale"} & set(arguments)
    expected = stock_edit(family, pipe, request)
    (image,) = uniref_fast.edit(pipe, [request], output_type="pt", progress=False)
    assert max_relative_error(image, expected) < 1e-4 and expected.std() > 1e-3
    assert validated_one(request, "request 1", pipe).num_inference_steps == 2


def test_the_weights_do_not_depend_on_the_call():
    family = families()[0]
    name = family.random_pipelines()[0]
    first, second = (family.random_pipeline(name, layers=1).transformer.state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    with pytest.raises(ValueError, match=f"no small Nothing can be built; {family.name} has {name}"):
        family.random_pipeline("Nothing")


def test_the_command_prints_figures_of_each_pipeline(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(family_demo, "GRID", 6)
    out = tmp_path / "sheet.png"
    arguments = ["demo", "--family", "qwen-image-2.1", "--out", str(out), "--num-inference-steps", "2"]
    arguments += ["--repeats", "1", "--references", "2"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (figures,) = found["pipelines"]
    assert (found["family"], found["weights"], figures["pipeline"]) == (
        "qwen-image-2.1",
        "random",
        "QwenImage21Pipeline",
    )
    assert figures["equal"] and 0 < figures["edit_error"] <= figures["tolerance"] == 1e-4
    assert figures["accelerated_calls"] > 0 and figures["original_calls"] == 0
    assert figures["references"] == [2, 1] * 3 and figures["packed_seconds"] > 0
    assert np.asarray(Image.open(out)).std() > 10


def test_a_result_that_differs_is_an_error(tmp_path, capsys, monkeypatch):
    figures = (2e-4, 1e-6, 1e-4, False, 2.0, 1.0, 2.0, 6.0, 3.0, 2.0, 8, 0)
    result = family_demo.PipelineResult("QwenImage21Pipeline", "prompts", (1, 2), *figures)
    sheet = Image.new("RGB", (8, 8))
    monkeypatch.setattr(family_demo, "run_family_demo", lambda family, **options: ([result], sheet))
    assert main(["demo", "--family", "qwen-image-2.1", "--out", str(tmp_path / "a.png")]) == 1
    printed = capsys.readouterr()
    assert "QwenImage21Pipeline" in printed.err and "max relative error 2.00e-04 (allowed 1.00e-04)" in printed.out
    assert (
        "random" in printed.out and "text          prompts" in printed.out and "packed 3.000 s (2.00x)" in printed.out
    )


@pytest.mark.slow
def test_bfloat16_is_compared_with_float32_of_the_same_weights(monkeypatch):
    """Two steps: later ones of a random model amplify rounding, and only a budget of the whole edit is compared."""
    monkeypatch.setattr(family_demo, "GRID", 6)
    family = family_demo.demo_family("flux2")
    monkeypatch.setattr(type(family), "random_pipelines", lambda self: ("Flux2Pipeline",))
    (result,), _ = run_family_demo(family, references=1, num_inference_steps=2, repeats=1, dtype=torch.bfloat16)
    assert result.equal and 1e-4 < result.tolerance < 0.1 and result.edit_error > 0
    assert result.text == "given embeddings: this small pipeline has no text encoder"


def test_an_unknown_family_is_an_error_with_the_nearest_name(tmp_path, capsys):
    assert main(["demo", "--family", "flux2klein", "--out", str(tmp_path / "a.png")]) == 2
    message = capsys.readouterr().err
    assert "'flux2klein'" in message and "nearest: flux2" in message and "qwen-image-edit" in message
