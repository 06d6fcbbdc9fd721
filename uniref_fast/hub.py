"""Find a model on the Hugging Face hub or in its local cache, without waiting for a network that does not answer."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import urllib.parse
import urllib.request
from pathlib import Path

from uniref_fast.progress import launcher_rank

__all__ = ["is_reachable", "local_or_hub"]

SECONDS = 2.0  # to wait for a connection


def local_or_hub(name: str, given: str) -> str:
    """Return the place that a model can be loaded from now.

    Args:
        name: "builtin", a folder, or a model id of the Hugging Face hub.
        given: Name of the model in messages, such as "--model NAME".

    Returns:
        The name itself; for a model id the folder of its snapshot in the cache if the hub cannot be reached.

    Raises:
        ValueError: If the hub cannot be reached, or must not be used, and the model is not in the cache.
    """
    if name == "builtin" or Path(name).is_dir():
        return name
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and is_reachable(constants.ENDPOINT):
        return name
    offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else None
    why = offline or f"no network: {constants.ENDPOINT} could not be reached"
    folder = _snapshot(name)
    if folder is None:
        raise ValueError(
            f"{given}: {why}{', and the model is not in the cache' if offline else ''}; give a local folder, or "
            f"download it first with: hf download {name}"
        )
    if offline is None and not launcher_rank():
        print(f"{why}; {name} is read from the cache, {folder}", file=sys.stderr)
    return folder


def is_reachable(url: str, seconds: float = SECONDS) -> bool:
    """Return True if the server of a URL, or the proxy that requests to it go through, accepts a connection.

    Args:
        url: URL of the server.
        seconds: Time to wait for a connection; the name of the server has to be resolved in this time too.
    """
    address = urllib.parse.urlsplit(url)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(address.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(address.hostname or ""):
        address = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = address.port or (80 if address.scheme == "http" else 443)
    found = threading.Event()

    def connect() -> None:
        with contextlib.suppress(OSError, UnicodeError):
            socket.create_connection((address.hostname, port), seconds).close()
            found.set()

    thread = threading.Thread(target=connect, daemon=True)  # a resolver may take longer, and knows no timeout
    thread.start()
    thread.join(seconds + 0.5)
    return found.is_set()


def _snapshot(name: str) -> str | None:
    """Return the folder of the newest snapshot of a model in the cache, or None."""
    from huggingface_hub import snapshot_download

    with contextlib.suppress(OSError, ValueError):  # the library has classes of both for a model that is not there
        folder = Path(snapshot_download(name, local_files_only=True))
        if (folder / "model_index.json").is_file():
            return str(folder)
    return None
