"""Print results JSON of the benchmarks as a Markdown table of ratios.

    pytest bench --benchmark-only --results bench/results --what bench
    python bench/report.py bench/results/2026-11-23-amd-epyc-bench.json

The first member of a group is the baseline; a ratio is its median time over a member's, the two run in turns.
"""

import argparse
import json
from pathlib import Path


def table(results: dict) -> str:
    """Markdown, a line a question: ratios, and on a GPU times and fractions of what the machine can do as well."""
    gpu = results["triton"] is not None and any("cuda" in row.get("timing", "") for row in _rows(results))
    lines = ["| question | answer: baseline time over ours, medians of one run |", "|---|---|"]
    for name, rows in results["groups"].items():
        if "seconds" not in rows[0]:  # the baseline itself could not run
            lines.append(f"| {name} | {', '.join(_answer(row, gpu) for row in rows)} |")
            continue
        answers = ", ".join(_answer(row, gpu) for row in rows[1:])
        first = _answer(rows[0], gpu) if gpu else rows[0]["member"]
        lines.append(f"| {name} (1x = {first}) | {answers} |")
    return "\n".join(lines)


def _rows(results: dict) -> list[dict]:
    return [row for rows in results["groups"].values() for row in rows]


def _answer(row: dict, gpu: bool) -> str:
    if "seconds" not in row:
        return f"{row['member']}: {row.get('skipped') or row.get('failed')}"
    text = row["member"] + ("" if row["ratio"] is None else f" {row['ratio']:.2f}x")
    if not gpu:
        return text
    of = {"fraction_of_matmul": "matmul", "fraction_of_copy": "copy"}
    fractions = "".join(f", {row[key]:.0%} of {what}" for key, what in of.items() if key in row)
    return f"{text} ({row['seconds'] * 1e3:.3f} ms{fractions})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSON files written by `pytest bench --results`")
    for path in parser.parse_args().results:
        print(f"{path}\n\n{table(json.loads(path.read_text()))}\n")


if __name__ == "__main__":
    main()
