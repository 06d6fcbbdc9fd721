"""The model that an evaluation measures: a pipeline by name, what training runs left put on top, or random weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from uniref_fast.adapters import Adapter, check_adapters, put_adapters
from uniref_fast.builtin import components
from uniref_fast.builtin.store import model_folder
from uniref_fast.fingerprint import content_key, fingerprint
from uniref_fast.loading import load_pipeline, load_run
from uniref_fast.runs import base_run, read_field

__all__ = ["check_runs", "files_digest", "load", "on_device", "weights_digest"]

ENDS = 1 << 16  # bytes


def on_device(device: str | None, dtype: str | None) -> tuple[str, str]:
    """Device and dtype by name: CUDA where there is one, float32 on a CPU and bfloat16 elsewhere, unless given."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}; use cpu, cuda or cuda:N") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but PyTorch sees no CUDA device here; use cpu")
    return device, dtype or ("float32" if kind == "cpu" else "bfloat16")


def load(
    model: str,
    runs: tuple[Path, ...],
    untrained: bool,
    device: str,
    dtype: str,
    adapters: Sequence[Adapter] = (),
) -> Any:
    """A pipeline that is ready to edit.

    Args:
        model: "builtin", a diffusers folder or a hub id.
        runs: folders of training runs whose `transformer/` or `lora/` is put on top, in order.
        untrained: the built-in model with the transformer that it has before any training, of seed 0.
        device, dtype: see `on_device`.
        adapters: put on top of all that, in order.

    Raises:
        ValueError, TypeError: for what is not there, cannot be read, or does not fit together.
    """
    kind = getattr(torch, dtype)
    pipe = load_pipeline(model, kind, device)
    if untrained:  # the autoencoder stays: it bounds what any transformer can reach
        pipe.transformer = components.pipeline(0, kind).transformer.to(device)
    active: list[str] = []
    for run in runs:
        # An adapter that needs another run's transformer comes after that run: `check_runs` has checked it.
        base = run if (run / "transformer").is_dir() else None
        if base is not None:
            active.clear()
        name = f"run{len(active)}"
        if load_run(pipe, run, kind, base=base, adapter=name, given=f"initial {run}", model=model):
            active.append(name)
            pipe.set_adapters(active)
    if adapters:
        put_adapters(pipe, adapters, check_adapters(adapters, model, runs), active, kind)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_runs(runs: tuple[Path, ...], model: str) -> None:
    """Refuse folders that no run wrote, runs of another model where none is named, adapters without the transformer
    that they were trained on, and those that count twice. Raises ValueError."""
    for number, run in enumerate(runs):
        if not any((run / name).is_dir() for name in ("lora", "transformer")):
            raise ValueError(f"initial {run} has neither lora/ nor transformer/; give the folder of a finished run")
        trained = read_field(run, "model")
        if model == "builtin" and trained not in (None, model):
            raise ValueError(f"{run} was trained on {trained}, not on the built-in model; give --model {trained}")
        given = [before.resolve() for before in runs[:number]]
        below, started = base_run(run), read_field(run, "initial")  # whose transformer, and what the run began with
        if below not in (None, run) and below.resolve() not in given:
            raise ValueError(
                f"the adapter of {run} was trained on top of {below}/transformer; give --initial {below} before it"
            )
        if started is not None and below not in (run, Path(started)) and Path(started).resolve() in given:
            raise ValueError(
                f"the adapter of {run} went on from that of {started}, which it holds; leave {started} out"
            )


def files_digest(model: str, runs: tuple[Path, ...], adapters: Sequence[Adapter] = ()) -> str:
    """Changes when weight files of this machine do, of the model or of runs; without loading them.

    Names, sizes, and the first and last 64 KiB of each: training leaves none of these as they were.
    """
    folders = [model_folder() if model == "builtin" else Path(model)]
    folders += [run / part for run in runs for part in ("transformer", "lora")]
    folders += [adapter.file for adapter in adapters]
    digest = hashlib.sha256()
    for folder in folders:
        inside = sorted(folder.rglob("*.safetensors")) if folder.is_dir() else []
        for path in [folder] if folder.is_file() else inside:
            size = path.stat().st_size
            digest.update(f"{path.relative_to(folder)} {size}".encode())
            with open(path, "rb") as file:
                digest.update(file.read(ENDS))
                file.seek(max(size - ENDS, 0))
                digest.update(file.read(ENDS))
    return digest.hexdigest()


def weights_digest(pipe: Any) -> str:
    """Changes when any part of the model does."""
    return content_key(*(fingerprint(part) for part in (pipe.transformer, pipe.vae, pipe.text_encoder)))
