"""Quality of faster edits on held-out rows: PSNR against the target and against the exact result, and the scene reward.

    uniref-fast data make data --size 64 --pictures simple --references 1,2,3 --train 0 --heldout 256
    python bench/quality_edit.py data/heldout_objects.jsonl --results bench/results --what quality

Every setting edits the same rows from the same noise. Differences to the exact edit are taken row by row. `--model` and
`--initial` take another model than the built-in one.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from conftest import machine, results_path, write_results

from uniref_fast import EditReport, edit
from uniref_fast.data.dataset import Dataset
from uniref_fast.evaluation import model as models
from uniref_fast.evaluation.metrics import measure, psnr, through_vae
from uniref_fast.evaluation.requests import eval_request
from uniref_fast.fast import default_16bit
from uniref_fast.models.single_frame import single_frame

FAST = {"mode": "fast", "impl": "reference"}
LINEARS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
    "img_mlp",
    "txt_mlp",
)
MODULATION = ("img_mod", "txt_mod")
SETTINGS = {
    "exact": {},
    "keep_references=2": {"keep_references": 2},
    "keep_references=3": {"keep_references": 3},
    "keep_references=6": {"keep_references": 6},
    "keep_references=auto": {"keep_references": "auto"},
    "keep_references=auto, keep_dtype=int8": {"keep_references": "auto", "keep_dtype": "int8"},
    "fast": FAST,
    "fast, Linears only": FAST | {"modules_to_not_convert": ("default", "processor")},
    "fast, attention only": FAST | {"modules_to_not_convert": ("default", *LINEARS)},
    "fast in all blocks": FAST | {"modules_to_not_convert": MODULATION},
}
"""Arguments of `edit`. "default" among names stands for what stays in 16 bits by default."""
AXES = ("integration", "consistency", "quality")
BATCH, BUDGET, TARGET_SIDE = 32, 128, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="held-out rows of `uniref-fast data make`")
    parser.add_argument("--results", type=Path, metavar="DIR", help="write DIR/<date>-<device>-<what>.json")
    parser.add_argument("--what", default="quality", metavar="NAME", help="last part of the name of the results file")
    parser.add_argument("--model", default="builtin", help="diffusers folder or hub id")
    parser.add_argument("--initial", type=Path, action="append", default=[], help="training run to load")
    parser.add_argument("--rows", type=int, default=128, help="number of rows, from the beginning")
    parser.add_argument("--num-inference-steps", type=int, default=12, help="number of denoising steps")
    parser.add_argument("--dtype", default="bfloat16", help="data type of the model")
    parser.add_argument(
        "--setting", action="append", default=[], choices=SETTINGS, help="settings besides the exact one"
    )
    args = parser.parse_args()
    pipe = models.load(args.model, tuple(args.initial), False, "cpu", args.dtype)
    dataset = Dataset((args.data,))
    rows = [
        eval_request(
            pipe, dataset[i], (args.data.name, i), target_side=TARGET_SIDE, budget=BUDGET, seed=0,
            num_inference_steps=args.num_inference_steps, true_cfg_scale=1.0,
        )
        for i in range(min(args.rows, len(dataset)))
    ]  # fmt: skip
    found: dict = {
        **machine(),
        "model": args.model,
        "zero_cond_t": bool(pipe.transformer.config.zero_cond_t),
        "rows": len(rows),
        "num_inference_steps": args.num_inference_steps,
        "dtype": args.dtype,
        "settings": {},
    }
    exact: list = []
    for name in dict.fromkeys(("exact", *(args.setting or SETTINGS))):
        images, report = run(pipe, rows, options_of(SETTINGS[name], pipe.transformer))
        records = measures(pipe, rows, images)
        exact = exact or [images, records]
        found["settings"][name] = summary(records, images, *exact, report, args.num_inference_steps)
        print(name, json.dumps(found["settings"][name]), flush=True)
    if args.results is not None:
        path = results_path(args.results, args.what)
        write_results(path, found)
        print(path)


def options_of(setting, transformer):
    """Return the arguments of `edit` for a setting and a transformer."""
    names = setting.get("modules_to_not_convert", ())
    if "default" not in names:
        return setting
    return setting | {"modules_to_not_convert": (*default_16bit(transformer), *names[1:])}


def run(pipe, rows, options):
    """Edit all rows in batches; return the images and the reports of the references."""
    images, reports = [], []
    with single_frame(pipe.vae):
        for first in range(0, len(rows), BATCH):
            report, batch = EditReport(), [row.request for row in rows[first : first + BATCH]]
            images += edit(pipe, batch, budget=BUDGET, progress=False, report=report, **options)
            reports += report.references
    return images, reports


def measures(pipe, rows, images):
    """Return the PSNR against the target and the three scores of each image."""
    found = []
    for row, image in zip(rows, images, strict=True):
        record = measure(row, image, through_vae(pipe, row.target), True)
        found.append({"psnr": record["psnr"], **{axis: record["scores"][axis] for axis in AXES}})
    return found


def summary(records, images, exact_images, exact_records, report, steps):
    """Return means with their standard errors, and differences to the exact edit row by row."""
    result = {}
    for name in ("psnr", *AXES):
        values = np.array([record[name] for record in records])
        before = np.array([record[name] for record in exact_records])
        result[name] = {"mean": mean(values), "sem": sem(values)}
        if records is not exact_records:
            result[name] |= {"difference": mean(values - before), "difference_sem": sem(values - before),
                             "worst_row": round(float((values - before).min()), 3)}  # fmt: skip
    if records is not exact_records:
        to_exact = np.array([psnr(a, b) for a, b in zip(images, exact_images, strict=True)])
        result["psnr_to_exact"] = {"mean": mean(to_exact), "worst_row": round(float(to_exact.min()), 2)}
    if report:
        counts = np.array([len(each.refreshed) for each in report])
        drifts = [each.max_drift for each in report if each.max_drift is not None]
        result["steps_with_references"] = {"mean": mean(counts), "of": steps}
        result["largest_drift"] = {"mean": mean(np.array(drifts)), "max": round(max(drifts), 3)} if drifts else None
    return result


def mean(values) -> float:
    return round(float(values.mean()), 3)


def sem(values) -> float:
    return round(float(values.std(ddof=1)) / math.sqrt(len(values)), 3)


if __name__ == "__main__":
    main()
