"""Metrics, events, sample images and the progress bar of a run.

    with Monitor(folder, total_steps=1000, start_step=resumed_at, enabled=rank == 0) as monitor:
        monitor.step(step, {"loss": 0.12, "lr": 1e-4}, tokens=32768, samples=9, flops=3e15, seconds=1.2)
        monitor.event(step, "checkpoint", path="checkpoints/000100")

The folder of the run then holds, in addition to the trainer's own files:

    metrics.jsonl                  a line per step: {"step": 100, "loss": 0.12, ..., "tokens_per_second": 27306.7}
    events.jsonl                   a line per event: {"step": 100, "kind": "checkpoint", "path": ...}
    samples/<name>-<step>.png
    tensorboard/
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from uniref_fast.files import RecordFile, keep_records, read_records, write_whole

if TYPE_CHECKING:
    import torch
    from PIL import Image

__all__ = ["GroupedMean", "Monitor", "peak_flops"]

COUNTED = ("tokens", "samples", "flops", "seconds")
DERIVED = ("tokens_per_second", "samples_per_second", "mfu")
IMAGE = re.compile(r"\w[\w.-]*-(\d{6,})\.png")
QUIET_SECONDS = 10.0  # without a printed line, after which every step prints one
RESERVED = frozenset(("step", *COUNTED, *DERIVED))


class Monitor:
    """Progress, metrics, events and sample images of one run; a context manager.

    A folder that holds an earlier part of the run is continued. Metrics written after the checkpoint that training
    resumes from are cut off first, so that a curve has no step twice; an event "resume" says how many. These are the
    training steps at or after `start_step`; what was logged at `start_step` itself describes the state that is
    resumed and stays, except at step 0, where the run starts from the beginning. Images of later steps are removed as
    well. Events stay, as the history of the run.

    Args:
        folder: Folder of the run; it is created if it is missing.
        total_steps: Training steps of the whole run; they are numbered from 0.
        start_step: First step of this process: 0, or the step of the checkpoint.
        enabled: False on ranks other than 0: every method then does nothing.
        tensorboard: Also write `tensorboard/`; if the package is missing, a line reports it and training continues.
        wandb: Also log to Weights & Biases, project "uniref_fast"; a continued folder continues its run there.
        flops_per_second: Peak of the devices that compute the `flops` given to `step`, see `peak_flops`; None logs no
            MFU.
        print_every: Steps between two printed lines if stderr is not a terminal, where a line also follows every step
            that ends ten seconds or more after the last line; a terminal gets a progress bar.

    Raises:
        ValueError: Steps are impossible; on entry, a metrics or events file is damaged in a way that no kill explains.
        ImportError: `wandb` is True and the package is missing.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        total_steps: int,
        start_step: int = 0,
        enabled: bool = True,
        tensorboard: bool = True,
        wandb: bool = False,
        flops_per_second: float | None = None,
        print_every: int = 10,
    ) -> None:
        if not 0 <= start_step <= total_steps:
            raise ValueError(f"start_step must be 0 to total_steps = {total_steps}, got {start_step}")
        if print_every < 1:
            raise ValueError(f"print_every must be at least 1, got {print_every}")
        if flops_per_second is not None and not flops_per_second > 0:
            raise ValueError(f"flops_per_second must be positive, or None when it is unknown, got {flops_per_second}")
        self.folder = Path(folder)
        self.total_steps = total_steps
        self.start_step = start_step
        self.enabled = enabled
        self.flops_per_second = flops_per_second
        self.print_every = print_every
        self._tensorboard = tensorboard
        self._wandb = _import_wandb() if wandb and enabled else None
        self._next_step = start_step  # the least that `step` accepts
        self._exit = contextlib.ExitStack()
        self._sinks: list[Any] = []  # each with .values(step, dict) and .image(step, name, image)
        self._stream: TextIO = sys.stderr
        self._bar: tqdm | None = None
        self._printed = 0.0  # time of the last printed line
        self._files: dict[str, RecordFile] = {}  # "metrics" and "events", while open

    def __enter__(self) -> Monitor:
        if not self.enabled:
            return self
        self._stream = sys.stderr
        self.validate()
        paths = self._paths()
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        cut = keep_records(paths["metrics"], self._before_start)
        keep_records(paths["events"], lambda record: True)
        for path in (self.folder / "samples").glob("*.png"):
            if (match := IMAGE.fullmatch(path.name)) and int(match[1]) > self.start_step:
                path.unlink()
        resumed = self.start_step > 0 or cut > 0
        with contextlib.ExitStack() as stack:  # closes what is open already if the rest cannot be opened
            for name, path in paths.items():
                self._files[name] = stack.enter_context(contextlib.closing(RecordFile(path)))
            if self._tensorboard:
                self._open_tensorboard(stack, resumed)
            if self._wandb is not None:
                wandb = _Wandb(self._wandb, self.folder)
                stack.push(wandb.close)
                self._sinks.append(wandb)
            if self._stream.isatty():
                bar = {"total": self.total_steps, "initial": self.start_step, "unit": "step", "dynamic_ncols": True}
                self._bar = stack.enter_context(tqdm(file=self._stream, **bar))
            self._exit = stack.pop_all()
        if resumed:
            self.event(self.start_step, "resume", metrics_cut=cut)
        return self

    def validate(self) -> None:
        """Raise ValueError for a metrics or events file damaged otherwise than by a kill; nothing is written."""
        for path in self._paths().values() if self.enabled else ():
            if path.exists():
                read_records(path)

    def _paths(self) -> dict[str, Path]:
        return {name: self.folder / f"{name}.jsonl" for name in ("metrics", "events")}

    def __exit__(self, *exception: Any) -> None:
        try:
            self._exit.__exit__(*exception)
        finally:
            self._bar, self._files, self._sinks = None, {}, []

    # ---- what a trainer calls ----

    def step(
        self, step: int, metrics: Mapping[str, Any], *, tokens: int, samples: int, flops: float, seconds: float
    ) -> None:
        """Record one training step and move the progress bar past it.

        Args:
            step: Number of the step, above every number recorded before.
            metrics: Values by name, numbers or tensors of one element; a slash groups values: "loss_by_k/3".
            tokens: Number of tokens trained on, without padding.
            samples: Number of samples trained on.
            flops: Floating-point operations of forward and backward, without recomputation, by the devices whose peak
                is `flops_per_second`; for MFU.
            seconds: Duration of the step.

        Raises:
            ValueError: The step is out of order, its duration is not positive, or a metric has a name that this method
                adds itself (tokens_per_second, samples_per_second, mfu, and the names of its arguments).
        """
        if not self.enabled:
            return
        if step < self._next_step:
            raise ValueError(f"step {step} is out of turn: the next one is {self._next_step} or later")
        if not 0 < seconds < math.inf:
            raise ValueError(f"seconds of step {step} must be positive, got {seconds}")
        counts = {"tokens": tokens, "samples": samples, "flops": flops, "seconds": seconds}
        rates = {"tokens_per_second": tokens / seconds, "samples_per_second": samples / seconds}
        if self.flops_per_second is not None:
            rates["mfu"] = flops / seconds / self.flops_per_second
        values = _numbers(metrics, step)
        self._record(step, {**values, **rates, **counts})
        self._next_step = step + 1
        self._show(step, {**values, **rates})

    def log(self, step: int, metrics: Mapping[str, Any], text: str | None = None) -> None:
        """Record and print values that belong to no training step of their own, such as a held-out loss ("eval/...").

        Args:
            step: Number of the step.
            metrics: Values by name, as in `step`.
            text: Description that is printed in place of the values.
        """
        if not self.enabled:
            return
        if step < self.start_step:
            raise ValueError(f"step {step} lies before start_step = {self.start_step}")
        values = _numbers(metrics, step)
        self._record(step, values)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._say(f"step {step}  {shown if text is None else text}")

    def event(self, step: int, kind: str, text: str | None = None, **details: Any) -> None:
        """Record and print something that happened: "skipped", "stage", "checkpoint", ..., with its details.

        Args:
            step: Number of the step.
            kind: Kind of the event.
            text: Description that is printed in place of the details, and is not recorded.
            details: Details that are recorded.
        """
        if not self.enabled:
            return
        self._opened("events").append({"step": step, "kind": kind, **details})
        shown = "".join(f"  {name}={_short(value)}" for name, value in details.items()) if text is None else f": {text}"
        self._say(f"step {step}  {kind}{shown}")

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """Write `samples/<name>-<step>.png`, whole or not at all, and show it in TensorBoard."""
        if not self.enabled:
            return
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"an image's name is part of a file's: letters, digits and _.- only, got {name!r}")
        self._opened("metrics")
        path = self._image_path(step, name)
        write_whole(path, lambda file: image.save(file, format="PNG"))
        for sink in self._sinks:
            sink.image(step, name, image.convert("RGB"))

    def logged(self, step: int, prefix: str) -> bool:
        """Return True if a value whose name begins with `prefix` is recorded for a step."""
        if not self.enabled:
            return False
        records = read_records(self.folder / "metrics.jsonl")
        return any(record["step"] == step and any(name.startswith(prefix) for name in record) for record in records)

    def has_image(self, step: int, name: str) -> bool:
        """Return True if `samples/<name>-<step>.png` was written, in this part of the run or an earlier one."""
        return self.enabled and self._image_path(step, name).exists()

    # ---- implementation ----

    def _image_path(self, step: int, name: str) -> Path:
        return self.folder / "samples" / f"{name}-{step:06d}.png"

    def _before_start(self, record: dict[str, Any]) -> bool:
        """Return True if the record belongs to the history of the state at `start_step`."""
        logged = "seconds" not in record
        return record["step"] < self.start_step or (logged and record["step"] == self.start_step > 0)

    def _open_tensorboard(self, stack: contextlib.ExitStack, resumed: bool) -> None:
        try:
            sink = _TensorBoard(self.folder / "tensorboard", self.start_step if resumed else None)
        except ImportError as error:
            self._say(
                f"TensorBoard is off ({error}): pip install tensorboard; metrics.jsonl has all that it would show"
            )
            return
        stack.callback(sink.close)
        self._sinks.append(sink)
        for record in read_records(self.folder / "metrics.jsonl"):
            if record["step"] == self.start_step:  # logged there, and hidden with the steps that are taken again
                sink.values(self.start_step, {name: float(x) for name, x in record.items() if name != "step"})

    def _record(self, step: int, values: dict[str, float]) -> None:
        self._opened("metrics").append({"step": step, **values})
        for sink in self._sinks:
            sink.values(step, values)

    def _opened(self, name: str) -> RecordFile:
        if name not in self._files:
            raise RuntimeError("the monitor is not open; use it as `with Monitor(...) as monitor:`")
        return self._files[name]

    def _show(self, step: int, values: dict[str, float]) -> None:
        shown = [name for name in values if name in ("loss", "reward", "lr") or name.startswith("reward/")]
        parts = [f"{name.removeprefix('reward/')} {values[name]:.4g}" for name in shown]
        parts.append(f"{tqdm.format_sizeof(values['tokens_per_second'])} tokens/s")
        parts.append(f"{values['samples_per_second']:.3g} samples/s")
        if "mfu" in values:
            parts.append(f"MFU {values['mfu']:.1%}")
        text, done = ", ".join(parts), step + 1
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
        elif (
            done % self.print_every == 0
            or done == self.total_steps
            or step == self.start_step
            or time.monotonic() - self._printed >= QUIET_SECONDS
        ):
            self._say(f"step {done}/{self.total_steps}  {text}")

    def _say(self, line: str) -> None:
        self._printed = time.monotonic()
        if self._bar is not None:
            tqdm.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)


class GroupedMean:
    """Means by group, such as the loss by number of references, over the values added since the last `reduce`.

    Args:
        name: Prefix of the groups in the result: "loss_by_k" gives "loss_by_k/1", "loss_by_k/2", ... .
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._totals: dict[str, tuple[float, float]] = {}

    def add(self, group: object, value: float, weight: float = 1.0) -> None:
        """Add a value of a group, with a weight above 0."""
        if not weight > 0:
            raise ValueError(f"a weight must be positive, got {weight} for {self.name}/{group}")
        total, count = self._totals.get(str(group), (0.0, 0.0))
        self._totals[str(group)] = total + float(value) * weight, count + weight

    def reduce(self) -> dict[str, float]:
        """Return the means in the order of the groups' names, and forget all values."""
        totals, self._totals = self._totals, {}
        return {f"{self.name}/{group}": total / weight for group, (total, weight) in sorted(totals.items())}


# Dense (no sparsity) bf16 peaks with fp32 accumulation, FLOP/s. A line serves names that hold all its words, so
# the special ones come first. fp16 has the same peak on all of them.
PEAKS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("H200", "NVL"), 836e12),  # H200 datasheet: 1,671 with sparsity
    (("H200",), 989e12),  # H200 datasheet: 1,979 with sparsity
    (("GH200",), 989e12),  # Grace Hopper datasheet: 990
    (("H100", "PCIe"), 756e12),  # H100 PCIe product brief: 1,513 with sparsity
    (("H100", "NVL"), 836e12),  # H100 datasheet: 1,671 with sparsity
    (("H100",), 989e12),  # H100 datasheet, SXM: 1,979 with sparsity
    (("B200",), 2250e12),  # HGX B200 datasheet: 36 PFLOP/s with sparsity for eight
    (("GB200",), 2500e12),  # GB200 NVL72 datasheet: 360 PFLOP/s with sparsity for 72
    (("A100",), 312e12),  # A100 datasheet, PCIe and SXM
    (("L40S",), 362e12),  # L40S datasheet: 733 with sparsity
    (("L40",), 181e12),  # L40 datasheet
    (("L4",), 121e12),  # L4 datasheet: 242 with sparsity
    (("A40",), 150e12),  # A40 datasheet: 149.7
    (("4090",), 165e12),  # Ada architecture whitepaper: 165.2
    (("3090",), 71e12),  # GA102 architecture whitepaper
)
PARTIAL = {"MIG", "Laptop", "D", "Ti"}  # a slice of the chip, or another chip of nearly the same name


def peak_flops(device: torch.device | str, dtype: torch.dtype) -> float | None:
    """Return the dense matrix-product peak of a device in bf16 or fp16, in FLOP/s; None if it is not known."""
    import torch

    device = torch.device(device)
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    words = set(re.findall(r"[A-Za-z0-9]+", torch.cuda.get_device_name(device)))
    if words & PARTIAL:
        return None
    return next((peak for needed, peak in PEAKS if words.issuperset(needed)), None)


def _numbers(metrics: Mapping[str, Any], step: int) -> dict[str, float]:
    if taken := sorted(RESERVED & set(metrics)):
        raise ValueError(f"metrics of step {step} must not have the names {', '.join(taken)}: the monitor adds them")
    values = {}
    for name, value in metrics.items():
        try:
            values[name] = float(value)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"metric {name!r} of step {step} must be one number, got {type(value).__name__}") from None
    return values


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


# ---- TensorBoard and Weights & Biases ----


class _TensorBoard:
    """Scalars and images; on resume, what was written at or after `purge_step` is hidden."""

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=30)
        self.close = self._writer.close

    def values(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        import numpy as np

        self._writer.add_image(f"samples/{name}", np.asarray(image), step, dataformats="HWC")


class _Wandb:
    """One run per folder: its id is kept in `wandb_id`. "step" is a value like others, so that a resume may go back."""

    def __init__(self, module: Any, folder: Path) -> None:
        self._module = module
        kept = folder / "wandb_id"
        known = kept.read_text().strip() if kept.exists() else None
        self._run = module.init(
            project="uniref_fast", name=folder.resolve().name, id=known, resume="allow", dir=str(folder)
        )
        write_whole(kept, lambda file: file.write(f"{self._run.id}\n".encode()))
        self._run.define_metric("*", step_metric="step")

    def values(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def image(self, step: int, name: str, image: Image.Image) -> None:
        self._run.log({"step": step, f"samples/{name}": self._module.Image(image)})

    def close(self, kind: type[BaseException] | None, *rest: Any) -> None:
        self._run.finish(exit_code=0 if kind is None else 1)


def _import_wandb() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ImportError(f"wandb=True needs Weights & Biases ({error}): pip install wandb, or leave it off") from error
