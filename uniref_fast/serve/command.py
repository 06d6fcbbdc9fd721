"""Command `uniref-fast serve`. Imports PyTorch and the server libraries only when it runs."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import math
import os
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniref_fast.progress import announce, announce_import
from uniref_fast.serve.config import Limits, ServeConfig, limit_cached_products

if TYPE_CHECKING:
    from uniref_fast.adapters import Adapter
    from uniref_fast.serve.service import EditService

__all__ = ["add_arguments", "build_service", "run"]

KEY = "UNIREF_API_KEY"
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the server, without those of the model."""
    limits, add = Limits(), parser.add_argument_group("Server").add_argument
    add("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 for all. (default: %(default)s)")
    add("--port", type=_whole(0, 65535), default=8000,
        help="Port to listen on; 0 takes a free one. (default: %(default)s)")  # fmt: skip
    add(
        "--model-name",
        action="append",
        default=[],
        metavar="NAME",
        help="Further name that requests may give as their model; repeat the flag for more. (default: only --model)",
    )
    add("--allow-host", action="append", default=[], metavar="NAME",
        help="Further value of the header Host to accept beside loopback names; repeat the flag for more. (default: "
        "loopback names only for a server on a loopback address without a key; all names otherwise)")  # fmt: skip
    add("--allow-origin", type=_origin, action="append", default=[], metavar="ORIGIN",
        help="Origin of other web pages that may use the server, such as https://example.com; repeat the flag for "
        "more.")  # fmt: skip
    add("--allow-image-host", action="append", default=[], metavar="NAME",
        help="Host from which https URLs of pictures are read; repeat the flag for more. (default: none, and URLs are "
        "refused)")  # fmt: skip
    add = parser.add_argument_group("Limits").add_argument
    add("--max-tokens", type=_whole(1), metavar="N",
        help="Largest number of tokens of the edits that run together. (default: as many as fit the free memory of a "
        "GPU, no limit on a CPU)")  # fmt: skip
    add(
        "--max-waiting",
        type=_whole(1),
        default=64,
        metavar="N",
        help="Largest number of edits that wait; further ones are refused with status 429. (default: %(default)s)",
    )
    add("--max-images", type=_whole(1), default=limits.images, metavar="N",
        help="Largest number of pictures of a request. (default: %(default)s)")  # fmt: skip
    add("--max-pixels", type=_whole(1), default=limits.pixels, metavar="N",
        help="Largest number of pixels of all pictures of a request together. (default: %(default)s)")  # fmt: skip
    add("--max-result-pixels", type=_whole(1), default=limits.result_pixels, metavar="N",
        help="Largest number of pixels of a result. (default: %(default)s)")  # fmt: skip
    add("--max-bytes", type=_whole(1), default=limits.body_bytes, metavar="N",
        help="Largest number of bytes of a request. (default: %(default)s)")  # fmt: skip
    add("--max-steps", type=_whole(1), default=limits.steps, metavar="N",
        help="Largest number of denoising steps of an edit. (default: %(default)s)")  # fmt: skip
    add("--deadline", type=_seconds, default=limits.seconds, metavar="SECONDS",
        help="Longest time from the arrival of a request until its response. (default: %(default)g)")  # fmt: skip


def _whole(least: int, most: int = 2**53) -> Any:
    def parse(text: str) -> int:
        number = int(text) if text.isdecimal() else -1
        if not least <= number <= most:
            upper = f" to {most}" if most < 2**53 else ""
            raise argparse.ArgumentTypeError(f"must be a whole number from {least}{upper}, got {text!r}")
        return number

    return parse


def _origin(text: str) -> str:
    found = re.fullmatch(r"https?://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?", text.lower())
    if found is None:
        raise argparse.ArgumentTypeError(
            f"must be a scheme and a host, such as https://example.com or http://localhost:3000, got {text!r}"
        )
    return found[0]


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text!r}")
    return seconds


def run(args: argparse.Namespace) -> int:
    """Serve until a signal. Everything that can be checked is checked before the model is loaded."""
    import uvicorn  # noqa: F401 - if it is missing, that is known before the model is loaded

    key = _key()
    listener = _listen(args.host, args.port)
    with contextlib.closing(listener):
        host, port = listener.getsockname()[:2]
        service = build_service(args, key, host)

        from uniref_fast.serve.server import Server

        server = Server(service)
        announce(f"serving {args.model} on http://{f'[{host}]' if ':' in host else host}:{port}")
        if key is None and not ipaddress.ip_address(host).is_loopback:
            announce(f"anyone who reaches {host} can use this server: set {KEY} to ask for a key")
        try:
            server.run(sockets=[listener])
        finally:
            failed = service.engine.stats().has_failed
            service.engine.close(drain=False)
    return 1 if failed else 0


def _key() -> str | None:
    """Return the key that requests must send. Raises ValueError for one that no header can hold."""
    key = os.environ.get(KEY)
    if key is not None and (not key or not key.isascii() or not key.isprintable() or key != key.strip()):
        raise ValueError(f"{KEY} must be a text of printable ASCII characters that is not empty; unset it for no key")
    return key


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address. Raises ValueError if that is not possible."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot listen on --host {host} --port {port}: {reason}") from error
    return listener


def build_service(args: argparse.Namespace, key: str | None, address: str = "127.0.0.1") -> EditService:
    """Load the model and start its engine.

    Args:
        args: Flags of the command.
        key: Key that requests must send, or None.
        address: IP address on which the server listens.
    """
    limit_cached_products()
    announce_import("PyTorch", "torch")
    from uniref_fast.adapters import check_adapters
    from uniref_fast.evaluation.config import EvalConfig
    from uniref_fast.evaluation.model import check_runs, on_device
    from uniref_fast.flags import parse_keep_references
    from uniref_fast.loading import defaults
    from uniref_fast.models.families import family_of
    from uniref_fast.runs import run_folder

    keep = parse_keep_references(args.keep_references)
    if args.drift is not None and keep != "auto":
        raise ValueError(f"--drift is the tolerance of --keep-references auto, got {args.keep_references}")
    runs = tuple(run_folder(path) for path in args.initial)
    check_runs(runs, args.model)
    loras = _loras(args.lora)
    trained = EvalConfig(
        (), Path(), model=args.model, initial=runs, lora=tuple(loras.values()), budget=args.budget,
        visibility=args.visibility,
    )  # fmt: skip
    check_adapters(trained.adapters, args.model, runs)
    if scaled := next((each for each in trained.adapters if each.scale != 1), None):
        raise ValueError(f"--lora {scaled.given}: requests give the scales; leave :{scaled.scale:g} out")
    device, dtype = on_device(args.device, args.dtype)
    if args.offload and (args.mode == "fast" or args.quantisation):
        raise ValueError(f"--offload {args.offload} needs the weights as they are stored, without --mode fast and "
                         "--quantisation; leave one out")  # fmt: skip
    if args.offload and device == "cpu":
        raise ValueError(f"--offload {args.offload} makes room on a GPU, and the model is on the CPU; leave it out")
    pipe, active = _load(args, runs, dict(zip(loras, trained.adapters, strict=True)), device, dtype)

    from uniref_fast import Engine
    from uniref_fast.serve.service import EditService

    engine = Engine(
        pipe, args.max_tokens, max_waiting=args.max_waiting, budget=trained.resolve_sizes()[0],
        visibility=trained.resolve_visibility(), keep_references=keep, drift=args.drift, keep_dtype=args.keep_dtype,
        mode=args.mode,
    )  # fmt: skip
    (steps, guidance), family = defaults(args.model), family_of(pipe)
    limits = Limits(
        args.max_bytes, args.max_images, args.max_pixels, args.max_result_pixels, args.max_steps, seconds=args.deadline
    )
    name = Path(args.model).resolve().name if Path(args.model).is_dir() else args.model
    config = ServeConfig(
        name, tuple(args.model_name), min(steps, limits.steps), guidance, tuple(loras), active, limits, api_key=key,
        hosts=_hosts(args.allow_host, key, address), origins=tuple(args.allow_origin),
        image_hosts=tuple(name.lower() for name in args.allow_image_host),
        negative_prompt=family.usual_negative_prompt(), written=family.written,
    )  # fmt: skip
    return EditService(engine, config)


def _loras(given: Sequence[str]) -> dict[str, str]:
    """Return the paths of adapters by their names, from NAME=PATH."""
    found: dict[str, str] = {}
    for text in given:
        name, _, path = text.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) or not path:
            raise ValueError(f"--lora is NAME=PATH with a name of letters, digits, - and _, got {text!r}")
        if name in found or re.fullmatch(r"run[0-9]+", name):
            raise ValueError(f"--lora {text}: the name {name} is taken; choose another one")
        found[name] = path
    return found


def _load(
    args: argparse.Namespace, runs: tuple[Path, ...], loras: Mapping[str, Adapter], device: str, dtype: str
) -> tuple[Any, tuple[str, ...]]:
    """Return the pipeline, with adapters for single requests, and the names of the adapters that all requests have."""
    import torch

    from uniref_fast import patch
    from uniref_fast.adapters import apply_adapters, check_adapters
    from uniref_fast.evaluation.model import load
    from uniref_fast.loading import offload

    pipe = load(args.model, runs, False, "cpu" if args.offload else device, dtype, (), args.quantisation)
    active = tuple(pipe.get_active_adapters()) if getattr(pipe.transformer, "peft_config", None) else ()
    if loras:
        adapters = list(loras.values())
        below = check_adapters(adapters, args.model, runs)
        apply_adapters(pipe, adapters, below, active, getattr(torch, dtype), given_names=list(loras))
    if args.offload:
        offload(pipe, args.offload, device)
    if args.mode == "fast":
        patch(pipe, mode="fast")  # frees the memory of 16-bit weights
    return pipe, active


def _hosts(given: Sequence[str], key: str | None, address: str) -> tuple[str, ...]:
    """Return the values of the header Host to accept; none if all are accepted."""
    if not given and (key is not None or not ipaddress.ip_address(address).is_loopback):
        return ()
    return (*LOOPBACK, address, *(name.lower() for name in given))
