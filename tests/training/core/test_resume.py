"""Settings that may change when a run is resumed: there is a decision for every field of every recipe."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from uniref_fast import flags as configs
from uniref_fast.training import msgrpo, sft
from uniref_fast.training.builtin import vae
from uniref_fast.training.core import launch, resume
from uniref_fast.training.core.checkpoint import Newest
from uniref_fast.training.rl.recipes import MSGRPO_RECIPES
from uniref_fast.training.supervised.recipes import SFT_RECIPES

CONFIGS = {
    "SFT": ("", SFT_RECIPES["lora"]()),
    "MSGRPO": ("", MSGRPO_RECIPES["lora"]()),
    "VAE": ("vae.", vae.default()),
}


def data(config):
    return json.loads(configs.to_json(config))


def names(value, name=""):
    """Every setting of a configuration as JSON data, without the numbers of stages."""
    if isinstance(value, dict):
        return {found for key, item in value.items() for found in names(item, f"{name}.{key}".lstrip("."))}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {found for item in value for found in names(item, name)}
    return {name}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_setting_has_a_decision(kind):
    prefix, config = CONFIGS[kind]
    settings = {prefix + name for name in names(data(config))}
    assert {"stages.lr", "judge.url", "lora_alpha"} <= settings or kind != "MSGRPO"
    undecided = settings - set(resume.FIXED) - resume.MAY_CHANGE
    assert not undecided, "say in training/core/resume.py whether these may change when a run is resumed"


def test_no_decision_is_double_or_about_nothing():
    everything = {prefix + name for prefix, config in CONFIGS.values() for name in names(data(config))}
    assert set(resume.FIXED) | resume.MAY_CHANGE == everything
    assert not set(resume.FIXED) & resume.MAY_CHANGE


OTHER = {"adapter": "dora", "lora_rank": 8, "lora_alpha": 32.0, "lora_targets": ("to_q",),
         "dtype": "float32", "weight_dtype": "bfloat16",
         "base": "nf4", "optimizer": "adamw8bit", "ema": 0.5, "visibility": "reference_causal",
         "seed": 5, "weights": (2.0,), "cost": "flops",
         "columns": ("instruction=prompt",)}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in resume.FIXED if "." not in name])
def test_a_fixed_setting_is_refused_in_words(name, tmp_path):
    before = dataclasses.replace(SFT_RECIPES["lora"](), data=("rows.jsonl",))
    after = dataclasses.replace(before, **{name: OTHER[name]})
    message = rf"{resume.FIXED[name].words} is fixed: {name} is .*another --out"
    with pytest.raises(ValueError, match=message):
        accepted(before, after, tmp_path)


def accept(config, newest, out):
    before = launch.recorded(newest, out, SimpleNamespace(broadcast=lambda value: value))
    return launch.accept(config, newest, before, out)


def accepted(before, after, out, step=10, **state):
    before, after = launch.with_visibility(before), launch.with_visibility(after)
    newest = Newest(step, {"config": data(before), "visibility": before.visibility, **state}, [])
    return accept(after, newest, out)


def test_the_message_has_both_values(tmp_path):
    before = dataclasses.replace(SFT_RECIPES["lora"](), lora_rank=8, lora_alpha=64.0)
    after = dataclasses.replace(before, lora_rank=16, lora_alpha=1.0)
    with pytest.raises(ValueError) as caught:
        accepted(before, after, tmp_path)
    assert "the rank of the adapter is fixed: lora_rank is 8, not 16;" in str(caught.value)
    assert "the scale of the adapter is fixed: lora_alpha is 64.0, not 1.0" in str(caught.value)


def test_what_may_change_is_returned(tmp_path):
    before = MSGRPO_RECIPES["lora"]()
    stages = (dataclasses.replace(before.stages[0], lr=1e-5), *before.stages[1:], before.stages[-1])
    judge = dataclasses.replace(before.judge, url="http://other/v1")
    after = dataclasses.replace(before, stages=stages, judge=judge, kl=0.1, model="elsewhere")
    changed = accepted(before, after, tmp_path)
    assert changed.pop("stages.0.lr") == (1e-4, 1e-5) and changed.pop("kl") == (0.0, 0.1)
    assert changed.pop("judge.url") == (before.judge.url, "http://other/v1")
    assert changed.pop("model") == (before.model, "elsewhere")
    assert changed and all(name.startswith("stages.2.") and old is None for name, (old, _) in changed.items())
    assert accepted(before, before, tmp_path) == {}


def test_alike_values_are_no_change(tmp_path):
    sft, rl = SFT_RECIPES["lora"](), MSGRPO_RECIPES["lora"]()
    assert accepted(sft, dataclasses.replace(sft, visibility="full"), tmp_path) == {}, "as it is without"
    causal = dataclasses.replace(rl, visibility="reference_causal")
    changed = accepted(causal, dataclasses.replace(rl, visibility="group_shared"), tmp_path)
    assert changed == {"visibility": ("reference_causal", "group_shared")}
    averaged = dataclasses.replace(sft, ema=0.9)
    assert accepted(averaged, dataclasses.replace(sft, ema=0.99), tmp_path) == {"ema": (0.9, 0.99)}


def test_a_setting_that_an_older_version_did_not_have_is_no_change(tmp_path):
    before = SFT_RECIPES["lora"]()
    old = data(before)
    del old["lora_alpha"], old["stages"][0]["checkpointing"]
    newest = Newest(10, {"config": {**old, "gone": 3}, "visibility": "full"}, [])
    after = dataclasses.replace(before, lora_alpha=3.0, visibility="full")
    assert accept(after, newest, tmp_path) == {}


def test_a_run_of_a_version_without_a_base_has_the_dtype_of_the_computation(tmp_path):
    config = dataclasses.replace(SFT_RECIPES["lora"](), visibility="full")
    old = data(config)
    del old["base"]
    newest = Newest(10, {"config": old, "visibility": "full"}, [])
    assert accept(config, newest, tmp_path) == {}
    with pytest.raises(
        ValueError, match="the dtype of the frozen weights under the adapter is fixed: base is none, no"
    ):
        accept(dataclasses.replace(config, base="nf4"), newest, tmp_path)


def test_a_run_of_a_version_without_kinds_of_adapters_has_a_lora(tmp_path):
    config = dataclasses.replace(SFT_RECIPES["lora"](), visibility="full")
    old = data(config)
    del old["adapter"]
    newest = Newest(10, {"config": old, "visibility": "full"}, [])
    assert accept(config, newest, tmp_path) == {}
    with pytest.raises(ValueError, match="the kind of the adapter is fixed: adapter is lora, not dora"):
        accept(dataclasses.replace(config, adapter="dora"), newest, tmp_path)


def test_the_change_of_a_renamed_setting_is_found(tmp_path):
    config = dataclasses.replace(MSGRPO_RECIPES["lora"](), visibility="full")
    old = data(config)
    del old["ratio_guard"], old["advantage_std"]
    newest = Newest(10, {"config": {**old, "guard": True, "spread": "group"}, "visibility": "full"}, [])
    assert accept(config, newest, tmp_path) == {"ratio_guard": (True, False)}


def test_a_run_that_was_recorded_under_former_names_is_resumed(tmp_path):
    config = dataclasses.replace(MSGRPO_RECIPES["lora"](), visibility="full")
    text = json.dumps(data(config))
    for new, old in (("budget", "side"), ("sample_num_inference_steps", "sample_steps"), ("rollout_true_cfg_scale",
                     "guidance"), ("sample_true_cfg_scale", "sample_guidance"), ("rollout_num_inference_steps",
                     "rollout_steps")):  # fmt: skip
        assert f'"{new}"' in text
        text = text.replace(f'"{new}"', f'"{old}"')
    newest = Newest(0, {"config": json.loads(text), "visibility": "full"}, [])
    assert accept(config, newest, tmp_path) == {}
    stages = (dataclasses.replace(config.stages[0], budget=768), *config.stages[1:])
    other = dataclasses.replace(config, stages=stages, rollout_num_inference_steps=12, sample_true_cfg_scale=3.0)
    assert accept(other, newest, tmp_path) == {
        "stages.0.budget": (512, 768),
        "rollout_num_inference_steps": (10, 12),
        "sample_true_cfg_scale": (1.0, 3.0),
    }


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [
        (msgrpo, "--guard", "--ratio-guard"),
        (msgrpo, "--spread", "--advantage-std"),
        (msgrpo, "--guidance", "--rollout-true-cfg-scale"),
        (msgrpo, "--rollout-steps", "--rollout-num-inference-steps"),
        (sft, "--sample-steps", "--sample-num-inference-steps"),
        (sft, "--sample-guidance", "--sample-true-cfg-scale"),
        (sft, "--stages.1.side", "--stages.1.budget"),
        (msgrpo, "--stages.0.side", "--stages.0.budget"),
    ],
)
def test_a_former_flag_is_refused_with_its_new_name(command, old, new, capsys):
    assert command.main([old, "8"]) == 2
    assert f": {old} is now called {new}\n" in capsys.readouterr().err


def test_a_former_flag_of_another_command_is_unknown(capsys):
    assert sft.main(["--guidance", "2"]) == 2
    assert "unknown flag --guidance; did you mean" in capsys.readouterr().err


def test_a_checkpoint_without_settings_goes_by_those_of_the_folder(tmp_path):
    """Older versions wrote such checkpoints."""
    before = dataclasses.replace(SFT_RECIPES["lora"](), visibility="reference_causal")
    (tmp_path / "config.json").write_text(configs.to_json(before))
    newest = Newest(10, {}, [])
    assert accept(dataclasses.replace(before, warmup=3), newest, tmp_path) == {"warmup": (100, 3)}
    with pytest.raises(ValueError, match="visibility is reference_causal, not full"):
        accept(launch.with_visibility(SFT_RECIPES["lora"]()), newest, tmp_path)
    assert accept(SFT_RECIPES["lora"](), Newest(None, {}, []), tmp_path) == {}, "it begins anew"


def test_fewer_steps_than_are_done(tmp_path):
    config = SFT_RECIPES["lora"]()
    with pytest.raises(ValueError, match="has done 3000 steps, and 2000 are given; give at least --steps 3000"):
        accepted(config, dataclasses.replace(config, steps=2000), tmp_path, step=3000)
    assert accepted(config, dataclasses.replace(config, steps=3000), tmp_path, step=3000) == {"steps": (None, 3000)}
    assert accepted(config, dataclasses.replace(config, steps=3500), tmp_path, step=3000) == {}, "the sum of its stages"


def test_only_what_changes_the_remaining_steps_is_returned(tmp_path):
    """Resume at step 2500, where the first stage and the warm-up are over, and the second stage is not."""
    config = SFT_RECIPES["lora"]()
    assert config.ends()[0] <= 2500 < config.ends()[1] and config.warmup < 2500

    def changed(step=2500, before=config, **fields):
        return set(accepted(before, dataclasses.replace(before, **fields), tmp_path, step=step))

    def stages(number, **fields):
        return tuple(
            dataclasses.replace(stage, **fields) if i == number else stage for i, stage in enumerate(config.stages)
        )

    assert changed(stages=stages(0, lr=1e-6, budget=512, pack_tokens=9999)) == set()
    assert changed(500, stages=stages(0, lr=1e-6, budget=512)) == {"stages.0.lr", "stages.0.budget"}
    assert changed(stages=stages(1, lr=1e-6, checkpointing=True)) == {"stages.1.lr", "stages.1.checkpointing"}
    assert changed(stages=stages(0, steps=1900)) == {"stages.0.steps"}, "all later steps move"
    constant = dataclasses.replace(config, schedule="constant")
    assert changed(before=constant, warmup=7, weight_decay=0.3) == {"weight_decay"}
    assert changed(50, constant, warmup=7) == {"warmup"}
    cosine = dataclasses.replace(config, schedule="cosine")
    assert changed(before=cosine, warmup=7) == {"warmup"}, "it moves the whole cosine"
    more = (*config.stages, config.stages[-1])
    assert {name.split(".")[1] for name in changed(stages=more)} == {str(len(config.stages))}


def test_paths_are_plain(tmp_path):
    config = dataclasses.replace(SFT_RECIPES["lora"](), cache=Path("a"))
    assert accepted(config, dataclasses.replace(config, cache=Path("b")), tmp_path) == {"cache": ("a", "b")}


def resumed(before, command, given, out):
    """Return the configuration of a run that was started with `before`, for a command without other flags."""
    return launch.with_recorded(command, data(before), frozenset(given), out)


def test_a_resumed_run_keeps_the_settings_that_no_flag_gives(tmp_path, capsys):
    """The recipe has other defaults now than the version that started the run."""
    now = SFT_RECIPES["tiny"]()
    stages = tuple(dataclasses.replace(stage, budget=96, lr=0.25) for stage in now.stages)
    before = dataclasses.replace(
        now, lora_rank=8, lora_alpha=64.0, stages=stages, betas=(0.5, 0.5), steps=7, seed=3, keep=9, warmup=1
    )
    found = resumed(before, now, {"resume", "out"}, tmp_path)
    assert found == before
    line = capsys.readouterr().err
    assert line.startswith(f"the run in {tmp_path} keeps its settings: ") and "lora_alpha = 64.0" in line
    assert line.count("\n") == 1 and line.rstrip().endswith("more")
    assert resumed(before, before, (), tmp_path) == before and not capsys.readouterr().err


def test_flags_and_places_are_those_of_the_command(tmp_path):
    now = dataclasses.replace(SFT_RECIPES["tiny"](), data=("new.jsonl",), cache=Path("new"), workers=7)
    before = dataclasses.replace(SFT_RECIPES["tiny"](), data=("old.jsonl",), heldout=("x",), steps=7, warmup=3)
    found = resumed(before, dataclasses.replace(now, steps=9), {"steps"}, tmp_path)
    assert (found.steps, found.warmup) == (9, 3)
    assert (found.data, found.cache, found.workers, found.heldout) == (now.data, now.cache, 7, ())
    stages = (dataclasses.replace(now.stages[0], lr=0.5), *now.stages[1:])
    changed = resumed(before, dataclasses.replace(now, stages=stages), {"stages.0.lr"}, tmp_path)
    assert changed.stages == stages


def test_a_run_keeps_its_judge_and_takes_the_place_of_the_command(tmp_path):
    """The model that scores belongs to the run; where it is served, and how patiently it is asked, to the command."""
    now = MSGRPO_RECIPES["lora"]()
    old = dataclasses.replace(now.judge, url="http://old/v1", model="old", samples=3, temperature=0.7, patience=1.0)
    found = resumed(dataclasses.replace(now, judge=old), now, (), tmp_path).judge
    assert (found.model, found.samples) == ("old", 3)
    assert (found.url, found.patience) == (now.judge.url, now.judge.patience)


def test_stages_of_another_number_are_those_of_the_command(tmp_path):
    now = SFT_RECIPES["tiny"]()
    before = dataclasses.replace(now, stages=now.stages[:1], weight_decay=0.5)
    found = resumed(before, now, (), tmp_path)
    assert found.stages == now.stages and found.weight_decay == 0.5


def test_a_run_of_an_older_version_is_resumed_under_its_old_names(tmp_path):
    now = SFT_RECIPES["tiny"]()
    old = data(now)
    for stage in old["stages"]:
        stage["side"] = 80
        del stage["budget"]
    old["sample_guidance"] = 4.0
    del old["sample_true_cfg_scale"]
    found = launch.with_recorded(now, old, frozenset(), tmp_path)
    assert [stage.budget for stage in found.stages] == [80, 80] and found.sample_true_cfg_scale == 4.0


def test_alpha_is_the_rank_unless_it_is_given():
    config = dataclasses.replace(SFT_RECIPES["tiny"](), lora_rank=8)
    assert launch.with_adapter(config).lora_alpha == 8.0
    assert launch.with_adapter(dataclasses.replace(config, lora_alpha=3.0)).lora_alpha == 3.0
    assert launch.with_adapter(SFT_RECIPES["tiny"]()).lora_alpha is None
    assert launch.with_adapter(SFT_RECIPES["lora"]()).lora_alpha == 64.0
