// Arguments that native.cpp (the C ABI, compiled once) passes to level.cpp (the kernels, compiled once per ISA level).
// Plain data, and how it is read. Strides are in elements. Offsets are 64-bit everywhere: many references make big tensors.
#pragma once

#include <stdint.h>

namespace uf {

enum DType { kFloat32 = 0, kBFloat16 = 1 };

// One stream's [tokens, heads, dim] view; the last dimension is contiguous.
struct View {
  const void* data;
  int64_t token_stride, head_stride;
};

// An interval of an AttentionPlan. Of a causal one, which is stored with the start -1 - begin, row i of its range sees
// the rows begin .. begin + i. (In a transpose, row j is seen by the rows begin + j .. end - 1.)
struct Interval {
  int64_t begin, end;
  bool causal;
};

// Always inlined, as simd.h asks of all code that several levels use.
static inline __attribute__((always_inline)) Interval interval_at(const int32_t* intervals, int64_t i) {
  const int64_t begin = intervals[2 * i];
  return {begin < 0 ? -1 - begin : begin, intervals[2 * i + 1], begin < 0};
}

// Rows [begin, end) of q, `offset` rows behind the start of their range, see the key intervals [first, last).
struct QueryTile {
  int64_t begin, end, first, last, work, offset;
};

struct Attention {
  View q, k, v;
  void* out;   // [nq, heads, dim]
  float* lse;  // [heads, nq]
  int64_t nq, heads, dim;
  float scale;
  const int32_t* kv_ranges;
  const QueryTile* tiles;  // longest work first
  int64_t n_tiles, max_panels;
  int threads;
};

// These sizes decide where sums are cut and so the bits of the result: they are the same on every machine.
constexpr int64_t kKeyBlock = 192;  // keys of a task
constexpr int64_t kQueryTile = 48;  // queries that meet a block of keys at a time

// Rows [begin, end) of k and v, the index-th block of its key range, which the spans [first, last) see.
struct KeyBlock {
  int64_t begin, end, first, last, index;
};

// Rows [begin, end) of q that see a key range. `turns` key blocks see them, `before` of them before the range's first.
struct QuerySpan {
  int64_t begin, end;
  bool causal;   // query i sees key j of the key range for j <= i
  int64_t tile;  // number of its first tile
  int64_t before, turns;
};

struct AttentionBackward {
  DType dtype;
  View grad_out, q, k, v, out;
  const float* lse;     // [heads, nq]
  void *dq, *dk, *dv;   // [nq or nk, heads, dim]; rows that no pair contains are not written
  int64_t nq, heads, dim;
  float scale;
  const KeyBlock* blocks;  // ascending
  const QuerySpan* spans;
  int64_t n_blocks, n_tiles;
  float* delta;   // [heads, nq]
  float* dq_sum;  // [heads, nq, dim rounded up to a vector], or null when no span has more than one turn
  int32_t* done;  // [heads, n_tiles], zeros: turns taken
  int threads;
};

struct QkNormRope {
  DType dtype;
  View q[2], k[2], v[2];        // text, image
  const float* weight_q[2];     // null: no norm
  const float* weight_k[2];
  const int32_t* joint_row[2];
  int64_t tokens[2];
  const float *cos, *sin;       // [joint rows, dim / 2]
  void *out_q, *out_k, *out_v;  // [joint rows, heads, dim]
  int64_t heads, dim;
  float eps;
  bool eager_rounding;
  int threads;
};

constexpr int64_t kChunk = 64;  // tokens of one share of a sum over tokens

struct QkNormRopeBackward {
  DType dtype;
  View dq, dk, dv;              // joint
  View q[2], k[2];              // text, image
  const float* weight_q[2];
  const float* weight_k[2];
  const int32_t* joint_row[2];
  int64_t tokens[2];
  const float *cos, *sin;
  void *out_q[2], *out_k[2], *out_v[2];  // [tokens, heads, dim]
  float *out_wq[2], *out_wk[2];          // [dim], or null
  float* shares;                         // [chunks, 2, dim]: each chunk's sums of dwq and dwk
  int64_t heads, dim;
  float eps;
  int threads;
};

// gate_residual, norm_modulate and both at once: a null pointer leaves the part out. The norm is multiplied by
// `one + scale`. A branch_eps that is not negative divides y by the root of its mean squares before it is added.
struct TokenOp {
  DType dtype;
  const void *x, *y, *gate, *shift, *scale;
  void *x_out, *normed;
  int64_t x_stride, y_stride, gate_stride, shift_stride, scale_stride;
  const int32_t* mod_index;  // modulation row of each token; null: row 0
  int64_t tokens, channels;
  float eps, branch_eps, one;
  bool rms, eager_rounding;
  int threads;
};

// The tokens order[begin .. end) have this row. `share`: where the chunk's sums go, -1 when it is the row's only one.
struct RowChunk {
  int64_t row, begin, end, share;
};

// A row's shares, which are summed in this order; a row without tokens has none.
struct RowSum {
  int64_t row, first, last;
};

// norm_modulate when gate is null, gate_residual when scale is null. Null dgate, dshift, dscale: not wanted.
struct TokenOpBackward {
  DType dtype;
  const void *grad_x, *grad_normed, *x, *y, *gate, *scale;
  void *dx, *dy, *dgate, *dshift, *dscale;
  int64_t grad_x_stride, grad_normed_stride, x_stride, y_stride, gate_stride, scale_stride;
  const int32_t* order;  // tokens sorted by row
  const RowChunk* chunks;
  const RowSum* sums;
  int64_t n_chunks, n_sums;
  float* shares;  // [shares, 3, channels]: gate, shift, scale
  int64_t channels;
  float eps;
  bool rms;
  int threads;
};

// gelu(x), or with `grad` its gradient, of contiguous memory.
struct Gelu {
  DType dtype;
  const void *x, *grad;
  void* out;
  int64_t size;
  int threads;
};

struct Kernels {
  int query_panel;     // queries computed side by side; tiles are made of whole panels
  int max_query_tile;  // queries that share one packed tile of keys and values
  // Each returns 0, or 1 when a work buffer could not be allocated.
  int (*attention[2])(const Attention&);  // by DType
  int (*attention_backward)(const AttentionBackward&);
  int (*qk_norm_rope)(const QkNormRope&);
  int (*qk_norm_rope_backward)(const QkNormRopeBackward&);
  int (*token_op)(const TokenOp&);
  int (*token_op_backward)(const TokenOpBackward&);
  int (*gelu)(const Gelu&);
};

}  // namespace uf
