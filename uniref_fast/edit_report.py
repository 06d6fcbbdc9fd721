"""Report of an edit: which steps computed the references, and how much their keys and values had changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from uniref_fast.models.kept_references import KeptReferences
from uniref_fast.quantised_linear import describe_errors

__all__ = ["EditReport", "ReferenceReport"]


@dataclass(frozen=True)
class ReferenceReport:
    """Steps of one prediction of a request that computed its references.

    Attributes:
        request: Number of the request, from 0; None for a call of a patched pipeline.
        prediction: "prompt", or "negative prompt" for the second prediction of guidance; "prompt of image 2" and so on
            for a request with several images; "prediction 1", "prediction 2" for those of a patched pipeline, in the
            order of their first calls.
        steps: Number of denoising steps.
        refreshed: Numbers of the steps, from 0, that computed the references. Empty without references.
        drift: Relative change of their keys and values, which each of these steps but the first has measured.
        kept_bytes: Bytes of the kept keys and values.
    """

    request: int | None
    prediction: str
    steps: int
    refreshed: tuple[int, ...]
    drift: tuple[float, ...]
    kept_bytes: int

    @property
    def max_drift(self) -> float | None:
        """Largest measured drift; None if none was measured."""
        return max(self.drift, default=None)

    def __str__(self) -> str:
        where = self.prediction if self.request is None else f"request {self.request + 1}, {self.prediction}"
        if not self.refreshed:
            return f"{where}: no references"
        drift = "" if self.max_drift is None else f"; drift at most {self.max_drift:.3f}"
        return (
            f"{where}: references computed in {len(self.refreshed)} of {self.steps} steps "
            f"({', '.join(map(str, self.refreshed))}){drift}; {self.kept_bytes / 2**20:.1f} MiB kept"
        )


@dataclass
class EditReport:
    """Report that `edit(..., report=report)` fills. `str(report)` is for reading.

    Attributes:
        compare: Run the exact edit as well, to measure `latent_errors`; this more than doubles the time.
        references: Steps that computed the references, for each prediction of each request. Empty if nothing was kept.
        errors: Relative error of the first call of each Linear and attention in 8 bits by name,
            `|8 bits - 16 bits| / |16 bits|`.
        latent_errors: Relative error of the final latents of each request, `|result - exact| / |exact|`. The exact edit
            keeps no references and computes in 16 bits. Empty without `compare`.
        note: Sentence on the Linears that `mode="fast"` has left as they are, because another library has quantised
            them; None if there is none.
        forwards: Number of forwards of the packed model by how they ran with `capture=True`: "replayed" from a CUDA
            graph, or the reason why they were not. Empty without it.
    """

    compare: bool = False
    references: list[ReferenceReport] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    latent_errors: list[float] = field(default_factory=list)
    note: str | None = None
    forwards: Counter[str] = field(default_factory=Counter)

    def fill(
        self,
        kept: Sequence[tuple[int, int, Sequence[KeptReferences]]],
        errors: dict[str, float],
        latent_errors: list[float],
    ) -> None:
        """Replace the content by that of an edit.

        Args:
            kept: Number from 0, number of images and kept references of each request. These are listed image by image,
                for the prompt and, with guidance, for the negative prompt, and empty where nothing was kept.
            errors: Errors of the parts in 8 bits.
            latent_errors: Errors of the final latents.
        """
        self.errors, self.latent_errors = errors, latent_errors
        self.references = [
            ReferenceReport(
                i, name, store.steps, tuple(store.refreshed), tuple(store.drifts), store.nbytes
            )
            for i, images, stores in kept
            for name, store in zip(_predictions(images, len(stores)), stores, strict=True)
        ]  # fmt: skip

    def __str__(self) -> str:
        lines = [*map(str, self.references)] or ["references computed in every step"]
        if self.errors:
            lines.append(f"{len(self.errors)} parts in 8 bits: {describe_errors(self.errors)}")
        lines += [self.note] if self.note else []
        if self.forwards:
            lines.append(f"forwards: {', '.join(f'{count} x {how}' for how, count in self.forwards.items())}")
        lines += [f"request {i}: error of the latents {error:.2%}" for i, error in enumerate(self.latent_errors, 1)]
        return "\n".join(lines)


def _predictions(images: int, stores: int) -> list[str]:
    """Return the name of each prediction of a request."""
    names = ("prompt", "negative prompt")[: stores // images]
    return [f"{name} of image {i}" if images > 1 else name for i in range(1, images + 1) for name in names]
