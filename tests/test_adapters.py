"""Adapters by path and scale, as `uniref-fast edit --lora` and `eval --lora` take them."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, QwenImageEditPlusPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

import uniref_fast
from uniref_fast import EditRequest, builtin
from uniref_fast.adapters import Adapter, adapter_visibility, apply_adapters, check_adapters, fuse_adapters
from uniref_fast.cli import main
from uniref_fast.loading import load_pipeline
from uniref_fast.training.core.base import LIBRARIES
from uniref_fast.training.core.frozen_base import quantise_base

pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder as a training run leaves it: an adapter that was trained under reference_causal."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    pipe = builtin.load()
    torch.manual_seed(0)
    pipe.transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_v"])
    )
    lora = get_peft_model_state_dict(pipe.transformer)
    type(pipe).save_lora_weights(str(folder / "lora"), transformer_lora_layers=lora)
    (folder / "config.json").write_text(json.dumps({"model": "builtin", "visibility": "reference_causal"}))
    return folder


def edited(adapters, pipe=None, **options):
    pipe = pipe or builtin.load()
    pipe.set_progress_bar_config(disable=True)
    apply_adapters(pipe, adapters, None, (), torch.float32)
    request = EditRequest("x", [Image.new("RGB", (64, 64), "red")], true_cfg_scale=1.0, seed=0, num_inference_steps=2)
    return uniref_fast.edit(pipe, [request], output_type="latent", progress=False, **options)[0]


def test_run_folder_and_file_are_one_adapter_and_the_scale_counts(run):
    (file,) = (run / "lora").iterdir()
    given = [
        Adapter.parse(text) for text in (str(run), f"{run}/lora", str(file), f"{file}:1.0", f"{run}:0.5", f"{run}:0")
    ]
    assert {one.file for one in given} == {file} and {one.run for one in given} == {run}
    assert [one.scale for one in given] == [1, 1, 1, 1, 0.5, 0]
    none, half, whole, zero = (edited([one] if one else []) for one in (None, given[4], given[0], given[5]))
    assert torch.allclose(zero, none, atol=1e-5)
    assert (whole - none).abs().max() > (half - none).abs().max() > 1e-3
    twice = edited([given[4], given[4]])
    assert torch.allclose(twice, whole, atol=1e-4), "two of half the scale are one whole"


def test_what_a_run_says_is_respected(run, tmp_path):
    assert adapter_visibility([Adapter.parse(str(run / "lora"))]) == "reference_causal"
    assert adapter_visibility([]) is None
    other = shutil.copytree(run, tmp_path / "other")
    (other / "config.json").write_text(json.dumps({"model": "a/b"}))
    with pytest.raises(ValueError, match="was trained on a/b, not on the built-in model; give --model a/b"):
        check_adapters([Adapter.parse(str(other))], "builtin")
    below = tmp_path / "below"
    pipe = builtin.load()
    with torch.no_grad():
        pipe.transformer.proj_out.weight.mul_(-1)
    pipe.transformer.save_pretrained(below / "transformer")
    (other / "config.json").write_text(json.dumps({"initial": str(below)}))
    adapter = Adapter.parse(str(other))
    assert check_adapters([adapter], "builtin") == below
    assert check_adapters([adapter], "builtin", [below]) is None
    with pytest.raises(ValueError, match=r"not of .*; only one transformer can be loaded"):
        check_adapters([adapter], "builtin", [run])
    fresh = builtin.load()
    apply_adapters(fresh, [adapter], below, (), torch.float32)
    assert torch.equal(fresh.transformer.proj_out.weight, pipe.transformer.proj_out.weight)


def test_what_is_no_adapter(run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full" / "transformer").mkdir(parents=True)
    (tmp_path / "note.txt").write_text("")
    for text, message in (
        (tmp_path / "gone", "no such file or folder"),
        (f"{tmp_path / 'gone'}:0.5", "no such file or folder"),
        (f"{run}:much", "scale after the colon must be a finite number, got 'much'"),
        (f"{run}:nan", "must be a finite number"),
        (tmp_path / "empty", "has no .safetensors file; give"),
        (tmp_path / "full", "it holds transformer/, which has all weights of a model"),
        (tmp_path / "note.txt", "an adapter is a .safetensors file, got note.txt"),
    ):
        with pytest.raises(ValueError, match=message):
            Adapter.parse(str(text))
    damaged, foreign = (tmp_path / name for name in ("damaged.safetensors", "foreign.safetensors"))
    damaged.write_bytes(b"x" * 20)
    save_file(
        {"unet.mid.to_q.lora_A.weight": torch.zeros(2, 4), "unet.mid.to_q.lora_B.weight": torch.zeros(4, 2)}, foreign
    )
    (file,) = (run / "lora").iterdir()
    deeper, tensors = tmp_path / "deeper.safetensors", load_file(file)
    tensors |= {
        key.replace("blocks.0.", "blocks.9."): value.clone() for key, value in tensors.items() if "blocks.0." in key
    }
    save_file(tensors, deeper)
    with pytest.raises(
        ValueError, match="4 of its 20 tensors belong to no layer of this model; it was trained for another"
    ):
        apply_adapters(builtin.load(), [Adapter.parse(str(deeper))], None, (), torch.float32)
    for path, message in (
        (damaged, "damaged.safetensors is truncated or not a safetensors file .*again"),
        (foreign, "foreign.safetensors"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_adapters(builtin.load(), [Adapter.parse(str(path))], None, (), torch.float32)


def test_the_command(run, tmp_path, capsys):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "in.png")
    args = ["edit", "--image", str(tmp_path / "in.png"), "--prompt", "x", "--num-inference-steps", "2"]
    outputs = {}
    for name, more in (
        ("plain", []),
        ("lora", ["--lora", str(run)]),
        ("causal", ["--lora", str(run), "--visibility", "reference_causal"]),
        ("full", ["--lora", f"{run}:1", "--visibility", "full"]),
    ):
        assert main([*args, *more, "--out", str(tmp_path / f"{name}.png")]) == 0
        outputs[name] = np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int)
    assert np.array_equal(outputs["lora"], outputs["causal"]), "it attends as the adapter was trained"
    assert not np.array_equal(outputs["lora"], outputs["full"])
    assert not np.array_equal(outputs["lora"], outputs["plain"])
    capsys.readouterr()
    assert main([*args, "--lora", str(tmp_path / "gone"), "--out", str(tmp_path / "x.png")]) == 2
    assert "--lora" in capsys.readouterr().err and not (tmp_path / "x.png").exists()


@pytest.fixture
def whole_run(tmp_path):
    """A folder as a run of all weights leaves it, trained under reference_causal."""
    folder = tmp_path / "whole"
    pipe = builtin.load()
    with torch.no_grad():
        pipe.transformer.proj_out.weight.mul_(0.5)
    pipe.transformer.save_pretrained(folder / "transformer")
    (folder / "config.json").write_text(json.dumps({"model": "builtin", "visibility": "reference_causal"}))
    return folder


@pytest.mark.parametrize("inside", ["", "/transformer"])
def test_edit_uses_a_run_of_all_weights(run, whole_run, tmp_path, capsys, inside):
    """The run's folder and its transformer/ are the same, and an adapter is added to them."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "in.png")
    args = ["edit", "--image", str(tmp_path / "in.png"), "--prompt", "x", "--num-inference-steps", "2"]
    results = {}
    for name, more in (
        ("plain", ["--visibility", "reference_causal"]),
        ("whole", ["--initial", f"{whole_run}{inside}"]),
        ("causal", ["--initial", str(whole_run), "--visibility", "reference_causal"]),
        ("both", ["--initial", f"{whole_run}{inside}", "--lora", str(run)]),
    ):
        assert main([*args, *more, "--out", str(tmp_path / f"{name}.png")]) == 0
        results[name] = np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int)
    assert np.array_equal(results["whole"], results["causal"]), "it attends as the run was trained"
    assert not np.array_equal(results["whole"], results["plain"])
    assert not np.array_equal(results["both"], results["whole"])
    assert "0%" in capsys.readouterr().err, "an edit shows its progress"


def test_errors_of_initial(run, whole_run, tmp_path, capsys):
    args = ["edit", "--prompt", "x", "--out", str(tmp_path / "x.png")]
    other = shutil.copytree(whole_run, tmp_path / "other")
    (other / "config.json").write_text(json.dumps({"model": "a/b"}))
    for given, message in (
        (tmp_path / "gone", "has neither lora/ nor transformer/; give the folder of a finished run"),
        (other, "was trained on a/b, not on the built-in model; give --model a/b"),
    ):
        assert main([*args, "--initial", str(given)]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "x.png").exists()


def test_an_adapter_of_another_model_is_one_line(tmp_path, capfd):
    """diffusers logs a line for each tensor; the error has the first one, with what to do."""
    wide = tmp_path / "wide.safetensors"
    name = "transformer.transformer_blocks.{}.attn.to_q.lora_{}.weight"
    save_file({name.format(i, part): torch.zeros(shape) for i in range(4)
               for part, shape in (("A", (4, 3072)), ("B", (3072, 4)))}, wide)  # fmt: skip
    status = main(["edit", "--prompt", "x", "--lora", str(wide), "--out", str(tmp_path / "x.png")])
    error = capfd.readouterr().err.splitlines()
    assert status == 2 and len(error) == 2 and error[1] == "Try 'uniref-fast edit --help'."
    assert "was trained for another model" in error[0] and "has the shape [4, 3072]" in error[0]
    assert "in this model it would be [4, 256]; give --model of the model that it was trained on" in error[0]
    from diffusers.utils import logging

    assert logging.get_verbosity() < logging.CRITICAL


def test_an_adapter_of_the_built_in_model_is_refused_before_another_model_is_loaded(run, tmp_path):
    with pytest.raises(ValueError, match="was trained on the built-in model, not on a/b; give --model builtin"):
        check_adapters([Adapter.parse(str(run))], "a/b")
    copy = builtin.build(tmp_path / "copy", seed=1)
    assert check_adapters([Adapter.parse(str(run))], str(copy)) is None


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_fused_model_edits_like_the_model_with_its_adapter(run, tmp_path, capsys, scale):
    out = tmp_path / "fused"
    assert main(["fuse", "builtin", "--lora", f"{run}:{scale}", "--out", str(out), "--dtype", "float32"]) == 0
    assert f"uniref-fast edit --model {out} --visibility reference_causal" in capsys.readouterr().out
    pipe = load_pipeline(str(out), torch.float32, "cpu")
    assert torch.allclose(edited([], pipe=pipe), edited([Adapter.parse(f"{run}:{scale}")]), atol=1e-4)
    stock = builtin.SmallQwenImageEditPlusPipeline.from_pretrained(str(out), use_safetensors=True)
    assert torch.equal(edited([], pipe=stock), edited([], pipe=pipe))
    capsys.readouterr()
    assert main(["fuse", "builtin", "--lora", str(run), "--out", str(out)]) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err


def test_fusing_computes_in_float32_and_rounds_once(run):
    pipe, exact = builtin.load(torch.bfloat16), builtin.load(torch.bfloat16)
    exact.transformer.float()
    fuse_adapters(pipe, [Adapter.parse(str(run))], None)
    fuse_adapters(exact, [Adapter.parse(str(run))], None)
    assert pipe.transformer.dtype == torch.bfloat16
    expected = exact.transformer.state_dict()
    for name, tensor in pipe.transformer.state_dict().items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_adapters_are_not_fused_into_quantised_weights(run, base):
    pytest.importorskip(LIBRARIES[base])
    pipe = builtin.load()
    quantise_base(pipe.transformer, base, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"quantised weights \(transformer_blocks.0.*16 or 32 bits"):
        fuse_adapters(pipe, [Adapter.parse(str(run))], None)


def test_a_fused_model_of_the_stock_class_is_loaded_by_diffusers(run, tmp_path):
    parts = builtin.load().components
    config = {name: value for name, value in parts["transformer"].config.items() if name != builtin.AREAS_KEY}
    transformer = type(parts["transformer"]).from_config(config)
    transformer.load_state_dict(parts["transformer"].state_dict())
    stock = QwenImageEditPlusPipeline(**{**parts, "transformer": transformer})
    stock.save_pretrained(tmp_path / "model")
    adapter = shutil.copy(next((run / "lora").iterdir()), tmp_path / "a.safetensors")  # of no run: of no known model
    arguments = ["--lora", str(adapter), "--out", str(tmp_path / "fused"), "--dtype", "float32"]
    assert main(["fuse", str(tmp_path / "model"), *arguments]) == 0
    fuse_adapters(stock, [Adapter.parse(str(adapter))], None)
    expected = stock.transformer.state_dict()
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "fused", processor=None)  # the built-in one is not diffusers'
    for pipe in (loaded, load_pipeline(str(tmp_path / "fused"), torch.float32, "cpu")):
        assert type(pipe) is QwenImageEditPlusPipeline and len(pipe.transformer.state_dict()) == len(expected)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in pipe.transformer.state_dict().items())


def test_a_lokr_of_another_program_for_flux2(tmp_path):
    """A file may have one layer for q, k and v, which diffusers then fuses in the model too."""
    import flux2

    shapes = {"double_blocks.0.img_attn.qkv": ((4, 4), (96, 32)), "single_blocks.0.linear2": ((4, 4), (32, 128))}
    tensors = {
        f"diffusion_model.{layer}.{part}": torch.randn(shape, generator=torch.Generator().manual_seed(1))
        for layer, sides in shapes.items()
        for part, shape in zip(("lokr_w1", "lokr_w2"), sides, strict=True)
    }
    tensors |= {f"diffusion_model.{layer}.alpha": torch.tensor(4.0) for layer in shapes}
    save_file(tensors, tmp_path / "lokr.safetensors")
    transformer = flux2.transformer("klein", heads=1, layers=1, single_layers=1)
    pipe = flux2.pipeline(transformer, "klein", distilled=True)
    request = {"prompt": "x", "images": [flux2.picture(64, 64)], "seed": 0, "num_inference_steps": 1}
    (before,) = uniref_fast.edit(pipe, [request], progress=False)
    apply_adapters(pipe, [Adapter.parse(str(tmp_path / "lokr.safetensors"))], None, (), torch.float32)
    (after,) = uniref_fast.edit(pipe, [request], progress=False)
    generator = torch.Generator().manual_seed(0)
    stock = pipe(prompt="x", image=request["images"], generator=generator, num_inference_steps=1).images[0]
    first, second, expected = (np.asarray(image, dtype=int) for image in (before, after, stock))
    assert abs(second - expected).max() <= 1 < abs(first - expected).max()
