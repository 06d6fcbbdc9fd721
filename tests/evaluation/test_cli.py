"""`uniref-fast eval` as a user types it."""

import json
import math

import numpy as np
import pytest
from eval_records import results, run_eval

from uniref_fast.cli import main
from uniref_fast.evaluation.evaluate import EvalConfig

pytestmark = pytest.mark.usefixtures("threads")


def test_the_command_prints_a_table_and_differences(config, data, whole, tmp_path, capsys):
    args = [*config.data, "--target-side", 32, "--budget", 32, "--out", tmp_path / "a", "--baseline", "vae"]
    status, text, _ = run_eval(capsys, *args, "--against", whole)
    assert status == 0 and f"minus {whole}" in text and "heldout_combinations" in text and "best" in text
    found = results(tmp_path / "a")
    ours, theirs = found["rows"], results(whole)["rows"]
    made = [{"psnr": row["psnr"], "scores": row["scores"], "objects": row["objects"]} for row in ours]
    assert made == [row["bound"] for row in theirs], "the vae baseline is the bound of every model"
    part = found["comparison"]["files"]["heldout_objects"]
    expected = [a["psnr"] - b["psnr"] for a, b in zip(ours[:3], theirs[:3], strict=True)]
    assert part["rows"] == 3 and part["psnr"]["mean"] == pytest.approx(np.mean(expected))
    assert part["psnr"]["sem"] == pytest.approx(np.std(expected, ddof=1) / 3**0.5)
    status, text, _ = run_eval(capsys, *args, "--against", whole, "--json")
    assert status == 0 and json.loads(text)["comparison"] == found["comparison"]
    status, _, err = run_eval(
        capsys, *args[:-3], tmp_path / "b", "--against", whole, "--num-inference-steps", 5, "--seed", 4
    )
    assert status == 2 and "seed is 4 here and 0 there; num_inference_steps is 5 here and 2 there" in err
    assert not (tmp_path / "b").exists(), "refused before the work"


def test_wrong_commands(data, benchmark_rows, whole, tmp_path, capsys, monkeypatch):
    file, out = data / "heldout_objects.jsonl", tmp_path / "out"
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "full").write_text("a file")
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "thesis.txt").touch()
    cases = [
        ([tmp_path / "none.jsonl"], "no such file or folder"),
        ([tmp_path / "empty.jsonl"], "no rows in empty.jsonl"),
        ([file, "--model", tmp_path / "none"], "no such folder, and not a hub id"),
        ([file, "--initial", tmp_path], "has neither lora/ nor transformer/"),
        ([file, "--baseline", "input", "--initial", tmp_path], "leave out initial"),
        ([file, "--baseline", "untrained", "--model", "a/b"], "for the built-in model only"),
        ([file, "--limit", 0], "limit must be at least 1, got 0"),
        ([file, "--keep-references", 3, "--drift", 0.1], 'drift is the tolerance of keep_references = "auto", got 3'),
        ([file, "--keep-references", 0], "true, false, auto or a number of steps from 1, got '0'"),
        ([file, "--mode", "fast", "--device", "cpu"], "it needs e4m3 matrix products"),
        ([file, "--mode", "fast", "--baseline", "input"], "baseline input runs no transformer"),
        ([file, "--num-inference-steps", 0], "num_inference_steps must be at least 1"),
        ([file, "--budget", 3], "budget is the side of a square in pixels, at least 16; got 3"),
        ([file, "--budget", 1024**2], "for 1048576 pixels give 1024"),
        ([file, "--device", "tpu9"], "unknown device"),
        ([file, "--width", 8, "--height", 64], "width must be at least 16, got 8"),
        ([file, "--width", 64], "give width and height together, got width = 64 and height = None"),
        ([data, "--out", data / "results"], "its files would be read as rows"),
        ([benchmark_rows, "--reward", "scene"], "mico_bench_hoi.jsonl:1 has no scene; the scene reward needs"),
        ([file, "--judge.model", "x"], "--judge.model needs --reward judge"),
        ([file, "--reward", "judge", "--judge.url", "ftp://x"], "judge: url must be like"),
        ([file, "--against", tmp_path], "holds no results.json"),
        ([benchmark_rows, "--against", whole, "--reward", "none"], "reward is 'none' here and 'scene' there"),
        ([data / "heldout_combinations.jsonl", "--image-folder", tmp_path / "none"], "image folder"),
    ]
    for args, message in cases:
        status, text, err = run_eval(capsys, *([] if "--out" in args else ["--out", out]), *args)
        assert status == 2 and message in err and not text and "Traceback" not in err, args
    for place, message in (("full", "cannot be created"), ("busy", "not empty and holds no evaluation")):
        status, _, err = run_eval(capsys, file, "--out", tmp_path / place)
        assert status == 2 and message in err
    status, _, err = run_eval(
        capsys, file, "--out", out, "--num-inference-steps", 2, "--seed", 7, "--baseline", "input", "--grid", 0
    )
    assert status == 0, "earlier errors leave the folder usable"
    assert not (out / "grid.png").exists()
    with pytest.raises(ValueError, match="true_cfg_scale must be a finite number"):
        EvalConfig((file,), out, true_cfg_scale=math.nan)
    for args, message in (
        ([file], "required: --out"),
        ([file, "--out", out, "--true-cfg-scale", "nan"], "--true-cfg-scale: expects NUMBER|none, got 'nan'"),
        ([file, "--out", out, "--judge.timeout", "soon"], "--judge.timeout: expects NUMBER, got 'soon'"),
        ([file, "--out", out, "--batches", "3"], "--batches 3; did you mean --batch?"),
    ):
        with pytest.raises(SystemExit) as stop:
            run_eval(capsys, *args)
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_help_lists_the_judge(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    text = capsys.readouterr().out
    assert (
        "--baseline input|vae|untrained|none" in text
        and "--judge.max-tokens" in text
        and "Qwen/Qwen3" in text
        and "--against PATH" in text
    )
