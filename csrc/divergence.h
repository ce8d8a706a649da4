// How far the distribution of a row of logits z is from that of a reference r, at a temperature T. Host and device
// code.
//
//   p = softmax(z/T), q = softmax(r/T) over the classes that z does not exclude
//   d_j = ((r_j − max r) − (z_j − max z)) / T       e_j = exp((r_j − max r) / T)       f_j = exp((z_j − max z) / T)
//
// With E = Σ e and F = Σ f, log q_j − log p_j = d_j − log(E/F), and since f_j = e_j exp(−d_j),
//
//   F/E − 1 = (Σ e_j g(−d_j) − Σ e_j d_j) / E =: x,   g(t) = exp(t) − 1 − t ≥ 0
//   KL(q ‖ p) = Σ e_j d_j / E + log(1 + x) = Σ e_j g(−d_j) / E + (log(1 + x) − x)       1 + x = F/E
//
// and KL(p ‖ q) likewise with f, −d and g(d). What is of first order in d has cancelled on paper, so that a divergence
// of 1e-6 between nearly equal distributions keeps its digits, where Σ q log q − Σ q log p has none left in float32.
#pragma once

#include "numbers.h"

namespace objkern {
inline namespace OBJKERN_VARIANT {

// The divergences of a row, and what its gradient reads.
template <class R>
struct Divergence {
  R max_z = R(0), max_r = R(0);
  R to_p = R(0), to_q = R(0);  // p_j / T = to_p f_j, q_j / T = to_q e_j
  R log_ratio = R(0);          // log(E/F)
  R forward = R(0);            // KL(q ‖ p)
  R reverse = R(0);            // KL(p ‖ q)
};
constexpr int kDivergence = 7;

// Sums over some classes, relative to their own maxima. A class that r excludes has e = 0 and d = −∞.
template <class R>
struct DivergenceSums {
  R max_z = R(0), max_r = R(0);
  R e = R(0), f = R(0);
  R ed = R(0), eg = R(0);  // Σ e d, Σ e g(−d)
  R fd = R(0), fg = R(0);  // Σ f d, Σ f g(d)
};

// 1/k! − d/(k+1)! + d²/(k+2)! ..., as far as 1/kLast!.
constexpr double over_factorial(int k) {
  return k < 2 ? 1.0 : over_factorial(k - 1) / k;
}

template <int k, int kLast, class R>
[[gnu::always_inline]] OBJKERN_INLINE R alternating(R d) {
  constexpr double kOver = over_factorial(k);
  if constexpr (k == kLast) return R(kOver);
  return R(kOver) - d * alternating<k + (k < kLast), kLast>(d);
}

// g(−d) for |d| < 1/2 by its series, as long as terms matter; as a plain formula it would be all cancellation.
template <bool kDouble, class R>
[[gnu::always_inline]] OBJKERN_INLINE R g_of_minus(R d) {
  return d * d * alternating<2, kDouble ? 14 : 8>(d);
}

// Of the two ways to take the difference of two differences the one that rounds less: z_j and r_j beside each other
// where their maxima are near, each beside its own maximum where an offset of thousands lies between them.
template <class R>
OBJKERN_INLINE bool far_apart(R max_z, R max_r) {
  return Lane<R>::less(R(16), Lane<R>::abs(max_r - max_z));
}

// A gradient takes d within ±kMostApart. Beyond lie classes that r excludes, or that either side masks by a number like
// −3e38, which is −∞ over T < 1: their e or f is 0, and 0·∞ would be NaN.
constexpr float kMostApart = 1e30f;

// One class more; the sums of KL(p ‖ q) alone only if kReverse. kFinite: d is known to be.
template <bool kDouble, bool kReverse, bool kFinite = false, class R>
[[gnu::always_inline]] OBJKERN_INLINE void add_class(DivergenceSums<R>& s, R e, R f, R d) {
  using L = Lane<R>;
  const R ed = kFinite ? e * d : weighted(e, d);
  const auto small = L::less(L::abs(d), R(0.5));
  const R series = e * g_of_minus<kDouble>(d);
  s.e = s.e + e;
  s.f = s.f + f;
  s.ed = s.ed + ed;
  s.eg = s.eg + L::select(small, series, f - e + ed);
  if constexpr (kReverse) {
    const R fd = kFinite ? f * d : weighted(f, d);
    s.fd = s.fd + fd;
    s.fg = s.fg + L::select(small, (ed - series) * d - series, e - f - fd);  // e − f = e d − e g(−d)
  }
}

// To maxima that are larger by `up_z` and `up_r`, both over T: with s = up_z − up_r, d becomes d + s and
// g(−d − s) = exp(−s) g(−d) + g(−s) + (1 − exp(−s)) d. An infinite `up_r`: r has excluded every class so far. NaN,
// which is −∞ − (−∞): it excludes those that come, too.
struct Raise {
  double less_z, less_r, s, change, g_e, g_f;  // change: exp(−up_z) − exp(−up_r)

  OBJKERN_INLINE Raise(double up_z, double up_r) : less_z(std::exp(-up_z)), less_r(0), s(0), change(0), g_e(0), g_f(0) {
    if (!(up_r < std::numeric_limits<double>::infinity())) return;
    less_r = std::exp(-up_r);
    s = up_z - up_r;
    const bool small = std::fabs(s) < 0.5;
    change = small ? less_r * std::expm1(-s) : less_z - less_r;
    g_e = small ? less_r * g_of_minus<true>(s) : change + weighted(less_r, s);
    g_f = small ? less_z * g_of_minus<true>(-s) : -change - weighted(less_z, s);
  }

  // A: the type of a number of R.
  template <class A, class R>
  OBJKERN_INLINE void apply(DivergenceSums<R>& sums) const {
    const auto r = [](double number) { return R(static_cast<A>(number)); };
    sums.eg = weighted(r(less_z), sums.eg) + weighted(sums.e, r(g_e)) - weighted(r(change), sums.ed);
    sums.fg = weighted(r(less_r), sums.fg) + weighted(sums.f, r(g_f)) - weighted(r(change), sums.fd);
    sums.ed = weighted(r(less_r), sums.ed + weighted(sums.e, r(s)));
    sums.fd = weighted(r(less_z), sums.fd + weighted(sums.f, r(s)));
    sums.e = r(less_r) * sums.e;
    sums.f = r(less_z) * sums.f;
  }
};

OBJKERN_INLINE DivergenceSums<double> merge(DivergenceSums<double> a, DivergenceSums<double> b,
                                            double inverse_temperature) {
  if (a.f == 0) return b;
  if (b.f == 0) return a;
  DivergenceSums<double> both;
  both.max_z = a.max_z < b.max_z ? b.max_z : a.max_z;
  both.max_r = a.e == 0 || (a.max_r < b.max_r && b.e != 0) ? b.max_r : a.max_r;
  for (int i = 0; i < 2; ++i) {
    DivergenceSums<double>& part = i == 0 ? a : b;
    const double up_r = part.e == 0 ? std::numeric_limits<double>::infinity() : both.max_r - part.max_r;
    Raise((both.max_z - part.max_z) * inverse_temperature, up_r * inverse_temperature).apply<double>(part);
  }
  both.e = a.e + b.e;
  both.f = a.f + b.f;
  both.ed = a.ed + b.ed;
  both.eg = a.eg + b.eg;
  both.fd = a.fd + b.fd;
  both.fg = a.fg + b.fg;
  return both;
}

// Σ w d / W + log(1 + x) for 1 + x = `ratio`: by the second-order sum where that is small, for then the first two have
// little left of them; else as it stands.
OBJKERN_INLINE double divergence_of(double first, double second, double ratio) {
  const double x = second - first;
  if (second < 0.5 && std::fabs(ratio - 1) < 0.5) return second + (std::log1p(x) - x);
  return first + std::log(ratio);
}

OBJKERN_INLINE Divergence<double> divergence(const DivergenceSums<double>& s, double inverse_temperature) {
  const double second = s.fg / s.f, y = second + s.fd / s.f;
  Divergence<double> found;
  found.max_z = s.max_z;
  found.max_r = s.max_r;
  found.to_p = inverse_temperature / s.f;
  found.to_q = inverse_temperature / s.e;
  found.log_ratio = second < 0.5 && std::fabs(y) < 0.5 ? std::log1p(y) : std::log(s.e / s.f);
  found.forward = divergence_of(s.ed / s.e, s.eg / s.e, s.f / s.e);
  found.reverse = divergence_of(-s.fd / s.f, second, s.e / s.f);
  return found;
}

}  // namespace OBJKERN_VARIANT
}  // namespace objkern
