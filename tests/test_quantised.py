"""`patch` and `edit` on transformers that other libraries have quantised: each format in each use.

The oracle of a format is a transformer in float64 whose weights are those that its Linears multiply with, read off the
Linears themselves. What a patched or packed model computes may be twice as far from it as the quantised model of
diffusers is.
"""

import argparse
import contextlib
import functools
import typing
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from quantised_models import CONFIG, DTYPE, FORMATS, build, enable_casting, load, without_gpu_check

import uniref_fast
from uniref_fast import EditReport, EditRequest, PackedQwenImage, Sample
from uniref_fast.adapters import Adapter, apply_adapters
from uniref_fast.builtin.components import TEXT_DIM
from uniref_fast.costs import weight_bytes
from uniref_fast.quantised import row_dependence, stored_format
from uniref_fast.quantised_linear import base_linear, is_quantised
from uniref_fast.testing import assert_within_budget

QUICK = ("torchao int8", "bitsandbytes nf4")
VARIANTS = ("torchao int8, quantize_", "bitsandbytes nf4 double", "bitsandbytes int8, threshold 0", "GGUF Q8_0",
            "quanto float8")  # fmt: skip
"""Formats that differ from another one in their numbers only: they are tested in a single forward."""


def formats(*left_out):
    """Parametrise a test by the formats; all but the quick ones are marked as slow."""
    names = [name for name in FORMATS if name not in left_out]
    return pytest.mark.parametrize(
        "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]
    )


every_format, each_format = formats(), formats(*VARIANTS)
GRIDS = [(1, 4, 6), (1, 3, 5), (1, 1, 7)]  # target and two references
TEXT = 7
LOOP_ERROR = 0.01
"""Largest relative error (norms) of the final latents of a loop against that of diffusers, both in bfloat16."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Quanto.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:each result depends a little"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("quantised")
    build().save_pretrained(path / "transformer")
    return path


@pytest.fixture(scope="module")
def shared(folder):
    """Load each format once; the tests that use it leave it as it was."""
    return functools.cache(lambda name: load(name, folder))


@pytest.fixture(scope="module")
def pipe_of():
    """Return a pipeline with a given transformer and the other parts of the built-in model."""
    from uniref_fast import builtin

    base = builtin.load(dtype=DTYPE)

    def make(transformer):
        pipe = builtin.SmallQwenImageEditPlusPipeline(**{**base.components, "transformer": transformer})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def inputs(dtype=DTYPE):
    generator = torch.Generator().manual_seed(1)
    tokens = sum(h * w for _, h, w in GRIDS)
    image = torch.randn(1, tokens, 64, generator=generator).to(DTYPE).to(dtype)
    text = torch.randn(1, TEXT, TEXT_DIM, generator=generator).to(DTYPE).to(dtype)
    return image, text, torch.tensor([0.7], dtype=dtype)


def stock(model, dtype=DTYPE):
    """Return the result of diffusers' forward, `[1, N_image, C]`, or only the targets' rows."""
    image, text, timestep = inputs(dtype)
    with torch.no_grad():
        return model(
            hidden_states=image, encoder_hidden_states=text, encoder_hidden_states_mask=None, timestep=timestep,
            img_shapes=[GRIDS], return_dict=False,
        )[0]  # fmt: skip


def packed(model, count=1):
    """Return the targets' rows of each of `count` equal samples of a pack."""
    image, text, timestep = inputs()
    run = PackedQwenImage(model)
    layout = run.layout([Sample(TEXT, GRIDS[0], tuple(GRIDS[1:]))] * count)
    with torch.no_grad():
        out = run(image[0].repeat(count, 1), text[0].repeat(count, 1), timestep.repeat(count), layout)
    return layout.split_targets(out)


def oracle_of(model):
    """Return the transformer in float64, whose Linears have the weights that a quantised model multiplies with."""
    wide = build(torch.float64)
    wide.load_state_dict({name: value.double() for name, value in build().state_dict().items()})
    for name, linear in wide.named_modules():
        if isinstance(linear, torch.nn.Linear):
            quantised = model.get_submodule(name)
            bias, quantised.bias = quantised.bias, None
            unit = torch.eye(linear.in_features, dtype=DTYPE)
            with torch.no_grad():
                linear.weight.copy_(quantised(unit).T)
            quantised.bias = bias
    return wide


def kinds(model):
    return {name: (type(module), type(getattr(module, "weight", None))) for name, module in model.named_modules()}


def pictures():
    sizes = {"red": (60, 40), "blue": (64, 64), "green": (33, 77)}
    return {color: Image.new("RGB", size, color) for color, size in sizes.items()}


def requests():
    """Two requests of different sizes and numbers of references."""
    image = pictures()
    return [
        EditRequest("make it night", [image["red"]], true_cfg_scale=1.0, seed=2, num_inference_steps=2),
        EditRequest("a b c d", [image["blue"], image["green"]], true_cfg_scale=1.0, seed=3, height=64, width=96,
                    num_inference_steps=2),
    ]  # fmt: skip


def call(pipe, request):
    """Return the final latents of the pipeline's own call."""
    return pipe(
        image=list(request.images), prompt=request.prompt, height=request.height, width=request.width,
        num_inference_steps=request.num_inference_steps, true_cfg_scale=1.0, output_type="latent",
        generator=torch.Generator().manual_seed(request.seed),
    ).images  # fmt: skip


def edited(pipe, given=None, **options):
    return uniref_fast.edit(pipe, given or requests(), output_type="latent", progress=False, **options)


def relative(actual, expected):
    assert actual.isfinite().all()
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


# ---- one forward


@every_format
def test_patched_and_packed_forwards_are_within_the_budget(shared, name):
    """No call runs the original, no Linear is replaced, and unpatch gives the same bits as before."""
    model = shared(name)
    expected, oracle, before = stock(model), stock(oracle_of(model), torch.float64), kinds(model)
    assert relative(expected, oracle) < 0.02, "the oracle has the weights of the quantised model"
    report = uniref_fast.patch(model)
    try:
        for _ in range(2):
            out = stock(model)
            assert_within_budget(out, expected, oracle, "patched")
        assert report.calls.total() == 2 * len(report.sites) == 12 and not report.fallbacks, report
        assert kinds(model) == before
    finally:
        uniref_fast.unpatch(model)
    assert torch.equal(stock(model), expected)
    targets = GRIDS[0][1] * GRIDS[0][2]
    for sample in packed(model, count=2):
        assert_within_budget(sample, expected[0, :targets], oracle[0, :targets], "packed")


BYTES = {"nf4": 4 / 8 + 2 / 64, "nf4 double": 4 / 8 + 1 / 64, "Q8_0": 34 / 32, "Q4_0": 18 / 32, "int4": 1 + 3 / 32,
         "casting": 1, "interface": 4 / 8 + 2 / 32 + 2 * 8 * 2 / 256}  # fmt: skip
"""Bytes per weight of the formats, but for small tables; those of 8 bits have scales of rows in addition, and the
scales of nf4 have 32 bits until a CPU has used them."""


@every_format
def test_the_blocks_are_stored_in_the_format(shared, name):
    """`estimate` counts the bytes that the format has by its definition."""
    model = shared(name)
    linears = [module for module in model.transformer_blocks.modules() if hasattr(module, "in_features")]
    assert len(linears) == 3 * 14 and None not in map(stored_format, linears)
    numbers = sum(linear.in_features * linear.out_features for linear in linears)
    rest = sum(p.numel() for key, p in build().transformer_blocks.named_parameters() if p.ndim == 1)
    per_weight = (weight_bytes(model.transformer_blocks) - 2 * rest) / numbers
    expected = next((count for words, count in BYTES.items() if name.endswith(words)), 1)
    assert expected * 0.97 <= per_weight <= expected * 1.1
    assert stored_format(torch.nn.Linear(4, 4)) is None is stored_format(torch.nn.Linear(4, 4).bfloat16())


# ---- edit


@each_format
def test_edit_equals_the_pipeline_and_each_request_its_own_run(shared, pipe_of, name):
    pipe = pipe_of(shared(name))
    together = edited(pipe)
    for request, latents in zip(requests(), together, strict=True):
        assert relative(latents, call(pipe, request)) < LOOP_ERROR
        (alone,) = edited(pipe, [request])
        assert relative(latents, alone) < LOOP_ERROR


def test_a_warning_where_results_depend_on_their_pack(folder, shared, pipe_of):
    """Outliers of LLM.int8 make whole channels exact, for all rows of a call; one scale may serve all of them."""
    torchao = pytest.importorskip("torchao.quantization")
    from torchao.quantization.quantize_.workflows.float8.float8_tensor import QuantizeTensorToFloat8Kwargs

    outliers, without = shared("bitsandbytes int8"), shared("bitsandbytes int8, threshold 0")
    x = torch.randn(9, CONFIG["num_attention_heads"] * CONFIG["attention_head_dim"], dtype=DTYPE)
    x[7, 3] = 20
    with torch.no_grad():
        for model, equal in ((outliers, False), (without, True)):
            linear = model.transformer_blocks[0].attn.to_q
            assert torch.equal(linear(x)[:4], linear(x[:4])) == equal
    with pytest.warns(UserWarning, match=r"depends a little on the other requests: .*bitsandbytes .*6 or more"):
        edited(pipe_of(outliers))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edited(pipe_of(outliers), requests()[:1])
        edited(pipe_of(without))
    for granularity, found in ((torchao.PerTensor(), True), (torchao.PerRow(), False)):
        linear = torch.nn.Linear(32, 32, dtype=DTYPE)
        weight = torchao.Float8Tensor.from_hp(
            linear.weight.detach(), granularity=granularity,
            act_quant_kwargs=QuantizeTensorToFloat8Kwargs(granularity=granularity),
        )  # fmt: skip
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        assert ("one scale for all rows" in str(row_dependence(linear))) == found


@each_format
def test_references_are_kept(shared, pipe_of, name):
    """The result is the same where keeping is exact, and the pipeline keeps the same references as `edit`."""
    pipe = pipe_of(shared(name))
    given, report = requests()[1:], EditReport()
    (kept,) = edited(pipe, given, keep_references=True, visibility="reference_isolated", report=report)
    (whole,) = edited(pipe, given, visibility="reference_isolated")
    assert report.references[0].refreshed == (0,) and report.references[0].steps == 2
    assert relative(kept, whole) < LOOP_ERROR
    patched = uniref_fast.patch(pipe, keep_references=2)
    try:
        assert relative(call(pipe, given[0]), edited(pipe, given, keep_references=2)[0]) < LOOP_ERROR
        assert [steps.refreshed for steps in patched.references] == [(0,)] and not patched.references_not_kept
    finally:
        uniref_fast.unpatch(pipe)


@each_format
def test_mode_fast_leaves_quantised_linears_as_they_are(shared, pipe_of, name):
    """Attention is then in 8 bits, and the reports name the formats of the Linears."""
    model = shared(name)
    pipe, before, given = pipe_of(model), kinds(model), requests()[1:]
    (exact,), report = edited(pipe, given), EditReport()
    (fast,) = edited(pipe, given, mode="fast", impl="reference", report=report)
    assert 1e-4 < relative(fast, exact) < 0.1 and kinds(model) == before
    assert report.errors.keys() == {"transformer_blocks.1.attn.processor"}
    assert report.note.startswith("42 Linears of the blocks are quantised already and stay as they are: 42 ")
    patched = uniref_fast.patch(pipe, mode="fast", impl="reference")
    try:
        assert patched.eight_bit == (0, 1) and report.note in patched.notes and kinds(model) == before
        assert relative(call(pipe, given[0]), fast) < 0.05
    finally:
        uniref_fast.unpatch(pipe)
    assert kinds(model) == before and not any(map(is_quantised, model.modules()))


# ---- adapters


@pytest.fixture(scope="module")
def adapter(folder):
    """A LoRA on attention and feed-forwards, as a file."""
    model = build(torch.float32)
    torch.manual_seed(1)
    targets = ["to_q", "to_k", "add_v_proj", "to_out.0", "img_mlp.net.2"]
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=targets))
    from uniref_fast.builtin import SmallQwenImageEditPlusPipeline as Pipeline

    Pipeline.save_lora_weights(str(folder / "lora"), transformer_lora_layers=get_peft_model_state_dict(model))
    return Adapter.parse(f"{folder / 'lora'}:1.5")


NO_ADAPTERS = {
    "SVDQuant interface": r"--lora .* could not be applied to the model: Target module LowRank",
    "layerwise casting": r"--lora .* would be stored as torch.float8_e4m3fn.* apply adapters first",
}


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without")
@each_format
def test_adapters_on_quantised_linears(folder, pipe_of, adapter, name):
    """The adapter of diffusers and peft has the same effect in the pipeline, patched and packed."""
    pipe = pipe_of(load(name, folder))
    request = requests()[1]
    before = call(pipe, request)
    if name in NO_ADAPTERS:
        with pytest.raises(ValueError, match=NO_ADAPTERS[name]):
            apply_adapters(pipe, [adapter], None, (), DTYPE)
        if name != "layerwise casting":
            return
        pipe = pipe_of(build())
    apply_adapters(pipe, [adapter], None, (), DTYPE)
    if name == "layerwise casting":
        enable_casting(pipe.transformer)
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    assert base_linear(layer) is not layer and stored_format(base_linear(layer)) is not None
    expected = call(pipe, request)
    assert relative(expected, before) > 4 * LOOP_ERROR
    report = uniref_fast.patch(pipe)
    assert relative(call(pipe, request), expected) < LOOP_ERROR
    assert report.calls.total() == 12 and not report.fallbacks, report
    uniref_fast.unpatch(pipe)
    (result,) = edited(pipe, [request])
    assert relative(result, expected) < LOOP_ERROR


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="without AVX512-BF16, rows are rounded by pack")
@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without")
@formats(*VARIANTS, *(name for name, form in FORMATS.items() if not form.by_row))
def test_results_have_the_same_bits(folder, pipe_of, adapter, name):
    """A request has the same result in a pack and alone, with kept references, and with an adapter."""
    pipe, given = pipe_of(load(name, folder)), requests()
    together = edited(pipe)
    assert all(torch.equal(edited(pipe, [one])[0], latents) for one, latents in zip(given, together, strict=True))
    kept, whole = (
        edited(pipe, given[1:], keep_references=keep, visibility="reference_isolated")[0] for keep in (True, False)
    )
    assert torch.equal(kept, whole)
    if name not in NO_ADAPTERS:
        apply_adapters(pipe, [adapter], None, (), DTYPE)
        assert torch.equal(edited(pipe)[1], edited(pipe, given[1:])[0])


def test_the_table_of_the_documents():
    """Compare each cell of the table with what the tests expect."""
    text = (Path(__file__).parent.parent / "docs/quantised.md").read_text()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    found = {name: cells for name, _, *cells in table[2:]}
    expected = {}
    for name, form in FORMATS.items():
        lora = {"SVDQuant interface": "refused", "layerwise casting": "yes, applied first"}.get(name, "yes")
        assert (lora == "yes") == (name not in NO_ADAPTERS)
        bits = "the same bits" if form.by_row else "may differ a little"
        expected[name] = [bits, lora, "yes" if name in SAVED else "not tried"]
    assert found == {name: cells for name, cells in expected.items() if name not in VARIANTS}


def test_a_transformer_of_nunchaku_is_refused():
    """The blocks are not those of diffusers, and the error names the way to load the checkpoint that is supported."""
    stranger = type("NunchakuQwenImageTransformer2DModel", (type(build()),), {})
    model = build()
    model.__class__ = stranger
    with pytest.raises(TypeError, match=r"NunchakuQwenImageTransformer2DModel is not supported: .*NunchakuLite"):
        uniref_fast.patch(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchao int8", "bitsandbytes nf4", "GGUF Q4_0"])
def test_group_offloading(folder, pipe_of, name):
    """The hooks of a block run in `edit` as in the pipeline, and change no bits of the result."""
    pipe, request = pipe_of(load(name, folder)), requests()[1]
    (expected,) = edited(pipe, [request])
    device = torch.device("cpu")
    pipe.transformer.enable_group_offload(device, device, offload_type="block_level", num_blocks_per_group=1)
    assert torch.equal(edited(pipe, [request])[0], expected)
    report = uniref_fast.patch(pipe)
    assert relative(call(pipe, request), expected) < LOOP_ERROR and not report.fallbacks


# ---- save, compile


SAVED = ("torchao int8", "torchao int8 dynamic", "quanto int8", "bitsandbytes nf4", "bitsandbytes int8")
"""Formats that diffusers can save and load again."""


@each_format
def test_a_patched_model_is_saved_as_it_was(folder, tmp_path, name):
    """The state dict holds the same tensors, and a saved model loads again where diffusers can save the format."""
    model = load(name, folder)
    expected, before = stock(model), dict(model.state_dict())
    uniref_fast.patch(model, mode="fast", impl="reference")
    stock(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(type(after[key]) is type(value) and after[key].shape == value.shape for key, value in before.items())
    if name in SAVED:
        model.save_pretrained(tmp_path / "saved")
        with without_gpu_check() if name.startswith("bitsandbytes") else contextlib.nullcontext({}) as options:
            again = type(model).from_pretrained(tmp_path / "saved", torch_dtype=DTYPE, **options)
        # bitsandbytes rounds the scales of nf4 to 16 bits when a CPU has run it and it is saved, patched or not
        assert relative(stock(again), expected) <= (0.03 if name == "bitsandbytes nf4" else 0)
    uniref_fast.unpatch(model)
    assert relative(stock(model), expected) <= (0.03 if name == "bitsandbytes nf4" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchao int8", "bitsandbytes nf4", "GGUF Q4_0", "SVDQuant interface"])
def test_compiled_blocks(folder, name):
    model = load(name, folder)
    expected = stock(model)
    report = uniref_fast.patch(model)
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend="eager")
    for _ in range(2):
        assert relative(stock(model), expected) < LOOP_ERROR
    assert report.traces and not report.traced_originals
    torch._dynamo.reset()


# ---- pipelines that this package loads, estimates, the doctor


@pytest.mark.parametrize("name", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_a_pipeline_is_loaded_in_fewer_bits(tmp_path, name):
    """`estimate` knows the bytes before and after; a transformer that is loaded later is quantised likewise."""
    from uniref_fast import builtin
    from uniref_fast.fingerprint import fingerprint
    from uniref_fast.loading import load_pipeline, load_transformer

    pytest.importorskip("torchao")
    given = requests()[1:]
    folder = builtin.store.model_folder()
    planned = uniref_fast.estimate(folder, given, quantisation=name).stages
    whole = uniref_fast.estimate(folder, given).stages
    pipe = load_pipeline("builtin", DTYPE, "cpu", name)
    measured = uniref_fast.estimate(pipe, given).stages
    for part in (0, 2):
        assert 0.4 < planned[part].weight_bytes / whole[part].weight_bytes < 0.8
        assert planned[part].weight_bytes == pytest.approx(measured[part].weight_bytes, rel=0.02)
    assert planned[2].activation_bytes == measured[2].activation_bytes > whole[2].activation_bytes
    blocks = pipe.transformer.transformer_blocks.modules()
    assert all(stored_format(part) for part in blocks if hasattr(part, "in_features"))
    assert stored_format(pipe.transformer.proj_out) is None
    plain = builtin.load(DTYPE)
    pipe.set_progress_bar_config(disable=True)
    before = edited(pipe, given)[0]
    assert 0 < relative(before, edited(plain, given)[0]) < 0.1
    digest, weight = fingerprint(pipe.transformer), pipe.transformer.transformer_blocks[0].attn.to_q.weight
    weight.qdata[0, 0] = 0
    assert fingerprint(pipe.transformer) != digest
    plain.transformer.save_pretrained(tmp_path / "transformer")
    load_transformer(pipe, tmp_path, DTYPE, given="initial")
    assert torch.equal(edited(pipe, given)[0], before)
    with pytest.raises(ValueError, match="is loaded, and its weights count as they are stored"):
        uniref_fast.estimate(pipe, given, quantisation=name)


def test_the_names_of_formats_agree():
    from uniref_fast import cli, quantisation
    from uniref_fast.evaluation.config import EvalConfig

    option = argparse.ArgumentParser()
    cli._add_quantisation(option.add_argument)
    field = typing.get_args(typing.get_type_hints(EvalConfig)["quantisation"])
    assert option._actions[-1].choices == quantisation.NAMES == typing.get_args(field[0])


def test_formats_that_cannot_be_loaded_are_refused(monkeypatch, tmp_path):
    from uniref_fast import quantisation
    from uniref_fast.loading import load_pipeline

    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match=r"nf4 needs a GPU: .* int8 and fp8 work"):
        load_pipeline("builtin", DTYPE, "cpu", "nf4")
    with pytest.raises(ValueError, match=r"is quantised already .*torchao.*; leave out the quantisation"):
        quantisation.check_unquantised("--model x", {"quantization_config": {"quant_method": "torchao"}})
    with pytest.raises(ValueError, match="unknown quantisation 'int3'; known: int8, fp8, nf4"):
        quantisation.planned_configs("int3")
    monkeypatch.setitem(quantisation.PACKAGES, "torchao", "no-such-package")
    with pytest.raises(ValueError, match="int8 needs torchao, which is not installed: pip install no-such-package"):
        load_pipeline("builtin", DTYPE, "cpu", "int8")
    assert quantisation.trials("cpu")["torchao int8"] == "not installed: pip install no-such-package"


def test_the_doctor_tries_each_format(monkeypatch):
    from uniref_fast import quantisation
    from uniref_fast.doctor import facts, report

    for library in ("torchao", "bitsandbytes", "gguf"):
        pytest.importorskip(library)
    found = facts()
    tried = found["quantised"]["cpu"]
    assert tried["torchao int8"] is None and tried["GGUF"] is None
    assert tried["bitsandbytes nf4"] == "diffusers loads it onto a GPU only; the library itself runs"
    text = report(found)
    assert "torchao int8            works" in text and "quantised weights on cpu" in text
    assert found["versions"]["torchao"] in text

    def broken(linear, device):
        raise OSError("undefined symbol: _Z3foo\nmore")

    monkeypatch.setitem(quantisation._FORMATS, "GGUF", ("gguf", broken))
    assert quantisation.trials("cpu")["GGUF"] == "OSError: undefined symbol: _Z3foo"
