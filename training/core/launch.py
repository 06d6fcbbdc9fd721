"""The frame around a training command: flags, ranks, built-in data, the folder of the run, and errors.

PyTorch and the modules that need it are imported after the flags are parsed, so that `--help` and errors in flags are
printed at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from uniref_fast import flags as configs
from uniref_fast.files import write_whole
from uniref_fast.progress import announce, announce_import, launcher_rank, running
from uniref_fast.runs import adapter_settings, check_export, trained_visibility
from uniref_fast.training.core import resume
from uniref_fast.training.core.processes import end_with_launcher, explain_to_launcher, locked
from uniref_fast.training.core.recipe import Recipe

if TYPE_CHECKING:
    from uniref_fast.scenes.make import MakeConfig
    from uniref_fast.training.core.checkpoint import Newest
    from uniref_fast.training.core.distributed import Ranks
    from uniref_fast.training.core.trainer import Trainer

__all__ = ["RunOptions", "launch"]

C = TypeVar("C", bound=Recipe)
CONFIG_FILE = "config.json"
EXPORTS = ("lora", "transformer")
BUILTIN_ROWS = {"train": 1000, "heldout_objects": 64, "heldout_combinations": 64}
BUILTIN_SIZE = 64
SHOWN = 8  # settings that a message lists


@dataclass(frozen=True)
class RunOptions:
    """Options of a training command that are not part of the configuration of the run.

    Attributes: Folder
        out: Folder of the run, for its configuration, metrics, checkpoints, sample grids and trained weights.
        resume: Continue the run in the folder: "auto" resumes from its newest complete checkpoint, or starts if there
            is none; "never" refuses a folder that holds a run.
    """

    out: Path
    resume: Literal["never", "auto"] = "never"

    @property
    def read_only(self) -> bool:
        """Return True if the command writes nothing into the folder except the data that it generates."""
        return False


def launch(
    name: str,
    recipes: Mapping[str, Callable[[], C]],
    options: Any,
    make: Callable[[C, Ranks, Any, int | None], Trainer],
    argv: Sequence[str],
    description: str,
    failures: Callable[[], tuple[type[Exception], ...]] = tuple,
) -> int:
    """Run a training command.

    Args:
        name: Name of the command, `training/<name>.py`.
        recipes: Functions that return configurations, by name.
        options: A `RunOptions`, with the defaults of its flags.
        make: Function that builds the trainer from the configuration, the ranks, the options, and the step to resume
            from.
        argv: Arguments of the command.
        description: Description for `--help`.
        failures: Function that returns the errors of this kind of run, in addition to those that every run may raise.

    Returns:
        The exit status: 0 for a finished run, 143 or 130 for a run that SIGTERM or Ctrl-C ended and that was saved, 1
        for an error during the run, 2 for an error that the user can correct.
    """
    try:
        parsed = configs.parse(
            recipes, argv, extra=options, prog=f"training/{name}.py", description=description, renamed=resume.RENAMED
        )
        parsed = dataclasses.replace(parsed, config=with_adapter(with_visibility(parsed.config), parsed.given))
    except (ValueError, FileNotFoundError) as error:
        return _failed(name, error, 2)
    try:
        return _launch(name, parsed, make, failures)
    except KeyboardInterrupt:  # before the first step, or a second Ctrl-C
        return _failed(name, ValueError("interrupted; earlier checkpoints are kept"), 130)


def _launch(
    name: str,
    parsed: configs.Parsed[Any, Any],
    make: Callable[[Any, Ranks, Any, int | None], Trainer],
    failures: Callable[[], tuple[type[Exception], ...]],
) -> int:
    from uniref_fast.training.core.suitability import check_suitability, with_targets

    if not launcher_rank():
        announce(f"{name}: recipe {parsed.recipe}, model {parsed.config.model}, folder {parsed.extra.out}")
        announce_import("PyTorch", "torch")
    resumes = parsed.extra.resume == "auto" and (parsed.extra.out / CONFIG_FILE).exists()
    try:
        if not resumes:  # the settings of a resumed run are known when its checkpoint has been found
            parsed = dataclasses.replace(parsed, config=with_targets(parsed.config, parsed.given))
            check_suitability(parsed.config, int(os.environ.get("WORLD_SIZE", 1)))
    except ValueError as error:
        return _failed(name, error, 2)
    import torch.distributed as dist

    from uniref_fast.data.dataset import BrokenRowsError
    from uniref_fast.training.core.checkpoint import CheckpointError
    from uniref_fast.training.core.distributed import Ranks
    from uniref_fast.training.core.encoders import EncoderError
    from uniref_fast.training.core.export import ExportError
    from uniref_fast.training.core.trainer import DivergedError

    try:
        end_with_launcher()
        ranks = Ranks.start()
        run = _train(parsed, ranks, make)
        # a rank may receive the signal that stopped another one later, or not at all
        stopped = max(ranks.gather(run.signalled)) or signal.SIGTERM if run.stopping else 0
        if ranks.rank == 0 and not parsed.extra.read_only:
            print(last_line(run, stopped), file=sys.stderr)
        return 128 + stopped if stopped else 0
    except (ValueError, FileNotFoundError) as error:  # the user can correct these
        return _failed(name, error, 2)
    except (BrokenRowsError, CheckpointError, DivergedError, EncoderError, ExportError, OSError, ImportError) as error:
        return _failed(name, error, 1)
    except failures() as error:
        return _failed(name, error, 1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _train(
    parsed: configs.Parsed[Any, Any], ranks: Ranks, make: Callable[[Any, Ranks, Any, int | None], Trainer]
) -> Trainer:
    """Build the trainer, train until the last step or a signal, and return the trainer."""
    import torch

    from uniref_fast.training.core.suitability import check_suitability, with_targets

    out, alone = parsed.extra.out, not parsed.extra.read_only
    with locked(out, ranks) if alone else contextlib.nullcontext():
        with running("verifying the newest checkpoint", shown=not ranks.rank):
            newest = find(parsed.extra, ranks, parsed.config.keep)
        with _no_data_of_failed_start(out) if alone and ranks.rank == 0 else contextlib.nullcontext():
            before = recorded(newest, out, ranks)
            refuse_model_of_recipe(parsed, before)
            config = with_targets(with_recorded(parsed.config, before, parsed.given, out), parsed.given)
            if before:
                check_suitability(config, ranks.size)
            config = with_data(config, out, ranks)
            torch.manual_seed(config.seed)
            changed = accept(config, newest, before, out)
            run = make(config, ranks, parsed.extra, newest.step)
            try:
                run.preflight()
                if alone:
                    begin(run, newest, changed)
            except BaseException:
                run.close()
                raise
        run.run()
    return run


@contextlib.contextmanager
def _no_data_of_failed_start(out: Path) -> Iterator[None]:
    """Remove the data that the block has generated in the folder of a run if the run does not start."""
    data = out / "data"
    new = not data.exists()
    try:
        yield
    except BaseException:
        if new:
            shutil.rmtree(data, ignore_errors=True)
        raise


def last_line(run: Trainer, stopped: int) -> str:
    """Return the last line that a run prints: how to continue it, or where its weights are and how to use them.

    Args:
        run: The trainer, after its last step.
        stopped: Number of the signal that stopped the run; 0 for a finished run.
    """
    config, out = run.config, shlex.quote(str(run.out))
    if stopped:
        return (
            f"stopped at step {run.step}; continue with --resume auto. "
            f"uniref-fast export {out} writes the weights of this step"
        )
    from uniref_fast.training.core.export import command_for

    command = command_for(run.out, str(config.model), config.lora_rank)
    if config.lora_rank is None:
        return f"the trained weights are in {run.out / 'transformer'}; use them with: {command}"
    return f"the adapter is in {run.out / 'lora'}; use it with: {command}"


def with_visibility(config: C) -> C:
    """Return the configuration with the visibility that its model is trained with; reads the folder of `initial`.

    Raises:
        ValueError: The run that `initial` names does not fit the configuration.
    """
    trained = trained_visibility(config.initial)
    config.check_initial(trained)
    resolved: dict[str, Any] = {"visibility": config.visibility or trained or "full"}
    return dataclasses.replace(config, **resolved)


def with_adapter(config: C, given: Collection[str] = ()) -> C:
    """Return the configuration with kind, rank, alpha and targets of the adapter of the initial run, if it has one.

    Args:
        config: Configuration of the run.
        given: Names of the settings that were given on the command line.

    Raises:
        ValueError: The initial run has no trained weights, or a setting was given that its adapter does not have.
    """
    run = config.initial
    if run is None:
        return _with_alpha(config)
    check_export(run)
    adopted = _adopted(run, config.lora_targets)
    if adopted and adopted["lora_targets"] != config.lora_targets:  # those of the model, if the command names none
        from uniref_fast.training.core.suitability import with_targets

        own = with_targets(dataclasses.replace(config, lora_rank=adopted["lora_rank"]), given).lora_targets
        config = dataclasses.replace(config, lora_targets=own)
        adopted = _adopted(run, own)
    changed = {name: value for name, value in adopted.items() if getattr(config, name) != value}
    for name, value in changed.items():
        if name in given and (name != "lora_alpha" or config.lora_alpha is not None):
            raise ValueError(
                f"training continues the adapter of initial = {run}, whose {name} is {resume.shown(value)}, not "
                f"{resume.shown(getattr(config, name))}; leave --{name.replace('_', '-')} out, or fuse the adapter "
                "into the model first, to train a new one on top"
            )
    if changed and not launcher_rank():
        shown = ", ".join(f"{name} = {resume.shown(value)}" for name, value in changed.items())
        print(f"training continues the adapter of {run}, with its {shown}", file=sys.stderr)
    return _with_alpha(dataclasses.replace(config, **changed))


def _with_alpha(config: C) -> C:
    """Return the configuration with the rank as the alpha of its adapter, if it names none."""
    return dataclasses.replace(config, lora_alpha=config.resolve_alpha())


def _adopted(run: Path, targets: Sequence[str]) -> dict[str, Any]:
    """Return the settings of the adapter of a run, by name; targets that are the same keep their order.

    The adapter may name layers by their whole names where a target is the end of them (`add_adapter`).
    """
    found = adapter_settings(run)
    if found is None:
        return {}
    kind, rank, alpha, layers = found
    ends = [next((target for target in targets if f".{layer}".endswith(f".{target}")), layer) for layer in layers]
    layers = tuple(targets) if set(ends) == set(targets) else layers
    return {"adapter": kind, "lora_rank": rank, "lora_alpha": alpha, "lora_targets": layers}


def builtin_rows(seed: int) -> MakeConfig:
    """Return the configuration of the rows that "builtin" among the data stands for."""
    from uniref_fast.scenes.make import MakeConfig, artworks

    return MakeConfig(artworks("shipped"), size=BUILTIN_SIZE, seed=seed, references=(1, 2, 3), pictures="simple")


def with_data(config: C, out: Path, ranks: Ranks) -> C:
    """Return the configuration with "builtin" data generated and replaced by paths. All ranks."""
    if not config.data:
        raise ValueError("no training data: give --data FILE_OR_FOLDER, or --data builtin for small generated scenes")
    if "builtin" not in config.data:
        return config
    from uniref_fast.scenes.dataset import write_dataset
    from uniref_fast.scenes.make import sample

    folder = out / "data"
    problem = None
    if ranks.rank == 0 and not (folder / "train.jsonl").exists():
        try:
            write_dataset(folder, builtin_rows(config.seed), BUILTIN_ROWS, config.workers, force=False, generate=sample)
        except (OSError, ValueError, RuntimeError) as error:
            problem = str(error)
    if problem := ranks.broadcast(problem):
        raise ValueError(f"the built-in data could not be generated: {problem}")
    data = tuple(str(folder / "train.jsonl") if path == "builtin" else path for path in config.data)
    heldout = config.heldout or tuple(str(path) for path in sorted(folder.glob("heldout_*.jsonl")))
    return dataclasses.replace(config, data=data, heldout=heldout)


def find(options: RunOptions, ranks: Ranks, keep: int) -> Newest:
    """Find the checkpoint to resume from. All ranks; nothing is written.

    Raises:
        ValueError: The folder holds a run and `resume` is "never", or it holds trained weights alone, which the run
            would replace.
        CheckpointError: None of the run's checkpoints can be used.
    """
    from uniref_fast.training.core.checkpoint import Checkpoints, Newest

    checkpoints = Checkpoints(options.out / "checkpoints", ranks, keep)
    newest = checkpoints.newest() if options.resume == "auto" else Newest(None, {}, [])
    if newest.step is not None or options.read_only:
        return newest
    # a command that failed before its first record has not started a run
    begun = (options.out / "metrics.jsonl").exists() and (options.out / CONFIG_FILE).exists()
    held = bool(checkpoints.steps() or begun), [name for name in EXPORTS if (options.out / name).is_dir()]
    holds_run, exports = ranks.broadcast(held)
    if holds_run and options.resume == "never":
        raise ValueError(f"{options.out} holds a run; resume it with --resume auto, or give another --out")
    if exports:
        raise ValueError(
            f"{options.out} holds trained weights ({exports[0]}/) and no checkpoint to resume from: training would "
            "start from the beginning and replace them. Move them away, or give another --out"
        )
    return newest


def recorded(newest: Newest, out: Path, ranks: Ranks) -> dict[str, Any]:
    """Return the settings that a run was trained with until its newest checkpoint, as JSON data. All ranks.

    They are those of the checkpoint, or of `config.json` if it has none. Empty for a run without a checkpoint, which
    begins again.
    """
    before = {**ranks.broadcast(newest.state.get("config") or _kept(out))}
    if not before or newest.step is None:
        return {}
    before.setdefault("optimizer", "adamw")
    before.setdefault("base", None)  # older versions have no other; a setting that is absent may change
    before.setdefault("adapter", "lora")
    initial = before.get("initial")
    before["visibility"] = (
        newest.state.get("visibility")
        or before.get("visibility")
        or trained_visibility(Path(initial) if initial else None)
        or "full"
    )
    if initial:  # older versions wrote the settings that were given, and continued the adapter with its own
        before.update(json.loads(json.dumps(_adopted(Path(initial), before.get("lora_targets", ())))))
    return before


def refuse_model_of_recipe(parsed: configs.Parsed[Any, Any], before: Mapping[str, Any]) -> None:
    """Raise ValueError if a resumed run would get the model of the recipe, because no flag names its own.

    Args:
        parsed: Parsed command line.
        before: Result of `recorded`.
    """
    own, config = before.get("model"), parsed.config
    if own is not None and "model" not in parsed.given and own != config.model:
        raise ValueError(
            f"the run in {parsed.extra.out} trains model = {own}, and the recipe {parsed.recipe} has model = "
            f"{config.model}; give --model {own}, or another place of the same model"
        )


def with_recorded(config: C, before: Mapping[str, Any], given: Collection[str], out: Path) -> C:
    """Return the configuration with the settings that a resumed run keeps, because no flag was given for them.

    Args:
        config: Configuration of the command line.
        before: Result of `recorded`.
        given: Names of the settings that were given on the command line.
        out: Folder of the run, for the message.
    """
    kept = resume.kept(before, json.loads(configs.to_json(config)), given)
    if kept and not launcher_rank():
        shown = [f"{name} = {resume.shown(value)}" for name, value in kept.items()]
        more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
        print(f"the run in {out} keeps its settings: {', '.join(shown[:SHOWN])}{more}", file=sys.stderr)
    return configs.with_plain(config, kept)


def accept(config: Recipe, newest: Newest, before: Mapping[str, Any], out: Path) -> dict[str, tuple[Any, Any]]:
    """Return the changed settings that make a difference to the remaining steps, after refusing fixed ones.

    Args:
        config: Configuration of the run.
        newest: Checkpoint to resume from.
        before: Result of `recorded`.
        out: Folder of the run, for messages.

    Returns:
        (before, now) of each of these settings, by name.

    Raises:
        ValueError: A setting that is fixed has changed, or fewer steps are given than are done.
    """
    if not before or newest.step is None:
        return {}
    changed = resume.changes(before, json.loads(configs.to_json(config)))
    resume.refuse(changed, out)
    if config.total_steps < newest.step:
        raise ValueError(
            f"the run in {out} has done {newest.step} steps, and {config.total_steps} are given; give at least "
            f"--steps {newest.step}, or start another run with another --out"
        )
    return resume.effective(changed, config, newest.step)


def _kept(out: Path) -> dict[str, Any]:
    """Return the content of `config.json` in the folder of a run; empty if there is none."""
    try:
        found = json.loads((out / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{out / CONFIG_FILE} is damaged ({error}); repair it, or give another --out") from None
    return found if isinstance(found, dict) else {}


def begin(run: Trainer, newest: Newest, changed: Mapping[str, tuple[Any, Any]]) -> None:
    """Write the configuration of a run that was accepted, and record what resuming has found. All ranks."""
    if newest.unverified:
        run.announce("unverified checkpoint", reason="it was written without checksums; only file sizes were verified")
    for name, reason in newest.damaged:
        run.announce("damaged checkpoint", name=name, reason=reason, renamed=f"{name}.damaged")
    for name, (before, now) in changed.items():
        run.announce("changed", setting=name, before=before, now=now)
    run.checkpoints.set_aside([name for name, _ in newest.damaged])
    if run.ranks.rank == 0:
        text = configs.to_json(run.config).encode()
        write_whole(run.out / CONFIG_FILE, lambda file: file.write(text))


def _failed(name: str, error: BaseException, status: int) -> int:
    rank, command = launcher_rank(), f"training/{name}.py"
    if rank:
        time.sleep(3)  # if rank 0 has the same error, torchrun ends the other ranks meanwhile
        name = f"{name}, rank {rank}"
    message = f"{name}: {_described(error)}"
    print(message if rank or status != 2 else f"{message}\nTry '{command} --help'.", file=sys.stderr)
    explain_to_launcher(message)
    return status


def _described(error: BaseException) -> str:
    """Return the message of an error; the class name comes first only where the message alone may be too short."""
    own = type(error).__module__.startswith("uniref_fast.")
    return (
        str(error) if own or isinstance(error, ValueError | FileNotFoundError) else f"{type(error).__name__}: {error}"
    )
