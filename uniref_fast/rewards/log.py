"""The reward log: every call of a judge as a line, which can answer the same call again without the judge."""

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

__all__ = ["Replay", "RewardLog", "Tally"]

# Failures of the way to the judge, not its answer: asked again where there is a server to ask.
PASSING = ("timeout", "connection", "overloaded", "replay")

# Fields that no server writes: a digest may hold a short key by chance, and a replay needs it as it is.
OWN = ("step", "key", "content", "sample", "attempts", "seconds", "status", "scores", "replayed")


class RewardLog:
    """A file that gets a record for each call; one process writes to it.

    A record is {"step", "key", "content", "sample", "attempts", "seconds", "status", "reply", "finish_reason",
    "refusal", "usage"} and "scores" by axis or "failure" {"kind", "reason"}; "replayed" where no server was asked. Or
    {"step", "void": true}: failures of that step, so far, answer nothing.

    Args:
        path: The file; one that exists is continued.
        hide: Function that removes secrets from a JSON value; everything that a server sent passes it.

    Raises:
        ValueError: for an existing file damaged otherwise than by a kill.
        OSError: when it cannot be read, and from `append` and `void` when it cannot be written.
    """

    def __init__(self, path: Path, hide: Callable[[Any], Any]) -> None:
        if path.exists():
            read_records(path)  # raises for a damaged file, before any work
        self.path = path
        self._file: RecordFile | None = None
        self._hide = hide

    def append(self, record: dict[str, Any], result: Scores | Failure) -> None:
        if isinstance(result, Scores):
            record["scores"] = dict(result.axes)
        else:
            record["failure"] = {"kind": result.kind, "reason": result.reason}
        self._write({name: item if name in OWN else self._hide(item) for name, item in record.items()})

    def void(self, step: int) -> None:
        """Failures of the step are not to be replayed: they ended the run, and what caused them will be put right."""
        self._write({"step": step, "void": True})

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is None:  # at the first record, so that a command that is refused before it creates no file
            self.path.parent.mkdir(parents=True, exist_ok=True)
            keep_records(self.path, lambda record: True)  # takes out a last line that a kill has cut
            self._file = RecordFile(self.path)
        self._file.append(record)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class Replay:
    """Answers of reward logs, by the content of the call.

    Calls of equal content may have got unequal replies; the record of the same step and key comes before any other, and
    a later record before an earlier one.

    Attributes:
        paths: of the logs.

    Raises:
        ValueError: when a file is not there, or is no reward log.
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
            if record.get("void") is True:  # of what this file has so far; the other ranks' say it themselves
                valid = [one for one in valid if one["step"] != record["step"] or "failure" not in one]
                continue
            content = record.get("content")
            if not isinstance(content, str) or not (isinstance(record.get("reply"), str) or "failure" in record):
                raise ValueError(f"{path} is no reward log: a record of step {record['step']} is no call of a judge")
            valid.append(record)
        for record in valid:
            content = record["content"]
            self._records[content, record["step"], tuple(record.get("key", ()))] = record
            if (content,) not in self._records or not _passing(record):
                self._records[(content,)] = record

    def find(self, content: str, step: int, key: Sequence[int], passing: bool) -> dict[str, Any] | None:
        """The record that answers a call; one that failed on the way counts only with `passing`."""
        for place in ((content, step, tuple(key)), (content,)):
            record = self._records.get(place)
            if record is not None and (passing or not _passing(record)):
                return record
        return None

    @staticmethod
    def result(record: dict[str, Any]) -> Scores | Failure:
        """What a record says, its reply being read anew."""
        if record.get("reply") is not None or record.get("refusal") is not None:
            return read_scores(Reply(record.get("reply"), record.get("finish_reason"), record.get("refusal")))
        return Failure(str(record["failure"]["kind"]), str(record["failure"]["reason"]))


def _passing(record: dict[str, Any]) -> bool:
    return record.get("failure", {}).get("kind") in PASSING


class Tally:
    """Counts of calls, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clear()

    def add(self, result: Scores | Failure, attempts: int, seconds: float, replayed: bool) -> None:
        with self._lock:
            self._failures[result.kind if isinstance(result, Failure) else None] += 1
            self._retries += max(attempts - 1, 0)
            self._replayed += replayed
            if not replayed:
                self._seconds.append(seconds)

    def take(self) -> dict[str, float]:
        """The counts since the last time; see `Judge.statistics`."""
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
