"""A LoRA step of the 20B shape (random weights) at the three budgets: time, MFU, peak memory. GPU only.

    pytest bench/bench_sft_20b.py --benchmark-only

One sample: a target of 1024 x 1024 pixels and three references that fill the joint budget, 700 text tokens; forward,
backward and AdamW. "stock" is diffusers' forward with its gradient checkpointing; ours keeps attention's results.
"""

import pytest
import torch
import torch.nn.functional as F

from uniref_fast.budget import fit_to_budget
from uniref_fast.estimate import transformer_flops
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.models import PackedQwenImage
from uniref_fast.testing import max_relative_error
from uniref_fast.training.monitor import peak_flops

CUDA = torch.cuda.is_available()
TEXT = 700
SHAPE = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "axes_dims_rope": (16, 56, 56),
    "zero_cond_t": True,
}


def make_model(shape, device, rank=64):
    """bfloat16 weights without ever being in float32, and a LoRA in float32."""
    from diffusers import QwenImageTransformer2DModel
    from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
    from peft import LoraConfig

    with torch.device("meta"):
        model = QwenImageTransformer2DModel(**shape)
    model = torch.nn.Module.to(model, torch.bfloat16).to_empty(device=device)
    model.pos_embed = QwenEmbedRope(theta=10000, axes_dim=list(shape["axes_dims_rope"]), scale_rope=True)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.constant_(parameter, float("norm" in name and "weight" in name))
        else:
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    model.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def make_step(model, sample, which):
    """A function of no arguments that takes one optimizer step and returns the prediction."""
    layout = SelfLayout.qwen([sample], zero_cond_t=bool(model.config.zero_cond_t))
    device, dtype = model.device, torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size):
        return torch.randn(*size, device=device, generator=generator).to(dtype)

    image = normal(layout.image_length, model.config.in_channels)
    text = normal(sample.text, model.config.joint_attention_dim)
    targets = sample.target[1] * sample.target[2]
    goal, t = normal(targets, model.config.in_channels).float(), torch.full((1,), 0.5, device=device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-9, fused=CUDA)
    packed = PackedQwenImage(model, checkpointing=True)
    model.train()
    model.enable_gradient_checkpointing()

    def predict():
        with torch.autocast(device.type, dtype):  # the adapter's float32 weights in bfloat16, as sharding casts them
            if which == "ours":
                return packed(image, text, t, layout)
            grids = [[sample.target, *sample.references]]
            return model(image[None], text[None], None, t, grids, return_dict=False)[0][0, :targets]

    def step():
        prediction = predict()
        F.mse_loss(prediction.float(), goal).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return prediction.detach()

    return step, 3 * sum(transformer_flops(model.config, layout))


def sample_of(side, target_side=1024):
    sizes = fit_to_budget([(4000, 3000), (3000, 4000), (2048, 2048)], side * side)
    grids = [(1, height // 16, width // 16) for width, height in sizes]
    return Sample(TEXT, (1, target_side // 16, target_side // 16), tuple(grids))


@pytest.fixture(scope="module")
def model():
    if not CUDA or torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs a GPU with 60 GiB: the weights alone are 41 GB")
    return make_model(SHAPE, "cuda")


@pytest.mark.parametrize("which", ["stock", "ours"])
@pytest.mark.parametrize("side", [1024, 1536, 2048])
def test_lora_step(timed, benchmark, model, side, which):
    benchmark.group = f"20B LoRA step, {side}x{side} budget"
    sample = sample_of(side)
    (step, flops), (stock, _) = (make_step(model, sample, each) for each in (which, "stock"))
    assert max_relative_error(step(), stock()) < 0.1
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated()
    timed(step, stock, flops=flops, dtype=torch.bfloat16)
    info, known = benchmark.extra_info, peak_flops("cuda", torch.bfloat16)
    info.update(tokens=sample.length, peak_gib=peak / 2**30, mfu=known and flops / info["seconds"] / known)
