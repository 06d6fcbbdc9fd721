"""MSGRPO on FLUX.2: rollouts, replays and runs on small models of the real classes with random weights."""

import dataclasses
import importlib.util
import json
import shutil
from types import SimpleNamespace

import flux2
import pytest
import torch
from PIL import Image
from rollouts import FakeRanks, FakeRewards
from safetensors.torch import load_file

from uniref_fast import cli
from uniref_fast.data.dataset import Dataset
from uniref_fast.models import PackedFlux2, flux2_family
from uniref_fast.run_plan import PlanOptions, make_plan
from uniref_fast.testing import max_relative_error
from uniref_fast.training import msgrpo
from uniref_fast.training.batches.latent_cache import TensorCache
from uniref_fast.training.batches.samples import Encoder
from uniref_fast.training.core import flux2_size
from uniref_fast.training.core.memory import MemoryPlan
from uniref_fast.training.core.sampling import PromptSamples
from uniref_fast.training.core.suitability import check_suitability
from uniref_fast.training.rl.generator import RolloutGenerator
from uniref_fast.training.rl.on_policy import TOLERANCE, check_on_policy
from uniref_fast.training.rl.recipes import MSGRPO, RLStage
from uniref_fast.training.rl.rollout import replay

pytestmark = pytest.mark.usefixtures("threads")
TEXT = 24


@pytest.fixture(scope="module", autouse=True)
def short_texts():
    """Texts that are padded to a few tokens and not to 512."""
    with pytest.MonkeyPatch.context() as patcher:
        for module in (flux2_family, flux2_size):
            patcher.setattr(module, "TEXT_LENGTH", TEXT)
        yield


def pipeline(kind):
    transformer = flux2.transformer(kind.removesuffix("-distilled"), heads=1, layers=1, single_layers=2)
    return flux2.pipeline(transformer, kind.removesuffix("-distilled"), distilled="distilled" in kind)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and rows with 0 to 2 references of several sizes."""
    folder, rows = tmp_path_factory.mktemp("flux2"), []
    pipeline("klein").save_pretrained(folder / "klein")
    for i in range(4):
        for j in range(1 + i % 3):
            flux2.picture(64 + 16 * (j % 2), 64, i + j).save(folder / f"{i}-{j}.png")
        rows.append({"input_images": [f"{i}-{j}.png" for j in range(1, 1 + i % 3)], "output_image": f"{i}-0.png",
                     "instruction": "make it " + "x " * i})  # fmt: skip
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def rollouts(folder):
    """Return denoised batches of two groups of two members, by the kind of the model."""
    pipes, dataset = {}, Dataset([folder / "train.jsonl"])

    def run(kind, heldout=False, **options):
        pipe = pipes.setdefault(kind, pipeline(kind))
        stage = RLStage(128, 1, 1e-3)
        config = MSGRPO((stage,), group=2, packs=1, dtype="float32", rollout_num_inference_steps=3, visibility="full",
                        model="klein", rewards=("scene",), sample_num_inference_steps=2,
                        **{"sample_true_cfg_scale": 2.5} | options)  # fmt: skip
        encoder = Encoder(pipe, TensorCache(None), guidance=config.embedded_guidance)
        if pipe.text_encoder is None:
            encoder.encode_text = lambda prepared, images, text=None: torch.randn(
                TEXT, 96, generator=torch.Generator().manual_seed(len(text or prepared.instruction))
            )
        rows = [((0, i), encoder.prepare(dataset[i], (0, i), 64, 64, rollout=True)) for i in (1, 2)]
        packed = PackedFlux2(pipe.transformer, for_training=True)
        model = SimpleNamespace(pipe=pipe, packed=packed, config=config, ranks=FakeRanks(), encoders=SimpleNamespace())
        generator = RolloutGenerator(config, model.ranks, model, encoder, FakeRewards(), lambda: False)
        plan = MemoryPlan(4000, 1, False, 0, "")
        batch = generator.heldout_batch(rows, plan) if heldout else generator.training_batch(rows, plan)
        assert generator.generate(batch)
        return generator, batch

    return run


def latents(batch):
    return torch.cat([member.latents for pack in batch.packs for member in pack.members])


@pytest.mark.parametrize("kind", ["klein", "klein-distilled", "klein-kv", "dev"])
def test_the_replay_of_every_step_has_the_ratio_1(rollouts, kind):
    generator, batch = rollouts(kind)
    found = check_on_policy(generator.model.packed, batch.packs, 2, generator.sampler, generator.ranks, None)
    assert len(found) == 8 and not any(one.off for one in found)
    assert generator.shared == (kind == "klein-kv")
    scales = {scale for pack in batch.packs for scale in pack.layout.guidance}
    assert scales == ({3.5} if kind == "dev" else set())


def test_members_of_klein_kv_share_references_which_are_kept_exactly(rollouts):
    """The packed model of a member alone, whose references see only each other, has the same results and gradients."""
    generator, batch = rollouts("klein-kv")
    (pack,) = batch.packs
    groups = {member.group.number: member.group for member in pack.members}.values()
    references = sum(group.reference_tokens for group in groups)
    assert pack.layout.joint_length == sum(m.group.tokens - m.group.reference_tokens for m in pack.members) + references
    _, kept = rollouts("klein-kv", keep_references=True)
    torch.testing.assert_close(latents(kept), latents(batch), rtol=0, atol=5e-5)  # products of other row counts
    packed, found = generator.model.packed, {}
    packed.transformer.requires_grad_(True)
    for shared in (True, False):
        generator.shared, packed.visibility = shared, "group_shared" if shared else "reference_causal"
        again = generator.training_batch([(g.key, g.prepared) for g in groups], MemoryPlan(4000, 1, False, 0, ""))
        assert generator.generate(again)
        torch.testing.assert_close(latents(again), latents(batch), rtol=0, atol=5e-5)
        packed.transformer.zero_grad()
        steps = [step for each in again.packs for _, step in replay(packed, each, 0, generator.sampler)]
        sum(step.mean.square().mean() for step in steps).backward()
        found[shared] = {name: p.grad for name, p in packed.transformer.named_parameters() if p.grad is not None}
    assert len(found[True]) > 20
    for name, gradient in found[False].items():
        assert max_relative_error(found[True][name], gradient) < 1e-4, name
    packed.transformer.requires_grad_(False)


def test_guidance_is_that_of_the_pipeline(rollouts):
    """klein-base has two prompts with guidance; dev embeds the scale of a sample; the others ignore it."""
    for kind, sequences, scale in (("klein", 2, set()), ("klein-kv", 1, set()), ("klein-distilled", 1, set()),
                                   ("dev", 1, {2.5})):  # fmt: skip
        _, batch = rollouts(kind, heldout=True)
        assert {len(member.group.prompts) for pack in batch.packs for member in pack.members} == {sequences}, kind
        assert {each for pack in batch.packs for each in pack.layout.guidance} == scale, kind
    _, batch = rollouts("dev", heldout=True, sample_true_cfg_scale=1.0, embedded_guidance=1.5)
    assert {each for pack in batch.packs for each in pack.layout.guidance} == {1.5}, "samples are as rollouts"
    one, two = latents(rollouts("dev")[1]), latents(rollouts("dev", embedded_guidance=1.0)[1])
    assert not torch.equal(one, two), "the scale of rollouts is a setting"


def refused(config, message):
    """Check that both the run and its plan are refused."""
    with pytest.raises(ValueError, match=message):
        check_suitability(config, 1)
    with pytest.raises(ValueError, match=message):
        make_plan("msgrpo", "test", config, PlanOptions(gpu_memory=200))


def test_what_a_model_cannot_have_is_refused(folder, tmp_path):
    """Guidance of a model that predicts for one prompt, and kept references that change with the time."""
    config = MSGRPO((RLStage(1024, 4, 1e-3),), model=str(folder / "klein"), visibility="full",
                    rollout_true_cfg_scale=4.0)  # fmt: skip
    check_suitability(config, 1)
    refused(dataclasses.replace(config, keep_references=True), 'under visibility = "full" its references depend')
    shutil.copytree(folder / "klein", tmp_path / "other")
    path = tmp_path / "other" / "model_index.json"
    index = json.loads(path.read_text())
    config = dataclasses.replace(config, model=str(tmp_path / "other"))
    path.write_text(json.dumps(index | {"is_distilled": True}))
    refused(config, "a Flux2KleinPipeline: the model is distilled, .*; leave --rollout-true-cfg-scale at 1")
    path.write_text(json.dumps(index | {"_class_name": "Flux2KleinKVPipeline"}))
    refused(config, "a Flux2KleinKVPipeline: it has no classifier-free guidance")
    check_suitability(dataclasses.replace(config, rollout_true_cfg_scale=1.0, keep_references=True), 1)
    dev = dataclasses.replace(config, model="black-forest-labs/FLUX.2-dev")
    with pytest.raises(ValueError, match=r"a Flux2Pipeline: true_cfg_scale is the guidance scale that its transformer"):
        make_plan("msgrpo", "test", dev, PlanOptions(gpu_memory=200))


def dark(candidate):
    """Return a higher score for a darker image."""
    return {"quality": 10 - 10 * sum(candidate.image.convert("L").resize((1, 1), Image.Resampling.BOX).getdata()) / 255}


def flags(folder, model, out, **more):
    """Return the arguments of a run of two steps."""
    given = {"recipe": "tiny", "model": model, "data": folder / "train.jsonl", "out": out, "steps": 2,
             "prompts": 2, "group": 2, "packs": 1, "lora-rank": 2, "rollout-num-inference-steps": 3,
             "eval-every": 0, "sample-every": 0, "save-every": 1, "tensorboard": "false",
             "rewards": f"{__name__}:dark", **more}  # fmt: skip
    for i in (0, 1):
        given |= {f"stages.{i}.budget": 128, f"stages.{i}.target-side": 128, f"stages.{i}.pack-tokens": 3000,
                  f"stages.{i}.references": "any"}  # fmt: skip
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="PixtralProcessor needs torchvision")
def test_a_run_of_dev_embeds_the_scale_that_is_given(folder, tmp_path, monkeypatch):
    """Rollouts, samples of held-out rows and samples of the prompts of `validate` have the same scale."""
    small = flux2.transformer("dev", heads=1, layers=1, single_layers=2)
    flux2.pipeline(small, "dev", mistral=True).save_pretrained(tmp_path / "dev")
    found, settings = [], []
    generate, grid = RolloutGenerator.generate_and_score, PromptSamples.grid

    def recorded(self, batch, step):
        found.append({scale for pack in batch.packs for scale in pack.layout.guidance})
        return generate(self, batch, step)

    def recorded_grid(self, pack_tokens):
        settings.append(self.settings["true_cfg_scale"])
        return grid(self, pack_tokens)

    monkeypatch.setattr(RolloutGenerator, "generate_and_score", recorded)
    monkeypatch.setattr(PromptSamples, "grid", recorded_grid)
    rows = folder / "train.jsonl"
    more = {"embedded-guidance": 2.5, "heldout": rows, "eval-samples": 1, "sample-count": 1, "validate": rows,
            "eval-every": 2, "sample-every": 2, "sample-num-inference-steps": 2, "encoders": "free"}  # fmt: skip
    assert msgrpo.main(flags(folder, tmp_path / "dev", tmp_path / "run", **more)) == 0
    assert found == [{2.5}] * 4 and settings == [2.5] * 2, "two steps; held-out rows before and after them"


@pytest.mark.slow
def test_a_run_resumes_exactly_and_edit_takes_its_adapter(folder, tmp_path, capsys):
    out = tmp_path / "run"
    words = flags(folder, folder / "klein", out)
    assert msgrpo.main(words) == 0
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    checks = [event["worst_log_ratio"] for event in events if event["kind"] == "on-policy check"]
    assert checks and max(checks) < TOLERANCE
    before = load_file(out / "lora" / "pytorch_lora_weights.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in before.items() if "lora_B" in name), "it was trained"
    shutil.rmtree(out / "lora")
    shutil.rmtree(out / "checkpoints" / "step-000002")
    capsys.readouterr()
    assert msgrpo.main(["--recipe", "tiny", "--out", str(out), "--resume", "auto"]) == 2
    expected = f"trains model = {folder / 'klein'}, and the recipe tiny has model = builtin; give --model"
    assert expected in capsys.readouterr().err
    assert msgrpo.main([*words, "--resume", "auto"]) == 0
    after = load_file(out / "lora" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items()), "bit for bit"
    common = ["--model", folder / "klein", "--image", folder / "1-1.png", "--prompt", "night", "--seed", 1]
    common += ["--num-inference-steps", 2, "--width", 64, "--height", 64]
    for name, more in (("plain", []), ("lora", ["--lora", out])):
        assert cli.main([str(x) for x in ("edit", *common, *more, "--out", tmp_path / f"{name}.png")]) == 0
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "lora.png").read_bytes()
