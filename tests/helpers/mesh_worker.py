"""One rank of `training/core/test_distributed.py`: two packs through a sharded model.

Rank 0 writes loss, gradients and norm.

Or rows gathered among the first few ranks: each of them writes what it got and the gradient of its part.
"""

import sys

import torch
import torch.distributed as dist
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import save_file

from uniref_fast import PackedQwenImage, Sample, SelfLayout
from uniref_fast.models.kept_references import KeptReferences, RefreshSchedule
from uniref_fast.models.sequence_parallel import SequenceParallel
from uniref_fast.training.core.base import QUANTISED
from uniref_fast.training.core.distributed import Ranks, global_norm, shard
from uniref_fast.training.core.frozen_base import quantise_base, quantised_parameters
from uniref_fast.training.core.offload import Offloading
from uniref_fast.training.core.processes import leave
from uniref_fast.training.supervised.flow_matching import FlowBatch, sample_errors

SHAPE = {
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 3,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 48,
    "axes_dims_rope": (8, 12, 12),
    "zero_cond_t": True,
}
# One token of text, images of one token, segments that lie across the cuts between ranks, a rank without targets.
PACKS = (
    (Sample(5, (1, 4, 4), ((1, 3, 3), (1, 2, 5))), Sample(1, (1, 2, 3))),
    (Sample(7, (1, 1, 1), ((1, 6, 7), (1, 1, 1))),),
)


STEPS, DRIFT = 6, 0.012  # steps with kept references, and the tolerance that decides which of them compute them


def make_model(dtype: torch.dtype = torch.float32) -> QwenImageTransformer2DModel:
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(**SHAPE)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.2)
    return model.to(dtype)


def make_batch(number: int, dtype: torch.dtype = torch.float32) -> FlowBatch:
    layout = SelfLayout.qwen(PACKS[number], zero_cond_t=True)
    generator = torch.Generator().manual_seed(number)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    targets = sum(segment.length for segment in layout.targets)
    image, text = randn(layout.image_length, 64), randn(layout.text_length, 48)
    t = torch.rand(layout.num_samples, generator=generator).to(dtype)
    return FlowBatch(image, text, t, randn(targets, 64), layout)


def add_adapter(model: QwenImageTransformer2DModel, kind: str = "lora") -> None:
    from peft import LoKrConfig, LoraConfig

    model.requires_grad_(False)
    torch.manual_seed(1)
    targets = ["to_q", "to_out.0", "net.2"]
    if kind == "lokr":
        model.add_adapter(LoKrConfig(r=4, init_weights=False, target_modules=targets))
    else:
        model.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=targets, use_dora=kind == "dora"))
    model.eval()


def run(ranks: Ranks, sequence: int, checkpointing: bool | str, kind: str) -> dict[str, torch.Tensor]:
    kind, _, host = kind.partition(".")
    model = make_model()
    if kind in QUANTISED:
        quantise_base(model, kind, torch.float32, ranks.device)
    if kind != "full":
        add_adapter(model, kind)
    packed = PackedQwenImage(model, checkpointing=checkpointing)
    offloading = Offloading({number: packed.blocks[number] for number in ((0, 2) if host else ())}, ranks.device)
    shard(packed, ranks, torch.float32, {*quantised_parameters(packed), *offloading.parameters})
    ranks.share_sequences(packed, sequence)
    loss = torch.zeros(())
    for number in range(ranks.replica, len(PACKS), ranks.replicas):
        batch = make_batch(number)
        prediction = packed(batch.image, batch.text, batch.t, batch.layout)
        cuts = packed.parallel.targets(batch.layout) if packed.parallel else [0, len(batch.velocity)]
        rank = packed.parallel.rank if packed.parallel else 0
        part = sample_errors(prediction, batch, (cuts[rank], cuts[rank + 1])).sum() / 3
        part.backward()
        loss += part.detach()
    dist.all_reduce(loss)
    parameters = {name: p for name, p in model.named_parameters() if p.grad is not None}
    result = {"loss": loss, "norm": torch.tensor(global_norm(parameters.values()))}
    return result | {name: p.grad.full_tensor().contiguous() for name, p in parameters.items()}


def all_rows(rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`[rows, 2, 3]`, no two values alike."""
    return torch.randn(rows, 2, 3, generator=torch.Generator().manual_seed(rows), dtype=torch.float64).to(dtype)


def loss_of(rows: torch.Tensor) -> torch.Tensor:
    """A loss that every rank computes alike, of all rows at once: each row's gradient depends on the others."""
    weights = torch.arange(1, rows.numel() + 1, dtype=rows.dtype).view_as(rows)
    return (rows * weights).sum().square() / rows.numel() + rows.prod(1).square().sum()


def gathered(group: dist.ProcessGroup, bounds: list[int]) -> dict[str, torch.Tensor]:
    """Rows that this rank held, gathered among the group; in float32 and, values alone, in bfloat16."""
    parallel = SequenceParallel(group, dist.get_world_size(group))
    start, end = bounds[parallel.rank], bounds[parallel.rank + 1]
    whole = all_rows(bounds[-1]).transpose(1, 2).contiguous().requires_grad_()
    part = whole.transpose(1, 2)[start:end]  # not contiguous
    rows = parallel.gather_rows(part, bounds)
    (gradient,) = torch.autograd.grad(loss_of(rows), whole)
    low = parallel.gather_rows(all_rows(bounds[-1], torch.bfloat16)[start:end], bounds)
    gradient = gradient.transpose(1, 2).contiguous()
    return {"rows": rows.detach().contiguous(), "gradient": gradient, "bfloat16": low.contiguous()}


def kept_steps(packed: PackedQwenImage) -> dict[str, torch.Tensor]:
    """Velocities of all targets in every step of both packs, with kept references, and what their stores say."""
    drift, result = DRIFT if packed.visibility == "full" else None, {}
    for number in range(len(PACKS)):
        batch = make_batch(number)
        stores = [KeptReferences(RefreshSchedule(drift=drift)) for _ in range(batch.layout.num_samples)]
        for step in range(STEPS):
            batch.image[batch.layout.target_rows("cpu")] += 0.3
            with torch.no_grad():
                out = packed(batch.image, batch.text, batch.t * (1 - step / STEPS), batch.layout, stores)
            if packed.parallel is not None:
                out = packed.parallel.gather_rows(out, packed.target_bounds)
            result[f"{number}.{step}"] = out
        for sample, store in enumerate(stores):
            result[f"{number}.refreshed.{sample}"] = torch.tensor(store.refreshed)
            result[f"{number}.drifts.{sample}"] = torch.tensor(store.drifts)
            result[f"{number}.nbytes.{sample}"] = torch.tensor(store.nbytes)
    return result


def main(folder: str, *cases: str) -> None:
    """Each case is "<ranks that share a pack>-<kept, recomputed, inputs or host>-<kind>"; one file of results each.

    The kind is full (all weights are trained), lora, dora, lokr, or a quantised base under a LoRA (nf4, int8, fp8);
    with ".host" behind it, the frozen weights of two blocks are on the host.

    Or "rows-<bounds with dashes>", for as many ranks as there are parts; one file of results each and a rank.

    Or "references-<ranks that share a pack>-<visibility>", for steps with kept references; likewise.
    """
    torch.set_num_threads(1)
    ranks = Ranks.start()
    for case in cases:
        if case.startswith("rows-"):
            bounds = [int(bound) for bound in case.split("-")[1:]]
            group = dist.new_group(range(len(bounds) - 1))
            if ranks.rank < len(bounds) - 1:
                save_file(gathered(group, bounds), f"{folder}/{ranks.rank}-{case}.safetensors")
            continue
        if case.startswith("references-"):
            _, sequence, visibility = case.split("-")
            packed = PackedQwenImage(make_model(), visibility=visibility)
            ranks.share_sequences(packed, int(sequence))
            save_file(kept_steps(packed), f"{folder}/{ranks.rank}-{case}.safetensors")
            continue
        sequence, blocks, kind = case.split("-")
        result = run(ranks, int(sequence), {"kept": False, "recomputed": True}.get(blocks, blocks), kind)
        if ranks.rank == 0:
            save_file(result, f"{folder}/{ranks.size}-{case}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
