// The mathematics of elementwise objectives: a prediction z (after logit scale and softcap), a target y, and what a
// term makes of the two. Host and device code, as objective.h.
//
// Each term adds scale · ∂value/∂z to a gradient; there is nothing else to know of an element, so an objective is one
// pass that reads z and y, and one that writes, or both at once.
#pragma once

#include "numbers.h"

namespace objkern {
inline namespace OBJKERN_VARIANT {

// The formulas, their sources and the reasons stand in objkern/terms.py; the order there is the order here.
enum class ElementKind : int64_t {
  kBinaryCrossEntropy,
  kBernoulliEntropy,
  kMeanSquaredError,
  kMeanAbsoluteError,
  kHuber,
  kLogitL2,
};
constexpr int64_t kElementKinds = 6;

OBJKERN_INLINE bool reads_odds(ElementKind kind) {
  return kind == ElementKind::kBinaryCrossEntropy || kind == ElementKind::kBernoulliEntropy;
}

// f with the kind as a constant, so that the choice is made once for many elements.
#pragma nv_exec_check_disable
template <class F>
OBJKERN_INLINE void with_kind(ElementKind kind, const F& f) {
  switch (kind) {
    case ElementKind::kBinaryCrossEntropy:
      return f.template operator()<ElementKind::kBinaryCrossEntropy>();
    case ElementKind::kBernoulliEntropy:
      return f.template operator()<ElementKind::kBernoulliEntropy>();
    case ElementKind::kMeanSquaredError:
      return f.template operator()<ElementKind::kMeanSquaredError>();
    case ElementKind::kMeanAbsoluteError:
      return f.template operator()<ElementKind::kMeanAbsoluteError>();
    case ElementKind::kHuber:
      return f.template operator()<ElementKind::kHuber>();
    case ElementKind::kLogitL2:
      return f.template operator()<ElementKind::kLogitL2>();
  }
}

// `weight` is of binary cross-entropy or the squared error, `pos_weight` of the former; 1 where there are none.
// `limits`: where the prediction is infinite, a value is its limit; otherwise binary cross-entropy is the number (NaN
// or ∞) that torch's formula gives.
template <class R>
struct ElementInputs {
  R z = R(0), y = R(0), weight = R(1), pos_weight = R(1);
  bool limits = true;
};

// The value of a term for an element, whose gradient gets scale · ∂value/∂z added. `odds` are those of z, and read by
// the terms of `reads_odds` alone.
template <class R>
OBJKERN_INLINE R element_value(ElementKind kind, double parameter, const ElementInputs<R>& in, const LogOdds<R>& odds,
                               R scale, R& grad) {
  using L = Lane<R>;
  const R p = R(parameter);
  switch (kind) {
    case ElementKind::kBinaryCrossEntropy: {  // parameter: label smoothing ε; each side exact in its tail
      const R y = parameter == 0 ? in.y : in.y * (R(1) - p) + p * R(0.5);
      const R no = R(1) - y, yes = y * in.pos_weight;
      grad = grad + scale * in.weight * (no * odds.sigmoid_plus - yes * odds.sigmoid_minus);
      R value = weighted(no, odds.softplus_plus) + weighted(yes, odds.softplus_minus);
      if (!in.limits) {
        const R infinity = R(std::numeric_limits<float>::infinity());
        const R log_sigmoid = R(0) - odds.softplus_minus;
        const R torchs = no * in.z - (R(1) + (in.pos_weight - R(1)) * y) * log_sigmoid;
        value = L::select(L::equal(L::abs(in.z), infinity), torchs, value);
      }
      return in.weight * L::select(L::equal(in.z, in.z), value, in.z);  // a NaN stays one beside weights of 0
    }
    case ElementKind::kBernoulliEntropy:
      grad = grad - scale * weighted(odds.sigmoid_plus * odds.sigmoid_minus, in.z);
      return weighted(odds.sigmoid_plus, odds.softplus_minus) + weighted(odds.sigmoid_minus, odds.softplus_plus);
    case ElementKind::kMeanSquaredError: {  // parameter: 1 if the weights are its own, 0 if it has none
      const R d = in.z - in.y, weight = parameter != 0 ? in.weight : R(1);
      grad = grad + scale * R(2) * weight * d;
      return weight * d * d;
    }
    case ElementKind::kMeanAbsoluteError: {  // the subgradient at 0 is 0
      const R d = in.z - in.y, size = L::abs(d);
      const R sign = L::select(L::less(R(0), d), R(1), L::select(L::less(d, R(0)), R(-1), d * R(0)));
      grad = grad + scale * sign;
      return size;
    }
    case ElementKind::kHuber: {  // parameter: δ
      const R d = in.z - in.y, size = L::abs(d);
      const auto far = L::less(p, size);
      const R end = L::select(L::less(d, R(0)), R(0) - p, p);
      grad = grad + scale * L::select(far, end, d);
      return L::select(far, p * (size - R(0.5) * p), R(0.5) * d * d);
    }
    case ElementKind::kLogitL2:
      grad = grad + scale * R(2) * in.z;
      return in.z * in.z;
  }
  return R(std::numeric_limits<float>::quiet_NaN());
}

}  // namespace OBJKERN_VARIANT
}  // namespace objkern
