"""State that the patched places of one transformer share: options, report, and the values of the running forward."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from uniref_fast import ops
from uniref_fast.fast import EightBitParts
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.models.packed import ForwardContext
from uniref_fast.patch.report import SELF_CHECK_TOLERANCE, PatchReport, Site
from uniref_fast.visibility import Rule

__all__ = ["PatchState", "batch_rows"]


class _Calls(threading.local):
    """Values of the running forward of one thread. Copies start empty.

    Attributes:
        img_shapes: Image sizes that the transformer was called with.
        checking: True while the original runs within a site, whose calls are not counted.
        context: Last result of `PatchState.context` and its arguments.
        rows: Last result of `PatchState.modulation_rows` and its arguments.
        masked: Last plan of attention with a mask, and the mask.
        kept: `KeptForward` of a transformer with kept references, or None.
        predictions: Predictions of the running edit with their kept references.
    """

    img_shapes: Any = None
    checking: bool = False
    context: Any = None
    rows: Any = None
    masked: Any = None
    kept: Any = None

    def __init__(self) -> None:
        self.predictions: list[Any] = []  # of each thread

    def __reduce__(self) -> tuple:
        return _Calls, ()


class _Shapes(WeakIdKeyDictionary):
    """Image sizes of forwards, by their rotary tables while these live. Copies start empty."""

    def __deepcopy__(self, memo: Any) -> _Shapes:
        return _Shapes()

    def __reduce__(self) -> tuple:
        return _Shapes, ()


class PatchState:
    """Options, report and running forward of one patched transformer.

    Args:
        report: Report that counts the calls.
        visibility: Visibility of attention.
        strict: Raise an error when a self-check fails.
        impl: Implementation forced on every op, or None.
        parts: Parts that compute in 8 bits, or None for the mode "exact".
    """

    def __init__(
        self,
        report: PatchReport,
        visibility: str | Rule,
        strict: bool,
        impl: str | None,
        parts: EightBitParts | None = None,
    ) -> None:
        self.report, self.visibility, self.strict, self.impl, self.parts = report, visibility, strict, impl, parts
        self.calls = _Calls()
        self.shapes = _Shapes()

    @property
    def in_kept_step(self) -> bool:
        """True while a forward runs that takes the keys and values of references from the store."""
        return self.calls.kept is not None and self.calls.kept.kept

    def remember_shapes(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Store the image sizes of a call of the transformer (a forward pre-hook)."""
        self.calls.img_shapes = kwargs.get("img_shapes", args[4] if len(args) > 4 else None)

    # ---- one forward of the transformer ----

    def context(self, hidden_states: Tensor, text_length: int, mask: Tensor | None, freqs: tuple) -> ForwardContext:
        """Return the context of the running forward; its first block builds it, the others reuse it.

        Args:
            hidden_states: Image stream, `[B, N_image, C]`.
            text_length: Rows of the text stream of each sample, padding included.
            mask: Valid text tokens, bool `[B, N_text]`, or None for all.
            freqs: Complex rotary tables of image and text, `[N_image, D / 2]` and `[N_text, D / 2]`.
        """
        kept = self.calls.kept
        if kept is not None:
            kept.context = kept.context or self._kept_context(kept, hidden_states, text_length, mask, freqs)
            return kept.context
        return self._whole_context(hidden_states, text_length, mask, freqs)

    def _kept_context(
        self, kept: Any, hidden_states: Tensor, text_length: int, mask: Tensor | None, freqs: tuple
    ) -> ForwardContext:
        """Return the context of a forward with kept references."""
        if not kept.kept:
            whole = self._whole_context(hidden_states, text_length, mask, freqs, kept.zero_cond_t)
            return replace(whole, references=kept.start(whole.layout, whole.rotary))
        rows = kept.rows
        return ForwardContext(
            layout=rows.layout, visibility=self.visibility, rotary=rows.rotary(kept.prediction.rotary),
            references=rows, impl=self.impl, rounding="eager",
        )  # fmt: skip

    def _whole_context(
        self, hidden_states: Tensor, text_length: int, mask: Tensor | None, freqs: tuple, zero_cond_t: bool = False
    ) -> ForwardContext:
        batch, image_length = hidden_states.shape[:2]
        # With checkpointing a backward runs the blocks again, possibly after other forwards and in another thread. The
        # tensors that the checkpoint keeps, such as the rotary tables, then tell to which forward the call belongs.
        shapes = None
        if self.visibility != "full" or self.calls.kept is not None:
            shapes = self.shapes.setdefault(freqs[0], self.calls.img_shapes)
            assert shapes is not None, "no image sizes are known of this forward"
        grids = [_grids(shapes, sample, image_length) for sample in range(batch)]
        key = (text_length, grids)
        saved = self.calls.context
        if saved and saved[0] == key and saved[1] is mask and saved[2] is freqs[0] and saved[3] is freqs[1]:
            return saved[4]
        with torch.inference_mode(False), torch.no_grad():
            runs = _text_runs(mask, batch, text_length)
            samples = [Sample(text, *shapes) for text, shapes in zip(runs, grids, strict=True)]
            layout = SelfLayout.qwen(samples, zero_cond_t=zero_cond_t)
            joint = torch.cat([freqs[1], freqs[0]]).repeat(batch, 1)  # [text | image] of every sample
            rotary = joint.real.float().contiguous(), joint.imag.float().contiguous()
            context = ForwardContext(
                layout=layout, visibility=self.visibility, rotary=rotary, impl=self.impl, rounding="eager"
            )
        self.calls.context = (key, mask, *freqs, context)  # holding the tensors keeps their identity unambiguous
        return context

    def modulation_rows(self, index: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
        """Return the row of the `[B or 2 B, C]` modulation table for every token of a stream, int32 `[B * length]`.

        Args:
            index: 0 for tokens with the sampled t, another number for t = 0, `[B, length]`. None: all have the
                sampled t.
            batch: Number of samples B.
            length: Tokens of each sample in the stream.
            device: Device of the result.
        """
        if ops.is_traced() or torch.compiler.is_exporting():
            rows = torch.arange(batch, dtype=torch.int32, device=device)[:, None].expand(batch, length)
            return (rows if index is None else rows + (index != 0).to(torch.int32) * batch).reshape(-1).contiguous()
        if index is None:
            return batch_rows(batch, length, device)
        saved = self.calls.rows
        if saved and saved[0] is index and saved[1] == batch:
            return saved[2]
        # rows [batch, 2 * batch) of the table are those of t = 0
        rows = batch_rows(batch, length, device).view(batch, length) + (index != 0).to(torch.int32) * batch
        self.calls.rows = (index, batch, rows.reshape(-1))
        return self.calls.rows[2]

    def count_onednn(self) -> None:
        """Count a Linear that oneDNN computed."""
        if not self.calls.checking:
            self.report.onednn_linears += 1

    def refuse(self, site: Site, reason: str, original: Callable[[], tuple]) -> tuple:
        """Count a refusal and run the original."""
        if not self.calls.checking:
            site.fallbacks[reason] += 1
        return original()

    def _uncounted(self, original: Callable[[], tuple]) -> tuple:
        """Return the original's result without counting the calls of sites within it."""
        self.calls.checking = True
        try:
            return original()
        finally:
            self.calls.checking = False

    def accept(
        self,
        site: Site,
        fused: tuple,
        like: Tensor,
        original: Callable[[], tuple],
        check: Callable[[], float] | None,
        choice: tuple[str, str | None],
    ) -> tuple:
        """Count a fused result and return it, or the original's result if the self-check fails.

        Args:
            site: Site that was called.
            fused: Result of the fused operators.
            like: Input of the site, whose dtype decides the tolerance.
            original: Function that runs the original.
            check: Function that compares the result with the original's and returns the relative error; None for no
                self-check.
            choice: Implementation that computed the result, and for attention the reason of the choice.

        Raises:
            RuntimeError: If the self-check fails and the patch is strict.
        """
        if self.calls.checking:  # inside an original that runs for another site, so not a call by the user
            return fused
        if check is not None:
            with torch.no_grad():  # a checkpoint counts the tensors that are saved, also those of the comparison
                error = check()
            tolerance = site.tolerance or SELF_CHECK_TOLERANCE[like.dtype]
            message = f"differs from the original by {error:.2e} (relative; allowed {tolerance:.0e})"
            if error > tolerance and self.strict:  # the site stays unchecked: the next call raises too
                advice = "unpatch, or patch with strict=False to leave such sites alone"
                raise RuntimeError(f"{site.name} {message}; {advice}")
            site.max_rel_error = error
            if error > tolerance:
                site.disabled = message
                site.fallbacks[message] += 1
                return self._uncounted(original)
        served, reason = choice
        site.calls[served] += 1
        if reason is not None:
            site.reasons[f"{served}: {reason}"] += 1
        return fused


def _grids(shapes: Any, sample: int, image_length: int) -> tuple:
    """Return target and reference grids of a sample; without shapes, one grid of all image tokens.

    One grid is enough for the visibility "full", which does not depend on the images.
    """
    if shapes is None:
        return ((1, 1, image_length),)
    target, *references = shapes[sample if sample < len(shapes) else 0]
    return tuple(target), tuple(tuple(grid) for grid in references)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def batch_rows(batch: int, length: int, device: torch.device) -> Tensor:
    """Return the number of the sample for every token of a batch, int32 `[B * length]`."""
    return torch.arange(batch, dtype=torch.int32, device=device).repeat_interleave(length)


def _text_runs(mask: Tensor | None, batch: int, length: int) -> list[int | tuple[tuple[int, bool], ...]]:
    """Return the text of each sample as (length, valid) runs; it reads the mask on the host."""
    if mask is None:
        return [length] * batch
    return [
        tuple((len(list(run)), bool(valid)) for valid, run in itertools.groupby(row)) for row in mask.bool().tolist()
    ]
