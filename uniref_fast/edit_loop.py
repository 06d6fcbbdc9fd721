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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.models.family import family_of
from uniref_fast.models.kept_references import KeptReferences
from uniref_fast.models.packed import PackedModel
from uniref_fast.models.step_constants import StepConstants
from uniref_fast.packing import next_fit
from uniref_fast.patch.stock import is_own_method
from uniref_fast.request import EditRequest, Geometry

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
        latents: Latents of the result after the steps so far, `[1, n, C]`, as the scheduler and the VAE expect.
        scheduler: Scheduler of the request.
        timesteps: Timesteps of the scheduler.
        step_options: Options of `scheduler.step`: the generator, if it has that argument.
        guide: Classifier-free guidance of the family (`Family.guide`).
        kept: Kept references of each of the samples, or None if they are computed in every step.
        steps: Number of steps so far.
        is_interrupted: A step of its scheduler has raised an error, which may have changed its state.
        velocity: Velocity `[n, C]` of the last step, after guidance; None before the first one.
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
    kept: list[KeptReferences] | None = None
    steps: int = 0
    is_interrupted: bool = False
    velocity: Tensor | None = None

    @property
    def is_finished(self) -> bool:
        return self.steps >= len(self.timesteps)

    @property
    def tokens(self) -> int:
        """Number of tokens of its sequences."""
        return sum(sample.length for sample in self.samples)

    @property
    def stores(self) -> Sequence[KeptReferences | None]:
        """Kept references of each of the samples; None for one whose references are computed in every step."""
        return self.kept or [None] * len(self.samples)

    def predicted_latents(self) -> Tensor:
        """Return the latents at t = 0 to which the last velocity leads, `[1, n, C]`."""
        if self.velocity is None or self.is_finished:
            return self.latents
        t = self.timesteps[self.steps].to(self.latents.dtype) / 1000
        return self.latents - t * self.velocity.to(self.latents.dtype)

    def copy(self) -> Edit:
        """Return the same edit with latents, scheduler and generator of its own, and without kept references."""
        options = dict(self.step_options)
        if isinstance(options.get("generator"), torch.Generator):
            generator = options["generator"]
            options["generator"] = torch.Generator(generator.device).set_state(generator.get_state())
        scheduler = copy.deepcopy(self.scheduler)
        return replace(self, latents=self.latents.clone(), scheduler=scheduler, step_options=options, kept=None)


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
    prompts, texts = zip(*(
        family.encode_prompt(
            pipe, None if embeds is not None else text or "", images, sizes.condition_sizes, embeds, mask, cast=cast
        )
        for text, embeds, mask in request.texts
    ), strict=True)  # fmt: skip
    generator = request.generator
    if request.seed is not None:
        generator = torch.Generator("cpu").manual_seed(request.seed)
    own = is_own_method(pipe, "prepare_latents")
    latents, references = family.starting_latents(pipe, request, sizes, images, prompts[0].dtype, generator, own)
    # In the pipeline, stochastic schedulers draw from the global generator; here they use the request's seed.
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    samples = [sizes.sample(text) for text in texts]
    return Edit(
        request, sizes, [*prompts], samples, references, latents, scheduler, scheduler.timesteps, options, family.guide
    )


@dataclass(frozen=True)
class _Pack:
    """Sequences that run as one forward of the model: one per edit, or two for an edit with guidance.

    Attributes:
        edits: Edit of each sequence.
        text: Prompt embeddings of all sequences, `[N_text, D]`.
        layout: Layout of the pack.
        image: Image stream, `[N_image, C]`. References are written once, targets before each step.
        kept: Kept references of each sequence, or None if nothing is kept.
        constants: Store of what the model computes once for all steps of the pack.
    """

    edits: tuple[Edit, ...]
    text: Tensor
    layout: SelfLayout
    image: Tensor
    kept: tuple[KeptReferences | None, ...] | None
    constants: StepConstants


@dataclass
class EditLoop:
    """Edits that run together, one denoising step of each at a time.

    Attributes:
        model: The packed transformer.
        pack_tokens: Largest number of tokens in one pack; a step then runs as several packs. None puts all sequences
            into one pack.
        edits: Edits that are not finished, in the order in which they joined.
    """

    model: PackedModel
    pack_tokens: int | None = None
    edits: list[Edit] = field(default_factory=list)
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
        lengths = [sample.length for edit in self.edits for sample in edit.samples]
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
        """Run the next denoising step of every edit, and return the edits that are finished, which leave the loop."""
        if not self.edits:
            return []
        if self._packs is None:
            self._packs = self._build_packs()
        for edit, velocities in zip(self.edits, self._predict(self._packs), strict=True):
            velocity = velocities[0]
            if edit.request.guided:
                velocity = edit.guide(velocities[0], velocities[1], edit.request.true_cfg_scale)
            edit.is_interrupted = True
            stepped = edit.scheduler.step(
                velocity[None], edit.timesteps[edit.steps], edit.latents, return_dict=False, **edit.step_options
            )[0]
            edit.latents, edit.velocity = stepped.to(edit.latents.dtype), velocity
            edit.is_interrupted = False
            edit.steps += 1
        finished = [edit for edit in self.edits if edit.is_finished]
        self.leave(finished)
        return finished

    def _build_packs(self) -> list[_Pack]:
        """Put the sequences of the edits into packs of at most `pack_tokens`, in order."""
        rows = [
            (edit, *each) for edit in self.edits for each in zip(edit.prompts, edit.samples, edit.stores, strict=True)
        ]
        packs = []
        for indices in next_fit([sample.length for _, _, sample, _ in rows], self.pack_tokens):
            owners, prompts, samples, kept = zip(*(rows[i] for i in indices), strict=True)
            layout = self.model.layout(samples)
            image = layout.image_stream([edit.latents[0] for edit in owners], [edit.references for edit in owners])
            constants = self.model.step_constants()
            packs.append(_Pack(owners, torch.cat(prompts), layout, image, kept if any(kept) else None, constants))
        return packs

    def _predict(self, packs: Sequence[_Pack]) -> list[list[Tensor]]:
        """Return the velocities `[n, C]` of each edit: one, or two with guidance."""
        velocities: list[Tensor] = []
        for pack in packs:
            pack.layout.write_targets(pack.image, [edit.latents[0] for edit in pack.edits])
            t = torch.stack([edit.timesteps[edit.steps].to(edit.latents.dtype) / 1000 for edit in pack.edits])
            predicted = self.model(pack.image, pack.text, t, pack.layout, pack.kept, pack.constants)
            velocities += pack.layout.split_targets(predicted)
        at = iter(velocities)
        return [[next(at) for _ in edit.prompts] for edit in self.edits]
