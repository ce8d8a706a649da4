// The divergence of rows from those of a reference, before the kernels over rows, which read what is left here.
//
//   segment of a row: z and r ──▶ their maxima, across the block ──▶ the sums, relative to the largest so far
//
// The second look at a segment finds it in the cache. See ../divergence.h.
#pragma once

#include "beside.h"
#include "epilogue.h"

namespace objkern::cuda {

constexpr int kCompareThreads = 256;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kCompareBlocks = 3;  // of a multiprocessor; with four, two words of half-precision kernels would spill
#else
constexpr int kCompareBlocks = 4;
#endif
#ifdef OBJKERN_EMULATED
constexpr int kCompareSegment = 96;  // columns, so that the tests' short rows have several
#else
constexpr int kCompareSegment = 1 << 13;
#endif

struct CompareCall {
  Rows rows;
  Scalar logit_scale;
  void* found = nullptr;  // (kDivergence, rows) of A; of ignored rows nothing
};

// f(z, r) for this thread's share of columns [begin, end), a vector or a single one at a time.
template <class T, bool kTransform, class F>
OBJKERN_DEVICE void each_pair(const T* x, const Beside<T>& beside,
                              const Transform<Accumulation<T>, kTransform>& transform, int begin, int end, const F& f) {
  using A = Accumulation<T>;
  constexpr int kVector = Element<T>::kVector;
  const int thread = thread_index(), threads = block_threads();
  const Walk w = walk(x, begin, end);
  for (int v = thread; v < w.vectors; v += threads) {
    A z[kVector], r[kVector];
    unpack<T>(load128(x + w.body + v * kVector), z);
    beside.load(w.body + v * kVector, r);
#pragma unroll
    for (int i = 0; i < kVector; ++i) z[i] = transform(z[i]);
    f(z, r);
  }
  const auto one = [&](int j) {
    const A z[1] = {transform(widen(x[j]))}, r[1] = {beside.at(j)};
    f(z, r);
  };
  for (int j = w.begin + thread; j < w.body; j += threads) one(j);
  for (int j = w.body + w.vectors * kVector + thread; j < w.end; j += threads) one(j);
}

struct CompareShared {
  double sums[kCompareThreads / kWarp][6];
  double max_z[kCompareThreads / kWarp], max_r[kCompareThreads / kWarp];
};

// kReverse: whether KL(p ‖ q) is read. No branch depends on a class, so that the classes of a vector overlap.
template <class T, bool kTransform, bool kReverse>
OBJKERN_KERNEL(kCompareThreads, (sizeof(T) == 8 ? 1
                                 : kTransform   ? 2
                                                : kCompareBlocks))
compare_kernel(OBJKERN_ARGUMENT CompareCall call) {
  using A = Accumulation<T>;
  CompareShared& shared = *reinterpret_cast<CompareShared*>(shared_memory());
  const Rows& rows = call.rows;
  const Transform<A, kTransform> transform(rows, call.logit_scale);
  const ExpOver<T> exp_over(rows.temperature);
  const A low = A(-kInfinity);
  const int warp = thread_index() / kWarp, warps = block_threads() / kWarp;
  const auto finite = [low](A max) { return max == low ? A(0) : max; };

  for (int64_t row = block_index(); row < rows.rows; row += block_count()) {
    const Label label(rows, row);
    if (label.ignored) continue;
    const T* const x = static_cast<const T*>(rows.logits) + row * rows.row_stride;
    const Beside<T> beside{rows, row};
    DivergenceSums<A> sums;
    A top_z = low, top_r = low;
    for (int begin = 0; begin < rows.classes; begin += kCompareSegment) {
      const int end = min(begin + kCompareSegment, static_cast<int>(rows.classes));
      A max_z = low, max_r = low;
      each_pair(x, beside, transform, begin, end, [&]<int kCount>(const A(&z)[kCount], const A(&r)[kCount]) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          max_z = larger(max_z, z[i]);
          max_r = larger(max_r, z[i] == low ? low : r[i]);
        }
      });
      for (int step = kWarp / 2; step > 0; step /= 2) {
        max_z = larger(max_z, shuffle_xor(max_z, step));
        max_r = larger(max_r, shuffle_xor(max_r, step));
      }
      if (thread_index() % kWarp == 0) {
        shared.max_z[warp] = static_cast<double>(max_z);
        shared.max_r[warp] = static_cast<double>(max_r);
      }
      block_sync();
      max_z = top_z;
      max_r = top_r;
      for (int i = 0; i < warps; ++i) {
        max_z = larger(max_z, static_cast<A>(shared.max_z[i]));
        max_r = larger(max_r, static_cast<A>(shared.max_r[i]));
      }
      block_sync();
      if (top_z != low && (max_z != top_z || max_r != top_r)) {
        const double per = 1.0 / rows.temperature;
        Raise((static_cast<double>(max_z) - static_cast<double>(top_z)) * per,
              (static_cast<double>(max_r) - static_cast<double>(top_r)) * per)
            .apply<A>(sums);
      }
      top_z = max_z;
      top_r = max_r;
      const A base_z = finite(top_z), base_r = finite(top_r), apart = base_r - base_z;
      // Differences of half-precision logits from their maximum are exact, or as good as that.
      const bool far = (sizeof(T) == 2 && !kTransform) || far_apart(base_z, base_r);
      each_pair(x, beside, transform, begin, end, [&]<int kCount>(const A(&z)[kCount], const A(&r)[kCount]) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const bool out = z[i] == low;
          const A t_r = (out ? low : r[i]) - base_r, t_z = z[i] - base_z;
          const A d = (far ? t_r - t_z : (r[i] - z[i]) - apart) * exp_over.by;
          add_class<sizeof(A) == 8, kReverse>(sums, exp_over(t_r), exp_over(t_z), d);  // of an excluded class e = f = 0
        }
      });
    }

    double fields[6] = {sums.e, sums.f, sums.ed, sums.eg, sums.fd, sums.fg};
#pragma unroll
    for (int k = 0; k < 6; ++k) {
      for (int step = kWarp / 2; step > 0; step /= 2) fields[k] += shuffle_xor(fields[k], step);
      if (thread_index() % kWarp == 0) shared.sums[warp][k] = fields[k];
    }
    block_sync();
    if (thread_index() == 0) {
      double whole[6] = {};
      for (int i = 0; i < warps; ++i)
        for (int k = 0; k < 6; ++k) whole[k] += shared.sums[i][k];
      DivergenceSums<double> all;
      all.max_z = finite(top_z), all.max_r = finite(top_r);
      all.e = whole[0], all.f = whole[1], all.ed = whole[2], all.eg = whole[3], all.fd = whole[4], all.fg = whole[5];
      const Divergence<double> found = divergence(all, 1.0 / rows.temperature);
      const double* const numbers = &found.max_z;
      for (int k = 0; k < kDivergence; ++k)
        static_cast<A*>(call.found)[k * rows.rows + row] = static_cast<A>(numbers[k]);
    }
    block_sync();
  }
}

}  // namespace objkern::cuda
