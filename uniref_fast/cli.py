"""The command line: `uniref-fast demo | edit | estimate | data | eval | doctor`."""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from uniref_fast import __version__
from uniref_fast.data.cli import add_data_commands, leave_to
from uniref_fast.files import write_whole
from uniref_fast.loading import LORA_HELP

if TYPE_CHECKING:
    from uniref_fast.data.images import ImageSource

__all__ = ["main"]

TRAIN_ONLY = ("fontTools", "httpx2", "matplotlib", "peft", "pyarrow", "tensorboard")
DTYPES = ("float32", "bfloat16", "float16")
UNTRAINED = "The weights are untrained: the picture is noise shaped by the architecture."


class UsageError(Exception):
    """Something the user can put right; printed without a traceback, exit status 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    name = "uniref-fast"
    try:
        args = _parser().parse_args(argv)
        name += f" {args.command}"
        return args.run(args)
    except (UsageError, ValueError, TypeError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        extra = '; pip install -e ".[train]" brings it' if error.name in TRAIN_ONLY else ""
        print(f"{name}: {error}{extra}", file=sys.stderr)
        return 1
    except (OSError, ImportError, RuntimeError) as error:  # disk, broken packages, out of memory
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse unknown arguments where the command is known, so that the message has its name."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\nTry '{self.prog} --help'.\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="uniref-fast", description="Fast multi-reference image editing.")
    parser.add_argument("--version", action="version", version=f"uniref_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    demo = commands.add_parser("demo", help="stock against patched pipeline on a composed scene, as a contact sheet")
    demo.add_argument("--out", type=Path, default=Path("out/demo.png"), help="contact sheet to write (%(default)s)")
    demo.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    demo.add_argument("--seed", type=int, default=0, help="scene and noise (%(default)s)")
    demo.add_argument("--references", type=int, choices=(1, 2, 3), default=3, help="pictures given (%(default)s)")
    demo.add_argument("--steps", type=int, default=8, help="denoising steps, with guidance (%(default)s)")
    demo.add_argument("--repeats", type=int, default=3, help="timed runs of each pipeline (%(default)s)")
    demo.add_argument("--dtype", choices=DTYPES[:2], default="float32", help="(%(default)s)")
    demo.add_argument("--device", default="cpu", help="(%(default)s)")
    demo.set_defaults(run=_demo)

    edit = commands.add_parser("edit", help="edit your own pictures")
    _add_request(edit)
    edit.add_argument("--out", type=Path, required=True, help="picture to write (.png, .jpg, .webp, ...)")
    edit.add_argument(
        "--visibility", choices=("full", "reference_causal", "reference_isolated"),
        help="other than full for models trained with it (that of the last --lora's training run, else full)",
    )  # fmt: skip
    edit.add_argument("--lora", action="append", default=[], metavar="PATH[:SCALE]", help=LORA_HELP)
    edit.add_argument("--dtype", choices=DTYPES, help="float32 on a CPU, bfloat16 on a GPU by default")
    edit.add_argument("--device", help="cuda where there is one, else cpu, by default")
    edit.set_defaults(run=_edit)

    estimate = commands.add_parser("estimate", help="tokens, operations and memory of an edit, before running it")
    _add_request(estimate, sizes=True)
    estimate.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    estimate.set_defaults(run=_estimate)

    add_data_commands(commands)
    evaluation = commands.add_parser("eval", help="measure a model on held-out rows or a public bench")
    leave_to(evaluation, "uniref_fast.evaluation.cli")

    doctor = commands.add_parser("doctor", help="versions, devices, and which implementation serves each op and why")
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_request(parser: argparse.ArgumentParser, sizes: bool = False) -> None:
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE",
        help='a reference, repeat for more; "picture 1" in the prompt is the first',
    )  # fmt: skip
    if sizes:
        parser.add_argument(
            "--size", action="append", default=[], metavar="WxH", help="a reference of that size instead"
        )
    parser.add_argument("--prompt", required=True, help="what to do")
    parser.add_argument("--negative-prompt", help="for guidance (a single space by default)")
    parser.add_argument(
        "--guidance", type=float, help="true CFG scale; 1 turns it off (1 for the built-in model, else 4)"
    )
    parser.add_argument("--width", type=int, help="of the result in pixels")
    parser.add_argument("--height", type=int, help="of the result in pixels")
    parser.add_argument("--steps", type=int, help="denoising steps (8 for the built-in model, else 50)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--budget", type=int, metavar="SIDE", help="joint pixel budget of all references: SIDE x SIDE")
    parser.add_argument(
        "--model", default="builtin", metavar="DIR_OR_ID", help="diffusers folder or hub id (%(default)s)"
    )


# ---- commands ----


def _demo(args: argparse.Namespace) -> int:
    import torch

    from uniref_fast.demo import MORE, run_demo

    _writable(args.out, [".png"])
    if not 0 <= args.seed < 10**9:
        raise UsageError(f"--seed is a number from 0 to 999999999, got {args.seed}")
    _check_device(args.device)
    result, sheet, report = run_demo(
        seed=args.seed,
        references=args.references,
        steps=args.steps,
        repeats=args.repeats,
        dtype=getattr(torch, args.dtype),
        device=args.device,
        log=lambda line: print(line, file=sys.stderr),
    )
    _save(sheet, args.out)
    if args.json:
        print(json.dumps({**result.as_dict(), "out": str(args.out)}))
    else:
        print(report)
        print(f"max relative error  {result.max_rel_error:.2e} (allowed {result.tolerance:.2e}, {result.dtype})")
        print(f"stock               {result.stock_seconds:.3f} s")
        print(f"patched             {result.patched_seconds:.3f} s ({result.speedup:.2f}x)")
        print(f"packed              {result.packed_seconds:.3f} s for {MORE} more scenes")
        print(f"weights             {result.weights}")
        print(f"PSNR                {result.psnr:.1f} dB; of the packed ones {result.packed_psnr:.1f} dB on average")
        print(f"contact sheet       {args.out}")
        if result.weights == "untrained":
            print(UNTRAINED)
    if not result.equal:
        print(f"the patched pipeline differs by more than {result.tolerance:.1e}", file=sys.stderr)
        return 1
    return 0


def _edit(args: argparse.Namespace) -> int:
    import torch

    from uniref_fast import EditRequest, builtin, edit
    from uniref_fast.loading import load_pipeline

    _writable(args.out)
    images = [_image(path).load() for path in args.image]
    if not args.prompt.strip():
        raise UsageError("--prompt is empty; say what to do, for example --prompt 'put picture 1 on picture 2'")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    dtype = getattr(torch, args.dtype) if args.dtype else (torch.bfloat16 if device != "cpu" else torch.float32)
    adapters, visibility, below = [], args.visibility, None
    if args.lora:
        from uniref_fast import adapters as loras

        adapters = [loras.Adapter.parse(text) for text in args.lora]
        below = loras.check_adapters(adapters, args.model)
        visibility = visibility or loras.adapter_visibility(adapters)
    pipe = load_pipeline(args.model, dtype, device)
    if adapters:
        loras.put_adapters(pipe, adapters, below, (), dtype)
    request = EditRequest(images=images, seed=args.seed, **_request_fields(args))
    (image,) = edit(pipe, [request], budget=_budget(args), visibility=visibility or "full")
    _save(image, args.out)
    print(f"{args.out}: {image.width} x {image.height}, {len(images)} reference(s), {dtype} on {device}")
    if builtin.weights_status(pipe) == "untrained":
        print(UNTRAINED)
    return 0


def _estimate(args: argparse.Namespace) -> int:
    from uniref_fast import EditRequest, builtin, estimate
    from uniref_fast.loading import model_errors
    from uniref_fast.request import parse_size

    sizes = [_image(path).size() for path in args.image] + [parse_size(text) for text in args.size]
    request = EditRequest(**_request_fields(args))
    with model_errors(args.model):
        pipe = builtin.load() if args.model == "builtin" else args.model
        result = estimate(pipe, [request], image_sizes=[sizes], budget=_budget(args))
    print(json.dumps(result.as_dict()) if args.json else result)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    import torch

    from uniref_fast import native, ops

    versions = {"python": platform.python_version(), "uniref_fast": __version__}
    for name in ("torch", "triton", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    devices = [f"cpu: {_cpu_name()}, {torch.get_num_threads()} threads"]
    kinds = ["cpu"]
    if torch.cuda.is_available():
        kinds.insert(0, "cuda")
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            memory = properties.total_memory / 2**30
            devices.append(f"cuda:{i}: {properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB")
    served = {}
    for kind in kinds:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            chosen, why = ops.explain(torch.empty(0, dtype=dtype, device=kind))
            served[f"{kind} {str(dtype).removeprefix('torch.')}"] = {"implementation": chosen, "reason": why}
    # Those of 8 bits have no native implementation and choose for themselves.
    names = [n for n in ops.__all__ if hasattr(torch.ops.uniref_fast, n) and not n.endswith("_fp8")]
    facts = {"versions": versions, "devices": devices, "native": native.reason(), "ops": names, "served": served}
    if args.json:
        print(json.dumps(facts))
        return 0
    print("versions")
    for name, version in versions.items():
        print(f"  {name:<14}{version}")
    print("devices")
    for line in devices:
        print(f"  {line}")
    if len(kinds) == 1:
        print("  no CUDA device: Triton kernels are not used")
    print(f"native CPU kernels\n  {native.reason()}")
    print(f"implementation of each op ({', '.join(names)})")
    for case, choice in served.items():
        print(f"  {case:<16}{choice['implementation']:<11}{choice['reason']}")
    return 0


# ---- helpers ----


def _request_fields(args: argparse.Namespace) -> dict[str, Any]:
    from uniref_fast.guidance import negative_prompt_for
    from uniref_fast.loading import defaults

    steps, guidance = defaults(args.model)
    guidance = guidance if args.guidance is None else args.guidance
    return {
        "prompt": args.prompt,
        "negative_prompt": negative_prompt_for(guidance) if args.negative_prompt is None else args.negative_prompt,
        "true_cfg_scale": guidance,
        "height": args.height,
        "width": args.width,
        "num_inference_steps": steps if args.steps is None else args.steps,
    }


def _budget(args: argparse.Namespace) -> int | None:
    if args.budget is None:
        return None
    if args.budget < 16:
        raise UsageError(f"--budget is the side of a square in pixels, at least 16; got {args.budget}")
    return args.budget**2


def _image(path: str) -> ImageSource:
    """The image at a path, which is read when it is asked for. Raises UsageError without a file there."""
    from uniref_fast.data.images import ImageSource

    try:
        there = Path(path).is_file()
    except OSError as error:
        raise UsageError(f"{path} cannot be read as an image: {error.strerror}") from None
    if not there:
        raise UsageError(f"{path} is not an image file" if Path(path).exists() else f"no such image file: {path}")
    return ImageSource(path, Path(path))


def _writable(path: Path, suffixes: Sequence[str] | None = None) -> None:
    """Fail before the work when the result could not be written after it."""
    from PIL import Image

    known = {ext: fmt for ext, fmt in Image.registered_extensions().items() if fmt in Image.SAVE}
    if path.suffix.lower() not in (suffixes or known):
        few = ", ".join(suffixes or (".png", ".jpg", ".webp"))
        raise UsageError(f"--out {path}: the ending of the name decides the format and must be one of {few}")
    try:
        Image.new("RGB", (1, 1)).save(io.BytesIO(), known[path.suffix.lower()])
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"--out {path}: that format cannot hold the picture ({error}); use .png, .jpg or .webp"
        ) from None
    if path.is_dir():
        raise UsageError(f"--out {path} is a folder; name a file")
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UsageError(f"--out {path}: {nearest} is not a folder that can be written to")


def _save(image: Any, path: Path) -> None:
    """Save an image that appears whole or not at all, in the format that its name ends with."""
    from PIL import Image

    form = Image.registered_extensions().get(path.suffix.lower())
    write_whole(path, lambda file: image.save(file, form))


def _check_device(device: str) -> None:
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UsageError(f"unknown device {device!r}; use cpu, cuda or cuda:N") from None
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"device {device!r} is not supported; use cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {device!r} was asked for, but PyTorch sees no CUDA device here; use cpu")


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
