"""Compiled blocks of a packed model: whole graphs, few of them, the results of uncompiled blocks, and edit()."""

from copy import deepcopy

import pytest
import torch
from offloading import Offloading
from patching import ROUNDING
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend

import uniref_fast
from uniref_fast import EditRequest, PackedQwenImage, Sample
from uniref_fast.models.compiled_block import compiler_of
from uniref_fast.models.kept_references import KeptReferences, RefreshSchedule
from uniref_fast.testing import max_relative_error

pytestmark = pytest.mark.slow

LAYOUTS = [
    [Sample(5 + i, (1, 4 + i % 3, 6 + i % 4), [(1, 3 + (i + j) % 4, 5) for j in range(i % 3 + 1)])] * (1 + i % 3)
    for i in range(10)
]  # 1 to 3 samples with 1 to 3 references each
RED = Image.new("RGB", (64, 64), "red")
REQUESTS = [
    EditRequest("make it night", [RED], true_cfg_scale=1.0, seed=1, height=64, width=64, num_inference_steps=2),
    EditRequest("make it day", [RED, RED], negative_prompt=" ", true_cfg_scale=2.0, seed=2, height=64, width=96,
                num_inference_steps=2),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(model, samples):
    layout = model.layout(samples)
    generator = torch.Generator().manual_seed(layout.joint_length)
    image, text = (torch.randn(n, c, generator=generator)
                   for n, c in ((layout.image_length, 64), (layout.text_length, 48)))  # fmt: skip
    return image, text, torch.rand(layout.num_samples, generator=generator), layout


def edit(pipe, **options):
    return uniref_fast.edit(pipe, REQUESTS, output_type="latent", progress=False, **options)


def copied(pipe):
    return type(pipe)(**{**pipe.components, "transformer": deepcopy(pipe.transformer)})


@pytest.mark.parametrize("zero_cond_t, layouts", [(True, LAYOUTS), (False, LAYOUTS[:4])])
def test_layouts(make_transformer, zero_cond_t, layouts):
    """Two graphs for each of the first, the last and the other blocks: the second one has symbols for all sizes.

    Kept references add one for each, so that a process with both stays within PyTorch's limit for one function.
    """
    model = make_transformer(zero_cond_t, layers=3)
    counter, plain, compiled = CompileCounterWithBackend("eager"), PackedQwenImage(model), PackedQwenImage(model)
    compiled.compile_repeated_blocks(backend=counter, fullgraph=True)
    with torch.no_grad():
        for samples in layouts:
            given = inputs(plain, samples)
            assert max_relative_error(compiled(*given), plain(*given)) < ROUNDING
    assert 3 <= counter.frame_count <= 6
    found = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert sum("segment_attention" in name for name in found) == counter.frame_count
    if not zero_cond_t:
        return
    before = counter.frame_count
    with torch.no_grad():
        for samples in layouts[:2]:
            stores = [KeptReferences() for _ in samples]
            for _ in range(2):
                compiled(*inputs(plain, samples), stores)
            compiled(*inputs(plain, samples))
    assert counter.frame_count <= before + 3


@pytest.mark.parametrize("zero_cond_t, dtype", [(True, None), (False, "int8")])
def test_kept_references(make_transformer, zero_cond_t, dtype):
    """One graph for each of the first, the last and the other blocks computes, keeps, and does both in one pack."""
    model = make_transformer(zero_cond_t, layers=3)
    counter = CompileCounterWithBackend("aot_eager")
    plain, compiled = PackedQwenImage(model), PackedQwenImage(model)
    compiled.compile_repeated_blocks(backend=counter, fullgraph=True)
    for samples in (LAYOUTS[1], LAYOUTS[0], LAYOUTS[8]) if dtype is None else LAYOUTS[1:2]:
        every = [2, None, 3][: len(samples)] if len(samples) == 3 else [2, 3][: len(samples)]  # None: nothing is kept
        stores = [[n and KeptReferences(RefreshSchedule(every=n), dtype) for n in every] for _ in range(2)]
        image, text, _, layout = inputs(plain, samples)
        for step in range(5):
            given = image + step, text, torch.full((len(samples),), 0.9 - step / 8), layout
            with torch.no_grad():
                ours, theirs = compiled(*given, stores[1]), plain(*given, stores[0])
            assert max_relative_error(ours, theirs) < (ROUNDING if dtype is None else 1e-3)
        for ours, theirs in zip(*stores, strict=True):
            if theirs is not None:
                assert ours.refreshed == theirs.refreshed and len(theirs.refreshed) < 5 and ours.nbytes == theirs.nbytes
                assert ours.drifts == pytest.approx(theirs.drifts, rel=1e-3)
    assert counter.frame_count == 3


def test_gradients(make_transformer):
    model = make_transformer(True, layers=2)
    gradients = []
    for compile_blocks in (False, True):
        packed = PackedQwenImage(model)
        if compile_blocks:
            packed.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        image, *others = inputs(packed, LAYOUTS[1])
        image.requires_grad_()
        packed(image, *others).square().mean().backward()
        gradients.append([image.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        model.zero_grad()
    for ours, theirs in zip(*gradients, strict=True):
        assert max_relative_error(ours, theirs) < 10 * ROUNDING


def test_inductor(make_transformer):
    model = make_transformer(True, layers=2)
    plain, compiled = PackedQwenImage(model), PackedQwenImage(model)
    compiled.compile_repeated_blocks(fullgraph=True, dynamic=True)
    with torch.no_grad():
        given = inputs(plain, LAYOUTS[1])
        assert max_relative_error(compiled(*given), plain(*given)) < ROUNDING


@pytest.mark.parametrize("how, offloaded, keep", [("compile_repeated_blocks", True, False), ("compile", False, 2)])
def test_edit_with_a_compiled_transformer(builtin_pipe, monkeypatch, how, offloaded, keep):
    """The user's options are used, a second edit compiles nothing, and hooks of blocks stay outside of the graph."""
    expected = edit(builtin_pipe, keep_references=keep)
    pipe, counter = copied(builtin_pipe), CompileCounterWithBackend("eager")
    offloading = Offloading(monkeypatch)
    if offloaded:
        offloading.enable(pipe.transformer, "block_level", stream=True)
    getattr(pipe.transformer, how)(backend=counter, fullgraph=True, dynamic=True)
    for _ in range(2):
        for ours, theirs in zip(edit(pipe, keep_references=keep), expected, strict=True):
            assert max_relative_error(ours, theirs) < 1e-4
        assert counter.frame_count == 3 and not offloading.onloaded
    assert compiler_of(builtin_pipe.transformer) is None
    pipe.transformer._compiled_call_impl = lambda *args: None  # compiled in a way that PyTorch does not describe
    assert compiler_of(pipe.transformer) is torch.compile


def by_leaf(pipe):
    pipe.transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")


UNCOMPILED = {
    "hooks move the weights of the QK norms": (by_leaf, {}),
    "Linears compute in 8 bits": (lambda pipe: None, {"mode": "fast", "impl": "reference"}),
    "plans attention on the host": (lambda pipe: None, {"impl": "dense"}),
}


@pytest.mark.parametrize("reason", UNCOMPILED)
def test_what_cannot_be_compiled_runs_uncompiled_with_the_reason(builtin_pipe, reason):
    prepare, options = UNCOMPILED[reason]
    expected, pipe, counter = edit(builtin_pipe, **options), copied(builtin_pipe), CompileCounterWithBackend("eager")
    prepare(pipe)
    pipe.transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
    with pytest.warns(UserWarning, match=f"ran its blocks uncompiled, because .*{reason}"):
        ours = edit(pipe, **options)
    assert all(map(torch.equal, ours, expected)) and not counter.frame_count
