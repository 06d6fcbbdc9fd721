"""Settings of the server: what it offers, its limits, and who may use it. Imports no server library."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from uniref_fast.guidance import EMPTY_PROMPT

__all__ = ["Limits", "ServeConfig", "limit_cached_products"]


def limit_cached_products() -> None:
    """Limit the memory that oneDNN uses on a CPU for its cache of compiled products.

    It keeps 1024 of them by default, and a server meets packs of ever new lengths: its memory would grow for hours.
    A value of the environment variable `ONEDNN_PRIMITIVE_CACHE_CAPACITY` that the user has set stays. oneDNN reads it
    at the first product of a process, so this is called before a model runs.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


@dataclass(frozen=True)
class Limits:
    """Largest values that the server accepts.

    Attributes:
        body_bytes: Bytes of the body of a request.
        images: Pictures of a request.
        pixels: Pixels of all pictures of a request together, counted before they are decoded.
        result_pixels: Pixels of a result.
        steps: Denoising steps of an edit.
        n: Images that one request asks for.
        seconds: Seconds from the arrival of a request until its response; its edits are cancelled afterwards.
    """

    body_bytes: int = 64 * 1024**2
    images: int = 16
    pixels: int = 64_000_000
    result_pixels: int = 2048 * 2048
    steps: int = 100
    n: int = 10
    seconds: float = 600.0


@dataclass(frozen=True)
class ServeConfig:
    """Settings of the server.

    Attributes:
        model: Name of the model in responses.
        aliases: Further names that requests may give as `model`.
        steps: Denoising steps of a request that gives none.
        guidance: True CFG scale of a request that gives none; 1 turns guidance off.
        loras: Names of the adapters that requests may use.
        active_loras: Names of the adapters that all requests have, those of the runs of `--initial`.
        limits: Largest values.
        api_key: Key that requests must send; None asks for none.
        hosts: Values of the header `Host` that are accepted; empty accepts all.
        origins: Origins of other web pages that may use the server.
        image_hosts: Hosts from which image URLs are read; empty refuses all URLs.
        negative_prompt: Negative prompt of a request with guidance that gives none (`Family.usual_negative_prompt`).
        written: Function that writes an instruction in the form of the model's prompts (`Family.written`).
    """

    model: str
    aliases: tuple[str, ...] = ()
    steps: int = 50
    guidance: float = 4.0
    loras: tuple[str, ...] = ()
    active_loras: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    api_key: str | None = field(default=None, repr=False)
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    image_hosts: tuple[str, ...] = ()
    negative_prompt: str | None = EMPTY_PROMPT
    written: Callable[[str], str] = str
