"""The table of families: what it says works, on small models of the real classes."""

import importlib.util
import inspect
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
import torch.nn.functional as F
from family_models import FAMILIES, SIDE, picture

import uniref_fast
from uniref_fast import EditRequest, builtin, cli
from uniref_fast.cli import main
from uniref_fast.data.dataset import Row
from uniref_fast.data.images import ImageSource
from uniref_fast.evaluation.metrics import through_vae
from uniref_fast.evaluation.requests import eval_request
from uniref_fast.family_table import facts, markdown, report
from uniref_fast.layout import REFERENCE_PLACE, Sample
from uniref_fast.loading import defaults, load_pipeline
from uniref_fast.model_kind import _instead
from uniref_fast.models import onednn_linear, packed
from uniref_fast.models.families import families, family_of, find_transformer
from uniref_fast.models.family import CAPABILITIES
from uniref_fast.models.kept_references import dependence
from uniref_fast.patch.families import _PATCHES
from uniref_fast.quantisation import outside
from uniref_fast.request import geometry, validated_one
from uniref_fast.skeleton import skeleton
from uniref_fast.testing import max_relative_error
from uniref_fast.training.core.model_size import SIZES

ROOT = Path(__file__).parent.parent
TOLERANCE = 1e-4  # of latents in float32 after two steps of models that amplify rounding
PIPELINES = [
    pytest.param(family.name, name, id=name)
    for family in families()
    for name in (*family.pipelines, *family.other_pipelines)
]
EDITED = [pytest.param(family.name, name, id=name) for family in families() for name in family.pipelines]


def named(name):
    return next(family for family in families() if family.name == name)


def make(family, name, request):
    if getattr(diffusers, name, None) is None:
        pytest.skip(f"the installed diffusers has no {name}")
    pipe = FAMILIES[family][0](name, request)
    pipe.set_progress_bar_config(disable=True)
    return pipe, FAMILIES[family][1](name)


def form_of(name):
    """Return an output type that `edit` and the pipeline have in the same form."""
    return "pt" if any(part in name for part in ("Flux", "Joy", "ZImage", "Fibo2")) else "latent"


def stock(pipe, arguments, seed=0):
    torch.manual_seed(0)  # QwenImageControlNetInpaintPipeline draws the latents of its image without the generator
    generator = torch.Generator().manual_seed(seed)
    form = "pt" if "layers" in arguments else form_of(type(pipe).__name__)
    if "Modular" in type(pipe).__name__:  # the scale is a setting of its guider
        arguments = {key: value for key, value in arguments.items() if key != "guidance_scale"}
    images = pipe(**arguments, num_inference_steps=2, generator=generator, output_type=form).images
    return torch.cat(list(images)) if isinstance(images, list) else images


def request_of(arguments, seed=0):
    """Return the request that is the call of a pipeline."""
    images = arguments.get("image", arguments.get("images", []))
    fields = {key: value for key, value in arguments.items() if key in EditRequest.__dataclass_fields__}
    images = images if isinstance(images, list) else [images]
    if "guidance_scale" in arguments:
        fields["true_cfg_scale"] = arguments["guidance_scale"]
    return {**fields, "images": images, "num_inference_steps": 2, "seed": seed}


def test_every_family_is_tested_here():
    assert {family.name for family in families()} == set(FAMILIES)
    for family in families():
        assert set(family.missing) <= set(CAPABILITIES)
        assert set(family.untrained) <= set(family.pipelines)
        assert not set(family.pipelines) & set(family.other_pipelines)
        assert getattr(uniref_fast.models, family.packed.__name__) is family.packed


@pytest.mark.parametrize("family, name", PIPELINES)
def test_patch_gives_the_images_of_the_stock_pipeline(family, name, request):
    pipe, arguments = make(family, name, request)
    assert family_of(pipe).name == family
    if reason := named(family).reason_against("patch"):
        with pytest.raises(ValueError, match=re.escape(reason)):
            uniref_fast.patch(pipe)
        return
    expected = stock(pipe, arguments)
    patched = uniref_fast.patch(pipe)
    for _ in range(2):
        assert max_relative_error(stock(pipe, arguments), expected) < TOLERANCE
    assert patched.calls.total() and not patched.fallbacks and not patched.notes and patched.max_rel_error < 1e-3
    uniref_fast.unpatch(pipe)
    assert torch.equal(stock(pipe, arguments), expected)


@pytest.mark.parametrize("family, name", PIPELINES)
def test_edit_gives_the_latents_of_the_stock_pipeline_or_says_why_not(family, name, request):
    pipe, arguments = make(family, name, request)
    reason = named(family).other_pipelines.get(name)
    if reason is not None:
        for call in (uniref_fast.edit, uniref_fast.estimate):
            with pytest.raises(TypeError, match=re.escape(reason)):
                call(pipe, [{"prompt": "x"}])
        return
    expected = stock(pipe, arguments)
    one, other = request_of(arguments), request_of(arguments, seed=1)
    if "prompt" in other:
        other["prompt"] = other["prompt"].replace("an owl", "two rockets and a fish")
    form = form_of(name)
    packed = uniref_fast.edit(pipe, [one, other], output_type=form, progress=False)
    assert max_relative_error(packed[0].reshape(expected.shape), expected) < TOLERANCE
    (alone,) = uniref_fast.edit(pipe, [one], output_type=form, progress=False)
    assert max_relative_error(alone, packed[0]) < TOLERANCE
    assert max_relative_error(packed[1], packed[0]) > 100 * TOLERANCE, "the requests have different seeds"
    assert uniref_fast.edit(pipe, [one], progress=False)[0].size == (SIDE, SIDE)


@pytest.mark.parametrize(
    "family, name", [("flux2", "Flux2KleinPipeline"), ("flux3", "Flux3DistilledModularPipeline"),
                     ("flux3", "Flux3ModularPipeline")]
)  # fmt: skip
def test_a_subclass_of_a_pipeline_has_the_guidance_of_its_class(family, name):
    """Only some classes of a family have guidance, and the name of a user's class says nothing about it."""
    family, guided = named(family), "Distilled" not in name
    pipe = family.random_pipeline(name, layers=1, grid=4)
    assert family.index(pipe)["_class_name"] == name
    pipe.__class__ = type("Wrapped" if not guided else "DistilledFurther", (type(pipe),), {})
    assert family.index(pipe)["_class_name"] == name and (family.unguided(family.index(pipe)) is None or not guided)
    request = {"prompt": family.written("x"), "negative_prompt": "y", "true_cfg_scale": 4.0}
    if guided:
        assert validated_one(request, "request 1", pipe).negative_prompt == "y"
        return
    with pytest.raises(ValueError, match="Wrapped takes no negative prompt: guidance is part of it"):
        validated_one(request, "request 1", pipe)


@pytest.mark.parametrize("family, name", EDITED)
def test_estimate_counts_the_tokens_of_the_edit(family, name, request, monkeypatch):
    """Sizes instead of images give the same figures; the VAE counts with the shapes of its images and latents."""
    pipe, arguments = make(family, name, request)
    whole = request_of(arguments)
    counted = uniref_fast.estimate(pipe, [whole])
    sizes = [[image.size for image in whole["images"]]]
    assert uniref_fast.estimate(pipe, [{**whole, "images": []}], image_sizes=sizes) == counted
    seen = []
    packed = named(family).packed
    monkeypatch.setattr(packed, "_check", lambda model, image, text, t, layout: seen.append((len(image), len(text))))
    uniref_fast.edit(pipe, [request_of(arguments)], output_type="latent", progress=False)
    shapes = [named(family).vae_shape(pipe.vae, (96, 64), direction) for direction in ("encode", "decode")]
    with torch.no_grad():
        assert pipe.vae.encode(torch.zeros(shapes[0])).latent_dist.mode().shape == shapes[1]
    tokens = counted.tokens
    assert set(seen) == {(tokens["target"] + tokens["reference"], tokens["text"])}


@pytest.mark.parametrize("family, name", EDITED)
def test_kept_references(family, name, request):
    pipe, arguments = make(family, name, request)
    one, asked = request_of(arguments), named(family)

    def edited(**options):
        return uniref_fast.edit(pipe, [one], output_type="latent", progress=False, **options)[0]

    if reason := asked.reason_against("keep_references"):
        with pytest.raises(ValueError, match=re.escape(reason)):
            edited(keep_references=2)
        return
    every = edited(keep_references=1)
    assert torch.equal(every, edited()) or max_relative_error(every, edited()) < TOLERANCE
    model = asked.packed(pipe.transformer)
    text = ((2, True), REFERENCE_PLACE, (1, True))
    exact = dependence(model.layout([Sample(text, (1, 2, 2), ((1, 2, 2),))]), model.visibility) is None
    assert exact == (asked.exact_references == "always" or name in asked.exact_references)
    if exact:
        assert max_relative_error(edited(keep_references=True), edited()) < TOLERANCE
    else:
        with pytest.raises(ValueError, match="would not be exact"):
            edited(keep_references=True)


@pytest.mark.parametrize("family", [family.name for family in families()])
def test_linears_of_packed_blocks_are_called_by_one_function(family, request, monkeypatch):
    """Check that oneDNN can compute them; those of modulation and cross-attention are called as PyTorch does."""
    monkeypatch.setattr(onednn_linear, "onednn_is_faster", lambda: True)
    called, chosen = set(), set()
    linear, by_rows = F.linear, packed.row_by_row_linear
    monkeypatch.setattr(F, "linear", lambda x, weight, *args: (called.add(weight), linear(x, weight, *args))[1])
    monkeypatch.setattr(
        packed, "row_by_row_linear", lambda each, x, impl: (chosen.add(each), by_rows(each, x, impl))[1]
    )
    pipe, arguments = make(family, next(iter(named(family).pipelines)), request)
    uniref_fast.edit(pipe, [request_of(arguments)], progress=False)
    expected, kinds = set(), named(family).packed.row_kinds
    for block in named(family).packed(find_transformer(pipe)).blocks:
        for name, module in block.block.named_modules():
            kind = next(kind for part, kind in kinds if part in f".{name}")
            if type(module) is torch.nn.Linear and kind != "table" and not name.startswith("cross_attention"):
                expected.add(module)
    ran = {each for each in expected if each.weight in called}  # the last block skips Linears of the text
    assert ran and {each for each in chosen if type(each) is torch.nn.Linear} == ran


@pytest.mark.parametrize("family", [family.name for family in families()])
def test_8_bits(family, request):
    pipe, arguments = make(family, named(family).pipelines[0], request)

    def edited():
        return uniref_fast.edit(pipe, [request_of(arguments)], mode="fast", impl="reference", progress=False)

    if reason := named(family).reason_against("fast"):
        for call in (edited, lambda: uniref_fast.patch(pipe, mode="fast", impl="reference")):
            with pytest.raises(ValueError, match=re.escape(reason) + "|not supported"):
                call()
    else:
        assert edited()


@pytest.mark.parametrize("family", [family.name for family in families()])
def test_training_is_refused_where_the_table_says_so(family):
    """The other families train in tests/training."""
    from uniref_fast.model_kind import check_trainable

    asked = named(family)
    index = {"_class_name": asked.pipelines[0]}
    for kind in ("sft", "msgrpo"):
        if (reason := asked.reason_against("sft") or asked.reason_against(kind)) is None:
            check_trainable("x", index, kind)
            assert asked.transformer in SIZES, "uniref-fast plan knows its sizes"
        else:
            with pytest.raises(ValueError, match=re.escape(reason)):
                check_trainable("x", index, kind)


@pytest.mark.parametrize("family, name", EDITED)
def test_commands_use_the_defaults_of_the_pipeline(family, name, tmp_path):
    """A pipeline without guidance has a scale of 1; the one that a transformer embeds comes before the other."""
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    if "Modular" in name:  # the arguments are those of its blocks, and the scale is a setting of its guider
        pipe = getattr(diffusers, name)()
        scale = getattr(getattr(pipe, "guider", None), "guidance_scale", 1.0)
        assert defaults(str(tmp_path)) == (pipe.default_call_parameters["num_inference_steps"], scale)
        return
    call = inspect.signature(getattr(diffusers, name).__call__).parameters
    scales = (call[key].default for key in ("guidance_scale", "true_cfg_scale") if key in call)
    scale = next((each for each in scales if each is not None), 1.0)
    assert defaults(str(tmp_path)) == (call["num_inference_steps"].default, scale)


@pytest.mark.parametrize(
    "index, expected",
    [
        ({"_class_name": "QwenImage21Pipeline", "sample_sigmas": [1.0, 0.8, 0.5]}, (3, 1.0)),
        ({"_class_name": "QwenImage21Pipeline", "sample_sigmas": None}, (40, 1.0)),
        ({"_class_name": "Flux2KleinPipeline", "is_distilled": True}, (4, 1.0)),
    ],
)
def test_a_distilled_checkpoint_has_its_own_defaults(index, expected, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert defaults(str(tmp_path)) == expected


def test_commands_know_a_saved_klein_that_is_distilled(tmp_path):
    """Take 4 steps without guidance for a `model_index.json` that says so, unless flags give others."""
    pipe = named("flux2").random_pipeline("Flux2KleinPipeline", layers=1, heads=1)
    pipe.register_to_config(is_distilled=True)
    pipe.save_config(tmp_path)
    flags = ["edit", "--prompt", "an owl", "--out", "a.png", "--model", str(tmp_path)]
    fields = cli._request_fields(cli._parser().parse_args(flags))
    assert (fields["num_inference_steps"], fields["true_cfg_scale"], fields["negative_prompt"]) == (4, 1.0, None)
    fields = cli._request_fields(cli._parser().parse_args([*flags, "--num-inference-steps", "8"]))
    assert validated_one(fields, "request 1", pipe).num_inference_steps == 8


@pytest.mark.parametrize("family", ["flux2", "z-image"])
def test_images_that_a_pipeline_refuses_are_named(family):
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    pipe = SimpleNamespace(image_processor=Flux2ImageProcessor())
    assert named(family).image_refusal(pipe, [(64, 64), (80, 600)]) is None
    assert named(family).image_refusal(pipe, [(64, 64), (63, 64)]).startswith("image 2: Image too small: 63")


@pytest.mark.parametrize("family, name", EDITED)
def test_a_request_has_the_defaults_of_the_call(family, name, request):
    """A pipeline without guidance has a scale of 1."""
    pipe, arguments = make(family, name, request)
    asked = {key: value for key, value in request_of(arguments).items() if key != "num_inference_steps"}
    asked.pop("true_cfg_scale", None)
    checked = validated_one(asked, "request 1", pipe)
    if "Modular" in name:
        steps, scale = pipe.default_call_parameters["num_inference_steps"], 1.0 if "Distilled" in name else 2.0
    else:
        call = inspect.signature(getattr(diffusers, name).__call__).parameters
        steps = call["num_inference_steps"].default
        scale = next((call[key].default for key in ("guidance_scale", "true_cfg_scale") if key in call
                      and call[key].default is not None), 1.0)  # fmt: skip
    assert (checked.num_inference_steps, checked.true_cfg_scale) == (steps, scale)
    assert isinstance(checked.true_cfg_scale, float)
    given = validated_one({**asked, "num_inference_steps": 3, "true_cfg_scale": 2}, "request 1", pipe)
    assert given.num_inference_steps == 3 and given.true_cfg_scale == (1.0 if "KV" in name or "Dist" in name else 2)


def test_a_model_without_embedded_guidance_has_the_other_default(request):
    pipe, _ = make("flux1", "FluxKontextPipeline", request)
    pipe.transformer.register_to_config(guidance_embeds=False)
    assert validated_one({"prompt": "x"}, "request 1", pipe).true_cfg_scale == 1.0


def test_a_pipeline_of_your_own_has_its_own_defaults():
    class Mine(diffusers.QwenImageEditPlusPipeline):
        def __call__(self, image, num_inference_steps=7, true_cfg_scale=None, **options):
            pass

    class Other(diffusers.QwenImageEditPlusPipeline):
        def __call__(self, *args, **options):
            pass

    parts = builtin.load().components
    assert named("qwen-image-edit").call_defaults(Mine(**parts)) == (7, 4.0)
    assert named("qwen-image-edit").call_defaults(Other(**parts)) == (50, 4.0)
    assert named("qwen-image-edit").call_defaults(builtin.load()) == (50, 4.0)


@pytest.mark.parametrize("family, name", EDITED)
def test_commands_use_the_prompts_of_the_pipeline(family, name, request, tmp_path):
    """Only for Qwen-Image models commands give a negative prompt of their own, with which these have guidance."""
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    flags = ["edit", "--prompt", "an owl", "--out", "a.png", "--model", str(tmp_path), "--true-cfg-scale", "3"]
    fields = cli._request_fields(cli._parser().parse_args(flags))
    pipe, arguments = make(family, name, request)
    asked = {**request_of(arguments), "negative_prompt": None, "true_cfg_scale": 3.0}
    if pipe.text_encoder is None:
        pytest.skip("this small pipeline has no text encoder")
    alone = validated_one(asked, "request 1", pipe)
    given = validated_one({**asked, **{key: fields[key] for key in ("prompt", "negative_prompt")}}, "request 1", pipe)
    content = io.BytesIO()
    picture(1).save(content, "PNG")
    row = Row("an owl", (ImageSource("a", data=content.getvalue()),), None, None, "a:1")
    options = {"target_side": 64, "budget": None, "seed": 0, "num_inference_steps": 2, "true_cfg_scale": 3.0}
    one = eval_request(pipe, row, ("a", 0), **options)
    assert (one.request.prompt, one.request.negative_prompt) == (given.prompt, given.negative_prompt)
    if family.startswith("qwen"):
        assert (alone.negative_prompt, given.negative_prompt) == (None, " ")
    else:
        assert given.negative_prompt == alone.negative_prompt


@pytest.mark.parametrize("family, name", EDITED)
def test_guidance_without_a_text_encoder_needs_embeddings(family, name, request):
    """A pipeline that would encode a negative prompt refuses; the others have no guidance, or embed the scale."""
    pipe, arguments = make(family, name, request)
    for part in ("text_encoder", "text_encoder_2"):
        if hasattr(pipe, part):
            setattr(pipe, part, None)
    asked = {key: value for key, value in request_of(arguments).items() if "prompt" not in key}
    if family in ("qwen-image-2.1", "z-image"):
        asked["images"] = []  # embeddings do not say where they are
    embeds = torch.zeros(512, named(family).text_channels(pipe.transformer.config))
    asked |= {"prompt_embeds": embeds, "true_cfg_scale": 3.0}
    assert validated_one({**asked, "true_cfg_scale": 1.0}, "request 1", pipe)
    if family.startswith("qwen") or family == "flux1" or any(part in name for part in ("KV", "Flux2P", "Distilled")):
        assert not validated_one(asked, "request 1", pipe).guided
        return
    with pytest.raises(ValueError, match=r"request 1: .* no text encoder; guidance needs negative_prompt_embeds"):
        validated_one(asked, "request 1", pipe)
    assert validated_one({**asked, "negative_prompt_embeds": embeds}, "request 1", pipe).guided


def test_a_freed_text_encoder_leaves_the_negative_prompt_of_a_row(request):
    """Training encodes the prompts itself then."""
    content = io.BytesIO()
    picture(1).save(content, "PNG")
    row = Row("x", (ImageSource("a", data=content.getvalue()),), None, None, "a:1")
    pipe, _ = make("flux2", "Flux2KleinPipeline", request)
    pipe.text_encoder = None
    options = {"target_side": 64, "budget": None, "seed": 0, "num_inference_steps": 2, "true_cfg_scale": 3.0}
    one = eval_request(pipe, row, ("a", 0), **options)
    assert one.request.guided and [text for text, _, _ in one.request.texts] == ["x", ""]


@pytest.mark.parametrize("family", [family.name for family in families()])
def test_the_bound_of_an_evaluation_is_an_rgb_image(family, request):
    pipe, _ = make(family, named(family).pipelines[0], request)
    image = through_vae(pipe, picture(1))
    assert image.mode == "RGB" and image.size == picture(1).size


def test_a_row_that_the_family_refuses_has_an_error_of_its_own(request):
    """FLUX.2 takes no reference with a side below 64 pixels."""
    content = io.BytesIO()
    picture(1, 48).save(content, "PNG")
    row = Row("x", (ImageSource("a", data=content.getvalue()),), None, None, "a:1")
    pipe, _ = make("flux2", "Flux2KleinPipeline", request)
    with pytest.raises(ValueError, match="too small"):
        eval_request(pipe, row, ("a", 0), target_side=64, budget=None, seed=0, num_inference_steps=2, true_cfg_scale=1)


@pytest.mark.parametrize(
    ("pipeline", "part", "processor", "transformer"),
    [
        ("QwenImage21Pipeline", "processor", "Qwen3VLProcessor", "QwenImage21Transformer2DModel"),
        ("Flux2Pipeline", "tokenizer", "PixtralProcessor", "Flux2Transformer2DModel"),
    ],
)
def test_a_processor_that_needs_torchvision_is_refused_before_anything_is_loaded(
    pipeline, part, processor, transformer, tmp_path, monkeypatch
):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchvision" else find(name))
    index = {
        "_class_name": pipeline, part: ["transformers", processor], "image_encoder": [None, None], "is_distilled": True,
        "transformer": ["diffusers", transformer],
    }  # fmt: skip
    (tmp_path / "transformer").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "transformer/config.json").write_text(json.dumps({"_class_name": transformer}))
    for load in (lambda name: load_pipeline(name, torch.float32, "cpu"), skeleton):
        with pytest.raises(ValueError, match=rf"{processor}, which needs torchvision; .*uniref_fast\[processor\]"):
            load(str(tmp_path))


@pytest.mark.parametrize("family", [family.name for family in families()])
def test_linears_outside_of_the_blocks_are_not_quantised(family, request):
    """A name of the list leaves out the modules whose path contains it, as diffusers compares them."""
    pipe, _ = make(family, named(family).pipelines[0], request)
    linears = [name for name, each in pipe.transformer.named_modules() if isinstance(each, torch.nn.Linear)]
    skipped = {name for name in linears if any(key == name or f"{key}." in name for key in outside())}
    blocks = tuple(f"{path}." for path in named(family).packed.block_classes)
    # The modulation of a block may have the name of one outside of the blocks; it stays as well.
    assert skipped == {name for name in linears if not name.startswith(blocks) or "modulation" in name} and skipped


def test_the_error_names_training_only_where_it_works():
    for family in families():
        words = "editing, estimates, training and evaluation take a "
        assert (words in _instead(family)) == (family.reason_against("sft") is None)


def test_the_first_generation_takes_one_image(request):
    pipe, _ = make("qwen-image-edit", "QwenImageEditPipeline", request)
    for images in ([], [picture(1), picture(2)]):
        with pytest.raises(ValueError, match=f"takes exactly one image per request, got {len(images)}"):
            uniref_fast.edit(pipe, [{"prompt": "x", "images": images}])


def test_the_first_generation_has_the_sizes_of_diffusers():
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions

    pipe = diffusers.QwenImageEditPipeline(**builtin.load().components)
    width, height, _ = calculate_dimensions(1024 * 1024, 300 / 200)
    sizes = geometry(pipe, [(300, 200)])
    assert sizes.size == (width, height) and sizes.condition_sizes == sizes.reference_sizes == ((width, height),)


def test_a_pipeline_that_training_does_not_take():
    from uniref_fast.model_kind import check_trainable

    with pytest.raises(ValueError, match="is a QwenImageEditPipeline, which training does not support: it"):
        check_trainable("--model x", {"_class_name": "QwenImageEditPipeline"})
    check_trainable("--model x", {"_class_name": "SmallQwenImageEditPlusPipeline"})


@pytest.mark.parametrize("kind", [diffusers.SD3Transformer2DModel, diffusers.PixArtTransformer2DModel])
def test_an_unknown_transformer_is_refused_with_the_nearest_class(kind):
    with torch.device("meta"):
        model = kind(num_layers=1)
    for call in (find_transformer, family_of, uniref_fast.patch):
        with pytest.raises(TypeError) as error:
            call(model)
        message = str(error.value)
        assert f"{kind.__name__} is not supported. It must be a transformer of exactly one of these classes:" in message
        assert "uniref-fast families" in message


def test_a_misspelt_class_gets_the_nearest_one():
    class QwenImageEditPlusPipelines:
        pass

    with pytest.raises(TypeError, match="nearest: QwenImageEditPlusPipeline"):
        family_of(QwenImageEditPlusPipelines())


def test_a_family_that_the_installed_diffusers_does_not_have(monkeypatch):
    from uniref_fast.model_kind import check_configuration

    family = families()[0]
    monkeypatch.setattr(diffusers, family.transformer, None)
    index = {"_class_name": family.pipelines[0], "transformer": ["diffusers", family.transformer]}
    with pytest.raises(ValueError, match=f"the installed diffusers .* has no {family.transformer}; install a newer"):
        check_configuration("--model x", index)


def test_the_command(capsys):
    assert main(["families"]) == 0
    text = capsys.readouterr().out
    assert text.strip() == report(facts())
    assert main(["families", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(facts()))
    for family in families():
        assert all(name in text for name in (family.name, *family.pipelines, *family.other_pipelines, *family.models))


def test_the_tables_of_the_documentation():
    page = (ROOT / "docs/families.md").read_text(encoding="utf-8")
    assert markdown(facts()) in page, "write the tables of `uniref_fast.family_table.markdown(facts())` into the page"
    rows = re.findall(r"^\|.*`.*\|$", page, re.M)
    assert len(rows) == len(set(rows)), "a row is there twice"


def test_the_page_names_the_files_of_every_family():
    named_files = set(
        re.findall(r"`(uniref_fast/[\w/]+\.py)`", (ROOT / "docs/families.md").read_text(encoding="utf-8"))
    )
    assert all((ROOT / path).is_file() for path in named_files)
    package = ROOT / "uniref_fast"
    files = {*package.glob("models/*_family.py"), *package.glob("random_models/[a-z]*.py")}
    files |= {ROOT / f"{place.partition(':')[0].replace('.', '/')}.py" for place in _PATCHES.values()}
    files |= {ROOT / f"{family.packed.__module__.replace('.', '/')}.py" for family in families()}
    assert {str(path.relative_to(ROOT)) for path in files} <= named_files
