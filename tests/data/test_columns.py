"""Columns under names of a user's own: none with pictures is left out in silence, and each can be given its role."""

import base64
import dataclasses
import io
import json

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from uniref_fast.cli import main
from uniref_fast.data.columns import Columns
from uniref_fast.data.dataset import BrokenFileError, Dataset, RowError
from uniref_fast.training.batches.heldout import heldout_datasets
from uniref_fast.training.batches.rows import row_weights
from uniref_fast.training.rl.recipes import MSGRPO_RECIPES
from uniref_fast.training.supervised.recipes import SFT_RECIPES

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encoded(color):
    file = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """r.png, g.png and b.png of one colour each, and r, a picture without a suffix."""
    for name, color in (("r.png", RED), ("g.png", GREEN), ("b.png", BLUE), ("r", RED)):
        (tmp_path / name).write_bytes(encoded(color))
    return tmp_path


def write_jsonl(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def meaning(found):
    colors = [source.load().getpixel((0, 0)) for source in (*found.references, found.target) if source]
    return found.instruction, colors[: len(found.references)], colors[len(found.references) :]


NAMES = (
    "reference_images", "references", "refs", "ref", "ref_images", "reference", "source_images", "sources",
    "control_images", "control", "conditions", "inputs", "images_in", "input_imgs", "subject", "depth", "a",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_references_under_an_unknown_key_are_refused_with_the_nearest_known_key(folder, name):
    values = {"instruction": "do it", name: ["r.png"], "output_image": "b.png"}
    path = write_jsonl(folder / "a.jsonl", [{"instruction": "x", "output_image": "b.png"}, values])
    with pytest.raises(RowError) as error:
        Dataset(path)[1]
    message = str(error.value)
    assert message.startswith(f"a.jsonl:2: key {name!r} holds images but is not known; did you mean 'input_images'?")
    assert f"references={name}" in message and f"ignore={name}" in message
    assert main(["data", "check", str(path)]) == 1


def test_a_target_under_an_unknown_key_is_told_from_references(folder):
    for name in ("edited_image", "targetImage", "ground_truth", "result", "gt"):
        values = {"instruction": "do it", "input_images": ["r.png"], name: "b.png"}
        with pytest.raises(RowError, match="did you mean 'output_image'"):
            Dataset(write_jsonl(folder / "a.jsonl", [values]), targets="optional")[0]


@pytest.mark.parametrize(
    "value",
    [
        "r.png", "nowhere/none.JPG", "r", ["r"], [["r.png"]], {"path": "r.png"}, [{"role": "source", "uri": "r.png"}],
        "https://example.com/a.webp", "data:image/png;base64,AAAA", base64.b64encode(encoded(RED)).decode(),
        ["a text", "r.png"],
    ],
)  # fmt: skip
def test_values_that_count_as_images(folder, value):
    values = {"instruction": "do it", "more": value, "output_image": "b.png"}
    with pytest.raises(RowError, match="key 'more' holds images"):
        Dataset(write_jsonl(folder / "a.jsonl", [values]))[0]


def test_other_metadata_stays_allowed(folder):
    others = {
        "id": "b.png", "seed": 3, "source": "a.jsonl", "url": "https://example.com/page", "tags": ["a", "b"],
        "empty": [], "meta": {"score": 0.5, "model": "x"}, "prompt": "another text", "nothing": None,
        "size": [8, 6], "text": "no file",
    }  # fmt: skip
    values = {"instruction": "do it", "input_images": ["r.png"], "output_image": "b.png", **others}
    dataset = Dataset(write_jsonl(folder / "a.jsonl", [values]))
    assert meaning(dataset[0]) == ("do it", [RED], [BLUE])
    roles = dataset.roles(0)
    assert roles["instruction"] == "instruction" and roles["input_images"] == "references"
    assert roles["output_image"] == "target" and roles["id"] == "key"
    assert all(roles[key] is None for key in others if key not in ("id", "nothing")) and "nothing" not in roles


@pytest.mark.parametrize("depth", [300, 900])
def test_deeply_nested_values_end_no_command(folder, depth):
    def nested(inside):
        for _ in range(depth):
            inside = [inside]
        return inside

    lines = [{"instruction": "x", "output_image": "b.png", "more": nested(inside)} for inside in (1, "r.png")]
    lines.append({"instruction": nested(1), "output_image": "b.png"})
    dataset = Dataset(write_jsonl(folder / "a.jsonl", lines))
    try:
        assert dataset[0].instruction == "x"
    except RowError as error:  # where the JSON parser of this Python goes no deeper
        assert "nested too deeply" in error.reason
    for index in (1, 2):
        with pytest.raises(RowError, match=r"holds images|nested too deeply|must be a text"):
            dataset[index]


@pytest.mark.parametrize("kind", [pa.binary(), pa.struct({"bytes": pa.binary(), "path": pa.string()})])
def test_a_parquet_column_of_images_is_refused_too(folder, kind):
    picture = encoded(RED) if pa.types.is_binary(kind) else {"bytes": encoded(RED), "path": None}
    table = pa.table({
        "instruction": ["do it", "do it"], "output_image": [encoded(BLUE)] * 2, "embedding": [[0.5] * 4] * 2,
        "refs": pa.array([[picture], None], pa.list_(kind)),
    })  # fmt: skip
    parquet.write_table(table, folder / "a.parquet")
    dataset = Dataset(folder / "a.parquet")
    with pytest.raises(RowError, match=r"^a.parquet:1: key 'refs' holds images"):
        dataset[0]
    assert meaning(dataset[1]) == ("do it", [], [BLUE]) and dataset.unread_columns == {"embedding": 2}
    named = Dataset(folder / "a.parquet", columns=["references=refs"])
    assert meaning(named[0]) == ("do it", [RED], [BLUE])
    ignored = Dataset(folder / "a.parquet", columns=["ignore=refs"])
    assert meaning(ignored[0]) == ("do it", [], [BLUE]) and ignored.unread_columns == {"embedding": 2, "refs": 2}


@pytest.mark.parametrize(
    "values, columns, expected",
    [
        ({"prompt": "do it", "refs": ["r.png", "g.png"], "out": "b.png"},
         "instruction=prompt,references=refs,target=out", ("do it", [RED, GREEN], [BLUE])),
        ({"instruction": "do it", "refs": "r.png", "output_image": "b.png"},
         "references=refs", ("do it", [RED], [BLUE])),
        ({"prompt": "do it", "image": "b.png", "refs": ["r.png"]}, "references=refs", ("do it", [RED], [BLUE])),
        ({"q": "do it", "image": "b.png", "edit_image": ["r.png"]}, "instruction=q", ("do it", [RED], [BLUE])),
        ({"prompt": "do it", "image": "r.png"}, "references=image", ("do it", [RED], [])),
        ({"prompt": "do it", "image": "r.png", "after": "b.png"},
         "references=image,target=after", ("do it", [RED], [BLUE])),
        ({"instruction": "do it", "a": "r.png", "b": ["g.png"], "output_image": "b.png"},
         "references=a,references=b", ("do it", [RED, GREEN], [BLUE])),
        ({"instruction": "do it", "a": "r.png", "b": None, "output_image": "b.png"},
         "references=a,references=b", ("do it", [RED], [BLUE])),
        ({"text": "do it", "pics": ["r.png", "b.png"]},
         "instruction=text,references=pics,target=pics", ("do it", [RED], [BLUE])),
        ({"instruction": "do it", "input_images": ["r.png"], "output_image": "b.png", "mask": "g.png", "url": "x.jpg"},
         "ignore=mask,ignore=url", ("do it", [RED], [BLUE])),
        ({"caption": "do it", "instruction": "not this", "output_image": "b.png", "input_images": ["r.png"]},
         "instruction=caption", ("do it", [RED], [BLUE])),
    ],
)  # fmt: skip
def test_columns_can_be_given_their_roles(folder, values, columns, expected):
    dataset = Dataset(write_jsonl(folder / "a.jsonl", [values]), targets="optional", columns=columns.split(","))
    assert meaning(dataset[0]) == expected
    for part in columns.split(","):
        role, column = part.split("=")
        if values[column] is not None:
            assert (dataset.roles(0)[column] or "ignore").startswith(role) or role == "target"


def test_columns_apply_to_the_files_that_have_them(folder):
    own = write_jsonl(folder / "a.jsonl", [{"instruction": "do it", "refs": ["r.png"], "output_image": "b.png"}])
    known = write_jsonl(folder / "b.jsonl", [{"instruction": "x", "input_images": ["g.png"], "output_image": "b.png"}])
    dataset = Dataset([own, known], columns=["references=refs"])
    assert [meaning(found) for found in dataset] == [("do it", [RED], [BLUE]), ("x", [GREEN], [BLUE])]


def test_a_column_that_no_row_has_is_reported(folder):
    lines = [{"instruction": "do it", "output_image": "b.png"}] * 1001
    late = write_jsonl(folder / "a.jsonl", [*lines, {"instruction": "x", "refs": "r.png", "output_image": "b.png"}])
    assert Dataset(late, columns=["references=refs"]).left_out == (), "it may be in the last row only"
    for pairs in (["references=reffs"], ["ignore=mask"], ["instruction=instruction", "target=output"]):
        ((name, reason),) = Dataset(late, targets="optional", columns=pairs).left_out
        assert name == "columns" and reason.startswith(f"no row has '{pairs[-1].partition('=')[2]}'; columns are [")


def test_task_key_and_language_can_be_named(folder):
    values = {"instruction": "do it", "output_image": "b.png", "kind": "edit", "name": "n1", "id": 7, "tongue": "en"}
    path = write_jsonl(folder / "a.jsonl", [values])
    (found,) = Dataset(path, columns=["task_type=kind", "key=name", "language=tongue"])
    assert (found.task_type, found.key, found.language) == ("edit", "n1", "en")


def test_rows_that_the_columns_do_not_fit(folder):
    gap = {"instruction": "x", "output_image": "b.png", "a": None, "c": "r.png"}
    with pytest.raises(RowError, match="references must fill a, c in this order without gaps"):
        Dataset(write_jsonl(folder / "a.jsonl", [gap]), columns=["references=a", "references=c"])[0]
    both = {"instruction": "x", "output_image": "b.png", "input_images": ["g.png"], "refs": ["r.png"]}
    with pytest.raises(RowError, match="'input_images' does not belong"):
        Dataset(write_jsonl(folder / "a.jsonl", [both]), columns=["references=refs"])[0]
    question = {"question": "x", "output_image": "b.png", "refs": ["r.png"]}
    with pytest.raises(BrokenFileError, match=r"no column 'instruction' for the instruction; columns found: \['out"):
        Dataset(write_jsonl(folder / "a.jsonl", [question]), columns=["references=refs"])


@pytest.mark.parametrize(
    "pairs, message",
    [
        (["references"], "pairs such as references=refs, got 'references'"),
        (["references="], "pairs such as"),
        (["reference=refs"], r"'reference' in 'reference=refs' is not a role; .*did you mean references=refs"),
        (["target=a", "target=b"], "target is given twice"),
        (["target=a", "key=a"], "'a' is given two roles, target and key"),
        (["references=a", "references=a"], "'a' is given two roles"),
    ],
)
def test_wrong_columns(folder, pairs, message):
    with pytest.raises(ValueError, match=message):
        Columns.of(pairs)
    with pytest.raises(ValueError, match=message):
        Dataset(write_jsonl(folder / "a.jsonl", []), columns=pairs)


def test_columns_are_part_of_what_a_run_is_resumed_by(folder):
    path = write_jsonl(folder / "a.jsonl", [{"instruction": "do it", "refs": "r.png", "output_image": "b.png"}])
    prints = {Dataset(path, columns=pairs).fingerprint for pairs in ([], ["references=refs"], ["ignore=refs"])}
    assert len(prints) == 3


@pytest.mark.parametrize("recipe", [SFT_RECIPES["tiny"], MSGRPO_RECIPES["tiny"]])
def test_every_run_reads_the_columns_of_its_recipe(folder, recipe):
    path = write_jsonl(folder / "a.jsonl", [{"prompt": "do it", "refs": ["r.png"], "out": "b.png"}])
    columns = ("instruction=prompt", "references=refs", "target=out")
    config = dataclasses.replace(recipe(), data=(str(path),), weights=(2.0,), heldout=(str(path),), columns=columns)
    dataset = Dataset(config.data, columns=columns)
    assert dataset.path_lengths == (1,) and row_weights(config, dataset) == [2.0]
    assert meaning(heldout_datasets([path], config)["a"][0]) == ("do it", [RED], [BLUE])
    with pytest.raises(ValueError, match="is not a role"):
        dataclasses.replace(config, columns=("refs=references",))


def test_check_says_which_column_is_read_as_what(folder, capsys):
    lines = [
        {"prompt": "do it", "refs": ["r.png"], "out": "b.png", "seed": 1},
        {"prompt": "do it", "out": "b.png"},
        {"prompt": "", "refs": ["r.png"], "out": "b.png"},
    ]
    path = write_jsonl(folder / "a.jsonl", lines)
    columns = "instruction=prompt,references=refs,target=out"
    assert main(["data", "check", str(path), "--columns", columns]) == 1
    out = capsys.readouterr().out.partition("\nnotes")[0]
    read = [line.split(maxsplit=1) for line in out.splitlines() if line.startswith("  ") and "row(s)" in line]
    assert [(name, rest.rsplit(maxsplit=2)[0].strip(), rest.split()[-2]) for name, rest in read] == [
        ("prompt", "instruction", "3"), ("refs", "references", "2"), ("out", "target", "3"), ("seed", "not read", "1"),
    ]  # fmt: skip
    main(["data", "check", str(path), "--columns", columns, "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["columns"][1] == {"column": "refs", "read_as": "references", "rows": 2}
    assert main(["data", "check", str(path), "--columns", "refs=references"]) == 2
    assert "is not a role" in capsys.readouterr().err
