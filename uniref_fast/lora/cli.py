"""Commands `uniref-fast lora info` and `uniref-fast lora convert`, for LoRA files of any format."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniref_fast import __version__
from uniref_fast.lora.names import FORMATS, weight_shape
from uniref_fast.progress import announce_import, running

if TYPE_CHECKING:
    from uniref_fast.lora.file import LoraFile

__all__ = ["add_lora_commands"]

IN_HELP = "LoRA file (.safetensors) of any known format, the folder of a training run, or its lora/ folder."
WIDTHS = {3072: "Qwen-Image, Qwen-Image-Edit, 2509 and 2511 (60 blocks)", 256: "the built-in model (4 blocks)"}


def add_lora_commands(commands: Any) -> None:
    """Add `lora` with its commands to the commands of `uniref-fast`."""
    summary = "Describe or convert LoRA files."
    lora = commands.add_parser("lora", help=summary, description=summary)
    group = lora.add_subparsers(dest="lora_command", required=True, metavar="COMMAND", title="Commands")

    summary = "Describe a LoRA file: format, kind, rank, alpha, layers, dtype, and the model that it suits."
    info = group.add_parser("info", help=summary, description=summary)
    info.add_argument("file", metavar="FILE", help=IN_HELP)
    info.add_argument("--json", action="store_true", help="Print one JSON object instead of text.")
    info.set_defaults(run=_info)

    summary = "Rewrite a LoRA file with the key names of another program."
    convert = group.add_parser(
        "convert",
        help=summary,
        description=f"{summary} The weights change as before; a tensor that cannot be converted is an error.",
    )
    convert.add_argument("file", metavar="IN", help=IN_HELP)
    convert.add_argument("out", type=Path, metavar="OUT", help="New .safetensors file.")
    convert.add_argument("--to", choices=tuple(FORMATS), required=True, help="Format to write.")
    convert.set_defaults(run=_convert)


def _read(text: str) -> LoraFile:
    announce_import("PyTorch", "torch")
    from uniref_fast.adapters import adapter_file
    from uniref_fast.lora.file import read_lora

    path = Path(text)
    if not path.exists():
        raise ValueError(f"no such file or folder: {path}")
    file = adapter_file(path, text)
    with running(f"reading {file.name}"):
        return read_lora(file)


def _convert(args: argparse.Namespace) -> int:
    from uniref_fast.lora.file import write_lora

    out: Path = args.out
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: the file to write is a .safetensors file")
    if out.exists():
        raise ValueError(f"{out} exists; give a new file")
    file = _read(args.file)
    note = f"by uniref_fast {__version__}, from {file.format or 'a mixture'} to {args.to}"
    with running(f"writing {out}"):
        remarks = write_lora(file, out, FORMATS[args.to], note)
    print(f"{out}: {len(file.layers)} layers, {FORMATS[args.to].name} ({FORMATS[args.to].programs})")
    for remark in remarks:
        print(f"note: {remark}")
    return 0


def _info(args: argparse.Namespace) -> int:
    file = _read(args.file)
    found = describe(file)
    if args.json:
        print(json.dumps(found))
        return 0
    for name, value in found.items():
        if isinstance(value, list):
            value = ", ".join(map(str, value))
        elif isinstance(value, dict):
            value = ", ".join(f"{key} ({count})" for key, count in value.items())
        print(f"{name.replace('_', ' '):<12}{value}")
    return 0


def describe(file: LoraFile) -> dict[str, Any]:
    """Return a description of a LoRA file as JSON data."""
    tensors = [tensor for layer in file.layers.values() for tensor in layer.tensors.values()]
    kinds = sorted(file.kinds) + ["dora"] * file.dora
    scales = Counter(f"{layer.scale:g}" for layer in file.layers.values())
    blocks = {int(name.split(".")[1]) for name in file.layers if name.startswith("transformer_blocks.")}
    names = Counter(name.split(".", 2)[2] if name.startswith("transformer_blocks.") else name for name in file.layers)
    return {
        "file": str(file.path),
        "format": file.format or f"a variant of several formats, such as {file.example}",
        "programs": FORMATS[file.format].programs if file.format else "",
        "kind": kinds,
        "rank": sorted({layer.rank for layer in file.layers.values() if layer.rank is not None}),
        "scale": dict(scales),
        "layers": dict(names),
        "blocks": f"{len(blocks)} of numbers {min(blocks)} to {max(blocks)}" if blocks else "none",
        "dtype": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
        "parameters": sum(tensor.numel() for tensor in tensors),
        "model": _model(file),
        "metadata": sorted(file.metadata),
    }


def _model(file: LoraFile) -> str:
    """Return the model whose layers have the shapes of the file."""
    widths = {width for width in WIDTHS if any(weight_shape(n, width) == s for n, s in _shapes(file).items())}
    odd = [name for name, shape in _shapes(file).items() if shape not in [weight_shape(name, w) for w in widths]]
    if len(widths) == 1 and not odd:
        return WIDTHS[widths.pop()]
    shown = next(((name, shape) for name, shape in _shapes(file).items() if name in odd or not widths), None)
    return "not known" + (f": the weight of {shown[0]} would be {shown[1][0]} x {shown[1][1]}" if shown else "")


def _shapes(file: LoraFile) -> dict[str, tuple[int, int]]:
    """Return the shapes of the weights of the Linear layers of blocks that the file changes."""
    found = {}
    for name, layer in file.layers.items():
        if weight_shape(name, 1) is not None and (shape := layer.shape) is not None:
            found[name] = shape
    return found
