"""Benchmarks compare side by side: a group is one question, its members answer it on the same inputs in one run.

    pytest bench --benchmark-only --results bench/results --what bench

writes `bench/results/<date>-<device>-bench.json` and updates it after every member, so that a run that is stopped keeps
what it has measured; `report.py` prints such a file as a table. `--tiny` runs the same code on tiny shapes on the CPU.
"""

import datetime
import functools
import gc
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import time
import traceback
from pathlib import Path

import pytest
import torch

CUDA = torch.cuda.is_available()
if CUDA:
    # A backward runs on the stream of its forward, and nothing on the default stream can be captured.
    torch.cuda.set_stream(torch.cuda.Stream())
SECONDS = 1 if CUDA else 3  # a member takes, when its rounds are long; at least three rounds


def pytest_addoption(parser):
    group = parser.getgroup("uniref_fast benchmarks")
    group.addoption("--results", type=Path, metavar="DIR", help="write DIR/<date>-<device>-<what>.json")
    group.addoption("--what", default="bench", metavar="NAME", help="last part of the name of the results file")
    group.addoption(
        "--tiny",
        action="store_true",
        help="tiny shapes on the CPU, one round each: checks that the benchmarks run; their figures mean nothing",
    )


def machine():
    """Return device, versions, threads, commit and date, for the head of a results file."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if CUDA else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": described.stdout.strip() or None,
    }


def _processor():
    names = re.findall(r"^model name\s*:\s*(.*)$", _read("/proc/cpuinfo"), flags=re.MULTILINE)
    return names[0] if names else platform.processor() or platform.machine()


def _read(path):
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def results_path(folder, what):
    """Return the path of today's results file for this machine."""
    header = machine()
    device = re.sub(r"[^a-z0-9]+", "-", header["device"].lower().replace("nvidia", "")).strip("-")
    return Path(folder) / f"{header['date']}-{device}-{what}.json"


def write_results(path, results):
    """Replace a results file, or create it; a process that is killed meanwhile leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(json.dumps(results, indent=1) + "\n")
    new.replace(path)


def pytest_configure(config):
    folder = config.getoption("--results")
    if folder is not None:
        command = shlex.join(["pytest", *map(str, config.invocation_params.args)])
        path = results_path(folder, config.getoption("--what"))
        config.stash[RESULTS] = path, machine() | {"command": command, "groups": {}}


RESULTS = pytest.StashKey()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Add a member to the results as soon as it is measured, or the reason why it could not be."""
    report = yield
    benchmark = getattr(item, "funcargs", {}).get("benchmark")
    if call.when != "call" or RESULTS not in item.config.stash or benchmark is None or benchmark.group is None:
        return report
    info = {k: float(f"{x:.5g}") if isinstance(x, float) else x for k, x in benchmark.extra_info.items()}
    if not report.passed:
        reason = str(call.excinfo.value).strip().splitlines() or [""]
        info[report.outcome] = f"{call.excinfo.typename}: {reason[0][:200]}"
    params = item.callspec.params if hasattr(item, "callspec") else {}
    member = str(params.get("whose") or params.get("which") or item.name)
    path, results = item.config.stash[RESULTS]
    results["groups"].setdefault(benchmark.group, []).append({"member": member} | info)
    write_results(path, results)
    return report


def pytest_terminal_summary(terminalreporter, config):
    if RESULTS in config.stash and config.stash[RESULTS][1]["groups"]:
        terminalreporter.write_line(f"results: {config.stash[RESULTS][0]}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A member that needs more memory than there is, is no failure; what it had is not kept in a traceback."""
    try:
        return (yield)
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)
        reason = str(error).splitlines()[0][:160]
    finally:
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
    pytest.skip(f"out of memory: {reason}")


@pytest.fixture(scope="session")
def tiny(request):
    """True in a run with `--tiny`, which only checks that the benchmarks work."""
    return request.config.getoption("--tiny")


@pytest.fixture
def device():
    return "cuda" if CUDA else "cpu"


def stopwatch(call):
    """A function that runs the call once and returns the seconds that it took."""
    if not CUDA:

        def wall():
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return wall
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def events():
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return events


def captured(call):
    """Replays the call from a CUDA graph; None for one that cannot be captured, such as one that plans on the host.

    So launches from Python, which a whole model hides behind its work, do not count.
    """
    if not CUDA:
        return None
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        torch.cuda.synchronize()
        return None


@pytest.fixture
def timed(benchmark, request, tiny):
    """Time a call of no arguments against its baseline, in turns; the ratio of medians goes to `extra_info`.

    `flops` and `moved` (bytes) of the call give its rate and its fraction of what this machine reaches in a matrix
    product of that dtype or in a copy, measured in the same run. On a GPU both are replayed from CUDA graphs where both
    can be; `graph=False` does not try, as a failed capture of a backward leaves PyTorch's random generator unusable.
    """
    capture = request.config.pluginmanager.getplugin("capturemanager")  # a run that is cut off writes no JSON

    def run(call, baseline, rounds=15, flops=None, moved=None, dtype=torch.float32, graph=True):
        fewest, rounds = (1, 1) if tiny else (3, rounds)
        both = [baseline] if call is baseline else [baseline, call]
        for each in both:
            each()  # compiles what is to be compiled
        replays = [captured(each) for each in both] if graph else [None]
        how = "cuda graph" if None not in replays else "events" if CUDA else "wall clock"
        watches = [stopwatch(each) for each in (both if None in replays else replays)]
        their_watch, our_watch = watches[0], watches[-1]
        pairs, until = [], time.perf_counter() + SECONDS
        while len(pairs) < fewest or (len(pairs) < rounds and time.perf_counter() < until):
            theirs = their_watch()
            pairs.append((theirs, theirs if call is baseline else our_watch()))
        theirs, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
        info = benchmark.extra_info
        info.update(ratio=theirs / ours, seconds=ours, rounds=len(pairs), timing=how)
        if flops:
            info.update(flops=flops, fraction_of_matmul=flops / ours / matmul_rate(dtype))
        if moved:
            info.update(bytes=moved, fraction_of_copy=moved / ours / copy_rate())
        with capture.global_and_fixture_disabled():
            print(f"\n{benchmark.name}: {theirs / ours:.2f}x, {ours * 1e3:.4g} ms", flush=True)
        benchmark.pedantic(call, rounds=1)

    return run


_rates: dict[object, float] = {}


def matmul_rate(dtype):
    """Flops a second of a big square matrix product."""
    if dtype not in _rates:
        n = 8192 if CUDA else 1536
        a, b = (torch.randn(n, n, device="cuda" if CUDA else "cpu").to(dtype) for _ in range(2))
        _rates[dtype] = 2 * n**3 / _best(lambda: a @ b)
    return _rates[dtype]


def copy_rate():
    """Bytes a second, read and written, of the better of two copies much larger than the caches."""
    if "copy" not in _rates:
        source = torch.ones(2**28 if CUDA else 2**24, device="cuda" if CUDA else "cpu")
        target = torch.empty_like(source)
        copies = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
        _rates["copy"] = 2 * source.nbytes / min(_best(copy) for copy in copies)
    return _rates["copy"]


def _best(call):
    call()
    watch = stopwatch(captured(call) or call)
    return min(watch() for _ in range(10))


SHAPE_20B = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "axes_dims_rope": (16, 56, 56),
    "zero_cond_t": True,
}


def make_model(shape, device, rank=None, base=None):
    """Random bfloat16 weights that were never in float32, quantised if asked for, and with a rank a LoRA in float32."""
    from diffusers import QwenImageTransformer2DModel
    from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

    with torch.device("meta"):
        model = QwenImageTransformer2DModel(**shape)
    model = torch.nn.Module.to(model, torch.bfloat16).to_empty(device=device)
    model.pos_embed = QwenEmbedRope(theta=10000, axes_dim=list(shape["axes_dims_rope"]), scale_rope=True)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.constant_(parameter, float("norm" in name and "weight" in name))
        else:
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    model.requires_grad_(False)
    if base is not None:
        from uniref_fast.training.core.frozen_base import quantise_base

        quantise_base(model, base, torch.bfloat16, torch.device(device))
    if rank is None:
        return model
    from peft import LoraConfig

    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


SHAPE_TINY = SHAPE_20B | {
    "num_layers": 2,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (8, 28, 28),
}


@pytest.fixture(scope="session")
def make_20b(tiny):
    """Makes a transformer of the size of Qwen-Image-Edit on the GPU, with a LoRA of `rank` or none, on a `base`."""
    if tiny:
        return functools.partial(make_model, SHAPE_TINY, "cpu")
    if not CUDA or torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs a GPU with 60 GiB: the weights alone are 41 GB")
    return functools.partial(make_model, SHAPE_20B, "cuda")


@pytest.fixture(scope="session")
def make_small():
    """Makes a small transformer with random weights, whose shape the arguments change."""
    return lambda **changes: make_model(SHAPE_TINY | changes, "cuda" if CUDA else "cpu")
