"""Command `uniref-fast eval`.

uniref-fast eval heldout_objects.jsonl heldout_combinations.jsonl --initial runs/mine --out results/mine
uniref-fast eval OmniContext/ --model Qwen/Qwen-Image-Edit-2511 --reward judge --judge.model X --out results/omni
uniref-fast eval heldout_objects.jsonl --initial runs/other --out results/other --against results/mine
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from uniref_fast import builtin
from uniref_fast.evaluation.config import EvalConfig
from uniref_fast.flags import add_fields
from uniref_fast.progress import announce_import
from uniref_fast.rewards.config import JudgeConfig

__all__ = ["add_arguments", "run"]

SHOWN = 10  # broken rows that are listed
FIELDS = (
    "image_folder", "columns", "language", "limit",
    "model", "initial", "lora", "baseline", "visibility", "dtype", "device",
    "quantisation", "mode", "impl",
    "num_inference_steps", "true_cfg_scale", "seed", "budget", "target_side", "width", "height", "batch", "pack_tokens",
    "keep_references", "drift", "keep_dtype",
    "rewards", "grid", "against",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `uniref-fast eval`: the fields of `EvalConfig`, and `--judge.FIELD` for `JudgeConfig`."""
    parser.usage = "%(prog)s PATH [PATH ...] --out DIR [--FLAG VALUE ...]"
    parser.add_argument("data", nargs="+", type=Path, metavar="PATH", help="File or folder of dataset rows.")
    groups = add_fields(parser, EvalConfig((), Path()), FIELDS)
    groups["Rewards"].add_argument(
        "--reward", choices=("scene", "judge", "none"),
        help="Reward that scores the results: scene (generated data), judge (a vision-language model), or none. "
        "(default: scene if the first row of a file has a scene, else none)",
    )  # fmt: skip
    groups["Results"].add_argument(
        "--out", type=Path, required=True, metavar="DIR",
        help="Folder of the results: new, empty, or with the results of the same evaluation, which is then continued.",
    )  # fmt: skip
    groups["Results"].add_argument("--json", action="store_true", help="Print one JSON object instead of text.")
    judge = parser.add_argument_group("Judge", "Settings of --reward judge: an OpenAI-compatible endpoint.")
    add_fields(judge, JudgeConfig(), prefix="judge")


def run(args: argparse.Namespace) -> int:
    """Evaluate and return the exit status: 1 if no row could be evaluated. Raises the errors of `evaluate`."""
    announce_import("PyTorch", "torch")
    from uniref_fast.evaluation.evaluate import evaluate

    names = {field.name for field in dataclasses.fields(EvalConfig)}
    given = {name: value for name, value in vars(args).items() if name in names}
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    config = EvalConfig(**given, judge=_judge(args))
    results = evaluate(config, progress=True)
    broken = [row for row in results["rows"] if "error" in row]
    if args.json:
        shown = ("settings", "versions", "aggregates", "overall", "comparison")
        found: dict[str, Any] = {name: results[name] for name in shown}
        print(json.dumps(found | {"broken": [{k: row[k] for k in ("where", "error")} for row in broken]}))
    else:
        print(_text(config, results, broken))
    return 1 if len(broken) == len(results["rows"]) else 0


def _text(config: EvalConfig, results: dict[str, Any], broken: list[dict[str, Any]]) -> str:
    from uniref_fast.evaluation.compare import comparison_table
    from uniref_fast.evaluation.report import aggregates_table, sampling_text

    sections = [aggregates_table(results["aggregates"], results["overall"])]
    sizes = [row["size"] for row in results["rows"] if "size" in row]
    sections.append(f"settings  {sampling_text(results['settings'], sizes)}")
    if results["comparison"] is not None:
        sections.append(comparison_table(results["comparison"]))
    if broken:
        lines = [f"  {row['where']}: {row['error']}" for row in broken[:SHOWN]]
        more = [f"  and {len(broken) - SHOWN} more"] if len(broken) > SHOWN else []
        sections.append("\n".join(["rows that could not be evaluated", *lines, *more]))
    if results["left_out"]:
        lines = [f"  {name}: {reason}" for name, reason in results["left_out"][:SHOWN]]
        more = [f"  and {len(results['left_out']) - SHOWN} more"] if len(results["left_out"]) > SHOWN else []
        sections.append("\n".join(["files or members that hold no rows", *lines, *more]))
    if config.model == "builtin" and not (config.initial or config.lora) and builtin.weights_status() == "untrained":
        sections.append("the built-in weights are untrained: the results are noise")
    sections.append(f"results  {config.out / 'results.json'}")
    return "\n\n".join(sections)


def _judge(args: argparse.Namespace) -> JudgeConfig:
    given = {name: value for name, value in vars(args).items() if name.startswith("judge.")}
    if given and args.reward != "judge":
        raise ValueError(f"--{next(iter(given)).replace('_', '-')} needs --reward judge")
    try:
        return JudgeConfig(**{name.removeprefix("judge."): value for name, value in given.items()})
    except ValueError as error:
        raise ValueError(f"judge: {error}") from error
