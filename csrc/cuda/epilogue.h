// From the centred sums of a row to the values of its terms and the coefficients of its gradient, and from the values
// of the rows to the loss.
#pragma once

#include "call.h"

namespace objkern::cuda {

// What the passes of a depth can serve; masking with it leaves out, at compile time, what they cannot.
OBJKERN_DEVICE constexpr int64_t readable(Depth depth) {
  int64_t reads = kLogprob | kOtherLogprob | kLse | kTargetLogit;
  if (depth >= Depth::kEntropy) reads |= kEntropy | kMeanLogprob;
  if (depth >= Depth::kSquare) reads |= kMeanSquareLogit;
  return depth == Depth::kFull ? int64_t{kEverything} : reads;
}

// A row's label as kernels use it. One that is out of range is never used to read.
struct Label {
  int column = -1;  // −1: no target
  bool ignored = false;
  bool bad = false;

  OBJKERN_DEVICE Label(const Rows& rows, int64_t row) {
    if (rows.target == nullptr) return;
    const int64_t y = rows.target[row];
    ignored = y == rows.ignore_index;
    bad = !ignored && (y < 0 || y >= rows.classes);
    column = ignored || bad ? -1 : static_cast<int>(y);
  }
};

// The denominators of a mean, from the counts of the labels: cross-entropy divides by the weight of its labels, every
// other term by the number of rows that count; a normalizer replaces both. By the first warp of a block.
template <class S>
OBJKERN_DEVICE void share_scales(const RowCall& call, S& shared) {
  const int lane = thread_index();
  const Program& program = call.program;
  const Header& header = *call.header();
  double rows = 0, weight = 0;
  const int counts = program.reduction == Reduction::kNone ? 0 : static_cast<int>(header.counts);
  for (int i = lane; i < counts; i += kWarp) {
    rows += header.count[i].rows;
    weight += header.count[i].weight;
  }
  for (int step = kWarp / 2; step > 0; step /= 2) {
    rows += shuffle_xor(rows, step);
    weight += shuffle_xor(weight, step);
  }
  if (lane == 0) shared.counted = rows;
  for (int k = lane; k < program.size; k += kWarp) {
    const Term& term = program.terms[k];
    const bool of_labels = static_cast<TermKind>(term.kind) == TermKind::kCrossEntropy && call.rows.target != nullptr;
    double denominator = 1;
    if (program.has_normalizer) {
      denominator = number(program.normalizer);
    } else if (program.reduction == Reduction::kMean && !(program.empty_zero && rows == 0)) {
      denominator = of_labels ? weight : rows;
    }
    const double factor = program.factors == nullptr ? 1.0 : program.factors[k];
    shared.denominator[k] = denominator;
    shared.scale[k] = term.scale * factor / denominator;
  }
}

// The values of a row go to put(quantity, value); returns the coefficients of its gradient.
template <Depth kDepth, class A, class F>
OBJKERN_DEVICE RowGradient<A> row_epilogue(const RowCall& call, const double* scale, const Centred<A>& c,
                                           A label_weight, bool bad, const F& put) {
  const Rows& rows = call.rows;
  const Program& program = call.program;
  const bool dense = kDepth == Depth::kFull && rows.dense_target != nullptr;
  const bool weighted_classes = kDepth == Depth::kFull && rows.class_weight != nullptr;
  const int64_t reads = rows.reads & readable(kDepth);
  const A nan = std::numeric_limits<A>::quiet_NaN();
  const Odds<A> odds(c);
  const Statistics<A> s = derive(c, odds, dense, reads | (program.with_parts ? kLse : 0));
  Statistics<A> partials;
  double total = 0;
  for (int k = 0; k < program.size; ++k) {
    const Term& term = program.terms[k];
    A value = term_value<A>(static_cast<TermKind>(term.kind), term.parameter, label_weight, scale[k], s, partials,
                            -odds.nlp_target_low);
    if (bad) value = nan;
    total += scale[k] * static_cast<double>(value);
    if (program.with_parts) put(1 + k, value);
  }
  put(0, static_cast<A>(total));
  if (program.with_parts) {
    put(1 + program.size, bad ? nan : s.lse);
    put(2 + program.size, bad ? A(0) : c.target_is_max);
    put(3 + program.size, bad ? nan : odds.p_target);
  }
  RowGradient<A> g = chain(c, odds, s, partials, reads, dense, weighted_classes);
  if (bad) g.max = g.exp_1 = g.const_1 = nan;
  return g;
}

template <class A>
OBJKERN_DEVICE void store_row_gradient(const RowCall& call, const RowGradient<A>& g, int64_t row) {
  A* out = static_cast<A*>(call.results.row_gradient) + row;
  const A* fields = &g.max;
#pragma unroll
  for (int k = 0; k < kRowGradient; ++k)
    if (k < call.fields) out[k * call.rows.rows] = fields[k];
}

template <class A>
OBJKERN_DEVICE A label_weight(const Rows& rows, const Label& label) {
  if (rows.class_weight == nullptr || label.column < 0) return A(1);
  return static_cast<const A*>(rows.class_weight)[label.column];
}

// What the comparison with a reference found of the row.
template <Depth kDepth, class A>
OBJKERN_DEVICE void load_divergence(const RowCall& call, int64_t row, Centred<A>& c) {
  if (kDepth != Depth::kFull || call.divergence == nullptr) return;
  A* const numbers = &c.reference.max_z;
#pragma unroll
  for (int k = 0; k < kDivergence; ++k) numbers[k] = static_cast<const A*>(call.divergence)[k * call.rows.rows + row];
}

template <class A>
OBJKERN_DEVICE void store_statistics(const RowCall& call, const Centred<A>& c, bool bad, int64_t row) {
  const Statistics<A> s = derive(c, Odds<A>(c), call.rows.dense_target != nullptr, call.rows.reads);
  const A *centred = &c.max, *statistics = &s.logprob;
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (int k = 0; k < kCentred; ++k)
    call.centred[k * call.rows.rows + row] = bad ? nan : static_cast<double>(centred[k]);
  for (int k = 0; k < kStatistics; ++k)
    call.statistics[k * call.rows.rows + row] = bad ? nan : static_cast<double>(statistics[k]);
}

OBJKERN_DEVICE void store_no_statistics(const RowCall& call, int64_t row) {
  for (int k = 0; k < kCentred; ++k) call.centred[k * call.rows.rows + row] = 0;
  for (int k = 0; k < kStatistics; ++k) call.statistics[k * call.rows.rows + row] = 0;
}

// Unreduced values: quantity 0 is the loss, the others are the parts.
template <class A>
OBJKERN_DEVICE void store_value(const RowCall& call, int quantity, int64_t row, A value) {
  if (quantity == 0) {
    static_cast<A*>(call.results.loss)[row] = value;
  } else {
    static_cast<A*>(call.results.parts)[(quantity - 1) * call.rows.rows + row] = value;
  }
}

// Every block of a launch that reduces ends here, with its sums in `values`, quantities × slots; the last one to come
// adds up what the others left, in the order of the teams.
template <class A, class S>
OBJKERN_DEVICE void finish(const RowCall& call, S& shared, int64_t team, int slots) {
  const Program& program = call.program;
  const int count = quantities(program), thread = thread_index(), threads = block_threads();
  double* const sums = call.team_sums();
  block_sync();
  for (int q = thread; q < count; q += threads) {
    double sum = 0;
    for (int slot = 0; slot < slots; ++slot) sum += shared.values()[q * slots + slot];
    sums[q * call.teams + team] = sum;
  }
  block_sync();
  if (thread == 0) shared.last = take_ticket(&call.header()->ticket) + 1 == static_cast<uint32_t>(call.teams);
  block_sync();
  if (!shared.last) return;
  for (int q = 0; q < count; ++q) {
    double sum = 0;
    for (int64_t i = thread; i < call.teams; i += threads) sum += load_shared_by_blocks(sums + q * call.teams + i);
    for (int step = kWarp / 2; step > 0; step /= 2) sum += shuffle_xor(sum, step);
    double* const of_warps = shared.values();
    if (thread % kWarp == 0) of_warps[thread / kWarp] = sum;
    block_sync();
    if (thread == 0) {
      double whole = 0;
      for (int warp = 0; warp < threads / kWarp; ++warp) whole += of_warps[warp];
      A* const parts = static_cast<A*>(call.results.parts);
      if (q == 0) {
        for (int k = 0; shared.counted == 0 && k < program.size; ++k) whole += 0 * shared.scale[k];  // 0/0 is NaN
        *static_cast<A*>(call.results.loss) = static_cast<A>(whole);
      } else if (q <= program.size) {
        parts[q - 1] = static_cast<A>(whole / shared.denominator[q - 1]);
      } else {
        parts[q - 1] = static_cast<A>(whole / shared.counted);
      }
      if (program.with_parts && q == 0) parts[program.size + kFreeStatistics] = static_cast<A>(shared.counted);
    }
    block_sync();
  }
}

}  // namespace objkern::cuda
