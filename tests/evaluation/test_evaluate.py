"""Evaluations from end to end, with the untrained built-in model and a few synthetic rows."""

import json
import shutil
import sys
from dataclasses import replace

import judge_server
import numpy as np
import pytest
from eval_records import images, results, run_eval
from judge_server import JudgeServer
from PIL import Image

from uniref_fast.builtin import SmallQwenImageEditPlusPipeline
from uniref_fast.data.dataset import Dataset
from uniref_fast.evaluation import evaluate as module
from uniref_fast.evaluation.evaluate import evaluate
from uniref_fast.patch import patch
from uniref_fast.rewards.scene import scene_details
from uniref_fast.rewards.types import AXES
from uniref_fast.scenes.scene import crop_box

pytestmark = pytest.mark.usefixtures("threads")


def test_an_evaluation(whole):
    found = results(whole)
    assert [(row["file"], row["index"]) for row in found["rows"]] == [
        *(("heldout_objects", i) for i in range(3)), *(("heldout_combinations", i) for i in range(2)),
    ]  # fmt: skip
    for row in found["rows"]:
        assert set(row["scores"]) == set(row["bound"]["scores"]) == {*AXES, "mean"}
        assert row["scores"]["mean"] == pytest.approx(sum(row["scores"][axis] for axis in AXES) / 3)
        assert 0 < row["psnr"] < 60 and 0 < row["bound"]["psnr"] < 60
        assert max(row["size"]) <= 64 and row["size"][0] * row["size"][1] <= 32 * 32
        picture = Image.open(whole / "images" / row["file"] / f"{row['index']}.png")
        assert list(picture.size) == row["size"] and np.asarray(picture).std() > 1
    assert len({row["seed"] for row in found["rows"]}) == 5, "each row has its own noise"
    assert found["settings"]["reward"] == "scene" and found["settings"]["num_inference_steps"] == 2
    assert {"uniref_fast", "torch", "diffusers"} <= set(found["versions"]) and found["comparison"] is None
    files = found["aggregates"]
    assert list(files) == ["heldout_objects", "heldout_combinations"]
    assert files["heldout_objects"]["all"]["scores"]["mean"]["n"] == 3
    ours = [row["psnr"] for row in found["rows"][:3]]
    assert files["heldout_objects"]["all"]["psnr"]["mean"] == pytest.approx(np.mean(ours))
    assert Image.open(whole / "grid.png").height > 2 * 160
    assert not [path for path in whole.rglob(".*")], "no partial file remains"


def test_the_journal_and_the_results_agree(whole):
    lines = [json.loads(line) for line in (whole / "rows.jsonl").read_text().splitlines()]
    assert lines[0] == {"settings": results(whole)["settings"]} and set(lines[1]) == {"weights"}
    assert [line["row"] for line in lines[2:]] == results(whole)["rows"]


def test_objects_are_those_of_the_scene_reward(config, data, tmp_path):
    """The target through the autoencoder has the scores of the bound."""
    found = evaluate(replace(config, out=tmp_path / "a", baseline="vae", target_side=None))
    dataset = Dataset(config.data)
    for number, row in enumerate(found["rows"]):
        assert row["size"] == dataset[number].scene["size"], "the size of the target, if the pipeline allows it"
        assert row["scores"] == row["bound"]["scores"] and row["psnr"] == row["bound"]["psnr"] and row["seed"] is None
        assert [one["artwork"] for one in row["objects"]] == [o["artwork"] for o in dataset[number].scene["objects"]]
        image = Image.open(tmp_path / "a" / "images" / row["file"] / f"{row['index']}.png")
        details = scene_details(dataset[number], image)
        assert [one["present"] for one in row["objects"]] == [one.present for one in details.objects]
        assert [one["similarity"] for one in row["objects"]] == [one.similarity for one in details.objects]
        assert all((one["distance"] is None) == (not one["present"]) for one in row["objects"])
    for part in found["aggregates"].values():
        assert part["all"]["gap_psnr"]["mean"] == 0 and part["all"]["gap_scores"]["mean"]["mean"] == 0


def test_the_input_baseline_is_the_background_reference_or_grey(config, tmp_path):
    found = evaluate(replace(config, out=tmp_path / "a", baseline="input"))
    dataset, seen = Dataset(config.data), set()
    for number, row in enumerate(found["rows"]):
        made = Image.open(tmp_path / "a" / "images" / row["file"] / f"{row['index']}.png")
        sources = dataset[number].references
        shown = dataset[number].scene["background"].get("picture")
        seen.add(shown)
        expected = Image.new("RGB", made.size, "#808080")
        if sources:
            picture = sources[(shown or 1) - 1].load()
            expected = picture.resize(made.size, Image.LANCZOS, box=crop_box(picture.size, made.size))
        assert np.array_equal(np.asarray(made), np.asarray(expected))
    assert max(n for n in seen if n) > 1 and found["settings"]["num_inference_steps"] is None


@pytest.mark.parametrize(
    "name, value, seen",
    [
        ("seed", 1, lambda request, options: request.seed),
        ("true_cfg_scale", 3.0, lambda request, options: (request.true_cfg_scale, request.negative_prompt)),
        ("num_inference_steps", 3, lambda request, options: request.num_inference_steps),
        ("budget", 48, lambda request, options: options["budget"]),
        ("target_side", 48, lambda request, options: (request.width, request.height)),
        ("width, height", (48, 32), lambda request, options: (request.width, request.height)),
        ("visibility", "reference_causal", lambda request, options: options["visibility"]),
        ("pack_tokens", 999, lambda request, options: options["pack_tokens"]),
        ("keep_references", "2", lambda request, options: options["keep_references"]),
        ("impl", "reference", lambda request, options: options["impl"]),
    ],
)
def test_each_setting_reaches_the_edit(config, builtin_pipe, tmp_path, monkeypatch, name, value, seen):
    """The edit is replaced by a function that records its arguments."""
    calls = []

    def record(pipe, requests, **options):
        calls.append([seen(request, options) for request in requests])
        return [Image.new("RGB", (request.width, request.height)) for request in requests]

    monkeypatch.setattr(module, "edit", record)
    monkeypatch.setattr(module.models, "load", lambda *args, **options: builtin_pipe)
    few = replace(config, limit=2, data=config.data[:1], grid=0, reward="none")
    before = evaluate(replace(few, out=tmp_path / "a"))
    given = dict(zip(name.split(", "), value if name == "width, height" else [value], strict=True))
    after = evaluate(replace(few, out=tmp_path / "b", **given))
    assert len(calls) == 2 and len(calls[0]) == 2 and calls[0] != calls[1]
    expected = {"true_cfg_scale": (3.0, " "), "num_inference_steps": 3, "budget": 48, "width, height": (48, 32),
                "visibility": "reference_causal", "pack_tokens": 999, "keep_references": 2}.get(name)  # fmt: skip
    assert expected is None or calls[1] == [expected] * 2
    if name == "keep_references":
        assert after["settings"][name] == [2, None, None] and name not in before["settings"]
    for one in given if name not in ("pack_tokens", "keep_references") else ():
        assert after["settings"][one] == given[one] != before["settings"].get(one)


def test_a_quantised_model_is_evaluated(config, tmp_path, monkeypatch):
    """The pipeline has quantised weights, and the settings of the results name the format."""
    pytest.importorskip("torchao")
    seen, few = [], replace(config, limit=1, data=config.data[:1], grid=0, reward="none")

    def record(pipe, requests, **options):
        seen.append(type(pipe.transformer.transformer_blocks[0].attn.to_q.weight).__name__)
        return [Image.new("RGB", (request.width, request.height)) for request in requests]

    monkeypatch.setattr(module, "edit", record)
    found = evaluate(replace(few, quantisation="int8", out=tmp_path / "a"))
    assert seen == ["Int8Tensor"] and found["settings"]["quantisation"] == "int8"
    assert "quantisation" not in evaluate(replace(few, out=tmp_path / "b"))["settings"]
    with pytest.raises(ValueError, match="baseline vae runs no quantised transformer"):
        replace(few, quantisation="int8", baseline="vae")


def test_a_model_in_8_bits_is_evaluated(config, whole, tmp_path, monkeypatch):
    """The weights are quantised once, and the results are those of `edit` in this mode, not the exact ones."""
    patched = []

    def counted(pipe, **options):
        patched.append(options)
        return patch(pipe, **options)

    monkeypatch.setattr(module, "patch", counted)
    few = replace(config, limit=2, data=config.data[:1], grid=0, batch=1, mode="fast", impl="reference")
    found = evaluate(replace(few, out=tmp_path / "out"))
    assert patched == [{"mode": "fast", "impl": "reference"}]
    assert (found["settings"]["mode"], found["settings"]["impl"]) == ("fast", "reference")
    exact = json.loads((whole / "results.json").read_text())
    assert "mode" not in exact["settings"]
    for row, before in zip(found["rows"], exact["rows"], strict=False):
        assert row["psnr"] != before["psnr"] and abs(row["psnr"] - before["psnr"]) < 0.5


def test_the_grid_has_the_given_number_of_rows_of_each_file(config, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    evaluate(replace(config, out=out, grid=2))
    assert Image.open(out / "grid.png").height > Image.open(whole / "grid.png").height + 2 * 160


OWN_REWARD = """
from uniref_fast.rewards import UnscoredError

def size(candidate):
    if candidate.key[1] == 1:
        raise UnscoredError("no opinion")
    return {"width": candidate.image.width / 10, "pictures": len(candidate.references)}

def wrong(candidate):
    return {"width": 11}
"""


def test_own_rewards(config, whole, tmp_path, monkeypatch, capsys):
    """Your own rewards have their own axes, failures, columns and differences to another evaluation."""
    (tmp_path / "my_rewards.py").write_text(OWN_REWARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    args = [*config.data, "--num-inference-steps", 2, "--true-cfg-scale", 1, "--budget", 32, "--target-side", 32,
            "--batch", 2, "--grid", 0]  # fmt: skip
    status, text, _ = run_eval(capsys, *args, "--rewards", "my_rewards:size", "--out", tmp_path / "a")
    assert status == 0 and "size.width" in text and "size.pictures" in text
    found = results(tmp_path / "a")
    rows = {(row["file"], row["index"]): row for row in found["rows"]}
    for (_, index), row in rows.items():
        result = row["own"]["my_rewards:size"]
        assert "scores" in row, "the default reward scores the row too"
        if index == 1:
            assert result == {"failure": {"kind": "refused", "reason": "no opinion"}}
        else:
            assert result == {"scores": {"width": row["size"][0] / 10, "pictures": row["references"]}}
    part = found["overall"]["all"]
    assert part["own_failures"] == {"my_rewards:size: refused": 2}
    assert part["own"]["my_rewards:size.width"]["n"] == 3
    assert images(tmp_path / "a") == images(whole)
    status, text, _ = run_eval(
        capsys, *args, "--rewards", "my_rewards:size", "--out", tmp_path / "b", "--against", tmp_path / "a"
    )
    assert status == 0 and "size.width" in text.split("minus ")[1]
    assert results(tmp_path / "b")["comparison"]["files"]["heldout_objects"]["my_rewards:size.width"]["mean"] == 0
    status, _, error = run_eval(capsys, *args, "--rewards", "my_rewards:wrong", "--out", tmp_path / "c")
    assert status == 2 and "must return scores from 0 to 10 by axis" in error
    for name, message in (("my_rewards:gone", "has no attribute 'gone'"), ("judge", "functions of your own"),
                          ("my_rewards:size,my_rewards:size", "each once")):  # fmt: skip
        status, _, error = run_eval(capsys, *args, "--rewards", name, "--out", tmp_path / "d")
        assert status == 2 and message in error, error


def judged(rows, out, server, *more):
    flags = ["--reward", "judge", "--judge.url", server.url, "--judge.model", judge_server.MODEL]
    return [
        rows,
        "--out",
        out,
        "--baseline",
        "input",
        "--target-side",
        32,
        *flags,
        "--judge.attempts",
        1,
        *more,
    ]


def test_a_judge_scores_rows_without_target(benchmark_rows, tmp_path, capsys):
    with JudgeServer() as server:
        server.default = judge_server.say(judge_server.scores(7, 8, 9))
        server.plan = [
            server.default,
            server.default,
            judge_server.say("no JSON"),
        ]  # first: the check
        status, text, _ = run_eval(capsys, *judged(benchmark_rows, tmp_path / "out", server), "--judge.concurrency", 1)
        asked = len(server.requests)
        assert status == 0 and asked == 4
        found = results(tmp_path / "out")
        assert found["rows"][0]["scores"] == {"integration": 7, "consistency": 8, "quality": 9, "mean": 8}
        assert found["rows"][1]["failure"]["kind"] == "malformed" and "scores" not in found["rows"][1]
        assert found["aggregates"]["mico_bench_hoi"]["all"]["scores"]["mean"] == {"n": 2, "mean": 8.0, "sem": 0.0}
        assert found["aggregates"]["mico_bench_hoi"]["all"]["failures"] == {"malformed": 1}
        assert found["aggregates"]["mico_bench_hoi"]["tasks"]["HOI"]["rows"] == 3
        assert "psnr" not in found["rows"][0] and "unscored" in text and "PSNR" not in text
        assert len(judge_server.pictures(server.requests[2])) == 3, "both references and the result"
        run_eval(capsys, *judged(benchmark_rows, tmp_path / "out", server), "--judge.concurrency", 1)
        assert len(server.requests) == asked, "a malformed reply is not requested again"
        journal = tmp_path / "out" / "rows.jsonl"
        journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-1]))
        run_eval(capsys, *judged(benchmark_rows, tmp_path / "out", server), "--judge.concurrency", 1)
        assert len(server.requests) == asked + 1, "only the check: the replies are in the log of the judge"
        assert results(tmp_path / "out") == found


def test_calls_that_did_not_reach_the_judge_are_repeated(benchmark_rows, tmp_path, capsys):
    with JudgeServer() as server:
        server.default = judge_server.say(judge_server.scores(7, 8, 9))
        server.plan = [server.default, judge_server.status(500)]
        args = judged(benchmark_rows, tmp_path / "out", server, "--judge.concurrency", 1)
        status, *_ = run_eval(capsys, *args)
        assert status == 0 and results(tmp_path / "out")["rows"][0]["failure"]["kind"] == "overloaded"
        asked = len(server.requests)
        run_eval(capsys, *args)
        assert results(tmp_path / "out")["rows"][0]["scores"]["mean"] == 8
        assert len(server.requests) == asked + 2, "the check and this row"
        status, _, err = run_eval(capsys, *args[:-1], 2, "--judge.max-tokens", 7)
        assert status == 2 and "judge.max_tokens: 1024 -> 7" in err
    status, _, err = run_eval(capsys, *judged(benchmark_rows, tmp_path / "new", server))
    assert status == 2 and "does not answer" in err


def test_keys_and_languages_of_a_bench(tmp_path, capsys):
    """GEdit-Bench has each edit in two languages, which are reported separately."""
    Image.new("RGB", (40, 40), "red").save(tmp_path / "r.png")
    same = {"task_type": "color_alter", "input_image_raw": "r.png"}
    lines = [{**same, "key": f"k{i}", "instruction": text, "instruction_language": language}
             for i in range(2) for language, text in (("en", "turn"), ("cn", "b"))]  # fmt: skip
    (tmp_path / "gedit.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = [tmp_path / "gedit.jsonl", "--baseline", "input", "--reward", "none", "--width", 64, "--height", 32]
    status, text, _ = run_eval(capsys, *args, "--out", tmp_path / "a")
    found = results(tmp_path / "a")
    assert status == 0 and [(row["key"], row["language"]) for row in found["rows"]] == [
        ("k0", "en"), ("k0", "cn"), ("k1", "en"), ("k1", "cn"),
    ]  # fmt: skip
    assert found["aggregates"]["gedit"]["languages"]["cn"]["rows"] == 2 == found["overall"]["languages"]["en"]["rows"]
    assert {tuple(row["size"]) for row in found["rows"]} == {(64, 32)} and "  cn" in text
    status, *_ = run_eval(capsys, *args, "--out", tmp_path / "b", "--language", "cn", "--limit", 1)
    assert status == 0 and [row["instruction"] for row in results(tmp_path / "b")["rows"]] == ["b"]
    status, _, err = run_eval(capsys, *args, "--out", tmp_path / "c", "--language", "fr")
    assert status == 2 and 'no row has the language "fr"; languages are: cn, en' in err


def test_a_broken_row_is_reported_and_the_others_are_evaluated(data, tmp_path, capsys):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    file = folder / "heldout_objects.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    bad = folder / lines[0]["output_image"]
    content = bad.read_bytes()
    bad.write_bytes(content[: len(content) // 2])
    lines[1]["scene"]["size"] = [64]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{\n")
    args = [file, "--out", tmp_path / "out", "--baseline", "input"]
    status, text, _ = run_eval(capsys, *args)
    found = results(tmp_path / "out")
    assert status == 0 and [("error" in row) for row in found["rows"]] == [True, True, False, True]
    assert found["aggregates"]["heldout_objects"]["all"]["broken"] == 3
    assert found["aggregates"]["heldout_objects"]["all"]["scores"]["mean"]["n"] == 1
    assert "heldout_objects.jsonl:1: " in text and "scene.size must be 2 numbers" in text and ":4: not JSON" in text
    bad.write_bytes(content)
    status, text, _ = run_eval(capsys, *args, "--json")
    made = json.loads(text)
    assert status == 0 and [one["where"][-2:] for one in made["broken"]] == [":2", ":4"], "the first row was repaired"
    assert made["aggregates"]["heldout_objects"]["all"]["broken"] == 2 and "rows" not in made
    file.write_text("{\n{\n")
    status, text, _ = run_eval(capsys, file, "--out", tmp_path / "none")
    assert status == 1 and "rows that could not be evaluated" in text and not (tmp_path / "none" / "grid.png").exists()


def test_a_row_that_only_the_text_encoder_refuses_is_reported(data, tmp_path, monkeypatch, capsys):
    """The other rows of its batch have the same results as without it."""
    lines = (data / "heldout_objects.jsonl").read_text().splitlines()[:3]
    odd = json.dumps(json.loads(lines[0]) | {"instruction": "unspeakable"})
    for name, rows in (("with", [lines[0], odd, *lines[1:]]), ("without", lines)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    encode = SmallQwenImageEditPlusPipeline.encode_prompt

    def refuse(self, *args, **options):
        if "unspeakable" in str(options.get("prompt")):
            raise ValueError("no such word")
        return encode(self, *args, **options)

    monkeypatch.setattr(SmallQwenImageEditPlusPipeline, "encode_prompt", refuse)
    for name in ("with", "without"):
        settings = (
            "--image-folder",
            data,
            "--num-inference-steps",
            2,
            "--budget",
            32,
            "--target-side",
            32,
            "--batch",
            4,
        )
        assert run_eval(capsys, tmp_path / f"{name}.jsonl", "--out", tmp_path / name, *settings)[0] == 0
    rows = results(tmp_path / "with")["rows"]
    assert [row.get("error") for row in rows] == [None, "the text encoder refuses it: no such word", None, None]
    assert rows[1]["where"] == "with.jsonl:2" and len(images(tmp_path / "with")) == 3


def test_an_error_that_no_row_causes_ends_the_evaluation(config, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise ValueError("x")

    monkeypatch.setattr(module, "edit", fail)
    with pytest.raises(ValueError, match=r"^x$"):
        evaluate(replace(config, out=tmp_path / "out"))
