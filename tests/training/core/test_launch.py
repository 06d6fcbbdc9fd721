"""The launcher: what it reads and resolves before a run is built."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from uniref_fast import flags as configs
from uniref_fast import loading
from uniref_fast.training import sft
from uniref_fast.training.core import launch
from uniref_fast.training.core.checkpoint import Newest
from uniref_fast.training.core.flux2_size import Flux2Size
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


# ---- the adapter of the initial run ----


def adapter(path, rank=8, alpha=16.0, targets=("to_q", "to_k"), **peft):
    """Write the folder of a run with an adapter, as far as the launcher reads it."""
    run = run_folder(path)
    (run / "lora").mkdir()
    name = "alpha" if peft.get("peft_type") == "LOKR" else "lora_alpha"
    peft |= {"r": rank, name: alpha, "target_modules": list(targets)}
    found = {f"transformer.{name}": value for name, value in peft.items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(found)}
    save_file({"x": np.zeros(1, np.float32)}, run / "lora" / "pytorch_lora_weights.safetensors", metadata)
    return run


def test_a_run_takes_the_adapter_settings_of_its_initial_run(tmp_path, capsys):
    config = dataclasses.replace(SFT_CONFIG, initial=adapter(tmp_path / "run"))
    found = launch.with_adapter(config, {"initial", "steps"})
    assert (found.lora_rank, found.lora_alpha, found.lora_targets) == (8, 16.0, ("to_k", "to_q"))
    assert "continues the adapter of" in capsys.readouterr().err
    assert launch.with_adapter(found, {"lora_rank", "lora_alpha", "lora_targets"}) == found, "equal values are given"
    assert not capsys.readouterr().err


def test_targets_that_are_the_same_keep_their_order(tmp_path):
    """peft writes them in any order, and the order of a run that is resumed must not differ from that of its start."""
    targets = SFT_CONFIG.lora_targets
    config = dataclasses.replace(SFT_CONFIG, initial=adapter(tmp_path / "run", targets=targets[::-1]))
    assert launch.with_adapter(config).lora_targets == targets


def test_whole_names_of_layers_are_those_of_the_target_that_ends_them(tmp_path, capsys, monkeypatch):
    """`to_out` of FLUX.2 is also a list, so that an adapter has the whole names of these layers (`add_adapter`)."""
    monkeypatch.setattr(loading, "configuration", lambda name: ({}, {"_class_name": Flux2Size.transformer_class}))
    targets = Flux2Size.lora_targets
    written = [*targets[:-1], *(f"single_transformer_blocks.{i}.attn.to_out" for i in range(2))]
    run = adapter(tmp_path / "run", targets=written)
    config = dataclasses.replace(SFT_CONFIG, model="a/b", initial=run, lora_rank=8, lora_alpha=16.0)
    assert launch.with_adapter(config).lora_targets == targets and not capsys.readouterr().err
    given = dataclasses.replace(config, lora_targets=targets[::-1])
    assert launch.with_adapter(given, {"lora_targets"}) == given
    fewer = dataclasses.replace(config, initial=adapter(tmp_path / "fewer", targets=written[1:]))
    assert launch.with_adapter(fewer).lora_targets == tuple(sorted(written[1:]))


def test_the_kind_of_the_adapter_is_that_of_the_initial_run(tmp_path):
    config = dataclasses.replace(SFT_CONFIG, initial=adapter(tmp_path / "run", use_dora=True))
    assert launch.with_adapter(config).adapter == "dora"
    lokr = adapter(tmp_path / "lokr", peft_type="LOKR", alpha=4.0)
    found = launch.with_adapter(dataclasses.replace(SFT_CONFIG, initial=lokr))
    assert (found.adapter, found.lora_rank, found.lora_alpha) == ("lokr", 8, 4.0)
    with pytest.raises(ValueError, match="whose adapter is dora, not rslora; leave --adapter out"):
        launch.with_adapter(dataclasses.replace(config, adapter="rslora"), {"adapter"})


@pytest.mark.parametrize(
    ("name", "value"), [("lora_rank", 4), ("lora_rank", None), ("lora_alpha", 8.0), ("lora_targets", ("to_v",))]
)
def test_other_adapter_settings_than_those_of_the_initial_run_are_refused(tmp_path, name, value):
    config = dataclasses.replace(SFT_CONFIG, initial=adapter(tmp_path / "run"), **{name: value})
    with pytest.raises(ValueError, match=rf"whose {name} is .*leave --{name.replace('_', '-')} out, or fuse") as caught:
        launch.with_adapter(config, {name})
    assert "null" not in str(caught.value)
    assert getattr(launch.with_adapter(config), name) != value, "a recipe's own value is replaced"


def test_an_initial_run_without_an_adapter_or_without_weights(tmp_path):
    run = run_folder(tmp_path / "run")
    config = dataclasses.replace(SFT_CONFIG, initial=run, lora_rank=4)
    with pytest.raises(ValueError, match="neither lora/ nor transformer/"):
        launch.with_adapter(config)
    (run / "transformer").mkdir()
    without = dataclasses.replace(config, lora_alpha=4.0)
    assert launch.with_adapter(config, {"lora_rank"}) == without
    (run / "lora").mkdir()
    (run / "lora" / "other.safetensors").write_bytes(b"damaged")
    assert launch.with_adapter(config, {"lora_rank"}) == without, "loading the file reports it"


def test_a_run_that_an_older_version_started_from_an_adapter_is_resumed(tmp_path):
    """Accept a checkpoint that records the alpha of the recipe, though the adapter was trained with its own."""
    initial = adapter(tmp_path / "run")
    config = dataclasses.replace(SFT_CONFIG, initial=initial, lora_rank=8, lora_alpha=64.0, visibility="full")
    ranks = SimpleNamespace(broadcast=lambda value: value)
    newest = Newest(1, {"config": json.loads(configs.to_json(config)), "visibility": "full"}, [])
    before = launch.recorded(newest, tmp_path, ranks)
    assert before["lora_alpha"] == 16.0
    assert launch.accept(launch.with_adapter(config), newest, before, tmp_path) == {}


def test_ctrl_c_before_the_first_step_is_one_line(monkeypatch, tmp_path, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "_launch", interrupted)
    assert sft.main(["--recipe", "tiny", "--out", str(tmp_path / "run")]) == 130
    error = capsys.readouterr().err
    assert error.startswith("sft: interrupted") and error.count("\n") == 1


def test_the_last_line_names_the_model_of_the_adapter(tmp_path):
    config = dataclasses.replace(SFT_CONFIG, model="a/b", lora_rank=4)
    line = launch.last_line(SimpleNamespace(config=config, out=tmp_path / "my run"), 0)
    assert f"uniref-fast edit --model a/b --lora '{tmp_path / 'my run'}'" in line
