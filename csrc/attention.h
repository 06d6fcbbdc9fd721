// Flash-style attention over key intervals, fp32 arithmetic, transposed so that no operand needs a transpose per tile:
//
//   S^T [key, query] = K [key, d] . Q^T [d, query]        K is read as scalars, Q^T was packed once per query tile
//   P^T = exp2(c (S^T - max)), max and sum over keys     down the rows: every lane is one query, nothing horizontal
//   O^T [d, query] = O^T * alpha + V^T [d, key] . P^T      V is read as scalars
//
// A lane never meets another lane, and key tiles start at interval starts: a query's bits depend on its own q and on
// its own keys only, whatever shares the pack, the tile or the thread.
#pragma once

#include <stdlib.h>

#include "kernels.h"
#include "simd.h"

namespace UF_NAMESPACE {

// Register block: MR scalars x NR vectors. 12 accumulators + 3 + 1 of 16 registers; 24 + 3 + 1 of 32.
constexpr int MR = W >= 16 ? 8 : 4;
constexpr int NR = 3;
constexpr int PANEL = NR * W;     // queries in a panel
constexpr int KEYS = 64;          // keys in a tile: summed in one go, then added to what came before
constexpr int MAX_QUERIES = 192;  // queries that share one packed tile of K and V; panels and tiles stay in L2
constexpr int64_t DOT = 32;       // products of a score summed in one go; shorter sums round less
constexpr float LOG2E = 1.4426950408889634f;

// The three inner loops: inlined together they compete for registers, and accumulators spill.
#define UF_NOINLINE __attribute__((noinline))

UF_INLINE float minus_infinity() { return -__builtin_inff(); }

// A buffer per thread that lives as long as the thread: fresh megabytes per call would cost a page fault per 4 KiB.
struct Scratch {
  float* data = nullptr;
  int64_t size = 0;
  ~Scratch() { free(data); }
  float* at_least(int64_t floats) {
    if (floats > size) {
      free(data);
      data = static_cast<float*>(aligned_alloc(64, (floats * 4 + 63) / 64 * 64));
      size = data ? floats : 0;
    }
    return data;
  }
};
static thread_local Scratch scratch;

struct Buffers {
  float *queries, *out, *keys, *values, *scores, *row_max, *row_sum, *rows;

  static int64_t floats(int64_t dim, int64_t panels) {
    return panels * PANEL * (2 * dim + 2) + KEYS * 2 * dim + KEYS * PANEL + 4 * dim;
  }
  Buffers(float* p, int64_t dim, int64_t panels) {
    queries = p, p += panels * PANEL * dim;
    out = p, p += panels * PANEL * dim;
    keys = p, p += KEYS * dim;
    values = p, p += KEYS * dim;
    scores = p, p += KEYS * PANEL;
    row_max = p, p += panels * PANEL;
    row_sum = p, p += panels * PANEL;
    rows = p;
  }
};

template <class T>
UF_INLINE const T* row_of(const uf::View& view, int64_t token, int64_t head) {
  return static_cast<const T*>(view.data) + token * view.token_stride + head * view.head_stride;
}

// dim is a multiple of 8, W may be 16.
template <class T>
UF_INLINE void widen_row(float* to, const T* from, int64_t dim, float factor) {
  int64_t d = 0;
  for (; d + W <= dim; d += W) store(to + d, load(from + d) * factor);
  if (d < dim) store_tail(to + d, load_tail(from + d, dim - d) * factor, dim - d);
}

// q[panel][d][lane]; lanes past the tile's end are zero. Takes the sign of the scale, so that the largest score stays
// the largest; its size is left to exponentiate, because scaling q would round every product of the dot twice.
template <class T>
void pack_queries(const uf::Attention& a, const uf::QueryTile& tile, int64_t head, const Buffers& b) {
  const int64_t n = tile.end - tile.begin, padded = (n + PANEL - 1) / PANEL * PANEL;
  for (int64_t i = 0; i < padded; i++) {
    float* to = b.queries + i / PANEL * PANEL * a.dim + i % PANEL;
    if (i < n) {
      widen_row(b.rows, row_of<T>(a.q, tile.begin + i, head), a.dim, a.scale < 0.0f ? -1.0f : 1.0f);
      for (int64_t d = 0; d < a.dim; d++) to[d * PANEL] = b.rows[d];
    } else {
      for (int64_t d = 0; d < a.dim; d++) to[d * PANEL] = 0.0f;
    }
  }
}

// keys[key][d] and values[d / MR][key][d % MR], the order multiply_values reads; zero up to a multiple of MR keys.
// Four keys at a time, because they fill a cache line of values: one key's pieces lie 2 KiB apart, in one cache set.
template <class T>
void pack_keys_values(const uf::Attention& a, int64_t begin, int64_t n, int64_t head, const Buffers& b) {
  const int64_t dim = a.dim, padded = (n + MR - 1) / MR * MR;
  for (int64_t i = 0; i < padded; i += 4) {
    for (int64_t r = 0; r < 4; r++) {
      float *key = b.keys + (i + r) * dim, *value = b.rows + r * dim;
      if (i + r < n) {
        widen_row(key, row_of<T>(a.k, begin + i + r, head), dim, 1.0f);
        widen_row(value, row_of<T>(a.v, begin + i + r, head), dim, 1.0f);
      } else {
        for (int64_t d = 0; d < dim; d++) key[d] = value[d] = 0.0f;
      }
    }
    for (int64_t d = 0; d < dim; d += MR)
      for (int64_t r = 0; r < 4; r++)
        __builtin_memcpy(b.values + d * KEYS + (i + r) * MR, b.rows + r * dim + d, MR * sizeof(float));
  }
}

// scores[key][lane] of n keys for one panel of V vectors; written up to a multiple of MR keys.
template <int V>
UF_NOINLINE void multiply_keys(const float* queries, const float* keys, float* scores, int64_t n, int64_t dim) {
  for (int64_t key = 0; key < n; key += MR) {
    for (int64_t begin = 0; begin < dim; begin += DOT) {
      const int64_t end = begin + DOT < dim ? begin + DOT : dim;
      const float* k = keys + key * dim;
      vf acc[MR][V] = {};
      for (int64_t block = begin; block < end; block += 4)
#pragma GCC unroll 4
        for (int64_t d = block; d < block + 4; d++) {
          vf q[V];
          for (int j = 0; j < V; j++) q[j] = load(queries + d * PANEL + j * W);
#pragma GCC unroll 8
          for (int i = 0; i < MR; i++)
            for (int j = 0; j < V; j++) acc[i][j] += k[i * dim + d] * q[j];
        }
      float* s = scores + key * PANEL;
#pragma GCC unroll 8
      for (int i = 0; i < MR; i++)
        for (int j = 0; j < V; j++) {
          float* to = s + i * PANEL + j * W;
          store(to, begin ? load(to) + acc[i][j] : acc[i][j]);
        }
    }
  }
}

// scores -> probabilities 2^(factor * (score - max)), max over the row so far; returns alpha, the factor for what was
// summed before. Subtracting first keeps large scores exact.
template <int V>
UF_NOINLINE void exponentiate(float* scores, int64_t n, float factor, float* row_max, float* row_sum, vf* alpha) {
  const float limit = -100.0f / factor;
  vf m[V], sum[V] = {};
  for (int j = 0; j < V; j++) m[j] = load(row_max + j * W);
  for (int64_t key = 0; key < n; key++)
    for (int j = 0; j < V; j++) m[j] = max_of(load(scores + key * PANEL + j * W), m[j]);
  for (int j = 0; j < V; j++) {
    alpha[j] = exp2_scaled(load(row_max + j * W) - m[j], factor, limit);
    store(row_max + j * W, m[j]);
  }
  for (int64_t key = 0; key < n; key++)
    for (int j = 0; j < V; j++) {
      float* s = scores + key * PANEL + j * W;
      const vf p = exp2_scaled(load(s) - m[j], factor, limit);
      sum[j] += p;
      store(s, p);
    }
  for (int64_t key = n; key % MR; key++)
    for (int j = 0; j < V; j++) store(scores + key * PANEL + j * W, vf{});
  for (int j = 0; j < V; j++) store(row_sum + j * W, load(row_sum + j * W) * alpha[j] + sum[j]);
}

// out = out * alpha + values^T . probabilities. A tile is summed apart from what came before, for accuracy.
template <int V>
UF_NOINLINE void multiply_values(const float* values, const float* probabilities, float* out, int64_t n, int64_t dim,
                                 const vf* alpha) {
  for (int64_t d = 0; d < dim; d += MR) {
    const float* v = values + d * KEYS;
    vf acc[MR][V] = {};
    for (int64_t block = 0; block < n; block += 4)
#pragma GCC unroll 4
      for (int64_t key = block; key < block + 4; key++) {
        vf p[V];
        for (int j = 0; j < V; j++) p[j] = load(probabilities + key * PANEL + j * W);
#pragma GCC unroll 8
        for (int i = 0; i < MR; i++)
          for (int j = 0; j < V; j++) acc[i][j] += v[key * MR + i] * p[j];
      }
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
      for (int j = 0; j < V; j++) {
        float* o = out + (d + i) * PANEL + j * W;
        store(o, load(o) * alpha[j] + acc[i][j]);
      }
  }
}

template <int V>
void attend_panel(const Buffers& b, int64_t panel, int64_t n, int64_t dim, float factor) {
  vf alpha[V];
  multiply_keys<V>(b.queries + panel * PANEL * dim, b.keys, b.scores, n, dim);
  exponentiate<V>(b.scores, n, factor, b.row_max + panel * PANEL, b.row_sum + panel * PANEL, alpha);
  multiply_values<V>(b.values, b.scores, b.out + panel * PANEL * dim, n, dim, alpha);
}

template <class T>
void write_tile(const uf::Attention& a, const uf::QueryTile& tile, int64_t head, const Buffers& b) {
  for (int64_t i = 0; i < tile.end - tile.begin; i++) {
    const int64_t query = tile.begin + i;
    const float* from = b.out + i / PANEL * PANEL * a.dim + i % PANEL;
    const float sum = b.row_sum[i];
    const bool empty = b.row_max[i] == minus_infinity() && sum == 0.0f;
    const float inverse = empty ? 0.0f : 1.0f / sum;
    for (int64_t d = 0; d < a.dim; d++) b.rows[d] = from[d * PANEL] * inverse;
    T* to = static_cast<T*>(a.out) + (query * a.heads + head) * a.dim;
    int64_t d = 0;
    for (; d + W <= a.dim; d += W) store(to + d, load(b.rows + d));
    if (d < a.dim) store_tail(to + d, load_tail(b.rows + d, a.dim - d), a.dim - d);
    const float lse = b.row_max[i] * __builtin_fabsf(a.scale) + __builtin_logf(sum);
    a.lse[head * a.nq + query] = empty ? minus_infinity() : lse;
  }
}

template <class T>
void attend_tile(const uf::Attention& a, const uf::QueryTile& tile, int64_t head, const Buffers& b) {
  const int64_t n = tile.end - tile.begin, panels = (n + PANEL - 1) / PANEL;
  for (int64_t i = 0; i < panels * PANEL; i++) b.row_max[i] = minus_infinity(), b.row_sum[i] = 0.0f;
  for (int64_t i = 0; i < panels * PANEL * a.dim; i++) b.out[i] = 0.0f;
  const float size = __builtin_fabsf(a.scale) * LOG2E;
  const float factor = size > 0.0f ? size : 1e-30f;  // not 0: 0 * -inf, the maximum before the first key, is NaN
  if (tile.first < tile.last) pack_queries<T>(a, tile, head, b);
  for (int64_t interval = tile.first; interval < tile.last; interval++) {
    const int64_t end = a.kv_ranges[2 * interval + 1];
    for (int64_t key = a.kv_ranges[2 * interval]; key < end; key += KEYS) {
      const int64_t keys = end - key < KEYS ? end - key : KEYS;
      pack_keys_values<T>(a, key, keys, head, b);
      for (int64_t panel = 0; panel < panels; panel++) {
        const int64_t left = n - panel * PANEL;
        if (left > 2 * W) attend_panel<3>(b, panel, keys, a.dim, factor);
        else if (left > W) attend_panel<2>(b, panel, keys, a.dim, factor);
        else attend_panel<1>(b, panel, keys, a.dim, factor);
      }
    }
  }
  write_tile<T>(a, tile, head, b);
}

static int attention(const uf::Attention& a) {
  int failed = 0;
#pragma omp parallel num_threads(a.threads)
  {
    float* memory = scratch.at_least(Buffers::floats(a.dim, a.max_panels));
    if (!memory) {
#pragma omp atomic write
      failed = 1;
    }
    // Heads inside tiles: equal work lies side by side, so "longest first" holds over the whole loop.
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < a.n_tiles * a.heads; i++) {
      if (!memory) continue;
      const Buffers buffers(memory, a.dim, a.max_panels);
      const uf::QueryTile& tile = a.tiles[i / a.heads];
      if (a.dtype == uf::kFloat32) attend_tile<float>(a, tile, i % a.heads, buffers);
      else attend_tile<bf16>(a, tile, i % a.heads, buffers);
    }
  }
  return failed;
}

}  // namespace UF_NAMESPACE
