"""Tests of the command line: results, JSON, and errors that say what is possible."""

import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

import uniref_fast
from uniref_fast import builtin, cli
from uniref_fast.cli import main

TWO_STEPS = ("--num-inference-steps", 2, "--true-cfg-scale", 1)
SHORT = ("--num-inference-steps", 2, "--repeats", 1)


@pytest.fixture
def pictures(tmp_path):
    paths = []
    for i, (color, size) in enumerate((("red", (60, 40)), ("blue", (30, 50)))):
        paths.append(tmp_path / f"{i}.png")
        Image.new("RGB", size, color).save(paths[-1])
    return paths


def run(capsys, *args):
    status = main([str(a) for a in args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.slow
def test_demo_writes_a_contact_sheet_and_prints_one_json_object(tmp_path, capsys):
    out = tmp_path / "deep" / "sheet.png"
    status, text, _ = run(capsys, "demo", "--out", out, "--json", *SHORT, "--seed", 1)
    figures = json.loads(text)
    assert status == 0 and figures["weights"] == builtin.weights_status()
    assert 0 <= figures["max_rel_error"] <= 1e-4 == figures["tolerance"]
    assert figures["stock_seconds"] > 0 and figures["patched_seconds"] > 0
    assert figures["accelerated_calls"] > 0 and figures["original_calls"] == 0
    sheet = np.asarray(Image.open(out))
    assert sheet.ndim == 3 and sheet.std() > 10
    assert not list(out.parent.glob(".*")), "no partial file is left"


@pytest.mark.slow
def test_demo_in_bfloat16_is_within_the_error_budget(tmp_path, capsys):
    args = ("demo", "--out", tmp_path / "b.png", "--json", *SHORT, "--references", 1)
    status, text, _ = run(capsys, *args, "--dtype", "bfloat16")
    figures = json.loads(text)
    assert status == 0 and 0 < figures["max_rel_error"] <= figures["tolerance"] < 0.1


def test_demo_says_that_weights_are_untrained(tmp_path, capsys):
    if builtin.weights_status() == "trained":
        pytest.skip("trained weights are shipped")
    _, text, _ = run(capsys, "demo", "--out", tmp_path / "a.png", *SHORT, "--references", 1)
    assert "untrained" in text and "max relative error" in text and "accelerated" in text


def test_edit_with_two_pictures(tmp_path, pictures, capsys):
    out = tmp_path / "result.png"
    args = ["edit", "--image", pictures[0], "--image", pictures[1], "--prompt", "put picture 1 on picture 2"]
    status, text, _ = run(capsys, *args, "--out", out, *TWO_STEPS)
    assert status == 0 and str(out) in text
    image = Image.open(out)
    assert image.height > image.width  # the last picture's aspect ratio
    first = np.asarray(image)
    run(capsys, *args, "--out", out, *TWO_STEPS)
    assert np.array_equal(np.asarray(Image.open(out)), first), "the seed is fixed by default"


def test_edit_with_several_images(tmp_path, pictures, capsys):
    out = tmp_path / "new" / "result.png"
    fields = ["--prompt", "x", "--image", pictures[0], "--num-inference-steps", 2, "--width", 32, "--height", 32]
    status, text, _ = run(capsys, "edit", *fields, "--num-images", 2, "--out", out)
    assert status == 0 and not out.exists()
    first, second = (Image.open(out.with_name(f"result-{i}.png")) for i in (1, 2))
    assert first.size == second.size == (32, 32) and first.tobytes() != second.tobytes()
    assert "result-1.png: 32 x 32" in text and "result-2.png: 32 x 32" in text
    status, text, _ = run(capsys, "estimate", *fields, "--num-images", 2, "--json")
    assert status == 0 and json.loads(text)["results"] == [[32, 32], [32, 32]]
    status, _, error = run(capsys, "edit", *fields, "--num-images", 0, "--out", out)
    assert status == 2 and "num_images must be at least 1" in error


def test_edit_with_kept_references(tmp_path, pictures, capsys):
    args = ["edit", "--image", pictures[0], "--prompt", "make it night", "--num-inference-steps", 3]
    for keep, steps in (("2", "2 of 3 steps (0, 2)"), ("auto", "3 of 3 steps")):
        status, text, _ = run(capsys, *args, "--out", tmp_path / "x.png", "--keep-references", keep)
        assert status == 0 and f"request 1, prompt: references computed in {steps}" in text
    status, text, _ = run(capsys, *args, "--out", tmp_path / "x.png")
    assert status == 0 and "computed" not in text


def test_edit_without_pictures_with_budget_and_size(tmp_path, capsys):
    out = tmp_path / "result.webp"
    args = ["edit", "--prompt", "a sunflower", "--width", 64, "--height", 96, *TWO_STEPS]
    assert run(capsys, *args, "--out", out, "--budget", 64)[0] == 0
    assert Image.open(out).size == (64, 96)


def test_edit_reads_odd_pictures(tmp_path, capsys):
    """Palette with transparency, 16 bit grey, and a photo that carries its orientation in EXIF."""
    Image.new("P", (30, 20), 3).save(tmp_path / "p.png", transparency=3)
    Image.fromarray(np.full((20, 30), 40000, np.uint16)).save(tmp_path / "grey.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 20), "green").save(tmp_path / "turned.jpg", exif=exif)
    images = [a for name in ("p.png", "grey.png", "turned.jpg") for a in ("--image", tmp_path / name)]
    out = tmp_path / "result.png"
    assert run(capsys, "edit", *images, "--prompt", "x", "--out", out, *TWO_STEPS)[0] == 0
    assert Image.open(out).height > Image.open(out).width, "the orientation tag counts"


@pytest.mark.parametrize("ending, mode", [(".png", "RGBA"), (".webp", "RGBA"), (".jpg", "RGB"), (".bmp", "RGB")])
def test_results_with_transparency_are_saved_in_every_format(tmp_path, ending, mode):
    path = tmp_path / f"a{ending}"
    cli._save(Image.new("RGBA", (16, 16), (0, 0, 0, 0)), path)
    with Image.open(path) as image:
        assert image.mode == mode and (mode == "RGBA" or image.getpixel((3, 3)) == (255, 255, 255))


def test_the_family_decides_about_transparency(tmp_path, monkeypatch, capsys):
    """The command and the server pass transparency on, and Qwen-Image-Edit gets pictures over white."""
    from uniref_fast.models.families import families
    from uniref_fast.serve.pictures import decode

    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    given = decode([(tmp_path / "clear.png").read_bytes()])

    def edit(pipe, requests, **options):
        given.extend(requests[0].images)
        return [Image.new("RGB", (16, 16))]

    monkeypatch.setattr(uniref_fast, "edit", edit)
    args = ("edit", "--image", tmp_path / "clear.png", "--prompt", "x", "--out", tmp_path / "a.png")
    assert run(capsys, *args)[0] == 0
    corner = {each.name: [each.convert_image(image).getpixel((0, 0)) for image in given] for each in families()}
    transparent = {name for name, pixels in corner.items() if pixels == [(255, 0, 0, 0)] * 2}
    assert transparent == {"qwen-image-2.1"}
    hidden = {each.name for each in families() if each.drops_transparency}  # as their pipelines do
    assert hidden == {"flux3", "fibo-edit"} and all(corner[name] == [(255, 0, 0)] * 2 for name in hidden)
    assert all(corner[name] == [(255, 255, 255)] * 2 for name in corner.keys() - transparent - hidden)


def test_edit_with_a_model_folder(tmp_path, pictures, capsys):
    folder = builtin.build(tmp_path / "model", seed=1)
    out = tmp_path / "result.png"
    args = ["edit", "--image", pictures[0], "--prompt", "x", "--out", out, *TWO_STEPS, "--model", folder]
    status, text, _ = run(capsys, *args)
    assert status == 0 and out.is_file() and "untrained" in text
    before = out.read_bytes()
    (folder / "uniref_fast.json").unlink()  # as `save_pretrained` leaves it: known by its areas, and by its weights
    status, text, _ = run(capsys, *args)
    assert status == 0 and out.read_bytes() == before and "untrained" in text


def test_estimate(pictures, capsys):
    status, text, _ = run(capsys, "estimate", "--image", pictures[0], "--image-size", "512x384", "--prompt", "x")
    assert status == 0 and "transformer" in text
    status, _, err = run(capsys, "estimate", "--image-size", "512", "--prompt", "x")
    assert status == 2 and "WIDTHxHEIGHT" in err
    status, _, err = run(capsys, "estimate", "--prompt", "x", "--model", "no/such/folder")
    assert status == 2 and "no such folder" in err
    status, text, _ = run(capsys, "estimate", "--image-size", "512x384", "--prompt", "x", "--json")
    found = json.loads(text)
    assert status == 0 and found["tokens"]["reference"] > 0 and found["fits"] is None


def test_estimate_answers_whether_a_gpu_is_large_enough(capsys):
    args = ("estimate", "--image-size", "512x384", "--prompt", "x", "--device", "some-gpu", "--gpu-memory")
    status, text, _ = run(capsys, *args, 0.001)
    assert status == 0 and "does not fit a GPU of 0.001 GB" in text and "not measured on some-gpu" in text
    assert json.loads(run(capsys, *args, 1, "--json")[1])["fits"] is True
    whole, block = (json.loads(run(capsys, *args, 1, "--json", *more)[1]) for more in ((), ("--offload", "block")))
    assert block["peak_bytes"] < whole["peak_bytes"] and block["weight_bytes"] == whole["weight_bytes"]
    status, _, err = run(capsys, *args, 1, "--offload", "model", "--mode", "fast")
    assert status == 2 and "--offload model needs the weights as they are stored" in err
    status, _, err = run(capsys, *args, "nan")
    assert status == 2 and "--gpu-memory is a number of GB above 0, got nan" in err


def test_fast_is_refused_where_it_is_impossible(capsys, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    status, _, err = run(capsys, "edit", "--prompt", "a", "--out", str(tmp_path / "a.png"), "--mode", "fast")
    assert status == 2 and 'mode="fast" is not possible here: it needs e4m3 matrix products' in err


def test_doctor(capsys):
    status, text, _ = run(capsys, "doctor")
    assert status == 0 and "segment_attention" in text and "torch" in text
    facts = json.loads(run(capsys, "doctor", "--json")[1])
    assert facts["served"]["cpu float16"]["implementation"] == "reference"
    assert set(facts["ops"]) == {
        "gate_residual",
        "gate_residual_norm_modulate",
        "gelu",
        "norm_modulate",
        "qk_norm_rope",
        "segment_attention",
    }


def test_doctor_names_what_an_older_native_library_does_not_have(monkeypatch):
    from uniref_fast import doctor, native
    from uniref_fast.native import library

    loaded, reason = library._load()
    if loaded is None:
        pytest.skip("not built")
    assert native.missing() == doctor.facts()["native_missing"] == [] and "older" not in doctor.report(doctor.facts())
    older = types.SimpleNamespace(uf_level_supported=loaded.uf_level_supported)
    monkeypatch.setattr(library, "_load", lambda: (older, reason))
    facts = doctor.facts()
    assert facts["native_missing"] == ["gelu", "norms with add_one=False or branch_eps"]
    assert "without gelu, norms with add_one=False or branch_eps; PyTorch computes these" in doctor.report(facts)
    assert not native.has_gelu() and not native.has_branch_norm()


BAD = [
    (["--image", "missing.png"], "no such image file: missing.png"),
    (["--image", "empty"], "empty is not an image file"),
    (["--image", "text.png"], "text.png: not an image of a known format"),
    (["--image", "cut.png"], "cut.png: image file is truncated"),
    (["--image", "long.png"], "too elongated"),
    (["--prompt", "  "], "--prompt is empty"),
    (["--out", "result.txt"], "must be one of .png, .jpg"),
    (["--out", "result.xbm"], "cannot hold the image"),
    (["--out", "."], "--out"),
    (["--out", "text.png/x.png"], "is not a writable folder"),
    (["--out", "new/deep/x.png", "--image", "missing.png"], "no such image"),
    (["--width", "3"], "width must be at least 16"),
    (["--num-inference-steps", "1"], "use at least 2"),
    (["--num-inference-steps", "0"], "at least 1"),
    (["--width", "99999999"], "at most 16384"),
    (["--seed", "99999999999999999999"], "64 bits"),
    (["--true-cfg-scale", "nan"], "finite number"),
    (["--device", "meta"], "not supported"),
    (["--budget", "4"], "budget is the side"),
    (["--image", "ok.png", "--image", "ok.png", "--budget", "20"], "cannot fit a budget"),
    (["--model", "nowhere/at/all"], "no such folder"),
    (["--model", "empty"], "no model_index.json"),
    (["--device", "quantum"], "unknown device"),
    (["--keep-references", "often"], "true, false, auto or a number of steps from 1, got 'often'"),
    (["--keep-references", "true", "--image", "ok.png"], "not be exact"),
    (["--keep-references", "2", "--drift", "0.1"], "drift is the tolerance"),
    (["--device", "cuda:99"], "cuda"),
    (["--offload", "block", "--device", "cpu"], "makes room on a GPU, and the model is on the CPU"),
    (["--offload", "model", "--mode", "fast", "--device", "cpu"], "without --mode fast and --quantisation"),
]


@pytest.mark.parametrize("args, message", BAD, ids=[" ".join(args) for args, _ in BAD])
def test_bad_input_is_explained(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("not a picture")
    Image.new("RGB", (2000, 3)).save("long.png")
    Image.effect_noise((90, 90), 90).save("ok.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "ok.png").read_bytes()[:900])
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.iterdir())
    if "cuda:99" in args and __import__("torch").cuda.is_available():
        pytest.skip("for machines without CUDA")
    defaults = {"--prompt": "x", "--out": "result.png"}
    rest = [a for key, value in defaults.items() if key not in args for a in (key, value)]
    status, out, err = run(capsys, "edit", *args, *rest)
    assert status == 2 and message in err and out == ""
    assert "Traceback" not in err and sorted(tmp_path.iterdir()) == before, "nothing is left behind"


@pytest.mark.parametrize("seed", [-1, 10**20])
def test_the_demo_refuses_a_seed_out_of_range(tmp_path, capsys, seed):
    status, out, err = run(capsys, "demo", "--out", tmp_path / "a.png", "--seed", seed)
    assert status == 2 and "--seed is a number from 0 to 999999999" in err and out == ""


@pytest.mark.parametrize("model, given, scale", [("builtin", None, 1.0), ("", None, 4.0), ("builtin", 3.0, 3.0)])
def test_guidance_is_off_for_the_built_in_model_unless_asked_for(model, given, scale, tmp_path):
    """The built-in model gives its best images without guidance."""
    (tmp_path / "model_index.json").write_text('{"_class_name": "QwenImageEditPlusPipeline"}')
    model = model or str(tmp_path)
    more = [] if given is None else ["--true-cfg-scale", str(given)]
    args = cli._parser().parse_args(["edit", "--prompt", "x", "--out", "a.png", "--model", model, *more])
    assert cli._request_fields(args)["true_cfg_scale"] == scale


@pytest.mark.parametrize("args", [[], ["edit"], ["paint"], ["edit", "--prompt", "x"], ["demo", "--references", "9"]])
def test_usage_errors(args, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2 and "--help" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args", ["edit --prompt x --out x.png", "data make out", "data check rows", "eval rows --out x"]
)
def test_an_unknown_flag_names_the_command_that_has_the_help(args, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*args.split(), "--rows", "24"])
    command = args.partition(" -")[0].removesuffix(" out").removesuffix(" rows")
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert f"uniref-fast {command}: error: unrecognized arguments: --rows 24" in err
    assert f"Try 'uniref-fast {command} --help'" in err


@pytest.mark.parametrize(
    ("args", "old", "new"),
    [
        (["edit", "--prompt", "x", "--out", "x.png"], "--steps", "--num-inference-steps"),
        (["edit", "--prompt", "x", "--out", "x.png"], "--guidance=2", "--true-cfg-scale"),
        (["estimate", "--prompt", "x"], "--size", "--image-size"),
        (["demo"], "--steps", "--num-inference-steps"),
        (["eval", "x", "--out", "y"], "--steps", "--num-inference-steps"),
        (["eval", "x", "--out", "y"], "--size", "--width and --height"),
        (["eval", "x", "--out", "y"], "--judge-max-tokens=5", "--judge.max-tokens"),
    ],
)
def test_a_former_flag_is_refused_with_its_new_name(args, old, new, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*args, old, "4"])
    name = f"uniref-fast {args[0]}"
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        f"{name}: error: {old.partition('=')[0]} is now called {new}\nTry '{name} --help'.\n"
    )


def test_an_unknown_flag_suggests_the_nearest_one(capsys):
    with pytest.raises(SystemExit):
        main(["edit", "--prompt", "x", "--out", "x.png", "--true-cfg-sclae=2"])
    assert "unrecognized arguments: --true-cfg-sclae=2; did you mean --true-cfg-scale?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, status, message",
    [
        (ValueError("steps must be at least 1"), 2, "steps must be at least 1"),
        (OSError(28, "No space left on device", "x.png"), 1, "[Errno 28] No space left on device: 'x.png'"),
        (RuntimeError("out of memory"), 1, "out of memory"),
        (RuntimeError(), 1, "RuntimeError"),
        (ModuleNotFoundError("No module named 'peft'", name="peft"), 1, "install it with pip install -e"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_are_one_line_without_a_traceback(monkeypatch, capsys, error, status, message):
    def fail(args):
        raise error

    monkeypatch.setattr(cli, "_doctor", fail)
    assert main(["doctor"]) == status
    err = capsys.readouterr().err
    hint = "\nTry 'uniref-fast doctor --help'.\n" if status == 2 else "\n"
    assert err.startswith("uniref-fast doctor: error: ") and message in err
    assert err.endswith(hint) and err.count("\n") == hint.count("\n")


def test_as_a_program():
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    result = subprocess.run([sys.executable, "-m", "uniref_fast", "--version"], capture_output=True, text=True, env=env)
    assert result.returncode == 0 and result.stdout.startswith("uniref_fast ")
