// The element types that the kernels read and write. No torch.
#pragma once

#include <cstdint>

namespace objkern {

enum class DType : int64_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

}  // namespace objkern
