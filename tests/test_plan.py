"""`uniref-fast plan`: sizes of the models, memory of the trainers, rows of the loader, and its messages."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from uniref_fast import speeds
from uniref_fast.cli import main
from uniref_fast.run_plan import PlanOptions, _settings, make_plan
from uniref_fast.training.core import recipe
from uniref_fast.training.core.known_models import KNOWN
from uniref_fast.training.core.model_size import ModelSize, model_size
from uniref_fast.training.supervised.recipes import SFT_RECIPES

ROOT = Path(__file__).parent.parent
TARGETS = SFT_RECIPES["lora"]().lora_targets


def run(capsys, *args):
    status = main(["plan", *map(str, args)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def planned(capsys, *args):
    return json.loads(run(capsys, *args, "--json")[1])


@pytest.fixture
def rows(tmp_path):
    """Thirty rows of one or two references and a target, of several sizes."""
    lines = []
    for i in range(30):
        sizes = {"a": (60 + i, 40), "b": (30, 50 + i), "out": (64, 48 + i)}
        for name, size in sizes.items():
            Image.new("RGB", size, (8 * i, 0, 0)).save(tmp_path / f"{name}{i}.png")
        references = [f"a{i}.png", f"b{i}.png"][: 1 + i % 2]
        lines.append({"instruction": "put the owl of picture 1 left", "input_images": references,
                      "output_image": f"out{i}.png"})  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "rows.jsonl"


# ---- sizes ----


def parameters(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def test_sizes_of_the_built_in_model_are_those_of_its_weights(builtin_pipe):
    size = model_size("builtin")
    assert size.transformer == parameters(builtin_pipe.transformer)
    assert size.encoders == parameters(builtin_pipe.text_encoder, builtin_pipe.vae)
    assert size.token_side == builtin_pipe.vae_scale_factor * 2 and size.output_side == 64 and size.small


@pytest.mark.parametrize("targets", [TARGETS, ("to_q", "img_mod.1"), ("proj_out", "net.2")])
def test_an_adapter_has_the_parameters_that_peft_adds(targets):
    from diffusers import QwenImageTransformer2DModel

    from uniref_fast.training.core.adapter import add_adapter

    with torch.device("meta"):
        model = QwenImageTransformer2DModel(num_layers=2, num_attention_heads=3, attention_head_dim=128)
        add_adapter(model, 4, 4.0, targets)
        other = QwenImageTransformer2DModel(num_layers=2, num_attention_heads=3, attention_head_dim=128)
        add_adapter(other, 300, 4.0, targets, "lokr")
    added = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert ModelSize(num_layers=2, num_attention_heads=3).adapter(4, targets) == added
    added = sum(p.numel() for name, p in other.named_parameters() if "lokr_" in name)
    assert ModelSize(num_layers=2, num_attention_heads=3).adapter(300, targets, "lokr") == added, "of any rank"
    with pytest.raises(ValueError, match="no Linear layer of the transformer"):
        ModelSize().adapter(4, ("to_qq",))


def language(width, hidden, layers, heads, kv_heads, words, **more):
    return {"hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers, "vocab_size": words,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, **more}  # fmt: skip


def qwen2_5_vl():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = language(3584, 18944, 28, 28, 4, 152064)
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def qwen3_vl_8b():
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096}
    text = language(4096, 12288, 36, 32, 8, 151936, head_dim=128)
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision))


def qwen3(width, hidden, tied):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    given = language(width, hidden, 36, 32, 8, 151936, head_dim=128, tie_word_embeddings=tied)
    return Qwen3ForCausalLM(Qwen3Config(**given))


def mistral_24b():
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, MistralConfig, PixtralVisionConfig

    text = MistralConfig(**language(5120, 32768, 40, 32, 8, 131072, head_dim=128))
    vision = PixtralVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    )
    config = Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return Mistral3ForConditionalGeneration(config)


KLEIN_4B = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
KLEIN_9B = {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288}
RELEASED = {
    "Qwen-Image-Edit-(2509|2511)": ("QwenImage", {"out_channels": 16, "zero_cond_t": True}, qwen2_5_vl),
    "Qwen-Image-2.1": ("QwenImage21", {}, qwen3_vl_8b),
    "FLUX.2-klein-(base-)?4B": ("Flux2", KLEIN_4B | {"guidance_embeds": False}, lambda: qwen3(2560, 9728, True)),
    "FLUX.2-klein-(base-)?9[bB](-kv)?": (
        "Flux2", KLEIN_9B | {"guidance_embeds": False}, lambda: qwen3(4096, 12288, False)
    ),
    "FLUX.2-dev": ("Flux2", {}, mistral_24b),
}  # fmt: skip
"""Class of the transformer and the VAE, configuration of the transformer, and text encoder, by the form of the name."""


@pytest.mark.parametrize("names", RELEASED)
def test_sizes_of_the_released_models_are_those_of_their_architecture(names):
    """2511 differs from 2509, klein-KV from klein-9B and distilled models from their base by no weights."""
    import diffusers

    kind, config, encoder = RELEASED[names]
    with torch.device("meta"):
        transformer = getattr(diffusers, f"{kind}Transformer2DModel")(**config)
        encoders = parameters(encoder(), vae := getattr(diffusers, f"AutoencoderKL{kind}")())
    sizes = [known.size for name, known in KNOWN.items() if re.fullmatch(names, name.rpartition("/")[2])]
    assert sizes
    for size in sizes:
        assert size.transformer == parameters(transformer) and size.encoders == encoders
        for name, value in size.transformer_config().items():
            assert value is None or transformer.config[name] == value, name
        assert size.with_vae(vae.config) == size


def test_a_known_model_has_its_own_number_of_steps_and_scale_without_a_download(monkeypatch):
    monkeypatch.setattr(recipe, "local_index", lambda name: None)
    found = {name: dataclasses.replace(SFT_RECIPES["lora"](), model=name).resolve_sampling() for name in KNOWN}
    distilled = [f"black-forest-labs/FLUX.2-klein-{kind}" for kind in ("4B", "9B", "9b-kv")]
    own = dict.fromkeys(distilled, (4, 1.0)) | {"Qwen/Qwen-Image-2.1": (40, 1.0)}
    assert found == dict.fromkeys(KNOWN, (50, 4.0)) | own


def test_a_known_model_that_training_refuses_has_no_plan(capsys, monkeypatch):
    """The same reason as with a local copy, whose `model_index.json` is checked."""
    from uniref_fast.models.flux2_family import Flux2

    monkeypatch.setattr(Flux2, "untrained", {"Flux2KleinKVPipeline": "no reason"})
    status, _, error = run(capsys, "--recipe", "lora", "--model", "black-forest-labs/FLUX.2-klein-9b-kv")
    assert status == 2 and "9b-kv is a Flux2KleinKVPipeline, which training does not support: no reason" in error
    status, text, _ = run(capsys, "--recipe", "lora", "--model", "black-forest-labs/FLUX.2-klein-9B")
    assert status == 0 and "9.08 billion parameters of the transformer, 8.27 billion of the encoders" in text


# ---- the command ----


def test_a_known_model_is_planned_without_torch_and_without_a_network(tmp_path):
    """Importing torch takes longer than the whole command, and nothing is asked of the hub."""
    code = (
        "import sys, socket\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "from uniref_fast.cli import main\n"
        "status = main(['plan', '--recipe', 'lora', '--model', 'Qwen/Qwen-Image-Edit-2509'])\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'triton', 'huggingface_hub'} & set(sys.modules)\n"
        "assert status == 0 and not heavy, (status, heavy)\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "20.4 billion parameters" in result.stdout and not list(tmp_path.iterdir())


def test_the_recipe_lora_needs_one_gpu_of_80_gb(capsys):
    """The help of the recipe says so."""
    status, text, _ = run(capsys, "--recipe", "lora", "--gpu-memory", 80)
    assert status == 0 and "blocks and attention recomputed, inputs kept" in text
    assert "1 rank(s) per pack, blocks kept would need" in text, "the reason for recomputing"
    status, text, _ = run(capsys, "--recipe", "lora", "--gpu-memory", 48)
    assert status == 1 and "does not fit: a pack of 14848 tokens" in text
    assert "it fits 4 GPUs of 48 GB (--nproc 4); it fits 1 GPU(s) of 80 GB (--gpu-memory 80)" in text
    assert "nine tenths of a GPU of 80 GB, the smallest that the run fits" in run(capsys, "--recipe", "lora")[1]


def test_the_sizes_of_the_stages_that_fit_are_offered_for_the_others(capsys):
    status, text, _ = run(capsys, "--recipe", "lora", "--gpu-memory", 72)
    assert status == 1 and text.count("does not fit") == 1
    flags = ["--stages.2.budget", "1536"]
    assert f"fits        no; stage 0, 1 fits; train the others with its sizes: {' '.join(flags)}; it fits with" in text
    assert run(capsys, "--recipe", "lora", "--gpu-memory", 72, *flags)[0] == 0


def test_the_parts_of_the_memory_are_the_whole(capsys):
    found = planned(capsys, "--recipe", "lora", "--gpu-memory", 80, "--nproc", 4)
    for stage in found["stages"]:
        together = sum(found["held_bytes"].values()) + stage["activation_bytes"]
        assert abs(together - stage["bytes_needed"]) <= 4 and stage["bytes_needed"] <= found["memory"]
    assert found["disk_bytes"]["4 checkpoints"] == 4 * 12 * found["parameters"]["trained"]
    whole = planned(capsys, "--recipe", "paper", "--gpu-memory", 141, "--nproc", 16)
    assert whole["disk_bytes"]["transformer/"] == 2 * whole["parameters"]["transformer"]
    assert whole["parameters"]["trained"] == whole["parameters"]["transformer"]


def test_rows_are_counted_as_the_trainer_counts_them(capsys, rows, builtin_pipe):
    """Compare with the trainer's own encoder; only words of instructions are counted roughly."""
    from uniref_fast.data.dataset import Dataset
    from uniref_fast.training.batches.latent_cache import TensorCache
    from uniref_fast.training.batches.row_tokens import row_tokens
    from uniref_fast.training.batches.samples import Encoder

    config = dataclasses.replace(SFT_RECIPES["tiny"](), data=(str(rows),))
    found = row_tokens(config, model_size("builtin"), True, 4)
    encoder, dataset = Encoder(builtin_pipe, TensorCache(None)), Dataset(rows)
    for number, stage in enumerate(config.stages):
        samples = [encoder.prepare(dataset[i], (0, i), stage.budget, stage.target_side).sample for i in range(30)]
        for length, sample in zip(found.lengths[number], samples, strict=True):
            assert abs(length - sample.length) <= 6, "the target and the references are exact"
    assert found.rows == 30 and found.broken == 0 and found.references == (1, 2) * 15


def test_steps_of_an_epoch_are_those_of_the_packer(capsys, rows, builtin_pipe):
    from uniref_fast.data.dataset import Dataset
    from uniref_fast.training.batches.latent_cache import TensorCache
    from uniref_fast.training.batches.packing import CostModel, Packer
    from uniref_fast.training.batches.samples import Encoder

    found = planned(capsys, "--recipe", "tiny", "--data", rows)
    config, dataset = SFT_RECIPES["tiny"](), Dataset(rows)
    encoder, packer = Encoder(builtin_pipe, TensorCache(None)), Packer(1024, 2, CostModel(1.0, 0.0))
    for epoch in range(20):
        for i in range(30):
            packer.push(packer.pending((epoch, i), encoder.prepare(dataset[i], (epoch, i), None, 64).sample))
    steps = [sum(len(pack.items) for pack in packer.pack()) for _ in range(20)]
    assert found["rows"] == 30 and config.packs == 2
    assert found["stages"][0]["rows_per_step"] == pytest.approx(sum(steps) / 20, rel=0.15)
    assert found["stages"][0]["steps_per_epoch"] == pytest.approx(30 / found["stages"][0]["rows_per_step"])


def test_few_rows_and_large_steps_are_noted(capsys, rows):
    text = run(capsys, "--recipe", "tiny", "--data", rows, "--packs", 64)[1]
    assert "a step uses each row" in text and "a smaller --packs" in text
    assert "a step uses each row" not in run(capsys, "--recipe", "tiny", "--data", rows)[1]


def test_time_is_that_of_a_stated_or_measured_speed_only(capsys, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(speeds, "FOLDER", tmp_path / "none")
    speeds.table.cache_clear()
    args = ("--recipe", "tiny", "--data", rows, "--lora-rank", 8)
    found = planned(capsys, *args)
    assert found["seconds"] is None and "not measured for this model on any device" in run(capsys, *args)[1]
    found = planned(capsys, *args, "--tokens-per-second", 1000)
    expected = sum(stage["steps"] * stage["tokens_per_step"] for stage in found["stages"]) / 1000
    assert found["seconds"] == pytest.approx(expected)
    assert found["stages"][0]["tokens_per_step"] == pytest.approx(
        found["stages"][0]["rows_per_step"] * found["stages"][0]["tokens_per_row"]
    )
    row = {"model": "4 blocks of 4 x 64", "dtype": "float32", "lora": True, "ranks": 1, "date": "2026-11-30",
           "torch": "2.14.1", "threads": 2, "command": "python bench/speeds.py"}  # fmt: skip
    measured = [row | {"pack_tokens": tokens, "tokens_per_second": tokens} for tokens in (1024, 1536)]
    monkeypatch.setattr(speeds, "FOLDER", tmp_path)
    (tmp_path / "box.json").write_text(json.dumps({"edits": [], "training": measured}))
    speeds.table.cache_clear()
    found = planned(capsys, *args, "--device", "box")
    speeds.table.cache_clear()
    assert found["tokens_per_second"] == 1024 and "2026-11-30, torch 2.14.1" in found["tokens_per_second_source"]


def test_msgrpo_counts_rollouts_and_rows_of_its_stages(capsys, rows):
    found = planned(capsys, "msgrpo", "--recipe", "tiny", "--data", rows, "--tokens-per-second", 1e6)
    first, second = found["stages"]  # 15 rows have two references, 15 have one
    assert first["rows_per_step"] == 8 and first["steps_per_epoch"] == pytest.approx(15 / 8)
    assert first["tokens_per_row"] > second["tokens_per_row"]
    runs = 8 + max(round(0.6 * 7), 1)
    assert first["tokens_per_step"] == pytest.approx(8 * 12 * runs * first["tokens_per_row"])
    guided = planned(capsys, "msgrpo", "--recipe", "tiny", "--data", rows, "--rollout-true-cfg-scale", 3)
    assert guided["stages"][0]["tokens_per_row"] == 2 * first["tokens_per_row"]


def test_cache_is_part_of_the_disk(capsys, rows, tmp_path):
    args = ("--recipe", "tiny", "--data", rows)
    assert "cache" not in planned(capsys, *args)["disk_bytes"]
    assert planned(capsys, *args, "--cache", tmp_path / "cache")["disk_bytes"]["cache"] > 30 * 64 * 64
    assert not (tmp_path / "cache").exists(), "a plan writes nothing"


def test_the_last_line_starts_the_run(capsys, rows):
    args = ("--recipe", "tiny", "--data", rows, "--nproc", 2, "--gpu-memory=24", "--packs", 4)
    last = run(capsys, *args)[1].splitlines()[-1]
    assert last.endswith(f"training/sft.py --recipe tiny --data {rows} --packs 4 --out runs/rows")
    assert "torchrun --nproc-per-node 2" in last


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["sftt"], "unknown kind of run 'sftt'; give sft or msgrpo"),
        (["--recipe", "lora", "--gpu-memry", "8"], "did you mean --gpu-memory?"),
        (["--recipe", "lora", "--gpu-memory", "0"], "gpu_memory must be above 0, got 0"),
        (["--recipe", "lora", "--model", "nobody/model"], "no model of the hub that was downloaded to this machine"),
        (["--recipe", "lora", "--model", "builtin"], "the recipe does not suit model = builtin"),
        (
            ["--recipe", "tiny", "--lora-rank", "8", "--lora-targets", "to_q,to_z"],
            "no Linear layer of the transformer has the name 'to_z'",
        ),
        (["--recipe", "tiny", "--lora-rank", "257"], "lora_rank = 257 is more than the width 256 of the layers 'to_q'"),
        (
            ["--recipe", "tiny", "--adapter", "dora"],
            "adapter = dora is a kind of adapter, and this run",
        ),
        (["--recipe", "paper", "--base", "nf4"], "base = nf4 is a dtype of frozen weights, and this run trains all"),
        (["--recipe", "paper", "--offload-blocks", "60"], "offload_blocks = 60 moves frozen weights, and this run"),
        (["--recipe", "lora", "--data", "no/such.jsonl"], "no/such.jsonl"),
        (["--recipe", "lora", "--nproc", "3", "--gpu-memory", "141"], "packs = 8 cannot be shared equally by 3"),
    ],
)
def test_errors_say_what_is_possible(capsys, args, message):
    status, out, err = run(capsys, *args)
    assert status == 2 and not out and message in err and "Try 'uniref-fast plan --help'" in err


def test_rows_that_cannot_be_used_are_counted(capsys, rows):
    (rows.parent / "out3.png").write_bytes(b"no image")
    assert planned(capsys, "--recipe", "tiny", "--data", rows)["broken_rows"] == 1
    assert (
        "30 rows; 1 of those that were read cannot be used (see uniref-fast data check)"
        in run(capsys, "--recipe", "tiny", "--data", rows)[1]
    )
    for path in rows.parent.glob("out*.png"):
        path.unlink()
    status, _, err = run(capsys, "--recipe", "tiny", "--data", rows)
    assert status == 2 and "no row of the data can be used" in err


def test_the_settings_of_an_initial_adapter_are_adopted(capsys, tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "lora").mkdir()
    metadata = {f"transformer.{name}": value for name, value in
                {"r": 4, "lora_alpha": 4.0, "target_modules": ["to_q"]}.items()}  # fmt: skip
    save_file({"x": torch.zeros(1)}, tmp_path / "lora" / "pytorch_lora_weights.safetensors",
              {"lora_adapter_metadata": json.dumps(metadata)})  # fmt: skip
    found = planned(capsys, "--recipe", "lora", "--initial", tmp_path)
    assert found["parameters"]["trained"] == 60 * 4 * (3072 + 3072)


# ---- recipes for GPUs of some sizes, and what a run can change ----


@pytest.mark.parametrize("gigabytes", [24, 48, 80])
def test_the_recipes_for_gpus_fit_them(capsys, gigabytes):
    found = planned(capsys, "--recipe", f"lora_{gigabytes}gb", "--gpu-memory", gigabytes)
    assert found["fits"] and "encoders" not in found["held_bytes"]
    smaller = {24: 16, 48: 24, 80: 48}[gigabytes]
    assert not planned(capsys, "--recipe", f"lora_{gigabytes}gb", "--gpu-memory", smaller)["fits"]


@pytest.mark.parametrize(
    ("args", "flags"),
    [
        (("--gpu-memory", 64), "--encoders free"),
        (("--gpu-memory", 48), "--encoders free --base int8"),
        (("--gpu-memory", 48, "--adapter", "dora"), "--encoders free --offload-blocks 20"),
        (("--gpu-memory", 28), "--encoders free --base nf4"),
    ],
)
def test_a_plan_names_the_settings_with_which_the_run_fits(capsys, args, flags):
    args = ("--recipe", "lora", *args)
    status, text, _ = run(capsys, *args)
    assert status == 1 and f"it fits with {flags}; it fits" in text
    assert run(capsys, *args, *flags.split())[0] == 0


def test_settings_that_the_run_cannot_have_are_not_offered(capsys):
    """Moments in 8 bits need trained weights in float32; fewer blocks on the host than now would need more memory."""
    args = ("--recipe", "lora", "--gpu-memory", 16, "--weight-dtype", "bfloat16")
    status, text, _ = run(capsys, *args)
    assert status == 1 and "adamw8bit" not in text and "fits        no; " in text
    tried = []

    def never(config):
        tried.append(config.offload_blocks)
        return False

    config = dataclasses.replace(SFT_RECIPES["lora"](), offload_blocks=30)
    assert _settings(config, model_size("Qwen/Qwen-Image-Edit-2511"), 1, never) == ""
    assert [count for count in tried if count != 30] == [40, 60]


def test_a_plan_needs_no_library(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    args = ("--recipe", "lora", "--gpu-memory", 28)
    assert "it fits with --encoders free --base nf4" in run(capsys, *args)[1]
    for more in (("--optimizer", "adamw8bit"), ("--base", "nf4")):
        assert run(capsys, *args, *more)[0] == 1
    assert run(capsys, "--recipe", "lora", "--gpu-memory", 16)[0] == 1


def test_moments_in_8_bits_need_one_process_and_less_memory(capsys):
    args = ("--recipe", "lora", "--gpu-memory", 80)
    plain, eight = planned(capsys, *args), planned(capsys, *args, "--optimizer", "adamw8bit")
    assert plain["held_bytes"]["gradients and optimizer"] == 12 * plain["parameters"]["trained"]
    assert eight["held_bytes"]["gradients and optimizer"] // eight["parameters"]["trained"] == 6
    status, _, err = run(capsys, *args, "--optimizer", "adamw8bit", "--nproc", 2)
    assert status == 2 and "this run has 2 ranks; give --optimizer adamw" in err


# ---- the tracked memory in the documents ----


def gib(count):
    return f"{count / 2**30:.1f}"


def test_the_documents_show_the_tracked_memory():
    """The tables of docs/sft.md are the newest results, whose plans are those of this version."""
    file = sorted((ROOT / "bench" / "results").glob("*-memory-training.json"))[-1]
    results, page = json.loads(file.read_text()), (ROOT / "docs" / "sft.md").read_text()
    assert file.name in page and results["date"] in page
    tolerance = {True: 0.01, "inputs": 0.01, "host": 0.02, False: 0.05}
    for row in results["rows"]:
        assert row["planned_bytes"] == pytest.approx(row["tracked_bytes"], rel=tolerance[row["checkpointing"]])
        assert row["planned_bytes"] == replanned(row, "lora_80gb", 1000, row["tokens"], row["checkpointing"])
        name = str(row["checkpointing"]).lower()
        line = f"| {row['budget']} | {row['references']} | `{name}` | {gib(row['tracked_bytes'])} | "
        assert f"{line}{gib(row['planned_bytes'])} |\n" in page, line
    for row in results["recipes"]:
        name = str(row.get("checkpointing")).lower()
        cells = f"`{name}` | {gib(row['planned_bytes'])}" if row["fits"] else "does not fit |"
        assert f"| `{row['recipe']}` | {row['budget']} | {cells} |\n" in page, row
    for row in results["recipes"]:
        tokens = next(each["tokens"] for each in results["rows"]
                      if (each["budget"], each["references"]) == (row["budget"], 6))  # fmt: skip
        assert replanned(row, row["recipe"], row["gpu_gb"], tokens, None) == row.get("planned_bytes"), row


def replanned(row, recipe, gigabytes, tokens, checkpointing):
    """Return the bytes that this version plans for a row of the results, or None if it does not fit."""
    config = SFT_RECIPES[recipe]()
    stage = dataclasses.replace(config.stages[0], budget=row["budget"], pack_tokens=tokens, checkpointing=checkpointing)
    config = dataclasses.replace(config, stages=(stage,))
    plan = make_plan("sft", "lora", config, PlanOptions(gpu_memory=gigabytes)).stages[0].plan
    return plan and plan.bytes_needed
