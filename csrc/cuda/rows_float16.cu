// The kernels for float16 logits:  nvcc -O3 -std=c++20 -arch=sm_90 --expt-relaxed-constexpr -c
// csrc/cuda/rows_float16.cu
#include "table.h"

namespace objkern::cuda {

const Table& table_float16() {
  static const Table table = table_of<Float16>();
  return table;
}

}  // namespace objkern::cuda
