"""`edit(pipe, requests)` runs many requests in one packed denoising loop.

Each request has its own prompt, references, size, seed, guidance and number of steps; the two predictions of guidance
are two sequences of a pack. The result of a request does not depend on the other requests.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from uniref_fast.budget import check_budget
from uniref_fast.edit_loop import Edit, EditLoop, encoded_edit
from uniref_fast.edit_report import EditReport
from uniref_fast.encode import decode_image
from uniref_fast.fast import EightBitParts, check_mode, check_supported, eight_bit, eight_bit_parts, quantised_before
from uniref_fast.guidance import is_guided
from uniref_fast.model_kind import check_pipeline
from uniref_fast.models.kept_references import (
    KeepDtype,
    KeptReferences,
    RefreshSchedule,
    check_keep_dtype,
    dependence,
)
from uniref_fast.models.module_hooks import is_offloaded
from uniref_fast.models.qwen_image import PackedQwenImage, find_transformer
from uniref_fast.patch.install import patched_parts
from uniref_fast.patch.stock import deviations, is_own_method
from uniref_fast.progress import tracked
from uniref_fast.quantised import row_dependence
from uniref_fast.quantised_linear import exact_products, recorded_errors
from uniref_fast.request import EditRequest, Geometry, request_geometry, validated
from uniref_fast.schedule import denoising_schedule
from uniref_fast.visibility import Rule

__all__ = ["edit"]


def edit(
    pipe: Any,
    requests: Sequence[EditRequest | Mapping[str, Any]],
    *,
    budget: int | None = None,
    pack_tokens: int | None = None,
    visibility: str | Rule = "full",
    impl: str | None = None,
    output_type: str = "pil",
    progress: bool = True,
    model: PackedQwenImage | None = None,
    keep_references: bool | int | Literal["auto"] = False,
    drift: float | None = None,
    keep_dtype: KeepDtype | None = None,
    report: EditReport | None = None,
    mode: str = "exact",
    modules_to_not_convert: Sequence[str] | None = None,
) -> list[Any]:
    """Run several edit requests together.

    Args:
        pipe: A `QwenImageEditPlusPipeline`, patched or not. It is not changed.
        requests: `EditRequest`s, or mappings of its fields.
        budget: Joint pixel budget of each request's references, the side of a square in pixels: 1024 gives all of them
            together 1024 x 1024 pixels. None sizes each reference as diffusers does.
        pack_tokens: Largest number of tokens in one pack; a step then runs as several packs. None puts all sequences
            into one pack.
        visibility: Policy or rule of attention. Anything but "full" needs a model trained for it.
        impl: Implementation forced on every op, or a library ("dense", "flash", "cudnn_flex") forced on attention
            alone. None chooses by device.
        output_type: "pil", "np" (float32 `[H, W, 3]`, 0 to 1), "pt" (`[3, H, W]`, 0 to 1, the pipeline's dtype), or
            "latent" (packed latents `[1, N, C]`).
        progress: Show the pipeline's progress bar.
        model: Packed model to run, such as a sharded one, with its own visibility and impl. None builds one from the
            pipeline's transformer.
        keep_references: Keep the keys and values of references over denoising steps, so that most steps compute text
            and target only (docs/fast.md). A number n computes the references in every n-th step, "auto" as often as
            `drift` requires. True computes them once, which needs a model for which this is exact. False computes them
            in every step.
        drift: Tolerance of "auto": the largest relative change of the references' keys and values between two steps
            that compute them. None takes the default.
        keep_dtype: "int8" keeps them in 8 bits, in half the memory of 16 bits, and rounds each value to a multiple of
            1/127 of the largest one of its token and head. None keeps them unchanged.
        report: Report to fill with the steps that computed the references and the drift that they measured.
        mode: "exact", or "fast": Linears of the blocks and attention in 8 bits (`uniref_fast.fast`). The weights are
            quantised at each call and 16-bit weights stay on the device; `patch(pipe, mode="fast")` does it once.
        modules_to_not_convert: Names of modules that stay in 16 bits under `mode="fast"`. None keeps the first and the
            last block and the modulation.

    Returns:
        One result per request, in order.

    Raises:
        ValueError: If a request or the pipeline cannot run, before any work is done.
        TypeError: If a request or the pipeline has the wrong type, likewise.
    """
    _check_options(output_type, pack_tokens, budget)
    check_pipeline(pipe)
    transformer = find_transformer(pipe)
    device = pipe._execution_device
    _refuse_changes(pipe, transformer, device)
    if torch.is_autocast_enabled(device.type):
        raise ValueError("edit() computes in the pipeline's own dtype; call it outside torch.autocast")
    requests = validated(requests, pipe)
    _warn_of_guidance(requests)
    if len(requests) > 1 and (reason := row_dependence(transformer)):
        warnings.warn(f"each result depends a little on the other requests: {reason}", stacklevel=2)
    geometries = [request_geometry(pipe, request, budget) for request in requests]
    schedulers = []  # all of them before any model runs, because a scheduler may refuse its schedule
    for i, (request, sizes) in enumerate(zip(requests, geometries, strict=True)):
        _check_latents(pipe, request, sizes, f"request {i + 1}")
        tokens = math.prod(sizes.grid(sizes.size))
        schedulers.append(denoising_schedule(pipe.scheduler, tokens, request.num_inference_steps, device))
    parts = _eight_bit_parts(transformer, device, impl, mode, modules_to_not_convert, model)
    model = model or PackedQwenImage(
        transformer, visibility=visibility, impl=impl, attention_8bit=parts.attention if parts else ()
    )
    check_keep_dtype(keep_dtype)
    keeping = _refresh_schedules(model, geometries, keep_references, drift)
    with torch.no_grad(), eight_bit(transformer, None if patched_parts(transformer) else parts):
        shown = progress and not getattr(pipe, "_progress_bar_config", {}).get("disable")
        prepared = tracked(list(zip(requests, geometries, schedulers, strict=True)), "encoding", "request", shown=shown)
        jobs = [encoded_edit(pipe, *each) for each in prepared]
        for job, schedule in zip(jobs, keeping, strict=True):
            if schedule is not None:
                job.kept = [KeptReferences(schedule, keep_dtype, len(job.timesteps)) for _ in job.samples]
        exact = [job.copy() for job in jobs] if report is not None and report.compare else []
        errors: dict[str, float] = {}
        with recorded_errors(errors) if parts is not None and report is not None else contextlib.nullcontext():
            _denoise(pipe, model, jobs, pack_tokens, progress)
        if report is not None:
            latent_errors = _latent_errors(pipe, model, jobs, exact, pack_tokens, progress)
            report.fill([job.kept or () for job in jobs], errors, latent_errors)
            report.note = quantised_before(transformer) if parts is not None else None
        for job in jobs:
            job.kept = None  # decoding needs the memory
        results = [_decode(pipe, job, output_type) for job in tracked(jobs, "decoding", "result", shown=shown)]
    pipe.maybe_free_model_hooks()
    return results


def _eight_bit_parts(
    transformer: Any,
    device: torch.device,
    impl: str | None,
    mode: str,
    modules_to_not_convert: Sequence[str] | None,
    model: PackedQwenImage | None,
) -> EightBitParts | None:
    """Return the parts that compute in 8 bits, or None for the mode "exact"."""
    installed = patched_parts(transformer)
    if not check_mode(mode, modules_to_not_convert):
        if installed is not None:
            raise ValueError('the pipeline is patched with mode="fast"; give edit() the same mode, or unpatch first')
        return None
    if model is not None:
        raise ValueError('mode="fast" builds its own packed model; leave model out')
    check_supported(device, impl)
    if installed is None:
        if any(is_offloaded(module, whole=False) for module in transformer.modules()):
            raise ValueError(
                'mode="fast" quantises the weights, and offloading by block or by layer holds them elsewhere; without '
                'offloading, call patch(pipe, mode="fast") first, and then enable it'
            )
        return eight_bit_parts(transformer, modules_to_not_convert, impl)
    if modules_to_not_convert is not None or impl != installed.impl:
        raise ValueError(
            f"the pipeline is patched with mode='fast' and impl={installed.impl!r}; give edit() the same impl, and no "
            "modules_to_not_convert: those of the patch hold"
        )
    return installed


def _check_options(output_type: Any, pack_tokens: Any, budget: Any) -> None:
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f'output_type must be "pil", "np", "pt" or "latent", got {output_type!r}')
    if budget is not None:
        check_budget(budget)
    if pack_tokens is not None and not isinstance(pack_tokens, numbers.Real):
        raise TypeError(f"pack_tokens must be a number, got {pack_tokens!r}")
    if pack_tokens is not None and pack_tokens < 1:
        raise ValueError(f"pack_tokens must be at least 1, got {pack_tokens}")


def _refresh_schedules(
    model: PackedQwenImage, geometries: Sequence[Geometry], keep: bool | int | str, drift: float | None
) -> list[RefreshSchedule | None]:
    """Return for each request when its references are computed again; None where nothing is kept."""
    layouts = [model.layout([sizes.sample(1)]) for sizes in geometries]
    return [RefreshSchedule.of(keep, drift, dependence(layout, model.visibility)) for layout in layouts]


def _latent_errors(
    pipe: Any, model: PackedQwenImage, jobs: list[Edit], exact: list[Edit], pack_tokens: int | None, progress: bool
) -> list[float]:
    """Run the exact edits, and return the relative errors of the latents of jobs that have run."""
    if not exact:
        return []
    with exact_products():
        same = PackedQwenImage(model.transformer, visibility=model.visibility, impl=model.impl)
        _denoise(pipe, same, exact, pack_tokens, progress)
    pairs = [(job.latents.float(), other.latents.float()) for job, other in zip(jobs, exact, strict=True)]
    return [((result - expected).norm() / expected.norm()).item() for result, expected in pairs]


def _warn_of_guidance(requests: Sequence[EditRequest]) -> None:
    """Warn about scales and negative prompts that have no effect, as the pipeline does."""
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


def _denoise(pipe: Any, model: PackedQwenImage, jobs: list[Edit], pack_tokens: int | None, progress: bool) -> None:
    loop = EditLoop(model, pack_tokens)
    loop.join(*jobs)
    bar = pipe.progress_bar(total=max(len(job.timesteps) for job in jobs)) if progress else None
    while loop.edits:
        loop.step()
        if bar is not None:
            bar.update()
    if bar is not None:
        bar.close()


def _decode(pipe: Any, job: Edit, output_type: str) -> Any:
    if output_type == "latent":
        return job.latents
    return decode_image(pipe, job.latents, job.geometry.size, output_type)


def _refuse_changes(pipe: Any, transformer: Any, device: torch.device) -> None:
    """Raise ValueError if the pipeline's call or code in its transformer was changed: the packed loop would skip it."""
    found = next(deviations(transformer, device), None)
    if found is None and not is_own_method(pipe, "__call__"):
        found = f"{type(pipe).__name__}.__call__ is not diffusers' own"
    if found is not None:
        raise ValueError(
            f"{found}. edit() runs all requests through one packed forward, which would skip this; undo it, or call "
            "the pipeline (patched or not) request by request"
        )
