// The kernels that write a gradient from the coefficients that an earlier launch kept, and the one that makes those
// coefficients from the partial derivatives of the statistics.
//
// A row whose label was bad is NaN by what was kept of it. Here a label outside the classes is that of a class that
// another part of the vocabulary has: the row counts, and none of its elements is the target.
#pragma once

#include "affine.h"
#include "epilogue.h"

namespace objkern::cuda {

constexpr int kGradientThreads = 256;
constexpr int kGradientBlocks = 4;  // of a multiprocessor at once, which leaves 64 registers
constexpr int kSegment = 1 << 14;   // columns of a row that a block writes in one go

struct GradientCall {
  Rows rows;
  Scalar logit_scale;
  const void* row_gradient = nullptr;
  int fields = 0;
  const void* upstream = nullptr;
  int64_t upstream_stride = 0;
  bool unless_one = false;
  void* gradient = nullptr;
  int lanes = 0;         // that share a row; 0: a block for each segment
  int64_t segments = 1;  // of a row
  int64_t items = 0;     // segments, or groups of rows that a block has at once
};

// The first of the others that attains the maximum, as this thread sees it.
template <class T, bool kTransform>
OBJKERN_DEVICE int first_at(const T* x, int classes, int target, Accumulation<T> max,
                            const Transform<Accumulation<T>, kTransform>& transform, int thread, int threads) {
  int first = std::numeric_limits<int>::max();
  for (int j = thread; j < classes && first == std::numeric_limits<int>::max(); j += threads)
    if (j != target && transform(widen(x[j])) == max) first = j;
  return first;
}

template <class A>
OBJKERN_DEVICE RowGradient<A> load_row_gradient(const GradientCall& call, int64_t row) {
  RowGradient<A> g;
  A* const fields = &g.max;
  const A* const from = static_cast<const A*>(call.row_gradient) + row;
#pragma unroll
  for (int k = 0; k < kRowGradient; ++k)
    if (k < call.fields) fields[k] = from[k * call.rows.rows];
  return g;
}

template <class T, class G, Depth kDepth, bool kTransform>
OBJKERN_KERNEL(kGradientThreads, (sizeof(T) == 8                         ? 1
                                  : kDepth == Depth::kFull || kTransform ? 2
                                                                         : kGradientBlocks))
gradient_kernel(OBJKERN_ARGUMENT GradientCall call) {
  using A = Accumulation<T>;
  const Rows& rows = call.rows;
  const A* const upstream = static_cast<const A*>(call.upstream);
  if (call.unless_one && *upstream == A(1)) return;
  const int classes = static_cast<int>(rows.classes);
  const bool whole_blocks = call.lanes == 0;
  const int threads = whole_blocks ? kGradientThreads : call.lanes, slots = kGradientThreads / threads;
  const int thread = thread_index() % threads, slot = thread_index() / threads;
  const Transform<A, kTransform> transform(rows, call.logit_scale);
  int* const shared = reinterpret_cast<int*>(shared_memory());

  for (int64_t item = block_index(); item < call.items; item += block_count()) {
    const int64_t row_ = whole_blocks ? item / call.segments : item * slots + slot;
    const bool there = row_ < rows.rows;
    const int64_t row = there ? row_ : 0;
    const int begin = whole_blocks ? static_cast<int>(item % call.segments) * kSegment : 0;
    const int end = whole_blocks && kDepth != Depth::kFull ? min(begin + kSegment, classes) : classes;
    const Label label(rows, row);
    const T* const x = static_cast<const T*>(rows.logits) + row * rows.row_stride;
    const RowGradient<A> g = load_row_gradient<A>(call, row);
    int place = -1;                          // nowhere
    if constexpr (kDepth == Depth::kFull) {  // whole rows
      const bool searches = there && !label.ignored && g.max_grad != A(0);
      if (searches) place = first_at(x, classes, label.column, g.max, transform, thread, threads);
      for (int step = min(threads, kWarp) / 2; step > 0; step /= 2) place = min(place, shuffle_xor(place, step));
      if (whole_blocks) {
        if (thread % kWarp == 0) shared[thread / kWarp] = place;
        block_sync();
        for (int warp = 0; warp < kGradientThreads / kWarp; ++warp) place = min(place, shared[warp]);
        block_sync();
      }
    }
    if (!there) continue;
    G* const out = static_cast<G*>(call.gradient) + row * rows.classes;
    if (label.ignored) {
      write_zeros(out, begin, end, thread, threads);
      continue;
    }
    const Affine<T, G, kDepth, kTransform> affine(rows, transform, row, label.column, place,
                                                  upstream[row * call.upstream_stride], g);
    affine.write(x, out, begin, end, thread, threads);
  }
}

struct ChainCall {
  Rows rows;
  const double* centred = nullptr;
  const double* partials = nullptr;
  void* row_gradient = nullptr;
};

constexpr int kChainThreads = 128;

template <class A>
OBJKERN_KERNEL(kChainThreads, 1)
chain_kernel(OBJKERN_ARGUMENT ChainCall call) {
  const Rows& rows = call.rows;
  const int64_t row = static_cast<int64_t>(block_index()) * kChainThreads + thread_index();
  if (row >= rows.rows) return;
  const Label label(rows, row);
  Centred<double> c;
  Statistics<double> f;
  double *const sums = &c.max, *const partials = &f.logprob;
#pragma unroll
  for (int k = 0; k < kCentred; ++k) sums[k] = call.centred[k * rows.rows + row];
#pragma unroll
  for (int k = 0; k < kStatistics; ++k) partials[k] = call.partials[k * rows.rows + row];
  const Odds<double> odds(c);
  const bool dense = rows.dense_target != nullptr;
  const RowGradient<double> g =
      chain(c, odds, derive(c, odds, dense, rows.reads), f, rows.reads, dense, rows.class_weight != nullptr);
  const double* const fields = &g.max;
#pragma unroll
  for (int k = 0; k < kRowGradient; ++k) {
    static_cast<A*>(call.row_gradient)[k * rows.rows + row] = static_cast<A>(label.ignored ? 0.0 : fields[k]);
  }
}

// How many labels count, and the sum of their weights, for each of at most kMostCounts equal shares of the rows; and
// the ticket at its beginning.
template <class A>
OBJKERN_KERNEL(kCountThreads, 1)
count_kernel(OBJKERN_ARGUMENT RowCall call) {
  const Rows& rows = call.rows;
  const int64_t share = (rows.rows + block_count() - 1) / block_count(), begin = block_index() * share;
  const int64_t end = begin + share < rows.rows ? begin + share : rows.rows;
  Count count = {0, 0};
  for (int64_t row = begin + thread_index(); row < end; row += kCountThreads) {
    const int64_t y = rows.target == nullptr ? -1 : rows.target[row];
    if (rows.target != nullptr && y == rows.ignore_index) continue;
    count.rows += 1;
    if (rows.target == nullptr || rows.class_weight == nullptr) {
      count.weight += 1;
    } else {  // a bad label reads the nearest weight; its row is NaN anyway
      const int64_t column = y < 0 ? 0 : y < rows.classes ? y : rows.classes - 1;
      count.weight += static_cast<double>(static_cast<const A*>(rows.class_weight)[column]);
    }
  }
  for (int step = kWarp / 2; step > 0; step /= 2) {
    count.rows += shuffle_xor(count.rows, step);
    count.weight += shuffle_xor(count.weight, step);
  }
  Count* const of_warps = reinterpret_cast<Count*>(shared_memory());
  if (thread_index() % kWarp == 0) of_warps[thread_index() / kWarp] = count;
  block_sync();
  if (thread_index() != 0) return;
  for (int warp = 1; warp < kCountThreads / kWarp; ++warp) {
    count.rows += of_warps[warp].rows;
    count.weight += of_warps[warp].weight;
  }
  Header& header = *call.header();
  header.count[block_index()] = count;
  if (block_index() == 0) {
    header.ticket = 0;
    header.counts = static_cast<uint32_t>(block_count());
  }
}

}  // namespace objkern::cuda
