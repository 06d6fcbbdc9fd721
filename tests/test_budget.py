import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uniref_fast.budget import fit_to_budget

sizes = st.lists(st.tuples(st.integers(1, 6000), st.integers(1, 6000)), min_size=1, max_size=8)


@settings(max_examples=300, deadline=None)
@given(sizes, st.integers(64, 2048), st.booleans())
def test_fits_and_keeps_ratios(sizes, side, upscale):
    fitted = fit_to_budget(sizes, side, upscale=upscale)
    assert sum(w * h for w, h in fitted) <= side * side
    assert all(w % 16 == h % 16 == 0 and w >= 16 and h >= 16 for w, h in fitted)
    # One scale explains every side that is not at the floor of 16, each to within one 16-pixel step.
    low = max((s - 16) / f for size, fit in zip(sizes, fitted, strict=True) for f, s in zip(size, fit, strict=True))
    high = min(
        (
            (s + 16) / f
            for size, fit in zip(sizes, fitted, strict=True)
            for f, s in zip(size, fit, strict=True)
            if s > 16
        ),
        default=float("inf"),
    )
    assert low <= high
    if not upscale:
        pairs = [(a, b) for size, fit in zip(sizes, fitted, strict=True) for a, b in zip(size, fit, strict=True)]
        assert all(fit <= max(16, size + 8) for size, fit in pairs)


def test_uses_the_budget():
    assert fit_to_budget([(4000, 4000)], 1024) == [(1024, 1024)]
    assert fit_to_budget([(2000, 1000), (1000, 2000)], 1024) == [(1024, 512), (512, 1024)]
    assert fit_to_budget([(512, 512)], 1024) == [(512, 512)]  # never enlarged unless asked
    assert fit_to_budget([(512, 512)], 1024, upscale=True) == [(1024, 1024)]
    assert fit_to_budget([], 1024) == []


def test_tiny_and_extreme_images():
    assert fit_to_budget([(1, 1)], 1024) == [(16, 16)]
    width, height = fit_to_budget([(100000, 10)], 1024)[0]  # too elongated: the short side stays at 16
    assert height == 16 and width * height <= 1024**2 and width > 60000


@pytest.mark.parametrize(
    "sizes, budget, message",
    [
        ([(0, 5)], 32, "at least 1 pixel"),
        ([(50, 50)] * 3, 27, "3 images cannot fit a budget of 27 x 27 pixels: each needs .* together 768"),
        ([(9, 9)], 15, "budget is the side of a square in pixels, at least 16; got 15"),
        ([(9, 9)], float("nan"), "at least 16; got nan"),
        ([(9, 9)], float("inf"), "at least 16; got inf"),
        ([(9, 9)], 1024**2, "budget is the side of a square in pixels; for 1048576 pixels give 1024"),
        ([(9, 9)], 16385, "for 16385 pixels give 128"),
        ([(float("nan"), 5)], 30, "at least 1 pixel"),
    ],
)
def test_bad_input(sizes, budget, message):
    with pytest.raises(ValueError, match=message):
        fit_to_budget(sizes, budget)


def test_a_budget_is_a_number():
    assert fit_to_budget([(16, 16)], 16384) == [(16, 16)]
    with pytest.raises(TypeError, match="budget must be a number, got '64'"):
        fit_to_budget([(16, 16)], "64")
