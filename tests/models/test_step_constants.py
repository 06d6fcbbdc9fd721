"""The text stream is computed once for all steps of a pack, with the same bits, and again where something changed."""

import pytest
import torch
from peft import LoraConfig
from PIL import Image

import uniref_fast
from uniref_fast import EditRequest, PackedQwenImage, Sample

SAMPLES = [Sample(5, (1, 4, 6), ((1, 3, 5),)), Sample(3, (1, 2, 4))]
STEPS = 3


@pytest.fixture
def model(make_transformer):
    return make_transformer(True)


@pytest.fixture
def text_products(model, monkeypatch):
    """The products with the weights of `txt_in`, one entry each."""
    return products(model.txt_in, monkeypatch)


def products(module, monkeypatch):
    found, linear = [], torch.nn.functional.linear
    weights = {id(p) for p in module.parameters()}

    def counted(x, weight, bias=None):
        found.extend([len(x)] if id(weight) in weights else [])
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    return found


def inputs(packed, seed=0):
    generator, layout = torch.Generator().manual_seed(seed), packed.layout(SAMPLES)
    image = torch.randn(layout.image_length, 64, generator=generator)
    return image, torch.randn(layout.text_length, 48, generator=generator), torch.rand(2, generator=generator), layout


def step(packed, given, constants=None):
    with torch.no_grad():
        return packed(*given, None, constants)


def test_computed_once_with_the_same_bits(model, text_products):
    packed = PackedQwenImage(model)
    image, text, _, layout = inputs(packed)
    constants = packed.step_constants()
    for i in range(STEPS):
        given = image + i, text, torch.full((2,), 0.9 - i / 4), layout
        assert torch.equal(step(packed, given, constants), step(packed, given))
    assert constants.computed == 1 and text_products == [8] * (STEPS + 1)


def hook(model):
    model.txt_in.register_forward_hook(lambda *call: None)


def pre_hook(model):
    model.txt_norm.register_forward_pre_hook(lambda *call: None)


def replaced_forward(model):
    forward = model.txt_in.forward
    model.txt_in.forward = lambda x: forward(x)


def casting(model):
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def dropout(model):
    model.add_adapter(LoraConfig(r=2, target_modules=["txt_in"], lora_dropout=0.5))
    model.train()


@pytest.mark.parametrize("change", [hook, pre_hook, replaced_forward, casting, dropout])
def test_computed_in_every_step_where_a_call_must_be_seen(model, change):
    change(model)
    packed = PackedQwenImage(model)
    constants, given = packed.step_constants(), inputs(packed)
    for _ in range(STEPS):
        step(packed, given, constants)
    assert constants.computed == 0


def test_computed_in_every_step_with_gradients(model):
    packed = PackedQwenImage(model)
    constants, given = packed.step_constants(), inputs(packed)
    step(packed, given, constants)
    packed(*given, None, constants).sum().backward()
    assert constants.computed == 1 and model.txt_in.weight.grad.any()


def weights(model, text):
    with torch.no_grad():
        model.txt_in.weight.mul_(1.5)


def new_parameter(model, text):
    model.txt_norm.weight = torch.nn.Parameter(model.txt_norm.weight.detach() * 1.5)


def adapter_scale(model, text):
    model.set_adapters(["a"], [0.5])


def adapter_off(model, text):
    model.disable_adapters()


def embeddings(model, text):
    text.mul_(1.5)


@pytest.mark.parametrize("change", [weights, new_parameter, adapter_scale, adapter_off, embeddings])
def test_computed_again_after_a_change(model, change):
    config = LoraConfig(r=2, target_modules=["txt_in"], init_lora_weights=False)
    model.add_adapter(config, adapter_name="a")
    packed = PackedQwenImage(model.eval())
    constants, given = packed.step_constants(), inputs(packed)
    before = step(packed, given, constants)
    change(model, given[1])
    after = step(packed, given, constants)
    assert torch.equal(after, step(packed, given)) and not torch.equal(after, before)
    assert constants.computed == 2
    image, text, t, layout = given
    assert torch.equal(step(packed, (image, text.clone(), t, layout), constants), after) and constants.computed == 3


def test_an_edit_computes_it_once_for_each_pack(builtin_pipe, monkeypatch):
    red = Image.new("RGB", (64, 64), "red")
    requests = [
        EditRequest(prompt, images, negative_prompt=" ", seed=1, height=64, width=64, num_inference_steps=steps)
        for prompt, images, steps in (("make it night", [red], STEPS), ("a red apple", [], STEPS - 1))
    ]
    found = products(builtin_pipe.transformer.txt_in, monkeypatch)

    def edited():
        found.clear()
        return uniref_fast.edit(builtin_pipe, requests, output_type="latent", progress=False), len(found)

    kept, count = edited()
    monkeypatch.setattr(PackedQwenImage, "step_constants", lambda self: None)
    computed, every_step = edited()
    assert (count, every_step) == (2, STEPS), "the second request leaves the pack before the last step"
    assert all(map(torch.equal, kept, computed))
