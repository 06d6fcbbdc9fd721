"""patch of FLUX.2 against diffusers: models, pipelines and features of diffusers."""

import functools

import flux2
import forwards
import pytest
import torch
from patching import ROUNDING, assert_compiled_blocks

import uniref_fast
from uniref_fast.patch.stock import deviations
from uniref_fast.testing import max_relative_error

KINDS = ["klein", "klein-kv", "dev"]
run = functools.partial(forwards.run, kind="klein", variant="one")


@pytest.mark.parametrize("kind", KINDS)
def test_pipelines(make_flux2, kind):
    """The cache of klein-KV is filled in the first step and read in the others, as without the patch."""
    pipe = flux2.pipeline(make_flux2(kind), kind)
    options = {"prompt_embeds": torch.randn(2, 9, 96), "image": [flux2.picture(64, 80, i) for i in range(2)]}
    if kind == "klein":
        options |= {"guidance_scale": 3.0, "negative_prompt_embeds": torch.randn(2, 9, 96)}

    def call():
        generator = torch.Generator().manual_seed(0)
        return pipe(num_inference_steps=3, generator=generator, output_type="pt", **options).images

    expected = call()
    report = uniref_fast.patch(pipe)
    for _ in range(2):  # the first call compares every place with the original
        assert max_relative_error(call(), expected) < ROUNDING
    assert not report.fallbacks and report.calls.total() == 2 * 3 * 10 * (2 if kind == "klein" else 1)


@pytest.mark.slow
def test_compiled_blocks_trace_the_fused_places(make_flux2):
    """Each kind of block has one graph for all steps, and another one for another number of samples."""
    calls = [{"step": 0}, {"step": 1}, {"variant": "two"}]
    report = assert_compiled_blocks(make_flux2("klein"), run, calls, graphs=4)
    assert report.traces and not report.traced_originals


def test_edit_on_a_patched_pipeline(make_flux2):
    """The packed forward is of the same kind, also for klein-KV, whose processors the patch has replaced."""
    pipe = flux2.pipeline(make_flux2("klein-kv"), "klein-kv")
    request = {"prompt": "x", "images": [flux2.picture(64, 80)], "num_inference_steps": 2, "seed": 1}
    expected = uniref_fast.edit(pipe, [request], output_type="latent", progress=False)
    uniref_fast.patch(pipe)
    assert torch.equal(uniref_fast.edit(pipe, [request], output_type="latent", progress=False)[0], expected[0])


def test_lora_files_load_through_the_pipeline(make_flux2):
    from peft.utils import get_peft_model_state_dict

    source = make_flux2("klein")
    forwards.lora(source, "klein")
    weights = {f"transformer.{name}": x for name, x in get_peft_model_state_dict(source).items()}
    pipe = flux2.pipeline(make_flux2("klein"))
    request = {"prompt": "x", "images": [flux2.picture(64, 80)], "num_inference_steps": 2, "seed": 1}
    request |= {"true_cfg_scale": 1.0}

    def stock():
        generator = torch.Generator().manual_seed(1)
        return pipe(request["images"], "x", num_inference_steps=2, guidance_scale=1.0, generator=generator,
                    output_type="pt").images[0]  # fmt: skip

    before = stock()
    report = uniref_fast.patch(pipe)
    pipe.load_lora_weights(weights)
    patched = stock()
    (packed,) = uniref_fast.edit(pipe, [request], output_type="pt", progress=False)
    uniref_fast.unpatch(pipe)
    expected = stock()
    assert max_relative_error(expected, before) > 100 * ROUNDING and not report.fallbacks
    for result in (patched, packed):
        assert max_relative_error(result, expected) < 3 * ROUNDING


def test_other_processors_and_backends_are_refused_by_edit(make_flux2):
    model = make_flux2("klein")
    pipe = flux2.pipeline(model)
    stock = model.attn_processors
    for block in model.transformer_blocks:
        block.attn.processor = lambda *args, **options: None  # without the settings of diffusers' own
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn has its own processor function"):
        uniref_fast.edit(pipe, [{"prompt": "x"}])
    assert len([*deviations(model, torch.device("cpu"))]) == 2
    model.set_attn_processor(stock)
    model.single_transformer_blocks[1].attn.processor._attention_backend = "flash"
    with pytest.raises(ValueError, match=r"single_transformer_blocks\.1\.attn is set to attention backend 'flash'"):
        uniref_fast.edit(pipe, [{"prompt": "x"}])
