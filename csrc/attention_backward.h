// Gradients of attention in one pass. A task is a block of keys of one head; it goes through the queries that see the
// block, tile by tile.
//
//   S [query, key] = Q . K^T          dP = dO . V^T            Q, dO read as scalars, K^T and V^T packed once per task
//   P = exp(scale S - lse)            dS = P (dP - delta)      a lane is one key: lse and delta are scalars
//   dV^T [d, key] += dO^T . P         dK^T += Q^T . dS         summed in the task's own panels
//   dQ [query, d] += dS . K                                    summed over tasks, each waiting for its turn
//
// Tasks add to a tile of dQ in the order of their keys, on any thread, and blocks and tiles have fixed sizes and start
// where ranges start (of a causal interval, a block adds 0 to tiles that do not see it): the bits depend neither on threads nor on the rest of the pack. A task only waits for tasks of
// lower number, and tasks start in order of number, so at least one can always proceed.
#pragma once

#include <sched.h>

#include "attention.h"

namespace UF_NAMESPACE {

constexpr int64_t BLOCK = uf::kKeyBlock;
constexpr int64_t TILE = uf::kQueryTile;
constexpr int RQ = 6;  // rows x VQ vectors of dQ in registers, as MR x NR
constexpr int VQ = W >= 16 ? 4 : 2;
static_assert(BLOCK % PANEL == 0 && TILE % MR == 0 && TILE % RQ == 0, "blocks are whole panels, tiles whole registers");

struct BackwardBuffers {
  float *keys_t, *values_t, *dk_t, *dv_t;  // [panel][dim][PANEL]
  float *keys;                             // [BLOCK][stride]
  float *queries, *grads, *dq;             // [TILE][stride]
  float *p, *ds;                           // [TILE][PANEL], [TILE][BLOCK]
  float *lse, *delta;                      // [TILE]
  float* row;
  int64_t dim, padded, stride;  // padded: whole vectors; stride: no power of two, where rows would share cache sets

  static int64_t width(int64_t dim) { return round_up(dim, W) + 16; }
  static int64_t floats(int64_t dim) {
    return 4 * BLOCK * dim + (BLOCK + 3 * TILE + 1) * width(dim) + TILE * (PANEL + BLOCK + 2);
  }
  BackwardBuffers(float* at, int64_t head_dim) : dim(head_dim), padded(round_up(dim, W)), stride(width(dim)) {
    float** panels[] = {&keys_t, &values_t, &dk_t, &dv_t};
    for (float** panel : panels) *panel = at, at += BLOCK * dim;
    keys = at, at += BLOCK * stride;
    queries = at, at += TILE * stride;
    grads = at, at += TILE * stride;
    dq = at, at += TILE * stride;
    p = at, at += TILE * PANEL;
    ds = at, at += TILE * BLOCK;
    lse = at, at += TILE;
    delta = at, at += TILE;
    row = at;
  }
};

// to[column][row]: one more column of a panel.
UF_INLINE void scatter_column(float* to, const float* row, int64_t dim) {
  for (int64_t d = 0; d < dim; d++) to[d * PANEL] = row[d];
}

template <class T>
void pack_block(const uf::AttentionBackward& a, const uf::KeyBlock& block, int64_t head, const BackwardBuffers& b) {
  const int64_t n = block.end - block.begin, lanes = round_up(n, PANEL);
  for (int64_t i = 0; i < lanes * b.dim; i++) b.dk_t[i] = b.dv_t[i] = 0.0f;
  for (int64_t i = 0; i < lanes; i++) {
    const int64_t lane = i / PANEL * PANEL * b.dim + i % PANEL;
    float* key = b.keys + i * b.stride;
    for (int64_t d = 0; d < b.padded; d++) key[d] = b.row[d] = 0.0f;
    if (i < n) {
      widen_row(key, row_of<T>(a.k, block.begin + i, head), b.dim, 1.0f);
      widen_row(b.row, row_of<T>(a.v, block.begin + i, head), b.dim, 1.0f);
    }
    scatter_column(b.keys_t + lane, key, b.dim);
    scatter_column(b.values_t + lane, b.row, b.dim);
  }
}

// Rows up to a multiple of the register block; those past n add zeros to dK and dV.
template <class T>
void load_tile(const uf::AttentionBackward& a, int64_t begin, int64_t n, int64_t head, const BackwardBuffers& b) {
  const int64_t rows = round_up(n, MR);
  for (int64_t i = 0; i < rows; i++) {
    float *query = b.queries + i * b.stride, *grad = b.grads + i * b.stride;
    if (i < n) {
      widen_row(query, row_of<T>(a.q, begin + i, head), b.dim, 1.0f);
      widen_row(grad, row_of<T>(a.grad_out, begin + i, head), b.dim, 1.0f);
    } else {
      for (int64_t d = 0; d < b.dim; d++) query[d] = grad[d] = 0.0f;
    }
    b.lse[i] = i < n ? a.lse[head * a.nq + begin + i] : 0.0f;
    b.delta[i] = i < n ? a.delta[head * a.nq + begin + i] : 0.0f;
  }
  for (int64_t i = rows; i < round_up(n, RQ); i++)
    for (int64_t key = 0; key < BLOCK; key++) b.ds[i * BLOCK + key] = 0.0f;
}

// Scores and dP of one panel -> P and dS.
template <int V>
UF_NOINLINE void differentiate(float* p, float* ds, int64_t n, const float* lse, const float* delta, float scale) {
  const float limit = -100.0f / LOG2E;
  for (int64_t i = 0; i < n; i++)
    for (int j = 0; j < V; j++) {
      float *at_p = p + i * PANEL + j * W, *at_ds = ds + i * BLOCK + j * W;
      // The product rounded as in lse, so that a key that outweighs all others has weight 1 exactly.
      const vf weight = exp2_scaled(separate(load(at_p) * scale) - lse[i], LOG2E, limit);
      store(at_p, weight);
      store(at_ds, weight * (load(at_ds) - delta[i]));
    }
}

// P and dS of keys that a query does not see become 0: query i sees the lanes up to `last` + i.
UF_NOINLINE void hide_lanes(float* p, float* ds, int64_t n, int64_t last) {
  for (int64_t i = 0; i < n; i++)
    for (int64_t lane = last + i < 0 ? 0 : last + i + 1; lane < PANEL; lane++)
      p[i * PANEL + lane] = ds[i * BLOCK + lane] = 0.0f;
}

// out[d][lane] += rows^T [d, query] . x [query, lane]
template <int V>
UF_NOINLINE void add_transposed(const float* rows, int64_t stride, const float* x, int64_t x_stride, float* out,
                                int64_t n, int64_t dim) {
  for (int64_t d = 0; d < dim; d += MR) {
    vf acc[MR][V] = {};
    for (int64_t block = 0; block < n; block += 4)
#pragma GCC unroll 4
      for (int64_t query = block; query < block + 4; query++) {
        vf right[V];
        for (int j = 0; j < V; j++) right[j] = load(x + query * x_stride + j * W);
#pragma GCC unroll 8
        for (int i = 0; i < MR; i++)
          for (int j = 0; j < V; j++) acc[i][j] += rows[query * stride + d + i] * right[j];
      }
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
      for (int j = 0; j < V; j++) {
        float* to = out + (d + i) * PANEL + j * W;
        store(to, load(to) + acc[i][j]);
      }
  }
}

// V vectors of columns of dq [query, d] = ds [query, key] . keys [key, d]
template <int V>
UF_NOINLINE void multiply_rows(const float* ds, const float* keys, float* dq, int64_t stride, int64_t queries,
                               int64_t n) {
  for (int64_t query = 0; query < queries; query += RQ) {
    const float* left = ds + query * BLOCK;
    vf acc[RQ][V] = {};
#pragma GCC unroll 4
    for (int64_t key = 0; key < n; key++) {
      vf right[V];
      for (int j = 0; j < V; j++) right[j] = load(keys + key * stride + j * W);
#pragma GCC unroll 8
      for (int i = 0; i < RQ; i++)
        for (int j = 0; j < V; j++) acc[i][j] += left[i * BLOCK + key] * right[j];
    }
#pragma GCC unroll 8
    for (int i = 0; i < RQ; i++)
      for (int j = 0; j < V; j++) store(dq + (query + i) * stride + j * W, acc[i][j]);
  }
}

template <int V>
void backward_panel(const BackwardBuffers& b, int64_t panel, int64_t queries, int64_t last, float scale, int64_t dot) {
  const int64_t at = panel * PANEL * b.dim;
  float* ds = b.ds + panel * PANEL;
  multiply_keys<V>(b.keys_t + at, b.queries, b.stride, b.p, PANEL, queries, b.dim, dot);
  multiply_keys<V>(b.values_t + at, b.grads, b.stride, ds, BLOCK, queries, b.dim, dot);
  differentiate<V>(b.p, ds, queries, b.lse, b.delta, scale);
  if (last < PANEL - 1) hide_lanes(b.p, ds, queries, last);
  add_transposed<V>(b.grads, b.stride, b.p, PANEL, b.dv_t + at, queries, b.dim);
  add_transposed<V>(b.queries, b.stride, ds, BLOCK, b.dk_t + at, queries, b.dim);
}

// Computes the shares of one tile of queries and one block of keys in all gradients; dq is left in the buffers. Query i
// sees the keys up to `last` + i of the block.
template <class T>
void backward_tile(const uf::AttentionBackward& a, int64_t begin, int64_t n, int64_t end, int64_t keys, int64_t last,
                   int64_t head, const BackwardBuffers& b) {
  load_tile<T>(a, begin, n, head, b);
  const int64_t next = begin + n, next_end = min_of(next + TILE, end), panels = (keys + PANEL - 1) / PANEL;
  const uf::View sum = {a.dq_sum, b.padded, a.nq * b.padded};
  for (int64_t panel = 0; panel < panels; panel++) {
    prefetch_rows<T>(a.q, next, next_end, panel, panels, head, b.dim);
    prefetch_rows<T>(a.grad_out, next, next_end, panel, panels, head, b.dim);
    if (a.dq_sum) prefetch_rows<float>(sum, begin, next, panel, panels, head, b.dim);
    const int64_t left = keys - panel * PANEL, rows = round_up(n, MR), seen = last - panel * PANEL;
    if (left > 2 * W) backward_panel<3>(b, panel, rows, seen, a.scale, DOT<T>);
    else if (left > W) backward_panel<2>(b, panel, rows, seen, a.scale, DOT<T>);
    else backward_panel<1>(b, panel, rows, seen, a.scale, DOT<T>);
  }
  int64_t d = 0;
  for (; d + VQ * W <= b.padded; d += VQ * W) multiply_rows<VQ>(b.ds, b.keys + d, b.dq + d, b.stride, n, keys);
  for (; d < b.padded; d += W) multiply_rows<1>(b.ds, b.keys + d, b.dq + d, b.stride, n, keys);
}

// Adds the dq of a tile after `turn` key blocks have added theirs; the last block stores the result.
template <class T>
void add_dq(const uf::AttentionBackward& a, int64_t begin, int64_t n, int64_t head, int64_t turn, int64_t turns,
            int32_t* done, const BackwardBuffers& b) {
  for (int64_t tries = 0; __atomic_load_n(done, __ATOMIC_ACQUIRE) != turn; tries++)
    if (tries > 64) sched_yield();
  for (int64_t i = 0; i < n; i++) {
    const float* share = b.dq + i * b.stride;
    float* sum = turns > 1 ? a.dq_sum + (head * a.nq + begin + i) * b.padded : nullptr;
    T* to = static_cast<T*>(a.dq) + ((begin + i) * a.heads + head) * b.dim;
    if (turn + 1 < turns) {
      for (int64_t d = 0; d < b.padded; d += W)
        store(sum + d, turn ? load(sum + d) + load(share + d) : load(share + d));
    } else {
      for_row(b.dim, [&](int64_t d, int64_t live) {
        const vf total = turn ? load(sum + d) + load(share + d) : load(share + d);
        store_n(to + d, total * a.scale, live);
      });
    }
  }
  __atomic_store_n(done, static_cast<int32_t>(turn + 1), __ATOMIC_RELEASE);
}

template <class T>
void backward_block(const uf::AttentionBackward& a, const uf::KeyBlock& block, int64_t head, const BackwardBuffers& b) {
  const int64_t keys = block.end - block.begin;
  pack_block<T>(a, block, head, b);
  for (int64_t s = block.first; s < block.last; s++) {
    const uf::QuerySpan& span = a.spans[s];
    for (int64_t i = 0, begin = span.begin; begin < span.end; i++, begin += TILE) {
      const int64_t n = min_of(span.end - begin, TILE);
      const int64_t last = span.causal ? i * TILE - block.index * BLOCK : BLOCK;
      if (last + n > 0) {
        backward_tile<T>(a, begin, n, span.end, keys, last, head, b);
      } else {  // none of its queries sees a key of the block, but the tile waits for its turn
        for (int64_t d = 0; d < n * b.stride; d++) b.dq[d] = 0.0f;
      }
      add_dq<T>(a, begin, n, head, span.before + block.index, span.turns, a.done + head * a.n_tiles + span.tile + i, b);
    }
  }
  for (int64_t i = 0; i < keys; i++) {
    const int64_t lane = i / PANEL * PANEL * b.dim + i % PANEL, at = ((block.begin + i) * a.heads + head) * b.dim;
    write_column(static_cast<T*>(a.dk) + at, b.dk_t + lane, PANEL, b.dim, a.scale, b.row);
    write_column(static_cast<T*>(a.dv) + at, b.dv_t + lane, PANEL, b.dim, 1.0f, b.row);
  }
}

// delta = rowsum(dO * out), the gradient of the softmax's normalisation.
template <class T>
void delta_row(const uf::AttentionBackward& a, int64_t query) {
  for (int64_t head = 0; head < a.heads; head++) {
    const T *grad = row_of<T>(a.grad_out, query, head), *out = row_of<T>(a.out, query, head);
    vf sum = {};
    for_row(a.dim, [&](int64_t d, int64_t n) { sum += load_n(grad + d, n) * load_n(out + d, n); });
    a.delta[head * a.nq + query] = sum_lanes(sum);
  }
}

static int attention_backward(const uf::AttentionBackward& a) {
  int failed = 0;
  int64_t next = 0;
#pragma omp parallel num_threads(a.threads)
  {
    float* memory = scratch.at_least(BackwardBuffers::floats(a.dim));
    if (!memory) {
#pragma omp atomic write
      failed = 1;
    }
#pragma omp for schedule(static)
    for (int64_t query = 0; query < a.nq; query++) {
      if (a.dtype == uf::kFloat32) delta_row<float>(a, query);
      else delta_row<bf16>(a, query);
    }
    // Not an OpenMP loop: those may start iterations in another order. Heads inside blocks, so that neighbouring tasks
    // have nothing to wait for.
    while (memory) {
      const int64_t i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (i >= a.n_blocks * a.heads) break;
      const BackwardBuffers buffers(memory, a.dim);
      if (a.dtype == uf::kFloat32) backward_block<float>(a, a.blocks[i / a.heads], i % a.heads, buffers);
      else backward_block<bf16>(a, a.blocks[i / a.heads], i % a.heads, buffers);
    }
  }
  return failed;
}

}  // namespace UF_NAMESPACE
