"""Trained weights in the format of diffusers, written by a run at its end or from one of its checkpoints.

An export from a checkpoint needs neither the base weights nor the optimizer: the transformer is built without memory
for its weights, only for the names and the configuration that are written with the trained tensors.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from uniref_fast.builtin.store import model_folder
from uniref_fast.files import check_new_folder, whole_folder
from uniref_fast.models.families import families, family_of, family_of_class, unsupported_class
from uniref_fast.models.family import Family
from uniref_fast.runs import base_run
from uniref_fast.training.core.adapter import add_adapter
from uniref_fast.training.core.checkpoint import Checkpoints
from uniref_fast.training.core.distributed import Ranks

__all__ = ["ExportError", "Exported", "command_for", "export_checkpoint", "write_weights"]

CONFIG_FILE = "config.json"
FOLDERS = ("lora", "transformer")


class ExportError(RuntimeError):
    """The trained weights could not be written; an earlier export and the checkpoints are untouched."""


@dataclass(frozen=True)
class Exported:
    """Result of an export from a checkpoint.

    Attributes:
        folder: Folder that was written, `lora/` or `transformer/`.
        step: Step of the checkpoint.
        averaged: The weights are the moving average, as in the export at the end of the run.
        damaged: (name, reason) of each newer checkpoint, which cannot be used.
        command: Command that uses the weights.
    """

    folder: Path
    step: int
    averaged: bool
    damaged: list[tuple[str, str]]
    command: str


def command_for(run: Path, model: str, lora_rank: int | None) -> str:
    """Return the command that uses the exported weights of a run.

    Args:
        run: Folder with `lora/` or `transformer/`.
        model: Model that was trained: "builtin", a folder, or an id.
        lora_rank: Rank of the adapter; None if all weights were trained.
    """
    folder, flag = shlex.quote(str(run)), "" if model == "builtin" else f" --model {shlex.quote(model)}"
    given = "--initial" if lora_rank is None else "--lora"
    return f'uniref-fast edit{flag} {given} {folder} --image IMAGE.png --prompt "TEXT" --out RESULT.png'


def export_checkpoint(run: Path, step: int | None = None, out: Path | None = None) -> Exported:
    """Write the trained weights of a checkpoint: the tensors that the run itself would export after that step.

    Args:
        run: Folder of the run; nothing else in it is changed.
        step: Step of the checkpoint; None takes the newest complete one.
        out: New folder that receives `lora/` or `transformer/`, and the configuration of the run; None writes into the
            folder of the run.

    Returns:
        The folder that was written, and the weights that it holds.

    Raises:
        ValueError: The folder is not a run with checkpoints, the run has no checkpoint of that step, or the folder to
            write exists already.
        CheckpointError: The checkpoint is damaged.
        ExportError: The folder cannot be written, for example because the disk is full.
    """
    checked = _check_folders(run, step, out)
    with _one_rank() as ranks:
        checkpoints = Checkpoints(run / "checkpoints", ranks, keep=1)
        damaged: list[tuple[str, str]] = []
        if step is None:
            newest = checkpoints.newest()
            assert newest.step is not None  # the folder has checkpoints
            step, state, damaged = newest.step, newest.state, newest.damaged
        else:
            state = checkpoints.verified(step)
        config = _config(run, state)
        name = "transformer" if config.get("lora_rank") is None else "lora"
        folder = (out or run) / name
        if folder.is_dir() and (damaged or step != checked[-1]):
            raise ValueError(
                f"{folder} exists, and step {step} is not the newest checkpoint; write it elsewhere with --out DIR"
            )
        weights = checkpoints.read(step, "model")
        average = checkpoints.read(step, "average")
        weights = {n: average[n].to(tensor.dtype) if average else tensor for n, tensor in weights.items()}
    transformer = _empty_transformer(config)
    if unknown := sorted(set(weights) - {n for n, _ in transformer.named_parameters()}):
        raise ValueError(
            f"the transformer of {config.get('model')} has no {unknown[0]}, which the checkpoint holds; the model or "
            "the initial run has changed since the training"
        )
    try:
        with whole_folder(out or folder, replace=out is None) as partial:
            target = partial
            if out is not None:
                (target := partial / name).mkdir()
                (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            write_weights(target, transformer, weights, config["lora_rank"], config["dtype"])
    except (OSError, SafetensorError) as error:
        problem = getattr(error, "strerror", None) or error
        raise ExportError(f"the trained weights could not be written to {folder}: {problem}") from error
    command = command_for(folder.parent, str(config["model"]), config["lora_rank"])
    return Exported(folder, step, bool(average), damaged, command)


def write_weights(
    folder: Path, transformer: Any, whole: Mapping[str, Tensor], lora_rank: int | None, dtype: str
) -> None:
    """Write the trained weights into an existing folder, in the format of diffusers.

    Args:
        folder: Folder that receives the files.
        transformer: The transformer, with the adapter "default" if one is trained; only its names and its
            configuration are used.
        whole: Trained parameters on the CPU, by their names in the transformer.
        lora_rank: Rank of the adapter; None if all weights were trained.
        dtype: Name of the dtype of a whole transformer; an adapter keeps its own.
    """
    if lora_rank is None:
        from huggingface_hub import save_torch_state_dict

        transformer.save_config(folder)
        pattern = "diffusion_pytorch_model{suffix}.safetensors"
        tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in whole.items()}
        save_torch_state_dict(tensors, folder, filename_pattern=pattern)
        return
    import diffusers
    from peft.utils import get_peft_model_state_dict

    adapter = get_peft_model_state_dict(transformer, state_dict=dict(whole))
    getattr(diffusers, family_of(transformer).pipelines[0]).save_lora_weights(
        str(folder),
        transformer_lora_layers={name: tensor.contiguous() for name, tensor in adapter.items()},
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
        safe_serialization=True,
    )


def _check_folders(run: Path, step: int | None, out: Path | None) -> list[int]:
    """Check the folders of an export before PyTorch's process group starts; return the steps of the checkpoints."""
    if not run.is_dir():
        raise ValueError(f"no such folder: {run}; give the folder of a training run")
    steps = Checkpoints.steps_in(run / "checkpoints")
    if not steps:
        whole = next((f"; its weights are in {run / name} already" for name in FOLDERS if (run / name).is_dir()), "")
        raise ValueError(f"{run} has no checkpoints{whole or '; give the folder of a training run'}")
    if step is not None and step not in steps:
        raise ValueError(f"{run} has no checkpoint of step {step}; it has those of {', '.join(map(str, steps))}")
    if out is not None:
        check_new_folder(out, "--out")
    return steps


@contextlib.contextmanager
def _one_rank() -> Iterator[Ranks]:
    """Yield a process group of this process alone."""
    import torch.distributed as dist

    ranks = Ranks.start()
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


def _config(run: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration that a checkpoint was trained with; `config.json` for checkpoints of older versions."""
    config = state.get("config")
    if not config:
        try:
            config = json.loads((run / CONFIG_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{run / CONFIG_FILE} cannot be read ({error}); restore the file") from None
    if not isinstance(config, dict) or not {"model", "dtype", "lora_rank"} <= set(config):
        raise ValueError(
            f"{run} is not a run of training/sft.py or training/msgrpo.py: its configuration names no model"
        )
    visibility = state.get("visibility")
    return {**config, "visibility": visibility} if visibility else config


def _empty_transformer(config: Mapping[str, Any]) -> Any:
    """Return the transformer of a run on the meta device, with its adapter if it trains one."""
    from diffusers import AutoModel

    initial = Path(config["initial"]) if config.get("initial") else None
    base = None if initial is None else base_run(initial)
    name = str(model_folder()) if config["model"] == "builtin" else config["model"]
    source = name if base is None else str(base)
    try:
        found = AutoModel.load_config(source, subfolder="transformer")
    except OSError as error:
        raise ValueError(f"the configuration of {source} could not be loaded: {str(error).splitlines()[0]}") from None
    with torch.device("meta"):
        transformer = _family(found).transformer_class().from_config(found)
        if config["lora_rank"] is not None and not (initial is not None and (initial / "lora").is_dir()):
            kind = config.get("adapter", "lora")  # older versions have no other
            add_adapter(transformer, config["lora_rank"], config["lora_alpha"], config["lora_targets"], kind)
    if config["lora_rank"] is not None and not hasattr(transformer, "peft_config"):
        assert initial is not None  # training continued the adapter of that run, with the configuration in its file
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*to a meta parameter.*")  # only the configuration is needed
            transformer.load_lora_adapter(str(initial / "lora"), adapter_name="default", use_safetensors=True)
    return transformer


def _family(config: Mapping[str, Any]) -> Family:
    """Return the family of the configuration of a transformer; one that names no class is of Qwen-Image-Edit."""
    name = str(config.get("_class_name", families()[0].transformer))
    family = family_of_class(name)
    if family is None:
        raise ValueError(unsupported_class(name))
    return family
