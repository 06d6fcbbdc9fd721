"""Whole edits on the built-in pipeline: patched against stock, a packed batch against one by one; kept references.

The same for Qwen-Image-2.1 with random weights, whose pipelines keep text and references, patched or not.

pytest bench/bench_edit.py --benchmark-only
"""

import dataclasses
import functools

import pytest
import qwen_image_21
import torch

import uniref_fast
from uniref_fast import EditRequest, builtin
from uniref_fast.layout import Sample
from uniref_fast.models import PackedQwenImage
from uniref_fast.models.kept_references import KeptReferences, RefreshSchedule
from uniref_fast.scenes.make import MakeConfig, artworks, sample
from uniref_fast.testing import max_relative_error

STEPS = 4


def load():
    pipe = builtin.load(device="cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return load()


@pytest.fixture(scope="module")
def patched():
    """A patched pipeline of its own, after its self-check."""
    pipe = load()
    uniref_fast.patch(pipe)
    stock(pipe, requests()[2])
    return pipe


@pytest.fixture(scope="module")
def compiled():
    """Pipelines whose blocks are compiled, unpatched and patched."""
    pipes = {"compiled": load(), "patched and compiled": load()}
    uniref_fast.patch(pipes["patched and compiled"])
    for pipe in pipes.values():
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    return pipes


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
def test_patch(timed, pipe, patched, which):
    request = requests()[2]
    calls = {"stock": lambda: stock(pipe, request), "patched": lambda: stock(patched, request)}
    assert max_relative_error(calls["patched"](), calls["stock"]()) < 1e-4
    timed(calls[which], calls["stock"])


@pytest.mark.parametrize("which", ["compiled", "patched and compiled"])
@pytest.mark.benchmark(group="one edit with compiled blocks, 3 references")
def test_compiled(timed, pipe, compiled, which):
    request = requests()[2]
    calls = {name: functools.partial(stock, one, request) for name, one in compiled.items()}
    expected = stock(pipe, request)
    for call in calls.values():
        assert max_relative_error(call(), expected) < 1e-4
    timed(calls[which], calls["compiled"], graph=False)


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize("which", ["edit", "edit captured"])
@pytest.mark.benchmark(group="40 steps of one edit, 3 references")
def test_capture(timed, pipe, which):
    request = dataclasses.replace(requests()[2], num_inference_steps=40)

    def edit(capture):
        return uniref_fast.edit(pipe, [request], output_type="latent", progress=False, capture=capture)[0]

    calls = {"edit": functools.partial(edit, False), "edit captured": functools.partial(edit, True)}
    assert torch.equal(calls["edit captured"](), calls["edit"]())
    timed(calls[which], calls["edit"], graph=False)


KEPT_STEPS = 12
SCHEDULES = {
    "exact": None,
    "keep_references=3": RefreshSchedule.of(3, None, "changes"),
    "keep_references=auto": RefreshSchedule.of("auto", None, "changes"),
    "keep_references=6": RefreshSchedule.of(6, None, "changes"),
}


@pytest.fixture(scope="module")
def wide(tiny, make_small):
    """Transformer of 8 blocks of 1024 channels with random weights."""
    return PackedQwenImage(make_small(**({} if tiny else {"num_layers": 8, "num_attention_heads": 16})))


@pytest.mark.parametrize("which", SCHEDULES)
@pytest.mark.benchmark(group="12 steps of a packed edit, 1024 channels, 8 blocks, 3 references of the target's size")
def test_kept_references(timed, benchmark, wide, tiny, which):
    """The transformer alone; `refreshed` is the number of steps that computed the references."""
    side = 4 if tiny else 16
    layout = wide.layout([Sample(64, (1, side, side), ((1, side, side),) * 3)])
    device, dtype = wide.transformer.device, wide.transformer.dtype
    image = torch.randn(layout.image_length, 64, device=device).to(dtype)
    text = torch.randn(64, wide.transformer.config.joint_attention_dim, device=device).to(dtype)
    noise = torch.randn(KEPT_STEPS, side * side, 64, device=device).to(dtype)
    refreshed = []

    @torch.no_grad()
    def edit(name):
        kept = SCHEDULES[name] and [KeptReferences(SCHEDULES[name], total=KEPT_STEPS)]
        for step in range(KEPT_STEPS):
            t = 1 - step / KEPT_STEPS
            image[: side * side] = noise[step] * t
            out = wide(image, text, torch.tensor([t], device=device), layout, kept)
        refreshed[:] = kept[0].refreshed if kept else range(KEPT_STEPS)
        return out

    assert max_relative_error(edit(which), edit("exact")) < 0.05, "random weights: references hardly change"
    edit(which)
    benchmark.extra_info["refreshed"] = len(refreshed)
    exact = functools.partial(edit, "exact")
    timed(exact if which == "exact" else functools.partial(edit, which), exact, graph=False)


# ---- Qwen-Image-2.1, 6 blocks of 512 channels with random weights ----

SIDE = 256
"""Side in pixels of a square with the area of references and results."""


@pytest.fixture(scope="module")
def pipes_21(tiny):
    """A stock and a patched pipeline, the latter after its self-check."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {"area": 64**2} if tiny else {"area": SIDE**2, "layers": 6, "num_attention_heads": 4}
    pipes = {name: qwen_image_21.pipeline(**sizes).to(device) for name in ("stock", "patched")}
    uniref_fast.patch(pipes["patched"])
    stock_21(pipes["patched"], requests_21()[2])
    return pipes


def requests_21():
    """K = 1, 2, 3 references of mixed sizes, guided; results of the aspect ratio of the last reference."""
    return [
        EditRequest(r.prompt, r.images, " ", seed=r.seed, num_inference_steps=STEPS, true_cfg_scale=4.0)
        for r in requests()
    ]


def stock_21(pipe, request):
    return pipe(
        image=list(request.images), prompt=request.prompt, negative_prompt=" ", true_cfg_scale=4.0,
        num_inference_steps=STEPS, generator=torch.Generator().manual_seed(request.seed), output_type="latent",
        output_resolution=round(pipe.output_area**0.5),
    ).images  # fmt: skip


@pytest.mark.parametrize("which", ["stock", "patched"])
@pytest.mark.benchmark(group="Qwen-Image-2.1: one edit, 3 references")
def test_patch_21(timed, pipes_21, which):
    calls = {name: functools.partial(stock_21, pipe, requests_21()[2]) for name, pipe in pipes_21.items()}
    assert max_relative_error(calls["patched"](), calls["stock"]()) < 1e-4
    timed(calls[which], calls["stock"])


@pytest.mark.parametrize("which", ["stock one by one", "edit one by one", "edit packed"])
@pytest.mark.benchmark(group="Qwen-Image-2.1: six edits, 1 to 3 references, mixed sizes")
def test_packed_batch_21(timed, pipes_21, which):
    pipe, batch = pipes_21["stock"], requests_21()
    edit = functools.partial(uniref_fast.edit, pipe, output_type="latent", progress=False, keep_references=True)
    calls = {
        "stock one by one": lambda: [stock_21(pipe, request) for request in batch],
        "edit one by one": lambda: [edit([request])[0] for request in batch],
        "edit packed": lambda: edit(batch),
    }
    for a, b in zip(calls["edit packed"](), calls["stock one by one"](), strict=True):
        assert max_relative_error(a, b) < 1e-4
    timed(calls[which], calls["stock one by one"])
