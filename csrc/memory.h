// Access to memory that all kernels share: a work buffer, addresses, whole vectors and the tail behind them.
#pragma once

#include <stdlib.h>

#include "kernels.h"
#include "simd.h"

namespace UF_NAMESPACE {

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

UF_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
UF_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
UF_INLINE const T* row_of(const uf::View& view, int64_t token, int64_t head) {
  return static_cast<const T*>(view.data) + token * view.token_stride + head * view.head_stride;
}

// Prefetches part `part` of `parts` of the rows [begin, end) into L2. The rows of the next tile lie pages apart, where
// the processor does not prefetch by itself: without this, packing a tile takes longer by a tenth of its products.
template <class T>
UF_INLINE void prefetch_rows(const uf::View& view, int64_t begin, int64_t end, int64_t part, int64_t parts,
                             int64_t head, int64_t dim) {
  const int64_t last = begin + (end - begin) * (part + 1) / parts;
  for (int64_t i = begin + (end - begin) * part / parts; i < last; i++)
    for (int64_t d = 0; d < dim; d += 64 / static_cast<int64_t>(sizeof(T)))
      __builtin_prefetch(row_of<T>(view, i, head) + d, 0, 2);
}

// Calls f(offset, n) over a row: whole vectors, then the tail through a padded one. n is the number of lanes in use.
template <class F>
UF_INLINE void for_row(int64_t size, F f) {
  int64_t i = 0;
  for (; i + W <= size; i += W) f(i, W);
  if (i < size) f(i, size - i);
}
// As for_row, with a slot that alternates between 0 and 1, so that two sums do not wait for each other's additions.
template <class F>
UF_INLINE void for_row_slots(int64_t size, F f) {
  int64_t i = 0;
  for (; i + 2 * W <= size; i += 2 * W) f(i, W, 0), f(i + W, W, 1);
  for (; i < size; i += W) f(i, min_of(size - i, W), 0);
}
// Marks the body of an inner loop.
#define UF_BODY __attribute__((always_inline))

template <class T>
UF_INLINE vf load_n(const T* p, int64_t n) {
  return n == W ? load(p) : load_tail(p, n);
}
template <class T>
UF_INLINE void store_n(T* p, vf x, int64_t n) {
  if (n == W) store(p, x);
  else store_tail(p, x, n);
}

template <class T>
UF_INLINE void widen_row(float* to, const T* from, int64_t dim, float factor) {
  for_row(dim, [&](int64_t d, int64_t n) { store_n(to + d, load_n(from + d, n) * factor, n); });
}

// Writes a column of a transposed panel (elements `stride` floats apart), times `factor`, as a row; `row` is a buffer.
template <class T>
UF_INLINE void write_column(T* to, const float* from, int64_t stride, int64_t dim, float factor, float* row) {
  for (int64_t d = 0; d < dim; d++) row[d] = from[d * stride] * factor;
  for_row(dim, [&](int64_t d, int64_t n) { store_n(to + d, load_n(row + d, n), n); });
}

}  // namespace UF_NAMESPACE
