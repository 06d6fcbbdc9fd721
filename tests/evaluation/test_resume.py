"""Evaluations that are interrupted, continued, or compared later."""

import json
import re
import shutil
from dataclasses import replace

import pytest
from eval_records import images, results, run_eval
from PIL import Image

from uniref_fast import builtin
from uniref_fast.evaluation import evaluate as module
from uniref_fast.evaluation.evaluate import evaluate

pytestmark = pytest.mark.usefixtures("threads")


def test_an_interrupted_evaluation_continues_to_the_same_results(config, whole, tmp_path, monkeypatch):
    made = []
    original = module.edit

    def stopped(pipe, requests, **options):
        made.append(len(requests))
        if len(made) == 2:
            raise KeyboardInterrupt
        return original(pipe, requests, **options)

    monkeypatch.setattr(module, "edit", stopped)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        evaluate(replace(config, out=out))
    assert not (out / "results.json").exists()
    (out / "rows.jsonl").write_bytes((out / "rows.jsonl").read_bytes()[:-3])  # as after a kill while writing
    evaluate(replace(config, out=out))
    assert results(out) == results(whole) and images(out) == images(whole), "bit for bit"
    assert made == [2, 1, 1, 2], "the images of the first batch exist; one row only needs its measures"

    def never(*args, **options):
        raise AssertionError("no row is unfinished")

    monkeypatch.setattr(module.models, "load", never)
    before = (out / "rows.jsonl").read_bytes()
    assert evaluate(replace(config, out=out)) == results(whole) and (out / "rows.jsonl").read_bytes() == before


def test_missing_and_damaged_images_are_generated_again(config, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "images" / "heldout_combinations")
    (out / "images" / "heldout_objects" / "1.png").write_bytes(b"not an image")
    evaluate(replace(config, out=out))
    assert results(out) == results(whole) and images(out) == images(whole)


def test_an_evaluation_of_changed_rows_is_refused(config, data, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    few = replace(config, data=(folder / "heldout_objects.jsonl",), baseline="input", out=tmp_path / "out")
    evaluate(few)
    text = few.data[0].read_text()
    few.data[0].write_text(text.replace('"instruction": "', '"instruction": "p', 1).replace(", ", ",", 1))
    assert len(few.data[0].read_text()) == len(text)
    with pytest.raises(ValueError, match=r"other settings: data.heldout_objects: "):
        evaluate(few)


def test_a_comparison_is_kept_by_a_call_without_it(config, whole, tmp_path):
    here = replace(config, out=tmp_path / "out", baseline="input", against=whole)
    compared = evaluate(here)["comparison"]
    assert compared["files"]["heldout_objects"]["rows"] == 3 and compared["settings"] == []
    assert evaluate(replace(here, against=None))["comparison"] == compared == results(tmp_path / "out")["comparison"]
    (tmp_path / "out" / "images" / "heldout_objects" / "0.png").unlink()
    assert evaluate(replace(here, against=None))["comparison"] is None, "rows were evaluated again"


def test_files_with_equal_names_are_distinguished(config, data, tmp_path):
    """The difference of an evaluation to itself is 0, for any names of its files."""
    for name in ("d", "e"):
        shutil.copytree(data, tmp_path / name)
    lines = [json.loads(line) for line in (tmp_path / "e" / "heldout_objects.jsonl").read_text().splitlines()]
    for line in lines:
        path = tmp_path / "e" / line["output_image"]
        Image.eval(Image.open(path).convert("RGB"), lambda value: 255 - value).save(path)
    (tmp_path / "e" / "heldout_objects.jsonl").write_text("".join(json.dumps(line) + " \n" for line in lines))
    both = replace(config, data=tuple(tmp_path / name / "heldout_objects.jsonl" for name in "de"), baseline="input")
    evaluate(replace(both, out=tmp_path / "a"))
    found = evaluate(replace(both, out=tmp_path / "b", against=tmp_path / "a"))["comparison"]
    assert {name: one["psnr"]["mean"] for name, one in found["files"].items()} == {
        "d/heldout_objects": 0.0, "e/heldout_objects": 0.0,
    }  # fmt: skip


def test_a_partly_edited_batch_is_edited_again_as_a_whole(config, whole, tmp_path):
    """The packs, and so the bits, are those of an evaluation without interruption."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    lines = (out / "rows.jsonl").read_bytes().splitlines(keepends=True)
    (out / "rows.jsonl").write_bytes(b"".join(lines[:3]))
    (out / "images" / "heldout_objects" / "1.png").unlink()
    evaluate(replace(config, out=out))
    assert results(out) == results(whole) and images(out) == images(whole)


def test_other_settings_in_the_folder_are_refused(config, whole, capsys):
    args = [*config.data, "--out", whole, "--num-inference-steps", 2, "--true-cfg-scale", 1, "--budget", 32,
            "--target-side", 32]  # fmt: skip
    status, _, err = run_eval(capsys, *args, "--seed", 3, "--reward", "none")
    assert status == 2 and "reward: 'scene' -> 'none'; seed: 0 -> 3" in err
    status, out, _ = run_eval(capsys, *args, "--batch", 5)
    assert status == 0 and "heldout_combinations" in out, "the size of a batch is not a setting"


def with_former_names(folder):
    """Rename the settings of an evaluation as older versions have recorded them."""
    for name in ("rows.jsonl", "results.json"):
        content = (folder / name).read_bytes()
        for new, old in (("num_inference_steps", "steps"), ("true_cfg_scale", "guidance")):
            assert f'"{new}"'.encode() in content
            content = content.replace(f'"{new}"'.encode(), f'"{old}"'.encode())
        content, count = re.subn(rb'"width": null,\s*"height": null', b'"size": null', content)
        content, sized = re.subn(rb'"width": 64,\s*"height": 32', b'"size": [64, 32]', content)
        assert count + sized == 1
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("size", [{}, {"width": 64, "height": 32}])
def test_an_evaluation_of_an_older_version_is_continued_and_compared_with(config, tmp_path, size):
    few = replace(config, limit=1, out=tmp_path / "a", baseline="input" if size else None, **size)
    before = evaluate(few)["rows"]
    with_former_names(tmp_path / "a")
    compared = evaluate(replace(few, out=tmp_path / "b", against=tmp_path / "a"))["comparison"]
    assert compared["settings"] == [] and not compared["unmatched"]
    assert evaluate(few)["rows"] == before and json.loads((tmp_path / "a" / "results.json").read_text())["settings"]
    other = replace(few, height=48, width=48, true_cfg_scale=3.0)
    with pytest.raises(ValueError, match=r"width: .* -> 48; height: .* -> 48"):
        evaluate(other)


def test_an_evaluation_with_other_weights_is_refused(config, tmp_path):
    folder = builtin.build(tmp_path / "model")
    few = replace(config, data=config.data[:1], limit=1, model=str(folder), out=tmp_path / "a", baseline="input")
    evaluate(few)
    evaluate(few)
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="other settings: weights: "):
        evaluate(few)


def test_a_file_has_the_same_results_alone_and_beside_others(config, whole, tmp_path):
    """Labels, noise and identity of rows do not depend on the other files."""
    (tmp_path / "other").mkdir()
    copy = tmp_path / "other" / config.data[0].name
    copy.write_text(config.data[0].read_text())
    both = (config.data[0], copy)
    found = evaluate(replace(config, data=both, limit=1, image_folder=config.data[0].parent, out=tmp_path / "a",
                             against=whole))  # fmt: skip
    assert len(found["aggregates"]) == 2
    assert all(part["mean"]["mean"] == 0 and part["rows"] == 1 for part in found["comparison"]["files"].values())
