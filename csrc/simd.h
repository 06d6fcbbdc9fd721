// Vectors of UF_WIDTH floats, written with compiler vector extensions so that one source serves every ISA level.
//
// level.cpp is compiled once per level with its own flags and its own UF_NAMESPACE. Everything a level uses must live
// in that namespace: a function with external linkage shared between levels would be merged by the linker, and the
// generic level could then run AVX-512 code. For the same reason no C++ library header belongs here.
#pragma once

#include <stdint.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace UF_NAMESPACE {

constexpr int W = UF_WIDTH;

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint64_t vq __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

struct bf16 {
  uint16_t bits;
};

#define UF_INLINE static inline __attribute__((always_inline))
#define UF_NOINLINE static __attribute__((noinline))

UF_INLINE vf splat(float x) { return x - vf{}; }
// NaN in `b` stays, NaN in `a` is dropped: the order of arguments matters to the callers.
UF_INLINE vf max_of(vf a, vf b) { return a > b ? a : b; }

UF_INLINE vf widen(vh h) {
  // One instruction; GCC compiles the portable line to five. (maskz: the plain intrinsic warns in GCC 12.)
#if UF_WIDTH == 16 && defined(__AVX512F__)
  return (vf)((vu)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h) << 16);
#elif UF_WIDTH == 8 && defined(__AVX2__)
  return (vf)((vu)_mm256_cvtepu16_epi32((__m128i)h) << 16);
#else
  return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}

// The bits of a bf16, in the low halves. Round to nearest even; a NaN stays a (quiet) NaN.
UF_INLINE vu narrow_bits(vf x) {
  const vu bits = (vu)x;
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vu quiet = (bits >> 16) | 0x40u;
  return x != x ? quiet : rounded;
}
UF_INLINE vh narrow(vf x) { return __builtin_convertvector(narrow_bits(x), vh); }

UF_INLINE vf load(const float* p) {
  vf x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
UF_INLINE vf load(const bf16* p) {
  vh h;
  __builtin_memcpy(&h, p, sizeof h);
  return widen(h);
}
UF_INLINE void store(float* p, vf x) { __builtin_memcpy(p, &x, sizeof x); }
UF_INLINE void store(bf16* p, vf x) {
  const vh h = narrow(x);
  __builtin_memcpy(p, &h, sizeof h);
}

// The last n < W elements of a row; lanes past n read as zero. Not inlined: calls are rare.
template <class T>
UF_NOINLINE vf load_tail(const T* p, int64_t n) {
  T lanes[W] = {};
  __builtin_memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}
template <class T>
UF_NOINLINE void store_tail(T* p, vf x, int64_t n) {
  T lanes[W];
  store(lanes, x);
  __builtin_memcpy(p, lanes, n * sizeof(T));
}

// Returns x as it is after it was stored as T and read back.
template <class T>
UF_INLINE vf rounded_to(vf x);
template <>
inline __attribute__((always_inline)) vf rounded_to<float>(vf x) {
  return x;
}
template <>
inline __attribute__((always_inline)) vf rounded_to<bf16>(vf x) {
  return widen(narrow(x));
}

// Keeps the compiler from contracting x, a product, into the addition that follows.
UF_INLINE vf separate(vf x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__) && UF_WIDTH <= 8
  asm("" : "+x"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

// Fixed order, so that a row's sum does not depend on how the loop around it was vectorised.
UF_INLINE float sum_lanes(vf x) {
  float lanes[W];
  store(lanes, x);
  for (int n = W / 2; n > 0; n /= 2)
    for (int i = 0; i < n; i++) lanes[i] += lanes[i + n];
  return lanes[0];
}

// (x0, x1, x2, x3, ..) -> (x1, x0, x3, x2, ..)
UF_INLINE vf swap_pairs(vf x) {
  const vq pair = (vq)x;
  return (vf)((pair << 32) | (pair >> 32));
}

// 2^(factor * x) for x <= 0, relative error about 1e-7, never below 2^-100 (also for -inf); NaN stays NaN. `limit` is
// -100 / factor. factor * x = n + f, |f| <= 1/2: adding 1.5 * 2^23 leaves n in the low mantissa bits, from where a
// shift moves it to the exponent. Written so that FMA takes in the product twice, which is then never rounded.
UF_INLINE vf exp2_scaled(vf x, float factor, float limit) {
  const vf clamped = max_of(splat(limit), x);
  const vf shifted = clamped * factor + 12582912.0f;
  const vf f = clamped * factor - (shifted - 12582912.0f);
  // Minimax for the relative error on |f| <= 1/2 with p(0) = 1 exactly, so that 2^0 is 1: 2e-9 before rounding.
  vf p = splat(1.5353362e-4f);
  p = p * f + 1.33988790e-3f;
  p = p * f + 9.61843692e-3f;
  p = p * f + 5.55033237e-2f;
  p = p * f + 2.40226477e-1f;
  p = p * f + 6.93147182e-1f;
  p = p * f + 1.0f;
  return (vf)((vi)p + ((vi)shifted << 23));
}

}  // namespace UF_NAMESPACE
