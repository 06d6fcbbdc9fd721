"""The ranks of a run: FSDP2 over all of them, and Ulysses sequence parallelism within groups of neighbours.

Parameters, gradients and optimizer state are sharded over every rank, whatever the size of the sequence-parallel
groups, so that this size can change between the stages of a run. Gradients are summed, not averaged: the loss is
divided by the number of samples of the step, which every rank knows. torchrun starts the ranks; one process
without it is a group of one rank.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from uniref_fast.models.packed import PackedModel
from uniref_fast.models.sequence_parallel import SequenceParallel

__all__ = ["Ranks", "global_norm", "local", "scale_gradients", "shard"]


@dataclass
class Ranks:
    """The processes of a run.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        device: Device of this process.
        mesh: One-dimensional mesh of all ranks.
        sequence: Number of ranks that share a pack.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    sequence: int = 1

    @classmethod
    def start(cls) -> Ranks:
        """Join the process group: torchrun's, or one of this process alone."""
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            if "RANK" in os.environ:
                dist.init_process_group(backend)
            else:
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("all",))
        return cls(dist.get_rank(), dist.get_world_size(), device, mesh)

    @property
    def replicas(self) -> int:
        """Number of groups that each work on a pack of their own."""
        return self.size // self.sequence

    @property
    def replica(self) -> int:
        """Number of this rank's group."""
        return self.rank // self.sequence

    def share_sequences(self, model: PackedModel, size: int) -> None:
        """Let groups of `size` neighbouring ranks share each pack from now on. All ranks.

        Raises:
            ValueError: The ranks cannot be divided into such groups, or the heads cannot be divided among a group.
        """
        if self.size % size:
            possible = [n for n in range(1, self.size + 1) if self.size % n == 0]
            raise ValueError(
                f"{self.size} ranks cannot form groups of {size}; sequence parallel sizes that work: {possible}"
            )
        self.sequence = size
        model.parallel = None
        if size > 1:
            mesh = init_device_mesh(self.device.type, (self.replicas, size), mesh_dim_names=("data", "sequence"))
            heads = model.transformer.config.num_attention_heads
            model.parallel = SequenceParallel(mesh["sequence"].get_group(), heads)

    def gather(self, value: Any) -> list[Any]:
        """Return a small picklable value of every rank, in the order of the ranks. All ranks."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value. All ranks."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]


def shard(model: PackedModel, ranks: Ranks, compute: torch.dtype, whole: Collection[torch.nn.Parameter] = ()) -> None:
    """Shard the parameters block by block; they are gathered in `compute` and their gradients reduced in float32.

    Args:
        model: The packed model.
        ranks: Ranks of the run.
        compute: Dtype of the computation.
        whole: Frozen parameters that stay whole on every rank, and where they are.
    """
    # Inputs have the right dtype already: casting them would round the rotary tables, which are always float32.
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*model.blocks, model):
        # The outermost module too: weights that stay gathered after a validation would be the averaged ones.
        fully_shard(module, mesh=ranks.mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=set(whole))
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
    # Blocks return views of their modulation; nothing here writes to them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def global_norm(parameters: Iterable[Tensor]) -> float:
    """Return the Euclidean norm of all gradients over all ranks.

    It is summed in float64 and rounded to float32, so that it is the same for any number of ranks.
    """
    squares = [local(p.grad).double().square().sum() for p in parameters if p.grad is not None]
    total = torch.stack(squares).sum()
    dist.all_reduce(total)
    return total.sqrt().float().item()


def scale_gradients(parameters: Iterable[Tensor], factor: float) -> None:
    """Multiply all gradients by a factor, in place."""
    torch._foreach_mul_([local(p.grad) for p in parameters if p.grad is not None], factor)
