"""Error budget of numerical tests.

A result in low precision is compared with a float64 oracle that is computed from the *same* low-precision inputs, so
that the rounding of the inputs does not count. Its error may be at most twice the error of plain PyTorch in the same
dtype, plus one rounding band.
"""

from __future__ import annotations

import torch

__all__ = ["assert_within_budget", "error_budget", "max_relative_error"]


def error_budget(eager: torch.Tensor, oracle: torch.Tensor, dtype: torch.dtype | None = None) -> float:
    """Return the largest absolute error allowed: ``2 * max|eager - oracle| + eps(dtype) * max|oracle|``.

    Args:
        eager: Plain PyTorch result, in the dtype under test.
        oracle: Result of the same formula in float64, any device, the same shape.
        dtype: Dtype whose rounding band is added; ``eager.dtype`` by default.
    """
    oracle = oracle.double().cpu()
    if oracle.numel() == 0:
        return 0.0
    assert oracle.isfinite().all() and eager.isfinite().all(), "no budget: the baseline or the oracle is not finite"
    eager_error = (eager.double().cpu() - oracle).abs().max().item()
    return 2.0 * eager_error + torch.finfo(dtype or eager.dtype).eps * oracle.abs().max().item()


def assert_within_budget(actual: torch.Tensor, eager: torch.Tensor, oracle: torch.Tensor, what: str = "") -> None:
    """Raise AssertionError with the failing coordinates unless ``actual`` is finite and within the error budget.

    Args:
        actual: Result under test, any shape.
        eager: Plain PyTorch result in the same dtype and shape.
        oracle: Float64 result of the same shape.
        what: Name that begins the message of a failure.
    """
    assert actual.shape == oracle.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    if actual.numel() == 0:
        return
    result = actual.detach().double().cpu()
    oracle = oracle.detach().double().cpu()
    not_finite = ~torch.isfinite(result)
    assert not not_finite.any(), f"{what}: {int(not_finite.sum())} values not finite, first at {_first(not_finite)}"
    budget = error_budget(eager.detach(), oracle, actual.dtype)
    error = (result - oracle).abs()
    bad = error > budget
    if bad.any():
        index = _first(error == error.max())
        raise AssertionError(
            f"{what}: error {error.max().item():.3e} over the budget of {budget:.3e} in {int(bad.sum())} of "
            f"{bad.numel()} values; first at {_first(bad)}, worst at {index}: "
            f"{result[index].item():.6g}, expected {oracle[index].item():.6g}"
        )


def max_relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ``max|actual - expected| / max|expected|`` in float64; 0 if both are empty."""
    if expected.numel() == 0:
        return 0.0
    expected = expected.detach().double()
    difference = (actual.detach().to(expected.device).double() - expected).abs().max().item()
    return difference / max(expected.abs().max().item(), torch.finfo(torch.float64).tiny)


def _first(mask: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in mask.nonzero()[0])
