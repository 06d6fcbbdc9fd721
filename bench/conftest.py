"""Benchmarks compare side by side: a group is one question, its members answer it on the same inputs in one run."""

import platform

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
    """Time a call of no arguments, the GPU's work included, after one untimed call."""

    def run(call, rounds=7):
        def wait():
            result = call()
            if device == "cuda":
                torch.cuda.synchronize()
            return result

        with torch.no_grad():
            return benchmark.pedantic(wait, rounds=rounds, warmup_rounds=2)

    return run
