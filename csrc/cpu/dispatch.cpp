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

bool runs_avx2() {
#ifdef OBJKERN_HAS_AVX2
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool runs_avx512() {
#ifdef OBJKERN_HAS_AVX512
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

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

template <class A>
double weight_of(const void* weights, int64_t y) {
  return weights == nullptr ? 1.0 : static_cast<double>(static_cast<const A*>(weights)[y]);
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
  const auto weight = rows.dtype == DType::kFloat64 ? weight_of<double> : weight_of<float>;
  for (int64_t row = 0; row < rows.rows; ++row) {
    const int64_t y = rows.target[row];
    if (y == rows.ignore_index) continue;
    if (y < 0 || y >= rows.classes) {
      summary.bad_row = row;
      return summary;
    }
    ++summary.counted;
    summary.weight_sum += weight(rows.class_weight, y);
  }
  return summary;
}

}  // namespace objkern::cpu
