// What native.cpp (the C ABI, compiled once) hands to level.cpp (the kernels, compiled once per ISA level).
// Plain data only. Strides are in elements. Offsets are 64-bit everywhere: many references make big tensors.
#pragma once

#include <stdint.h>

namespace uf {

enum DType { kFloat32 = 0, kBFloat16 = 1 };

// One stream's [tokens, heads, dim] view; the last dimension is contiguous.
struct View {
  const void* data;
  int64_t token_stride, head_stride;
};

// Rows [begin, end) of q, which see the key intervals [first, last) of kv_ranges.
struct QueryTile {
  int64_t begin, end, first, last, work;
};

struct Attention {
  DType dtype;
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
  int threads;
};

// gate_residual, norm_modulate and both at once: a null pointer leaves the part out.
struct TokenRows {
  DType dtype;
  const void *x, *y, *gate, *shift, *scale;
  void *x_out, *normed;
  int64_t x_stride, y_stride, gate_stride, shift_stride, scale_stride;
  const int32_t* rows;  // null: row 0 for every token
  int64_t tokens, channels;
  float eps;
  int threads;
};

struct Kernels {
  int query_panel;     // queries computed side by side; tiles are made of whole panels
  int max_query_tile;  // queries that share one packed tile of keys and values
  int (*attention)(const Attention&);  // 0, or 1 when a work buffer could not be allocated
  int (*qk_norm_rope)(const QkNormRope&);
  void (*token_rows)(const TokenRows&);
};

}  // namespace uf
