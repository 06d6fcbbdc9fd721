"""Samplers: what they do to data whose velocity is known exactly, and their probabilities."""

import itertools
import math
import re

import pytest
import torch

from uniref_fast.training.rl.recipes import MSGRPO_RECIPES
from uniref_fast.training.rl.sde import (
    FINAL_LIMIT,
    STEP_LIMIT,
    Sampler,
    Transition,
    check_noise,
    deviations,
    divergence,
    largest_noise,
    log_density,
    transition,
    worst,
)

DATA_STD = 0.8


def grid(steps):
    return [1 - i / steps for i in range(steps)] + [0.0]


def tensors(seed=0, n=7):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 5, generator=generator, dtype=torch.float64) for _ in range(3)]


# ---- marginals ----


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [(None, 0.759), (Sampler("sde", 0.7), 0.794), (Sampler("sde", 1.5), 0.801), (Sampler("cps", 0.8), 0.613)],
)
def test_standard_deviation_of_gaussian_data(sampler, expected):
    assert deviations(sampler, grid(25))[-1] * DATA_STD == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("noise", [0.7, 1.5])
def test_the_sde_goes_to_the_data_as_steps_are_added_and_beats_the_ode(noise):
    """Slowly for small noise: what the first step adds falls as steps to the power of -noise^2."""
    off = {steps: abs(deviations(Sampler("sde", noise), grid(steps))[-1] - 1) for steps in (10, 25, 100, 6400)}
    assert off[6400] < 1.5e-3 and off[6400] < off[100] < off[25] < off[10]
    for steps in (10, 25, 100):
        assert off[steps] < 0.35 * abs(deviations(None, grid(steps))[-1] - 1)


def test_the_other_sign_blows_up():
    """The drift as it is printed for noise at t = 0, taken literally here."""
    steps = grid(25)
    variance = 1.0
    for t, t_next in itertools.pairwise(steps):
        std = 0.7 * math.sqrt(t / (1 - (t_next if t == 1 else t)))
        slope = (t - (1 - t) * DATA_STD**2) / ((1 - t) ** 2 * DATA_STD**2 + t**2)
        mean = 1 + (slope - std**2 / (2 * t) * (1 + (1 - t) * slope)) * (t_next - t)
        variance = mean**2 * variance + std**2 * (t - t_next)
    assert math.sqrt(variance) > 2 * DATA_STD
    assert deviations(Sampler("sde", 0.7), steps)[-1] < 1.01


def test_deviations_are_what_samples_have():
    sampler, steps = Sampler("sde", 1.5), grid(10)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400_000, generator=generator, dtype=torch.float64)
    for i, (t, t_next) in enumerate(itertools.pairwise(steps)):
        slope = (t - (1 - t) * DATA_STD**2) / ((1 - t) ** 2 * DATA_STD**2 + t**2)
        step = transition(sampler if i in range(1, 5) else None, x, slope * x, t, t_next)
        x = step.mean + step.std * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        expected = deviations(sampler, steps, range(1, 5))[i] * math.sqrt((1 - t_next) ** 2 * DATA_STD**2 + t_next**2)
        assert x.std().item() == pytest.approx(expected, rel=5e-3)


def test_a_large_noise_is_fine_over_the_whole_way_and_not_in_a_window():
    sampler, steps = Sampler("sde", 1.5), grid(25)
    assert abs(deviations(sampler, steps)[-1] - 1) < 0.01
    assert deviations(sampler, steps, range(1, 5))[-1] > 1.05
    assert abs(deviations(Sampler("sde", 0.7), steps, range(1, 5))[-1] - 1) < 0.03


@pytest.mark.parametrize("steps", [8, 25, 100])
def test_the_first_step_adds_noise_of_its_own_size_however_many_steps_there_are(steps):
    """The mean from t = 1 is (t' - a^2 / 2) x, and the noise has the standard deviation a."""
    a, t_next = 1.5, 1 - 1 / steps
    expected = math.sqrt((t_next - a**2 / 2) ** 2 + a**2) / math.sqrt((1 - t_next) ** 2 * DATA_STD**2 + t_next**2)
    assert expected > 1.5
    ratios = deviations(Sampler("sde", a), grid(steps))
    assert ratios[0] == pytest.approx(expected, rel=1e-9)
    largest, step, final = worst(Sampler("sde", a), grid(steps), [None, range(0, 1)])
    assert largest == max(ratios) and step == ratios.index(largest) + 1
    assert final == max(ratios[-1], deviations(Sampler("sde", a), grid(steps), range(0, 1))[-1])


@pytest.mark.parametrize("places", [[None], [range(first, first + 2) for first in range(4)]])
def test_the_largest_noise_is_within_the_limits_and_the_next_is_not(places):
    def sound(noise):
        found = [deviations(Sampler("sde", noise), grid(25), noisy) for noisy in places]
        return max(map(max, found)) <= STEP_LIMIT and max(ratios[-1] for ratios in found) <= FINAL_LIMIT

    noise = largest_noise(Sampler("sde", 1.5), grid(25), places)
    assert 0.5 <= noise < 1.5 and sound(noise) and not sound(noise + 0.05)
    assert largest_noise(Sampler("sde", 0.04), grid(25), places) is None


def test_the_last_step_is_not_noisy_by_default():
    sampler, steps = Sampler("sde", 0.7), grid(8)
    assert deviations(sampler, steps) == deviations(sampler, steps, range(7)) != deviations(sampler, steps, range(8))


# ---- one step ----


def test_the_ode_step():
    x, v, _ = tensors()
    step = transition(None, x, v, 0.6, 0.5)
    assert step.std == 0 and torch.allclose(step.mean, x - 0.1 * v, rtol=1e-14)


def test_cps_keeps_the_coefficients():
    """Coefficient of the data 1 - t', of the noise t' in size; at noise 0 it would be the ODE step."""
    x0, e, _ = tensors()
    t, t_next, noise = 0.7, 0.4, 0.8
    x, v = (1 - t) * x0 + t * e, e - x0
    step = transition(Sampler("cps", noise), x, v, t, t_next)
    rest = math.sqrt(t_next**2 - step.std**2)
    assert torch.allclose(step.mean, (1 - t_next) * x0 + rest * e, rtol=1e-12)
    assert step.std**2 + rest**2 == pytest.approx(t_next**2) and step.std == t_next * math.sin(0.4 * math.pi)
    small = transition(Sampler("cps", 1e-9), x, v, t, t_next)
    assert torch.allclose(small.mean, transition(None, x, v, t, t_next).mean, rtol=1e-9)
    assert transition(Sampler("cps", 0.5), x, v, t, 0.0).std == 0


def test_at_the_first_step_the_next_grid_point_stands_in():
    x, v, _ = tensors()
    step = transition(Sampler("sde", 0.7), x, v, 1.0, 0.9)
    std = 0.7 * math.sqrt(1 / (1 - 0.9))
    assert step.std == pytest.approx(std * math.sqrt(0.1), rel=1e-12) and step.mean.isfinite().all()
    assert torch.allclose(step.mean, x - 0.1 * (v + std**2 / 2 * x), rtol=1e-12)
    inside = transition(Sampler("sde", 0.7), x, v, 0.9, 0.8)
    assert inside.std == pytest.approx(0.7 * math.sqrt(0.9 / 0.1 * 0.1), rel=1e-12)


@pytest.mark.parametrize(("t", "t_next"), [(0.5, 0.5), (0.4, 0.5), (1.1, 1.0), (0.1, -0.1), (math.nan, 0.1)])
def test_steps_that_do_not_go_down(t, t_next):
    x, v, _ = tensors()
    with pytest.raises(ValueError, match="goes down"):
        transition(None, x, v, t, t_next)


@pytest.mark.parametrize(("kind", "noise"), [("sde", 0.0), ("sde", -1), ("sde", math.inf), ("cps", 1.2), ("ode", 0.5)])
def test_samplers_that_are_none(kind, noise):
    with pytest.raises(ValueError, match="sampler"):
        Sampler(kind, noise)


# ---- probabilities ----


def test_log_density():
    x, v, _ = tensors()
    step = transition(Sampler("sde", 0.7), x, v, 0.6, 0.5)
    point = step.mean + 0.3
    expected = torch.distributions.Normal(step.mean, step.std).log_prob(point).mean()
    assert torch.allclose(log_density(point, step), expected, rtol=1e-12)


@pytest.mark.parametrize(("t", "t_next"), [(1.0, 0.9), (0.6, 0.5), (0.1, 0.02)])
def test_divergence_in_closed_form_and_by_sampling(t, t_next):
    x, v, other = tensors()
    sampler = Sampler("sde", 0.7)
    step, reference = transition(sampler, x, v, t, t_next), transition(sampler, x, v + 0.3 * other, t, t_next)
    std, dt = step.std / math.sqrt(t - t_next), t - t_next
    closed = dt / 2 * (std * (1 - t) / (2 * t) + 1 / std) ** 2 * (0.3 * other).square().mean()
    assert torch.allclose(divergence(step, reference), closed, rtol=1e-12)
    noise = torch.randn(4000, *x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    samples = step.mean + step.std * noise
    log = torch.distributions.Normal(step.mean, step.std).log_prob(samples)
    log = log - torch.distributions.Normal(reference.mean, reference.std).log_prob(samples)
    assert log.mean().item() == pytest.approx(
        closed.item(), rel=0.1, abs=3 * (log.std() / math.sqrt(log.numel())).item()
    )


def test_gradients_reach_the_velocity_and_low_precision_is_raised():
    x, v, point = tensors()
    v = v.to(torch.bfloat16).requires_grad_()
    step = transition(Sampler("sde", 0.7), x.float(), v, 0.6, 0.5)
    assert step.mean.dtype == torch.float32
    log_density(point.float(), step).backward()
    assert v.grad is not None and v.grad.abs().sum() > 0
    assert isinstance(step, Transition)


# ---- the check of the noise ----


def test_noise_that_is_too_large_is_named_with_what_to_set_instead():
    """The paper's noise ends right, after latents that no model was trained on."""
    found = check_noise(Sampler("sde", 1.5), grid(25))
    assert found.final < FINAL_LIMIT and found.largest > 1.5 and found.after_step <= 2 and found.without_noise < 1
    assert f"{found.largest:.2f} times the standard deviation" in found.warning
    sound = float(re.search(r"set noise to ([\d.]+) or less", found.warning)[1])
    assert sound >= 0.7 and check_noise(Sampler("sde", sound), grid(25)).warning == ""
    assert check_noise(Sampler("sde", sound + 0.1), grid(25)).warning != ""


def test_noise_is_judged_at_the_worst_place_of_the_window():
    places = [[0], [1], [2], [3]]
    found = check_noise(Sampler("sde", 1.0), grid(10), window=1, stop=4)
    assert (found.largest, found.after_step, found.final) == worst(Sampler("sde", 1.0), grid(10), places)
    assert found.after_step == 2 and found.largest > worst(Sampler("sde", 1.0), grid(10), places[:1])[0]
    assert found.warning and check_noise(Sampler("sde", 0.2), grid(10), window=2, stop=2).warning == ""


def test_a_window_that_no_noise_fits_should_be_left_out():
    found = check_noise(Sampler("sde", 5.0), grid(2), window=1, stop=1)
    assert "window = none" in found.warning or "set noise to" in found.warning


@pytest.mark.parametrize("name", ["tiny", "lora"])
def test_the_noise_of_the_recipes_is_sound(name):
    recipe = MSGRPO_RECIPES[name]()
    sampler = Sampler(recipe.sampler, recipe.noise)
    assert (
        check_noise(sampler, grid(recipe.rollout_num_inference_steps), recipe.window, recipe.window_stop).warning == ""
    )
