// GELU in the tanh approximation, and its gradient. Elements are independent of each other: one read, one write.
//
//   gelu(x) = x / 2 (1 + tanh(u)) = x s,   u = sqrt(2 / pi) (x + 0.044715 x^3),   s = sigmoid(2 u)
//   dx = grad (s + x s (1 - s) 2 u')
#pragma once

#include "memory.h"

namespace UF_NAMESPACE {

constexpr int64_t GELU_PART = 8192;  // elements that a thread takes at a time, whole vectors
constexpr float GELU_LINEAR = 1.5957691216f, GELU_CUBIC = 0.0713548163f;  // 2 u = x (linear + cubic x^2)
constexpr float GELU_LOG2E = 1.4426950408889634f, GELU_LIMIT = -100.0f / GELU_LOG2E;

// `grad` null: gelu(x), else the gradient. The last elements run through this same code, because a compiler
// may contract the operations of a second copy differently, and their bits would change.
template <class T, bool kBackward>
UF_NOINLINE void gelu_vectors(const T* x, const T* grad, T* out, int64_t n) {
  for (int64_t i = 0; i < n; i += W) {
    const vf value = load(x + i), square = value * value;
    const vf z = value * (GELU_CUBIC * square + GELU_LINEAR);
    const vf minus = z < 0.0f ? z : -z;
    // exp(-|z|), 0 where it is below 2^-100: x may be as large as 3e38.
    const vf e = minus <= splat(GELU_LIMIT) ? vf{} : exp2_scaled(minus, GELU_LOG2E, GELU_LIMIT);
    const vf inverse = 1.0f / (1.0f + e);
    const vf s = (z < 0.0f ? e : splat(1.0f)) * inverse;
    if (!kBackward) {
      store(out + i, value * s);
      continue;
    }
    // Where x^2 is large, s (1 - s) is 0; the bound keeps 0 times infinity out of the sum.
    const vf slope = 3.0f * GELU_CUBIC * (square > 1e4f ? splat(1e4f) : square) + GELU_LINEAR;
    store(out + i, load(grad + i) * (s + value * (e * inverse * inverse) * slope));
  }
}

template <class T, bool kBackward>
int gelu_of(const uf::Gelu& a) {
  const T *x = static_cast<const T*>(a.x), *grad = static_cast<const T*>(a.grad);
  T* out = static_cast<T*>(a.out);
  const int64_t parts = (a.size + GELU_PART - 1) / GELU_PART;
#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (int64_t part = 0; part < parts; part++) {
    const int64_t begin = part * GELU_PART, size = min_of(a.size - begin, GELU_PART);
    const int64_t whole = size / W * W, tail = begin + whole, rest = size - whole;
    gelu_vectors<T, kBackward>(x + begin, kBackward ? grad + begin : nullptr, out + begin, whole);
    if (!rest) continue;
    T lanes[3][W] = {};
    __builtin_memcpy(lanes[0], x + tail, rest * sizeof(T));
    if (kBackward) __builtin_memcpy(lanes[1], grad + tail, rest * sizeof(T));
    gelu_vectors<T, kBackward>(lanes[0], lanes[1], lanes[2], W);
    __builtin_memcpy(out + tail, lanes[2], rest * sizeof(T));
  }
  return 0;
}

static int gelu(const uf::Gelu& a) {
  if (a.dtype == uf::kFloat32) return a.grad ? gelu_of<float, true>(a) : gelu_of<float, false>(a);
  return a.grad ? gelu_of<bf16, true>(a) : gelu_of<bf16, false>(a);
}

}  // namespace UF_NAMESPACE
