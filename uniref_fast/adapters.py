"""LoRA adapters that `uniref-fast edit` and `eval` apply to a model, by path and scale; imports no PyTorch itself."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniref_fast.builtin import is_builtin_folder
from uniref_fast.loading import load_adapter, load_transformer
from uniref_fast.runs import base_run, export_hint, read_field, trained_sizes, trained_visibility

if TYPE_CHECKING:
    import torch

__all__ = [
    "Adapter",
    "adapter_file",
    "adapter_sizes",
    "adapter_visibility",
    "apply_adapters",
    "check_adapters",
    "fuse_adapters",
]


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in a safetensors file.

    Attributes:
        given: Path as the user gave it.
        file: The safetensors file.
        scale: Factor of its contribution; 1 is the scale of its training.
        run: Folder of the training run that it belongs to, or None.
    """

    given: Path
    file: Path
    scale: float
    run: Path | None

    @classmethod
    def parse(cls, text: str) -> Adapter:
        """Parse "PATH" or "PATH:SCALE": the folder of a run, its lora/ folder, another folder with one file, or a file.

        Raises:
            ValueError: The path does not exist or holds no adapter, or the scale is not a finite number.
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
        file = adapter_file(path, f"--lora {text}")
        run = (
            file.parent.parent
            if file.parent.name == "lora" and (file.parent.parent / "config.json").is_file()
            else None
        )
        return cls(path, file, factor, run)


def adapter_file(path: Path, given: str) -> Path:
    """Return the safetensors file of an adapter.

    Args:
        path: The file, a folder that holds one, or the folder of a training run.
        given: Name of the path in messages.

    Raises:
        ValueError: The path holds no adapter, or several.
    """
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{given}: an adapter is a .safetensors file, got {path.name}")
        return path
    folder = path / "lora" if (path / "lora").is_dir() else path
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        found = f"{len(files)} .safetensors files" if files else "no .safetensors file"
        whole = "; it holds transformer/, which has all weights of a model" if (path / "transformer").is_dir() else ""
        advice = "give the folder or the file of one adapter"
        if not whole and (path / "checkpoints").is_dir():  # a run that was stopped before its end
            advice = export_hint(path)
        raise ValueError(f"{given}: {folder} has {found}{whole}; {advice}")
    return files[0]


def check_adapters(adapters: Sequence[Adapter], model: str, initial: Sequence[Path] = ()) -> Path | None:
    """Check that adapters fit the model and that they were trained on the same transformer.

    Args:
        adapters: Adapters to apply.
        model: "builtin", a folder or a hub id.
        initial: Runs that are applied to the model before.

    Returns:
        The run whose `transformer/` the adapters were trained on, if `initial` does not include it; None for the
        model's own transformer.

    Raises:
        ValueError: An adapter was trained on another model, or the transformers differ.
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
        if trained == "builtin" and model != trained and not is_builtin_folder(model):
            raise ValueError(f"{adapter.given} was trained on the built-in model, not on {model}; give --model builtin")
        below = base_run(adapter.run)
        if below is not None and below.resolve() not in [run.resolve() for run in initial]:
            bases[below.resolve()] = below
    if len(bases) > 1 or (bases and initial):
        raise ValueError(
            f"adapters were trained on top of the transformers of {', '.join(map(str, bases.values()))}"
            + (f", not of {', '.join(map(str, initial))}" if initial else "")
            + "; only one transformer can be loaded"
        )
    return next(iter(bases.values()), None)


def apply_adapters(
    pipe: Any,
    adapters: Sequence[Adapter],
    below: Path | None,
    active: Sequence[str],
    dtype: torch.dtype,
    given_names: Sequence[str] | None = None,
) -> None:
    """Apply adapters to a pipeline without fusing them: in 16 bits, rounding would remove small updates.

    Args:
        pipe: The pipeline.
        adapters: Adapters in order.
        below: Run whose transformer replaces that of the pipeline, see `check_adapters`; None keeps it.
        active: Names of adapters that are applied already, at scale 1.
        dtype: Data type of the transformer of `below`.
        given_names: Names of the adapters on the pipeline, for requests that choose their own adapters. None chooses
            names, and activates all adapters.

    Raises:
        ValueError: A file cannot be read or does not fit the model.
    """
    if below is not None:
        load_transformer(pipe, below, dtype, given=str(below))
    names, scales = list(active), [1.0] * len(active)
    for number, adapter in enumerate(adapters):
        name = f"lora{number}" if given_names is None else given_names[number]
        try:
            held = _load(pipe, adapter, name)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"--lora {adapter.given} {_reason(error)}") from error
        matrices = [
            value
            for key, value in pipe.transformer.named_parameters()
            if f".{name}." in key or key.endswith(f".{name}")
        ]
        if stored := next((value.dtype for value in matrices if value.dtype.itemsize < 2), None):
            raise ValueError(
                f"--lora {adapter.given} would be stored as {stored}, in which nothing can be computed, as the layers "
                "below are (enable_layerwise_casting); apply adapters first and enable layerwise casting afterwards"
            )
        fitting = len(matrices)
        if fitting < held:  # diffusers ignores tensors of missing layers
            raise ValueError(
                f"--lora {adapter.given}: {held - fitting} of its {held} tensors belong to no layer of this model; it "
                "was trained for another one"
            )
        names.append(name)
        scales.append(adapter.scale)
    if names and given_names is None:
        pipe.set_adapters(names, scales)


def _load(pipe: Any, adapter: Adapter, name: str) -> int:
    """Add an adapter of any known format to a pipeline, and return the number of its tensors."""
    from uniref_fast.lora.file import read_lora, to_format
    from uniref_fast.lora.names import FORMATS
    from uniref_fast.models.families import families, family_of

    folder, options = str(adapter.file.parent), {"weight_name": adapter.file.name, "use_safetensors": True}
    family = family_of(pipe)
    if family is not families()[0]:  # `uniref_fast.lora` knows the layers of Qwen-Image alone
        if not hasattr(pipe, "lora_state_dict"):
            raise ValueError(f"the {type(pipe).__name__} of diffusers loads no LoRA files")
        with _quiet_diffusers():
            tensors = pipe.lora_state_dict(folder, **options)
            if encoders := [key for key in tensors if key.startswith("text_encoder")]:
                raise ValueError(
                    f"{len(encoders)} of its {len(tensors)} tensors are an adapter of the text encoder, and only "
                    "adapters of the transformer are supported; remove them from the file"
                )
            lokr = any(".lokr_" in key for key in tensors) and not family.loads_lokr
            load_adapter(pipe, folder, name, lokr, **options)
        return sum(not key.endswith(".alpha") for key in tensors)
    file = read_lora(adapter.file)
    lokr = "lokr" in file.kinds
    with _quiet_diffusers():
        if file.format == "diffusers":  # as it is: the factor of its configuration is not rounded
            load_adapter(pipe, folder, name, lokr, **options)
            return sum(len(layer.tensors) for layer in file.layers.values())
        tensors, _ = to_format(file, FORMATS["diffusers"])
        load_adapter(pipe, tensors, name, lokr)
        return len(tensors)


def fuse_adapters(pipe: Any, adapters: Sequence[Adapter], below: Path | None) -> None:
    """Fuse adapters into the weights of a pipeline's transformer, in float32, and round the result to its dtype.

    Args:
        pipe: The pipeline, without adapters; its transformer has none after the call either.
        adapters: Adapters to fuse, each at its scale.
        below: Run whose transformer replaces that of the pipeline, see `check_adapters`; None keeps it.

    Raises:
        ValueError: A file cannot be read or does not fit the model, or the weights of the transformer are quantised.
    """
    import torch

    quantised = [name for name, p in pipe.transformer.named_parameters() if type(p) is not torch.nn.Parameter]
    if quantised:
        raise ValueError(
            f"adapters cannot be fused into quantised weights ({quantised[0]}, ...), which would round them once more; "
            "fuse them into the model with weights of 16 or 32 bits, and quantise the result"
        )
    dtype = pipe.transformer.dtype
    pipe.transformer.float()
    apply_adapters(pipe, adapters, below, (), torch.float32)
    pipe.fuse_lora(components=["transformer"], adapter_names=pipe.get_active_adapters())
    pipe.unload_lora_weights()
    torch.nn.Module.to(pipe.transformer, dtype)  # diffusers' own method warns about every cast


def _reason(error: Exception) -> str:
    """Return the reason why an adapter could not be loaded, as the end of a sentence."""
    found = re.search(r"size mismatch for (\S+): .*?Size\(\[(.*?)\]\).*?Size\(\[(.*?)\]\)", str(error), re.DOTALL)
    if found:
        return (
            f"was trained for another model: {found[1]} has the shape [{found[2]}], and in this model it would be "
            f"[{found[3]}]; give --model of the model that it was trained on"
        )
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"could not be applied to the model: {first}"


@contextlib.contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Hide what diffusers logs about an adapter that does not fit; the errors of this module say it in one line."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def adapter_sizes(adapters: Sequence[Adapter]) -> tuple[int | None, int] | None:
    """Return (budget, target_side) that the last adapter's run was trained with at its end; None if not known."""
    return trained_sizes(adapters[-1].run) if adapters else None


def adapter_visibility(adapters: Sequence[Adapter]) -> str | None:
    """Return the visibility that the last adapter's run was trained with; None if it is not known."""
    return trained_visibility(adapters[-1].run) if adapters else None
