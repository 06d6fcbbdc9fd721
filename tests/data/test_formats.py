"""Formats: the names that public datasets give their keys, and the content of a row."""

import json

import pytest
from data_rows import BLUE, GREEN, ONE, RED, TWO, color_of, encoded, meaning, row, write_jsonl, write_parquet

from uniref_fast.data.dataset import BrokenFileError, Dataset, RowError
from uniref_fast.encode import prompt_embeddings


@pytest.mark.parametrize(
    "values, expected",
    [
        (row(), TWO),
        ({**row(), "input_images": "r.png"}, ONE),
        (row(references=()), ("do it", [], BLUE)),
        ({"output_image": "b.png", "instruction": "do it", "input_images": None}, ("do it", [], BLUE)),
        ({"output_image": "b.png", "instruction": "do it"}, ("do it", [], BLUE)),
        ({"prompt": "do it", "image": "b.png", "edit_image": ["r.png", "g.png"]}, TWO),
        ({"prompt": "do it", "image": "b.png", "edit_image": "r.png"}, ONE),
        ({"prompt": "do it", "images": ["r.png", "g.png"]}, ("do it", [RED, GREEN], None)),
        ({"prompt": "do it", "image": "r.png", "requirement": "red"}, ("do it", [RED], None)),
        ({"image_path": "b.png", "control_path": "r.png", "caption": "do it"}, ONE),
        ({"image_path": "b.png", "control_path_1": "g.png", "control_path_0": "r.png", "caption": "do it"}, TWO),
        ({"image_path": "b.png", "caption": "do it"}, ("do it", [], BLUE)),
        ({"source_image": "r.png", "target_image": "b.png", "instruction": "do it", "instruction_cn": "x"}, ONE),
        ({"image_path": ["r.png", "g.png"], "edit_path": "b.png", "prompt": "do it"}, TWO),
        ({"image_list": ["r.png", "g.png", "b.png"], "instruction_list": ["do it"]}, TWO),
        ({"image_list": ["r.png", "g.png", "b.png"], "instruction_list": [["do it", "make it"]]}, TWO),
        ({"image_list": ["r.png", "g.png", "b.png"], "instruction": "do it"}, TWO),
    ],
)
def test_every_format_is_recognised(folder, values, expected):
    path = write_jsonl(folder / "rows.jsonl", [values])
    assert meaning(Dataset(path, targets="optional")[0]) == expected
    if expected[2] is None:
        with pytest.raises(RowError, match=r"^rows.jsonl:1: no target image"):
            Dataset(path)[0]
    else:
        assert meaning(Dataset(path)[0]) == expected


MICO = {
    "idx": 3, "input": ["r.png", "g.png"], "reference": "b.png", "Task": "HOI", "editing_type": "1 Human + 1 Object",
    "prompt": "do it", "human_indices": [0],
}  # fmt: skip


def test_mico_bench(folder):
    """The column `reference` is one of many results, so not the target. De&Re has better prompts."""
    dere = {**{k: v for k, v in MICO.items() if k not in ("idx", "editing_type")}, "ed_idx": 9, "Task": "DeRe"}
    lines = [MICO, {**dere, "refined_prompt": "do it well"}, {**dere, "refined_prompt": ""}, {**MICO, "task_type": "x"}]
    dataset = Dataset(write_jsonl(folder / "mico_bench_hoi.jsonl", lines), targets="optional")
    assert [meaning(found) for found in dataset] == [
        ("do it", [RED, GREEN], None),
        ("do it well", [RED, GREEN], None),
        ("do it", [RED, GREEN], None),
        ("do it", [RED, GREEN], None),
    ]
    assert [found.task_type for found in dataset] == ["HOI", "DeRe", "DeRe", "x"]
    columns = {key: [MICO[key]] for key in MICO} | {"refined_prompt": ["do it well"]}
    (found,) = Dataset(write_parquet(folder / "m.parquet", columns), targets="optional")
    assert (found.instruction, found.task_type) == ("do it well", "HOI")
    with pytest.raises(RowError, match="Task must be a text, got 3"):
        Dataset(write_jsonl(folder / "a.jsonl", [{**MICO, "Task": 3}]), targets="optional")[0]
    with pytest.raises(RowError, match="did you mean 'input'"):
        Dataset(write_jsonl(folder / "a.jsonl", [MICO, {**MICO, "input": None, "inputs": ["r.png"]}]),
                targets="optional")[1]  # fmt: skip


@pytest.mark.parametrize(
    "values",
    [
        row(input="a text", human_indices=[0], Task=3, refined_prompt=7, reference="a text"),
        row(input=["a text"], prompt="another", human_indices=[]),
        {"prompt": "do it", "edit_image": ["r.png", "g.png"], "image": "b.png", "input": "x", "human_indices": [1]},
    ],
)
def test_keys_of_mico_bench_are_ignored_in_other_formats(folder, values):
    found = Dataset(write_jsonl(folder / "a.jsonl", [values]))[0]
    assert meaning(found) == TWO and found.task_type is None


@pytest.mark.parametrize("key, value", [("reference", "b.png"), ("input", ["r.png"])])
def test_images_under_keys_of_mico_bench_are_refused_in_other_formats(folder, key, value):
    with pytest.raises(RowError, match=f"^a.jsonl:1: key '{key}' holds images .* did you mean 'input_images'"):
        Dataset(write_jsonl(folder / "a.jsonl", [row(**{key: value})]))[0]


def test_rows_of_text_may_have_the_keys_of_mico_bench(folder):
    values = {"instruction": "do it", "prompt": "x", "input": "y", "human_indices": []}
    found = Dataset(write_jsonl(folder / "a.jsonl", [values]), targets="optional")[0]
    assert meaning(found) == ("do it", [], None)


def test_gedit_bench(folder):
    """Both pictures are structs of bytes; the raw one is what is edited, the other is the same, resized."""
    pictures = [{"bytes": encoded(color), "path": None} for color in (RED, BLUE)]
    columns = {
        "task_type": ["background_change"], "key": ["0a"], "instruction": ["do it"], "instruction_language": ["en"],
        "input_image": pictures[1:], "input_image_raw": pictures[:1], "Intersection_exist": [True],
    }  # fmt: skip
    (found,) = Dataset(write_parquet(folder / "train-0.parquet", columns), targets="optional")
    assert meaning(found) == ("do it", [RED], None) and found.task_type == "background_change"
    lines = [{"instruction": "do it", "input_image": "b.png", "input_image_raw": "r.png"}]
    assert meaning(Dataset(write_jsonl(folder / "g.jsonl", lines), targets="optional")[0]) == ("do it", [RED], None)


def test_omnicontext(folder):
    """The files on the hub have lists of structs of bytes and no target; the others are as lines with paths."""
    facts = {"key": "a", "task_type": "multi_object", "instruction": "do it", "instruction_language": "en"}
    pictures = [{"bytes": encoded(color), "path": "x.png"} for color in (RED, GREEN)]
    write_parquet(folder / "OmniContext.parquet", {**{k: [v] for k, v in facts.items()}, "input_images": [pictures]})
    (folder / "OmniContext.json").write_text(json.dumps([{**facts, "input_images": ["r.png", "g.png"]}]))
    for name in ("OmniContext.parquet", "OmniContext.json"):
        (found,) = Dataset(folder / name, targets="optional")
        assert meaning(found) == ("do it", [RED, GREEN], None) and found.task_type == "multi_object"


def test_more_than_ten_numbered_references_stay_in_order(folder):
    shades = [(20 * i, 0, 0) for i in range(12)]
    for i, shade in enumerate(shades):
        (folder / f"{i}.png").write_bytes(encoded(shade))
    values = {f"control_path_{i}": f"{i}.png" for i in reversed(range(12))}
    found = Dataset(write_jsonl(folder / "a.jsonl", [{"caption": "x", "image_path": "b.png", **values}]))[0]
    assert [color_of(s) for s in found.references] == shades


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "do it"},
        {"prompt": "do it", "image": "b.png", "edit_image": "r.png", "requirement": "x"},
        {"prompt": "do it", "images": ["r.png"], "image": "b.png"},
        {"instruction": "do it", "input_images": [], "output_image": "b.png", "image": "r.png"},
    ],
)
def test_unknown_and_ambiguous_keys_are_an_error_that_lists_keys_and_formats(folder, values):
    with pytest.raises(BrokenFileError) as error:
        Dataset(write_jsonl(folder / "rows.jsonl", [values]), targets="optional")
    message = str(error.value)
    assert message.startswith("rows.jsonl: ") and str(sorted(values)) in message
    for name in ("OmniGen2", "DyRef", "Flow-Factory", "Edit-R1", "musubi", "DanceGRPO", "Lumina", "Echo-4o"):
        assert name in message


def test_rows_of_two_formats_in_one_file_are_an_error(folder):
    path = write_jsonl(folder / "a.jsonl", [row(), {"prompt": "a", "image": "b.png", "edit_image": ["r.png"]}])
    with pytest.raises(BrokenFileError, match=r"^a.jsonl: rows of several formats \(DyRef.*OmniGen2"):
        Dataset(path)


def test_all_rows_of_a_file_determine_its_format(folder):
    plain, edit = {"prompt": "a", "image": "b.png"}, {"prompt": "b", "image": "b.png", "edit_image": ["r.png"]}
    dataset = Dataset(write_jsonl(folder / "rows.jsonl", [plain, edit, plain]))
    assert [len(found.references) for found in dataset] == [0, 1, 0]


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>"])
def test_an_instruction_with_an_image_placeholder_is_a_broken_row(folder, builtin_pipe, token):
    dataset = Dataset(write_jsonl(folder / "a.jsonl", [row(text=f"put {token} here"), row(text="<|im_end|> is fine")]))
    with pytest.raises(
        RowError, match=r"^a.jsonl:1: instruction has <\|.*_pad\|>, which stands for the tokens of an image"
    ):
        dataset[0]
    assert dataset[1].instruction == "<|im_end|> is fine"
    with pytest.raises(ValueError, match="_pad"):  # the reason
        prompt_embeddings(builtin_pipe, token, [], [])


@pytest.mark.parametrize("numbers", [(1, 2), (0, 2), ("", 0), ("00",)])
def test_gaps_in_numbered_references_are_an_error(folder, numbers):
    values = {"control_path" + (f"_{n}" if n != "" else ""): "r.png" for n in numbers}
    path = write_jsonl(folder / "a.jsonl", [{"caption": "x", "image_path": "b.png", **values}])
    with pytest.raises(RowError, match="without gaps"):
        Dataset(path)[0]


def test_a_chain_of_edits_is_refused(folder):
    values = {"image_list": ["r.png", "g.png", "b.png"], "instruction_list": ["first", "then"]}
    with pytest.raises(RowError, match="chain of edits"):
        Dataset(write_jsonl(folder / "a.jsonl", [values]))[0]
    with pytest.raises(RowError, match="last image is the target"):
        Dataset(write_jsonl(folder / "b.jsonl", [{"image_list": [], "instruction_list": ["x"]}]))[0]
