"""Rollouts of one group: a prompt with three references and sixteen noises, no guidance.

    pytest bench/bench_rollout.py --benchmark-only

Denoising alone is timed in every member, from encoded references and prompt to latents:

- stock one by one: diffusers' transformer and scheduler in a loop, one rollout after another;
- packed: all rollouts in packs, each with its own copy of the references; equal to stock within rounding;
- packed, group-shared: one copy of the references for all, for models trained with `reference_causal`; checked against
  `reference_causal` one by one.

`tokens` of the extra info counts what goes through the transformer in a step.
"""

import math

import pytest
import torch

from uniref_fast import builtin
from uniref_fast.encode import image_latents, prompt_embeddings
from uniref_fast.models import PackedQwenImage
from uniref_fast.request import geometry
from uniref_fast.scenes.make import MakeConfig, artworks, sample
from uniref_fast.schedule import denoising_schedule
from uniref_fast.testing import max_relative_error
from uniref_fast.training.batches.samples import Prepared
from uniref_fast.training.rl.rollout import EncodedGroup, Member, RolloutPack, denoise, sigmas

STEPS, MEMBERS, SIDE = 4, 16, 64


@pytest.fixture(scope="module")
def pipe():
    return builtin.load(device="cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def group(pipe):
    scene = sample("train", 0, MakeConfig(artworks("shipped"), references=(3,)))
    made = geometry(
        pipe, [image.size for image in scene.references], width=SIDE, height=SIDE, budget=math.ceil(math.sqrt(3) * SIDE)
    )
    with torch.no_grad():
        text = prompt_embeddings(pipe, scene.instruction, scene.references, made.condition_sizes)
        parts = [image_latents(pipe, *pair) for pair in zip(scene.references, made.reference_sizes, strict=True)]
    prepared = Prepared(None, scene.instruction, False, made, made.sample(len(text)))
    times = sigmas(pipe, SIDE**2 // made.patch**2, STEPS)
    return EncodedGroup((0, 0), 0, prepared, 1.0, (len(text),), times, (), False, torch.cat(parts), (text,))


@torch.no_grad()
def stock(pipe, group):
    """Denoise as the loop of the pipeline does, one rollout after another."""
    sample, made = group.prepared.sample, []
    shapes = [[sample.target, *sample.references]]
    for number in range(MEMBERS):
        latents = Member.start(group, number, 0).latents[None]
        scheduler = denoising_schedule(pipe.scheduler, latents.shape[1], STEPS, latents.device)
        for t in scheduler.timesteps:
            velocity = pipe.transformer(
                hidden_states=torch.cat([latents, group.references[None]], 1),
                timestep=t.expand(1) / 1000,
                encoder_hidden_states=group.texts[0][None],
                encoder_hidden_states_mask=None,
                img_shapes=shapes,
                return_dict=False,
            )[0][:, : latents.shape[1]]
            latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
        made.append(latents[0])
    return torch.stack(made)


def packed(pipe, group, visibility, members=range(MEMBERS)):
    """Latents of the members, and tokens of a step."""
    model = PackedQwenImage(pipe.transformer, visibility=visibility)
    started = [Member.start(group, number, 0) for number in members]
    pack = RolloutPack.of(started, model, visibility == "group_shared", torch.float32)
    denoise(model, pack, None, seed=0)
    return torch.stack([member.latents for member in started]), pack.layout.joint_length


@pytest.mark.parametrize("which", ["stock one by one", "packed", "packed, group-shared"])
@pytest.mark.benchmark(group="rollouts of a group of 16, 3 references")
def test_rollouts(timed, benchmark, pipe, group, which):
    expected = stock(pipe, group)
    whole, tokens = packed(pipe, group, "full")
    shared, fewer = packed(pipe, group, "group_shared")
    alone = torch.cat([packed(pipe, group, "reference_causal", [number])[0] for number in range(MEMBERS)])
    assert max_relative_error(whole, expected) < 1e-4
    assert max_relative_error(shared, alone) < 1e-4
    calls = {
        "stock one by one": (lambda: stock(pipe, group), tokens),
        "packed": (lambda: packed(pipe, group, "full"), tokens),
        "packed, group-shared": (lambda: packed(pipe, group, "group_shared"), fewer),
    }
    call, count = calls[which]
    benchmark.extra_info["tokens"] = count
    timed(call, calls["stock one by one"][0])
