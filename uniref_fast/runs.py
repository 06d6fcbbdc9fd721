"""What the folder of an earlier run tells: its configuration, the transformer below it, how its model attends."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

__all__ = ["base_run", "read_field", "trained_visibility"]


def read_field(run: Path, name: str) -> str | None:
    """A text of a run's configuration, such as the run that it went on from."""
    try:
        value = json.loads((run / "config.json").read_text(encoding="utf-8")).get(name)
    except (OSError, ValueError, AttributeError):
        return None  # exported by another program, or copied without it
    return value if isinstance(value, str) else None


def base_run(run: Path) -> Path | None:
    """The run whose transformer a run's export belongs to: itself, or one that its adapter went on from, or none.

    Raises:
        ValueError: when one on the way is not there.
    """
    seen: list[Path] = []
    while not (run / "transformer").is_dir():
        seen.append(run.resolve())
        before = read_field(run, "initial")
        if before is None or Path(before).resolve() in seen:  # a run that was told to go on from itself
            return None
        if not Path(before).is_dir():
            raise ValueError(
                f"the adapter of {run} was trained on top of {before}, which is not there; put it back, or, where it "
                f"held an adapter alone, take `initial` out of {run / 'config.json'}"
            )
        run = Path(before)
    return run


def trained_visibility(run: Path | None) -> str | None:
    """The visibility that a run's model was trained with: the run's own, or that of the one it went on from.

    None where no run says it.
    """
    seen: list[Path] = []
    while run is not None and run.resolve() not in seen:
        if visibility := _checkpoint_visibility(run) or read_field(run, "visibility"):
            return "reference_causal" if visibility == "group_shared" else visibility  # alike for a sample alone
        seen.append(run.resolve())
        before = read_field(run, "initial")
        run = None if before is None else Path(before)
    return None


def _checkpoint_visibility(run: Path) -> str | None:
    """The visibility in the newest checkpoint of a run; None for a folder without checkpoints, or with older ones."""
    steps = sorted((run / "checkpoints").glob("step-*"), key=lambda path: (len(path.name), path.name), reverse=True)
    for path in steps:
        with contextlib.suppress(OSError, ValueError, LookupError, AttributeError, TypeError):  # one that is damaged
            found = json.loads((path / "state.json").read_text(encoding="utf-8"))["state"].get("visibility")
            if isinstance(found, str) and path.name.removeprefix("step-").isdecimal():
                return found
    return None
