"""Reward log of a judge: one line per call, which can answer the same call again without the judge."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uniref_fast.files import RecordFile, keep_records, read_records
from uniref_fast.rewards.reply import Reply, read_scores
from uniref_fast.rewards.types import Failure, Scores

__all__ = ["CallStatistics", "Replay", "RewardLog"]

# Failures of the connection, not of the answer: such calls are asked again if there is a server to ask.
PASSING = ("timeout", "connection", "overloaded", "replay")

# Fields that no server writes. They are not searched for the key: a digest may hold a short key by chance.
OWN = ("step", "key", "content", "sample", "attempts", "seconds", "status", "scores", "replayed")


class RewardLog:
    """A JSONL file with a record for each call; one process writes to it.

    A record is {"step", "key", "content", "sample", "attempts", "seconds", "status", "reply", "finish_reason",
    "refusal", "usage"} and "scores" by axis or "failure" {"kind", "reason"}; "replayed" if no server was asked. The
    record {"step", "void": true} says that the earlier failures of that step answer no call.

    Args:
        path: File of the log; an existing file is continued.
        hide: Function that removes secrets from a JSON value; everything that a server sent passes it.

    Raises:
        ValueError: If an existing file is damaged, other than by a cut last line.
        OSError: If the file cannot be read, and from `append` and `void` if it cannot be written.
    """

    def __init__(self, path: Path, hide: Callable[[Any], Any]) -> None:
        if path.exists():
            read_records(path)  # raises for a damaged file, before any work
        self.path = path
        self._file: RecordFile | None = None
        self._hide = hide

    def append(self, record: dict[str, Any], result: Scores | Failure) -> None:
        """Write the record of a call with its result."""
        if isinstance(result, Scores):
            record["scores"] = dict(result.axes)
        else:
            record["failure"] = {"kind": result.kind, "reason": result.reason}
        self._write({name: item if name in OWN else self._hide(item) for name, item in record.items()})

    def void(self, step: int) -> None:
        """Record that failures of a step are not to be replayed: they ended the run, and their cause will be fixed."""
        self._write({"step": step, "void": True})

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is None:  # opened by the first record, so that a refused command creates no file
            self.path.parent.mkdir(parents=True, exist_ok=True)
            keep_records(self.path, lambda record: True)  # removes a last line that a kill has cut
            self._file = RecordFile(self.path)
        self._file.append(record)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class Replay:
    """Replies of reward logs, by the content of the call.

    Calls with equal content may have different replies. The record of the same step and key has precedence over all
    others, and a later record over an earlier one.

    Args:
        paths: Files of the logs.

    Raises:
        ValueError: If a file does not exist, or is not a reward log.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self._records: dict[tuple, dict[str, Any]] = {}
        for path in paths:
            self._read(path)

    def _read(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"there is no reward log {path} to replay")
        valid: list[dict[str, Any]] = []
        for record in read_records(path):
            if record.get("void") is True:  # for the records of this file so far; each rank voids its own file
                valid = [one for one in valid if one["step"] != record["step"] or "failure" not in one]
                continue
            content = record.get("content")
            if not isinstance(content, str) or not (isinstance(record.get("reply"), str) or "failure" in record):
                raise ValueError(f"{path} is not a reward log: a record of step {record['step']} is not a judge call")
            valid.append(record)
        for record in valid:
            content = record["content"]
            self._records[content, record["step"], tuple(record.get("key", ()))] = record
            if (content,) not in self._records or not _passing(record):
                self._records[(content,)] = record

    def find(self, content: str, step: int, key: Sequence[int], passing: bool) -> dict[str, Any] | None:
        """Return the record that answers a call, or None; a failed connection answers only with `passing`."""
        for place in ((content, step, tuple(key)), (content,)):
            record = self._records.get(place)
            if record is not None and (passing or not _passing(record)):
                return record
        return None

    @staticmethod
    def result(record: dict[str, Any]) -> Scores | Failure:
        """Return the result of a record; its reply is parsed again."""
        if record.get("reply") is not None or record.get("refusal") is not None:
            return read_scores(Reply(record.get("reply"), record.get("finish_reason"), record.get("refusal")))
        return Failure(str(record["failure"]["kind"]), str(record["failure"]["reason"]))


def _passing(record: dict[str, Any]) -> bool:
    return record.get("failure", {}).get("kind") in PASSING


class CallStatistics:
    """Statistics of calls; the methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clear()

    def add(self, result: Scores | Failure, attempts: int, seconds: float, replayed: bool) -> None:
        """Count a call."""
        with self._lock:
            self._failures[result.kind if isinstance(result, Failure) else None] += 1
            self._retries += max(attempts - 1, 0)
            self._replayed += replayed
            if not replayed:
                self._seconds.append(seconds)

    def take(self) -> dict[str, float]:
        """Return the statistics since the last time that they were taken; see `Judge.statistics`."""
        with self._lock:
            failures, seconds = self._failures, self._seconds
            calls = failures.total()
            values: dict[str, Any] = {"calls": calls, "retries": self._retries, "replayed": self._replayed}
            values["failed"] = (calls - failures[None]) / max(calls, 1)
            values |= {f"failed/{kind}": n / calls for kind, n in sorted((k, n) for k, n in failures.items() if k)}
            if seconds:
                values |= {"seconds_mean": np.mean(seconds), "seconds_p95": np.percentile(seconds, 95)}
            self._clear()
        return {name: float(value) for name, value in values.items()}

    def _clear(self) -> None:
        self._failures: Counter[str | None] = Counter()
        self._seconds: list[float] = []
        self._retries = self._replayed = 0
