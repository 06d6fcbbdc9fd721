"""patch together with torch.compile and torch.export: the fused operators are in the graph, and no graph is added."""

import pytest
import torch
from patching import ROUNDING, inputs, run
from torch._dynamo.testing import CompileCounterWithBackend

import uniref_fast
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.patch import traced
from uniref_fast.testing import max_relative_error
from uniref_fast.visibility import plan

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, how, backend, **options):
    """Compile a model in place, its blocks, or a wrapper around it, and return the callable."""
    if how == "wrapper":
        return torch.compile(model, backend=backend, **options)
    (model.compile if how == "model" else model.compile_repeated_blocks)(backend=backend, **options)
    return model


def graphs(model, how, fullgraph):
    """Return the number of graphs after equal calls, and after calls with another text length."""
    counter = CompileCounterWithBackend("eager")
    call, counts = compiled(model, how, counter, fullgraph=fullgraph), []
    for given in ({}, {"text": 9}):
        for _ in range(3):
            run(call, **given)
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    return counts


@pytest.mark.parametrize(
    "how, fullgraph, called_before", [("blocks", True, False), ("wrapper", True, True), ("model", False, False)]
)
def test_as_many_graphs_as_stock(make_transformer, how, fullgraph, called_before):
    """Equal calls compile once, so the compiler has no guard on the counters of the report."""
    layers = 2 if how == "blocks" else 1
    stock, model = make_transformer(True, layers=layers), make_transformer(True, layers=layers)
    report = uniref_fast.patch(model)
    if called_before:  # the self-check has been made, counters stand at other values
        run(model)
        run(stock)
    expected = graphs(stock, how, fullgraph)
    assert expected[0] == 1 and graphs(model, how, fullgraph) == expected
    assert report.traces and not report.traced_originals
    assert report.calls.total() == (2 * layers if called_before else 0) and not report.fallbacks


def test_compiled_calls_after_the_recompile_limit(make_transformer):
    """Then the model runs uncompiled, and nothing of the fused path is compiled piece by piece."""
    counts, reports = [], []
    for patched in (False, True):
        model = make_transformer(True, layers=1)
        counter = CompileCounterWithBackend("eager")
        reports.append(uniref_fast.patch(model) if patched else None)
        with torch._dynamo.config.patch(recompile_limit=1):
            model.compile(backend=counter, dynamic=False)
            outputs = [run(model, text=length) for length in (3, 4, 5)]
        counts.append(counter.frame_count)
        torch._dynamo.reset()
    stock = make_transformer(True, layers=1)
    assert counts[1] == counts[0]
    assert reports[1].calls.total() > 0 and reports[1].max_rel_error < ROUNDING
    for length, out in zip((3, 4, 5), outputs, strict=True):
        assert max_relative_error(out, run(stock, text=length)) < ROUNDING


LAYOUTS = [
    (5 + i, [(1, 4 + i % 3, 6 + i % 4), *((1, 3 + (i + j) % 4, 5) for j in range(i % 3 + 1))]) for i in range(10)
]  # text tokens and grids, 1 to 3 references


def test_ten_layouts_by_block(make_transformer):
    """One graph for the first layout and two for the others, whose sizes are symbols, as without the patch."""
    model, stock = make_transformer(True, layers=1), make_transformer(True, layers=1)
    report, counter = uniref_fast.patch(model), CompileCounterWithBackend("eager")
    model.compile_repeated_blocks(backend=counter, fullgraph=True)
    for text, grids in LAYOUTS:
        given = {"text": text, "grids": grids}
        assert max_relative_error(run(model, **given), run(stock, **given)) < ROUNDING
    assert counter.frame_count <= 3
    assert sum("uniref_fast" in str(node.target) for node in counter.graphs[-1].graph.nodes) == 8
    assert not report.calls and report.traces == 2 * counter.frame_count and not report.traced_originals
    assert "traces of sites by torch.compile; calls of compiled code are neither counted nor compared" in str(report)


def test_gradients_of_a_compiled_batch(make_transformer):
    """The compiler differentiates the operators; a model without zero_cond_t has one table row for each sample."""
    gradients = []
    for patched in (False, True):
        model = make_transformer(False, layers=1)
        if patched:
            uniref_fast.patch(model)
        model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        given = inputs(batch=2)
        given["hidden_states"].requires_grad_()
        model(**given)[0].square().mean().backward()
        gradients.append([given["hidden_states"].grad, *(p.grad for p in model.parameters())])
    for ours, theirs in zip(gradients[1], gradients[0], strict=True):
        if theirs is None:
            assert ours is None
        else:
            assert max_relative_error(ours, theirs) < 10 * ROUNDING


def test_what_cannot_be_traced_runs_the_original(make_transformer):
    """A text mask has values that a graph cannot plan from; the rest of the block stays fused."""
    mask = torch.ones(1, 7, dtype=torch.bool)
    mask[0, 5:] = False
    model, stock = make_transformer(True, layers=1), make_transformer(True, layers=1)
    report = uniref_fast.patch(model)
    model.compile(backend="eager", fullgraph=True)
    assert max_relative_error(run(model, mask=mask), run(stock, mask=mask)) < ROUNDING
    assert report.traces == 1 and "a text mask" in " ".join(report.traced_originals)
    assert "1 traces of the original: a text mask inside torch.compile" in str(report)


def test_a_library_of_attention_is_not_traced(make_transformer):
    model, stock = make_transformer(True, layers=1), make_transformer(True, layers=1)
    report = uniref_fast.patch(model, impl="dense")
    model.compile(backend="eager", fullgraph=True)
    assert max_relative_error(run(model), run(stock)) < ROUNDING
    assert not report.traces and "impl='dense' inside torch.compile" in str(report)


def test_settings_and_code_that_are_checked_when_the_compiler_traces(make_transformer):
    model = make_transformer(True, layers=1)
    report = uniref_fast.patch(model)
    model.transformer_blocks[0].attn.processor._attention_backend = "_native_math"  # as set_attention_backend does
    model.transformer_blocks[0].img_norm1.register_forward_hook(lambda module, args, out: None)
    model.compile(backend="eager", fullgraph=True)
    run(model)
    assert not report.traces and "set_attention_backend" in str(report) and "the norms have hooks" in str(report)


@pytest.mark.parametrize("batch, length", [(1, 37), (3, 37), (2, 16)])  # with and without a rest in the last tile
def test_the_tables_of_a_graph_are_those_of_the_plan(batch, length):
    attention = plan(SelfLayout.qwen([Sample(5, (1, 1, length - 5))] * batch))
    for mine, theirs in zip(traced._plan_tensors(batch, length, CPU), attention.tensors(CPU), strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    for mine, theirs in zip(traced._plan_tensors(batch, length, CPU), attention.transpose.tensors(CPU), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(traced._tiles(batch, length, 16, CPU), attention.tiles(16, CPU))


def test_the_triton_kernels_in_a_graph(make_transformer):
    model, stock = make_transformer(True, layers=1), make_transformer(True, layers=1)
    report = uniref_fast.patch(model, impl="triton")
    model.compile(backend="eager", fullgraph=True)
    given = inputs(batch=2, text=2, grids=[(1, 2, 2), (1, 1, 1)])  # the interpreter is slow
    given["hidden_states"].requires_grad_()
    out, expected = model(**given)[0], stock(**given)[0]
    assert report.traces == 2 and max_relative_error(out, expected) < ROUNDING
    (ours,), (theirs,) = (torch.autograd.grad(x.square().mean(), given["hidden_states"]) for x in (out, expected))
    assert max_relative_error(ours, theirs) < 10 * ROUNDING


def test_export(make_transformer):
    model, stock = make_transformer(True, layers=1), make_transformer(True, layers=1)
    report = uniref_fast.patch(model)
    with torch.no_grad():
        exported = torch.export.export(model, (), kwargs=inputs()).module()
        assert max_relative_error(exported(**inputs())[0], run(stock)) < ROUNDING
    assert report.traced_originals and not report.traces and not report.calls
    assert "torch.export" in str(report)


@pytest.mark.parametrize("how", ["model", "wrapper"])
def test_a_model_that_was_compiled_and_called_before(make_transformer, how):
    """The patch is in the next graph; without it the first graph serves again."""
    model, counter = make_transformer(True, layers=1), CompileCounterWithBackend("eager")
    call = compiled(model, how, counter, fullgraph=True)
    expected = run(call)
    report = uniref_fast.patch(call)
    assert max_relative_error(run(call), expected) < ROUNDING and counter.frame_count == 2
    assert report.traces == 2 and any("uniref_fast" in str(node.target) for node in counter.graphs[1].graph.nodes)
    assert uniref_fast.unpatch(call) and not uniref_fast.unpatch(call)
    assert torch.equal(run(call), expected) and counter.frame_count == 2
    assert all("forward" not in vars(block) for block in model.transformer_blocks)


@pytest.mark.parametrize("how", ["model", "blocks", "wrapper"])
def test_patch_again_after_compiling_returns_the_report(make_transformer, how):
    model = make_transformer(True, layers=1)
    report = uniref_fast.patch(model)
    assert uniref_fast.patch(compiled(model, how, "eager")) is report


def test_compiled_code_does_not_attend_fully_under_another_visibility(make_transformer):
    """Compiled code would run the original, which is another model: the call runs uncompiled, or raises."""
    expected, model = make_transformer(True, layers=1), make_transformer(True, layers=1)
    uniref_fast.patch(expected, visibility="reference_causal")
    uniref_fast.patch(model, visibility="reference_causal")
    model.compile(backend="eager")
    assert torch.equal(run(model), run(expected))
    model.compile(backend="eager", fullgraph=True)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="exception"):
        run(model)
