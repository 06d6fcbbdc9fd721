"""Train the built-in model from scratch: data, autoencoder, SFT with growing budgets, MSGRPO, export, evaluation.

    python -m uniref_fast.training.builtin.make --out runs/builtin

Every part is a command of this repository, which is printed before it runs. Parts that are done are skipped, so the
same command continues a run that was stopped. `uniref_fast/assets/model` is a copy of `runs/builtin/model`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from uniref_fast import __version__
from uniref_fast import flags as configs
from uniref_fast.evaluation.compare import comparison_table
from uniref_fast.evaluation.report import aggregates_table
from uniref_fast.files import write_whole
from uniref_fast.training.core.processes import signal_at_parent_end
from uniref_fast.training.core.recipe import Recipe
from uniref_fast.training.rl.recipes import MSGRPO_RECIPES
from uniref_fast.training.supervised.recipes import SFT_RECIPES

__all__ = ["BuiltinModel", "Part", "main", "parts", "report", "ship"]

MADE = "made.json"
HELDOUT = ("heldout_objects", "heldout_combinations")
MORE = (4, 5, 6)  # pictures of a sample, of which the model saw at most three in training
MORE_SFT = ("data of one picture", "sft-more")


@dataclass(frozen=True)
class BuiltinModel:
    """Settings of the training of the built-in model, from the data to the report.

    Attributes: Folders and processes
        out: Folder of all parts.
        ranks: Number of training processes, each on a GPU of its own if there are GPUs; none takes the number of GPUs,
            at most 2, or 2 on a CPU.

    Attributes: Data
        artworks: Objects of the scenes, as in `uniref-fast data make`.
        samples: Number of training samples.
        heldout: Number of samples in each held-out split.

    Attributes: Training
        vae_steps: Number of optimizer steps of the autoencoder.
        scale: Factor of the numbers of steps of SFT and MSGRPO: below 1 for a trial or a slow machine, above 1 for a
            GPU.
        dtype: Data type of the computation in SFT and MSGRPO. bfloat16 takes a third of the time of float32 on a CPU
            that multiplies it (AVX-512-BF16), and longer on others; none takes bfloat16 on a GPU and on such a CPU.
        more: Continue SFT after its first part (recipe `builtin_more`). Without it everything takes under two and a
            half hours.
        seed: Seed of all parts.
        seeds: Number of runs of MSGRPO, with this seed and the following ones. The result of the first is the model;
            the others show how much of the gain is due to chance.
    """

    out: Path = Path("runs/builtin")
    ranks: int | None = None
    artworks: Literal["auto", "font", "shipped"] = "font"
    samples: int = 20_000
    heldout: int = 256
    vae_steps: int = 10_000
    scale: float = 1.0
    dtype: Literal["float32", "bfloat16"] | None = None
    more: bool = True
    seed: int = 0
    seeds: int = 3

    def __post_init__(self) -> None:
        for name in ("ranks", "samples", "heldout", "vae_steps", "seeds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not (self.scale > 0 and math.isfinite(self.scale)):
            raise ValueError(f"scale must be above 0, got {self.scale}")


def for_machine(config: BuiltinModel) -> BuiltinModel:
    """Return the configuration with `ranks` and `dtype` chosen for this machine where they are None."""
    import torch

    gpus = torch.cuda.device_count()
    fast = gpus or torch.cpu._is_avx512_bf16_supported()
    dtype: Literal["float32", "bfloat16"] = "bfloat16" if fast else "float32"
    return replace(config, ranks=config.ranks or min(gpus, 2) or 2, dtype=config.dtype or dtype)


@dataclass(frozen=True)
class Part:
    """One part of the training.

    Attributes:
        name: Name of the part, such as "vae".
        done: File or folder that exists once the part is done.
        work: Command line to run, or a function to call in this process.
    """

    name: str
    done: Path
    work: tuple[str, ...] | Callable[[], None]


def parts(config: BuiltinModel) -> list[Part]:
    """Return all parts in order."""
    out, ranks, dtype = config.out, config.ranks or 2, config.dtype or "bfloat16"
    heldout = [str(out / "data" / f"{name}.jsonl") for name in HELDOUT]
    more = [str(out / "data-more" / f"{name}.jsonl") for name in HELDOUT]
    make = ("--size", 64, "--pictures", "simple", "--artworks", config.artworks, "--seed", config.seed,
            "--workers", ranks)  # fmt: skip
    train, train_one = (str(out / name / "train.jsonl") for name in ("data", "data-one"))
    data = ("--data", train)
    # With these weights a quarter of the rows is "move", and two in five have several references.
    both = ("--data", f"{train},{train_one}", "--weights", "1,0.6")
    common = ("--model", str(out / "vae" / "model"), "--heldout", ",".join(heldout), "--cache", str(out / "cache"),
              "--dtype", dtype, "--resume", "auto")  # fmt: skip
    edits = ("-m", "uniref_fast", "eval", *heldout, *more, "--num-inference-steps", 12,
             "--true-cfg-scale", 1, "--budget", 128, "--batch", 32)  # fmt: skip
    model = ("--model", str(out / "vae" / "model"))
    sft = _sft(config)
    after_sft = (*model, "--initial", str(sft))
    evaluated: dict[str, tuple[str, ...]] = {
        "nothing": ("--model", str(out / "model"), "--baseline", "input"),
        "autoencoder": ("--model", str(out / "model"), "--baseline", "vae"),
        "untrained": model,
        "sft": (*model, "--initial", str(out / "sft")),
        sft.name: after_sft,
    }
    runs = {config.seed + i: out / (f"msgrpo-{i}" if i else "msgrpo") for i in range(config.seeds)}
    against = ("--against", str(out / "eval" / sft.name))
    evaluated |= {run.name: (*after_sft, "--initial", str(run), *against) for run in runs.values()}
    evaluated["shipped"] = ("--model", str(out / "model"), *against)  # the result of the first run, rounded to bfloat16
    made = [
        Part("data", out / "data" / "made.json",
             _python("-m", "uniref_fast", "data", "make", out / "data", *make, "--references", "1,2,3",
                     "--train", config.samples, "--heldout", config.heldout)),
        Part("data of more pictures", out / "data-more" / "made.json",
             _python("-m", "uniref_fast", "data", "make", out / "data-more", *make,
                     "--references", ",".join(map(str, MORE)), "--train", 0, "--heldout", -(-config.heldout // 3))),
        Part("data of one picture", out / "data-one" / "made.json",
             _python("-m", "uniref_fast", "data", "make", out / "data-one", *make, "--references", 1,
                     "--tasks", "move,move,replace_background,recolour", "--train", config.samples, "--heldout", 0)),
        Part("vae", out / "vae" / "model",
             _torchrun(ranks, "-m", "uniref_fast.training.builtin.vae", "--data", out / "data", "--out", out / "vae",
                       "--steps", config.vae_steps, "--seed", config.seed)),
        Part("sft", out / "sft" / "transformer",
             _torchrun(ranks, _script("sft"), "--recipe", "builtin", *common, *data, "--out", out / "sft",
                       "--seed", config.seed, "--steps", _steps(SFT_RECIPES["builtin"](), config.scale))),
        Part("sft-more", out / "sft-more" / "transformer",
             _torchrun(ranks, _script("sft"), "--recipe", "builtin_more", *common, *both,
                       "--out", out / "sft-more", "--initial", out / "sft",
                       "--seed", config.seed + 1, "--steps", _steps(SFT_RECIPES["builtin_more"](), config.scale))),
        *(Part(run.name, run / "lora",
               _torchrun(ranks, _script("msgrpo"), "--recipe", "tiny", *common, *data, "--out", run,
                         "--initial", sft, "--seed", seed,
                         "--steps", _steps(MSGRPO_RECIPES["tiny"](), config.scale)))
          for seed, run in runs.items()),
        Part("model", out / "model", lambda: ship(config)),
        *(Part(f"eval {name}", out / "eval" / name / "results.json",
               _python(*edits, "--out", out / "eval" / name, *flags))
          for name, flags in evaluated.items()),
        Part("curves", out / "curves.png",
             _python("-m", "uniref_fast", "plot", *runs.values(),
                     "--keys", "reward", "eval", "ratio", "grad_norm", "--out", out / "curves.png")),
        Part("report", out / "report.json", lambda: report(out, list(evaluated))),
    ]  # fmt: skip
    return [part for part in made if config.more or part.name not in MORE_SFT]


def _sft(config: BuiltinModel) -> Path:
    """Return the folder of the run that MSGRPO continues."""
    return config.out / ("sft-more" if config.more else "sft")


def ship(config: BuiltinModel) -> None:
    """Write the trained parts as one bfloat16 pipeline folder, with the record of their training."""
    import torch

    from uniref_fast import builtin
    from uniref_fast.loading import load_pipeline

    out = config.out
    pipe = load_pipeline(str(out / "vae" / "model"), torch.float32, "cpu")
    pipe.transformer = type(pipe.transformer).from_pretrained(_sft(config) / "transformer", use_safetensors=True)
    pipe.load_lora_weights(str(out / "msgrpo" / "lora"), use_safetensors=True)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder):
        for parameter in part.parameters():  # not part.to(dtype): rotary tables stay float32
            parameter.data = parameter.data.to(torch.bfloat16)
    builtin.write(pipe, out / "model", weights="trained", made=json.loads((out / MADE).read_text()))


def report(out: Path, names: Sequence[str]) -> None:
    """Write the results of the evaluations, without their rows, to `report.json`, and print them as tables."""
    found: dict[str, Any] = {"made": json.loads((out / MADE).read_text()), "evaluations": {}}
    found["made"]["parts"].pop("report", None)  # the part that runs now, which is recorded when it begins
    lines = []
    for name in names:
        results = json.loads((out / "eval" / name / "results.json").read_text())
        kept = {key: results[key] for key in ("settings", "versions", "aggregates", "comparison")}
        found["evaluations"][name] = kept
        lines += [f"== {name}", aggregates_table(kept["aggregates"])]
        if kept["comparison"] is not None:
            lines.append(comparison_table(kept["comparison"]))
    print("\n".join(lines))
    write_whole(out / "report.json", lambda file: file.write((json.dumps(found, indent=1) + "\n").encode()))


def main(argv: Sequence[str] | None = None) -> int:
    """Train the model and return the exit status: that of the part that failed, or 0."""
    try:
        given = sys.argv[1:] if argv is None else argv
        config = configs.parse(
            {"default": BuiltinModel},
            given,
            prog="python -m uniref_fast.training.builtin.make",
            description="Train the built-in model from scratch, and evaluate it.",
        ).config
        config = for_machine(config)
        _keep(config)
        for part in parts(config):
            if status := _run(part, config.out):
                print(f"error: {part.name} ended with status {status}; the same command continues", file=sys.stderr)
                return status
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(config.out / "model")
    return 0


def _run(part: Part, out: Path) -> int:
    if part.done.exists():
        print(f"{part.name}: done, {part.done}", flush=True)
        return 0
    _record(part, out, 0.0)  # before the work, so that a part that is killed at its end is recorded too
    start = time.perf_counter()
    if callable(part.work):
        print(f"{part.name}: {part.done}", flush=True)
        part.work()
        status = 0
    else:
        print(f"{part.name}: {shlex.join(part.work)}", flush=True)
        status = run_command(part.work)
    if status == 0 and not part.done.exists():
        raise ValueError(f"{part.name} ended with status 0 but did not write {part.done}")
    minutes = (time.perf_counter() - start) / 60
    print(f"{part.name}: {minutes:.1f} min", flush=True)
    _record(part, out, minutes)
    return status


def _record(part: Part, out: Path, minutes: float) -> None:
    """Add the minutes of an attempt at a part, and the commit of the sources, to the record of the folder."""
    made = json.loads((out / MADE).read_text())
    done = made["parts"].setdefault(part.name, {"commits": [], "minutes": 0.0})  # over all attempts
    done["commits"] = list(dict.fromkeys([*done["commits"], _commit()]))
    done["minutes"] = round(done["minutes"] + minutes, 1)
    _write_made(out, made)


def run_command(command: Sequence[str]) -> int:
    """Run a command and return its exit status; signals to this process are passed on to it.

    If this process is killed, the command gets SIGTERM, so that its ranks do not train beside those of the next start.
    """
    follow = functools.partial(signal_at_parent_end, signal.SIGTERM)
    with subprocess.Popen(command, preexec_fn=follow) as process, _passed_on(process):
        return process.wait()


@contextlib.contextmanager
def _passed_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    def pass_on(number: int, frame: Any) -> None:
        process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _keep(config: BuiltinModel) -> None:
    """Record the settings of the training; raise ValueError for a folder with other settings."""
    path = config.out / MADE
    settings = {key: value for key, value in asdict(config).items() if key != "out"}
    if path.exists():
        before = json.loads(path.read_text())["settings"]
        odd = [f"{key} {before.get(key)} -> {value}" for key, value in settings.items() if before.get(key) != value]
        if odd:
            raise ValueError(f"{config.out} was started with other settings ({', '.join(odd)}); give another --out")
        return
    config.out.mkdir(parents=True, exist_ok=True)
    _write_made(config.out, {"settings": settings, "version": __version__, "parts": {}})


def _write_made(out: Path, made: dict[str, Any]) -> None:
    write_whole(out / MADE, lambda file: file.write((json.dumps(made, indent=2) + "\n").encode()))


def _commit() -> str | None:
    """Return the commit of the sources, marked if they differ from it; None without git."""
    here = Path(__file__).resolve().parent
    try:
        run = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
                             capture_output=True, text=True, check=True)  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def _steps(recipe: Recipe, scale: float) -> int:
    return max(round(recipe.total_steps * scale), len(recipe.stages))


def _script(name: str) -> Path:
    return Path(__file__).resolve().parents[1] / f"{name}.py"


def _python(*arguments: object) -> tuple[str, ...]:
    return (sys.executable, *map(str, arguments))


def _torchrun(ranks: int, *arguments: object) -> tuple[str, ...]:
    return _python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, *arguments)


if __name__ == "__main__":
    sys.exit(main())
