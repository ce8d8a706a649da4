// Numbers, and vectors of them: what the formulas of objective.h, divergence.h and elementwise.h are written in. Host
// and device code.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define OBJKERN_INLINE __host__ __device__ inline
#else
#define OBJKERN_INLINE inline
#endif

// The same header is compiled for several instruction sets and linked into one library. A name of its own for each
// keeps the linker from merging an AVX-512 copy of an inline function into the baseline build.
#ifndef OBJKERN_VARIANT
#define OBJKERN_VARIANT baseline
#endif

namespace objkern {
inline namespace OBJKERN_VARIANT {

// The formulas below are written for R: a float, a double, or a vector of them with one row per lane. There are
// therefore no branches on values, only selections; `Lane<R>` says how R does what operators cannot.
template <class R>
struct Lane {
  using Mask = bool;
  static constexpr bool kCompensated = sizeof(R) == 4;  // sums keep the part that rounding took off
  OBJKERN_INLINE static R exp(R x) { return std::exp(x); }
  OBJKERN_INLINE static R exp_nonpositive(R x) { return std::exp(x); }
  // exp(a·b): what a product of −20 is rounded by is a millionth of the result in float32, and is put back.
  OBJKERN_INLINE static R exp_of_product(R a, R b) {
    const R product = a * b, e = std::exp(product);
    return e == R(0) ? e : e * (R(1) + std::fma(a, b, -product));
  }
  OBJKERN_INLINE static R expm1(R x) { return std::expm1(x); }
  OBJKERN_INLINE static R log(R x) { return std::log(x); }
  OBJKERN_INLINE static R log1p(R x) { return std::log1p(x); }  // asked for 0 ≤ x ≤ 1 alone
  OBJKERN_INLINE static R abs(R x) { return std::fabs(x); }
  OBJKERN_INLINE static Mask equal(R a, R b) { return a == b; }
  OBJKERN_INLINE static Mask less(R a, R b) { return a < b; }
  OBJKERN_INLINE static R select(Mask m, R yes, R no) { return m ? yes : no; }
};

template <class R>
OBJKERN_INLINE R minus_infinity() {
  return R(-std::numeric_limits<float>::infinity());
}

// a·b where a is a probability: 0·∞ is the limit 0, as in p·log p.
template <class R>
OBJKERN_INLINE R weighted(R probability, R b) {
  return Lane<R>::select(Lane<R>::equal(probability, R(0)), R(0), probability * b);
}

// a + b − sum, exactly, where sum is a + b rounded. Source: Knuth, "The Art of Computer Programming", volume 2, 4.2.2.
template <class R>
OBJKERN_INLINE R rounded_off(R a, R b, R sum) {
  const R b_in_sum = sum - a;
  return (a - (sum - b_in_sum)) + (b - b_in_sum);
}

// log(1 + exp(d)) and 1 / (1 + exp(−d)), for d and −d at once, exact in both tails. `low` is what d was rounded by: at
// |d| = 10 the last digit of a float32 d is a millionth of exp(−|d|).
template <class R>
struct LogOdds {
  R softplus_plus = R(0), softplus_minus = R(0), sigmoid_plus = R(0), sigmoid_minus = R(0);
  R softplus_plus_low = R(0);  // what softplus_plus was rounded by

  LogOdds() = default;
  OBJKERN_INLINE explicit LogOdds(R d) {
    const R e = Lane<R>::exp_nonpositive(R(0) - Lane<R>::abs(d));
    set(d, R(0), Lane<R>::log1p(e), e, R(1) / (R(1) + e));
  }
  OBJKERN_INLINE LogOdds(R d, R low) {
    using L = Lane<R>;
    const auto negative = L::less(d, R(0));
    R e = L::exp_nonpositive(R(0) - L::abs(d));
    if constexpr (L::kCompensated) e = e - e * L::select(negative, R(0) - low, low);
    set(d, low, L::log1p(e), e, R(1) / (R(1) + e));
    if constexpr (L::kCompensated) {
      const R lost = rounded_off(d, low + softplus_minus, softplus_plus);
      softplus_plus_low = L::select(negative, R(0), L::select(L::equal(lost, lost), lost, R(0)));  // d may be infinite
    }
  }
  // From e = exp(−|d|), tail = log(1 + e) and near = 1 / (1 + e).
  OBJKERN_INLINE void set(R d, R low, R tail, R e, R near) {
    using L = Lane<R>;
    const auto negative = L::less(d, R(0));
    const R far = e * near;
    softplus_plus = L::select(negative, tail, d + (low + tail));
    softplus_minus = L::select(negative, (tail - low) - d, tail);
    sigmoid_plus = L::select(negative, far, near);
    sigmoid_minus = L::select(negative, near, far);
  }
};

}  // namespace OBJKERN_VARIANT
}  // namespace objkern
