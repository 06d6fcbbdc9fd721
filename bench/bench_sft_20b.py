"""A LoRA step of the 20B shape (random weights) at the three budgets: time, MFU, peak memory. GPU only.

    pytest bench/bench_sft_20b.py --benchmark-only

One sample: a target of 1024 x 1024 pixels and three references that fill the joint budget, 700 text tokens; forward,
backward and AdamW. "stock" is diffusers' forward with its gradient checkpointing; ours keeps attention's results.
"""

import gc

import pytest
import torch
import torch.nn.functional as F

from uniref_fast.budget import fit_to_budget
from uniref_fast.costs import transformer_flops
from uniref_fast.layout import Sample
from uniref_fast.models import PackedQwenImage
from uniref_fast.testing import max_relative_error
from uniref_fast.training.core.base import offloaded_blocks
from uniref_fast.training.core.monitor import peak_flops
from uniref_fast.training.core.offload import Offloading

CUDA = torch.cuda.is_available()


def make_step(model, sample, which, host=()):
    """A function of no arguments that takes one optimizer step and returns the prediction.

    The frozen weights of the blocks with the numbers `host` are on the host.
    """
    packed = PackedQwenImage(model, checkpointing=True)
    Offloading({number: packed.blocks[number] for number in host}, model.device)
    layout = packed.layout([sample])
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


def sample_of(side, tiny):
    """Three references in a joint budget of `side` x `side` pixels, or with a sixteenth of these sides if tiny."""
    text, target_side, side = (5, 64, side // 16) if tiny else (700, 1024, side)
    sizes = fit_to_budget([(4000, 3000), (3000, 4000), (2048, 2048)], side)
    grids = [(1, height // 16, width // 16) for width, height in sizes]
    return Sample(text, (1, target_side // 16, target_side // 16), tuple(grids))


@pytest.mark.parametrize("base", [None, "int8", "fp8", "nf4"])
@pytest.mark.parametrize("host", [0, 30])
def test_step_on_a_frozen_base(timed, benchmark, make_20b, base, host, tiny):
    """A model for each dtype of the base and number of blocks on the host, before the others, whose model stays."""
    benchmark.group = "20B LoRA step by frozen base, budget of 1024x1024"
    model = make_20b(rank=64, base=base)
    numbers = offloaded_blocks(model.config.num_layers, min(host, 1) if tiny else host)
    step, flops = make_step(model, sample_of(1024, tiny), "ours", numbers)
    step()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated() if CUDA else 0
    timed(step, step, flops=flops, dtype=torch.bfloat16, graph=False)
    benchmark.extra_info.update(base=base, offload_blocks=host, peak_gib=peak / 2**30)
    del step, model
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def model(make_20b):
    yield make_20b(rank=64)
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


@pytest.mark.parametrize("which", ["stock", "ours"])
@pytest.mark.parametrize("side", [1024, 1536, 2048])
def test_lora_step(timed, benchmark, model, side, which, tiny):
    benchmark.group = f"20B LoRA step, {side}x{side} budget"
    sample, cuda = sample_of(side, tiny), model.device.type == "cuda"
    step, flops = make_step(model, sample, which)
    made = step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    stock = step
    if which != "stock":
        try:
            stock = make_step(model, sample, "stock")[0]
            assert max_relative_error(made, stock()) < 0.1
        except torch.OutOfMemoryError:  # then there is no ratio
            stock = step
    timed(step, stock, flops=flops, dtype=torch.bfloat16, graph=False)
    info, known = benchmark.extra_info, peak_flops(model.device.type, torch.bfloat16)
    if stock is step and which != "stock":
        info["ratio"] = None
    info.update(tokens=sample.length, peak_gib=peak / 2**30, mfu=known and flops / info["seconds"] / known)
