// Gradients of token_ops.h. With n the normalised row, f = 1 + scale, and both parts present:
//
//   dn = grad_normed f,   g = grad_x + (dn - mean(dn) - n mean(dn n)) / std        dx = g,  dy = gate g
//   dgate = sum g y,      dshift = sum grad_normed,      dscale = sum grad_normed n        over the tokens of a row
//
// Statistics are computed again from x, whose row is in L1. The tokens of a modulation row are taken in chunks
// of fixed size counted from its own first token, and chunks are summed in order: the bits of a row's gradient depend
// on its tokens only.
#pragma once

#include "token_ops.h"

namespace UF_NAMESPACE {

constexpr int TOGETHER = 2;  // tokens whose row gradients are added up in registers first

template <class T>
UF_INLINE const T* at_row(const void* base, int64_t row, int64_t stride) {
  return static_cast<const T*>(base) + row * stride;
}

// Values of one token for the last pass over its row: n = (x - mean) * inverse + offset, and the two means over it.
struct TokenMeans {
  Moments moments;
  float dn, dn_n;
};

template <class T>
UF_INLINE vf normalised(const T* x, const Moments& m, int64_t n) {
  return (load_n(x, n) - m.mean) * m.inverse + m.offset;
}

template <class T>
UF_INLINE TokenMeans token_means(const uf::TokenOpBackward& a, const T* x, const T* grad, const T* scale) {
  const float sum = moment_sum(x, a.channels, a.rms), count = static_cast<float>(a.channels);
  const Moments m = a.rms ? rms_moments(sum, a.channels, a.eps) : layer_moments(x, sum, a.channels, a.eps);
  vf plain[2] = {}, weighted[2] = {};
  for_row_slots(a.channels, [&](int64_t c, int64_t n, int slot) UF_BODY {
    const vf dn = load_n(grad + c, n) * (1.0f + load_n(scale + c, n));  // zero past the end of the row
    plain[slot] += dn;
    weighted[slot] += dn * normalised(x + c, m, n);
  });
  return {m, a.rms ? 0.0f : sum_slots(plain) / count, sum_slots(weighted) / count};
}

// `count` tokens of one modulation row; their share of its gradients is added to sums[3][padded].
template <class T, bool kNorm, bool kGate, int kCount>
UF_INLINE void backward_tokens(const uf::TokenOpBackward& a, const int32_t* tokens, int64_t row, float* sums,
                               int64_t padded) {
  const T* scale = at_row<T>(a.scale, row, a.scale_stride);
  const T* gate = at_row<T>(a.gate, row, a.gate_stride);
  const T *x[kCount], *y[kCount], *grad_x[kCount], *grad[kCount];
  T *dx[kCount], *dy[kCount];
  TokenMeans means[kCount];
  for (int t = 0; t < kCount; t++) {
    const int64_t token = tokens[t];
    x[t] = at_row<T>(a.x, token, a.x_stride), y[t] = at_row<T>(a.y, token, a.y_stride);
    grad_x[t] = at_row<T>(a.grad_x, token, a.grad_x_stride);
    grad[t] = at_row<T>(a.grad_normed, token, a.grad_normed_stride);
    dx[t] = static_cast<T*>(a.dx) + token * a.channels, dy[t] = static_cast<T*>(a.dy) + token * a.channels;
    if (kNorm) means[t] = token_means(a, x[t], grad[t], scale);
  }
  for_row(a.channels, [&](int64_t c, int64_t n) UF_BODY {
    vf dgate = {}, dshift = {}, dscale = {};
    vf factor = {}, gates = {};
    if (kNorm) factor = 1.0f + load_n(scale + c, n);
    if (kGate) gates = load_n(gate + c, n);
#pragma GCC unroll 2
    for (int t = 0; t < kCount; t++) {
      vf g = {};
      if (kGate) g = load_n(grad_x[t] + c, n);
      if (kNorm) {
        const TokenMeans& m = means[t];
        const vf incoming = load_n(grad[t] + c, n), norm = normalised(x[t] + c, m.moments, n);
        g += (incoming * factor - m.dn - norm * m.dn_n) * m.moments.inverse;
        dshift += incoming;
        dscale += incoming * norm;
        store_n(dx[t] + c, g, n);
      }
      if (kGate) {
        dgate += g * load_n(y[t] + c, n);
        store_n(dy[t] + c, gates * g, n);
      }
    }
    if (!sums) return;
    const vf share[3] = {dgate, dshift, dscale};
    for (int part = kGate ? 0 : 1; part < (kNorm ? 3 : 1); part++) {
      float* to = sums + part * padded + c;  // past the row's end: padding
      store(to, load(to) + share[part]);
    }
  });
}

template <class T, bool kNorm, bool kGate>
void backward_chunk(const uf::TokenOpBackward& a, const uf::RowChunk& chunk, float* sums, int64_t padded) {
  void* const out[3] = {a.dgate, a.dshift, a.dscale};
  const bool wanted = a.dgate || a.dshift || a.dscale;
  if (wanted) __builtin_memset(sums, 0, 3 * padded * sizeof(float));
  float* to = wanted ? sums : nullptr;
  int64_t i = chunk.begin;
  for (; i + TOGETHER <= chunk.end; i += TOGETHER)
    backward_tokens<T, kNorm, kGate, TOGETHER>(a, a.order + i, chunk.row, to, padded);
  for (; i < chunk.end; i++) backward_tokens<T, kNorm, kGate, 1>(a, a.order + i, chunk.row, to, padded);
  for (int part = 0; part < 3; part++) {
    if (!out[part]) continue;
    const float* from = sums + part * padded;
    if (chunk.share < 0) {
      T* row = static_cast<T*>(out[part]) + chunk.row * a.channels;
      for_row(a.channels, [&](int64_t c, int64_t n) { store_n(row + c, load(from + c), n); });
    } else {
      __builtin_memcpy(a.shares + (chunk.share * 3 + part) * a.channels, from, a.channels * sizeof(float));
    }
  }
}

// The gradients of rows with several chunks, and of rows without any.
template <class T>
void sum_shares(const uf::TokenOpBackward& a, const uf::RowSum& sum) {
  void* const out[3] = {a.dgate, a.dshift, a.dscale};
  for (int part = 0; part < 3; part++) {
    if (!out[part]) continue;
    T* row = static_cast<T*>(out[part]) + sum.row * a.channels;
    for_row(a.channels, [&](int64_t c, int64_t n) {
      vf total = {};
      for (int64_t share = sum.first; share < sum.last; share++)
        total += load_n(a.shares + (share * 3 + part) * a.channels + c, n);
      store_n(row + c, total, n);
    });
  }
}

template <class T, bool kNorm, bool kGate>
int backward_of(const uf::TokenOpBackward& a) {
  int failed = 0;
  const int64_t padded = round_up(a.channels, W);
#pragma omp parallel num_threads(a.threads)
  {
    float* memory = scratch.at_least(3 * padded);
    if (!memory) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < a.n_chunks; i++)
      if (memory) backward_chunk<T, kNorm, kGate>(a, a.chunks[i], memory, padded);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < a.n_sums; i++) sum_shares<T>(a, a.sums[i]);
  }
  return failed;
}

template <class T>
int backward_parts(const uf::TokenOpBackward& a) {
  if (!a.gate) return backward_of<T, true, false>(a);
  return a.scale ? backward_of<T, true, true>(a) : backward_of<T, false, true>(a);
}

static int token_op_backward(const uf::TokenOpBackward& a) {
  return a.dtype == uf::kFloat32 ? backward_parts<float>(a) : backward_parts<bf16>(a);
}

}  // namespace UF_NAMESPACE
