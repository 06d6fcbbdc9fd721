"""What every training run does around its steps: plan the stages, look, save, resume, export, survive signals."""

from __future__ import annotations

import contextlib
import json
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uniref_fast.estimate import transformer_flops
from uniref_fast.flags import to_json
from uniref_fast.layout import Sample
from uniref_fast.training.core.checkpoint import Checkpoints
from uniref_fast.training.core.distributed import Ranks, global_norm, scale_gradients
from uniref_fast.training.core.ema import MovingAverage
from uniref_fast.training.core.memory import MemoryPlan, device_memory, plan_memory
from uniref_fast.training.core.model import ExportError, TrainedModel
from uniref_fast.training.core.monitor import Monitor, peak_flops
from uniref_fast.training.core.recipe import Recipe, stage_at

__all__ = ["DivergedError", "Trainer"]


class DivergedError(RuntimeError):
    """Too many steps in a row had a NaN or infinite loss or gradient."""


class Trainer:
    """One process of a run; a subclass says what a step is.

    Args:
        config: of the run; data and heldout are paths by now.
        ranks: of the run.
        out: folder of the run.
        resume: step of the checkpoint to resume from, which `Checkpoints.newest` has verified, or None.

    Attributes:
        saved: what the checkpoint kept of a subclass's `state()`; empty at the start of a run.

    Raises:
        ValueError: for a stage that does not fit.
    """

    def __init__(self, config: Recipe, ranks: Ranks, out: Path, resume: int | None = None) -> None:
        self.config, self.ranks, self.out = config, ranks, out
        self.model = TrainedModel(config, ranks)
        self.parameters = list(self.model.parameters.values())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=1.0, betas=config.betas, weight_decay=config.weight_decay, foreach=True
        )
        self.average = None if config.ema is None else MovingAverage(self.model.parameters, config.ema)
        self.checkpoints = Checkpoints(out / "checkpoints", ranks, config.keep)
        self.stage = -1
        self.step = 0
        self.skipped = 0  # in a row
        self.signalled = False  # this process was asked to stop
        self.stopping = False  # all agreed to
        self.saved_at = resume  # step of the last checkpoint
        self._announced: list[tuple[str, dict[str, Any]]] = []  # events of before the monitor was opened
        self.saved: dict[str, Any] = {} if resume is None else self._load(resume)
        self.plans = self._plans({(side, target): tokens for side, target, tokens in self.saved.get("packs", ())})
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

    # ---- what a subclass says ----

    def train_step(self) -> bool:
        """Do step `self.step`; False when a signal came before it had any effect. All ranks agree."""
        raise NotImplementedError

    def validate(self, figures: bool, grid: bool) -> bool:
        """Held-out figures and sample grids, at the averaged weights; False when a signal ended it. All ranks agree."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside weights and optimizer, for JSON."""
        raise NotImplementedError

    def preflight(self) -> None:
        """Refuse what shows only once everything is built; nothing is written yet. All ranks.

        Raises:
            ValueError: saying what is wrong.
        """
        self.agreed(self.monitor.validate)

    def agreed(self, check: Callable[[], None]) -> None:
        """Run a check that may raise ValueError on some ranks, and raise it on all."""
        problem = None
        try:
            check()
        except ValueError as error:
            problem = str(error)
        for found in self.ranks.gather(problem):
            if found:
                raise ValueError(found)

    def begin(self) -> None:
        """Before the first step of this process, with the monitor open."""

    def finished(self) -> None:
        """After the last, with the monitor open."""

    def close(self) -> None:
        """Whatever happened."""

    # ---- the loop ----

    def run(self) -> bool:
        """Train to the last step; False when a signal ended it before. A checkpoint then holds what was done."""
        try:
            with self.monitor, self._signals():
                for kind, details in self._announced:
                    self.monitor.event(self.step, kind, **details)
                self.begin()
                self._validate(self.step == self.config.total_steps, resumed=True)
                while self.step < self.config.total_steps and not self.stopping:
                    self._enter_stage()
                    if not self.train_step():
                        self.stopping = True
                        self._save()
                        break
                    self.step += 1
                    done = self.step == self.config.total_steps
                    if self.step % self.config.save_every == 0 or done or self.stopping:
                        self._save()
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
            with self._averaged():
                self.model.export(self.out)
        except ExportError as error:
            raise ExportError(
                f"{error}. All steps are done and {self.checkpoints.path(self.step)} holds them: make room, then give "
                "the same command with --resume auto, which writes the weights"
            ) from error

    def _enter_stage(self) -> None:
        number, stage = stage_at(self.config, self.step)  # of the last step once all are done
        if number != self.stage:
            self.stage, plan = number, self.plans[number]
            self.ranks.share_sequences(self.model.packed, plan.sequence_parallel)
            self.model.packed.checkpointing = plan.checkpointing
            self.monitor.event(
                self.step, "stage", number=number, side=stage.side, pack_tokens=plan.pack_tokens, plan=plan.reason
            )

    def announce(self, kind: str, **details: Any) -> None:
        """Record an event as soon as the monitor is open."""
        self._announced.append((kind, details))

    def _validate(self, done: bool = False, resumed: bool = False) -> None:
        """Evaluate on held-out rows where it is due at this step.

        A resumed run makes what the folder lacks for its step: the run may have ended during the evaluation.
        """
        config = self.config
        figures = config.eval_every and (self.step % config.eval_every == 0 or done)
        grid = config.sample_every and ((self.step and self.step % config.sample_every == 0) or done)
        if resumed and (figures or grid):
            monitor = self.monitor
            found = monitor.logged(self.step, "eval/"), monitor.has_image(self.step, "heldout")
            logged, drawn = self.ranks.broadcast(found)
            figures, grid = figures and not logged, grid and not drawn
        if figures or grid:
            self._enter_stage()
            self.model.packed.eval()
            with self._averaged():
                complete = self.validate(bool(figures), bool(grid))
            self.model.packed.train()
            if not complete:
                self.stopping = True
                self._save()

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        return self.average.applied() if self.average and self.step else contextlib.nullcontext()

    def take_step(self, norm: float) -> None:
        """Clip the gradients and let the optimizer step."""
        if norm > self.config.max_grad_norm > 0:
            scale_gradients(self.parameters, self.config.max_grad_norm / norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr(self.step)
        self.optimizer.step()

    def norm(self) -> float:
        return global_norm(self.parameters)

    def finite(self, norm: float, loss: float, rows: Callable[[], list[str]]) -> bool:
        """Whether the step may be taken; otherwise it is skipped, counted and named.

        Args:
            norm, loss: of the step.
            rows: names what it was taken on.

        Raises:
            DivergedError: after `max_skipped` in a row.
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
        """Everything that training changes, by name; makes the optimizer's state where there is none yet."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.model.parameters.items():
            state = self.optimizer.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(parameter) for _ in range(2))
            tensors |= {f"{part}.{name}": state[part] for part in ("exp_avg", "exp_avg_sq")}
            tensors[f"model.{name}"] = parameter.detach()
            if self.average is not None:
                tensors[f"average.{name}"] = self.average.average[name]
        return tensors

    def _save(self) -> None:
        """Write a checkpoint of this step, unless it is the one that was written or resumed from last."""
        if self.saved_at == self.step:
            return
        updates = [int(self.optimizer.state[p]["step"]) if self.optimizer.state[p] else 0 for p in self.parameters]
        stages = zip(self.config.stages, self.plans, strict=True)
        packs = [(stage.side, stage.target_side, plan.pack_tokens) for stage, plan in stages]
        state = {
            **self.state(),
            "skipped": self.skipped,
            "updates": updates,
            "packs": packs,
            "config": json.loads(to_json(self.config)),
            "visibility": self.model.packed.visibility,
            "frozen": self.model.frozen,
        }
        path = self.checkpoints.save(self.step, self._tensors(), state)
        self.saved_at = self.step
        self.monitor.event(self.step, "checkpoint", path=path.name)

    def _load(self, step: int) -> dict[str, Any]:
        state = self.checkpoints.load(step, self._tensors(), verify=False)
        if state.get("frozen", self.model.frozen) != self.model.frozen:  # older checkpoints do not have it
            raise ValueError(
                f"the run in {self.out} was trained on top of other weights than those of model = {self.config.model}"
                f"{f' with initial = {self.config.initial}' if self.config.initial else ''}; give the model that it "
                "began with, or begin another run with another --out"
            )
        for parameter, updates in zip(self.parameters, state["updates"], strict=True):
            self.optimizer.state[parameter]["step"].fill_(updates)
        self.step, self.skipped = step, state["skipped"]
        return state

    # ---- planning ----

    def _plans(self, kept: Mapping[tuple[int, int], int]) -> list[MemoryPlan]:
        """Of each stage; a run that is gone on with keeps the packs that it had for the same sizes, however much memory
        there is now."""
        ranks, config = self.ranks, self.config
        memory = device_memory(ranks.device, config.memory_gib)
        if ranks.device.type == "cpu" and config.memory_gib is None:
            memory //= ranks.size
        plans = [
            plan_memory(
                replace(stage, pack_tokens=stage.pack_tokens or kept.get((stage.side, stage.target_side))),
                self.model.pipe.transformer.config,
                ranks=ranks.size,
                memory=memory,
                fixed=self.model.fixed_bytes(),
                sharded=self.model.sharded_bytes(),
                element=getattr(torch, config.dtype).itemsize,
                patch=self.model.pipe.vae_scale_factor * 2,
                sequences=config.sequences,
            )
            for stage in config.stages
        ]
        for plan in plans:
            if config.packs % (ranks.size // plan.sequence_parallel):
                raise ValueError(
                    f"packs = {config.packs} cannot be shared equally by {ranks.size // plan.sequence_parallel} groups "
                    f"of ranks ({ranks.size} ranks, {plan.sequence_parallel} a pack)"
                )
        return self.ranks.broadcast(plans)

    def wait(self) -> None:
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()

    def flops(self, samples: tuple[Sample, ...]) -> int:
        return sum(transformer_flops(self.model.pipe.transformer.config, self.model.packed.layout(samples)))

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the run after the step, with a checkpoint; a second one ends it at once."""

        def stop(number: int, frame: Any) -> None:
            self.signalled = True
            signal.signal(number, before[number])

        before: dict[int, Any] = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
