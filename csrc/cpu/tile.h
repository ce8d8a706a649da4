// The row epilogue: from the sums of a tile of rows to values and gradient coefficients, one row per lane.
#pragma once

#include <vector>

#include "kernels.h"
#include "vectors.h"

namespace objkern::cpu {
inline namespace OBJKERN_VARIANT {
namespace {

static_assert(sizeof(Centred<double>) == kCentred * sizeof(double));
static_assert(sizeof(Statistics<double>) == kStatistics * sizeof(double));
static_assert(sizeof(RowGradient<double>) == kRowGradient * sizeof(double));

constexpr int64_t kTile = 16;  // rows that share an epilogue
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// What the passes collect for kTile rows, field by field. Lanes of rows that are not there hold harmless numbers.
struct Tile {
  alignas(64) double field[kCentred][kTile];

  Tile() {
    Centred<double> harmless;
    harmless.sum_e = harmless.classes = 1;
    for (int64_t lane = 0; lane < kTile; ++lane) set(lane, harmless);
  }
  void set(int64_t lane, const Centred<double>& c) {
    for (int k = 0; k < kCentred; ++k) field[k][lane] = (&c.max)[k];
  }
  Centred<Vec<double>> lanes(int64_t first) const {
    Centred<Vec<double>> c;
    for (int k = 0; k < kCentred; ++k) (&c.max)[k] = Vec<double>::loadu(&field[k][first]);
    return c;
  }
};

inline bool ignored(const Rows& in, int64_t row) {
  return in.target != nullptr && in.target[row] == in.ignore_index;
}

inline int64_t label(const Rows& in, int64_t row) {
  return in.target == nullptr ? -1 : in.target[row];
}

template <class A>
double label_weight(const Rows& in, int64_t row) {
  if (in.class_weight == nullptr || in.target == nullptr || ignored(in, row)) return 1.0;
  return static_cast<double>(static_cast<const A*>(in.class_weight)[in.target[row]]);
}

inline bool any_ignored(const Rows& in, int64_t row, int64_t count) {
  bool any = false;
  for (int64_t i = 0; i < count; ++i) any |= ignored(in, row + i);
  return any;
}

inline Depth depth_of(const Rows& in) {
  return objkern::depth_of(in.reads, in.class_weight != nullptr, in.dense_target != nullptr);
}

inline int row_gradient_fields(const Rows& in) {
  return objkern::row_gradient_fields(in.reads, in.class_weight != nullptr, in.dense_target != nullptr);
}

// Writes a field of the lanes [first, first + count) to consecutive rows, and 0 to the ignored ones.
template <class To>
void scatter(const Rows& in, const Vec<double>& v, int64_t row, int64_t count, bool some_ignored, To* out) {
  constexpr int64_t kLanes = Vec<double>::size();
  if (count == kLanes && !some_ignored) return store_as(v, out);
  alignas(64) double lanes[kLanes];
  v.store(lanes);
  for (int64_t i = 0; i < count; ++i) out[i] = ignored(in, row + i) ? To(0) : static_cast<To>(lanes[i]);
}

template <class A>
void store_row_gradient(const Rows& in, const RowGradient<Vec<double>>& g, int64_t row, int64_t count,
                        bool some_ignored, A* out) {
  const int fields = row_gradient_fields(in);
  for (int k = 0; k < fields; ++k) scatter(in, (&g.max)[k], row, count, some_ignored, out + k * in.rows + row);
}

// Where the values of a batch go: of every row to (size + kFreeStatistics, rows), or summed by tile. The sums of the
// tiles are added in their order; tiles depend on the shape alone, so the sum is the same for any number of threads.
struct Values {
  const Rows& in;
  const bool per_row;
  const int64_t fields, rows_per_tile;
  double* const out;
  std::vector<double> of_tiles;

  Values(const Rows& rows, const Program& program, int64_t tile, double* values)
      : in(rows),
        per_row(program.per_row),
        fields(program.size + kFreeStatistics),
        rows_per_tile(tile),
        out(values),
        of_tiles(per_row ? 0 : (rows.rows + tile - 1) / tile * fields) {}

  // A vector of field k for rows [row, row + count); `counts` marks the lanes that are rows and not ignored.
  void put(int64_t k, const Vec<double>& v, int64_t row, int64_t count, bool all, const Vec<double>& counts) {
    if (per_row) {
      scatter(in, v, row, count, !all, out + k * in.rows + row);
    } else {
      of_tiles[row / rows_per_tile * fields + k] +=
          horizontal_sum(all ? v : Vec<double>::blendv(Vec<double>(0.0), v, counts));
    }
  }

  void finish() {
    if (per_row) return;
    std::fill(out, out + fields, 0.0);
    for (size_t i = 0; i < of_tiles.size(); i += fields)
      for (int64_t k = 0; k < fields; ++k) out[k] += of_tiles[i + k];
  }
};

// Values of the terms and coefficients of the gradient for rows [row, row + count).
template <class A>
void epilogue(const Rows& in, const Program& program, const Tile& tile, int64_t row, int64_t count, Values& values,
              A* row_gradient) {
  using V = Vec<double>;
  const bool dense = in.dense_target != nullptr;
  const int64_t reads = in.reads | (in.free_statistics ? kLse : 0);
  for (int64_t lane = 0; lane < count; lane += V::size()) {
    const int64_t first = row + lane, n = std::min<int64_t>(V::size(), count - lane);
    const bool some_ignored = any_ignored(in, first, n), all = n == V::size() && !some_ignored;
    V row_weight(1.0), counts(0.0);
    if (in.class_weight != nullptr) {
      alignas(64) double weights[V::size()] = {};
      for (int64_t i = 0; i < n; ++i) weights[i] = label_weight<A>(in, first + i);
      row_weight = V::loadu(weights);
    }
    if (!all) {
      alignas(64) double there[V::size()] = {};
      for (int64_t i = 0; i < n; ++i) there[i] = !ignored(in, first + i);
      counts = V::loadu(there) == V(1.0);
    }

    const Centred<V> c = tile.lanes(lane);
    const Odds<V> odds(c);
    const Statistics<V> s = derive(c, odds, dense, reads);
    Statistics<V> partials;
    for (int64_t k = 0; k < program.size; ++k) {
      const Term& term = program.terms[k];
      const V value =
          term_value<V>(static_cast<TermKind>(term.kind), term.parameter, row_weight, term.scale, s, partials);
      values.put(k, value, first, n, all, counts);
    }
    if (in.free_statistics) {
      values.put(program.size, s.lse, first, n, all, counts);
      values.put(program.size + 1, c.target_is_max, first, n, all, counts);
      values.put(program.size + 2, odds.p_target, first, n, all, counts);
    }
    store_row_gradient(in, chain(c, odds, s, partials, in.reads, dense, in.class_weight != nullptr), first, n,
                       some_ignored, row_gradient);
  }
}

}  // namespace
}  // namespace OBJKERN_VARIANT
}  // namespace objkern::cpu
