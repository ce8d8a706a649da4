// A row beside the same row of a reference: the sums of their divergence, and its share of the gradient. See
// ../divergence.h.
#pragma once

#include <vector>

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

  const Rows& in;
  const Transform<A>& transform;
  const A inverse_temperature;
  std::vector<A> z, r;  // of a segment

  Reference(const Rows& rows, const Transform<A>& transform_)
      : in(rows), transform(transform_), inverse_temperature(static_cast<A>(1.0 / rows.temperature)) {}

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

  // Over `count` classes from `begin` on of the row of logits x.
  DivergenceSums<double> collect(const T* x, int64_t row, int64_t begin, int64_t count) {
    z.resize(count + W::kPack);
    r.resize(count + W::kPack);
    const V low = minus_inf<A>(), zero(A(0));
    V high_z = low, high_r = low;
    for (int64_t j = 0; j < count; j += W::kPack) {
      Pack of_z, of_r;
      W::load(x + begin + j, std::min(W::kPack, count - j), -std::numeric_limits<float>::infinity(), of_z);
      load(row, begin + j, std::min(W::kPack, count - j), of_r);
      for (int k = 0; k < W::kVectors; ++k) {
        const V z_ = transform(of_z[k]), r_ = V::blendv(of_r[k], low, is_minus_inf(z_));
        high_z = at::vec::clamp_min(z_, high_z);
        high_r = at::vec::clamp_min(r_, high_r);
        z_.store(z.data() + j + k * W::kLanes);
        r_.store(r.data() + j + k * W::kLanes);
      }
    }
    const auto finite = [](A max) { return max == -std::numeric_limits<A>::infinity() ? A(0) : max; };
    const A max_z = finite(horizontal_max(high_z)), max_r = finite(horizontal_max(high_r));
    const V m_z(max_z), m_r(max_r), apart(max_r - max_z), by(inverse_temperature);
    DivergenceSums<V> sums;
    for (int64_t j = 0; j < count; j += W::kLanes) {
      const V z_ = V::loadu(z.data() + j), r_ = V::loadu(r.data() + j), out = is_minus_inf(z_);
      const V e = exp_nonpositive((r_ - m_r) * by), f = exp_nonpositive((z_ - m_z) * by);
      add_class(sums, e, f, V::blendv(((r_ - z_) - apart) * by, zero, out), sizeof(A) == 8);
    }
    DivergenceSums<double> found;
    found.max_z = max_z;
    found.max_r = max_r;
    found.e = horizontal_sum(sums.e);
    found.f = horizontal_sum(sums.f);
    found.ed = horizontal_sum(sums.ed);
    found.eg = horizontal_sum(sums.eg);
    found.fd = horizontal_sum(sums.fd);
    found.fg = horizontal_sum(sums.fg);
    return found;
  }

  // What the divergence adds to the gradient of classes whose logits are z and r; finite where r is −∞.
  V share(const RowGradient<A>& g, const V& z_, const V& r_) const {
    const V by(inverse_temperature);
    const V e = exp_nonpositive((r_ - V(g.max_r)) * by), f = exp_nonpositive((z_ - V(g.max_z)) * by);
    const V d = clamp_exponent(((r_ - z_) - V(g.max_r - g.max_z)) * by);
    return at::vec::fmadd(f, at::vec::fmadd(V(g.of_pd), d, V(g.of_p)), V(g.of_q) * e);
  }
  A share_at(const RowGradient<A>& g, A z_, int64_t row, int64_t j) const {
    alignas(64) A lanes[W::kLanes];
    share(g, V(z_), V(at(row, j))).store(lanes);
    return lanes[0];
  }
};

}  // namespace
}  // namespace OBJKERN_VARIANT
}  // namespace objkern::cpu
