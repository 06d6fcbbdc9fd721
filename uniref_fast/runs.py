"""Readers of the folder of an earlier training run: its configuration, its base transformer, its visibility."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "adapter_kind",
    "adapter_settings",
    "base_run",
    "check_export",
    "export_hint",
    "read_field",
    "run_folder",
    "trained_sizes",
    "trained_visibility",
]


def read_field(run: Path, name: str) -> str | None:
    """Return a text of a run's configuration, such as the run that it started from; None if it is missing."""
    try:
        value = json.loads((run / "config.json").read_text(encoding="utf-8")).get(name)
    except (OSError, ValueError, AttributeError):
        return None  # the folder was exported by another program, or copied without its configuration
    return value if isinstance(value, str) else None


def check_export(run: Path) -> None:
    """Raise ValueError if a run has no trained weights to start from."""
    if not any((run / name).is_dir() for name in ("lora", "transformer")):
        raise ValueError(f"initial = {run} has neither lora/ nor transformer/; {export_hint(run)}")


def adapter_settings(run: Path) -> tuple[str, int, float, tuple[str, ...]] | None:
    """Return the kind, the rank, the alpha and the sorted target layers of the adapter of a run, as its file says.

    None if the run has no adapter, or if the file does not record all of them, as one of another program.
    """
    from safetensors import SafetensorError, safe_open

    for file in sorted((run / "lora").glob("*.safetensors")):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, SafetensorError):  # refused when loaded
            with safe_open(file, framework="numpy") as opened:
                found = json.loads(opened.metadata()["lora_adapter_metadata"])
            found = {name.removeprefix("transformer."): value for name, value in found.items()}
            kind = adapter_kind(found)
            rank, alpha, targets = (
                found["r"],
                found["alpha" if kind == "lokr" else "lora_alpha"],
                found["target_modules"],
            )
            if isinstance(targets, list):
                return kind, int(rank), float(alpha), tuple(sorted(targets))
    return None


def adapter_kind(config: Mapping[str, Any]) -> str:
    """Return the kind of an adapter, lora, rslora, dora or lokr, from its configuration of peft."""
    if config.get("peft_type") == "LOKR":
        return "lokr"
    return next((kind for kind in ("dora", "rslora") if config.get(f"use_{kind}")), "lora")


def run_folder(path: Path) -> Path:
    """Return the folder of a run for the folder itself, or for its `transformer/` or `lora/`."""
    inside = path.name in ("transformer", "lora") and not (path / "transformer").is_dir()
    return path.absolute().parent if inside and any(path.glob("*.safetensors")) else path


def base_run(run: Path) -> Path | None:
    """Return the run whose transformer the weights of a run belong to, or None for the model's own transformer.

    It is the run itself if it has a `transformer/`, otherwise the nearest one among the runs that its adapter started
    from.

    Raises:
        ValueError: One of these runs is missing.
    """
    seen: list[Path] = []
    while not (run / "transformer").is_dir():
        seen.append(run.resolve())
        before = read_field(run, "initial")
        if before is None or Path(before).resolve() in seen:  # the configuration names the run itself
            return None
        if not Path(before).is_dir():
            raise ValueError(
                f"the adapter of {run} was trained on top of {before}, which does not exist; restore it, or, if it "
                f"held only an adapter, remove `initial` from {run / 'config.json'}"
            )
        run = Path(before)
    return run


def export_hint(run: Path) -> str:
    """Return what to do about a run without exported weights, as the end of a sentence of an error message."""
    if any((run / "checkpoints").glob("step-*")):
        return (
            f"it has checkpoints only: uniref-fast export {shlex.quote(str(run))} writes the weights of the newest one"
        )
    return "give the folder of a finished run"


def trained_visibility(run: Path | None) -> str | None:
    """Return the visibility that a run's model was trained with: the run's own, or that of the run it started from.

    None if no run records it.
    """
    seen: list[Path] = []
    while run is not None and run.resolve() not in seen:
        if visibility := _checkpoint_visibility(run) or read_field(run, "visibility"):
            return "reference_causal" if visibility == "group_shared" else visibility  # equal for a single sample
        seen.append(run.resolve())
        before = read_field(run, "initial")
        run = None if before is None else Path(before)
    return None


def trained_sizes(run: Path | None) -> tuple[int | None, int] | None:
    """Return (budget, target_side) of the last stage of a run, which its validations use; None if none is recorded."""
    try:
        stage = json.loads((run / "config.json").read_text(encoding="utf-8"))["stages"][-1] if run else {}
        budget, target = (stage["budget"] if "budget" in stage else stage["side"]), stage["target_side"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    numbers = isinstance(target, int) and isinstance(budget, int | None)
    return (budget, target) if numbers else None


def _checkpoint_visibility(run: Path) -> str | None:
    """Return the visibility in the newest readable checkpoint of a run; None if no checkpoint records it."""
    steps = sorted((run / "checkpoints").glob("step-*"), key=lambda path: (len(path.name), path.name), reverse=True)
    for path in steps:
        with contextlib.suppress(OSError, ValueError, LookupError, AttributeError, TypeError):  # a damaged checkpoint
            found = json.loads((path / "state.json").read_text(encoding="utf-8"))["state"].get("visibility")
            if isinstance(found, str) and path.name.removeprefix("step-").isdecimal():
                return found
    return None
