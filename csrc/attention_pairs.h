// Attention on bfloat16 operands, for instructions that add the products of two pairs of bfloat16 to a float32 lane:
//
//   S^T [key, query] += (K[key, 2i], K[key, 2i+1]) . (Q[query, 2i], Q[query, 2i+1])     pairs along d
//   O^T [d, query]   += (V[2i, d], V[2i+1, d]) . (P[2i, query], P[2i+1, query])         pairs along keys
//
// A pair fills a 32-bit lane, so the panels of attention.h keep their shapes at half the depth. P is rounded to
// bfloat16 for the second product; its sum is of the unrounded values. Without the instruction the same code adds the
// products one after the other (how it is tested on other processors).
#pragma once

#include "attention.h"

namespace UF_NAMESPACE {

// Buffers are written as halves or floats and read as pairs.
typedef uint32_t __attribute__((may_alias)) word;
typedef uint16_t __attribute__((may_alias)) half;

// The first of a pair is in the low half of the lane.
UF_INLINE vu make_pairs(vf first, vf second) {
#ifdef __AVX512BF16__
  const vu low = (vu)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)_mm512_cvtneps_pbh((__m512)first));
  const vu high = (vu)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)_mm512_cvtneps_pbh((__m512)second));
  return low | high << 16;
#else
  return narrow_bits(first) | narrow_bits(second) << 16;
#endif
}

UF_INLINE vu load_pairs(const word* p) {
  vu x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

// sum + left.first * right.first + left.second * right.second
UF_INLINE vf add_products(vf sum, uint32_t left, vu right) {
#ifdef __AVX512BF16__
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(left)), (__m512bh)right);
#else
  const vu pair = left - vu{};
  sum += (vf)(pair & 0xffff0000u) * (vf)(right & 0xffff0000u);
  return sum + (vf)(pair << 16) * (vf)(right << 16);
#endif
}

template <int V>
UF_NOINLINE void multiply_key_pairs(const word* queries, const word* keys, float* scores, int64_t n,
                                    int64_t pairs) {
  for (int64_t key = 0; key < n; key += MR) {
    const word* k = keys + key * pairs;
    vf acc[MR][V] = {};
    for (int64_t block = 0; block < pairs; block += 4)
#pragma GCC unroll 4
      for (int64_t d = block; d < block + 4; d++) {
        vu q[V];
        for (int j = 0; j < V; j++) q[j] = load_pairs(queries + d * PANEL + j * W);
#pragma GCC unroll 8
        for (int i = 0; i < MR; i++)
          for (int j = 0; j < V; j++) acc[i][j] = add_products(acc[i][j], k[i * pairs + d], q[j]);
      }
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
      for (int j = 0; j < V; j++) store(scores + (key + i) * PANEL + j * W, acc[i][j]);
  }
}

// scores [key][lane] -> pairs of probabilities [key / 2][lane], in place; zero up to a multiple of MR keys, and for keys
// that hide_keys has hidden.
template <int V, bool HIDDEN>
UF_NOINLINE void exponentiate_pairs(float* scores, int64_t n, float factor, float* row_max, float* row_sum,
                                    vf* alpha) {
  const float limit = -100.0f / factor;
  vf m[V], sum[V] = {};
  raise_maximum<V>(scores, n, factor, limit, row_max, m, alpha);
  for (int64_t key = 0; key < round_up(n, MR); key += 2)
    for (int j = 0; j < V; j++) {
      const float* s = scores + key * PANEL + j * W;
      vf first = key < n ? exp2_scaled(load(s) - m[j], factor, limit) : vf{};
      vf second = key + 1 < n ? exp2_scaled(load(s + PANEL) - m[j], factor, limit) : vf{};
      if (HIDDEN) first = without_hidden(first, load(s)), second = without_hidden(second, load(s + PANEL));
      sum[j] += first + second;
      const vu pair = make_pairs(first, second);
      __builtin_memcpy(scores + key / 2 * PANEL + j * W, &pair, sizeof pair);  // rows below 2 * key are read
    }
  for (int j = 0; j < V; j++) store(row_sum + j * W, load(row_sum + j * W) * alpha[j] + sum[j]);
}

template <int V>
UF_NOINLINE void multiply_value_pairs(const word* values, const word* probabilities, float* out, int64_t pairs,
                                      int64_t dim, const vf* alpha) {
  for (int64_t d = 0; d < dim; d += MR) {
    const word* v = values + d * (KEYS / 2);
    vf acc[MR][V] = {};
    for (int64_t block = 0; block < pairs; block += 4)
#pragma GCC unroll 4
      for (int64_t pair = block; pair < block + 4; pair++) {
        vu p[V];
        for (int j = 0; j < V; j++) p[j] = load_pairs(probabilities + pair * PANEL + j * W);
#pragma GCC unroll 8
        for (int i = 0; i < MR; i++)
          for (int j = 0; j < V; j++) acc[i][j] = add_products(acc[i][j], v[pair * MR + i], p[j]);
      }
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
      for (int j = 0; j < V; j++) {
        float* o = out + (d + i) * PANEL + j * W;
        store(o, load(o) * alpha[j] + acc[i][j]);
      }
  }
}

// The operands as bfloat16; they fill half of each buffer.
struct Pairs {
  static_assert(MR % 8 == 0, "key tiles are filled up to whole blocks of 4 pairs");

  static word* words(float* buffer) { return reinterpret_cast<word*>(buffer); }

  // queries[panel][d / 2][lane]
  static void pack_q(const uf::Attention& a, const uf::QueryTile& tile, int64_t head, const Buffers& b) {
    const int64_t n = tile.end - tile.begin, pairs = a.dim / 2;
    for (int64_t i = 0; i < round_up(n, PANEL); i++) {
      word* to = words(b.queries) + i / PANEL * PANEL * pairs + i % PANEL;
      word* row = words(b.rows);
      for (int64_t d = 0; i >= n && d < pairs; d++) row[d] = 0;
      if (i < n) __builtin_memcpy(row, row_of<bf16>(a.q, tile.begin + i, head), a.dim * sizeof(bf16));
      for (int64_t d = 0; d < pairs; d++) to[d * PANEL] = row[d];
    }
  }

  // keys[key][d / 2], values[d / MR][key / 2][d % MR], both zero up to a multiple of MR keys
  static void pack_kv(const uf::Attention& a, int64_t begin, int64_t n, int64_t head, const Buffers& b) {
    const int64_t dim = a.dim, bytes = dim * sizeof(bf16), padded = round_up(n, MR);
    half *keys = reinterpret_cast<half*>(b.keys), *first = reinterpret_cast<half*>(b.rows), *second = first + dim;
    for (int64_t i = 0; i < n; i++) __builtin_memcpy(keys + i * dim, row_of<bf16>(a.k, begin + i, head), bytes);
    for (int64_t i = n * dim; i < padded * dim; i++) keys[i] = 0;
    for (int64_t i = 0; i < padded; i += 2) {
      for (int64_t d = 0; d < 2 * dim; d++) first[d] = 0;
      if (i < n) __builtin_memcpy(first, row_of<bf16>(a.v, begin + i, head), bytes);
      if (i + 1 < n) __builtin_memcpy(second, row_of<bf16>(a.v, begin + i + 1, head), bytes);
      for (int64_t d = 0; d < dim; d += MR) {
        word* to = words(b.values) + d * (KEYS / 2) + i / 2 * MR;
        for (int r = 0; r < MR; r++) to[r] = first[d + r] | static_cast<uint32_t>(second[d + r]) << 16;
      }
    }
  }

  template <int V>
  static void attend(const Buffers& b, int64_t panel, int64_t n, int64_t last, int64_t dim, float factor) {
    vf alpha[V];
    float *row_max = b.row_max + panel * PANEL, *row_sum = b.row_sum + panel * PANEL;
    multiply_key_pairs<V>(words(b.queries) + panel * PANEL * (dim / 2), words(b.keys), b.scores, n, dim / 2);
    if (last + 1 < n) {
      hide_keys(b.scores, n, last);
      exponentiate_pairs<V, true>(b.scores, n, factor, row_max, row_sum, alpha);
    } else {
      exponentiate_pairs<V, false>(b.scores, n, factor, row_max, row_sum, alpha);
    }
    multiply_value_pairs<V>(words(b.values), words(b.scores), b.out + panel * PANEL * dim, round_up(n, MR) / 2, dim,
                            alpha);
  }
};

}  // namespace UF_NAMESPACE
