"""Everything that waits for a GPU, in order of worth, within 12 minutes on one H200 (bench/GPU_TODO.md).

    python bench/harvest.py --out bench/results          # on a machine with a CUDA device
    python bench/harvest.py --out build/harvest --tiny   # tiny shapes on the CPU: checks that every part runs

Each part runs in a process of its own with its own time limit and writes `<date>-<device>-<part>.json`, updated after
every measurement, so that a part that fails or is stopped keeps what it has and costs the next part nothing. Time that
a part leaves unused goes to the parts after it. The exit status is 1 when a part failed, 0 otherwise; a part that
reached its time limit has not failed.

The machine needs Python 3.10 or newer and the packages in NEEDED; nothing is downloaded. On a machine that has torch
and no network:

    pip install --no-build-isolation --no-deps -e . diffusers-*.whl
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from conftest import CUDA, machine, results_path, write_results

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("torch", "triton", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy", "pillow",
          "pytest", "pytest-benchmark", "pytest-xdist", "hypothesis")  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A part of the harvest.

    Attributes:
        name: Last part of the name of the results file.
        seconds: Time limit; unused time of earlier parts is added.
        arguments: Arguments of pytest.
        tiny: Selection of tests for `--tiny`, instead of the one in `arguments`.
    """

    name: str
    seconds: int
    arguments: tuple[str, ...]
    tiny: tuple[str, ...]


LAYOUTS = "(one and 3) or ragged or causal or shared or 128"  # the rows of the table in docs/performance-gpu.md
PARTS = (
    Part("edit-20b", 210, ("bench/bench_edit_20b.py",), ("bench/bench_edit_20b.py", "-k", "1")),
    Part("kernel-tests", 120, (), ()),
    Part(
        "attention",
        140,
        ("bench/bench_attention.py", "-k", LAYOUTS),
        ("bench/bench_attention.py", "-k", "128 and forward and bfloat16"),
    ),
    Part(
        "token-ops",
        60,
        ("bench/bench_token_ops.py",),
        ("bench/bench_token_ops.py", "-k", "test_norm_modulate and forward and bfloat16 and not compiled"),
    ),
    Part("lora-20b", 190, ("bench/bench_sft_20b.py",), ("bench/bench_sft_20b.py", "-k", "1024")),
)

# Test files, the sources whose change makes them due again, and the test that stands for them in a tiny run.
KERNEL_TESTS = {
    "attention": (
        (
            "tests/kernels/test_segment_attention.py",
            "tests/kernels/test_segment_attention_fp8.py",
            "tests/ops/test_segment_attention.py",
            "tests/ops/test_attention_libraries.py",
        ),
        ("kernels/segment_attention*.py", "kernels/fp8.py", "uniref_fast/ops/*attention*.py", "uniref_fast/ops/fp8.py"),
        "test_plans and one_token",
    ),
    "token ops": (
        ("tests/kernels/test_token_ops.py", "tests/ops/test_fp8.py"),
        ("kernels/[fnqt]*.py", "uniref_fast/ops/fp8.py", "uniref_fast/ops/[nq]*.py"),
        "test_gate_residual",
    ),
}


def missing_packages() -> list[str]:
    """Packages in NEEDED that are not installed."""
    missing = []
    for name in NEEDED:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    return missing


def digest(patterns: tuple[str, ...]) -> str:
    """Hash of the contents of all files that match."""
    hashed = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in ROOT.glob(pattern)):
        hashed.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return hashed.hexdigest()


def passed_before(folder: Path, device: str) -> dict[str, str]:
    """Group of kernel tests -> hash of the sources that last passed it on this kind of device."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*-kernel-tests.json")):  # sorted by date
        results = json.loads(path.read_text())
        if results["device"] == device:
            found |= {name: group["sources"] for name, group in results["groups"].items() if group["complete"]}
    return found


def run_kernel_tests(folder: Path, seconds: float, tiny: bool, committed: Path) -> bool:
    """Run the tests of kernels that changed since they last passed on such a device; whether none failed."""
    header = machine()
    path, results = results_path(folder, "kernel-tests"), header | {"groups": {}}
    before, until, good = passed_before(committed, header["device"]), time.monotonic() + seconds, True
    for name, (files, sources, small) in KERNEL_TESTS.items():
        if before.get(name) == digest(sources) and not tiny:
            print(f"kernel-tests: {name}: unchanged since they passed on {header['device']}", flush=True)
            continue
        group = {"sources": digest(sources), "complete": False, "passed": 0, "skipped": 0, "failed": []}
        results["groups"][name] = group

        def count(line: str, group: dict = group) -> None:
            match = re.match(r"\[gw\d+\] \[ *\d+%\] (PASSED|SKIPPED|FAILED|ERROR) (.*)", line)
            if match is None:
                return
            if match[1] in ("FAILED", "ERROR"):
                group["failed"].append(match[2])
                print(f"kernel-tests: failed: {match[2]}", flush=True)
            else:
                group[match[1].lower()] += 1
            write_results(path, results)

        # several workers, since most of the time goes into compiling kernels
        command = ["-m", "pytest", *files, "-v", "--color=no", "-p", "no:cacheprovider", "-n"]
        selected = ["1", "-k", small] if tiny else [str(min(8, os.cpu_count() or 1))]
        status = run(command + selected, until - time.monotonic(), count)
        group["complete"] = status == 0
        write_results(path, results)
        good = good and not group["failed"] and status in (0, None)
        state = "complete" if status == 0 else "stopped at the time limit" if status is None else f"status {status}"
        print(f"kernel-tests: {name}: {group['passed']} passed, {len(group['failed'])} failed, {state}", flush=True)
    return good


def run(arguments: list[str], seconds: float, on_line=None) -> int | None:
    """Run Python with these arguments in a process group of its own; its exit status, None at the time limit."""
    # without the variables of a pytest that runs the harvest: its workers would measure nothing
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment | {"PYTHONUNBUFFERED": "1"},
        start_new_session=True,
        text=True,
        stdout=None if on_line is None else subprocess.PIPE,
    )
    if on_line is not None:
        stdout = process.stdout
        reader = threading.Thread(target=lambda: [on_line(line.rstrip()) for line in stdout], daemon=True)
        reader.start()
    try:
        status = process.wait(max(seconds, 1))
    except subprocess.TimeoutExpired:
        status = None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if on_line is not None:
        reader.join(5)
    return status


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog="Parts: " + ", ".join(part.name for part in PARTS)
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results files")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="parts to run; default: all")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU: checks that every part runs")
    options = parser.parse_args()
    if missing := missing_packages():
        parser.error(f"these packages are missing: {', '.join(missing)}")
    if not CUDA and not options.tiny:
        parser.error("there is no CUDA device here; --tiny checks on the CPU that every part runs")
    if options.tiny and CUDA:
        parser.error("--tiny is for machines without a CUDA device")
    header = machine()
    print(", ".join(f"{key} {value}" for key, value in header.items()), flush=True)
    out, failed = options.out.resolve(), []
    deadline = time.monotonic()
    for part in PARTS:
        if options.only and part.name not in options.only:
            continue
        start = time.monotonic()
        deadline += part.seconds
        print(f"== {part.name}: {deadline - start:.0f} s at most", flush=True)
        if part.name == "kernel-tests":
            status = 0 if run_kernel_tests(out, deadline - start, options.tiny, ROOT / "bench" / "results") else 1
        else:
            selected = (*part.tiny, "--tiny") if options.tiny else part.arguments
            arguments = ["-m", "pytest", *selected, "--benchmark-only", "--results", str(out), "--what", part.name]
            quiet = ["-q", "--benchmark-columns=median", "-p", "no:cacheprovider"]
            status = run(arguments + quiet, deadline - start)
        ended = {0: "complete", None: "stopped at its time limit"}.get(status, f"failed with exit status {status}")
        print(f"== {part.name}: {ended} after {time.monotonic() - start:.0f} s", flush=True)
        if status not in (0, None):
            failed.append(part.name)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
