// The C ABI that uniref_fast/native calls: level dispatch, checks that need the values of tables, work buffers.
// Strides are in elements. Functions return a Status; nothing throws.
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <memory>
#include <new>
#include <vector>

#include "kernels.h"
#include "tasks.h"

#define UF_API extern "C" __attribute__((visibility("default")))

extern const uf::Kernels uf_kernels_generic;
#ifdef UF_HAVE_AVX2
extern const uf::Kernels uf_kernels_avx2;
extern const uf::Kernels uf_kernels_avx512_on_avx2;
#endif
#ifdef UF_HAVE_AVX512
extern const uf::Kernels uf_kernels_avx512;
#endif
// Levels with attention on bfloat16 pairs; their other kernels are those of the level below.
extern int uf_attention_avx512bf16(const uf::Attention&);
extern int uf_attention_avx512bf16_on_avx2(const uf::Attention&);

namespace {

using uf::kBadIndex;
using uf::kBadLevel;
using uf::kBadRow;
using uf::kNoMemory;
using uf::kOk;

enum Level { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAvx512OnAvx2 = 3, kAvx512Bf16 = 4, kAvx512Bf16OnAvx2 = 5 };
constexpr int kAbiVersion = 2;

#ifdef UF_HAVE_AVX512BF16
// Leaf 7, subleaf 1: not every compiler that has the instructions knows their name in __builtin_cpu_supports. That the
// operating system keeps the registers is part of the answer for avx512f. Asked once: in a virtual machine the
// instruction traps to the host, which takes longer than a small kernel.
bool cpu_has_avx512bf16() {
  static const bool found = [] {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1);
  }();
  return found;
}
#endif

uf::Kernels with_pairs(uf::Kernels kernels, int (*attention)(const uf::Attention&)) {
  kernels.attention[uf::kBFloat16] = attention;
  return kernels;
}

const uf::Kernels* kernels(int level) {
  switch (level) {
    case kGeneric:
      return &uf_kernels_generic;
#ifdef UF_HAVE_AVX2
    case kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &uf_kernels_avx2 : nullptr;
    case kAvx512OnAvx2:
      return kernels(kAvx2) ? &uf_kernels_avx512_on_avx2 : nullptr;
    case kAvx512Bf16OnAvx2: {
      static const uf::Kernels pairs = with_pairs(uf_kernels_avx512_on_avx2, uf_attention_avx512bf16_on_avx2);
      return kernels(kAvx2) ? &pairs : nullptr;
    }
#endif
#ifdef UF_HAVE_AVX512
    case kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("fma")
                 ? &uf_kernels_avx512
                 : nullptr;
#endif
#ifdef UF_HAVE_AVX512BF16
    case kAvx512Bf16: {
      static const uf::Kernels pairs = with_pairs(uf_kernels_avx512, uf_attention_avx512bf16);
      return kernels(kAvx512) && cpu_has_avx512bf16() ? &pairs : nullptr;
    }
#endif
    default:
      return nullptr;
  }
}

// Asks for pages of 2 MiB: the first write to new memory costs a fault per page, which can take longer than the work.
// Nothing changes if the system declines.
template <class... Pointers>
void expect_writes(int64_t bytes, Pointers... outs) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHuge = 2 << 20;
  for (void* out : {static_cast<void*>(outs)...}) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(out);
    const uintptr_t begin = (at + kHuge - 1) / kHuge * kHuge, end = (at + bytes) / kHuge * kHuge;
    if (out && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#else
  (void)bytes;
  ((void)outs, ...);
#endif
}

int64_t size_of(int dtype) { return dtype == uf::kFloat32 ? 4 : 2; }

// Memory without zeros, for values that are written once. Throws std::bad_alloc.
std::unique_ptr<float[]> floats(int64_t count) { return std::unique_ptr<float[]>(new float[count]); }

// Rows of a contiguous [rows, size] result that no kernel writes.
void clear_rows(void* out, int64_t begin, int64_t end, int64_t bytes) {
  memset(static_cast<char*>(out) + begin * bytes, 0, (end - begin) * bytes);
}

}  // namespace

UF_API int uf_abi_version() { return kAbiVersion; }
UF_API int uf_level_supported(int level) { return kernels(level) != nullptr; }

UF_API int uf_segment_attention(int level, int threads, int dtype, const void* q, int64_t q_token, int64_t q_head,
                                const void* k, int64_t k_token, int64_t k_head, const void* v, int64_t v_token,
                                int64_t v_head, int64_t nq, int64_t nk, int64_t heads, int64_t dim,
                                const int32_t* q_ranges, int64_t n_ranges, const int32_t* kv_ptr,
                                const int32_t* kv_ranges, int64_t n_intervals, float scale, void* out, float* lse) {
  const uf::Kernels* kernel = kernels(level);
  if (!kernel) return kBadLevel;
  try {
    std::vector<uf::Range> ranges;
    const int status = uf::collect_ranges({q_ranges, kv_ptr, kv_ranges, n_ranges, n_intervals}, nq, nk, ranges);
    if (status != kOk) return status;
    uf::fill_gaps(ranges, nq);
    std::vector<uf::QueryTile> tiles;
    const int64_t panels = uf::cut_tiles(ranges, *kernel, heads, threads, tiles);
    const uf::Attention args = {{q, q_token, q_head}, {k, k_token, k_head},
                                {v, v_token, v_head}, out, lse, nq, heads, dim, scale, kv_ranges,
                                tiles.data(), static_cast<int64_t>(tiles.size()), panels, threads};
    expect_writes(nq * heads * dim * size_of(dtype), out);
    return kernel->attention[dtype](args) ? kNoMemory : kOk;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

// views: data pointers of grad_out, q, k, v, out; strides: token and head stride of each.
UF_API int uf_segment_attention_backward(int level, int threads, int dtype, const void* const* views,
                                         const int64_t* strides, const float* lse, int64_t nq, int64_t nk,
                                         int64_t heads, int64_t dim, const int32_t* q_ranges, int64_t n_ranges,
                                         const int32_t* kv_ptr, const int32_t* kv_ranges, int64_t n_intervals,
                                         const int32_t* k_ranges, int64_t n_key_ranges, const int32_t* q_ptr,
                                         const int32_t* q_spans, int64_t n_spans, float scale, void* dq, void* dk,
                                         void* dv) {
  const uf::Kernels* kernel = kernels(level);
  if (!kernel) return kBadLevel;
  try {
    std::vector<uf::Range> ranges;
    int status = uf::collect_ranges({q_ranges, kv_ptr, kv_ranges, n_ranges, n_intervals}, nq, nk, ranges);
    if (status != kOk) return status;
    uf::BackwardTasks tasks;
    status = uf::cut_backward(ranges, kv_ranges, {k_ranges, q_ptr, q_spans, n_key_ranges, n_spans}, nk, tasks);
    if (status != kOk) return status;

    const auto delta = floats(heads * nq);
    const auto dq_sum = floats(tasks.shared ? heads * nq * ((dim + 15) / 16 * 16) : 0);
    std::vector<int32_t> done(heads * tasks.n_tiles, 0);
    const int64_t bytes = heads * dim * size_of(dtype);
    expect_writes(nq * bytes, dq);
    expect_writes(nk * bytes, dk, dv);
    if (tasks.shared) expect_writes(heads * nq * dim * 4, dq_sum.get());
    int64_t covered = 0;
    for (const uf::Range& range : ranges) {
      clear_rows(dq, covered, range.begin, bytes);
      if (range.keys == 0) clear_rows(dq, range.begin, range.end, bytes);
      covered = range.end;
    }
    clear_rows(dq, covered, nq, bytes);
    covered = 0;
    for (const uf::KeyBlock& block : tasks.blocks) {
      clear_rows(dk, covered, block.begin, bytes);
      clear_rows(dv, covered, block.begin, bytes);
      covered = block.end;
    }
    clear_rows(dk, covered, nk, bytes);
    clear_rows(dv, covered, nk, bytes);

    uf::AttentionBackward args = {};
    args.dtype = static_cast<uf::DType>(dtype);
    uf::View* const targets[] = {&args.grad_out, &args.q, &args.k, &args.v, &args.out};
    for (int i = 0; i < 5; i++) *targets[i] = {views[i], strides[2 * i], strides[2 * i + 1]};
    args.lse = lse, args.dq = dq, args.dk = dk, args.dv = dv;
    args.nq = nq, args.heads = heads, args.dim = dim, args.scale = scale;
    args.blocks = tasks.blocks.data(), args.n_blocks = tasks.blocks.size();
    args.spans = tasks.spans.data(), args.n_tiles = tasks.n_tiles;
    args.delta = delta.get(), args.dq_sum = dq_sum.get(), args.done = done.data();
    args.threads = threads;
    return kernel->attention_backward(args) ? kNoMemory : kOk;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

// views: data pointers of txt_q, img_q, txt_k, img_k, txt_v, img_v; strides: token and head stride of each.
// weights: txt_wq, img_wq, txt_wk, img_wk (fp32 or null); index: txt_index, img_index; tokens: their lengths.
UF_API int uf_qk_norm_rope(int level, int threads, int dtype, const void* const* views, const int64_t* strides,
                           const float* const* weights, const int32_t* const* index, const int64_t* tokens,
                           const float* cos, const float* sin, int64_t heads, int64_t dim, float eps,
                           int eager_rounding, void* out_q, void* out_k, void* out_v) {
  const uf::Kernels* kernel = kernels(level);
  if (!kernel) return kBadLevel;
  try {
    // Checked, because a row written twice would leave another one unwritten.
    if (!uf::is_permutation(index, tokens)) return kBadIndex;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  uf::QkNormRope args = {};
  args.dtype = static_cast<uf::DType>(dtype);
  for (int s = 0; s < 2; s++) {
    args.q[s] = {views[s], strides[2 * s], strides[2 * s + 1]};
    args.k[s] = {views[2 + s], strides[4 + 2 * s], strides[4 + 2 * s + 1]};
    args.v[s] = {views[4 + s], strides[8 + 2 * s], strides[8 + 2 * s + 1]};
    args.weight_q[s] = weights[s];
    args.weight_k[s] = weights[2 + s];
    args.joint_row[s] = index[s];
    args.tokens[s] = tokens[s];
  }
  args.cos = cos, args.sin = sin;
  args.out_q = out_q, args.out_k = out_k, args.out_v = out_v;
  args.heads = heads, args.dim = dim, args.eps = eps, args.eager_rounding = eager_rounding, args.threads = threads;
  expect_writes((tokens[0] + tokens[1]) * heads * dim * size_of(dtype), out_q, out_k, out_v);
  return kernel->qk_norm_rope(args) ? kNoMemory : kOk;
}

// views: dq, dk, dv, txt_q, img_q, txt_k, img_k; strides: token and head stride of each. outs: gradients of txt_q,
// img_q, txt_k, img_k, txt_v, img_v. out_weights: of txt_wq, img_wq, txt_wk, img_wk, fp32 or null, null without weight.
UF_API int uf_qk_norm_rope_backward(int level, int threads, int dtype, const void* const* views,
                                    const int64_t* strides, const float* const* weights, const int32_t* const* index,
                                    const int64_t* tokens, const float* cos, const float* sin, int64_t heads,
                                    int64_t dim, float eps, void* const* outs, float* const* out_weights) {
  const uf::Kernels* kernel = kernels(level);
  if (!kernel) return kBadLevel;
  try {
    if (!uf::is_permutation(index, tokens)) return kBadIndex;
    uf::QkNormRopeBackward args = {};
    args.dtype = static_cast<uf::DType>(dtype);
    uf::View* const targets[] = {&args.dq, &args.dk, &args.dv, &args.q[0], &args.q[1], &args.k[0], &args.k[1]};
    for (int i = 0; i < 7; i++) *targets[i] = {views[i], strides[2 * i], strides[2 * i + 1]};
    int64_t chunks = 0;
    bool wanted = false;
    for (int s = 0; s < 2; s++) {
      args.weight_q[s] = weights[s], args.weight_k[s] = weights[2 + s];
      args.joint_row[s] = index[s], args.tokens[s] = tokens[s];
      args.out_q[s] = outs[s], args.out_k[s] = outs[2 + s], args.out_v[s] = outs[4 + s];
      args.out_wq[s] = out_weights[s], args.out_wk[s] = out_weights[2 + s];
      wanted |= out_weights[s] || out_weights[2 + s];
      chunks += (tokens[s] + uf::kChunk - 1) / uf::kChunk;
    }
    const auto shares = floats(wanted ? chunks * 2 * dim : 0);
    args.shares = wanted ? shares.get() : nullptr;
    args.cos = cos, args.sin = sin, args.heads = heads, args.dim = dim, args.eps = eps, args.threads = threads;
    for (int i = 0; i < 6; i++) expect_writes(tokens[i % 2] * heads * dim * size_of(dtype), outs[i]);
    return kernel->qk_norm_rope_backward(args) ? kNoMemory : kOk;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

// Null gate: norm_modulate. Null normed: gate_residual. n_rows: rows of gate, shift and scale.
UF_API int uf_token_rows_of(int level, int threads, int dtype, const void* x, int64_t x_stride, const void* y,
                            int64_t y_stride, const void* gate, int64_t gate_stride, const void* shift,
                            int64_t shift_stride, const void* scale, int64_t scale_stride, const int32_t* mod_index,
                            int64_t n_rows, int64_t tokens, int64_t channels, float eps, int rms, int eager_rounding,
                            void* x_out, void* normed, float branch_eps, float one) {
  const uf::Kernels* kernel = kernels(level);
  if (!kernel) return kBadLevel;
  if (n_rows < 1) return kBadRow;
  for (int64_t i = 0; mod_index && i < tokens; i++)
    if (mod_index[i] < 0 || mod_index[i] >= n_rows) return kBadRow;
  const uf::TokenOp args = {static_cast<uf::DType>(dtype), x, y, gate, shift, scale, x_out, normed, x_stride, y_stride,
                            gate_stride, shift_stride, scale_stride, mod_index, tokens, channels, eps, branch_eps, one,
                            rms != 0, eager_rounding != 0, threads};
  expect_writes(tokens * channels * size_of(dtype), x_out, normed);
  return kernel->token_op(args) ? kNoMemory : kOk;
}

// The same with 1 + scale and a branch as it is.
UF_API int uf_token_rows(int level, int threads, int dtype, const void* x, int64_t x_stride, const void* y,
                         int64_t y_stride, const void* gate, int64_t gate_stride, const void* shift,
                         int64_t shift_stride, const void* scale, int64_t scale_stride, const int32_t* mod_index,
                         int64_t n_rows, int64_t tokens, int64_t channels, float eps, int rms, int eager_rounding,
                         void* x_out, void* normed) {
  return uf_token_rows_of(level, threads, dtype, x, x_stride, y, y_stride, gate, gate_stride, shift, shift_stride, scale,
                          scale_stride, mod_index, n_rows, tokens, channels, eps, rms, eager_rounding, x_out, normed,
                          -1.0f, 1.0f);
}

// inputs: grad_x, grad_normed, x, y, gate, scale, null where the part is missing; strides: a row's of each.
// outs: dx, dy, dgate, dshift, dscale; the last three null when they are not wanted.
UF_API int uf_token_rows_backward(int level, int threads, int dtype, const void* const* inputs, const int64_t* strides,
                                  const int32_t* mod_index, int64_t n_rows, int64_t tokens, int64_t channels, float eps,
                                  int rms, void* const* outs) {
  const uf::Kernels* kernel = kernels(level);
  if (!kernel) return kBadLevel;
  try {
    uf::TokenChunks cut;
    if (!uf::chunk_tokens(mod_index, tokens, n_rows, cut)) return kBadRow;
    const auto shares = floats(cut.shares * 3 * channels);
    uf::TokenOpBackward args = {};
    args.dtype = static_cast<uf::DType>(dtype);
    args.grad_x = inputs[0], args.grad_normed = inputs[1], args.x = inputs[2];
    args.y = inputs[3], args.gate = inputs[4], args.scale = inputs[5];
    args.dx = outs[0], args.dy = outs[1], args.dgate = outs[2], args.dshift = outs[3], args.dscale = outs[4];
    args.grad_x_stride = strides[0], args.grad_normed_stride = strides[1], args.x_stride = strides[2];
    args.y_stride = strides[3], args.gate_stride = strides[4], args.scale_stride = strides[5];
    args.order = cut.order.data(), args.chunks = cut.chunks.data(), args.sums = cut.sums.data();
    args.n_chunks = cut.chunks.size(), args.n_sums = cut.sums.size();
    args.shares = shares.get(), args.channels = channels, args.eps = eps, args.rms = rms != 0, args.threads = threads;
    expect_writes(tokens * channels * size_of(dtype), outs[0], outs[1]);
    return kernel->token_op_backward(args) ? kNoMemory : kOk;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

// Null grad: gelu(x), else its gradient; `size` contiguous elements each.
UF_API int uf_gelu(int level, int threads, int dtype, const void* x, const void* grad, int64_t size, void* out) {
  const uf::Kernels* kernel = kernels(level);
  if (!kernel) return kBadLevel;
  const uf::Gelu args = {static_cast<uf::DType>(dtype), x, grad, out, size, threads};
  expect_writes(size * size_of(dtype), out);
  return kernel->gelu(args);
}
