"""Measured tables: results of `bench/autotune.py` on a device, stored with device, versions and date.

`assets/tuned/<device>.json` holds, for attention, the cost of each implementation as a linear function of a plan, and
on GPUs the launch parameters that were fastest. A device without a table gets the rules of `ops.segment_attention` and
of the kernels' `pick_config`, which come from compiler reports and published figures, not from a measurement there.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import torch

from uniref_fast import native
from uniref_fast.visibility import AttentionPlan

__all__ = ["FEATURES", "attention_config", "attention_features", "attention_seconds", "device_name",
           "named_device", "table"]  # fmt: skip

FOLDER = Path(__file__).parent / "assets" / "tuned"
FEATURES = ("call", "rectangle", "row", "pair")
"""Quantities that a cost is linear in: calls; rectangles of (query range, key interval); rows of both sides of the
rectangles, and visible (query, key) pairs, the last two times heads times head dimension."""


@functools.cache
def device_name(device: torch.device | str) -> str:
    """Return the name of a device's table, such as "h200", or "cpu-avx2" for a CPU whose best native level is avx2."""
    device = torch.device(device)
    if device.type == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower().replace("nvidia", "")).strip("-")
    return f"cpu-{native.levels()[0]}" if native.available() else "cpu"


def named_device(device: torch.device | str) -> str:
    """Return the name of a device's table for "cpu", "cuda" or "cuda:N" of this machine; other names stay.

    Raises:
        ValueError: PyTorch finds no such device on this machine.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", str(device)):
        return str(device)
    if str(device) != "cpu" and not torch.cuda.is_available():
        raise ValueError(
            f"device {str(device)!r} is not available: PyTorch finds no CUDA device; use cpu, or the name of a "
            "measured device such as h100-80gb-hbm3"
        )
    return device_name(device)


@functools.cache
def table(name: str) -> dict[str, Any] | None:
    """Return the table of a device, or None if it was not measured."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def attention_features(plan: AttentionPlan, heads: int, head_dim: int) -> tuple[float, ...]:
    """Return the amounts of `FEATURES` in one attention call under a plan."""
    pairs = zip(plan.ranges, plan.intervals, strict=True)
    sides = [(end - start, b - a) for (start, end), keys in pairs for a, b in keys]
    width = heads * head_dim
    return 1.0, float(len(sides)), float(width * sum(m + n for m, n in sides)), float(width * plan.area)


def attention_seconds(
    name: str, impl: str, dtype: torch.dtype, plan: AttentionPlan, heads: int, head_dim: int, backward: bool
) -> float | None:
    """Return the expected seconds of one call on the device of that name, optionally with its backward, or None."""
    costs = ((table(name) or {}).get("attention") or {}).get(impl, {}).get(str(dtype).removeprefix("torch."))
    if costs is None:
        return None
    features = attention_features(plan, heads, head_dim)
    total = sum(a * b for a, b in zip(costs["forward"], features, strict=True))
    return total + backward * sum(a * b for a, b in zip(costs["backward"], features, strict=True))


def attention_config(name: str, dtype: torch.dtype, head_dim: int, direction: str) -> dict[str, Any] | None:
    """Return the fastest launch parameters of the Triton kernel ("forward", "backward") on a device, or None."""
    configs = (table(name) or {}).get("attention_configs", {})
    found = configs.get(f"{str(dtype).removeprefix('torch.')}/{head_dim}/{direction}")
    return None if found is None else _without_removed(found)


def _without_removed(config: dict[str, Any]) -> dict[str, Any]:
    """Return launch parameters without those of a kernel that is no longer there, which older tables list."""
    kept = {key: value for key, value in config.items() if key != "hopper_keys"}
    return {key: _without_removed(value) if isinstance(value, dict) else value for key, value in kept.items()}
