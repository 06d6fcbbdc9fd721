"""The folder of encoded tensors: made once, whole or not there, and never a reason to stop."""

import errno
import os
import resource
import threading
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from uniref_fast.fingerprint import content_key, fingerprint
from uniref_fast.training.batches.latent_cache import TensorCache

KEY = content_key("a picture", (64, 48))
VALUE = torch.arange(6.0).reshape(2, 3)


def counted(value=VALUE):
    calls = []

    def make():
        calls.append(1)
        return value

    return make, calls


def files(folder):
    return sorted(path.name for path in Path(folder).rglob("*") if path.is_file())


def path_of(folder, key=KEY):
    return Path(folder) / key[:2] / f"{key}.safetensors"


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_a_tensor_is_made_once_and_read_afterwards(tmp_path, no_warnings):
    make, calls = counted()
    cache = TensorCache(tmp_path / "not" / "there" / "yet")
    assert torch.equal(cache.get(KEY, make), VALUE) and (cache.hits, cache.misses) == (0, 1)
    assert torch.equal(cache.get(KEY, make), VALUE) and (cache.hits, cache.misses) == (1, 1)
    other = TensorCache(cache.folder)  # another process
    assert torch.equal(other.get(KEY, make), VALUE) and len(calls) == 1
    assert files(cache.folder) == [f"{KEY}.safetensors"]


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(3, 4).bfloat16(),
        torch.zeros(0, 64),  # no references
        torch.randn(4, 6)[:, ::2].t(),  # strides
        torch.randn(8, 2)[3:5],  # a part of a larger tensor: only the part is kept
        torch.nn.Parameter(torch.randn(2)),
        torch.tensor(1.5),
    ],
    ids=["bfloat16", "empty", "strided", "slice", "with gradient", "scalar"],
)
def test_what_is_read_is_what_was_made(tmp_path, no_warnings, value):
    cache = TensorCache(tmp_path)
    cache.get(KEY, lambda: value)
    read = cache.get(KEY, lambda: pytest.fail("made again"))
    assert read.dtype == value.dtype and read.shape == value.shape and torch.equal(read, value)
    assert not read.requires_grad
    assert path_of(tmp_path).stat().st_size < 1000


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, calls = counted()
    cache = TensorCache(None)
    assert cache.get(KEY, make) is VALUE and cache.get(KEY, make) is VALUE and len(calls) == 2
    assert not any(tmp_path.iterdir())


def test_another_key_is_another_tensor(tmp_path):
    cache = TensorCache(tmp_path)
    cache.get(KEY, lambda: VALUE)
    make, calls = counted(VALUE + 1)
    assert torch.equal(cache.get(content_key("a picture", (48, 64)), make), VALUE + 1) and calls


# ---- faults ----


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def cut_in_header(path):
    path.write_bytes(path.read_bytes()[:20])


def empty(path):
    path.write_bytes(b"")


def other_tensors(path):
    save_file({"latents": VALUE}, path)


def junk(path):
    path.write_bytes(b"\x00" * 400)


@pytest.mark.parametrize("damage", [truncate, cut_in_header, empty, other_tensors, junk])
def test_a_damaged_file_is_made_anew_with_a_warning(tmp_path, damage):
    cache = TensorCache(tmp_path)
    cache.get(KEY, lambda: VALUE)
    damage(path_of(tmp_path))
    make, calls = counted()
    with pytest.warns(UserWarning, match=rf"{KEY}.safetensors cannot be used \(.*\); it is computed again"):
        assert torch.equal(cache.get(KEY, make), VALUE)
    assert calls
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(cache.get(KEY, lambda: pytest.fail("not mended")), VALUE)
    assert files(tmp_path) == [f"{KEY}.safetensors"]


def test_a_tensor_of_another_shape_is_computed_anew_and_the_row_named(tmp_path):
    cache = TensorCache(tmp_path)
    cache.get(KEY, lambda: VALUE[:1])
    make, calls = counted()
    message = rf"^rows.jsonl:3: the cached .*{KEY}.safetensors cannot be used \(its shape is .*, not .*\)"
    with pytest.warns(UserWarning, match=message):
        assert torch.equal(cache.get(KEY, make, tuple(VALUE.shape), "rows.jsonl:3"), VALUE)
    assert calls and (cache.hits, cache.misses) == (0, 2)
    assert torch.equal(cache.get(KEY, lambda: pytest.fail("not mended"), tuple(VALUE.shape)), VALUE)


def test_a_make_that_raises_leaves_nothing_and_may_be_tried_again(tmp_path):
    cache = TensorCache(tmp_path)

    def broken():
        raise ValueError("no such picture")

    with pytest.raises(ValueError, match="no such picture"):
        cache.get(KEY, broken)
    assert not files(tmp_path)
    assert torch.equal(cache.get(KEY, lambda: VALUE), VALUE)


@pytest.mark.parametrize("call", ["write", "rename"])
def test_a_full_disk_is_a_warning_and_leaves_nothing(tmp_path, monkeypatch, call):
    """A limit on the size of files stands for a disk that is full while the content is written."""

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache = TensorCache(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    reason = "File too large" if call == "write" else "No space left on device"
    with monkeypatch.context() as patch:
        if call == "rename":
            patch.setattr(Path, "replace", full)
        for _ in range(2):
            make, calls = counted()
            resource.setrlimit(resource.RLIMIT_FSIZE, (9 if call == "write" else soft, hard))
            try:
                with pytest.warns(UserWarning, match=f"cannot be written .{reason}"):
                    assert torch.equal(cache.get(KEY, make), VALUE)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert calls and not files(tmp_path)
    cache.get(KEY, lambda: VALUE)
    assert files(tmp_path) == [f"{KEY}.safetensors"]


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path):
    (tmp_path / "taken").write_text("a file")
    cache = TensorCache(tmp_path / "taken")
    with pytest.warns(UserWarning) as caught:
        assert torch.equal(cache.get(KEY, lambda: VALUE), VALUE)
    assert any("cannot be written" in str(warning.message) for warning in caught)
    assert files(tmp_path) == ["taken"]


def test_a_killed_writer_leaves_no_file_with_the_name(tmp_path, monkeypatch):
    """A file has a temporary name until it is complete."""
    seen = []
    replace = Path.replace

    def watch(path, to):
        seen.append(files(tmp_path))
        return replace(path, to)

    monkeypatch.setattr(Path, "replace", watch)
    TensorCache(tmp_path).get(KEY, lambda: VALUE)
    assert len(seen) == 1 and len(seen[0]) == 1 and seen[0][0].endswith(".partial")


@pytest.mark.parametrize("writers", [2, 8])
def test_writers_at_once_all_get_the_tensor_and_leave_one_file(tmp_path, writers):
    """All of them find nothing, all make it, all write."""
    together = threading.Barrier(writers)
    results, errors = [], []

    def work():
        try:
            cache = TensorCache(tmp_path)
            big = torch.full((256, 256), 7.0)

            def make():
                together.wait(timeout=20)
                return big

            results.append(torch.equal(cache.get(KEY, make), big) and torch.equal(cache.get(KEY, make), big))
            results.append((cache.hits, cache.misses) == (1, 1))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not errors and results == [True] * 2 * writers
    assert files(tmp_path) == [f"{KEY}.safetensors"]


# ---- keys ----


def test_keys_tell_apart_what_differs():
    keys = [content_key(), content_key("a"), content_key("a", "b"), content_key("b", "a"), content_key("ab"),
            content_key("a", ["b"]), content_key("a", 1), content_key("a", "1"), content_key("a", 1.5),
            content_key("ü"), content_key(["a"], "b"), content_key(None)]  # fmt: skip
    assert len(set(keys)) == len(keys) and all(len(key) == 64 for key in keys)
    assert content_key("a", (64, 48)) == content_key("a", [64, 48]), "a size is a size"


def test_a_fingerprint_tells_weights_dtype_and_configuration_apart(make_transformer):
    model = make_transformer(layers=1)
    first = fingerprint(model)
    assert first == fingerprint(make_transformer(layers=1))
    assert fingerprint(make_transformer(layers=1, seed=1)) != first
    assert fingerprint(make_transformer(layers=1, zero_cond_t=True)) != first, "same weights, other configuration"
    with torch.no_grad():
        for row, what in ((0, "first"), (-1, "last")):
            weight = model.proj_out.weight
            before = weight[row, row].item()
            weight[row, row] += 1e-3
            assert fingerprint(model) != first, f"the {what} value of one weight"
            weight[row, row] = before
    assert fingerprint(model) == first
    rounded = make_transformer(layers=1, dtype=torch.bfloat16)
    assert fingerprint(rounded) != fingerprint(make_transformer(layers=1, dtype=torch.bfloat16).float()), (
        "equal values, but what they compute is not"
    )
