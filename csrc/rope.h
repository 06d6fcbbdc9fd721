// RMSNorm per head and rotary embedding, from the streams into the joint sequence, and their gradients.
#pragma once

#include "memory.h"

namespace UF_NAMESPACE {

// cos and sin of one token spread to pairs, sin with the sign its lane needs: out = x * cosines + swap(x) * sines.
UF_INLINE void spread_rotary(const float* cos, const float* sin, int64_t half, float* cosines, float* sines) {
  for (int64_t i = 0; i < half; i++) {
    cosines[2 * i] = cosines[2 * i + 1] = cos[i];
    sines[2 * i] = -sin[i];
    sines[2 * i + 1] = sin[i];
  }
}

// 1 / rms of a head
template <class T>
UF_INLINE float inverse_rms(const T* x, int64_t dim, float eps) {
  vf squares[2] = {};
  for_row_slots(dim, [&](int64_t d, int64_t n, int slot) UF_BODY {
    const vf value = load_n(x + d, n);
    squares[slot] += value * value;
  });
  const float sum = sum_lanes(squares[0] + squares[1]);
  return 1.0f / __builtin_sqrtf(sum / static_cast<float>(dim) + eps);
}

// kRound: the normalised head is rounded before and after it is multiplied with the weight.
template <class T, bool kRound>
UF_INLINE void norm_rope_head(const T* x, const float* weight, const float* cosines, const float* sines, T* out,
                              int64_t dim, float eps) {
  const float inverse = weight ? inverse_rms(x, dim, eps) : 1.0f;
  for_row(dim, [&](int64_t d, int64_t n) UF_BODY {
    vf value = load_n(x + d, n);
    if (weight && kRound) value = rounded_to<T>(rounded_to<T>(value * inverse) * load_n(weight + d, n));
    else if (weight) value = value * inverse * load_n(weight + d, n);
    store_n(out + d, value * load_n(cosines + d, n) + swap_pairs(value) * load_n(sines + d, n), n);
  });
}

template <class T, bool kRound>
void qk_norm_rope_token(const uf::QkNormRope& a, int stream, int64_t token, float* cosines, float* sines) {
  const int64_t row = a.joint_row[stream][token];
  spread_rotary(a.cos + row * (a.dim / 2), a.sin + row * (a.dim / 2), a.dim / 2, cosines, sines);
  const int64_t out = row * a.heads * a.dim;
  for (int64_t h = 0; h < a.heads; h++)
    norm_rope_head<T, kRound>(row_of<T>(a.q[stream], token, h), a.weight_q[stream], cosines, sines,
                              static_cast<T*>(a.out_q) + out + h * a.dim, a.dim, a.eps);
  for (int64_t h = 0; h < a.heads; h++)
    norm_rope_head<T, kRound>(row_of<T>(a.k[stream], token, h), a.weight_k[stream], cosines, sines,
                              static_cast<T*>(a.out_k) + out + h * a.dim, a.dim, a.eps);
  for (int64_t h = 0; h < a.heads; h++) {
    const T* from = row_of<T>(a.v[stream], token, h);
    T* to = static_cast<T*>(a.out_v) + out + h * a.dim;
    __builtin_memcpy(to, from, a.dim * sizeof(T));
  }
}

template <class T, bool kRound>
int qk_norm_rope_of(const uf::QkNormRope& a) {
  int failed = 0;
  const int64_t tokens = a.tokens[0] + a.tokens[1];
#pragma omp parallel num_threads(a.threads)
  {
    float* memory = scratch.at_least(2 * a.dim);
    if (!memory) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(dynamic, 16)
    for (int64_t i = 0; i < tokens; i++) {
      if (!memory) continue;
      const int stream = i >= a.tokens[0];
      const int64_t token = stream ? i - a.tokens[0] : i;
      qk_norm_rope_token<T, kRound>(a, stream, token, memory, memory + a.dim);
    }
  }
  return failed;
}

static int qk_norm_rope(const uf::QkNormRope& a) {
  if (a.dtype == uf::kFloat32)
    return a.eager_rounding ? qk_norm_rope_of<float, true>(a) : qk_norm_rope_of<float, false>(a);
  return a.eager_rounding ? qk_norm_rope_of<bf16, true>(a) : qk_norm_rope_of<bf16, false>(a);
}

// ---- backward -----------------------------------------------------------------------------------------------------

// With g the gradient rotated back and n the normalised head: dx = (g w - n mean(g w n)) / rms; g n is added to `dw`.
template <class T>
UF_INLINE void norm_rope_head_backward(const T* grad, const T* x, const float* weight, const float* cosines,
                                       const float* sines, T* out, float* dw, int64_t dim, float eps) {
  const auto turned_back = [&](int64_t d, int64_t n) UF_BODY {
    const vf g = load_n(grad + d, n);
    return g * load_n(cosines + d, n) - swap_pairs(g) * load_n(sines + d, n);
  };
  if (!weight) {
    for_row(dim, [&](int64_t d, int64_t n) UF_BODY { store_n(out + d, turned_back(d, n), n); });
    return;
  }
  const float inverse = inverse_rms(x, dim, eps);
  vf sums[2] = {};
  for_row_slots(dim, [&](int64_t d, int64_t n, int slot) UF_BODY {
    const vf norm = load_n(x + d, n) * inverse, share = turned_back(d, n) * norm;
    sums[slot] += share * load_n(weight + d, n);
    if (dw) store_n(dw + d, load_n(dw + d, n) + share, n);
  });
  const float mean = sum_lanes(sums[0] + sums[1]) / static_cast<float>(dim);
  for_row(dim, [&](int64_t d, int64_t n) UF_BODY {
    const vf norm = load_n(x + d, n) * inverse;
    store_n(out + d, (turned_back(d, n) * load_n(weight + d, n) - norm * mean) * inverse, n);
  });
}

// Tokens [begin, end) of a stream; their sums over tokens and heads go to shares[2][dim]. Sums over heads are taken
// first: short sums round less. memory: 4 dim floats.
template <class T>
void qk_norm_rope_chunk_backward(const uf::QkNormRopeBackward& a, int stream, int64_t begin, int64_t end,
                                 float* shares, float* memory) {
  float *cosines = memory, *sines = memory + a.dim, *token_dw = memory + 2 * a.dim;
  const uf::View grads[2] = {a.dq, a.dk}, inputs[2] = {a.q[stream], a.k[stream]};
  const float* const weights[2] = {a.weight_q[stream], a.weight_k[stream]};
  void* const outs[2] = {a.out_q[stream], a.out_k[stream]};
  if (shares) __builtin_memset(shares, 0, 2 * a.dim * sizeof(float));
  for (int64_t token = begin; token < end; token++) {
    const int64_t row = a.joint_row[stream][token], at = token * a.heads * a.dim;
    spread_rotary(a.cos + row * (a.dim / 2), a.sin + row * (a.dim / 2), a.dim / 2, cosines, sines);
    for (int which = 0; which < 2; which++) {
      float* dw = shares && weights[which] ? token_dw : nullptr;
      if (dw) __builtin_memset(dw, 0, a.dim * sizeof(float));
      for (int64_t h = 0; h < a.heads; h++)
        norm_rope_head_backward(row_of<T>(grads[which], row, h), row_of<T>(inputs[which], token, h), weights[which],
                                cosines, sines, static_cast<T*>(outs[which]) + at + h * a.dim, dw, a.dim, a.eps);
      for (int64_t d = 0; dw && d < a.dim; d++) shares[which * a.dim + d] += dw[d];
    }
    for (int64_t h = 0; h < a.heads; h++) {
      const T* from = row_of<T>(a.dv, row, h);
      T* to = static_cast<T*>(a.out_v[stream]) + at + h * a.dim;
      __builtin_memcpy(to, from, a.dim * sizeof(T));
    }
  }
}

template <class T>
int qk_norm_rope_backward_of(const uf::QkNormRopeBackward& a) {
  int failed = 0;
  const int64_t chunks[2] = {(a.tokens[0] + uf::kChunk - 1) / uf::kChunk, (a.tokens[1] + uf::kChunk - 1) / uf::kChunk};
#pragma omp parallel num_threads(a.threads)
  {
    float* memory = scratch.at_least(4 * a.dim);
    if (!memory) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < chunks[0] + chunks[1]; i++) {
      if (!memory) continue;
      const int stream = i >= chunks[0];
      const int64_t begin = (stream ? i - chunks[0] : i) * uf::kChunk;
      const int64_t end = min_of(begin + uf::kChunk, a.tokens[stream]);
      float* shares = a.shares ? a.shares + i * 2 * a.dim : nullptr;
      qk_norm_rope_chunk_backward<T>(a, stream, begin, end, shares, memory);
    }
  }
  for (int s = 0; s < 2; s++)
    for (int which = 0; which < 2; which++) {
      float* to = which ? a.out_wk[s] : a.out_wq[s];
      for (int64_t d = 0; to && d < a.dim; d++) {
        float total = 0.0f;
        for (int64_t i = s ? chunks[0] : 0; i < (s ? chunks[0] + chunks[1] : chunks[0]); i++)
          total += a.shares[(i * 2 + which) * a.dim + d];
        to[d] = total;
      }
    }
  return failed;
}

static int qk_norm_rope_backward(const uf::QkNormRopeBackward& a) {
  return a.dtype == uf::kFloat32 ? qk_norm_rope_backward_of<float>(a) : qk_norm_rope_backward_of<bf16>(a);
}

}  // namespace UF_NAMESPACE
