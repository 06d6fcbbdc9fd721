"""Every family on small pipelines with random weights: patched against stock, a packed batch against one by one.

A batch has six edits of 1 to 3 references and of mixed sizes, with guidance where the pipeline has it. Times include
the text encoder and the VAE, which are small.

pytest bench/bench_families.py --benchmark-only --results bench/results --what families
"""

import functools
from types import SimpleNamespace

import pytest
import torch

import uniref_fast
from uniref_fast.family_demo import demo_requests, stock_edit
from uniref_fast.models.families import families
from uniref_fast.testing import max_relative_error

STEPS = 2
SIZES = {"layers": 3, "heads": 2, "grid": 8}  # 256 channels; 3 blocks of each kind: one between the first and the last
SIZES_TINY = {"layers": 3, "heads": 2, "grid": 6}
# With 3 heads, the feed-forwards of Z-Image and Fibo 2 have the multiple of 16 channels that 8-bit products need.
PIPELINES = {name: family for family in families() for name in family.random_pipelines()[:1]}


@pytest.fixture(scope="module", params=PIPELINES)
def small(request, tiny):
    """A stock and a patched pipeline with the same weights, and requests whose results were compared."""
    family, sizes = PIPELINES[request.param], SIZES_TINY if tiny else SIZES
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stock, patched = (family.random_pipeline(request.param, **sizes).to(device) for _ in range(2))
    requests = demo_requests(family, stock, sizes["grid"], 3, STEPS)
    found = SimpleNamespace(family=family, name=request.param, stock=stock, patched=patched, requests=requests)
    uniref_fast.patch(patched)
    expected = [stock_edit(family, stock, each) for each in requests]
    results = [stock_edit(family, patched, requests[0]), *packed(found)]
    for result, image in zip(results, [expected[0], *expected], strict=True):
        assert max_relative_error(result, image) < 1e-4
    return found


def packed(small, requests=None):
    return uniref_fast.edit(small.stock, requests or small.requests, output_type="pt", progress=False)


@pytest.mark.parametrize("which", ["stock", "patched"])
def test_patch(timed, benchmark, small, which):
    benchmark.group = f"{small.family.name}, {small.name}: one edit, {len(small.requests[0].images)} references"
    calls = {
        name: functools.partial(stock_edit, small.family, pipe, small.requests[0])
        for name, pipe in (("stock", small.stock), ("patched", small.patched))
    }
    timed(calls[which], calls["stock"], graph=False)


@pytest.mark.parametrize("which", ["stock one by one", "edit one by one", "edit packed"])
def test_packed_batch(timed, benchmark, small, which):
    benchmark.group = f"{small.family.name}, {small.name}: six edits, mixed references and sizes"
    calls = {
        "stock one by one": lambda: [stock_edit(small.family, small.stock, each) for each in small.requests],
        "edit one by one": lambda: [packed(small, [each])[0] for each in small.requests],
        "edit packed": lambda: packed(small),
    }
    timed(calls[which], calls["stock one by one"], rounds=5, graph=False)


@pytest.mark.parametrize("name", PIPELINES)
def test_errors_of_8_bits(benchmark, name, tiny):
    """The relative errors of two edits in 8 bits and of the products, emulated on any device; no time is measured."""
    family, sizes = PIPELINES[name], (SIZES_TINY if tiny else SIZES) | {"heads": 3}
    pipe = family.random_pipeline(name, **sizes)
    benchmark.group = f"{family.name}, {name}: two edits in 8 bits, emulated"
    report = uniref_fast.EditReport(compare=True)
    requests = demo_requests(family, pipe, sizes["grid"], 3, STEPS)[:2]
    uniref_fast.edit(pipe, requests, mode="fast", impl="reference", progress=False, report=report)
    errors = report.errors.values()
    benchmark.extra_info.update(
        latents=[float(f"{error:.3g}") for error in report.latent_errors], parts=len(errors),
        mean_of_parts=sum(errors) / len(errors), largest_of_parts=max(errors),
    )  # fmt: skip
    benchmark.pedantic(lambda: None, rounds=1)
