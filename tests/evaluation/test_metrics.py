"""Measures of images, and the record of a reward's result."""

import numpy as np
import pytest
from PIL import Image

from uniref_fast.evaluation.metrics import own_reward_record, psnr, reward_record
from uniref_fast.rewards.types import Failure, Scores


def test_psnr():
    black, grey = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), (51, 51, 51))
    assert psnr(black, grey) == pytest.approx(20 * np.log10(5)) and psnr(grey, grey) == pytest.approx(58.92, abs=0.01)


def test_records_of_rewards():
    scores = Scores({"integration": 7.0, "consistency": 8.0, "quality": 9.0})
    assert reward_record(scores)["scores"] == {"integration": 7.0, "consistency": 8.0, "quality": 9.0, "mean": 8.0}
    assert own_reward_record(Scores({"width": 3.0})) == {"scores": {"width": 3.0}}
    failed = {"failure": {"kind": "timeout", "reason": "60 s"}}
    assert reward_record(Failure("timeout", "60 s")) == own_reward_record(Failure("timeout", "60 s")) == failed
