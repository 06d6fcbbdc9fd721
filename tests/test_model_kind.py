"""Check of models of another kind: one check and one message for all functions that load them."""

import json
import shutil

import pytest
import torch
from diffusers import (
    Lumina2Pipeline,
    QwenImageEditInpaintPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

import uniref_fast
from uniref_fast import builtin
from uniref_fast.builtin.store import model_folder
from uniref_fast.cli import main
from uniref_fast.loading import load_pipeline
from uniref_fast.model_kind import check_configuration, check_pipeline
from uniref_fast.training import msgrpo, sft

FLUX = {"_class_name": "FluxTransformer2DModel", "in_channels": 64, "guidance_embeds": True}
FLUX_PART = ["diffusers", "FluxTransformer2DModel"]
KINDS = {  # changes of model_index.json and of transformer/config.json, and what the message says
    "inpainting": ({"_class_name": "QwenImageEditInpaintPipeline"}, {}, "first generation of Qwen-Image-Edit, for inp"),
    "text to image": ({"_class_name": "QwenImagePipeline"}, {}, "a text-to-image model, which takes no references"),
    "flux": ({"_class_name": "FluxPipeline", "transformer": FLUX_PART}, FLUX, "is a FluxPipeline, which is not"),
    "lumina": ({"_class_name": "Lumina2Pipeline", "transformer": None}, {}, "is a Lumina2Pipeline, which is not"),
    "no transformer": ({"_class_name": "StableDiffusionXLPipeline", "transformer": None}, {}, "StableDiffusionXL"),
    "another transformer": ({"transformer": FLUX_PART}, FLUX, "of the class FluxTransformer2DModel, not"),
    "another file": ({}, {"_class_name": "QwenImage21Transformer2DModel"}, "the class QwenImage21Transformer2DModel"),
    "layers": ({}, {"use_layer3d_rope": True, "use_additional_t_cond": True}, "use_additional_t_cond = True"),
    "guidance": ({}, {"guidance_embeds": True}, "guidance_embeds = True, which is not supported (it must be False)"),
    "patches": ({}, {"patch_size": 1}, "patch_size = 1"),
    "rotary": ({}, {"axes_dims_rope": [8, 28]}, "rotary axes (8, 28)"),
}  # fmt: skip


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Folders whose configurations are those of a model of another kind."""
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = path = tmp_path_factory.mktemp("models") / kind.replace(" ", "-")
            shutil.copytree(model_folder(), path)
            for name, changes in zip(("model_index.json", "transformer/config.json"), KINDS[kind][:2], strict=True):
                content = json.loads((path / name).read_text()) | changes
                content.pop("_image_areas", None)
                for area in ("condition_image_area", "vae_image_area", "output_area"):
                    content.pop(area, None)
                if content.get("_class_name") == "SmallQwenImageEditPlusPipeline":
                    content["_class_name"] = "QwenImageEditPlusPipeline"
                (path / name).write_text(json.dumps(content))
        return made[kind]

    return folder


def commands(folder, tmp_path, *more):
    rows = tmp_path / "rows.jsonl"
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    rows.write_text(json.dumps({"instruction": "x", "input_images": ["a.png"], "output_image": "a.png"}) + "\n")
    model, out = f"--model={folder}", tmp_path / "out"
    data = ["--recipe=tiny", f"--data={rows}", model]
    return {
        "edit": lambda: main(["edit", "--prompt", "x", model, "--out", str(tmp_path / "x.png")]),
        "estimate": lambda: main(["estimate", "--prompt", "x", model]),
        "eval": lambda: main(["eval", str(rows), model, "--out", str(out / "eval"), *more]),
        "sft": lambda: sft.main([*data, f"--out={out / 'sft'}", *more]),
        "msgrpo": lambda: msgrpo.main([*data, f"--out={out / 'rl'}", "--rewards=scene"]),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_another_kind_is_refused_before_its_weights_are_read(make, kind, monkeypatch):
    folder, says = make(kind), KINDS[kind][2]
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(ValueError) as loaded:
        load_pipeline(str(folder), torch.float32, "cpu")
    with pytest.raises(ValueError) as estimated:
        uniref_fast.estimate(folder, [{"prompt": "x"}])
    for error in (loaded, estimated):
        message = str(error.value)
        assert says in message and str(folder) in message and "\n" not in message
        assert (
            f"use {'black-forest-labs/FLUX.1-Kontext-dev' if kind == 'flux' else 'Qwen/Qwen-Image-Edit-2511'}"
            in message
        )
    assert str(loaded.value) == f"--model {estimated.value}"


@pytest.mark.parametrize("command", ["edit", "estimate", "eval", "sft", "msgrpo"])
@pytest.mark.parametrize("kind", ["text to image", "lumina"])
def test_every_command_gives_that_message(make, kind, command, tmp_path, capsys):
    folder = make(kind)
    assert commands(folder, tmp_path)[command]() == 2
    captured = capsys.readouterr()
    assert KINDS[kind][2] in captured.err and str(folder) in captured.err and "Traceback" not in captured.err
    assert ("patch(pipe) accelerates this one" in captured.err) == (kind != "lumina")


def other_runs(tmp_path, builtin_pipe):
    """Exports of runs on models of other shapes or kinds, with what the message says."""
    config = dict(builtin_pipe.transformer.config)
    flux, narrow, adapter = (tmp_path / name for name in ("flux", "narrow", "adapter"))
    (flux / "transformer").mkdir(parents=True)
    (flux / "transformer" / "config.json").write_text(json.dumps(FLUX))
    small = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)}
    other = QwenImageTransformer2DModel.from_config(config | small | {"joint_attention_dim": 48})
    other.save_pretrained(narrow / "transformer")
    other.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    QwenImageEditPlusPipeline.save_lora_weights(adapter / "lora", get_peft_model_state_dict(other))
    return {
        flux: "FluxTransformer2DModel, not",
        narrow: "joint_attention_dim = 48, but",
        adapter: "could not be loaded into the model builtin",
    }


def test_runs_on_models_of_another_kind(tmp_path, builtin_pipe, capsys):
    for run, says in other_runs(tmp_path, builtin_pipe).items():
        for name in ("sft", "eval"):
            command = commands("builtin", tmp_path, f"--initial={run}", *["--lora-rank=4"] * (name == "sft"))[name]
            assert command() == 2
            captured = capsys.readouterr().err
            (line,) = [line for line in captured.splitlines() if says in line]
            assert str(run) in line and "Traceback" not in captured, captured


@pytest.mark.parametrize("kind", [QwenImageEditInpaintPipeline, QwenImagePipeline, Lumina2Pipeline])
def test_loaded_pipelines_of_another_kind(builtin_pipe, kind):
    pipe = kind.__new__(kind)
    for call in (uniref_fast.edit, uniref_fast.estimate):
        with pytest.raises(TypeError, match=f"^{kind.__name__} is not supported.*use Qwen/Qwen-Image-Edit-2511"):
            call(pipe, [{"prompt": "x"}])


def test_the_supported_kinds_pass(builtin_pipe):
    of_2511 = {"_class_name": "QwenImageTransformer2DModel", "zero_cond_t": True, "num_layers": 60}
    for name in ("QwenImageEditPlusPipeline", "SmallQwenImageEditPlusPipeline"):
        index = {"_class_name": name, "transformer": ["diffusers", "QwenImageTransformer2DModel"]}
        for transformer in (None, {}, of_2511):
            check_configuration("x", index, transformer)
    check_pipeline(builtin_pipe)


@pytest.mark.parametrize(
    "part, option, value, says",
    [
        (
            "transformer",
            "in_channels",
            32,
            "in_channels = 32, but its VAE gives 64 channels; the two belong to different models",
        ),
        ("transformer", "joint_attention_dim", 64, "joint_attention_dim = 64, but its text encoder gives 128"),
        ("transformer", "use_layer3d_rope", True, "use_layer3d_rope = True"),
    ],
)
def test_parts_of_different_models(part, option, value, says):
    pipe = builtin.load()
    getattr(pipe, part).register_to_config(**{option: value})
    with pytest.raises(ValueError, match=says):
        check_pipeline(pipe)
