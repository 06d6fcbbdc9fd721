"""Training on Qwen-Image-2.1: loss and gradients of the stock model, runs, exports, rollouts; on random weights."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import warm
from PIL import Image
from qwen_image_21 import case, pipeline, transformer
from rollouts import FakeRanks, FakeRewards
from safetensors.torch import load_file

import uniref_fast
from uniref_fast.data.dataset import Dataset
from uniref_fast.evaluation import requests
from uniref_fast.loading import load_pipeline, load_run
from uniref_fast.models import PackedQwenImage21
from uniref_fast.run_plan import PlanOptions, make_plan
from uniref_fast.testing import max_relative_error
from uniref_fast.training import msgrpo, sft
from uniref_fast.training.batches.latent_cache import TensorCache
from uniref_fast.training.batches.samples import Encoder
from uniref_fast.training.core.adapter import add_adapter
from uniref_fast.training.core.memory import MemoryPlan
from uniref_fast.training.core.model_size import QwenImage21Size, model_size
from uniref_fast.training.core.recipe import BudgetStage
from uniref_fast.training.core.suitability import check_suitability
from uniref_fast.training.rl.generator import RolloutGenerator
from uniref_fast.training.rl.on_policy import TOLERANCE, check_on_policy
from uniref_fast.training.rl.recipes import MSGRPO, RLStage
from uniref_fast.training.rl.rollout import replay
from uniref_fast.training.supervised.flow_matching import flow_batch, sample_errors
from uniref_fast.training.supervised.recipes import SFT

pytestmark = pytest.mark.usefixtures("threads")

# ---- loss and gradients ----

CASES = [
    case((5, 3, 2), ((1, 4, 6), (1, 2, 8)), seed=1),
    case((7,), target=(1, 2, 4), seed=2),
    case((2, 0, 0, 4), ((1, 2, 2), (1, 4, 2), (1, 2, 6)), target=(1, 6, 4), seed=3),
]


def flow(packed, cases):
    """Batch whose targets and noise are drawn by the text of each case; the clean targets are those of the case."""
    parts = [one.image.split([one.target_tokens, len(one.image) - one.target_tokens]) for one in cases]
    noises = [torch.randn(x.shape, generator=torch.Generator().manual_seed(len(x))) for x, _ in parts]
    times, layout = [one.timestep.item() for one in cases], packed.layout([one.sample for one in cases])
    texts = [one.text for one in cases]
    return flow_batch([x for x, _ in parts], [r for _, r in parts], texts, times, noises, layout, torch.float32)


def packed_losses(model, cases, **options):
    packed = PackedQwenImage21(model, for_training=True, **options)
    batch = flow(packed, cases)
    return sample_errors(packed(batch.image, batch.text, batch.t, batch.layout), batch)


def stock_losses(model, cases):
    found = []
    for one in cases:
        batch = flow(PackedQwenImage21(model), [one])
        noisy, references = batch.image.split([one.target_tokens, len(one.image) - one.target_tokens])
        given = {**one.stock, "hidden_states": torch.cat([references, noisy])[None], "timestep": batch.t}
        found.append(sample_errors(model(**given)[0][0, -one.target_tokens :], batch))
    return torch.cat(found)


def gradients(model, losses):
    model.zero_grad()
    losses.sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("causal_condition", [True, False])
@pytest.mark.parametrize("rank", [None, 4])
def test_a_pack_has_the_loss_and_the_gradients_of_the_stock_model(rank, causal_condition):
    model = transformer(layers=2, causal_condition=causal_condition)
    if rank is not None:
        model.requires_grad_(False)
        add_adapter(model, rank, 4.0, QwenImage21Size.lora_targets)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # new ones are 0, and those of A would get no gradients
                torch.nn.init.normal_(parameter, std=0.05)
    expected = stock_losses(model, CASES)
    losses = packed_losses(model, CASES)
    assert max_relative_error(losses, expected) < 1e-5
    wanted = gradients(model, expected)
    alone = {name: torch.zeros_like(g) for name, g in wanted.items()}
    for one in CASES:
        for name, gradient in gradients(model, packed_losses(model, [one])).items():
            alone[name] += gradient
    for checkpointing in (False, True, "inputs"):
        found = gradients(model, packed_losses(model, CASES, checkpointing=checkpointing))
        assert len(found) == len(wanted) > 10
        for name, gradient in wanted.items():
            assert gradient.abs().max() > 0, name
            assert max_relative_error(found[name], gradient) < 1e-5, name
            assert max_relative_error(found[name], alone[name]) < 1e-5, name


# ---- what rows are encoded to ----


def test_images_keep_their_transparency_for_the_vae_and_lie_on_white_for_the_text_encoder(tmp_path):
    pipe = pipeline(layers=1)
    values = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 4), dtype=np.uint8)
    images = [Image.fromarray(each) for each in values]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    row = {"input_images": ["1.png", "2.png"], "output_image": "0.png", "instruction": "swap them"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (tmp_path / "cache").mkdir()
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        encoder = Encoder(pipe, TensorCache(cache))
        prepared = encoder.prepare(Dataset([tmp_path / "rows.jsonl"])[0], (0, 0), 64, 64)
        encoded = encoder.encode(prepared, prepared.load())
        family, sizes = encoder.family, prepared.geometry
        with torch.no_grad():
            assert torch.equal(encoded.target, family.encode_image(pipe, images[0], sizes.size))
            references = [
                family.encode_image(pipe, *each) for each in zip(images[1:], sizes.reference_sizes, strict=True)
            ]
            embeds, text = family.encode_prompt(pipe, "swap them", images[1:], sizes.condition_sizes)
        assert torch.equal(encoded.references, torch.cat(references))
        assert torch.equal(encoded.text, embeds) and prepared.sample.text == text
        assert sum(length == 0 for length, _ in text) == 2, "the places of the references"
        opaque = family.encode_image(pipe, images[0].convert("RGB"), sizes.size)
        assert not torch.equal(encoded.target, opaque), "the alpha channel counts"


# ---- runs ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, rows to train on with 0 to 3 references of several sizes, some transparent, and held-out rows."""
    folder, random = tmp_path_factory.mktemp("qwen-image-2.1"), np.random.default_rng(0)
    pipeline(layers=2).save_pretrained(folder / "model")
    for name, count in (("train", 8), ("heldout", 2)):
        rows = []
        for i in range(count):
            files = [f"{name}-{i}-{j}.png" for j in range(1 + i % 4)]
            for j, file in enumerate(files):
                shape = (128, 96 + 32 * (i % 2), 4 if j == 1 else 3)
                Image.fromarray(random.integers(0, 255, shape, dtype=np.uint8)).save(folder / file)
            rows.append({"input_images": files[1:], "output_image": files[0], "instruction": "make it " + "x " * i})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.jsonl").write_text((folder / "train.jsonl").read_text().splitlines()[2])  # two references
    return folder


def flags(folder, out, *more):
    given = {"recipe": "tiny", "model": folder / "model", "data": folder / "train.jsonl", "out": out, "steps": 4,
             "heldout": folder / "heldout.jsonl", "validate": folder / "prompts.jsonl",
             "packs": 2, "lora-rank": 4, "save-every": 2, "warmup": 1,
             "eval-every": 4, "eval-samples": 2, "sample-count": 2, "sample-every": 4, "tensorboard": "false",
             "sample-num-inference-steps": 2, "sample-true-cfg-scale": 2}  # fmt: skip
    for i in (0, 1):
        given |= {f"stages.{i}.budget": 128, f"stages.{i}.target-side": 128, f"stages.{i}.pack-tokens": 300}
    given |= {name.removeprefix("--"): value for name, value in zip(more[::2], more[1::2], strict=True)}
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


def records(out):
    """Figures of a run by step, without those that depend on the time."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], name): value for line in lines for name, value in line.items()
            if name.startswith(("loss", "eval/", "psnr/", "grad_norm"))}  # fmt: skip


def adapter(out):
    return load_file(out / "lora" / "pytorch_lora_weights.safetensors")


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run of four steps that trains a LoRA."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "run"
    assert sft.main(flags(folder, out)) == 0
    torch.set_num_threads(before)
    return out


@pytest.mark.slow
def test_a_run_trains_the_layers_of_the_family_and_its_adapter_edits_like_the_trained_model(folder, whole):
    config = json.loads((whole / "config.json").read_text())
    assert tuple(config["lora_targets"]) == QwenImage21Size.lora_targets
    names = {name.split(".lora_")[0].split(".", 3)[3] for name in adapter(whole)}
    assert names == {"attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "img_mlp.proj", "img_mlp.gate_layer",
                     "img_mlp.out"}  # fmt: skip
    found = records(whole)
    assert found[4, "eval/heldout"] < found[0, "eval/heldout"], "it learns"
    assert (whole / "samples" / "heldout-000004.png").exists() and (0, "psnr/heldout") in found
    pipe = load_pipeline(str(folder / "model"), torch.float32, "cpu")
    request = {"prompt": "make it night", "images": [Image.open(folder / "train-1-1.png").resize((64, 64))],
               "width": 64, "height": 64, "num_inference_steps": 2, "seed": 0, "true_cfg_scale": 1.0}  # fmt: skip
    pipe.output_area = 64 * 64

    def edited():
        return uniref_fast.edit(pipe, [request], output_type="latent", progress=False)[0]

    before = edited()
    assert load_run(pipe, whole, torch.float32, base=None, adapter="trained", given="run")
    after = edited()
    assert max_relative_error(after, before) > 1e-4
    arguments = {"output_resolution": 64, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    fields = {name: request[name] for name in ("prompt", "width", "height", "num_inference_steps")}
    stock = pipe(**fields, image=request["images"], **arguments).images
    assert max_relative_error(after, stock.reshape(after.shape)) < 1e-4, "diffusers' own pipeline with the adapter"


@pytest.mark.slow
def test_a_resumed_run_and_one_with_freed_encoders_have_the_same_bits(folder, whole, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints" / "step-000004")
    shutil.rmtree(half / "lora")
    assert sft.main(flags(folder, half, "--resume", "auto", "--encoders", "free")) == 0
    assert sft.main(flags(folder, tmp_path / "free", "--cache", tmp_path / "cache")) == 0
    for out in (half, tmp_path / "free"):
        assert records(out) == records(whole)
        assert all(torch.equal(tensor, adapter(whole)[name]) for name, tensor in adapter(out).items())
    for name in ("prompts-000000.png", "prompts-000004.png", "heldout-000004.png"):
        assert (tmp_path / "free" / "samples" / name).read_bytes() == (whole / "samples" / name).read_bytes(), name


def test_the_text_encoder_is_asked_about_references_of_their_budget(folder, monkeypatch):
    pipe, seen = pipeline(layers=1), []
    monkeypatch.setattr(requests, "prompt_embeddings", lambda pipe, prompt, images, sizes: seen.extend(sizes))
    row, settings = Dataset([folder / "prompts.jsonl"])[0], {"num_inference_steps": 2, "true_cfg_scale": 1.0}
    one = requests.eval_request(pipe, row, ("rows", 0), target_side=64, budget=128, seed=0, **settings)
    assert requests.encoder_refusal(pipe, one, 128) is None
    assert seen == list(requests.request_geometry(pipe, one.request, 128).reference_sizes)


@pytest.mark.slow
def test_two_ranks_train_all_weights_as_one_does(folder, tmp_path):
    more = ("--lora-rank", "none", "--steps", 2, "--eval-every", 0, "--sample-every", 0, "--ema", "none")
    warm.run_ranks(2, "training/sft.py", *flags(folder, tmp_path / "two", *more))
    assert sft.main(flags(folder, tmp_path / "one", *more)) == 0
    two, one = records(tmp_path / "two"), records(tmp_path / "one")
    assert two == pytest.approx(one, rel=1e-4)
    pipe = load_pipeline(str(folder / "model"), torch.float32, "cpu")
    before = dict(pipe.transformer.named_parameters())
    load_run(pipe, tmp_path / "two", torch.float32, base=tmp_path / "two", adapter="none", given="run")
    weights = [
        load_file(tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors") for name in ("one", "two")
    ]
    for name, parameter in pipe.transformer.named_parameters():
        assert torch.equal(parameter, weights[1][name]) and not torch.equal(parameter, before[name]), name
        assert max_relative_error(weights[1][name], weights[0][name]) < 1e-3, name


# ---- rollouts ----


@pytest.fixture(scope="module")
def rollouts(folder):
    """Return denoised batches of groups of three, by whether members share text and references, and keep them."""
    pipe = load_pipeline(str(folder / "model"), torch.float32, "cpu")
    dataset, encoder = Dataset([folder / "train.jsonl"]), Encoder(pipe, TensorCache(None))
    rows = [((0, i), encoder.prepare(dataset[i], (0, i), 128, 128, rollout=True)) for i in (2, 3)]

    def run(shared, kept, guidance):
        config = MSGRPO((RLStage(128, 1, 1e-3),), group=3, packs=2, dtype="float32", rollout_num_inference_steps=3,
                        rollout_true_cfg_scale=guidance, keep_references=kept, rewards=("scene",))  # fmt: skip
        packed, encoders = PackedQwenImage21(pipe.transformer, for_training=True), SimpleNamespace()
        model = SimpleNamespace(pipe=pipe, packed=packed, config=config, ranks=FakeRanks(), encoders=encoders)
        generator = RolloutGenerator(config, model.ranks, model, encoder, FakeRewards(), lambda: False)
        assert generator.shared, "without any flag"
        generator.shared = shared
        batch = generator.training_batch(rows, MemoryPlan(2000, 1, False, 0, ""))
        assert generator.generate(batch)
        return generator, batch

    return run


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_members_share_text_and_references_which_are_kept_exactly(rollouts, guidance):
    ends, tokens = {}, {}
    for shared, kept in ((False, False), (True, False), (True, True)):
        generator, batch = rollouts(shared, kept, guidance)
        found = check_on_policy(generator.model.packed, batch.packs, 2, generator.sampler, generator.ranks, None)
        assert len(found) == 12 and not any(one.off for one in found), "the replay computes every row"
        packs = [pack for pack in batch.packs if pack is not None]
        assert sum(len(pack.members) for pack in packs) == 6
        ends[shared, kept] = torch.cat([member.latents for pack in packs for member in pack.members])
        tokens[shared] = [pack.layout.joint_length for pack in packs]
        for pack in packs:
            groups = {member.group.number: member.group for member in pack.members}.values()
            own = sum(member.group.own_tokens for member in pack.members)
            expected = sum(member.group.tokens for member in pack.members)
            assert pack.layout.joint_length == (own + sum(g.shared_tokens for g in groups) if shared else expected)
    assert sum(tokens[True]) < 0.7 * sum(tokens[False])
    for found in (ends[True, False], ends[True, True]):
        torch.testing.assert_close(found, ends[False, False], rtol=0, atol=5e-5)  # products of other row counts


def test_the_gradient_of_shared_prefixes_is_that_of_members_alone(rollouts):
    found = {}
    for shared in (False, True):
        generator, batch = rollouts(shared, False, 1.0)
        packed = generator.model.packed
        packed.transformer.requires_grad_(True)
        loss = sum(step.mean.square().mean() for pack in batch.packs if pack is not None
                   for _, step in replay(packed, pack, 0, generator.sampler))  # fmt: skip
        found[shared] = gradients(packed.transformer, loss)
    for name, gradient in found[False].items():
        assert max_relative_error(found[True][name], gradient) < 1e-4, name


@pytest.mark.slow
def test_a_run_of_msgrpo(folder, tmp_path):
    out = tmp_path / "run"
    given = {"recipe": "tiny", "model": folder / "model", "data": folder / "train.jsonl", "out": out, "steps": 2,
             "heldout": folder / "heldout.jsonl", "prompts": 2, "group": 2, "packs": 2, "lora-rank": 2,
             "rollout-num-inference-steps": 3, "sample-num-inference-steps": 2, "eval-every": 2, "eval-samples": 1,
             "sample-every": 0, "save-every": 1, "tensorboard": "false", "keep-references": "true",
             "rewards": "qwen_image_21:dark"}  # fmt: skip
    for i in (0, 1):
        given |= {f"stages.{i}.budget": 128, f"stages.{i}.target-side": 128, f"stages.{i}.pack-tokens": 1000,
                  f"stages.{i}.references": "any"}  # fmt: skip
    words = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    assert msgrpo.main(words) == 0
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    checks = [event["worst_log_ratio"] for event in events if event["kind"] == "on-policy check"]
    assert checks and max(checks) < TOLERANCE
    before = adapter(out)
    assert any(tensor.abs().max() > 0 for name, tensor in before.items() if "lora_B" in name), "it was trained"
    shutil.rmtree(out / "lora")
    shutil.rmtree(out / "checkpoints" / "step-000002")
    assert msgrpo.main([*words, "--resume", "auto"]) == 0
    assert all(torch.equal(tensor, adapter(out)[name]) for name, tensor in before.items()), "bit for bit"


# ---- the plan ----


def test_a_plan_has_the_sizes_of_the_model_and_refuses_to_share_packs(folder):
    pipe, size = load_pipeline(str(folder / "model"), torch.float32, "cpu"), model_size(str(folder / "model"))
    assert size.transformer == sum(p.numel() for p in pipe.transformer.parameters())
    assert size.encoders == sum(p.numel() for part in (pipe.text_encoder, pipe.vae) for p in part.parameters())
    assert (size.token_side, size.text_channels) == (16, pipe.transformer.config.context_in_dim)
    stage = BudgetStage(1024, 4, 1e-3)
    config = SFT((stage,), model=str(folder / "model"), data=(str(folder / "train.jsonl"),), lora_rank=4)
    plan = make_plan("sft", "test", config, PlanOptions(gpu_memory=80, nproc=2))
    assert plan.config.lora_targets == QwenImage21Size.lora_targets
    add_adapter(pipe.transformer, 4, 4.0, QwenImage21Size.lora_targets)
    assert plan.trained == sum(p.numel() for n, p in pipe.transformer.named_parameters() if "lora_" in n)
    assert plan.fits and plan.stages[0].plan.sequence_parallel == 1
    shared = dataclasses.replace(config, stages=(dataclasses.replace(stage, sequence_parallel=2),))
    with pytest.raises(ValueError, match="ranks cannot share a pack of a QwenImage21"):
        make_plan("sft", "test", shared, PlanOptions(gpu_memory=80, nproc=2))


def refused(kind, config, message):
    """Check that both the run and its plan are refused."""
    with pytest.raises(ValueError, match=message):
        check_suitability(config, 1)
    with pytest.raises(ValueError, match=message):
        make_plan(kind, "test", config, PlanOptions(gpu_memory=80))


def test_a_visibility_and_a_number_of_steps_that_the_model_cannot_have_are_refused(folder, tmp_path):
    """2.1-Turbo has sigmas of its own, one for each step."""
    model = str(folder / "model")
    stages = {SFT: (BudgetStage(1024, 4, 1e-3),), MSGRPO: (RLStage(1024, 4, 1e-3),)}
    for kind, visibility in ((SFT, "reference_causal"), (MSGRPO, "group_shared")):
        config = kind(stages[kind], model=model, visibility=visibility)
        message = f'visibility = "{visibility}" is not possible for model = .*: it can have full; leave --visibility'
        refused(kind.kind, config, message)
    turbo = tmp_path / "turbo"
    turbo.mkdir()
    for path in (folder / "model").iterdir():
        (turbo / path.name).symlink_to(path)
    index = json.loads((turbo / "model_index.json").read_text())
    (turbo / "model_index.json").unlink()
    (turbo / "model_index.json").write_text(json.dumps(index | {"sample_sigmas": [1.0, 0.9, 0.7, 0.4]}))
    config = MSGRPO(stages[MSGRPO], model=str(turbo), rollout_num_inference_steps=10)
    refused("msgrpo", config, "rollout_num_inference_steps = 10, .* exactly 4 steps; give --rollout-num-inference-st")
    check_suitability(dataclasses.replace(config, rollout_num_inference_steps=4), 1)
    check_suitability(SFT(stages[SFT], model=str(turbo)), 1)
