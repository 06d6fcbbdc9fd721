// Gated residual, norm, modulation: every row is read from memory once, processed in L1, and written once.
#pragma once

#include "memory.h"

namespace UF_NAMESPACE {

// normalised = (x - mean) * inverse + offset
struct Moments {
  float mean, inverse, offset;
};

UF_INLINE float sum_slots(const vf* sums) { return sum_lanes(sums[0] + sums[1]); }

UF_INLINE Moments rms_moments(float squares, int64_t channels, float eps) {
  return {0.0f, 1.0f / __builtin_sqrtf(squares / static_cast<float>(channels) + eps), 0.0f};
}

// The mean of what is left after subtracting the mean corrects both mean and variance, so a large common offset costs
// no accuracy beyond the rounding of the input itself.
template <class T>
UF_INLINE Moments layer_moments(const T* x, float sum, int64_t channels, float eps) {
  const float count = static_cast<float>(channels), mean = sum / count;
  vf rest[2] = {}, squares[2] = {};
  for_row_slots(channels, [&](int64_t c, int64_t n, int slot) UF_BODY {
    vf d = load_n(x + c, n) - mean;
    if (n < W) {
      float live[W] = {};
      for (int64_t i = 0; i < n; i++) live[i] = 1.0f;
      d *= load(live);
    }
    rest[slot] += d;
    squares[slot] += d * d;
  });
  const float correction = sum_slots(rest) / count;
  const float variance = sum_slots(squares) / count - correction * correction;
  const float inverse = 1.0f / __builtin_sqrtf((variance > 0.0f || variance != variance ? variance : 0.0f) + eps);
  return {mean, inverse, -correction * inverse};
}

// The sum that `rms_moments` or `layer_moments` starts from.
template <class T>
UF_INLINE float moment_sum(const T* x, int64_t channels, bool rms) {
  vf sums[2] = {};
  // Two loops: with a branch in one loop, compilers contract to FMA in some copies only, and results would differ.
  if (rms) {
    for_row_slots(channels, [&](int64_t c, int64_t n, int slot) UF_BODY {
      const vf value = load_n(x + c, n);
      sums[slot] += value * value;
    });
  } else {
    for_row_slots(channels, [&](int64_t c, int64_t n, int slot) UF_BODY { sums[slot] += load_n(x + c, n); });
  }
  return sum_slots(sums);
}

// x + gate (y inverse) into `out` and, as float32 of what `out` holds, into `row`; kRound: the products are rounded as
// well.
template <class T, bool kRound>
UF_INLINE void gate_residual_row(const T* x, const T* y, float inverse, const T* gate, T* out, float* row,
                                 int64_t channels) {
  for_row(channels, [&](int64_t c, int64_t n) UF_BODY {
    vf branch = load_n(y + c, n) * inverse;
    if (kRound) branch = rounded_to<T>(branch);
    vf product = load_n(gate + c, n) * branch;
    if (kRound) product = rounded_to<T>(separate(product));
    const vf sum = load_n(x + c, n) + product;
    store_n(out + c, sum, n);
    if (row) store_n(row + c, rounded_to<T>(sum), n);
  });
}

template <class T, bool kRound, class X>
UF_INLINE void modulate_row(const X* x, const Moments& m, const T* shift, const T* scale, float one, T* out,
                            int64_t channels) {
  for_row(channels, [&](int64_t c, int64_t n) UF_BODY {
    vf value = (load_n(x + c, n) - m.mean) * m.inverse + m.offset;
    vf factor = one + load_n(scale + c, n);
    if (kRound) value = separate(rounded_to<T>(rounded_to<T>(value) * rounded_to<T>(factor)));
    else value *= factor;
    store_n(out + c, value + load_n(shift + c, n), n);
  });
}

template <class T, class X>
UF_INLINE Moments moments_of(const X* x, const uf::TokenOp& a) {
  const float sum = moment_sum(x, a.channels, a.rms);
  return a.rms ? rms_moments(sum, a.channels, a.eps) : layer_moments(x, sum, a.channels, a.eps);
}

template <class T, bool kRound>
void one_token(const uf::TokenOp& a, int64_t i, const T* zeros, float* stored) {
  const int64_t row = a.mod_index ? a.mod_index[i] : 0, at = i * a.channels;
  const T* x = static_cast<const T*>(a.x) + i * a.x_stride;
  const T* scale = static_cast<const T*>(a.scale) + row * a.scale_stride;
  const T* shift = a.shift ? static_cast<const T*>(a.shift) + row * a.shift_stride : zeros;
  T* normed = static_cast<T*>(a.normed) + at;
  if (!a.gate) {
    modulate_row<T, kRound>(x, moments_of<T>(x, a), shift, scale, a.one, normed, a.channels);
    return;
  }
  const T* y = static_cast<const T*>(a.y) + i * a.y_stride;
  const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride;
  const float inverse =
      a.branch_eps < 0.0f ? 1.0f : rms_moments(moment_sum(y, a.channels, true), a.channels, a.branch_eps).inverse;
  T* x_out = static_cast<T*>(a.x_out) + at;
  gate_residual_row<T, kRound>(x, y, inverse, gate, x_out, a.normed ? stored : nullptr, a.channels);
  // The stored value is normalised, rounding included.
  if (a.normed) modulate_row<T, kRound>(stored, moments_of<T>(stored, a), shift, scale, a.one, normed, a.channels);
}

template <class T, bool kRound>
int token_op_of(const uf::TokenOp& a) {
  int failed = 0;
  const int64_t padded = round_up(a.channels, 16);
#pragma omp parallel num_threads(a.threads)
  {
    float* memory = scratch.at_least(2 * padded);
    if (!memory) {
#pragma omp atomic write
      failed = 1;
    } else {
      __builtin_memset(memory, 0, padded * sizeof(float));  // stands for a missing shift
    }
#pragma omp for schedule(dynamic, 16)
    for (int64_t i = 0; i < a.tokens; i++)
      if (memory) one_token<T, kRound>(a, i, reinterpret_cast<const T*>(memory), memory + padded);
  }
  return failed;
}

static int token_op(const uf::TokenOp& a) {
  if (a.dtype == uf::kFloat32) return a.eager_rounding ? token_op_of<float, true>(a) : token_op_of<float, false>(a);
  return a.eager_rounding ? token_op_of<bf16, true>(a) : token_op_of<bf16, false>(a);
}

}  // namespace UF_NAMESPACE
