"""edit() with weights that are elsewhere between their uses: equal bits, and every weight is fetched and returned."""

import dataclasses
import functools
from copy import deepcopy

import pytest
import torch
from accelerate import cpu_offload
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import hooks as diffusers_hooks
from offloading import CPU, Offloading
from peft import LoraConfig
from PIL import Image

import uniref_fast
from uniref_fast import EditRequest, builtin
from uniref_fast.loading import offload
from uniref_fast.quantised_linear import QuantisedWeight
from uniref_fast.testing import max_relative_error

RED, BLUE = (Image.new("RGB", (64, 64), color) for color in ("red", "blue"))
SIZE = {"height": 64, "width": 64, "num_inference_steps": 3}
REQUESTS = [
    EditRequest("put picture 1 on picture 2", [RED, BLUE], negative_prompt=" ", true_cfg_scale=2.0, seed=0, **SIZE),
    EditRequest("make it night", [RED], true_cfg_scale=1.0, seed=1, **SIZE),
]


def run(pipe, requests=REQUESTS, **options):
    return uniref_fast.edit(pipe, requests, output_type="latent", progress=False, **options)


def copied(pipe, part="transformer"):
    """The pipeline with a copy of one part, which the test may change."""
    return type(pipe)(**{**pipe.components, part: deepcopy(getattr(pipe, part))})


@pytest.fixture
def pipe(builtin_pipe):
    return copied(builtin_pipe)


@pytest.fixture(scope="module")
def expected(_builtin_pipe):
    return run(_builtin_pipe)


@pytest.fixture(scope="module")
def alone(_builtin_pipe):
    return run(_builtin_pipe, pack_tokens=1)


@pytest.fixture
def offloading(monkeypatch):
    return Offloading(monkeypatch)


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "kind, blocks, stream",
    [("block_level", 1, False), ("block_level", 1, True), ("block_level", 2, False), ("leaf_level", 1, False),
     ("leaf_level", 1, True)],
)  # fmt: skip
def test_group_offloading(pipe, expected, alone, offloading, kind, blocks, stream):
    """The same bits packed and alone; weights are NaN outside of their use and until the stream is waited for."""
    offloading.enable(pipe.transformer, kind, stream=stream, blocks_per_group=blocks)
    assert_equal(run(pipe), expected)
    assert_equal(run(pipe, pack_tokens=1), alone)
    assert not offloading.onloaded, "every weight is away after the edit"
    assert len({*offloading.fetched.values()}) == 1, "each group was fetched once in each forward"
    if kind == "block_level":
        assert offloading.peak == (2 if stream else 1)


def test_the_stock_pipeline_before_and_after(pipe, expected, offloading):
    """The order in which one of them fetches weights in advance also serves the other."""

    def stock():
        return pipe(image=[RED], prompt="make it night", true_cfg_scale=1.0, output_type="latent",
                    generator=torch.Generator().manual_seed(1), **SIZE).images  # fmt: skip

    pipe.set_progress_bar_config(disable=True)
    plain = stock()
    offloading.enable(pipe.transformer, "leaf_level", stream=True)
    assert torch.equal(stock(), plain)
    assert_equal(run(pipe), expected)
    assert torch.equal(stock(), plain)


def test_accelerate_by_leaf_and_by_model(pipe, expected):
    """Weights of leaves are on the meta device between calls."""
    cpu_offload(pipe.transformer, CPU)
    assert all(parameter.is_meta for parameter in pipe.transformer.parameters())
    assert_equal(run(pipe), expected)
    assert all(parameter.is_meta for parameter in pipe.transformer.parameters())


def test_model_offloading(pipe, expected):
    pipe.enable_model_cpu_offload(device="cpu")
    assert_equal(run(pipe), expected)
    assert pipe._all_hooks, "the hooks are in place for the next call"
    pipe.remove_all_hooks()  # other tests share the encoders


@pytest.mark.parametrize("how", ["model", "block"])
def test_offloading_of_all_parts(how):
    """`uniref-fast edit --offload` enables what the pipeline supports, for each of its parts, with the same bits.

    Another copy of the weights may lie at other alignments, with which products round differently.
    """
    pipe = builtin.load()
    expected = run(pipe)
    offload(pipe, how, CPU)
    assert_equal(run(pipe), expected)
    assert all(
        any(hasattr(module, "_diffusers_hook" if how == "block" else "_hf_hook") for module in part.modules())
        for part in (pipe.text_encoder, pipe.transformer, pipe.vae)
    )


def test_offloading_to_disk(pipe, expected, tmp_path):
    """Weights that a file holds are mapped to memory at other alignments, and so products may round differently."""
    pipe.transformer.enable_group_offload(
        CPU, CPU, offload_type="block_level", num_blocks_per_group=2, offload_to_disk_path=str(tmp_path)
    )
    for ours, theirs in zip(run(pipe), expected, strict=True):
        assert max_relative_error(ours, theirs) < 1e-4
    assert any(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_encoders_by_leaf(builtin_pipe, expected, offloading, part):
    pipe = copied(builtin_pipe, part)
    offloading.enable(getattr(pipe, part), "leaf_level")
    assert_equal(run(pipe), expected)
    if part == "vae":
        image = uniref_fast.edit(pipe, REQUESTS[1:], output_type="pt", progress=False)[0]
        plain = uniref_fast.edit(builtin_pipe, REQUESTS[1:], output_type="pt", progress=False)[0]
        assert torch.equal(image, plain)
    assert not offloading.onloaded and offloading.fetched


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_with_kept_references(builtin_pipe, pipe, offloading, kind):
    kept = run(builtin_pipe, keep_references=2)
    offloading.enable(pipe.transformer, kind, stream=True)
    assert_equal(run(pipe, keep_references=2), kept)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_patched(pipe, expected, offloading, kind):
    uniref_fast.patch(pipe)
    offloading.enable(pipe.transformer, kind, stream=True)
    assert_equal(run(pipe), expected)


def test_weights_in_8_bits(builtin_pipe, pipe, monkeypatch):
    """patch quantises before offloading; edit alone cannot, because the weights are elsewhere."""
    plain = run(builtin_pipe, mode="fast", impl="reference")
    uniref_fast.patch(pipe, mode="fast", impl="reference")
    pipe.transformer.enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=1)
    assert_equal(run(pipe, mode="fast", impl="reference"), plain)
    other = copied(builtin_pipe)
    other.transformer.enable_group_offload(CPU, CPU, offload_type="leaf_level")
    with pytest.raises(ValueError, match=r"holds them elsewhere.*call patch"):
        run(other, mode="fast", impl="reference")


def test_weights_in_8_bits_on_a_stream(monkeypatch):
    """Pinned host memory holds the 8-bit values, and both of their tensors are recorded on the stream."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: stream.append(tensor.shape))
    weight, stream = QuantisedWeight.of(torch.randn(16, 32), "reference"), []
    call = functools.partial(QuantisedWeight.__torch_dispatch__, types=())
    pinned = call(torch.ops.aten._pin_memory.default, args=(weight,))
    assert type(pinned) is QuantisedWeight and pinned.original is weight.original
    assert torch.equal(pinned.e4m3.view(torch.uint8), weight.e4m3.view(torch.uint8)) and pinned.e4m3 is not weight.e4m3
    assert call(torch.ops.aten.is_pinned.default, args=(weight,)) is False
    call(torch.ops.aten.record_stream.default, args=(weight, stream))
    assert stream == [(16, 32), (16,)]


def test_a_hook_that_is_added_between_two_edits(pipe, expected, offloading):
    """A cache is refused, on top of offloading too; offloading that is enabled later is followed."""
    assert_equal(run(pipe), expected)
    offloading.enable(pipe.transformer, "block_level")
    assert_equal(run(pipe), expected)
    fetched = offloading.fetched.total()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.05))
    with pytest.raises(ValueError, match="fbc_leader_block_hook"):
        run(pipe)
    pipe.transformer.disable_cache()
    registry = pipe.transformer.transformer_blocks[1]._diffusers_hook
    registry.register_hook(diffusers_hooks.ModelHook(), "own")
    with pytest.raises(ValueError, match=r"transformer_blocks\.1 has hooks \(own\)"):
        run(pipe)
    registry.remove_hook("own")
    assert offloading.fetched.total() == fetched, "nothing ran"
    assert_equal(run(pipe), expected)


def test_blocks_on_other_devices_are_refused(pipe, offloading):
    """Several GPUs share a model by other hooks than offloading: the streams would have to move between the blocks."""
    offloading.enable(pipe.transformer, "block_level")
    block = pipe.transformer.transformer_blocks[1]
    block._diffusers_hook.get_hook("group_offloading").group.onload_device = torch.device("meta")
    with pytest.raises(ValueError, match=r"blocks\.1 is brought to meta by its hooks, and the pipeline runs on cpu"):
        run(pipe)


def test_norms_on_another_device_are_refused(pipe):
    pipe.transformer.transformer_blocks[1].attn.norm_k.to("meta")
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.norm_k has its weight on meta, not cpu"):
        run(pipe)


@pytest.mark.parametrize("how", ["block_level", "leaves"])
def test_a_lora_for_each_request(pipe, offloading, how):
    torch.manual_seed(0)
    pipe.transformer.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "txt_mod.1"]), "a")
    pipe.transformer.disable_adapters()
    requests = [dataclasses.replace(REQUESTS[0], lora={"a": 1.0}), REQUESTS[1]]
    expected = run(pipe, requests)
    if how == "leaves":
        cpu_offload(pipe.transformer, CPU)
    else:
        offloading.enable(pipe.transformer, how, stream=True)
    assert_equal(run(pipe, requests), expected)
    assert not offloading.onloaded
