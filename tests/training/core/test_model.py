"""The trained model: sharded, with adapters or whole, written for diffusers; and the held-out loss. One rank."""

import dataclasses
import json
import resource
import shutil

import pytest
import torch
import torch.distributed as dist
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import load_file
from synthetic import synthetic_sample
from torch._dynamo.testing import CompileCounterWithBackend

from uniref_fast import builtin
from uniref_fast.evaluation.model import check_runs
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.models import PackedQwenImage
from uniref_fast.run_plan import PlanOptions, make_plan
from uniref_fast.runs import base_run
from uniref_fast.training.batches.latent_cache import TensorCache
from uniref_fast.training.batches.samples import Encoder
from uniref_fast.training.core import model as trained_models
from uniref_fast.training.core import sampling
from uniref_fast.training.core.base import LIBRARIES, base_bytes
from uniref_fast.training.core.distributed import Ranks, local
from uniref_fast.training.core.ema import MovingAverage
from uniref_fast.training.core.export import ExportError
from uniref_fast.training.core.frozen_base import FrozenLinear
from uniref_fast.training.core.memory import activation_bytes
from uniref_fast.training.core.model import TrainedModel
from uniref_fast.training.core.recipe import BudgetStage
from uniref_fast.training.supervised.recipes import SFT
from uniref_fast.training.supervised.validation import Validation

pytestmark = pytest.mark.usefixtures("threads")
CONFIG = SFT((BudgetStage(32, 1, 1e-3, target_side=32),), model="builtin", dtype="float32", ema=0.9, eval_samples=3)
LAYOUT = SelfLayout.qwen([Sample(5, (1, 2, 3), ((1, 2, 2),)), Sample(3, (1, 2, 2))], zero_cond_t=True)


@pytest.fixture(scope="module")
def ranks():
    yield Ranks.start()
    dist.destroy_process_group()


@pytest.fixture
def trained(ranks):
    """Makes models; those with `moved` have had every trained weight changed, as by training."""

    def build(moved=True, **fields):
        model = TrainedModel(dataclasses.replace(CONFIG, **fields), ranks)
        model.packed.eval()
        if moved:
            generator = torch.Generator().manual_seed(1)
            for parameter in model.parameters.values():
                values = local(parameter.detach())
                values += 0.05 * torch.randn(values.shape, generator=generator).to(values.dtype)
        return model

    return build


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(LAYOUT.image_length, 64, generator=generator)
    text = torch.randn(LAYOUT.text_length, 128, generator=generator)
    return image.to(dtype), text.to(dtype), torch.tensor([0.3, 0.8]), LAYOUT


def predicted(packed, dtype=torch.float32):
    with torch.no_grad():
        return packed(*inputs(dtype))


@pytest.fixture
def untrained(threads):
    """Return the predictions before training; another number of threads would round differently."""
    return predicted(PackedQwenImage(builtin.load(torch.float32).transformer, for_training=True))


# ---- running ----


def test_sharding_changes_no_bit_in_either_dtype(trained, untrained):
    assert torch.equal(predicted(trained(moved=False).packed), untrained)
    model = trained(moved=False, dtype="bfloat16")
    assert {p.dtype for p in model.parameters.values()} == {torch.float32}, "master weights"
    expected = predicted(PackedQwenImage(builtin.load(torch.bfloat16).transformer, for_training=True), torch.bfloat16)
    assert torch.equal(predicted(model.packed, torch.bfloat16), expected)


def test_a_step_after_a_validation_uses_its_own_weights(trained):
    """The outermost part of a sharded model, too, must drop the averaged weights."""
    model = trained()
    average = MovingAverage(model.parameters, 0.9)
    for values in average.average.values():
        local(values).mul_(0.5)
    before = model.packed(*inputs())
    before.square().sum().backward()
    with average.applied():
        averaged = predicted(model.packed)
    after = model.packed(*inputs())
    assert torch.equal(after, before) and not torch.equal(averaged, before.detach())
    whole = builtin.load(torch.float32).transformer
    whole.load_state_dict({name: values.full_tensor() for name, values in average.average.items()})
    assert torch.equal(predicted(PackedQwenImage(whole, for_training=True)), averaged)


def test_only_what_is_trained_gets_gradients(trained):
    model = trained(lora_rank=2, dtype="bfloat16")
    model.packed(*inputs(torch.bfloat16)).float().square().sum().backward()
    unused = ("transformer_blocks.3.attn.to_add_out.", "transformer_blocks.3.txt_mlp.")  # the last block's text
    for name, parameter in model.pipe.transformer.named_parameters():
        assert ("lora" in name) == (name in model.parameters)
        assert (parameter.grad is not None) == ("lora" in name and not name.startswith(unused))
        assert parameter.dtype == (torch.float32 if "lora" in name else torch.bfloat16)
        if parameter.grad is not None:
            assert parameter.grad.dtype == torch.float32 and local(parameter.grad).isfinite().all()
    for part in (model.pipe.vae, model.pipe.text_encoder):
        assert not any(parameter.requires_grad for parameter in part.parameters())


def test_adapters_begin_as_nothing_and_the_same_everywhere(trained, untrained):
    first, second = trained(moved=False, lora_rank=2), trained(moved=False, lora_rank=2)
    assert torch.equal(predicted(first.packed), untrained)
    assert all(torch.equal(local(first.parameters[n]), local(second.parameters[n])) for n in first.parameters)
    assert any(local(parameter).any() for parameter in first.parameters.values())


def test_targets_that_are_not_there(trained):
    with pytest.raises(ValueError, match=r"lora_targets \['to_query'\]: .*to_query.*not found"):
        trained(lora_rank=2, lora_targets=("to_query",))


def test_bytes(trained):
    model = trained()
    numbers = sum(p.numel() for p in model.pipe.transformer.parameters())
    assert model.sharded_bytes() == numbers * 4 * 5, "weight, gradient, two moments and the average"
    model = trained(lora_rank=2, ema=None, dtype="bfloat16")
    few = sum(p.numel() for p in model.parameters.values())
    frozen = sum(p.numel() for n, p in model.pipe.transformer.named_parameters() if n not in model.parameters)
    assert model.sharded_bytes() == frozen * 2 + few * 4 * 4 and 0 < few < frozen / 20
    encoders = (model.pipe.vae, model.pipe.text_encoder)
    assert model.fixed_bytes() == sum(p.numel() * 2 for part in encoders for p in part.parameters())


@pytest.mark.parametrize("away", [0, 3])
def test_bytes_of_a_quantised_base_with_blocks_on_the_host(trained, away):
    """Every rank has the quantised weights of the blocks on its device, two of those on the host included."""
    pytest.importorskip("torchao")
    model, plain = (trained(lora_rank=2, base=base, offload_blocks=n) for base, n in (("int8", away), (None, 0)))
    linears = [layer for layer in model.packed.blocks[0].block.modules() if isinstance(layer, FrozenLinear)]
    block = sum(base_bytes("int8", *layer.weight.shape, 4) for layer in linears)
    layers = len(model.packed.blocks)
    assert model.fixed_bytes() - plain.fixed_bytes() == (layers - away + min(away, 2)) * block
    numbers = sum(layer.weight.numel() for layer in linears)
    assert plain.sharded_bytes() - model.sharded_bytes() == layers * numbers * 4


# ---- written for diffusers ----


@pytest.mark.parametrize("alpha", [8.0, 1.0])
def test_an_adapter_loads_into_a_fresh_pipeline_and_predicts_the_same(trained, untrained, tmp_path, alpha):
    """The scale, alpha / rank, is kept too, although it is not in the weights."""
    model = trained(lora_rank=4, lora_alpha=alpha)
    model.export(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]
    pipe = builtin.load(torch.float32)
    pipe.load_lora_weights(tmp_path / "lora")
    out, expected = predicted(PackedQwenImage(pipe.transformer)), predicted(model.packed)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert (expected - untrained).abs().max() > 0.01, "the adapter does something"
    (loaded,) = pipe.transformer.peft_config.values()
    assert (loaded.r, loaded.lora_alpha) == (4, alpha)
    loaded = {n: p for n, p in pipe.transformer.named_parameters() if "lora" in n}
    assert len(loaded) == len(model.parameters) > 0, "every adapter"


def test_all_weights_load_as_a_transformer_and_predict_the_same(trained, untrained, tmp_path):
    model = trained()
    model.export(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["transformer"]
    loaded = QwenImageTransformer2DModel.from_pretrained(tmp_path / "transformer", use_safetensors=True)
    expected = predicted(model.packed)
    assert torch.equal(predicted(PackedQwenImage(loaded, for_training=True)), expected) and not torch.equal(
        expected, untrained
    )
    saved = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == model.parameters.keys()
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "QwenImageTransformer2DModel" and config["zero_cond_t"] is True


def test_all_weights_are_written_in_the_dtype_of_the_computation(trained, tmp_path):
    trained(dtype="bfloat16").export(tmp_path)
    saved = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


PACKS = [
    [Sample(5, (1, 2, 3), ((1, 2, 2),)), Sample(3, (1, 2, 2))],
    [Sample(9, (1, 4, 4), ((1, 2, 2), (1, 3, 2)))],
    [Sample(4, (1, 2, 2)), Sample(7, (1, 3, 3)), Sample(6, (1, 2, 4), ((1, 2, 2),))],
    [Sample(16, (1, 6, 4), ((1, 5, 2), (1, 3, 2)))],
    [Sample(8, (1, 3, 5)), Sample(2, (1, 4, 2), ((1, 2, 2),))],
]


def outcome(model, checkpointing):
    """Velocities of every pack with and without gradients, and the gradient of all."""
    model.packed.checkpointing = checkpointing
    dtype, made = getattr(torch, model.config.dtype), []
    for number, samples in enumerate(PACKS):
        layout, generator = SelfLayout.qwen(samples, zero_cond_t=True), torch.Generator().manual_seed(number)
        image = torch.randn(layout.image_length, 64, generator=generator).to(dtype)
        text = torch.randn(layout.text_length, 128, generator=generator).to(dtype)
        given = image, text, torch.linspace(0.2, 0.8, len(samples)), layout
        velocity = model.packed(*given)
        velocity.float().square().mean().backward()
        with torch.no_grad():
            assert torch.equal(model.packed(*given), velocity), "rollouts and their replay"
        made.append(velocity.detach())
    gradients = {name: p.grad for name, p in model.parameters.items() if p.grad is not None}
    return made, {name: local(gradient) for name, gradient in gradients.items()}


def distance(first, second):
    return ((first.double() - second.double()).norm() / second.double().norm().clamp_min(1e-12)).item()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "rank", "checkpointing"),
    [
        ("aot_eager", 4, True),
        ("inductor", None, False),
    ],
)
def test_compiled_blocks_share_few_graphs_and_compute_the_same(trained, monkeypatch, backend, rank, checkpointing):
    """However many blocks and packs there are; in float32, with gradients."""
    compiled, counter = [], CompileCounterWithBackend(backend)
    compile = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **more: (compiled.append(self), compile(self, backend=counter, **more))
    )
    torch._dynamo.reset()
    expected, gradients = outcome(trained(lora_rank=rank), checkpointing)
    assert not compiled
    model = trained(lora_rank=rank, compile=True)
    first, _ = outcome(model, checkpointing)
    blocks, graphs = len(model.packed.blocks), counter.frame_count
    assert blocks >= 3 and 2 * blocks <= len(compiled) and 1 <= graphs <= 12
    for parameter in model.parameters.values():
        parameter.grad = None
    again, found = outcome(model, checkpointing)
    assert counter.frame_count == graphs and all(map(torch.equal, first, again))
    assert max(map(distance, first, expected)) < 1e-5
    assert found.keys() == gradients.keys()
    assert max(distance(found[name], gradient) for name, gradient in gradients.items()) < 1e-4
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "rank"), [("lora", 4), ("transformer", None)])
def test_a_full_disk_leaves_the_older_export(trained, tmp_path, name, rank):
    """A limit on the size of files stands for it: the errors are those of the libraries that write."""
    model = trained(lora_rank=rank)
    model.export(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        with pytest.raises(ExportError, match=f"could not be written to .*{name}: .*File too large"):
            model.export(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_average_is_exported_while_it_is_applied(trained, tmp_path):
    model = trained()
    average = MovingAverage(model.parameters, 0.9)
    for values in average.average.values():
        local(values).mul_(0.5)
    with average.applied():
        model.export(tmp_path)
    saved = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[name], values.full_tensor()) for name, values in average.average.items())


@pytest.mark.parametrize("fields", [{}, {"lora_rank": 2}])
def test_an_export_replaces_the_older_one_or_leaves_it(trained, tmp_path, monkeypatch, fields):
    model = trained(**fields)
    model.export(tmp_path)
    (folder,) = tmp_path.iterdir()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for parameter in model.parameters.values():
        local(parameter.detach()).mul_(2)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(trained_models, "write_weights", full)
        with pytest.raises(ExportError, match="No space left"):
            model.export(tmp_path)
    assert list(tmp_path.iterdir()) == [folder]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    model.export(tmp_path)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert list(tmp_path.iterdir()) == [folder] and after.keys() == before.keys() and after != before


# ---- the held-out loss ----


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heldout")
    lines = []
    for i in range(5):
        scene = synthetic_sample(i, size=64, references=1 + i % 2)
        names = [f"{i}-{j}.png" for j in range(len(scene.references) + 1)]
        for name, image in zip(names, [*scene.references, scene.target], strict=True):
            image.save(folder / name)
        row = {"input_images": names[:-1], "output_image": names[-1], "instruction": scene.instruction}
        lines.append(json.dumps(row) + "\n")
    (folder / "objects.jsonl").write_text("".join(lines))
    (folder / "more.jsonl").write_text("".join(lines[:2]))
    return folder


def held_out(model, ranks, files, **fields):
    config = dataclasses.replace(CONFIG, **fields)
    return Validation(files, config, model, Encoder(model.pipe, TensorCache(None)), ranks)


def test_the_held_out_loss_depends_on_the_weights_alone(trained, ranks, rows):
    model = trained()
    files = [rows / "objects.jsonl", rows / "more.jsonl"]
    heldout = held_out(model, ranks, files)
    first = heldout.losses(4096)
    assert set(first) == {"objects", "more"} and all(0 < loss < 100 for loss in first.values())
    torch.manual_seed(99)
    assert heldout.losses(4096) == first, "the same rows, times and noise"
    fresh = held_out(model, ranks, files).losses(1)
    assert fresh == pytest.approx(first, rel=1e-5), "however it is packed: here each row alone"
    assert held_out(model, ranks, files[:1], eval_samples=2).losses(4096)["objects"] != first["objects"]
    for parameter in model.parameters.values():
        local(parameter.detach()).mul_(1.01)
    assert heldout.losses(4096) != first


def test_validations_have_the_sizes_of_the_last_stage_in_every_stage(trained, ranks, rows):
    model, files = trained(), [rows / "objects.jsonl"]
    small, large = CONFIG.stages[0], dataclasses.replace(CONFIG.stages[0], budget=96, target_side=48)
    wanted = {"stages": (small, large), "sample_count": 2, "sample_num_inference_steps": 2}
    grown = held_out(model, ranks, files, **wanted)
    last = held_out(model, ranks, files, **{**wanted, "stages": (large,)})
    assert grown.losses(4096) == last.losses(4096) != held_out(model, ranks, files, stages=(small,)).losses(4096)
    assert {sample.image.size for sample in grown.samples(4096)} == {(48, 48)}
    assert [one.psnr for one in grown.samples(4096)] == [one.psnr for one in last.samples(10)], "however it is packed"
    first = held_out(model, ranks, files, **{**wanted, "stages": (large, small)}).samples(4096)
    assert {sample.image.size for sample in first} == {(32, 32)}
    assert "num_inference_steps 2, true_cfg_scale 1, budget 96, size 48x48" in grown.settings_text(grown.samples(4096))


def test_the_grid_shows_the_settings_of_its_samples(trained, ranks, rows, monkeypatch):
    shown = {}
    monkeypatch.setattr(sampling, "contact_sheet", lambda lines, **texts: shown.update(texts, lines=lines))
    stages = (dataclasses.replace(CONFIG.stages[0], budget=None),)
    heldout = held_out(trained(), ranks, [rows / "more.jsonl"], stages=stages, sample_count=1)
    samples = heldout.samples(4096)
    heldout.grid(samples)
    assert shown["heading"] == (
        "num_inference_steps 8, true_cfg_scale 1, budget none (references as in diffusers), size 32x32"
    )
    assert shown["lines"][0][0][0] == f"1. result {samples[0].psnr:.1f} dB" and shown["lines"][0][1][0] == "more"


def test_files_of_one_name_or_no_rows_are_refused(trained, ranks, rows, tmp_path):
    model = trained(moved=False)
    shutil.copy(rows / "more.jsonl", tmp_path / "more.jsonl")
    with pytest.raises(ValueError, match=r"two files of held-out rows are called more, one is .*; rename one"):
        held_out(model, ranks, [rows / "more.jsonl", tmp_path / "more.jsonl"])
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"none\.jsonl"):
        held_out(model, ranks, [tmp_path / "none.jsonl"])


def test_an_adapter_comes_with_the_weights_that_it_was_trained_on(trained, tmp_path):
    """SFT of all weights, then an adapter on top, then a third run that names only the second one."""
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    trained().export(first)
    model = trained(initial=first, lora_rank=2)
    model.export(second)
    (second / "config.json").write_text(json.dumps({"initial": str(first)}))
    expected = predicted(model.packed)
    assert torch.equal(predicted(trained(moved=False, initial=second, lora_rank=2).packed), expected)
    again = trained(moved=False, initial=second, lora_rank=2)
    again.export(third)
    (third / "config.json").write_text(json.dumps({"initial": str(second)}))
    assert torch.equal(predicted(trained(moved=False, initial=third, lora_rank=2).packed), expected)
    with pytest.raises(ValueError, match=f"on top of {first}/transformer; give --initial {first} before it"):
        check_runs((third,), "builtin")
    check_runs((first, third), "builtin")
    (third / "config.json").write_text(json.dumps({"initial": str(third)}))
    assert base_run(third) is None, "a run that names itself as its initial run ends the search"
    shutil.rmtree(first)
    with pytest.raises(ValueError, match=f"{second} was trained on top of {first}, which does not exist"):
        trained(moved=False, initial=second, lora_rank=2)


def test_an_adapter_is_gone_on_with_unrounded_and_as_it_is(trained, tmp_path, capsys):
    model = trained(lora_rank=2, lora_alpha=3.0, dtype="bfloat16")
    model.export(tmp_path)
    again = trained(moved=False, initial=tmp_path, lora_rank=2, lora_alpha=7.0, dtype="bfloat16")
    assert "keeps its lora_alpha = 3" in capsys.readouterr().err
    assert {p.dtype for p in again.parameters.values()} == {torch.float32}
    assert again.parameters.keys() == model.parameters.keys()
    for name, parameter in model.parameters.items():
        assert torch.equal(local(again.parameters[name]), local(parameter)), name
    assert torch.equal(predicted(again.packed, torch.bfloat16), predicted(model.packed, torch.bfloat16))


@pytest.mark.parametrize(
    "fields",
    [{}, {"ema": None}, {"lora_rank": 4}, {"lora_rank": 4, "dtype": "bfloat16"}, {"dtype": "bfloat16"}],
    ids=lambda fields: " ".join(fields) or "default",
)
def test_a_plan_counts_the_bytes_that_the_model_holds(trained, fields):
    """`uniref-fast plan` computes them from the configuration alone."""
    from uniref_fast.run_plan import PlanOptions, make_plan

    model = trained(moved=False, **fields)
    plan = make_plan("sft", "test", dataclasses.replace(CONFIG, **fields), PlanOptions())
    held = dict(plan.held)
    assert held.pop("encoders") == model.fixed_bytes()
    assert sum(held.values()) == model.sharded_bytes()


@pytest.mark.parametrize(
    ("base", "offload_blocks", "rank"),
    [(None, 0, None), (None, 0, 4), (None, 2, 4), (None, 4, 4), ("bf16", 1, 4), ("int8", 0, 4), ("nf4", 2, 4)],
)
def test_a_plan_counts_the_bytes_of_the_model(trained, base, offload_blocks, rank):
    """`uniref-fast plan` knows the sizes from configurations; the trainer plans with those of its model."""
    if base in LIBRARIES:
        pytest.importorskip(LIBRARIES[base])
    model = trained(base=base, offload_blocks=offload_blocks, lora_rank=rank)
    stage = dataclasses.replace(model.config.stages[0], pack_tokens=10**6, checkpointing="host")
    config = dataclasses.replace(model.config, stages=(stage,), visibility="full")
    plan = make_plan("sft", "tiny", config, PlanOptions(gpu_memory=1000))
    assert sum(plan.held.values()) == pytest.approx(model.fixed_bytes() + model.sharded_bytes(), rel=1e-4)
    activations = activation_bytes(plan.size, 10**6, "host", 4)
    gathered = plan.stages[0].plan.bytes_needed - sum(plan.held.values()) - activations
    assert gathered == pytest.approx(model.gathered_bytes(), rel=1e-3)
    assert model.gathered_bytes() > 4 * plan.size.block * (rank is None)
