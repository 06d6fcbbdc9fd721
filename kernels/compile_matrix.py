"""Compile every kernel for GPUs that are not here, and check the compiler's own report.

    python -m uniref_fast.kernels.compile_matrix [--arch 80 90 100] [--kernel attention ...] [--head-dim 64 128]

Each launcher is called with meta tensors of real sizes. Triton's compilation hook then hands over exactly what the
launch would compile, specialisation included, and it is compiled to a cubin for the wanted architecture. Checked:

- no spills (no local-memory instruction, no stack), shared memory within the chip's limit for one block;
- tensor-core instructions in attention: HMMA on sm_80, HGMMA (wgmma) on sm_90, UTC*MMA (tcgen05) on sm_100;
- 128-bit global loads and stores in the memory-bound kernels, and no 8-bit or 16-bit ones.

It says nothing about speed or results. Exit status 1 when a check fails.
"""

from __future__ import annotations

import argparse
import functools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from uniref_fast.kernels import norm_modulate, patchify, qk_norm_rope, segment_attention

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a block may use
TENSOR_MEMORY_COLUMNS = 512  # sm_100
TENSOR_CORE = {80: r"\bHMMA\.", 90: r"\bHGMMA\.", 100: r"\bUTC\w*MMA\b"}

TEXT, IMAGE, HEADS, CHANNELS = 1024, 16384, 24, 3072  # Qwen-Image-Edit with a target and three references at 1024^2
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Case:
    """One launch to compile: `launch(arch)` calls a launcher with meta tensors."""

    kernel: str
    dtype: torch.dtype
    head_dim: int
    launch: Callable[[int], object]

    @property
    def tensor_core(self) -> bool:
        return self.kernel == "attention"


@dataclass(frozen=True)
class Report:
    """What the compiler made of one case."""

    case: Case
    arch: int
    num_warps: int
    registers: int
    stack: int
    spills: int
    shared: int
    tensor_memory: int
    tensor_core: int
    widest_load: int
    widest_store: int
    narrow: int

    def violations(self) -> list[str]:
        found = []
        if self.spills or self.stack:
            found.append(f"{self.spills} local-memory instructions, {self.stack} bytes of stack")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} bytes of shared memory, limit {SHARED_LIMIT[self.arch]}")
        if self.tensor_memory > TENSOR_MEMORY_COLUMNS:
            found.append(f"{self.tensor_memory} columns of tensor memory, limit {TENSOR_MEMORY_COLUMNS}")
        if self.case.tensor_core and not self.tensor_core:
            found.append(f"no {TENSOR_CORE[self.arch]} instruction")
        if self.widest_load < 128 or self.widest_store < 128:
            found.append(f"global access: loads of {self.widest_load} bits, stores of {self.widest_store} bits")
        if self.narrow:
            found.append(f"{self.narrow} global accesses of 8 or 16 bits")
        return found


def cases(head_dims: tuple[int, ...] = (64, 128)) -> list[Case]:
    """The matrix: attention in bf16 and fp16, the memory-bound kernels in bf16, real sizes."""
    made: list[Case] = []

    def case(kernel: str, launch: Callable[..., object], *args, dtype=torch.bfloat16, head_dim: int = 0) -> None:
        made.append(Case(kernel, dtype, head_dim, functools.partial(launch, *args)))

    for dim in head_dims:
        for dtype in (torch.bfloat16, torch.float16):
            case("attention", _attention, dim, dtype, dtype=dtype, head_dim=dim)
        case("qk_norm_rope", _qk_norm_rope, dim, head_dim=dim)

    x, y, rows = _meta(IMAGE, CHANNELS), _meta(IMAGE, CHANNELS), _meta(IMAGE, dtype=torch.int32)
    # Slices of one projection, as a transformer block makes them.
    shift, scale, gate = _meta(8, 3 * CHANNELS).chunk(3, dim=1)
    case("norm_modulate", _any_arch, norm_modulate.norm_modulate, x, shift, scale, rows, 1e-6)
    case("gate_residual", _any_arch, norm_modulate.gate_residual, x, y, gate, rows)
    both = norm_modulate.gate_residual_norm_modulate
    case("gate_residual_norm_modulate", _any_arch, both, x, y, gate, shift, scale, rows, 1e-6)
    case("pack", _any_arch, patchify.pack, [_meta(16, 1, 128, 128)], [0], 64 * 64)
    case("unpack", _any_arch, patchify.unpack, _meta(64 * 64, 64), [0], [(1, 64, 64)], 16)
    return made


def compile_case(case: Case, arch: int) -> Report:
    """Compile one case for one architecture and read the compiler's report."""
    with _collect(arch) as compiled:
        case.launch(arch)
    (kernel,) = compiled
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", path)
        sass = _tool("cuobjdump", "-sass", path)
    accesses = [(op, _width(suffix)) for op, suffix in re.findall(r"\b(LDG|LDGSTS|STG)\.(E\S*)", sass)]
    return Report(
        case=case,
        arch=arch,
        num_warps=kernel.metadata.num_warps,
        registers=int(re.findall(r"\bREG:(\d+)", usage)[-1]),
        stack=int(re.findall(r"\bSTACK:(\d+)", usage)[-1]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared=kernel.metadata.shared,
        tensor_memory=getattr(kernel.metadata, "tmem_size", None) or 0,
        tensor_core=len(re.findall(TENSOR_CORE[arch], sass)),
        widest_load=max((width for op, width in accesses if op != "STG"), default=0),
        widest_store=max((width for op, width in accesses if op == "STG"), default=0),
        narrow=sum(width < 32 for _, width in accesses),
    )


def _attention(head_dim: int, dtype: torch.dtype, arch: int) -> object:
    config = segment_attention.pick_config(head_dim, dtype, divmod(arch, 10))
    q, k, v = (_meta(TEXT + IMAGE, HEADS, head_dim, dtype=dtype) for _ in range(3))
    q_ranges, kv_ptr, kv_ranges, tiles = (_meta(*s, dtype=torch.int32) for s in ((4, 2), (5,), (7, 2), (140, 2)))
    return segment_attention.segment_attention(q, k, v, q_ranges, kv_ptr, kv_ranges, tiles, head_dim**-0.5, config)


def _qk_norm_rope(head_dim: int, arch: int) -> object:
    txt, img = (_meta(rows, HEADS, head_dim) for rows in (TEXT, IMAGE))
    weight, table = _meta(head_dim), _meta(TEXT + IMAGE, head_dim // 2, dtype=torch.float32)
    txt_index, img_index = (_meta(rows, dtype=torch.int32) for rows in (TEXT, IMAGE))
    return qk_norm_rope.qk_norm_rope(
        txt, txt, txt, img, img, img, weight, weight, weight, weight, table, table, txt_index, img_index, 1e-6
    )


def _any_arch(launcher: Callable[..., object], *args) -> object:
    """For launchers whose parameters do not depend on the architecture, which comes last."""
    return launcher(*args[:-1])


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class _OfflineDriver:
    """Stands in for the CUDA driver up to the compilation of a kernel; nothing is ever launched."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> str:
        return f"sm_{self.arch}"  # only a key of Triton's per-device caches

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def _collect(arch: int) -> Iterator[list]:
    """Within the block, kernel launches compile for `arch` into the yielded list instead of running."""
    compiled: list = []

    def hook(*, fn, compile, **_) -> bool:
        options = {name: compile[name] for name in ("num_warps", "num_stages", "num_ctas", "enable_fp_fusion")}
        (attributes,) = compile["configs"]
        source = ASTSource(fn.jit_function, compile["signature"], compile["constants"], attributes)
        compiled.append(triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options))
        return True  # Triton takes the compilation as declined and does not launch

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
    """Bits a thread moves with one access, from the instruction's suffix: `E.128`, `E.U16`, `E` alone is 32."""
    if wide := re.search(r"\b(64|128|256)\b", suffix):
        return int(wide[1])
    if narrow := re.search(r"\b[US](8|16)\b", suffix):
        return int(narrow[1])
    return 32


COLUMNS = "kernel dtype D arch warps registers spills shared tensor-core load/store"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(SHARED_LIMIT), default=sorted(SHARED_LIMIT))
    parser.add_argument("--kernel", nargs="+", help="names of kernels; all by default")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: kernels are interpreted, there is nothing to compile")

    chosen = cases(tuple(options.head_dim))
    if options.kernel:
        unknown = set(options.kernel) - {case.kernel for case in chosen}
        if unknown:
            parser.error(f"unknown kernels {sorted(unknown)}, known: {sorted({case.kernel for case in chosen})}")
        chosen = [case for case in chosen if case.kernel in options.kernel]
    row = "{:28} {:5} {:>3} {:>6} {:>5} {:>9} {:>6} {:>7} {:>11} {:>10}"
    print(row.format(*COLUMNS.split()))
    failed = False
    for arch in options.arch:
        for case in chosen:
            report = compile_case(case, arch)
            print(
                row.format(
                    case.kernel, DTYPE_NAMES[case.dtype], case.head_dim or "-", f"sm_{arch}", report.num_warps,
                    report.registers, report.spills, report.shared, report.tensor_core or "-",
                    f"{report.widest_load}/{report.widest_store}",
                ),
                flush=True,
            )  # fmt: skip
            for violation in report.violations():
                failed = True
                print(f"    VIOLATION: {violation}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
