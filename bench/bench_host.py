"""Host time of one block: what Python and the dispatcher take, at sizes at which the device computes almost nothing.

pytest bench/bench_host.py --benchmark-only --results bench/results --what host

A block's time is the difference between two models, divided by the difference of their numbers of blocks. On a GPU a
call is timed until it returns, on an idle device; on a CPU its small products are part of the time.
"""

import statistics
import time

import pytest
import torch

import uniref_fast
from uniref_fast import PackedQwenImage, Sample
from uniref_fast.testing import max_relative_error

FEW, MANY = 2, 10
SAMPLE = Sample(4, (1, 2, 2), [(1, 2, 2)])
SHAPE = {"num_attention_heads": 1}  # 64 channels


def inputs(model, device):
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(n, c, generator=generator).to(device, torch.bfloat16)
                   for n, c in ((8, 64), (4, model.config.joint_attention_dim)))  # fmt: skip
    return image, text, torch.tensor([0.5], device=device)


def stock(model, device):
    image, text, t = inputs(model, device)
    return lambda: model(
        hidden_states=image[None], encoder_hidden_states=text[None], timestep=t.to(torch.bfloat16),
        img_shapes=[[SAMPLE.target, *SAMPLE.references]], return_dict=False,
    )[0][0, :4]  # fmt: skip


def patched(model, device):
    uniref_fast.patch(model)
    return stock(model, device)


def packed(model, device):
    image, text, t = inputs(model, device)
    model = PackedQwenImage(model)
    layout = model.layout([SAMPLE])
    return lambda: model(image, text, t, layout)


def compiled(make):
    def prepare(model, device):
        model.compile_repeated_blocks(fullgraph=True, dynamic=False)
        return make(model, device)

    return prepare


CALLS = {
    "diffusers": stock, "patched": patched, "packed": packed, "diffusers, compiled": compiled(stock),
    "patched, compiled": compiled(patched), "packed, compiled": compiled(packed),
}  # fmt: skip


def host_seconds(call, rounds):
    """Median of the seconds until a call returns, each on an idle device."""
    seconds = []
    for _ in range(rounds):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


@pytest.mark.parametrize("which", CALLS)
@pytest.mark.benchmark(group="host time of one block")
@torch.no_grad()
def test_block(benchmark, make_small, device, tiny, which):
    torch._dynamo.reset()
    calls = {}
    for layers in (FEW, MANY):
        expected = stock(make_small(num_layers=layers, **SHAPE), device)()
        calls[layers] = CALLS[which](make_small(num_layers=layers, **SHAPE), device)
        assert max_relative_error(calls[layers](), expected) < 0.05
        calls[layers]()
    pairs = [[host_seconds(call, 1 if tiny else 20) for call in calls.values()] for _ in range(1 if tiny else 10)]
    few, many = (min(column) for column in zip(*pairs, strict=True))
    micros = (many - few) / (MANY - FEW) * 1e6
    benchmark.extra_info.update(host_us_per_block=micros, seconds=many, blocks=MANY)
    print(f"\n{which}: {micros:.0f} us")
    benchmark.pedantic(calls[MANY], rounds=1)
