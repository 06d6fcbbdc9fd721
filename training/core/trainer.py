"""The base of every trainer: planning, validation, checkpoints, export and signals around the steps."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uniref_fast.costs import transformer_flops
from uniref_fast.data.dataset import Dataset
from uniref_fast.flags import to_json
from uniref_fast.layout import Sample
from uniref_fast.loading import inference_mode
from uniref_fast.progress import running
from uniref_fast.request import image_areas
from uniref_fast.training.core.checkpoint import Checkpoints, read_state
from uniref_fast.training.core.distributed import Ranks, global_norm, scale_gradients
from uniref_fast.training.core.ema import MovingAverage
from uniref_fast.training.core.export import ExportError
from uniref_fast.training.core.memory import MemoryPlan, check_packs, device_memory, plan_memory, plan_stages
from uniref_fast.training.core.model import TrainedModel
from uniref_fast.training.core.monitor import Monitor, peak_flops
from uniref_fast.training.core.optimizer import make_optimizer
from uniref_fast.training.core.recipe import Recipe, stage_at
from uniref_fast.training.core.sampling import PromptSamples, prompt_rows

__all__ = ["DivergedError", "Trainer", "kept_packs"]

PROMPTS = "prompts"  # name of the grid of the user's own prompts


class DivergedError(RuntimeError):
    """The loss or the gradient was NaN or infinite for too many steps in a row."""


def kept_packs(state: Mapping[str, Any]) -> dict[tuple[int | None, int], int]:
    """Return the tokens of a pack by the (budget, target_side) of its stage, from the state of a checkpoint.

    Args:
        state: State of the checkpoint; empty at the start of a run.
    """
    return {(budget, target): tokens for budget, target, tokens in state.get("packs", ())}


class Trainer:
    """One process of a run. A subclass defines the step, the validation, and what a checkpoint holds besides weights.

    Args:
        config: Configuration of the run, as `launch` has resolved it: `data` and `heldout` are paths, and `visibility`
            is set.
        ranks: Ranks of the run.
        out: Folder of the run.
        resume: Step of the checkpoint to resume from, which `Checkpoints.newest` has verified; None starts a run.

    Attributes:
        progress: Display of the work that runs now.
        saved: State of the checkpoint, with what the subclass's `state()` returned; empty at the start of a run.

    Raises:
        ValueError: A stage does not fit the memory, or the checkpoint belongs to other weights.
    """

    def __init__(self, config: Recipe, ranks: Ranks, out: Path, resume: int | None = None) -> None:
        self.config, self.ranks, self.out = config, ranks, out
        self.progress = running(shown=ranks.rank == 0)  # of the work that runs now
        self.checkpoints = Checkpoints(out / "checkpoints", ranks, config.keep)
        self._announced: list[tuple[str, dict[str, Any]]] = []  # events from before the monitor was opened
        self.prompt_samples: PromptSamples | None = None
        prompts = prompt_rows(config)  # a wrong file is reported before the model is loaded
        self.model = TrainedModel(config, ranks, functools.partial(self._open, resume, prompts))
        self.parameters = list(self.model.parameters.values())
        self.optimizer = make_optimizer(config, self.model.parameters)
        self.average = None if config.ema is None else MovingAverage(self.model.parameters, config.ema)
        self.stage = -1
        self.step = 0
        self.skipped = 0  # steps in a row
        self.signalled = 0  # number of the signal that this process received
        self.stopping = False  # all ranks have agreed to stop
        self.saved_at = resume  # step of the last checkpoint
        self.saved: dict[str, Any] = {} if resume is None else self._load(resume)
        self.plans = self._plans(kept_packs(self.saved))
        peak = peak_flops(ranks.device, getattr(torch, config.dtype))
        self.monitor = Monitor(
            out,
            config.total_steps,
            self.step,
            enabled=ranks.rank == 0,
            tensorboard=config.tensorboard,
            wandb=config.wandb,
            flops_per_second=peak and peak * ranks.size,
        )

    def _open(self, resume: int | None, prompts: Dataset | None, model: TrainedModel) -> None:
        """Open the rows of the run while the transformer is in host memory, and encode them if encoders are freed."""
        self.model = model
        state = {} if resume is None else read_state(self.checkpoints.path(resume))["state"]
        self.open_rows(resume or 0, state)
        if prompts is not None:
            self.prompt_samples = PromptSamples(prompts, self.config, model)
            if self.config.resolve_encoders() == "free":
                self.prompt_samples.encode_texts()

    @property
    def cache_folder(self) -> Path | None:
        """Folder of encoded images and prompts: `cache`, or one of the run if its encoders are freed."""
        return (self.config.cache or self.out / "cache") if self.config.has_cache else None

    # ---- defined by a subclass ----

    def open_rows(self, step: int, state: Mapping[str, Any]) -> None:
        """Open the rows of the run; if `encoders` are freed, encode all rows that the run uses from a step on.

        The encoders can be used, and nothing is on the device yet.

        Args:
            step: Step that the run continues from.
            state: State of its checkpoint; empty at the start of a run.
        """
        raise NotImplementedError

    def train_step(self) -> bool:
        """Run step `self.step` on all ranks.

        Returns:
            False if a signal ended the step before it had any effect; all ranks return the same.
        """
        raise NotImplementedError

    def validate(self, figures: bool, grid: bool) -> bool:
        """Evaluate on held-out rows, on all ranks. The model holds the averaged weights.

        Args:
            figures: Log the held-out loss or rewards.
            grid: Log a picture of samples.

        Returns:
            False if a signal ended the evaluation; all ranks return the same.
        """
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds besides weights and optimizer, for JSON."""
        raise NotImplementedError

    def preflight(self) -> None:
        """Check, on all ranks, what can only be checked once everything is built. Nothing has been written yet.

        Raises:
            ValueError: The run cannot start.
        """
        self.agreed(self.monitor.validate)

    def agreed(self, check: Callable[[], None]) -> None:
        """Run a check on all ranks; if it raises ValueError on some of them, raise it on all."""
        problem = None
        try:
            check()
        except ValueError as error:
            problem = str(error)
        for found in self.ranks.gather(problem):
            if found:
                raise ValueError(found)

    def begin(self) -> None:
        """Run before the first step of this process, when the monitor is open."""

    def finished(self) -> None:
        """Run after the last step of this process, while the monitor is open."""

    def close(self) -> None:
        """Release threads and connections, also after an error."""

    # ---- the loop ----

    def run(self) -> bool:
        """Train to the last step and export the weights.

        Returns:
            False if a signal ended the run before; a checkpoint then holds the steps that are done.
        """
        try:
            with self.monitor, self._signals():
                for kind, details in self._announced:
                    self.monitor.event(self.step, kind, **details)
                self.begin()
                # A run that was killed during an evaluation has the checkpoint of that step, but not its figures.
                self._validate(self.step == self.config.total_steps, resumed=True)
                while self.step < self.config.total_steps and not self.stopping:
                    self._enter_stage()
                    # kernels are compiled in the first step of this process; the monitor shows that later ones end
                    first = self.step == self.monitor.start_step
                    with self.progress.of(f"step {self.step + 1}", 1.0 if first else 10.0):
                        complete = self.train_step()
                    if not complete:  # nothing of the step has happened: the checkpoint is that of before
                        self.stopping = True
                        self.save()
                        break
                    self.step += 1
                    done = self.step == self.config.total_steps
                    # The checkpoint is written before the evaluation, which may take long or be killed. After a signal
                    # there is no time for an evaluation: the resumed run does it first.
                    if self.step % self.config.save_every == 0 or done or self.stopping:
                        self.save()
                    if not self.stopping:
                        self._validate(done)
                if not self.stopping:
                    self._export()
                self.finished()
        finally:
            self.close()
        return not self.stopping

    def _export(self) -> None:
        try:
            with self._averaged(), self.progress.of("writing the trained weights"):
                self.model.export(self.out)
        except ExportError as error:
            raise ExportError(
                f"{error}. All steps are done and {self.checkpoints.path(self.step)} holds them: make room, then run "
                "the same command with --resume auto, which writes the weights"
            ) from error

    def _enter_stage(self) -> None:
        number, stage = stage_at(self.config, self.step)  # after the last step: the last stage
        if number != self.stage:
            self.stage, plan = number, self.plans[number]
            self.ranks.share_sequences(self.model.packed, plan.sequence_parallel)
            self.model.packed.checkpointing = plan.checkpointing
            self.monitor.event(
                self.step, "stage", number=number, budget=stage.budget, pack_tokens=plan.pack_tokens, plan=plan.reason
            )

    def announce(self, kind: str, **details: Any) -> None:
        """Record an event as soon as the monitor is open."""
        self._announced.append((kind, details))

    def _validate(self, done: bool = False, resumed: bool = False) -> None:
        """Evaluate on held-out rows if it is due at this step.

        Args:
            done: All steps are done.
            resumed: The run resumes at this step; only what the folder lacks is evaluated.
        """
        config = self.config
        figures = config.eval_every and (self.step % config.eval_every == 0 or done)
        grid = config.sample_every and (self.step % config.sample_every == 0 or done)
        prompts = grid and self.prompt_samples is not None
        if resumed and (figures or grid):
            monitor = self.monitor
            found = monitor.logged(self.step, "eval/"), *(monitor.has_image(self.step, n) for n in ("heldout", PROMPTS))
            logged, drawn, prompts_drawn = self.ranks.broadcast(found)
            figures, grid, prompts = figures and not logged, grid and not drawn, prompts and not prompts_drawn
        if figures or grid or prompts:
            self._enter_stage()
            self.model.packed.eval()
            with self._averaged(), self.progress.of(f"validating at step {self.step}"):
                complete = self.validate(bool(figures), bool(grid)) if figures or grid else True
                if complete and prompts and self.prompt_samples is not None:
                    plan = self.plans[self.stage]
                    sheet = self.prompt_samples.grid(plan.pack_tokens // plan.sequence_parallel)
                    self.monitor.image(self.step, PROMPTS, sheet)
            self.model.packed.train()
            inference_mode(self.model.pipe.transformer)  # the layers of the adapter stay out of training mode
            if not complete:
                self.stopping = True
                self.save()

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        return self.average.applied() if self.average and self.step else contextlib.nullcontext()

    def take_step(self, norm: float) -> None:
        """Clip the gradients, set the learning rate, and step the optimizer."""
        if norm > self.config.max_grad_norm > 0:
            scale_gradients(self.parameters, self.config.max_grad_norm / norm)
        for group in self.optimizer.groups:
            group["lr"] = self.config.lr(self.step)
        self.optimizer.step()

    def norm(self) -> float:
        """Return the norm of all gradients over all ranks."""
        return global_norm(self.parameters)

    def finite(self, norm: float, loss: float, rows: Callable[[], list[str]]) -> bool:
        """Return True if the step may be taken; otherwise count it as skipped and record an event.

        Args:
            norm: Gradient norm of the step.
            loss: Loss of the step.
            rows: Function that returns the places of the rows of the step.

        Raises:
            DivergedError: `max_skipped` steps in a row were skipped.
        """
        if math.isfinite(norm) and math.isfinite(loss):
            self.skipped = 0
            return True
        self.skipped += 1
        places = rows()
        self.monitor.event(self.step, "skipped", loss=loss, grad_norm=norm, in_a_row=self.skipped, rows=places)
        if self.skipped >= self.config.max_skipped:
            raise DivergedError(
                f"{self.skipped} steps in a row had a loss or gradient that is not finite; the last was step "
                f"{self.step} (loss {loss}, gradient norm {norm}) on {', '.join(places[:8])}. Nothing of these steps "
                "was kept; resume with a lower lr"
            )
        return False

    # ---- saving ----

    def _tensors(self) -> dict[str, Tensor]:
        """Return every tensor that training changes, by name; create the optimizer's state where there is none yet."""
        tensors = self.optimizer.tensors()
        for name, parameter in self.model.parameters.items():
            tensors[f"model.{name}"] = parameter.detach()
            if self.average is not None:
                tensors[f"average.{name}"] = self.average.average[name]
        return tensors

    def save(self) -> None:
        """Write a checkpoint of this step, unless the last checkpoint written or loaded is of this step."""
        if self.saved_at == self.step:
            return
        stages = zip(self.config.stages, self.plans, strict=True)
        packs = [(stage.budget, stage.target_side, plan.pack_tokens) for stage, plan in stages]
        state = {
            **self.state(),
            "skipped": self.skipped,
            "updates": self.optimizer.updates(),
            "packs": packs,
            "config": json.loads(to_json(self.config)),
            "visibility": self.config.visibility or "full",
            "frozen": self.model.frozen,
        }
        with self.progress.of(f"writing the checkpoint of step {self.step}"):
            path = self.checkpoints.save(self.step, self._tensors(), state)
        self.saved_at = self.step
        self.monitor.event(self.step, "checkpoint", path=path.name)

    def _load(self, step: int) -> dict[str, Any]:
        with self.progress.of(f"reading the checkpoint of step {step}"):
            state = self.checkpoints.load(step, self._tensors(), verify=False)
        if state.get("frozen", self.model.frozen) != self.model.frozen:  # checkpoints of older versions lack it
            raise ValueError(
                f"the run in {self.out} was trained on top of other weights than those of model = {self.config.model}"
                f"{f' with initial = {self.config.initial}' if self.config.initial else ''}; give the model that the "
                "run started with, or start another run with another --out"
            )
        self.optimizer.set_updates(state["updates"])
        self.step, self.skipped = step, state["skipped"]
        return state

    # ---- planning ----

    def _plans(self, kept: Mapping[tuple[int | None, int], int]) -> list[MemoryPlan]:
        """Plan the memory of each stage, on all ranks.

        Args:
            kept: Tokens of a pack by (budget, target_side), of the run that is resumed. It keeps them, however much
                memory there is now, so that its batches do not change.
        """
        ranks, config = self.ranks, self.config
        memory = device_memory(ranks.device, config.memory_gib)
        if ranks.device.type == "cpu" and config.memory_gib is None:
            memory //= ranks.size
        model = self.model
        stages = [replace(stage, pack_tokens=stage.pack_tokens or kept.get((stage.budget, stage.target_side)))
                  for stage in config.stages]  # fmt: skip
        plan = functools.partial(
            plan_memory,
            size=model.size,
            ranks=ranks.size,
            memory=memory,
            fixed=model.fixed_bytes(),
            sharded=model.sharded_bytes(),
            element=getattr(torch, config.dtype).itemsize,
            gathered=model.gathered_bytes(),
            update=model.update_bytes(),
            freed=model.freed_bytes(),
            patch=model.family.token_side(model.pipe),
            sequences=config.sequences,
            reference_area=image_areas(model.pipe)[1],
        )
        plans = plan_stages(stages, plan)
        check_packs(config.packs, ranks.size, plans)
        return self.ranks.broadcast(plans)

    def wait(self) -> None:
        """Wait until the device has finished, so that the time can be taken."""
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()

    def flops(self, samples: tuple[Sample, ...]) -> int:
        """Return the floating-point operations of one forward of a pack."""
        config, layout = self.model.pipe.transformer.config, self.model.packed.layout(samples)
        return sum(transformer_flops(config, layout, family=self.model.family))

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Let SIGTERM and SIGINT end the run after this step, with a checkpoint; a second signal ends it at once."""

        def stop(number: int, frame: Any) -> None:
            self.signalled = number
            signal.signal(number, before[number])

        before: dict[int, Any] = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
