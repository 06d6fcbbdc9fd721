"""Measure attention on this machine and write its table: costs of each implementation and, on a GPU, the best launches.

    python bench/autotune.py [--out uniref_fast/assets/tuned]

FlashAttention and cuDNN's flex attention are measured too where they are installed; of several generations of
FlashAttention the fastest one is written. Results are checked first. On a GPU bfloat16 is measured; float16, whose
arithmetic costs the same, is checked and gets the same figures. Launches are tried side by side, each in a process of
its own, those of attention in 8 bits too; no table has the latter yet. Costs are a linear function of a plan
(`uniref_fast.tuning.FEATURES`), fitted to the fastest rounds of plans from tiny to big, by relative error and with no
coefficient below zero; how far they are off is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import itertools
import json
import multiprocessing
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import torch
from conftest import CUDA, captured, stopwatch

from uniref_fast import ops, tuning
from uniref_fast.kernels.segment_attention_config import (
    AttentionConfig,
    pick_backward_config,
    pick_config,
    pick_fp8_config,
)
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.ops import _dispatch, dense_attention, flash_attention, flex_attention
from uniref_fast.ops.attention_fp8 import attention_fp8_reference
from uniref_fast.ops.fp8 import FP8
from uniref_fast.ops.segment_attention import segment_attention_reference
from uniref_fast.testing import max_relative_error
from uniref_fast.visibility import AttentionPlan, plan

DEVICE = "cuda" if CUDA else "cpu"
OURS = "triton" if CUDA else "native"
DTYPES = (torch.bfloat16,) if CUDA else (torch.float32, torch.bfloat16)
SAME = {torch.bfloat16: (torch.float16,)} if CUDA else {}  # dtypes that take the figures of another dtype
HEADS, DIMS, SIDE = (24, (64, 128), 64) if CUDA else (4, (64, 128), 16)
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2, FP8: 3e-2}


def plans() -> list[AttentionPlan]:
    """Return plans from one big rectangle to hundreds of tiny ones."""
    u = SIDE
    samples = [
        ([Sample(u, (1, u, u), ((1, u, u),) * k)], visibility)
        for k in (0, 1, 3)
        for visibility in ("full", "reference_causal")
    ]
    samples += [
        ([Sample(u // 4 + i, (1, u // 2, u // 2 + i), ((1, u // 2, u // 4),)) for i in range(n)], "full")
        for n in (3, 12)
    ]
    samples += [([Sample(3, (1, 4, 4), ((1, 2, 2),))] * n, "full") for n in (4, 32, 128)]
    samples += [([Sample(u // 4, (1, u // 2, u // 2), ((1, u // 2, u // 2),) * 2)], "reference_isolated")]
    return [plan(SelfLayout.qwen(pack), visibility) for pack, visibility in samples]


def calls(compiled: AttentionPlan, impl: str, dtype: torch.dtype, dim: int):
    """Return forward and backward of one implementation as calls without arguments."""
    x = [torch.randn(compiled.num_queries, HEADS, dim, device=DEVICE).to(dtype) for _ in range(3)]
    leaves = [t.clone().requires_grad_() for t in x]
    out = ops.segment_attention(*leaves, compiled, impl=impl)
    forward = torch.no_grad()(lambda: ops.segment_attention(*x, compiled, impl=impl))
    return forward, lambda: torch.autograd.grad(out, leaves, x[0], retain_graph=True)


def timed_call(compiled: AttentionPlan, dtype: torch.dtype, dim: int, way: str):
    """Return the call that a launch is timed by; attention in 8 bits (`FP8`) takes tensors in 16 bits."""
    if dtype != FP8:
        return calls(compiled, "triton", dtype, dim)[way == "backward"]
    x = [torch.randn(compiled.num_queries, HEADS, dim, device=DEVICE).to(DTYPES[0]) for _ in range(3)]
    return lambda: ops.attention_fp8(*x, compiled, impl="triton")


def seconds_of(call, rounds: int = 15) -> float:
    """Return the time of the fastest round, which other processes disturb least."""
    call()
    watch = stopwatch(captured(call) or call)
    return min(watch() for _ in range(rounds))


def fit(features: torch.Tensor, seconds: torch.Tensor) -> list[float]:
    """Fit non-negative coefficients by least squares of relative errors: the best of all subsets of features."""
    best, answer = float("inf"), [0.0] * features.shape[1]
    a = features / seconds[:, None]
    b = torch.ones_like(seconds)
    for size in range(1, a.shape[1] + 1):
        for columns in itertools.combinations(range(a.shape[1]), size):
            solved = torch.linalg.lstsq(a[:, columns], b[:, None]).solution[:, 0]
            error = (a[:, columns] @ solved - b).square().sum().item()
            if (solved >= 0).all() and error < best:
                best, answer = error, [0.0] * a.shape[1]
                for column, value in zip(columns, solved.tolist(), strict=True):
                    answer[column] = value
    return answer


def libraries() -> dict[str, str]:
    """Return the versions of the installed libraries of attention, by implementation."""
    probe = torch.zeros(1, HEADS, DIMS[0], dtype=DTYPES[0], device=DEVICE)
    found = {}
    if isinstance(library := flash_attention.serving(probe), flash_attention.Library):
        found["flash"] = library.version
    if flex_attention.unavailable(probe) is None:
        found["cudnn_flex"] = flex_attention.installed()
    return found


def only_generation(number: int):
    """Make `impl="flash"` use one generation of FlashAttention within a `with` block."""
    generations = {number: flash_attention.GENERATIONS[number]}
    return mock.patch.multiple(flash_attention, GENERATIONS=generations, PREFERENCE=(number,))


def fastest_generation() -> int | None:
    """Return the installed generation of FlashAttention that is fastest over all plans, or None without any."""
    totals = {}
    for number in flash_attention.GENERATIONS:
        with only_generation(number):
            if "flash" in libraries():
                timed = [call for each in plans() for call in calls(each, "flash", DTYPES[0], DIMS[-1])]
                totals[number] = sum(seconds_of(call) for call in timed)
                print(f"flash-attn generation {number}: {totals[number] * 1e3:.3f} ms over all plans", flush=True)
    return min(totals, key=lambda number: totals[number]) if totals else None


def costs() -> dict:
    """Return coefficients by implementation, dtype and direction, from one fit over all head dimensions."""
    made: dict = {impl: {} for impl in (OURS, "dense", *libraries())}
    for dtype in DTYPES:
        rows: dict = {(impl, way): [] for impl in made for way in ("forward", "backward")}
        for dim in DIMS:
            for compiled in plans():
                features = tuning.attention_features(compiled, HEADS, dim)
                check(compiled, dtype, dim)
                for impl in made:
                    for way, call in zip(("forward", "backward"), calls(compiled, impl, dtype, dim), strict=True):
                        rows[impl, way].append((features, seconds_of(call)))
        for (impl, way), measured in rows.items():
            features = torch.tensor([f for f, _ in measured], dtype=torch.float64)
            seconds = torch.tensor([s for _, s in measured], dtype=torch.float64)
            coefficients = fit(features, seconds)
            errors = ((features @ torch.tensor(coefficients, dtype=torch.float64)) / seconds - 1).abs()
            name = _name(dtype)
            made[impl].setdefault(name, {})[way] = [float(f"{c:.4g}") for c in coefficients]
            off = f"off by {errors.median():.0%}, at most {errors.max():.0%}"
            print(f"{impl:8}{name:10}{way:10}{made[impl][name][way]}  {off}", flush=True)
            for same in SAME.get(dtype, ()):
                made[impl].setdefault(_name(same), {})[way] = made[impl][name][way]
    return made


def check(compiled: AttentionPlan, dtype: torch.dtype, dim: int) -> None:
    x = [torch.randn(compiled.num_queries, HEADS, dim, device=DEVICE).to(dtype) for _ in range(3)]
    expected = segment_attention_reference(*(t.float() for t in x), compiled, dim**-0.5)[0]
    for impl in (OURS, "dense", *libraries()):
        error = max_relative_error(ops.segment_attention(*x, compiled, impl=impl), expected)
        if error > TOLERANCE[dtype]:
            raise SystemExit(f"{impl} is wrong in {dtype} by {error:.1e}: nothing was written")


def check_against_dense(compiled: AttentionPlan, dtype: torch.dtype, dim: int) -> None:
    """Raise ArithmeticError if results or gradients of the launch under test are wrong."""
    x = [torch.randn(compiled.num_queries, HEADS, dim, device=DEVICE).to(dtype).requires_grad_() for _ in range(3)]
    results = []
    for impl in ("triton", "dense"):
        out = ops.segment_attention(*x, compiled, impl=impl)
        results.append((out, *torch.autograd.grad(out, x, x[0].detach())))
    worst = max(max_relative_error(a, b) for a, b in zip(*results, strict=True))
    if worst > TOLERANCE[dtype]:
        raise ArithmeticError(f"wrong by {worst:.1e}")


def check_in_8_bits(compiled: AttentionPlan, dim: int) -> None:
    """Raise ArithmeticError if the result of the launch under test is not that of the emulated arithmetic."""
    x = [torch.randn(compiled.num_queries, HEADS, dim, device=DEVICE).to(DTYPES[0]) for _ in range(3)]
    worst = max_relative_error(
        ops.attention_fp8(*x, compiled, impl="triton"), attention_fp8_reference(*x, compiled, dim**-0.5)
    )
    if worst > TOLERANCE[FP8]:
        raise ArithmeticError(f"wrong by {worst:.1e}")


def launch_key(dtype: torch.dtype, dim: int, way: str) -> str:
    return f"{_name(dtype)}/{dim}/{way}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def using(configs: dict):
    """Make the ops launch with these parameters instead of those of a table within a `with` block."""
    return mock.patch.object(tuning, "attention_config", lambda _, *what: configs.get(launch_key(*what)))


def candidates(dtype: torch.dtype, dim: int, way: str) -> list:
    """Return launches to try; the first is the one that is picked without a table."""
    capability = torch.cuda.get_device_capability()

    def grid(rows, keys, warps, stages):
        return [AttentionConfig(*each) for each in itertools.product(rows, keys, warps, stages)]

    if dtype == FP8:
        default = pick_fp8_config(dim, capability, causal=False)
        tried = grid((128,), (32, 64, 128), (8,), (2, 3, 4)) + grid((128,), (64,), (4,), (2, 3))
        tried += grid((64,), (64, 128), (4,), (2, 3))
        return [default, *(config for config in tried if config != default)]
    if way == "forward":
        tried = [pick_config(dim, dtype, capability)]
        tried += grid((128,), (64,), (8,), (2, 3, 4)) + grid((64,), (64,), (4,), (2, 3, 4))
        tried += (
            grid((128,), (128,), (8,), (2, 3)) + grid((128,), (64,), (4,), (2, 3)) + grid((128,), (32,), (8,), (3,))
        )
        return tried
    # The two kernels run one after the other: each is varied beside the other's default.
    default = pick_backward_config(dim, dtype, capability)
    dq = grid((128,), (32, 64, 128), (8,), (2, 3)) + grid((64,), (32, 64), (4,), (2, 3))
    dkdv = grid((64,), (64, 128), (8,), (2, 3)) + grid((32,), (64, 128), (4, 8), (2, 3))
    dkdv += grid((64,), (64,), (4,), (2,))
    return [
        default,
        *(dataclasses.replace(default, dq=config) for config in dq),
        *(dataclasses.replace(default, dkdv=config) for config in dkdv),
    ]


def fastest(timings: list[tuple[float, dict]], default: dict) -> dict:
    """Return the fastest launch; of a backward, the best of each kernel beside the default of the other."""
    if "dq" not in default:
        return min(timings, key=lambda timing: timing[0])[1]
    best = {}
    for name, other in (("dq", "dkdv"), ("dkdv", "dq")):
        beside = [timing for timing in timings if timing[1][other] == default[other]]
        best[name] = min(beside, key=lambda timing: timing[0])[1][name]
    return best


def long_sequence() -> AttentionPlan:
    return plan(SelfLayout.qwen([Sample(SIDE * 8, (1, SIDE, SIDE), ((1, SIDE, SIDE),) * 3)]))


def trial(dtype: torch.dtype, dim: int, way: str, parameters: dict, answer: Connection) -> None:
    """Send the reason why a launch cannot be used, or None."""
    try:
        with using({launch_key(dtype, dim, way): parameters}):
            if dtype == FP8:
                check_in_8_bits(long_sequence(), dim)
            else:
                check_against_dense(long_sequence(), dtype, dim)
        answer.send(None)
    except Exception as error:  # does not fit this GPU, or is wrong
        answer.send(f"{type(error).__name__} {str(error)[:160]}")


def tried(*what) -> str | None:
    """Return the answer of a `trial` in a process of its own: a bad launch makes its process unusable, or ends it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=trial, args=(*what, theirs))
    process.start()
    theirs.close()
    try:
        verdict = ours.recv()
    except EOFError:
        verdict = "its process ended"
    process.join()
    return verdict


def wanted_launches() -> list[tuple[torch.dtype, int, str]]:
    """Return dtype, head dimension and direction of the kernels to tune; in 8 bits where this GPU computes in them."""
    wanted = list(itertools.product(DTYPES, DIMS, ("forward", "backward")))
    return wanted + [(FP8, dim, "forward") for dim in DIMS if torch.cuda.get_device_capability() >= (8, 9)]


def launches() -> dict:
    """Return the fastest launch parameters of the Triton kernels by "dtype/head_dim/direction"."""
    compiled = long_sequence()
    torch.manual_seed(0)
    jobs = {
        (dtype, dim, way): [dataclasses.asdict(config) for config in candidates(dtype, dim, way)]
        for dtype, dim, way in wanted_launches()
    }
    best = {}
    room = torch.cuda.mem_get_info()[0] // (6 * 2**30)  # a trial takes about 4 GiB
    with ThreadPoolExecutor(max(min(len(os.sched_getaffinity(0)) - 2, room), 1)) as pool:
        asked = {key: [pool.submit(tried, *key, parameters) for parameters in given] for key, given in jobs.items()}
        verdicts = {key: [future.result() for future in futures] for key, futures in asked.items()}
    for key, given in jobs.items():
        dtype, dim, way = key
        timings: list[tuple[float, dict]] = []
        for parameters, why in zip(given, verdicts[key], strict=True):
            if why is None:
                with using({launch_key(*key): parameters}):
                    timings.append((seconds_of(timed_call(compiled, dtype, dim, way)), parameters))
                print(f"  {launch_key(*key)} {timings[-1][0] * 1e3:.3f} ms {parameters}", flush=True)
                continue
            print(f"  {launch_key(*key)} {parameters}: {why}", flush=True)
            if parameters == given[0]:
                raise SystemExit("the default launch fails, see above: nothing was written")
        best[launch_key(*key)] = chosen = fastest(timings, given[0])
        for same in SAME.get(dtype, ()):
            with using({launch_key(same, dim, way): chosen}):
                check_against_dense(compiled, same, dim)
            best[launch_key(same, dim, way)] = chosen
        print(f"{launch_key(*key)}: {chosen}, {len(timings)} of {len(given)} ran", flush=True)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=tuning.FOLDER)
    args = parser.parse_args()
    probe = torch.zeros(1, HEADS, DIMS[0], dtype=DTYPES[0], device=DEVICE)
    if why := _dispatch.unavailable(OURS, probe):
        raise SystemExit(f"nothing to tune: {why}")
    if dense_attention.backend(probe) is None:
        raise SystemExit("nothing to choose between: PyTorch has no fused attention here")
    torch.manual_seed(0)
    result = {
        "device": torch.cuda.get_device_name() if CUDA else platform.processor() or platform.machine(),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "command": "python bench/autotune.py",
    }
    configs = launches() if CUDA else {}
    with using(configs), contextlib.ExitStack() as stack:
        if generation := fastest_generation():
            result["flash_generation"] = generation
            stack.enter_context(only_generation(generation))
        result["libraries"] = libraries()
        result["attention"] = costs()
    if configs:
        result["attention_configs"] = configs
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{tuning.device_name(DEVICE)}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
