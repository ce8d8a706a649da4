// The row epilogue: from the sums of a tile of rows to values and gradient coefficients, one row per lane.
#pragma once

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

// Writes a field of the lanes [first, first + count) to consecutive rows, and 0 to the ignored ones.
template <class To>
void scatter(const Rows& in, const Vec<double>& v, int64_t row, int64_t count, bool some_ignored, To* out) {
  constexpr int64_t kLanes = Vec<double>::size();
  alignas(64) double lanes[kLanes];
  v.store(lanes);
  if (count == kLanes && !some_ignored) {
    for (int64_t i = 0; i < kLanes; ++i) out[i] = static_cast<To>(lanes[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = ignored(in, row + i) ? To(0) : static_cast<To>(lanes[i]);
  }
}

template <class A>
void store_row_gradient(const Rows& in, const RowGradient<Vec<double>>& g, int64_t row, int64_t count,
                        bool some_ignored, A* out) {
  const int fields = kFieldsOfDepth[static_cast<int>(depth_of(in))];
  for (int k = 0; k < fields; ++k) scatter(in, (&g.max)[k], row, count, some_ignored, out + k * in.rows + row);
}

// Values of the terms and coefficients of the gradient for rows [row, row + count).
template <class A>
void epilogue(const Rows& in, const Program& program, const Tile& tile, int64_t row, int64_t count, double* values,
              A* row_gradient) {
  using V = Vec<double>;
  const bool dense = in.dense_target != nullptr;
  for (int64_t lane = 0; lane < count; lane += V::size()) {
    const int64_t first = row + lane, n = std::min<int64_t>(V::size(), count - lane);
    const bool some_ignored = any_ignored(in, first, n);
    V row_weight(1.0);
    if (in.class_weight != nullptr) {
      alignas(64) double weights[V::size()] = {};
      for (int64_t i = 0; i < n; ++i) weights[i] = label_weight<A>(in, first + i);
      row_weight = V::loadu(weights);
    }

    const Centred<V> c = tile.lanes(lane);
    const Odds<V> odds(c);
    const Statistics<V> s = derive(c, odds, dense);
    Statistics<V> partials;
    for (int64_t k = 0; k < program.size; ++k) {
      const Term& term = program.terms[k];
      const V value =
          term_value<V>(static_cast<TermKind>(term.kind), term.parameter, row_weight, term.scale, s, partials);
      scatter(in, value, first, n, some_ignored, values + k * in.rows + first);
    }
    double* free = values + program.size * in.rows + first;
    scatter(in, s.lse, first, n, some_ignored, free);
    scatter(in, c.target_is_max, first, n, some_ignored, free + in.rows);
    scatter(in, odds.p_target, first, n, some_ignored, free + 2 * in.rows);
    store_row_gradient(in, chain(c, odds, s, partials, in.reads, dense, in.class_weight != nullptr), first, n,
                       some_ignored, row_gradient);
  }
}

}  // namespace
}  // namespace OBJKERN_VARIANT
}  // namespace objkern::cpu
