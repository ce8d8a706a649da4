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
constexpr int kPacksOfBlock = 16;         // whose sums are in the accumulation type

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

enum class Asked { kSums, kValues, kGradient };  // the gradient alone

// T: the prediction; D: the target, T or the accumulation type.
template <class T, class D>
struct ElementKernel {
  using W = Walk<T>;
  using A = typename W::A;
  using V = Vec<A>;

  const Elements& in;
  const Program& program;
  const Transform<A> transform;
  const Periodic<A> weight, pos_weight;
  bool odds = false;
  std::vector<V> of_block;

  ElementKernel(const Elements& elements, const Program& program_)
      : in(elements),
        program(program_),
        transform(in.logit_scale, in.softcap, in.unscaled),
        weight{static_cast<const A*>(in.weight), in.weight_period},
        pos_weight{static_cast<const A*>(in.pos_weight), in.pos_weight_period},
        of_block(program.size, V(A(0))) {
    for (int64_t k = 0; k < program.size; ++k) odds |= reads_odds(static_cast<ElementKind>(program.terms[k].kind));
  }

  // Elements [begin, end). `sums` (size) get theirs added, or `unreduced` every one; `gradient`, if there is one, the
  // gradient times `upstream`, of which there is one or (stride 1) one for each element.
  template <Asked kAsked>
  void run(int64_t begin, int64_t end, double* sums, const Unreduced& unreduced, const A* upstream,
           int64_t upstream_stride, T* gradient) {
    const T* x = static_cast<const T*>(in.input);
    const D* y = static_cast<const D*>(in.target);
    typename W::Pack z, target, found;
    for (V& v : target) v = V(A(0));
    for (int64_t block = begin; block < end; block += kPacksOfBlock * W::kPack) {
      const int64_t stop = std::min(block + kPacksOfBlock * W::kPack, end);
      for (int64_t i = block; i < stop; i += W::kPack) {
        const int64_t count = std::min(W::kPack, stop - i);
        W::load(x + i, count, 0.0f, z);
        if (y != nullptr) W::load(y + i, count, 0.0f, target);
        for (int v = 0; v < W::kVectors; ++v) {
          const int64_t first = i + v * W::kLanes, there = std::clamp<int64_t>(count - v * W::kLanes, 0, W::kLanes);
          found[v] = element<kAsked>(z[v], target[v], first, there, unreduced);
          if (upstream_stride != 0) {
            found[v] = found[v] * load_first(upstream + first, there, 0.0f);
          } else if (upstream != nullptr) {
            found[v] = found[v] * V(*upstream);
          }
        }
        if (gradient != nullptr) W::store(gradient + i, count, found);
      }
      if (kAsked != Asked::kSums) continue;
      for (int64_t k = 0; k < program.size; ++k) {
        sums[k] += horizontal_sum(of_block[k]);
        of_block[k] = V(A(0));
      }
    }
  }

  // A vector of ∂L/∂x; the values go to `unreduced`, to the sums of the block, or nowhere.
  template <Asked kAsked>
  V element(const V& x, const V& y, int64_t first, int64_t there, const Unreduced& unreduced) {
    ElementInputs<V> e;
    e.z = transform(x);
    e.y = y;
    e.weight = weight.at(first, there);
    e.pos_weight = pos_weight.at(first, there);
    e.limits = in.limits;
    const LogOdds<V> of_z(odds ? e.z : V(A(0)));
    V gradient(A(0)), total(A(0));
    for (int64_t k = 0; k < program.size; ++k) {
      const Term& term = program.terms[k];
      const V value = element_value<V>(static_cast<ElementKind>(term.kind), term.parameter, e, of_z,
                                       V(static_cast<A>(term.scale)), gradient);
      if constexpr (kAsked == Asked::kValues) {
        total = total + V(static_cast<A>(term.scale)) * value;
        if (unreduced.parts != nullptr)
          store_first(static_cast<A*>(unreduced.parts) + k * in.count + first, there, value);
      } else if constexpr (kAsked == Asked::kSums) {
        of_block[k] = of_block[k] + (there == W::kLanes ? value : V::set(V(A(0)), value, there));
      }
    }
    if constexpr (kAsked == Asked::kValues) store_first(static_cast<A*>(unreduced.loss) + first, there, total);
    return gradient * transform.slope(e.z);
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
        Kernel(in, program).template run<Asked::kValues>(begin, end, nullptr, unreduced, nullptr, 0, gradient);
      });
      return;
    }
    std::vector<double> of_pieces((in.count + kElementPiece - 1) / kElementPiece * program.size);
    over_pieces(in, [&](int64_t begin, int64_t end, int64_t piece) {
      double* const own = of_pieces.data() + piece * program.size;
      Kernel(in, program).template run<Asked::kSums>(begin, end, own, {}, nullptr, 0, gradient);
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
