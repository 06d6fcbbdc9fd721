"""Readers of .jsonl, .json and .parquet files, and errors for damaged files."""

import json
import pickle

import numpy as np
import pyarrow as pa
import pytest
from data_rows import BLUE, GREEN, ONE, RED, TWO, color_of, encoded, meaning, row, write_jsonl, write_parquet
from pyarrow import parquet

from uniref_fast.data import readers
from uniref_fast.data.dataset import BrokenFileError, Dataset, RowError, left_out


def test_blank_lines_are_counted_and_a_bom_is_skipped(folder):
    lines = ["\ufeff" + json.dumps(row(text="one")), "", "  \t", json.dumps(row(text="four")), '{"broken', "", ""]
    path = folder / "a.jsonl"
    path.write_bytes("\r\n".join(lines).encode())
    dataset = Dataset(path)
    assert len(dataset) == 3 and [dataset.where(i) for i in range(3)] == ["a.jsonl:1", "a.jsonl:4", "a.jsonl:5"]
    assert [dataset[i].instruction for i in (1, 0, -2, -3, np.int64(1))] == ["four", "one", "four", "one", "four"]
    with pytest.raises(RowError, match=r"^a.jsonl:5: not JSON"):
        dataset[2]
    for index in (3, -4):
        with pytest.raises(IndexError):
            dataset[index]
    with pytest.raises(TypeError):
        dataset[0:1]


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"instruction": "\xff"}', "not UTF-8"),
        (b'{"input_images": ["r.png"], "input_images": ["g.png"], "instruction": "x"}', "occurs twice"),
        (b"[" * 100_000, "nested too deeply|not JSON"),
        (b'{"instruction": "x"} {"instruction": "y"}', "not JSON"),
    ],
)
def test_damaged_lines(folder, line, reason):
    path = folder / "a.jsonl"
    path.write_bytes(line + b"\n" + json.dumps(row()).encode())  # and no newline at the end
    dataset = Dataset(path)
    with pytest.raises(RowError, match=reason):
        dataset[0]
    assert meaning(dataset[1]) == TWO


def test_an_empty_file_has_no_rows(tmp_path):
    for content in ("", "\n\n", "\ufeff"):
        (tmp_path / "a.jsonl").write_text(content)
        dataset = Dataset(tmp_path / "a.jsonl")
        assert len(dataset) == 0 and list(dataset) == []
        with pytest.raises(IndexError):
            dataset[0]
    (tmp_path / "a.json").write_text("[]")
    assert len(Dataset(tmp_path / "a.json")) == 0


def test_a_json_list(folder):
    path = folder / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([row(), 3, row(text="third")]).encode())
    dataset = pickle.loads(pickle.dumps(Dataset(path)))
    assert b"third" not in pickle.dumps(Dataset(path)), "the rows do not travel"
    assert len(dataset) == 3 and dataset[2].instruction == "third" and dataset[2].where == "a.json:3"
    with pytest.raises(RowError, match=r"^a.json:2: a row must be"):
        dataset[1]


@pytest.mark.parametrize(
    "content, reason", [("[{]", "not JSON"), ('{"a": 1}', "not a row of a known format"), ("", "not JSON")]
)
def test_a_json_file_that_is_not_a_list_of_rows(tmp_path, content, reason):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(BrokenFileError, match=f"^a.json: .*{reason}"):
        Dataset(tmp_path / "a.json")


ROWS_OF_JSON = {
    "lines": "\n".join(json.dumps(row(text=text)) for text in ("one", "two")) + "\n",
    "lines with a BOM and blanks": "\ufeff\n" + "\n\n".join(json.dumps(row(text=text)) for text in ("one", "two")),
    "a list under a key": json.dumps(
        {"version": 1, "tags": ["a"], "data": [row(text="one"), row(text="two")]}, indent=1
    ),
    "a list": json.dumps([row(text="one"), row(text="two")]),
}


@pytest.mark.parametrize("content", ROWS_OF_JSON.values(), ids=ROWS_OF_JSON.keys())
@pytest.mark.parametrize("inside", [True, False])
def test_every_layout_of_json_is_read_named_and_in_a_folder(folder, content, inside):
    (folder / "a.json").write_text(content)
    dataset = pickle.loads(pickle.dumps(Dataset(folder if inside else folder / "a.json")))
    assert [found.instruction for found in dataset] == ["one", "two"] and dataset.left_out == ()


def test_a_json_file_of_one_row(folder):
    for name in ("one", "two"):
        (folder / f"{name}.json").write_text(json.dumps(row(text=name), indent=2))
    assert [found.instruction for found in Dataset(folder)] == ["one", "two"]
    line = json.dumps(row(text="three")) + '\n{"broken\n'
    (folder / "two.json").write_text(line)
    dataset = Dataset(folder)
    assert dataset[1].instruction == "three" and len(dataset) == 3
    with pytest.raises(RowError, match=r"^two.json:2: not JSON"):
        dataset[2]


@pytest.mark.parametrize(
    "content, reason",
    [
        ('{"seed": 0}', "holds a JSON object ('seed') that is not a row"),
        ('{"data": [{"text": "x", "picture": "y"}]}', "not a row of a known format"),
        ("[1, 2]", "list without objects"),
        ("3", "must hold a JSON list of rows, got int"),
    ],
)
def test_a_json_file_without_rows_is_left_out_of_a_folder_and_reported(folder, capsys, content, reason):
    write_jsonl(folder / "a.jsonl", [row()])
    (folder / "b.json").write_text(content)
    dataset = Dataset(folder)
    ((name, reported),) = dataset.left_out
    assert len(dataset) == 1 and name == "b.json" and reason in reported
    assert left_out([dataset, dataset]) == [(name, reported)]
    with pytest.raises(BrokenFileError, match=r"^b.json: "):
        Dataset(folder / "b.json")


@pytest.mark.parametrize("content", ['{"data": [{"instruction": "x"', "[{]", "{]\n"])
def test_a_damaged_json_file_in_a_folder_is_an_error(folder, content):
    write_jsonl(folder / "a.jsonl", [row()])
    (folder / "b.json").write_text(content)
    with pytest.raises(BrokenFileError, match=r"^b.json: not JSON"):
        Dataset(folder)


def test_rows_under_several_keys_are_an_error(folder):
    (folder / "a.json").write_text(json.dumps({"train": [row()], "test": [row()]}))
    with pytest.raises(BrokenFileError, match="rows under several keys, train, test"):
        Dataset(folder)


def test_parquet_with_bytes_structs_and_paths(folder):
    r, g, b = encoded(RED), encoded(GREEN), encoded(BLUE)
    texts = ["do it"] * 2
    bagel = {"image_list": [[r, g, b], [r, b]], "instruction_list": [["do it"]] * 2}
    mico = {
        "input_images": [
            [{"bytes": r, "path": "x.png"}, {"bytes": g, "path": None}],
            [{"bytes": None, "path": "r.png"}],
        ],
        "output_image": [{"bytes": b, "path": "y.png"}, {"bytes": b, "path": None}],
        "instruction": texts,
    }
    plain = {"input_images": [["r.png", "g.png"], ["r.png"]], "output_image": ["b.png"] * 2, "instruction": texts}
    ragged = {
        "image_path": ["b.png"] * 2, "control_path_0": ["r.png"] * 2, "control_path_1": ["g.png", None],
        "caption": texts,
    }  # fmt: skip
    for columns in (bagel, mico, plain, ragged):
        dataset = Dataset(write_parquet(folder / "p.parquet", columns))
        assert [meaning(found) for found in dataset] == [TWO, ONE]
        assert dataset[1].where == "p.parquet:2"


def test_only_the_row_group_and_the_columns_needed_are_read(folder, monkeypatch):
    count = 20
    columns = {
        "input_images": [[encoded((i, 0, 0))] for i in range(count)],
        "output_image": [encoded(BLUE)] * count,
        "instruction": [f"row {i}" for i in range(count)],
        "embedding": [[0.5] * 100] * count,
    }
    path = write_parquet(folder / "p.parquet", columns, row_group_size=3)
    read, original = [], parquet.ParquetFile.read_row_group

    def counted(self, group, columns):
        read.append((group, tuple(columns)))
        return original(self, group, columns)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", counted)
    dataset = Dataset(path)
    assert not read
    assert color_of(dataset[19].references[0]) == (19, 0, 0)
    assert read == [(6, ("input_images", "output_image", "instruction"))]
    assert [found.instruction for found in dataset] == [f"row {i}" for i in range(count)]
    assert len(read) == 8, "each group once, in a pass"  # group 6 had left the cache
    assert [dataset[i].instruction for i in (18, 12, 19)] == ["row 18", "row 12", "row 19"] and len(read) == 8


def test_parquet_rows_that_are_broken(folder):
    columns = {"input_images": [[b""], None, [encoded(RED)]], "output_image": [encoded(BLUE), encoded(BLUE), None],
               "instruction": ["a", None, "c"]}  # fmt: skip
    dataset = Dataset(write_parquet(folder / "p.parquet", columns))
    with pytest.raises(ValueError, match=r"input_images\[0\]"):
        dataset[0].references[0].size()
    with pytest.raises(RowError, match=r"^p.parquet:2: no 'instruction'"):
        dataset[1]
    with pytest.raises(RowError, match=r"^p.parquet:3: no target"):
        dataset[2]
    both_none = {
        "output_image": [{"bytes": None, "path": None}, {"bytes": b"x", "path": "p"}],
        "instruction": ["a", "b"],
    }
    dataset = Dataset(write_parquet(folder / "q.parquet", both_none))
    with pytest.raises(RowError, match=r"^q.parquet:1: output_image must be"):
        dataset[0]
    numbers = {"output_image": [1], "instruction": ["a"]}
    with pytest.raises(RowError, match=r"output_image must be a path or, in parquet, bytes"):
        Dataset(write_parquet(folder / "n.parquet", numbers))[0]
    empty = write_parquet(
        folder / "e.parquet", {"output_image": pa.array([], pa.binary()), "instruction": pa.array([], pa.string())}
    )
    assert len(Dataset(empty)) == 0


def test_a_misspelt_column_of_images_is_an_error(folder):
    columns = {"input_image": [[encoded(RED)]], "output_image": [encoded(BLUE)], "instruction": ["do it"]}
    with pytest.raises(RowError, match=r"^p.parquet:1: key 'input_image' holds images .*'input_images'"):
        Dataset(write_parquet(folder / "p.parquet", columns))[0]


def test_the_cache_drops_the_least_recently_used_row_group():
    cache, read = readers.RowGroupCache(2), []
    for key in "abacab":
        assert cache.get(key, lambda key=key: read.append(key) or key) == key
    assert read == ["a", "b", "c", "b"]


def test_damaged_parquet(folder):
    path = folder / "p.parquet"
    columns = {"output_image": [encoded(BLUE)] * 4, "instruction": ["do it"] * 4}
    whole = write_parquet(path, columns, compression="none", use_dictionary=False).read_bytes()
    for damaged in (b"", b"PAR1", whole[:-20], whole[: len(whole) // 2], b"x" * 200):
        path.write_bytes(damaged)
        with pytest.raises(BrokenFileError, match=r"^p.parquet: damaged parquet"):
            Dataset(path)
    path.write_bytes(b"PAR1" + b"\xff" * 100 + whole[104:])  # the first page's header, under a good footer
    with pytest.raises(RowError, match=r"^p.parquet:1: damaged parquet"):
        Dataset(path)[0]
