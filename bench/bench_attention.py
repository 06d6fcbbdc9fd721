"""segment_attention against its peers, by layout; correctness checked first.

    pytest bench/bench_attention.py --benchmark-only [-k "forward and bfloat16"]

Peers: PyTorch's attention as one would use it without this library (a call per sample, or one call with a boolean mask
where visibility is not full), a call per segment where text is causal, each of its backends, compiled FlexAttention
with the cost of its block mask counted, and FlashAttention and cuDNN's flex attention when installed, as `impl="flash"`
and `impl="cudnn_flex"` call them. The group's first member is the baseline of its ratios.
"""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from uniref_fast import ops
from uniref_fast.layout import Sample, SelfLayout
from uniref_fast.ops.segment_attention import segment_attention_reference
from uniref_fast.testing import max_relative_error
from uniref_fast.visibility import AttentionPlan, plan

CUDA = torch.cuda.is_available()
# Tokens a side of an image, text tokens, heads: Qwen-Image-Edit at 1024^2, or something a CPU ends in seconds.
SIDE, TEXT, HEADS = (64, 512, 24) if CUDA else (16, 32, 4)
DIM = 128
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def image(height=1.0, width=1.0):
    return 1, max(int(SIDE * height), 1), max(int(SIDE * width), 1)


def one(references):
    return [Sample(TEXT, image(), (image(),) * references)]


def ragged(count):
    """Unlike samples: 0 to 3 references, sides from half to one and a half."""
    sizes = itertools.cycle([0.5, 1.0, 0.75, 1.5, 0.6])
    return [
        Sample(TEXT // 4 + i, image(next(sizes), next(sizes)), (image(0.5, next(sizes)),) * (i % 4))
        for i in range(count)
    ]


def text_and_images():
    """Text, three images, text and the target of Qwen-Image-2.1: each sees what is before it, text itself causally."""
    lengths = [200, *[SIDE * SIDE] * 3, 100, SIDE * SIDE]
    spans = tuple(itertools.pairwise([0, *itertools.accumulate(lengths)]))
    keys = [((0, end),) for _, end in spans]
    for text in (0, 4):
        keys[text] = tuple(span for span in ((0, spans[text][0]), spans[text]) if span[0] < span[1])
    total = spans[-1][1]
    return AttentionPlan(spans, tuple(keys), total, total, (0, -1, -1, -1, 1, -1))


CAUSAL_TEXT = "causal text of 200, 3 images, text of 100, target"
LAYOUTS = {
    **{f"one sample, {k} references": (one(k), "full") for k in (range(9) if CUDA else (0, 3))},
    **{f"ragged pack of {n}": (ragged(n), "full") for n in ((2, 8, 32) if CUDA else (8,))},
    "reference_causal, 3 references": (one(3), "reference_causal"),
    "group_shared, 16 targets with one copy of 3 references": (
        [Sample(TEXT // 4, image(0.5), (image(0.5),) * 3, group=0)] * 16,
        "group_shared",
    ),
    CAUSAL_TEXT: (text_and_images(), "block_causal"),
    "128 samples of 23 tokens": ([Sample(3, (1, 4, 4), ((1, 2, 2),)) for _ in range(128)], "full"),
}
if not CUDA:  # the size that the goal for CPUs names
    LAYOUTS["one sample, 4096 tokens, 24 heads"] = ([Sample(64, (1, 48, 56), ((1, 32, 42),))], "full")

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
MEMBERS = ["sdpa", "sdpa by segment", *(f"sdpa {name}" for name in BACKENDS if CUDA), "flex compiled"]
MEMBERS += ["triton" if CUDA else "native", "dense", "flash", "cudnn_flex", "dispatch"]


def heads_first(x):
    return x.transpose(0, 1)[None]


def sdpa(compiled, visibility):
    """A call per sample, or one with a mask."""
    if visibility == "full":
        spans = [slice(*keys[0]) for keys in compiled.intervals]
        rows = [slice(*span) for span in compiled.ranges]

        def attend(q, k, v):
            parts = zip(rows, spans, strict=True)
            return torch.cat([_sdpa(q[row], k[span], v[span]) for row, span in parts])

        return attend
    mask = visible(compiled)
    return lambda q, k, v: _sdpa(q, k, v, attn_mask=mask)


def by_segment(compiled):
    """A call per segment, with a mask for text, as diffusers does by default."""
    mask, rows = (
        visible(compiled),
        [(slice(*span), slice(keys[-1][1])) for span, keys in zip(compiled.ranges, compiled.intervals, strict=True)],
    )

    def attend(q, k, v):
        return torch.cat(
            [
                _sdpa(q[row], k[seen], v[seen], attn_mask=mask[row, seen] if causal >= 0 else None)
                for (row, seen), causal in zip(rows, compiled.causal, strict=True)
            ]
        )

    return attend


def _sdpa(q, k, v, **options):
    return F.scaled_dot_product_attention(*map(heads_first, (q, k, v)), **options)[0].transpose(0, 1)


def visible(compiled):
    mask = torch.zeros(compiled.num_queries, compiled.num_keys, dtype=torch.bool, device="cuda" if CUDA else "cpu")
    for (start, end), keys in zip(compiled.ranges, compiled.intervals, strict=True):
        for a, b in keys:
            mask[start:end, a:b] = True
    for (a, b), index in compiled.causal_intervals.items():
        mask[slice(*compiled.ranges[index]), a:b].tril_()
    return mask


def flex(compiled, visibility):
    device = "cuda" if CUDA else "cpu"
    columns = compiled.transpose.ranges
    of_query, of_key = (
        torch.repeat_interleave(torch.arange(len(spans)), torch.tensor([b - a for a, b in spans])).to(device)
        for spans in (compiled.ranges, columns)
    )
    seen = torch.tensor(
        [[any(a <= x and y <= b for a, b in keys) for x, y in columns] for keys in compiled.intervals], device=device
    )

    # The difference of query and key from which on they see each other: none, or that of the diagonal.
    least = torch.full(seen.shape, -(2**31))
    for i, index in enumerate(compiled.causal_intervals.get(span, -1) for span in columns):
        if index >= 0:
            least[index, i] = compiled.ranges[index][0] - columns[i][0]
    least = least.to(device)

    def rule(batch, head, query, key):
        return seen[of_query[query], of_key[key]]

    def causal_rule(batch, head, query, key):
        return rule(batch, head, query, key) & (query - key >= least[of_query[query], of_key[key]])

    kernel, made = (torch.compile(function, dynamic=False) for function in (flex_attention, create_block_mask))

    def attend(q, k, v):  # compiled, since eager makes the whole mask in int64: 19 GiB for 30,000 tokens
        mask = made(
            causal_rule if compiled.causal else rule, None, None, compiled.num_queries, compiled.num_keys, device=device
        )
        return kernel(*map(heads_first, (q, k, v)), block_mask=mask)[0].transpose(0, 1)

    return attend


def member(name, compiled, visibility, backward, dtype):
    """q, k, v -> out, or a skip with the reason."""
    if name == "flex compiled":
        if not CUDA and (backward or visibility == "full"):
            pytest.skip("on a CPU FlexAttention has no backward, and its compilation is shown on two layouts only")
        return flex(compiled, visibility)
    if name in ("flash", "cudnn_flex"):
        q = torch.empty(1, HEADS, DIM, dtype=dtype, device="cuda" if CUDA else "cpu")
        if why := ops.attention_unavailable(name, q):
            pytest.skip(why)
    if name == "sdpa by segment":
        if not compiled.causal:
            pytest.skip("shown where text is causal")
        return by_segment(compiled)
    if name.startswith("sdpa"):
        attend, backend = sdpa(compiled, visibility), BACKENDS.get(name.removeprefix("sdpa").strip())
        if backend is None:
            return attend
        if visibility != "full" and backend is SDPBackend.FLASH_ATTENTION:
            pytest.skip("takes no mask")

        def forced(q, k, v):
            with sdpa_kernel(backend):
                return attend(q, k, v)

        return forced
    impl = None if name == "dispatch" else name
    return lambda q, k, v: ops.segment_attention(q, k, v, compiled, impl=impl)


@pytest.mark.parametrize("whose", MEMBERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16] if CUDA else [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_attention(benchmark, timed, device, direction, layout, dtype, whose):
    samples, visibility = LAYOUTS[layout]
    if "24 heads" in layout and (direction == "backward" or dtype != torch.bfloat16):
        pytest.skip("shown forward in bfloat16 only: it takes seconds a call")
    compiled = samples
    if not isinstance(compiled, AttentionPlan):
        compiled = plan(SelfLayout.qwen(samples, shared_references=visibility == "group_shared"), visibility)
    heads = 24 if "24 heads" in layout else HEADS
    torch.manual_seed(0)
    x = [torch.randn(compiled.num_queries, heads, DIM, device=device).to(dtype) for _ in range(3)]
    backward = direction == "backward"
    calls = []
    for name in ("sdpa", whose):
        attend = member(name, compiled, visibility, backward, dtype)
        if not backward:
            calls.append(torch.no_grad()(lambda attend=attend: attend(*x)))
            continue
        leaves = [t.clone().requires_grad_() for t in x]
        out, g = attend(*leaves), x[0]
        calls.append(functools.partial(torch.autograd.grad, out, leaves, g, retain_graph=True))
    check(calls, x, compiled, dtype, backward)
    benchmark.group = f"attention {direction}, {layout}, {str(dtype).removeprefix('torch.')}"
    if whose == "dispatch":
        benchmark.extra_info["choice"] = ": ".join(ops.explain_attention(x[0], compiled, backward=backward))
    flops = (10 if backward else 4) * compiled.area * heads * DIM
    timed(calls[1], calls[0], flops=flops, dtype=dtype, graph=whose != "flex compiled" or not backward)


def check(calls, x, compiled, dtype, backward):
    """The member against the specification in float32; gradients against the baseline's."""
    if backward:
        pairs = zip(calls[1](), calls[0](), strict=True)
    else:
        wide = [t.float() for t in x]
        pairs = [(calls[1](), segment_attention_reference(*wide, compiled, DIM**-0.5)[0])]
    for ours, theirs in pairs:
        assert max_relative_error(ours, theirs) < TOLERANCE[dtype]
