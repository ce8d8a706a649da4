// Rows as vectors: loads and stores of any element type, a fast exponential, and vectors as the numbers of objective.h.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>

#include "../dtypes.h"
#include "../objective.h"

namespace objkern {
inline namespace OBJKERN_VARIANT {

template <class A>
using Vec = at::vec::Vectorized<A>;

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

// exp(t) for t ≤ 0 or NaN, within 1.1 ulp; exactly 0 where float32 has only subnormals left, below −87.3.
//
//   exp(t) = 2^n · exp(r) with n the nearest multiple of 1/K to t·log2(e), so that |r| ≤ log(2)/2K
//
// Adding `magic` rounds to such multiples. With vector instructions that look up a table of K entries (K lanes), the
// fractions 2^(k/K) come from there and r is so small that a cubic is enough; else K = 1 and the polynomial is longer.
//
// With `in_range`, t ≥ kLeastExponent is known.
constexpr float kLeastExponent = -87.33f;

#if defined(CPU_CAPABILITY_AVX512)
template <bool in_range = false>
inline Vec<float> exp_nonpositive(const Vec<float>& t) {
  using F = Vec<float>;
  const __m512 fractions = _mm512_setr_ps(  // 2^(k/16)
      1.0f, 1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f, 1.29683955f, 1.35425555f, 1.41421356f,
      1.47682615f, 1.54221083f, 1.61049033f, 1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f);
  const F magic(786432.0f);  // 1.5·2^19
  const F shifted = at::vec::fmadd(t, F(1.44269504f), magic);
  const F n = shifted - magic;
  F r = at::vec::fmadd(n, F(-0.693145752f), t);
  r = at::vec::fmadd(n, F(-1.42860677e-6f), r);
  const F q = at::vec::fmadd(at::vec::fmadd(F(1.0f / 6), r, F(0.5f)), r, F(1.0f));    // exp(r) = 1 + r q
  const F fraction = _mm512_permutexvar_ps(_mm512_castps_si512(shifted), fractions);  // by its low four bits
  const F p = at::vec::fmadd(fraction * r, q, fraction);
  if constexpr (in_range) return _mm512_scalef_ps(p, n);  // p·2^⌊n⌋
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(t, F(kLeastExponent), _CMP_NLT_UQ), p, n);
}
#elif defined(CPU_CAPABILITY_AVX2)
template <bool in_range = false>
inline Vec<float> exp_nonpositive(const Vec<float>& t_) {
  using F = Vec<float>;
  const __m256 fractions = _mm256_setr_ps(  // 2^(k/8)
      1.0f, 1.09050773f, 1.18920712f, 1.29683955f, 1.41421356f, 1.54221083f, 1.68179283f, 1.83400809f);
  const F t = in_range ? t_ : clamp_exponent(t_), magic(1572864.0f);  // 1.5·2^20
  const F shifted = at::vec::fmadd(t, F(1.44269504f), magic);
  const F n = shifted - magic;
  F r = at::vec::fmadd(n, F(-0.693145752f), t);
  r = at::vec::fmadd(n, F(-1.42860677e-6f), r);
  // 0.5 and as much as makes up for r^4/24 best.
  const F q = at::vec::fmadd(at::vec::fmadd(F(1.0f / 6), r, F(0.5000647f)), r, F(1.0f));
  const __m256i bits = _mm256_castps_si256(shifted);
  const F fraction = _mm256_permutevar8x32_ps(fractions, bits);  // by its low three bits
  const F p = at::vec::fmadd(fraction * r, q, fraction);
  // 2^⌊n⌋: n stands in the low bits of `shifted`; ⌊n⌋ = −127 makes 0 of it.
  const __m256i whole = _mm256_slli_epi32(_mm256_andnot_si256(_mm256_set1_epi32(7), bits), 20);
  return p * F(_mm256_castsi256_ps(_mm256_add_epi32(whole, _mm256_set1_epi32(0x3f800000))));
}
#else
template <bool in_range = false>
inline Vec<float> exp_nonpositive(const Vec<float>& t_) {
  using F = Vec<float>;
  using I = Vec<int32_t>;
  const F t = in_range ? t_ : clamp_exponent(t_), magic(12582912.0f);  // 1.5·2^23
  const F shifted = at::vec::fmadd(t, F(1.44269504f), magic);
  const F n = shifted - magic;
  F r = at::vec::fmadd(n, F(-0.693145752f), t);
  r = at::vec::fmadd(n, F(-1.42860677e-6f), r);
  F p = F(1.0f / 720);  // Taylor's, but for what makes up for r^7/5040 best
  p = at::vec::fmadd(p, r, F(0.00837504f));
  p = at::vec::fmadd(p, r, F(1.0f / 24));
  p = at::vec::fmadd(p, r, F(0.16666416f));
  p = at::vec::fmadd(p, r, F(0.5f));
  p = at::vec::fmadd(p, r, F(1.0f));
  p = at::vec::fmadd(p, r, F(1.0f));
  // 2^n: n stands in the low bits of `shifted`; n = −127 makes 0 of it.
  const I exponent = (at::vec::cast<int32_t>(shifted) << I(23)) + I(0x3f800000);
  return p * at::vec::cast<float>(exponent);
}
#endif

template <bool in_range = false>
inline Vec<double> exp_nonpositive(const Vec<double>& t) {
  return t.exp();
}

}  // namespace OBJKERN_VARIANT
}  // namespace cpu

inline namespace OBJKERN_VARIANT {

// log(1 + x) for 0 ≤ x ≤ 1 or NaN, all that objective.h asks for, within 2 ulp: 2 atanh(s) for s = x / (2 + x) ≤ 1/3,
// by its series. Half the price of the general function, which was a quarter of a row of ten classes.
template <class A>
inline Vec<A> log1p_of_unit(const Vec<A>& x) {
  const Vec<A> s = x / (x + Vec<A>(A(2))), square = s * s;
  constexpr int kLast = sizeof(A) == 4 ? 15 : 31;
  Vec<A> sum(A(1) / A(kLast));
  for (int k = kLast - 2; k >= 3; k -= 2) sum = at::vec::fmadd(sum, square, Vec<A>(A(1) / A(k)));
  return at::vec::fmadd(sum * square, s + s, s + s);
}

// One row per lane: the formulas of objective.h on vectors.
template <class A>
struct Lane<Vec<A>> {
  using R = Vec<A>;
  using Mask = Vec<A>;
  static constexpr bool kCompensated = false;  // the epilogue is in float64
  static R exp(const R& x) { return x.exp(); }
  static R exp_nonpositive(const R& x) { return cpu::exp_nonpositive(x); }
  static R exp_of_product(const R& a, const R& b) { return (a * b).exp(); }  // the epilogue is in float64
  static R expm1(const R& x) { return x.expm1(); }
  static R log(const R& x) { return x.log(); }
  static R log1p(const R& x) { return log1p_of_unit(x); }
  static R abs(const R& x) { return x.abs(); }
  static Mask equal(const R& a, const R& b) { return a == b; }
  static Mask less(const R& a, const R& b) { return a < b; }
  static R select(const Mask& m, const R& yes, const R& no) { return R::blendv(no, yes, m); }
};

}  // namespace OBJKERN_VARIANT

namespace cpu {
inline namespace OBJKERN_VARIANT {

// ---- across the lanes ---------------------------------------------------------------------------------------------

// Neighbours first: log2(lanes) additions that wait for each other instead of one for every lane.
template <class A>
inline double horizontal_sum(const Vec<A>& v) {
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (std::is_same_v<A, float>) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v)),
                  high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
    return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
  } else {
    return _mm512_reduce_add_pd(v);
  }
#else
  constexpr int kLanes = Vec<A>::size();
  alignas(64) A lanes[kLanes];
  v.store(lanes);
  double sums[kLanes / 2];
  for (int i = 0; i < kLanes / 2; ++i)
    sums[i] = static_cast<double>(lanes[i]) + static_cast<double>(lanes[i + kLanes / 2]);
  for (int width = kLanes / 4; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
  return sums[0];
#endif
}

// A NaN may get lost.
template <class A>
inline A horizontal_max(const Vec<A>& v) {
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (std::is_same_v<A, float>) return _mm512_reduce_max_ps(v);
#endif
  alignas(64) A lanes[Vec<A>::size()];
  v.store(lanes);
  for (int width = Vec<A>::size() / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] < lanes[i + width] ? lanes[i + width] : lanes[i];
  return lanes[0];
}

template <class A>
inline bool any_above(const Vec<A>& a, const Vec<A>& b) {
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (std::is_same_v<A, float>) return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<A, float>) return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
#endif
  constexpr int kAll = (1 << Vec<A>::size()) - 1;  // a comparison's result is 0 in the lanes where it does not hold
  return ((a > b).zero_mask() & kAll) != kAll;
}

template <class A>
inline Vec<A> zero_at_minus_inf(const Vec<A>& d, const Vec<A>& z) {
#ifdef CPU_CAPABILITY_AVX512  // the portable form goes from mask to vector and back
  if constexpr (std::is_same_v<A, float>)
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(z, minus_inf<float>(), _CMP_NEQ_UQ), d);
#endif
  return Vec<A>::blendv(d, Vec<A>(A(0)), is_minus_inf(z));
}

// ---- loads and stores ---------------------------------------------------------------------------------------------

#ifdef CPU_CAPABILITY_AVX2
inline __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(std::max<int64_t>(count, 0))),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256i sixteen_places() {
  return _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
#endif

// The first `count` elements at p, and `pad` in the lanes past them. Nothing past them is read.
template <class E>
inline Vec<E> load_first(const E* p, int64_t count, float pad) {
  constexpr int64_t kLanes = Vec<E>::size();
  if (count >= kLanes) return Vec<E>::loadu(p);
#ifdef CPU_CAPABILITY_AVX512
  const uint32_t there = count <= 0 ? 0 : (1u << count) - 1;
  if constexpr (std::is_same_v<E, float>) return _mm512_mask_loadu_ps(_mm512_set1_ps(pad), there, p);
  if constexpr (std::is_same_v<E, double>) return _mm512_mask_loadu_pd(_mm512_set1_pd(pad), there, p);
  if constexpr (sizeof(E) == 2) {
    const E fill(pad);
    return _mm512_mask_loadu_epi16(_mm512_set1_epi16(static_cast<int16_t>(fill.x)), there, p);
  }
#endif
#ifdef CPU_CAPABILITY_AVX2
  if constexpr (std::is_same_v<E, float>) {
    const __m256i there = first_lanes(count);
    return _mm256_blendv_ps(_mm256_set1_ps(pad), _mm256_maskload_ps(p, there), _mm256_castsi256_ps(there));
  }
  if constexpr (sizeof(E) == 2) {  // as pairs, and the last one of an odd number by itself
    const E fill(pad);
    const __m256i size = _mm256_set1_epi16(static_cast<int16_t>(std::max<int64_t>(count, 0)));
    __m256i bits = _mm256_maskload_epi32(reinterpret_cast<const int*>(p), first_lanes(count / 2));
    if (count > 0 && count % 2 != 0) {
      const __m256i last = _mm256_cmpeq_epi16(_mm256_add_epi16(sixteen_places(), _mm256_set1_epi16(1)), size);
      bits = _mm256_blendv_epi8(bits, _mm256_set1_epi16(static_cast<int16_t>(p[count - 1].x)), last);
    }
    const __m256i there = _mm256_cmpgt_epi16(size, sixteen_places());
    return _mm256_blendv_epi8(_mm256_set1_epi16(static_cast<int16_t>(fill.x)), bits, there);
  }
#endif
  alignas(64) E buffer[kLanes];
  const int64_t size = std::max<int64_t>(count, 0);
  std::copy(p, p + size, buffer);
  std::fill(buffer + size, buffer + kLanes, static_cast<E>(pad));
  return Vec<E>::loadu(buffer);
}

template <class E>
inline void store_first(E* p, int64_t count, const Vec<E>& v) {
  constexpr int64_t kLanes = Vec<E>::size();
  if (count >= kLanes) return v.store(p);
#ifdef CPU_CAPABILITY_AVX512
  const uint32_t there = count <= 0 ? 0 : (1u << count) - 1;
  if constexpr (std::is_same_v<E, float>) return _mm512_mask_storeu_ps(p, there, v);
  if constexpr (std::is_same_v<E, double>) return _mm512_mask_storeu_pd(p, there, v);
  if constexpr (sizeof(E) == 2) return _mm512_mask_storeu_epi16(p, there, v);
#endif
#ifdef CPU_CAPABILITY_AVX2
  if constexpr (std::is_same_v<E, float>) return _mm256_maskstore_ps(p, first_lanes(count), v);
  if constexpr (sizeof(E) == 2) {
    _mm256_maskstore_epi32(reinterpret_cast<int*>(p), first_lanes(count / 2), v);
    if (count <= 0 || count % 2 == 0) return;
    alignas(64) E buffer[kLanes];
    v.store(buffer);
    p[count - 1] = buffer[count - 1];
    return;
  }
#endif
  alignas(64) E buffer[kLanes];
  v.store(buffer);
  std::copy(buffer, buffer + std::max<int64_t>(count, 0), p);
}

// Past the caches: the line is not read before it is written, and pushes nothing out. p lies on a vector's boundary.
template <class E>
inline void store_past_caches(E* p, const Vec<E>& v) {
#if defined(CPU_CAPABILITY_AVX512)
  __m512i bits;
  std::memcpy(&bits, &v, sizeof bits);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bits);
#elif defined(CPU_CAPABILITY_AVX2)
  __m256i bits;
  std::memcpy(&bits, &v, sizeof bits);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits);
#else
  v.store(p);
#endif
}

// What was stored past the caches is seen by other threads only after a fence.
inline void finish_stores() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

// In float64, and from there: in registers, for what is read back at once in vectors of another width has to wait.
inline void store_as(const Vec<double>& v, double* to) {
  v.store(to);
}
inline void store_as(const Vec<float>& v, double* to) {
#if defined(CPU_CAPABILITY_AVX512)
  _mm512_storeu_pd(to, _mm512_cvtps_pd(_mm512_castps512_ps256(v)));
  _mm512_storeu_pd(to + 8, _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
#elif defined(CPU_CAPABILITY_AVX2)
  _mm256_storeu_pd(to, _mm256_cvtps_pd(_mm256_castps256_ps128(v)));
  _mm256_storeu_pd(to + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
#else
  alignas(64) float lanes[Vec<float>::size()];
  v.store(lanes);
  for (int i = 0; i < Vec<float>::size(); ++i) to[i] = static_cast<double>(lanes[i]);
#endif
}
inline void store_as(const Vec<double>& v, float* to) {
#if defined(CPU_CAPABILITY_AVX512)
  _mm256_storeu_ps(to, _mm512_cvtpd_ps(v));
#elif defined(CPU_CAPABILITY_AVX2)
  _mm_storeu_ps(to, _mm256_cvtpd_ps(v));
#else
  alignas(64) double lanes[Vec<double>::size()];
  v.store(lanes);
  for (int i = 0; i < Vec<double>::size(); ++i) to[i] = static_cast<float>(lanes[i]);
#endif
}

// bfloat16 in vectors of float32, even elements in the first and odd ones in the second: a float32 is a bfloat16 and
// sixteen bits, so that one shift and one mask convert 2·kLanes of them, where keeping the order takes shuffles.
struct SplitPairs {
#if defined(CPU_CAPABILITY_AVX512)
  static constexpr bool kAvailable = true;
  static void widen(const Vec<c10::BFloat16>& x, Vec<float>& even, Vec<float>& odd) {
    even = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(0xffff0000)));
  }
  // To the nearest, ties to even. A NaN stays one if its low bits are not all ones: see `canonical`.
  static __m512i rounded(const __m512i bits) {
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  }
  static Vec<c10::BFloat16> narrow(const Vec<float>& even, const Vec<float>& odd) {
    const __m512i low = _mm512_srli_epi32(rounded(_mm512_castps_si512(even)), 16);
    return _mm512_mask_blend_epi16(0xaaaaaaaa, low, rounded(_mm512_castps_si512(odd)));
  }
#elif defined(CPU_CAPABILITY_AVX2)
  static constexpr bool kAvailable = true;
  static void widen(const Vec<c10::BFloat16>& x, Vec<float>& even, Vec<float>& odd) {
    even = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(0xffff0000)));
  }
  static __m256i rounded(const __m256i bits) {
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  }
  static Vec<c10::BFloat16> narrow(const Vec<float>& even, const Vec<float>& odd) {
    const __m256i low = _mm256_srli_epi32(rounded(_mm256_castps_si256(even)), 16);
    return _mm256_blend_epi16(low, rounded(_mm256_castps_si256(odd)), 0xaa);
  }
#else
  static constexpr bool kAvailable = false;
  static void widen(const Vec<c10::BFloat16>& x, Vec<float>& even, Vec<float>& odd);
  static Vec<c10::BFloat16> narrow(const Vec<float>& even, const Vec<float>& odd);
#endif
};

// x, or the plain NaN: rounding to bfloat16 carries a payload of ones over into −0. Numbers that take part in every
// element of a row pass through here once, instead of every element; NaN logits of bfloat16 end in sixteen zeros.
template <class A>
inline A canonical(A x) {
  return x == x ? x : std::numeric_limits<A>::quiet_NaN();
}

// A row of T is walked in packs: kVectors vectors of the accumulation type A, which are one full vector of T.
//
// `load` and `store` keep the classes in order. `take` and `put` may order the classes within a pack as it suits the
// conversion; class `place<E>(k)` (lane by lane) stands in vector k. E is T, or A for a row that was converted before.
template <class T>
struct Walk {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  static constexpr int kVectors = sizeof(T) == 2 ? 2 : 1;
  static constexpr int64_t kLanes = Vec<A>::size();
  static constexpr int64_t kPack = kVectors * kLanes;
  using Pack = Vec<A>[kVectors];

  template <class E>
  static constexpr bool kSplit = std::is_same_v<E, c10::BFloat16> && SplitPairs::kAvailable;

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
    if constexpr (std::is_same_v<E, A>) {
      for (int k = 0; k < kVectors; ++k) v[k] = load_first(p + k * kLanes, count - k * kLanes, pad);
    } else {
      std::tie(v[0], v[1]) = at::vec::convert_to_float<E>(load_first(p, count, pad));
    }
  }

  static void store(T* p, int64_t count, const Pack& v) {
    if constexpr (std::is_same_v<T, A>) {
      store_first(p, count, v[0]);
    } else {
      store_first(p, count, at::vec::convert_from_float<T>(v[0], v[1]));
    }
  }

  template <class E>
  static void take(const E* p, Pack& v) {
    if constexpr (kSplit<E>) {
      SplitPairs::widen(Vec<E>::loadu(p), v[0], v[1]);
    } else {
      load(p, v);
    }
  }

  template <class E>
  static void take(const E* p, int64_t count, float pad, Pack& v) {
    if constexpr (kSplit<E>) {
      SplitPairs::widen(load_first(p, count, pad), v[0], v[1]);
    } else {
      load(p, count, pad, v);
    }
  }

  template <class E>
  static Vec<A> place(int k) {
    if constexpr (kSplit<E>) return Vec<A>::arange(static_cast<A>(k), A(2));
    return Vec<A>::arange(static_cast<A>(k * kLanes), A(1));
  }

  // The inverse of `take`, up to the vector store.
  static Vec<T> packed(const Pack& v) {
    if constexpr (std::is_same_v<T, A>) {
      return v[0];
    } else if constexpr (kSplit<T>) {
      return SplitPairs::narrow(v[0], v[1]);
    } else {
      return at::vec::convert_from_float<T>(v[0], v[1]);
    }
  }

  // How many elements p is away from the next boundary of a vector.
  static int64_t to_boundary(const T* p) {
    constexpr uintptr_t kBytes = kPack * sizeof(T);
    return static_cast<int64_t>((kBytes - reinterpret_cast<uintptr_t>(p) % kBytes) % kBytes / sizeof(T));
  }
};

// f(type of the elements, type of what stands beside them) for a batch: the second is the first, or its accumulation
// type.
template <class F>
void with_element_types(DType dtype, bool same, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f.template operator()<float, float>();
    case DType::kFloat64:
      return f.template operator()<double, double>();
    case DType::kBFloat16:
      return same ? f.template operator()<c10::BFloat16, c10::BFloat16>()
                  : f.template operator()<c10::BFloat16, float>();
    case DType::kFloat16:
      return same ? f.template operator()<c10::Half, c10::Half>() : f.template operator()<c10::Half, float>();
  }
}

// tanh within 3 ulp: x + x³ P(x²) near 0, else 1 − 2e / (1 + e) with e = exp(−2|x|).
inline Vec<float> fast_tanh(const Vec<float>& x) {
  using F = Vec<float>;
  const F magnitude = x.abs(), square = x * x, one(1.0f);
  F p(-5.70498872745e-3f);
  p = at::vec::fmadd(p, square, F(2.06390887954e-2f));
  p = at::vec::fmadd(p, square, F(-5.37397155531e-2f));
  p = at::vec::fmadd(p, square, F(1.33314422036e-1f));
  p = at::vec::fmadd(p, square, F(-3.33332819422e-1f));
  const F near = at::vec::fmadd(p * square, x, x);
  const F e = exp_nonpositive(magnitude * F(-2.0f)), far = one - (e + e) / (one + e);
  const F signed_far = F::blendv(far, far.neg(), x < F(0.0f));
  return F::blendv(signed_far, near, magnitude < F(0.625f));
}
inline Vec<double> fast_tanh(const Vec<double>& x) {
  return x.tanh();
}

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
    if (cap != A(0)) z = fast_tanh(z / Vec<A>(cap)) * Vec<A>(cap);
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
