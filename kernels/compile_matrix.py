"""Compile every kernel for GPUs that this machine need not have, and check the compiler's report.

    python -m uniref_fast.kernels.compile_matrix [--arch 80 90 100] [--only attention ...] [--head-dim 64 128]

Each launcher is called with meta tensors of real sizes. Triton's compilation hook then receives exactly the source that
the launch would compile, specialisation included, and it is compiled to a cubin for the chosen architecture. Checks:

- no spills (no local-memory instruction, no stack), shared memory within the chip's limit for one block;
- tensor-core instructions of the kernel's data type in attention: for 16 bits HMMA on sm_80 and sm_89, HGMMA (wgmma) on
  sm_90, UTCHMMA (tcgen05) on sm_100; for 8 bits QMMA, QGMMA and UTCQMMA, and none of 16 bits beside them;
- 128-bit global loads and stores in the memory-bound kernels, and no 8-bit or 16-bit ones.

Speed and results are not checked. The exit status is 1 if a check fails.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from uniref_fast.kernels import (
    fp8,
    norm_modulate,
    norm_modulate_backward,
    qk_norm_rope,
    qk_norm_rope_backward,
    segment_attention,
    segment_attention_backward,
    segment_attention_config,
    segment_attention_fp8,
)
from uniref_fast.kernels.segment_attention_config import AttentionConfig, AttentionTables

SHARED_LIMIT = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}  # bytes a block may use
TENSOR_MEMORY_COLUMNS = 512  # sm_100
TENSOR_CORE = {  # instructions for 16 bits (H) and for 8 bits (Q)
    80: r"\b{}MMA\.", 89: r"\b{}MMA\.", 90: r"\b{}GMMA\.", 100: r"\bUTC{}MMA\b",
}  # fmt: skip

TEXT, IMAGE, HEADS, CHANNELS = 1024, 16384, 24, 3072  # Qwen-Image-Edit with a target and three references at 1024^2
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


Launcher = Callable[..., object]

FP8_FLOOR = 89  # conversions to e4m3

# Requirements of a kernel: its kind of tensor-core instructions, and the widths of its widest load and store in bits.
# No access may be narrower than 32 bits, except in a kernel that stores so little that 16 are expected.
MATMUL = ("H", 128, 128)
STREAM = (None, 128, 128)
EXPECTED = {
    "segment_attention_kernel": MATMUL,
    "segment_attention_fp8_kernel": ("Q", 128, 128),
    "dq_kernel": MATMUL,
    "dkdv_kernel": MATMUL,
    "delta_kernel": (None, 128, 32),
    "sum_tiles_kernel": (None, 128, 16),
}


@dataclass(frozen=True)
class Case:
    """One launch to compile: `launch(arch)` calls a launcher with meta tensors, which may run several kernels."""

    name: str
    dtype: torch.dtype
    head_dim: int
    launch: Callable[[int], object]


@dataclass(frozen=True)
class Report:
    """The compiler's report of one kernel of a case."""

    case: Case
    kernel: str
    arch: int
    num_warps: int
    registers: int
    stack: int
    spills: int
    shared: int
    tensor_memory: int
    tensor_core: int
    other_tensor_core: int
    widest_load: int
    widest_store: int
    narrow: int

    def violations(self) -> list[str]:
        kind, load, store = EXPECTED.get(self.kernel, STREAM)
        found = []
        if self.spills or self.stack:
            found.append(f"{self.spills} local-memory instructions, {self.stack} bytes of stack")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} bytes of shared memory, limit {SHARED_LIMIT[self.arch]}")
        if self.tensor_memory > TENSOR_MEMORY_COLUMNS:
            found.append(f"{self.tensor_memory} columns of tensor memory, limit {TENSOR_MEMORY_COLUMNS}")
        if kind and not self.tensor_core:
            found.append(f"no instruction {TENSOR_CORE[self.arch].format(kind)}")
        if self.other_tensor_core:
            found.append(f"{self.other_tensor_core} tensor-core instructions of another data type")
        if self.widest_load < load or self.widest_store < store:
            found.append(f"global access: loads of {self.widest_load} bits, stores of {self.widest_store} bits")
        if self.narrow and min(load, store) >= 32:
            found.append(f"{self.narrow} global accesses of 8 or 16 bits")
        return found


def cases(arch: int, head_dims: tuple[int, ...] = (64, 128)) -> list[Case]:
    """Return the matrix: attention in bf16 and fp16, the memory-bound kernels in bf16, all with real sizes."""
    made: list[Case] = []

    def case(name: str, launch: Launcher, *args, dtype=torch.bfloat16, head_dim: int = 0) -> None:
        made.append(Case(name, dtype, head_dim, functools.partial(launch, *args)))

    for dim in head_dims:
        for dtype, causal in itertools.product((torch.bfloat16, torch.float16), (False, True)):
            suffix = "_causal" if causal else ""
            case("attention" + suffix, _attention, dim, dtype, causal, dtype=dtype, head_dim=dim)
            case("attention_backward" + suffix, _attention_backward, dim, dtype, causal, dtype=dtype, head_dim=dim)
        case("qk_norm_rope", _qk_norm_rope, dim, head_dim=dim)
        case("qk_norm_rope_eager", _qk_norm_rope, dim, True, head_dim=dim)
        for weight_grads in (True, False):
            name = "qk_norm_rope_backward" + ("" if weight_grads else "_frozen")
            case(name, _qk_norm_rope_backward, dim, weight_grads, head_dim=dim)

    x, y, rows = _meta(IMAGE, CHANNELS), _meta(IMAGE, CHANNELS), _meta(IMAGE, dtype=torch.int32)
    # Slices of one projection, as in a transformer block.
    shift, scale, gate = _meta(8, 3 * CHANNELS).chunk(3, dim=1)
    backward = norm_modulate_backward
    for eager in (False, True):
        suffix = "_eager" if eager else ""
        options = (rows, 1e-6, False, eager)
        case("norm_modulate" + suffix, _any_arch, norm_modulate.norm_modulate, x, shift, scale, *options)
        both: Launcher = norm_modulate.gate_residual_norm_modulate
        case("gate_residual_norm_modulate" + suffix, _any_arch, both, x, y, gate, shift, scale, *options)
    case("rms_norm_modulate", _any_arch, norm_modulate.norm_modulate, x, None, scale, None, 1e-6, True)
    case("gate_residual", _any_arch, norm_modulate.gate_residual, x, y, gate, rows)
    case("gate_residual_of_norm", _any_arch, norm_modulate.gate_residual, x, y, gate, rows, True, 1e-6)
    both = norm_modulate.gate_residual_norm_modulate
    name = "gate_residual_of_norm_norm_modulate"
    case(name, _any_arch, both, x, y, gate, None, scale, rows, 1e-6, True, True, False, 1e-6)
    for grads in (True, False):
        suffix = "_backward" if grads else "_backward_frozen"
        options = (rows, 1e-6, False, grads)
        case("norm_modulate" + suffix, _any_arch, backward.norm_modulate_backward, x, y, scale, *options)
        case("gate_residual" + suffix, _any_arch, backward.gate_residual_backward, x, y, gate, rows, grads)
        both = backward.gate_residual_norm_modulate_backward
        case("gate_residual_norm_modulate" + suffix, _any_arch, both, x, y, x, y, gate, scale, *options)
    if arch >= FP8_FLOOR:
        case("norm_modulate_fp8", _any_arch, fp8.norm_modulate_fp8, x, shift, scale, rows, 1e-6)
        both = fp8.gate_residual_norm_modulate_fp8
        case("gate_residual_norm_modulate_fp8", _any_arch, both, x, y, gate, shift, scale, rows, 1e-6)
        case("quantize_fp8", _any_arch, fp8.quantize_fp8, x)
        for dim in head_dims:
            case("attention_fp8", _attention_fp8, dim, False, head_dim=dim)
            case("attention_fp8_causal", _attention_fp8, dim, True, head_dim=dim)
        case("gelu_fp8", _any_arch, fp8.gelu_fp8, _meta(IMAGE, 4 * CHANNELS))
    return made


def compile_case(case: Case, arch: int) -> list[Report]:
    """Compile one case for one architecture and return the compiler's report of each of its kernels."""
    with _collect(arch) as compiled:
        case.launch(arch)
    return [_report(case, arch, name, kernel) for name, kernel in compiled.items()]


def _report(case: Case, arch: int, name: str, kernel) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", path)
        sass = _tool("cuobjdump", "-sass", path)
    kind = EXPECTED.get(name, STREAM)[0]
    wanted, all_kinds = (len(re.findall(TENSOR_CORE[arch].format(one), sass)) for one in (kind or r"\w*", r"\w*"))
    accesses = [(op, _width(suffix)) for op, suffix in re.findall(r"\b(LDG|LDGSTS|STG)\.(E\S*)", sass)]
    return Report(
        case=case,
        kernel=name,
        arch=arch,
        num_warps=kernel.metadata.num_warps,
        registers=int(re.findall(r"\bREG:(\d+)", usage)[-1]),
        stack=int(re.findall(r"\bSTACK:(\d+)", usage)[-1]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared=kernel.metadata.shared,
        tensor_memory=getattr(kernel.metadata, "tmem_size", None) or 0,
        tensor_core=wanted,
        other_tensor_core=all_kinds - wanted,
        widest_load=max((width for op, width in accesses if op != "STG"), default=0),
        widest_store=max((width for op, width in accesses if op == "STG"), default=0),
        narrow=sum(width < 32 for _, width in accesses),
    )


# ---- launches ----


def _attention(head_dim: int, dtype: torch.dtype, causal: bool, arch: int) -> object:
    config = segment_attention_config.pick_config(head_dim, dtype, divmod(arch, 10))
    q, k, v = (_meta(TEXT + IMAGE, HEADS, head_dim, dtype=dtype) for _ in range(3))
    launcher: Launcher = segment_attention.segment_attention
    return launcher(q, k, v, _tables(4, 7, 140, config, causal), head_dim**-0.5)


def _attention_fp8(head_dim: int, causal: bool, arch: int) -> object:
    config = segment_attention_config.pick_fp8_config(head_dim, divmod(arch, 10), causal)
    q, k, v = (_meta(TEXT + IMAGE, HEADS, head_dim) for _ in range(3))
    launcher: Launcher = segment_attention_fp8.segment_attention_fp8
    return launcher(q, k, v, _tables(4, 7, 140, config, causal), head_dim**-0.5)


def _attention_backward(head_dim: int, dtype: torch.dtype, causal: bool, arch: int) -> object:
    config = segment_attention_config.pick_backward_config(head_dim, dtype, divmod(arch, 10), causal)
    tensors = [_meta(TEXT + IMAGE, HEADS, head_dim, dtype=dtype) for _ in range(5)]
    lse = _meta(HEADS, TEXT + IMAGE, dtype=torch.float32)
    launcher: Launcher = segment_attention_backward.segment_attention_backward
    tables = _tables(4, 7, 140, config.dq, causal), _tables(5, 9, 280, config.dkdv, causal)
    return launcher(*tensors, lse, *tables, head_dim**-0.5)


def _tables(ranges: int, intervals: int, tiles: int, config: AttentionConfig, causal: bool) -> AttentionTables:
    """Return tables of a plan with so many ranges, intervals and tiles, with or without causal intervals."""
    shapes = (ranges, 2), (ranges + 1,), (intervals, 2), (tiles, 2)
    spans, pointers, seen, first_rows = (_meta(*shape, dtype=torch.int32) for shape in shapes)
    return AttentionTables(spans, pointers, seen, first_rows, config, causal)


def _qk_norm_rope(head_dim: int, *rest) -> object:
    *options, _ = rest
    txt, img = (_meta(rows, HEADS, head_dim) for rows in (TEXT, IMAGE))
    launcher: Launcher = qk_norm_rope.qk_norm_rope
    return launcher(txt, txt, txt, img, img, img, *_rope_tables(head_dim), 1e-6, *options)


def _qk_norm_rope_backward(head_dim: int, weight_grads: bool, arch: int) -> object:
    txt, img, joint = (_meta(rows, HEADS, head_dim) for rows in (TEXT, IMAGE, TEXT + IMAGE))
    launcher: Launcher = qk_norm_rope_backward.qk_norm_rope_backward
    return launcher(joint, joint, joint, txt, txt, img, img, *_rope_tables(head_dim), 1e-6, weight_grads)


def _rope_tables(head_dim: int) -> list[torch.Tensor]:
    """Return four norm weights, cos and sin, and the joint row of each token of both streams."""
    table = _meta(TEXT + IMAGE, head_dim // 2, dtype=torch.float32)
    return [*[_meta(head_dim)] * 4, table, table, *(_meta(rows, dtype=torch.int32) for rows in (TEXT, IMAGE))]


def _any_arch(launcher: Launcher, *args) -> object:
    """Call a launcher whose parameters do not depend on the architecture, which is the last argument."""
    return launcher(*args[:-1])


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class _OfflineDriver:
    """Replacement of the CUDA driver up to the compilation of a kernel; nothing is launched."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> str:
        return f"sm_{self.arch}"  # only a key of Triton's per-device caches

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def _collect(arch: int) -> Iterator[dict]:
    """Compile kernel launches in the block for `arch` instead of running them; yields kernel name -> compiled."""
    compiled: dict = {}

    def hook(*, fn, compile, **_) -> bool:
        options = {name: compile[name] for name in ("num_warps", "num_stages", "num_ctas", "enable_fp_fusion")}
        (attributes,) = compile["configs"]
        source = ASTSource(fn.jit_function, compile["signature"], compile["constants"], attributes)
        kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        compiled[fn.jit_function.__name__] = kernel
        return True  # Triton then takes the compilation as declined and does not launch

    driver = triton.runtime.driver
    # `_active` rather than `active`: reading the latter looks for a real driver, and fails without one.
    previous_driver, previous_hook = driver._active, triton.knobs.runtime.jit_cache_hook
    driver.set_active(_OfflineDriver(arch))
    triton.knobs.runtime.jit_cache_hook = hook
    try:
        yield compiled
    finally:
        driver._active, triton.knobs.runtime.jit_cache_hook = previous_driver, previous_hook


def _tool(name: str, *arguments: object) -> str:
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def _width(suffix: str) -> int:
    """Return the bits that a thread moves with one access, from the suffix: `E.128`, `E.U16`, `E` is 32."""
    if wide := re.search(r"\b(64|128|256)\b", suffix):
        return int(wide[1])
    if narrow := re.search(r"\b[US](8|16)\b", suffix):
        return int(narrow[1])
    return 32


ROW = "{:43} {:30} {:5} {:>3} {:>6} {:>5} {:>9} {:>6} {:>7} {:>11} {:>10}"
COLUMNS = "launch kernel dtype D arch warps registers spills shared tensor-core load/store"


def _compile_named(key: tuple[int, tuple[int, ...], int]) -> list[tuple[str, list[str]]]:
    """Return the lines and violations of one case, in a worker process."""
    arch, head_dims, index = key
    reports = compile_case(cases(arch, head_dims)[index], arch)
    return [(_line(report), report.violations()) for report in reports]


def _line(report: Report) -> str:
    case = report.case
    return ROW.format(
        case.name, report.kernel, DTYPE_NAMES[case.dtype], case.head_dim or "-", f"sm_{report.arch}", report.num_warps,
        report.registers, report.spills, report.shared, report.tensor_core or "-",
        f"{report.widest_load}/{report.widest_store}",
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(SHARED_LIMIT), default=sorted(SHARED_LIMIT))
    parser.add_argument("--only", nargs="+", metavar="LAUNCH", help="names of launches; all by default")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--jobs", type=int, help="processes; one a core by default")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: kernels are interpreted, there is nothing to compile")
    head_dims = tuple(options.head_dim)
    known = {arch: [case.name for case in cases(arch, head_dims)] for arch in options.arch}
    names = {name for of_arch in known.values() for name in of_arch}
    if unknown := set(options.only or []) - names:
        parser.error(f"unknown launches {sorted(unknown)}, known: {sorted(names)}")
    keys = [
        (arch, head_dims, i)
        for arch, of_arch in known.items()
        for i, name in enumerate(of_arch)
        if not options.only or name in options.only
    ]
    print(f"Triton {triton.__version__}\n{ROW.format(*COLUMNS.split())}", flush=True)
    failed = 0
    with ProcessPoolExecutor(options.jobs) as pool:
        for lines in pool.map(_compile_named, keys):
            for line, violations in lines:
                print(line, *(f"    VIOLATION: {each}" for each in violations), sep="\n", flush=True)
                failed += len(violations)
    print(f"{len(keys)} launches, {failed} violations")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
