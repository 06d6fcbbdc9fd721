"""Defaults of an evaluation's configuration."""

import json
from dataclasses import replace


def test_default_guidance_is_off_for_the_built_in_model(config):
    assert replace(config, true_cfg_scale=None).resolve_sampling()[1] == 1.0 == config.resolve_sampling()[1]
    other = replace(config, num_inference_steps=None, true_cfg_scale=None, model="a/b")
    assert other.resolve_sampling() == (50, 4.0) and replace(other, true_cfg_scale=2.5).resolve_sampling() == (50, 2.5)


def test_a_model_is_evaluated_with_the_visibility_of_its_training(config, tmp_path):
    """Shared references of a group are a sample's own references here."""
    assert config.resolve_visibility() == "full"
    for trained, expected in (("reference_isolated", "reference_isolated"), ("group_shared", "reference_causal")):
        run = tmp_path / trained
        (run / "lora").mkdir(parents=True)
        (run / "config.json").write_text(json.dumps({"visibility": trained}))
        assert replace(config, initial=(run,)).resolve_visibility() == expected
        assert replace(config, initial=(run,), visibility="full").resolve_visibility() == "full"
