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

#include <cstdint>
#include <limits>

#include "divergence.h"
#include "numbers.h"

namespace objkern {
inline namespace OBJKERN_VARIANT {

// ---- what the pass over a row collects --------------------------------------------------------------------------

// Sums over the others j, with t_j = z_j − max and e_j = exp(t_j). A class whose logit is −inf is excluded: it adds
// to nothing and is not counted. The `w` sums use the class weights w (1 where there are none).
template <class R>
struct Centred {
  R max = R(0);            // M = max z_j; 0 where there is no other class left
  R sum_e = R(0);          // S = Σ e_j
  R sum_et = R(0);         // Σ e_j t_j
  R sum_t = R(0);          // C = Σ t_j
  R sum_dd = R(0);         // Σ (z_j − mean)² about the mean of the others
  R sum_zz = R(0);         // Σ z_j²; from M, C and Q it would lose a digit
  R sum_w = R(0);          // Σ w_j
  R sum_wt = R(0);         // Σ w_j t_j
  R sum_q = R(0);          // Σ w_j q_j      q: a dense probability target
  R sum_qt = R(0);         // Σ w_j q_j t_j
  R classes = R(0);        // n, the number of classes that count, the target included
  R target = R(0);         // z_y; −inf where there is no target
  R target_weight = R(0);  // w_y
  R target_is_max = R(0);  // 1 if the target is the first maximum of the row
  Divergence<R> reference;
};

// ---- the vocabulary of the terms --------------------------------------------------------------------------------

// The order is the order of objkern.terms.Statistics.
template <class R>
struct Statistics {
  R logprob = R(0);            // log p_y, or Σ w_j q_j log p_j for a dense target q
  R other_logprob = R(0);      // log(1 − p_y)
  R lse = R(0);                // log Σ exp z_j
  R entropy = R(0);            // −Σ p_j log p_j
  R max_logit = R(0);          // max z_j
  R mean_logit = R(0);         // Σ z_j / n, n the number of classes that are not excluded
  R mean_square_logit = R(0);  // Σ z_j² / n
  R logit_variance = R(0);     // Σ (z_j − mean)² / n
  R target_logit = R(0);       // z_y
  R mean_logprob = R(0);       // Σ w_j log p_j / n
  R forward_kl = R(0);         // KL(q ‖ p), q of the reference; both at the temperature
  R reverse_kl = R(0);         // KL(p ‖ q)
};
constexpr int kStatistics = 12;

// Which statistics a term reads, as bits; what nobody reads is neither collected nor differentiated.
enum Reads : int64_t {
  kLogprob = 1 << 0,
  kOtherLogprob = 1 << 1,
  kLse = 1 << 2,
  kEntropy = 1 << 3,
  kMaxLogit = 1 << 4,
  kMeanLogit = 1 << 5,
  kMeanSquareLogit = 1 << 6,
  kLogitVariance = 1 << 7,
  kTargetLogit = 1 << 8,
  kMeanLogprob = 1 << 9,
  kForwardKl = 1 << 10,
  kReverseKl = 1 << 11,
  kDivergences = kForwardKl | kReverseKl,
  kEverything = (1 << kStatistics) - 1,
};

// The numbers that several formulas share; d = (M − z_y) + log S is log((1 − p_y) / p_y).
template <class R>
struct Odds {
  R d, log_s, inverse_s, p_target, p_others, nlp_target, nlp_others;  // nlp: −log p_y and −log(1 − p_y)
  R nlp_target_low;                                                   // what nlp_target was rounded by

  OBJKERN_INLINE explicit Odds(const Centred<R>& c) {
    using L = Lane<R>;
    log_s = L::log(c.sum_e);
    inverse_s = L::select(L::equal(c.sum_e, R(0)), R(0), R(1) / c.sum_e);  // 0: the others are impossible
    const R margin = c.max - c.target;
    d = margin + log_s;
    R low = R(0);
    if constexpr (L::kCompensated) {
      low = rounded_off(c.max, R(0) - c.target, margin) + rounded_off(margin, log_s, d);
      low = L::select(L::equal(low, low), low, R(0));  // ∞ − ∞, where d is infinite
    }
    const LogOdds<R> odds(d, low);
    p_target = odds.sigmoid_minus;
    p_others = odds.sigmoid_plus;
    nlp_target = odds.softplus_plus;
    nlp_target_low = odds.softplus_plus_low;
    nlp_others = odds.softplus_minus;
  }
};

// t_y and z_y, and 0 where there is no target: it then adds nothing to the moments.
template <class R>
OBJKERN_INLINE R target_t(const Centred<R>& c) {
  return Lane<R>::select(Lane<R>::equal(c.target, minus_infinity<R>()), R(0), c.target - c.max);
}

template <class R>
OBJKERN_INLINE R finite_target(const Centred<R>& c) {
  return Lane<R>::select(Lane<R>::equal(c.target, minus_infinity<R>()), R(0), c.target);
}

// −Σ w_j log p_j over all classes: −log p_j = nlp_others + log S − t_j for the others.
template <class R>
OBJKERN_INLINE R weighted_nlp(const Centred<R>& c, const Odds<R>& o) {
  using L = Lane<R>;
  const R others = L::select(L::equal(c.sum_e, R(0)), R(0), weighted(c.sum_w, o.nlp_others + o.log_s));
  return weighted(c.target_weight, o.nlp_target) + others - c.sum_wt;
}

// 1/n; the division is left out where nothing in `reads` is a mean.
template <class R>
OBJKERN_INLINE R inverse_classes(const Centred<R>& c, int64_t reads) {
  const int64_t means = kMeanLogit | kMeanSquareLogit | kLogitVariance | kMeanLogprob;
  return (reads & means) != 0 ? R(1) / c.classes : R(0);
}

// The statistics in `reads`; those made of log-probabilities are there anyway.
template <class R>
OBJKERN_INLINE Statistics<R> derive(const Centred<R>& c, const Odds<R>& o, bool dense_target,
                                    int64_t reads = kEverything) {
  using L = Lane<R>;
  const R inverse_n = inverse_classes(c, reads);
  const auto no_target = L::equal(c.target, minus_infinity<R>());
  Statistics<R> s;
  s.logprob = dense_target ? c.sum_qt - c.sum_q * o.log_s : R(0) - o.nlp_target;
  s.other_logprob = R(0) - o.nlp_others;
  s.target_logit = c.target;
  if ((reads & kLse) != 0) {
    s.lse = L::select(L::less(o.d, R(0)), c.target + o.nlp_target, c.max + o.log_s + o.nlp_others);
  }
  if ((reads & kEntropy) != 0) {
    const R mu = c.sum_et * o.inverse_s;
    s.entropy = weighted(o.p_target, o.nlp_target) + weighted(o.p_others, o.nlp_others + o.log_s - mu);
  }
  if ((reads & kMaxLogit) != 0) {
    const auto alone = L::equal(c.sum_e, R(0));
    const R larger = L::select(L::less(c.target, c.max), c.max, c.target);  // NaN if the target's logit is
    const R only = L::select(no_target, R(std::numeric_limits<float>::quiet_NaN()), c.target);
    s.max_logit = L::select(alone, only, L::select(L::equal(c.max, c.max), larger, c.max));
  }
  if ((reads & kMeanLogit) != 0) s.mean_logit = c.max + (c.sum_t + target_t(c)) * inverse_n;
  if ((reads & kMeanSquareLogit) != 0) {
    const R z_target = finite_target(c);
    const R mean = (c.sum_zz + z_target * z_target) * inverse_n;
    s.mean_square_logit = L::select(L::equal(c.max, c.max), mean, c.max);  // NaN beside a logit of +inf, as all others
  }
  if ((reads & kLogitVariance) != 0) {  // the target joins the others as a second sample of size 1
    const R others = c.classes - L::select(no_target, R(0), R(1));
    const R apart = target_t(c) - L::select(L::equal(others, R(0)), R(0), c.sum_t / others);
    const R joined = L::select(no_target, R(0), apart * apart * others * inverse_n);
    s.logit_variance = (c.sum_dd + joined) * inverse_n;
  }
  if ((reads & kMeanLogprob) != 0) s.mean_logprob = R(0) - weighted_nlp(c, o) * inverse_n;
  s.forward_kl = c.reference.forward;
  s.reverse_kl = c.reference.reverse;
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
  kForwardKl,
  kReverseKl,
};
constexpr int64_t kTermKinds = 12;

OBJKERN_INLINE int64_t reads_of(TermKind kind, double parameter) {
  switch (kind) {
    case TermKind::kCrossEntropy:
      return kLogprob | (parameter != 0 ? kMeanLogprob : 0);
    case TermKind::kZLoss:
      return kLse;
    case TermKind::kMaxZLoss:
      return kMaxLogit;
    case TermKind::kEntropy:
      return kEntropy;
    case TermKind::kFocal:
      return parameter != 0 ? kLogprob | kOtherLogprob : kLogprob;
    case TermKind::kPoly1:
    case TermKind::kMargin:
      return kLogprob | kOtherLogprob;
    case TermKind::kGeneralizedCrossEntropy:
      return kLogprob;
    case TermKind::kUnlikelihood:
      return kOtherLogprob;
    case TermKind::kLogitL2:
      return kMeanSquareLogit;
    case TermKind::kForwardKl:
      return kForwardKl;
    case TermKind::kReverseKl:
      return kReverseKl;
  }
  return 0;
}

// The value of a term for a row; adds scale · ∂value/∂s to `grad`. `row_weight` is the class weight of the target,
// which cross-entropy alone reads; `logprob_low` is what log p_y was rounded by, if that is known.
template <class R>
OBJKERN_INLINE R term_value(TermKind kind, double parameter, R row_weight, double scale_, const Statistics<R>& s,
                            Statistics<R>& grad, R logprob_low = R(0)) {
  using L = Lane<R>;
  const R scale = R(scale_), p = R(parameter);
  switch (kind) {
    case TermKind::kCrossEntropy: {  // parameter: label smoothing ε
      const R hard = (R(1) - p) * row_weight;
      R value = R(0) - hard * s.logprob;
      grad.logprob = grad.logprob - scale * hard;
      if (parameter != 0) {
        value = value - p * s.mean_logprob;
        grad.mean_logprob = grad.mean_logprob - scale * p;
      }
      return value;
    }
    case TermKind::kZLoss:
      grad.lse = grad.lse + scale * R(2) * s.lse;
      return s.lse * s.lse;
    case TermKind::kMaxZLoss:
      grad.max_logit = grad.max_logit + scale * R(2) * s.max_logit;
      return s.max_logit * s.max_logit;
    case TermKind::kEntropy:
      grad.entropy = grad.entropy + scale;
      return s.entropy;
    case TermKind::kFocal: {  // parameter: γ; (1 − p)^γ = exp(γ log(1 − p))
      if (parameter == 0) {
        grad.logprob = grad.logprob - scale;
        return R(0) - s.logprob;
      }
      const R focus = L::exp_of_product(p, s.other_logprob);
      grad.logprob = grad.logprob - scale * focus;
      grad.other_logprob = grad.other_logprob - scale * weighted(focus, p * s.logprob);
      return R(0) - weighted(focus, s.logprob);
    }
    case TermKind::kPoly1: {  // parameter: ε
      const R others = p * L::exp(s.other_logprob);
      grad.logprob = grad.logprob - scale;
      grad.other_logprob = grad.other_logprob + scale * others;
      return others - s.logprob;
    }
    case TermKind::kGeneralizedCrossEntropy:  // parameter: q
      grad.logprob = grad.logprob - scale * L::exp_of_product(p, s.logprob) * (R(1) + p * logprob_low);
      return (R(0) - L::expm1(p * s.logprob)) / p;
    case TermKind::kUnlikelihood:
      grad.other_logprob = grad.other_logprob - scale;
      return R(0) - s.other_logprob;
    case TermKind::kMargin: {  // parameter: m; the log-odds against the target grow by m
      const LogOdds<R> odds(s.other_logprob - s.logprob + p);
      grad.logprob = grad.logprob - scale * odds.sigmoid_plus;
      grad.other_logprob = grad.other_logprob + scale * odds.sigmoid_plus;
      return odds.softplus_plus;
    }
    case TermKind::kLogitL2:
      grad.mean_square_logit = grad.mean_square_logit + scale;
      return s.mean_square_logit;
    case TermKind::kForwardKl:  // parameter: T
      grad.forward_kl = grad.forward_kl + scale * (p * p);
      return p * p * s.forward_kl;
    case TermKind::kReverseKl:
      grad.reverse_kl = grad.reverse_kl + scale * (p * p);
      return p * p * s.reverse_kl;
  }
  return R(std::numeric_limits<float>::quiet_NaN());
}

// ---- the gradient of a row --------------------------------------------------------------------------------------

// dL/dz_j = e_j (exp_1 + exp_t t_j) + const_1 + const_t t_j + const_z z_j + const_w w_j + const_q w_j q_j   for j ≠ y,
// plus max_grad at the first maximum of the others; the target's own element is target_grad, computed directly,
// because p_y − 1 has no digits left where the model is sure. The order is that of Depth: a shallow objective has no
// more than the first fields.
//
// A divergence adds f_j (of_p + of_pd d_j) + of_q e_j for every j, the target too; e, f and d are those of
// divergence.h, relative to max_z and max_r.
template <class R>
struct RowGradient {
  R max = R(0), target_grad = R(0), exp_1 = R(0);
  R exp_t = R(0), const_1 = R(0);
  R const_z = R(0);
  R const_t = R(0), const_w = R(0), const_q = R(0), max_grad = R(0);
  R max_z = R(0), max_r = R(0), of_p = R(0), of_pd = R(0), of_q = R(0);
};
constexpr int kRowGradient = 15;

// How much of the vocabulary an objective needs: what the passes over a row are compiled for.
enum class Depth : int {
  kPlain,    // Σ e: cross-entropy, z-loss and what else is made of log-probabilities
  kEntropy,  // and Σ e t, Σ t: entropy, label smoothing
  kSquare,   // and Σ z²: logit L2
  kFull,     // and everything else
};

OBJKERN_INLINE Depth depth_of(int64_t reads, bool weighted_classes, bool dense_target) {
  const int64_t rest = kMaxLogit | kMeanLogit | kLogitVariance | kDivergences;
  if ((reads & rest) != 0 || dense_target || (weighted_classes && (reads & kMeanLogprob) != 0)) return Depth::kFull;
  if ((reads & kMeanSquareLogit) != 0) return Depth::kSquare;
  return (reads & (kEntropy | kMeanLogprob)) != 0 ? Depth::kEntropy : Depth::kPlain;
}

// How many fields of RowGradient an objective has.
OBJKERN_INLINE int row_gradient_fields(int64_t reads, bool weighted_classes, bool dense_target) {
  constexpr int kOfDepth[] = {3, 5, 6, 10};
  if ((reads & kDivergences) != 0) return kRowGradient;
  return kOfDepth[static_cast<int>(depth_of(reads, weighted_classes, dense_target))];
}

// From the partial derivatives of the row's value to the coefficients of its gradient, for the statistics in `reads`.
// `weighted_classes` says whether the class weights w_j differ from 1 (then they are read per element).
template <class R>
OBJKERN_INLINE RowGradient<R> chain(const Centred<R>& c, const Odds<R>& o, const Statistics<R>& s,
                                    const Statistics<R>& f, int64_t reads, bool dense_target, bool weighted_classes) {
  using L = Lane<R>;
  const R r = o.p_others * o.inverse_s;  // p_j = r e_j
  const R inverse_n = inverse_classes(c, reads);
  RowGradient<R> g;
  g.max = c.max;

  if ((reads & kLogprob) != 0) {
    if (dense_target) {
      g.exp_1 = g.exp_1 - f.logprob * c.sum_q * r;
      g.const_q = g.const_q + f.logprob;
    } else {
      g.exp_1 = g.exp_1 - f.logprob * r;
      g.target_grad = g.target_grad + f.logprob * o.p_others;
    }
  }
  if ((reads & kOtherLogprob) != 0) {  // ∂log(1 − p_y)/∂z_j = p_y e_j / S
    const R own = weighted(o.p_target, f.other_logprob);
    g.exp_1 = g.exp_1 + own * o.inverse_s;
    g.target_grad = g.target_grad - own;
  }
  if ((reads & kLse) != 0) {
    g.exp_1 = g.exp_1 + f.lse * r;
    g.target_grad = g.target_grad + f.lse * o.p_target;
  }
  if ((reads & kEntropy) != 0) {  // −p_j (log p_j + H), log p_j = t_j − log S − nlp_others
    const R mu = c.sum_et * o.inverse_s;
    g.exp_1 = g.exp_1 - weighted(r, f.entropy * (s.entropy - o.log_s - o.nlp_others));
    g.exp_t = g.exp_t - f.entropy * r;
    g.target_grad = g.target_grad - f.entropy * weighted(o.p_target * o.p_others, o.log_s - mu - o.d);
  }
  if ((reads & kMaxLogit) != 0) {
    const auto at_target = L::less(R(0), c.target_is_max);
    g.target_grad = g.target_grad + L::select(at_target, f.max_logit, R(0));
    g.max_grad = L::select(at_target, R(0), f.max_logit);
  }
  if ((reads & kMeanLogit) != 0) {
    g.const_1 = g.const_1 + f.mean_logit * inverse_n;
    g.target_grad = g.target_grad + f.mean_logit * inverse_n;
  }
  if ((reads & kMeanSquareLogit) != 0) {
    const R twice = R(2) * f.mean_square_logit * inverse_n;
    g.const_z = g.const_z + twice;
    g.target_grad = g.target_grad + twice * finite_target(c);
  }
  if ((reads & kLogitVariance) != 0) {
    const R twice = R(2) * f.logit_variance * inverse_n;
    const R mean_t = (c.sum_t + target_t(c)) * inverse_n;
    g.const_t = g.const_t + twice;
    // Logits of −3e38 that mask classes have no finite mean, which is nothing to a gradient that is not of it.
    g.const_1 = g.const_1 - weighted(twice, mean_t);
    g.target_grad = g.target_grad + weighted(twice, target_t(c) - mean_t);
  }
  if ((reads & kTargetLogit) != 0) g.target_grad = g.target_grad + f.target_logit;
  if ((reads & kMeanLogprob) != 0) {  // (w_j − W p_j) / n; at the target (w_y (1 − p_y) − (W − w_y) p_y) / n
    const R share = f.mean_logprob * inverse_n;
    g.exp_1 = g.exp_1 - share * (c.sum_w + c.target_weight) * r;
    if (weighted_classes) {
      g.const_w = g.const_w + share;
    } else {
      g.const_1 = g.const_1 + share;
    }
    g.target_grad = g.target_grad + share * (c.target_weight * o.p_others - c.sum_w * o.p_target);
  }
  if ((reads & kDivergences) != 0) {  // (p_j − q_j) / T, and p_j (log p_j − log q_j − KL) / T
    const Divergence<R>& v = c.reference;
    g.max_z = v.max_z;
    g.max_r = v.max_r;
    g.of_p = v.to_p * (f.forward_kl + weighted(f.reverse_kl, v.log_ratio - v.reverse));
    g.of_pd = R(0) - v.to_p * f.reverse_kl;
    g.of_q = R(0) - v.to_q * f.forward_kl;
  }
  g.exp_1 = L::select(L::equal(c.sum_e, R(0)), R(0), g.exp_1);  // no other class is left: it may be NaN
  return g;
}

// ---- pieces of a row --------------------------------------------------------------------------------------------

// The plain sums over a piece of the others, relative to the piece's own maximum. Pieces merge associatively, so a
// row may be collected in segments, in any number of threads, or on several devices.
struct Piece {
  double max = 0, sum_e = 0, sum_et = 0, sum_t = 0, sum_dd = 0, sum_zz = 0, classes = 0;
};

OBJKERN_INLINE Piece merge(const Piece& a, const Piece& b) {
  if (a.classes == 0) return b;
  if (b.classes == 0) return a;
  const Piece& low = a.max < b.max ? a : b;
  Piece sum = a.max < b.max ? b : a;
  const double shift = low.max - sum.max, factor = std::exp(shift);  // t = t_low + shift
  sum.sum_e += factor * low.sum_e;
  sum.sum_et += weighted(factor, low.sum_et + shift * low.sum_e);
  const double apart = low.sum_t / low.classes + shift - sum.sum_t / sum.classes;  // of the two means
  sum.sum_dd += low.sum_dd + apart * apart * low.classes * sum.classes / (low.classes + sum.classes);
  sum.sum_t += low.sum_t + low.classes * shift;
  sum.sum_zz += low.sum_zz;
  sum.classes += low.classes;
  return sum;
}

}  // namespace OBJKERN_VARIANT
}  // namespace objkern
