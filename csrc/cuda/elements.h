// A row of logits as threads read and write it: single elements at its ends and 16-byte vectors between them, at any
// alignment, and never outside the row.
//
//   address mod 16   6  8  ...  14 | 0             | 0             | 0  2  4
//                    head            vector          vector          tail         float16, 5 + 8 + 8 + 3 classes
#pragma once

#include <cmath>

#include "../objective.h"
#include "device.h"
#include "kernels.h"

namespace objkern::cuda {

template <class T>
struct Element {
  using A = float;  // sums and coefficients
  static constexpr int kVector = 16 / static_cast<int>(sizeof(T));
};
template <>
struct Element<double> {
  using A = double;
  static constexpr int kVector = 2;
};
template <class T>
using Accumulation = typename Element<T>::A;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// ---- vectors ------------------------------------------------------------------------------------------------------

template <class T>
OBJKERN_DEVICE void unpack(const Words& words, Accumulation<T>* z) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) widen_pair(static_cast<T*>(nullptr), words.w[i], z[2 * i], z[2 * i + 1]);
  } else {
    __builtin_memcpy(z, &words, sizeof words);
  }
}

template <class T>
OBJKERN_DEVICE Words packed(const Accumulation<T> (&d)[Element<T>::kVector]) {
  Words words;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words.w[i] = pack(static_cast<T*>(nullptr), d[2 * i], d[2 * i + 1]);
  } else {
    __builtin_memcpy(&words, d, sizeof words);
  }
  return words;
}

// kVector elements at p as numbers of the accumulation type. E may be narrower than the accumulation type.
template <class E, int kVector, class A>
OBJKERN_DEVICE void read_vector(const E* p, A (&found)[kVector]) {
  if constexpr (sizeof(E) * kVector == 16) {
    unpack<E>(load128(p), found);
  } else {  // of a wider type than the prediction's
    static_assert(sizeof(E) * kVector == 32);
    const Words low = load128(p), high = load128(p + kVector / 2);
    __builtin_memcpy(found, &low, sizeof low);
    __builtin_memcpy(found + kVector / 2, &high, sizeof high);
  }
}

template <class T>
OBJKERN_DEVICE T narrowed(Accumulation<T> d) {
  if constexpr (sizeof(T) == 2) {
    return {static_cast<uint16_t>(pack(static_cast<T*>(nullptr), d, 0.0f))};
  } else {
    return d;
  }
}

template <class T>
OBJKERN_DEVICE int misalignment(const T* p) {  // bytes past a multiple of 16
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) & 15);
}

// 16 bytes from an address that lies `past` bytes behind a multiple of 16: out of the two aligned words around it. All
// threads of a warp pass the same number.
OBJKERN_DEVICE Words load128_across(const void* p, int past) {
  if (past == 0) return load128(p);
  const char* aligned = static_cast<const char*>(p) - past;
  const Words low = load128(aligned), high = load128(aligned + 16);
  uint32_t w[8] = {low.w[0], low.w[1], low.w[2], low.w[3], high.w[0], high.w[1], high.w[2], high.w[3]};
  if ((past & 8) != 0) {
#pragma unroll
    for (int i = 0; i < 6; ++i) w[i] = w[i + 2];
  }
  if ((past & 4) != 0) {
#pragma unroll
    for (int i = 0; i < 5; ++i) w[i] = w[i + 1];
  }
  Words found;
#pragma unroll
  for (int i = 0; i < 4; ++i) found.w[i] = shifted_bytes(w[i], w[i + 1], past & 3);
  return found;
}

// Columns [begin, end) of a row: where the vectors begin, and how many there are. `before` and `after` are elements at
// the ends that no vector may cover, because what is read along with them does not lie at the same alignment.
struct Walk {
  int begin, body, vectors, end;
};

template <class T>
OBJKERN_DEVICE Walk walk(const T* row, int begin, int end, bool apart = false) {
  constexpr int kVector = Element<T>::kVector;
  const int margin = apart ? kVector : 0;
  const int to_boundary = (16 - misalignment(row + begin)) % 16 / static_cast<int>(sizeof(T));
  const int body = min(begin + to_boundary + margin, end);
  return {begin, body, max(end - body - margin, 0) / kVector, end};
}

// ---- numbers ------------------------------------------------------------------------------------------------------

template <class A>
OBJKERN_DEVICE A larger(A a, A b) {  // of a NaN and a number, the number
  return std::fmax(a, b);
}
template <class A>
OBJKERN_DEVICE A smaller(A a, A b) {
  return std::fmin(a, b);
}

// exp(t) for t ≤ 0, of which half precision needs fewer digits. The product t·log2 e loses |t| units in the last place;
// for float32 logits what it lost is put back. e^−200 is 0, and −∞·0 would be NaN.
template <class T>
OBJKERN_DEVICE float exp_nonpositive(float t) {
  constexpr float kLog2E = 1.44269504f, kRest = 1.92596299e-8f, kLn2 = 0.693147181f;
  if constexpr (sizeof(T) == 2) return exp2_fast(t * kLog2E);
  t = t < -200.0f ? -200.0f : t;
  const float y = t * kLog2E, lost = std::fma(t, kRest, std::fma(t, kLog2E, -y)), e = exp2_fast(y);
  return std::fma(e, lost * kLn2, e);
}
template <class T>
OBJKERN_DEVICE double exp_nonpositive(double t) {
  return std::exp(t);
}

// exp(t / temperature) for t ≤ 0.
template <class T>
struct ExpOver {
  using A = Accumulation<T>;
  static constexpr float kLog2E = 1.44269504f;
  A by, by_log2;

  OBJKERN_DEVICE explicit ExpOver(double temperature)
      : by(static_cast<A>(1.0 / temperature)), by_log2(by * static_cast<A>(kLog2E)) {}
  OBJKERN_DEVICE A operator()(A t) const {
    if constexpr (sizeof(T) == 2) return exp2_fast(t * by_log2);
    return exp_nonpositive<A>(t * by);
  }
};

OBJKERN_DEVICE double number(const Scalar& scalar) {
  if (scalar.pointer == nullptr) return scalar.value;
  return scalar.dtype == DType::kFloat32 ? static_cast<double>(*static_cast<const float*>(scalar.pointer))
                                         : *static_cast<const double*>(scalar.pointer);
}

// z = c·tanh(s·x / c), the identity unless kOn; −inf stays −inf. The slope is ∂z/∂x, or ∂z/∂(s·x) for the gradient of
// the scale itself.
template <class A, bool kOn>
struct Transform {
  A scale = A(1), cap = A(0), gain = A(1);

  template <class In>  // Rows or Elements
  OBJKERN_DEVICE Transform(const In& in, const Scalar& logit_scale) {
    if constexpr (kOn) {
      scale = static_cast<A>(number(logit_scale));
      cap = static_cast<A>(in.softcap);
      gain = in.unscaled ? A(1) : scale;
    }
  }
  OBJKERN_DEVICE bool is_identity() const { return scale == A(1) && cap == A(0); }
  OBJKERN_DEVICE A operator()(A x) const {
    if constexpr (kOn) {
      if (x == A(-kInfinity)) return x;
      const A z = x * scale;
      return cap != A(0) ? std::tanh(z / cap) * cap : z;
    }
    return x;
  }
  OBJKERN_DEVICE A slope(A z) const {
    if constexpr (kOn) {
      const bool capped = cap != A(0) && z != A(-kInfinity);
      return capped ? gain * (A(1) - (z / cap) * (z / cap)) : gain;
    }
    return A(1);
  }
};

// Element j of a vector of numbers whose type is known only now.
template <class A>
OBJKERN_DEVICE A element(const void* p, DType dtype, int64_t j) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<A>(static_cast<const float*>(p)[j]);
    case DType::kFloat64:
      return static_cast<A>(static_cast<const double*>(p)[j]);
    case DType::kBFloat16:
      return static_cast<A>(widen(static_cast<const BFloat16*>(p)[j]));
    case DType::kFloat16:
      return static_cast<A>(widen(static_cast<const Float16*>(p)[j]));
  }
  return A(0);
}

}  // namespace objkern::cuda
