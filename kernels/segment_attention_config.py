"""Launch parameters of segment attention: the one place where tuned numbers live, and what made them.

Those of 9.x in 16 bits at head dimensions 64 and 128 were the fastest on an H100 that do not spill
(`bench/autotune.py`; that GPU itself is served by its table). The others come from the compiler's report
(`compile_matrix`), not from a measurement: no spills, shared memory within the chip's limit, tensor-core instructions
in every matmul.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

HEAD_DIMS = (16, 32, 64, 128)


@dataclass(frozen=True)
class AttentionConfig:
    """Launch parameters: query rows and key rows of a tile, warps, software pipeline stages.

    `hopper_keys`, of the forward on 9.x in 16-bit dtypes: key rows of a tile for the warp-specialised kernel, which
    then takes the query ranges without a shorter interval; 0 for the portable kernel alone. Off by default: on an H100
    it is right, and 3 % (head dimension 128) to 28 % (64) slower.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    hopper_keys: int = 0


@dataclass(frozen=True)
class BackwardConfig:
    """Launch parameters of the backward: tiles of `dq.BLOCK_M` query rows, and of `dkdv.BLOCK_N` key rows."""

    dq: AttentionConfig
    dkdv: AttentionConfig


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


def pick_backward_config(head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> BackwardConfig:
    """Launch parameters of the backward for a head size, dtype and compute capability."""
    if dtype == torch.float32:
        small = AttentionConfig(BLOCK_M=32, BLOCK_N=32, num_warps=8, num_stages=1)
        return BackwardConfig(dq=small, dkdv=small)
    if capability[0] == 9:
        return _hopper_backward(head_dim)
    # 96 KiB of shared memory at head_dim 128 with mma.sync, within the 99 KiB of 8.6 and 8.9; on 12.x it may spill.
    dq_keys = 32 if head_dim == 128 and capability[0] == 12 else 64
    # dk and dv keep two accumulators of BLOCK_N x head_dim, S and dP in registers: the largest tiles that do not spill.
    rows = 32 if head_dim == 64 and capability[0] in (8, 12) else 64
    return BackwardConfig(
        dq=AttentionConfig(BLOCK_M=128, BLOCK_N=dq_keys, num_warps=8, num_stages=2),
        dkdv=AttentionConfig(BLOCK_M=rows, BLOCK_N=64 if head_dim == 128 else 128, num_warps=8, num_stages=2),
    )


def _hopper_backward(head_dim: int) -> BackwardConfig:
    """The fastest on an H100 at head dimensions 64 and 128 that do not spill (`bench/autotune.py`)."""
    if head_dim == 128:
        return BackwardConfig(
            dq=AttentionConfig(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=3),
            dkdv=AttentionConfig(BLOCK_M=64, BLOCK_N=128, num_warps=8, num_stages=3),
        )
    return BackwardConfig(
        dq=AttentionConfig(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=3),
        dkdv=AttentionConfig(BLOCK_M=32, BLOCK_N=64, num_warps=4, num_stages=3),  # 128 keys: 4 % faster, but spills
    )
