"""LoRA adapters that `uniref-fast edit` and `eval` put on a model, by path and scale. Imports no PyTorch by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from uniref_fast.loading import load_transformer
from uniref_fast.runs import base_run, read_field, trained_visibility

if TYPE_CHECKING:
    import torch

__all__ = ["Adapter", "adapter_visibility", "check_adapters", "put_adapters"]


@dataclass(frozen=True)
class Adapter:
    """A LoRA in a safetensors file.

    Attributes:
        given: path as it was given.
        file: the safetensors file.
        scale: factor on its contribution; 1 as trained.
        run: folder of the training run that it lies in, or None.
    """

    given: Path
    file: Path
    scale: float
    run: Path | None

    @classmethod
    def parse(cls, text: str) -> Adapter:
        """Read "PATH" or "PATH:SCALE": a run's folder, its lora/ folder, another folder with one file, or a file.

        Raises:
            ValueError: for a path that is not there or holds no adapter, or a scale that is no number.
        """
        path, scale = Path(text), "1"
        if not path.exists() and ":" in text:
            before, _, scale = text.rpartition(":")
            path = Path(before)
        if not path.exists():
            raise ValueError(f"--lora {text}: no such file or folder {path}")
        try:
            factor = float(scale)
        except ValueError:
            factor = math.nan
        if not math.isfinite(factor):
            raise ValueError(f"--lora {text}: the scale after the colon must be a finite number, got {scale!r}")
        file = _file(path, text)
        run = (
            file.parent.parent
            if file.parent.name == "lora" and (file.parent.parent / "config.json").is_file()
            else None
        )
        return cls(path, file, factor, run)


def _file(path: Path, text: str) -> Path:
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"--lora {text}: an adapter is a .safetensors file, got {path.name}")
        return path
    folder = path / "lora" if (path / "lora").is_dir() else path
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        found = f"{len(files)} .safetensors files" if files else "no .safetensors file"
        whole = "; it holds transformer/, all weights of a model" if (path / "transformer").is_dir() else ""
        raise ValueError(f"--lora {text}: {folder} has {found}{whole}; give the folder or the file of one adapter")
    return files[0]


def check_adapters(adapters: Sequence[Adapter], model: str, initial: Sequence[Path] = ()) -> Path | None:
    """Refuse adapters of another model, and those of runs whose transformers are different ones.

    Args:
        adapters: to put on the model.
        model: "builtin", a folder or a hub id.
        initial: runs that are put on the model before.

    Returns:
        the run whose `transformer/` the adapters were trained on, where `initial` does not bring it; None for the
        model's own.
    """
    bases: dict[Path, Path] = {}
    for adapter in adapters:
        if adapter.run is None:
            continue
        trained = read_field(adapter.run, "model")
        if model == "builtin" and trained not in (None, model):
            raise ValueError(
                f"{adapter.given} was trained on {trained}, not on the built-in model; give --model {trained}"
            )
        below = base_run(adapter.run)
        if below is not None and below.resolve() not in [run.resolve() for run in initial]:
            bases[below.resolve()] = below
    if len(bases) > 1 or (bases and initial):
        raise ValueError(
            f"adapters were trained on top of the transformers of {', '.join(map(str, bases.values()))}"
            + (f", not of {', '.join(map(str, initial))}" if initial else "")
            + "; a model has one"
        )
    return next(iter(bases.values()), None)


def put_adapters(
    pipe: Any, adapters: Sequence[Adapter], below: Path | None, active: Sequence[str], dtype: torch.dtype
) -> None:
    """Put adapters on a pipeline, unfused: in 16 bits fusing would round what was trained away.

    Args:
        pipe: the pipeline.
        adapters: in order.
        below: see `check_adapters`.
        active: names of adapters that are on it already, at scale 1.
        dtype: of the transformer of `below`.

    Raises:
        ValueError: for a file that cannot be read or does not fit the model.
    """
    if below is not None:
        load_transformer(pipe, below, dtype, given=str(below))
    names, scales = list(active), [1.0] * len(active)
    for number, adapter in enumerate(adapters):
        name = f"lora{number}"
        where = {"weight_name": adapter.file.name, "use_safetensors": True}
        try:
            pipe.load_lora_weights(str(adapter.file.parent), adapter_name=name, **where)
        except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"--lora {adapter.given} could not be put on the model: {first}") from error
        if name not in pipe.get_list_adapters().get("transformer", []):  # diffusers passes over other models' keys
            raise ValueError(f"--lora {adapter.given} holds no weights for {type(pipe.transformer).__name__}")
        fitting = sum(f".{name}." in key for key, _ in pipe.transformer.named_parameters())
        if fitting < (held := _lora_tensors(adapter.file)):  # diffusers passes over those of layers that are not there
            raise ValueError(
                f"--lora {adapter.given}: {held - fitting} of its {held} tensors belong to no layer of this model; it "
                "was made for another one"
            )
        names.append(name)
        scales.append(adapter.scale)
    if names:
        pipe.set_adapters(names, scales)


def _lora_tensors(file: Path) -> int:
    """Number of LoRA matrices in a file, under the names of diffusers, peft and kohya, without text encoders'."""
    parts = ("lora_A", "lora_B", "lora_down", "lora_up", "lora.down", "lora.up")
    with safe_open(file, "pt") as found:
        keys = [key for key in found.keys() if not key.startswith(("text_encoder", "lora_te"))]  # noqa: SIM118
    return sum(any(part in key for part in parts) for key in keys)


def adapter_visibility(adapters: Sequence[Adapter]) -> str | None:
    """The visibility that the last adapter's run was trained with; None where no run says it."""
    return trained_visibility(adapters[-1].run) if adapters else None
