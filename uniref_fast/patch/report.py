"""Report of a patch: the patched sites, with counters that change while the pipeline runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from uniref_fast.edit_report import ReferenceReport
from uniref_fast.quantised_linear import describe_errors

__all__ = ["EIGHT_BIT_TOLERANCE", "SELF_CHECK_TOLERANCE", "PatchReport", "Site"]

SELF_CHECK_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Largest accepted `max|patched - original| / max|original|` of the results of a site, by dtype."""

EIGHT_BIT_TOLERANCE = 0.3
"""The same for attention in 8 bits, whose keys, values and weights are rounded to 4 significant bits."""


@dataclass
class Site:
    """One patched place and its counters.

    Attributes:
        name: Name of the module within the transformer.
        calls: Accelerated calls, by the implementation that served them.
        fallbacks: Calls that ran the original, by reason.
        reasons: Accelerated attention calls, by "implementation: reason of the choice".
        traces: Number of times that torch.compile traced the fused operators of the site. The calls of compiled code
            are neither counted nor compared with the original.
        traced_originals: Traces of torch.compile and torch.export that took the original, by reason.
        max_rel_error: `max|patched - original| / max|original|` of the first accelerated call; None before it.
        disabled: Reason why the site runs the original from now on, or None.
        tolerance: Largest accepted error of the first call; None for `SELF_CHECK_TOLERANCE`.
        replacement: Function that returns a description of what replaced the place after `patch`, or None. It is None
            for blocks, for which `unpatch` raises an error instead.
    """

    name: str
    calls: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    traces: int = 0
    traced_originals: Counter[str] = field(default_factory=Counter)
    max_rel_error: float | None = None
    disabled: str | None = None
    tolerance: float | None = None
    replacement: Callable[[], str | None] | None = field(default=None, repr=False, compare=False)

    def record_trace(self, reason: str | None) -> None:
        """Count a trace: of the original for a reason, or of the fused operators."""
        if reason is None:
            self.traces += 1
        else:
            self.traced_originals[reason] += 1


@dataclass
class PatchReport:
    """Result of `patch`. It is live: its counters change while the pipeline runs. `str(report)` is for reading.

    Attributes:
        model: Class of the transformer.
        mode: Mode of the patch.
        visibility: Visibility of the patch.
        implementation: Implementation chosen for the model when it was patched; `calls` counts those that served calls.
        reason: Reason of that choice.
        sites: The patched places, each with its counters.
        notes: Places that were not patched, and why.
        references: Steps of the last edit that computed the references, for each prediction of guidance; empty
            without `keep_references`.
        references_not_kept: Calls of the transformer that computed the references and kept nothing, by reason.
        onednn_linears: Calls of Linears in float32 that oneDNN computed instead of MKL.
        eight_bit: Numbers of Linears and of attentions in 8 bits; None for the mode "exact".
        errors: Relative error of the first call of each of these by name, `|8 bits - 16 bits| / |16 bits|`.
    """

    model: str
    mode: str
    visibility: str
    implementation: str
    reason: str
    sites: list[Site]
    notes: list[str] = field(default_factory=list)
    references: list[ReferenceReport] = field(default_factory=list)
    references_not_kept: Counter[str] = field(default_factory=Counter)
    onednn_linears: int = 0
    eight_bit: tuple[int, int] | None = None
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def max_rel_error(self) -> float | None:
        """Largest error of a self-check over all sites; None before the first call."""
        return max((s.max_rel_error for s in self.sites if s.max_rel_error is not None), default=None)

    @property
    def calls(self) -> Counter[str]:
        """Accelerated calls, by the implementation that served them."""
        return sum((s.calls for s in self.sites), Counter())

    @property
    def fallbacks(self) -> Counter[str]:
        """Calls that ran the original, by reason."""
        return sum((s.fallbacks for s in self.sites), Counter())

    @property
    def traces(self) -> int:
        """Number of times that torch.compile traced the fused operators of a site."""
        return sum(s.traces for s in self.sites)

    @property
    def traced_originals(self) -> Counter[str]:
        """Traces of torch.compile and torch.export that took the original, by reason."""
        return sum((s.traced_originals for s in self.sites), Counter())

    @property
    def replaced(self) -> list[str]:
        """Places that other code replaced after `patch`, and what runs there instead."""
        found = ((site.name, site.replacement()) for site in self.sites if site.replacement is not None)
        return [f"{name} {description}" for name, description in found if description is not None]

    @property
    def reasons(self) -> Counter[str]:
        """Accelerated attention calls, by implementation and why it was chosen."""
        return sum((s.reasons for s in self.sites), Counter())

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {len(self.sites)} sites patched, mode={self.mode}, visibility={self.visibility}",
            f"  implementation  {self.implementation} when patched ({self.reason})",
            f"  accelerated     {self.calls.total()} calls"
            + "".join(f", {count} {name}" for name, count in self.calls.most_common()),
            f"  originals run   {sum(self.fallbacks.values())} calls",
        ]
        lines += [f"    {count:6d} x  {reason}" for reason, count in self.fallbacks.most_common()]
        if self.traces:
            lines.append(
                f"  compiled        {self.traces} traces of sites by torch.compile; calls of compiled code are neither "
                "counted nor compared with the original"
            )
        originals = self.traced_originals.most_common()
        lines += [f"  compiled        {count} traces of the original: {reason}" for reason, count in originals]
        if self.onednn_linears:
            reason = "MKL does not use the 512 bits of this CPU"
            lines.append(f"  linears         {self.onednn_linears} calls in float32 computed by oneDNN: {reason}")
        lines += [f"  attention       {count} x {reason}" for reason, count in self.reasons.most_common(4)]
        lines += [f"  disabled        {s.name}: {s.disabled}" for s in self.sites if s.disabled]
        lines += [f"  references      {steps}" for steps in self.references]
        lines += [f"  not kept        {n} x {reason}" for reason, n in self.references_not_kept.most_common()]
        error = self.max_rel_error
        checked = sum(s.max_rel_error is not None for s in self.sites)
        result = "not run yet" if error is None else f"max relative error {error:.2e}"
        lines.append(f"  self-check      {result}, {checked} of {len(self.sites)} sites compared with the original")
        if self.eight_bit is not None:
            linears, attentions = self.eight_bit
            measured = f"; {describe_errors(self.errors)}" if self.errors else "; errors are measured in the first call"
            lines.append(f"  8 bits          {linears} Linears, attention of {attentions} blocks{measured}")
        lines += [f"  replaced        {description}" for description in self.replaced]
        lines += [f"  note            {note}" for note in self.notes]
        return "\n".join(lines)
