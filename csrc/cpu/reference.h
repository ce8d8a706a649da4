// A row beside the same row of a reference: the sums of their divergence, and its share of the gradient. See
// ../divergence.h.
#pragma once

#include "kernels.h"
#include "vectors.h"

namespace objkern::cpu {
inline namespace OBJKERN_VARIANT {
namespace {

// T: the logits.
template <class T>
struct Reference {
  using W = Walk<T>;
  using A = typename W::A;
  using V = Vec<A>;
  using Pack = typename W::Pack;

  // Classes, which the first cache keeps from the maxima to the sums. With few lanes, whose long sums take many
  // additions, they are fewer and summed by themselves; see Running in wide.h.
  static constexpr bool kFewLanes = sizeof(A) == 4 && W::kLanes < 8;
  static constexpr int64_t kAtOnce = kFewLanes ? 256 : 1024;

  const Rows& in;
  const Transform<A>& transform;
  const A inverse_temperature;

  Reference(const Rows& rows, const Transform<A>& transform_)
      : in(rows), transform(transform_), inverse_temperature(static_cast<A>(1.0 / rows.temperature)) {}

  const T* of_row(int64_t row) const { return static_cast<const T*>(in.reference) + row * in.reference_stride; }

  // The reference's logits of `count` classes from j on, −∞ past them.
  void load(int64_t row, int64_t j, int64_t count, Pack& v) const {
    const int64_t first = row * in.reference_stride + j;
    if (in.reference_dtype == in.dtype) {
      W::load(static_cast<const T*>(in.reference) + first, count, -std::numeric_limits<float>::infinity(), v);
    } else {
      W::load(static_cast<const A*>(in.reference) + first, count, -std::numeric_limits<float>::infinity(), v);
    }
  }
  A at(int64_t row, int64_t j) const {
    const int64_t place = row * in.reference_stride + j;
    return in.reference_dtype == in.dtype ? static_cast<A>(static_cast<const T*>(in.reference)[place])
                                          : static_cast<const A*>(in.reference)[place];
  }

  // Logits and those of the reference, in the same order; −∞ past `count`.
  [[gnu::always_inline]] void load_both(const T* x, int64_t row, int64_t j, int64_t count, Pack& z, Pack& r) const {
    const float low = -std::numeric_limits<float>::infinity();
    if (in.reference_dtype != in.dtype) {
      W::load(x + j, count, low, z);
      load(row, j, count, r);
    } else if (count == W::kPack) [[likely]] {
      W::take(x + j, z);
      W::take(of_row(row) + j, r);
    } else {
      W::take(x + j, count, low, z);
      W::take(of_row(row) + j, count, low, r);
    }
    if (!transform.identity)
      for (int k = 0; k < W::kVectors; ++k) z[k] = transform(z[k]);
  }

  // f(z, r, whether the pack is whole: a type) for every pack of classes [first, last), in order.
  template <class F>
  [[gnu::always_inline]] void packs(const T* x, int64_t row, int64_t first, int64_t last, const F& f) const {
    Pack z, r;
    int64_t j = first;
    if (transform.identity && in.reference_dtype == in.dtype) {
      const T* const beside = of_row(row);
      for (; j + W::kPack <= last; j += W::kPack) {
        W::take(x + j, z);
        W::take(beside + j, r);
        f(z, r, std::true_type{});
      }
    } else {
      for (; j + W::kPack <= last; j += W::kPack) {
        load_both(x, row, j, W::kPack, z, r);
        f(z, r, std::true_type{});
      }
    }
    if (j == last) return;
    load_both(x, row, j, last - j, z, r);
    f(z, r, std::false_type{});
  }

  // Over classes [begin, end) of the row of logits x.
  DivergenceSums<double> collect(const T* x, int64_t row, int64_t begin, int64_t end) const {
    return (in.reads & kReverseKl) != 0 ? sums_of<true>(x, row, begin, end) : sums_of<false>(x, row, begin, end);
  }

  template <bool kReverse>
  DivergenceSums<double> sums_of(const T* x, int64_t row, int64_t begin, int64_t end) const {
    const V low = minus_inf<A>(), zero(A(0)), by(inverse_temperature);
    const auto finite = [](A max) { return max == -std::numeric_limits<A>::infinity() ? A(0) : max; };
    const A most = std::numeric_limits<A>::max() / 8 * std::min(A(1), static_cast<A>(in.temperature));
    A top_z = -std::numeric_limits<A>::infinity(), top_r = top_z;
    DivergenceSums<V> sums;
    for (int64_t first = begin; first < end; first += kAtOnce) {
      const int64_t last = std::min(first + kAtOnce, end);
      V high_z = low, high_r = low, low_z = zero, low_r = zero;
      packs(x, row, first, last, [&](const Pack& z, const Pack& r, auto whole) __attribute__((always_inline)) {
        for (int k = 0; k < W::kVectors; ++k) {
          high_z = at::vec::clamp_min(z[k], high_z);
          if constexpr (whole) {
            high_r = at::vec::clamp_min(r[k], high_r);
            low_z = at::vec::clamp_max(z[k], low_z);
            low_r = at::vec::clamp_max(r[k], low_r);
          } else {
            high_r = at::vec::clamp_min(V::blendv(r[k], low, is_minus_inf(z[k])), high_r);
          }
        }
      });
      // Whether z has −∞ in a whole pack, where what r has does not count.
      const bool excluded = any_above(V(std::numeric_limits<A>::lowest()), low_z);
      if (excluded) [[unlikely]] {
        high_r = low;
        packs(x, row, first, last, [&](const Pack& z, const Pack& r, auto) {
          for (int k = 0; k < W::kVectors; ++k)
            high_r = at::vec::clamp_min(V::blendv(r[k], low, is_minus_inf(z[k])), high_r);
        });
      }
      const A max_z = std::max(top_z, horizontal_max(high_z)), max_r = std::max(top_r, horizontal_max(high_r));
      if (top_z != -std::numeric_limits<A>::infinity() && (max_z != top_z || max_r != top_r)) {
        const double per = 1.0 / in.temperature;
        Raise((static_cast<double>(max_z) - static_cast<double>(top_z)) * per,
              (static_cast<double>(max_r) - static_cast<double>(top_r)) * per)
            .template apply<A>(sums);
      }
      top_z = max_z;
      top_r = max_r;
      const V m_z(finite(top_z)), m_r(finite(top_r)), apart = m_r - m_z;
      const bool far = far_apart(finite(top_z), finite(top_r));
      // No difference of such logits, over T, is infinite.
      const V least(-most);
      const bool ordinary = !any_above(least, low_z) && !any_above(least, low_r) && top_z <= most && top_r <= most;
      const auto add = [&]<bool kUsual>() __attribute__((always_inline)) {
        DivergenceSums<V> own;  // in registers
        if constexpr (!kFewLanes) own = sums;
        packs(x, row, first, last, [&](const Pack& z, const Pack& r_, auto whole) __attribute__((always_inline)) {
          constexpr bool kFinite = kUsual && whole;
#pragma GCC unroll 2
          for (int k = 0; k < W::kVectors; ++k) {
            V r = r_[k], below_z = z[k] - m_z;
            V d = (!kUsual && far ? (r - m_r) - below_z : (r - z[k]) - apart) * by;
            if constexpr (!kFinite) {
              const V out = is_minus_inf(z[k]);
              r = V::blendv(r, low, out);
              d = V::blendv(d, zero, out);
            }
            const V e = exp_nonpositive((r - m_r) * by), f = exp_nonpositive(below_z * by);
            add_class<sizeof(A) == 8, kReverse, kFinite>(own, e, f, d);
          }
        });
        if constexpr (kFewLanes) {
          for (const auto field : {&DivergenceSums<V>::e, &DivergenceSums<V>::f, &DivergenceSums<V>::ed,
                                   &DivergenceSums<V>::eg, &DivergenceSums<V>::fd, &DivergenceSums<V>::fg})
            own.*field = own.*field + sums.*field;
        }
        sums = own;
      };
      if (far || !ordinary) [[unlikely]] {
        add.template operator()<false>();
      } else {
        add.template operator()<true>();
      }
    }
    DivergenceSums<double> found;
    found.max_z = finite(top_z);
    found.max_r = finite(top_r);
    found.e = horizontal_sum(sums.e);
    found.f = horizontal_sum(sums.f);
    found.ed = horizontal_sum(sums.ed);
    found.eg = horizontal_sum(sums.eg);
    found.fd = horizontal_sum(sums.fd);
    found.fg = horizontal_sum(sums.fg);
    return found;
  }

  // What the divergence adds to a row's gradient, times `factor`; finite where d is not.
  struct Share {
    const bool of_forward_alone, far;  // KL(q ‖ p) alone needs no log-ratio
    const V by, max_z, max_r, of_p, of_q, of_pd, apart;

    Share(const RowGradient<A>& g, A factor, A inverse_temperature)
        : of_forward_alone(g.of_pd == A(0)),
          far(far_apart(g.max_z, g.max_r)),
          by(inverse_temperature),
          max_z(g.max_z),
          max_r(g.max_r),
          of_p(g.of_p * factor),
          of_q(g.of_q * factor),
          of_pd(g.of_pd * factor),
          apart(g.max_r - g.max_z) {}

    // Of classes whose logits are z and r.
    template <bool kForwardAlone>
    [[gnu::always_inline]] V of(const V& z, const V& r) const {
      const V below_z = z - max_z, below_r = r - max_r;
      const V e = exp_nonpositive(below_r * by), f = exp_nonpositive(below_z * by);
      if constexpr (kForwardAlone) return at::vec::fmadd(f, of_p, of_q * e);
      const V d = at::vec::clamp((far ? below_r - below_z : (r - z) - apart) * by, V(-kMostApart), V(kMostApart));
      return at::vec::fmadd(f, at::vec::fmadd(of_pd, d, of_p), of_q * e);
    }
    [[gnu::always_inline]] V operator()(const V& z, const V& r) const {
      return of_forward_alone ? of<true>(z, r) : of<false>(z, r);
    }
  };

  Share share(const RowGradient<A>& g, A factor) const { return Share(g, factor, inverse_temperature); }

  A share_at(const RowGradient<A>& g, A z_, int64_t row, int64_t j) const {
    alignas(64) A lanes[W::kLanes];
    share(g, A(1))(V(z_), V(at(row, j))).store(lanes);
    return lanes[0];
  }
};

}  // namespace
}  // namespace OBJKERN_VARIANT
}  // namespace objkern::cpu
