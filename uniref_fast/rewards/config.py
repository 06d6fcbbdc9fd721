"""Configuration of the judge: a vision-language model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import contextlib
import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["JudgeConfig"]


@dataclass(frozen=True)
class JudgeConfig:
    """Settings of a judge: its endpoint, the requests and the replies.

    Attributes:
        url: Base URL of the OpenAI-compatible endpoint, up to its /v1; empty answers only what `replay` holds.
        model: Name of the model at the endpoint.
        concurrency: Largest number of simultaneous requests of this process.
        timeout: Time limit of a request in seconds.
        attempts: Largest number of requests for one reply, after connection errors, timeouts and the statuses 408, 429
            and 5xx.
        backoff: Waiting time in seconds before the second attempt; it doubles with each attempt. A Retry-After header
            of the server takes precedence.
        backoff_limit: Largest waiting time between attempts in seconds.
        patience: Length of an outage in seconds after which the waiting candidates fail; also the longest Retry-After
            that is obeyed.
        temperature: Sampling temperature; none leaves it to the server.
        seed: Seed of the sampling, to which the number of the reply is added; none leaves it to the server.
        max_tokens: Largest number of tokens of a reply, including its thinking.
        token_field: Name of that limit in requests; newer models of OpenAI need max_completion_tokens.
        samples: Number of replies per candidate; the score is their mean, without the replies that failed.
        max_side: Largest side in pixels of the images that are sent; larger ones are scaled down.
        json_mode: Way to ask for JSON: by a schema, as any JSON object, or by the prompt alone ("off"). If the server
            refuses one, the next is used.
        key_variable: Environment variable that holds the API key; without it no key is sent.
        replay: Reward log whose replies answer requests with the same content; other requests go to the server.
    """

    url: str = "http://localhost:8000/v1"
    model: str = "Qwen/Qwen3-VL-32B-Instruct"
    concurrency: int = 32
    timeout: float = 120.0
    attempts: int = 4
    backoff: float = 1.0
    backoff_limit: float = 30.0
    patience: float = 900.0
    temperature: float | None = 0.0
    seed: int | None = 0
    max_tokens: int = 1024
    token_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    samples: int = 1
    max_side: int = 2048
    json_mode: Literal["schema", "object", "off"] = "schema"
    key_variable: str = "JUDGE_API_KEY"
    replay: Path | None = None

    def __post_init__(self) -> None:
        _check_url(self.url)
        if not self.url and self.replay is None:
            raise ValueError("a judge needs a url, or a reward log to replay; both are empty")
        if not self.model:
            raise ValueError("a judge needs the name of its model, as the endpoint lists it at /models")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_variable):
            # the value is not shown, since it may be the key itself
            raise ValueError("key_variable must be the name of an environment variable (letters, digits, underscores)")
        for name, least in dict(concurrency=1, attempts=1, max_tokens=1, samples=1, max_side=16).items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("timeout", "backoff", "backoff_limit", "patience"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0 seconds, got {getattr(self, name)}")
        if self.temperature is not None and self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, or none; got {self.temperature}")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"{self.samples} samples at temperature 0 are the same reply; set temperature to 0.7")

    @property
    def base(self) -> str:
        return self.url.rstrip("/")

    def wait(self, attempts: int) -> float:
        """Return the seconds to wait after the given number of attempts."""
        return min(self.backoff * 2.0 ** min(attempts - 1, 60), self.backoff_limit)

    def options(self, sample: int) -> dict[str, Any]:
        """Return the fields of a request that control how the reply is generated."""
        options: dict[str, Any] = {"model": self.model, self.token_field: self.max_tokens}
        if self.temperature is not None:
            options["temperature"] = self.temperature
        if self.seed is not None:
            options["seed"] = self.seed + sample
        return options


def _check_url(url: str) -> None:
    if not url:
        return
    parts = None
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(url)
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError('url must be like "http://localhost:8000/v1"; this one has another scheme or no host')
    if parts.username or parts.password or parts.query:
        raise ValueError("url must hold no user, password or query: it is shown and logged; keys go into key_variable")
    if parts.path.rstrip("/").endswith(("/chat/completions", "/models")):
        raise ValueError(f"url must end with /v1, without the path of a request: {url.partition('/chat/')[0]}")
