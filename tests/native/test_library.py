"""The native library: levels and loading."""

from pathlib import Path

import pytest
import torch

from uniref_fast import native
from uniref_fast.native import library

pytestmark = [
    pytest.mark.skipif(not native.available(), reason=native.reason()),
    pytest.mark.usefixtures("nan_memory"),
]

EPS = 1e-6
LEVELS = native.levels()


def test_levels():
    assert "generic" in LEVELS and native.levels()[0] in native.reason()
    with pytest.raises(ValueError, match=r"supported: .*generic"):
        native.norm_modulate(*[torch.randn(1, 8)] * 3, None, EPS, level="sse9")


def test_available_under_compile():
    """Asked inside a compiled function: no graph break, as torch.compile looks through functools.cache."""
    doubled = torch.compile(lambda x: x * 2 if native.available() else x, backend="eager", fullgraph=True)
    assert torch.equal(doubled(torch.ones(2)), torch.full((2,), 2.0))


def test_one_openmp_runtime():
    """Two would mean two thread pools fighting over the cores."""
    native.norm_modulate(*[torch.randn(64, 8)] * 3, None, EPS)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    runtimes = {
        path
        for path in maps.read_text().split()
        if path.startswith("/") and any(name in path for name in ("libgomp", "libomp"))
    }
    assert len(runtimes) <= 1, runtimes


def test_missing_library(monkeypatch, tmp_path):
    """An installation without a compiler has no library, a reason for it, and a clear error on use."""
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    for cached in (library._load, native.levels):
        cached.cache_clear()
    try:
        assert not native.available() and native.levels() == [] and "compiler" in native.reason()
        with pytest.raises(RuntimeError, match="compiler"):
            native.gate_residual(*[torch.randn(1, 8)] * 3, None)
        (tmp_path / "_native.so").write_bytes(b"not a library")
        library._load.cache_clear()
        assert "does not load" in native.reason()
    finally:
        monkeypatch.undo()
        for cached in (library._load, native.levels):
            cached.cache_clear()


def test_a_library_of_an_older_version_has_no_gelu(monkeypatch):
    """Everything else works with it."""
    monkeypatch.setattr(library, "_load", lambda: (object(), ""))
    assert not native.has_gelu()
    monkeypatch.setattr(library, "_load", lambda: (None, "not built"))
    assert not native.has_gelu()
