"""Tar shards as training data: samples from members, nothing extracted, nothing followed, damage noticed."""

import gzip
import hashlib
import io
import json
import tarfile

import pytest
from data_rows import BLUE, GREEN, RED, encoded, meaning, row

from uniref_fast.data.dataset import BrokenFileError, Dataset, RowError

TWO = ("do it", [RED, GREEN], BLUE)
ONE = ("do it", [RED], BLUE)


def write_tar(path, members):
    """Members are (name, bytes), or a TarInfo without content."""
    with tarfile.open(path, "w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            name, content = member
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_tar_with_members_of_the_sample(tmp_path):
    r, g, b = encoded(RED), encoded(GREEN, form="JPEG"), encoded(BLUE)
    path = write_tar(tmp_path / "shard-3.tar", [
        ("000017.input_1.jpg", g), ("000017.json", b'{"instruction": "do it", "task_type": "edit"}'),
        ("000017.output.png", b), ("000017.input_0.png", r),
        ("./sub.d/18.txt", "\ufeffdo it\n".encode()), ("./sub.d/18.input_0.png", r), ("sub.d/18.output.png", b),
        ("19.txt", b"from nothing"), ("19.output.webp", encoded(BLUE, form="WEBP", lossless=True)),
        ("20.json", b'{"prompt": "do it", "seed": 3}'), ("20.output.png", b), ("20.cls", b"4"),
    ])  # fmt: skip
    dataset = Dataset(path)
    assert [dataset.where(i) for i in range(len(dataset))] == [
        "shard-3.tar:000017", "shard-3.tar:sub.d/18", "shard-3.tar:19", "shard-3.tar:20",
    ]  # fmt: skip
    assert dataset[0].task_type == "edit" and dataset[1].task_type is None
    text, references, target = meaning(dataset[0])
    assert (text, references[0], target) == ("do it", RED, BLUE) and references[1][1] > 250 > 10 > references[1][0]
    assert dataset[0].references[1].read() == g and dataset[0].references[0].digest == hashlib.sha256(r).hexdigest()
    assert meaning(dataset[1]) == ONE
    assert meaning(dataset[2]) == ("from nothing", [], BLUE)
    assert meaning(dataset[3]) == ("do it", [], BLUE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shard-3.tar"], "nothing is extracted"


def test_tar_whose_json_names_members(tmp_path):
    values = row(references=["pictures/r.png", "1.g.png"], target="1.output.png")
    path = write_tar(tmp_path / "s.tar", [
        ("a/pictures/r.png", encoded(RED)), ("a/1.g.png", encoded(GREEN)), ("a/1.output.png", encoded(BLUE)),
        ("a/1.json", json.dumps(values).encode()), ("a/._1.json", b"a file manager's"),
        ("a/2.json", json.dumps({"prompt": "do it", "image": "1.output.png", "edit_image": ["a/1.g.png"]}).encode()),
    ])  # fmt: skip
    with pytest.raises(BrokenFileError, match="known format"):  # two formats in one file
        Dataset(path)
    path = write_tar(tmp_path / "s.tar", [
        ("a/pictures/r.png", encoded(RED)), ("a/1.g.png", encoded(GREEN)), ("a/1.output.png", encoded(BLUE)),
        ("a/1.json", json.dumps(values).encode()),
        ("b/2.json", json.dumps(row(references=["a/pictures/r.png"], target="a/1.output.png")).encode()),
        ("b/.json", b"hidden"), ("b/3.txt", b"do it"),
        ("b/3.json", json.dumps({"output_image": "a/1.output.png"}).encode()),
    ])  # fmt: skip
    dataset = Dataset(path)
    assert [meaning(found) for found in dataset] == [TWO, ONE, ("do it", [], BLUE)]
    assert dataset[0].where == "s.tar:a/1"


def link(name, kind, target="1.output.png"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "members, reason",
    [
        ([link("1.input_0.png", tarfile.SYMTYPE, "/etc/passwd")], "'1.input_0.png' is a link (to '/etc/passwd')"),
        ([link("1.input_0.png", tarfile.LNKTYPE)], "'1.input_0.png' is a link"),
        ([link("1.input_0.png", tarfile.CHRTYPE)], "is not a plain file"),
        ([link("1.input_0.png", tarfile.FIFOTYPE)], "is not a plain file"),
        ([link("1.json", tarfile.SYMTYPE, "2.json")], "is a link"),
        ([("1.input_1.png", b"x")], "inputs must be .input_0"),
        ([("1.input_0.png", b"x"), ("1.input_0.jpg", b"x")], "once each"),
        ([("1.input_0.png", b"x"), ("1.input_0.png", b"y")], "occurs twice"),
        ([("1.output.jpg", b"x")], "several outputs"),
        ([("1.depth.png", b"x")], "neither .input_0"),
        ([("1.mask.png", b"x"), ("1.mask.jpg", b"x")], "several masks"),
        ([("1.json", b'{"instruction": "other"}')], "different instructions"),
        ([("1.json", b'{"instruction": "do it", "prompt": "do it"}')], "several instructions"),
        ([("1.json", b"{")], "not JSON"),
        ([("1.json", b"[]")], "must hold a JSON object"),
        ([("1.json", b'{"output_image": "/etc/passwd"}')], "is not inside the archive"),
        ([("1.json", b'{"output_image": "../1.output.png"}')], "is not inside the archive"),
        ([("1.json", b'{"output_image": "none.png"}')], "1.output.png is not named"),
        ([("1.json", b'{"output_image": "1.output.png", "input_images": ["none.png"]}')], "no member 'none.png'"),
        ([("1.input_0.png", b"x"), ("1.json", b'{"output_image": "1.output.png"}')], "1.input_0.png is not named"),
    ],
)
def test_tar_members_that_are_refused(tmp_path, members, reason):
    good = [("2.output.png", encoded(BLUE)), ("2.txt", b"do it")]
    path = write_tar(tmp_path / "s.tar", [("1.txt", b"do it"), ("1.output.png", encoded(BLUE)), *members, *good])
    dataset = Dataset(path)
    with pytest.raises(RowError) as error:
        dataset[0]
    assert str(error.value).startswith("s.tar:1: ") and reason in str(error.value)
    assert meaning(dataset[1]) == ("do it", [], BLUE)


@pytest.mark.parametrize("name", ["/etc/1.txt", "../1.txt", "a/../../1.txt"])
def test_names_that_leave_the_archive_are_refused(tmp_path, name):
    path = write_tar(tmp_path / "s.tar", [(name, b"do it")])
    with pytest.raises(RowError, match="has a name that leaves the archive"):
        Dataset(path, targets="optional")[0]


def test_a_link_that_another_sample_names_is_refused(tmp_path):
    members = [link("x.png", tarfile.SYMTYPE, "/etc/passwd"), ("1.json", json.dumps(row(["x.png"], "x.png")).encode())]
    with pytest.raises(RowError, match=r"^s.tar:1: member 'x.png' is a link"):
        Dataset(write_tar(tmp_path / "s.tar", members))[0]


def test_damaged_tars(tmp_path):
    path = tmp_path / "s.tar"
    members = [
        (f"{i}.{end}", content) for i in range(3) for end, content in (("txt", b"do it"), ("output.png", encoded(BLUE)))
    ]
    whole = write_tar(path, members).read_bytes()
    end = whole.rstrip(b"\0")
    last = (len(end) // 512 + 1) * 512  # end of the last member
    damaged = {
        "empty": b"",
        "in a header": whole[: 512 * 8 + 100],
        "in a member": whole[: last - 300],
        "between members": whole[: 512 * 8],
        "without end mark": whole[:last],
        "header overwritten": whole[: 512 * 4] + b"\xff" * 512 + whole[512 * 5 :],
        "two joined": whole + whole,
        "compressed": gzip.compress(whole),
    }
    assert len(Dataset(path)) == 3
    for kind, content in damaged.items():
        path.write_bytes(content)
        with pytest.raises(BrokenFileError, match=r"^s.tar: "):
            raise AssertionError(f"{kind}: {len(Dataset(path))} rows")
    with pytest.raises(BrokenFileError, match="no sample"):
        Dataset(write_tar(path, [("a.png", encoded(RED))]))
    assert len(Dataset(write_tar(path, []))) == 0


def test_a_tar_that_is_cut_after_it_was_indexed(tmp_path):
    path = write_tar(
        tmp_path / "s.tar", [("1.txt", b"do it"), ("1.output.png", encoded(BLUE, (64, 64), compress_level=0))]
    )
    found = Dataset(path)[0]
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"1.output.png: .* is truncated"):
        found.target.read()


# ---- dotted keys, and what no sample reads ----


def test_keys_of_samples_may_have_dots(tmp_path):
    b = encoded(BLUE)
    path = write_tar(tmp_path / "s.tar", [
        ("good.txt", b"good"), ("good.output.png", b),
        ("v1.5_002.txt", b"dotted"), ("v1.5_002.input_0.png", encoded(RED)), ("v1.5_002.output.png", b),
        ("a.b/v1.5_003.json", b'{"instruction": "json"}'), ("a.b/v1.5_003.output.jpg", encoded(BLUE, form="JPEG")),
        ("w.txt", b"first"), ("w.output.png", b), ("w.2.txt", b"second"), ("w.2.output.png", b),
    ])  # fmt: skip
    dataset = Dataset(path)
    assert [dataset.where(i).removeprefix("s.tar:") for i in range(len(dataset))] == [
        "good", "v1.5_002", "a.b/v1.5_003", "w", "w.2",
    ]  # fmt: skip
    assert [found.instruction for found in dataset] == ["good", "dotted", "json", "first", "second"]
    assert meaning(dataset[1]) == ("dotted", [RED], BLUE) and dataset.left_out == ()


def test_a_dotted_sample_that_lacks_its_target_is_a_broken_row(tmp_path):
    good = [("good.txt", b"good"), ("good.output.png", encoded(BLUE))]
    path = write_tar(tmp_path / "s.tar", [*good, ("v1.5_002.txt", b"dotted"), ("v1.5_002.input_0.png", encoded(RED))])
    with pytest.raises(RowError, match=r"^s.tar:v1.5_002: no target image"):
        Dataset(path)[1]


def test_texts_beside_a_sample_are_parts_of_it(tmp_path):
    members = [("1.txt", b"do it"), ("1.output.png", encoded(BLUE)), ("1.meta.json", b"{}"), ("1.caption.txt", b"x"),
               ("1.output.png.txt", b"x"), ("1.cls", b"3")]  # fmt: skip
    dataset = Dataset(write_tar(tmp_path / "s.tar", members))
    assert [meaning(found) for found in dataset] == [("do it", [], BLUE)]
    ((name, reason),) = dataset.left_out
    assert name == "s.tar" and reason.startswith("4 members are read only if a JSON file names them: ")
    assert all(f"1 {kind}" in reason for kind in (".meta.json", ".caption.txt", ".png.txt", ".cls"))


def test_members_that_are_named_are_not_counted(tmp_path):
    values = row(references=["1.src.png", "art/r.png"], target="1.dst.png")
    members = [("1.json", json.dumps(values).encode()), ("1.src.png", encoded(RED)), ("1.dst.png", encoded(BLUE)),
               ("art/r.png", encoded(GREEN)), ("1.depth.png", encoded(RED))]  # fmt: skip
    dataset = Dataset(write_tar(tmp_path / "s.tar", members))
    assert [meaning(found) for found in dataset] == [("do it", [RED, GREEN], BLUE)]
    assert [reason for _, reason in dataset.left_out] == [
        "1 members are read only if a JSON file names them: 1 .depth.png"
    ]


def test_members_of_no_sample_are_counted(tmp_path):
    members = [("1.txt", b"do it"), ("1.output.png", encoded(BLUE)), ("2.jpg", b"x"), ("2.caption", b"x"),
               ("3.jpg", b"x"), ("README", b"x"), ("._1.txt", b"a file manager's")]  # fmt: skip
    ((_, reason),) = Dataset(write_tar(tmp_path / "s.tar", members)).left_out
    assert reason.startswith("4 members") and "2 .jpg" in reason and "1 .caption" in reason and "suffix" in reason
