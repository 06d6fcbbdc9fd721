"""A guided denoising step of the 20B shape (random weights), 1024 x 1024 pixels, 1 and 3 references. GPU only.

    pytest bench/bench_edit_20b.py --benchmark-only

The transformer alone, with the prompt and with the negative one, 700 text tokens each: diffusers' model twice; patched,
twice; and both in one pack. `peak_gib` is what the allocator had at most, weights included, and `estimated_gib` what
`uniref_fast.estimate` expects of the pack.
"""

import gc

import pytest
import torch

import uniref_fast
from uniref_fast.estimate import _block_peak, _weight_bytes, transformer_flops
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.models import PackedQwenImage
from uniref_fast.testing import max_relative_error

SIDE, TEXT = 64, 700  # tokens


@pytest.fixture(scope="module")
def model(make_20b):
    yield make_20b().eval()
    gc.collect()
    torch.cuda.empty_cache()


def members(model, references, side, text):
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
    both = SelfLayout.qwen([sample, sample], zero_cond_t=bool(model.config.zero_cond_t))

    def one_by_one():
        made = [
            model(latents, prompt[None], None, t, shapes, return_dict=False)[0][0, : side * side] for prompt in prompts
        ]
        return torch.stack(made)

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

    calls = {"stock": one_by_one, "patched": patched, "one pack": pack}
    return {name: torch.no_grad()(call) for name, call in calls.items()}, both


@pytest.mark.parametrize("which", ["stock", "patched", "one pack"])
@pytest.mark.parametrize("references", [1, 3])
def test_step(timed, benchmark, model, references, which):
    benchmark.group = f"guided 20B step, {references} references, 1024x1024"
    calls, layout = members(model, references, SIDE, TEXT)
    torch.cuda.reset_peak_memory_stats()
    ours = calls[which]()
    peak = torch.cuda.max_memory_allocated()
    assert max_relative_error(ours, calls["stock"]()) < 0.05
    flops = sum(transformer_flops(model.config, layout))
    timed(calls[which], calls["stock"], flops=flops, dtype=torch.bfloat16, graph=False)
    benchmark.extra_info.update(tokens=layout.joint_length, peak_gib=peak / 2**30)
    if which == "one pack":
        expected = _weight_bytes(model) + _block_peak(model, layout.joint_length)
        benchmark.extra_info.update(estimated_gib=expected / 2**30)
