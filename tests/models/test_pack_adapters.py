"""LoRA of single requests in one pack: equal to the stock pipeline with that adapter, and to the request alone."""

import dataclasses
import threading

import pytest
import torch
from peft import LoKrConfig, LoraConfig
from PIL import Image

import uniref_fast
from uniref_fast import EditRequest, Engine
from uniref_fast.layout import Sample
from uniref_fast.models.pack_adapters import PackAdapters, tuner_layers
from uniref_fast.quantised_linear import is_quantised
from uniref_fast.testing import max_relative_error

pytestmark = pytest.mark.usefixtures("threads")

EVERY = ["to_q", "to_k", "to_out.0", "add_q_proj", "to_add_out", "img_mlp.net.2", "txt_mlp.net.0.proj", "img_mod.1",
         "txt_mod.1", "norm_out.linear", "proj_out", "img_in", "txt_in", "linear_1"]  # fmt: skip
"""Linears of both streams, of the modulation and of the ends."""


def with_adapters(pipe):
    """Add the adapters "a" and "b", of which none is active; they reach different layers."""
    torch.manual_seed(0)
    for name, targets in (("a", EVERY), ("b", ["to_q", "to_v", "img_mod.1", "add_k_proj"])):
        config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=targets)
        pipe.transformer.add_adapter(config, name)
    for name, parameter in pipe.transformer.named_parameters():
        if ".lora_" in name:
            parameter.data.mul_(0.3)
    pipe.transformer.disable_adapters()
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return with_adapters(uniref_fast.builtin.load(torch.bfloat16))


def request(seed=1, count=2, **fields):
    images = [Image.new("RGB", (40, 30), "red"), Image.new("RGB", (30, 50), "blue")][:count]
    given = {"images": images, "height": 32, "width": 48, "num_inference_steps": 2, "true_cfg_scale": 1.0}
    return EditRequest("put both on a table", **(given | {"seed": seed} | fields))


GUIDED = {"negative_prompt": " ", "true_cfg_scale": 2.0}


def mixed():
    """Requests with one adapter, two, another one, none and the pipeline's own, in an order that separates them."""
    return [
        request(1, lora={"a": 1.0}, **GUIDED),
        request(2, lora={"b": 0.5}, height=48),
        request(3, count=0, lora={"a": 1.0}),
        request(4, count=1, lora={"a": 0.7, "b": 1.2}),
        request(5, lora={}),
        request(6, count=1),
    ]


def edit(pipe, requests, **options):
    return uniref_fast.edit(pipe, requests, **({"progress": False, "output_type": "latent"} | options))


OPTIONS = {
    "default": {},
    "small packs": {"pack_tokens": 150},
    "kept references": {"keep_references": 2},
    "exact kept references": {"visibility": "reference_causal", "keep_references": True},
    "8 bits": {"mode": "fast", "impl": "reference", "modules_to_not_convert": ["transformer_blocks.0"]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_request_in_a_pack_has_the_bits_of_the_request_alone(pipe, name):
    together = edit(pipe, mixed(), **OPTIONS[name])
    for each, result in zip(mixed(), together, strict=True):
        assert torch.equal(result, edit(pipe, [each], **OPTIONS[name])[0]), each.lora
    state = {layer._active_adapter if isinstance(layer._active_adapter, str) else tuple(layer._active_adapter)
             for _, layer in tuner_layers(pipe.transformer)}  # fmt: skip
    assert state <= {"a", "b", ("a",), ("b",)} and all(layer.disable_adapters for _, layer in tuner_layers(
        pipe.transformer)), "the state of the layers is restored"  # fmt: skip
    assert not any(layer._forward_hooks for _, layer in tuner_layers(pipe.transformer))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_without_lora_a_request_has_the_active_adapters(dtype):
    """The same bits as in a call in which no request has a LoRA, and as in one that names these adapters."""
    pipe = with_adapters(uniref_fast.builtin.load(torch.bfloat16))
    for name, parameter in pipe.transformer.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)
    pipe.transformer.set_adapters(["b", "a"], [0.5, 0.8])
    pipe.transformer.enable_adapters()
    expected = edit(pipe, [request(6)])[0]
    named = edit(pipe, [request(6, lora={"b": 0.5, "a": 0.8})])[0]
    mixed_with = edit(pipe, [request(6), request(1, lora={})])
    pipe.transformer.disable_adapters()
    base = edit(pipe, [request(6), request(1)])
    assert torch.equal(mixed_with[0], expected) and torch.equal(named, expected)
    assert torch.equal(mixed_with[1], base[1]) and not torch.equal(base[0], expected)


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_each_result_equals_the_stock_pipeline_with_that_adapter(make_lora, kind):
    """The results are equal within the float32 tolerance of the loop; adapters change them by far more."""
    pipe = make_lora(kind)
    requests = [request(1, lora={"a": 1.0}, **GUIDED), request(2, lora={"b": 0.5}), request(3, lora={})]
    results = edit(pipe, requests)
    for each, result in zip(requests, results, strict=True):
        if each.lora:
            pipe.transformer.enable_adapters()
            pipe.transformer.set_adapters(list(each.lora), list(each.lora.values()))
        else:
            pipe.transformer.disable_adapters()
        expected = pipe(
            image=list(each.images), prompt=each.prompt, negative_prompt=each.negative_prompt, height=32, width=48,
            true_cfg_scale=each.true_cfg_scale or 4.0, num_inference_steps=2, output_type="latent",
            generator=torch.Generator().manual_seed(each.seed),
        ).images  # fmt: skip
        pipe.transformer.disable_adapters()
        error = max_relative_error(result, expected)
        assert error < 1e-4, each.lora
        plain = edit(pipe, [dataclasses.replace(each, lora={})])[0]
        assert not each.lora or max_relative_error(plain, expected) > 1e-3


@pytest.fixture
def make_lora():
    def make(kind):
        pipe = uniref_fast.builtin.load()
        pipe.set_progress_bar_config(disable=True)
        torch.manual_seed(0)
        common = {"init_lora_weights": False, "target_modules": EVERY}
        for name in "ab":
            if kind == "lokr":
                config = LoKrConfig(r=4, alpha=8, init_weights=False, target_modules=EVERY)
            else:
                config = LoraConfig(r=4, lora_alpha=8, use_dora=kind == "dora", **common)
            pipe.transformer.add_adapter(config, name)
        pipe.transformer.eval()
        for name, parameter in pipe.transformer.named_parameters():
            if ".lora_A." in name or ".lora_B." in name or ".lokr_" in name:
                parameter.data.mul_(0.3)
        pipe.transformer.disable_adapters()
        return pipe

    return make


def test_adapters_compute_the_rows_of_their_samples_only(pipe, monkeypatch):
    """One product serves several samples that have the same adapter."""
    calls = []
    layer = pipe.transformer.transformer_blocks[1].attn.to_q
    original = layer.lora_A["a"].forward
    monkeypatch.setattr(layer.lora_A["a"], "forward", lambda x: calls.append(len(x)) or original(x))
    model = uniref_fast.edit_session.EditSession(pipe).model
    samples = [Sample(4, (1, 3, 2), ((1, 2, 2),)), Sample(2, (1, 1, 5)), Sample(3, (1, 2, 4))]
    layout = model.layout(samples)
    image, text = torch.zeros(layout.image_length, 64), torch.zeros(layout.text_length, 128)
    t = torch.full((3,), 0.5)
    with torch.no_grad():
        adapters = model.pack_adapters([{"a": 1.0}, {"b": 1.0}, {"a": 1.0}])
        model(image.bfloat16(), text.bfloat16(), t.bfloat16(), layout, adapters=adapters)
    assert calls == [6 + 4 + 8]


def test_several_images_and_kept_references_of_one_request(pipe):
    images, _ = edit(pipe, [request(seed=[4, 5], num_images=2, lora={"a": 1.0}), request(3)], keep_references=2)
    for seed, image in zip((4, 5), images, strict=True):
        assert torch.equal(image, edit(pipe, [request(seed, lora={"a": 1.0})], keep_references=2)[0])


def test_each_edit_of_an_engine_has_its_own_lora(pipe):
    """Edits join while others run."""
    arrived = threading.Event()
    with Engine(pipe) as engine:
        first = engine.submit(request(9, num_inference_steps=4, lora={"b": 1.0}), lambda _: arrived.wait(60),
                              output_type="latent")  # fmt: skip
        futures = [engine.submit(each, output_type="latent") for each in mixed()]
        with pytest.raises(ValueError, match="adapter 'c', and loaded are a, b"):
            engine.submit(request(lora={"c": 1.0}))
        arrived.set()
        results = [future.result(60) for future in futures]
        assert torch.equal(first.result(60), edit(pipe, [request(9, num_inference_steps=4, lora={"b": 1.0})])[0])
    for each, result in zip(mixed(), results, strict=True):
        assert torch.equal(result, edit(pipe, [each])[0])


def test_compiled_blocks_run_uncompiled_with_the_reason(pipe):
    expected = edit(pipe, [request(lora={"a": 1.0})])[0]
    model = uniref_fast.PackedQwenImage(pipe.transformer)
    model.compile_repeated_blocks(backend="eager")
    with pytest.warns(UserWarning, match="uncompiled, because samples have their own LoRA"):
        (result,) = edit(pipe, [request(lora={"a": 1.0})], model=model)
    assert torch.equal(result, expected)


def test_8_bit_layers_keep_their_adapters_in_16_bits(pipe, monkeypatch):
    seen = []
    layer = pipe.transformer.transformer_blocks[1].attn.to_q
    original = layer.lora_A["a"].forward
    monkeypatch.setattr(
        layer.lora_A["a"], "forward", lambda x: seen.append((type(x), x.dtype, is_quantised(layer))) or original(x)
    )
    edit(pipe, [request(lora={"a": 1.0})], **(OPTIONS["8 bits"] | {"modules_to_not_convert": ["img_mod"]}))
    assert set(seen) == {(torch.Tensor, torch.bfloat16, True)}


@pytest.mark.parametrize(
    "lora, error, message",
    [
        ({"c": 1.0}, ValueError, "request 2: lora has the adapter 'c', and loaded are a, b; load it with "),
        ({"a": "1"}, TypeError, "the scale of the adapter 'a' must be a number, got '1'"),
        ({"a": float("nan")}, ValueError, "must be finite"),
        (["a"], TypeError, "lora must be a mapping from names of adapters to scales, got .'a'."),
        ("a", TypeError, "must be a mapping"),
    ],
)  # fmt: skip
def test_wrong_lora(pipe, lora, error, message):
    with pytest.raises(error, match=message):
        edit(pipe, [request(), request(lora=lora)])


def test_a_pipeline_without_adapters(builtin_pipe):
    with pytest.raises(ValueError, match="adapter 'a', and none is loaded"):
        edit(builtin_pipe, [request(lora={"a": 1.0})])
    assert torch.equal(edit(builtin_pipe, [request(lora={})])[0], edit(builtin_pipe, [request()])[0])


def test_fused_adapters_are_part_of_the_model():
    """A request cannot have a fused adapter, and others are added to it."""
    pipe = with_adapters(uniref_fast.builtin.load(torch.float32))
    pipe.transformer.enable_adapters()
    pipe.transformer.set_adapters(["a", "b"], [0.5, 1.0])
    expected = edit(pipe, [request()])[0]
    pipe.transformer.set_adapters(["a"], [0.5])
    pipe.transformer.fuse_lora(adapter_names=["a"])
    with pytest.raises(ValueError, match="'a', which is fused into the weights"):
        edit(pipe, [request(lora={"a": 1.0})])
    added = edit(pipe, [request(lora={"b": 1.0}), request()])
    assert max_relative_error(added[0], expected) < 1e-3 < max_relative_error(added[1], expected)


def test_gradients_and_wrong_rows_are_refused(pipe):
    model = uniref_fast.edit_session.EditSession(pipe).model
    layout = model.layout([Sample(4, (1, 3, 2))])
    image, text = torch.zeros(6, 64).bfloat16(), torch.zeros(4, 128).bfloat16()
    adapters = model.pack_adapters([{"a": 1.0}])
    with pytest.raises(ValueError, match="no gradients"):
        model(image, text, torch.zeros(1).bfloat16(), layout, adapters=adapters)
    wrong = PackAdapters(pipe.transformer, (("", "text"),), [{"a": 1.0}])
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match="a layer has 6 rows of the kind 'text'"),
    ):
        model(image, text, torch.zeros(1).bfloat16(), layout, adapters=wrong)
    assert not any(layer._forward_hooks for _, layer in tuner_layers(pipe.transformer))


def test_offloading_by_layer_is_refused(pipe):
    part = pipe.transformer.transformer_blocks[1].attn.to_q.lora_A["a"]
    part._diffusers_hook = object()
    try:
        with pytest.raises(ValueError, match="leaf_level"):
            uniref_fast.models.pack_adapters.check_lora(pipe.transformer, {"a": 1.0}, "request 1")
    finally:
        del part._diffusers_hook
