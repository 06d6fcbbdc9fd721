"""Captured steps equal eager ones bit for bit; a stand-in replays the operators on a CPU (tests/helpers)."""

import contextlib
import functools
import inspect

import pytest
import recorded_graphs
import torch
from PIL import Image
from torch.utils._pytree import tree_leaves

import uniref_fast
from uniref_fast import EditReport, EditRequest, edit_session
from uniref_fast.layout import Sample
from uniref_fast.models import PackedQwenImage, step_graphs
from uniref_fast.models.flux3 import PackedFlux3
from uniref_fast.models.kept_references import KeptReferences, RefreshSchedule
from uniref_fast.models.step_graphs import FIRST, StepGraphs, check_capture

SAMPLES = [Sample(7, (1, 4, 6), ((1, 3, 5), (1, 2, 9))), Sample(3, (1, 3, 3)), Sample(11, (1, 2, 2), ((1, 9, 12),))]
CUDA = torch.device("cuda")


@pytest.fixture
def recorded(monkeypatch):
    recorded_graphs.install(monkeypatch)


@pytest.fixture
def run(make_transformer):
    return PackedQwenImage(make_transformer(True, layers=2))


def inputs(run, count, seed=0, dtype=torch.float32):
    """Yield image, text, times and layout of each step; the references differ by step as well."""
    generator = torch.Generator().manual_seed(seed)
    layout = run.layout(SAMPLES)
    text = torch.randn(layout.text_length, 48, generator=generator).to(dtype)
    for _ in range(count):
        image = torch.randn(layout.image_length, 64, generator=generator).to(dtype)
        yield image, text, torch.rand(layout.num_samples, generator=generator).to(dtype), layout


def forwards(**counts):
    """Return the expected counts, with short names."""
    names = {"first": FIRST, "limit": f"{counts.pop('of', 1)} graphs are the limit"}
    return {names.get(name, name): count for name, count in counts.items()}


def test_the_stand_in_has_the_arguments_of_pytorch():
    for mine, theirs in (
        (recorded_graphs.graph.__init__, torch.cuda.graph.__init__),
        (recorded_graphs.graph_pool_handle, torch.cuda.graph_pool_handle),
        (recorded_graphs.CUDAGraph.capture_begin, torch.cuda.CUDAGraph.capture_begin),
    ):
        given, expected = inspect.signature(mine).parameters, inspect.signature(theirs).parameters
        assert list(given) == list(expected)[: len(given)]
    for mine, theirs in (
        (recorded_graphs.Stream, torch.cuda.Stream.__new__),
        (recorded_graphs.device, torch.cuda.device),
        (recorded_graphs.set_stream, torch.cuda.set_stream),
    ):
        assert next(iter(inspect.signature(mine).parameters)) in inspect.signature(theirs).parameters
    for name in ("capture_end", "replay", "pool"):
        assert callable(getattr(torch.cuda.CUDAGraph, name))


@torch.no_grad()
def test_latents_references_and_times_are_copied(run, recorded):
    """Steps with the same layout and prompt have one graph, whatever their references are."""
    graphs = StepGraphs(run)
    outs = []
    for image, text, t, layout in inputs(run, 3):
        outs.append((graphs(image, text, t, layout), run(image, text, t, layout)))
    assert all(torch.equal(*pair) for pair in outs), "a result was overwritten by a later step, or is another one"
    assert graphs.forwards == forwards(first=1, replayed=2)
    graphs(image, text, t.double(), layout)
    assert graphs.forwards == forwards(first=2, replayed=2), "a buffer has one dtype"


KEPT = {
    "2": (RefreshSchedule(every=2), None),
    "auto": (RefreshSchedule(drift=10.0), None),
    "int8": (RefreshSchedule(every=2), "int8"),
    "True": (RefreshSchedule(), None),
}


@pytest.mark.parametrize("kind", KEPT)
@torch.no_grad()
def test_kept_references(run, recorded, kind):
    """The count of steps, the schedule and the drift are those of eager steps."""
    schedule, dtype = KEPT[kind]
    graphs = StepGraphs(run)
    mine, theirs = ([KeptReferences(schedule, dtype, 9) for _ in SAMPLES] for _ in range(2))
    for arguments in inputs(run, 9):
        assert torch.equal(graphs(*arguments, mine), run(*arguments, theirs))
    for a, b in zip(mine, theirs, strict=True):
        assert (a.steps, a.refreshed, a.drifts) == (b.steps, b.refreshed, b.drifts)
    assert len(mine[0].refreshed) > (1 if schedule.every or schedule.drift else 0)
    if schedule.every:  # first and later refreshes differ: the later ones measure the drift
        assert graphs.forwards == forwards(first=3, replayed=6)
    assert graphs.forwards["replayed"] > 3


@torch.no_grad()
def test_other_stores_have_other_graphs(run, recorded):
    graphs = StepGraphs(run)
    for seed in range(2):
        mine, theirs = ([KeptReferences() for _ in SAMPLES] for _ in range(2))
        for arguments in inputs(run, 4, seed):
            assert torch.equal(graphs(*arguments, mine), run(*arguments, theirs))
    for store in (*mine, *theirs):  # new tensors hold the keys and values from then on
        store.clear()
    for arguments in inputs(run, 4, seed=5):
        assert torch.equal(graphs(*arguments, mine), run(*arguments, theirs))
    assert graphs.forwards == forwards(first=6, replayed=6)


@pytest.mark.parametrize("schedules", [(3, 3, 3), (3, 2, None)])
@torch.no_grad()
def test_text_and_references_of_flux3(make_flux3, recorded, schedules):
    """Steps that compute other references read the same kept streams; a graph keeps what it reads alive."""
    run = PackedFlux3(make_flux3())
    graphs, steps = StepGraphs(run), 12
    layout, generator = run.layout(SAMPLES), torch.Generator().manual_seed(0)
    mine, theirs = (
        [None if every is None else KeptReferences(RefreshSchedule(every=every)) for every in schedules]
        for _ in range(2)
    )
    constants = run.step_constants(), run.step_constants()
    text = torch.randn(layout.text_length, run.transformer.config.joint_attention_dim, generator=generator)
    image = torch.randn(layout.image_length, 128, generator=generator)
    for _ in range(steps):
        targets = [torch.randn(segment.length, 128, generator=generator) for segment in layout.targets]
        layout.write_targets(image, targets)
        given = image, text, torch.rand(layout.num_samples, generator=generator), layout
        found, expected = graphs(*given, mine, constants[0]), run(*given, theirs, constants[1])
        assert torch.equal(found, expected)
    assert graphs.forwards["replayed"] > steps // 2 and graphs.forwards.total() == steps
    assert all((each.computed, each.references.computed) == (1, 1) for each in constants)
    reads = {x.storage.cdata for graph in graphs._graphs.values() for x in tree_leaves(graph.graph.calls)
             if isinstance(x, recorded_graphs.Outside)}  # fmt: skip
    for path, runs in (("txt_mode_blocks", 0), ("mode_blocks.image_cond", 0), ("mode_blocks.image", 1)):
        weights = {p.untyped_storage()._cdata for p in run.transformer.get_submodule(path).parameters()}
        assert len(weights & reads) == runs * len(weights), f"{path} in replays"
    constants[0]._stream = constants[0].references._stream = None
    for graph in graphs._graphs.values():
        graph.graph.replay()
    image = image.clone()
    image.add_(1)  # other references
    given = image, *given[1:]
    assert torch.equal(graphs(*given, mine, constants[0]), run(*given, theirs, constants[1]))


def change_weights(run, graphs):
    run.transformer.txt_in.bias.add_(0.5)


def move_weights(run, graphs):
    for parameter in run.transformer.parameters():
        parameter.data = parameter.data.clone()


def other_adapter(run, graphs):
    run.transformer.set_adapters("b", 0.5)


def convert(run, graphs):
    run.transformer.to(torch.bfloat16)


@pytest.mark.parametrize("change", [change_weights, move_weights, other_adapter, convert])
@torch.no_grad()
def test_a_change_ends_the_graphs(run, recorded, change):
    from peft import LoraConfig

    for name in ("a", "b"):
        run.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False), name)
    run.transformer.set_adapters("a")
    graphs, constants, dtype = StepGraphs(run), run.step_constants(), torch.float32
    texts = [next(inputs(run, 1, dtype=dtype))[1] for dtype in (torch.float32, torch.bfloat16)]
    for again in range(2):
        text = texts[dtype == torch.bfloat16]  # equal tensors would have graphs of their own
        for image, _, t, layout in inputs(run, 3, dtype=dtype):
            arguments = image, text, t, layout
            assert torch.equal(graphs(*arguments, None, constants), run(*arguments))
        assert graphs.forwards == forwards(first=1 + again, replayed=2 + 2 * again)
        change(run, graphs)
        dtype = run.transformer.dtype


@torch.no_grad()
def test_other_prompts_have_other_graphs(run, recorded):
    """Change the prompt in place."""
    graphs, constants = StepGraphs(run), run.step_constants()
    text = None
    for step, (image, first, t, layout) in enumerate(inputs(run, 6)):
        text = first if text is None else text
        if step == 3:
            text.mul_(2)
        assert torch.equal(graphs(image, text, t, layout, None, constants), run(image, text, t, layout))
    assert graphs.forwards == forwards(first=2, replayed=4)


@torch.no_grad()
def test_the_number_of_graphs_is_limited(run, recorded):
    """Steps of further kinds run eagerly."""
    graphs = StepGraphs(run, max_graphs=1)
    stores = [[KeptReferences() for _ in SAMPLES] for _ in range(2)]
    for arguments in inputs(run, 3):
        for kept in stores:
            graphs(*arguments, kept)
    assert len(graphs._graphs) == 1
    # Of each: the first step, the first kept step; then one is replayed, and the other meets the limit.
    assert graphs.forwards == forwards(first=4, replayed=1, limit=1)
    graphs.clear()
    assert not graphs._graphs and not graphs._held


def picture(color):
    image = Image.new("RGB", (40, 40), color)
    image.paste("white", (10, 10, 20, 30))
    return image


def replace_latents(pipe, step, timestep, given):
    return {"latents": given["latents"] * (1.1 if step % 2 else 0.9)}


OPTIONS = {
    "exact": {},
    "kept, several packs": {"keep_references": 2, "pack_tokens": 200},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_edit(builtin_pipe, recorded, monkeypatch, options):
    """Unlike requests, one with a callback that replaces latents; the report counts the replayed steps."""
    monkeypatch.setattr(edit_session, "check_capture", lambda model, device: check_capture(model, CUDA))
    common = {"height": 32, "width": 32}
    requests = [
        EditRequest("swap them", [picture("red"), picture("blue")], " ", num_inference_steps=6, seed=0, **common),
        EditRequest("make it night", [picture("green")], true_cfg_scale=1.0, num_inference_steps=4, seed=1,
                    callback_on_step_end=replace_latents, **common),
    ]  # fmt: skip
    given = {"output_type": "latent", "progress": False, **OPTIONS[options]}
    report, eager = EditReport(), EditReport()
    captured = uniref_fast.edit(builtin_pipe, requests, capture=True, report=report, **given)
    for mine, theirs in zip(captured, uniref_fast.edit(builtin_pipe, requests, report=eager, **given), strict=True):
        assert torch.equal(mine, theirs)
    assert report.references == eager.references and not eager.forwards
    if options == "exact":  # 4 steps of both requests, then 2 steps of the first one
        assert report.forwards == forwards(first=2, replayed=4) and "4 x replayed" in str(report)
    else:
        assert report.forwards["replayed"] >= 3


def test_a_prompt_that_a_callback_may_replace(builtin_pipe, recorded, monkeypatch):
    """The packs are built in each step, so nothing is replayed and the result is right."""
    monkeypatch.setattr(edit_session, "check_capture", lambda model, device: None)
    request = EditRequest(
        "make it night", [picture("green")], true_cfg_scale=1.0, num_inference_steps=4, seed=1, height=32, width=32,
        callback_on_step_end=lambda pipe, step, t, given: {"prompt_embeds": given["prompt_embeds"] * 0.9},
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )  # fmt: skip
    report = EditReport()
    given = {"output_type": "latent", "progress": False}
    (mine,) = uniref_fast.edit(builtin_pipe, [request], capture=True, report=report, **given)
    assert torch.equal(mine, uniref_fast.edit(builtin_pipe, [request], **given)[0])
    assert report.forwards == forwards(first=4)


def offloaded(run):
    from accelerate.hooks import CpuOffload, add_hook_to_module

    add_hook_to_module(run.transformer, CpuOffload("cpu"))


def hooked(run):
    run.transformer.transformer_blocks[1].attn.to_q.register_forward_hook(lambda *arguments: None)


def shared(run):
    run.parallel = object()


@pytest.mark.parametrize(
    "change, device, reason",
    [
        (None, "cpu", "capture needs a CUDA device, and the pipeline computes on cpu; leave capture out"),
        (offloaded, "cuda", "the transformer has hooks of diffusers or accelerate, such as those of offloading"),
        (hooked, "cuda", "transformer_blocks.1.attn.to_q has forward hooks, which a captured step would skip"),
        (shared, "cuda", "sequence parallelism"),
    ],
)
def test_what_cannot_be_captured(run, change, device, reason):
    check_capture(run, CUDA)
    if change is not None:
        change(run)
    with pytest.raises(ValueError, match=reason):
        check_capture(run, torch.device(device))


def test_edit_on_a_cpu_names_the_reason(builtin_pipe):
    with pytest.raises(ValueError, match="capture needs a CUDA device, and the pipeline computes on cpu"):
        uniref_fast.edit(builtin_pipe, [EditRequest("make it night")], capture=True)


@torch.no_grad()
def test_a_step_that_cannot_be_captured_is_an_error_with_advice(run, recorded, monkeypatch):
    """An operator that waits for the device, such as one of a quantised Linear."""
    proj = run.transformer.proj_out
    monkeypatch.setattr(proj, "forward", lambda x: type(proj).forward(proj, x) * x.abs().max().item())
    graphs = StepGraphs(run)
    first, second = inputs(run, 2)
    graphs(*first)
    current = torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match=r"could not be captured in a CUDA graph \(.*not permitted.*leave"):
        graphs(*second)
    assert torch.cuda.current_stream() is current

    def out_of_memory(x):
        with contextlib.suppress(RuntimeError):
            x.max().item()  # the capture cannot end after it
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(proj, "forward", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        graphs(*second)
    assert torch.cuda.current_stream() is current


def watch_inputs(monkeypatch):
    """Let PyTorch raise an error where a replay would read freed memory, if it knows how."""
    if "check_input_liveness" in inspect.signature(torch.cuda.graph.__init__).parameters:
        monkeypatch.setattr(torch.cuda, "graph", functools.partial(torch.cuda.graph, check_input_liveness=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", [None, *KEPT])
@torch.no_grad()
def test_captured_equals_eager_on_a_gpu(make_transformer, kind, monkeypatch):
    watch_inputs(monkeypatch)
    run = PackedQwenImage(make_transformer(True, layers=2).to("cuda", torch.bfloat16))
    graphs, constants = StepGraphs(run), run.step_constants()
    schedule, dtype = KEPT.get(kind, (None, None))
    mine, theirs = (
        None if schedule is None else [KeptReferences(schedule, dtype, 9) for _ in SAMPLES] for _ in range(2)
    )
    texts: list = []
    for image, text, t, layout in inputs(run, 9, dtype=torch.bfloat16):
        texts.append(text.to("cuda"))
        arguments = image.to("cuda"), texts[0], t.to("cuda"), layout
        assert torch.equal(graphs(*arguments, mine, constants), run(*arguments, theirs))
    assert graphs.forwards["replayed"] > 3
    assert len(graphs._graphs) <= step_graphs.MAX_GRAPHS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_captured_flux3_equals_eager_on_a_gpu(make_flux3, monkeypatch):
    watch_inputs(monkeypatch)
    run = PackedFlux3(make_flux3(torch.bfloat16).to("cuda"))
    graphs, constants, layout = StepGraphs(run), run.step_constants(), run.layout(SAMPLES)
    mine, theirs = ([KeptReferences(RefreshSchedule(every=3)) for _ in SAMPLES] for _ in range(2))
    text = torch.randn(layout.text_length, run.transformer.config.joint_attention_dim, dtype=torch.bfloat16).cuda()
    image = torch.randn(layout.image_length, 128, dtype=torch.bfloat16).cuda()
    for step in range(12):
        layout.write_targets(image, [torch.full_like(image[: s.length], step / 9) for s in layout.targets])
        given = image, text, torch.full((layout.num_samples,), 1 - step / 12).to(image), layout
        assert torch.equal(graphs(*given, mine, constants), run(*given, theirs))
    assert graphs.forwards["replayed"] > 6
