// Elementwise objectives: one pass over the elements, in blocks whose sums join float64 sums in a fixed order.
#pragma once

#include <vector>

#include "../elementwise.h"
#include "kernels.h"
#include "vectors.h"

namespace objkern::cpu {
inline namespace OBJKERN_VARIANT {
namespace {

constexpr int64_t kElementPiece = 16384;  // elements of a task, whose sums are a number for each term

// Numbers that repeat with a period, a vector at a time.
template <class A>
struct Periodic {
  const A* numbers;
  int64_t period;

  Vec<A> at(int64_t i, int64_t count) const {  // elements i to i + count
    if (numbers == nullptr) return Vec<A>(A(1));
    const int64_t first = i % period;
    if (first + count <= period) return load_first(numbers + first, count, 1.0f);
    alignas(64) A lanes[Vec<A>::size()];
    for (int64_t k = 0; k < Vec<A>::size(); ++k) lanes[k] = k < count ? numbers[(first + k) % period] : A(1);
    return Vec<A>::loadu(lanes);
  }
};

enum class Asked { kSums, kSumsAndGradient, kValues, kGradient };

// T: the prediction; D: the target, T or the accumulation type.
template <class T, class D>
class ElementKernel {
 public:
  using W = Walk<T>;
  using A = typename W::A;

  ElementKernel(const Elements& elements, const Program& program)
      : in_(elements),
        program_(program),
        transform_(elements.logit_scale, elements.softcap, elements.unscaled),
        weight_{static_cast<const A*>(elements.weight), elements.weight_period},
        pos_weight_{static_cast<const A*>(elements.pos_weight), elements.pos_weight_period} {
    for (int64_t k = 0; k < program.size; ++k) odds_ |= reads_odds(static_cast<ElementKind>(program.terms[k].kind));
    for (ElementInputs<V>& e : inputs_) e.limits = elements.limits;
  }

  // Elements [begin, end). `sums` (size) get theirs added, or `unreduced` every one; `gradient` is the gradient times
  // `upstream`, of which there is one or (stride 1) one for each element. What is not asked for is not touched.
  template <Asked kAsked>
  void run(int64_t begin, int64_t end, double* sums, const Unreduced& unreduced, const A* upstream,
           int64_t upstream_stride, T* gradient) {
    constexpr bool kSums = sums_asked(kAsked), kWrites = gradient_asked(kAsked);
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t count = std::min(kBlock, end - first);
      load(first, count);
      if (kAsked == Asked::kValues) std::fill(total_, total_ + kVectors, V(A(0)));
      if (kWrites) std::fill(gradient_, gradient_ + kVectors, V(A(0)));
      for (int64_t k = 0; k < program_.size; ++k) {
        const Term& term = program_.terms[k];
        with_kind(static_cast<ElementKind>(term.kind), [&]<ElementKind kKind>() {
          const double sum = values<kKind, kAsked>(term, k, first, count, unreduced);
          if (kSums) sums[k] += sum;
        });
      }
      if (kAsked == Asked::kValues) store_total(first, count, static_cast<A*>(unreduced.loss));
      if (kWrites) write(first, count, upstream, upstream_stride, gradient);
    }
  }

 private:
  using V = Vec<A>;
  static constexpr int kPacks = Vec<float>::size() == 16 ? 8 : 16, kVectors = kPacks * W::kVectors;
  static constexpr int64_t kBlock = kPacks * W::kPack;

  const Elements& in_;
  const Program& program_;
  const Transform<A> transform_;
  const Periodic<A> weight_, pos_weight_;
  bool odds_ = false;
  // A block of elements, which stays in the first-level cache while the terms take their turns.
  ElementInputs<V> inputs_[kVectors];
  LogOdds<V> of_z_[kVectors];
  V gradient_[kVectors], total_[kVectors];

  static constexpr bool sums_asked(Asked asked) { return asked == Asked::kSums || asked == Asked::kSumsAndGradient; }
  static constexpr bool gradient_asked(Asked asked) {
    return asked == Asked::kGradient || asked == Asked::kSumsAndGradient;
  }
  static int64_t there(int64_t count, int v) { return std::clamp<int64_t>(count - v * W::kLanes, 0, W::kLanes); }

  void load(int64_t first, int64_t count) {
    const T* x = static_cast<const T*>(in_.input) + first;
    const D* y = in_.target == nullptr ? nullptr : static_cast<const D*>(in_.target) + first;
    typename W::Pack z, target;
    for (int p = 0; p < kPacks; ++p) {
      const int64_t left = count - p * W::kPack;
      if (left >= W::kPack) {
        W::load(x + p * W::kPack, z);
      } else {
        W::load(x + p * W::kPack, std::max<int64_t>(left, 0), 0.0f, z);
      }
      for (int v = 0; v < W::kVectors; ++v) inputs_[p * W::kVectors + v].z = transform_(z[v]);
      if (y == nullptr) continue;
      if (left >= W::kPack) {
        W::load(y + p * W::kPack, target);
      } else {
        W::load(y + p * W::kPack, std::max<int64_t>(left, 0), 0.0f, target);
      }
      for (int v = 0; v < W::kVectors; ++v) inputs_[p * W::kVectors + v].y = target[v];
    }
    for (int v = 0; v < kVectors && in_.weight != nullptr; ++v)
      inputs_[v].weight = weight_.at(first + v * W::kLanes, there(count, v));
    for (int v = 0; v < kVectors && in_.pos_weight != nullptr; ++v)
      inputs_[v].pos_weight = pos_weight_.at(first + v * W::kLanes, there(count, v));
    for (int v = 0; v < kVectors && odds_; ++v) of_z_[v] = LogOdds<V>(inputs_[v].z);
  }

  // Adds a term's part to the gradient. Its values go to their sum, which is returned, to `unreduced`, or nowhere.
  template <ElementKind kKind, Asked kAsked>
  double values(const Term& term, int64_t k, int64_t first, int64_t count, const Unreduced& unreduced) {
    const V scale(static_cast<A>(term.scale));
    V sum(A(0));
    for (int v = 0; v < kVectors; ++v) {
      V unread(A(0));
      const V value = element_value<V>(kKind, term.parameter, inputs_[v], of_z_[v], scale,
                                       gradient_asked(kAsked) ? gradient_[v] : unread);
      if constexpr (sums_asked(kAsked)) {
        sum = sum + (count == kBlock ? value : V::set(V(A(0)), value, there(count, v)));
      } else if constexpr (kAsked == Asked::kValues) {
        total_[v] = total_[v] + scale * value;
        if (unreduced.parts == nullptr) continue;
        store_first(static_cast<A*>(unreduced.parts) + k * in_.count + first + v * W::kLanes, there(count, v), value);
      }
    }
    return sums_asked(kAsked) ? horizontal_sum(sum) : 0.0;
  }

  void store_total(int64_t first, int64_t count, A* loss) const {
    for (int v = 0; v < kVectors; ++v) store_first(loss + first + v * W::kLanes, there(count, v), total_[v]);
  }

  void write(int64_t first, int64_t count, const A* upstream, int64_t stride, T* out) const {
    const V u(upstream == nullptr ? A(1) : *upstream);
    typename W::Pack found;
    for (int p = 0; p < kPacks; ++p) {
      for (int i = 0; i < W::kVectors; ++i) {
        const int v = p * W::kVectors + i;
        found[i] = gradient_[v] * transform_.slope(inputs_[v].z);
        found[i] = found[i] * (stride == 0 ? u : load_first(upstream + first + v * W::kLanes, there(count, v), 0.0f));
      }
      if (const int64_t left = count - p * W::kPack; left > 0) W::store(out + first + p * W::kPack, left, found);
    }
  }
};

// f(begin, end, piece) for every piece of the elements.
template <class F>
void over_pieces(const Elements& in, const F& f) {
  const int64_t pieces = (in.count + kElementPiece - 1) / kElementPiece;
  at::parallel_for(0, pieces, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(i * kElementPiece, std::min((i + 1) * kElementPiece, in.count), i);
  });
}

void elementwise_door(const Elements& in, const Program& program, double* sums, const Unreduced& unreduced,
                      void* gradient_) {
  with_element_types(in.dtype, in.target == nullptr || in.target_dtype == in.dtype, [&]<class T, class D>() {
    using Kernel = ElementKernel<T, D>;
    T* gradient = static_cast<T*>(gradient_);
    if (program.per_row) {
      over_pieces(in, [&](int64_t begin, int64_t end, int64_t) {
        Kernel(in, program).template run<Asked::kValues>(begin, end, nullptr, unreduced, nullptr, 0, nullptr);
      });
      return;
    }
    std::vector<double> of_pieces((in.count + kElementPiece - 1) / kElementPiece * program.size);
    over_pieces(in, [&](int64_t begin, int64_t end, int64_t piece) {
      double* const own = of_pieces.data() + piece * program.size;
      if (gradient == nullptr) {
        Kernel(in, program).template run<Asked::kSums>(begin, end, own, {}, nullptr, 0, nullptr);
      } else {
        Kernel(in, program).template run<Asked::kSumsAndGradient>(begin, end, own, {}, nullptr, 0, gradient);
      }
    });
    std::fill(sums, sums + program.size, 0.0);
    for (size_t i = 0; i < of_pieces.size(); ++i) sums[i % program.size] += of_pieces[i];
  });
}

void elementwise_gradient_door(const Elements& in, const Program& program, const void* upstream, int64_t stride,
                               void* gradient) {
  with_element_types(in.dtype, in.target == nullptr || in.target_dtype == in.dtype, [&]<class T, class D>() {
    using A = typename Walk<T>::A;
    over_pieces(in, [&](int64_t begin, int64_t end, int64_t) {
      ElementKernel<T, D>(in, program)
          .template run<Asked::kGradient>(begin, end, nullptr, {}, static_cast<const A*>(upstream), stride,
                                          static_cast<T*>(gradient));
    });
  });
}

}  // namespace
}  // namespace OBJKERN_VARIANT
}  // namespace objkern::cpu
