"""Records of an evaluation, written by hand, and helpers that run and read one."""

import json

from uniref_fast.cli import main


def record(file="a", index=0, score=5.0, references=1, task="add", **more):
    found = {"file": file, "index": index, "where": f"{file}.jsonl:{index + 1}", "instruction": f"do {file} {index}"}
    found |= {"task": task, "references": references, "size": [64, 48], "psnr": 20.0 + index, "bound": {"psnr": 30.0}}
    if score is not None:
        found |= {"scores": scores(score), "bound": {"psnr": 30.0, "scores": scores(9.0)}}
    return found | more


def scores(value):
    return {"integration": value, "consistency": value + 1, "quality": value - 1, "mean": value}


def placed(present, distance=None, kept=False, similarity=0.5):
    return {"present": present, "distance": distance, "kept": kept, "similarity": similarity}


def broken(file="a", index=9):
    return {"file": file, "index": index, "where": f"{file}.jsonl:{index + 1}", "error": "cut short"}


def results(out):
    """Return the content of results.json."""
    return json.loads((out / "results.json").read_text())


def images(out):
    """Return the bytes of all images by their path in the folder of the results."""
    return {path.relative_to(out): path.read_bytes() for path in sorted((out / "images").rglob("*.png"))}


def run_eval(capsys, *args):
    """Run `uniref-fast eval`; return its exit status and what it wrote to stdout and stderr."""
    status = main(["eval", *map(str, args)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err
