"""patch together with torch.compile and torch.export: the compiler sees the original, and nothing that counts."""

import pytest
import torch
from patching import ROUNDING, inputs, run
from torch._dynamo.testing import CompileCounterWithBackend

import uniref_fast
from uniref_fast.testing import max_relative_error

pytestmark = pytest.mark.slow


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
    "how, fullgraph, called_before", [("model", False, False), ("blocks", True, False), ("wrapper", True, True)]
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


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compile_repeated_blocks(make_transformer, fullgraph):
    """Inside torch.compile the original block is traced, without a graph break, and the report says so."""
    model, stock = make_transformer(True, layers=2), make_transformer(True, layers=2)
    report = uniref_fast.patch(model)
    assert "compiled" not in str(report)
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=fullgraph)
    assert max_relative_error(run(model), run(stock)) < ROUNDING
    assert not report.calls and report.traces == 2  # one block and its attention: the others reuse the graph
    assert "2 traces of sites by torch.compile; compiled code runs the original" in str(report)


def test_export(make_transformer):
    model, stock = make_transformer(True, layers=1), make_transformer(True, layers=1)
    report = uniref_fast.patch(model)
    with torch.no_grad():
        exported = torch.export.export(model, (), kwargs=inputs()).module()
        assert max_relative_error(exported(**inputs())[0], run(stock)) < ROUNDING
    assert report.traces and not report.calls


@pytest.mark.parametrize("how", ["blocks", "wrapper"])
def test_unpatch_of_a_model_that_was_compiled_afterwards(make_transformer, how):
    model = make_transformer(True, layers=1)
    expected = run(model)
    uniref_fast.patch(model)
    call = compiled(model, how, "eager")
    assert max_relative_error(run(call), expected) < ROUNDING
    assert uniref_fast.unpatch(call) and not uniref_fast.unpatch(call)
    assert torch.equal(run(call), expected)
    assert all("forward" not in vars(block) for block in model.transformer_blocks)


@pytest.mark.parametrize("how", ["model", "blocks", "wrapper"])
def test_a_model_that_is_compiled_already_is_refused(make_transformer, how):
    model = make_transformer(True, layers=2)
    call = compiled(model, how, "eager")
    what = "_orig_mod" if how == "wrapper" else "was compiled in place; patch first, then compile"
    with pytest.raises(TypeError if how == "wrapper" else ValueError, match=what):
        uniref_fast.patch(call)
    assert not uniref_fast.unpatch(call) and not any("forward" in vars(b) for b in model.transformer_blocks)


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
