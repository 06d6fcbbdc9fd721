"""CUDA graphs of denoising steps: a step is recorded once, and its kernels then run again without Python in between.

    graphs = StepGraphs(model)
    velocity = graphs(image, text, t, layout, kept, constants)    # as `model(...)`, with the same bits

A graph reads and writes fixed addresses, so it serves forwards with the same layout, prompt embeddings, weights,
adapters and stores of kept references, and with the same choice of references that are computed. Latents and times are
copied into buffers of the graph. The first forward of each kind runs as usual, which compiles kernels and fills tables;
the second one is recorded, and it and all later ones are replayed. The count of steps and the schedule of kept
references belong to the host, and are outside of the graphs.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from uniref_fast.layout import SelfLayout
from uniref_fast.memo import version_of
from uniref_fast.models.kept_references import KeptReferences, ReferenceRows
from uniref_fast.models.module_hooks import has_moving_hooks
from uniref_fast.models.pack_adapters import PackAdapters
from uniref_fast.models.packed import PackedModel
from uniref_fast.models.step_constants import StepConstants, weights_state

__all__ = ["MAX_GRAPHS", "StepGraphs", "check_capture"]

MAX_GRAPHS = 16
"""Largest number of graphs at a time: each one holds its launches, about 10 kB for a kernel, and its small buffers."""

FIRST = "the first of its kind"


def check_capture(model: PackedModel, device: torch.device) -> None:
    """Check that the steps of a model can be captured in CUDA graphs.

    Args:
        model: The packed model.
        device: Device on which it computes.

    Raises:
        ValueError: If they cannot; the message says why.
    """
    if device.type != "cuda":
        raise ValueError(f"capture needs a CUDA device, and the pipeline computes on {device}; leave capture out")
    if model.parallel is not None:
        raise ValueError("capture does not work under sequence parallelism, whose ranks communicate in every step")
    for name, module in _called_modules(model):
        if has_moving_hooks(module):
            raise ValueError(
                f"capture needs weights that stay on the device, and {name} has hooks of diffusers or accelerate, such "
                "as those of offloading and layerwise casting; move the pipeline to the device without them, or leave "
                "capture out"
            )
        own = vars(module)
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            raise ValueError(
                f"{name} has forward hooks, which a captured step would skip; remove them, or leave capture out"
            )
    if torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks:
        raise ValueError(
            "torch.nn has global forward hooks, which a captured step would skip; remove them, or leave capture out"
        )


def _called_modules(model: PackedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules whose hooks a forward runs, with their names."""
    yield "the packed model", model
    for name, module in model.transformer.named_modules():
        if name:
            yield name, module
        elif has_moving_hooks(module):  # other hooks of the transformer itself do not run
            yield "the transformer", module


@dataclass(eq=False)
class _Graph:
    """A captured forward.

    Attributes:
        graph: The `torch.cuda.CUDAGraph`.
        image, timestep: Buffers that the graph reads.
        velocity: Buffer of the result.
        changes: Buffers of the measured changes of kept references, as `ReferenceRows.measured` returns them.
        constants: Kept streams of the pack that the graph may read.
    """

    graph: Any
    image: Tensor
    timestep: Tensor
    velocity: Tensor
    changes: list[Tensor | None]
    constants: list[Tensor]


class StepGraphs:
    """A packed model whose forwards are captured in CUDA graphs and replayed, without gradients.

    Args:
        model: The packed model. Its steps can be captured if `check_capture` raises no error.
        max_graphs: Largest number of graphs at a time. Further kinds of forwards run as usual.

    Attributes:
        forwards: Number of forwards by how they ran: "replayed", or the reason why they were not.
    """

    def __init__(self, model: PackedModel, max_graphs: int = MAX_GRAPHS) -> None:
        self.model, self.max_graphs = model, max_graphs
        self.forwards: Counter[str] = Counter()
        self._pool: Any = None  # memory that all graphs share, because they run one after the other
        self._stream: Any = None  # of the captures, on the device of the pack
        self._weights: tuple = ()
        self._graphs: dict[tuple, _Graph] = {}
        self._held: dict[tuple, tuple] = {}  # objects of the keys, so that no other object gets the identity of one

    def clear(self) -> None:
        """Free all graphs and their memory."""
        self._graphs.clear()
        self._held.clear()
        self._pool = None

    def __call__(
        self,
        image: Tensor,
        text: Tensor,
        timestep: Tensor,
        layout: SelfLayout,
        kept: Sequence[KeptReferences | None] | None = None,
        constants: StepConstants | None = None,
        adapters: PackAdapters | None = None,
    ) -> Tensor:
        """Return what `model(...)` returns for these arguments, see `PackedModel.forward`."""
        weights = weights_state(self.model.transformer, addresses=True)
        if weights != self._weights:
            self.clear()
            self._weights = weights
        rows = None if kept is None else ReferenceRows(layout, kept, counts=False)
        options: dict[str, Any] = {} if adapters is None else {"adapters": adapters}

        def forward(image: Tensor, timestep: Tensor) -> Tensor:
            return self.model(image, text, timestep, layout, rows, constants, **options)

        sources = () if constants is None else constants.pack_sources(image)
        held: tuple = (layout, text, constants, adapters, *sources, *(() if rows is None else rows.storage()))
        key = (
            *map(id, held), version_of(text), None if rows is None else rows.computed(),
            image.dtype, timestep.dtype, self.model.visibility, self.model.impl,
        )  # fmt: skip
        found = self._graphs.get(key)
        if found is None and (reason := self._refusal(key)):
            self._held[key] = held
            self.forwards[reason] += 1
            velocity = forward(image, timestep)
            if rows is not None:
                rows.count(rows.changes)
            return velocity
        if found is None:
            found = self._graphs[key] = self._captured(forward, image, timestep, rows, constants)
        found.image.copy_(image)
        found.timestep.copy_(timestep)
        with torch.cuda.device(image.device):
            found.graph.replay()
        self.forwards["replayed"] += 1
        if rows is not None:
            rows.count([None if change is None else change.clone() for change in found.changes])
        return found.velocity.clone()  # the next replay writes into the buffer

    def _refusal(self, key: tuple) -> str | None:
        """Return the reason why a forward without a graph is not captured now, or None."""
        if key not in self._held:
            return FIRST
        return f"{self.max_graphs} graphs are the limit" if len(self._graphs) >= self.max_graphs else None

    def _captured(
        self,
        forward: Any,
        image: Tensor,
        timestep: Tensor,
        rows: ReferenceRows | None,
        constants: StepConstants | None,
    ) -> _Graph:
        reads = contextlib.nullcontext() if constants is None else constants.captured(image)
        image, timestep = image.clone(), timestep.clone()
        with torch.cuda.device(image.device):
            if self._stream is None:
                self._stream = torch.cuda.Stream(image.device)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            # "thread_local": another thread, such as one that loads images, may allocate memory meanwhile.
            options = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
            try:
                with reads, torch.cuda.graph(graph, **options):
                    velocity = forward(image, timestep)
            except Exception as error:
                torch.cuda.set_stream(current)  # PyTorch leaves the capture's stream set if the capture cannot end
                # the end of the capture raises an error that follows from the first one
                first = error.__context__ if isinstance(error.__context__, Exception) else error
                if isinstance(first, torch.OutOfMemoryError):
                    raise first from None  # for the caller, who may try a smaller pack
                raise RuntimeError(
                    f"a denoising step could not be captured in a CUDA graph ({first}); leave capture out"
                ) from error
        changes = [] if rows is None else rows.changes
        return _Graph(graph, image, timestep, velocity, changes, [] if constants is None else constants.tensors())
