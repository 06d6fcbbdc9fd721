"""The server on several GPUs and machines: a deployment of Ray Serve with one engine for each replica.

    # edits.py; start it with `serve run edits:app`
    app = uniref_fast.serve.ray.application(build, num_gpus=1, max_replicas=8)

The routes are those of `uniref-fast serve`. Ray distributes requests, and adds replicas while tokens wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from uniref_fast.serve.app import create_app
from uniref_fast.serve.config import limit_cached_products
from uniref_fast.serve.service import EditService

__all__ = ["TokenPolicy", "application"]

TOKENS = "tokens"
"""Name of the metric by which replicas are added: the tokens of the edits of a replica that wait and run."""


class Edits:
    """A replica: the service that `build` returns, with its routes.

    Args:
        build: Function that loads the model, and returns its service.
    """

    def __init__(self, build: Callable[[], EditService]) -> None:
        limit_cached_products()
        self.service = build()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.service)

    def check_health(self) -> None:
        """Raise RuntimeError if the engine has failed; Ray then replaces the replica."""
        if self.service.engine.stats().has_failed:
            raise RuntimeError("the engine has failed")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the metric that `TokenPolicy` reads."""
        stats = self.service.engine.stats()
        return {TOKENS: float(stats.tokens + stats.waiting_tokens)}


class TokenPolicy:
    """Policy of autoscaling: as many replicas as the tokens of all edits need, waiting ones included.

    Args:
        tokens_per_replica: Number of tokens for which one replica is kept.
    """

    def __init__(self, tokens_per_replica: int) -> None:
        self.tokens_per_replica = tokens_per_replica

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return the number of replicas, and no state."""
        tokens = sum((context.aggregated_metrics or {}).get(TOKENS, {}).values())
        least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        return min(max(math.ceil(tokens / self.tokens_per_replica), least), most), {}


def application(
    build: Callable[[], EditService],
    *,
    num_gpus: float = 1,
    num_cpus: float = 1,
    min_replicas: int = 1,
    max_replicas: int = 1,
    tokens_per_replica: int = 65536,
    seconds: float = 600.0,
) -> serve.Application:
    """Return an application for `ray.serve.run`, or for `serve run` on the command line.

    Args:
        build: Function that loads the model in a replica, and returns its service.
        num_gpus: GPUs of a replica.
        num_cpus: CPU cores of a replica.
        min_replicas: Smallest number of replicas.
        max_replicas: Largest number of replicas. Above `min_replicas`, Ray adds and removes replicas.
        tokens_per_replica: Number of tokens, running and waiting, for which one replica is kept.
        seconds: Longest time that a replica which is removed may take to finish its edits.

    Raises:
        ValueError: If the numbers of replicas are not 1 <= `min_replicas` <= `max_replicas`.
    """
    if not 1 <= min_replicas <= max_replicas:
        raise ValueError(f"replicas must be 1 <= min <= max, got min = {min_replicas} and max = {max_replicas}")
    number: dict[str, Any] = {"num_replicas": min_replicas}
    if max_replicas > min_replicas:
        policy = AutoscalingPolicy(
            policy_function=TokenPolicy, policy_kwargs={"tokens_per_replica": tokens_per_replica}
        )
        number = {
            "autoscaling_config": AutoscalingConfig(min_replicas=min_replicas, max_replicas=max_replicas, policy=policy)
        }
    deployment: Any = serve.deployment(
        serve.ingress()(Edits),
        name="edits",
        ray_actor_options={"num_gpus": num_gpus, "num_cpus": num_cpus},
        max_ongoing_requests=1000,  # the engine has the queue, and refuses what is too much
        graceful_shutdown_timeout_s=seconds,
        **number,
    )
    return deployment.bind(build)
