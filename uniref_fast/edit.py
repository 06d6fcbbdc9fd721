"""`edit(pipe, requests)` runs many requests in one packed denoising loop.

Each request has its own prompt, references, size, seed, guidance and number of steps; the two predictions of guidance
are two sequences of a pack. The result of a request does not depend on the other requests.
"""

from __future__ import annotations

import contextlib
import numbers
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from uniref_fast.edit_loop import Edit, EditLoop
from uniref_fast.edit_report import EditReport
from uniref_fast.edit_session import CheckedRequest, EditSession, check_output_type, warn_of_guidance
from uniref_fast.fast import quantised_before
from uniref_fast.models.families import family_of
from uniref_fast.models.kept_references import (
    KeepDtype,
)
from uniref_fast.models.module_hooks import free_model_hooks
from uniref_fast.models.packed import PackedModel
from uniref_fast.models.step_graphs import StepGraphs
from uniref_fast.ops._dispatch import one_of
from uniref_fast.progress import tracked
from uniref_fast.quantised import row_dependence
from uniref_fast.quantised_linear import exact_products, recorded_errors
from uniref_fast.request import EditRequest, as_list
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
    model: PackedModel | None = None,
    keep_references: bool | int | Literal["auto"] = False,
    drift: float | None = None,
    keep_dtype: KeepDtype | None = None,
    report: EditReport | None = None,
    mode: str = "exact",
    modules_to_not_convert: Sequence[str] | None = None,
    errors: Literal["raise", "return"] = "raise",
    capture: bool = False,
) -> list[Any]:
    """Run several edit requests together.

    Args:
        pipe: A pipeline of a supported family, such as `QwenImageEditPlusPipeline`, patched or not. It is not changed.
        requests: `EditRequest`s, or mappings of its fields.
        budget: Joint pixel budget of each request's references, the side of a square in pixels: 1024 gives all of them
            together 1024 x 1024 pixels. None sizes each reference as diffusers does.
        pack_tokens: Largest number of tokens in one pack; a step then runs as several packs. None puts all sequences
            into one pack.
        visibility: Policy or rule of attention. Anything but "full" needs a model trained for it.
        impl: Implementation forced on every op, or a library ("dense", "flash", "cudnn_flex") forced on attention
            alone. None chooses by device.
        output_type: "pil", "np" (float32 `[H, W, 3]`, 0 to 1), "pt" (`[3, H, W]`, 0 to 1, the pipeline's dtype), or
            "latent" (packed latents `[1, N, C]`). Images of Qwen-Image-2.1 have 4 channels, with transparency.
        progress: Show the pipeline's progress bar.
        model: Packed model to run, such as a sharded one, with its own visibility and impl. It computes in the dtype of
            the embeddings that requests give. None builds one from the pipeline's transformer.
        keep_references: Keep the keys and values of references over denoising steps, so that most steps compute text
            and target only (docs/fast.md). A number n computes the references in every n-th step, "auto" as often as
            `drift` requires. True computes them once, which needs a model for which this is exact. False does
            what the pipeline does: it computes them in every step, or once for models whose pipeline keeps them.
        drift: Tolerance of "auto": the largest relative change of the references' keys and values between two steps
            that compute them. None takes the default.
        keep_dtype: "int8" keeps them in 8 bits, in half the memory of 16 bits, and rounds each value to a multiple of
            1/127 of the largest one of its token and head. None keeps them unchanged.
        report: Report to fill with the steps that computed the references and the drift that they measured.
        mode: "exact", or "fast": Linears of the blocks and attention in 8 bits (`uniref_fast.fast`). The weights are
            quantised at each call and 16-bit weights stay on the device; `patch(pipe, mode="fast")` does it once.
        modules_to_not_convert: Names of modules that stay in 16 bits under `mode="fast"`. None keeps the first and the
            last block and the modulation.
        errors: "raise" raises the error of a request, which ends the call. "return" puts the exception into the list of
            results, in the place of its request, and the other requests run. An error of the whole pack, such as too
            little memory for a step, is raised in both cases.
        capture: Capture denoising steps in CUDA graphs and replay them, which saves the time of Python between the
            kernels of a small step (docs/fast.md). The result has the same bits. It needs a CUDA device, and memory for
            the activations of one more step.

    Returns:
        One result per request, in order. It is a list of images for a request with `num_images` above 1.

    Raises:
        ValueError: If a request or the pipeline cannot run, before any work is done.
        TypeError: If a request or the pipeline has the wrong type, likewise.
    """
    _check_options(output_type, pack_tokens)
    given = as_list(requests)
    failures = _Failures(one_of("errors", errors, "raise", "return"), len(given))
    session = EditSession(
        pipe,
        budget=budget,
        visibility=visibility,
        impl=impl,
        model=model,
        keep_references=keep_references,
        drift=drift,
        keep_dtype=keep_dtype,
        mode=mode,
        modules_to_not_convert=modules_to_not_convert,
        capture=capture,
    )
    if torch.is_autocast_enabled(session.device.type):
        raise ValueError("edit() computes in the pipeline's own dtype; call it outside torch.autocast")
    checked: dict[int, CheckedRequest] = {}
    for i, request in enumerate(given, start=1):
        with failures.of(i):
            checked[i] = session.check_one(request, f"request {i}")
    warn_of_guidance(checked)
    if len(checked) > 1 and (reason := row_dependence(session.model.transformer)):
        warnings.warn(f"each result depends a little on the other requests: {reason}", stacklevel=2)
    shown = progress and not getattr(pipe, "_progress_bar_config", {}).get("disable")
    edits: dict[int, Edit] = {}
    results: dict[int, Any] = {}
    with session.computing():
        for i in tracked(list(checked), "encoding", "request", shown=shown):
            with failures.of(i, "while it was encoded"):
                edits[i] = session.encode(checked[i])
        exact = {i: each.copy() for i, each in edits.items()} if report is not None and report.compare else {}
        product_errors: dict[str, float] = {}
        measured = session.parts is not None and report is not None
        graphs = StepGraphs(session.model) if capture else None
        with recorded_errors(product_errors) if measured else contextlib.nullcontext():
            _denoise(pipe, session.model, edits, pack_tokens, progress, failures, graphs)
        if graphs is not None:
            graphs.clear()  # decoding needs the memory
        edits = {i: each for i, each in edits.items() if each.error is None}
        if report is not None:
            exact = {i: each for i, each in exact.items() if i in edits}
            latent_errors = _latent_errors(pipe, session.model, edits, exact, pack_tokens, progress)
            kept = [(i - 1, each.request.num_images, each.kept or ()) for i, each in edits.items()]
            report.fill(kept, product_errors, latent_errors)
            report.forwards = Counter() if graphs is None else graphs.forwards
            report.note = quantised_before(session.model.transformer) if session.parts is not None else None
        for each in edits.values():
            each.kept = None  # decoding needs the memory
        for i in tracked(list(edits), "decoding", "result", shown=shown):
            with failures.of(i, "while its result was decoded"):
                results[i] = session.decode(edits[i], output_type)
    free_model_hooks(pipe)
    return [failures.kept[i] if i in failures.kept else results[i] for i in range(1, len(given) + 1)]


def _progress_bar(pipe: Any, total: int) -> Any:
    """Return the progress bar of a pipeline; modular pipelines have one for each of their blocks only."""
    if hasattr(pipe, "progress_bar"):
        return pipe.progress_bar(total=total)
    from tqdm.auto import tqdm

    return tqdm(total=total)


class _Failures:
    """Errors of single requests, which are raised or kept.

    Args:
        keeps: Keep the errors instead of raising them.
        total: Number of requests.

    Attributes:
        kept: Errors by the number of the request, from 1.
    """

    def __init__(self, keeps: bool, total: int) -> None:
        self.keeps, self.total = keeps, total
        self.kept: dict[int, Exception] = {}

    @contextlib.contextmanager
    def of(self, number: int, when: str = "") -> Iterator[None]:
        """Return a context for the work of one request, which names it in a note of an error that is raised."""
        try:
            yield
        except Exception as error:
            if not self.keeps:
                note = f"This is the error of request {number} of {self.total}, which failed {when}."
                if when and hasattr(error, "add_note"):  # Python 3.11
                    error.add_note(note)
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the tensors of the call that failed
            self.kept[number] = error


def _check_options(output_type: Any, pack_tokens: Any) -> None:
    check_output_type(output_type)
    if pack_tokens is not None and not isinstance(pack_tokens, numbers.Real):
        raise TypeError(f"pack_tokens must be a number, got {pack_tokens!r}")
    if pack_tokens is not None and pack_tokens < 1:
        raise ValueError(f"pack_tokens must be at least 1, got {pack_tokens}")


def _latent_errors(
    pipe: Any,
    model: PackedModel,
    edits: Mapping[int, Edit],
    exact: Mapping[int, Edit],
    pack_tokens: int | None,
    progress: bool,
) -> list[float]:
    """Run the exact edits, and return the relative errors of the latents of edits that have run."""
    if not exact:
        return []
    with exact_products():
        same = family_of(pipe).packed(model.transformer, visibility=model.visibility, impl=model.impl)
        _denoise(pipe, same, exact, pack_tokens, progress, _Failures(False, len(exact)))
    pairs = [(edits[i].latents.float(), exact[i].latents.float()) for i in exact]
    return [((result - expected).norm() / expected.norm()).item() for result, expected in pairs]


def _denoise(
    pipe: Any,
    model: PackedModel,
    edits: Mapping[int, Edit],
    pack_tokens: int | None,
    progress: bool,
    failures: _Failures,
    graphs: StepGraphs | None = None,
) -> None:
    if not edits:
        return
    loop = EditLoop(model, pack_tokens, graphs=graphs)
    loop.join(*edits.values())
    bar = _progress_bar(pipe, max(len(edit.timesteps) for edit in edits.values())) if progress else None
    while loop.edits:
        running = {i: edit for i, edit in edits.items() if edit in loop.edits}
        loop.step()
        for i, edit in running.items():
            with failures.of(i, f"in step {edit.steps}"):
                if edit.error is not None:
                    raise edit.error
        if bar is not None:
            bar.update()
    if bar is not None:
        bar.close()
