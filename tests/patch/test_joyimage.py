"""patch of JoyImage-Edit-Plus against diffusers: models, pipelines and features of diffusers."""

import copy

import joyimage
import pytest
import torch
from family_models import picture
from patching import ROUNDING, assert_compiled_blocks

import uniref_fast
from uniref_fast.models import PackedJoyImage
from uniref_fast.patch.stock import deviations
from uniref_fast.testing import max_relative_error

SIZES = [(1, 4, 6), (1, 3, 5), (1, 1, 1), (1, 2, 9)]
BATCH = [(7, SIZES[:1]), (11, SIZES), (3, SIZES[1:3])]
"""Text length and grids (target first) of each sample; the longest one is not the first."""


def run(model, samples=BATCH, **options):
    with torch.no_grad():
        return model(**joyimage.inputs(samples, model.dtype, **options))[0]


def test_pipelines():
    """A batch of samples that differ in the number of references, with guidance."""
    pipe = joyimage.pipeline()
    images = [[picture(1)], [picture(2), picture(3)]]

    def call():
        return pipe(
            images=images, prompt=["an owl", "put both on a table"], guidance_scale=3.0, height=64, width=48,
            num_inference_steps=3, generator=[torch.Generator().manual_seed(i) for i in range(2)], output_type="pt",
        ).images  # fmt: skip

    expected = call()
    report = uniref_fast.patch(pipe)
    for _ in range(2):  # the first call compares every place with the original
        assert max_relative_error(call(), expected) < ROUNDING
    tables = 2 * 3 * 2 * (2 + 3)  # of target and references, in each step and for both predictions
    assert not report.fallbacks and report.calls["kept"] == tables - 3
    assert report.calls.total() == tables - 3 + 2 * 3 * 6


def test_tables_are_kept_for_their_settings_only():
    model = joyimage.transformer()
    report = uniref_fast.patch(model)
    run(model)
    kept = report.calls["kept"]
    run(model)
    assert report.calls["kept"] == kept + 1 + 4 + 2
    model.register_to_config(theta=100)
    other = run(model)
    uniref_fast.unpatch(model)
    assert max_relative_error(run(model), other) < ROUNDING
    model.register_to_config(theta=256)
    assert max_relative_error(run(model), other) > 100 * ROUNDING


def test_tables_that_are_not_used_leave():
    model = joyimage.transformer(layers=1)
    uniref_fast.patch(model)
    for side in range(1, 50):
        run(model, [(1, [(1, 1, side)])])
    place = model._get_rotary_pos_embed_for_range.__self__
    assert len(place._kept) == 32
    first = model._get_rotary_pos_embed_for_range((0, 0, 0), (1, 1, 20))
    assert model._get_rotary_pos_embed_for_range((0, 0, 0), (1, 1, 20))[0] is first[0]


def test_a_method_that_was_replaced_after_patching():
    model = joyimage.transformer(layers=1)
    uniref_fast.patch(model)
    model._get_rotary_pos_embed_for_range = lambda start, stop: None
    with pytest.raises(RuntimeError, match="_get_rotary_pos_embed_for_range was replaced after patching"):
        uniref_fast.unpatch(model)
    assert any(
        "_get_rotary_pos_embed_for_range was replaced" in each for each in deviations(model, torch.device("cpu"))
    )
    del model._get_rotary_pos_embed_for_range
    other = joyimage.transformer(layers=1)
    tables = other._get_rotary_pos_embed_for_range
    other._get_rotary_pos_embed_for_range = lambda start, stop: tables(start, stop)
    assert "_get_rotary_pos_embed_for_range was replaced, and runs unchanged" in uniref_fast.patch(other).notes


def changed_backend(model):
    model.double_blocks[1].attn.processor._attention_backend = "_native_math"  # as set_attention_backend does


def changed_norm(model):
    model.double_blocks[0].img_norm1 = torch.nn.LayerNorm(256, elementwise_affine=False, eps=1e-6)


def changed_eps(model):
    model.double_blocks[0].attn.txt_attn_k_norm.eps = 1e-3


@pytest.mark.parametrize(
    "change, reason",
    [
        (changed_backend, "set_attention_backend"),
        (changed_norm, "a block's norm is a LayerNorm"),
        (changed_eps, "different eps"),
    ],
)
def test_changes_run_the_original_and_are_refused_by_edit(change, reason):
    stock, model = joyimage.transformer(layers=2), joyimage.transformer(layers=2)
    report = uniref_fast.patch(model)
    run(model)
    for each in (stock, model):
        change(each)
    assert max_relative_error(run(model), run(stock)) < ROUNDING
    assert any(reason in each for each in report.fallbacks)
    assert [*deviations(model, torch.device("cpu"))]


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"attention_mask": torch.ones(1, 1, 22)}, "the mask is not a boolean tensor"),
        ({"image_rotary_emb": None}, "without text or rotary embedding"),
        ({"image_rotary_emb": (torch.ones(1, 15, 128).double(),) * 2}, "one float32 value per image token"),
    ],
)
def test_calls_that_run_the_original(changes, reason):
    model = joyimage.transformer(layers=1)
    block, report = model.double_blocks[0], uniref_fast.patch(model)
    generator = torch.Generator().manual_seed(0)
    given = {
        "hidden_states": torch.randn(1, 15, 256, generator=generator),
        "encoder_hidden_states": torch.randn(1, 7, 256, generator=generator),
        "temb": torch.randn(1, 6, 256, generator=generator),
        "image_rotary_emb": (torch.ones(1, 15, 128), torch.zeros(1, 15, 128)),
    } | changes
    with torch.no_grad():
        outs = block(**given)
        assert any(reason in each for each in report.fallbacks), report
        uniref_fast.unpatch(model)
        for out, expected in zip(outs, block(**given), strict=True):
            assert max_relative_error(out, expected) < ROUNDING


def test_a_mask_is_that_of_its_call():
    """Calls of a block with the same rotary tables, other masks, and a mask that was changed in place."""
    stock, model = joyimage.transformer(layers=1).double_blocks[0], joyimage.transformer(layers=1)
    uniref_fast.patch(model)
    generator = torch.Generator().manual_seed(0)
    image, text, temb = (torch.randn(2, n, 256, generator=generator) for n in (15, 7, 6))
    rotary, outs = (torch.ones(2, 15, 128), torch.zeros(2, 15, 128)), []
    masks = [torch.ones(2, 1, 1, 22, dtype=torch.bool) for _ in range(2)]
    for hidden, mask in zip((2, 9, 11), (masks[0], masks[1], masks[1]), strict=True):
        mask.fill_(True)[1, :, :, hidden] = False
        with torch.no_grad():
            outs.append(model.double_blocks[0](image, text, temb, rotary, mask)[0])
            assert max_relative_error(outs[-1], stock(image, text, temb, rotary, mask)[0]) < ROUNDING
    assert torch.equal(outs[0][0], outs[1][0]) and max_relative_error(outs[0][1], outs[1][1]) > 10 * ROUNDING


def test_float16_is_not_clipped():
    """Other models of diffusers clip their blocks; these overflow, and the results show where."""
    model = joyimage.transformer(torch.float16, layers=2)
    with torch.no_grad():
        model.double_blocks[0].img_mlp.net[2].bias[:3] = 60000
        model.double_blocks[0].img_mod.modulate_table[:, 5] = 40
    expected = run(model, BATCH[1:2])
    assert not expected.isfinite().any()
    report = uniref_fast.patch(model, impl="reference")  # there is no other on a CPU
    assert not run(model, BATCH[1:2]).isfinite().any() and not report.fallbacks
    given = joyimage.inputs(BATCH[1:2], torch.float16)
    image, text = given["hidden_states"][0].flatten(1), given["encoder_hidden_states"][0]
    packed = PackedJoyImage(model)
    layout = packed.layout([uniref_fast.Sample(11, SIZES[0], tuple(SIZES[1:]))])
    with torch.no_grad():
        assert not packed(image, text, given["timestep"] / 1000, layout).isfinite().any()


@pytest.mark.slow
def test_compiled_blocks_trace_the_fused_places():
    """The blocks are fused for all batches; a mask of the padding needs the original attention."""
    calls = [{"samples": batch} for batch in (BATCH[:1], BATCH[1:2], BATCH, BATCH[:1])]
    model = joyimage.transformer(layers=1)
    report = assert_compiled_blocks(model, lambda model, samples: run(model, samples), calls, graphs=3)
    assert report.traces >= 3 and report.calls["kept"]
    assert ["mask" in reason for reason in report.traced_originals] == [True]


@pytest.mark.slow
def test_a_compiled_model_is_one_graph_as_without_the_patch():
    from torch._dynamo.testing import CompileCounter

    model = joyimage.transformer(layers=1)
    expected, report = run(model), uniref_fast.patch(model)
    torch.compiler.reset()
    counter = CompileCounter()
    model.compile(backend=counter, fullgraph=True)
    assert max_relative_error(run(model), expected) < ROUNDING and counter.frame_count == 1
    assert report.traces and all("torch.compile" in reason for reason in report.traced_originals) and not report.calls


def test_copies_and_edit_on_a_patched_pipeline():
    pipe = joyimage.pipeline()
    request = {"prompt": "x", "images": [picture(1)], "num_inference_steps": 2, "seed": 1, "true_cfg_scale": 1.0}
    expected = uniref_fast.edit(pipe, [request], output_type="latent", progress=False)
    before = run(pipe.transformer)
    uniref_fast.patch(pipe)
    assert torch.equal(uniref_fast.edit(pipe, [request], output_type="latent", progress=False)[0], expected[0])
    copied = copy.deepcopy(pipe.transformer)
    assert copied._get_rotary_pos_embed_for_range.__self__.transformer is copied
    assert max_relative_error(run(copied), before) < ROUNDING
