// Flash-style attention over key intervals, fp32 arithmetic, transposed so that no operand needs a transpose per tile:
//
//   S^T [key, query] = K [key, d] . Q^T [d, query]        K is read as scalars, Q^T was packed once per query tile
//   P^T = exp2(c (S^T - max)), max and sum over keys     down the rows: every lane is one query, nothing horizontal
//   O^T [d, query] = O^T * alpha + V^T [d, key] . P^T      V is read as scalars
//
// A lane never meets another lane, and key tiles start at interval starts: a query's bits depend on its own q and on
// its own keys only, and not on the other samples of the pack, tile or thread.
//
// Of a causal interval, a panel of queries reads the keys up to its last query. A key behind a query has the score -inf
// and the probability 0 exactly, which changes no sum: the bits do not depend on how the range was cut into tiles.
//
// attention_pairs.h does the same with Q, K, P and V in bfloat16.
#pragma once

#include "memory.h"

namespace UF_NAMESPACE {

// Register block: MR scalars x NR vectors. 12 accumulators + 3 + 1 of 16 registers; 24 + 3 + 1 of 32.
constexpr int MR = W >= 16 ? 8 : 4;
constexpr int NR = 3;
constexpr int PANEL = NR * W;     // queries in a panel
constexpr int KEYS = 64;          // keys in a tile: summed first, then added to the sums of earlier tiles
constexpr int MAX_QUERIES = 384;  // queries that share one packed tile of K and V; all of it fits an L2 of 512 KiB
// Products of a score that are summed at a time: shorter sums round less, which is visible in float32 storage.
template <class T>
constexpr int64_t DOT = sizeof(T) == 4 ? 32 : 1 << 30;
constexpr float LOG2E = 1.4426950408889634f;

UF_INLINE float minus_infinity() { return -__builtin_inff(); }

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

// q[panel][d][lane]; lanes past the tile's end are zero. The scale is left to exponentiate, because scaling q would
// round every product of the dot product twice.
template <class T>
void pack_queries(const uf::Attention& a, const uf::QueryTile& tile, int64_t head, const Buffers& b) {
  const int64_t n = tile.end - tile.begin, padded = round_up(n, PANEL);
  for (int64_t i = 0; i < padded; i++) {
    float* to = b.queries + i / PANEL * PANEL * a.dim + i % PANEL;
    if (i < n) {
      widen_row(b.rows, row_of<T>(a.q, tile.begin + i, head), a.dim, 1.0f);
      for (int64_t d = 0; d < a.dim; d++) to[d * PANEL] = b.rows[d];
    } else {
      for (int64_t d = 0; d < a.dim; d++) to[d * PANEL] = 0.0f;
    }
  }
}

// keys[key][d] and values[d / MR][key][d % MR], the order multiply_values reads; zero up to a multiple of MR keys.
// Four keys at a time fill a cache line of values; the pieces of one key lie 2 KiB apart, in the same cache set.
template <class T>
void pack_keys_values(const uf::Attention& a, int64_t begin, int64_t n, int64_t head, const Buffers& b) {
  const int64_t dim = a.dim, padded = round_up(n, MR);
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

// The three inner loops are not inlined: together they compete for registers, and accumulators spill.

// scores[key][lane] of n keys for one panel of V vectors, summed `dot` products at a time; written up to a multiple of
// MR keys.
template <int V>
UF_NOINLINE void multiply_keys(const float* queries, const float* keys, int64_t key_stride, float* scores,
                               int64_t score_stride, int64_t n, int64_t dim, int64_t dot) {
  for (int64_t key = 0; key < n; key += MR) {
    for (int64_t begin = 0; begin < dim; begin += dot) {
      const int64_t end = min_of(begin + dot, dim);
      const float* k = keys + key * key_stride;
      vf acc[MR][V] = {};
      for (int64_t block = begin; block < end; block += 4)
#pragma GCC unroll 4
        for (int64_t d = block; d < block + 4; d++) {
          vf q[V];
          for (int j = 0; j < V; j++) q[j] = load(queries + d * PANEL + j * W);
#pragma GCC unroll 8
          for (int i = 0; i < MR; i++)
            for (int j = 0; j < V; j++) acc[i][j] += k[i * key_stride + d] * q[j];
        }
      float* s = scores + key * score_stride;
#pragma GCC unroll 8
      for (int i = 0; i < MR; i++)
        for (int j = 0; j < V; j++) {
          float* to = s + i * score_stride + j * W;
          store(to, begin ? load(to) + acc[i][j] : acc[i][j]);
        }
    }
  }
}

// Scores of keys that a query does not see become -inf: lane l sees the keys up to `last` + l.
UF_NOINLINE void hide_keys(float* scores, int64_t n, int64_t last) {
  for (int64_t key = last < 0 ? 0 : last + 1; key < n; key++)
    for (int64_t lane = 0; lane < min_of(key - last, PANEL); lane++) scores[key * PANEL + lane] = minus_infinity();
}

// The probability of a key whose score is -inf is 0, where exp2_scaled gives 2^-100.
UF_INLINE vf without_hidden(vf probability, vf score) {
  return score == splat(minus_infinity()) ? vf{} : probability;
}

// Updates the maximum of a row with n more keys; alpha is the factor for the sums taken under the old maximum.
template <int V>
UF_INLINE void raise_maximum(const float* scores, int64_t n, float factor, float limit, float* row_max, vf* m,
                             vf* alpha) {
  for (int j = 0; j < V; j++) m[j] = load(row_max + j * W);
  for (int64_t key = 0; key < n; key++)
    for (int j = 0; j < V; j++) m[j] = max_of(load(scores + key * PANEL + j * W), m[j]);
  for (int j = 0; j < V; j++) {
    alpha[j] = exp2_scaled(load(row_max + j * W) - m[j], factor, limit);
    store(row_max + j * W, m[j]);
  }
}

// scores -> probabilities 2^(factor * (score - max)), max over the row so far. Subtracting first keeps large scores
// exact. Zero up to a multiple of MR keys, and for keys that hide_keys has hidden.
template <int V, bool HIDDEN>
UF_NOINLINE void exponentiate(float* scores, int64_t n, float factor, float* row_max, float* row_sum, vf* alpha) {
  const float limit = -100.0f / factor;
  vf m[V], sum[V] = {};
  raise_maximum<V>(scores, n, factor, limit, row_max, m, alpha);
  for (int64_t key = 0; key < n; key++)
    for (int j = 0; j < V; j++) {
      float* s = scores + key * PANEL + j * W;
      vf p = exp2_scaled(load(s) - m[j], factor, limit);
      if (HIDDEN) p = without_hidden(p, load(s));
      sum[j] += p;
      store(s, p);
    }
  for (int64_t key = n; key % MR; key++)
    for (int j = 0; j < V; j++) store(scores + key * PANEL + j * W, vf{});
  for (int j = 0; j < V; j++) store(row_sum + j * W, load(row_sum + j * W) * alpha[j] + sum[j]);
}

// out = out * alpha + values^T . probabilities. A tile is summed apart from earlier tiles, for accuracy.
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

// The operands as float32.
template <class T>
struct Wide {
  static void pack_q(const uf::Attention& a, const uf::QueryTile& tile, int64_t head, const Buffers& b) {
    pack_queries<T>(a, tile, head, b);
  }
  static void pack_kv(const uf::Attention& a, int64_t begin, int64_t n, int64_t head, const Buffers& b) {
    pack_keys_values<T>(a, begin, n, head, b);
  }
  // Adds n keys to the sums of a panel, whose lane l sees the keys up to `last` + l.
  template <int V>
  static void attend(const Buffers& b, int64_t panel, int64_t n, int64_t last, int64_t dim, float factor) {
    vf alpha[V];
    float *row_max = b.row_max + panel * PANEL, *row_sum = b.row_sum + panel * PANEL;
    multiply_keys<V>(b.queries + panel * PANEL * dim, b.keys, dim, b.scores, PANEL, n, dim, DOT<T>);
    if (last + 1 < n) {
      hide_keys(b.scores, n, last);
      exponentiate<V, true>(b.scores, n, factor, row_max, row_sum, alpha);
    } else {
      exponentiate<V, false>(b.scores, n, factor, row_max, row_sum, alpha);
    }
    multiply_values<V>(b.values, b.scores, b.out + panel * PANEL * dim, n, dim, alpha);
  }
};

template <class T>
void write_tile(const uf::Attention& a, const uf::QueryTile& tile, int64_t head, const Buffers& b) {
  for (int64_t i = 0; i < tile.end - tile.begin; i++) {
    const int64_t query = tile.begin + i;
    const float sum = b.row_sum[i];
    const bool empty = b.row_max[i] == minus_infinity() && sum == 0.0f;
    T* to = static_cast<T*>(a.out) + (query * a.heads + head) * a.dim;
    write_column(to, b.out + i / PANEL * PANEL * a.dim + i % PANEL, PANEL, a.dim, empty ? 0.0f : 1.0f / sum, b.rows);
    // In double: the gradients of the whole row inherit its error, so it is rounded once.
    const double lse = static_cast<double>(b.row_max[i]) * a.scale + __builtin_log(sum);
    a.lse[head * a.nq + query] = empty ? minus_infinity() : static_cast<float>(lse);
  }
}

template <class T, class Operands>
void attend_tile(const uf::Attention& a, const uf::QueryTile& tile, int64_t head, const Buffers& b) {
  const int64_t n = tile.end - tile.begin, panels = (n + PANEL - 1) / PANEL;
  for (int64_t i = 0; i < panels * PANEL; i++) b.row_max[i] = minus_infinity(), b.row_sum[i] = 0.0f;
  for (int64_t i = 0; i < panels * PANEL * a.dim; i++) b.out[i] = 0.0f;
  // Not 0: 0 * -inf, where -inf is the maximum before the first key, is NaN.
  const float factor = a.scale * LOG2E > 0.0f ? a.scale * LOG2E : 1e-30f;
  if (tile.first < tile.last) Operands::pack_q(a, tile, head, b);
  for (int64_t i = tile.first; i < tile.last; i++) {
    const uf::Interval interval = uf::interval_at(a.kv_ranges, i);
    const int64_t end = interval.causal ? interval.begin + tile.offset + n : interval.end;
    for (int64_t key = interval.begin; key < end; key += KEYS) {
      const int64_t keys = min_of(end - key, KEYS);
      Operands::pack_kv(a, key, keys, head, b);
      const int64_t next = key + keys, next_end = min_of(next + KEYS, end);
      for (int64_t panel = 0; panel < panels; panel++) {
        prefetch_rows<T>(a.k, next, next_end, panel, panels, head, a.dim);
        prefetch_rows<T>(a.v, next, next_end, panel, panels, head, a.dim);
        const int64_t left = n - panel * PANEL;
        // The last key of this tile that the panel's first query sees; it may lie before or behind the tile.
        const int64_t last = interval.causal ? interval.begin + tile.offset + panel * PANEL - key : KEYS;
        const int64_t seen = min_of(keys, last + min_of(left, PANEL));
        if (seen <= 0) continue;
        if (left > 2 * W) Operands::template attend<3>(b, panel, seen, last, a.dim, factor);
        else if (left > W) Operands::template attend<2>(b, panel, seen, last, a.dim, factor);
        else Operands::template attend<1>(b, panel, seen, last, a.dim, factor);
      }
    }
  }
  write_tile<T>(a, tile, head, b);
}

template <class T, class Operands>
int attention(const uf::Attention& a) {
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
      attend_tile<T, Operands>(a, a.tiles[i / a.heads], i % a.heads, buffers);
    }
  }
  return failed;
}

}  // namespace UF_NAMESPACE
