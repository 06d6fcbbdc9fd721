"""patch of the modular pipelines of diffusers whose transformer belongs to a family."""

import diffusers
import flux2
import pytest
import qwen_image_21
import torch

import uniref_fast
from uniref_fast import builtin
from uniref_fast.testing import max_relative_error

RELATIVE = 1e-4
"""Largest relative error of latents in float32 after two steps of models that amplify rounding."""

PICTURES = [flux2.picture(64, 64, 1), flux2.picture(64, 80, 2)]


@pytest.fixture(scope="module")
def components(make_flux2):
    """Returns the components of a small pipeline by its name."""
    made = {}

    def of(name):
        if name not in made:
            pipe = {
                "qwen": builtin.load,
                "qwen21": lambda: qwen_image_21.pipeline(area=64 * 64),
                "klein": lambda: flux2.pipeline(make_flux2("klein")),
                "dev": lambda: flux2.pipeline(make_flux2("dev"), "klein"),
            }[name]()
            made[name] = dict(pipe.components)
        return made[name]

    return of


def modular(name, components, monkeypatch):
    """Return a modular pipeline with the components that it has in common with another pipeline."""
    from diffusers.modular_pipelines.qwenimage import encoders
    from diffusers.modular_pipelines.qwenimage21 import encoders as encoders_21

    for module in (encoders, encoders_21):  # these pipelines take no other size of references
        monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: (64, 64, None))
    pipe = getattr(diffusers, name)()
    pipe.update_components(**{key: value for key, value in components.items() if key in pipe.component_names and value})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe, **given):
    generator = torch.Generator().manual_seed(0)
    options = {"prompt": "an owl", "height": 64, "width": 64, "num_inference_steps": 2, "output_type": "pt"}
    images = pipe(**options | given, generator=generator).images
    return images if torch.is_tensor(images) else torch.stack([*images])


@pytest.mark.parametrize(
    "name, parts, given",
    [
        ("QwenImageModularPipeline", "qwen", {"negative_prompt": " "}),
        ("QwenImageEditModularPipeline", "qwen", {"negative_prompt": " ", "image": PICTURES[0]}),
        ("QwenImageEditPlusModularPipeline", "qwen", {"negative_prompt": " ", "image": PICTURES}),
        ("QwenImage21ModularPipeline", "qwen21", {"image": PICTURES}),
        ("QwenImage21TurboModularPipeline", "qwen21", {"image": PICTURES}),
        ("Flux2KleinModularPipeline", "klein", {"image": PICTURES}),
        ("Flux2KleinBaseModularPipeline", "klein", {"image": PICTURES}),
        ("Flux2ModularPipeline", "dev", {"image": PICTURES, "text_encoder_out_layers": (9, 18, 27)}),
    ],
)
def test_a_patched_modular_pipeline_equals_the_stock_one(components, name, parts, given, monkeypatch):
    pipe = modular(name, components(parts), monkeypatch)
    expected = call(pipe, **given)
    report = uniref_fast.patch(pipe)
    try:
        assert max_relative_error(call(pipe, **given), expected) < RELATIVE
        assert report.calls.total() and not report.fallbacks and not report.notes and report.max_rel_error < 1e-3
    finally:
        assert uniref_fast.unpatch(pipe)


def test_references_are_kept_in_a_modular_pipeline(components, monkeypatch):
    pipe = modular("QwenImageEditPlusModularPipeline", components("qwen"), monkeypatch)
    given = {"negative_prompt": " ", "image": PICTURES}
    expected = call(pipe, **given)
    report = uniref_fast.patch(pipe, keep_references=2)
    try:
        result = call(pipe, **given)
        assert RELATIVE < max_relative_error(result, expected) < 0.5
        assert report.references and not report.references_not_kept
    finally:
        uniref_fast.unpatch(pipe)


def test_edit_names_the_pipeline_that_it_takes_instead(components, monkeypatch):
    pipe = modular("Flux2KleinModularPipeline", components("klein"), monkeypatch)
    with pytest.raises(
        TypeError, match=r"Flux2KleinModularPipeline is not supported; .* take a Flux2KleinPipeline .*patch"
    ):
        uniref_fast.edit(pipe, [{"prompt": "x"}])
