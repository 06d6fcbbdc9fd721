"""Command line: `uniref-fast demo | edit | serve | estimate | data | eval | export | lora | plan | ...`.

Modules that load PyTorch are imported by the command that needs them, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import difflib
import io
import json
import math
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from uniref_fast import __version__, weights
from uniref_fast.data import cli as data
from uniref_fast.data.readers import escape_controls
from uniref_fast.evaluation import cli as evaluation
from uniref_fast.files import write_whole
from uniref_fast.lora import cli as lora
from uniref_fast.progress import announce, announce_import, running
from uniref_fast.scenes import make as scenes
from uniref_fast.serve import command as serve

if TYPE_CHECKING:
    import torch

    from uniref_fast.data.images import ImageSource

__all__ = ["main"]

TRAIN_ONLY = ("fontTools", "httpx2", "matplotlib", "peft", "pyarrow", "tensorboard")
SERVE_ONLY = ("fastapi", "prometheus_client", "python_multipart", "uvicorn")
DTYPES = ("float32", "bfloat16", "float16")
JSON_HELP = "Print one JSON object instead of text."
UNTRAINED = "The weights are untrained: the image is noise shaped by the architecture."


RENAMED = {  # new flags by former ones, for the message of the error; the first that a command has
    "--steps": ("--num-inference-steps",),
    "--guidance": ("--true-cfg-scale",),
    "--size": ("--image-size", "--width and --height"),
}


class UsageError(Exception):
    """An error that the user can correct; printed without a traceback, exit status 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    name = "uniref-fast"
    try:
        words = sys.argv[1:] if argv is None else list(argv)
        if words[:1] == ["plan"]:  # its flags are those of a recipe
            from uniref_fast import plan

            name += " plan"
            return plan.run(words[1:])
        if words[:2] == ["data", "encode"]:  # likewise
            from uniref_fast import encode_rows

            name += " data encode"
            return encode_rows.run(words[2:])
        args = _parser().parse_args(words)
        inner = getattr(args, f"{args.command}_command", None)  # of data and lora
        name += f" {args.command}" + (f" {inner}" if inner else "")
        return args.run(args)
    except (UsageError, ValueError, TypeError) as error:
        return _failed(name, str(error), 2)
    except ModuleNotFoundError as error:
        extra = '; install it with pip install -e ".[train]"' if error.name in TRAIN_ONLY else ""
        extra = '; install it with pip install "uniref_fast[serve]"' if error.name in SERVE_ONLY else extra
        return _failed(name, f"{error}{extra}", 1)
    except (OSError, ImportError, RuntimeError) as error:  # disk, broken packages, out of memory
        return _failed(name, str(error) or type(error).__name__, 1)
    except KeyboardInterrupt:
        return _failed(name, "interrupted", 130)


def _failed(name: str, message: str, status: int) -> int:
    hint = f"\nTry '{name} --help'." if status == 2 else ""
    print(f"{name}: error: {escape_controls(message)}{hint}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments, and refuse unknown ones here, where the message can name the command and similar flags."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            if now := _new_name(unknown[0].partition("=")[0], flags):
                self.error(f"{unknown[0].partition('=')[0]} is now called {now}")
            near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=1)
            self.error(f"unrecognized arguments: {' '.join(unknown)}" + (f"; did you mean {near[0]}?" if near else ""))
        return found, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\nTry '{self.prog} --help'.\n")


def _new_name(flag: str, flags: Collection[str]) -> str | None:
    """Return the new name of a former flag among the flags of a command; None for other flags."""
    nested = f"--judge.{flag.removeprefix('--judge-')}"  # as in the configurations of training
    return next((new for new in RENAMED.get(flag, (nested,)) if new.split()[0] in flags), None)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="uniref-fast",
        description="Fast multi-reference image editing with Qwen-Image-Edit, other families of models (`uniref-fast "
        "families`), and the small built-in model.",
        epilog="uniref-fast COMMAND --help describes the flags of a command.",
    )
    parser.add_argument("--version", action="version", version=f"uniref_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="Commands")

    def command(name: str, run: Any, summary: str, more: str = "") -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=f"{summary} {more}".strip())
        added.set_defaults(run=run)
        return added

    demo = command("demo", _demo, "Compare the stock with the patched pipeline on a generated scene.",
                   "Prints the times and the error, and writes the images as a contact sheet. With --family, it shows "
                   "the small pipelines of that family.")  # fmt: skip
    _add_demo(demo)
    edit = command("edit", _edit, "Edit your own images.")
    _add_edit(edit, _add_request(edit))
    served = command("serve", serve.run, "Serve edits over HTTP, as OpenAI's images API does.",
                     "Edits join and leave a running pack.")  # fmt: skip
    _add_serve(served)
    estimate = command("estimate", _estimate, "Estimate size, tokens, memory and time of an edit without running it.",
                       "Memory counts weights and tensors. A time is given only where it was measured.")  # fmt: skip
    _add_estimate(_add_request(estimate, sizes=True))
    _add_keep(estimate)
    estimate.add_argument("--json", action="store_true", help=JSON_HELP)
    data_commands = data.add_data_commands(commands)
    summary = "Generate a dataset of multi-reference edits with exact targets."
    make = data_commands.add_parser("make", help=summary, description=summary)
    scenes.add_arguments(make)
    make.set_defaults(run=scenes.run)
    summary = "Encode the images and prompts of a dataset into the cache of training."
    data_commands.add_parser("encode", help=summary, description=summary)
    evaluation.add_arguments(
        command("eval", evaluation.run, "Evaluate a model on held-out rows or a public benchmark.")
    )
    weights.add_export(command("export", weights.export, "Write the trained weights of a checkpoint of a run.",
                               "A run that was stopped before its end has checkpoints only."))  # fmt: skip
    weights.add_fuse(command("fuse", weights.fuse, "Write a model with LoRA adapters fused into its weights.",
                             "diffusers loads the folder like any other pipeline."))  # fmt: skip
    lora.add_lora_commands(commands)
    command("plan", None, "Plan a training run: memory, packs, steps, time and disk, before anything is downloaded.")
    plot = command("plot", _plot, "Draw the metrics of training runs.",
                   "Each panel shows one metric or a group of metrics; several runs are overlaid.")  # fmt: skip
    _add_plot(plot)
    family = command("families", _families, "Show the supported families of models, and what works for each of them.")
    family.add_argument("--json", action="store_true", help="Print a JSON list instead of text.")
    doctor = command(
        "doctor", _doctor, "Show versions, devices, and the implementation of each operator with its reason."
    )
    doctor.add_argument("--json", action="store_true", help=JSON_HELP)
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--family", metavar="NAME",
        help="Family of models, such as flux2. Its small pipelines are built with random weights, and `patch` and "
        "`edit` are compared with the unchanged pipeline. `uniref-fast families` prints the names. (default: the "
        "built-in model)")  # fmt: skip
    add("--out", type=Path, default=Path("out/demo.png"), help="Contact sheet to write. (default: %(default)s)")
    add("--json", action="store_true", help=JSON_HELP)
    add("--seed", type=int, default=0, help="Seed of the scene and of the noise. (default: %(default)s)")
    add("--references", type=int, choices=(1, 2, 3), default=3, help="Number of references. (default: %(default)s)")
    add("--num-inference-steps", type=int, default=8, metavar="N",
        help="Number of denoising steps, with guidance. (default: %(default)s)")  # fmt: skip
    add("--repeats", type=int, default=3, help="Number of timed runs of each pipeline. (default: %(default)s)")
    add("--dtype", choices=DTYPES[:2], default="float32", help="Data type of the model. (default: %(default)s)")
    add("--device", default="cpu", help="Device of the model: cpu, cuda or cuda:N. (default: %(default)s)")


def _add_request(parser: argparse.ArgumentParser, sizes: bool = False) -> Any:
    """Add the flags that `edit` and `estimate` share, and return the group of those of the model."""
    add = parser.add_argument_group("Request").add_argument
    add("--prompt", required=True, metavar="TEXT", help="Instruction, such as 'put picture 1 on picture 2'.")
    add("--image", action="append", default=[], metavar="FILE",
        help='Reference image; repeat the flag for more. "picture 1" in the prompt is the first one.')  # fmt: skip
    if sizes:
        add("--image-size", action="append", default=[], metavar="WIDTHxHEIGHT",
            help="Size in pixels of a further reference that need not exist; repeat the flag for more.")  # fmt: skip
    add("--negative-prompt", metavar="TEXT",
        help="Negative prompt for guidance. (default: that of the model's pipeline; a single space for Qwen-Image "
        "models)")  # fmt: skip
    add("--width", type=int, help="Width of the result in pixels. (default: as the pipeline chooses)")
    add("--height", type=int, help="Height of the result in pixels. (default: as the pipeline chooses)")
    add("--num-inference-steps", type=int, metavar="N",
        help="Number of denoising steps. (default: that of the model's pipeline, 50 for Qwen-Image-Edit, 8 for the "
        "built-in model)")  # fmt: skip
    add("--true-cfg-scale", type=float, metavar="SCALE",
        help="True CFG scale; 1 turns guidance off, except where the model embeds the scale (FLUX.2 dev, FLUX.1 "
        "Kontext). (default: that of the model's pipeline, 4 for Qwen-Image-Edit, 1 for the built-in "
        "model)")  # fmt: skip
    add("--budget", type=int, metavar="SIDE",
        help="Joint pixel budget of the references: SIDE x SIDE pixels for all of them together"
        + (". (default: each reference is scaled as diffusers does)" if sizes else
           ", or 0 to scale each as diffusers does. (default: that of the last run of --lora or --initial, else each "
           "reference is scaled as diffusers does)"))  # fmt: skip
    add("--seed", type=int, default=0, help="Seed of the noise. (default: %(default)s)")
    add("--num-images", type=int, default=1, metavar="N",
        help="Number of images, which differ in their noise. (default: %(default)s)")  # fmt: skip
    return _add_model(parser)


def _add_model(parser: argparse.ArgumentParser) -> Any:
    """Add the flags that choose the model, and return their group."""
    model = parser.add_argument_group("Model")
    model.add_argument(
        "--model", default="builtin", metavar="DIR_OR_ID",
        help='Model: "builtin", a diffusers folder, or a model id of the Hugging Face hub. (default: %(default)s)',
    )  # fmt: skip
    model.add_argument(
        "--mode", choices=("exact", "fast"), default="exact",
        help="Computation: exact, or fast with most Linears and attention in 8 bits, on a GPU of compute capability "
        "8.9 or newer. (default: %(default)s)",
    )  # fmt: skip
    return model


def _add_edit(parser: argparse.ArgumentParser, model: Any) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="FILE",
        help="Image to write; its ending (.png, .jpg, .webp, ...) chooses the format. Several images get a number: "
        "out-1.png, out-2.png, ...")  # fmt: skip
    add = model.add_argument
    add("--lora", action="append", default=[], metavar="PATH[:SCALE]",
        help="LoRA adapter to load: the folder of a training run, its lora/ folder, or a .safetensors file, with a "
        "factor on its effect; repeat the flag for more.")  # fmt: skip
    _add_weights(parser, model)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    serve.add_arguments(parser)
    model = _add_model(parser)
    model.add_argument("--budget", type=int, metavar="SIDE",
        help="Joint pixel budget of the references of a request: SIDE x SIDE pixels for all of them together, or 0 to "
        "scale each as diffusers does. (default: that of the run of the last --lora, else of the last --initial, else "
        "0)")  # fmt: skip
    model.add_argument("--lora", action="append", default=[], metavar="NAME=PATH",
        help="LoRA adapter that requests may use by its name: the folder of a training run, its lora/ folder, or a "
        ".safetensors file; repeat the flag for more.")  # fmt: skip
    _add_weights(parser, model)


def _add_weights(parser: argparse.ArgumentParser, model: Any) -> None:
    """Add the flags for the weights of the model, and for where and how they are computed with."""
    add = model.add_argument
    add("--initial", action="append", type=Path, default=[], metavar="RUN",
        help="Folder of a training run, or its transformer/ folder, whose weights are loaded into the model; repeat "
        "the flag for runs that continue others, in order.")  # fmt: skip
    add("--visibility", choices=("full", "reference_causal", "reference_isolated"),
        help="Attention policy, for models that were trained with another than full. (default: that of the run of the "
        "last --lora, else of the last --initial, else full)")  # fmt: skip
    _add_keep(parser)
    _add_quantisation(add)
    add("--dtype", choices=DTYPES, help="Data type of the model. (default: float32 on a CPU, bfloat16 on a GPU)")
    add("--device", help="Device of the model: cpu, cuda or cuda:N. (default: cuda if there is a GPU)")
    _add_offload(add)


def _add_estimate(model: Any) -> None:
    add = model.add_argument
    add("--device", metavar="NAME",
        help="Device whose measured times are used: cpu or cuda of this machine, or the name of a measured device such "
        "as h100-80gb-hbm3. (default: cuda if there is a GPU, else cpu)")  # fmt: skip
    _add_quantisation(add)
    _add_offload(add)
    add("--gpu-memory", type=float, metavar="GB", help="Memory of a GPU that the edit has to fit.")


def _add_quantisation(add: Any) -> None:
    add("--quantisation", choices=("int8", "fp8", "nf4"),
        help="Format in which text encoder and transformer are stored: int8 or fp8 (torchao), or nf4 (bitsandbytes, on "
        "a GPU). (default: 16 or 32 bits, or as the model is stored)")  # fmt: skip


def _add_offload(add: Any) -> None:
    add("--offload", choices=("model", "block"),
        help="Keep the weights in host memory, and bring to the GPU one model after the other, or one block of the "
        "transformer after the other. (default: all weights stay on the GPU)")  # fmt: skip


def _add_keep(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("References kept across steps").add_argument
    add("--keep-references", default="false", metavar="true|false|auto|N",
        help="Steps that compute the references: every N-th one, auto as often as --drift requires, true the first one "
        "only (for models where this is exact). (default: false, every step)")  # fmt: skip
    add("--drift", type=float, metavar="NUMBER",
        help="Tolerance of --keep-references auto: the largest relative change of the references' keys and values "
        "between two steps that compute them. (default: 0.15)")  # fmt: skip
    add("--keep-dtype", choices=("int8",), help="Data type of kept keys and values. (default: that of the model)")


def _add_plot(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="Folder of a training run.")
    add("--out", type=Path, default=Path("plots.png"), metavar="FILE",
        help="Image to write, .png, .svg or .pdf. (default: %(default)s)")  # fmt: skip
    add("--smooth", type=float, default=0.9, metavar="WEIGHT",
        help="Weight of earlier values in the smoothed curves, from 0 (no smoothing) to below 1. (default: "
        "%(default)s)")  # fmt: skip
    add("--keys", nargs="+", metavar="KEY", help="Metrics, or groups of metrics such as loss_by_k, one for each panel. "
        "(default: the usual ones that the runs have)")  # fmt: skip


# ---- commands ----


def _demo(args: argparse.Namespace) -> int:
    _writable(args.out, [".png"])
    if not 0 <= args.seed < 10**9:
        raise UsageError(f"--seed is a number from 0 to 999999999, got {args.seed}")
    announce_import("PyTorch", "torch")
    import torch

    from uniref_fast.demo import MORE, run_demo

    _check_device(args.device)
    if args.family is not None:
        return _demo_family(args)
    result, sheet, report = run_demo(
        seed=args.seed,
        references=args.references,
        num_inference_steps=args.num_inference_steps,
        repeats=args.repeats,
        dtype=getattr(torch, args.dtype),
        device=args.device,
        log=announce,
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
        print(f"PSNR                {result.psnr:.1f} dB; {result.packed_psnr:.1f} dB on average for the packed scenes")
        print(f"contact sheet       {args.out}")
        if result.weights == "untrained":
            print(UNTRAINED)
    if not result.equal:
        print(f"the patched pipeline differs by more than {result.tolerance:.1e}", file=sys.stderr)
        return 1
    return 0


def _demo_family(args: argparse.Namespace) -> int:
    import torch

    from uniref_fast.family_demo import demo_family, report, run_family_demo

    family = demo_family(args.family)
    results, sheet = run_family_demo(
        family, seed=args.seed, references=args.references, num_inference_steps=args.num_inference_steps,
        repeats=args.repeats, dtype=getattr(torch, args.dtype), device=args.device, log=announce,
    )  # fmt: skip
    _save(sheet, args.out)
    if args.json:
        pipelines = [result.as_dict() for result in results]
        print(json.dumps({"family": family.name, "weights": "random", "dtype": args.dtype, "device": args.device,
                          "pipelines": pipelines, "out": str(args.out)}))  # fmt: skip
    else:
        print(report(results, args.dtype, args.device))
        print(f"contact sheet   {args.out}\nThe weights are random: the images only show that the results agree.")
    if different := [result.pipeline for result in results if not result.equal]:
        print(f"results differ by more than the allowed error: {', '.join(different)}", file=sys.stderr)
        return 1
    return 0


def _edit(args: argparse.Namespace) -> int:
    _writable(args.out)
    images = [_image(path).load("original") for path in args.image]
    if not args.prompt.strip():
        raise UsageError("--prompt is empty; give an instruction, for example --prompt 'put picture 1 on picture 2'")
    announce_import("PyTorch", "torch")
    import torch

    from uniref_fast import EditReport, EditRequest, builtin, edit, patch
    from uniref_fast.flags import parse_keep_references

    keep = parse_keep_references(args.keep_references)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    if args.offload and (args.mode == "fast" or args.quantisation):
        raise UsageError(f"--offload {args.offload} needs the weights as they are stored, without --mode fast and "
                         "--quantisation; leave one out")  # fmt: skip
    if args.offload and device == "cpu":
        raise UsageError(f"--offload {args.offload} makes room on a GPU, and the model is on the CPU; leave it out")
    dtype = getattr(torch, args.dtype) if args.dtype else (torch.bfloat16 if device != "cpu" else torch.float32)
    pipe, visibility, budget = _trained_pipeline(args, device, dtype)
    request = EditRequest(images=images, seed=args.seed, **_request_fields(args))
    report = EditReport() if keep else None
    if args.mode == "fast":
        patch(pipe, mode="fast")  # frees the memory of 16-bit weights, which edit() alone would not
    (result,) = edit(
        pipe, [request], mode=args.mode, budget=budget, visibility=visibility, report=report,
        keep_references=keep, drift=args.drift, keep_dtype=args.keep_dtype,
    )  # fmt: skip
    results = {args.out: result}
    if args.num_images > 1:
        results = {_numbered(args.out, i): image for i, image in enumerate(result, start=1)}
    for path, image in results.items():
        _save(image, path)
        print(f"{path}: {image.width} x {image.height}, {len(images)} reference(s), {dtype} on {device}")
    if report is not None:
        print(report)
    if builtin.weights_status(pipe) == "untrained":
        print(UNTRAINED)
    return 0


def _trained_pipeline(args: argparse.Namespace, device: str, dtype: torch.dtype) -> tuple[Any, str, int | None]:
    """Return the pipeline with the weights of `--initial` and `--lora`, its visibility, and the joint pixel budget."""
    from uniref_fast.adapters import check_adapters
    from uniref_fast.evaluation.config import EvalConfig
    from uniref_fast.evaluation.model import check_runs, load
    from uniref_fast.loading import offload
    from uniref_fast.runs import run_folder

    runs = tuple(run_folder(path) for path in args.initial)
    given = {"budget": args.budget, "visibility": args.visibility, "lora": tuple(args.lora),
             "keep_references": args.keep_references, "drift": args.drift}  # fmt: skip
    config = EvalConfig((), Path(), model=args.model, initial=runs, **given)
    check_runs(runs, args.model)
    check_adapters(config.adapters, args.model, runs)  # before anything is loaded
    name = str(dtype).removeprefix("torch.")
    place = "cpu" if args.offload else device
    pipe = load(args.model, runs, False, place, name, config.adapters, args.quantisation)
    if args.offload:
        offload(pipe, args.offload, device)
    pipe.set_progress_bar_config()  # an evaluation shows no bar of its own for each image
    return pipe, config.resolve_visibility(), config.resolve_sizes()[0]


def _estimate(args: argparse.Namespace) -> int:
    announce_import("PyTorch", "torch")
    import torch

    from uniref_fast import EditRequest, builtin, estimate
    from uniref_fast.flags import parse_keep_references
    from uniref_fast.gpu_memory import fits, fits_text
    from uniref_fast.loading import model_errors
    from uniref_fast.request import parse_size

    memory = args.gpu_memory
    if memory is not None and not 0 < memory < math.inf:
        raise UsageError(f"--gpu-memory is a number of GB above 0, got {memory:g}")
    if args.offload and (args.mode == "fast" or args.quantisation):
        raise UsageError(f"--offload {args.offload} needs the weights as they are stored, without --mode fast and "
                         "--quantisation")  # fmt: skip
    sizes = [_image(path).size() for path in args.image] + [parse_size(text) for text in args.image_size]
    request = EditRequest(**_request_fields(args))
    keep = parse_keep_references(args.keep_references)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device.startswith("cpu") else torch.bfloat16
    with model_errors(args.model) as place, running(f"reading the configuration of {args.model}"):
        pipe: Any = place
        if args.model == "builtin":
            pipe = builtin.load(dtype) if args.quantisation is None else builtin.store.model_folder()
        result = estimate(
            pipe, [request], image_sizes=[sizes], budget=args.budget, device=device, mode=args.mode,
            keep_references=keep, drift=args.drift, keep_dtype=args.keep_dtype, quantisation=args.quantisation,
            offload=args.offload,
        )  # fmt: skip
    if args.json:
        print(json.dumps(result.as_dict() | {"fits": None if memory is None else fits(result.peak_bytes, memory)}))
    else:
        print(result if memory is None else f"{result}\nfits        {fits_text(result.peak_bytes, memory)}")
    return 0


def _plot(args: argparse.Namespace) -> int:
    announce_import("Matplotlib", "matplotlib")
    from uniref_fast.training.core.plots import plot

    try:
        with running("drawing"):
            plot(args.runs, args.out, args.keys, args.smooth)
    except OSError as error:  # a folder without metrics, or a file that cannot be written
        raise UsageError(str(error)) from error
    print(args.out)
    return 0


def _families(args: argparse.Namespace) -> int:
    announce_import("PyTorch", "torch")
    from uniref_fast.family_table import facts, report

    found = facts()
    print(json.dumps(found) if args.json else report(found))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    announce_import("PyTorch", "torch")
    from uniref_fast.doctor import facts, report

    with running("examining the installation"):
        found = facts()
    print(json.dumps(found) if args.json else report(found))
    return 0


# ---- helpers ----


def _request_fields(args: argparse.Namespace) -> dict[str, Any]:
    from uniref_fast.guidance import negative_prompt_for
    from uniref_fast.loading import defaults, model_family

    (steps, scale), family, negative = defaults(args.model), model_family(args.model), args.negative_prompt
    scale = scale if args.true_cfg_scale is None else args.true_cfg_scale
    if negative is None:
        negative = negative_prompt_for(scale, family.usual_negative_prompt())
    return {
        "prompt": family.written(args.prompt),
        "negative_prompt": negative,
        "true_cfg_scale": scale,
        "height": args.height,
        "width": args.width,
        "num_inference_steps": steps if args.num_inference_steps is None else args.num_inference_steps,
        "num_images": args.num_images,
    }


def _image(path: str) -> ImageSource:
    """Return the image at a path, which is read later. Raises UsageError if there is no such file."""
    from uniref_fast.data.images import ImageSource

    try:
        exists = Path(path).is_file()
    except OSError as error:
        raise UsageError(f"{path} cannot be read as an image: {error.strerror}") from None
    if not exists:
        raise UsageError(f"{path} is not an image file" if Path(path).exists() else f"no such image file: {path}")
    return ImageSource(path, Path(path))


def _writable(path: Path, suffixes: Sequence[str] | None = None) -> None:
    """Raise UsageError, before any work, if a result could not be written to the path."""
    from PIL import Image

    known = {ext: fmt for ext, fmt in Image.registered_extensions().items() if fmt in Image.SAVE}
    if path.suffix.lower() not in (suffixes or known):
        few = ", ".join(suffixes or (".png", ".jpg", ".webp"))
        raise UsageError(f"--out {path}: the ending of the name decides the format and must be one of {few}")
    try:
        Image.new("RGB", (1, 1)).save(io.BytesIO(), known[path.suffix.lower()])
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"--out {path}: that format cannot hold the image ({error}); use .png, .jpg or .webp"
        ) from None
    if path.is_dir():
        raise UsageError(f"--out {path} is a folder; give the name of a file")
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UsageError(f"--out {path}: {nearest} is not a writable folder")


def _numbered(path: Path, number: int) -> Path:
    """Return the path of one of several images."""
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def _save(image: Any, path: Path) -> None:
    """Write an image completely or not at all, in the format that the ending of its name chooses."""
    from PIL import Image

    from uniref_fast.encode import saveable

    form = Image.registered_extensions().get(path.suffix.lower())
    image = saveable(image, form)
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
        raise UsageError(f"device {device!r} is not available: PyTorch finds no CUDA device; use cpu")


if __name__ == "__main__":
    sys.exit(main())
