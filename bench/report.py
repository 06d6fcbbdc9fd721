"""A pytest-benchmark JSON -> a small results JSON to commit, and a Markdown table of ratios.

    pytest bench --benchmark-only --benchmark-json=/tmp/raw.json
    python bench/report.py /tmp/raw.json --what ops --out bench/results

The first member of a group is the baseline; a ratio is its median time over a member's, the two run in turns. Only
what is needed to judge the figures is kept: device, versions, threads, commit, date; nothing else about the machine.
"""

import argparse
import json
import re
from pathlib import Path


def condense(raw: dict) -> dict:
    """Device, versions, and for each group what every member measured (`conftest.timed`), in run order."""
    machine = raw["machine_info"]
    groups: dict[str, list[dict]] = {}
    for item in raw["benchmarks"]:
        params = item.get("params") or {}
        member = str(params.get("whose") or params.get("which") or item["name"])
        info = {key: float(f"{x:.5g}") if isinstance(x, float) else x for key, x in item["extra_info"].items()}
        groups.setdefault(item["group"], []).append({"member": member} | info)
    gpu = machine["device"] if machine.get("cuda") else None
    return {
        "date": raw["datetime"][:10],
        "device": gpu or machine["cpu"].get("brand_raw", machine["processor"]),
        "threads": machine["threads"],
        "python": machine["python_version"],
        "torch": machine["torch"],
        "triton": machine["triton"],
        "commit": raw["commit_info"].get("id"),
        "groups": groups,
    }


def table(results: dict) -> str:
    """Markdown, a line a question: ratios, and on a GPU times and fractions of what the machine can do as well."""
    gpu = results["triton"] is not None and any("cuda" in row.get("timing", "") for row in _rows(results))
    lines = ["| question | answer: baseline time over ours, medians of one run |", "|---|---|"]
    for name, rows in results["groups"].items():
        answers = ", ".join(_answer(row, gpu) for row in rows[1:])
        first = _answer(rows[0], gpu) if gpu else rows[0]["member"]
        lines.append(f"| {name} (1x = {first}) | {answers} |")
    return "\n".join(lines)


def _rows(results: dict) -> list[dict]:
    return [row for rows in results["groups"].values() for row in rows]


def _answer(row: dict, gpu: bool) -> str:
    text = row["member"] + ("" if row["ratio"] is None else f" {row['ratio']:.2f}x")
    if not gpu:
        return text
    of = {"fraction_of_matmul": "matmul", "fraction_of_copy": "copy"}
    fractions = "".join(f", {row[key]:.0%} of {what}" for key, what in of.items() if key in row)
    return f"{text} ({row['seconds'] * 1e3:.3f} ms{fractions})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("raw", type=Path, help="JSON written by --benchmark-json")
    parser.add_argument("--what", required=True, help="last part of the result's name, e.g. ops")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    args = parser.parse_args()
    results = condense(json.loads(args.raw.read_text()))
    device = re.sub(r"[^a-z0-9]+", "-", results["device"].lower().replace("nvidia", "")).strip("-")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{results['date']}-{device}-{args.what}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{path}\n\n{table(results)}")


if __name__ == "__main__":
    main()
