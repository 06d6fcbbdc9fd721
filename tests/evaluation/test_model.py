"""The evaluated model: training runs, adapters, the untrained baseline."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from eval_records import images, results

from uniref_fast import builtin
from uniref_fast.evaluation import model as models
from uniref_fast.evaluation.evaluate import evaluate

pytestmark = pytest.mark.usefixtures("threads")


def test_a_run_of_another_model_is_refused(tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"model": "Qwen/Qwen-Image-Edit-2511"}))
    with pytest.raises(ValueError, match="trained on Qwen/Qwen-Image-Edit-2511, not on the built-in model; give --mod"):
        models.check_runs((tmp_path,), "builtin")
    models.check_runs((tmp_path,), "Qwen/Qwen-Image-Edit-2511")


def test_runs_are_applied_in_order(config, builtin_pipe, whole, tmp_path):
    """A transformer and an adapter that was trained on it both change the results."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    pipe = builtin.load()
    with torch.no_grad():
        pipe.transformer.proj_out.weight.mul_(-1)
    pipe.transformer.save_pretrained(tmp_path / "sft" / "transformer")
    pipe.transformer.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]))
    lora = get_peft_model_state_dict(pipe.transformer)
    type(pipe).save_lora_weights(str(tmp_path / "rl" / "lora"), transformer_lora_layers=lora)
    (tmp_path / "rl" / "config.json").write_text(json.dumps({"initial": str(tmp_path / "sft")}))

    sft, rl = tmp_path / "sft", tmp_path / "rl"
    with pytest.raises(ValueError, match=f"trained on top of {sft}/transformer; give --initial {sft} before it"):
        models.check_runs((rl,), "a/b")
    models.check_runs((sft, rl), "a/b")
    (tmp_path / "rl2" / "lora").mkdir(parents=True)
    (tmp_path / "rl2" / "config.json").write_text(json.dumps({"initial": str(rl)}))
    with pytest.raises(ValueError, match=r"continues that of .*leave .*rl out"):
        models.check_runs((sft, rl, tmp_path / "rl2"), "a/b")

    few = replace(config, data=config.data[:1], limit=1)
    evaluate(replace(few, out=tmp_path / "a", initial=(sft,)))
    evaluate(replace(few, out=tmp_path / "b", initial=(sft, rl)))
    first = Path("images/heldout_objects/0.png")
    assert len({images(out)[first] for out in (whole, tmp_path / "a", tmp_path / "b")}) == 3
    loaded = models.load("builtin", (sft, rl), False, "cpu", "float32").transformer
    expected = pipe.transformer.state_dict()
    ours = {name.replace(".run0.", ".default."): tensor for name, tensor in loaded.state_dict().items()}
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)

    for path in (rl / "lora").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"initial {rl} could not be loaded into the model builtin"):
        models.load("builtin", (sft, rl), False, "cpu", "float32")


def test_adapters_are_applied_by_path_and_scale(config, tmp_path):
    """An adapter has the effect of a run, is recorded, and its file may not change."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(0)
    pipe = builtin.load()
    pipe.transformer.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]))
    lora = get_peft_model_state_dict(pipe.transformer)
    type(pipe).save_lora_weights(str(tmp_path / "run" / "lora"), transformer_lora_layers=lora)
    few = replace(config, data=config.data[:1], limit=1)
    generated = {}
    for name, changes in (("initial", {"initial": (tmp_path / "run",)}), ("lora", {"lora": (f"{tmp_path / 'run'}:1",)}),
                          ("half", {"lora": (f"{tmp_path / 'run'}:0.5",)})):  # fmt: skip
        evaluate(replace(few, out=tmp_path / name, **changes))
        generated[name] = images(tmp_path / name)
    assert generated["initial"] == generated["lora"] != generated["half"]
    assert results(tmp_path / "half")["settings"]["lora"] == [f"{tmp_path / 'run'}:0.5"]
    (file,) = (tmp_path / "run" / "lora").iterdir()
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(ValueError, match="other settings: weights"):
        evaluate(replace(few, out=tmp_path / "half", lora=(f"{tmp_path / 'run'}:0.5",)))
    with pytest.raises(ValueError, match="leave out initial and lora"):
        replace(config, baseline="vae", lora=("x",))


def test_the_untrained_baseline_has_the_transformer_of_seed_0(builtin_pipe):
    """The autoencoder is that of the model, so that the bound is the same."""
    loaded = models.load("builtin", (), True, "cpu", "float32")
    expected = builtin.components.pipeline(0, torch.float32)
    expected.vae, expected.text_encoder = builtin_pipe.vae, builtin_pipe.text_encoder
    for name in ("transformer", "vae", "text_encoder"):
        ours, theirs = getattr(loaded, name).state_dict(), getattr(expected, name).state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert models.weights_digest(loaded) == models.weights_digest(expected)
    with torch.no_grad():
        next(expected.transformer.parameters()).add_(1)
    assert models.weights_digest(loaded) != models.weights_digest(expected)
