"""Launch parameters of segment attention, and the tables of a plan that are cut for them.

The parameters for compute capability 9.x in 16 bits at head dimensions 64 and 128 are the fastest on an H100 that do
not spill (`bench/autotune.py`; that GPU itself is served by its own table). The others come from the compiler's report
(`compile_matrix`), not from a measurement: no spills, shared memory within the chip's limit, tensor-core instructions
in every matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch

from uniref_fast.visibility import AttentionPlan

HEAD_DIMS = (16, 32, 64, 128)


@dataclass(frozen=True)
class AttentionConfig:
    """Launch parameters of one kernel.

    Attributes:
        BLOCK_M: Query rows of a tile.
        BLOCK_N: Key rows of a tile.
        num_warps: Warps of a program.
        num_stages: Stages of the software pipeline.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class BackwardConfig:
    """Launch parameters of the backward.

    Attributes:
        dq: Launch of `dq_kernel`, which has a program for every `dq.BLOCK_M` query rows.
        dkdv: Launch of `dkdv_kernel`, which has a program for every `dkdv.BLOCK_N` key rows.
    """

    dq: AttentionConfig
    dkdv: AttentionConfig


@dataclass(frozen=True)
class AttentionTables:
    """An `AttentionPlan` (or its transpose) on a device, and the launch that its tiles were cut for.

    A kernel is launched with the `config` of its tables and with no other: a launch with larger tiles would compute
    rows twice, one with smaller tiles would leave rows unwritten.

    Attributes:
        ranges: Start and end row of each range, int32 [R, 2]; together the ranges cover every row once.
        pointers: Range r sees `intervals[pointers[r] : pointers[r + 1]]`; int32 [R + 1].
        intervals: Half-open, sorted, disjoint and non-empty intervals of rows, int32 [M, 2].
        tiles: Range and first row of each tile in launch order, int32 [T, 2]; None for the native kernels.
        config: Launch parameters that the tiles were cut for; None for the native kernels, which cut no tiles.
        causal: True if some intervals are causal; their start s is stored as -1 - s.
    """

    ranges: torch.Tensor
    pointers: torch.Tensor
    intervals: torch.Tensor
    tiles: torch.Tensor | None = None
    config: AttentionConfig | None = None
    causal: bool = False

    @classmethod
    def uncut(cls, plan: AttentionPlan, device: torch.device | str) -> AttentionTables:
        """Return the tables of a plan without tiles."""
        return cls(*plan.tensors(device))

    @classmethod
    def by_query(cls, plan: AttentionPlan, device: torch.device | str, config: AttentionConfig) -> AttentionTables:
        """Return the tables of a plan with tiles of `config.BLOCK_M` query rows."""
        return cls(*plan.tensors(device), plan.tiles(config.BLOCK_M, device), config, bool(plan.causal))

    @classmethod
    def by_key(cls, plan: AttentionPlan, device: torch.device | str, config: AttentionConfig) -> AttentionTables:
        """Return the tables of the transpose of a plan with tiles of `config.BLOCK_N` key rows."""
        transpose = plan.transpose
        return cls(*transpose.tensors(device), transpose.tiles(config.BLOCK_N, device), config, bool(plan.causal))

    @property
    def plan_tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The ranges, pointers and intervals."""
        return self.ranges, self.pointers, self.intervals

    def operands(self) -> tuple[list[torch.Tensor], list[int]]:
        """Return the tables as arguments of a `torch.library` op, which takes no dataclass: tensors and integers."""
        tiles = [] if self.tiles is None else [self.tiles]
        numbers = [] if self.config is None else [*astuple(self.config), int(self.causal)]
        return [*self.plan_tensors, *tiles], numbers

    @classmethod
    def from_operands(cls, tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> AttentionTables:
        """Return the tables that `operands` gave; without numbers, for the native kernels, `causal` is not known."""
        ranges, pointers, intervals, *tiles = tensors
        *config, causal = numbers or (0,)
        launch = AttentionConfig(*config) if config else None
        return cls(ranges, pointers, intervals, tiles[0] if tiles else None, launch, bool(causal))

    def launch(self, device: torch.device) -> tuple[torch.Tensor, AttentionConfig]:
        """Return the tiles and the launch parameters for a Triton kernel, after checks of all tables."""
        assert self.tiles is not None and self.config is not None, "these tables were not cut into tiles for a launch"
        for table in (*self.plan_tensors, self.tiles):
            assert table.dtype == torch.int32 and table.is_contiguous(), "plan tensors are contiguous int32"
            assert table.device == device, f"plan on {table.device}, tensors on {device}"
        assert self.pointers.numel() == self.ranges.shape[0] + 1
        return self.tiles, self.config


def pick_config(head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> AttentionConfig:
    """Launch parameters of the forward for a head size, dtype and compute capability."""
    if dtype == torch.float32:
        # No tensor cores in full fp32: with bigger tiles or fewer warps head_dim 128 spills.
        return AttentionConfig(BLOCK_M=32, BLOCK_N=32, num_warps=8, num_stages=1)
    # Eight warps: with four, or with 128 keys a tile at head_dim 128, registers spill or run out; on 10.x and 12.x they
    # also do with 64, by a newer compiler than that of Triton 3.6.
    keys = 32 if head_dim == 128 and capability[0] in (10, 12) else 64
    # Three stages at head_dim 128 take 88 to 128 KiB of shared memory; 8.6, 8.9 and 12.x have 99 KiB a block.
    stages = 3 if capability in ((8, 0), (9, 0)) or capability[0] == 10 else 2
    return AttentionConfig(BLOCK_M=128, BLOCK_N=keys, num_warps=8, num_stages=stages)


def pick_fp8_config(head_dim: int, capability: tuple[int, int], causal: bool) -> AttentionConfig:
    """Launch parameters of the forward in 8 bits, for a plan with or without causal intervals.

    They do not depend on the dtype of its inputs and output. All are from the compiler's report: the largest tiles that
    do not spill.
    """
    if causal:
        keys = 64 if capability[0] == 8 or (capability[0] == 9 and head_dim < 128) else 32
    else:
        keys = 64 if head_dim < 128 or capability[0] in (8, 9) else 32
    return AttentionConfig(BLOCK_M=128, BLOCK_N=keys, num_warps=8, num_stages=3 if capability[0] in (9, 10) else 2)


def pick_backward_config(
    head_dim: int, dtype: torch.dtype, capability: tuple[int, int], causal: bool = False
) -> BackwardConfig:
    """Launch parameters of the backward, for a plan with or without causal intervals."""
    if dtype == torch.float32:
        small = AttentionConfig(BLOCK_M=32, BLOCK_N=32, num_warps=8, num_stages=1)
        return BackwardConfig(dq=small, dkdv=small)
    if capability[0] == 9:
        return _hopper_backward(head_dim, causal)
    # 96 KiB of shared memory at head_dim 128 with mma.sync, within the 99 KiB of 8.6 and 8.9; on 12.x it may spill.
    dq_keys = 32 if head_dim == 128 and capability[0] == 12 else 64
    # dk and dv keep two accumulators of BLOCK_N x head_dim, S and dP in registers: the largest tiles that do not spill.
    rows = 32 if head_dim == 64 and capability[0] in (8, 12) else 64
    return BackwardConfig(
        dq=AttentionConfig(BLOCK_M=128, BLOCK_N=dq_keys, num_warps=8, num_stages=2),
        dkdv=AttentionConfig(BLOCK_M=rows, BLOCK_N=64 if head_dim == 128 else 128, num_warps=8, num_stages=2),
    )


def _hopper_backward(head_dim: int, causal: bool) -> BackwardConfig:
    """The fastest on an H100 at head dimensions 64 and 128 that do not spill (`bench/autotune.py`).

    Those for causal intervals were not measured.
    """
    if head_dim == 128:
        return BackwardConfig(
            dq=AttentionConfig(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=3),
            # with causal intervals, 64 queries spill under Triton 3.9
            dkdv=AttentionConfig(BLOCK_M=32 if causal else 64, BLOCK_N=128, num_warps=8, num_stages=3),
        )
    return BackwardConfig(
        dq=AttentionConfig(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=3),
        dkdv=AttentionConfig(BLOCK_M=32, BLOCK_N=64, num_warps=4, num_stages=3),  # 128 keys: 4 % faster, but spills
    )
