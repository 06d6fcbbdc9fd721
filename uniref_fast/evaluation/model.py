"""Loading of the model to evaluate: a pipeline, with the weights of training runs and with adapters."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from uniref_fast.adapters import Adapter, apply_adapters, check_adapters
from uniref_fast.builtin import components
from uniref_fast.builtin.store import model_folder
from uniref_fast.fingerprint import content_key, fingerprint
from uniref_fast.loading import load_pipeline, load_run
from uniref_fast.models.families import family_of
from uniref_fast.progress import running
from uniref_fast.runs import base_run, export_hint, read_field

__all__ = ["check_runs", "files_digest", "load", "on_device", "weights_digest"]

ENDS = 1 << 16  # bytes at the beginning and at the end of a weight file that a digest covers


def on_device(device: str | None, dtype: str | None) -> tuple[str, str]:
    """Return device and dtype by name; by default CUDA if available, float32 on a CPU and bfloat16 elsewhere."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}; use cpu, cuda or cuda:N") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} is not available: PyTorch sees no CUDA device; use cpu")
    return device, dtype or ("float32" if kind == "cpu" else "bfloat16")


def load(
    model: str,
    runs: tuple[Path, ...],
    untrained: bool,
    device: str,
    dtype: str,
    adapters: Sequence[Adapter] = (),
    quantisation: str | None = None,
) -> Any:
    """Load a pipeline that is ready to edit.

    Args:
        model: "builtin", a diffusers folder or a hub id.
        runs: Folders of training runs; their `transformer/` and `lora/` are applied in order.
        untrained: Give the built-in model the transformer that it has before training, with seed 0.
        device: Name of the device, see `on_device`.
        dtype: Name of the dtype, see `on_device`.
        adapters: Adapters that are applied after the runs, in order.
        quantisation: Format in which text encoder and transformer are stored, see `load_pipeline`.

    Raises:
        ValueError, TypeError: A folder is missing, cannot be read, or does not fit the model.
    """
    kind = getattr(torch, dtype)
    pipe = load_pipeline(model, kind, device, quantisation)
    if untrained:  # keep the autoencoder, which bounds the PSNR of any transformer
        pipe.transformer = components.pipeline(0, kind).transformer.to(device)
    active: list[str] = []
    with running("applying trained weights", shown=bool(runs or adapters)):
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
            apply_adapters(pipe, adapters, check_adapters(adapters, model, runs), active, kind)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_runs(runs: tuple[Path, ...], model: str) -> None:
    """Check that the folders of training runs exist and fit together, without loading them.

    Raises:
        ValueError: A folder has no weights, was trained on another model, needs the transformer of another run, or
            would be applied twice.
    """
    for number, run in enumerate(runs):
        if not any((run / name).is_dir() for name in ("lora", "transformer")):
            raise ValueError(f"initial {run} has neither lora/ nor transformer/; {export_hint(run)}")
        trained = read_field(run, "model")
        if model == "builtin" and trained not in (None, model):
            raise ValueError(f"{run} was trained on {trained}, not on the built-in model; give --model {trained}")
        given = [before.resolve() for before in runs[:number]]
        below, started = base_run(run), read_field(run, "initial")  # run of the transformer; run it started from
        if below not in (None, run) and below.resolve() not in given:
            raise ValueError(
                f"the adapter of {run} was trained on top of {below}/transformer; give --initial {below} before it"
            )
        if started is not None and below not in (run, Path(started)) and Path(started).resolve() in given:
            raise ValueError(f"the adapter of {run} continues that of {started} and contains it; leave {started} out")


def files_digest(model: str, runs: tuple[Path, ...], adapters: Sequence[Adapter] = ()) -> str:
    """Return a digest of the local weight files of the model, the runs and the adapters, without loading them.

    It covers names, sizes, and the first and last 64 KiB of each file, which training always changes.
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
    """Return a digest of all weights of the pipeline."""
    encoders = [part for part in family_of(pipe).text_encoders(pipe) if part is not None]
    return content_key(*(fingerprint(part) for part in (pipe.transformer, pipe.vae, *encoders)))
