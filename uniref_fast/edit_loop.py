"""The packed denoising loop of edits, which edits join and leave between two steps.

    loop = EditLoop(model, pack_tokens=None)
    loop.join(edit)
    while loop.edits:
        for finished in loop.step():
            ...

A result does not depend on the edits that run beside it, and so not on when they join or leave.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.models.families import family_of
from uniref_fast.models.kept_references import KeptReferences
from uniref_fast.models.pack_adapters import PackAdapters
from uniref_fast.models.packed import PackedModel
from uniref_fast.models.step_constants import StepConstants
from uniref_fast.models.step_graphs import StepGraphs
from uniref_fast.packing import next_fit
from uniref_fast.patch.stock import is_own_method
from uniref_fast.request import EditRequest, EncodedRequest, Geometry
from uniref_fast.step_callback import StepCallback

__all__ = ["Edit", "EditLoop", "encoded_edit"]


@dataclass(eq=False)
class Edit:
    """A request in the denoising loop.

    Attributes:
        request: The request.
        geometry: Sizes of the request.
        prompts: Embeddings `[l, D]` of the prompt and, with guidance, of the negative prompt.
        samples: Sample of the layout for each of these prompts.
        references: Latents of all references, `[m, C]`.
        latents: Latents of the B images of the request after the steps so far, `[B, n, C]`, as the scheduler expects.
        scheduler: Scheduler of the request.
        timesteps: Timesteps of the scheduler.
        step_options: Options of `scheduler.step`: the generator, if it has that argument.
        guide: Classifier-free guidance of the family (`Family.guide`).
        callback: Callback of the request, or None.
        kept: Kept references of each sample of the first image, then of the second one, and so on; None if they are
            computed in every step.
        steps: Number of steps so far.
        is_interrupted: A step of its scheduler has raised an error, which may have changed its state.
        is_stopped: The callback has ended the edit before its last step.
        error: Error of its last step, with which it left the loop, or None.
        velocity: Velocity `[B, n, C]` of the last step, after guidance; None before the first one.
    """

    request: EditRequest
    geometry: Geometry
    prompts: list[Tensor]
    samples: list[Sample]
    references: Tensor
    latents: Tensor
    scheduler: Any
    timesteps: Tensor
    step_options: dict[str, Any]
    guide: Callable[[Tensor, Tensor, float], Tensor]
    callback: StepCallback | None = None
    kept: list[KeptReferences] | None = None
    steps: int = 0
    is_interrupted: bool = False
    is_stopped: bool = False
    error: BaseException | None = None
    velocity: Tensor | None = None

    @property
    def is_finished(self) -> bool:
        return self.is_stopped or self.steps >= len(self.timesteps)

    @property
    def sequences(self) -> list[_Sequence]:
        """Sequences of the prompts for the first image, then for the second one, and so on."""
        stores: Iterator[KeptReferences | None] = itertools.repeat(None) if self.kept is None else iter(self.kept)
        return [
            _Sequence(self, image, prompt, sample, next(stores))
            for image in range(len(self.latents))
            for prompt, sample in zip(self.prompts, self.samples, strict=True)
        ]

    @property
    def tokens(self) -> int:
        """Number of tokens of its sequences."""
        return len(self.latents) * sum(sample.length for sample in self.samples)

    def advance(self, velocities: Sequence[Tensor]) -> None:
        """Make a step of the scheduler, and call the callback of the request.

        Args:
            velocities: Velocity `[n, C]` of each of its sequences.
        """
        if self.request.guided:
            scale = self.request.true_cfg_scale
            assert scale is not None  # of a checked request
            velocities = [self.guide(*pair, scale) for pair in zip(velocities[::2], velocities[1::2], strict=True)]
        velocity = torch.stack([*velocities])
        self.is_interrupted = True
        stepped = self.scheduler.step(
            velocity, self.timesteps[self.steps], self.latents, return_dict=False, **self.step_options
        )[0]
        self.latents, self.velocity = stepped.to(self.latents.dtype), velocity
        self.is_interrupted = False
        self.steps += 1
        if self.callback is not None:
            self.callback(self)

    def predicted_latents(self) -> Tensor:
        """Return the latents at t = 0 to which the last velocity leads, `[B, n, C]`."""
        if self.velocity is None or self.steps >= len(self.timesteps):
            return self.latents
        t = self.timesteps[self.steps].to(self.latents.dtype) / 1000
        return self.latents - t * self.velocity.to(self.latents.dtype)

    def copy(self) -> Edit:
        """Return the same edit with latents, scheduler and generator of its own, and without kept references."""
        options = dict(self.step_options)
        generator = options.get("generator")
        if isinstance(generator, list):
            options["generator"] = [_copied(each) for each in generator]
        elif generator is not None:
            options["generator"] = _copied(generator)
        return replace(
            self, prompts=[*self.prompts], latents=self.latents.clone(), scheduler=copy.deepcopy(self.scheduler),
            step_options=options, kept=None,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Sequence:
    """A sequence of a pack: one prompt of one image of an edit, with its sample and its kept references, or None."""

    edit: Edit
    image: int
    prompt: Tensor
    sample: Sample
    store: KeptReferences | None

    @property
    def latents(self) -> Tensor:
        """Latents of the image, `[n, C]`."""
        return self.edit.latents[self.image]


def _copied(generator: torch.Generator) -> torch.Generator:
    return torch.Generator(generator.device).set_state(generator.get_state())


def encoded_edit(pipe: Any, request: EditRequest, sizes: Geometry, scheduler: Any, cast: bool = True) -> Edit:
    """Encode prompt and references with the pipeline's own methods, and draw the noise.

    Args:
        pipe: Pipeline of the request.
        request: A checked request.
        sizes: Sizes of the request.
        scheduler: Scheduler of the request, with its timesteps.
        cast: Cast the request's embeddings to the dtype of the pipeline's transformer.
    """
    family = family_of(pipe)
    images = [family.convert_image(image) for image in request.images]
    prompts, texts = zip(*family.encode_prompts(pipe, request, sizes, images, cast), strict=True)
    if isinstance(request, EncodedRequest):
        texts = request.encoded_texts
    generator = _generator(request)
    own = is_own_method(pipe, "prepare_latents")
    latents, references = family.starting_latents(pipe, request, sizes, images, prompts[0].dtype, generator, own)
    # In the pipeline, stochastic schedulers draw from the global generator; here they use the request's seed.
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    samples = [sizes.sample(text) for text in texts]
    function, names = request.callback_on_step_end, request.callback_on_step_end_tensor_inputs
    callback = None if function is None else StepCallback(pipe, function, names)
    return Edit(
        request, sizes, [*prompts], samples, references, latents, scheduler, scheduler.timesteps, options, family.guide,
        callback,
    )  # fmt: skip


def _generator(request: EditRequest) -> torch.Generator | list[torch.Generator] | None:
    """Return one generator for all images of a request, or one for each, as diffusers' pipelines take them."""
    if request.seed is None:
        return request.generators if isinstance(request.generator, Sequence) else request.generator
    if isinstance(request.seed, Sequence):
        return [torch.Generator("cpu").manual_seed(seed) for seed in request.seed]
    return torch.Generator("cpu").manual_seed(request.seed)


@dataclass(frozen=True)
class _Pack:
    """Sequences that run as one forward of the model: for each image of an edit one, or two with guidance.

    Attributes:
        sequences: The sequences.
        text: Prompt embeddings of all sequences, `[N_text, D]`.
        layout: Layout of the pack.
        image: Image stream, `[N_image, C]`. References are written once, targets before each step.
        kept: Kept references of each sequence, or None if nothing is kept.
        constants: Store of what the model computes once for all steps of the pack.
        adapters: LoRA of each sequence, or None if all have the active adapters of the pipeline.
    """

    sequences: tuple[_Sequence, ...]
    text: Tensor
    layout: SelfLayout
    image: Tensor
    kept: tuple[KeptReferences | None, ...] | None
    constants: StepConstants
    adapters: PackAdapters | None


@dataclass
class EditLoop:
    """Edits that run together, one denoising step of each at a time.

    Attributes:
        model: The packed transformer.
        pack_tokens: Largest number of tokens in one pack; a step then runs as several packs. None puts all sequences
            into one pack.
        edits: Edits that are not finished, in the order in which they joined.
        graphs: CUDA graphs that run the model, or None to run the model itself.
    """

    model: PackedModel
    pack_tokens: int | None = None
    edits: list[Edit] = field(default_factory=list)
    graphs: StepGraphs | None = field(default=None, kw_only=True)
    _packs: list[_Pack] | None = field(default=None, repr=False)  # None if the edits have changed since they were built

    def join(self, *edits: Edit) -> None:
        """Add edits, which run from the next step on."""
        self.edits += edits
        self._packs = None

    def leave(self, edits: Iterable[Edit]) -> None:
        """Remove edits, finished or not."""
        gone = set(edits)
        if gone:
            self.edits = [edit for edit in self.edits if edit not in gone]
            self._packs = None

    @property
    def largest_pack(self) -> int | None:
        """Number of tokens of the largest pack; None if that is one sequence, which cannot be divided."""
        lengths = [row.sample.length for edit in self.edits for row in edit.sequences]
        packs = next_fit(lengths, self.pack_tokens)
        tokens, sequences = max(((sum(lengths[i] for i in pack), len(pack)) for pack in packs), default=(0, 1))
        return tokens if sequences > 1 else None

    def set_pack_tokens(self, pack_tokens: int) -> None:
        """Set the largest number of tokens in one pack for the next steps."""
        self.pack_tokens, self._packs = pack_tokens, None

    def rebuild(self) -> None:
        """Build the packs again, because kept references of an edit were replaced."""
        self._packs = None

    def step(self) -> list[Edit]:
        """Run the next denoising step of every edit, and return the edits that are finished, which leave the loop.

        An edit whose scheduler or callback raises an error leaves the loop too, with this error.
        """
        if not self.edits:
            return []
        if self._packs is None:
            self._packs = self._build_packs()
        for edit, velocities in zip(self.edits, self._predict(self._packs), strict=True):
            try:
                edit.advance(velocities)
            except BaseException as error:  # a callback may raise anything
                edit.error = error
        if any(edit.callback is not None and edit.callback.may_change_prompts for edit in self.edits):
            self._packs = None
        finished = [edit for edit in self.edits if edit.error is None and edit.is_finished]
        self.leave([*finished, *(edit for edit in self.edits if edit.error is not None)])
        return finished

    def _build_packs(self) -> list[_Pack]:
        """Put the sequences of the edits into packs of at most `pack_tokens`, in order."""
        if self.graphs is not None:
            self.graphs.clear()  # they are those of the packs before
        rows = [sequence for edit in self.edits for sequence in edit.sequences]
        packs = []
        for indices in next_fit([row.sample.length for row in rows], self.pack_tokens):
            chosen = tuple(rows[i] for i in indices)
            layout = self.model.layout([row.sample for row in chosen])
            image = layout.image_stream([row.latents for row in chosen], [row.edit.references for row in chosen])
            kept = tuple(row.store for row in chosen)
            text = torch.cat([row.prompt for row in chosen])
            constants = self.model.step_constants()
            loras = [row.edit.request.lora for row in chosen]
            adapters = None if all(lora is None for lora in loras) else self.model.pack_adapters(loras)
            packs.append(_Pack(chosen, text, layout, image, kept if any(kept) else None, constants, adapters))
        return packs

    def _predict(self, packs: Sequence[_Pack]) -> list[list[Tensor]]:
        """Return the velocities `[n, C]` of each edit: for each image one, or two with guidance."""
        velocities: list[Tensor] = []
        for pack in packs:
            pack.layout.write_targets(pack.image, [row.latents for row in pack.sequences])
            timesteps = [row.edit.timesteps[row.edit.steps] for row in pack.sequences]
            t = self.model.times(timesteps, pack.image.dtype)
            if self.model.jumps:
                t = torch.stack([t, self.model.times(self._next_timesteps(pack), pack.image.dtype)], dim=1)
            options = {} if pack.adapters is None else {"adapters": pack.adapters}
            run: Callable[..., Tensor] = self.model if self.graphs is None else self.graphs
            predicted = run(pack.image, pack.text, t, pack.layout, pack.kept, pack.constants, **options)
            velocities += pack.layout.split_targets(predicted)
        at = iter(velocities)
        return [[next(at) for _ in range(len(edit.latents) * len(edit.prompts))] for edit in self.edits]

    @staticmethod
    def _next_timesteps(pack: _Pack) -> list[Tensor]:
        """Return the timestep of the next step of each sequence; 0 for its last step."""
        found = []
        for edit in (row.edit for row in pack.sequences):
            left = edit.timesteps[edit.steps :]
            found.append(left[1] if len(left) > 1 else torch.zeros_like(left[0]))
        return found
