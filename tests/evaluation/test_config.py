"""Defaults of an evaluation's configuration."""

import json
from dataclasses import replace


def test_default_guidance_is_off_for_the_built_in_model(config):
    assert replace(config, guidance=None).scale == 1.0 == config.scale
    assert replace(config, guidance=None, model="a/b").scale == 4.0 and replace(config, guidance=2.5).scale == 2.5


def test_a_model_is_evaluated_with_the_visibility_of_its_training(config, tmp_path):
    """Shared references of a group are a sample's own references here."""
    assert config.resolve_visibility() == "full"
    for trained, expected in (("reference_isolated", "reference_isolated"), ("group_shared", "reference_causal")):
        run = tmp_path / trained
        (run / "lora").mkdir(parents=True)
        (run / "config.json").write_text(json.dumps({"visibility": trained}))
        assert replace(config, initial=(run,)).resolve_visibility() == expected
        assert replace(config, initial=(run,), visibility="full").resolve_visibility() == "full"
