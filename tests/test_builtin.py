"""The built-in pipeline: its folder, its tokenizer and processor, and edits with one to three references."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock_module
from peft import LoraConfig
from PIL import Image
from synthetic import synthetic_sample

import uniref_fast
from uniref_fast import EditRequest, builtin
from uniref_fast.builtin import BuiltinProcessor, SmallQwenImageEditPlusPipeline, components, store
from uniref_fast.loading import defaults, load_pipeline
from uniref_fast.request import image_areas

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return builtin.build(tmp_path_factory.mktemp("model") / "builtin")


@pytest.fixture(scope="module")
def pipe(folder):
    pipe = SmallQwenImageEditPlusPipeline.from_pretrained(str(folder), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def edit(pipe, references, prompt="put the owl on the left", seed=0, **kwargs):
    """Packed latents [1, tokens, 64] of two steps with classifier-free guidance."""
    kwargs = {"num_inference_steps": 2, "negative_prompt": " ", "output_type": "latent", **kwargs}
    return pipe(references, prompt, generator=torch.Generator().manual_seed(seed), **kwargs).images


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- folder -----------------------------------------------------------------------------------------------------------


def test_build_gives_the_same_bytes_and_leaves_the_random_state_alone(folder, tmp_path):
    state = torch.get_rng_state()
    again = builtin.build(tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), state)
    assert contents(again) == contents(folder)
    other = builtin.build(tmp_path / "other", seed=1)
    assert contents(other).keys() == contents(folder).keys()
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert contents(other)[weights] != contents(folder)[weights]


def test_build_is_all_or_nothing(tmp_path, monkeypatch):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        builtin.build(tmp_path / "taken")
    monkeypatch.setattr(components, "pipeline", lambda seed, dtype: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        builtin.build(tmp_path / "fails")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


def test_folder_is_small_and_safe(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 24e6
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "SmallQwenImageEditPlusPipeline"
    assert index["processor"] == ["transformers", "Qwen2VLProcessor"]
    assert str(folder) not in "".join(path.read_text() for path in files if path.suffix == ".json")


def test_round_trip(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "copy")
    copy = SmallQwenImageEditPlusPipeline.from_pretrained(str(tmp_path / "copy"), dtype=torch.float32, output_area=4096)
    for name in ("transformer", "vae", "text_encoder"):
        ours, theirs = getattr(pipe, name).state_dict(), getattr(copy, name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == torch.float32 for key in ours)
    assert (copy.condition_image_area, copy.vae_image_area, copy.output_area) == (56**2, 64**2, 4096)
    index = json.loads((tmp_path / "copy" / "model_index.json").read_text())
    assert index["_class_name"] == "SmallQwenImageEditPlusPipeline"
    copy.vae_image_area = 96 * 96  # an assignment is saved too
    copy.save_pretrained(tmp_path / "changed")
    assert json.loads((tmp_path / "changed" / "model_index.json").read_text())["vae_image_area"] == 96 * 96


def test_stock_class_loads_the_folder(folder, pipe):
    processor = BuiltinProcessor.from_pretrained(str(folder), subfolder="processor")
    stock = QwenImageEditPlusPipeline.from_pretrained(str(folder), processor=processor, dtype=torch.float32)
    assert type(stock) is QwenImageEditPlusPipeline
    prompt, _ = stock.encode_prompt("a crown", image=[Image.new("RGB", (128, 96))])
    ours, _ = pipe.encode_prompt("a crown", image=[Image.new("RGB", (128, 96))])
    assert torch.equal(prompt, ours)


# --- saved and loaded again: the same model, or an error ---


def small_edit(pipe):
    """Latents of two guided steps through `uniref_fast.edit`, at the pipeline's own sizes."""
    pipe.set_progress_bar_config(disable=True)
    request = EditRequest(
        "a crown", [Image.new("RGB", (90, 60), "red")], negative_prompt=" ", seed=0, num_inference_steps=2
    )
    return uniref_fast.edit(pipe, [request], output_type="latent", progress=False)[0]


def unchanged(folder):
    return SmallQwenImageEditPlusPipeline.from_pretrained(str(folder), dtype=torch.float32)


def plain(folder):
    """The folder in the stock class."""
    pipe = QwenImageEditPlusPipeline.from_pretrained(str(folder), processor=None, dtype=torch.float32)
    pipe.register_modules(processor=BuiltinProcessor.from_pretrained(str(folder), subfolder="processor"))
    return pipe


def fused(folder):
    pipe = SmallQwenImageEditPlusPipeline.from_pretrained(str(folder), dtype=torch.float32)
    torch.manual_seed(0)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    pipe.fuse_lora(components=["transformer"])
    with pytest.raises(ValueError, match=r"holds LoRA adapters.*unload_lora_weights"):
        pipe.save_pretrained("never")
    pipe.unload_lora_weights()
    return pipe


def cast(folder):
    pipe = SmallQwenImageEditPlusPipeline.from_pretrained(str(folder), dtype=torch.float32)
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    return pipe


def other_areas(folder):
    return SmallQwenImageEditPlusPipeline.from_pretrained(
        str(folder), dtype=torch.float32, vae_image_area=96 * 96, output_area=32 * 64, condition_image_area=32 * 32
    )


@pytest.mark.slow
@pytest.mark.parametrize("variant", [unchanged, plain, fused, cast, other_areas])
def test_a_saved_pipeline_is_the_same_model(folder, tmp_path, variant):
    before = variant(folder)
    before.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "uniref_fast.json").write_text("{}")  # another program's file
    after = load_pipeline(str(tmp_path / "saved"), torch.float32, "cpu")
    again = plain(tmp_path / "saved")  # through a pipeline that does not have image areas
    # Linears with hooks are computed by PyTorch on every CPU, the others by oneDNN where that is faster
    with torch.backends.mkldnn.flags(enabled=variant is not cast):
        expected = small_edit(before)
        assert torch.equal(small_edit(after), expected)
        assert torch.equal(small_edit(again), expected)
    given = [EditRequest("a crown", num_inference_steps=2)], [[(90, 60)]]
    tokens = [
        uniref_fast.estimate(model, given[0], image_sizes=given[1]).tokens
        for model in (before, after, again, tmp_path / "saved")
    ]
    assert all(counts == tokens[0] for counts in tokens) and tokens[0]["together"] < 500
    assert defaults(str(tmp_path / "saved")) == defaults("builtin")
    if variant is not plain:  # the stock class keeps nothing of its own in model_index.json
        assert builtin.weights_status(after) == builtin.weights_status(before) == "untrained"
    if variant is not cast:
        rebuilt = SmallQwenImageEditPlusPipeline(**after.components)
        assert image_areas(rebuilt) == image_areas(before)


def test_plain_diffusers_refuses_the_folder(folder):
    """The stock class would run at 1024 x 1024 pixels."""
    with pytest.raises(AttributeError, match="SmallQwenImageEditPlusPipeline"):
        DiffusionPipeline.from_pretrained(str(folder))


def test_a_folder_that_the_stock_class_saved_long_ago(folder, pipe, tmp_path):
    """Areas in the index alone, beside the name of the stock class."""
    old = shutil.copytree(folder, tmp_path / "old")
    for name, changes in (("model_index.json", {"_class_name": "QwenImageEditPlusPipeline"}),
                          ("transformer/config.json", {"_image_areas": None})):  # fmt: skip
        content = json.loads((old / name).read_text()) | changes
        (old / name).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    (old / "uniref_fast.json").unlink()
    assert torch.equal(small_edit(load_pipeline(str(old), torch.float32, "cpu")), small_edit(pipe))


def test_a_transformer_saved_with_adapters_in_place_is_an_error(folder, tmp_path):
    pipe = SmallQwenImageEditPlusPipeline.from_pretrained(str(folder), dtype=torch.float32)
    pipe.save_pretrained(tmp_path / "saved")
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    pipe.transformer.save_pretrained(tmp_path / "saved" / "transformer")
    with pytest.raises(ValueError, match=r"transformer has no file for 8 of its weights .*adapters"):
        load_pipeline(str(tmp_path / "saved"), torch.float32, "cpu")


@pytest.mark.parametrize("area", [0, 1000, 16384.0, "4096"])
def test_areas_are_checked(pipe, area):
    with pytest.raises(ValueError, match="vae_image_area"):
        SmallQwenImageEditPlusPipeline(**pipe.components, vae_image_area=area)


# --- cache ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "shipped_folder", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "uniref_fast"


def test_cache_is_reused_and_repaired(empty_cache, monkeypatch):
    first = store.model_folder()
    assert first.parent == empty_cache and builtin.weights_status() == "untrained"
    weights = first / "vae" / "diffusion_pytorch_model.safetensors"
    written = weights.stat().st_mtime_ns
    assert store.model_folder() == first and weights.stat().st_mtime_ns == written
    weights.write_bytes(weights.read_bytes()[:1000])  # a truncated file
    assert store.model_folder() == first and weights.stat().st_size > 1000
    assert [path.name for path in empty_cache.iterdir()] == [first.name]


def test_another_process_builds_the_same_folder_first(empty_cache, monkeypatch):
    """The folder of the other process appears before this process renames its own."""
    build = store.build

    def late(folder):
        build(folder)
        return build(folder)

    monkeypatch.setattr(store, "build", late)
    folder = store.model_folder()
    assert folder == empty_cache / f"builtin-{store.fingerprint()}" and builtin.weights_status() == "untrained"
    assert [path.name for path in empty_cache.iterdir()] == [folder.name]


def test_unwritable_cache_falls_back_to_the_temporary_directory(empty_cache, tmp_path, monkeypatch):
    empty_cache.parent.write_text("a file where a folder should be")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    assert (tmp_path / "tmp") in store.model_folder().parents
    assert builtin.weights_status(builtin.load()) == "untrained"


def test_weights_status_of_other_folders(pipe, tmp_path, monkeypatch):
    assert builtin.weights_status(pipe) == "untrained"
    (tmp_path / "model_index.json").write_text("{}")
    store.write_status(tmp_path, weights="trained")
    monkeypatch.setattr(store, "shipped_folder", lambda: tmp_path)
    assert builtin.weights_status() == "trained"
    assert builtin.weights_status(object()) == "trained"  # somebody's own model
    with pytest.raises(ValueError, match="untrained"):
        store.write_status(tmp_path, weights="half")


# --- tokenizer and processor ------------------------------------------------------------------------------------------


def test_prompt_prefix_is_what_the_pipeline_drops(pipe):
    prefix = pipe.prompt_template_encode.split("{}")[0]
    whole = pipe.tokenizer(pipe.prompt_template_encode.format("a crown"))["input_ids"]
    ids = pipe.tokenizer(prefix)["input_ids"]
    assert len(ids) == pipe.prompt_template_encode_start_idx == 64
    assert whole[:64] == ids


@pytest.mark.parametrize(
    "text",
    [
        "put the owl left of the rocket",
        "",
        " ",
        "\t\r\n",
        "Füge den Käse hinzu",
        "把猫放在左边",
        "ضع القطة",
        "🦉🚀👩‍👩‍👧",
        "\x00\u200d\uffff",
    ],
)
def test_any_text_is_encodable(pipe, text):
    ids = pipe.tokenizer(text)["input_ids"]
    assert pipe.tokenizer.decode(ids) == text
    assert all(id_ < pipe.text_encoder.config.text_config.vocab_size for id_ in ids)
    embeds, _ = pipe.encode_prompt(text)
    assert embeds.isfinite().all() and embeds.shape[1] == len(ids) + 5  # <|im_end|> \n <|im_start|> assistant \n


def test_special_tokens_of_files_and_configs_agree(pipe):
    config, tokenizer = pipe.text_encoder.config, pipe.tokenizer
    for name in ("image", "video", "vision_start", "vision_end"):
        token = f"<|{name}_pad|>" if name in ("image", "video") else f"<|{name}|>"
        assert tokenizer.convert_tokens_to_ids(token) == getattr(config, f"{name}_token_id")
    assert len(tokenizer) <= config.text_config.vocab_size
    assert tokenizer.pad_token == "<|endoftext|>"


def test_processor_without_images_pads_on_the_right(pipe):
    texts = ["a crown", "put the crown left of the owl"]
    inputs = pipe.processor(text=texts, images=None, padding=True, return_tensors="pt")
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape and inputs["input_ids"].dtype == torch.int64
    assert inputs.get("pixel_values") is None and inputs.get("image_grid_thw") is None
    lengths = inputs["attention_mask"].sum(1).tolist()
    assert lengths == [len(pipe.tokenizer(text)["input_ids"]) for text in texts]
    assert inputs["attention_mask"][0].tolist() == [1] * lengths[0] + [0] * (lengths[1] - lengths[0])


@pytest.mark.parametrize("name, content", [("chat_template.jinja", "{{ x }}"), ("chat_template.json", None)])
def test_the_processor_keeps_settings_of_a_larger_model(folder, tmp_path, name, content):
    """A chat template, in either form, and other limits of pixels, which a saved pipeline is to have as well."""
    given = shutil.copytree(folder / "processor", tmp_path / "given")
    (given / name).write_text(content or json.dumps({"chat_template": "{{ x }}"}))
    limits = {"size": {"shortest_edge": 28 * 28, "longest_edge": 500 * 28 * 28}}
    config = json.loads((given / "preprocessor_config.json").read_text())
    (given / "preprocessor_config.json").write_text(json.dumps(config | limits))
    processor = BuiltinProcessor.from_pretrained(str(given))
    processor.save_pretrained(tmp_path / "saved")
    again = BuiltinProcessor.from_pretrained(str(tmp_path / "saved"))
    assert processor.chat_template == again.chat_template == "{{ x }}"
    counts = [p.image_processor.get_number_of_image_patches(560, 560, {}) for p in (processor, again)]
    assert counts == [1600, 1600]


def test_processor_expands_each_picture(pipe):
    slot = "<|vision_start|><|image_pad|><|vision_end|>"
    images = [Image.new("RGB", size) for size in ((128, 96), (512, 512), (32, 160))]
    inputs = pipe.processor(text=[slot + slot + "a", slot], images=images, padding=True, return_tensors="pt")
    patches = inputs["image_grid_thw"].prod(1)
    pixels = inputs["pixel_values"]
    assert pixels.shape == (patches.sum(), 3 * 2 * 14 * 14) and pixels.dtype == torch.float32
    pads = (inputs["input_ids"] == pipe.processor.image_token_id).sum(1).tolist()
    assert pads == [(patches[:2].sum() // 4).item(), (patches[2] // 4).item()]
    assert max(patches.tolist()) <= 16 * 4  # at most 16 tokens a reference
    with pytest.raises(ValueError, match="number of"):
        pipe.processor(text=[slot], images=images[:2], padding=True, return_tensors="pt")


# --- edits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3])
def test_edits_run(pipe, k):
    scene = synthetic_sample(0, references=k)
    latents = edit(pipe, scene.references, scene.instruction, height=96, width=160)
    assert latents.shape == (1, 12 * 20, 64) and latents.isfinite().all() and latents.std() > 0.3


def test_default_size_follows_the_last_reference(pipe):
    scene = synthetic_sample(0)
    image = edit(pipe, scene.references, output_type="pil")[0]
    ratio = scene.references[-1].width / scene.references[-1].height
    assert image.size == stock_module.calculate_dimensions(pipe.output_area, ratio)
    assert np.asarray(image).std() > 10  # untrained, yet not a flat picture
    assert edit(pipe, scene.references, output_type="pil", width=64)[0].size == (64, image.height)
    # long and thin: diffusers rounds the shorter side to 0
    thin = [Image.new("RGB", (1200, 30), "red")]
    assert min(edit(pipe, thin, output_type="pil")[0].size) == 32


def test_seeds_reproduce_and_every_input_matters(pipe):
    references = synthetic_sample(0, references=2).references
    size = dict(height=64, width=64)
    base = edit(pipe, references, **size)
    assert torch.equal(base, edit(pipe, references, **size))
    changed = [Image.new("RGB", image.size, "navy") for image in references]
    others = [edit(pipe, references, seed=1, **size), edit(pipe, references, "a crown", **size)]
    others += [edit(pipe, [*references[:i], changed[i], *references[i + 1 :]], **size) for i in range(2)]
    assert all((other - base).abs().max() > 1e-3 for other in others)


def test_same_as_the_stock_call_with_its_constants_changed(pipe, monkeypatch):
    scene = synthetic_sample(1)
    ours = edit(pipe, scene.references, scene.instruction)
    size = stock_module.calculate_dimensions(pipe.output_area, scene.references[-1].width / scene.references[-1].height)
    assert (stock_module.CONDITION_IMAGE_SIZE, stock_module.VAE_IMAGE_SIZE) == (384**2, 1024**2)  # untouched by a call
    monkeypatch.setattr(stock_module, "CONDITION_IMAGE_SIZE", pipe.condition_image_area)
    monkeypatch.setattr(stock_module, "VAE_IMAGE_SIZE", pipe.vae_image_area)
    theirs = QwenImageEditPlusPipeline.__call__(
        pipe,
        scene.references,
        scene.instruction,
        negative_prompt=" ",
        num_inference_steps=2,
        width=size[0],
        height=size[1],
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images
    assert torch.equal(ours, theirs) and not ours.requires_grad


def test_callbacks_and_tuples_as_in_diffusers(pipe):
    seen = []

    def on_step_end(pipeline, step, timestep, tensors):
        seen.append((step, tuple(tensors["latents"].shape)))
        return tensors

    result = pipe(
        synthetic_sample(0).references[0],  # a single image, not a list
        "a crown",
        height=64,
        width=64,
        true_cfg_scale=1.0,
        num_inference_steps=2,
        output_type="latent",
        callback_on_step_end=on_step_end,
        return_dict=False,
    )
    assert isinstance(result, tuple) and result[0].shape == (1, 64, 64)
    assert seen == [(0, (1, 64, 64)), (1, (1, 64, 64))]


@pytest.mark.parametrize("nothing", [None, []])
def test_no_reference_is_an_error_that_says_so(pipe, nothing):
    with pytest.raises(ValueError, match="at least one reference"):
        pipe(nothing, "a crown")
