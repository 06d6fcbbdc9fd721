"""Requests that wait for the denoising loop of an engine, and the progress that they report."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from uniref_fast.edit_loop import Edit
from uniref_fast.edit_session import CheckedRequest

__all__ = ["MAX_OVERTAKEN", "EditProgress", "Job", "Queue"]

MAX_OVERTAKEN = 8
"""Number of later requests that may start before a waiting one that does not fit yet."""


@dataclass(frozen=True)
class EditProgress:
    """Progress of a running edit, the argument of `on_progress`.

    Attributes:
        steps: Number of denoising steps so far.
        num_inference_steps: Number of all steps.
    """

    steps: int
    num_inference_steps: int
    _preview: Callable[[], Any] = field(repr=False)

    def preview(self) -> Any:
        """Return the result that the last prediction leads to, as a PIL image. Call it in `on_progress` only."""
        return self._preview()


@dataclass(eq=False)
class Job:
    """A request from its submission to its result."""

    checked: CheckedRequest
    output_type: str
    future: Future[Any]
    on_progress: Callable[[EditProgress], object] | None
    priority: int
    tokens: int | None = None  # not counted yet
    overtaken: int = 0
    first: Edit | None = None  # the edit before its first step, if it can be restarted


class Queue:
    """Waiting jobs, by priority and then in order of arrival."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def add(self, job: Job) -> None:
        at = next((i for i, other in enumerate(self.jobs) if other.priority < job.priority), len(self.jobs))
        self.jobs.insert(at, job)

    def take(self, fits: Callable[[Job], bool]) -> Job | None:
        """Remove and return the first job that fits, unless one before it was overtaken `MAX_OVERTAKEN` times."""
        for at, job in enumerate(self.jobs):
            if fits(job):
                for passed in self.jobs[:at]:
                    passed.overtaken += 1
                return self.jobs.pop(at)
            if job.overtaken >= MAX_OVERTAKEN:
                return None
        return None
