"""The memory of a training step as PyTorch's memory tracker counts it, without the memory: with fake tensors.

The model code, its adapter and the sharding are those of a run; the optimizer is PyTorch's AdamW. Fake tensors have
shapes and no values, so that a step of a model of 20 billion parameters is tracked on any machine, and the plan of its
memory can be checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from uniref_fast.layout import Sample
from uniref_fast.models import packed
from uniref_fast.models.families import family_of, family_of_class
from uniref_fast.training.core.adapter import add_adapter
from uniref_fast.training.core.distributed import Ranks, local, shard
from uniref_fast.training.core.model_size import ModelSize
from uniref_fast.training.core.recipe import Recipe

__all__ = ["FakeTrainedModel"]


class FakeTrainedModel:
    """A transformer of fake tensors that takes training steps under PyTorch's memory tracker.

    Args:
        size: Sizes of the model.
        config: Configuration of a run: the adapter and the dtypes.
        ranks: Ranks of the run.
        layers: Number of blocks; None takes those of the model.
    """

    def __init__(self, size: ModelSize, config: Recipe, ranks: Ranks, layers: int | None = None) -> None:
        self.config, self.mode = config, FakeTensorMode()
        self.size = size if layers is None else replace(size, num_layers=layers)
        transformer = self._transformer()
        self.family = family_of(transformer)
        self.packed = self.family.packed(transformer, visibility=config.visibility or "full", for_training=True)
        compute = getattr(torch, config.dtype)
        with self.mode:
            shard(self.packed, ranks, compute)
            self.trained = [p for p in transformer.parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, foreach=True)
            for parameter in self.trained:
                parameter.grad = torch.zeros_like(parameter)
            self.optimizer.step()  # makes its state

    def _transformer(self) -> Any:
        """Return the transformer with its adapter, of fake tensors in the dtypes of a run."""
        config, size = self.config, self.size
        compute, master = (getattr(torch, name) for name in (config.dtype, config.weight_dtype))
        family = family_of_class(size.transformer_class)
        assert family is not None
        with torch.device("meta"):
            transformer: Any = family.transformer_class()(**size.transformer_config())
            transformer.requires_grad_(config.lora_rank is None)
            if config.lora_rank is not None:
                add_adapter(
                    transformer, config.lora_rank, config.resolve_alpha() or 1.0, config.lora_targets, config.adapter
                )
        with self.mode:
            transformer.pos_embed = torch.nn.Identity()  # the packed forward has rotary tables of its own
            for module in transformer.modules():
                for tensors in (module._buffers, vars(module)):
                    tensors |= {
                        n: torch.empty(t.shape, dtype=t.dtype) for n, t in tensors.items() if torch.is_tensor(t)
                    }
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        dtype = master if parameter.requires_grad else compute
                        empty = torch.empty(parameter.shape, dtype=dtype)
                        module._parameters[name] = torch.nn.Parameter(empty, parameter.requires_grad)
        return transformer

    def held(self) -> int:
        """Return the bytes of weights, gradients and optimizer state of this rank."""
        states = [value for state in self.optimizer.state.values() for value in state.values() if value.ndim]
        tensors = [*self.packed.transformer.parameters(), *(p.grad for p in self.trained), *states]
        return sum(part.numel() * part.element_size() for part in map(local, tensors))

    def peak(self, samples: Sequence[Sample], checkpointing: Any) -> int:
        """Return the most bytes that are alive in the forward and backward of a pack that is not the step's first.

        Args:
            samples: Samples of the pack.
            checkpointing: Recomputation of the blocks, as `BudgetStage.checkpointing`.
        """
        self.packed.checkpointing = checkpointing
        config, dtype = self.packed.transformer.config, getattr(torch, self.config.dtype)
        # The tracker registers hooks on parameters to name what it counts, and fails on frozen ones. Its totals come
        # from the operators.
        tracker: Any = MemTracker()
        tracker._pre_fw_hook = tracker._post_fw_hook = tracker._pre_bw_hook = tracker._post_bw_hook = _ignore
        with self.mode:
            tracker.track_external(self.packed, self.optimizer)
            # Copies in host memory are no memory of the device, which is the CPU here.
            with tracker, mock.patch.object(packed, "HOST", "meta"):
                layout = replace(self.packed.layout(samples))  # a copy: tables that it keeps are fake
                image = torch.zeros(layout.image_length, config.in_channels, dtype=dtype)
                text = torch.zeros(layout.text_length, self.family.text_channels(config), dtype=dtype)
                out = self.packed(image, text, torch.full((len(samples),), 0.5), layout)
                out.float().square().mean().backward()
                del out
            snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
        return snapshot["Total"]


def _ignore(*_: Any) -> None:
    """Do nothing."""
