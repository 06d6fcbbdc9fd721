"""`edit(pipe, requests)`: many unlike requests in one packed denoising loop.

Every request keeps its own prompt, references, size, seed, guidance and number of steps; both predictions of guidance
ride in the same pack. A request's result does not depend on what it is packed with.
"""

from __future__ import annotations

import inspect
import math
import numbers
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uniref_fast.encode import decode_image, encoded_prompt, image_latents, to_rgb
from uniref_fast.guidance import guide, is_guided
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.model_kind import check_pipeline
from uniref_fast.models.qwen_image import PackedQwenImage, find_transformer
from uniref_fast.packing import next_fit
from uniref_fast.patch.stock import deviations, is_own_method
from uniref_fast.request import EditRequest, Geometry, request_geometry, validated
from uniref_fast.schedule import denoising_schedule
from uniref_fast.visibility import Rule

__all__ = ["edit"]


def edit(
    pipe: Any,
    requests: Sequence[EditRequest | Mapping[str, Any]],
    *,
    budget: int | None = None,
    max_tokens: int | None = None,
    visibility: str | Rule = "full",
    impl: str | None = None,
    output_type: str = "pil",
    progress: bool = True,
    model: PackedQwenImage | None = None,
) -> list[Any]:
    """Run several edit requests together.

    Args:
        pipe: a `QwenImageEditPlusPipeline`; it need not be patched, and is left as it is.
        requests: `EditRequest`s or mappings of its fields; any number of references of any sizes, each its own.
        budget: joint pixel budget of each request's references, an area such as `1024**2`; None sizes each reference as
            diffusers does.
        max_tokens: most tokens in one pack; a step then runs as several packs. None puts all in one.
        visibility: policy or rule; anything but "full" needs a model trained for it.
        impl: implementation forced on every op; None picks by device.
        output_type: "pil", "np" (float32 `[H, W, 3]`, 0 to 1), "pt" (`[3, H, W]`, 0 to 1, the pipeline's dtype), or
            "latent" (packed latents `[1, N, C]`).
        progress: show the pipeline's progress bar, one step a tick.
        model: the packed model to run instead of one made of the pipeline's transformer, such as a sharded one;
            it brings its own visibility and impl.

    Returns:
        one result a request, in order.

    Raises:
        ValueError, TypeError: for requests or pipelines that cannot run, before any work is done.
    """
    _check_options(output_type, max_tokens, budget)
    check_pipeline(pipe)
    transformer = find_transformer(pipe)
    device = pipe._execution_device
    _refuse_changes(pipe, transformer, device)
    if torch.is_autocast_enabled(device.type):
        raise ValueError("edit() computes in the pipeline's own dtype; call it outside torch.autocast")
    requests = validated(requests, pipe)
    _warn_of_guidance(requests)
    geometries = [request_geometry(pipe, request, budget) for request in requests]
    schedulers = []  # all of them before any model runs, as a scheduler may refuse its schedule
    for i, (request, sizes) in enumerate(zip(requests, geometries, strict=True)):
        _check_latents(pipe, request, sizes, f"request {i + 1}")
        tokens = math.prod(sizes.grid(sizes.size))
        schedulers.append(denoising_schedule(pipe.scheduler, tokens, request.num_inference_steps, device))
    model = model or PackedQwenImage(transformer, visibility=visibility, impl=impl)
    with torch.no_grad():
        jobs = [_prepare(pipe, *each) for each in zip(requests, geometries, schedulers, strict=True)]
        _denoise(pipe, model, jobs, max_tokens, progress)
        results = [_decode(pipe, job, output_type) for job in jobs]
    pipe.maybe_free_model_hooks()
    return results


def _check_options(output_type: Any, max_tokens: Any, budget: Any) -> None:
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f'output_type must be "pil", "np", "pt" or "latent", got {output_type!r}')
    for name, value in (("max_tokens", max_tokens), ("budget", budget)):
        if value is not None and not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")


@dataclass
class _Job:
    """A request on its way: what the loop needs, `[tokens, channels]` tensors."""

    request: EditRequest
    geometry: Geometry
    prompts: list[Tensor]  # the prompt's embeddings and, when guided, the negative prompt's
    samples: list[Sample]  # of the layout, for each of these
    references: Tensor
    latents: Tensor  # [1, N, C], as the scheduler and the VAE expect
    scheduler: Any
    timesteps: Tensor
    step_options: dict[str, Any]  # of `scheduler.step`: the generator, where it takes one


def _prepare(pipe: Any, request: EditRequest, sizes: Geometry, scheduler: Any) -> _Job:
    """Encode prompt and references with the pipeline's own methods, draw the noise."""
    images = [to_rgb(image) for image in request.images]
    prompts, texts = zip(*(
        encoded_prompt(pipe, None if embeds is not None else text or "", images, sizes.condition_sizes, embeds, mask)
        for text, embeds, mask in request.texts
    ), strict=True)  # fmt: skip
    generator = request.generator
    if request.seed is not None:
        generator = torch.Generator("cpu").manual_seed(request.seed)
    latents, references = _latents(pipe, request, sizes, images, prompts[0].dtype, generator)
    # The pipeline leaves the noise of stochastic schedulers to the global generator; here a request's seed covers it.
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    samples = [sizes.sample(text) for text in texts]
    return _Job(request, sizes, [*prompts], samples, references, latents, scheduler, scheduler.timesteps, options)


def _latents(
    pipe: Any, request: EditRequest, sizes: Geometry, images: list[Any], dtype: torch.dtype, generator: Any
) -> tuple[Tensor, Tensor]:
    """Starting noise `[1, N, C]` and packed latents of the references `[N_references, C]`."""
    pairs, pixels = list(zip(images, sizes.reference_sizes, strict=True)), None
    own = is_own_method(pipe, "prepare_latents")
    if pairs and not own:  # somebody's method is given all that the pipeline would give it
        pixels = [pipe.image_processor.preprocess(image, h, w).unsqueeze(2) for image, (w, h) in pairs]
    width, height = sizes.size
    channels = pipe.transformer.config.in_channels // 4
    latents, packed = pipe.prepare_latents(
        pixels, 1, channels, height, width, dtype, pipe._execution_device, generator, request.latents
    )
    if not own:
        return latents, latents[0, :0] if packed is None else packed[0].to(latents.dtype)
    # diffusers' own would give the pictures to the VAE in the transformer's dtype; it may have another
    parts = [image_latents(pipe, *pair).to(latents.dtype) for pair in pairs]
    return latents, torch.cat([latents[0, :0], *parts])


def _warn_of_guidance(requests: Sequence[EditRequest]) -> None:
    """Warn of scales and negative prompts that have no effect, where the pipeline warns."""
    for i, request in enumerate(requests, start=1):
        if is_guided(request.true_cfg_scale) and not request.has_negative_prompt:
            reason = f"true_cfg_scale={request.true_cfg_scale} has no effect without a negative prompt, such as ' '"
        elif not is_guided(request.true_cfg_scale) and request.has_negative_prompt:
            reason = (
                f"the negative prompt has no effect at true_cfg_scale={request.true_cfg_scale}, which is not over 1"
            )
        else:
            continue
        warnings.warn(f"request {i}: {reason}; classifier-free guidance is off", stacklevel=3)


def _check_latents(pipe: Any, request: EditRequest, sizes: Geometry, where: str) -> None:
    if request.latents is None:
        return
    _, height, width = sizes.grid(sizes.size)
    expected = [1, height * width, pipe.transformer.config.in_channels]
    if list(request.latents.shape) != expected:
        raise ValueError(
            f"{where}: latents have shape {list(request.latents.shape)}, a {sizes.size[0]} x {sizes.size[1]} result "
            f"needs {expected}"
        )


@dataclass(frozen=True)
class _Pack:
    """Sequences that run as one forward of the model: one per job, or two where the job is guided.

    Attributes:
        jobs: job of each sequence.
        prompts: prompt embeddings of each sequence.
        layout: the packed sequence.
        image: image stream `[N_image, C]`; its references are written once, its targets before each step.
    """

    jobs: tuple[_Job, ...]
    prompts: tuple[Tensor, ...]
    layout: SelfLayout
    image: Tensor


def _denoise(pipe: Any, model: PackedQwenImage, jobs: list[_Job], max_tokens: int | None, progress: bool) -> None:
    hook = getattr(model.transformer, "_hf_hook", None)
    if hook is not None:  # model offloading: bring the weights in, as a call of the model itself would
        hook.pre_forward(model.transformer)
    steps = max(len(job.timesteps) for job in jobs)
    active: list[_Job] = []
    packs: list[_Pack] = []
    bar = pipe.progress_bar(total=steps) if progress else None
    for step in range(steps):
        running = [job for job in jobs if step < len(job.timesteps)]
        if len(running) != len(active):  # jobs only leave
            active, packs = running, _packs(model, running, max_tokens)
        for job, velocities in zip(active, _predict(model, active, packs, step), strict=True):
            velocity = velocities[0]
            if job.request.guided:
                velocity = guide(velocities[0], velocities[1], job.request.true_cfg_scale)
            stepped = job.scheduler.step(
                velocity[None], job.timesteps[step], job.latents, return_dict=False, **job.step_options
            )[0]
            job.latents = stepped.to(job.latents.dtype)
        if bar is not None:
            bar.update()
    if bar is not None:
        bar.close()


def _packs(model: PackedQwenImage, jobs: list[_Job], max_tokens: int | None) -> list[_Pack]:
    """Put the sequences of jobs into packs of at most `max_tokens`, in order."""
    rows = [(job, prompt, sample) for job in jobs for prompt, sample in zip(job.prompts, job.samples, strict=True)]
    packs = []
    for indices in next_fit([sample.length for *_, sample in rows], max_tokens):
        owners, prompts, samples = zip(*(rows[i] for i in indices), strict=True)
        layout = model.layout(samples)
        image = layout.image_stream([job.latents[0] for job in owners], [job.references for job in owners])
        packs.append(_Pack(owners, prompts, layout, image))
    return packs


def _predict(model: PackedQwenImage, jobs: list[_Job], packs: list[_Pack], step: int) -> list[list[Tensor]]:
    """Velocities `[N_target, C]` of each job: one, or two when guided."""
    velocities: list[Tensor] = []
    for pack in packs:
        pack.layout.write_targets(pack.image, [job.latents[0] for job in pack.jobs])
        text = torch.cat(pack.prompts)
        t = torch.stack([job.timesteps[step].to(job.latents.dtype) / 1000 for job in pack.jobs])
        velocities += pack.layout.split_targets(model(pack.image, text, t, pack.layout))
    at = iter(velocities)
    return [[next(at) for _ in job.prompts] for job in jobs]


def _decode(pipe: Any, job: _Job, output_type: str) -> Any:
    if output_type == "latent":
        return job.latents
    return decode_image(pipe, job.latents, job.geometry.size, output_type)


def _refuse_changes(pipe: Any, transformer: Any, device: torch.device) -> None:
    """The packed loop replaces the pipeline's call and the forwards of blocks: changes of those would be skipped."""
    found = next(deviations(transformer, device), None)
    if found is None and not is_own_method(pipe, "__call__"):
        found = f"{type(pipe).__name__}.__call__ is not diffusers' own"
    if found is not None:
        raise ValueError(
            f"{found}. edit() runs all requests through one packed forward, which would skip this; undo it, or call "
            "the pipeline (patched or not) request by request"
        )
