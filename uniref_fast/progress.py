"""Lines and bars on stderr that show what runs, so that no command is silent for long.

    announce_import("PyTorch", "torch")
    with running("encoding", total=96, unit="row") as bar:
        for row in rows:
            ...
            bar.update()

Work that ends within a second shows nothing. Longer work shows a progress bar on a terminal. Elsewhere it prints a line
after that second and then every five seconds: "encoding: 24 of 96 rows".
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

__all__ = ["announce", "announce_import", "launcher_rank", "running", "tracked"]

T = TypeVar("T")
IMPORT_LOGGERS = "bitsandbytes", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"
AFTER, EVERY = 1.0, 5.0  # seconds until work shows its first line, and between later ones


def announce(text: str) -> None:
    """Print a line on stderr, above a progress bar if there is one."""
    if "tqdm" in sys.modules and sys.stderr.isatty():
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)
    else:
        print(text, file=sys.stderr, flush=True)


def announce_import(name: str, module: str) -> None:
    """Announce an import that takes seconds, unless it was done already.

    Warnings that libraries of quantised weights cause while they are imported are not shown: diffusers imports all that
    are installed, whether a command uses them or not.
    """
    if module not in sys.modules:
        announce(f"loading {name}")
    for logger in IMPORT_LOGGERS:
        logging.getLogger(logger).setLevel(logging.ERROR)


def launcher_rank() -> int:
    """Return the rank of this process as torchrun started it; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


class running:  # noqa: N801 - a context manager, as those of contextlib
    """Show that work is running for as long as the block takes, if that is more than a second.

    It may be entered again after its end, with another description.

    Args:
        what: Description of the work, such as "loading the model".
        total: Number of parts of the work, which `update` counts; None if it has no parts.
        unit: Name of a part.
        shown: False shows nothing, as on ranks other than 0.
    """

    def __init__(self, what: str = "", total: int | None = None, unit: str = "", shown: bool = True) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, 0
        self.after, self.shown = AFTER, shown
        self._ended, self._start = threading.Event(), 0.0
        self._thread: threading.Thread | None = None

    def of(self, what: str, after: float = AFTER) -> running:
        """Describe the work of the next block, which shows its first line after so many seconds."""
        self.after = after
        self.phase(what)
        return self

    def phase(self, what: str, total: int | None = None, unit: str = "") -> None:
        """Describe the work that begins now within the block."""
        self.what, self.total, self.unit, self.done = what, total, unit, 0

    def update(self, count: int = 1) -> None:
        """Count finished parts."""
        self.done += count

    def __enter__(self) -> running:
        self._ended, self._start = threading.Event(), time.monotonic()
        if self.shown and self.total != 0:
            self._thread = threading.Thread(target=self._show, args=[self._ended], daemon=True, name="progress")
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _show(self, ended: threading.Event) -> None:
        if ended.wait(self.after):
            return
        if sys.stderr.isatty():
            self._show_bar(ended)
            return
        announce(self._line())
        while not ended.wait(EVERY):
            announce(self._line())

    def _show_bar(self, ended: threading.Event) -> None:
        from tqdm import tqdm

        with tqdm(file=sys.stderr, leave=False, dynamic_ncols=True) as bar:
            while True:  # the phase may have changed
                bar.total, bar.n, bar.unit = self.total, self.done, self.unit or "it"
                bar.bar_format = "{desc}{elapsed}" if self.total is None else None
                bar.set_description(self.what)
                if ended.wait(0.2):
                    return

    def _line(self) -> str:
        seconds = time.monotonic() - self._start
        units = f" {self.unit}s" if self.unit else ""
        parts = "" if self.total is None else f": {self.done} of {self.total}{units}"
        return f"{self.what}{parts}" + (f", {seconds:.0f} s so far" if seconds >= EVERY else "")


def tracked(items: Iterable[T], what: str, unit: str = "", total: int | None = None, shown: bool = True) -> Iterator[T]:
    """Yield items and show how many are done; see `running`.

    Args:
        items: Items to yield.
        what: Description of the work.
        unit: Name of an item.
        total: Number of items; None asks `items`, if it has a length.
        shown: False shows nothing.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with running(what, total, unit, shown) as bar:
        for item in items:
            yield item
            bar.update()
