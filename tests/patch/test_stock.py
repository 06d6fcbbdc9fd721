"""A pipeline of stock classes only, as a download from the hub is: edited, patched, trained and exported.

It needs torchvision, which transformers' own `Qwen2VLProcessor` imports; the other tests use the built-in processor.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("torchvision")
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageEditPlusPipeline
from synthetic import synthetic_sample
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor, Qwen2VLProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

import uniref_fast
from uniref_fast.builtin import components
from uniref_fast.layout import Kind
from uniref_fast.loading import load_pipeline
from uniref_fast.scenes.artworks import artworks
from uniref_fast.scenes.dataset import write_dataset
from uniref_fast.scenes.make import MakeConfig, sample
from uniref_fast.training import msgrpo, sft

pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with random weights, as `save_pretrained` writes it: 16 x 16 pixels a token, as in the large models."""
    folder = tmp_path_factory.mktemp("stock") / "pipeline"
    transformer, _, text_encoder = components.models(0, torch.float32)
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    tokenizer = components.tokenizer()
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(**components.IMAGE_PIXELS), tokenizer, Qwen2VLVideoProcessor(**components.IMAGE_PIXELS)
    )
    scheduler = FlowMatchEulerDiscreteScheduler(**components.SCHEDULER)
    QwenImageEditPlusPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        processor=processor,
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def pipe(folder, monkeypatch):
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock

    monkeypatch.setattr(stock, "VAE_IMAGE_SIZE", 128 * 128)  # references of 1024 x 1024 would take seconds each
    pipe = load_pipeline(str(folder), torch.float32, "cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(image):
    return np.asarray(image).astype(int)


def arguments(references):
    scene = synthetic_sample(3, size=96, references=references)
    return {"prompt": scene.instruction, "width": 64, "height": 48, "num_inference_steps": 3, "true_cfg_scale": 2.0,
            "negative_prompt": " "}, scene.references  # fmt: skip


def stock_image(pipe, references, seed=0):
    options, images = arguments(references)
    return pipe(image=images, generator=torch.Generator().manual_seed(seed), **options).images[0]


def test_the_classes_are_those_of_diffusers_and_transformers(pipe):
    assert type(pipe) is QwenImageEditPlusPipeline and type(pipe.processor) is Qwen2VLProcessor
    assert type(pipe.text_encoder) is Qwen2_5_VLForConditionalGeneration
    assert pipe.vae_scale_factor == 8


@pytest.mark.slow
@pytest.mark.parametrize("references", [1, 3])
def test_patched_and_edit_equal_stock(pipe, references):
    expected = pixels(stock_image(pipe, references))
    options, images = arguments(references)
    request = {"images": images, "seed": 0, **options}
    (edited,) = uniref_fast.edit(pipe, [request])
    assert abs(pixels(edited) - expected).max() <= 1
    report = uniref_fast.patch(pipe)
    assert abs(pixels(stock_image(pipe, references)) - expected).max() <= 1
    assert report.calls.total() > 0 and not report.fallbacks, str(report)
    assert uniref_fast.unpatch(pipe)
    assert (pixels(stock_image(pipe, references)) == expected).all()


def test_unlike_requests_in_one_pack_equal_their_own_runs(pipe):
    requests = [{"images": images, "seed": k, **options} for k in (1, 2) for options, images in [arguments(k)]]
    for k, image in zip((1, 2), uniref_fast.edit(pipe, requests), strict=True):
        assert abs(pixels(image) - pixels(stock_image(pipe, k, seed=k))).max() <= 1


@pytest.mark.slow
def test_estimate_counts_the_tokens_of_an_edit(pipe, folder):
    options, images = arguments(2)
    request = {"images": images, "seed": 0, **options}
    loaded = uniref_fast.estimate(pipe, [request])
    read = uniref_fast.estimate(str(folder), [request])
    assert loaded.tokens == read.tokens
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(
            (kwargs["encoder_hidden_states"].shape[1], kwargs["hidden_states"].shape[1])
        ),
        with_kwargs=True,
    )
    stock_image(pipe, 2)
    hook.remove()
    text, image = ([0, 0] for _ in range(2))  # tokens with the prompt and with the negative prompt
    for segment in loaded.layout.segments:
        (text if segment.kind is Kind.TEXT else image)[segment.sample] += segment.length
    assert list(zip(text, image, strict=True)) == seen[:2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "made"
    config = MakeConfig(artworks("shipped"), size=64, references=(1, 2))
    write_dataset(
        folder, config, {"train": 8, "heldout_objects": 2, "heldout_combinations": 0}, 1, force=False, generate=sample
    )
    return folder


def flags(folder, data, out, **more):
    given = {"recipe": "tiny", "model": folder, "data": data / "train.jsonl", "out": out, "lora-rank": 2,
             "eval-every": 0, "sample-every": 0, "tensorboard": "false"} | more  # fmt: skip
    for i in range(2):
        given |= {f"stages.{i}.budget": 128, f"stages.{i}.target-side": 128, f"stages.{i}.pack-tokens": 1024}
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


@pytest.mark.slow
def test_a_trained_adapter_is_loaded_by_the_stock_pipeline(folder, data, pipe, tmp_path):
    out = tmp_path / "sft"
    assert sft.main(flags(folder, data, out, steps=2, **{"save-every": 2, "warmup": 1, "stages.0.lr": "1e-2"})) == 0
    before = pixels(stock_image(pipe, 2))
    pipe.load_lora_weights(str(out / "lora"))
    trained = pixels(stock_image(pipe, 2))
    assert (trained != before).any(), "the adapter changes the image"
    uniref_fast.patch(pipe)
    assert abs(pixels(stock_image(pipe, 2)) - trained).max() <= 1

    out = tmp_path / "rl"
    more = {
        "steps": 2,
        "prompts": 2,
        "group": 2,
        "rollout-num-inference-steps": 3,
        "save-every": 1,
        "initial": tmp_path / "sft",
    }
    assert msgrpo.main(flags(folder, data, out, **more)) == 0
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    checks = [event for event in events if event["kind"] == "on-policy check"]
    assert checks and all(check["worst_log_ratio"] == 0.0 for check in checks)
    assert (out / "lora").is_dir()


def test_areas_are_those_of_diffusers(folder):
    """Nothing of the built-in model is in the folder: a reference takes 1024 x 1024 pixels, 64 x 64 tokens."""
    pipe = load_pipeline(str(folder), torch.float32, "cpu")
    images = [Image.new("RGB", (512, 512))]
    estimate = uniref_fast.estimate(pipe, [{"prompt": "x", "images": images, "true_cfg_scale": 1.0}])
    assert (estimate.tokens["reference"], estimate.tokens["target"]) == (4096, 4096)
