"""Whole edits on the built-in pipeline: patched against stock, a packed batch against one by one.

pytest bench/bench_edit.py --benchmark-only
"""

import pytest
import torch

import uniref_fast
from uniref_fast import EditRequest, builtin
from uniref_fast.scenes.make import MakeConfig, artworks, sample
from uniref_fast.testing import max_relative_error

STEPS = 4


@pytest.fixture(scope="module")
def pipe():
    pipe = builtin.load(device="cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def requests():
    """K = 1, 2, 3 references of mixed sizes, guided."""
    scenes = [sample("train", i, MakeConfig(artworks("shipped"), references=(i % 3 + 1,))) for i in range(6)]
    return [
        EditRequest(
            s.instruction, s.references, " ", seed=i, num_inference_steps=STEPS, width=96 + 16 * (i % 3), height=96
        )
        for i, s in enumerate(scenes)
    ]


def stock(pipe, request):
    return pipe(
        image=list(request.images),
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=request.width,
        height=request.height,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="latent",
    ).images


@pytest.mark.parametrize("which", ["stock", "patched"])
@pytest.mark.benchmark(group="one edit, 3 references")
def test_patch(timed, pipe, which):
    request = requests()[2]
    expected = stock(pipe, request)

    def patched():
        """Patched for the call, so that both can run in turns; the first use's self-check is not timed."""
        for site in uniref_fast.patch(pipe).sites:
            site.max_rel_error = 0.0
        try:
            return stock(pipe, request)
        finally:
            uniref_fast.unpatch(pipe)

    assert max_relative_error(patched(), expected) < 1e-4
    calls = {"stock": lambda: stock(pipe, request), "patched": patched}
    timed(calls[which], calls["stock"])


@pytest.mark.parametrize("which", ["stock one by one", "edit one by one", "edit packed"])
@pytest.mark.benchmark(group="six edits, 1 to 3 references, mixed sizes")
def test_packed_batch(timed, pipe, which):
    batch = requests()

    def packed():
        return uniref_fast.edit(pipe, batch, output_type="latent", progress=False)

    calls = {
        "stock one by one": lambda: [stock(pipe, request) for request in batch],
        "edit one by one": lambda: [
            uniref_fast.edit(pipe, [request], output_type="latent", progress=False)[0] for request in batch
        ],
        "edit packed": packed,
    }
    for a, b in zip(packed(), calls["stock one by one"](), strict=True):
        assert max_relative_error(a, b) < 1e-4
    timed(calls[which], calls["stock one by one"])
