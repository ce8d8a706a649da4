// Chooses the kernels for this processor, and looks at the targets before any logit is read.
#include <ATen/Parallel.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels.h"

namespace objkern::cpu {

// One table for each instruction set that was built; setup.py defines OBJKERN_HAS_*.
inline namespace baseline {
extern const Doors table;
}
#ifdef OBJKERN_HAS_AVX2
namespace avx2 {
extern const Doors table;
}
#endif
#ifdef OBJKERN_HAS_AVX512
namespace avx512 {
extern const Doors table;
}
#endif

namespace {

#if defined(OBJKERN_HAS_AVX2) || defined(OBJKERN_HAS_AVX512)
bool runs_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif

#ifdef OBJKERN_HAS_AVX512
bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

const Doors* choose(const char* name) {
  const bool any = name == nullptr || *name == 0;
#ifdef OBJKERN_HAS_AVX512
  if ((any || !std::strcmp(name, "avx512")) && runs_avx512()) return &avx512::table;
#endif
#ifdef OBJKERN_HAS_AVX2
  if ((any || !std::strcmp(name, "avx2")) && runs_avx2()) return &avx2::table;
#endif
  if (any || !std::strcmp(name, "default")) return &baseline::table;
  return nullptr;
}

}  // namespace

const Doors* doors() {
  static const Doors* const chosen = choose(std::getenv("OBJKERN_CPU_CAPABILITY"));
  return chosen;
}

const Caches& caches() {
  static const Caches sizes = [] {
    Caches found{0, 0};
#ifdef _SC_LEVEL2_CACHE_SIZE
    found = {sysconf(_SC_LEVEL2_CACHE_SIZE), sysconf(_SC_LEVEL3_CACHE_SIZE)};
#endif
    if (found.second <= 0) found.second = int64_t{1} << 20;
    if (found.last <= 0) found.last = int64_t{32} << 20;
    return found;
  }();
  return sizes;
}

TargetSummary summarize_targets(const Rows& rows) {
  TargetSummary summary;
  if (rows.target == nullptr) {
    summary.counted = rows.rows;
    summary.weight_sum = static_cast<double>(rows.rows);
    return summary;
  }
  // In pieces of a fixed size, each summed by one thread and then in order: the same for any number of threads.
  constexpr int64_t kPiece = 8192;
  struct Sum {
    int64_t counted = 0;
    double weight = 0;
    bool bad = false;
  };
  const Doors& kernels = doors() == nullptr ? baseline::table : *doors();
  std::vector<Sum> sums((rows.rows + kPiece - 1) / kPiece);
  const auto* doubles = static_cast<const double*>(rows.class_weight);
  const auto* floats = static_cast<const float*>(rows.class_weight);
  at::parallel_for(0, static_cast<int64_t>(sums.size()), 2, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      Sum& sum = sums[i];
      const int64_t begin = i * kPiece, end = std::min(begin + kPiece, rows.rows);
      kernels.scan(rows, begin, end, sum.counted, sum.bad);
      if (rows.class_weight == nullptr || sum.bad) continue;
      double lanes[4] = {};  // four sums in step: one alone would wait for itself
      for (int64_t row = begin; row < end; ++row) {
        const int64_t y = rows.target[row];
        if (y != rows.ignore_index) lanes[row % 4] += rows.dtype == DType::kFloat64 ? doubles[y] : floats[y];
      }
      sum.weight = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    }
  });
  bool bad = false;
  for (const Sum& sum : sums) {
    summary.counted += sum.counted;
    summary.weight_sum += sum.weight;
    bad |= sum.bad;
  }
  if (rows.class_weight == nullptr) summary.weight_sum = static_cast<double>(summary.counted);
  for (int64_t row = 0; bad && summary.bad_row < 0; ++row) {
    const int64_t y = rows.target[row];
    if (y != rows.ignore_index && (y < 0 || y >= rows.classes)) summary.bad_row = row;
  }
  return summary;
}

}  // namespace objkern::cpu
