"""Locks, signals and exit: at most one run per folder, and no rank without its launcher.

Every rank of a run holds a shared `flock` on `run.lock` in the folder of the run. Rank 0 takes the lock exclusively
first, which fails while a process of another run is alive, on this node or, where the file system passes locks on, on
another one. The kernel releases a lock when its process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import errno
import fcntl
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from uniref_fast.training.core.distributed import Ranks

__all__ = ["end_with_launcher", "explain_to_launcher", "leave", "locked", "signal_at_parent_end"]

LOCK_FILE = "run.lock"
PATIENCE = 10.0  # seconds to wait for the processes of a run that was just killed
UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
PARENT = os.getppid()  # when this module was imported


@contextlib.contextmanager
def locked(out: Path, ranks: Ranks) -> Iterator[None]:
    """Lock the folder of a run for these ranks within the block; create it if it is missing. All ranks.

    A new folder that holds only the lock in the end, as after a refused command, is removed again, with the parents
    that were created for it.

    Raises:
        ValueError: A process of another run holds the folder; on all ranks. The message names the process.
        OSError: The folder or the lock file cannot be created.
    """
    new = [path for path in (out, *out.parents) if not path.exists()] if ranks.rank == 0 else []
    file, problem = -1, None
    if ranks.rank == 0:
        file, problem = _claimed(out, ranks)
    problem = ranks.broadcast(problem)
    if problem is None and ranks.rank:
        file, problem = _shared(out, ranks)
    problems = [found for found in ranks.gather(problem) if found]
    try:
        if problems:
            raise problems[0]
        yield
    finally:
        if new and file >= 0 and os.listdir(out) == [LOCK_FILE]:
            with contextlib.suppress(OSError):
                (out / LOCK_FILE).unlink()
                for path in new:
                    path.rmdir()
        if file >= 0:
            os.close(file)


def _claimed(out: Path, ranks: Ranks) -> tuple[int, Exception | None]:
    """Take the lock for a new run: exclusively, then shared with the other ranks.

    Returns:
        A file descriptor or -1, and the error if there is one.
    """
    path, end, file = out / LOCK_FILE, time.monotonic() + PATIENCE, -1
    try:
        out.mkdir(parents=True, exist_ok=True)
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is(path, file):  # a refused command may have removed the file meanwhile
                    os.ftruncate(file, 0)
                    _sign(file, ranks)
                    fcntl.flock(
                        file, fcntl.LOCK_SH | fcntl.LOCK_NB
                    )  # not atomic: another process may take it in between
                    return file, None
            except BlockingIOError:
                if time.monotonic() > end:
                    raise ValueError(
                        f"{out} is in use by {_holder(path)}; wait until that run has ended, stop it, or give another "
                        "--out"
                    ) from None
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                print(
                    f"the file system of {out} has no locks ({error.strerror}): nothing keeps a second run from "
                    "writing to the same folder",
                    file=sys.stderr,
                )
                return file, None
            os.close(file)
            file = -1
            time.sleep(0.2)
    except (OSError, ValueError) as error:
        if file >= 0:
            os.close(file)
        return -1, error


def _shared(out: Path, ranks: Ranks) -> tuple[int, Exception | None]:
    """Join the lock that rank 0 has taken; returns as `_claimed` does."""
    file = -1
    try:
        out.mkdir(parents=True, exist_ok=True)  # on a node with a file system of its own
        file = os.open(out / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        _sign(file, ranks)
    except BlockingIOError:
        os.close(file)
        return -1, ValueError(f"{out} is in use by {_holder(out / LOCK_FILE)}; another run started at the same moment")
    except OSError as error:
        if error.errno not in UNSUPPORTED or file < 0:  # rank 0 reports a file system without locks
            return -1, error
    return file, None


def _is(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def _sign(file: int, ranks: Ranks) -> None:
    """Write into the lock file who holds it."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(sep=" ", timespec="seconds")
    line = {"rank": ranks.rank, "ranks": ranks.size, "pid": os.getpid(), "host": socket.gethostname(), "since": now}
    os.write(file, json.dumps(line).encode() + b"\n")


def _holder(path: Path) -> str:
    """Describe the process that holds a lock: the first of those that are not known to have ended."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        holder = next(line for line in lines if _may_live(line))
        return (
            f"process {holder['pid']} (rank {holder['rank']} of {holder['ranks']}) on {holder['host']} since "
            f"{holder['since']}"
        )
    except (OSError, ValueError, LookupError, TypeError, StopIteration):  # the file is being written
        return "another process"


def _may_live(line: dict[str, Any]) -> bool:
    if line["host"] != socket.gethostname():
        return True
    try:
        os.kill(line["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def end_with_launcher() -> None:
    """End this process when torchrun ends, also if torchrun is killed.

    Ranks that continue alone would train at the same time as the ranks of the next start. On Linux the kernel sends
    SIGKILL when the parent ends; elsewhere a thread checks every second whether the parent lives. Without torchrun this
    does nothing: ranks that a shell started may outlive it.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    if not signal_at_parent_end(signal.SIGKILL):
        threading.Thread(target=_watch, name="launcher watchdog", daemon=True).start()
    if os.getppid() != PARENT:  # the parent ended before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)


def signal_at_parent_end(number: signal.Signals) -> bool:
    """Ask the kernel to send this process a signal when its parent ends; return True if it will, as on Linux."""
    try:
        return ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0) == 0
    except (OSError, AttributeError, TypeError):  # no such function here
        return False


def _watch(pause: float = 1.0) -> None:
    while os.getppid() == PARENT:
        time.sleep(pause)
    print(f"the launcher (process {PARENT}) has ended, so this rank ends too", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def explain_to_launcher(message: str) -> None:
    """Let torchrun print a message as the cause of a failure, at the end of its own traceback.

    torchrun prints a traceback of itself for every rank that fails; without the message it ends with advice to change
    the script. Without torchrun this does nothing.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return
    details = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": str(int(time.time()))}}
    with contextlib.suppress(OSError), open(file, "w", encoding="utf-8") as out:
        json.dump({"message": details}, out)


def leave(status: int) -> NoReturn:
    """Flush the output and end the process at once, without tearing down the interpreter.

    The threads of a process group outlive `destroy_process_group` as long as anything refers to it. A thread that frees
    a tensor after the interpreter is gone aborts the process, and with it the job.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe
            stream.flush()
    os._exit(status)
