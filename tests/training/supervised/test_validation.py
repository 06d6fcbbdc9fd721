"""Validations: the warning about samples that get worse while the held-out loss falls."""

import dataclasses
import json

import pytest
from PIL import Image

from uniref_fast.training.core.recipe import BudgetStage
from uniref_fast.training.supervised.recipes import SFT
from uniref_fast.training.supervised.validation import DeclineDetector, HeldoutSample

CONFIG = SFT((BudgetStage(64, 1, 1.0),), lora_rank=8, lora_alpha=64.0)
SETTINGS = {"num_inference_steps": 8, "true_cfg_scale": 1.0, "budget": None, "target_side": 64}
FIRST = (20.0, 22.0, 24.0, 26.0)


def samples(psnrs, file="rows"):
    return [HeldoutSample(file, None, Image.new("RGB", (64, 64)), value) for value in psnrs]


def detector(state=None, config=CONFIG, settings=SETTINGS):
    return DeclineDetector(config, settings, state)


def begun(**options):
    found = detector(**options)
    assert found.add(0, {"rows": 0.94}, samples(FIRST)) == []
    return found


def test_samples_that_get_worse_while_the_loss_falls_are_reported_once_until_they_recover():
    found, worse = begun(), [value - 4.0 + 0.1 * i for i, value in enumerate(FIRST)]
    (text,) = found.add(50, {"rows": 0.56}, samples(worse))
    assert text.startswith(
        "rows: since step 0 the held-out loss has fallen from 0.94 to 0.56, but the samples have lost"
    )
    assert "3.8 ±0.1 dB of PSNR" in text and "\n" not in text
    assert "a lower lr, lora_alpha = 8 in place of 64, or fewer steps, or export an earlier checkpoint" in text
    assert found.add(100, {"rows": 0.5}, samples(worse)) == [], "it was reported"
    assert found.add(150, {"rows": 0.5}, samples(FIRST)) == []
    assert len(found.add(200, {"rows": 0.5}, samples(worse))) == 1


@pytest.mark.parametrize(
    ("loss", "changes"),
    [
        (0.95, (-4, -4, -4, -4)),  # the loss did not fall: the curves say it all
        (0.56, (4, 4, 4, 4)),  # better
        (0.56, (-6, 4, -5, 3)),  # within the noise: mean -1, standard error 2.6
        (0.56, (-0.2, -0.2, -0.2, -0.2)),  # certain, and too small to see
    ],
)
def test_no_warning_without_a_clear_decline(loss, changes):
    now = [value + change for value, change in zip(FIRST, changes, strict=True)]
    assert begun().add(50, {"rows": loss}, samples(now)) == []


def test_one_row_has_no_noise_to_compare_with():
    found = detector()
    found.add(0, {"rows": 0.94}, samples((22.0,)))
    assert found.add(50, {"rows": 0.5}, samples((12.0,))) == []
    none = detector()
    none.add(0, {"rows": 0.94}, [])
    assert none.add(50, {"rows": 0.5}, []) == [], "sample_count is 0"


def test_each_file_is_compared_with_itself():
    found = detector()
    found.add(0, {"a": 0.9, "b": 0.9}, samples(FIRST, "a") + samples((30.0, 32.0), "b"))
    now = samples([value - 3 for value in FIRST], "a") + samples((30.0, 32.0), "b")
    (text,) = found.add(9, {"a": 0.8, "b": 0.8}, now)
    assert text.startswith("a: ")


def test_the_advice_names_an_alpha_only_above_the_rank():
    config = dataclasses.replace(CONFIG, lora_alpha=None)
    (text,) = begun(config=config).add(9, {"rows": 0.5}, samples([value - 3 for value in FIRST]))
    assert "alpha" not in text and "with a lower lr or fewer steps" in text


def test_a_resumed_run_compares_with_the_first_validation_of_the_run():
    state = json.loads(json.dumps(begun().state()))
    assert len(detector(state).add(90, {"rows": 0.5}, samples([value - 3 for value in FIRST]))) == 1
    other = detector(state, settings={**SETTINGS, "budget": 96})
    assert other.add(90, {"rows": 0.5}, samples([value - 3 for value in FIRST])) == [], "samples of other settings"
    assert other.add(95, {"rows": 0.4}, samples([value - 6 for value in FIRST])) != [], "compared with step 90"
    fewer = detector(state)
    assert fewer.add(90, {"rows": 0.5}, samples((10.0, 10.0))) == [], "other rows"
