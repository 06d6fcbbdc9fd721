"""Masks of targets: what a mask image means, which keys and files hold masks, and how commands count and keep them."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pytest
from data_rows import BLUE, RED, encoded, row, write_jsonl, write_parquet
from PIL import Image

from uniref_fast.cli import main
from uniref_fast.data.dataset import BrokenFileError, Dataset, RowError
from uniref_fast.data.images import ImageSource

SIZE = (8, 6)  # of the images of `folder`


def png(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def half(size=SIZE):
    """The left half is white, the right half black."""
    image = Image.new("L", size)
    image.paste(255, (0, 0, size[0] // 2, size[1]))
    return image


@pytest.fixture
def masked(folder):
    """The folder of `folder` with m.png, whose left half is white."""
    (folder / "m.png").write_bytes(png(half()))
    return folder


def is_half(found):
    return found.mask is not None and found.load_mask().tolist() == [[1.0] * 4 + [0.0] * 4] * 6


# ---- the meaning of an image ----


def palette(colors, transparency=None):
    image = Image.new("P", (len(colors), 1))
    image.putpalette([value for color in colors for value in color])
    image.putdata(range(len(colors)))
    return png(image, **({} if transparency is None else {"transparency": transparency}))


def pixels(mode, values):
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return png(image)


@pytest.mark.parametrize(
    "content, weights",
    [
        (pixels("L", [0, 128, 255]), [0, 128 / 255, 1]),
        (pixels("1", [0, 255]), [0, 1]),
        (pixels("RGB", [(0, 0, 0), (255, 255, 255), (90, 90, 90)]), [0, 1, 90 / 255]),
        (pixels("RGB", [(255, 0, 0)]), [76 / 255]),
        (palette([(255, 255, 255), (0, 0, 0), (51, 51, 51)]), [1, 0, 0.2]),
        (png(Image.fromarray(np.array([[0, 13107, 65535]], dtype=np.uint16))), [0, 0.2, 1]),
        # an opaque alpha channel says nothing
        (pixels("RGBA", [(255, 255, 255, 255), (0, 0, 0, 255)]), [1, 0]),
        # a transparent pixel: opaque counts, whatever the colours are
        (pixels("RGBA", [(255, 255, 255, 0), (0, 0, 0, 255), (9, 9, 9, 51)]), [0, 1, 0.2]),
        (pixels("LA", [(255, 0), (0, 255)]), [0, 1]),
        (palette([(255, 255, 255), (0, 0, 0)], transparency=0), [0, 1]),
    ],
    ids=["grey", "bits", "colours", "red", "palette", "16 bits", "opaque", "alpha", "grey alpha", "palette alpha"],
)  # fmt: skip
def test_weights_of_every_kind_of_image(content, weights):
    found = ImageSource("m.png", data=content).load_mask()
    assert found.dtype == np.float32 and found.shape == (1, len(weights))
    np.testing.assert_allclose(found[0], weights, rtol=1e-6)


def test_a_mask_is_turned_upright_as_its_target_is():
    exif = Image.Exif()
    exif[0x0112] = 6
    found = ImageSource("m.jpg", data=png(half((16, 8)), "JPEG", exif=exif, quality=100)).load_mask()
    assert found.shape == (16, 8) and found[:8].min() > 0.95 and found[8:].max() < 0.05


def test_a_mask_without_a_range_is_refused():
    with pytest.raises(ValueError, match="'F' has no defined range"):
        ImageSource("m.tif", data=png(Image.new("F", (2, 2)), "TIFF")).load_mask()


# ---- rows ----


@pytest.mark.parametrize("key", ["mask", "mask_path", "loss_mask"])
@pytest.mark.parametrize("values", [row(), {"prompt": "do it", "edit_image": ["r.png"], "image": "b.png"},
                                    {"caption": "do it", "control_path": "r.png", "image_path": "b.png"}])  # fmt: skip
def test_every_format_may_have_a_mask(masked, values, key):
    dataset = Dataset(write_jsonl(masked / "a.jsonl", [values | {key: "m.png"}, values | {key: None}]))
    assert is_half(dataset[0]) and dataset.roles(0)[key] == "mask" and dataset.has_masks
    assert dataset[1].mask is None and dataset[1].load_mask() is None
    assert len(dataset[0].references) == len(dataset[1].references)


def test_rows_without_masks_are_as_before(masked):
    dataset = Dataset(write_jsonl(masked / "a.jsonl", [row()]))
    assert not dataset.has_masks and dataset[0].mask is None and "mask" not in dataset.roles(0).values()


def test_columns_name_or_ignore_a_mask(masked):
    path = write_jsonl(masked / "a.jsonl", [row(matte="m.png", mask="r.png")])
    found = Dataset(path, columns=["mask=matte", "ignore=mask"])
    assert is_half(found[0]) and found.roles(0)["mask"] is None
    ignored = Dataset(path, columns=["ignore=mask", "ignore=matte"])
    assert ignored[0].mask is None and ignored.roles(0)["mask"] is None and not ignored.has_masks
    with pytest.raises(RowError, match="key 'mask' holds images"):
        Dataset(path, columns=["mask=matte"])[0]
    with pytest.raises(RowError, match="key 'matte' holds images"):
        Dataset(path)[0]
    path = write_jsonl(masked / "a.jsonl", [row(mask_img="m.png")])
    with pytest.raises(RowError, match=r"did you mean 'mask'.*mask=mask_img"):
        Dataset(path)[0]
    path = write_jsonl(masked / "a.jsonl", [row(source_image="m.png")])
    assert is_half(Dataset(path, columns=["mask=source_image"])[0]), "also a key of images of another format"


@pytest.mark.parametrize(
    "more, reason",
    [
        ({"mask": "m.png", "loss_mask": "m.png"}, "a row has one mask, got mask and loss_mask"),
        ({"mask": ["m.png"]}, "mask must be one image that weighs the target .* --columns ignore=mask"),
        ({"mask": True}, "mask must be one image .*got True"),
        ({"mask": "none.png"}, "no image file 'none.png'"),
    ],
)
def test_wrong_values_are_broken_rows(masked, more, reason):
    with pytest.raises(RowError, match=rf"^a.jsonl:1: {reason}"):
        Dataset(write_jsonl(masked / "a.jsonl", [row(**more)]))[0]


@pytest.mark.parametrize("size, fits", [((8, 6), True), ((16, 12), True), ((4, 3), True), ((161, 120), True),
                                        ((8, 8), False), ((6, 8), False), ((160, 90), False)])  # fmt: skip
def test_a_mask_has_the_shape_of_its_target(folder, size, fits):
    (folder / "m.png").write_bytes(png(half(size)))
    found = Dataset(write_jsonl(folder / "a.jsonl", [row(mask="m.png")]))[0]
    if fits:
        assert found.sizes()[0] == SIZE
        return
    with pytest.raises(RowError, match=rf"m.png: the mask is {size[0]} x {size[1]} pixels, and the target 8 x 6"):
        found.sizes()


def test_a_black_mask_and_a_cut_one_are_broken(folder):
    (folder / "black.png").write_bytes(png(Image.new("L", SIZE)))
    whole = png(Image.effect_noise((640, 480), 90))
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    rows = [row(mask="black.png"), row(mask="cut.png")]
    black, cut = Dataset(write_jsonl(folder / "a.jsonl", rows))
    for found, reason in ((black, "black.png: the mask is black everywhere"), (cut, "cut.png: .*truncated")):
        assert found.sizes(decode=True)[0] == SIZE, "the header is whole"
        with pytest.raises(ValueError, match=f"^{reason}"):
            found.load_mask()


def test_the_check_decodes_each_mask_once(masked, monkeypatch, capsys):
    loaded, load = [], ImageSource.load_mask
    monkeypatch.setattr(ImageSource, "load_mask", lambda source: loaded.append(source) or load(source))
    path = write_jsonl(masked / "a.jsonl", [row(mask="m.png"), row()])
    assert main(["data", "check", str(path), "--decode"]) == 0 and len(loaded) == 1


# ---- files ----


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_masks_in_tables_and_archives(masked):
    content = {"input_images": [[{"bytes": encoded(RED), "path": None}]], "mask": [{"bytes": png(half())}],
               "output_image": [encoded(BLUE)], "instruction": ["do it"]}  # fmt: skip
    kinds = {"mask": pa.array(content["mask"], pa.struct([("bytes", pa.binary())]))}
    assert is_half(Dataset(write_parquet(masked / "a.parquet", content | kinds))[0])
    (masked / "a.csv").write_text("prompt,image,edit_image,mask\ndo it,b.png,r.png,m.png\ndo it,b.png,r.png,\n")
    first, second = Dataset(masked / "a.csv")
    assert is_half(first) and second.mask is None
    named = json.dumps(row(["2.src.png"], "2.dst.png", mask="2.mask.png")).encode()
    members = {"1.input_0.png": encoded(RED), "1.output.png": encoded(BLUE), "1.mask.png": png(half()),
               "1.txt": b"do it", "2.json": named, "2.src.png": encoded(RED), "2.dst.png": encoded(BLUE),
               "2.mask.png": png(half())}  # fmt: skip
    dataset = Dataset(write_tar(masked / "a.tar", members))
    assert all(map(is_half, dataset)) and len(dataset) == 2 and not dataset.left_out


def test_a_mask_in_an_archive_that_its_json_does_not_name_is_an_error(folder):
    members = {"1.input_0.png": encoded(RED), "1.output.png": encoded(BLUE), "1.mask.png": png(half())}
    for more, options, outcome in (
        ({}, {}, None),
        ({"mask": "1.mask.png"}, {}, True),
        ({"matte": "./1.mask.png"}, {"columns": ["mask=matte"]}, True),
        ({"mask": "1.mask.png"}, {"columns": ["ignore=mask"]}, False),
    ):
        named = json.dumps(row(["1.input_0.png"], "1.output.png", **more)).encode()
        dataset = Dataset(write_tar(folder / "a.tar", {**members, "1.json": named}), **options)
        if outcome is None:
            with pytest.raises(RowError, match=r"member 1.mask.png is not named by 1.json, which names other members"):
                dataset[0]
        else:
            assert is_half(dataset[0]) == outcome


def captioned(folder, **more):
    """Two captioned targets with references; masks of the first under the given names."""
    for path in ("t/1.png", "t/2.png", "control/1.png", "control/2.png"):
        (folder / path).parent.mkdir(exist_ok=True, parents=True)
        (folder / path).write_bytes(encoded(BLUE if path[0] == "t" else RED))
    for number in "12":
        (folder / f"t/{number}.txt").write_text("do it")
    for path, content in more.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", ["mask/1.png", "Masks/1.webp", "loss_mask/1.png", "t/1-masklabel.png"])
def test_folders_of_masks_and_masks_beside_their_targets(tmp_path, name):
    before = Dataset(captioned(tmp_path)).fingerprint
    form = {"lossless": True, "form": "WEBP"} if name.endswith("webp") else {}
    dataset = Dataset(captioned(tmp_path, **{name: png(half().convert("RGB"), **form)}))
    assert len(dataset) == 2 and is_half(dataset[0]) and dataset[1].mask is None
    assert [len(found.references) for found in dataset] == [1, 1] and not dataset.left_out
    assert dataset.fingerprint != before, "a run is not resumed with other masks"


def test_masks_without_a_target_and_two_folders_of_masks_are_refused(tmp_path):
    folder = captioned(tmp_path, **{"mask/1.png": png(half()), "mask/3.png": png(half())})
    with pytest.raises(BrokenFileError, match=r"1 masks of .*mask have no target of their name: 3.png"):
        Dataset(folder)
    (folder / "mask/3.png").unlink()
    with pytest.raises(ValueError, match=r"several folders \(control, mask, masks, t\)"):
        Dataset(captioned(folder, **{"masks/1.png": png(half())}))


def test_two_masks_of_one_target_are_refused(tmp_path):
    """Masks in a folder and masks beside their targets may be mixed, but each target has one mask."""
    folder = captioned(tmp_path, **{"mask/2.png": png(half()), "t/1-masklabel.png": png(half())})
    assert all(is_half(row) for row in Dataset(folder))
    (folder / "mask/1.png").write_bytes(png(half()))
    with pytest.raises(BrokenFileError, match=r"1 targets have two masks: .*mask, and .* \(1-masklabel.png\); remove"):
        Dataset(folder)


TOOLKIT = (
    "config: {process: [{datasets: [{folder_path: t, control_path: control, mask_path: m, mask_min_value: 0.1}]}]}"
)
MUSUBI = '[[datasets]]\nimage_directory = "t"\ncontrol_directory = "control"\nmask_directory = "m"\n'
TUNER = [{"id": "t", "type": "local", "instance_data_dir": "t", "caption_strategy": "textfile",
          "conditioning_data": ["m", "c"]},
         {"id": "c", "type": "local", "dataset_type": "conditioning", "instance_data_dir": "control"},
         {"id": "m", "type": "local", "dataset_type": "conditioning", "conditioning_type": "mask",
          "instance_data_dir": "m"}]  # fmt: skip


@pytest.mark.parametrize("name, content", [("a.yaml", TOOLKIT), ("a.toml", MUSUBI), ("a.json", json.dumps(TUNER))])
def test_configurations_of_other_programs_name_masks(tmp_path, name, content):
    folder = captioned(tmp_path, **{"m/1.png": png(half())})
    (folder / name).write_text(content)
    dataset = Dataset(folder / name)
    assert is_half(dataset[0]) and dataset[1].mask is None and [len(found.references) for found in dataset] == [1, 1]
    notes = [reason for _, reason in dataset.left_out]
    assert notes == (["datasets entry 1: mask_min_value = 0.1 is not followed; train with --mask-weight-outside 0.1"]
                     if name == "a.yaml" else [])  # fmt: skip


@pytest.mark.parametrize("setting", ["alpha_mask = true", "invert_mask = true"])
def test_masks_in_alpha_channels_and_inverted_ones_are_refused(tmp_path, setting):
    folder = captioned(tmp_path)
    (folder / "a.toml").write_text(f'[[datasets]]\nimage_directory = "t"\n{setting}\n')
    with pytest.raises(BrokenFileError, match=f"{setting.split()[0]}, which is not followed; write the masks"):
        Dataset(folder / "a.toml")


def test_an_imagefolder_may_have_a_mask(masked):
    values = {"file_name": "b.png", "input_file_name": "r.png", "mask_file_name": "m.png", "text": "x"}
    dataset = Dataset(write_jsonl(masked / "metadata.jsonl", [values]))
    assert is_half(dataset[0]) and len(dataset[0].references) == 1 and dataset.has_masks
    with pytest.raises(BrokenFileError, match="ambiguous"):
        Dataset(write_jsonl(masked / "metadata.jsonl", [values | {"other_mask_file_name": "m.png"}]))


# ---- commands ----


def test_check_counts_masks_and_finds_broken_ones(masked, capsys):
    for name, image in (
        ("black", Image.new("L", SIZE)),
        ("tall", half((6, 8))),
        ("label", half().point(lambda v: v // 255)),
    ):
        (masked / f"{name}.png").write_bytes(png(image))
    (masked / "white.png").write_bytes(png(Image.new("L", SIZE, 255)))
    names = ["m", "white", "m", None, "black", "tall", "label"]
    path = write_jsonl(masked / "a.jsonl", [row(mask=name and f"{name}.png") for name in names])
    assert main(["data", "check", str(path), "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["masks"]["rows"] == 4
    assert facts["masks"]["covered"] == pytest.approx({"min": 0.5 / 255, "median": 0.5, "max": 1.0})
    assert {"column": "mask", "read_as": "mask", "rows": 6} in facts["columns"]
    assert [error["where"] for error in facts["errors"]] == ["a.jsonl:5", "a.jsonl:6"]
    (note,) = (note for note in facts["notes"] if note["kind"] == "dim_mask")
    assert note["examples"][0]["where"] == "a.jsonl:7"
    assert "1 of 255" in note["examples"][0]["note"]
    main(["data", "check", str(path)])
    out = capsys.readouterr().out
    assert "masks             4, share of the target min / median / max 0.2% / 50.0% / 100.0%" in out
    assert "  1 row(s) without a mask train on the whole target" in out
    main(["data", "check", str(write_jsonl(masked / "b.jsonl", [row()]))])
    assert "masks" not in capsys.readouterr().out


def test_convert_keeps_masks(tmp_path, capsys):
    folder = captioned(tmp_path / "in", **{"m/1.png": png(half())})
    out = tmp_path / "rows.jsonl"
    command = ["data", "convert", "--target-folder", str(folder / "t"), "--control-folder", str(folder / "control"),
               "--out", str(out)]  # fmt: skip
    assert main([*command, "--mask-folder", str(folder / "m")]) == 0
    first, second = Dataset(out)
    assert is_half(first) and second.mask is None
    assert [len(found.references) for found in (first, second)] == [1, 1]
    content = {"input_images": [[encoded(RED)]], "mask": [png(half())], "output_image": [encoded(BLUE)],
               "instruction": ["do it"]}  # fmt: skip
    source = write_parquet(tmp_path / "a.parquet", content)
    assert main(["data", "convert", str(source), "--out", str(tmp_path / "b.jsonl")]) == 0
    assert is_half(Dataset(tmp_path / "b.jsonl")[0]), "bytes become a file"
    capsys.readouterr()
    assert main(["data", "convert", str(source), "--mask-folder", "m", "--out", str(tmp_path / "c.jsonl")]) == 2
    assert "--mask-folder needs --target-folder" in capsys.readouterr().err
