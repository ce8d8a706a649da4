// The mathematics of objkern: what a row of logits is reduced to, what an objective makes of that, and the affine
// form of its gradient. Host and device code; no torch, no CUDA API, no memory access.
//
//   centred sums  ──derive──▶  statistics  ──terms──▶  value, ∂value/∂statistics  ──chain──▶  row gradient
//   (one pass)                 (the vocabulary)                                              (one pass writes it)
//
// One row: logits z of V classes (after logit scale and softcap), target y or none, p = softmax(z).
// "Others" are the classes other than the target; without a target they are all classes. Sums over the others are
// taken relative to their own maximum, because raw sums cancel: lse − z_y is 0 in float32 from a margin of 20 on,
// and Σ p·z loses every digit under a common offset of 1e7.
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

// ---- scalar functions in their stable forms ---------------------------------------------------------------------

// log(1 + exp(x)), exact in both tails.
template <class R>
OBJKERN_INLINE R softplus(R x) {
  return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
}

// 1 / (1 + exp(−x)), exact in both tails.
template <class R>
OBJKERN_INLINE R sigmoid(R x) {
  if (x >= 0) return R(1) / (R(1) + std::exp(-x));
  const R e = std::exp(x);
  return e / (R(1) + e);
}

// a·b where a is a probability: 0·∞ is the limit 0, as in p·log p.
template <class R>
OBJKERN_INLINE R weighted(R probability, R b) {
  return probability == 0 ? R(0) : probability * b;
}

// ---- what the pass over a row collects --------------------------------------------------------------------------

// Sums over the others j, with t_j = z_j − max and e_j = exp(t_j). A class whose logit is −inf is excluded: it adds
// to nothing and is not counted. The `w` sums use the class weights w (1 where there are none).
template <class R>
struct Centred {
  R max = 0;            // M = max z_j; 0 where there is no other class left
  R sum_e = 0;          // S = Σ e_j
  R sum_et = 0;         // Σ e_j t_j
  R sum_t = 0;          // C = Σ t_j
  R sum_tt = 0;         // Q = Σ t_j²
  R sum_zz = 0;         // Σ z_j²; from M, C and Q it would lose a digit
  R sum_w = 0;          // Σ w_j
  R sum_wt = 0;         // Σ w_j t_j
  R sum_q = 0;          // Σ w_j q_j      q: a dense probability target
  R sum_qt = 0;         // Σ w_j q_j t_j
  R classes = 0;        // n, the number of classes that count, the target included
  R target = 0;         // z_y; −inf where there is no target
  R target_weight = 0;  // w_y
  R target_is_max = 0;  // 1 if the target is the first maximum of the row
};

// ---- the vocabulary of the terms --------------------------------------------------------------------------------

// The order is the order of objkern.terms.Statistics.
template <class R>
struct Statistics {
  R logprob = 0;            // log p_y, or Σ w_j q_j log p_j for a dense target q
  R other_logprob = 0;      // log(1 − p_y)
  R lse = 0;                // log Σ exp z_j
  R entropy = 0;            // −Σ p_j log p_j
  R max_logit = 0;          // max z_j
  R mean_logit = 0;         // Σ z_j / n, n the number of classes that are not excluded
  R mean_square_logit = 0;  // Σ z_j² / n
  R logit_variance = 0;     // Σ (z_j − mean)² / n
  R target_logit = 0;       // z_y
  R mean_logprob = 0;       // Σ w_j log p_j / n
};
constexpr int kStatistics = 10;

// The numbers that several formulas share; d = (M − z_y) + log S is log((1 − p_y) / p_y).
template <class R>
struct Odds {
  R d, log_s, p_target, p_others, nlp_target, nlp_others;  // nlp_target = −log p_y, nlp_others = −log(1 − p_y)

  OBJKERN_INLINE explicit Odds(const Centred<R>& c) {
    log_s = std::log(c.sum_e);
    d = (c.max - c.target) + log_s;
    p_target = sigmoid(-d);
    p_others = sigmoid(d);
    nlp_target = softplus(d);
    nlp_others = softplus(-d);
  }
};

// t_y, and 0 where there is no target: it then adds nothing to the moments.
template <class R>
OBJKERN_INLINE R target_t(const Centred<R>& c) {
  return c.target != -std::numeric_limits<R>::infinity() ? c.target - c.max : R(0);
}

// −Σ w_j log p_j over all classes: −log p_j = nlp_others + log S − t_j for the others.
template <class R>
OBJKERN_INLINE R weighted_nlp(const Centred<R>& c, const Odds<R>& o) {
  const R others = c.sum_e == 0 || c.sum_w == 0 ? R(0) : c.sum_w * (o.nlp_others + o.log_s);
  const R own = c.target_weight == 0 ? R(0) : c.target_weight * o.nlp_target;
  return own + others - c.sum_wt;
}

template <class R>
OBJKERN_INLINE Statistics<R> derive(const Centred<R>& c, bool dense_target) {
  const Odds<R> o(c);
  const R n = c.classes;
  const R t_target = target_t(c);
  const R mean_t = (c.sum_t + t_target) / n;
  Statistics<R> s;
  s.logprob = dense_target ? c.sum_qt - c.sum_q * o.log_s : -o.nlp_target;
  s.other_logprob = -o.nlp_others;
  s.lse = o.d < 0 ? c.target + o.nlp_target : c.max + o.log_s + o.nlp_others;
  const R mu = c.sum_e == 0 ? R(0) : c.sum_et / c.sum_e;
  s.entropy = weighted(o.p_target, o.nlp_target) + weighted(o.p_others, o.nlp_others + o.log_s - mu);
  s.max_logit = c.sum_e == 0 || c.target > c.max ? c.target : c.max;
  s.mean_logit = c.max + mean_t;
  s.mean_square_logit = (c.sum_zz + (c.target != -std::numeric_limits<R>::infinity() ? c.target * c.target : R(0))) / n;
  s.logit_variance = (c.sum_tt + t_target * t_target) / n - mean_t * mean_t;
  s.target_logit = c.target;
  s.mean_logprob = -weighted_nlp(c, o) / n;
  return s;
}

// ---- terms: a value and its partial derivatives -----------------------------------------------------------------

// The formulas, sources and the reasons for each stand in objkern/terms.py; the order there is the order here.
enum class TermKind : int64_t {
  kCrossEntropy,
  kZLoss,
  kMaxZLoss,
  kEntropy,
  kFocal,
  kPoly1,
  kGeneralizedCrossEntropy,
  kUnlikelihood,
  kMargin,
  kLogitL2,
};
constexpr int64_t kTermKinds = 10;

// The value of a term for a row; adds scale · ∂value/∂s to `grad`. `row_weight` is the class weight of the target,
// which cross-entropy alone reads.
template <class R>
OBJKERN_INLINE R term_value(TermKind kind, R parameter, R row_weight, R scale, const Statistics<R>& s,
                            Statistics<R>& grad) {
  switch (kind) {
    case TermKind::kCrossEntropy: {  // parameter: label smoothing ε
      const R hard = (R(1) - parameter) * row_weight;
      R value = 0;
      if (parameter != 1) {
        value -= hard * s.logprob;
        grad.logprob -= scale * hard;
      }
      if (parameter != 0) {
        value -= parameter * s.mean_logprob;
        grad.mean_logprob -= scale * parameter;
      }
      return value;
    }
    case TermKind::kZLoss:
      grad.lse += scale * R(2) * s.lse;
      return s.lse * s.lse;
    case TermKind::kMaxZLoss:
      grad.max_logit += scale * R(2) * s.max_logit;
      return s.max_logit * s.max_logit;
    case TermKind::kEntropy:
      grad.entropy += scale;
      return s.entropy;
    case TermKind::kFocal: {  // parameter: γ; (1 − p)^γ = exp(γ log(1 − p))
      const R focus = parameter == 0 ? R(1) : std::exp(parameter * s.other_logprob);
      grad.logprob -= scale * focus;
      grad.other_logprob -= scale * weighted(focus, parameter * s.logprob);
      return -weighted(focus, s.logprob);
    }
    case TermKind::kPoly1: {  // parameter: ε
      const R others = parameter * std::exp(s.other_logprob);
      grad.logprob -= scale;
      grad.other_logprob += scale * others;
      return others - s.logprob;
    }
    case TermKind::kGeneralizedCrossEntropy:  // parameter: q
      grad.logprob -= scale * std::exp(parameter * s.logprob);
      return -std::expm1(parameter * s.logprob) / parameter;
    case TermKind::kUnlikelihood:
      grad.other_logprob -= scale;
      return -s.other_logprob;
    case TermKind::kMargin: {  // parameter: m; the log-odds against the target grow by m
      const R d = s.other_logprob - s.logprob + parameter;
      grad.logprob -= scale * sigmoid(d);
      grad.other_logprob += scale * sigmoid(d);
      return softplus(d);
    }
    case TermKind::kLogitL2:
      grad.mean_square_logit += scale;
      return s.mean_square_logit;
  }
  return std::numeric_limits<R>::quiet_NaN();
}

// ---- the gradient of a row --------------------------------------------------------------------------------------

// dL/dz_j = e_j (exp_1 + exp_t t_j) + const_1 + const_t t_j + const_z z_j + const_w w_j + const_q w_j q_j   for j ≠ y,
// plus max_grad at the first maximum of the others; the target's own element is target_grad, computed directly,
// because p_y − 1 has no digits left where the model is sure.
template <class R>
struct RowGradient {
  R max = 0, exp_1 = 0, exp_t = 0, const_1 = 0, const_t = 0, const_z = 0, const_w = 0, const_q = 0, max_grad = 0,
    target_grad = 0;
};
constexpr int kRowGradient = 10;

// From the partial derivatives of the row's value to the coefficients of its gradient. `weighted_classes` says
// whether the class weights w_j differ from 1 (then they are read per element).
template <class R>
OBJKERN_INLINE RowGradient<R> chain(const Centred<R>& c, const Statistics<R>& s, const Statistics<R>& f,
                                    bool dense_target, bool weighted_classes) {
  const Odds<R> o(c);
  const R n = c.classes;
  const R r = c.sum_e == 0 ? R(0) : o.p_others / c.sum_e;  // p_j = r e_j
  const R w = c.sum_w + c.target_weight;
  RowGradient<R> g;
  g.max = c.max;

  if (dense_target) {
    g.exp_1 -= f.logprob * c.sum_q * r;
    g.const_q += f.logprob;
  } else {  // 0·NaN included: a row without a softmax has no gradient, whatever its weight
    g.exp_1 -= f.logprob * r;
    g.target_grad += f.logprob * o.p_others;
  }
  if (f.other_logprob != 0) {  // ∂log(1 − p_y)/∂z_j = p_y e_j / S
    g.exp_1 += c.sum_e == 0 ? R(0) : weighted(o.p_target, f.other_logprob) / c.sum_e;
    g.target_grad -= weighted(o.p_target, f.other_logprob);
  }
  if (f.lse != 0) {
    g.exp_1 += f.lse * r;
    g.target_grad += f.lse * o.p_target;
  }
  if (f.entropy != 0) {  // −p_j (log p_j + H), log p_j = t_j − log S − nlp_others
    const R mu = c.sum_e == 0 ? R(0) : c.sum_et / c.sum_e;
    g.exp_1 -= weighted(r, f.entropy * (s.entropy - o.log_s - o.nlp_others));
    g.exp_t -= f.entropy * r;
    g.target_grad -= f.entropy * weighted(o.p_target * o.p_others, o.log_s - mu - o.d);
  }
  if (f.max_logit != 0) (c.target_is_max != 0 ? g.target_grad : g.max_grad) += f.max_logit;
  if (f.mean_logit != 0) {
    g.const_1 += f.mean_logit / n;
    g.target_grad += f.mean_logit / n;
  }
  if (f.mean_square_logit != 0) {
    g.const_z += R(2) * f.mean_square_logit / n;
    g.target_grad += R(2) * f.mean_square_logit / n * c.target;
  }
  if (f.logit_variance != 0) {
    const R t_target = target_t(c);
    const R mean_t = (c.sum_t + t_target) / n;
    g.const_t += R(2) * f.logit_variance / n;
    g.const_1 -= R(2) * f.logit_variance / n * mean_t;
    g.target_grad += R(2) * f.logit_variance / n * (t_target - mean_t);
  }
  if (f.target_logit != 0) g.target_grad += f.target_logit;
  if (f.mean_logprob != 0) {  // (w_j − W p_j) / n; at the target (w_y (1 − p_y) − (W − w_y) p_y) / n
    g.exp_1 -= f.mean_logprob * w * r / n;
    (weighted_classes ? g.const_w : g.const_1) += f.mean_logprob / n;
    g.target_grad += f.mean_logprob * (c.target_weight * o.p_others - c.sum_w * o.p_target) / n;
  }
  return g;
}

}  // namespace OBJKERN_VARIANT
}  // namespace objkern
