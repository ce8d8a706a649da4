// The kernels for float64 logits:  nvcc -O3 -std=c++20 -arch=sm_90 --expt-relaxed-constexpr -c
// csrc/cuda/rows_float64.cu
#include "table.h"

namespace objkern::cuda {

const Table& table_float64() {
  static const Table table = table_of<double>();
  return table;
}

}  // namespace objkern::cuda
