"""`uniref-fast eval` and its API, on the untrained built-in model and a few made rows."""

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import judge_server
import numpy as np
import pytest
import torch
from judge_server import JudgeServer
from PIL import Image

from uniref_fast import builtin
from uniref_fast.builtin import SmallQwenImageEditPlusPipeline
from uniref_fast.cli import main
from uniref_fast.data.dataset import Dataset
from uniref_fast.evaluation import evaluate as module
from uniref_fast.evaluation import model as models
from uniref_fast.evaluation.evaluate import EvalConfig, evaluate
from uniref_fast.evaluation.metrics import psnr
from uniref_fast.evaluation.requests import eval_request, rows_by_file
from uniref_fast.rewards.scene import scene_details
from uniref_fast.rewards.types import AXES
from uniref_fast.scenes.dataset import write_dataset
from uniref_fast.scenes.make import MakeConfig, artworks, sample
from uniref_fast.scenes.scene import crop_box

pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """3 and 2 held-out rows of 64 pixels."""
    folder = tmp_path_factory.mktemp("data") / "made"
    config = MakeConfig(artworks("shipped"), size=64, references=(0, 1, 2))
    counts = {"train": 0, "heldout_objects": 3, "heldout_combinations": 2}
    write_dataset(folder, config, counts, 1, force=False, generate=sample)
    return folder


@pytest.fixture(scope="module")
def config(data):
    """Of an evaluation of 5 rows, in packs of 2."""
    files = (data / "heldout_objects.jsonl", data / "heldout_combinations.jsonl")
    return EvalConfig(files, Path(), steps=2, guidance=1.0, budget=32, target_side=32, batch=2, grid=1)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """Evaluated without any interruption."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "deep" / "results"
    evaluate(replace(config, out=out))
    torch.set_num_threads(before)
    return out


def results(out):
    return json.loads((out / "results.json").read_text())


def images(out):
    return {path.relative_to(out): path.read_bytes() for path in sorted((out / "images").rglob("*.png"))}


def run(capsys, *args):
    status = main(["eval", *map(str, args)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# ---- what is measured ----


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
    assert len({row["seed"] for row in found["rows"]}) == 5, "every row has its own noise"
    assert found["settings"]["reward"] == "scene" and found["settings"]["steps"] == 2
    assert {"uniref_fast", "torch", "diffusers"} <= set(found["versions"]) and found["comparison"] is None
    files = found["aggregates"]
    assert list(files) == ["heldout_objects", "heldout_combinations"]
    assert files["heldout_objects"]["all"]["scores"]["mean"]["n"] == 3
    ours = [row["psnr"] for row in found["rows"][:3]]
    assert files["heldout_objects"]["all"]["psnr"]["mean"] == pytest.approx(np.mean(ours))
    assert Image.open(whole / "grid.png").height > 2 * 160
    assert not [path for path in whole.rglob(".*")], "no partial file is left"


def test_the_journal_and_the_results_agree(whole):
    lines = [json.loads(line) for line in (whole / "rows.jsonl").read_text().splitlines()]
    assert lines[0] == {"settings": results(whole)["settings"]} and set(lines[1]) == {"weights"}
    assert [line["row"] for line in lines[2:]] == results(whole)["rows"]


def test_objects_are_those_that_the_scene_reward_finds(config, data, tmp_path):
    """The answer itself shows all at their places; through the autoencoder it is the bound."""
    found = evaluate(replace(config, out=tmp_path / "a", baseline="vae", target_side=None))
    dataset = Dataset(config.data)
    for number, row in enumerate(found["rows"]):
        assert row["size"] == dataset[number].scene["size"], "as large as the target where the pipeline allows it"
        assert row["scores"] == row["bound"]["scores"] and row["psnr"] == row["bound"]["psnr"] and row["seed"] is None
        assert [one["artwork"] for one in row["objects"]] == [o["artwork"] for o in dataset[number].scene["objects"]]
        image = Image.open(tmp_path / "a" / "images" / row["file"] / f"{row['index']}.png")
        details = scene_details(dataset[number], image)
        assert [one["present"] for one in row["objects"]] == [one.present for one in details.objects]
        assert [one["similarity"] for one in row["objects"]] == [one.similarity for one in details.objects]
        assert all((one["distance"] is None) == (not one["present"]) for one in row["objects"])
    for part in found["aggregates"].values():
        assert part["all"]["gap_psnr"]["mean"] == 0 and part["all"]["gap_scores"]["mean"]["mean"] == 0


def test_a_model_attends_as_it_was_trained(config, data, tmp_path):
    """Unless it is told: with the visibility of the last run, a group's shared references being a sample's own."""
    assert config.resolve_visibility() == "full"
    for trained, expected in (("reference_isolated", "reference_isolated"), ("group_shared", "reference_causal")):
        run = tmp_path / trained
        (run / "lora").mkdir(parents=True)
        (run / "config.json").write_text(json.dumps({"visibility": trained}))
        assert replace(config, initial=(run,)).resolve_visibility() == expected
        assert replace(config, initial=(run,), visibility="full").resolve_visibility() == "full"
    found = evaluate(replace(config, out=tmp_path / "a", visibility="reference_causal", limit=1))
    full = evaluate(replace(config, out=tmp_path / "b", limit=1))
    assert found["settings"]["visibility"] == "reference_causal" and full["settings"]["visibility"] == "full"
    assert [row["psnr"] for row in found["rows"]] != [row["psnr"] for row in full["rows"]]


def test_the_baseline_input_is_the_background_else_picture_1_and_grey_without(config, tmp_path):
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
    assert max(n for n in seen if n) > 1 and found["settings"]["steps"] is None


@pytest.mark.parametrize("more", [{"seed": 1}, {"guidance": 3.0}, {"steps": 3}, {"budget": 48}, {"target_side": 48},
                                  {"size": (48, 32)}], ids=str)  # fmt: skip
def test_each_setting_changes_what_is_made(config, whole, tmp_path, more):
    found = evaluate(replace(config, out=tmp_path / "a", limit=2, data=config.data[:1], **more))
    before = [row["psnr"] for row in results(whole)["rows"][:2]]
    assert [row["psnr"] for row in found["rows"]] != before
    name, value = next(iter(more.items()))
    assert found["settings"][name] == (list(value) if name == "size" else value)
    if name == "size":
        assert [row["size"] for row in found["rows"]] == [[48, 32]] * 2


def test_guidance_is_off_for_the_built_in_model_unless_asked_for(config):
    assert replace(config, guidance=None).scale == 1.0 == config.scale
    assert replace(config, guidance=None, model="a/b").scale == 4.0 and replace(config, guidance=2.5).scale == 2.5


def test_the_grid_has_so_many_rows_of_each_file(config, whole, tmp_path):
    heights = {}
    for grid in (1, 2):
        evaluate(replace(config, out=tmp_path / str(grid), baseline="input", grid=grid))
        heights[grid] = Image.open(tmp_path / str(grid) / "grid.png").height
    assert heights[2] > heights[1] + 2 * 160


def test_psnr():
    black, grey = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), (51, 51, 51))
    assert psnr(black, grey) == pytest.approx(20 * np.log10(5)) and psnr(grey, grey) == pytest.approx(58.92, abs=0.01)


# ---- rows ----


def test_noise_follows_from_the_seed_and_the_row(builtin_pipe, data):
    rows = Dataset(data / "heldout_objects.jsonl")
    sizes = dict(target_side=32, budget=1024, steps=2, guidance=1.0)

    def seed(number, **given):
        key = (given.pop("file", "a"), number)
        return eval_request(builtin_pipe, rows[0], key, **{**sizes, "seed": 0, **given}).request.seed

    assert seed(0) == seed(0) == seed(0, steps=9, target_side=64)
    assert len({seed(0), seed(1), seed(0, seed=1), seed(0, file="b")}) == 4


def test_sizes_of_rows_with_and_without_target(builtin_pipe, tmp_path):
    for name, size in (("w", (160, 80)), ("s", (40, 40))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    lines = [
        {"instruction": "x", "input_images": ["s.png"], "output_image": "w.png"},  # scaled down to the area
        {"instruction": "x", "input_images": ["w.png"], "output_image": "s.png"},  # never scaled up
        {"instruction": "x", "input_images": ["s.png", "w.png"]},  # the last picture's ratio, the whole area
        {"instruction": "x"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = Dataset(tmp_path / "rows.jsonl", targets="optional")
    plans = [
        eval_request(builtin_pipe, row, ("a", 0), target_side=64, budget=None, seed=0, steps=2, guidance=1.0)
        for row in rows
    ]
    assert [one.size for one in plans] == [(80, 48), (48, 48), (80, 48), (64, 64)]
    assert [one.target and one.target.size for one in plans] == [(80, 48), (48, 48), None, None]


def test_labels_of_files_and_the_limit(tmp_path):
    line = json.dumps({"instruction": "x"}) + "\n"
    for name, count in (("a/x.jsonl", 3), ("b/x.jsonl", 1), ("y.jsonl", 2), ("y.tar.jsonl", 1)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(line * count)
    (tmp_path / "y.json").write_text(f"[{line.strip()}]")
    dataset = Dataset(tmp_path, targets="optional")
    assert rows_by_file(dataset, 2) == {
        "a/x": [0, 1], "b/x": [3], "y.json": [4], "y.jsonl": [5, 6], "y.tar": [7],
    }  # fmt: skip
    (tmp_path / "b" / "x.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"no rows in b/x\.jsonl"):
        rows_by_file(Dataset(tmp_path, targets="optional"), None)


# ---- interruptions ----


def test_what_was_stopped_goes_on_to_the_same_results(config, whole, tmp_path, monkeypatch):
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
    (out / "rows.jsonl").write_bytes((out / "rows.jsonl").read_bytes()[:-3])  # and killed while it wrote
    evaluate(replace(config, out=out))
    assert results(out) == results(whole) and images(out) == images(whole), "bit for bit"
    assert made == [2, 1, 1, 2], "the images of the first batch were there, one row only needed its measures"

    def never(*args, **options):
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(module.models, "load", never)
    before = (out / "rows.jsonl").read_bytes()
    assert evaluate(replace(config, out=out)) == results(whole) and (out / "rows.jsonl").read_bytes() == before


def test_an_image_that_is_gone_is_made_again(config, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "images" / "heldout_combinations")
    evaluate(replace(config, out=out))
    assert results(out) == results(whole) and images(out) == images(whole)


def test_what_is_no_picture_is_made_again(config, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "images" / "heldout_objects" / "1.png").write_bytes(b"no picture")
    evaluate(replace(config, out=out))
    assert results(out) == results(whole) and images(out) == images(whole)


def test_rows_that_changed_are_not_gone_on_with(config, data, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    few = replace(config, data=(folder / "heldout_objects.jsonl",), baseline="input", out=tmp_path / "out")
    evaluate(few)
    text = few.data[0].read_text()
    few.data[0].write_text(text.replace('"instruction": "', '"instruction": "p', 1).replace(", ", ",", 1))
    assert len(few.data[0].read_text()) == len(text)
    with pytest.raises(ValueError, match=r"other settings: data.heldout_objects: "):
        evaluate(few)


def test_a_comparison_outlives_a_call_without_it(config, whole, tmp_path):
    here = replace(config, out=tmp_path / "out", baseline="input", against=whole)
    compared = evaluate(here)["comparison"]
    assert compared["files"]["heldout_objects"]["rows"] == 3 and compared["settings"] == []
    assert evaluate(replace(here, against=None))["comparison"] == compared == results(tmp_path / "out")["comparison"]
    (tmp_path / "out" / "images" / "heldout_objects" / "0.png").unlink()
    assert evaluate(replace(here, against=None))["comparison"] is None, "of rows that were made anew"


def test_two_files_of_one_name_are_not_taken_for_each_other(config, data, tmp_path):
    """An evaluation less itself is nothing, whatever its files are called."""
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


def test_a_batch_half_made_is_edited_as_a_whole(config, whole, tmp_path):
    """So that the packs, and with them the bits, are those of an evaluation that was never stopped."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    lines = (out / "rows.jsonl").read_bytes().splitlines(keepends=True)
    (out / "rows.jsonl").write_bytes(b"".join(lines[:3]))
    (out / "images" / "heldout_objects" / "1.png").unlink()
    evaluate(replace(config, out=out))
    assert results(out) == results(whole) and images(out) == images(whole)


def test_other_settings_in_the_folder_are_refused(config, whole, capsys):
    args = [*config.data, "--out", whole, "--steps", 2, "--guidance", 1, "--budget", 32, "--target-side", 32]
    status, _, err = run(capsys, *args, "--seed", 3, "--reward", "none")
    assert status == 2 and "reward: 'scene' -> 'none'; seed: 0 -> 3" in err
    status, out, _ = run(capsys, *args, "--batch", 5)
    assert status == 0 and "heldout_combinations" in out, "how many are edited together is no setting"


def test_a_finished_evaluation_is_not_that_of_other_weights(config, tmp_path):
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


def test_a_file_is_the_same_alone_and_beside_others(config, whole, tmp_path):
    """Its label and so its noise and its rows' identity do not depend on what is evaluated with it."""
    (tmp_path / "other").mkdir()
    copy = tmp_path / "other" / config.data[0].name
    copy.write_text(config.data[0].read_text())
    both = (config.data[0], copy)
    found = evaluate(replace(config, data=both, limit=1, image_folder=config.data[0].parent, out=tmp_path / "a",
                             against=whole))  # fmt: skip
    assert len(found["aggregates"]) == 2
    assert all(part["mean"]["mean"] == 0 and part["rows"] == 1 for part in found["comparison"]["files"].values())


def test_a_run_of_another_model_needs_its_name(tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"model": "Qwen/Qwen-Image-Edit-2511"}))
    with pytest.raises(ValueError, match="trained on Qwen/Qwen-Image-Edit-2511, not on the built-in model; give --mod"):
        models.check_runs((tmp_path,), "builtin")
    models.check_runs((tmp_path,), "Qwen/Qwen-Image-Edit-2511")


# ---- models ----


def test_a_run_put_on_top(config, builtin_pipe, whole, tmp_path):
    """A transformer, and an adapter on top of it; both change what is made."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    pipe = builtin.load()
    with torch.no_grad():
        pipe.transformer.proj_out.weight.mul_(-1)
    pipe.transformer.save_pretrained(tmp_path / "sft" / "transformer")
    pipe.transformer.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]))
    lora = get_peft_model_state_dict(pipe.transformer)
    type(pipe).save_lora_weights(str(tmp_path / "rl" / "lora"), transformer_lora_layers=lora)
    (tmp_path / "rl" / "config.json").write_text(json.dumps({"initial": str(tmp_path / "sft")}))

    sft, rl = tmp_path / "sft", tmp_path / "rl"
    with pytest.raises(ValueError, match=f"trained on top of {sft}/transformer; give --initial {sft} before it"):
        models.check_runs((rl,), "a/b")
    models.check_runs((sft, rl), "a/b")
    (tmp_path / "rl2" / "lora").mkdir(parents=True)
    (tmp_path / "rl2" / "config.json").write_text(json.dumps({"initial": str(rl)}))
    with pytest.raises(ValueError, match=r"went on from that of .*leave .*rl out"):
        models.check_runs((sft, rl, tmp_path / "rl2"), "a/b")

    few = replace(config, data=config.data[:1], limit=1)
    evaluate(replace(few, out=tmp_path / "a", initial=(sft,)))
    evaluate(replace(few, out=tmp_path / "b", initial=(sft, rl)))
    first = Path("images/heldout_objects/0.png")
    assert len({images(out)[first] for out in (whole, tmp_path / "a", tmp_path / "b")}) == 3
    loaded = models.load("builtin", (sft, rl), False, "cpu", "float32").transformer
    expected = pipe.transformer.state_dict()
    ours = {name.replace(".run0.", ".default."): tensor for name, tensor in loaded.state_dict().items()}
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)

    for path in (rl / "lora").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"initial {rl} could not be put on builtin"):
        models.load("builtin", (sft, rl), False, "cpu", "float32")


def test_an_adapter_by_path_and_scale(config, tmp_path):
    """As `initial`, and recorded; a file of it that changes is another evaluation."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    pipe = builtin.load()
    pipe.transformer.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]))
    lora = get_peft_model_state_dict(pipe.transformer)
    type(pipe).save_lora_weights(str(tmp_path / "run" / "lora"), transformer_lora_layers=lora)
    few = replace(config, data=config.data[:1], limit=1)
    made = {}
    for name, changes in (("initial", {"initial": (tmp_path / "run",)}), ("lora", {"lora": (f"{tmp_path / 'run'}:1",)}),
                          ("half", {"lora": (f"{tmp_path / 'run'}:0.5",)})):  # fmt: skip
        evaluate(replace(few, out=tmp_path / name, **changes))
        made[name] = images(tmp_path / name)
    assert made["initial"] == made["lora"] != made["half"]
    assert results(tmp_path / "half")["settings"]["lora"] == [f"{tmp_path / 'run'}:0.5"]
    (file,) = (tmp_path / "run" / "lora").iterdir()
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(ValueError, match="other settings: weights"):
        evaluate(replace(few, out=tmp_path / "half", lora=(f"{tmp_path / 'run'}:0.5",)))
    with pytest.raises(ValueError, match="leave out initial and lora"):
        replace(config, baseline="vae", lora=("x",))


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
    """Scores by axes of their own, failures counted, a column each, differences to another evaluation."""
    (tmp_path / "my_rewards.py").write_text(OWN_REWARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    args = [*config.data, "--steps", 2, "--guidance", 1, "--budget", 32, "--target-side", 32, "--batch", 2, "--grid", 0]
    status, text, _ = run(capsys, *args, "--rewards", "my_rewards:size", "--out", tmp_path / "a")
    assert status == 0 and "size.width" in text and "size.pictures" in text
    found = results(tmp_path / "a")
    rows = {(row["file"], row["index"]): row for row in found["rows"]}
    for (_, index), row in rows.items():
        result = row["own"]["my_rewards:size"]
        assert "scores" in row, "the reward of the rows is asked as well"
        if index == 1:
            assert result == {"failure": {"kind": "refused", "reason": "no opinion"}}
        else:
            assert result == {"scores": {"width": row["size"][0] / 10, "pictures": row["references"]}}
    part = found["overall"]["all"]
    assert part["own_failures"] == {"my_rewards:size: refused": 2}
    assert part["own"]["my_rewards:size.width"]["n"] == 3
    assert images(tmp_path / "a") == images(whole)
    status, text, _ = run(
        capsys, *args, "--rewards", "my_rewards:size", "--out", tmp_path / "b", "--against", tmp_path / "a"
    )
    assert status == 0 and "size.width" in text.split("minus ")[1]
    assert results(tmp_path / "b")["comparison"]["files"]["heldout_objects"]["my_rewards:size.width"]["mean"] == 0
    status, _, error = run(capsys, *args, "--rewards", "my_rewards:wrong", "--out", tmp_path / "c")
    assert status == 2 and "must return scores from 0 to 10 by axis" in error
    for name, message in (("my_rewards:gone", "has no attribute 'gone'"), ("judge", "functions of your own"),
                          ("my_rewards:size,my_rewards:size", "each once")):  # fmt: skip
        status, _, error = run(capsys, *args, "--rewards", name, "--out", tmp_path / "d")
        assert status == 2 and message in error, error


def test_the_untrained_baseline_has_the_transformer_of_seed_0(builtin_pipe):
    """And the model's own autoencoder, so that its bound is that of the others."""
    loaded = models.load("builtin", (), True, "cpu", "float32")
    expected = builtin.components.pipeline(0, torch.float32)
    expected.vae, expected.text_encoder = builtin_pipe.vae, builtin_pipe.text_encoder
    for name in ("transformer", "vae", "text_encoder"):
        ours, theirs = getattr(loaded, name).state_dict(), getattr(expected, name).state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert models.weights_digest(loaded) == models.weights_digest(expected)
    with torch.no_grad():
        next(expected.transformer.parameters()).add_(1)
    assert models.weights_digest(loaded) != models.weights_digest(expected)


# ---- judges ----


@pytest.fixture
def bench(tmp_path):
    """Rows as a public bench has them: no target, no scene."""
    for name, color in (("r", "red"), ("b", "blue")):
        Image.new("RGB", (40, 40), color).save(tmp_path / f"{name}.png")
    lines = [
        {"idx": i, "input": ["r.png", "b.png"][: 1 + i % 2], "prompt": f"do {i}", "Task": "HOI", "human_indices": []}
        for i in range(3)
    ]
    (tmp_path / "mico_bench_hoi.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "mico_bench_hoi.jsonl"


def judged(bench, out, server, *more):
    flags = ["--reward", "judge", "--judge-url", server.url, "--judge-model", judge_server.MODEL]
    return [bench, "--out", out, "--baseline", "input", "--target-side", 32, *flags, "--judge-attempts", 1, *more]


def test_a_judge_scores_what_has_no_target(bench, tmp_path, capsys):
    with JudgeServer() as server:
        server.default = judge_server.say(judge_server.scores(7, 8, 9))
        server.plan = [server.default, server.default, judge_server.say("no JSON")]  # the first is the check
        status, text, _ = run(capsys, *judged(bench, tmp_path / "out", server), "--judge-concurrency", 1)
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
        run(capsys, *judged(bench, tmp_path / "out", server), "--judge-concurrency", 1)
        assert len(server.requests) == asked, "an answer that could not be read is an answer"
        journal = tmp_path / "out" / "rows.jsonl"
        journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-1]))
        run(capsys, *judged(bench, tmp_path / "out", server), "--judge-concurrency", 1)
        assert len(server.requests) == asked + 1, "the check alone: answers are in the judge's log"
        assert results(tmp_path / "out") == found


def test_calls_that_a_judge_did_not_get_are_made_again(bench, tmp_path, capsys):
    with JudgeServer() as server:
        server.default = judge_server.say(judge_server.scores(7, 8, 9))
        server.plan = [server.default, judge_server.status(500)]
        args = judged(bench, tmp_path / "out", server, "--judge-concurrency", 1)
        status, *_ = run(capsys, *args)
        assert status == 0 and results(tmp_path / "out")["rows"][0]["failure"]["kind"] == "overloaded"
        asked = len(server.requests)
        run(capsys, *args)
        assert results(tmp_path / "out")["rows"][0]["scores"]["mean"] == 8
        assert len(server.requests) == asked + 2, "the check and that row alone"
        status, _, err = run(capsys, *args[:-1], 2, "--judge-max-tokens", 7)
        assert status == 2 and "judge.max_tokens: 1024 -> 7" in err
    status, _, err = run(capsys, *judged(bench, tmp_path / "new", server))
    assert status == 2 and "does not answer" in err


def test_keys_and_languages_of_a_bench(tmp_path, capsys):
    """As GEdit-Bench has them: each edit in two languages, reported apart, or one alone."""
    Image.new("RGB", (40, 40), "red").save(tmp_path / "r.png")
    same = {"task_type": "color_alter", "input_image_raw": "r.png"}
    lines = [{**same, "key": f"k{i}", "instruction": text, "instruction_language": language}
             for i in range(2) for language, text in (("en", "turn"), ("cn", "b"))]  # fmt: skip
    (tmp_path / "gedit.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = [tmp_path / "gedit.jsonl", "--baseline", "input", "--reward", "none", "--size", "64x32"]
    status, text, _ = run(capsys, *args, "--out", tmp_path / "a")
    found = results(tmp_path / "a")
    assert status == 0 and [(row["key"], row["language"]) for row in found["rows"]] == [
        ("k0", "en"), ("k0", "cn"), ("k1", "en"), ("k1", "cn"),
    ]  # fmt: skip
    assert found["aggregates"]["gedit"]["languages"]["cn"]["rows"] == 2 == found["overall"]["languages"]["en"]["rows"]
    assert {tuple(row["size"]) for row in found["rows"]} == {(64, 32)} and "  cn" in text
    status, *_ = run(capsys, *args, "--out", tmp_path / "b", "--language", "cn", "--limit", 1)
    assert status == 0 and [row["instruction"] for row in results(tmp_path / "b")["rows"]] == ["b"]
    status, _, err = run(capsys, *args, "--out", tmp_path / "c", "--language", "fr")
    assert status == 2 and 'no row has the language "fr"; languages are: cn, en' in err


def test_lists_that_hold_no_rows_are_passed_over_in_folders(bench, tmp_path):
    """Captions beside the pictures, as benches have them."""
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "captions.json").write_text('["a cat", "a mat"]')
    dataset = Dataset(tmp_path, targets="optional")
    assert dataset.files == ("mico_bench_hoi.jsonl",) and dataset.left_out[0][0] == "0/captions.json"


# ---- broken rows ----


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
    status, text, _ = run(capsys, *args)
    found = results(tmp_path / "out")
    assert status == 0 and [("error" in row) for row in found["rows"]] == [True, True, False, True]
    assert found["aggregates"]["heldout_objects"]["all"]["broken"] == 3
    assert found["aggregates"]["heldout_objects"]["all"]["scores"]["mean"]["n"] == 1
    assert "heldout_objects.jsonl:1: " in text and "scene.size must be 2 numbers" in text and ":4: not JSON" in text
    bad.write_bytes(content)
    status, text, _ = run(capsys, *args, "--json")
    made = json.loads(text)
    assert status == 0 and [one["where"][-2:] for one in made["broken"]] == [":2", ":4"], "mended meanwhile"
    assert made["aggregates"]["heldout_objects"]["all"]["broken"] == 2 and "rows" not in made
    file.write_text("{\n{\n")
    status, text, _ = run(capsys, file, "--out", tmp_path / "none")
    assert status == 1 and "rows that could not be evaluated" in text and not (tmp_path / "none" / "grid.png").exists()


# ---- the command ----


def test_a_row_that_only_the_text_encoder_refuses_is_named_and_passed_over(data, tmp_path, monkeypatch, capsys):
    """Also when it shares a batch with others, whose results are those that they have without it."""
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
        settings = ("--image-folder", data, "--steps", 2, "--budget", 32, "--target-side", 32, "--batch", 4)
        assert run(capsys, tmp_path / f"{name}.jsonl", "--out", tmp_path / name, *settings)[0] == 0
    rows = results(tmp_path / "with")["rows"]
    assert [row.get("error") for row in rows] == [None, "the text encoder refuses it: no such word", None, None]
    assert rows[1]["where"] == "with.jsonl:2" and len(images(tmp_path / "with")) == 3


def test_an_error_that_no_row_is_to_blame_for_ends_the_evaluation(config, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise ValueError("x")

    monkeypatch.setattr(module, "edit", fail)
    with pytest.raises(ValueError, match=r"^x$"):
        evaluate(replace(config, out=tmp_path / "out"))


def test_the_command_prints_a_table_and_differences(config, data, whole, tmp_path, capsys):
    args = [*config.data, "--target-side", 32, "--budget", 32, "--out", tmp_path / "a", "--baseline", "vae"]
    status, text, _ = run(capsys, *args, "--against", whole)
    assert status == 0 and f"minus {whole}" in text and "heldout_combinations" in text and "best" in text
    found = results(tmp_path / "a")
    ours, theirs = found["rows"], results(whole)["rows"]
    made = [{"psnr": row["psnr"], "scores": row["scores"], "objects": row["objects"]} for row in ours]
    assert made == [row["bound"] for row in theirs], "what is made of the target is the bound of every model"
    part = found["comparison"]["files"]["heldout_objects"]
    expected = [a["psnr"] - b["psnr"] for a, b in zip(ours[:3], theirs[:3], strict=True)]
    assert part["rows"] == 3 and part["psnr"]["mean"] == pytest.approx(np.mean(expected))
    assert part["psnr"]["sem"] == pytest.approx(np.std(expected, ddof=1) / 3**0.5)
    status, text, _ = run(capsys, *args, "--against", whole, "--json")
    assert status == 0 and json.loads(text)["comparison"] == found["comparison"]
    status, _, err = run(capsys, *args[:-3], tmp_path / "b", "--against", whole, "--steps", 5, "--seed", 4)
    assert status == 2 and "seed is 4 here and 0 there; steps is 5 here and 2 there" in err
    assert not (tmp_path / "b").exists(), "said before the work"


def test_wrong_commands(data, bench, whole, tmp_path, capsys, monkeypatch):
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
        ([file, "--steps", 0], "steps must be at least 1"),
        ([file, "--budget", 3], "budget must be at least 16"),
        ([file, "--device", "tpu9"], "unknown device"),
        ([file, "--size", "8x64"], "at least 16 pixels wide and high, got 8x64"),
        ([data, "--out", data / "results"], "its files would be read as rows"),
        ([bench, "--reward", "scene"], "mico_bench_hoi.jsonl:1 has no scene; the scene reward needs"),
        ([file, "--judge-model", "x"], "--judge-model is for --reward judge"),
        ([file, "--reward", "judge", "--judge-url", "ftp://x"], "judge: url must be like"),
        ([file, "--against", tmp_path], "holds no results.json"),
        ([bench, "--against", whole, "--reward", "none"], "reward is 'none' here and 'scene' there"),
        ([data / "heldout_combinations.jsonl", "--image-folder", tmp_path / "none"], "image folder"),
    ]
    for args, message in cases:
        status, text, err = run(capsys, *([] if "--out" in args else ["--out", out]), *args)
        assert status == 2 and message in err and not text and "Traceback" not in err, args
    for place, message in (("full", "cannot be created"), ("busy", "not empty and holds no evaluation")):
        status, _, err = run(capsys, file, "--out", tmp_path / place)
        assert status == 2 and message in err
    status, _, err = run(capsys, file, "--out", out, "--steps", 2, "--seed", 7, "--baseline", "input", "--grid", 0)
    assert status == 0, "what went wrong before has not made the folder useless"
    assert not (out / "grid.png").exists()
    with pytest.raises(ValueError, match="guidance must be a finite number"):
        EvalConfig((file,), out, guidance=math.nan)
    for args, message in (
        ([file], "required: --out"),
        ([file, "--out", out, "--guidance", "nan"], "--guidance: expects NUMBER|none, got 'nan'"),
        ([file, "--out", out, "--judge-timeout", "soon"], "--judge-timeout: expects NUMBER, got 'soon'"),
        ([file, "--out", out, "--stpes", "3"], "--stpes 3; did you mean --steps?"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(capsys, *args)
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_help_lists_the_judge(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    text = capsys.readouterr().out
    assert (
        "--baseline input|vae|untrained|none" in text
        and "--judge-max-tokens" in text
        and "Qwen/Qwen3" in text
        and "--against PATH" in text
    )
