"""Metrics of the server for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from uniref_fast.engine import Engine

__all__ = ["Metrics"]

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)


class Metrics:
    """Metrics of one server, with a registry of their own.

    Args:
        engine: Engine whose state they show.
    """

    def __init__(self, engine: Engine) -> None:
        registry = self.registry = CollectorRegistry()
        self.responses = Counter(
            "uniref_fast_responses", "Responses to edit requests, by status and error code.", ["status", "code"],
            registry=registry,
        )  # fmt: skip
        self.images = Counter("uniref_fast_images", "Images that were made.", registry=registry)
        self.disconnects = Counter(
            "uniref_fast_disconnects", "Requests whose client has left before the response.", registry=registry
        )
        self.waited = Histogram(
            "uniref_fast_wait_seconds", "Seconds from the arrival of an edit at the engine until it is encoded.",
            registry=registry, buckets=SECONDS,
        )  # fmt: skip
        self.ran = Histogram(
            "uniref_fast_run_seconds", "Seconds from the encoding of an edit to its image.",
            registry=registry, buckets=SECONDS,
        )  # fmt: skip
        registry.register(_EngineMetrics(engine))

    def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self.registry)


class _EngineMetrics:
    """Collector of the numbers in `Engine.stats()`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Any]:
        stats = self._engine.stats()
        yield GaugeMetricFamily("uniref_fast_waiting", "Edits that wait.", value=stats.waiting)
        yield GaugeMetricFamily("uniref_fast_running", "Edits in the denoising loop.", value=stats.running)
        yield GaugeMetricFamily("uniref_fast_running_tokens", "Tokens of the edits in the loop.", value=stats.tokens)
        yield CounterMetricFamily("uniref_fast_steps", "Steps of the denoising loop.", value=stats.steps)
        yield CounterMetricFamily(
            "uniref_fast_step_seconds", "Seconds of the steps, without encoding and decoding.", value=stats.step_seconds
        )
        edits = CounterMetricFamily("uniref_fast_edits", "Edits that have ended, by their end.", labels=["end"])
        for end in ("finished", "failed", "cancelled"):
            edits.add_metric([end], getattr(stats, end))
        yield edits
