"""Measured times of edits and of training steps, as `bench/speeds.py` wrote them on a device.

`assets/speeds/<device>.json` holds the times of whole edits and the tokens per second of whole training steps, each
with versions and date. A time is interpolated between two measurements of the same model on the same device, and never
extrapolated: without such measurements there is none, and the reason says so.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["MeasuredTime", "edit_time", "measured_devices", "model_key", "table", "training_speed"]

FOLDER = Path(__file__).parent / "assets" / "speeds"


@dataclass(frozen=True)
class MeasuredTime:
    """A figure from a table of measurements, or the reason why there is none.

    Attributes:
        value: Seconds of an edit, or tokens per second of training; None if nothing suitable was measured.
        source: Description of the measurements, with device, versions and date, or the reason.
    """

    value: float | None
    source: str


def model_key(sizes: Any) -> str:
    """Return the name of a transformer's shape in the tables, such as "60 blocks of 24 x 128".

    Args:
        sizes: Configuration of a transformer, or any object with these sizes under the same names.
    """
    return f"{sizes.num_layers} blocks of {sizes.num_attention_heads} x {sizes.attention_head_dim}"


@functools.cache
def table(device: str) -> dict[str, Any]:
    """Return the table of a device; empty if nothing was measured there."""
    path = FOLDER / f"{device}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def edit_time(model: str, dtype: str, guided: bool, tokens: int, steps: int, device: str) -> MeasuredTime:
    """Return the seconds of one edit.

    Args:
        model: Shape of the transformer, see `model_key`.
        dtype: Dtype of the model, such as "bfloat16".
        guided: Each step predicts for a negative prompt as well.
        tokens: Number of tokens of a step, of both predictions.
        steps: Number of denoising steps.
        device: Name of the device, see `tuning.device_name`.
    """
    rows = _rows("edits", {"model": model, "dtype": dtype, "guided": guided}, device)
    if isinstance(rows, str):
        return MeasuredTime(None, rows)
    pair = _neighbours(rows, "tokens", tokens)
    if isinstance(pair, str):
        return MeasuredTime(None, pair)
    fixed, step = (_interpolated(pair, "tokens", tokens, name) for name in ("seconds_fixed", "seconds_per_step"))
    between = " and ".join(str(row["tokens"]) for row in pair)
    source = (
        f"{fixed:.3g} s to encode and decode, {steps} steps of {step:.3g} s, from measured edits of {between} tokens "
        f"{_origin(device, pair)}"
    )
    return MeasuredTime(fixed + steps * step, source)


def training_speed(model: str, dtype: str, lora: bool, pack_tokens: int, ranks: int, device: str) -> MeasuredTime:
    """Return the tokens per second of supervised fine-tuning over all ranks.

    Args:
        model: Shape of the transformer, see `model_key`.
        dtype: Dtype of the computation.
        lora: An adapter is trained, not all weights.
        pack_tokens: Largest number of tokens of a pack.
        ranks: Number of ranks.
        device: Name of the device of every rank.
    """
    rows = _rows("training", {"model": model, "dtype": dtype, "lora": lora, "ranks": ranks}, device)
    if isinstance(rows, str):
        return MeasuredTime(None, rows)
    pair = _neighbours(rows, "pack_tokens", pack_tokens)
    if isinstance(pair, str):
        return MeasuredTime(None, pair)
    between = " and ".join(str(row["pack_tokens"]) for row in pair)
    speed = _interpolated(pair, "pack_tokens", pack_tokens, "tokens_per_second")
    return MeasuredTime(speed, f"from measured steps with packs of {between} tokens {_origin(device, pair)}")


def measured_devices(kind: str, model: str) -> list[str]:
    """Return the devices on which a model was measured; `kind` is "edits" or "training"."""
    names = sorted(path.stem for path in FOLDER.glob("*.json"))
    return [name for name in names if any(row["model"] == model for row in table(name).get(kind, ()))]


def _rows(kind: str, wanted: Mapping[str, Any], device: str) -> list[dict[str, Any]] | str:
    """Return the measurements of a device that match, or the reason why there are none."""

    def matching(name: str) -> list[dict[str, Any]]:
        return [row for row in table(name).get(kind, ()) if all(row.get(key) == wanted[key] for key in wanted)]

    if found := matching(device):
        return found
    measured = sorted(path.stem for path in FOLDER.glob("*.json") if matching(path.stem))
    where = f"; measured on: {', '.join(measured)}" if measured else ""
    case = ", ".join(
        f"{key} {str(value).lower() if isinstance(value, bool) else value}" for key, value in wanted.items()
    )
    return f"not measured on {device} ({case}){where}"


def _neighbours(rows: Sequence[dict[str, Any]], name: str, value: int) -> list[dict[str, Any]] | str:
    """Return the one or two rows nearest to a value, below and above, or the reason why it is out of range."""
    ordered = sorted(rows, key=lambda row: row[name])
    below, above = [row for row in ordered if row[name] <= value], [row for row in ordered if row[name] >= value]
    if not below or not above:
        return f"not measured for {value} tokens, only from {ordered[0][name]} to {ordered[-1][name]}"
    return [below[-1]] if below[-1][name] == value else [below[-1], above[0]]


def _interpolated(pair: Sequence[dict[str, Any]], name: str, value: int, wanted: str) -> float:
    first, last = pair[0], pair[-1]
    share = (value - first[name]) / (last[name] - first[name]) if len(pair) > 1 else 0.0
    return first[wanted] + share * (last[wanted] - first[wanted])


def _origin(device: str, rows: Sequence[Mapping[str, Any]]) -> str:
    row = min(rows, key=lambda row: row["date"])
    return f"on {device} ({row['date']}, torch {row['torch']}, {row['threads']} threads, {row['command']})"
