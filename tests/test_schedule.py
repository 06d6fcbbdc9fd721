"""Shift of time by resolution, against the scheduler of diffusers."""

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_shift

from uniref_fast.builtin.components import SCHEDULER
from uniref_fast.schedule import denoising_schedule, resolution_shift, shift_time


@pytest.mark.parametrize("tokens", [1, 64, 256, 1024, 4096, 8192, 20000])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_the_shift_is_the_schedulers(tokens, kind):
    scheduler = FlowMatchEulerDiscreteScheduler(**{**SCHEDULER, "time_shift_type": kind, "shift_terminal": None})
    config = scheduler.config
    mu = calculate_shift(
        tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    sigmas = np.linspace(0.9, 0.1, 9)
    scheduler.set_timesteps(sigmas=sigmas, mu=mu, device="cpu")
    shift = resolution_shift(config, tokens)
    expected = shift * sigmas / (1 + (shift - 1) * sigmas)
    np.testing.assert_allclose(scheduler.sigmas[:-1].numpy(), expected, rtol=2e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_fixed_shift_does_not_depend_on_the_size(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    assert resolution_shift(scheduler.config, 16) == resolution_shift(scheduler.config, 4096) == shift


def test_shift_time_keeps_both_ends():
    assert [shift_time(t, 3.0) for t in (0.0, 0.5, 1.0)] == [0.0, 0.75, 1.0]


def test_a_schedule_leaves_the_scheduler_unchanged():
    scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
    before = scheduler.sigmas.clone()
    first, second = (denoising_schedule(scheduler, tokens, 4, "cpu").sigmas for tokens in (64, 4096))
    assert len(first) == 5 and first[0] == 1 and first[-1] == 0
    assert (second[1:-2] > first[1:-2]).all(), "larger images spend more steps near noise"
    assert scheduler.sigmas.equal(before)
