"""The Triton kernels against float64 oracles: interpreted where there is no GPU, compiled where there is one."""

import importlib.util
import itertools

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from uniref_fast.kernels import norm_modulate as norm
from uniref_fast.kernels import patchify
from uniref_fast.kernels import qk_norm_rope as rope
from uniref_fast.kernels import segment_attention as attention
from uniref_fast.testing import assert_within_budget
from uniref_fast.visibility import AttentionPlan

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
# The interpreter multiplies the bit patterns of bfloat16 and truncates casts to it.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=on_gpu)]
SMALL = attention.AttentionConfig(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=2)
EPS = 1e-6
torch_empty = torch.empty


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """New memory is NaN, so that a value nobody wrote fails the test."""

    def empty(*args, **kwargs):
        new = torch_empty(*args, **kwargs)
        return new.fill_(float("nan")) if new.is_floating_point() else new

    monkeypatch.setattr(torch, "empty", empty)
    torch.manual_seed(0)


# --- segment_attention


def run_attention(q, k, v, plan, config=SMALL):
    device = q.device
    tiles = plan.tiles(config.BLOCK_M, device)
    return attention.segment_attention(q, k, v, *plan.tensors(device), tiles, q.shape[2] ** -0.5, config)


def attention_formula(q, k, v, plan):
    """Out in q's dtype and lse, range by range, in plain PyTorch."""
    out = torch.zeros_like(q)
    lse = torch.full((q.shape[1], q.shape[0]), float("-inf"), dtype=q.dtype, device=q.device)
    for (start, end), intervals in zip(plan.ranges, plan.intervals, strict=True):
        rows = [row for interval in intervals for row in range(*interval)]
        if rows:
            scores = torch.einsum("mhd,nhd->hmn", q[start:end], k[rows]) * q.shape[2] ** -0.5
            out[start:end] = torch.einsum("hmn,nhd->mhd", scores.softmax(-1), v[rows])
            lse[:, start:end] = scores.logsumexp(-1)
    return out, lse


def check_attention(q, k, v, plan, config=SMALL):
    out, lse = run_attention(q, k, v, plan, config)
    oracle, lse_oracle = attention_formula(q.double(), k.double(), v.double(), plan)
    # The eager result computes in float32 and rounds its output: a tighter budget than low-precision scores would give.
    eager, lse_eager = attention_formula(q.float(), k.float(), v.float(), plan)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    assert_within_budget(out, eager.to(q.dtype), oracle, "out")
    empty = lse_oracle == float("-inf")
    assert torch.equal(lse == float("-inf"), empty)
    assert_within_budget(lse[~empty], lse_eager[~empty], lse_oracle[~empty], "lse")


def qkv(num_queries, num_keys, heads, head_dim, dtype, device):
    q = torch.randn(num_queries, heads, head_dim, device=device)
    return [x.to(dtype) for x in (q, *torch.randn(2, num_keys, heads, head_dim, device=device))]


def block_diagonal(lengths):
    edges = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    spans = tuple(itertools.pairwise(edges))
    return AttentionPlan(spans, tuple((span,) for span in spans), edges[-1], edges[-1])


PLANS = {
    "one_token": block_diagonal([1]),  # softmax of one score: out is v
    "tile_borders": block_diagonal([15, 16, 17, 31, 32, 33]),  # no full tile, no tail, both, one row past a border
    "tiny_segments": block_diagonal([1, 2, 3] * 11),  # more programs than work, every tile mostly masked
    "no_keys": AttentionPlan(((0, 3), (3, 20), (20, 22)), (((0, 5),), (), ((5, 22),)), 22, 22),
    "nobody_sees_anything": AttentionPlan(((0, 2),), ((),), 2, 0),  # k and v have no rows at all
    # A text and target range over everything, references over their own: intervals shared, and gaps between them.
    "several_intervals": AttentionPlan(
        ((0, 18), (18, 35), (35, 52)),
        (((0, 18), (20, 37), (40, 41)), ((18, 35),), ((1, 2), (19, 35), (51, 52))),
        52,
        52,
    ),
    "cross": AttentionPlan(((0, 5),), (((2, 21),),), 5, 40),  # queries of another length than keys
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PLANS)
def test_attention_plans(name, dtype, device):
    plan = PLANS[name]
    check_attention(*qkv(plan.num_queries, plan.num_keys, 2, 16, dtype, device), plan)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", attention.HEAD_DIMS)
def test_attention_head_dims_and_rectangular_tiles(head_dim, dtype, device):
    config = attention.AttentionConfig(BLOCK_M=32, BLOCK_N=16, num_warps=4, num_stages=1)
    plan = block_diagonal([33, 20])
    check_attention(*qkv(53, 53, 1, head_dim, dtype, device), plan, config)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_with_picked_config(dtype, device):
    # 130 is a full query tile of 128 and one of two rows; it has full key tiles and a tail of two.
    capability = torch.cuda.get_device_capability() if device == "cuda" else (9, 0)
    config = attention.pick_config(64, dtype, capability)
    check_attention(*qkv(131, 131, 1, 64, dtype, device), block_diagonal([1, 130]), config)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("lengths", [[1025], [4096, 512, 77, 1, 1331]])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_attention_real_sizes(lengths, head_dim, dtype, device):
    plan = block_diagonal(lengths)
    config = attention.pick_config(head_dim, dtype, torch.cuda.get_device_capability())
    check_attention(*qkv(plan.num_queries, plan.num_keys, 3, head_dim, dtype, device), plan, config)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_strided(dtype, device):
    fused = torch.randn(20, 3, 2, 16, device=device).to(dtype)  # one projection: rows of q, k, v are 96 apart
    check_attention(*fused.unbind(1), block_diagonal([3, 17]))
    heads_first = torch.randn(3, 2, 20, 16, device=device).to(dtype)  # [H, N, D] memory
    check_attention(*heads_first.transpose(1, 2), block_diagonal([3, 17]))
    q, k, v = fused[:, 0], heads_first[1].transpose(0, 1), heads_first[2].transpose(0, 1).contiguous()
    check_attention(q, k, v, block_diagonal([3, 17]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_bit_identical_alone_and_in_any_pack(dtype, device):
    lengths = [5, 33, 16, 1, 49]
    samples = [qkv(n, n, 2, 16, dtype, device) for n in lengths]
    alone = [run_attention(*sample, block_diagonal([n])) for sample, n in zip(samples, lengths, strict=True)]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        packed = (torch.cat(parts) for parts in zip(*(samples[i] for i in order), strict=True))
        out, lse = run_attention(*packed, block_diagonal([lengths[i] for i in order]))
        outs = out.split([lengths[i] for i in order])
        lses = lse.split([lengths[i] for i in order], dim=1)
        for i, part, part_lse in zip(order, outs, lses, strict=True):
            assert torch.equal(part, alone[i][0]) and torch.equal(part_lse, alone[i][1]), f"sample {i} in {order}"


def test_attention_ignores_what_is_not_visible(device):
    # The rows around the intervals, in the same key tile as visible ones, are not finite.
    plan = AttentionPlan(((0, 4),), (((1, 19), (24, 27)),), 4, 30)
    q, k, v = qkv(4, 30, 1, 16, torch.float32, device)
    expected = run_attention(q, k, v, plan)[0]
    for hidden in (0, slice(19, 24), slice(27, 30)):
        k[hidden], v[hidden] = float("nan"), float("inf")
    assert torch.equal(run_attention(q, k, v, plan)[0], expected)


def test_attention_offsets_beyond_32_bits(device):
    # 33 rows 2^26 elements apart end past 2^31 elements. Only the pages that are used become resident.
    stride = 2**26
    buffer = torch_empty(32 * stride + 64, dtype=torch.float16, device=device)
    q, k, v = (buffer.as_strided((33, 1, 16), (stride, 16, 1), offset) for offset in (0, 16, 32))
    for x in (q, k, v):
        x.copy_(torch.randn(33, 1, 16, device=device))
    plan = block_diagonal([33])
    out, lse = run_attention(q, k, v, plan)
    expected, expected_lse = run_attention(q.clone(), k.clone(), v.clone(), plan)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


def test_attention_without_queries(device):
    plan = AttentionPlan((), (), 0, 7)
    out, lse = run_attention(*qkv(0, 7, 2, 16, torch.float32, device), plan)
    assert out.shape == (0, 2, 16) and lse.shape == (2, 0)


def test_attention_refuses_other_head_dims(device):
    with pytest.raises(AssertionError, match="head_dim 48"):
        run_attention(*qkv(4, 4, 1, 48, torch.float32, device), block_diagonal([4]))


# --- qk_norm_rope


def rope_formula(streams, weights, cos, sin, indices, dtype):
    """Joint q, k, v of both streams, computed in `dtype`."""
    (txt, img), (txt_index, img_index) = streams, indices
    order = torch.cat([txt_index, img_index]).long()
    joint = []
    for i in range(3):
        parts = []
        for x, weight in ((txt[i].to(dtype), weights[i]), (img[i].to(dtype), weights[2 + i] if i < 2 else None)):
            if i < 2:
                x = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
                x = x if weight is None else x * weight.to(dtype)
            parts.append(x)
        result = torch.zeros(len(order), *txt[i].shape[1:], dtype=dtype, device=cos.device)
        result[order] = torch.cat(parts)
        if i < 2:
            x0, x1 = result.unflatten(-1, (-1, 2)).unbind(-1)
            c, s = cos.to(dtype)[:, None], sin.to(dtype)[:, None]
            result = torch.stack([x0 * c - x1 * s, x0 * s + x1 * c], -1).flatten(-2)
        joint.append(result)
    return joint


def check_rope(txt, img, weights, device):
    num_txt, num_img = len(txt[0]), len(img[0])
    angles = torch.randn(num_txt + num_img, txt[0].shape[2] // 2, device=device) * 10
    order = torch.randperm(num_txt + num_img, device=device).int()  # any joint order, as of a pack
    indices = order[:num_txt].contiguous(), order[num_txt:].contiguous()
    args = (angles.cos(), angles.sin(), *indices)
    actual = rope.qk_norm_rope(*txt, *img, *weights, *args, EPS)
    oracle = rope_formula((txt, img), weights, *args[:2], indices, torch.float64)
    eager = rope_formula((txt, img), weights, *args[:2], indices, torch.float32)
    for name, result, rounded, exact in zip("qkv", actual, eager, oracle, strict=True):
        assert result.is_contiguous() and result.dtype == txt[0].dtype
        assert_within_budget(result, rounded.to(result.dtype), exact, name)
    assert torch.equal(actual[2].double(), oracle[2]), "v is a copy"


# Streams without a row (no text; no image), one token, and neither heads nor rows a power of two.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_txt", "num_img", "heads", "head_dim"),
    [
        (0, 3, 2, 16),
        (1, 0, 1, 32),
        (5, 7, 3, 64),
        (2, 3, 24, 128),
        pytest.param(300, 2049, 24, 128, marks=on_gpu),
        (0, 0, 2, 16),
    ],
)
def test_qk_norm_rope(num_txt, num_img, heads, head_dim, dtype, device):
    txt = torch.randn(3, num_txt, heads, head_dim, device=device).to(dtype).unbind(0)
    img = torch.randn(3, num_img, heads, head_dim, device=device).to(dtype).unbind(0)
    weights = [(1 + 0.1 * torch.randn(head_dim, device=device)).to(dtype) for _ in range(4)]
    check_rope(txt, img, weights, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_qk_norm_rope_strided_without_some_weights(dtype, device):
    txt = torch.randn(4, 3, 2, 16, device=device).to(dtype).unbind(1)  # slices of one projection
    img = torch.randn(3, 2, 9, 16, device=device).to(dtype).transpose(1, 2).unbind(0)  # [H, N, D] memory
    weight = torch.rand(16, device=device)  # float32 weights beside a low-precision stream
    check_rope(txt, img, [None, weight, weight, None], device)


# --- norm_modulate, gate_residual


def norm_formula(x, shift, scale, rows, dtype):
    x, shift, scale = x.to(dtype), shift.to(dtype)[rows], scale.to(dtype)[rows]
    return torch.nn.functional.layer_norm(x, x.shape[1:], eps=EPS) * (1 + scale) + shift


# One channel (variance 0), an odd size (rows that no vector load can be aligned to), powers of two and not, the real
# one. One row, and more segments than rows.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize(
    ("num_rows", "channels"), [(3, 1), (4, 77), (1, 64), (7, 200), (2, 3072), pytest.param(2049, 3072, marks=on_gpu)]
)
def test_norm_modulate_and_gate_residual(num_rows, channels, with_rows, dtype, device):
    x, y = (3 * torch.randn(2, num_rows, channels, device=device) + 1).to(dtype)
    shift, scale, gate = torch.randn(9, 3 * channels, device=device).to(dtype).chunk(3, 1)  # as a projection gives them
    rows = torch.randint(9, (num_rows,), device=device).int() if with_rows else None
    index = torch.zeros(num_rows, dtype=torch.long, device=device) if rows is None else rows.long()

    out = norm.norm_modulate(x, shift, scale, rows, EPS)
    eager, oracle = (norm_formula(x, shift, scale, index, t) for t in (torch.float32, torch.float64))
    assert_within_budget(out, eager.to(dtype), oracle, "norm_modulate")

    x_out, normed = norm.gate_residual_norm_modulate(x, y, gate, shift, scale, rows, EPS)
    eager, oracle = (x.to(t) + gate.to(t)[index] * y.to(t) for t in (torch.float32, torch.float64))
    assert_within_budget(x_out, eager.to(dtype), oracle, "x_out")
    # The norm is taken of x_out as it was rounded.
    eager, oracle = (norm_formula(x_out, shift, scale, index, t) for t in (torch.float32, torch.float64))
    assert_within_budget(normed, eager.to(dtype), oracle, "normed")

    assert torch.equal(norm.gate_residual(x, y, gate, rows), x_out)
    assert torch.equal(norm.norm_modulate(x_out, shift, scale, rows, EPS), normed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_modulate_strided_with_float32_modulation(dtype, device):
    x, y = torch.randn(5, 2, 48, device=device).to(dtype).unbind(1)
    shift, scale, gate = torch.randn(3, 1, 48, device=device)
    out = norm.norm_modulate(x, shift, scale, None, EPS)
    index = torch.zeros(5, dtype=torch.long, device=device)
    eager, oracle = (norm_formula(x, shift, scale, index, t) for t in (torch.float32, torch.float64))
    assert_within_budget(out, eager.to(dtype), oracle)
    x_out, normed = norm.gate_residual_norm_modulate(x, y, gate, shift, scale, None, EPS)
    assert_within_budget(x_out, (x.float() + gate * y.float()).to(dtype), x.double() + gate.double() * y.double())
    assert torch.equal(normed, norm.norm_modulate(x_out, shift, scale, None, EPS))


def test_norm_modulate_without_rows_of_x(device):
    x, shift = torch.randn(0, 8, device=device), torch.randn(1, 8, device=device)
    assert norm.norm_modulate(x, shift, shift, None, EPS).shape == (0, 8)
    assert norm.gate_residual(x, x, shift, None).shape == (0, 8)


# --- pack, unpack


def tokens_of(latent):
    channels, frames, height, width = latent.shape
    patches = latent.reshape(channels, frames, height // 2, 2, width // 2, 2)
    return patches.permute(1, 2, 4, 0, 3, 5).reshape(-1, 4 * channels)


# (F, h, w): one token, one row longer than a tile of tokens and one as long, several frames, a column.
SIZES = [(1, 2, 2), (1, 2, 66), (1, 4, 64), (3, 4, 6), (1, 10, 2)]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int32])  # moves bits, whatever they mean
@pytest.mark.parametrize("channels", [1, 3, 16])  # 3: no power of two
def test_pack_and_unpack(channels, dtype, device):
    latents = [(100 * torch.randn(channels, *size, device=device)).to(dtype) for size in SIZES]
    counts = [x[0].numel() // 4 for x in latents]
    starts = [sum(counts[i + 1 :]) for i in range(len(counts))]  # images in another order than the stream
    stream = patchify.pack(latents, starts, sum(counts))
    assert torch.equal(stream, torch.cat([tokens_of(x) for x in reversed(latents)]))
    grids = [(f, h // 2, w // 2) for f, h, w in SIZES]
    for latent, back in zip(latents, patchify.unpack(stream, starts, grids, channels), strict=True):
        assert torch.equal(back, latent) and back.is_contiguous()


def test_pack_and_unpack_strided(device):
    latent = torch.randn(2, 6, 8, 3, device=device).permute(3, 0, 1, 2)  # channels last
    cropped = torch.randn(3, 2, 9, 11, device=device)[:, :, 1:7, 2:10]
    stream = patchify.pack([latent, cropped], [0, 24], 48)
    assert torch.equal(stream, torch.cat([tokens_of(latent), tokens_of(cropped)]))
    wide = torch.cat([stream, stream], 1)[:, :12]  # a column slice of a wider buffer
    assert torch.equal(patchify.unpack(wide, [24], [(2, 3, 4)], 3)[0], cropped)


def test_pack_refuses_odd_latents_and_gaps(device):
    with pytest.raises(AssertionError, match="fill the stream"):
        patchify.pack([torch.zeros(1, 1, 2, 2, device=device)], [1], 2)
    with pytest.raises(AssertionError, match="odd latent"):
        patchify.pack([torch.zeros(1, 4, 3, 3, device=device)], [0], 9)
