"""Requests that wait for the denoising loop of an engine, and the progress that they report."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from uniref_fast.edit_loop import Edit
from uniref_fast.edit_session import CheckedRequest
from uniref_fast.layout import Sample

__all__ = ["MAX_OVERTAKEN", "EditProgress", "Job", "Queue"]

MAX_OVERTAKEN = 8
"""Number of later requests that may start before a waiting one that does not fit yet."""


@dataclass(frozen=True)
class EditProgress:
    """Progress of a running edit, the argument of `on_progress`.

    Attributes:
        steps: Number of denoising steps so far.
        num_inference_steps: Number of all steps.
        sample: Numbers of text tokens, and grids of the result and of the references, for the prompt.
        tokens: Number of tokens that a step computes for this edit. With guidance, those of the negative prompt count.
        waited: Seconds from its submission until it was encoded.
    """

    steps: int
    num_inference_steps: int
    sample: Sample
    tokens: int
    waited: float
    _preview: Callable[[], Any] = field(repr=False)

    def preview(self) -> Any:
        """Return the result that the last prediction leads to, as a PIL image, or a list of them for several images.

        Call it in `on_progress` only.
        """
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
    order: int = 0  # of arrival
    submitted: float = field(default_factory=time.monotonic)
    started: float = 0.0  # when it was taken from the queue
    first: Edit | None = None  # the edit before its first step, for a restart
    is_restarted: bool = False  # after an error of its scheduler


class Queue:
    """Waiting jobs, by priority and then in order of arrival."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self._added = 0

    def add(self, job: Job) -> None:
        self._added += 1
        job.order = self._added
        self.put_back(job)

    def put_back(self, job: Job) -> None:
        """Add a job again at its place."""
        self.jobs.append(job)
        self.jobs.sort(key=lambda each: (-each.priority, each.order))

    def take(self, room: float) -> Job | None:
        """Remove and return the first job of at most `room` tokens.

        Nothing is taken if a job before it was overtaken `MAX_OVERTAKEN` times.
        """
        for at, job in enumerate(self.jobs):
            if job.tokens is not None and job.tokens <= room:
                for passed in self.jobs[:at]:
                    passed.overtaken += 1
                return self.jobs.pop(at)
            if job.overtaken >= MAX_OVERTAKEN:
                return None
        return None
