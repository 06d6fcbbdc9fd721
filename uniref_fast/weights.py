"""The commands `uniref-fast export`, for the checkpoints of a training run, and `uniref-fast fuse`, for adapters."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from uniref_fast.progress import announce_import, running

__all__ = ["add_export", "add_fuse", "export", "fuse"]


def add_export(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `export`."""
    add = parser.add_argument
    add("run_folder", type=Path, metavar="RUN", help="Folder of a training run with checkpoints.")
    add("--step", type=int, metavar="N", help="Step of the checkpoint. (default: the newest complete one)")
    add("--out", type=Path, metavar="DIR",
        help="New folder for the weights and the run's configuration. (default: the folder of the run)")  # fmt: skip


def add_fuse(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fuse`."""
    add = parser.add_argument
    add("model", metavar="MODEL", help='Model: "builtin", a diffusers folder, or a model id of the Hugging Face hub.')
    add("--lora", action="append", required=True, metavar="PATH[:SCALE]",
        help="LoRA adapter to fuse: the folder of a training run, its lora/ folder, or a .safetensors file, with a "
        "factor on its effect; repeat the flag for more.")  # fmt: skip
    add("--out", type=Path, required=True, metavar="DIR", help="New folder for the pipeline.")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16",
        help="Data type of the written weights. 16 bits round small updates away. (default: %(default)s)")  # fmt: skip


def export(args: argparse.Namespace) -> int:
    """Write the weights of a checkpoint, and print where they are and how to use them."""
    announce_import("PyTorch", "torch")
    from uniref_fast.training.core.export import export_checkpoint

    with running(f"verifying and writing the weights of {args.run_folder}"):
        done = export_checkpoint(args.run_folder, args.step, args.out)
    for name, reason in done.damaged:
        print(f"{name} cannot be used: {reason}", file=sys.stderr)
    kind = "averaged weights" if done.averaged else "weights"
    print(f"{done.folder}: {kind} of step {done.step}")
    print(f"use them with: {done.command}")
    return 0


def fuse(args: argparse.Namespace) -> int:
    """Write a pipeline with fused adapters, and print how to use it."""
    announce_import("PyTorch", "torch")
    import torch

    from uniref_fast.adapters import Adapter, adapter_visibility, check_adapters, fuse_adapters
    from uniref_fast.builtin import SmallQwenImageEditPlusPipeline, store
    from uniref_fast.files import check_new_folder, whole_folder
    from uniref_fast.loading import load_pipeline

    out: Path = args.out
    check_new_folder(out, "--out")
    adapters = [Adapter.parse(text) for text in args.lora]
    below = check_adapters(adapters, args.model)
    pipe = load_pipeline(args.model, getattr(torch, args.dtype), "cpu")
    with running("fusing the adapters"):
        fuse_adapters(pipe, adapters, below)
    with running(f"writing {out}"):
        if isinstance(pipe, SmallQwenImageEditPlusPipeline):
            store.write(pipe, out, weights="trained")
        else:
            with whole_folder(out) as partial:
                pipe.save_pretrained(partial)
    visibility = adapter_visibility(adapters) or "full"
    more = "" if visibility == "full" else f" --visibility {visibility}"
    print(f"{out}: {args.model} with {len(adapters)} fused adapter(s), {args.dtype}")
    print(f"use it with: uniref-fast edit --model {shlex.quote(str(out))}{more} ...")
    return 0
