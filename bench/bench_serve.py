"""Load and soak of the server: edits that join one packed loop, against stock diffusers behind the same HTTP code.

    python bench/bench_serve.py --results bench/results --what serve
    python bench/bench_serve.py --soak 500 --results bench/results --what serve-soak

The load has 32 clients. Each sends a request, waits for its image, thinks for a random time, and sends the next one.
The mean thinking time is 16 times the mean time of one edit of the stock pipeline, which is measured first: about 16
requests then wait for the stock pipeline. Requests have 1 to 3 references and mixed sizes, steps and guidance. Both
servers get the same requests, and their images are compared.

The soak sends good requests. One in ten is replaced by a bad one, by one whose client leaves while it waits, or by one
whose client leaves its stream. Every image is compared with the image of `edit` for that request alone.

Both write a plot beside the JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from conftest import machine, results_path, write_results
from serve_backends import ServerProcess
from serve_clients import Load, draw_calls, edits_alone, one_after_another, pixels, run_clients, soak_clients

DISTINCT = 48  # requests, drawn again and again


def summary(load: Load, warm: float, seconds: float) -> dict[str, Any]:
    """Return throughput and latencies of the responses between two times."""
    latencies = sorted(latency for at, latency in load.sent if warm <= at <= seconds)
    rate = len(latencies) / (seconds - warm)
    return {
        "edits": len(latencies),
        "edits_per_second": round(rate, 3),
        "mean_seconds": round(statistics.fmean(latencies), 3),
        "p50_seconds": round(float(np.percentile(latencies, 50)), 3),
        "p95_seconds": round(float(np.percentile(latencies, 95)), 3),
        "mean_in_the_system": round(rate * statistics.fmean(latencies), 1),
        "latencies": [round(each, 3) for each in latencies],
    }


def run_load(args: argparse.Namespace) -> dict[str, Any]:
    """Run the load on both servers, one after the other."""
    calls, loads, result = draw_calls(DISTINCT), {}, {}
    thinking = 0.0
    for backend in ("stock", "engine"):
        profile = args.profile and f"{args.profile}.{backend}"
        with ServerProcess(backend, args.dtype, args.threads, profile) as server:
            alone = one_after_another(server.url, calls[: DISTINCT // 2])
            thinking = thinking or args.waiting * alone
            print(f"{backend}: one edit takes {alone:.3f} s alone; clients think for {thinking:.2f} s", flush=True)
            before = server.counts()
            loads[backend] = asyncio.run(run_clients(server.url, calls, args.clients, thinking, args.seconds))
            steps = {name: server.counts()[name] - before[name] for name in before if "steps_total" in name}
        result[backend] = {"seconds_alone": round(alone, 4), **summary(loads[backend], args.warm, args.seconds)}
        result[backend] |= {"steps_of_the_loop": int(sum(steps.values()))} if backend == "engine" else {}
        shown = {name: value for name, value in result[backend].items() if name != "latencies"}
        print(f"{backend}: {json.dumps(shown)}", flush=True)
    stock, engine = result["stock"], result["engine"]
    ours, theirs = loads["engine"].images, loads["stock"].images
    differences = [np.abs(ours[at] - theirs[at]) for at in ours.keys() & theirs.keys()]
    result["comparison"] = {
        "throughput": round(engine["edits_per_second"] / stock["edits_per_second"], 3),
        "mean_latency": round(engine["mean_seconds"] / stock["mean_seconds"], 3),
        "p95_latency": round(engine["p95_seconds"] / stock["p95_seconds"], 3),
        "images_compared": len(differences),
        "largest_difference_of_255": int(max(each.max() for each in differences)),
        "pixels_that_differ": float(f"{np.mean([each.any(-1).mean() for each in differences]):.2g}"),
    }
    print(json.dumps(result["comparison"]), flush=True)
    settings = {"dtype": args.dtype, "clients": args.clients, "thinking_seconds": round(thinking, 3)}
    return settings | {"seconds": args.seconds, "warm": args.warm} | result


def plot_load(result: dict[str, Any], path: Path) -> None:
    """Draw throughput and the distribution of latencies of both servers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = {"stock": "stock diffusers,\none after another", "engine": "uniref_fast.Engine"}
    colors = {"stock": "#8a8f98", "engine": "#2f55d4"}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.8), width_ratios=(1, 2), layout="constrained")
    for at, backend in enumerate(names):
        run = result[backend]
        bar = left.bar(at, run["edits_per_second"], color=colors[backend], width=0.6)
        left.bar_label(bar, fmt="%.2f")
        latencies = run["latencies"]
        right.plot(latencies, np.arange(1, len(latencies) + 1) / len(latencies), color=colors[backend],
                   label=f"{names[backend]}: mean {run['mean_seconds']:.1f} s, p95 {run['p95_seconds']:.1f} s"
                   .replace("\n", " "))  # fmt: skip
        for value, style in ((run["mean_seconds"], "--"), (run["p95_seconds"], ":")):
            right.axvline(value, color=colors[backend], linestyle=style, linewidth=1)
    left.set_xticks(range(2), names.values())
    left.set_ylabel("edits per second")
    left.margins(y=0.12)
    right.set(
        xlabel="latency in seconds (dashed: mean, dotted: 95th percentile)", ylabel="part of the edits", ylim=(0, 1)
    )
    figure.legend(loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    where = f"{result['device']}, {result['threads']} threads, {result['dtype']}"
    figure.suptitle(f"{result['clients']} clients on the built-in model; {where}")
    figure.savefig(path, dpi=110)


def run_soak(args: argparse.Namespace) -> dict[str, Any]:
    """Send many requests, and compare images, counts and memory."""
    import torch

    from uniref_fast import builtin

    calls = draw_calls(DISTINCT)
    with ServerProcess("engine", args.dtype, args.threads) as server:
        torch.set_num_threads(args.threads)
        expected = edits_alone(builtin.load(getattr(torch, args.dtype)), calls)
        soak = asyncio.run(soak_clients(server, calls, args.soak, args.soak_clients))
        until = time.monotonic() + 60
        while (counts := server.counts())["uniref_fast_running"] + counts["uniref_fast_waiting"]:
            if time.monotonic() > until:
                soak.problems.append("edits of clients that have left still run")
                break
            time.sleep(0.1)
    differences = [np.abs(pixels(content) - expected[at]) for at, content in soak.images]
    most = 0 if args.dtype == "bfloat16" else 1  # levels of 255, as docs/numerics.md promises
    ended = {end: int(counts[f'uniref_fast_edits_total{{end="{end}"}}']) for end in ("finished", "failed", "cancelled")}
    if len(soak.images) != soak.kinds["good"]:
        soak.problems.append(f"{soak.kinds['good']} good requests have {len(soak.images)} images")
    if ended["failed"] or ended["finished"] < len(soak.images):
        soak.problems.append(f"edits by their end: {ended}")
    at, resident = zip(*soak.resident, strict=True)
    fifth = max(len(resident) // 5, 1)
    early, late = statistics.median(resident[fifth : 2 * fifth]), statistics.median(resident[-fifth:])
    result = {
        "dtype": args.dtype,
        "requests": args.soak,
        "clients": args.soak_clients,
        **soak.kinds,
        "edits_by_their_end": ended,
        "wrong_images": sum(int(each.max()) > most for each in differences),
        "largest_difference_of_255": max((int(each.max()) for each in differences), default=0),
        "problems": soak.problems,
        "resident_bytes_in_the_second_fifth": int(early),
        "resident_bytes_in_the_last_fifth": int(late),
        "growth": round(late / early - 1, 4),
        "seconds": at,
        "resident_bytes": resident,
    }
    print(json.dumps({name: value for name, value in result.items() if name not in ("seconds", "resident_bytes")}))
    return result


def plot_soak(result: dict[str, Any], path: Path) -> None:
    """Draw the memory of the server over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    axes.plot(result["seconds"], np.array(result["resident_bytes"]) / 2**20, color="#2f55d4")
    axes.set(xlabel="seconds", ylabel="resident memory in MiB", ylim=(0, None))
    axes.set_title(f"{result['requests']} requests, one in ten bad, cancelled or disconnected; {result['device']}")
    figure.savefig(path, dpi=110)


def main() -> int:
    """Run the load or the soak. Returns 1 if an image is wrong or a request is lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, metavar="DIR", help="write DIR/<date>-<device>-<what>.json and .png")
    parser.add_argument("--what", default="serve", metavar="NAME", help="last part of the names of the files")
    parser.add_argument("--clients", type=int, default=32, metavar="N", help="number of clients of the load")
    parser.add_argument("--waiting", type=float, default=16, metavar="N",
                        help="thinking time as a multiple of the time of one stock edit")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=150, help="length of the load on each server")
    parser.add_argument("--warm", type=float, default=30, metavar="SECONDS",
                        help="first part of that time, which is not counted")  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of the model")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of PyTorch in the server")
    parser.add_argument("--profile", metavar="PATH", help="write profiles of the worker threads to PATH.<backend>")
    parser.add_argument("--soak", type=int, metavar="N", help="run a soak of N requests instead of the load")
    parser.add_argument("--soak-clients", type=int, default=8, metavar="N", help="number of clients of the soak")
    args = parser.parse_args()
    result = run_soak(args) if args.soak else run_load(args)
    header = machine() | {"threads": args.threads, "command": " ".join(["python bench/bench_serve.py", *sys.argv[1:]])}
    if args.results:
        path = results_path(args.results, args.what)
        write_results(path, header | result)
        (plot_soak if args.soak else plot_load)(header | result, path.with_suffix(".png"))
        print(f"results: {path}")
    return 1 if args.soak and (result["wrong_images"] or result["problems"]) else 0


if __name__ == "__main__":
    sys.exit(main())
