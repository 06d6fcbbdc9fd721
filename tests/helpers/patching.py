"""Shared helpers of the tests of patch: a small input, and a comparison of stock and patched models."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import uniref_fast
from uniref_fast.testing import max_relative_error

ROUNDING = 2e-5
"""Largest relative error, in float32, between two orders of the same sums: about 170 roundings of the largest value.

Errors of one operator are measured with the error budget instead; here whole models and loops are compared."""

GRIDS = [(1, 4, 6), (1, 3, 5), (1, 1, 7)]
TOKENS = sum(f * h * w for f, h, w in GRIDS)


def inputs(dtype=torch.float32, batch=1, text=7, mask=None, seed=1, grids=GRIDS):
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(f * h * w for f, h, w in grids)
    return {
        "hidden_states": torch.randn(batch, tokens, 64, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch, text, 48, generator=generator).to(dtype),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.rand(batch, generator=generator),
        "img_shapes": [grids] * batch,
        "return_dict": False,
    }


def run(model, **kwargs):
    with torch.no_grad():
        return model(**inputs(**kwargs))[0]


def assert_compiled_blocks(model, run, calls, graphs):
    """Compare a model with itself, patched and with compiled blocks, and return the report of the patch.

    Args:
        model: The model.
        run: Function that calls a model.
        calls: Keyword arguments of `run` for each call.
        graphs: Largest number of graphs of all calls.
    """
    expected = [run(model, **given) for given in calls]
    report, counter = uniref_fast.patch(model), CompileCounterWithBackend("eager")
    torch.compiler.reset()
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    for given, theirs in zip(calls, expected, strict=True):
        assert max_relative_error(run(model, **given), theirs) < ROUNDING, given
    torch.compiler.reset()
    assert 0 < counter.frame_count <= graphs and not report.fallbacks
    kinds = {
        type(block): block.forward.__code__
        for block in model.modules()
        if type(block).__name__ in model._repeated_blocks
    }
    assert len({*kinds.values()}) == len(kinds), "the graphs of two kinds of block share one limit"
    return report


def assert_patched_equals_stock(
    prepare,
    make_transformer,
    *,
    fallback=None,
    calls=2,
    tolerance=ROUNDING,
    patch_first,
    dtype=torch.float32,
    moving=False,
):
    """Run a feature on a stock and on a patched model, installed in the given order, and compare every call.

    Args:
        prepare: Function that enables the feature on a model.
        make_transformer: Fixture that makes models.
        fallback: Part of the reason why the patched model runs the original; None if it must not.
        calls: Number of calls.
        tolerance: Largest relative error.
        patch_first: Patch before the feature is enabled.
        dtype: Dtype of the models.
        moving: Give every call another input, as in the steps of an edit.
    """
    stock, model = make_transformer(True, dtype=dtype), make_transformer(True, dtype=dtype)
    prepare(stock)
    if patch_first:
        report = uniref_fast.patch(model)
        prepare(model)
    else:
        prepare(model)
        report = uniref_fast.patch(model)
    for step in range(calls):
        given = {"dtype": dtype, "seed": step if moving else 1}
        with stock.cache_context("cond"):
            expected = run(stock, **given)
        with model.cache_context("cond"):
            assert max_relative_error(run(model, **given), expected) < tolerance, f"call {step + 1}"
    if fallback:
        assert any(fallback in reason for reason in report.fallbacks), report
    else:
        assert report.calls.total() > 0 and not report.fallbacks, report
    return model, report


order = pytest.mark.parametrize("patch_first", [True, False])
