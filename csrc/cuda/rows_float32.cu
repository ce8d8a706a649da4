// The kernels for float32 logits:  nvcc -O3 -std=c++20 -arch=sm_90 --expt-relaxed-constexpr -c
// csrc/cuda/rows_float32.cu
#include "table.h"

namespace objkern::cuda {

const Table& table_float32() {
  static const Table table = table_of<float>();
  return table;
}

}  // namespace objkern::cuda
