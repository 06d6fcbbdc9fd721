// The C ABI that uniref_fast/native.py calls: level dispatch, checks that need the indices' values, work planning.
// Strides are in elements. Functions return a Status; nothing throws.
#include <stdint.h>

#include <algorithm>
#include <new>
#include <vector>

#include "kernels.h"

#define UF_API extern "C" __attribute__((visibility("default")))

extern const uf::Kernels uf_kernels_generic;
#ifdef UF_HAVE_AVX2
extern const uf::Kernels uf_kernels_avx2;
extern const uf::Kernels uf_kernels_avx512_on_avx2;
#endif
#ifdef UF_HAVE_AVX512
extern const uf::Kernels uf_kernels_avx512;
#endif

namespace {

// Mirrored in native.py.
enum Status { kOk = 0, kNoMemory = 1, kBadLevel = 2, kBadQueryRange = 3, kBadKeyRange = 4, kBadRow = 5, kBadIndex = 6 };
enum Level { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAvx512OnAvx2 = 3 };
constexpr int kAbiVersion = 1;

const uf::Kernels* kernels(int level) {
  switch (level) {
    case kGeneric:
      return &uf_kernels_generic;
#ifdef UF_HAVE_AVX2
    case kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &uf_kernels_avx2 : nullptr;
    case kAvx512OnAvx2:
      return kernels(kAvx2) ? &uf_kernels_avx512_on_avx2 : nullptr;
#endif
#ifdef UF_HAVE_AVX512
    case kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("fma")
                 ? &uf_kernels_avx512
                 : nullptr;
#endif
    default:
      return nullptr;
  }
}

bool rows_within(const int32_t* rows, int64_t n, int64_t limit) {
  bool ok = true;
  for (int64_t i = 0; i < n; i++) ok &= rows[i] >= 0 && rows[i] < limit;
  return ok;
}

struct Range {
  int64_t begin, end, first, last, keys;
};

// Query ranges sorted by start, gaps between them filled with ranges without keys, so that every row is written.
int collect_ranges(const int32_t* q_ranges, int64_t n_ranges, const int32_t* kv_ptr, const int32_t* kv_ranges,
                   int64_t n_intervals, int64_t nq, int64_t nk, std::vector<Range>& ranges) {
  if (kv_ptr[0] != 0 || kv_ptr[n_ranges] != n_intervals) return kBadKeyRange;
  for (int64_t r = 0; r < n_ranges; r++) {
    const int64_t begin = q_ranges[2 * r], end = q_ranges[2 * r + 1];
    if (begin < 0 || end < begin || end > nq) return kBadQueryRange;
    if (kv_ptr[r] < 0 || kv_ptr[r + 1] < kv_ptr[r] || kv_ptr[r + 1] > n_intervals) return kBadKeyRange;
    int64_t keys = 0, previous = 0;
    for (int64_t i = kv_ptr[r]; i < kv_ptr[r + 1]; i++) {
      const int64_t first = kv_ranges[2 * i], last = kv_ranges[2 * i + 1];
      if (first < previous || last < first || last > nk) return kBadKeyRange;
      keys += last - first;
      previous = last;
    }
    if (begin < end) ranges.push_back({begin, end, kv_ptr[r], kv_ptr[r + 1], keys});
  }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  int64_t covered = 0;
  const size_t given = ranges.size();
  for (size_t i = 0; i <= given; i++) {
    const int64_t begin = i < given ? ranges[i].begin : nq;
    if (begin < covered) return kBadQueryRange;
    if (begin > covered) ranges.push_back({covered, begin, 0, 0, 0});
    if (i < given) covered = ranges[i].end;
  }
  return kOk;
}

// Tiles of whole panels. As large as packing K and V is worth, but small enough that every thread gets several; the
// choice moves no bit of the result (attention.h). Returns the panels of the largest tile.
int64_t cut_tiles(const std::vector<Range>& ranges, const uf::Kernels& kernel, int64_t heads, int threads,
                  std::vector<uf::QueryTile>& tiles) {
  const int64_t panel = kernel.query_panel;
  int64_t panels = 0, largest = 1;
  for (const Range& r : ranges) panels += (r.end - r.begin + panel - 1) / panel;
  const int64_t fair = panels * heads / (4 * static_cast<int64_t>(threads));
  const int64_t limit = std::max<int64_t>(1, std::min<int64_t>(kernel.max_query_tile / panel, fair));
  for (const Range& r : ranges) {
    const int64_t count = (r.end - r.begin + panel - 1) / panel, pieces = (count + limit - 1) / limit;
    const int64_t step = (count + pieces - 1) / pieces * panel;
    largest = std::max(largest, step / panel);
    for (int64_t begin = r.begin; begin < r.end; begin += step) {
      const int64_t end = std::min(begin + step, r.end);
      tiles.push_back({begin, end, r.first, r.last, (end - begin) * r.keys});
    }
  }
  std::stable_sort(tiles.begin(), tiles.end(),
                   [](const uf::QueryTile& a, const uf::QueryTile& b) { return a.work > b.work; });
  return largest;
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
    std::vector<Range> ranges;
    const int status = collect_ranges(q_ranges, n_ranges, kv_ptr, kv_ranges, n_intervals, nq, nk, ranges);
    if (status != kOk) return status;
    std::vector<uf::QueryTile> tiles;
    const int64_t panels = cut_tiles(ranges, *kernel, heads, threads, tiles);
    const uf::Attention args = {static_cast<uf::DType>(dtype), {q, q_token, q_head}, {k, k_token, k_head},
                                {v, v_token, v_head}, out, lse, nq, heads, dim, scale, kv_ranges,
                                tiles.data(), static_cast<int64_t>(tiles.size()), panels, threads};
    return kernel->attention(args) ? kNoMemory : kOk;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

// views: data pointers of txt_q, img_q, txt_k, img_k, txt_v, img_v; strides: token and head stride of each.
// weights: txt_wq, img_wq, txt_wk, img_wk (fp32 or null); index: txt_index, img_index; tokens: their lengths.
UF_API int uf_qk_norm_rope(int level, int threads, int dtype, const void* const* views, const int64_t* strides,
                           const float* const* weights, const int32_t* const* index, const int64_t* tokens,
                           const float* cos, const float* sin, int64_t heads, int64_t dim, float eps, void* out_q,
                           void* out_k, void* out_v) {
  const uf::Kernels* kernel = kernels(level);
  if (!kernel) return kBadLevel;
  try {
    // A permutation, checked: a row written twice would leave another one unwritten.
    std::vector<char> seen(tokens[0] + tokens[1], 0);
    for (int s = 0; s < 2; s++)
      for (int64_t i = 0; i < tokens[s]; i++) {
        const int64_t row = index[s][i];
        if (row < 0 || row >= static_cast<int64_t>(seen.size()) || seen[row]) return kBadIndex;
        seen[row] = 1;
      }
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
  args.heads = heads, args.dim = dim, args.eps = eps, args.threads = threads;
  return kernel->qk_norm_rope(args) ? kNoMemory : kOk;
}

// Null gate: norm_modulate. Null normed: gate_residual. n_rows: rows of gate, shift and scale.
UF_API int uf_token_rows(int level, int threads, int dtype, const void* x, int64_t x_stride, const void* y,
                         int64_t y_stride, const void* gate, int64_t gate_stride, const void* shift,
                         int64_t shift_stride, const void* scale, int64_t scale_stride, const int32_t* rows,
                         int64_t n_rows, int64_t tokens, int64_t channels, float eps, void* x_out, void* normed) {
  const uf::Kernels* kernel = kernels(level);
  if (!kernel) return kBadLevel;
  if (rows ? !rows_within(rows, tokens, n_rows) : n_rows < 1) return kBadRow;
  kernel->token_rows({static_cast<uf::DType>(dtype), x, y, gate, shift, scale, x_out, normed, x_stride, y_stride,
                      gate_stride, shift_stride, scale_stride, rows, tokens, channels, eps, threads});
  return kOk;
}
