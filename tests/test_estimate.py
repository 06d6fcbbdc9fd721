"""estimate(): its tokens and operations against what a run really has."""

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import uniref_fast
from uniref_fast import EditRequest, Sample, SelfLayout
from uniref_fast.estimate import LivingTensors, _block_peak, transformer_flops
from uniref_fast.request import geometry

REQUESTS = [
    EditRequest("put the owl left of the rocket", [Image.new("RGB", (60, 40)), Image.new("RGB", (30, 90))],
                negative_prompt=" ", num_inference_steps=4, height=64, width=96),
    EditRequest("a red apple", num_inference_steps=2),
]  # fmt: skip


def test_tokens_are_those_of_the_run(builtin_pipe, monkeypatch):
    seen = []
    call = uniref_fast.PackedQwenImage.__call__

    def spy(self, image, text, timestep, layout):
        seen.append(layout)
        return call(self, image, text, timestep, layout)

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


def test_vae_operations_match_a_real_run(builtin_pipe):
    vae = builtin_pipe.vae
    # PyTorch's counter knows the math backend of attention, not the fused one for CPUs
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        vae.encode(torch.zeros(1, 3, 1, 64, 96))
    request = EditRequest("x", [(96, 64)], num_inference_steps=2)
    stages = {s.name: s for s in uniref_fast.estimate(builtin_pipe, [request], budget=96 * 64).stages}
    assert stages["VAE encode"].flops == counter.get_total_flops()


def test_text_encoder_operations_match_a_real_run(builtin_pipe):
    """Within a fifth: biases, windowed vision attention and patch merging are not modelled."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        builtin_pipe.encode_prompt(prompt="put the owl left of the rocket", image=None, device="cpu")
    request = EditRequest("put the owl left of the rocket", num_inference_steps=2)
    stage = uniref_fast.estimate(builtin_pipe, [request]).stages[0]
    assert 0.8 < stage.flops / counter.get_total_flops() < 1.25


def test_text_encoder_with_images(builtin_pipe):
    """The vision tower counts: against a real run with three pictures."""
    images = [Image.new("RGB", (60, 40), c) for c in ("red", "green", "blue")]
    request = EditRequest("x", images, num_inference_steps=2)
    sizes = geometry(builtin_pipe, request)
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


def test_activation_memory_is_near_what_lives(builtin_pipe):
    """Tensors alive at once in a real run on the CPU."""
    vae, transformer = builtin_pipe.vae, builtin_pipe.transformer
    request = EditRequest("x", [(128, 128)], num_inference_steps=2, height=128, width=128)
    stages = {s.name: s for s in uniref_fast.estimate(builtin_pipe, [request]).stages}
    with torch.no_grad(), LivingTensors() as memory:
        vae.encode(torch.zeros(1, 3, 1, 64, 64))  # the pipeline's area of a reference
    assert 0.8 < stages["VAE encode"].activation_bytes / memory.peak < 1.25
    with torch.no_grad(), LivingTensors() as memory:
        vae.decode(torch.zeros(1, 16, 1, 32, 32))
    assert 0.8 < stages["VAE decode"].activation_bytes / memory.peak < 1.25
    layout = SelfLayout.qwen([Sample(64, (1, 24, 24), ((1, 16, 16),))], zero_cond_t=True)
    config = transformer.config
    args = torch.zeros(layout.image_length, 64), torch.zeros(64, config.joint_attention_dim), torch.rand(1)
    with torch.no_grad(), LivingTensors() as memory:
        uniref_fast.PackedQwenImage(transformer)(*args, layout)
    assert 0.8 < _block_peak(transformer, layout.joint_length) / memory.peak < 1.25


def test_max_tokens_bounds_the_activations(builtin_pipe):
    whole, split = (uniref_fast.estimate(builtin_pipe, REQUESTS * 4, max_tokens=n) for n in (None, 700))
    assert split.stages[2].activation_bytes < whole.stages[2].activation_bytes and split.flops == whole.flops
    with pytest.raises(ValueError, match="max_tokens"):
        uniref_fast.estimate(builtin_pipe, REQUESTS, max_tokens=0)


def test_grows_as_the_request_does(builtin_pipe):
    def total(**changes):
        fields = {"prompt": "x", "images": [(64, 64)], "num_inference_steps": 2} | changes
        return uniref_fast.estimate(builtin_pipe, [fields])

    base = total()
    assert total(num_inference_steps=4).stages[2].flops == 2 * base.stages[2].flops
    assert total(images=[(64, 64)] * 3).flops > base.flops
    assert total(negative_prompt="y").tokens["target"] == 2 * base.tokens["target"]
    fields = {"prompt": "x", "images": [(64, 64)], "num_inference_steps": 2}
    causal = uniref_fast.estimate(builtin_pipe, [fields], visibility="reference_causal")
    assert causal.stages[2].flops < base.stages[2].flops
    assert base.peak_bytes > base.weight_bytes > 0
    assert base.weight_bytes == sum(
        sum(p.numel() * p.element_size() for p in m.parameters())
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
    import json

    estimate = uniref_fast.estimate(builtin_pipe, REQUESTS)
    text = str(estimate)
    assert "transformer" in text and "VAE decode" in text and "attention is" in text
    plain = json.loads(json.dumps(estimate.as_dict()))
    assert abs(sum(stage["share"] for stage in plain["stages"]) - 1) < 1e-9
    with pytest.raises(ValueError, match="no prompt"):
        uniref_fast.estimate(builtin_pipe, [{"prompt": ""}])
