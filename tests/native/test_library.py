"""The native library: levels, loading, pack and unpack."""

import math
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


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request):
    return request.param


# ---- pack, unpack ----


def pack_oracle(latents):
    return torch.cat(
        [
            x.reshape(c, f, h // 2, 2, w // 2, 2).permute(1, 2, 4, 0, 3, 5).reshape(-1, 4 * c)
            for x in latents
            for c, f, h, w in [x.shape]
        ]
    )


@pytest.mark.parametrize("channels", [1, 3, 16])
def test_pack_unpack(channels, dtype):
    # one patch; two frames; a row longer than the kernel's block of 32 tokens, with a rest
    shapes = [(1, 2, 2), (2, 6, 4), (1, 4, 70)]
    latents = [torch.randn(channels, *shape).to(dtype) for shape in shapes]
    latents[1] = latents[1].transpose(2, 3).contiguous().transpose(2, 3)  # columns strided, rows contiguous
    grids = [(f, h // 2, w // 2) for f, h, w in shapes]
    lengths = [math.prod(grid) for grid in grids]
    starts = [sum(lengths[:i]) for i in range(3)]
    stream = native.pack(latents, starts, sum(lengths))
    assert torch.equal(stream, pack_oracle(latents))
    for x, back in zip(latents, native.unpack(stream, starts, grids, channels), strict=True):
        assert torch.equal(x, back) and back.is_contiguous()


def test_pack_with_gaps_and_any_order():
    a, b = torch.randn(2, 1, 2, 4), torch.randn(2, 1, 4, 2)
    stream = native.pack([a, b], [4, 1], 7)
    assert torch.equal(stream[4:6], pack_oracle([a])) and torch.equal(stream[1:3], pack_oracle([b]))
    assert (stream[[0, 3, 6]] == 0).all()


def test_pack_errors():
    x = torch.randn(2, 1, 2, 4)
    with pytest.raises(ValueError, match="overlap"):
        native.pack([x, x], [0, 1], 4)
    with pytest.raises(ValueError, match="leave the 3 rows"):
        native.pack([x], [2], 3)
    with pytest.raises(ValueError, match="expected"):
        native.pack([x[..., :3]], [0], 2)
    with pytest.raises(ValueError, match=r"latents\[1\] is torch.bfloat16"):
        native.pack([x, x.bfloat16()], [0, 2], 4)
    with pytest.raises(ValueError, match="at least one"):
        native.pack([], [], 0)
    with pytest.raises(ValueError, match="leave the stream"):
        native.unpack(torch.randn(3, 8), [2], [(1, 1, 2)], 2)


# ---- the library ----


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
    """Without a compiler at install time: no library, a reason, and a clear error on use."""
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
