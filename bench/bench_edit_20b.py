"""A guided denoising step of the 20B shape (random weights), 1024 x 1024 pixels, 1, 2 and 3 references. GPU only.

    pytest bench/bench_edit_20b.py --benchmark-only

The transformer alone, with the prompt and with the negative one, 700 text tokens each: diffusers' model called twice,
the same with its blocks compiled, patched, both prompts in one pack, and that pack in 8 bits. `peak_gib` is the most
that PyTorch's allocator held, weights included, and `estimated_gib` what `uniref_fast.estimate` expects of the pack.
"""

import gc

import pytest
import torch

import uniref_fast
from uniref_fast import fast
from uniref_fast.costs import transformer_flops, transformer_peak, weight_bytes
from uniref_fast.layout import Sample
from uniref_fast.models import PackedQwenImage
from uniref_fast.quantised_linear import is_quantised
from uniref_fast.testing import max_relative_error


@pytest.fixture(scope="module")
def step_size(tiny):
    """Tokens along a side of each image, and of each prompt."""
    return (4, 5) if tiny else (64, 700)


@pytest.fixture(scope="module")
def model(make_20b):
    yield make_20b().eval()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def members(model, references, side, text, tiny):
    """Name -> a call without arguments that gives both velocities `[2, N, C]`; and the layout of both."""
    device, dtype = model.device, model.dtype
    generator = torch.Generator(device).manual_seed(0)
    sample = Sample(text, (1, side, side), ((1, side, side),) * references)
    latents = torch.randn(1, sum(g[1] * g[2] for g in (sample.target, *sample.references)), model.config.in_channels,
                          device=device, generator=generator).to(dtype)  # fmt: skip
    prompts = torch.randn(2, text, model.config.joint_attention_dim, device=device, generator=generator).to(dtype)
    t = torch.full((1,), 0.5, device=device, dtype=dtype)
    shapes = [[sample.target, *sample.references]]
    packed = PackedQwenImage(model)
    both = packed.layout([sample, sample])

    def one_by_one():
        made = [
            model(latents, prompt[None], None, t, shapes, return_dict=False)[0][0, : side * side] for prompt in prompts
        ]
        return torch.stack(made)

    def compiled():
        """Compiled block by block, as `compile_repeated_blocks` does, for the call."""
        if not compiled_calls:
            for block in model.transformer_blocks:
                block.compile(fullgraph=True, dynamic=False, backend="eager" if tiny else "inductor")
                compiled_calls.append(block._compiled_call_impl)
        for block, call in zip(model.transformer_blocks, compiled_calls, strict=True):
            block._compiled_call_impl = call
        try:
            return one_by_one()
        finally:
            for block in model.transformer_blocks:
                block._compiled_call_impl = None

    def patched():
        """Patched for the call, so that both can run in turns; the first use's self-check is not timed."""
        for site in uniref_fast.patch(model).sites:
            site.max_rel_error = 0.0
        try:
            return one_by_one()
        finally:
            uniref_fast.unpatch(model)

    def pack():
        return packed(latents[0].repeat(2, 1), prompts.flatten(0, 1), t.repeat(2), both).view(2, side * side, -1)

    kept = ("img_mod", "txt_mod") if tiny else None  # the tiny model has a first and a last block only
    parts = fast.eight_bit_parts(model, kept, impl=None if device.type == "cuda" else "reference")
    eight_bit: list = []
    packed_8bit = PackedQwenImage(model, impl=parts.impl, attention_8bit=parts.attention)

    def pack_8bit():
        """Both prompts in one pack with the 8-bit weights, which are made once and put in place for the call."""
        if not eight_bit:
            fast.quantise(model, parts)
            eight_bit.extend((linear, linear.weight) for linear in model.modules() if is_quantised(linear))
            fast.restore(model)
        originals = [linear.weight for linear, _ in eight_bit]
        for linear, weight in eight_bit:
            linear.weight = weight
        try:
            return packed_8bit(latents[0].repeat(2, 1), prompts.flatten(0, 1), t.repeat(2), both).view(
                2, side * side, -1
            )
        finally:
            for (linear, _), weight in zip(eight_bit, originals, strict=True):
                linear.weight = weight

    compiled_calls: list = []
    calls = {"stock": one_by_one, "compiled": compiled, "patched": patched, "one pack": pack}
    calls["one pack, 8 bits"] = pack_8bit
    return {name: torch.no_grad()(call) for name, call in calls.items()}, both


@pytest.mark.parametrize("which", ["stock", "compiled", "patched", "one pack", "one pack, 8 bits"])
@pytest.mark.parametrize("references", [1, 2, 3])
def test_step(timed, benchmark, model, references, which, step_size, tiny):
    benchmark.group = f"guided 20B step, {references} references, 1024x1024"
    calls, layout = members(model, references, *step_size, tiny)
    call, cuda = calls[which], model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    ours = call()
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    assert max_relative_error(ours, calls["stock"]()) < (0.3 if which == "one pack, 8 bits" else 0.05)
    flops = sum(transformer_flops(model.config, layout))
    timed(call, calls["stock"], flops=flops, dtype=torch.bfloat16, graph=False)
    benchmark.extra_info.update(tokens=layout.joint_length, peak_gib=peak / 2**30)
    if which == "one pack":
        expected = weight_bytes(model) + transformer_peak(model, layout)
        benchmark.extra_info.update(estimated_gib=expected / 2**30)
