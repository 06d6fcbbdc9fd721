"""The model that is trained: it is loaded, gets an adapter, is packed and sharded, and is exported for diffusers."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from uniref_fast.files import whole_folder
from uniref_fast.layout import Sample
from uniref_fast.loading import inference_mode, load_pipeline, load_run, load_transformer
from uniref_fast.models.families import family_of
from uniref_fast.models.family import Family
from uniref_fast.models.packed import PackedModel
from uniref_fast.progress import running
from uniref_fast.runs import adapter_kind, base_run, check_export
from uniref_fast.training.core.adapter import add_adapter, is_adapter, peft_alpha
from uniref_fast.training.core.base import QUANTISED, offloaded_blocks
from uniref_fast.training.core.distributed import Ranks, shard
from uniref_fast.training.core.encoders import Encoders
from uniref_fast.training.core.export import ExportError, write_weights
from uniref_fast.training.core.frozen_base import quantise_base, quantised_parameters, stored_bytes
from uniref_fast.training.core.memory import gathered_bytes
from uniref_fast.training.core.model_size import ModelSize
from uniref_fast.training.core.offload import Offloading
from uniref_fast.training.core.optimizer import moment_bytes, update_bytes
from uniref_fast.training.core.recipe import Recipe

__all__ = ["TrainedModel"]


class TrainedModel:
    """A pipeline whose transformer is trained on packs, by all ranks.

    Args:
        config: Configuration of the run: the model, its trained part, and dtypes.
        ranks: Ranks of the run.
        encode: Function that is called with the model when its encoders can be used and its transformer is still in
            host memory; encoders that are to be freed are freed after it.

    Attributes:
        pipe: The pipeline; its encoders are None while they are freed.
        family: Family of the pipeline.
        size: Sizes of the model, for the plan of its memory.
        encoders: Text encoder and VAE, frozen, and whole on every rank.
        packed: The packed transformer, sharded.
        parameters: Trained parameters by their names in the transformer.
        frozen: Digest of the weights that are not trained, of transformer and encoders, before they are quantised.
        whole: Frozen parameters on the device that are not sharded: every rank has a copy.
        offloading: Blocks whose frozen weights are on the host.

    Raises:
        ValueError: The model or the initial run cannot be loaded, or does not fit the configuration.
    """

    def __init__(self, config: Recipe, ranks: Ranks, encode: Callable[[TrainedModel], None] | None = None) -> None:
        self.config, self.ranks = config, ranks
        compute, master = (getattr(torch, name) for name in (config.dtype, config.weight_dtype))
        self.pipe = load_pipeline(config.model, compute, "cpu")
        self.family: Family = family_of(self.pipe)
        self.pipe.set_progress_bar_config(disable=True)
        if config.initial is not None:
            self._load_below(config.initial, compute)
        self.encoders = Encoders(self.pipe, config.model, compute, ranks.device)
        self.size = ModelSize.of({**self.pipe.transformer.config, "_class_name": self.family.transformer}, {}).with_vae(
            self.encoders.vae_config
        )
        free = config.resolve_encoders() == "free"
        if not free:
            self.encoders.to_device()
        if encode is not None:
            encode(self)  # the transformer is in host memory
        transformer = self.pipe.transformer
        transformer.requires_grad_(config.lora_rank is None)
        self.frozen = _digest(transformer, self.pipe.vae, self.pipe.text_encoder)  # of the weights in the files
        if free:
            self.encoders.free()
        with running("preparing the weights", shown=ranks.rank == 0):
            self._prepare(compute, master)
        self.parameters: dict[str, Tensor] = {
            name: parameter for name, parameter in self.pipe.transformer.named_parameters() if parameter.requires_grad
        }

    def _prepare(self, compute: torch.dtype, master: torch.dtype) -> None:
        """Quantise the base, load or add the adapter, and pack and shard the transformer."""
        config, ranks, transformer = self.config, self.ranks, self.pipe.transformer
        blocks = self.family.packed.blocks_of(transformer)
        host = offloaded_blocks(len(blocks), config.offload_blocks)
        if config.base is not None:
            quantise_base(transformer, config.base, compute, ranks.device, host)
        if config.initial is not None:
            self._load_adapter(config.initial, compute)
        if config.lora_rank is not None:
            self._add_adapter()
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(master)
        if config.initial is not None and (config.initial / "lora").is_dir():
            self._unrounded(config.initial / "lora")
        self.packed = self.family.packed(transformer, visibility=config.visibility or "full", for_training=True)
        if config.compile:
            _compile_blocks(self.packed)
        self.offloading = Offloading({number: self.packed.blocks[number] for number in host}, ranks.device)
        away = {id(parameter) for parameter in self.offloading.parameters}
        self.whole = [parameter for parameter in quantised_parameters(self.packed) if id(parameter) not in away]
        whole = [*self.whole, *self.offloading.parameters]
        shard(self.packed, ranks, compute, whole)  # moves a block at a time to the device

    def _load_below(self, run: Path, dtype: torch.dtype) -> None:
        """Load the whole transformer that an earlier run exported, or that its adapter was trained on top of."""
        check_export(run)
        below = base_run(run)
        if below is not None:
            load_transformer(self.pipe, below, dtype, given=f"initial = {run}", model=self.config.model)

    def _load_adapter(self, run: Path, dtype: torch.dtype) -> None:
        """Load the adapter that an earlier run exported; training continues it, and adds no second one."""
        given, model = f"initial = {run}", self.config.model
        if not load_run(self.pipe, run, dtype, base=None, adapter="default", given=given, model=model):
            return
        found, alpha = self.pipe.transformer.peft_config["default"], self.config.resolve_alpha()
        kind = adapter_kind(found.to_dict())
        if kind != self.config.adapter:
            raise ValueError(f"the adapter of {run} is a {kind}; give --adapter {kind}, or fuse it first")
        if found.r != self.config.lora_rank:
            raise ValueError(f"the adapter of {run} has rank {found.r}; set lora_rank to it, or fuse it first")
        kept = [f"lora_alpha = {peft_alpha(found)}"] * (peft_alpha(found) != alpha)
        kept += ["lora_targets"] * (set(found.target_modules) != set(self.config.lora_targets))
        if kept and self.ranks.rank == 0:
            print(f"training continues the adapter of {run}, which keeps its {' and '.join(kept)}", file=sys.stderr)

    def _unrounded(self, folder: Path) -> None:
        """Load the adapter's weights without rounding: peft has cast them to the dtype of the base weights."""
        from peft.utils import get_peft_model_state_dict

        mine = get_peft_model_state_dict(self.pipe.transformer)
        for file in sorted(folder.glob("*.safetensors")):
            for name, tensor in load_file(file).items():
                name = name.removeprefix("transformer.")
                if name in mine:  # a file of another program may have other names
                    mine[name].copy_(tensor)

    def _add_adapter(self) -> None:
        config, transformer = self.config, self.pipe.transformer
        alpha = config.resolve_alpha()
        assert config.lora_rank is not None and alpha is not None
        if hasattr(transformer, "peft_config"):  # the adapter of the initial run
            for name, parameter in transformer.named_parameters():
                parameter.requires_grad_(is_adapter(name))
        else:
            torch.manual_seed(config.seed)  # all ranks draw the same weights
            add_adapter(transformer, config.lora_rank, alpha, config.lora_targets, config.adapter)
        inference_mode(transformer)  # in training mode, a LoKr leaves itself out in one of 2**24 calls

    def idle_forward(self) -> Tensor:
        """Run the smallest possible pack and return its prediction, `[1, C]`.

        The ranks gather the sharded weights together, so a rank that has no pack of its own must still run the model
        as often as the others do.
        """
        config, device, dtype = self.pipe.transformer.config, self.ranks.device, getattr(torch, self.config.dtype)
        family = family_of(self.packed.transformer)
        layout = self.packed.layout([Sample(1, (1, 1, 1), guidance=family.training_guidance(config))])
        image = torch.zeros(1, config.in_channels, device=device, dtype=dtype)
        text = torch.zeros(1, family.text_channels(config), device=device, dtype=dtype)
        return self.packed(image, text, torch.full((1,), 0.5, device=device), layout)

    def sharded_bytes(self) -> int:
        """Return the bytes that the ranks share: weights, float32 gradients, moments and the average."""
        extra = 1 if self.config.ema is None else 2
        whole = {id(parameter) for parameter in (*self.whole, *self.offloading.parameters)}
        weights = sum(p.numel() * p.element_size() for p in self.pipe.transformer.parameters() if id(p) not in whole)
        trained = sum(p.numel() for p in self.parameters.values())
        return weights + trained * 4 * extra + moment_bytes(self.config, trained)

    def gathered_bytes(self) -> int:
        """Return the bytes of the blocks that are gathered at a time."""
        whole = {id(p) for p in (*self.whole, *self.offloading.parameters)}
        element = getattr(torch, self.config.dtype).itemsize
        found = quantised = 0
        if self.config.base in QUANTISED:
            linears = [x for x in self.packed.blocks.modules() if isinstance(x, torch.nn.Linear)]
            quantised = max(layer.in_features * layer.out_features for layer in linears)
        for block in self.packed.blocks:
            sharded = [p for p in block.parameters() if id(p) not in whole]
            trained = sum(p.numel() for p in sharded if p.requires_grad)
            numbers = sum(p.numel() for p in sharded)
            found = max(found, gathered_bytes(numbers, trained, element, self.ranks.size, quantised))
        return found

    def freed_bytes(self) -> int:
        """Return the bytes of the encoders if they are not on the device while the run trains, else 0."""
        return self.encoders.bytes if self.encoders.freed else 0

    def update_bytes(self) -> int:
        """Return the bytes that the update of all weights needs for a moment, which the ranks share."""
        return update_bytes(self.config, sum(p.numel() for p in self.parameters.values()))

    def fixed_bytes(self) -> int:
        """Return the bytes on the device of every rank: encoders that are not freed, and weights not sharded."""
        encoders = 0 if self.encoders.freed else self.encoders.bytes
        return encoders + stored_bytes(self.whole) + self.offloading.device_bytes

    def export(self, folder: Path) -> None:
        """Write the trained weights in the format of diffusers: `lora/`, for `load_lora_weights`, or `transformer/`.

        All ranks. The folder appears whole or not at all, and replaces an older one.

        Raises:
            ExportError: The folder cannot be written, for example because the disk is full; on all ranks.
        """
        whole = {}
        for name, parameter in self.parameters.items():
            tensor = _whole(parameter)
            if self.ranks.rank == 0:  # one copy of all weights per machine, not one per rank
                whole[name] = tensor.cpu()
        problem, name = None, "transformer" if self.config.lora_rank is None else "lora"
        if self.ranks.rank == 0:
            try:
                with whole_folder(folder / name, replace=True) as partial:
                    write_weights(partial, self.pipe.transformer, whole, self.config.lora_rank, self.config.dtype)
            except (OSError, SafetensorError) as error:
                problem = getattr(error, "strerror", None) or str(error)
        if problem := self.ranks.broadcast(problem):
            raise ExportError(f"the trained weights could not be written to {folder / name}: {problem}")


def _compile_blocks(packed: PackedModel) -> None:
    """Compile the parts of every block that take tensors alone: MLPs, and attention projections with an adapter.

    All blocks share the compiled code, in which the number of tokens is dynamic. The code between these parts is single
    fused operators with layouts and plans that differ from pack to pack: traced, every layout would be compiled again.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for each in packed.blocks:
        block: Any = each.block
        mlps: Any = each.mlps
        adapted = [part for part in block.attn.modules() if isinstance(part, BaseTunerLayer)]
        for part in (*(getattr(block, name) for name in mlps), *adapted):
            part.compile(dynamic=True)


def _digest(*modules: torch.nn.Module) -> str:
    """Return a hex digest of dtype, shape, first and last values of each frozen parameter.

    It does not depend on the parameters' names and order, which newer versions of a library may change.
    """
    digests = []
    for parameter in (parameter for module in modules for parameter in module.parameters()):
        if not parameter.requires_grad:
            flat = parameter.detach().flatten()
            ends = torch.cat([flat[:8], flat[-8:]]).float().cpu().numpy().tobytes()
            digests.append(hashlib.sha256(f"{parameter.dtype} {list(parameter.shape)}".encode() + ends).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def _whole(parameter: Tensor) -> Tensor:
    """Return the whole of a sharded parameter. All ranks."""
    tensor = parameter.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
