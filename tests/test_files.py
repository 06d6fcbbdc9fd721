"""Lines that survive kills and full disks, and files that are whole or absent."""

import json
import math
import os
import resource
import stat

import pytest

from uniref_fast.files import RecordFile, keep_records, read_records, whole_folder, write_whole


@pytest.fixture
def path(tmp_path):
    """A file of the steps 0 to 4."""
    file = RecordFile(tmp_path / "x.jsonl")
    for step in range(5):
        file.append({"step": step, "loss": 0.5})
    file.close()
    return file.path


def steps(path):
    return [record["step"] for record in read_records(path)]


def test_appends_and_reads_back(path):
    assert path.read_text().splitlines()[3] == '{"step": 3, "loss": 0.5}'
    file = RecordFile(path)
    file.append({"step": 9})
    assert steps(path) == [0, 1, 2, 3, 4, 9], "there before the file is closed"
    file.close()


def test_strict_json_of_anything(tmp_path):
    file = RecordFile(tmp_path / "x.jsonl")
    file.append({"step": 0, "a": math.nan, "b": (1, -math.inf), "c": tmp_path, "d": {1: None, "e": True}})
    file.close()

    def refuse(name):
        raise AssertionError(name)

    assert json.loads(file.path.read_text(), parse_constant=refuse) == {
        "step": 0, "a": "nan", "b": [1, "-inf"], "c": str(tmp_path), "d": {"1": None, "e": True},
    }  # fmt: skip


@pytest.mark.parametrize("cut", [1, 2, 20])  # the line's end only, its brace, most of it
def test_an_unfinished_last_line_is_left_out(path, cut):
    path.write_bytes(path.read_bytes()[:-cut])
    assert steps(path) == [0, 1, 2, 3]
    assert keep_records(path, lambda record: True) == 0 and path.read_bytes().endswith(b"}\n")
    assert steps(path) == [0, 1, 2, 3]


def test_a_tail_of_zeros_is_an_unfinished_line(path):
    """A file system may leave such lines after a power cut."""
    with open(path, "ab") as file:
        file.write(bytes(4096))
    assert steps(path) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "line", ["{broken", "[1]", '{"loss": 1}', '{"step": "3"}', '{"step": true}', "", "\xff", '{"a":' * 20_000]
)
def test_a_damaged_line_is_named_and_nothing_is_touched(path, line):
    path.write_bytes(path.read_bytes().replace(b"\n", b"\n" + line.encode("latin-1") + b"\n", 1))
    before = path.read_bytes()
    for use in (read_records, lambda path: keep_records(path, lambda record: False)):
        with pytest.raises(ValueError, match=r"line 2 is damaged.*repair or remove"):
            use(path)
    assert path.read_bytes() == before


def test_keep_records(path, tmp_path):
    assert keep_records(path, lambda record: record["step"] != 2) == 1 and steps(path) == [0, 1, 3, 4]
    inode = os.stat(path).st_ino
    assert keep_records(path, lambda record: True) == 0 and os.stat(path).st_ino == inode, "left alone"
    assert keep_records(path, lambda record: False) == 4 and path.read_bytes() == b""
    assert keep_records(path, lambda record: False) == 0 and steps(path) == []
    assert keep_records(tmp_path / "none", lambda record: True) == 0 and not (tmp_path / "none").exists()
    with pytest.raises(FileNotFoundError):
        read_records(tmp_path / "none")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_is_an_error_that_names_the_file_and_leaves_whole_lines(path):
    """A limit on file sizes stands for the disk."""
    file, size = RecordFile(path), path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 9, hard))
    try:
        with pytest.raises(OSError, match=r"step 5 could not be written: .*x.jsonl"):
            file.append({"step": 5, "loss": 0.5})
        left = path.stat().st_size
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert left == size
    file.append({"step": 5})
    file.close()
    assert steps(path) == [0, 1, 2, 3, 4, 5]


def test_write_whole_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "a.txt"
    write_whole(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, fail)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_files_of_a_cache_may_be_written_at_the_same_time(tmp_path):
    """The second writer begins and ends while the first one writes; neither takes the other's temporary file."""
    path = tmp_path / "a.txt"

    def first(file):
        file.write(b"one")
        write_whole(path, lambda other: other.write(b"two"), cache=True)
        assert path.read_bytes() == b"two"

    write_whole(path, first, cache=True)
    assert path.read_bytes() == b"one" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def filled(folder, text, **options):
    with whole_folder(folder, **options) as partial:
        (partial / "part").mkdir()
        (partial / "part" / "a.txt").write_text(text)
        assert not folder.exists() or (folder / "part" / "a.txt").read_text() != text, "it appears at the end"


def test_a_folder_appears_whole(tmp_path):
    folder = tmp_path / "parent" / "folder"
    filled(folder, "one")
    assert (folder / "part" / "a.txt").read_text() == "one"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755
    with pytest.raises(FileExistsError, match="not empty"):
        filled(folder, "two")
    filled(folder, "two", replace=True)
    assert (folder / "part" / "a.txt").read_text() == "two" and len(list(folder.parent.iterdir())) == 1


def test_a_folder_that_fails_leaves_the_old_one(tmp_path):
    folder = tmp_path / "folder"
    filled(folder, "old")
    with pytest.raises(KeyboardInterrupt), whole_folder(folder, replace=True) as partial:
        (partial / "a.txt").write_text("half")
        raise KeyboardInterrupt
    assert (folder / "part" / "a.txt").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_folder_that_another_process_writes_meanwhile_stays(tmp_path):
    folder = tmp_path / "folder"
    with pytest.raises(FileExistsError, match="written by another process"), whole_folder(folder) as partial:
        (partial / "a.txt").write_text("ours")
        filled(folder, "theirs")
    assert (folder / "part" / "a.txt").read_text() == "theirs" and [p.name for p in tmp_path.iterdir()] == ["folder"]
