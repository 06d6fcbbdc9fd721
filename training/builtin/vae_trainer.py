"""Training of the autoencoder of the built-in model; `vae.py` is the command."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from uniref_fast import builtin
from uniref_fast import flags as configs
from uniref_fast.builtin import components
from uniref_fast.data.images import ImageSource
from uniref_fast.keyed_random import draw
from uniref_fast.models.single_frame import single_frame
from uniref_fast.sheets import contact_sheet
from uniref_fast.training.builtin.vae import VAE
from uniref_fast.training.core import resume
from uniref_fast.training.core.checkpoint import Checkpoints, Newest
from uniref_fast.training.core.distributed import Ranks
from uniref_fast.training.core.monitor import Monitor
from uniref_fast.training.core.processes import locked

__all__ = ["crops", "psnr", "run"]


def run(config: VAE) -> None:
    """Train, or resume the run in the folder, and write the model.

    Raises:
        ValueError: If settings or data cannot be used, or another run uses the folder.
        CheckpointError: If a checkpoint cannot be written, or all existing checkpoints are damaged.
    """
    ranks = Ranks.start()
    with locked(config.out, ranks):
        _run(config, ranks)


def _run(config: VAE, ranks: Ranks) -> None:
    made = config.out / "model"
    if made.is_dir() and not (made / "model_index.json").is_file():
        raise ValueError(f"{made} holds no model; remove it, or give another --out")
    if config.batch % ranks.size:
        raise ValueError(f"{config.batch} crops per step cannot be divided evenly among {ranks.size} ranks")
    torch.manual_seed(config.seed)
    pipe = components.pipeline(0, torch.float32)
    vae = pipe.vae.to(ranks.device).train()
    parameters = dict(vae.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    checkpoints = Checkpoints(config.out / "checkpoints", ranks, keep=2)
    newest = checkpoints.newest()
    done, settings = newest.step or 0, json.loads(configs.to_json(config))
    changed = resume.changes(newest.state, settings)
    if done:
        resume.refuse(changed, config.out, "vae.")
        checkpoints.load(done, _tensors(parameters, optimizer), verify=False)
        for state in optimizer.state.values():
            state["step"].fill_(done)
    if made.is_dir():
        print(f"{made} exists; nothing to do")
        return
    checkpoints.set_aside([name for name, _ in newest.damaged])
    held = torch.stack([crops(config, -1 - i, split="heldout_objects") for i in range(4)]).flatten(0, 1)
    held = held.to(ranks.device)
    with (
        Monitor(config.out, config.steps, done, enabled=ranks.rank == 0, print_every=50) as monitor,
        single_frame(vae),
        ThreadPoolExecutor(1) as pool,
    ):
        _record_resuming(monitor, done, newest, changed)
        ahead = [pool.submit(crops, config, step) for step in range(done, min(done + 4, config.steps))]
        for step in range(done, config.steps):
            start, pixels = time.perf_counter(), ahead.pop(0).result().to(ranks.device)
            if step + 4 < config.steps:
                ahead.append(pool.submit(crops, config, step + 4))
            optimizer.param_groups[0]["lr"] = config.lr * _schedule(step, config.steps)
            losses = _losses(vae, pixels, config, step, ranks)
            losses["loss"].backward()
            _average([*(p.grad for p in parameters.values()), *losses.values()], ranks)
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds = time.perf_counter() - start
            values = {name: value.item() for name, value in losses.items()}
            if not math.isfinite(values["loss"]):
                raise ValueError(f"the loss is {values['loss']} at step {step}; lower lr, or resume from a checkpoint")
            monitor.step(step, values, tokens=pixels[:, 0].numel(), samples=len(pixels), flops=0.0, seconds=seconds)
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                _validate(vae, held, monitor, step + 1)
                checkpoints.save(step + 1, _tensors(parameters, optimizer), settings)
        _normalise(vae, config)
    _write_model(pipe, made, ranks, checkpoints.path(config.steps))


def _record_resuming(monitor: Monitor, step: int, newest: Newest, changed: Mapping[str, tuple[Any, Any]]) -> None:
    """Record what resuming at a step has found: checkpoints that cannot be used or verified, and changed settings."""
    if newest.unverified:
        monitor.event(step, "unverified checkpoint", reason="it was written without checksums")
    for name, reason in newest.damaged:
        monitor.event(step, "damaged checkpoint", name=name, reason=reason, renamed=f"{name}.damaged")
    for name, (before, now) in changed.items():
        monitor.event(step, "changed", setting=name, before=before, now=now)


@torch.no_grad()
def _validate(vae: Any, held: Tensor, monitor: Monitor, step: int) -> None:
    """Log how well held-out crops, `[N, 3, 1, side, side]`, are reconstructed."""
    decoded = vae.decode(vae.encode(held).latent_dist.mode()).sample
    monitor.log(step, {"eval/psnr": psnr(decoded, held).mean().item()})
    monitor.image(step, "heldout", _sheet(held, decoded))


def _write_model(pipe: Any, made: Path, ranks: Ranks, checkpoint: Path) -> None:
    """Write the pipeline with the trained autoencoder, in bfloat16, from rank 0."""
    for part in (pipe.vae, pipe.transformer, pipe.text_encoder):
        for parameter in part.parameters():  # not part.to(dtype): rotary tables stay float32
            parameter.data = parameter.data.to("cpu", torch.bfloat16)
    if ranks.rank == 0:
        try:
            builtin.write(pipe, made, weights="untrained", seed=0)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"the model could not be written to {made}: {error}. All steps are done and saved in "
                f"{checkpoint}: free some space, then run the same command again"
            ) from error
        print(made)


def crops(config: VAE, step: int, split: str = "train") -> Tensor:
    """Return the crops of a step, float32 `[batch, 3, 1, side, side]` in -1..1, each from another image of the split.

    Smaller images are enlarged. Negative steps give other crops than positive ones.

    Raises:
        ValueError: If the data has too few images.
    """
    random = np.random.Generator(np.random.PCG64([config.seed, abs(step), step < 0]))
    files = _pictures(config.data, split)
    if len(files) < config.batch:
        raise ValueError(
            f"{config.data} has {len(files)} images of {split}, fewer than the {config.batch} of a step; generate "
            f"more with: uniref-fast data make {config.data} --size 64"
        )
    found: list[np.ndarray] = []
    for number in random.choice(len(files), config.batch, replace=False):
        image = ImageSource(str(files[number]), files[number]).load()
        scale = max(1.0, config.side / min(image.size))
        if scale > 1:
            image = image.resize([math.ceil(s * scale) for s in image.size], Image.Resampling.LANCZOS)
        left, top = (int(random.integers(s - config.side + 1)) for s in image.size)
        found.append(np.asarray(image.crop((left, top, left + config.side, top + config.side))))
    pixels = torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float()
    return (pixels / 127.5 - 1).unsqueeze(2)


def psnr(made: Tensor, wanted: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio `[B]` of images in dB, for values in -1..1, to which `made` is clamped."""
    error = (made.float().clamp(-1, 1) - wanted.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp_min(1e-10))


@functools.cache
def _pictures(data: Path, split: str) -> list[Path]:
    return sorted((data / "images" / split).glob("*.png"))


def _losses(vae: Any, pixels: Tensor, config: VAE, step: int, ranks: Ranks) -> dict[str, Tensor]:
    """Return the losses of this rank's share of the crops."""
    pixels = pixels.chunk(ranks.size)[ranks.rank]
    posterior = vae.encode(pixels).latent_dist
    shape = (config.batch, *posterior.mean.shape[1:])
    noise = torch.randn(shape, generator=draw(config.seed, "vae", (step,))).chunk(ranks.size)[ranks.rank]
    noise = noise.to(pixels.device)
    made = vae.decode(posterior.mean + posterior.std * noise).sample
    difference = made - pixels
    absolute, square = difference.abs().mean(), difference.square().mean()
    divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).sum() / pixels.numel()
    return {"loss": absolute + square + config.kl * divergence, "l1": absolute, "mse": square, "kl": divergence,
            "latent_std": posterior.std.mean()}  # fmt: skip


@torch.no_grad()
def _average(tensors: Sequence[Tensor | None], ranks: Ranks) -> None:
    """Replace tensors by their means over the ranks, in one exchange."""
    found = [tensor for tensor in tensors if tensor is not None]
    flat = torch.cat([tensor.reshape(-1) for tensor in found]) / ranks.size
    dist.all_reduce(flat)
    for tensor, mean in zip(found, flat.split([tensor.numel() for tensor in found]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def _schedule(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _normalise(vae: Any, config: VAE) -> None:
    """Write mean and standard deviation of each latent channel over crops into the autoencoder's configuration."""
    device = next(vae.parameters()).device
    with torch.no_grad():
        parts = [vae.encode(crops(config, -100 - i).to(device)).latent_dist.mode() for i in range(32)]
    latents = torch.cat(parts).transpose(0, 1).flatten(1).double()
    vae.register_to_config(latents_mean=latents.mean(1).tolist(), latents_std=latents.std(1).tolist())


def _tensors(parameters: dict[str, Tensor], optimizer: Any) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(parameter) for _ in range(2))
        tensors |= {f"{part}.{name}": state[part] for part in ("exp_avg", "exp_avg_sq")}
        tensors[f"model.{name}"] = parameter.detach()
    return tensors


def _sheet(wanted: Tensor, made: Tensor, columns: int = 8) -> Image.Image:
    rows = []
    for first in range(0, min(len(wanted), 4 * columns), columns):
        for label, images in (("given", wanted), ("decoded", made)):
            values = ((images[first : first + columns, :, 0].clamp(-1, 1) + 1) * 127.5).round().byte()
            rows.append([(label, Image.fromarray(v.permute(1, 2, 0).cpu().numpy())) for v in values])
    return contact_sheet(rows, cell=96)
