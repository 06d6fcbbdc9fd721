"""The launcher: what it reads and resolves before a run is built."""

import dataclasses
import json
from pathlib import Path

import pytest

from uniref_fast import flags as configs
from uniref_fast.training.core import launch
from uniref_fast.training.core.recipe import BudgetStage
from uniref_fast.training.rl.recipes import MSGRPO, MSGRPO_RECIPES
from uniref_fast.training.supervised.recipes import SFT, SFT_RECIPES

SFT_CONFIG = SFT((BudgetStage(64, 1, 1.0),))


def run_folder(path, **config):
    """Write the configuration of an earlier run."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_configuration_is_built_and_written_without_reading_files(monkeypatch, tmp_path):
    """A path in `initial` is kept as it is; the launcher reads the folder of that run later."""
    run = run_folder(tmp_path / "run", visibility="reference_causal")
    (run / "lora").mkdir()

    def refuse(self, *arguments, **options):
        raise AssertionError(f"{self} is read")

    with monkeypatch.context() as patch:  # undone before pytest reports a failure, which reads files
        for name in ("open", "read_text", "read_bytes", "stat", "is_dir", "is_file", "exists", "iterdir", "glob"):
            patch.setattr(Path, name, refuse)
        configurations = [dataclasses.replace(recipe(), initial=run) for recipe in SFT_RECIPES.values()]
        for recipe in MSGRPO_RECIPES.values():
            configurations.append(dataclasses.replace(recipe(), initial=run, kl=0.1, lora_rank=4))
    texts = [repr(config) + configs.to_json(config) for config in configurations]
    assert all("initial" in text for text in texts)


@pytest.mark.parametrize(
    ("config", "given", "resolved"),
    [
        ({"visibility": "reference_isolated"}, None, "reference_isolated"),
        ({"visibility": "reference_causal"}, "full", "full"),
        ({"visibility": None}, None, "full"),  # as older versions wrote a run that had it from nowhere
        ({"visibility": "group_shared"}, None, "reference_causal"),
        ({}, "reference_causal", "reference_causal"),
    ],
)
def test_the_visibility_of_the_initial_run_is_resolved_once(tmp_path, config, given, resolved):
    initial = run_folder(tmp_path / "run", **config)
    made = dataclasses.replace(SFT_CONFIG, initial=initial, visibility=given)
    assert launch.with_visibility(made).visibility == resolved
    assert launch.with_visibility(launch.with_visibility(made)) == launch.with_visibility(made)


def test_the_configuration_of_an_older_run_names_no_visibility(tmp_path):
    """Older versions wrote null for a visibility that came from an earlier run; the launcher follows `initial`."""
    first = run_folder(tmp_path / "first", visibility="reference_causal")
    old = dataclasses.replace(SFT_CONFIG, initial=first)
    second = tmp_path / "second"
    second.mkdir()
    (second / "config.json").write_text(configs.to_json(old))
    assert json.loads((second / "config.json").read_text())["visibility"] is None
    third = launch.with_visibility(dataclasses.replace(SFT_CONFIG, initial=second))
    assert third.visibility == "reference_causal"


@pytest.mark.parametrize(
    ("trained", "given", "fits"),
    [
        ("reference_causal", "reference_causal", True),
        ("reference_causal", "group_shared", True),
        ("reference_causal", "full", False),
        ("reference_isolated", "group_shared", False),
        ("full", "reference_causal", False),
        (None, "reference_causal", True),
    ],
)
def test_msgrpo_refuses_another_visibility_than_the_trained_one(tmp_path, trained, given, fits):
    initial = run_folder(tmp_path / "run", **({"visibility": trained} if trained else {}))
    config = dataclasses.replace(MSGRPO_RECIPES["lora"](), initial=initial, visibility=given)
    if fits:
        assert launch.with_visibility(config).visibility == given
    else:
        with pytest.raises(ValueError, match=f'visibility = "{given}" is not how .* "{trained}"'):
            launch.with_visibility(config)


def test_msgrpo_refuses_kl_for_an_adapter_that_training_continues(tmp_path):
    initial = run_folder(tmp_path / "run")
    config: MSGRPO = dataclasses.replace(MSGRPO_RECIPES["lora"](), initial=initial, kl=0.1)
    launch.with_visibility(config)
    (initial / "lora").mkdir()
    with pytest.raises(ValueError, match="kl compares with the model without its adapter"):
        launch.with_visibility(config)
    launch.with_visibility(dataclasses.replace(config, kl=0.0))
