"""The table of the aggregates, and the sheet of images."""

from eval_records import broken, placed, record
from PIL import Image

from uniref_fast.evaluation import aggregate, report
from uniref_fast.rewards.types import AXES

ROWS = [
    record(index=0, score=2.0, objects=[placed(True, 4.0), placed(False, kept=True, similarity=0.1)]),
    record(index=1, score=4.0, references=2, task="move", objects=[placed(True, 1.0, kept=True)]),
    record(index=2, score=None, failure={"kind": "timeout", "reason": "60 s"}),
    broken(index=3),
    record("b", 0, references=10),
    record("b", 1, references=2),
]


def test_the_table_shows_known_values_with_a_legend():
    text = report.aggregates_table(aggregate.aggregates(ROWS))
    lines = text.splitlines()
    head = lines[0].split()
    assert head == ["rows", "broken", "unscored", *AXES, "mean", "best", "PSNR", "VAE", "gap", "present", "new", "off",
                    "similar"]  # fmt: skip
    first = lines[1].split()
    assert first[:4] == ["a", "4", "1", "1"] and "±1.00" in lines[1] and "67%" in lines[1]
    assert len({len(line) for line in lines if line.startswith(("a", "b"))} | {len(lines[0])}) <= 3
    assert "  10 references" in text and "  1 reference " in text and "  move" in text
    assert "unscored: rows that the reward could not score" in text and "best:" in text
    bare = report.aggregates_table(
        aggregate.aggregates([{k: v for k, v in record(score=None).items() if k not in ("psnr", "bound")}])
    )
    assert bare.splitlines()[0].split() == ["rows"], "only the number of rows is known"
    failed = report.aggregates_table(aggregate.aggregates([broken()]))
    assert failed.splitlines()[0].split() == ["rows", "broken"]


def test_the_sheet_has_a_line_for_each_row():
    picture = Image.new("RGB", (32, 32), "red")
    rows = [(record(), [("result", picture), ("target", picture)]), (record(score=None), [("result", picture)])]
    settings = {"num_inference_steps": 8, "true_cfg_scale": 1.0, "budget": None}
    assert report.sheet(rows, settings).size[0] == 24 + 2 * (160 + 24)


def test_the_settings_of_images_in_words():
    settings = {"num_inference_steps": 12, "true_cfg_scale": 2.5, "budget": 96}
    text = report.sampling_text(settings, [(64, 64), (48, 64), (64, 64)])
    assert text == "num_inference_steps 12, true_cfg_scale 2.5, budget 96, sizes 48x64 to 64x64"
    none = report.sampling_text({"num_inference_steps": None, "true_cfg_scale": None, "budget": None}, [(64, 32)])
    assert none == "budget none (references as in diffusers), size 64x32"
