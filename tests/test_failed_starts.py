"""A command that cannot start says so, names its own --help, and leaves no new file or folder."""

import json
import socket

import pytest
from PIL import Image

from uniref_fast.cli import main
from uniref_fast.training import msgrpo, sft

NOWHERE = "no-such-folder"
EDIT = ["edit", "--prompt", "x", "--out", "new/deep/x.png"]
EVAL = ["eval", "rows.jsonl", "--out", "new/deep/results"]
MAKE = ["data", "make", "new/deep/data"]
CONVERT = ["data", "convert", "rows.jsonl", "--out", "new/deep/rows.jsonl"]
RUN = ["--recipe", "tiny", "--data", "rows.jsonl", "--out", "new/deep/run"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a picture and a dataset of one row."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32), "red").save("a.png")
    row = {"instruction": "x", "input_images": ["a.png"], "output_image": "a.png"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path


def content(folder):
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["demo", "--out", "new/x.png", "--seed", "-1"], "--seed is a number"),
        (["demo", "--out", "new/x.txt"], "the ending of the name"),
        (["demo", "--out", "new/x.png", "--num-inference-steps", "1"], "at least 2 denoising steps"),
        ([*EDIT, "--image", "no.png"], "no such image file"),
        ([*EDIT, "--model", NOWHERE], "no such folder"),
        ([*EDIT, "--lora", NOWHERE], "no such file or folder"),
        ([*EDIT, "--budget", str(1024**2)], "for 1048576 pixels give 1024"),
        (["estimate", "--prompt", "x", "--image", "a.png", "--budget", str(1024**2)], "for 1048576 pixels give 1024"),
        ([*EDIT, "--num-inference-steps", "0"], "at least 1"),
        (["eval", "no.jsonl", "--out", "new/deep/results"], "no such file"),
        ([*EVAL, "--model", NOWHERE], "no such folder"),
        ([*EVAL, "--num-inference-steps", "0"], "at least 1"),
        ([*EVAL, "--num-inference-steps", "1"], "use at least 2"),
        ([*EVAL, "--against", NOWHERE], "holds no results.json"),
        ([*EVAL, "--lora", NOWHERE], "no such file or folder"),
        ([*EVAL, "--initial", NOWHERE], "neither lora/ nor transformer/"),
        ([*EVAL, "--rewards", "nowhere:f"], "nowhere"),
        (
            [*EVAL, "--reward", "judge", "--judge.model", "x", "--judge.url", "http://127.0.0.1:PORT/v1"],
            "does not answer",
        ),
        (["export", NOWHERE, "--out", "new/deep/x"], "no such folder"),
        (["fuse", "builtin", "--lora", NOWHERE, "--out", "new/deep/x"], "no such file or folder"),
        ([*MAKE, "--tasks", "paint"], "unknown task"),
        ([*MAKE, "--size", "3"], "multiple of 16"),
        ([*MAKE, "--preview", "x.txt"], "must end in .png"),
        ([*CONVERT, "--columns", "a=b"], "is not a role"),
        (["data", "convert", "no.jsonl", "--out", "new/deep/rows.jsonl"], "no such file"),
        (["plot", NOWHERE, "--out", "new/deep/x.png"], "is not a folder"),
    ],
)
def test_a_command_that_cannot_start(here, capsys, args, message):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    before = content(here)
    assert main([arg.replace("PORT", port) for arg in args]) == 2
    err = capsys.readouterr().err
    name = "uniref-fast " + " ".join(args[:2] if args[0] == "data" else args[:1])
    assert f"{name}: error: " in err and message in err and err.endswith(f"\nTry '{name} --help'.\n")
    assert content(here) == before


@pytest.mark.parametrize("command", [sft, msgrpo])
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--recipe", "tinny"], "did you mean tiny?"),
        (["--packs", "0"], "packs must be at least 1"),
        (["--data", "no.jsonl"], "no such file or folder: no.jsonl"),
        (["--heldout", "no.jsonl"], "no such file or folder: no.jsonl"),
        (["--model", NOWHERE, "--data", "builtin"], "no such folder"),
        (["--initial", NOWHERE], "neither lora/ nor transformer/"),
        (["--recipe", "lora", "--model", "builtin"], "the recipe does not suit model = builtin"),
        (["--lora-rank", "257"], "lora_rank = 257 is more than the width 256 of the layers 'to_q'"),
        (["--lora-rank", "4", "--lora-targets", "to_q,to_z"], "no Linear layer of the transformer has the name 'to_z'"),
        (["--stages.0.sequence-parallel", "3"], "sequence_parallel = 3 does not work for 1 rank(s) and 4 attention"),
        (["--memory-gib", "0.01"], "needs"),
    ],
)
def test_a_run_that_cannot_start(here, capsys, command, args, message):
    before = content(here)
    given = dict(zip(RUN[::2], RUN[1::2], strict=True)) | dict(zip(args[::2], args[1::2], strict=True))
    assert command.main([word for pair in given.items() for word in pair]) == 2
    name = command.__name__.rpartition(".")[2]
    err = capsys.readouterr().err
    assert f"{name}: " in err and message in err and err.endswith(f"\nTry 'training/{name}.py --help'.\n")
    assert content(here) == before


def test_the_generated_data_of_a_run_that_cannot_start_are_removed(here, capsys, monkeypatch):
    monkeypatch.setattr(
        "uniref_fast.training.core.launch.BUILTIN_ROWS", {"train": 2, "heldout_objects": 1, "heldout_combinations": 1}
    )
    before = content(here)
    assert sft.main(["--recipe", "tiny", "--out", "new/run", "--heldout", "no.jsonl"]) == 2
    assert "no such file or folder: no.jsonl" in capsys.readouterr().err and content(here) == before


def test_nothing_is_read_or_loaded_for_a_recipe_that_does_not_suit_the_model(here, capsys, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("the model or the data are loaded")

    monkeypatch.setattr("uniref_fast.training.core.model.load_pipeline", refuse)
    monkeypatch.setattr("uniref_fast.data.dataset.Dataset.__init__", refuse)
    assert sft.main(["--recipe", "lora", "--model", "builtin", "--data", "rows.jsonl", "--out", "run"]) == 2
    assert (
        "stage 0 has target_side = 1024, and the images of this model have about 64 x 64 pixels; use --recipe tiny, or "
        "set --stages.0.target-side to between 8 and 256\n"
    ) in capsys.readouterr().err
