"""The packed model against diffusers, sample by sample."""

import weakref

import pytest
import torch
from patching import ROUNDING

from uniref_fast import native
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.models import PackedQwenImage
from uniref_fast.models.packed import HostCopy
from uniref_fast.testing import assert_within_budget, max_relative_error

SIZES = [(1, 4, 6), (1, 3, 5), (1, 1, 1), (1, 2, 9), (1, 7, 7), (1, 1, 8), (1, 5, 2)]  # target, then references 1..6
IMPLS = ["reference", pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason="not built"))]


def inputs(model, grids, text=7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    dtype = model.dtype
    tokens = sum(f * h * w for f, h, w in grids)
    image = torch.randn(1, tokens, 64, generator=generator).to(dtype)
    return image, torch.randn(1, text, 48, generator=generator).to(dtype), torch.rand(1, generator=generator)


def stock(model, grids, image, text, timestep, mask=None):
    """The target's part of diffusers' own forward."""
    with torch.no_grad():
        out = model(
            hidden_states=image,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=mask,
            timestep=timestep,
            img_shapes=[list(grids)],
            return_dict=False,
        )[0]
    return out[0, : grids[0][1] * grids[0][2]]


def packed(model, samples, images, texts, timesteps, **options):
    run = PackedQwenImage(model, **options)
    layout = run.layout(samples)
    with torch.no_grad():
        out = run(torch.cat([x[0] for x in images]), torch.cat([x[0] for x in texts]), torch.cat(timesteps), layout)
    return layout.split_targets(out)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("references", range(7))
def test_equals_diffusers(make_transformer, references, zero_cond_t, impl):
    model = make_transformer(zero_cond_t)
    grids = SIZES[: references + 1]
    image, text, t = inputs(model, grids)
    (out,) = packed(model, [Sample(7, grids[0], tuple(grids[1:]))], [image], [text], [t], impl=impl)
    assert max_relative_error(out, stock(model, grids, image, text, t)) < ROUNDING


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_bfloat16_within_the_budget(make_transformer, zero_cond_t, impl):
    model = make_transformer(zero_cond_t, dtype=torch.bfloat16)
    wide = make_transformer(zero_cond_t).to(torch.bfloat16).double()
    grids = SIZES[:3]
    image, text, t = inputs(model, grids)
    (out,) = packed(model, [Sample(7, grids[0], tuple(grids[1:]))], [image], [text], [t], impl=impl)
    oracle = stock(wide, grids, image.double(), text.double(), t.to(torch.bfloat16).double())
    assert_within_budget(out, stock(model, grids, image, text, t), oracle)


@pytest.mark.parametrize("mask", [[1, 1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 0, 1, 1]])  # padded; with holes
def test_text_padding_is_dropped_not_computed(make_transformer, mask):
    """Valid tokens alone, at their original positions, equal diffusers' masked run."""
    model = make_transformer(True)
    grids = SIZES[:2]
    image, text, t = inputs(model, grids)
    keep = torch.tensor([mask]).bool()
    expected = stock(model, grids, image, text, t, mask=keep)
    runs = tuple((1, bool(valid)) for valid in mask)
    (with_padding,) = packed(model, [Sample(runs, *_split(grids))], [image], [text], [t])
    assert max_relative_error(with_padding, expected) < ROUNDING
    if mask[0]:  # padding at the end: dropping it moves no position
        (without,) = packed(model, [Sample(4, *_split(grids))], [image], [text[:, :4]], [t])
        assert max_relative_error(without, expected) < ROUNDING


def _split(grids):
    return grids[0], tuple(grids[1:])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_a_ragged_pack_equals_each_sample_alone(make_transformer, zero_cond_t, impl):
    model = make_transformer(zero_cond_t)
    pack = [(SIZES[:1], 3), (SIZES[1:5], 11), (SIZES[2:4], 1), (SIZES, 20)]
    data = [(grids, *inputs(model, grids, text, seed=i)) for i, (grids, text) in enumerate(pack)]
    samples = [Sample(text.shape[1], *_split(grids)) for grids, _, text, _ in data]
    together = packed(model, samples, *zip(*[d[1:] for d in data], strict=True), impl=impl)
    for sample, (grids, image, text, t), out in zip(samples, data, together, strict=True):
        (alone,) = packed(model, [sample], [image], [text], [t], impl=impl)
        assert max_relative_error(out, alone) < ROUNDING
        assert max_relative_error(out, stock(model, grids, image, text, t)) < ROUNDING


def assert_same_bits_in_packs(model, impl):
    """Each sample alone, and in packs of several orders; the sizes bring the Linears 1 to 800 rows."""
    pack = [(SIZES[:1], 3), (((1, 1, 1),), 1), (SIZES[1:5], 11), (((1, 16, 16), (1, 9, 11)), 33), (SIZES, 20)]
    data = [(Sample(text, *_split(grids)), *inputs(model, grids, text, seed=i)) for i, (grids, text) in enumerate(pack)]
    alone = [packed(model, *([x] for x in one), impl=impl)[0] for one in data]
    for order in ((0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (1, 0), (3, 1)):
        together = packed(model, *zip(*(data[i] for i in order), strict=True), impl=impl)
        assert all(torch.equal(out, alone[i]) for i, out in zip(order, together, strict=True)), order


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_in_packs_but_for_the_products_of_the_library(make_transformer, monkeypatch, dtype, impl):
    """A model whose Linears compute each row by itself gives a sample the same bits alone and in any pack."""
    linear = torch.nn.functional.linear

    def by_row(x, weight, bias=None):
        return torch.cat([linear(row, weight, bias) for row in x.split(1)])

    monkeypatch.setattr(torch.nn.functional, "linear", by_row)
    assert_same_bits_in_packs(make_transformer(True, dtype=dtype), impl)


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="bfloat16 products without instructions for them")
@pytest.mark.parametrize("impl", IMPLS)
def test_same_bits_in_packs_in_bfloat16(make_transformer, impl):
    """PyTorch's own Linears are used; in float32 these depend on the number of rows, by rounding."""
    assert_same_bits_in_packs(make_transformer(True, dtype=torch.bfloat16), impl)


def test_parameters_are_shared_not_copied(make_transformer):
    model = make_transformer()
    before = {id(p) for p in model.parameters()}
    grids = SIZES[:2]
    args = [Sample(7, *_split(grids))], *([x] for x in inputs(model, grids))
    (first,) = packed(model, *args)
    with torch.no_grad():
        model.transformer_blocks[1].attn.to_q.weight.mul_(1.5)
    (second,) = packed(model, *args)
    assert {id(p) for p in model.parameters()} == before and not torch.equal(first, second)


def test_reference_causal_makes_references_independent_of_the_target(make_transformer):
    """The references' K/V do not change with the noise: replacing it changes no reference row."""
    model = make_transformer(True)
    seen = []
    hook = model.transformer_blocks[-1].attn.to_k.register_forward_hook(lambda m, a, out: seen.append(out))
    grids = SIZES[:3]
    image, text, t = inputs(model, grids)
    for noise in (0.0, 1.0):
        image[:, :24] = noise
        packed(model, [Sample(7, *_split(grids))], [image], [text], [t], visibility="reference_causal")
    hook.remove()
    assert torch.equal(seen[0][24:], seen[1][24:]) and not torch.equal(seen[0][:24], seen[1][:24])


def test_group_shared_equals_separate_copies(make_transformer):
    model = make_transformer(True)
    grids = SIZES[:3]
    (image, text, t), (other, text2, _) = inputs(model, grids, 5, seed=1), inputs(model, grids, 9, seed=2)
    references, targets = image[0, 24:], (image[0, :24], other[0, :24])
    pack = [Sample(n, *_split(grids), group=0) for n in (5, 9)]
    run = PackedQwenImage(model, visibility="group_shared")
    texts, ts = torch.cat([text[0], text2[0]]), torch.cat([t, t])
    with torch.no_grad():
        shared = SelfLayout.qwen(pack, zero_cond_t=True, shared_references=True)
        out = run(torch.cat([targets[0], references, targets[1]]), texts, ts, shared)
        copied = SelfLayout.qwen(pack, zero_cond_t=True)
        expected = run(torch.cat([targets[0], references, targets[1], references]), texts, ts, copied)
    assert max_relative_error(out, expected) < ROUNDING


def test_refusals(make_transformer):
    model = make_transformer(True)
    image, text, t = inputs(model, SIZES[:1])
    layout = SelfLayout.qwen([Sample(7, SIZES[0])])
    with pytest.raises(ValueError, match="zero_cond_t=False"):
        PackedQwenImage(model)(image[0], text[0], t, layout)
    with pytest.raises(ValueError, match=r"text has shape \[6, 48\]"):
        PackedQwenImage(model)(image[0], text[0, 1:], t, SelfLayout.qwen([Sample(7, SIZES[0])], zero_cond_t=True))
    model.register_to_config(use_layer3d_rope=True)
    with pytest.raises(ValueError, match="use_layer3d_rope"):
        PackedQwenImage(model)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_of_a_pack_are_the_sum_of_single_ones(make_transformer, impl):
    """Gradients of every parameter and of the inputs equal those of diffusers one by one; K = 2, 0 and 1 references."""
    model = make_transformer(True)
    cases = [(SIZES[:3], 7), (SIZES[:1], 1), (SIZES[1:3], 5)]
    data = [inputs(model, grids, text, seed=i) for i, (grids, text) in enumerate(cases)]
    results = []
    for use_pack in (False, True):
        model.zero_grad()
        leaves = [(image.clone().requires_grad_(), text.clone().requires_grad_(), t) for image, text, t in data]
        if use_pack:
            samples = [Sample(text, *_split(grids)) for grids, text in cases]
            layout = SelfLayout.qwen(samples, zero_cond_t=True)
            streams = (torch.cat([leaf[i][0] for leaf in leaves]) for i in (0, 1))
            out = PackedQwenImage(model, impl=impl)(*streams, torch.cat([t for *_, t in leaves]), layout)
        else:
            parts = [
                model(
                    hidden_states=image,
                    encoder_hidden_states=text,
                    timestep=t,
                    img_shapes=[list(grids)],
                    return_dict=False,
                )[0][0, : grids[0][1] * grids[0][2]]
                for (grids, _), (image, text, t) in zip(cases, leaves, strict=True)
            ]
            out = torch.cat(parts)
        out.square().sum().backward()
        named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append(named | {f"input {i}.{j}": leaf[j].grad for i, leaf in enumerate(leaves) for j in (0, 1)})
    stock_grads, ours = results
    largest = max(g.abs().max().item() for g in stock_grads.values())
    # The text stream's last residuals reach no output: diffusers gives them zeros, the packed model computes them not.
    for name in stock_grads.keys() - ours.keys():
        assert not stock_grads[name].any(), name
    for name, grad in ours.items():
        scale = max(stock_grads[name].abs().max().item(), 1e-3 * largest)
        assert (grad - stock_grads[name]).abs().max().item() < 1e-4 * scale, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_the_same_bits_wherever_inputs_are_kept(make_transformer, dtype):
    model = make_transformer(True, dtype=dtype)
    samples = [Sample(7, (1, 4, 3), ((1, 2, 5),)), Sample(1, (1, 1, 1))]
    image, text, t = torch.randn(23, 64).to(dtype), torch.randn(8, 48).to(dtype), torch.tensor([0.3, 0.9])
    found = {}
    for checkpointing in (True, "inputs", "host"):
        ours = PackedQwenImage(model, checkpointing=checkpointing)
        model.zero_grad()
        prediction = ours(image, text, t, ours.layout(samples))
        prediction.float().square().mean().backward()
        named = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
        found[checkpointing] = {"prediction": prediction.detach()} | dict(named)
    for checkpointing, results in found.items():
        assert results.keys() == found[True].keys() and len(results) > 100
        assert [name for name, each in results.items() if not torch.equal(each, found[True][name])] == [], checkpointing


def test_a_copy_in_host_memory_stands_for_a_tensor_that_is_freed():
    tensor = torch.randn(4, 3, requires_grad=True) * 2
    values, gone = tensor.detach().clone(), weakref.ref(tensor)
    copy = HostCopy(tensor)
    assert copy.take() is tensor
    del tensor
    assert gone() is None
    for again in (copy.take(), copy.take()):
        assert torch.equal(again, values) and again.requires_grad and again.is_leaf
