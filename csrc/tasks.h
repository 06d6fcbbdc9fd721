// Checks of the tables' values, and the cutting of work into tiles, blocks and chunks. Compiled once, with native.cpp.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <vector>

#include "kernels.h"

namespace uf {

// The codes that uniref_fast/native/library.py turns into errors.
enum Status {
  kOk = 0,
  kNoMemory = 1,
  kBadLevel = 2,
  kBadQueryRange = 3,
  kBadKeyRange = 4,
  kBadRow = 5,
  kBadIndex = 6,
  kBadTranspose = 7,
};

// The tables of an AttentionPlan: range r of rows sees the intervals [ptr[r], ptr[r + 1]) of the other side's rows.
struct Table {
  const int32_t *ranges, *ptr, *intervals;
  int64_t n_ranges, n_intervals;
};

struct Range {
  int64_t begin, end, first, last, keys;
};

// Query ranges that are not empty, sorted by start.
inline int collect_ranges(const Table& table, int64_t nq, int64_t nk, std::vector<Range>& ranges) {
  const int32_t* ptr = table.ptr;
  if (ptr[0] != 0 || ptr[table.n_ranges] != table.n_intervals) return kBadKeyRange;
  for (int64_t r = 0; r < table.n_ranges; r++) {
    const int64_t begin = table.ranges[2 * r], end = table.ranges[2 * r + 1];
    if (begin < 0 || end < begin || end > nq) return kBadQueryRange;
    if (ptr[r] < 0 || ptr[r + 1] < ptr[r] || ptr[r + 1] > table.n_intervals) return kBadKeyRange;
    int64_t keys = 0, previous = 0;
    for (int64_t i = ptr[r]; i < ptr[r + 1]; i++) {
      const Interval seen = interval_at(table.intervals, i);
      if (seen.begin < previous || seen.end < seen.begin || seen.end > nk) return kBadKeyRange;
      if (seen.causal && seen.end - seen.begin != end - begin) return kBadKeyRange;
      keys += seen.end - seen.begin;
      previous = seen.end;
    }
    if (begin < end) ranges.push_back({begin, end, ptr[r], ptr[r + 1], keys});
  }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < ranges.size(); i++)
    if (ranges[i].begin < ranges[i - 1].end) return kBadQueryRange;
  return kOk;
}

// Ranges without keys for the rows between sorted ranges, so that every row is written.
inline void fill_gaps(std::vector<Range>& ranges, int64_t nq) {
  int64_t covered = 0;
  const size_t given = ranges.size();
  for (size_t i = 0; i <= given; i++) {
    const int64_t begin = i < given ? ranges[i].begin : nq;
    if (begin > covered) ranges.push_back({covered, begin, 0, 0, 0});
    if (i < given) covered = ranges[i].end;
  }
}

// Cuts ranges into tiles of whole panels: large, because K and V are packed once per tile, but small enough that every
// thread gets several. The sizes do not change the result (attention.h). Returns the panels of the largest tile.
inline int64_t cut_tiles(const std::vector<Range>& ranges, const Kernels& kernel, int64_t heads, int threads,
                         std::vector<QueryTile>& tiles) {
  const int64_t panel = kernel.query_panel;
  int64_t panels = 0, largest = 1;
  for (const Range& r : ranges) panels += (r.end - r.begin + panel - 1) / panel;
  const int64_t fair = panels * heads / (4 * static_cast<int64_t>(threads));
  const int64_t limit = std::max<int64_t>(1, std::min<int64_t>(kernel.max_query_tile / panel, fair));
  for (const Range& r : ranges) {
    const int64_t count = (r.end - r.begin + panel - 1) / panel, pieces = (count + limit - 1) / limit;
    const int64_t step = (count + pieces - 1) / pieces * panel;
    largest = std::max(largest, step / panel);
    for (int64_t begin = r.begin; begin < r.end; begin += step) {
      const int64_t end = std::min(begin + step, r.end);
      tiles.push_back({begin, end, r.first, r.last, (end - begin) * r.keys, begin - r.begin});
    }
  }
  std::stable_sort(tiles.begin(), tiles.end(),
                   [](const QueryTile& a, const QueryTile& b) { return a.work > b.work; });
  return largest;
}

// The range whose rows are exactly [begin, end), or -1.
inline int64_t find_range(const std::vector<Range>& ranges, int64_t begin, int64_t end) {
  const auto found = std::lower_bound(ranges.begin(), ranges.end(), begin,
                                      [](const Range& range, int64_t row) { return range.begin < row; });
  return found != ranges.end() && found->begin == begin && found->end == end ? found - ranges.begin() : -1;
}

// True if one interval of the range holds the keys [begin, end); a causal one must be these keys, and be wanted.
inline bool sees(const Range& range, const int32_t* intervals, int64_t begin, int64_t end, bool causal) {
  int64_t low = range.first, high = range.last;
  while (low < high) {  // the first interval that ends behind `begin`
    const int64_t middle = (low + high) / 2;
    if (intervals[2 * middle + 1] > begin) high = middle;
    else low = middle + 1;
  }
  if (low == range.last) return false;
  const Interval seen = interval_at(intervals, low);
  if (seen.causal != causal) return false;
  return causal ? seen.begin == begin && seen.end == end : seen.begin <= begin && end <= seen.end;
}

struct BackwardTasks {
  std::vector<KeyBlock> blocks;
  std::vector<QuerySpan> spans;
  int64_t n_tiles = 0;
  bool shared = false;  // some queries see several blocks, so that their dq is a sum
};

// Cuts key ranges into blocks, with the spans of queries that see them. `transpose` must hold the same pairs as the
// sorted `ranges`: each of its pairs is checked to be one of theirs, and their numbers to be equal.
inline int cut_backward(const std::vector<Range>& ranges, const int32_t* kv_ranges, const Table& transpose, int64_t nk,
                         BackwardTasks& tasks) {
  if (transpose.ptr[0] != 0 || transpose.ptr[transpose.n_ranges] != transpose.n_intervals) return kBadTranspose;
  std::vector<int64_t> tile(ranges.size()), turns(ranges.size(), 0), owner;
  int64_t area = 0;
  for (size_t i = 0; i < ranges.size(); i++) {
    tile[i] = tasks.n_tiles;
    tasks.n_tiles += (ranges[i].end - ranges[i].begin + kQueryTile - 1) / kQueryTile;
    area += (ranges[i].end - ranges[i].begin) * ranges[i].keys;
  }
  int64_t covered = 0;
  for (int64_t r = 0; r < transpose.n_ranges; r++) {
    const int64_t begin = transpose.ranges[2 * r], end = transpose.ranges[2 * r + 1];
    if (begin < covered || end < begin || end > nk) return kBadTranspose;
    if (transpose.ptr[r + 1] < transpose.ptr[r] || transpose.ptr[r + 1] > transpose.n_intervals) return kBadTranspose;
    const int64_t blocks = (end - begin + kKeyBlock - 1) / kKeyBlock, first = tasks.spans.size();
    int64_t previous = 0;
    for (int64_t i = transpose.ptr[r]; i < transpose.ptr[r + 1]; i++) {
      const Interval span = interval_at(transpose.intervals, i);
      const int64_t from = span.begin, to = span.end;
      if (from < previous || to < from) return kBadTranspose;
      previous = to;
      if (from == to || begin == end) continue;
      const int64_t range = find_range(ranges, from, to);
      if (range < 0 || !sees(ranges[range], kv_ranges, begin, end, span.causal)) return kBadTranspose;
      tasks.spans.push_back({from, to, span.causal, tile[range], turns[range], 0});
      owner.push_back(range);
      turns[range] += blocks;
      tasks.shared |= turns[range] > 1;
      area -= (end - begin) * (to - from);
    }
    for (int64_t i = 0; i < blocks; i++) {
      const int64_t from = begin + i * kKeyBlock, last = tasks.spans.size();
      if (first < last) tasks.blocks.push_back({from, std::min(from + kKeyBlock, end), first, last, i});
    }
    covered = end;
  }
  if (area != 0) return kBadTranspose;
  for (size_t i = 0; i < owner.size(); i++) tasks.spans[i].turns = turns[owner[i]];
  return kOk;
}

struct TokenChunks {
  std::vector<int32_t> order;
  std::vector<RowChunk> chunks;
  std::vector<RowSum> sums;
  int64_t shares = 0;
};

// Sorts tokens by modulation row (null: all have row 0) and cuts them into chunks. False if a row is out of range.
inline bool chunk_tokens(const int32_t* mod_index, int64_t tokens, int64_t n_rows, TokenChunks& cut) {
  if (n_rows < 1) return tokens == 0;
  std::vector<int64_t> start(n_rows + 1, 0);
  for (int64_t i = 0; i < tokens; i++) {
    const int64_t row = mod_index ? mod_index[i] : 0;
    if (row < 0 || row >= n_rows) return false;
    start[row + 1]++;
  }
  for (int64_t row = 0; row < n_rows; row++) start[row + 1] += start[row];
  cut.order.resize(tokens);
  std::vector<int64_t> at(start.begin(), start.end() - 1);
  for (int64_t i = 0; i < tokens; i++) cut.order[at[mod_index ? mod_index[i] : 0]++] = static_cast<int32_t>(i);
  for (int64_t row = 0; row < n_rows; row++) {
    const int64_t begin = start[row], end = start[row + 1], first = cut.shares;
    const bool single = end - begin <= kChunk;
    for (int64_t i = begin; i < end; i += kChunk)
      cut.chunks.push_back({row, i, std::min(i + kChunk, end), single ? -1 : cut.shares++});
    if (cut.shares > first || begin == end) cut.sums.push_back({row, first, cut.shares});
  }
  return true;
}

inline bool is_permutation(const int32_t* const* index, const int64_t* tokens) {
  std::vector<char> seen(tokens[0] + tokens[1], 0);
  for (int s = 0; s < 2; s++)
    for (int64_t i = 0; i < tokens[s]; i++) {
      const int64_t row = index[s][i];
      if (row < 0 || row >= static_cast<int64_t>(seen.size()) || seen[row]) return false;
      seen[row] = 1;
    }
  return true;
}

}  // namespace uf
