"""Memory of a stage, compared with measurements; the least sharing that fits; stages and learning rates of recipes."""

import dataclasses
import functools
import gc
import itertools
import math
import warnings

import pytest
import qwen_image_21
import torch

from uniref_fast import native
from uniref_fast.layout import REFERENCE_PLACE, Sample
from uniref_fast.meta_device import FusedAttention, LivingTensors
from uniref_fast.models import PackedQwenImage, PackedQwenImage21
from uniref_fast.training.core.memory import (
    RECOMPUTATION,
    TEXT_TOKENS,
    activation_bytes,
    coding_bytes,
    device_memory,
    gathered_bytes,
    plan_memory,
    plan_stages,
    smaller_stages,
)
from uniref_fast.training.core.model_size import ModelSize, QwenImage21Size
from uniref_fast.training.core.recipe import BudgetStage, stage_at
from uniref_fast.training.rl.recipes import MSGRPO_RECIPES
from uniref_fast.training.supervised.recipes import SFT, SFT_RECIPES, lora, paper, tiny

GIB = 2**30

# ---- what the backward keeps ----

ALONE = [Sample(30, (1, 12, 12), ((1, 8, 8),))]
MANY = [Sample(20, (1, 8, 8), ((1, 8, 8), (1, 6, 6))), Sample(10, (1, 6, 6)), Sample(30, (1, 10, 10), ((1, 8, 8),))]
NO_TEXT_TO_SPEAK_OF = [Sample(1, (1, 12, 12))] * 3


@pytest.fixture(scope="module")
def model_of(make_transformer):
    """Models by layers and dtype, built once."""
    return functools.cache(lambda layers, dtype: make_transformer(True, layers, dtype))


def storages(model, tensors):
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return {at: size for at, size in found.items() if at not in own}


def alive(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lazy modules that gc shows to isinstance
        tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
    # Inside torch.func, diffusers' cache of rotary tables keeps wrappers of that transform, which have no storage.
    return storages(model, [x for x in tensors if not torch._C._functorch.is_functorch_wrapped_tensor(x)])


def kept_bytes(model, samples, checkpointing, kind=PackedQwenImage):
    """(bytes, tokens): of all storages that a forward leaves for its backward, the parameters aside.

    What autograd saves shows in its hooks; what checkpointing keeps (arguments, attention's result) are live tensors.
    """
    packed = kind(model, impl="native", checkpointing=checkpointing)
    layout = packed.layout(samples)
    image = torch.randn(layout.image_length, 64).to(model.dtype)
    text = torch.randn(layout.text_length, 48).to(model.dtype)
    inputs = (image, text, torch.full((len(samples),), 0.3), layout)
    with torch.no_grad():
        packed(*inputs)  # tables stay with the layout
    before, saved = alive(model), []

    def save(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        out = packed(*inputs)
    found = {at: size for at, size in alive(model).items() if at not in before} | storages(model, saved)
    assert out.requires_grad
    return sum(found.values()), layout.joint_length


@pytest.mark.slow
@pytest.mark.skipif(not native.available(), reason="the native kernels are not built")
@pytest.mark.parametrize("checkpointing", [False, True, "inputs"])
@pytest.mark.parametrize(
    "samples, dtype",
    [(ALONE, torch.float32), (MANY, torch.float32), (NO_TEXT_TO_SPEAK_OF, torch.float32), (MANY, torch.bfloat16)],
    ids=["alone", "many", "short text", "bfloat16"],
)
def test_activation_bytes_are_what_autograd_keeps(model_of, threads, samples, checkpointing, dtype):
    few, many = (model_of(layers, dtype) for layers in (3, 6))
    (less, tokens), (more, _) = (kept_bytes(model, samples, checkpointing) for model in (few, many))
    element = dtype.itemsize
    estimates = [
        activation_bytes(ModelSize.of(model.config, {}), tokens, checkpointing, element) for model in (few, many)
    ]
    assert (more - less) == pytest.approx(estimates[1] - estimates[0], rel=0.15), "by block"
    width = few.config.num_attention_heads * few.config.attention_head_dim
    if checkpointing:  # the estimate has one block more, that the backward recomputes
        unit = activation_bytes(ModelSize.of(few.config, {}), tokens, False, element) // 3
        more, estimate = more + unit, estimates[1]
    else:
        estimate = estimates[1]
    assert more == pytest.approx(estimate, rel=0.15), f"{more / tokens / width / element:.1f} widths a token"


@pytest.mark.slow
@pytest.mark.skipif(not native.available(), reason="the native kernels are not built")
@pytest.mark.parametrize("checkpointing", [False, True, "inputs"])
def test_activation_bytes_of_qwen_image_21(threads, checkpointing):
    samples = [Sample(((20, True), REFERENCE_PLACE, (9, True)), (1, 8, 8), ((1, 8, 8),)), Sample(10, (1, 6, 6))]
    models = [qwen_image_21.transformer(layers=layers) for layers in (3, 6)]
    (less, tokens), (more, _) = (kept_bytes(model, samples, checkpointing, PackedQwenImage21) for model in models)
    few, many = (activation_bytes(QwenImage21Size.of(model.config, {}), tokens, checkpointing, 4) for model in models)
    assert more - less == pytest.approx(many - few, rel=0.05), "by block"


def test_activation_bytes_by_token_width_and_element(make_transformer):
    size = ModelSize.of(make_transformer(layers=1).config, {})
    for checkpointing in RECOMPUTATION:
        one = activation_bytes(size, 1, checkpointing, 2)
        assert activation_bytes(size, 1000, checkpointing, 2) == 1000 * one
        assert activation_bytes(size, 1, checkpointing, 4) == 2 * one


# ---- planning ----


SIZE = ModelSize(vae_width=0)  # of Qwen-Image-Edit, whose VAE does not count here
WITH_VAE = ModelSize(vae_width=96)


def planned(stage, memory, ranks=8, fixed=0, sharded=0, size=SIZE, **more):
    return plan_memory(stage, size, ranks=ranks, memory=memory, fixed=fixed, sharded=sharded, element=2, **more)


STAGE = BudgetStage(1024, 100, 1e-4)
LARGEST = 2 * 64 * 64 + TEXT_TOKENS  # tokens of references and target of STAGE, and its text


def needs(tokens, checkpointing, degree=1):
    return activation_bytes(SIZE, tokens, checkpointing, 2, degree > 1) // degree


def test_the_least_sharing_and_recomputing_that_fits_is_taken():
    kept, recomputed, inputs, host = (needs(LARGEST, checkpointing) for checkpointing in RECOMPUTATION)
    assert kept > 4 * recomputed and recomputed > 1.5 * inputs and inputs > 3 * host, "each memory has its own plan"
    expected = [
        (kept + GIB, 1, False),
        (kept - GIB, 1, True),  # recompute before sharing
        (recomputed + GIB, 1, True),
        (recomputed - GIB // 2, 1, "inputs"),
        (inputs - GIB // 2, 1, "host"),
        (host - GIB // 8, 2, "host"),
        (host // 2 - GIB // 16, 4, "host"),
        (host // 4 - GIB // 32, 8, "host"),
    ]
    for memory, degree, checkpointing in expected:
        plan = planned(STAGE, memory)
        assert (plan.sequence_parallel, plan.checkpointing) == (degree, checkpointing), memory / GIB
        assert plan.bytes_needed <= memory and plan.pack_tokens >= LARGEST
        assert f"{degree} rank(s) per pack, {RECOMPUTATION[checkpointing]}: " in plan.reason
    assert planned(STAGE, kept - GIB).reason.endswith(
        f"; 1 rank(s) per pack, blocks kept would need {needs(LARGEST, False) / GIB:.1f} GiB"
    )


def test_what_ranks_hold_anyway_comes_off_the_memory():
    memory = needs(LARGEST, False) + GIB
    assert not planned(STAGE, memory).checkpointing
    assert planned(STAGE, memory, fixed=2 * GIB).checkpointing, "fixed: on every rank"
    assert planned(STAGE, memory, sharded=16 * GIB).checkpointing, "sharded: an eighth on each of 8"
    assert not planned(STAGE, memory, sharded=7 * GIB).checkpointing
    plan = planned(STAGE, memory + 5 * GIB, fixed=3 * GIB, sharded=16 * GIB)
    assert plan.bytes_needed == pytest.approx(5 * GIB + needs(plan.pack_tokens, False), rel=1e-6)


@pytest.mark.parametrize("times", [1, 2, 3, 4, 9])
def test_packs_hold_what_fits_up_to_four_of_the_largest_samples(times):
    plan = planned(STAGE, needs(times * LARGEST, False) + needs(LARGEST // 2, False))
    assert plan.pack_tokens == min(times, 4) * LARGEST and not plan.checkpointing


def test_with_guidance_a_sample_takes_two_sequences():
    """Automatic packs hold both; what cannot is said."""
    enough, memory = needs(2 * LARGEST, "host"), needs(2 * LARGEST, "host") - GIB // 8
    assert planned(STAGE, enough + GIB // 8, ranks=1, sequences=2).pack_tokens == 2 * LARGEST
    assert planned(STAGE, memory, ranks=1).pack_tokens >= LARGEST
    with pytest.raises(ValueError, match=f"a pack of {2 * LARGEST} tokens .*, twice for guidance\\) needs"):
        planned(STAGE, memory, ranks=1, sequences=2)
    plain = MSGRPO_RECIPES["lora"]()
    assert (
        plain.sequences == lora().sequences == 1
        and dataclasses.replace(plain, rollout_true_cfg_scale=2.0).sequences == 2
    )
    assert plain.sample_true_cfg_scale == 1.0, "as it is trained"


def test_a_stage_without_a_budget_has_room_for_three_references():
    alone = dataclasses.replace(STAGE, budget=None)
    joint = dataclasses.replace(STAGE, budget=math.isqrt(3 * 512**2))
    assert planned(alone, 10**15, reference_area=512**2) == planned(joint, 10**15)


def test_what_a_stage_sets_is_kept():
    plenty = 10**15
    assert planned(dataclasses.replace(STAGE, checkpointing=True), plenty).checkpointing
    assert planned(dataclasses.replace(STAGE, sequence_parallel=4), plenty).sequence_parallel == 4
    assert planned(dataclasses.replace(STAGE, pack_tokens=777), plenty).pack_tokens == 777
    with pytest.raises(ValueError, match="a pack of 9728 tokens"):
        planned(dataclasses.replace(STAGE, checkpointing=False), needs(LARGEST, True) + GIB, ranks=1)


@pytest.mark.parametrize(
    "ranks, possible", [(1, {1}), (6, {1, 2, 3, 6}), (16, {1, 2, 4, 8}), (5, {1}), (48, {1, 2, 3, 4, 6, 8, 12, 24})]
)
def test_only_degrees_that_divide_ranks_and_heads_are_taken(ranks, possible):
    taken = set()
    for part in range(1, 2000):
        try:
            taken.add(planned(STAGE, needs(LARGEST, "host") * 60 // part, ranks=ranks).sequence_parallel)
        except ValueError:
            break
    assert taken == possible
    for degree in (2, 5, 7, 64):
        if degree not in possible:
            with pytest.raises(ValueError, match=rf"sequence_parallel = {degree} does not work for {ranks} rank"):
                planned(dataclasses.replace(STAGE, sequence_parallel=degree), 10**15, ranks=ranks)


@pytest.mark.parametrize("memory, fixed", [(GIB // 100, 0), (10 * GIB, 11 * GIB), (0, 0)])
def test_what_does_not_fit_is_an_error_that_says_what_would_help(memory, fixed):
    with pytest.raises(ValueError) as caught:
        planned(BudgetStage(2048, 10, 1e-4), memory, ranks=2, fixed=fixed)
    message = str(caught.value)
    tokens = (2048**2 + 1024**2) // 256 + TEXT_TOKENS
    least = (fixed + needs(tokens, "host", degree=2)) / GIB
    for part in (f"{tokens} tokens", "2048 x 2048", "1024 x 1024", f"{least:.1f} GiB", "each of 2 rank",
                 f"there are {memory / GIB:.1f}", "more ranks", "LoRA", "pack_tokens"):  # fmt: skip
        assert part in message


def test_memory_beside_the_activations_counts():
    """Gathered blocks are held with the activations; images are encoded, and weights updated, without them."""
    host, plenty = needs(LARGEST, "host"), needs(LARGEST, "host") + GIB // 8
    stage = dataclasses.replace(STAGE, checkpointing="host")
    assert planned(stage, plenty, ranks=1).bytes_needed == host
    assert planned(stage, plenty, ranks=1, gathered=GIB // 16).bytes_needed == host + GIB // 16
    small = dataclasses.replace(stage, pack_tokens=1)
    assert planned(small, 4 * plenty, ranks=2, update=6 * GIB).bytes_needed == 3 * GIB
    coding = coding_bytes(WITH_VAE, 2, 1024**2, 1024**2)
    assert coding > host and planned(small, 4 * plenty, ranks=1, size=WITH_VAE).bytes_needed == coding
    for more, needed in (({"update": 2 * GIB}, 2 * GIB), ({"size": WITH_VAE}, coding), ({"gathered": GIB}, host + GIB)):
        with pytest.raises(ValueError, match=f"needs {needed / GIB:.1f} GiB"):
            planned(stage, plenty, ranks=1, **more)
    large = dataclasses.replace(small, budget=2048)
    assert planned(large, 10**12, size=WITH_VAE).bytes_needed == coding_bytes(WITH_VAE, 2, 2048**2, 1024**2)
    assert planned(large, 10**12, size=WITH_VAE, freed=1).bytes_needed == 1 + coding_bytes(WITH_VAE, 2, 2048**2, 0)
    small_images = dataclasses.replace(small, budget=64)
    assert planned(small_images, 10**12, size=WITH_VAE, freed=1).bytes_needed == coding, "samples are decoded"
    assert planned(small_images, 10**12, size=WITH_VAE, freed=4 * GIB).bytes_needed == 4 * GIB + coding_bytes(
        WITH_VAE, 2, 1024**2, 0
    )
    assert gathered_bytes(1000, 10, 2, ranks=1) == 2060 and gathered_bytes(1000, 10, 2, ranks=2) == 4060
    assert gathered_bytes(1000, 10, 2, ranks=1, quantised=7) == 2088


def test_the_first_stages_are_offered_if_a_later_one_does_not_fit():
    stages = [BudgetStage(1024, 10, 1e-4), BudgetStage(1536, 10, 1e-4), BudgetStage(2048, 10, 1e-4, target_side=1536)]
    memory = needs((1536**2 + 1024**2) // 256 + TEXT_TOKENS, "host") + GIB // 8

    def plan(stage):
        return planned(stage, memory, ranks=1)

    with pytest.raises(ValueError) as caught:
        plan_stages(stages, plan)
    message = str(caught.value)
    assert message.startswith("stage 2 does not fit the memory: a pack of 27136 tokens")
    flags = "--stages.2.budget 1536 --stages.2.target-side 1024"
    assert message.endswith(f"; stage 0, 1 fits; train the others with its sizes: {flags}")
    assert [each.checkpointing for each in plan_stages(stages[:2], plan)] == ["host", "host"]
    assert smaller_stages(stages, [False] * 3) == smaller_stages(stages, [True] * 3) == ""
    unset = [BudgetStage(None, 10, 1e-4, pack_tokens=500), BudgetStage(64, 10, 1e-4)]
    assert smaller_stages(unset, [True, False]).endswith("--stages.1.budget none --stages.1.pack-tokens 500")


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize(
    "name, size, image, latents",
    [
        ("AutoencoderKLQwenImage", WITH_VAE, (1, 3, 1, 1024, 1024), (1, 16, 1, 128, 128)),
        ("AutoencoderKLQwenImage21", QwenImage21Size(), (1, 4, 1, 1024, 1024), (1, 64, 1, 64, 64)),
    ],
)
def test_the_vae_needs_what_is_planned(direction, name, size, image, latents):
    import diffusers

    from uniref_fast.models.single_frame import single_frame

    with torch.device("meta"):
        vae = torch.nn.Module.to(getattr(diffusers, name)(), torch.bfloat16)
    shape = image if direction == "encode" else latents
    with torch.no_grad(), single_frame(vae), LivingTensors() as memory, FusedAttention():
        getattr(vae, direction)(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
    assert memory.peak == pytest.approx(
        coding_bytes(size, 2, *((1024**2, 0) if direction == "encode" else (0, 1024**2))), rel=0.02
    )


def test_device_memory():
    cpu = torch.device("cpu")
    assert device_memory(cpu, 1.5) == 3 * GIB // 2
    assert GIB // 10 < device_memory(cpu, None) < 2**50


# ---- recipes ----


def run(*lengths, **fields):
    return SFT(tuple(BudgetStage(64, n, 10.0 ** -(i + 1)) for i, n in enumerate(lengths)), **fields)


@pytest.mark.parametrize(
    "lengths, steps, ends",
    [
        ((10,), None, [10]),
        ((30, 12, 8), None, [30, 42, 50]),
        ((30, 12, 8), 25, [15, 21, 25]),
        ((30, 12, 8), 500, [300, 420, 500]),
        ((1, 1, 1000), 3, [1, 2, 3]),
        ((1000, 1, 1), 3, [1, 2, 3]),
        ((1000, 1, 1), 10, [8, 9, 10]),
        ((50, 1, 49), 10, [5, 6, 10]),  # the middle one rounds to nothing
        ((1, 1, 1, 997), 10, [1, 2, 3, 10]),
        ((4, 4), 7, [4, 7]),
    ],
)
def test_stage_ends_are_scaled_and_every_stage_has_a_step(lengths, steps, ends):
    config = run(*lengths, steps=steps)
    assert config.ends() == ends and config.total_steps == ends[-1]


def test_every_stage_has_a_step_whatever_the_lengths():
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        count = int(torch.randint(1, 7, (), generator=generator))
        lengths = (10 ** (torch.rand(count, generator=generator) * 4)).long().tolist()
        config = run(*lengths, steps=int(torch.randint(count, 60, (), generator=generator)))
        ends = config.ends()
        assert ends[-1] == config.steps and all(a < b for a, b in itertools.pairwise([0, *ends]))


def test_a_step_belongs_to_the_stage_that_has_not_ended():
    config = run(2, 1, 3)
    assert [stage_at(config, step)[0] for step in range(8)] == [0, 0, 1, 2, 2, 2, 2, 2]
    assert all(stage_at(config, step)[1] is config.stages[stage_at(config, step)[0]] for step in range(7))


def test_learning_rates_warm_up_and_follow_one_cosine():
    config = run(60, 40, warmup=20)
    assert [config.lr(step) for step in (0, 9, 19)] == pytest.approx([0.1 / 20, 0.05, 0.1])
    assert config.lr(20) == pytest.approx(0.1)
    assert config.lr(59) == pytest.approx(0.1 * (1 + math.cos(math.pi * 39 / 80)) / 2)
    assert config.lr(60) == pytest.approx(0.01 * 0.5), "half of the cosine, at the second stage's rate"
    assert config.lr(99) == pytest.approx(0.01 * (1 + math.cos(math.pi * 79 / 80)) / 2) and config.lr(99) > 0
    rates = [config.lr(step) for step in range(100)]
    assert all(a < b for a, b in itertools.pairwise(rates[:20]))
    assert all(a > b for a, b in itertools.pairwise(rates[20:]))


def test_learning_rates_at_the_edges():
    constant = run(3, 3, warmup=2, schedule="constant")
    assert [constant.lr(step) for step in range(6)] == pytest.approx([0.05, 0.1, 0.1, 0.01, 0.01, 0.01])
    assert run(3, warmup=0).lr(0) == 0.1
    assert run(3, warmup=500).lr(2) == pytest.approx(0.1 * 3 / 500), "a run that ends while it warms up"
    assert run(3, warmup=3).lr(3) == pytest.approx(0.1)
    assert run(30, 12, 8, steps=10, warmup=0).lr(6) == pytest.approx(0.01 * (1 + math.cos(math.pi * 0.6)) / 2)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("budget", 15, "a stage's budget is the side of a square in pixels, at least 16; got 15"),
        ("target_side", 0, "target_side must be at least 16"),
        ("steps", 0, "steps must be at least 1"),
        ("lr", 0.0, "lr must be above 0"),
        ("lr", math.nan, "lr must be above 0"),
        ("lr", -1.0, "lr must be above 0"),
        ("pack_tokens", 0, "pack_tokens must be at least 1"),
        ("sequence_parallel", 0, "sequence_parallel must be at least 1"),
        ("sequence_parallel", -2, "sequence_parallel must be at least 1"),
    ],
)
def test_wrong_values_of_a_stage(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(STAGE, **{field: value})


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("stages", (), "at least one stage"),
        ("drop_text", 1.01, "drop_text must be a share from 0 to 1, got 1.01"),
        ("drop_references", -0.1, "drop_references must be a share"),
        ("drop_text", math.nan, "drop_text must be a share"),
        ("packs", 0, "packs must be at least 1"),
        ("save_every", 0, "save_every must be at least 1"),
        ("keep", 0, "keep must be at least 1"),
        ("eval_every", -1, "eval_every must be at least 0"),
        ("eval_samples", 0, "eval_samples must be at least 1"),
        ("sample_num_inference_steps", 1, "sample_num_inference_steps must be at least 2"),
        ("max_skipped", 0, "max_skipped must be at least 1"),
        ("max_broken", -1, "max_broken must be at least 0"),
        ("workers", 0, "workers must be at least 1"),
        ("warmup", -1, "warmup must be at least 0"),
        ("t_std", -0.1, "t_std must be at least 0"),
        ("embedded_guidance", math.nan, "embedded_guidance must be at least 0"),
        ("t_std", math.nan, "t_std must be at least 0"),
        ("max_grad_norm", math.nan, "max_grad_norm must be at least 0"),
        ("weight_decay", -1e-9, "weight_decay must be at least 0"),
        ("steps", 1, "2 stages need at least as many steps, got steps = 1"),
        ("lora_rank", 0, "lora_rank must be at least 1, or none"),
        ("ema", 1.0, "ema must be between 0 and 1, or none"),
        ("ema", 0.0, "ema must be"),
        ("ema", math.nan, "ema must be"),
    ],
)
def test_wrong_values_of_a_run(field, value, message):
    with pytest.raises(ValueError, match=message):
        run(3, 4, **{field: value}) if field != "stages" else SFT(value)


def test_values_at_the_limits_are_taken():
    given = {"steps": 2, "drop_text": 0.0, "drop_references": 1.0, "eval_every": 0, "sample_every": 0, "warmup": 0,
             "t_std": 0.0, "max_grad_norm": 0.0, "max_broken": 0, "lora_rank": 1, "ema": None}  # fmt: skip
    config = run(1, 1, **given)
    assert {name: getattr(config, name) for name in given} == given
    assert config.total_steps == 2 and config.ends() == [1, 2], "each stage has one step"
    assert config.lr(0) == config.stages[0].lr, "without warm-up the first step has the full rate"


def test_recipes_are_complete_and_named_after_themselves():
    sizes = ["lora", "lora_24gb", "lora_48gb", "lora_80gb"]
    assert list(SFT_RECIPES) == ["tiny", "builtin", "builtin_more", *sizes, "paper"]
    for name, recipe in SFT_RECIPES.items():
        config = recipe()
        assert config == SFT_RECIPES[name]() and config.ends()[-1] == config.total_steps
        budgets = [stage.budget or 0 for stage in config.stages]
        assert budgets == sorted(budgets)
        assert all(0 < config.lr(step) <= 4e-3 for step in range(0, config.total_steps, 97))
    assert [stage.budget for stage in paper().stages] == [stage.budget for stage in lora().stages] == [1024, 1536, 2048]
    assert paper().total_steps == 50_000 and paper().betas == (0.9, 0.95) and paper().weight_decay == 0.05
    assert paper().lora_rank is None and lora().lora_rank == 64 and tiny().model == "builtin"
    assert {stage.budget for stage in tiny().stages} == {None}, "as `uniref-fast edit` sizes references"


@pytest.mark.parametrize(("gib", "ranks"), [(139, 1), (139, 8), (79, 1), (79, 2), (79, 4), (79, 8)])
def test_the_lora_recipes_run_where_they_say(gib, ranks):
    """20.4 billion weights, 0.42 of them the adapter's, beside an encoder of 8.3: it fits, and packs can be shared."""
    memory, fixed, sharded = int(0.9 * gib * GIB), int(16.9e9), int(40.9e9 + 0.42e9 * 16)
    for config in (lora(), MSGRPO_RECIPES["lora"]()):
        plans = [planned(stage, memory, ranks, fixed, sharded) for stage in config.stages]
        assert all(plan.pack_tokens >= (s.budget**2 + s.target_side**2) // 256 + TEXT_TOKENS
                   for plan, s in zip(plans, config.stages, strict=True))  # fmt: skip
        assert all(config.packs % (ranks // plan.sequence_parallel) == 0 for plan in plans)
    with pytest.raises(ValueError, match="use more ranks"):
        planned(lora().stages[-1], int(0.9 * 69 * GIB), 1, fixed, sharded)


def test_no_flag_is_taken_for_one_of_torchrun():
    """torchrun looks through all arguments, the script's too, and refuses one that begins several of its own."""
    from torch.distributed.run import get_args_parser

    own = [option for action in get_args_parser()._actions for option in action.option_strings]
    for recipe in (*SFT_RECIPES.values(), *MSGRPO_RECIPES.values()):
        flags = ["--" + name.replace("_", "-") for name in recipe().__dataclass_fields__]
        assert [flag for flag in flags if any(option.startswith(flag) for option in own)] == []
