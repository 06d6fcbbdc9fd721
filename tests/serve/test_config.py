"""Settings of the server that no route shows."""

import os
import subprocess
import sys

import pytest

from uniref_fast.serve.config import limit_cached_products

NAME = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


@pytest.mark.parametrize("given, expected", [(None, "64"), ("7", "7")])
def test_a_limit_that_the_user_has_set_stays(monkeypatch, given, expected):
    monkeypatch.delenv(NAME, raising=False)
    if given is not None:
        monkeypatch.setenv(NAME, given)
    limit_cached_products()
    assert os.environ[NAME] == expected


@pytest.mark.slow
def test_products_are_compiled_again_beyond_the_limit():
    """oneDNN reads the limit after PyTorch was imported: each of 100 lengths is compiled twice."""
    code = """
import torch
from uniref_fast.serve.config import limit_cached_products
limit_cached_products()
x = torch.randn(200, 64, dtype=torch.bfloat16)
w = torch.randn(64, 64, dtype=torch.bfloat16)
for n in [*range(10, 110)] * 2:
    torch.nn.functional.linear(x[:n], w)
"""
    environment = {"ONEDNN_VERBOSE": "2", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    made = [line for line in done.stdout.splitlines() if "create:cache_miss" in line and "matmul" in line]
    if not made:
        pytest.skip("this CPU or build does not compute the product with oneDNN")
    assert len(made) == 200
