"""The parts of bench/autotune.py that need no measurement, in a process of their own: its imports live in bench/."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
PROGRAM = """
import dataclasses, json, sys
from unittest import mock
import torch
import autotune
import pytest

# seconds that are linear in the features come back as their coefficients; a feature that costs nothing gets 0
torch.manual_seed(0)
features = torch.rand(20, 4, dtype=torch.float64) + 0.1
wanted = torch.tensor([2.0, 0.0, 3.0, 0.5], dtype=torch.float64)
assert autotune.fit(features, features @ wanted) == pytest.approx(wanted.tolist(), abs=1e-9)
# a feature that would need a negative cost is left out
assert min(autotune.fit(features, (features @ wanted - 0.3 * features[:, 1]).clamp_min(0.1))) >= 0

counts = {}
for capability in ((8, 0), (9, 0), (10, 0)):
    with mock.patch.object(torch.cuda, "get_device_capability", lambda capability=capability: capability):
        for way in ("forward", "backward"):
            tried = [dataclasses.asdict(c) for c in autotune.candidates(torch.bfloat16, 128, way)]
            counts[f"{capability[0]}/{way}"] = len(tried)
            # the first is the default; each of the others is best in turn
            for best, parameters in enumerate(tried):
                timings = [(1.0 + (i != best), p) for i, p in enumerate(tried)]
                chosen = autotune.fastest(timings, tried[0])
                assert chosen == parameters, (capability, way, chosen, parameters)
print(json.dumps(counts))
"""


@pytest.mark.slow
def test_fit_and_choice():
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=BENCH, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["8/forward"] == counts["9/forward"] == counts["10/forward"]
    assert counts["8/backward"] == counts["10/backward"]
