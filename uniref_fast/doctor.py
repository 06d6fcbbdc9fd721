"""Facts about this installation that explain how fast it can be: versions, devices, and the choice of kernels."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from uniref_fast import __version__, native, ops
from uniref_fast.fast import unsupported
from uniref_fast.ops import flash_attention, flex_attention
from uniref_fast.quantisation import PACKAGES as QUANTISERS
from uniref_fast.quantisation import trials

__all__ = ["facts", "report"]

PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy")


def facts() -> dict[str, Any]:
    """Return versions, devices, the state of the native kernels, and the implementation of the operators, as JSON data.

    "native_missing" names what a native library of an older version does not have.
    "served" maps a device and a dtype, such as "cpu float32", to the implementation that serves it and the reason.
    "eight_bit" maps a device to the reason why it cannot compute in 8 bits, or to None.
    "libraries" maps an implementation of attention to the version of its library, or to how to install it.
    "quantised" maps a device to formats of quantised weights, each with the reason why a product with it does not work
    there, or None.
    """
    versions = {"python": platform.python_version(), "uniref_fast": __version__}
    for name in (*PACKAGES, *QUANTISERS.values()):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    devices, kinds = [f"cpu: {_cpu_name()}, {torch.get_num_threads()} threads"], ["cpu"]
    if torch.cuda.is_available():
        kinds.insert(0, "cuda")
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            memory = properties.total_memory / 2**30
            devices.append(f"cuda:{i}: {properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB")
    served = {}
    for kind in kinds:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            implementation, reason = ops.explain(torch.empty(0, dtype=dtype, device=kind))
            case = f"{kind} {str(dtype).removeprefix('torch.')}"
            served[case] = {"implementation": implementation, "reason": reason}
    # The 8-bit operators have no native implementation and choose for themselves.
    names = [name for name in ops.__all__ if hasattr(torch.ops.uniref_fast, name) and not name.endswith("_fp8")]
    return {
        "versions": versions,
        "devices": devices,
        "native": native.reason(),
        "native_missing": native.missing(),
        "ops": names,
        "served": served,
        "eight_bit": {kind: unsupported(kind, None) for kind in kinds},
        "libraries": {"flash": flash_attention.installed(), "cudnn_flex": flex_attention.installed()},
        "quantised": {kind: trials(kind) for kind in kinds},
    }


def report(facts: dict[str, Any]) -> str:
    """Return the facts as text."""
    lines = ["versions", *(f"  {name:<16}{version}" for name, version in facts["versions"].items())]
    lines += ["devices", *(f"  {device}" for device in facts["devices"])]
    if len(facts["devices"]) == 1:
        lines.append("  no CUDA device: Triton kernels are not used")
    lines += ["native CPU kernels", f"  {facts['native']}"]
    if facts["native_missing"]:
        names = ", ".join(facts["native_missing"])
        lines.append(f"  the library was built by an older version, without {names}; PyTorch computes these; reinstall")
    lines.append(f"implementation of each op ({', '.join(facts['ops'])})")
    for case, choice in facts["served"].items():
        lines.append(f"  {case:<16}{choice['implementation']:<11}{choice['reason']}")
    lines.append('8 bits (mode="fast")')
    lines += [f"  {kind:<16}{why or 'e4m3 products by torch._scaled_mm'}" for kind, why in facts["eight_bit"].items()]
    lines.append("libraries of attention, by implementation")
    lines += [f"  {implementation:<11}{found}" for implementation, found in facts["libraries"].items()]
    for kind, formats in facts["quantised"].items():
        lines.append(f"quantised weights on {kind} (docs/quantised.md)")
        lines += [f"  {name:<24}{reason or 'works'}" for name, reason in formats.items()]
    return "\n".join(lines)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
