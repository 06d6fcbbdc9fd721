"""Benchmarks compare side by side: a group is one question, its members answer it on the same inputs in one run."""

import platform
import statistics
import time

import pytest
import torch

CUDA = torch.cuda.is_available()
if CUDA:
    # A backward runs on the stream of its forward, and nothing on the default stream can be captured.
    torch.cuda.set_stream(torch.cuda.Stream())
SECONDS = 1 if CUDA else 3  # a member takes, when its rounds are long; at least three rounds


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["cuda"] = CUDA
    machine_info["device"] = torch.cuda.get_device_name() if CUDA else platform.processor()
    try:
        import triton

        machine_info["triton"] = triton.__version__
    except ImportError:
        machine_info["triton"] = None


@pytest.fixture
def device():
    return "cuda" if CUDA else "cpu"


def stopwatch(call):
    """A function that runs the call once and returns seconds, and how it measures.

    On a GPU the call is replayed from a CUDA graph where it can be captured, so that launches from Python, which a
    whole model hides behind its work, do not count; calls that plan on the host each time cannot be captured.
    """
    if not CUDA:

        def wall():
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return wall, "wall clock"
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run, how = call, "events"
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        run, how = graph.replay, "cuda graph"
    except RuntimeError:
        torch.cuda.synchronize()

    def events():
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return events, how


@pytest.fixture
def timed(benchmark):
    """Time a call of no arguments against its baseline, in turns; the ratio of medians goes to `extra_info`.

    `flops` and `moved` (bytes) of the call give its rate and its fraction of what this machine reaches in a matrix
    product of that dtype or in a copy, measured in the same run.
    """

    def run(call, baseline, rounds=15, flops=None, moved=None, dtype=torch.float32):
        watches = []
        for each in (baseline, call):
            each()  # compiles what is to be compiled
            watches.append(stopwatch(each))
        (their_watch, _), (our_watch, how) = watches
        pairs, until = [], time.perf_counter() + SECONDS
        while len(pairs) < 3 or (len(pairs) < rounds and time.perf_counter() < until):
            pairs.append((their_watch(), our_watch()))
        theirs, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
        info = benchmark.extra_info
        info.update(ratio=theirs / ours, seconds=ours, rounds=len(pairs), timing=how)
        if flops:
            info.update(flops=flops, fraction_of_matmul=flops / ours / matmul_rate(dtype))
        if moved:
            info.update(bytes=moved, fraction_of_copy=moved / ours / copy_rate())
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
    """Bytes a second, read and written, of a copy much larger than the caches."""
    if "copy" not in _rates:
        source = torch.zeros(2**30 if CUDA else 2**26, dtype=torch.uint8, device="cuda" if CUDA else "cpu")
        target = torch.empty_like(source).zero_()
        _rates["copy"] = 2 * source.nbytes / _best(lambda: target.copy_(source))
    return _rates["copy"]


def _best(call):
    call()
    watch, _ = stopwatch(call)
    return min(watch() for _ in range(10))
