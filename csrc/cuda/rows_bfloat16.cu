// The kernels for bfloat16 logits:  nvcc -O3 -std=c++20 -arch=sm_90 --expt-relaxed-constexpr -c
// csrc/cuda/rows_bfloat16.cu
#include "table.h"

namespace objkern::cuda {

const Table& table_bfloat16() {
  static const Table table = table_of<BFloat16>();
  return table;
}

}  // namespace objkern::cuda
