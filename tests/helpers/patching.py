"""Helpers of the tests of patch: a small input, and a comparison of stock and patched models with a feature enabled
before or after patching."""

import pytest
import torch

import uniref_fast
from uniref_fast.testing import max_relative_error

GRIDS = [(1, 4, 6), (1, 3, 5), (1, 1, 7)]
TOKENS = sum(f * h * w for f, h, w in GRIDS)


def inputs(dtype=torch.float32, batch=1, text=7, mask=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, TOKENS, 64, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch, text, 48, generator=generator).to(dtype),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.rand(batch, generator=generator),
        "img_shapes": [GRIDS] * batch,
        "return_dict": False,
    }


def run(model, **kwargs):
    with torch.no_grad():
        return model(**inputs(**kwargs))[0]


def assert_patched_equals_stock(
    prepare, make_transformer, *, fallback=None, calls=2, tolerance=1e-4, patch_first, dtype=torch.float32, moving=False
):
    """Run stock + feature and patched + feature in the given order of installation; compare every call.

    `moving`: every call has an input of its own, as the steps of an edit have.
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
