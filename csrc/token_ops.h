// The memory-bound operations: every row is read from memory once, worked on in L1, and written once.
#pragma once

#include "attention.h"

namespace UF_NAMESPACE {

// f(offset, load, store) over a row: whole vectors, then the tail through a padded one. `n` is the live lane count.
template <class F>
UF_INLINE void for_row(int64_t size, F f) {
  int64_t i = 0;
  for (; i + W <= size; i += W) f(i, W);
  if (i < size) f(i, size - i);
}
template <class T>
UF_INLINE vf load_n(const T* p, int64_t n) {
  return n == W ? load(p) : load_tail(p, n);
}
template <class T>
UF_INLINE void store_n(T* p, vf x, int64_t n) {
  if (n == W) store(p, x);
  else store_tail(p, x, n);
}

// ---- RMSNorm + rotary embedding into the joint sequence -----------------------------------------------------------

// cos and sin of one token spread to pairs, sin with the sign its lane needs: out = x * cosines + swap(x) * sines.
UF_INLINE void spread_rotary(const float* cos, const float* sin, int64_t half, float* cosines, float* sines) {
  for (int64_t i = 0; i < half; i++) {
    cosines[2 * i] = cosines[2 * i + 1] = cos[i];
    sines[2 * i] = -sin[i];
    sines[2 * i + 1] = sin[i];
  }
}

template <class T>
UF_INLINE void norm_rope_head(const T* x, const float* weight, const float* cosines, const float* sines, T* out,
                              int64_t dim, float eps) {
  float inverse = 1.0f;
  if (weight) {
    vf squares = {};
    for_row(dim, [&](int64_t d, int64_t n) {
      const vf value = load_n(x + d, n);
      squares += value * value;
    });
    inverse = 1.0f / __builtin_sqrtf(sum_lanes(squares) / static_cast<float>(dim) + eps);
  }
  for_row(dim, [&](int64_t d, int64_t n) {
    vf value = load_n(x + d, n);
    if (weight) value = value * inverse * load_n(weight + d, n);
    const vf rotated = value * load_n(cosines + d, n) + swap_pairs(value) * load_n(sines + d, n);
    store_n(out + d, rotated, n);
  });
}

template <class T>
void qk_norm_rope_token(const uf::QkNormRope& a, int stream, int64_t token, float* cosines, float* sines) {
  const int64_t row = a.joint_row[stream][token];
  spread_rotary(a.cos + row * (a.dim / 2), a.sin + row * (a.dim / 2), a.dim / 2, cosines, sines);
  const int64_t out = row * a.heads * a.dim;
  for (int64_t h = 0; h < a.heads; h++)
    norm_rope_head(row_of<T>(a.q[stream], token, h), a.weight_q[stream], cosines, sines,
                   static_cast<T*>(a.out_q) + out + h * a.dim, a.dim, a.eps);
  for (int64_t h = 0; h < a.heads; h++)
    norm_rope_head(row_of<T>(a.k[stream], token, h), a.weight_k[stream], cosines, sines,
                   static_cast<T*>(a.out_k) + out + h * a.dim, a.dim, a.eps);
  for (int64_t h = 0; h < a.heads; h++)
    __builtin_memcpy(static_cast<T*>(a.out_v) + out + h * a.dim, row_of<T>(a.v[stream], token, h), a.dim * sizeof(T));
}

static int qk_norm_rope(const uf::QkNormRope& a) {
  int failed = 0;
#pragma omp parallel num_threads(a.threads)
  {
    float* memory = scratch.at_least(2 * a.dim);
    if (!memory) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(dynamic, 16)
    for (int64_t i = 0; i < a.tokens[0] + a.tokens[1]; i++) {
      if (!memory) continue;
      const int stream = i >= a.tokens[0];
      const int64_t token = stream ? i - a.tokens[0] : i;
      if (a.dtype == uf::kFloat32) qk_norm_rope_token<float>(a, stream, token, memory, memory + a.dim);
      else qk_norm_rope_token<bf16>(a, stream, token, memory, memory + a.dim);
    }
  }
  return failed;
}

// ---- gated residual, LayerNorm, modulation ------------------------------------------------------------------------

template <class T>
UF_INLINE void gate_residual_row(const T* x, const T* y, const T* gate, T* out, int64_t channels) {
  for_row(channels, [&](int64_t c, int64_t n) {
    store_n(out + c, load_n(x + c, n) + load_n(gate + c, n) * load_n(y + c, n), n);
  });
}

// Two passes; the mean of what is left after subtracting the mean corrects both mean and variance, so a large common
// offset costs no accuracy beyond what the input's own rounding lost.
template <class T>
UF_INLINE void norm_modulate_row(const T* x, const T* shift, const T* scale, T* out, int64_t channels, float eps) {
  const float count = static_cast<float>(channels);
  vf sums[4] = {};
  int64_t c = 0;
  for (; c + 4 * W <= channels; c += 4 * W)
    for (int i = 0; i < 4; i++) sums[i] += load(x + c + i * W);
  for_row(channels - c, [&](int64_t d, int64_t n) { sums[0] += load_n(x + c + d, n); });
  const float mean = sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) / count;

  vf rest[2] = {}, squares[2] = {};
  c = 0;
  for (; c + 2 * W <= channels; c += 2 * W)
    for (int i = 0; i < 2; i++) {
      const vf d = load(x + c + i * W) - mean;
      rest[i] += d;
      squares[i] += d * d;
    }
  for (; c < channels; c += W) {
    const int64_t n = channels - c < W ? channels - c : W;
    float lanes[W] = {};
    for (int64_t i = 0; i < n; i++) lanes[i] = 1.0f;
    const vf d = (load_n(x + c, n) - mean) * load(lanes);
    rest[0] += d;
    squares[0] += d * d;
  }
  const float correction = sum_lanes(rest[0] + rest[1]) / count;
  const float variance = sum_lanes(squares[0] + squares[1]) / count - correction * correction;
  const float inverse = 1.0f / __builtin_sqrtf((variance > 0.0f || variance != variance ? variance : 0.0f) + eps);
  const float offset = -correction * inverse;
  for_row(channels, [&](int64_t d, int64_t n) {
    const vf normed = (load_n(x + d, n) - mean) * inverse + offset;
    store_n(out + d, normed * (1.0f + load_n(scale + d, n)) + load_n(shift + d, n), n);
  });
}

template <class T>
void token_row(const uf::TokenRows& a, int64_t i) {
  const int64_t row = a.rows ? a.rows[i] : 0;
  const T* x = static_cast<const T*>(a.x) + i * a.x_stride;
  if (a.gate) {
    T* out = static_cast<T*>(a.x_out) + i * a.channels;
    gate_residual_row(x, static_cast<const T*>(a.y) + i * a.y_stride,
                      static_cast<const T*>(a.gate) + row * a.gate_stride, out, a.channels);
    x = out;  // what is normalised is what was stored, rounding included
  }
  if (a.normed)
    norm_modulate_row(x, static_cast<const T*>(a.shift) + row * a.shift_stride,
                      static_cast<const T*>(a.scale) + row * a.scale_stride,
                      static_cast<T*>(a.normed) + i * a.channels, a.channels, a.eps);
}

static void token_rows(const uf::TokenRows& a) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(a.threads)
  for (int64_t i = 0; i < a.tokens; i++) {
    if (a.dtype == uf::kFloat32) token_row<float>(a, i);
    else token_row<bf16>(a, i);
  }
}

}  // namespace UF_NAMESPACE
