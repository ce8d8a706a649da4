// A reference's logits, read beside those of a row.
#pragma once

#include "elements.h"

namespace objkern::cuda {

// The logits of a row of the reference beside those of the row.
template <class T>
struct Beside {
  using A = Accumulation<T>;
  const Rows& rows;
  const int64_t row;

  OBJKERN_DEVICE A at(int column) const {
    return element<A>(rows.reference, rows.reference_dtype, row * rows.reference_stride + column);
  }

  // The row itself, if it is of the logits' type.
  OBJKERN_DEVICE const T* same() const {
    const bool same = rows.reference_dtype == rows.dtype;
    return same ? static_cast<const T*>(rows.reference) + row * rows.reference_stride : nullptr;
  }

  // Of `kCount` columns, whole vectors of T.
  template <int kCount>
  OBJKERN_DEVICE void load(int start, A (&r)[kCount]) const {
    const T* const p = static_cast<const T*>(rows.reference) + row * rows.reference_stride + start;
    if (rows.reference_dtype == rows.dtype && misalignment(p) == 0) {
      constexpr int kVector = Element<T>::kVector;
#pragma unroll
      for (int i = 0; i < kCount; i += kVector) unpack<T>(load128(p + i), r + i);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) r[i] = at(start + i);
    }
  }
};

}  // namespace objkern::cuda
