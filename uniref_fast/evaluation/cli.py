"""The command `uniref-fast eval`.

uniref-fast eval heldout_objects.jsonl heldout_combinations.jsonl --initial runs/mine --out results/mine
uniref-fast eval OmniContext/ --model Qwen/Qwen-Image-Edit-2511 --reward judge --judge-model X --out results/omni
uniref-fast eval heldout_objects.jsonl --initial runs/other --out results/other --against results/mine
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from uniref_fast import builtin
from uniref_fast import flags as configs
from uniref_fast.evaluation.compare import comparison_table
from uniref_fast.evaluation.config import EvalConfig
from uniref_fast.evaluation.report import aggregates_table
from uniref_fast.loading import LORA_HELP
from uniref_fast.rewards.config import JudgeConfig

__all__ = ["add_arguments", "run"]

SHOWN = 10  # broken rows that are listed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `uniref-fast eval`; what is not given is as `EvalConfig` has it."""
    own = EvalConfig((), Path())
    add = parser.add_argument
    add("data", nargs="+", type=Path, metavar="PATH", help="file or folder of rows, see the README")
    add("--out", type=Path, required=True, metavar="DIR", help="results; the same command goes on with what is there")
    add("--model", default=own.model, metavar="DIR_OR_ID", help="diffusers folder or hub id (%(default)s)")
    add(
        "--initial", type=Path, action="append", default=[], metavar="RUN",
        help="folder of a training run whose transformer/ or lora/ is put on top; repeat for more, in order",
    )  # fmt: skip
    add(
        "--baseline", choices=("input", "vae", "untrained"),
        help="instead: the picture that gives the background, as it is; the target through the autoencoder; the "
        "built-in model before training",
    )  # fmt: skip
    add("--lora", action="append", default=[], metavar="PATH[:SCALE]", help=f"{LORA_HELP}; after --initial")
    add(
        "--rewards", type=lambda text: tuple(text.split(",")), default=(), metavar="MODULE:FUNCTION,...",
        help="rewards of your own, found from the working directory, which score every image beside --reward",
    )  # fmt: skip
    add("--reward", choices=("scene", "judge", "none"), help="scene where rows have a scene, else none, by default")
    add("--steps", type=int, help="denoising steps (8 for the built-in model, else 50)")
    add("--guidance", type=float, help="true CFG scale; 1 turns it off (1 for the built-in model, else 4)")
    add("--budget", type=int, metavar="SIDE", help="joint pixel budget of all references of a row: SIDE x SIDE")
    add(
        "--target-side", type=int, metavar="SIDE",
        help="results have SIDE x SIDE pixels; with a target its size, at most so many (as the pipeline has it)",
    )  # fmt: skip
    add("--size", metavar="WxH", help="of all results, as OmniContext has 1024x1024, whatever the rows say")
    add("--language", metavar="NAME", help='only rows of this language, such as "en" of GEdit-Bench (all)')
    add("--seed", type=int, default=own.seed, help="of the noise, with the row (%(default)s)")
    add("--limit", type=int, metavar="N", help="rows of each file (all)")
    add("--image-folder", type=Path, metavar="DIR", help="of relative paths (beside their file by default)")
    add(
        "--columns", type=lambda text: tuple(text.split(",")), default=(), metavar="PAIRS",
        help="what columns hold whose names are not known, such as instruction=prompt,references=refs; as for "
        "`uniref-fast data check`",
    )  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="float32 on a CPU, bfloat16 on a GPU by default")
    add("--device", help="cuda where there is one, else cpu, by default")
    add("--batch", type=int, default=own.batch, metavar="N", help="rows that are edited together (%(default)s)")
    add("--pack-tokens", type=int, default=own.pack_tokens, metavar="N", help="most tokens of a pack (%(default)s)")
    add(
        "--visibility", choices=("full", "reference_causal", "reference_isolated"),
        help="that the model attends under (that of the last --initial's training, else full)",
    )  # fmt: skip
    add("--grid", type=int, default=own.grid, metavar="N", help="rows of each file on grid.png (%(default)s)")
    add("--against", type=Path, metavar="DIR", help="an earlier evaluation to take differences to, row by row")
    add("--json", action="store_true", help="print one JSON object instead of text")
    judge = parser.add_argument_group("judge", "of --reward judge; an OpenAI-compatible endpoint")
    for name in _judge_fields():
        default = getattr(own.judge, name)
        judge.add_argument(_flag(name), metavar="VALUE", help=f"({'none' if default is None else default})")


def run(args: argparse.Namespace) -> int:
    """Evaluate; returns the exit status: 1 when no row could be evaluated. Raises as `evaluate` does."""
    from uniref_fast.evaluation.evaluate import evaluate
    from uniref_fast.request import parse_size

    fields = [
        field.name
        for field in dataclasses.fields(EvalConfig)
        if field.name not in ("data", "initial", "lora", "size", "judge")
    ]
    config = EvalConfig(
        tuple(args.data),
        initial=tuple(args.initial),
        lora=tuple(args.lora),
        size=None if args.size is None else parse_size(args.size),
        judge=_judge(args),
        **{name: getattr(args, name) for name in fields},
    )
    results = evaluate(config, progress=True)
    broken = [row for row in results["rows"] if "error" in row]
    if args.json:
        names = ("settings", "versions", "aggregates", "overall", "comparison")
        found: dict[str, Any] = {name: results[name] for name in names}
        print(json.dumps(found | {"broken": [{k: row[k] for k in ("where", "error")} for row in broken]}))
    else:
        print(_text(config, results, broken))
    return 1 if len(broken) == len(results["rows"]) else 0


def _text(config: EvalConfig, results: dict[str, Any], broken: list[dict[str, Any]]) -> str:
    sections = [aggregates_table(results["aggregates"], results["overall"])]
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
        sections.append("the built-in weights are untrained: what they make is noise")
    sections.append(f"results  {config.out / 'results.json'}")
    return "\n\n".join(sections)


def _judge_fields() -> list[str]:
    return [field.name for field in dataclasses.fields(JudgeConfig)]


def _flag(name: str) -> str:
    return "--judge-" + name.replace("_", "-")


def _judge(args: argparse.Namespace) -> JudgeConfig:
    given = {name: text for name in _judge_fields() if (text := getattr(args, f"judge_{name}")) is not None}
    if given and args.reward != "judge":
        raise ValueError(f"{_flag(next(iter(given)))} is for --reward judge; give that too")
    try:
        return configs.parse({"judge": JudgeConfig}, [f"--{name}={text}" for name, text in given.items()]).config
    except configs.ConfigError as error:
        message = str(error)
        for name in given:
            message = message.replace(f"--{name} ", f"{_flag(name)} ")
        raise ValueError(message if message.startswith("--") else f"judge: {message}") from error
