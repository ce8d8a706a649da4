// Chooses the kernels for this processor, and looks at the targets before any logit is read.
#include <cstdlib>
#include <cstring>

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

TargetSummary summarize_targets(const Rows& rows) {
  TargetSummary summary;
  if (rows.target == nullptr) {
    summary.counted = rows.rows;
    summary.weight_sum = static_cast<double>(rows.rows);
    return summary;
  }
  // Without branches, for there may be many rows of few classes.
  int64_t counted = 0, bad = 0;
  for (int64_t row = 0; row < rows.rows; ++row) {
    const int64_t y = rows.target[row], counts = y != rows.ignore_index;
    counted += counts;
    bad |= counts & (static_cast<uint64_t>(y) >= static_cast<uint64_t>(rows.classes));
  }
  for (int64_t row = 0; bad != 0 && summary.bad_row < 0; ++row) {
    const int64_t y = rows.target[row];
    if (y != rows.ignore_index && (y < 0 || y >= rows.classes)) summary.bad_row = row;
  }
  summary.counted = counted;
  summary.weight_sum = static_cast<double>(counted);
  if (rows.class_weight == nullptr || bad != 0) return summary;
  const auto* doubles = static_cast<const double*>(rows.class_weight);
  const auto* floats = static_cast<const float*>(rows.class_weight);
  summary.weight_sum = 0;
  for (int64_t row = 0; row < rows.rows; ++row) {
    const int64_t y = rows.target[row];
    if (y != rows.ignore_index) summary.weight_sum += rows.dtype == DType::kFloat64 ? doubles[y] : floats[y];
  }
  return summary;
}

}  // namespace objkern::cpu
