"""Benchmarks compare side by side: a group is one question, its members answer it on the same inputs in one run."""

import platform
import statistics
import time

import pytest
import torch


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["cuda"] = torch.cuda.is_available()
    machine_info["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def timed(benchmark, device):
    """Time a call of no arguments against its baseline, in turns; the ratio of medians goes to `extra_info`."""

    def seconds(call):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def run(call, baseline, rounds=9):
        with torch.no_grad():
            for warm_up in (baseline, call):
                warm_up()
            pairs = [(seconds(baseline), seconds(call)) for _ in range(rounds)]
            theirs, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
            benchmark.extra_info["ratio"] = theirs / ours
            benchmark.pedantic(lambda: seconds(call), rounds=rounds)

    return run
