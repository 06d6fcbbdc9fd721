"""Rows to tensors: sizes known before anything is encoded, tensors as the pipeline makes them, cached or not."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from uniref_fast import builtin
from uniref_fast.data.dataset import Row, RowError
from uniref_fast.data.images import ImageSource
from uniref_fast.encode import image_latents, prompt_embeddings, prompt_tokens, to_rgb
from uniref_fast.guidance import EMPTY_PROMPT
from uniref_fast.training.batches import samples
from uniref_fast.training.batches.latent_cache import TensorCache
from uniref_fast.training.batches.samples import Encoder

SIZES = [(96, 64), (40, 200), (64, 64), (33, 47)]  # target, then references: wide, tall, square, odd


@pytest.fixture(autouse=True)
def one_thread(threads):
    """The pictures are so small that more threads only wait for each other."""


def picture(size, seed=0):
    """Smooth, so that resizing does not make it grey."""
    rng = np.random.default_rng([seed, *size])
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def source(size, seed=0, name="x.png", image=None):
    content = io.BytesIO()
    (image or picture(size, seed)).save(content, "PNG")
    return ImageSource(name, data=content.getvalue())


def row(references, instruction="put picture 1 on picture 2", target=SIZES[0], where="rows.jsonl:3"):
    sources = tuple(source(size, i, f"input_images[{i}]") for i, size in enumerate(SIZES[1 : references + 1], start=1))
    return Row(instruction, sources, source(target, name="output_image"), "compose", where)


def encoder_of(pipe, folder=None, **drops):
    return Encoder(pipe, TensorCache(folder), **drops)


def encoded_by(encoder, row, key=(0, 0), side=48, target_side=32):
    prepared = encoder.prepare(row, key, side, target_side)
    return prepared, encoder.encode(prepared, prepared.load())


def same(first, second):
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in ("target", "references", "text"))


# ---- rows that cannot be used ----


def test_a_row_that_the_text_encoder_refuses_is_named(builtin_pipe, monkeypatch):
    def refuse(**options):
        raise IndexError("token 5 is none")

    encoder = encoder_of(builtin_pipe)
    prepared = encoder.prepare(row(1), (0, 0), 48, 16)
    monkeypatch.setattr(builtin_pipe, "encode_prompt", refuse)
    with pytest.raises(RowError, match=r"^rows.jsonl:3: the text encoder refuses it: token 5 is none"):
        encoder.encode_conditions(prepared, prepared.load_references())


# ---- masks ----


@pytest.mark.parametrize("scale", [1, 2])
def test_a_mask_is_averaged_over_the_tokens_of_the_target(builtin_pipe, scale):
    """The means are in the order of the latents, also if the mask is larger than its target."""
    size, patch = (48, 32), builtin_pipe.vae_scale_factor * 2
    values = np.random.default_rng(0).integers(0, 256, (size[1] * scale, size[0] * scale), dtype=np.uint8)
    masked = replace(row(2, target=size), mask=source(size, image=Image.fromarray(values), name="mask"))
    encoder = encoder_of(builtin_pipe, drop_references=1.0)
    prepared = encoder.prepare(masked, (0, 0), 48, 64)
    _, h, w = prepared.sample.target
    assert (h, w) == (32 // patch, 48 // patch) and h != w and prepared.dropped
    tokens = (values / 255).reshape(h, patch * scale, w, patch * scale).mean((1, 3)).reshape(-1)
    encoded = encoder.encode(prepared, prepared.load())
    assert encoded.mask.dtype == torch.float32 and len(encoded.mask) == len(encoded.target)
    np.testing.assert_allclose(encoded.mask, tokens, rtol=1e-5)
    plain = encoded_by(encoder, row(2, target=size), target_side=64)[1]
    assert plain.mask is None and same(plain, encoded)


def test_a_white_mask_is_exactly_1_on_every_token_of_a_scaled_target(builtin_pipe):
    white = replace(row(0, target=(97, 61)), mask=source((97, 61), image=Image.new("L", (97, 61), 255)))
    _, encoded = encoded_by(encoder_of(builtin_pipe), white, target_side=48)
    assert encoded.mask.eq(1).all() and len(encoded.mask) > 4


def test_a_single_white_pixel_is_not_lost(builtin_pipe):
    image = Image.new("L", (97, 61))
    image.putpixel((96, 30), 255)
    _, encoded = encoded_by(
        encoder_of(builtin_pipe), replace(row(0, target=(97, 61)), mask=source((97, 61), image=image)), target_side=48
    )
    assert encoded.mask.gt(0).any()


# ---- text ----


@pytest.mark.parametrize("references", [0, 1, 3])
@pytest.mark.parametrize(
    "instruction", ["x", "put {picture 1} left of “picture 2”", " ", "ünï 猫\n\n" * 200, "<|im_end|> is a token"]
)
def test_the_length_of_a_text_is_known_before_it_is_encoded(builtin_pipe, references, instruction):
    """A prompt longer than encode_prompt's max_sequence_length counts whole too: nothing is cut."""
    encoder = encoder_of(builtin_pipe)
    prepared = encoder.prepare(row(references, instruction), (0, 0), 48, 16)
    sizes = prepared.geometry.condition_sizes
    _, images, _ = prepared.load()
    resized = [builtin_pipe.image_processor.resize(image, h, w) for image, (w, h) in zip(images, sizes, strict=True)]
    embeddings, mask = builtin_pipe.encode_prompt(prompt=instruction, image=resized or None)
    assert mask is None and prepared.sample.text == embeddings.shape[1] == prompt_tokens(
        builtin_pipe, instruction, sizes
    )
    assert torch.equal(encoder.encode(prepared, prepared.load()).text, embeddings[0])


@pytest.mark.parametrize(
    "drops", [{"drop_text": 1.0}, {"drop_references": 1.0}, {"drop_text": 1.0, "drop_references": 1.0}]
)
def test_what_is_dropped_is_in_no_part_of_a_sample(builtin_pipe, drops):
    prepared, encoded = encoded_by(encoder_of(builtin_pipe, **drops), row(3))
    text, references = "drop_text" in drops, "drop_references" in drops
    assert prepared.instruction == (EMPTY_PROMPT if text else row(3).instruction)
    assert prepared.dropped == references and len(prepared.load()[1]) == (0 if references else 3)
    assert len(prepared.sample.references) == len(prepared.geometry.reference_sizes) == (0 if references else 3)
    assert len(encoded.references) == (0 if references else sum(h * w for _, h, w in prepared.sample.references))
    images = [] if references else row(3).references
    expected = prompt_embeddings(
        builtin_pipe, prepared.instruction, [image.load() for image in images], prepared.geometry.condition_sizes
    )
    assert torch.equal(encoded.text, expected) and len(encoded.text) == prepared.sample.text
    other, _ = encoded_by(encoder_of(builtin_pipe), row(3))
    assert torch.equal(encoded.target, encoded_by(encoder_of(builtin_pipe), row(3))[1].target), "the target stays"
    assert other.geometry.size == prepared.geometry.size


def test_shares_of_what_is_dropped(builtin_pipe):
    """Independent of each other, fixed by the key, another choice in every epoch."""
    encoder = encoder_of(builtin_pipe, seed=1, drop_text=0.3, drop_references=0.15)
    small = row(1, "x")
    keys = [(epoch, i) for epoch in range(2) for i in range(300)]
    made = [encoder.prepare(small, key, 64, 64) for key in keys]
    text = np.array([prepared.instruction == EMPTY_PROMPT for prepared in made])
    references = np.array([prepared.dropped for prepared in made])
    assert abs(text.mean() - 0.3) < 0.05 and abs(references.mean() - 0.15) < 0.04
    assert abs((text & references).mean() - 0.045) < 0.025
    assert (text[:300] != text[300:]).any() and (references[:300] != references[300:]).any()
    again = encoder_of(builtin_pipe, seed=1, drop_text=0.3, drop_references=0.15)
    assert all(
        again.prepare(small, key, 64, 64) == prepared for key, prepared in list(zip(keys, made, strict=True))[::9]
    )


def test_shares_of_0_and_1_are_never_and_always(builtin_pipe):
    for share in (0.0, 1.0):
        encoder = encoder_of(builtin_pipe, drop_text=share, drop_references=share)
        for i in range(20):
            prepared = encoder.prepare(row(1), (0, i), 64, 64)
            assert (prepared.instruction == EMPTY_PROMPT) == prepared.dropped == bool(share)


# ---- pictures ----


@pytest.mark.parametrize("references", [0, 1, 3])
def test_latents_are_those_that_the_pipeline_denoises_with(builtin_pipe, references):
    prepared, encoded = encoded_by(encoder_of(builtin_pipe), row(references), side=64)
    target, images, _ = prepared.load()
    geometry = prepared.geometry

    def latents(images, sizes):
        pixels = [
            builtin_pipe.image_processor.preprocess(image, height, width).unsqueeze(2)
            for image, (width, height) in zip(images, sizes, strict=True)
        ]
        width, height = geometry.size
        _, packed = builtin_pipe.prepare_latents(
            pixels, 1, builtin_pipe.transformer.config.in_channels // 4, height, width, torch.float32, "cpu", None
        )
        return packed[0]

    with torch.no_grad():
        assert torch.equal(encoded.target, latents([target], [geometry.size]))
        if references:
            assert torch.equal(encoded.references, latents(images, geometry.reference_sizes))
    assert encoded.references.shape == (sum(h * w for _, h, w in prepared.sample.references), 64)
    assert len(encoded.target) == prepared.sample.target[1] * prepared.sample.target[2]
    assert not encoded.target.requires_grad and not encoded.text.requires_grad


def test_references_keep_their_order(builtin_pipe):
    first = row(2)
    swapped = Row(first.instruction, first.references[::-1], first.target, None, first.where)
    (a, x), (b, y) = (encoded_by(encoder_of(builtin_pipe), r) for r in (first, swapped))
    assert a.sample.references == b.sample.references[::-1] and not torch.equal(x.text, y.text)
    n = a.sample.references[0][1] * a.sample.references[0][2]
    assert torch.equal(x.references[:n], y.references[-n:]) and torch.equal(x.references[n:], y.references[:-n])


@pytest.mark.parametrize("side", [48, 64, 100, 128, 4096])
@pytest.mark.parametrize("references", [1, 2, 3])
def test_the_joint_budget_holds_and_nothing_is_enlarged(builtin_pipe, side, references):
    prepared = encoder_of(builtin_pipe).prepare(row(references), (0, 0), side, 64)
    sizes = prepared.geometry.reference_sizes
    assert sum(w * h for w, h in sizes) <= side**2
    assert all(w % 16 == h % 16 == 0 for w, h in sizes)
    for (w, h), (given_w, given_h) in zip(sizes, SIZES[1:], strict=False):
        assert w <= given_w + 8 and h <= given_h + 8
    assert prepared.sample.references == tuple((1, h // 8, w // 8) for w, h in sizes)
    if side == 4096:
        assert sizes == ((48, 208), (64, 64), (32, 48))[:references], "each its own size, to the nearest 16"


@pytest.mark.parametrize(
    "target, side, expected",
    [((96, 64), 64, (80, 48)), ((96, 64), 4096, (96, 64)), ((64, 64), 32, (32, 32)), ((5, 5), 64, (16, 16))],
)
def test_a_target_over_its_side_is_made_smaller(builtin_pipe, target, side, expected):
    prepared = encoder_of(builtin_pipe).prepare(row(1, target=target), (0, 0), 64, side)
    assert prepared.geometry.size == expected and prepared.sample.target == (1, expected[1] // 8, expected[0] // 8)


def test_only_headers_are_read_to_prepare(builtin_pipe):
    """A picture whose pixels are cut off has a size; that it is damaged shows when it is loaded."""
    whole = source(SIZES[1]).data
    good = row(0)
    cut = Row(good.instruction, (ImageSource("cut.png", data=whole[: len(whole) // 2]),), good.target, None, good.where)
    prepared = encoder_of(builtin_pipe).prepare(cut, (0, 0), 64, 64)
    with pytest.raises(ValueError, match=r"cut\.png"):
        prepared.load()


@pytest.mark.parametrize(
    "size, mode, value, expected",
    [
        ((8, 8), "RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ((8, 8), "LA", (0, 255), (0, 0, 0)),
        ((8, 8), "L", 7, (7, 7, 7)),
        ((8, 8), "I;16", 0x80FF, (128, 128, 128)),
    ],
)
def test_to_rgb(size, mode, value, expected):
    assert to_rgb(Image.new(mode, size, value)).getpixel((3, 3)) == expected


# ---- rows that cannot be used ----


@pytest.mark.parametrize(
    "change, message",
    [
        ({"target": None}, "no target image to train on"),
        ({"references": (ImageSource("a.png", data=b"no picture"),)}, "a.png: not an image"),
        ({"target": ImageSource("b.png", data=b"")}, "b.png: not an image"),
        ({"references": (source((16, 16)),) * 17}, "17 images cannot fit a budget of 64 x 64 pixels"),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_named(builtin_pipe, change, message):
    good = row(1)
    fields = {"references": good.references, "target": good.target, **change}
    broken = Row(good.instruction, fields["references"], fields["target"], None, "rows.jsonl:12")
    with pytest.raises(ValueError, match=rf"^rows\.jsonl:12: .*{message}"):
        encoder_of(builtin_pipe).prepare(broken, (0, 0), 64, 64)


def test_a_text_of_another_length_than_planned_is_never_trained_on(builtin_pipe):
    encoder = encoder_of(builtin_pipe)
    prepared = encoder.prepare(row(1), (0, 0), 64, 64)
    object.__setattr__(prepared, "instruction", prepared.instruction + " and more of it")
    with pytest.raises(RuntimeError, match=r"rows\.jsonl:3: \d+ text tokens, \d+ were planned"):
        encoder.encode(prepared, prepared.load())


# ---- the cache ----


@pytest.mark.parametrize("references", [0, 2])
def test_cached_and_encoded_are_the_same(builtin_pipe, tmp_path, references):
    _, plain = encoded_by(encoder_of(builtin_pipe), row(references))
    first = encoder_of(builtin_pipe, tmp_path)
    _, filling = encoded_by(first, row(references))
    assert first.cache.hits == 0 and first.cache.misses == references + 2
    second = encoder_of(builtin_pipe, tmp_path)
    _, cached = encoded_by(second, row(references))
    assert second.cache.misses == 0 and second.cache.hits == references + 2
    assert same(plain, filling) and same(plain, cached)


def test_cached_tensors_of_another_shape_are_computed_anew_and_named_by_row(builtin_pipe, tmp_path):
    """Files of another key may have been copied to the place."""
    _, plain = encoded_by(encoder_of(builtin_pipe), row(2))
    encoded_by(encoder_of(builtin_pipe, tmp_path), row(2))
    files = list(tmp_path.rglob("*.safetensors"))
    for file in files:
        tensor = load_file(file)["tensor"]
        save_file({"tensor": tensor[:-1].contiguous()}, file)
    encoder = encoder_of(builtin_pipe, tmp_path)
    with pytest.warns(UserWarning, match=r"rows.jsonl:3: the cached .* \(its shape is ") as warned:
        _, again = encoded_by(encoder, row(2))
    assert same(plain, again) and len(warned) == len(files) == 4 == encoder.cache.misses
    _, cached = encoded_by(encoder, row(2))
    assert same(plain, cached) and encoder.cache.hits == 4


def test_the_cache_tells_apart_sizes_instructions_pictures_and_what_is_dropped(builtin_pipe, tmp_path):
    encoder = encoder_of(builtin_pipe, tmp_path)
    good = row(2)
    encoded_by(encoder, good)
    for changed, side, drops in [
        (good, 64, {}),
        (row(2, "something else"), 48, {}),
        (Row(good.instruction, good.references[::-1], good.target, None, good.where), 48, {}),
        (Row(good.instruction, (good.references[0], source(SIZES[2], 99)), good.target, None, good.where), 48, {}),
        (good, 48, {"drop_text": 1.0}),
        (good, 48, {"drop_references": 1.0}),
    ]:
        _, cached = encoded_by(encoder_of(builtin_pipe, tmp_path, **drops), changed, side=side)
        _, plain = encoded_by(encoder_of(builtin_pipe, **drops), changed, side=side)
        assert same(cached, plain)


def test_the_same_picture_in_another_file_is_found(builtin_pipe, tmp_path):
    encoder = encoder_of(builtin_pipe, tmp_path)
    good = row(1)
    encoded_by(encoder, good)
    (tmp_path / "moved.png").write_bytes(good.references[0].data)
    moved = Row(good.instruction, (ImageSource("moved", path=tmp_path / "moved.png"),), good.target, None, "b.tar:7")
    before = encoder.cache.misses
    encoded_by(encoder, moved)
    assert encoder.cache.misses == before


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_what_other_weights_encoded_is_not_used(tmp_path, part):
    pipe = builtin.load()
    _, ours = encoded_by(encoder_of(pipe, tmp_path), row(1))
    weight = next(p for n, p in getattr(pipe, part).named_parameters() if "conv_in" in n or "embed_tokens" in n)
    with torch.no_grad():
        weight.add_(0.1)
    encoder = encoder_of(pipe, tmp_path)
    _, theirs = encoded_by(encoder, row(1))
    assert (encoder.cache.hits, encoder.cache.misses) == ((1, 2) if part == "vae" else (2, 1))
    assert same(theirs, encoded_by(encoder_of(pipe), row(1))[1]) and not same(theirs, ours)


def test_a_row_is_hashed_and_tokenized_once(builtin_pipe, tmp_path, monkeypatch):
    tokenized, real = [], samples.prompt_text
    monkeypatch.setattr(samples, "prompt_text", lambda *args: (tokenized.append(args), real(*args))[1])
    read, read_file = [], ImageSource.read
    monkeypatch.setattr(ImageSource, "read", lambda self: (read.append(self.name), read_file(self))[1])
    encoder = encoder_of(builtin_pipe, tmp_path)
    prepared, _ = encoded_by(encoder, row(2))
    assert encoder.missing(prepared, True, ()) == {}
    assert len(tokenized) == 1 and sorted(read) == ["input_images[1]", "input_images[2]", "output_image"]
    assert encoder.missing(prepared, True, (EMPTY_PROMPT,)) and len(tokenized) == 2


def test_what_another_dtype_encoded_is_not_used(tmp_path):
    """The weights may be the same numbers: what is computed from them is not."""
    encoded_by(encoder_of(builtin.load(torch.bfloat16), tmp_path), row(1))
    encoder = encoder_of(builtin.load(torch.float32), tmp_path)
    _, encoded = encoded_by(encoder, row(1))
    assert encoder.cache.hits == 0 and encoded.target.dtype == encoded.text.dtype == torch.float32


def test_encoding_leaves_no_graph_and_no_mark_on_the_pipeline(builtin_pipe):
    before = [p.requires_grad for p in builtin_pipe.vae.parameters()]
    with torch.enable_grad():
        _, encoded = encoded_by(encoder_of(builtin_pipe), row(1))
    assert encoded.target.grad_fn is None and encoded.text.grad_fn is None
    assert before == [p.requires_grad for p in builtin_pipe.vae.parameters()]
    latents = image_latents(builtin_pipe, picture((64, 64)), (32, 48))
    assert latents.shape == (24, 64), "6 rows of 4 tokens, of (width, height) pixels"
