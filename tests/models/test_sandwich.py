"""The packed Z-Image and Fibo 2 against diffusers, sample by sample."""

from dataclasses import dataclass

import fibo2
import pytest
import torch
import z_image

from uniref_fast import native
from uniref_fast.layout import Sample
from uniref_fast.models import z_image as packed_z_image
from uniref_fast.models.fibo2 import PackedFibo2
from uniref_fast.models.fibo2_family import FIBO_2
from uniref_fast.models.kept_references import KeptReferences, RefreshSchedule, dependence
from uniref_fast.models.z_image import PackedZImage, positions, text_of
from uniref_fast.models.z_image_family import Z_IMAGE, _feature_rows
from uniref_fast.testing import assert_within_budget, max_relative_error

RELATIVE = 1e-5
"""Largest relative error, in float32, between the packed model and diffusers."""

REFERENCES = [(2, 3), (4, 4), (1, 1), (3, 8), (2, 2), (7, 1)]  # 1 x 1, and filled up to 32 by none, few and many tokens
FEATURES = [(2, 2), (4, 8), (1, 1), (3, 5), (2, 1), (5, 3)]  # 4 x 8 needs no filling
CAPTIONS = [9, 33, 32, 1, 20, 5, 2, 7]
IMPLS = ["reference", pytest.param("native", marks=pytest.mark.skipif(not native.available(), reason="not built"))]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@dataclass
class Case:
    """One sample: as the packed model takes it, and a function of (model, dtype) that returns diffusers' velocity."""

    sample: Sample
    image: torch.Tensor  # target, then references, [n, C]
    text: torch.Tensor  # [l, D]
    timestep: torch.Tensor  # [1]
    stock: object


def z_image_case(references, target=(4, 6), seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    captions = [normal(n, z_image.CAPTION) for n in CAPTIONS[: references + 2 if references else 1]]
    images = [normal(16, 1, 2 * h, 2 * w) for h, w in (*REFERENCES[:references], target)]
    features = [normal(h, w, z_image.FEATURES) for h, w in FEATURES[:references]]
    t = torch.rand(1, generator=generator).to(dtype)

    def stock(model, wide=None):
        def cast(tensors):
            return [x if wide is None or x is None else x.to(wide) for x in tensors]

        (out,) = model(
            [cast(images)], cast([t])[0], [cast(captions)],
            siglip_feats=[cast([*features, None]) if features else None],
            image_noise_mask=[[0] * references + [1]], return_dict=False,
        )[0]  # fmt: skip
        return -Z_IMAGE.pack(out[:, 0][None])[0]

    rows = [*captions, *map(_feature_rows, features)]
    text = torch.cat([torch.nn.functional.pad(x, (0, z_image.CAPTION - x.shape[1])) for x in rows])
    tokens = [Z_IMAGE.pack(x[:, 0][None])[0] for x in images]
    grids = [(1, *grid) for grid in (target, *REFERENCES[:references])]
    lengths = text_of([len(x) for x in captions], FEATURES[:references]) if references else len(captions[0])
    return Case(Sample(lengths, grids[0], tuple(grids[1:])), torch.cat([tokens[-1], *tokens[:-1]]), text, t, stock)


def fibo2_case(references, target=(4, 6), seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    states = normal(1, 3, 7 + 60 * references, fibo2.BUNDLE)  # the number of gist tokens grows with the text
    images = [normal(1, 32, 2 * h, 2 * w) for h, w in (target, *REFERENCES[:references])]
    t = torch.rand(1, generator=generator).to(dtype)

    def stock(model, wide=None):
        given = [x if wide is None else x.to(wide) for x in (*images, t, states)]
        out = model(given[0], given[-2], given[-1], context_latents=given[1:-2] or None, return_dict=False)[0]
        return FIBO_2.pack(out)[0]

    grids = [(1, *grid) for grid in (target, *REFERENCES[:references])]
    tokens = torch.cat([FIBO_2.pack(x)[0] for x in images])
    return Case(Sample(states.shape[2], grids[0], tuple(grids[1:])), tokens, states[0].transpose(0, 1).flatten(1), t,
                stock)  # fmt: skip


MODELS = {
    "z-image": (z_image.transformer, PackedZImage, z_image_case),
    "fibo-2": (fibo2.transformer, PackedFibo2, fibo2_case),
}


@pytest.fixture(scope="module")
def transformers():
    return {name: make() for name, (make, _, _) in MODELS.items()}


def run(packed, cases, kept=None, constants=None):
    layout = packed.layout([one.sample for one in cases])
    image, text, t = (torch.cat([getattr(one, name) for one in cases]) for name in ("image", "text", "timestep"))
    return layout.split_targets(packed(image, text, t, layout, kept, constants))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("references", range(7))
def test_equals_diffusers(transformers, references, name, impl):
    model, (_, packed, case) = transformers[name], MODELS[name]
    one = case(references)
    assert max_relative_error(run(packed(model, impl=impl), [one])[0], one.stock(model)) < RELATIVE


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", MODELS)
def test_a_ragged_pack_equals_each_sample_alone(transformers, name, impl):
    """Every sample has its own time, text and references."""
    model, (_, packed, case) = transformers[name], MODELS[name]
    cases = [
        case(k, target, seed) for seed, (k, target) in enumerate([(0, (1, 1)), (3, (5, 7)), (1, (4, 8)), (2, (2, 9))])
    ]
    for one, out in zip(cases, run(packed(model, impl=impl), cases), strict=True):
        assert max_relative_error(out, one.stock(model)) < RELATIVE


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_within_the_budget(transformers, name, impl):
    make, packed, case = MODELS[name]
    model, wide = make(dtype=torch.bfloat16), make().to(torch.bfloat16).double()
    one = case(2, dtype=torch.bfloat16)
    (out,) = run(packed(model, impl=impl), [one])
    assert_within_budget(out.bfloat16(), one.stock(model), one.stock(wide, torch.float64))


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="bfloat16 products without instructions for them")
@pytest.mark.parametrize("name", MODELS)
def test_same_bits_in_packs_in_bfloat16(name):
    make, packed, case = MODELS[name]
    run_packed = packed(make(dtype=torch.bfloat16))
    cases = [case(k, target, seed, torch.bfloat16)
             for seed, (k, target) in enumerate([(0, (1, 1)), (2, (5, 7)), (1, (16, 16)), (4, (4, 6))])]  # fmt: skip
    alone = [run(run_packed, [one])[0] for one in cases]
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 0), (3, 1)):
        together = run(run_packed, [cases[i] for i in order])
        assert all(torch.equal(out, alone[i]) for i, out in zip(order, together, strict=True)), order


def test_positions_are_those_of_the_pipeline(transformers):
    """Those of captions too, which begin too early by the filling of the captions before them."""
    model, one = transformers["z-image"], z_image_case(3)
    layout = PackedZImage(model).layout([z_image_case(1).sample, one.sample])
    seen, embedder = [], model.rope_embedder

    def record(ids):
        seen.append(ids)
        return embedder(ids)

    model.rope_embedder = record
    try:
        one.stock(model)
    finally:
        model.rope_embedder = embedder
    images, captions, features = seen
    found = positions(layout)
    mine = [s for s in layout.segments if s.sample == 1]

    def of(chosen):
        return torch.cat([found[s.joint_start : s.joint_end] for s in mine if chosen(s)])

    tokens = of(packed_z_image._is_caption)
    assert torch.equal(tokens, captions[: len(tokens)]) and len(captions) > len(tokens)
    assert torch.equal(of(packed_z_image._is_feature), features)
    at = iter(images.split([6 + 26, 16 + 16, 1 + 31, 24 + 8]))  # tokens and filling
    for image in sorted((s for s in mine if not s.kind.is_text), key=lambda s: s.joint_start):
        assert torch.equal(found[image.joint_start : image.joint_end], next(at)[: image.length])


@pytest.mark.parametrize("name", MODELS)
def test_captions_features_and_gist_are_computed_once(transformers, name):
    model, (_, packed, case) = transformers[name], MODELS[name]
    run_packed, one = packed(model), case(2)
    constants, expected = run_packed.step_constants(), run(run_packed, [one])[0]
    layout = run_packed.layout([one.sample])
    for _ in range(3):
        assert torch.equal(run_packed(one.image, one.text, one.timestep, layout, None, constants), expected)
    assert constants.computed == 1


def test_captions_and_features_are_computed_again_after_a_change_of_their_filling():
    model, one = z_image.transformer(), z_image_case(1)
    run_packed = PackedZImage(model)
    constants, layout = run_packed.step_constants(), run_packed.layout([one.sample])
    for token in (None, model.cap_pad_token, model.siglip_pad_token):
        if token is not None:
            token.mul_(-1)
        out = run_packed(one.image, one.text, one.timestep, layout, None, constants)
        assert torch.equal(out, run(run_packed, [one])[0])


@pytest.mark.parametrize("name", MODELS)
def test_kept_references(transformers, name):
    """A step with kept references equals one that computes them while nothing has changed, and not after a change."""
    model, (_, packed, case) = transformers[name], MODELS[name]
    run_packed, cases = packed(model), [case(2), case(0, seed=2), case(1, (5, 5), 3)]
    assert "attend to text and target" in dependence(run_packed.layout([cases[0].sample]), run_packed.visibility)
    kept = [KeptReferences(RefreshSchedule(every=3)) for _ in cases]
    expected = run(run_packed, cases)
    for _ in range(2):
        for out, other in zip(run(run_packed, cases, kept), expected, strict=True):
            assert max_relative_error(out, other) < RELATIVE
    cases[0].timestep.mul_(0.5)
    moved, exact = run(run_packed, cases, kept), run(run_packed, cases)
    assert 100 * RELATIVE < max_relative_error(moved[0], exact[0]) < 0.2
    assert max_relative_error(run(run_packed, cases, kept)[0], exact[0]) < RELATIVE, "the references are computed again"
    assert [store.refreshed for store in kept] == [[0, 3], [], [0, 3]]


def test_refused_options(transformers):
    for name, model in transformers.items():
        with pytest.raises(ValueError, match="is for models that were trained with it"):
            MODELS[name][1](model, visibility="reference_causal")
        run_packed, one = MODELS[name][1](model), MODELS[name][2](1)
        with pytest.raises(ValueError, match="cannot share references"):
            run_packed.layout([one.sample], shared_references=True)
        layout = run_packed.layout([one.sample])
        with pytest.raises(ValueError, match=r"text has shape .* the layout expects"):
            run_packed(one.image, one.text[1:], one.timestep, layout)


@pytest.mark.parametrize("name", MODELS)
def test_gradients(transformers, name):
    """Gradients of all weights in a pack of two samples, also with recomputation, equal the sum over both."""
    model, (_, packed, case) = transformers[name], MODELS[name]
    cases, found = [case(2), case(1, (2, 2), 2)], []

    def gradients(outs):
        model.zero_grad()
        sum(out.square().sum() for out in outs).backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    with torch.enable_grad():
        found.append(gradients([one.stock(model) for one in cases]))
        for checkpointing in (False, True):
            found.append(gradients(run(packed(model, checkpointing=checkpointing), cases)))
    model.zero_grad()
    largest = max(grad.abs().max().item() for grad in found[0].values())
    for other in found[1:]:
        for key, grad in found[0].items():
            scale = max(grad.abs().max().item(), 1e-3 * largest)
            assert (other[key] - grad).abs().max().item() < 1e-4 * scale, key
