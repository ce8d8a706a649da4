// The doors of the CPU backend: who works on which rows. Compiled once per instruction set:
//
//   g++ -O3 -std=c++20 -I$TORCH/include -DCPU_CAPABILITY=AVX2 -DCPU_CAPABILITY_AVX2 -DOBJKERN_VARIANT=avx2
//       -mavx2 -mfma -mf16c -c csrc/cpu/kernels.cpp
//
// Rows of few classes lie one per lane (narrow.h), the others fill vectors by themselves (wide.h); the sums of a tile
// of rows pass through the row epilogue (tile.h), and the gradient is written from the logits.
#include "kernels.h"

#include <ATen/Parallel.h>

#include <cstring>
#include <vector>

#include "elementwise.h"
#include "narrow.h"
#include "tile.h"
#include "vectors.h"
#include "wide.h"

namespace objkern::cpu {
inline namespace OBJKERN_VARIANT {
namespace {

constexpr int64_t kGrain = 16384;  // elements that are worth a task of their own

template <class F>
void with_types(const Rows& in, const F& f) {
  with_element_types(in.dtype, in.dense_target == nullptr || in.dense_dtype == in.dtype, f);
}

int64_t rows_per_tile(const Rows& in) {  // as many rows as the second-level cache keeps until their gradient is written
  return std::clamp<int64_t>((int64_t{256} << 10) / (4 * in.classes), 1, kTile);
}

// Few long rows: fewer than keep every thread busy, each of several segments.
constexpr int64_t kMostSplit = 512;
bool split_rows(const Rows& in) {
  return in.rows < std::min<int64_t>(4 * at::get_num_threads(), kMostSplit) && in.classes >= 2 * kSegment;
}

// f(narrow kernel, row, count) for every group of rows.
template <class T, class D, class F>
void over_groups(const Rows& in, const F& f) {
  constexpr int64_t kLanes = Narrow<T, T>::kLanes;
  at::parallel_for(0, (in.rows + kLanes - 1) / kLanes, std::max<int64_t>(1, kGrain / (kLanes * in.classes)),
                   [&](int64_t begin, int64_t end) {
                     Narrow<T, D> kernel(in);
                     for (int64_t i = begin; i < end; ++i)
                       f(kernel, i * kLanes, std::min(kLanes, in.rows - i * kLanes));
                   });
}

// What is collected of a row, segment by segment.
struct Found {
  Piece others;
  DivergenceSums<double> beside;  // the reference

  template <class K>
  static Found of(K& kernel, int64_t row, int64_t segment, int64_t lane) {
    return {kernel.collect_segment(row, segment, lane), kernel.compare_segment(row, segment)};
  }
  void add(const Rows& in, const Found& more) {
    others = merge(others, more.others);
    if (in.reference != nullptr) beside = merge(beside, more.beside, 1.0 / in.temperature);
  }
};

// Collects every row and calls consume(kernel, tile, row, count) for each tile of them. `keep`: the kernel may keep for
// the gradient what it computes for the sums.
template <class K, class F>
void collect_wide(const Rows& in, bool keep, const F& consume) {
  if (!split_rows(in)) {
    const int64_t rows = rows_per_tile(in);
    const int64_t tiles = (in.rows + rows - 1) / rows;
    at::parallel_for(0, tiles, std::max<int64_t>(1, kGrain / (rows * in.classes)), [&](int64_t begin, int64_t end) {
      K kernel(in);
      // What is kept changes the last digit, so it must not hang on the number of threads: only rows that none splits.
      if (keep && in.rows >= kMostSplit && kernel.can_keep(rows)) kernel.keep(rows);
      Tile tile;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i * rows, count = std::min(rows, in.rows - row);
        for (int64_t lane = 0; lane < count; ++lane) {
          if (ignored(in, row + lane)) continue;
          Found found;
          for (int64_t s = 0; s < kernel.segments(); ++s) found.add(in, Found::of(kernel, row + lane, s, lane));
          tile.set(lane, kernel.centre(row + lane, found.others, found.beside));
        }
        consume(kernel, tile, row, count);
      }
      finish_stores();
    });
    return;
  }
  const int64_t segments = (in.classes + kSegment - 1) / kSegment;
  std::vector<Found> pieces(in.rows * segments);
  at::parallel_for(0, in.rows * segments, 1, [&](int64_t begin, int64_t end) {
    K kernel(in);
    for (int64_t i = begin; i < end; ++i)
      if (!ignored(in, i / segments)) pieces[i] = Found::of(kernel, i / segments, i % segments, 0);
  });
  K kernel(in);
  const int64_t rows = rows_per_tile(in);
  for (int64_t row = 0; row < in.rows; row += rows) {
    Tile tile;
    const int64_t count = std::min(rows, in.rows - row);
    for (int64_t lane = 0; lane < count; ++lane) {
      if (ignored(in, row + lane)) continue;
      Found found;
      for (int64_t s = 0; s < segments; ++s) found.add(in, pieces[(row + lane) * segments + s]);
      tile.set(lane, kernel.centre(row + lane, found.others, found.beside));
    }
    consume(kernel, tile, row, count);
  }
}

// Collects every row and calls consume(kernel, tile, row, count) for each tile of them.
template <class T, class D, class F>
void collect(const Rows& in, bool keep, const F& consume) {
  if (narrow(in)) {
    over_groups<T, D>(in, [&](auto& kernel, int64_t row, int64_t count) {
      kernel.collect(row, count);
      consume(kernel, kernel.tile, row, count);
    });
  } else {
    collect_wide<Wide<T, D>>(in, keep, consume);
  }
}

template <class T>
int64_t tile_of(const Rows& in) {
  return narrow(in) ? Narrow<T, T>::kLanes : rows_per_tile(in);
}

template <class K>
void write_row(const K& kernel, const typename K::A* row_gradient, typename K::A upstream, int64_t row, int64_t begin,
               int64_t end, typename K::Element* gradient, int64_t lane = 0) {
  typename K::Element* out = gradient + row * kernel.n;
  if (ignored(kernel.in, row)) {
    std::memset(static_cast<void*>(out + begin), 0, (end - begin) * sizeof *out);
  } else {
    kernel.write(row, kernel.coefficients(row_gradient, row), upstream, begin, end, out, lane);
  }
}

template <class K>
void write_wide(const Rows& in, const typename K::A* row_gradient, const typename K::A* upstream, int64_t stride,
                typename K::Element* gradient) {
  const int64_t segments = split_rows(in) ? (in.classes + kSegment - 1) / kSegment : 1;
  const int64_t size = segments == 1 ? in.classes : kSegment;
  at::parallel_for(0, in.rows * segments, std::max<int64_t>(1, kGrain / size), [&](int64_t begin, int64_t end) {
    const K kernel(in);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / segments, first = i % segments * size;
      write_row(kernel, row_gradient, canonical(upstream[row * stride]), row, first, std::min(first + size, in.classes),
                gradient);
    }
    finish_stores();
  });
}

void scan(const Rows& in, int64_t begin, int64_t end, int64_t& counted_, bool& bad_) {
  int64_t counted = 0, bad = 0;  // without branches, for there may be many rows of few classes
  const int64_t ignore = in.ignore_index;
  const uint64_t classes = static_cast<uint64_t>(in.classes);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t y = in.target[row], counts = y != ignore;
    counted += counts;
    bad |= counts & (static_cast<uint64_t>(y) >= classes);
  }
  counted_ = counted;
  bad_ = bad != 0;
}

void statistics_door(const Rows& in, double* centred, double* statistics) {
  with_types(in, [&]<class T, class D>() {
    collect<T, D>(in, false, [&](auto&, const Tile& tile, int64_t row, int64_t count) {
      using V = Vec<double>;
      for (int64_t lane = 0; lane < count; lane += V::size()) {
        const int64_t first = row + lane, n = std::min<int64_t>(V::size(), count - lane);
        const Centred<V> c = tile.lanes(lane);
        const Statistics<V> s = derive(c, Odds<V>(c), in.dense_target != nullptr, in.reads);
        const bool some = any_ignored(in, first, n);
        for (int k = 0; k < kCentred; ++k) scatter(in, (&c.max)[k], first, n, some, centred + k * in.rows + first);
        for (int k = 0; k < kStatistics; ++k)
          scatter(in, (&s.logprob)[k], first, n, some, statistics + k * in.rows + first);
      }
    });
  });
}

void objective_door(const Rows& in, const Program& program, double* values_, void* row_gradient) {
  with_types(in, [&]<class T, class D>() {
    using A = typename Walk<T>::A;
    Values values(in, program, tile_of<T>(in), values_);
    collect<T, D>(in, false, [&](auto&, const Tile& tile, int64_t row, int64_t count) {
      epilogue(in, program, tile, row, count, values, static_cast<A*>(row_gradient));
    });
    values.finish();
  });
}

// What was just collected, written while it is in the cache: the rows of a tile or group, or the group that a kernel
// has in hand.
template <class T, class D, class A>
void write_tile(Wide<T, D>& kernel, const A* row_gradient, int64_t row, int64_t count, T* gradient) {
  for (int64_t i = 0; i < count; ++i) write_row(kernel, row_gradient, A(1), row + i, 0, kernel.n, gradient, i);
}
template <class T, class D, class A>
void write_tile(Narrow<T, D>& kernel, const A* row_gradient, int64_t row, int64_t count, T* gradient) {
  const A one(1);
  if (narrow_gradient(kernel.in, sizeof(T))) {
    kernel.write(row, count, row_gradient, &one, 0, gradient);
  } else {
    Wide<T, D> writer(kernel.in);
    write_tile<T, D>(writer, row_gradient, row, count, gradient);
  }
}

void fused_door(const Rows& in, const Program& program, double* values_, void* row_gradient_, void* gradient_) {
  with_types(in, [&]<class T, class D>() {
    using A = typename Walk<T>::A;
    A* row_gradient = static_cast<A*>(row_gradient_);
    T* gradient = static_cast<T*>(gradient_);
    const A one(1);
    Values values(in, program, tile_of<T>(in), values_);
    const bool later = !narrow(in) && split_rows(in);  // a split row is not in one thread's cache
    collect<T, D>(in, true, [&](auto& kernel, const Tile& tile, int64_t row, int64_t count) {
      epilogue(in, program, tile, row, count, values, row_gradient);
      if (!later) write_tile<T, D>(kernel, row_gradient, row, count, gradient);
    });
    values.finish();
    if (later) write_wide<Wide<T, D>>(in, row_gradient, &one, 0, gradient);
  });
}

void chain_door(const Rows& in, const double* centred, const double* partials, void* row_gradient) {
  with_types(in, [&]<class T, class D>() {
    using A = typename Walk<T>::A;
    using V = Vec<double>;
    at::parallel_for(0, (in.rows + kTile - 1) / kTile, 64, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin * kTile; row < std::min(end * kTile, in.rows); row += V::size()) {
        const int64_t n = std::min<int64_t>(V::size(), in.rows - row);
        Centred<V> c;
        Statistics<V> f;
        for (int k = 0; k < kCentred; ++k) (&c.max)[k] = V::loadu(centred + k * in.rows + row, n);
        for (int k = 0; k < kStatistics; ++k) (&f.logprob)[k] = V::loadu(partials + k * in.rows + row, n);
        const Odds<V> odds(c);
        const bool dense = in.dense_target != nullptr;
        store_row_gradient(
            in, chain(c, odds, derive(c, odds, dense, in.reads), f, in.reads, dense, in.class_weight != nullptr), row,
            n, any_ignored(in, row, n), static_cast<A*>(row_gradient));
      }
    });
  });
}

void gradient_door(const Rows& in, const void* row_gradient_, const void* upstream_, int64_t upstream_stride,
                   void* gradient_) {
  with_types(in, [&]<class T, class D>() {
    using A = typename Walk<T>::A;
    const A *row_gradient = static_cast<const A*>(row_gradient_), *upstream = static_cast<const A*>(upstream_);
    T* gradient = static_cast<T*>(gradient_);
    if (narrow_gradient(in, sizeof(T))) {
      over_groups<T, D>(in, [&](auto& kernel, int64_t row, int64_t count) {
        kernel.load(row, count);
        kernel.write(row, count, row_gradient, upstream + row * upstream_stride, upstream_stride, gradient);
      });
    } else {
      write_wide<Wide<T, D>>(in, row_gradient, upstream, upstream_stride, gradient);
    }
  });
}

}  // namespace

#define OBJKERN_STRING_OF(x) #x
#define OBJKERN_STRING(x) OBJKERN_STRING_OF(x)
extern const Doors table;
const Doors table = {OBJKERN_STRING(OBJKERN_VARIANT),
                     scan,
                     statistics_door,
                     objective_door,
                     fused_door,
                     chain_door,
                     gradient_door,
                     elementwise_door,
                     elementwise_gradient_door};

}  // namespace OBJKERN_VARIANT
}  // namespace objkern::cpu
