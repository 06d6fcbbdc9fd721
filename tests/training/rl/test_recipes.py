"""Tests of the settings of MSGRPO: values that are refused, and values at their limits."""

import dataclasses

import pytest

from uniref_fast.training.rl.recipes import MSGRPO, MSGRPO_RECIPES, RLStage, Sampler


def config(**fields):
    return MSGRPO((RLStage(64, 1, 1e-3),), model="builtin", **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clip": -1}, "clip must be at least 0"),
        ({"clip_high": -0.1}, "clip_high must be at least 0"),
        ({"group": 1}, "group must be at least 2"),
        ({"min_members": 17}, "more than a group has, 16"),
        ({"alarm": 3}, "at least 4 steps"),
        ({"ratio_guard": True, "sampler": "cps"}, 'ratio_guard weighs steps by the noise of sampler = "sde"'),
        ({"sampler": "ddim"}, '"sde" with noise above 0'),
        ({"sampler": "cps", "noise": 1.1}, "up to 1"),
        ({"timesteps": 0.0}, "timesteps must be above 0 and at most 1"),
        ({"timesteps": 1.1}, "timesteps must be above 0 and at most 1"),
        ({"advantage_clip": 0.0}, "advantage_clip must be above 0"),
        ({"max_failures": -0.5}, "share from 0 to 1"),
        ({"window": 13}, "does not fit before step 12"),
        ({"window": 3, "window_end": 2}, "does not fit before step 2"),
        ({"window_end": 25}, "window_end must be 1 to rollout_num_inference_steps - 1"),
        ({"rewards": ()}, "at least one reward"),
        ({"reward_weights": (1.0, 2.0)}, "one for each of 1 rewards"),
        ({"kl": 0.1}, "set lora_rank"),
        ({"updates": 25}, "24 trained timesteps cannot be divided among 25 updates"),
    ],
    ids=str,
)
def test_a_wrong_value_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_values_at_their_limits_are_accepted():
    limits = dict(clip=0, clip_high=0.0, group=2, min_members=2, alarm=4, timesteps=1.0, max_failures=1,
                  window=12, updates=12, kl=0.0, rollout_true_cfg_scale=1.0)  # fmt: skip
    found = config(**limits)
    assert {name: getattr(found, name) for name in limits} == limits
    assert config(alarm=0).alarm == 0 and config(kl=0.1, lora_rank=4).kl == 0.1


def test_numbers_of_steps():
    assert (config().noisy_steps, config().trained_steps) == (24, 24)
    window = config(window=4, window_end=20, timesteps=0.5)
    assert (window.noisy_steps, window.trained_steps, window.window_stop) == (4, 2, 20)
    assert config(window=3, timesteps=0.01).trained_steps == 1, "at least one"
    assert config(rollout_true_cfg_scale=2.0).sequences == 2 and config().sequences == 1


def test_every_recipe_is_complete():
    for recipe in MSGRPO_RECIPES.values():
        found = recipe()
        assert dataclasses.replace(found) == found and Sampler(found.sampler, found.noise).noise == found.noise
