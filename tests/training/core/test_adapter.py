"""Kinds of adapters: they begin as nothing, have the gradients of diffusers' own forward, and are written for it."""

import contextlib
import dataclasses
from types import SimpleNamespace

import mesh_worker
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from uniref_fast import PackedQwenImage, builtin
from uniref_fast.adapters import Adapter, apply_adapters
from uniref_fast.cli import main
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.lora.file import read_lora
from uniref_fast.progress import running
from uniref_fast.runs import adapter_settings
from uniref_fast.training.core.adapter import NAMES, add_adapter, check_adapter, is_adapter, layer_parameters
from uniref_fast.training.core.distributed import Ranks, local
from uniref_fast.training.core.model import TrainedModel
from uniref_fast.training.core.recipe import BudgetStage
from uniref_fast.training.core.trainer import Trainer
from uniref_fast.training.supervised.recipes import SFT

pytestmark = pytest.mark.usefixtures("threads")
CONFIG = SFT((BudgetStage(32, 1, 1e-3, target_side=32),), model="builtin", dtype="float32", ema=0.9, lora_rank=4)
LAYOUT = SelfLayout.qwen([Sample(5, (1, 2, 3), ((1, 2, 2),)), Sample(3, (1, 2, 2))], zero_cond_t=True)
TARGETS = ("to_q", "to_out.0", "add_k_proj", "net.0.proj", "net.2", "proj_out")
CASES = [(((1, 3, 4), (1, 2, 2), (1, 2, 5)), 7), (((1, 2, 2),), 1)]  # target and references, tokens of text


@pytest.fixture(scope="module")
def ranks():
    yield Ranks.start()
    dist.destroy_process_group()


def moved(parameters):
    """Change every trained weight, as training does."""
    generator = torch.Generator().manual_seed(1)
    for parameter in parameters:
        values = local(parameter.detach())
        values += 0.05 * torch.randn(values.shape, generator=generator).to(values.dtype)


def predicted(packed):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(LAYOUT.image_length, 64, generator=generator)
    text = torch.randn(LAYOUT.text_length, 128, generator=generator)
    with torch.no_grad():
        return packed(image, text, torch.tensor([0.3, 0.8]), LAYOUT)


@pytest.mark.parametrize("rank", [4, 8])  # of LoKr's second matrix: a product, and whole
@pytest.mark.parametrize("kind", NAMES)
def test_gradients_are_those_of_the_stock_transformer(kind, rank):
    """A pack of two samples has the sum of the gradients that diffusers' own forward has for each of them."""
    model = mesh_worker.make_model().requires_grad_(False)
    add_adapter(model, rank, 6.0, TARGETS, kind)
    trained = {name: p for name, p in model.eval().named_parameters() if p.requires_grad}
    assert set(trained) == {name for name, _ in model.named_parameters() if is_adapter(name)}
    moved(trained.values())
    generator = torch.Generator().manual_seed(2)
    data = [(torch.randn(1, sum(h * w for _, h, w in grids), 64, generator=generator),
             torch.randn(1, text, 48, generator=generator), torch.rand(1, generator=generator))
            for grids, text in CASES]  # fmt: skip
    for (grids, _), (image, text, t) in zip(CASES, data, strict=True):
        arguments = {"hidden_states": image, "encoder_hidden_states": text, "timestep": t, "return_dict": False}
        (out,) = model(**arguments, img_shapes=[list(grids)])
        out[0, : grids[0][1] * grids[0][2]].square().sum().backward()
    expected = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained.items()}
    model.zero_grad()
    samples = [Sample(text, grids[0], tuple(grids[1:])) for grids, text in CASES]
    streams = (torch.cat([each[i][0] for each in data]) for i in (0, 1))
    layout = SelfLayout.qwen(samples, zero_cond_t=True)
    packed = PackedQwenImage(model, for_training=True, checkpointing=True)
    packed(*streams, torch.cat([t for *_, t in data]), layout).square().sum().backward()
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert any(p.grad is not None and p.grad.any() for n, p in trained.items() if "magnitude" in n or kind != "dora")
    for name, parameter in trained.items():
        if parameter.grad is None:  # the last block's text, which reaches no output
            assert not expected[name].any(), name
            continue
        error = (parameter.grad - expected[name]).abs().max()
        assert error < 1e-4 * max(expected[name].abs().max(), 1e-3 * largest), name


@pytest.mark.parametrize(
    "kind", ["dora", "lokr", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("lora", "rslora"))]
)
def test_an_adapter_begins_as_nothing_and_is_loaded_as_it_was_trained(ranks, tmp_path, kind):
    """diffusers alone, `--lora` and `--initial` of another run load it; the weights of that run are equal bits."""
    plain = predicted(PackedQwenImage(builtin.load(torch.float32).transformer))
    config = dataclasses.replace(CONFIG, adapter=kind, lora_alpha=6.0)
    model = TrainedModel(config, ranks)
    assert (predicted(model.packed) - plain).abs().max() < 1e-5
    assert not any(module.training for module in model.pipe.transformer.modules()), "a LoKr would draw random numbers"
    moved(model.parameters.values())
    expected = predicted(model.packed)
    assert (expected - plain).abs().max() > 0.01, "the adapter does something"
    model.export(tmp_path)
    pipe = builtin.load(torch.float32)
    load = pipe.transformer.load_lora_adapter if kind == "lokr" else pipe.load_lora_weights
    load(str(tmp_path / "lora"), adapter_name="x", use_safetensors=True)
    torch.testing.assert_close(predicted(PackedQwenImage(pipe.transformer)), expected, rtol=1e-5, atol=1e-5)
    pipe = builtin.load(torch.float32)
    apply_adapters(pipe, [Adapter.parse(str(tmp_path))], None, (), torch.float32)
    torch.testing.assert_close(predicted(PackedQwenImage(pipe.transformer)), expected, rtol=1e-5, atol=1e-5)
    assert adapter_settings(tmp_path) == (kind, 4, 6.0, tuple(sorted(config.lora_targets)))
    file = read_lora(next((tmp_path / "lora").iterdir()))
    assert file.kinds == {"lokr" if kind == "lokr" else "lora"} and file.dora == (kind == "dora")
    assert {layer.scale for layer in file.layers.values()} == {3.0 if kind == "rslora" else 1.5}
    again = TrainedModel(dataclasses.replace(config, initial=tmp_path), ranks)
    assert again.parameters.keys() == model.parameters.keys()
    assert all(torch.equal(local(again.parameters[n]), local(p)) for n, p in model.parameters.items())
    assert torch.equal(predicted(again.packed), expected)


def test_a_lokr_is_out_of_training_mode_after_a_validation(ranks):
    """A layer of LoKr in training mode would leave itself out at random."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = TrainedModel(dataclasses.replace(CONFIG, adapter="lokr", eval_every=1), ranks)
    validated = []
    trainer = SimpleNamespace(
        config=model.config, step=1, stage=0, model=model, prompt_samples=None, progress=running(shown=False),
        _enter_stage=lambda: None, _averaged=contextlib.nullcontext,
        validate=lambda figures, grid: validated.append((figures, model.packed.training)) or True,
    )  # fmt: skip
    Trainer._validate(trainer)
    layers = [module for module in model.pipe.transformer.modules() if isinstance(module, BaseTunerLayer)]
    assert layers and not any(module.training for layer in layers for module in layer.modules())
    assert validated == [(True, False)] and model.packed.training


def test_an_adapter_of_another_program_is_continued(ranks, tmp_path):
    """Convert its file into the folder of a run; the kind of the command has to be that of the file."""
    layer = "transformer_blocks.1.attn.to_k"
    flat = f"lora_unet_{layer.replace('.', '_')}"
    up = torch.randn(256, 4)
    save_file(
        {f"{flat}.lora_down.weight": torch.randn(4, 256), f"{flat}.lora_up.weight": up}, tmp_path / "a.safetensors"
    )
    run = tmp_path / "run"
    arguments = ["convert", str(tmp_path / "a.safetensors"), str(run / "lora" / "b.safetensors")]
    assert main(["lora", *arguments, "--to", "diffusers"]) == 0
    model = TrainedModel(dataclasses.replace(CONFIG, initial=run), ranks)
    assert {name.rpartition(".lora_")[0] for name in model.parameters} == {layer}
    assert torch.equal(local(model.parameters[f"{layer}.lora_B.default.weight"]), up)
    with pytest.raises(ValueError, match=r"the adapter of .* is a lora; give --adapter lora, or fuse it first"):
        TrainedModel(dataclasses.replace(CONFIG, initial=run, adapter="lokr"), ranks)


@pytest.mark.slow
def test_adapters_in_bfloat16_keep_their_own_weights_in_float32(ranks):
    for kind in ("dora", "lokr"):
        model = TrainedModel(dataclasses.replace(CONFIG, adapter=kind, dtype="bfloat16"), ranks)
        assert {p.dtype for p in model.parameters.values()} == {torch.float32}
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(LAYOUT.image_length, 64, generator=generator).bfloat16()
        text = torch.randn(LAYOUT.text_length, 128, generator=generator).bfloat16()
        model.packed(image, text, torch.tensor([0.3, 0.8]), LAYOUT).float().square().sum().backward()
        gradients = [p.grad for p in model.parameters.values() if p.grad is not None]
        assert gradients and all(local(g).isfinite().all() for g in gradients)


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("rank", [4, 12])
def test_numbers_of_parameters_are_those_of_peft(kind, rank):
    model = mesh_worker.make_model().requires_grad_(False)
    linears = {n: m.weight.shape for n, m in model.named_modules() if n.endswith(("to_q", "net.2", "img_mod.1"))}
    add_adapter(model, rank, 6.0, ("to_q", "net.2", "img_mod.1"), kind)
    expected = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(layer_parameters(kind, rank, *shape) for shape in linears.values()) == expected


def test_an_adapter_that_a_run_cannot_have_is_refused():
    for fields, message in (
        ({"adapter": "dora", "lora_rank": None}, "this run trains all weights; give --lora-rank"),
        ({"adapter": "dora", "base": "nf4"}, "adapter = dora needs the norms of the rows .*; base = nf4 is for lora"),
        ({"adapter": "lokr", "base": "int8"}, "adapter = lokr needs the shapes of the weights"),
    ):
        with pytest.raises(ValueError, match=message):
            check_adapter(dataclasses.replace(CONFIG, **fields))
    check_adapter(dataclasses.replace(CONFIG, adapter="rslora", base="nf4"))
    check_adapter(dataclasses.replace(CONFIG, adapter="dora", base="bf16"))
