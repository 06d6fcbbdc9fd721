"""Tests of `edit` for the models of every family, against the pipeline of diffusers; a family's file has the rest."""

import dataclasses
import warnings
from functools import cached_property, partial

import fibo2
import flux1
import flux2
import flux3
import joyimage
import pytest
import qwen_image_21
import torch
import z_image
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import set_peft_model_state_dict

from uniref_fast import EditRequest, edit, patch, unpatch
from uniref_fast.family_demo import stock_edit
from uniref_fast.models.families import families, family_of
from uniref_fast.testing import max_relative_error

RELATIVE = 5e-5
"""Largest relative error, in float32, after the steps of an edit and the VAE."""

PICTURES = [flux2.picture(96, 64, 1), flux2.picture(80, 112, 2), flux2.picture(70, 90, 3)]


@dataclasses.dataclass(frozen=True)
class Kind:
    """Models of one kind.

    Attributes:
        family: Name of the family; that of the built-in model has tests of its own.
        make: Function of a dtype that returns a small pipeline.
        references: Numbers of references of the requests.
        sizes: Width and height of the results; None for the pipeline's own.
        scale: Guidance scale of the second request; 1 for models without guidance.
        negative: Negative prompt of the last request, which has guidance then.
        prompt: Function of a text that returns the prompt.
        kept: Value of `keep_references` with which adapters are tested too; None for models that are tested in
            `tests/test_families.py` only.
    """

    family: str
    make: object
    references: tuple = (0, 1, 3)
    sizes: tuple = ((64, 96), (None, None), (80, 64))
    scale: float = 3.0
    negative: str | None = "green"
    prompt: object = str
    kept: object = None


GIVEN = ((96, 64), (64, 80), (80, 80))  # these pipelines make large images otherwise


def _flux1(kind, dtype):
    return flux1.pipeline(flux1.transformer(kind, dtype, layers=1, single_layers=1), kind)


def _flux2(kind, dtype):
    return flux2.pipeline(flux2.transformer(kind, dtype, layers=1, single_layers=1), kind)


def _flux3(flow_map, dtype):
    return flux3.pipeline(flux3.transformer(dtype, flow_map, layers=1, single_layers=1))


KINDS = {
    "kontext": Kind("flux1", partial(_flux1, "kontext"), (1, 0, 1), GIVEN, negative=None),
    "longcat": Kind("longcat-image-edit", partial(_flux1, "longcat"), (1, 1), GIVEN),
    "fibo": Kind("fibo-edit", partial(_flux1, "fibo"), (1, 0, 3), GIVEN, prompt=partial(flux1.prompt, "fibo")),
    "klein": Kind("flux2", partial(_flux2, "klein"), negative=None),
    "klein-kv": Kind("flux2", partial(_flux2, "klein-kv"), scale=1.0, negative=None),
    "dev": Kind("flux2", partial(_flux2, "dev"), negative=None),
    "flux3": Kind("flux3", partial(_flux3, False)),
    "flux3 flow map": Kind("flux3", partial(_flux3, True), scale=1.0, negative=None),
    "joyimage": Kind("joyimage-edit-plus", joyimage.pipeline, (0, 2, 6)),
    "qwen-image-2.1": Kind("qwen-image-2.1", qwen_image_21.pipeline, (0, 2, 6), kept=True),
    "z-image": Kind("z-image", lambda dtype: z_image.pipeline(z_image.transformer(dtype, layers=1)), (0, 2, 6), kept=2),
    "fibo-2": Kind("fibo-2", lambda dtype: fibo2.pipeline(fibo2.transformer(dtype)), (0, 2, 5), kept=2),
}
TEXTS = ["a red cat", "make it blue", "put both on a table, and then the third one under it"]


class Case:
    """A pipeline in float32, requests that differ, and their results."""

    def __init__(self, name):
        self.name, self.kind = name, KINDS[name]
        self.pipe = self.kind.make(torch.float32)

    @cached_property
    def requests(self):
        """Requests with other prompts, references, sizes, guidance scales and numbers of steps."""
        made, last = [], len(self.kind.references) - 1
        for i, count in enumerate(self.kind.references):
            width, height = self.kind.sizes[i]
            guided = i == 1 or (i == last and self.kind.negative is not None)
            negative = self.kind.negative if i == last else None
            if guided and self.name == "qwen-image-2.1":  # which has no guidance without one
                negative = negative or " "
            images = [*PICTURES[-count:], *PICTURES][:count] if count else ()
            steps = 2 if i else 3 if self.name == "qwen-image-2.1" else 1  # whose scheduler needs two
            made.append(
                EditRequest(
                    self.kind.prompt(TEXTS[i]), images, negative, self.kind.scale if guided else 1.0, width=width,
                    height=height, num_inference_steps=steps, seed=i,
                )
            )  # fmt: skip
        if self.pipe.text_encoder is None:  # unlike lengths of text
            generator = torch.Generator().manual_seed(0)
            texts = [torch.randn(n, 96, generator=generator) for n in (5, 9, 1)]
            made = [dataclasses.replace(r, prompt=None, prompt_embeds=x) for r, x in zip(made, texts, strict=True)]
        return made

    @cached_property
    def results(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # guidance has an effect
            return edit(self.pipe, self.requests, output_type="pt", progress=False)


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    return Case(request.param)


def stock(pipe, request):
    return stock_edit(family_of(pipe), pipe, request)


def test_every_family_is_tested_here():
    assert {kind.family for kind in KINDS.values()} | {"qwen-image-edit"} == {family.name for family in families()}


def test_a_pack_of_different_requests_equals_the_pipeline_one_by_one(case):
    assert family_of(case.pipe).name == case.kind.family
    for request, result in zip(case.requests, case.results, strict=True):
        expected = stock(case.pipe, request)
        assert result.shape == expected.shape and max_relative_error(result, expected) < RELATIVE, request


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="bfloat16 products without instructions for them")
def test_results_have_the_same_bits_alone_and_in_a_pack(case):
    pipe = case.kind.make(torch.bfloat16)
    together = edit(pipe, case.requests, output_type="latent", progress=False)
    for request, result in zip(case.requests, together, strict=True):
        assert torch.equal(result, edit(pipe, [request], output_type="latent", progress=False)[0]), request


def test_several_images_and_a_lora_for_each_request(case):
    """A file loads into the patched pipeline; its requests, alone and in a pack, equal the pipeline with the adapter.

    diffusers loads no files for LongCat-Image and JoyImage-Edit-Plus, whose adapters peft adds.
    """
    pipe, index = case.kind.make(torch.float32), min(1, len(case.requests) - 2)
    report = patch(pipe)
    _load_adapter(pipe)
    layers = [module for module in pipe.transformer.modules() if isinstance(module, BaseTunerLayer)]

    def use(scale):
        for layer in layers:
            layer.enable_adapters(scale is not None)
            if scale is not None:
                layer.set_scale("a", scale)

    one, two = case.requests[index : index + 2]
    seeds, base = (one.seed, 8), case.results[index]
    one = dataclasses.replace(one, num_images=2, seed=[*seeds])
    both = [dataclasses.replace(one, lora={"a": 0.8}), dataclasses.replace(two, lora={})]
    use(None)
    images, other = edit(pipe, both, output_type="pt", progress=False)
    assert max_relative_error(other, case.results[index + 1]) < RELATIVE
    use(0.8)
    first, second = (dataclasses.replace(one, num_images=1, seed=seed) for seed in seeds)
    patched = stock(pipe, first)
    if case.kind.kept is not None:
        options = {"keep_references": case.kind.kept, "output_type": "pt", "progress": False}
        (kept,) = edit(pipe, [first], **options)
        use(None)
        assert max_relative_error(edit(pipe, both, **options)[0][0], kept) < RELATIVE
        use(0.8)
    assert all("modulation" in reason for reason in report.fallbacks), "FLUX.3 computes that of an adapter itself"
    unpatch(pipe)
    for image, expected in zip(images, (patched, stock(pipe, second)), strict=True):
        assert max_relative_error(image, expected) < RELATIVE
    assert max_relative_error(images[0], base) > 50 * RELATIVE
    if hasattr(pipe, "unload_lora_weights"):
        pipe.unload_lora_weights()
        assert max_relative_error(edit(pipe, [first], output_type="pt", progress=False)[0], base) < RELATIVE


def _load_adapter(pipe):
    """Load a LoRA of all Linears with the name "a"."""
    torch.manual_seed(0)
    linears = {name: each for name, each in pipe.transformer.named_modules() if isinstance(each, torch.nn.Linear)}
    weights = {}
    for name, linear in linears.items():
        for side, shape in (("A", (4, linear.in_features)), ("B", (linear.out_features, 4))):
            weights[f"{name}.lora_{side}.weight"] = torch.randn(shape) * 0.05
    if hasattr(pipe, "load_lora_weights"):
        pipe.load_lora_weights({f"transformer.{name}": x for name, x in weights.items()}, adapter_name="a")
    else:
        inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=[*linears]), pipe.transformer, "a")
        set_peft_model_state_dict(pipe.transformer, weights, adapter_name="a")
