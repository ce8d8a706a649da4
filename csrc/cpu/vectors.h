// Rows as vectors: loads and stores of any element type, a fast exponential, and vectors as the numbers of objective.h.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "../objective.h"

namespace objkern {
inline namespace OBJKERN_VARIANT {

template <class A>
using Vec = at::vec::Vectorized<A>;

// One row per lane: the formulas of objective.h on vectors.
template <class A>
struct Lane<Vec<A>> {
  using R = Vec<A>;
  using Mask = Vec<A>;
  static R exp(const R& x) { return x.exp(); }
  static R expm1(const R& x) { return x.expm1(); }
  static R log(const R& x) { return x.log(); }
  static R log1p(const R& x) { return x.log1p(); }
  static R abs(const R& x) { return x.abs(); }
  static Mask equal(const R& a, const R& b) { return a == b; }
  static Mask less(const R& a, const R& b) { return a < b; }
  static R select(const Mask& m, const R& yes, const R& no) { return R::blendv(no, yes, m); }
};

}  // namespace OBJKERN_VARIANT

namespace cpu {
inline namespace OBJKERN_VARIANT {

template <class A>
inline Vec<A> minus_inf() {
  return Vec<A>(-std::numeric_limits<A>::infinity());
}

template <class A>
inline Vec<A> is_minus_inf(const Vec<A>& z) {
  return z == minus_inf<A>();
}

// Where exp(t) is 0 in the accumulation type, a bounded t: 0·(−inf) would be NaN.
inline Vec<float> clamp_exponent(const Vec<float>& t) {
  return at::vec::clamp_min(t, Vec<float>(-88.02f));
}
inline Vec<double> clamp_exponent(const Vec<double>& t) {
  return at::vec::clamp_min(t, Vec<double>(-800.0));
}

// exp(t) for t ≤ 0 or NaN, within 1 ulp; exactly 0 below −87.7, where float32 has only subnormals left.
// exp(t) = 2^n exp(r) with |r| ≤ log(2)/2; n is read off the bits of t·log2(e) + 1.5·2^23, and n = −127 makes 2^n = 0.
inline Vec<float> exp_nonpositive(const Vec<float>& t_) {
  using F = Vec<float>;
  using I = Vec<int32_t>;
  const F t = clamp_exponent(t_);
  const F magic(12582912.0f);
  const F shifted = at::vec::fmadd(t, F(1.44269504f), magic);
  const F n = shifted - magic;
  F r = at::vec::fmadd(n, F(-0.693145752f), t);
  r = at::vec::fmadd(n, F(-1.42860677e-6f), r);
  F p = F(1.0f / 720);
  p = at::vec::fmadd(p, r, F(1.0f / 120));
  p = at::vec::fmadd(p, r, F(1.0f / 24));
  p = at::vec::fmadd(p, r, F(1.0f / 6));
  p = at::vec::fmadd(p, r, F(0.5f));
  p = at::vec::fmadd(p, r, F(1.0f));
  p = at::vec::fmadd(p, r, F(1.0f));
  const I exponent = (at::vec::cast<int32_t>(shifted) << I(23)) + I(0x3f800000);
  return p * at::vec::cast<float>(exponent);
}

inline Vec<double> exp_nonpositive(const Vec<double>& t) {
  return t.exp();
}

template <class A>
inline double horizontal_sum(const Vec<A>& v) {
  alignas(64) A lanes[Vec<A>::size()];
  v.store(lanes);
  double sum = 0;
  for (A lane : lanes) sum += lane;
  return sum;
}

template <class A>
inline A horizontal_max(const Vec<A>& v) {
  alignas(64) A lanes[Vec<A>::size()];
  v.store(lanes);
  return *std::max_element(lanes, lanes + Vec<A>::size());
}

template <class A>
inline A horizontal_min(const Vec<A>& v) {
  alignas(64) A lanes[Vec<A>::size()];
  v.store(lanes);
  return *std::min_element(lanes, lanes + Vec<A>::size());
}

template <class A>
inline Vec<A> zero_at_minus_inf(const Vec<A>& d, const Vec<A>& z) {
#ifdef CPU_CAPABILITY_AVX512  // the portable form goes from mask to vector and back
  if constexpr (std::is_same_v<A, float>)
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(z, minus_inf<float>(), _CMP_NEQ_UQ), d);
#endif
  return Vec<A>::blendv(d, Vec<A>(A(0)), is_minus_inf(z));
}

// A row of T is walked in packs: kVectors vectors of the accumulation type A, which are one full vector of T.
template <class T>
struct Walk {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  static constexpr int kVectors = sizeof(T) == 2 ? 2 : 1;
  static constexpr int64_t kLanes = Vec<A>::size();
  static constexpr int64_t kPack = kVectors * kLanes;
  using Pack = Vec<A>[kVectors];

  // A full pack of E (T or A).
  template <class E>
  static void load(const E* p, Pack& v) {
    if constexpr (std::is_same_v<E, A>) {
      for (int k = 0; k < kVectors; ++k) v[k] = Vec<A>::loadu(p + k * kLanes);
    } else {
      at::vec::load_to_float<E>(p, v[0], v[1]);
    }
  }

  // `count` elements, and `pad` in the lanes past them.
  template <class E>
  static void load(const E* p, int64_t count, float pad, Pack& v) {
    if (count == kPack) return load(p, v);
    alignas(64) E buffer[kPack];
    std::copy(p, p + count, buffer);
    std::fill(buffer + count, buffer + kPack, static_cast<E>(pad));
    load(buffer, v);
  }

  static void store(T* p, const Pack& v) {
    if constexpr (std::is_same_v<T, A>) {
      v[0].store(p);
    } else {
      at::vec::convert_from_float<T>(v[0], v[1]).store(p);
    }
  }

  static void store(T* p, int64_t count, const Pack& v) {
    if (count == kPack) return store(p, v);
    alignas(64) T buffer[kPack];
    store(buffer, v);
    std::copy(buffer, buffer + count, p);
  }
};

// z = c·tanh(s·x / c), and its derivative to x. A logit of −inf stays −inf: it is tested before the cap.
template <class A>
struct Transform {
  A scale, cap, gain;
  bool identity;

  Transform(double scale_, double cap_, bool unscaled)
      : scale(static_cast<A>(scale_)),
        cap(static_cast<A>(cap_)),
        gain(unscaled ? A(1) : scale),
        identity(scale == A(1) && cap == A(0)) {}

  Vec<A> operator()(const Vec<A>& x) const {
    if (identity) return x;
    Vec<A> z = x * Vec<A>(scale);
    if (cap != A(0)) z = (z / Vec<A>(cap)).tanh() * Vec<A>(cap);
    return Vec<A>::blendv(z, minus_inf<A>(), is_minus_inf(x));
  }

  A operator()(A x) const {  // through the vector form, so that a class has one z everywhere
    if (identity) return x;
    alignas(64) A lanes[Vec<A>::size()];
    (*this)(Vec<A>(x)).store(lanes);
    return lanes[0];
  }

  A slope(A z) const {
    const bool capped = cap != A(0) && z != -std::numeric_limits<A>::infinity();
    return capped ? gain * (A(1) - (z / cap) * (z / cap)) : gain;
  }

  Vec<A> slope(const Vec<A>& z) const {
    if (cap == A(0)) return Vec<A>(gain);
    const Vec<A> r = z / Vec<A>(cap);
    return Vec<A>(gain) * (Vec<A>(A(1)) - r * r);
  }
};

// z − max, kept finite: 0·(−inf) would be NaN where the difference overflows.
template <class A>
inline Vec<A> difference(const Vec<A>& z, const Vec<A>& max) {
  return at::vec::clamp_min(z - max, Vec<A>(std::numeric_limits<A>::lowest()));
}

}  // namespace OBJKERN_VARIANT
}  // namespace cpu
}  // namespace objkern
