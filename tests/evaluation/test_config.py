"""Defaults of an evaluation's configuration."""

import json
from dataclasses import replace

import pytest

from uniref_fast.runs import trained_sizes


def test_default_guidance_is_off_for_the_built_in_model(config, tmp_path):
    assert replace(config, true_cfg_scale=None).resolve_sampling()[1] == 1.0 == config.resolve_sampling()[1]
    other = replace(config, num_inference_steps=None, true_cfg_scale=None, model=str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "QwenImageEditPlusPipeline"}')
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


def test_sizes_are_those_of_the_last_stage_of_the_run(config, tmp_path):
    plain = replace(config, budget=None, target_side=None)
    assert plain.resolve_sizes() == (None, None)
    for name, last, expected in (
        ("joint", {"budget": 96, "target_side": 64}, (96, 64)),
        ("alone", {"budget": None, "target_side": 48}, (None, 48)),
        ("older", {"side": 128, "target_side": 64}, (128, 64)),
    ):
        run = tmp_path / name
        (run / "lora").mkdir(parents=True)
        (run / "lora" / "a.safetensors").write_bytes(b"")
        (run / "config.json").write_text(json.dumps({"stages": [{"budget": 16, "target_side": 16}, last]}))
        assert replace(plain, initial=(run,)).resolve_sizes() == expected
        assert replace(plain, lora=(str(run),)).resolve_sizes() == expected
    both = replace(plain, initial=(run,), lora=(str(tmp_path / "joint"),))
    assert both.resolve_sizes() == (96, 64)
    assert replace(both, budget=0).resolve_sizes() == (None, 64), "as in diffusers"
    assert replace(both, budget=32, target_side=16).resolve_sizes() == (32, 16)


@pytest.mark.parametrize(
    "text", ["{", "{}", '{"stages": []}', '{"stages": [{"budget": "x", "target_side": 64}]}', "[]"]
)
def test_a_folder_that_records_no_sizes(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert trained_sizes(tmp_path) is None
