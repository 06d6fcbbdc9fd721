"""Checkpoints that are whole or not there, and the moving average that goes into them; one rank, in this process."""

import errno
import json
import os
import resource
import shutil
import zlib

import pytest
import torch
import torch.distributed as dist

from uniref_fast.models import PackedQwenImage
from uniref_fast.training.core import checkpoint
from uniref_fast.training.core.checkpoint import CheckpointError, Checkpoints
from uniref_fast.training.core.distributed import Ranks, local, shard
from uniref_fast.training.core.ema import MovingAverage


@pytest.fixture(scope="module")
def ranks():
    yield Ranks.start()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def parameters(make_transformer, ranks):
    """A dozen of a sharded model's, by name: matrices, biases, norms."""
    model = make_transformer(layers=1)
    shard(PackedQwenImage(model), ranks, torch.float32)
    found = dict(list(model.named_parameters())[:12])
    assert {parameter.ndim for parameter in found.values()} == {1, 2}
    assert all(hasattr(parameter, "full_tensor") for parameter in found.values())
    return found


def tensors_of(parameters, seed):
    """Return tensors like those of a trainer: sharded weights and moments, in two dtypes, and one that is whole."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, parameter in parameters.items():
        for part, dtype in (("model", torch.float32), ("exp_avg", torch.bfloat16)):
            tensor = torch.zeros_like(parameter.detach(), dtype=dtype)
            local(tensor).copy_(torch.randn(tensor.shape, generator=generator))
            made[f"{part}.{name}"] = tensor
    made["whole"] = torch.randn(3, 5, generator=generator)
    return made


def bits(tensor):
    tensor = local(tensor.detach())
    return tensor.contiguous().view(torch.uint8).clone()


def all_bits(tensors):
    return {name: bits(tensor) for name, tensor in tensors.items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def checkpoints(tmp_path, ranks):
    return Checkpoints(tmp_path / "run" / "checkpoints", ranks, keep=3)


def names(checkpoints):
    return sorted(path.name for path in checkpoints.folder.iterdir())


STATE = {"feeder": {"waiting": [[0, 3], [1, 2]]}, "updates": [7, 7], "text": "ü", "nothing": None, "lr": 1e-4}


# ---- round trips ----


def test_what_is_read_is_what_was_written_to_the_last_bit(checkpoints, parameters):
    tensors = tensors_of(parameters, 1)
    odd = next(iter(tensors.values()))
    local(odd).view(-1)[:4] = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    before = all_bits(tensors)
    assert checkpoints.steps() == []
    path = checkpoints.save(100, tensors, STATE)
    assert path == checkpoints.folder / "step-000100" and names(checkpoints) == ["step-000100"]
    assert checkpoints.steps() == [100] and same(all_bits(tensors), before), "saving changes nothing"
    others = tensors_of(parameters, 2)
    kept = {name: local(tensor).data_ptr() for name, tensor in others.items()}
    assert checkpoints.load(100, others) == STATE
    assert same(all_bits(others), before)
    assert kept == {name: local(tensor).data_ptr() for name, tensor in others.items()}, "in place"


def test_it_is_safetensors_and_json_alone(checkpoints, parameters):
    path = checkpoints.save(1, tensors_of(parameters, 1), STATE)
    assert {file.suffix for file in path.iterdir()} <= {".safetensors", ".json"}
    assert json.loads((path / "state.json").read_text())["state"] == STATE


def test_the_newest_are_kept(checkpoints, parameters):
    tensors = tensors_of(parameters, 1)
    for step in (5, 10, 15, 20, 1_000_000):
        checkpoints.save(step, tensors, {"at": step})
    assert checkpoints.steps() == [15, 20, 1_000_000]
    assert names(checkpoints) == ["step-000015", "step-000020", "step-1000000"]
    assert [checkpoints.load(step, tensors)["at"] for step in checkpoints.steps()] == [15, 20, 1_000_000]


def test_keep_one(tmp_path, ranks, parameters):
    checkpoints = Checkpoints(tmp_path, ranks, keep=1)
    for step in (1, 2, 3):
        checkpoints.save(step, tensors_of(parameters, step), {"at": step})
    assert checkpoints.steps() == [3]


def test_a_step_that_is_there_is_replaced_with_its_tensors(checkpoints, parameters):
    checkpoints.save(100, tensors_of(parameters, 1), {"n": 1})
    second = tensors_of(parameters, 2)
    path = checkpoints.save(100, second, {"n": 2})
    read = tensors_of(parameters, 3)
    assert checkpoints.load(100, read) == {"n": 2} and same(all_bits(read), all_bits(second))
    assert names(checkpoints) == [path.name]


def test_a_damaged_folder_of_the_same_step_is_replaced(checkpoints, parameters):
    (checkpoints.folder / "step-000100").mkdir(parents=True)
    (checkpoints.folder / "step-000100" / "left.safetensors").write_text("of an earlier attempt")
    tensors = tensors_of(parameters, 1)
    checkpoints.save(100, tensors, STATE)
    read = tensors_of(parameters, 2)
    assert checkpoints.load(100, read) == STATE and same(all_bits(read), all_bits(tensors))


# ---- what an interruption leaves ----


def test_a_leftover_of_a_killed_save_is_no_checkpoint_and_goes_with_the_next(checkpoints, parameters):
    tensors = tensors_of(parameters, 1)
    path = checkpoints.save(100, tensors, STATE)
    shutil.copytree(path, checkpoints.folder / ".step-000200.partial")
    shutil.copytree(path, checkpoints.folder / ".step-000300.partial")
    assert checkpoints.steps() == [100]
    checkpoints.save(300, tensors, STATE)
    assert names(checkpoints) == ["step-000100", "step-000300"] and checkpoints.steps() == [100, 300]


def test_a_kill_while_writing_leaves_no_name_of_a_checkpoint(checkpoints, parameters, monkeypatch):
    seen = []
    rename = os.rename

    class Killed(BaseException):
        pass

    def kill(*args):
        seen.extend(names(checkpoints))
        raise Killed

    monkeypatch.setattr(os, "rename", kill)
    with pytest.raises(Killed):
        checkpoints.save(100, tensors_of(parameters, 1), STATE)
    assert seen == [".step-000100.partial"] and checkpoints.steps() == []
    monkeypatch.setattr(os, "rename", rename)
    checkpoints.save(100, tensors_of(parameters, 1), STATE)
    assert checkpoints.steps() == [100] and names(checkpoints) == ["step-000100"]


def test_a_kill_while_deleting_the_oldest_leaves_no_part_of_it_under_its_name(tmp_path, ranks, parameters, monkeypatch):
    checkpoints = Checkpoints(tmp_path, ranks, keep=1)
    checkpoints.save(1, tensors_of(parameters, 1), STATE)

    class Killed(BaseException):
        pass

    def kill(path, ignore_errors=False):
        next(iter(path.iterdir())).unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", kill)
        with pytest.raises(Killed):
            checkpoints.save(2, tensors_of(parameters, 1), STATE)
    assert checkpoints.steps() == [2] and "step-000001" not in names(checkpoints)
    checkpoints.save(3, tensors_of(parameters, 1), STATE)
    assert names(checkpoints) == ["step-000003"]


def test_things_of_other_names_are_no_checkpoints_and_stay(checkpoints, parameters):
    checkpoints.folder.mkdir(parents=True)
    for name in ("step-12", "step-000007x", "notes", "step-000009.damaged"):
        (checkpoints.folder / name).mkdir()
    (checkpoints.folder / "step-000008").write_text("a file")
    (checkpoints.folder / "step-12" / "state.json").write_text("{}")
    assert checkpoints.steps() == []
    checkpoints.save(100, tensors_of(parameters, 1), STATE)
    assert checkpoints.steps() == [100] and len(names(checkpoints)) == 6


# ---- errors of writing ----


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["dcp.save", "os.fsync", "Path.write_text", "os.rename"])
def test_a_full_disk_is_an_error_and_older_checkpoints_stay(checkpoints, parameters, monkeypatch, call):
    first = tensors_of(parameters, 1)
    checkpoints.save(100, first, STATE)
    module, name = call.split(".")
    with monkeypatch.context() as patch:
        patch.setattr(getattr(checkpoint, module), name, no_space)
        what = "write" if call in ("dcp.save", "os.fsync") else "finish"  # torch syncs what it writes
        with pytest.raises(
            CheckpointError, match=rf"could not {what} a checkpoint in .*checkpoints: OSError.*No space"
        ):
            checkpoints.save(200, tensors_of(parameters, 2), STATE)
    assert names(checkpoints) == ["step-000100"] and checkpoints.steps() == [100]
    read = tensors_of(parameters, 3)
    checkpoints.load(100, read)
    assert same(all_bits(read), all_bits(first))
    checkpoints.save(200, first, STATE)
    assert checkpoints.steps() == [100, 200], "and saving works once there is room again"


def test_what_torch_wrote_is_synced_with_the_rest_before_it_gets_its_name(checkpoints, parameters, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda handle: (events.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle))
    )
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("renamed"), rename(a, b)))
    path = checkpoints.save(100, tensors_of(parameters, 1), STATE)
    before, after = events[: events.index("renamed")], events[events.index("renamed") + 1 :]
    partial = checkpoints.folder / ".step-000100.partial"
    assert {str(partial), *(str(partial / file.name) for file in path.iterdir())} <= set(before)
    assert after == [str(checkpoints.folder)], "and the name too"


def test_a_limit_on_files_stands_for_a_full_disk(checkpoints, parameters):
    """An error from within torch's own writer, as it comes."""
    first = tensors_of(parameters, 1)
    checkpoints.save(100, first, STATE)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        with pytest.raises(CheckpointError, match="could not write a checkpoint in") as caught:
            checkpoints.save(200, tensors_of(parameters, 2), STATE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert names(checkpoints) == ["step-000100"]


def test_a_folder_that_cannot_be_made(tmp_path, ranks, parameters):
    (tmp_path / "taken").write_text("a file")
    checkpoints = Checkpoints(tmp_path / "taken" / "checkpoints", ranks, keep=2)
    assert checkpoints.steps() == []
    with pytest.raises(CheckpointError, match=r"could not prepare a checkpoint in .*NotADirectoryError"):
        checkpoints.save(1, tensors_of(parameters, 1), STATE)


def test_a_state_that_json_cannot_hold(checkpoints, parameters):
    with pytest.raises(CheckpointError, match="TypeError: Object of type set"):
        checkpoints.save(1, tensors_of(parameters, 1), {"a": {1, 2}})
    assert names(checkpoints) == []


# ---- errors of reading ----


@pytest.mark.parametrize("damage", ["truncated", "longer", "missing"])
def test_a_damaged_shard_is_named(checkpoints, parameters, damage):
    path = checkpoints.save(100, tensors_of(parameters, 1), STATE)
    (file,) = path.glob("*.safetensors")
    if damage == "missing":
        file.unlink()
    else:
        content = file.read_bytes()
        file.write_bytes(content[:-1] if damage == "truncated" else content + b"x")
    tensors = tensors_of(parameters, 2)
    before = all_bits(tensors)
    with pytest.raises(CheckpointError, match=rf"step-000100/{file.name} is missing or not \d+ bytes"):
        checkpoints.load(100, tensors)
    assert same(all_bits(tensors), before), "nothing was read"


def test_a_shard_of_zeros_is_an_error(checkpoints, parameters):
    """A file of zeros has the right length, as a file system may leave it after a power cut."""
    path = checkpoints.save(100, tensors_of(parameters, 1), STATE)
    (file,) = path.glob("*.safetensors")
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(CheckpointError, match="could not read a checkpoint"):
        checkpoints.load(100, tensors_of(parameters, 2))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"files": {}}'])
def test_a_damaged_state_is_an_error(checkpoints, parameters, content):
    path = checkpoints.save(100, tensors_of(parameters, 1), STATE)
    (path / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"could not read a checkpoint in .*step-000100/state\.json"):
        checkpoints.load(100, tensors_of(parameters, 1))


def test_a_step_that_is_not_there(checkpoints, parameters):
    with pytest.raises(CheckpointError, match=r"step-000007 has no state.json"):
        checkpoints.load(7, tensors_of(parameters, 1))


def flip(path, position, bit):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def exponent(path):
    """Position of the byte with the exponent of a number in the middle of a safetensors file."""
    size = path.stat().st_size
    return size // 2 // 4 * 4 + 3


def zeros(path):
    content = path.read_bytes()
    start = len(content) // 2
    path.write_bytes(content[:start] + bytes(4096) + content[start + 4096 :])


DAMAGES = {
    "one bit of a tensor": lambda path: flip(tensor_file(path), exponent(tensor_file(path)), 6),
    "the last bit of the file": lambda path: flip(tensor_file(path), -1, 0),
    "4 KiB of zeros": lambda path: zeros(tensor_file(path)),
    "a shorter file": lambda path: os.truncate(tensor_file(path), 1000),
    "no tensor file": lambda path: tensor_file(path).unlink(),
    "another tensor file": lambda path: shutil.copy(tensor_file(path), path / "shard-00009-model.safetensors"),
    "one digit of the state": lambda path: edit_state(
        path, lambda text: text.replace('"updates": [7', '"updates": [8')
    ),
    "a checksum taken out": lambda path: edit_state(path, lambda text: text[: text.rindex(', "crc32"')] + "}"),
    "an empty state": lambda path: (path / "state.json").write_text(""),
    "an empty object": lambda path: (path / "state.json").write_text("{}"),
    "no state": lambda path: (path / "state.json").unlink(),
}


def tensor_file(path):
    (file,) = path.glob("*.safetensors")
    return file


def edit_state(path, change):
    text = (path / "state.json").read_text()
    assert change(text) != text
    (path / "state.json").write_text(change(text))


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_whole_checkpoint_is_found_and_the_damaged_one_named(checkpoints, parameters, damage, monkeypatch):
    monkeypatch.setattr(checkpoint, "PART", 4096)  # several checksums for a file
    first = tensors_of(parameters, 1)
    checkpoints.save(100, first, STATE)
    path = checkpoints.save(200, tensors_of(parameters, 2), STATE)
    assert checkpoints.newest() == checkpoint.Newest(200, STATE, [])
    DAMAGES[damage](path)
    before = all_bits(first)
    with pytest.raises(CheckpointError, match="step-000200"):
        checkpoints.load(200, first)
    assert same(all_bits(first), before), "nothing was read"
    found = checkpoints.newest()
    assert found.step == 100 and found.state == STATE and not found.unverified
    ((name, reason),) = found.damaged
    assert name == "step-000200" and reason.startswith("step-000200")
    checkpoints.set_aside([name])
    assert checkpoints.steps() == [100] and names(checkpoints) == ["step-000100", "step-000200.damaged"]
    checkpoints.save(200, first, STATE)
    assert checkpoints.newest().step == 200


def test_no_whole_checkpoint_is_an_error_that_says_what_to_do(checkpoints, parameters):
    for step in (100, 200):
        (checkpoints.save(step, tensors_of(parameters, 1), STATE) / "state.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"step-000200 has no state.json; step-000100 has no .*give another --out"
    ):
        checkpoints.newest()


def test_a_checkpoint_without_checksums_loads_and_is_marked(checkpoints, parameters):
    """Older versions wrote the sizes of the files and no checksums."""
    tensors = tensors_of(parameters, 1)
    path = checkpoints.save(100, tensors, STATE)
    content = json.loads((path / "state.json").read_text())
    content["files"] = {name: file["bytes"] for name, file in content["files"].items()}
    del content["crc32"]
    (path / "state.json").write_text(json.dumps(content))
    assert checkpoints.newest() == checkpoint.Newest(100, STATE, [], unverified=True)
    read = tensors_of(parameters, 2)
    assert checkpoints.load(100, read) == STATE and same(all_bits(read), all_bits(tensors))


def test_checksums_are_those_of_zlib(checkpoints, parameters, monkeypatch):
    monkeypatch.setattr(checkpoint, "PART", 10_000)
    path = checkpoints.save(100, tensors_of(parameters, 1), STATE)
    content = tensor_file(path).read_bytes()
    expected = [zlib.crc32(content[start : start + 10_000]) for start in range(0, len(content), 10_000)]
    assert len(expected) > 3
    ((_, file),) = json.loads((path / "state.json").read_text())["files"].items()
    assert file == {"bytes": len(content), "crc32": expected}


@pytest.mark.parametrize("change", ["missing", "extra", "renamed"])
def test_the_state_of_another_model_is_refused(checkpoints, parameters, change):
    tensors = tensors_of(parameters, 1)
    checkpoints.save(100, tensors, STATE)
    if change != "extra":
        moved = tensors.pop("whole")
    if change != "missing":
        tensors["another"] = moved if change == "renamed" else torch.zeros(2)
    name, count = ("another", 1 + (change == "renamed")) if change != "missing" else ("whole", 1)
    before = all_bits(tensors)
    with pytest.raises(CheckpointError, match=rf"another model or optimizer: {count} tensors differ, such as {name}"):
        checkpoints.load(100, tensors)
    assert same(all_bits(tensors), before)


def test_tensors_of_another_shape_are_refused(checkpoints, parameters):
    tensors = tensors_of(parameters, 1)
    checkpoints.save(100, tensors, STATE)
    tensors["whole"] = torch.zeros(4, 5)
    with pytest.raises(CheckpointError, match="whole"):
        checkpoints.load(100, tensors)


# ---- the moving average ----


def fresh(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"matrix": (4, 3), "vector": (7,), "scalar": (1,)}
    return {name: torch.randn(shape, generator=generator).to(dtype).requires_grad_() for name, shape in shapes.items()}


def stepped(parameters, step):
    generator = torch.Generator().manual_seed(100 + step)
    with torch.no_grad():
        for parameter in parameters.values():
            local(parameter).add_(torch.randn(local(parameter).shape, generator=generator).to(parameter.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.3, 0.9, 0.999])
def test_the_average_is_what_a_loop_gives(decay, dtype):
    parameters = fresh(dtype=dtype)
    average = MovingAverage(parameters, decay)
    expected = {name: parameter.detach().double() for name, parameter in parameters.items()}
    for step in range(30):
        stepped(parameters, step)
        average.update(step)
        kept = min(decay, (1 + step) / (10 + step))
        for name, parameter in parameters.items():
            expected[name] = kept * expected[name] + (1 - kept) * parameter.detach().double()
    for name, value in expected.items():
        assert average.average[name].dtype == torch.float32 and not average.average[name].requires_grad
        torch.testing.assert_close(average.average[name].double(), value, rtol=1e-5, atol=1e-5)


def test_averages_are_sharded_as_the_weights(parameters):
    average = MovingAverage(parameters, 0.9)
    for name, parameter in parameters.items():
        assert average.average[name].placements == parameter.placements
        assert local(average.average[name]).data_ptr() != local(parameter).data_ptr(), "a copy, also in float32"
    before = all_bits(parameters)
    expected = {name: 0.1 * local(p.detach()).double() for name, p in parameters.items()}
    stepped(parameters, 0)
    average.update(0)
    for name, parameter in parameters.items():
        expected[name] += 0.9 * local(parameter.detach()).double()
        torch.testing.assert_close(local(average.average[name]).double(), expected[name], rtol=1e-5, atol=1e-6)
    own = all_bits(parameters)
    with average.applied():
        for name, parameter in parameters.items():
            assert torch.equal(bits(parameter), bits(average.average[name]))
    assert same(all_bits(parameters), own) and not same(own, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_afterwards_the_model_has_its_own_weights_again_bit_for_bit(dtype):
    parameters = fresh(dtype=dtype)
    parameters["vector"].data[:3] = torch.tensor([-0.0, float("nan"), 1e-40])
    average = MovingAverage(parameters, 0.5)
    stepped(parameters, 0)
    average.update(0)
    own, averages = all_bits(parameters), all_bits(average.average)
    with average.applied():
        for name, parameter in parameters.items():
            assert torch.equal(bits(parameter), bits(average.average[name].to(dtype)))
            assert parameter.requires_grad
    assert same(all_bits(parameters), own) and same(all_bits(average.average), averages)
    with pytest.raises(KeyboardInterrupt), average.applied():
        for parameter in parameters.values():
            parameter.data.zero_()  # whatever happened inside
        raise KeyboardInterrupt
    assert same(all_bits(parameters), own) and same(all_bits(average.average), averages)
