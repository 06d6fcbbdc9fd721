"""Check that no step of an edit waits for the device: nothing reads a value of a tensor on the host."""

import pytest
import recorded_graphs
import torch
from family_models import FAMILIES
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import uniref_fast
from uniref_fast import EditRequest, edit_session
from uniref_fast.edit_loop import EditLoop
from uniref_fast.edit_session import EditSession
from uniref_fast.models.step_graphs import StepGraphs

READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__")
OPS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero")
IMAGES = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
REQUESTS = [
    EditRequest("put picture 1 on picture 2", IMAGES, negative_prompt=" ", num_inference_steps=4, seed=0),
    EditRequest("make it night", IMAGES[:1], true_cfg_scale=1.0, num_inference_steps=3, seed=1),
]


class NoReads(TorchDispatchMode):
    """Refuse the operators whose result depends on reading a value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in OPS, f"{func} waits for the device"
        if func.overloadpacket is torch.ops.aten.index:
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "an index by a mask waits for the device"
        return func(*args, **(kwargs or {}))


def refuse_reads(monkeypatch):
    """Refuse the methods that read values of tensors."""

    def refused(name):
        def read(self, *arguments, **options):
            raise AssertionError(f"Tensor.{name} waits for the device")

        return read

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, refused(name))


def test_the_detector_sees_reads(monkeypatch):
    x = torch.ones(3)
    for read in (lambda: x[x > 0], x.sum().item, x.nonzero):
        with pytest.raises(AssertionError, match="waits for the device"), NoReads():
            read()
    refuse_reads(monkeypatch)
    for read in (x.tolist, x.cpu, lambda: bool(x.sum() > 0), lambda: int(x[0]), lambda: [1, 2][x[0].long()]):
        with pytest.raises(AssertionError, match="waits for the device"):
            read()


@pytest.mark.parametrize("keep", [False, 2])
def test_no_step_of_an_edit_reads_a_value(builtin_pipe, monkeypatch, keep):
    """Check all steps but the first, also where a request ends and the others are packed again."""
    steps, predict = [], EditLoop._predict

    def predicted(loop, packs):
        steps.append(max(edit.steps for edit in loop.edits))
        if steps == [0]:
            return predict(loop, packs)
        refuse_reads(monkeypatch)
        with NoReads():
            return predict(loop, packs)

    monkeypatch.setattr(EditLoop, "_predict", predicted)
    undone = EditSession.decode
    monkeypatch.setattr(EditSession, "decode", lambda *arguments: (monkeypatch.undo(), undone(*arguments))[1])
    uniref_fast.edit(builtin_pipe, REQUESTS, progress=False, keep_references=keep)
    assert steps == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "family, name, options",
    [
        ("qwen-image-edit", "QwenImageEditPlusPipeline", {"keep_references": 2, "keep_dtype": "int8"}),
        ("qwen-image-2.1", "QwenImage21Pipeline", {}),
        ("flux2", "Flux2KleinKVPipeline", {}),
        ("flux3", "Flux3ModularPipeline", {"keep_references": 3}),
        ("z-image", "ZImageOmniPipeline", {"keep_references": 2}),  # its refiner uses the same stores
    ],
)
def test_no_captured_step_reads_a_value(request, monkeypatch, family, name, options):
    """Check all steps but the first while they are captured and replayed by the stand-in, which refuses reads too."""
    recorded_graphs.install(monkeypatch)
    monkeypatch.setattr(edit_session, "check_capture", lambda model, device: None)
    pipe = FAMILIES[family][0](name, request)
    run, calls = StepGraphs.__call__, []

    def called(graphs, *arguments):
        calls.append(graphs)
        if len(calls) == 1:
            return run(graphs, *arguments)
        with pytest.MonkeyPatch.context() as patched, NoReads():
            refuse_reads(patched)
            return run(graphs, *arguments)

    monkeypatch.setattr(StepGraphs, "__call__", called)
    edit = {"prompt": "an owl", "images": IMAGES, "num_inference_steps": 6, "height": 64, "width": 64, "seed": 0}
    given = {"progress": False, "output_type": "latent", **options}
    (captured,) = uniref_fast.edit(pipe, [edit], capture=True, **given)
    assert len(calls) == 6 and calls[0].forwards["replayed"] >= 3
    assert torch.equal(captured, uniref_fast.edit(pipe, [edit], **given)[0])


def test_no_call_of_a_patched_transformer_reads_a_value(builtin_pipe, monkeypatch):
    """Check the calls after the first ones, which run the self-checks."""
    transformer, calls = builtin_pipe.transformer, []
    uniref_fast.patch(builtin_pipe)
    forward = transformer.forward

    def spied(*arguments, **options):
        calls.append(len(calls))
        if len(calls) <= 2:
            return forward(*arguments, **options)
        with pytest.MonkeyPatch.context() as patched:
            refuse_reads(patched)
            return forward(*arguments, **options)

    monkeypatch.setattr(transformer, "forward", spied)
    try:
        builtin_pipe(IMAGES, "put picture 1 on picture 2", negative_prompt=" ", num_inference_steps=3)
    finally:
        monkeypatch.undo()
        uniref_fast.unpatch(builtin_pipe)
    assert len(calls) == 6
