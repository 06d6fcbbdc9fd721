"""estimate(): its tokens and operations against what a run really has."""

import copy
import dataclasses
import json

import pytest
import torch
from diffusers.hooks import group_offloading
from offloading import Offloading
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import uniref_fast
from uniref_fast import EditRequest, Sample, SelfLayout, gpu_memory, speeds
from uniref_fast.costs import transformer_flops, transformer_peak, vae_image_cost
from uniref_fast.meta_device import LivingTensors
from uniref_fast.models.kept_references import KeptReferences, RefreshSchedule
from uniref_fast.quantised import stored_tensors
from uniref_fast.request import request_geometry

REQUESTS = [
    EditRequest("put the owl left of the rocket", [Image.new("RGB", (60, 40)), Image.new("RGB", (30, 90))],
                negative_prompt=" ", num_inference_steps=4, height=64, width=96),
    EditRequest("a red apple", num_inference_steps=2),
]  # fmt: skip


def test_tokens_are_those_of_the_run(builtin_pipe, monkeypatch):
    seen = []
    call = uniref_fast.PackedQwenImage.__call__

    def spy(self, image, text, timestep, layout, *kept):
        seen.append(layout)
        return call(self, image, text, timestep, layout, *kept)

    monkeypatch.setattr(uniref_fast.PackedQwenImage, "__call__", spy)
    uniref_fast.edit(builtin_pipe, REQUESTS, progress=False)
    estimate = uniref_fast.estimate(builtin_pipe, REQUESTS)
    assert estimate.layout == seen[0]
    assert (
        estimate.tokens["together"]
        == seen[0].joint_length
        == sum(estimate.tokens[k] for k in ("text", "target", "reference"))
    )


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_transformer_operations_are_exact(make_transformer, zero_cond_t):
    """Counted by PyTorch on the reference ops, where every product is a matmul."""
    model = make_transformer(zero_cond_t)
    layout = SelfLayout.qwen([Sample(5, (1, 4, 4), ((1, 3, 3),)), Sample(2, (1, 2, 2))], zero_cond_t=zero_cond_t)
    width = 128
    args = torch.randn(layout.image_length, 64), torch.randn(layout.text_length, 48), torch.rand(2)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        uniref_fast.PackedQwenImage(model)(*args, layout)
    counted = counter.get_total_flops()  # custom ops count nothing: the linear part
    linear, attention = transformer_flops(model.config, layout)
    assert counted == linear
    squares = [(5 + 16 + 9) ** 2, (2 + 4) ** 2]
    targets = 16 * 30 + 4 * 6  # the last block asks for the targets only
    assert attention == 4 * width * (2 * sum(squares) + targets)


def kept_counts(model, args, layout, stores):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        uniref_fast.PackedQwenImage(model)(*args, layout, stores)
    return counter.get_total_flops()


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_operations_of_a_step_with_kept_references(make_transformer, zero_cond_t):
    model = make_transformer(zero_cond_t=zero_cond_t)
    layout = SelfLayout.qwen([Sample(5, (1, 4, 4), ((1, 3, 3),)), Sample(2, (1, 2, 2))], zero_cond_t=zero_cond_t)
    args = torch.randn(layout.image_length, 64), torch.randn(layout.text_length, 48), torch.rand(2)
    stores = [KeptReferences(RefreshSchedule(every=2)) for _ in range(2)]
    counted = [kept_counts(model, args, layout, stores) for _ in range(3)]
    linear, attention = transformer_flops(model.config, layout, kept=True)
    assert counted == [transformer_flops(model.config, layout)[0], linear, counted[0]] and linear < counted[0]
    queries = [(5 + 16) * (5 + 16 + 9), (2 + 4) ** 2]
    assert attention == 4 * 128 * (2 * sum(queries) + 16 * 30 + 4 * 6)


@pytest.mark.parametrize("keep_dtype", [None, "int8"])
def test_kept_memory_is_that_of_the_edit(builtin_pipe, keep_dtype):
    report = uniref_fast.EditReport()
    options = {"keep_references": 3, "keep_dtype": keep_dtype}
    uniref_fast.edit(builtin_pipe, REQUESTS, progress=False, report=report, **options)
    exact, kept = (uniref_fast.estimate(builtin_pipe, REQUESTS, **more) for more in ({}, options))
    assert kept.kept_bytes == sum(each.kept_bytes for each in report.references) > 0 == exact.kept_bytes
    assert kept.computed_references == (2, 1) and exact.computed_references == (4, 2)
    transformers = [estimate.stages[2] for estimate in (exact, kept)]
    assert transformers[1].activation_bytes - transformers[0].activation_bytes == kept.kept_bytes
    assert transformers[1].flops < transformers[0].flops and kept.time.value is None
    assert "computed in 2 step(s), in 1 step(s)" in str(kept)


def test_kept_references_by_drift_count_as_computed_in_every_step(builtin_pipe):
    exact, kept = (uniref_fast.estimate(builtin_pipe, REQUESTS, keep_references=keep) for keep in (False, "auto"))
    assert kept.computed_references == (None, 1) and kept.flops == exact.flops  # the second has no references
    assert "operations are those of computing them in every step" in str(kept)
    exactly = uniref_fast.estimate(builtin_pipe, REQUESTS, keep_references="auto", visibility="reference_isolated")
    assert exactly.computed_references == (1, 1)
    with pytest.raises(ValueError, match="would not be exact"):
        uniref_fast.estimate(builtin_pipe, REQUESTS, keep_references=True)


def test_capture_reserves_the_activations_of_one_more_step(builtin_pipe):
    plain, captured = (uniref_fast.estimate(builtin_pipe, REQUESTS, capture=capture) for capture in (False, True))
    before, after = (estimate.stages[2].activation_bytes for estimate in (plain, captured))
    assert 1.5 < after / before <= 2 and captured.flops == plain.flops
    assert "without capture" in captured.time.source
    with pytest.raises(ValueError, match='capture needs weights that stay on the device, got offload="block"'):
        uniref_fast.estimate(builtin_pipe, REQUESTS, capture=True, offload="block")


def test_vae_operations_match_a_real_run(builtin_pipe):
    vae = builtin_pipe.vae
    # PyTorch's counter knows the math backend of attention, not the fused one for CPUs
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        vae.encode(torch.zeros(1, 3, 1, 64, 96))
    request = EditRequest("x", num_inference_steps=2)
    stages = {
        s.name: s for s in uniref_fast.estimate(builtin_pipe, [request], image_sizes=[[(96, 64)]], budget=96).stages
    }
    assert stages["VAE encode"].flops == counter.get_total_flops()


def test_text_encoder_operations_match_a_real_run(builtin_pipe):
    """The estimate is within a fifth: biases, windowed vision attention and patch merging are not modelled."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        builtin_pipe.encode_prompt(prompt="put the owl left of the rocket", image=None, device="cpu")
    request = EditRequest("put the owl left of the rocket", num_inference_steps=2)
    stage = uniref_fast.estimate(builtin_pipe, [request]).stages[0]
    assert 0.8 < stage.flops / counter.get_total_flops() < 1.25


def test_text_encoder_with_images(builtin_pipe):
    """The vision tower counts: against a real run with three pictures."""
    images = [Image.new("RGB", (60, 40), c) for c in ("red", "green", "blue")]
    request = EditRequest("x", images, num_inference_steps=2)
    sizes = request_geometry(builtin_pipe, request)
    condition = [
        builtin_pipe.image_processor.resize(i, h, w) for i, (w, h) in zip(images, sizes.condition_sizes, strict=True)
    ]
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
        LivingTensors() as memory,
    ):
        builtin_pipe.encode_prompt(prompt="x", image=condition, device="cpu")
    stage = uniref_fast.estimate(builtin_pipe, [request]).stages[0]
    assert 0.75 < stage.flops / counter.get_total_flops() < 1.25
    assert 0.5 < stage.activation_bytes / memory.peak < 2


def test_living_tensors_are_counted():
    outside = torch.zeros(2000, 2)
    with LivingTensors() as memory:
        a = torch.ones(1000)
        b = a + 1
        view = b[10:]
        del a
        c = torch.ones(500)
        outside.t().add_(1)
        del view, c
    assert memory.peak == 8000 and memory.living == b.nbytes


def within(part, whole, tolerance):
    assert abs(part / whole - 1) < tolerance, f"{part} of {whole}: {part / whole:.3f}"


@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_vae_memory_is_what_lives(builtin_pipe, size):
    """The estimate is the peak of living tensors in a real run on the CPU, whose attention is fused too."""
    vae, (width, height) = builtin_pipe.vae, size
    request = EditRequest("x", num_inference_steps=2, width=width, height=height)
    estimate = uniref_fast.estimate(builtin_pipe, [request], image_sizes=[[size]], budget=max(size))
    stages = {s.name: s for s in estimate.stages}
    with torch.no_grad(), LivingTensors() as memory:
        vae.encode(torch.zeros(1, 3, 1, height, width))
    within(stages["VAE encode"].activation_bytes, memory.peak, 0.01)
    with torch.no_grad(), LivingTensors() as memory:
        vae.decode(torch.zeros(1, 16, 1, height // 4, width // 4))
    within(stages["VAE decode"].activation_bytes, memory.peak, 0.03)  # with what the request keeps


@pytest.mark.slow
def test_vae_tiling_counts(builtin_pipe):
    request, given = EditRequest("x", num_inference_steps=2), {"image_sizes": [[(256, 256)]], "budget": 256}
    whole = uniref_fast.estimate(builtin_pipe, [request], **given).stages[1]
    vae = builtin_pipe.vae
    vae.enable_tiling(64, 64, 48, 48)
    try:
        tiled = uniref_fast.estimate(builtin_pipe, [request], **given).stages[1]
        with torch.no_grad(), LivingTensors() as memory:
            vae.encode(torch.zeros(1, 3, 1, 256, 256))
    finally:
        vae.disable_tiling()
    within(tiled.activation_bytes, memory.peak, 0.01)
    assert tiled.activation_bytes < whole.activation_bytes / 2 and tiled.flops > whole.flops


def test_vae_attention_has_no_matrix_of_scores():
    """The VAE of the 20B models: 2048 x 2048 pixels are 65,536 tokens of one head of 384 dimensions."""
    from diffusers import AutoencoderKLQwenImage

    with torch.device("meta"):
        vae = AutoencoderKLQwenImage().to(torch.bfloat16)
    config = tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in vae.config.items() if k[0] != "_"))
    flops, peak = vae_image_cost(AutoencoderKLQwenImage, config, (), torch.bfloat16, (1, 3, 1, 2048, 2048), "encode")
    assert peak < 10e9 < 65536**2 * 4, "scores alone would take 17 GB"
    assert flops > 4 * 65536**2 * 384


@pytest.mark.parametrize(
    "samples",
    [
        [Sample(64, (1, 24, 24), ((1, 16, 16),))],
        [Sample(40, (1, 12, 12), ((1, 8, 8), (1, 8, 8)))] * 2,
        [Sample(300, (1, 2, 2)), Sample(5, (1, 6, 6))],  # mostly text
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformer_memory_is_what_lives(make_transformer, samples, dtype):
    """The count agrees with PyTorch's memory tracker, which follows storages by another way."""
    from torch.distributed._tools.mem_tracker import MemTracker

    model = make_transformer(True, dtype=dtype)
    layout = SelfLayout.qwen(samples, zero_cond_t=True)

    def run():
        image, text = (
            torch.zeros(layout.image_length, 64, dtype=dtype),
            torch.zeros(layout.text_length, 48, dtype=dtype),
        )
        return uniref_fast.PackedQwenImage(model)(image, text, torch.rand(layout.num_samples), layout)

    with torch.no_grad():
        run()  # tables are made once and kept with the layout
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            run()
        (snapshot,) = tracker.get_tracker_snapshot("peak").values()
        with LivingTensors() as memory:
            run()
    within(transformer_peak(model, layout), snapshot["Total"] - sum(p.nbytes for p in model.parameters()), 0.05)
    within(transformer_peak(model, layout), memory.peak, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("pack_tokens", [None, 700])
def test_the_peak_of_a_whole_edit(builtin_pipe, pack_tokens):
    requests = [EditRequest("x", [Image.new("RGB", (128, 128))] * 2, negative_prompt=" ", num_inference_steps=2,
                            seed=0, height=64, width=96)] * 3  # fmt: skip
    estimate = uniref_fast.estimate(builtin_pipe, requests, pack_tokens=pack_tokens)
    uniref_fast.edit(builtin_pipe, requests, progress=False, pack_tokens=pack_tokens)  # tables are made
    with LivingTensors() as memory:
        uniref_fast.edit(builtin_pipe, requests, progress=False, pack_tokens=pack_tokens)
    within(estimate.peak_bytes - estimate.weight_bytes, memory.peak, 0.05)


def test_a_block_frees_what_it_has_used(make_transformer):
    """A block's input streams and residuals are freed once they are added up.

    In the feed-forward of the image stream that stream, its norm, two hidden layers of four times the width, and two
    tensors of the text stream are alive.
    """
    if torch._dynamo.utils.counters["frames"]["total"]:
        pytest.skip("an earlier test of this process has used torch.compile, after which calls hold their arguments")
    model = make_transformer(False, layers=4)
    layout = SelfLayout.qwen([Sample(10, (1, 30, 30))])
    for _ in range(2):  # tables are made by the first run
        with torch.no_grad(), LivingTensors() as memory:
            uniref_fast.PackedQwenImage(model)(torch.zeros(900, 64), torch.zeros(10, 48), torch.ones(1), layout)
    row = 128 * 4
    within(memory.peak, row * (10 * 900 + 2 * 10) + 900 * 64 * 4, 0.02)


ONLOAD = group_offloading.ModuleGroup.onload_
OFFLOADED = [EditRequest("make it night", [Image.new("RGB", (64, 64))] * 2, num_inference_steps=2, height=64, width=64),
             EditRequest("a red apple", num_inference_steps=2, height=64, width=64)]  # fmt: skip


@pytest.mark.parametrize("requests", [OFFLOADED, OFFLOADED[1:]])
def test_offloading_by_model_is_that_of_the_hooks(builtin_pipe, monkeypatch, requests):
    """The parts on the device in each stage are those that the hooks have brought there and not taken away."""
    from accelerate import hooks

    pipe = type(builtin_pipe)(**builtin_pipe.components)
    present, seen = set(), {}
    names = {"text_encoder": pipe.text_encoder, "vae": pipe.vae, "transformer": pipe.transformer}
    bring = hooks.CpuOffload.pre_forward

    def brought(hook, module, *args, **kwargs):
        result = bring(hook, module, *args, **kwargs)  # it takes away the part before, but one that is on a CPU
        if hook.prev_module_hook is not None:
            present.difference_update(name for name, part in names.items() if part is hook.prev_module_hook.model)
        name = next(name for name, part in names.items() if part is module)
        present.add(name)
        stage = {"text_encoder": 0, "vae": 3 if 2 in seen else 1, "transformer": 2}[name]
        seen.setdefault(stage, set()).update(present)
        return result

    monkeypatch.setattr(hooks.CpuOffload, "pre_forward", brought)
    pipe.enable_model_cpu_offload(device="cpu")
    try:
        uniref_fast.edit(pipe, requests, progress=False)
    finally:
        pipe.remove_all_hooks()
    estimate = uniref_fast.estimate(builtin_pipe, requests, offload="model")
    sizes = {name: sum(t.nbytes for t in (*part.parameters(), *part.buffers())) for name, part in names.items()}
    expected = {stage: sum(sizes[name] for name in parts) for stage, parts in seen.items()}
    assert {stage: estimate.resident_bytes[stage] for stage in seen} == expected and {0, 2, 3} <= set(seen)


@pytest.mark.parametrize("part, kind", [("transformer", "block_level"), ("text_encoder", "leaf_level")])
def test_offloading_by_block_is_what_is_on_the_device(builtin_pipe, monkeypatch, part, kind):
    """The groups that are there at once: exactly those of the transformer, at most those of the text encoder."""
    pipe = type(builtin_pipe)(**{**builtin_pipe.components, part: copy.deepcopy(getattr(builtin_pipe, part))})
    offloading, peak = Offloading(monkeypatch), 0
    onload = offloading._onload

    def counted(group, original):
        nonlocal peak
        onload(group, original)
        tensors = {tensor for each in offloading.onloaded for tensor in offloading._tensors(each)}
        peak = max(peak, sum(tensor.nbytes for tensor in tensors))

    monkeypatch.setattr(group_offloading.ModuleGroup, "onload_", offloading._method(counted, ONLOAD))
    offloading.enable(getattr(pipe, part), kind, stream=True)
    uniref_fast.edit(pipe, OFFLOADED, progress=False)
    estimate = uniref_fast.estimate(builtin_pipe, OFFLOADED, offload="block")
    resident = dict(zip(("text_encoder", "vae", "transformer"), estimate.resident_bytes[:3], strict=True))[part]
    assert peak == resident if part == "transformer" else 0 < peak <= resident


def test_offloading_in_the_report(builtin_pipe):
    plain, model, block = (
        uniref_fast.estimate(builtin_pipe, REQUESTS, offload=how) for how in (None, "model", "block")
    )
    assert plain.peak_bytes == plain.weight_bytes + max(stage.activation_bytes for stage in plain.stages)
    assert block.peak_bytes < model.peak_bytes < plain.peak_bytes
    assert model.weight_bytes == plain.weight_bytes and model.stages == plain.stages
    assert "offloading  by block; weights on the device: " in str(block) and "offloading" not in str(plain)
    assert "without offloading" in model.time.source and block.as_dict()["offload"] == "block"
    with pytest.raises(ValueError, match='offload must be "model", "block" or None, got \'disk\''):
        uniref_fast.estimate(builtin_pipe, REQUESTS, offload="disk")
    with pytest.raises(ValueError, match="weights as they are stored"):
        uniref_fast.estimate(builtin_pipe, REQUESTS, offload="model", mode="fast")


def weights(pipe):
    return {s.name: s.weight_bytes for s in uniref_fast.estimate(pipe, REQUESTS).stages}


def copy_of(pipe):
    from uniref_fast.builtin import SmallQwenImageEditPlusPipeline

    return SmallQwenImageEditPlusPipeline(**{**pipe.components, "transformer": copy.deepcopy(pipe.transformer)})


def test_weights_count_as_they_are_stored(builtin_pipe):
    """Quantised weights pretend to have the dtype that they compute in; layerwise casting stores 8 bits."""
    pipe = copy_of(builtin_pipe)
    transformer = pipe.transformer
    plain = weights(pipe)["transformer"]
    linears = [m for m in transformer.transformer_blocks.modules() if isinstance(m, torch.nn.Linear)]
    for linear in linears:
        linear.weight = torch.nn.Parameter(Int8Weight(linear.weight.detach()), requires_grad=False)
        assert linear.weight.dtype == torch.float32
    numbers, rows = sum(m.weight.numel() for m in linears), sum(len(m.weight) for m in linears)
    assert weights(pipe)["transformer"] == plain - 4 * numbers + numbers + 4 * rows
    pipe = copy_of(builtin_pipe)
    before = uniref_fast.estimate(pipe, REQUESTS).stages[2]
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    after = uniref_fast.estimate(pipe, REQUESTS).stages[2]
    assert 0.24 < after.weight_bytes / before.weight_bytes < 0.27
    largest = max(m.weight.numel() * 4 for m in linears)
    assert after.activation_bytes == before.activation_bytes + largest, "computed in float32 all the same"


class Int8Weight(torch.Tensor):
    """A float32 weight of 8 bits and a scale a row, as torchao and quanto keep it."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight):
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.data8 = (weight / self.scale).round().to(torch.int8)

    def __tensor_flatten__(self):
        return ["data8", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        (weight,) = args
        return cls(weight.data8 * weight.scale)  # what nn.Parameter asks for: detach


class Packed(torch.Tensor):
    """Packed bytes with their scales in an attribute, as bitsandbytes and GGUF keep weights."""


def test_scales_in_attributes_count(builtin_pipe):
    weight = torch.zeros(100, dtype=torch.uint8).as_subclass(Packed)
    weight.scales = torch.zeros(10)
    assert sum(t.nbytes for t in stored_tensors(weight)) == 100 + 40


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, bits",
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": False}, 4.5),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
            4 + 0.125 + 1 / 512,
        ),
        ({"quant_method": "quanto", "weights_dtype": "int8"}, 8),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}, 8),
        ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, 4.25),
        (
            {
                "quant_method": "torchao",
                "quant_type": {"default": {"_type": "IntxWeightOnlyConfig", "_data": {"weight_dtype": "int4"}}},
            },
            8.1875,
        ),
    ],
)
def test_weights_of_a_folder_count_as_its_configuration_says(tmp_path, config, bits):
    from uniref_fast import builtin

    folder = builtin.build(tmp_path / "model")
    plain = uniref_fast.estimate(folder, REQUESTS).stages[2].weight_bytes
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    model = builtin.load().transformer
    linears = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    found = uniref_fast.estimate(folder, REQUESTS).stages[2].weight_bytes
    assert found == plain - int(linears * (2 - bits / 8))
    kept = {"modules_to_not_convert": ["proj_out"], "llm_int8_skip_modules": ["proj_out"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config | kept}))
    more = int(model.proj_out.weight.numel() * (2 - bits / 8))
    assert abs(uniref_fast.estimate(folder, REQUESTS).stages[2].weight_bytes - found - more) <= 1
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "new"}}))
    with pytest.raises(ValueError, match="does not know the bits per weight of quantization_config"):
        uniref_fast.estimate(folder, REQUESTS)


def test_pack_tokens_bounds_the_activations(builtin_pipe):
    whole, split = (uniref_fast.estimate(builtin_pipe, REQUESTS * 4, pack_tokens=n) for n in (None, 700))
    assert split.stages[2].activation_bytes < whole.stages[2].activation_bytes and split.flops == whole.flops
    with pytest.raises(ValueError, match="pack_tokens"):
        uniref_fast.estimate(builtin_pipe, REQUESTS, pack_tokens=0)


def test_sizes_instead_of_images(builtin_pipe):
    """Sizes give the estimate of images of these sizes, and are checked as images are."""
    sizes = [[image.size for image in request.images] for request in REQUESTS]
    bare = [dataclasses.replace(request, images=()) for request in REQUESTS]
    expected = uniref_fast.estimate(builtin_pipe, REQUESTS).as_dict()
    assert uniref_fast.estimate(builtin_pipe, bare, image_sizes=sizes).as_dict() == expected
    with pytest.raises(ValueError, match="image_sizes has sizes for 1 requests"):
        uniref_fast.estimate(builtin_pipe, bare, image_sizes=sizes[:1])
    with pytest.raises(ValueError, match="request 1: give images or image_sizes"):
        uniref_fast.estimate(builtin_pipe, REQUESTS, image_sizes=sizes)
    with pytest.raises(ValueError, match="request 2: image 1 of 1 x 500 pixels is too elongated"):
        uniref_fast.estimate(builtin_pipe, bare, image_sizes=[sizes[0], [(1, 500)]])
    for wrong in ([(64, 64)], [[64, 64]], [[("64", "64")]], [[(64.0, 64.0)]], [[(64, 64, 3)]], [None]):
        with pytest.raises(TypeError, match=r"request 1: image_sizes must be a list with \(width, height\) in pixels"):
            uniref_fast.estimate(builtin_pipe, bare[:1], image_sizes=wrong)
    with pytest.raises(TypeError, match="image 1 must be a PIL image"):
        uniref_fast.estimate(builtin_pipe, [EditRequest("x", [(64, 64)])])


def test_grows_as_the_request_does(builtin_pipe):
    fields = {"prompt": "x", "num_inference_steps": 2}

    def total(references=1, **changes):
        return uniref_fast.estimate(builtin_pipe, [fields | changes], image_sizes=[[(64, 64)] * references])

    base = total()
    assert total(num_inference_steps=4).stages[2].flops == 2 * base.stages[2].flops
    assert total(references=3).flops > base.flops
    assert total(negative_prompt="y").tokens["target"] == 2 * base.tokens["target"]
    causal = uniref_fast.estimate(builtin_pipe, [fields], image_sizes=[[(64, 64)]], visibility="reference_causal")
    assert causal.stages[2].flops < base.stages[2].flops
    assert base.peak_bytes > base.weight_bytes > 0
    assert base.weight_bytes == sum(
        sum(tensor.nbytes for tensor in (*m.parameters(), *m.buffers()))
        for m in (builtin_pipe.text_encoder, builtin_pipe.vae, builtin_pipe.transformer)
    )


def test_a_folder_is_estimated_without_its_weights(tmp_path):
    from uniref_fast import builtin

    folder = builtin.build(tmp_path / "model")
    loaded = uniref_fast.estimate(builtin.load(torch.bfloat16), REQUESTS)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    assert uniref_fast.estimate(folder, REQUESTS).as_dict() == loaded.as_dict()
    (folder / "transformer" / "config.json").unlink()
    with pytest.raises(OSError, match="config"):
        uniref_fast.estimate(folder, REQUESTS)


def test_the_20b_shape():
    """Published arithmetic: 12 C^2 products a token and block, and N^2 C twice; 1024 text tokens, 2 x 1024^2 pixels."""
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"):
        model = QwenImageTransformer2DModel(out_channels=16, zero_cond_t=True)
    assert 20e9 < sum(p.numel() for p in model.parameters()) < 21e9
    layout = SelfLayout.qwen([Sample(1024, (1, 64, 64), ((1, 64, 64),))], zero_cond_t=True)
    linear, attention = transformer_flops(model.config, layout)
    n, c = 9216, 3072
    assert abs(linear / (60 * 12 * c**2 * 2 * n) - 1) < 0.02  # the last block is spared all but the target
    assert abs(attention / (60 * 4 * n**2 * c) - 1) < 0.02


def test_readable_and_plain(builtin_pipe):
    estimate = uniref_fast.estimate(builtin_pipe, REQUESTS)
    text = str(estimate)
    assert "transformer" in text and "VAE decode" in text and "of the transformer's operations" in text
    assert "result      96 x 64, 64 x 64 pixels" in text and "fits a GPU of 16 GB or more" in text
    assert "single requests" in estimate.time.source and estimate.time.value is None
    plain = json.loads(json.dumps(estimate.as_dict()))
    assert abs(sum(stage["share"] for stage in plain["stages"]) - 1) < 1e-9
    with pytest.raises(ValueError, match="no prompt"):
        uniref_fast.estimate(builtin_pipe, [{"prompt": ""}])


def table_of_speeds(folder, device="cpu-test"):
    """Write a table of two measured edits of the built-in shape; 100 and 300 tokens."""
    shared = {"model": "4 blocks of 4 x 64", "dtype": "float32", "guided": False, "date": "2026-11-30",
              "torch": "2.14.1", "threads": 2, "command": "python bench/speeds.py"}  # fmt: skip
    rows = [{"tokens": tokens, "seconds_per_step": step, "seconds_fixed": fixed}
            for tokens, step, fixed in ((300, 0.3, 3.0), (100, 0.1, 1.0))]  # fmt: skip
    training = [{"pack_tokens": tokens, "tokens_per_second": speed, "lora": True, "ranks": 1}
                for tokens, speed in ((512, 1000), (1024, 2000))]  # fmt: skip
    content = {"edits": [shared | row for row in rows], "training": [shared | row for row in training]}
    (folder / f"{device}.json").write_text(json.dumps(content))


@pytest.fixture
def measured(tmp_path, monkeypatch):
    table_of_speeds(tmp_path)
    monkeypatch.setattr(speeds, "FOLDER", tmp_path)
    speeds.table.cache_clear()
    yield
    speeds.table.cache_clear()


def test_a_time_is_interpolated_between_measured_edits(builtin_pipe, measured):
    """145 tokens lie between the measured 100 and 300; the table states no order."""
    given = {"image_sizes": [[(64, 64)]], "device": "cpu-test"}
    fields = {"prompt": "x", "num_inference_steps": 4}
    found = uniref_fast.estimate(builtin_pipe, [fields], **given)
    share = (found.tokens["together"] - 100) / 200
    assert 0 < share < 1
    assert found.time.value == pytest.approx((1 + 2 * share) + 4 * (0.1 + 0.2 * share))
    assert "measured edits of 100 and 300 tokens on cpu-test (2026-11-30, torch 2.14.1, 2 threads" in str(found)
    assert found.as_dict()["seconds"] == found.time.value
    exact = speeds.edit_time("4 blocks of 4 x 64", "float32", False, 300, 1, "cpu-test")
    assert exact.value == pytest.approx(3.3) and "edits of 300 tokens" in exact.source


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "h200"}, "not measured on h200 (model 4 blocks of 4 x 64, dtype float32, guided false); measured "
                             "on: cpu-test"),
        ({"fields": {"negative_prompt": " ", "true_cfg_scale": 4.0}}, "guided true)"),
        ({"fields": {"width": 256, "height": 256}}, "tokens, only from 100 to 300"),
        ({"visibility": "reference_causal"}, 'the policy "full" only'),
    ],
)  # fmt: skip
def test_nothing_is_guessed(builtin_pipe, measured, change, reason):
    fields = {"prompt": "x", "num_inference_steps": 4, **change.pop("fields", {})}
    given = {"image_sizes": [[(64, 64)]], "device": "cpu-test", **change}
    found = uniref_fast.estimate(builtin_pipe, [fields], **given)
    assert found.time.value is None and found.as_dict()["seconds"] is None and reason in str(found)


def test_speed_of_training_is_that_of_the_pack(measured):
    shape = "4 blocks of 4 x 64"
    assert speeds.training_speed(shape, "float32", True, 768, 1, "cpu-test").value == pytest.approx(1500)
    assert speeds.training_speed(shape, "float32", True, 2048, 1, "cpu-test").value is None
    assert "ranks 2" in speeds.training_speed(shape, "float32", True, 768, 2, "cpu-test").source


def test_shipped_tables_state_their_origin():
    for path in speeds.FOLDER.glob("*.json"):
        content = json.loads(path.read_text())
        for row in content["edits"] + content["training"]:
            assert {"model", "dtype", "date", "torch", "threads", "command"} <= row.keys(), path


def test_fitting_a_gpu_leaves_a_tenth_free():
    assert gpu_memory.fits(36 * 2**30, 40) and not gpu_memory.fits(36 * 2**30 + 2**20, 40)
    assert gpu_memory.fits_text(60 * 2**30) == "fits a GPU of 80 GB or more"
    assert gpu_memory.fits_text(500 * 2**30) == "fits no GPU of up to 192 GB"
    assert gpu_memory.fits_text(60 * 2**30, 48) == "does not fit a GPU of 48 GB, of which 43.2 are planned for"
    assert gpu_memory.size_text(1536) == "1.5 KiB" and gpu_memory.size_text(3 * 2**40) == "3072.0 GiB"
