"""The parts of bench/autotune.py that need no measurement, in a process of their own: its imports live in bench/."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
HELPERS = Path(__file__).resolve().parents[1] / "helpers"
PROGRAM = """
import dataclasses, json, sys
from unittest import mock
import torch
import autotune
import pytest
import attention_libraries
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.ops import flash_attention
from uniref_fast.visibility import plan

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
        for way in ("forward", "backward", "8 bits"):
            given = (autotune.FP8, 128, "forward") if way == "8 bits" else (torch.bfloat16, 128, way)
            tried = [dataclasses.asdict(c) for c in autotune.candidates(*given)]
            counts[f"{capability[0]}/{way}"] = len(tried)
            # the first is the default; each of the others is best in turn
            for best, parameters in enumerate(tried):
                timings = [(1.0 + (i != best), p) for i, p in enumerate(tried)]
                chosen = autotune.fastest(timings, tried[0])
                assert chosen == parameters, (capability, way, chosen, parameters)

# launches in 8 bits are tried where the GPU computes in them; what is wrong is left out, and the fastest is written
for capability in ((8, 6), (8, 9)):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        patch.setattr(torch.cuda, "mem_get_info", lambda: (2**40, 2**40))
        patch.setattr(autotune, "DTYPES", ())
        patch.setattr(autotune, "tried", lambda *what: "wrong" if what[3]["BLOCK_N"] == 128 else None)
        patch.setattr(autotune, "timed_call", lambda *what: what)

        def seconds_of(call):
            dtype, dim, way = call[1:]
            found = autotune.tuning.attention_config("", dtype, dim, way)
            keys, rows, warps, stages = (found[n] for n in ("BLOCK_N", "BLOCK_M", "num_warps", "num_stages"))
            return 99.0 - stages - warps + keys / 1000 - rows / 10

        patch.setattr(autotune, "seconds_of", seconds_of)
        written = autotune.launches()
        counts[f"launches of {capability}"] = written
# every installed generation of FlashAttention is called, and the fastest is chosen
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(autotune, "plans", lambda: [plan(SelfLayout.qwen([Sample(3, (1, 4, 4))]))])

    def seconds_of(call):
        call()
        return {2: 2.0, 3: 3.0, 4: 1.0}[flash_attention.PREFERENCE[0]]

    patch.setattr(autotune, "seconds_of", seconds_of)
    counts |= {"none": autotune.fastest_generation(), "libraries": autotune.libraries()}
    called = attention_libraries.install(patch, "flash 2, flash 3, flash 4, cudnn_flex")
    counts |= {"chosen": autotune.fastest_generation(), "called": called}
    with autotune.only_generation(4):
        counts["found"] = autotune.libraries()
print(json.dumps(counts))
"""


@pytest.mark.slow
def test_fit_and_choice():
    pytest.importorskip("triton")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HELPERS), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=BENCH, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["8/forward"] == counts["9/forward"] == counts["10/forward"]
    assert counts["8/backward"] == counts["10/backward"]
    assert counts["launches of (8, 6)"] == {}
    fastest = {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 4}
    assert counts["launches of (8, 9)"] == {f"float8_e4m3fn/{dim}/forward": fastest for dim in (64, 128)}
    assert counts["none"] is None and counts["libraries"] == {}
    assert counts["chosen"] == 4 and counts["called"]["forward"] == 2 * counts["called"]["backward"] == 6
    assert set(counts["found"]) == {"flash", "cudnn_flex"} and counts["found"]["flash"].startswith("flash-attn-4")
