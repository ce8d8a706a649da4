// The kernels for float32 logits that write a float16 gradient:
//   nvcc -O3 -std=c++20 -arch=sm_90 --expt-relaxed-constexpr -c csrc/cuda/rows_float32_float16.cu
#include "table.h"

namespace objkern::cuda {

const Table& table_float32_float16() {
  static const Table table = table_of_narrow_gradient<Float16>(table_float32());
  return table;
}

}  // namespace objkern::cuda
