"""Supervised fine-tuning of FLUX.2 end to end, on small models of the real classes with random weights."""

import dataclasses
import importlib.util
import json
import shutil
from types import SimpleNamespace

import flux2
import pytest
import torch
import torch.distributed as dist
import warm
from safetensors.torch import load_file
from synthetic import synthetic_sample

from uniref_fast import cli, edit
from uniref_fast.data.dataset import Dataset, RowError
from uniref_fast.evaluation.requests import guidance_texts
from uniref_fast.layout import Sample
from uniref_fast.loading import load_pipeline
from uniref_fast.run_plan import PlanOptions, make_plan
from uniref_fast.training import sft
from uniref_fast.training.batches.encoding import EncodingPass, heldout_rows
from uniref_fast.training.batches.latent_cache import TensorCache
from uniref_fast.training.batches.samples import Encoder, Form
from uniref_fast.training.core.distributed import Ranks, local
from uniref_fast.training.core.flux2_size import Flux2Size
from uniref_fast.training.core.memory import activation_bytes
from uniref_fast.training.core.model import TrainedModel
from uniref_fast.training.core.recipe import BudgetStage
from uniref_fast.training.core.sampling import generate
from uniref_fast.training.core.tracked_memory import FakeTrainedModel
from uniref_fast.training.supervised.recipes import SFT, lora
from uniref_fast.training.supervised.validation import Validation

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("threads")]
WITHOUT_PROCESSOR = importlib.util.find_spec("torchvision") is None
needs_processor = pytest.mark.skipif(WITHOUT_PROCESSOR, reason="PixtralProcessor needs torchvision")
KINDS = ["klein", "klein-kv", pytest.param("dev", marks=needs_processor)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight rows to train on and two held out, with 0 to 3 references of different sizes."""
    folder = tmp_path_factory.mktemp("data")
    for name, first, count in (("train", 0, 8), ("heldout", 1000, 2)):
        rows = []
        for i in range(first, first + count):
            scene = synthetic_sample(i, size=64, references=1 + i % 3)
            files = [f"{i}-{j}.png" for j in range(len(scene.references) + 1)]
            sizes = [(64, 64), (96, 64), (64, 112)]
            for j, (file, image) in enumerate(zip(files, [*scene.references, scene.target], strict=True)):
                image.resize(sizes[(i + j) % 3]).save(folder / file)
            rows.append({"input_images": files[:-1] if i % 4 else [], "output_image": files[-1],
                         "instruction": scene.instruction})  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of small pipelines, by kind; that of dev has a Mistral as its text encoder."""
    folder = tmp_path_factory.mktemp("models")
    for kind in ("klein", "klein-kv") if WITHOUT_PROCESSOR else ("klein", "klein-kv", "dev"):
        small = flux2.transformer(kind, heads=1, layers=1, single_layers=2)
        flux2.pipeline(small, kind, mistral=True).save_pretrained(folder / kind)
    shutil.copytree(folder / "klein", folder / "distilled")
    index = json.loads((folder / "klein" / "model_index.json").read_text())
    (folder / "distilled" / "model_index.json").write_text(json.dumps(index | {"is_distilled": True}))
    return folder


def flags(data, model, out, *more):
    given = {
        "recipe": "lora", "model": model, "data": data / "train.jsonl", "out": out,
        "cache": data / f"cache-{model.name}", "steps": 4, "packs": 2, "lora-rank": 4, "ema": 0.9, "dtype": "float32",
        "cost": "flops", "save-every": 2, "warmup": 0, "eval-every": 0, "sample-every": 0, "tensorboard": "false",
        "workers": 1,
    }  # fmt: skip
    for i, side in enumerate((128, 128, 192)):
        given |= {f"stages.{i}.budget": side, f"stages.{i}.target-side": 128, f"stages.{i}.pack-tokens": 1400,
                  f"stages.{i}.lr": "1e-3"}  # fmt: skip
    given |= {name.removeprefix("--"): value for name, value in zip(more[::2], more[1::2], strict=True)}
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


def losses(out):
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def adapter(out):
    (file,) = (out / "lora").glob("*.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def whole(data, models, tmp_path_factory):
    """A run of four steps without any interruption, whose encoders were freed before its first step."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "run"
    more = "--heldout", data / "heldout.jsonl", "--eval-every", 4, "--sample-num-inference-steps", 2
    assert sft.main(flags(data, models / "klein", out, *more, "--sample-count", 1)) == 0
    torch.set_num_threads(before)
    return out


def test_a_run_resumes_exactly(data, models, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints" / "step-000004")
    shutil.rmtree(out / "lora")
    assert sft.main(flags(data, models / "klein", out, "--resume", "auto")) == 0
    expected, found = adapter(whole), adapter(out)
    assert losses(out) == losses(whole) and len(losses(out)) == 4
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(found) == 2 * (12 + 2 * 2), "all Linear layers of all blocks"


def test_two_ranks_that_shard_the_weights(data, models, whole, tmp_path):
    warm.run_ranks(2, "training/sft.py", *flags(data, models / "klein", tmp_path / "run"))
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-5)
    for name, tensor in adapter(tmp_path / "run").items():
        torch.testing.assert_close(tensor, adapter(whole)[name], rtol=1e-3, atol=1e-5)


def test_the_command_edit_takes_the_run(models, data, whole, tmp_path):
    common = ["--model", models / "klein", "--image", data / "1-0.png", "--prompt", "night", "--seed", 1]
    common += ["--num-inference-steps", 2, "--width", 64, "--height", 64]
    for name, more in (("plain", []), ("lora", ["--lora", whole])):
        assert cli.main([str(x) for x in ("edit", *common, *more, "--out", tmp_path / f"{name}.png")]) == 0
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "lora.png").read_bytes()


@needs_processor
def test_the_loss_of_a_repeated_sample_falls(data, models, tmp_path):
    """The guidance scale that dev embeds is that of the run: another one changes its losses."""
    row = json.loads((data / "train.jsonl").read_text().splitlines()[2])
    row |= {name: [str(data / file) for file in row[name]] for name in ("input_images",)}
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps(row | {"output_image": str(data / row["output_image"])}) + "\n")
    same = "--t-std", 0, "--drop-text", 0, "--drop-references", 0, "--packs", 1, "--ema", "none", "--data", one
    same += tuple(word for i in range(3) for word in (f"--stages.{i}.lr", 1e-2))
    found = []
    for more in (("--steps", 12), ("--steps", 3, "--embedded-guidance", 1.0)):
        out = tmp_path / f"run-{len(found)}"
        assert sft.main(flags(data, models / "dev", out, *same, *more)) == 0
        found.append(losses(out))
    assert found[0][11] < 0.9 * found[0][0]
    assert found[1][0] != found[0][0]


# ---- the trained model ----


@pytest.fixture(scope="module")
def ranks():
    yield Ranks.start()
    dist.destroy_process_group()


def config(models, kind, **fields):
    stage = BudgetStage(128, 1, 1e-3, target_side=128)
    given = {"model": str(models / kind), "dtype": "float32", "lora_targets": Flux2Size.lora_targets, **fields}
    return SFT((stage,), **given)


def trained(config, ranks):
    """Return a model whose trained weights have been changed, as by training."""
    model = TrainedModel(config, ranks)
    model.packed.eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters.values():
        values = local(parameter.detach())
        values += 0.05 * torch.randn(values.shape, generator=generator).to(values.dtype)
    return model


def request(pipe):
    images = [flux2.picture(64, 80), flux2.picture(96, 64, 1)]
    scale = 3.5 if pipe.transformer.config.guidance_embeds else 1.0
    return {"prompt": "an owl", "images": images, "num_inference_steps": 2, "seed": 3, "width": 64, "height": 64,
            "true_cfg_scale": scale}  # fmt: skip


def pixels(image):
    return torch.tensor(list(image.getdata())).float()


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_adapter_edits_like_the_trained_model(models, ranks, tmp_path, kind):
    """`load_lora_weights` of diffusers loads it; the stock pipeline makes the same image, within rounding."""
    model = trained(config(models, kind, lora_rank=4), ranks)
    model.export(tmp_path)
    (mine,) = generate(model, [request(model.pipe)], None, 10**6)
    pipe = load_pipeline(str(models / kind), torch.float32, "cpu")
    (before,) = edit(pipe, [request(pipe)], progress=False)
    pipe.load_lora_weights(tmp_path / "lora", adapter_name="default")
    assert {name for name, _ in pipe.transformer.named_parameters() if "lora_" in name} == set(model.parameters)
    (loaded,) = edit(pipe, [request(pipe)], progress=False)
    assert (pixels(loaded) - pixels(mine)).abs().max() <= 1 < (pixels(before) - pixels(mine)).abs().max()
    given = request(pipe)
    guidance = {} if kind == "klein-kv" else {"guidance_scale": given["true_cfg_scale"]}
    stock = pipe(
        prompt=given["prompt"], image=given["images"], num_inference_steps=2, width=64, height=64,
        generator=torch.Generator().manual_seed(3), **guidance,
    ).images[0]  # fmt: skip
    assert (pixels(stock) - pixels(mine)).abs().max() <= 1


def test_all_weights_of_klein_kv_are_exported_and_continued(models, ranks, tmp_path):
    """A transformer that is loaded gets the attention processors of klein-KV, whose references see only themselves."""
    model = trained(config(models, "klein-kv"), ranks)
    model.export(tmp_path)
    again = TrainedModel(config(models, "klein-kv", initial=tmp_path), ranks)
    assert again.packed.clean_references and again.packed.visibility == "reference_causal"
    images = [generate(each, [request(each.pipe)], None, 10**6)[0] for each in (model, again)]
    assert torch.equal(*map(pixels, images))


@needs_processor
@pytest.mark.parametrize(
    ("base", "offload_blocks", "rank"), [(None, 0, None), (None, 2, 4), ("bf16", 1, 4), ("nf4", 0, 4)]
)
def test_a_plan_counts_the_bytes_of_the_model(models, ranks, base, offload_blocks, rank):
    """`uniref-fast plan` knows the sizes of both kinds of block from configurations."""
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    given = config(models, "dev", base=base, offload_blocks=offload_blocks, lora_rank=rank, visibility="full")
    stage = dataclasses.replace(given.stages[0], pack_tokens=10**6, checkpointing="host")
    model, given = trained(given, ranks), dataclasses.replace(given, stages=(stage,))
    plan = make_plan("sft", "test", given, PlanOptions(gpu_memory=1000))
    assert sum(plan.held.values()) == pytest.approx(model.fixed_bytes() + model.sharded_bytes(), rel=1e-3)
    gathered = plan.stages[0].plan.bytes_needed - sum(plan.held.values())
    gathered -= activation_bytes(plan.size, 10**6, "host", 4)
    assert gathered == pytest.approx(model.gathered_bytes(), rel=1e-3)


def test_the_plan_is_the_tracked_memory(ranks):
    """Activations of klein-4B with one sample of six references, extrapolated from a few blocks of both kinds."""
    small = {"num_attention_heads": 24, "joint_attention_dim": 7680, "guidance_embeds": False}
    recipe = dataclasses.replace(lora(), lora_targets=Flux2Size.lora_targets)
    one, kept = Sample(512, (1, 64, 64), ((1, 64, 42),) * 6), (False, "inputs")
    peaks = []
    for layers, single in ((2, 3), (3, 3), (2, 4)):
        model = FakeTrainedModel(Flux2Size(num_layers=layers, num_single_layers=single, **small), recipe, ranks)
        peaks.append([model.peak([one], checkpointing) - model.held() for checkpointing in kept])
    klein = Flux2Size(num_layers=5, num_single_layers=20, **small)
    for checkpointing, few, double, more in zip(kept, *peaks, strict=True):
        tracked = few + 3 * (double - few) + 17 * (more - few)
        assert activation_bytes(klein, one.length, checkpointing, 2) == pytest.approx(tracked, rel=0.05)


def test_rows_share_the_embedding_of_their_instruction(models, data, tmp_path):
    """The text encoder sees no references, so that rows with other references, and none, have one embedding."""
    pipe = load_pipeline(str(models / "klein"), torch.float32, "cpu")
    encoder = Encoder(pipe, TensorCache(tmp_path))
    rows = [dataclasses.replace(Dataset([data / "train.jsonl"])[i], instruction="make it night") for i in (0, 1, 2)]
    prepared = [encoder.prepare(row, (0, i), 128, 128) for i, row in enumerate(rows)]
    assert [len(each.sample.references) for each in prepared] == [0, 2, 3] and prepared[1].sample.text == 512
    encoder.encode_conditions(prepared[0], prepared[0].load_references())
    lacking = [encoder.missing(each, target=False, texts=()) for each in prepared]
    assert [len(keys) for keys in lacking] == [0, 2, 3]


@pytest.mark.parametrize("kind", [*KINDS, "distilled"])
def test_samples_of_freed_encoders_are_those_of_resident_ones(models, data, ranks, tmp_path, kind):
    """A pipeline that takes no negative prompt gets none; klein-base gets the text that training without text has."""
    given = config(models, kind, lora_rank=2, eval_samples=1, sample_count=1, sample_num_inference_steps=2,
                   sample_true_cfg_scale=4.0)  # fmt: skip
    found, loaded = [], []
    for encoders in ("resident", "free"):
        opened, cache = [], tmp_path if encoders == "free" else None

        def encode(model, opened=opened, cache=cache):
            encoder = Encoder(model.pipe, TensorCache(cache), encoders=model.encoders)
            opened.append(Validation([data / "heldout.jsonl"], given, model, encoder, ranks))
            if cache:
                rows = heldout_rows(opened[0].datasets, given, target=True, guided=1)
                EncodingPass(encoder, ranks, 1, shown=False).run(rows)

        model = TrainedModel(dataclasses.replace(given, encoders=encoders), ranks, encode)
        model.packed.eval()
        original = model.encoders._loaded
        model.encoders._loaded = lambda name, original=original: loaded.append(name) or original(name)
        found.append([(one.psnr, one.image.tobytes()) for one in opened[0].samples(4000)])
    assert found[0] == found[1] and loaded == ["vae"], "all texts were encoded before"
    encoder = opened[0].encoder
    dropped = encoder.prepare_form(opened[0].datasets["heldout"][0], Form(128, 128, no_text=True)).instruction
    assert (*guidance_texts(model.pipe, 4.0), dropped) == (("", "") if kind == "klein" else ("",))


def test_a_row_whose_reference_the_pipeline_refuses_is_broken(models, data, tmp_path):
    flux2.picture(40, 64).save(tmp_path / "small.png")
    row = {"input_images": [str(data / "1-0.png"), "small.png"], "output_image": str(data / "1-0.png"),
           "instruction": "x"}  # fmt: skip
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    encoder = Encoder(load_pipeline(str(models / "klein"), torch.float32, "cpu"), TensorCache(None))
    reason = "rows.jsonl:1: image 2: Image too small: 40×64.*at least 64px"
    (one,) = [Dataset([tmp_path / "rows.jsonl"])[0]]
    with pytest.raises(RowError, match=reason):
        encoder.prepare(one, (0, 0), 128, 128)
    assert not encoder.prepare_form(one, Form(128, 128, no_references=True)).sample.references
    with pytest.raises(ValueError, match=f"{reason}; repair or remove this held-out row"):
        Validation(
            [tmp_path / "rows.jsonl"], config(models, "klein"), SimpleNamespace(pipe=encoder.pipe), encoder, None
        )
