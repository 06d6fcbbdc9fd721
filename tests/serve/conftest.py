"""Engines of the server's tests."""

import pytest
import torch

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from serving import StubEngine  # of tests/helpers

from uniref_fast import Engine
from uniref_fast.builtin import load


@pytest.fixture(scope="session")
def pipe():
    return load(torch.bfloat16)


@pytest.fixture(scope="session")
def engine(pipe):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with Engine(pipe) as engine:
        yield engine
    torch.set_num_threads(before)


@pytest.fixture
def stub():
    return StubEngine()
