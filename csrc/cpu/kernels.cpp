// The CPU kernels, one source for every instruction set. Compiled once per capability:
//
//   g++ -O3 -std=c++20 -I$TORCH/include -DCPU_CAPABILITY=AVX2 -DCPU_CAPABILITY_AVX2 -DOBJKERN_VARIANT=avx2
//       -mavx2 -mfma -mf16c -c csrc/cpu/kernels.cpp
//
// A row passes through a scratch row of the accumulation type that stays in the cache:
//
//   1. load, scale, cap ─▶ scratch; the maximum.  The target's place becomes −inf: excluded, like a masked class.
//   2. scratch ─▶ the centred sums.
//   3. the row epilogue of objective.h: values, coefficients of the gradient.
//   4. scratch (fused) or logits (gradient) ─▶ gradient; then the target's own element.
#include "kernels.h"

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "../objective.h"

namespace objkern::cpu {
inline namespace OBJKERN_VARIANT {
namespace {

static_assert(sizeof(Centred<double>) == kCentred * sizeof(double));
static_assert(sizeof(Statistics<double>) == kStatistics * sizeof(double));
static_assert(sizeof(RowGradient<double>) == kRowGradient * sizeof(double));

template <class A>
using Vec = at::vec::Vectorized<A>;

constexpr int64_t kGrain = 16384;  // elements that are worth a task of their own
constexpr int64_t kBlock = 4096;   // elements summed in the accumulation type before they join a float64 sum

// ---- rows as vectors --------------------------------------------------------------------------------------------

// How a row of T is walked: in packs of kVectors vectors of the accumulation type A, one full vector of T each.
template <class T>
struct Walk {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  static constexpr int kVectors = sizeof(T) == 2 ? 2 : 1;
  static constexpr int64_t kLanes = Vec<A>::size();
  static constexpr int64_t kPack = kVectors * kLanes;
  using Pack = Vec<A>[kVectors];

  // `count` elements of E (T or A) from p; lanes past them hold `pad`.
  template <class E>
  static void load(const E* p, int64_t count, float pad, Pack& v) {
    alignas(64) E buffer[kPack];
    if (count < kPack) {
      std::copy(p, p + count, buffer);
      std::fill(buffer + count, buffer + kPack, static_cast<E>(pad));
      p = buffer;
    }
    if constexpr (std::is_same_v<E, A>) {
      for (int k = 0; k < kVectors; ++k) v[k] = Vec<A>::loadu(p + k * kLanes);
    } else {
      at::vec::load_to_float<E>(p, v[0], v[1]);
    }
  }

  static void store(T* p, int64_t count, const Pack& v) {
    if constexpr (std::is_same_v<T, A>) {
      v[0].store(p, count);
    } else {
      at::vec::convert_from_float<T>(v[0], v[1]).store(p, count);
    }
  }

  // f(j, count): full packs, then the named remainder.
  template <class F>
  static void over(int64_t n, const F& f) {
    int64_t j = 0;
    for (; j + kPack <= n; j += kPack) f(j, kPack);
    if (j < n) f(j, n - j);
  }
};

template <class A>
double horizontal_sum(const Vec<A>& v) {
  alignas(64) A lanes[Vec<A>::size()];
  v.store(lanes);
  double sum = 0;
  for (A lane : lanes) sum += lane;
  return sum;
}

template <class A>
Vec<A> minus_inf() {
  return Vec<A>(-std::numeric_limits<A>::infinity());
}

// z − max, kept finite: 0·(−inf) would be NaN where the difference overflows.
template <class A>
Vec<A> difference(const Vec<A>& z, const Vec<A>& max) {
  return at::vec::maximum(z - max, Vec<A>(std::numeric_limits<A>::lowest()));
}

// z = c·tanh(s·x / c), and its derivative to x. A logit of −inf stays −inf: it is tested before the cap.
template <class A>
struct Transform {
  A scale, cap, gain;

  explicit Transform(const Rows& rows)
      : scale(static_cast<A>(rows.logit_scale)),
        cap(static_cast<A>(rows.softcap)),
        gain(rows.unscaled ? A(1) : scale) {}

  Vec<A> operator()(const Vec<A>& x) const {
    if (scale == A(1) && cap == A(0)) return x;
    Vec<A> z = x * Vec<A>(scale);
    if (cap != A(0)) z = (z / Vec<A>(cap)).tanh() * Vec<A>(cap);
    return Vec<A>::blendv(z, minus_inf<A>(), x == minus_inf<A>());
  }

  A operator()(A x) const {  // through the vector form, so that a class has one z everywhere
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

// ---- one row ----------------------------------------------------------------------------------------------------

// T: the logits; D: the dense target, T or the accumulation type.
template <class T, class D>
struct Kernel {
  using W = Walk<T>;
  using A = typename W::A;
  using V = Vec<A>;

  const Rows& in;
  const Transform<A> transform;
  const int64_t n;
  const A* const weight;
  std::vector<A> scratch;  // z of the row, padded with −inf to whole packs; the target's place holds −inf

  explicit Kernel(const Rows& rows)
      : in(rows),
        transform(rows),
        n(rows.classes),
        weight(static_cast<const A*>(rows.class_weight)),
        scratch((rows.classes + W::kPack - 1) / W::kPack * W::kPack) {}

  const T* logits(int64_t row) const { return static_cast<const T*>(in.logits) + row * in.row_stride; }
  const D* dense(int64_t row) const { return static_cast<const D*>(in.dense_target) + row * in.dense_stride; }
  bool ignored(int64_t row) const { return in.target != nullptr && in.target[row] == in.ignore_index; }
  int64_t label(int64_t row) const { return in.target != nullptr ? in.target[row] : -1; }
  double row_weight(int64_t y) const { return y < 0 || weight == nullptr ? 1.0 : static_cast<double>(weight[y]); }

  A scratch_max() const {
    V m = minus_inf<A>();
    for (size_t j = 0; j < scratch.size(); j += W::kLanes) m = at::vec::maximum(m, V::loadu(scratch.data() + j));
    return at::vec::vec_reduce_all<A>([](V a, V b) { return at::vec::maximum(a, b); }, m);
  }

  int64_t first_index_of(A z) const { return std::find(scratch.begin(), scratch.begin() + n, z) - scratch.begin(); }

  // Steps 1 and 2.
  Centred<double> collect(int64_t row) {
    const T* x = logits(row);
    typename W::Pack v;
    V m = minus_inf<A>();
    W::over(n, [&](int64_t j, int64_t count) {
      W::load(x + j, count, -std::numeric_limits<float>::infinity(), v);
      for (int k = 0; k < W::kVectors; ++k) {
        const V z = transform(v[k]);
        m = at::vec::maximum(m, z);
        z.store(scratch.data() + j + k * W::kLanes);
      }
    });
    A max = at::vec::vec_reduce_all<A>([](V a, V b) { return at::vec::maximum(a, b); }, m);

    Centred<double> c;
    const int64_t y = label(row);
    const A infinity = std::numeric_limits<A>::infinity();
    c.target = -infinity;
    if (y >= 0) {
      const A z = scratch[y];
      scratch[y] = -infinity;
      if (!(z < max)) max = scratch_max();
      // A logit of +inf has no softmax: NaN, as for any other class.
      c.target = z == infinity ? std::numeric_limits<A>::quiet_NaN() : z;
      c.target_is_max = z > max || (z == max && first_index_of(max) > y);
    }
    const bool alone = max == -infinity;  // no other class is left
    if (alone) max = 0;
    c.max = max;
    collect_sums(c, max);

    const double own = y >= 0, found = c.classes;  // `found` others are not −inf
    const bool target_excluded = c.target == -infinity;
    const bool infinite_terms = !in.masked && found + own != static_cast<double>(n);
    c.target_weight = y < 0 || (in.masked && target_excluded) ? 0.0 : row_weight(y);
    c.classes = in.masked ? found + !target_excluded : static_cast<double>(n);
    c.sum_w = in.masked ? found : static_cast<double>(n) - own;
    // As numbers, −inf logits make Σ log p_j infinite, and a row of nothing else has no softmax.
    c.sum_wt = infinite_terms ? -infinity : c.sum_t;
    if (!in.masked && alone && target_excluded) c.sum_e = std::numeric_limits<double>::quiet_NaN();
    if (weight != nullptr || in.dense_target != nullptr) collect_weighted(c, max, row, infinite_terms);
    return c;
  }

  void collect_sums(Centred<double>& c, A max) const {
    const V zero(A(0)), one(A(1)), maximum(max);
    for (size_t begin = 0; begin < scratch.size(); begin += kBlock) {
      const size_t end = std::min(begin + kBlock, scratch.size());
      V e_sum(A(0)), et_sum(A(0)), t_sum(A(0)), tt_sum(A(0)), zz_sum(A(0)), classes(A(0));
      for (size_t j = begin; j < end; j += W::kLanes) {
        const V z = V::loadu(scratch.data() + j);
        const V excluded = z == minus_inf<A>();
        const V t = V::blendv(difference(z, maximum), zero, excluded);
        const V e = V::blendv(t.exp(), zero, excluded);
        e_sum = e_sum + e;
        et_sum = at::vec::fmadd(e, t, et_sum);
        t_sum = t_sum + t;
        tt_sum = at::vec::fmadd(t, t, tt_sum);
        const V finite = V::blendv(z, zero, excluded);
        zz_sum = at::vec::fmadd(finite, finite, zz_sum);
        classes = classes + V::blendv(one, zero, excluded);
      }
      c.sum_e += horizontal_sum(e_sum);
      c.sum_et += horizontal_sum(et_sum);
      c.sum_t += horizontal_sum(t_sum);
      c.sum_tt += horizontal_sum(tt_sum);
      c.sum_zz += horizontal_sum(zz_sum);
      c.classes += horizontal_sum(classes);
    }
  }

  // The sums over class weights and a dense target. With `infinite_terms`, −inf logits are numbers: they make the sum
  // infinite, or NaN under a factor of 0, as they do in torch.
  void collect_weighted(Centred<double>& c, A max, int64_t row, bool infinite_terms) const {
    const int64_t y = label(row);
    const D* dense_row = in.dense_target == nullptr ? nullptr : dense(row);
    const V zero(A(0)), one(A(1));
    double sum_w = 0, sum_wt = 0, sum_q = 0, sum_qt = 0;
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      V w_sum(A(0)), wt_sum(A(0)), q_sum(A(0)), qt_sum(A(0));
      W::over(std::min(kBlock, n - begin), [&](int64_t offset, int64_t count) {
        const int64_t j = begin + offset;
        typename W::Pack w, q;
        for (int k = 0; k < W::kVectors; ++k) w[k] = one;
        if (weight != nullptr) W::load(weight + j, count, 0.0f, w);
        if (dense_row != nullptr) W::load(dense_row + j, count, 0.0f, q);
        for (int k = 0; k < W::kVectors; ++k) {
          const V z = V::loadu(scratch.data() + j + k * W::kLanes);
          const V excluded = z == minus_inf<A>();
          const V t = V::blendv(difference(z, V(max)), zero, excluded);
          const V wk = V::blendv(w[k], zero, excluded);
          w_sum = w_sum + wk;
          wt_sum = at::vec::fmadd(wk, t, wt_sum);
          if (dense_row != nullptr) {
            q_sum = q_sum + wk * q[k];
            qt_sum = at::vec::fmadd(wk * q[k], t, qt_sum);
          }
        }
      });
      sum_w += horizontal_sum(w_sum);
      sum_wt += horizontal_sum(wt_sum);
      sum_q += horizontal_sum(q_sum);
      sum_qt += horizontal_sum(qt_sum);
    }
    for (int64_t j = 0; infinite_terms && j < n; ++j) {
      if (j == y || scratch[j] != -std::numeric_limits<A>::infinity()) continue;
      const double w = weight == nullptr ? 1.0 : static_cast<double>(weight[j]);
      const double q = dense_row == nullptr ? 0.0 : static_cast<double>(dense_row[j]);
      sum_w += w;
      sum_wt += w * -std::numeric_limits<double>::infinity();
      sum_q += w * q;
      const bool lifted = in.smoothed && q == 0;  // the smoothed share stands in sum_wt
      if (dense_row != nullptr && !lifted) sum_qt += w * q * -std::numeric_limits<double>::infinity();
    }
    c.sum_w = sum_w;
    c.sum_wt = sum_wt;
    c.sum_q = sum_q;
    c.sum_qt = sum_qt;
  }

  // Step 3.
  Statistics<double> evaluate(int64_t row, const Centred<double>& c, const Program& program, double* values,
                              Statistics<double>& partials) {
    const bool has_dense = in.dense_target != nullptr;
    const Statistics<double> s = derive(c, has_dense);
    const double w = row_weight(label(row));
    for (int64_t k = 0; k < program.size; ++k) {
      const Term& term = program.terms[k];
      values[k * in.rows + row] =
          term_value(static_cast<TermKind>(term.kind), term.parameter, w, term.scale, s, partials);
    }
    double* free = values + program.size * in.rows + row;
    free[0] = s.lse;
    free[in.rows] = c.target_is_max;
    free[2 * in.rows] = std::exp(s.logprob);
    return s;
  }

  RowGradient<A> narrow(const RowGradient<double>& g) const {
    const double* from = &g.max;
    RowGradient<A> out;
    for (int k = 0; k < kRowGradient; ++k) (&out.max)[k] = static_cast<A>(from[k]);
    return out;
  }

  // Step 4. `z_at(j, count, pack)` delivers z; −inf marks what is excluded.
  template <class Z>
  void write(int64_t row, const RowGradient<A>& g, A upstream, A target_z, const Z& z_at, T* out) const {
    const D* dense_row = in.dense_target == nullptr ? nullptr : dense(row);
    const V zero(A(0)), one(A(1)), u(upstream);
    const bool read_weight = weight != nullptr && (g.const_w != 0 || g.const_q != 0);
    const bool read_dense = dense_row != nullptr && g.const_q != 0;
    W::over(n, [&](int64_t j, int64_t count) {
      typename W::Pack z, w, q;
      z_at(j, count, z);
      if (read_weight) W::load(weight + j, count, 0.0f, w);
      if (read_dense) W::load(dense_row + j, count, 0.0f, q);
      for (int k = 0; k < W::kVectors; ++k) {
        const V excluded = z[k] == minus_inf<A>();
        const V t = V::blendv(difference(z[k], V(g.max)), zero, excluded);
        const V e = V::blendv(t.exp(), zero, excluded);
        V d = e * at::vec::fmadd(V(g.exp_t), t, V(g.exp_1)) + at::vec::fmadd(V(g.const_t), t, V(g.const_1));
        if (g.const_z != 0) d = at::vec::fmadd(V(g.const_z), V::blendv(z[k], zero, excluded), d);
        if (read_weight) d = at::vec::fmadd(V(g.const_w), w[k], d);
        if (read_dense) d = d + V(g.const_q) * (read_weight ? w[k] * q[k] : q[k]);
        d = d * u * transform.slope(z[k]);
        z[k] = in.masked ? V::blendv(d, zero, excluded) : d;
      }
      W::store(out + j, count, z);
    });
    const int64_t y = label(row);
    if (y >= 0) {
      const bool excluded = in.masked && target_z == -std::numeric_limits<A>::infinity();
      out[y] = excluded ? T(0) : static_cast<T>(g.target_grad * upstream * transform.slope(target_z));
    }
    if (g.max_grad != 0) add_at_maximum(row, g, upstream, z_at, out);
  }

  // The subgradient of the maximum goes to its first place among the others, where t = 0 and e = 1.
  template <class Z>
  void add_at_maximum(int64_t row, const RowGradient<A>& g, A upstream, const Z& z_at, T* out) const {
    const int64_t y = label(row);
    int64_t place = -1;
    alignas(64) A lanes[W::kPack];
    for (int64_t j = 0; j < n && place < 0; j += W::kPack) {
      typename W::Pack z;
      const int64_t count = std::min(W::kPack, n - j);
      z_at(j, count, z);
      for (int k = 0; k < W::kVectors; ++k) z[k].store(lanes + k * W::kLanes);
      for (int64_t i = 0; i < count && place < 0; ++i)
        if (lanes[i] == g.max && j + i != y) place = j + i;
    }
    if (place < 0) return;
    A d = g.exp_1 + g.const_1 + g.const_z * g.max + g.max_grad;
    const A w = weight == nullptr ? A(1) : weight[place];
    if (weight != nullptr) d += g.const_w * w;
    if (in.dense_target != nullptr) d += g.const_q * w * static_cast<A>(dense(row)[place]);
    out[place] = static_cast<T>(d * upstream * transform.slope(g.max));
  }

  void write_from_logits(int64_t row, const RowGradient<A>& g, A upstream, T* out) const {
    const T* x = logits(row);
    const int64_t y = label(row);
    const A target_z = y < 0 ? A(0) : transform(static_cast<A>(x[y]));
    const auto z_at = [&](int64_t j, int64_t count, typename W::Pack& z) {
      W::load(x + j, count, -std::numeric_limits<float>::infinity(), z);
      for (int k = 0; k < W::kVectors; ++k) z[k] = transform(z[k]);
    };
    write(row, g, upstream, target_z, z_at, out);
  }

  void write_from_scratch(int64_t row, const RowGradient<A>& g, A target_z, T* out) const {
    const auto z_at = [&](int64_t j, int64_t, typename W::Pack& z) {
      for (int k = 0; k < W::kVectors; ++k) z[k] = V::loadu(scratch.data() + j + k * W::kLanes);
    };
    write(row, g, A(1), target_z, z_at, out);
  }
};

// ---- doors ------------------------------------------------------------------------------------------------------

// f(kernel, row) for every row; one kernel, with its scratch, per task.
template <class T, class D, class F>
void over_rows_of(const Rows& rows, const F& f) {
  at::parallel_for(0, rows.rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, rows.classes)),
                   [&](int64_t begin, int64_t end) {
                     Kernel<T, D> kernel(rows);
                     for (int64_t row = begin; row < end; ++row) f(kernel, row);
                   });
}

template <class F>
void over_rows(const Rows& rows, const F& f) {
  const bool dense_as_logits = rows.dense_target == nullptr || rows.dense_dtype == rows.dtype;
  switch (rows.dtype) {
    case DType::kFloat32:
      return over_rows_of<float, float>(rows, f);
    case DType::kFloat64:
      return over_rows_of<double, double>(rows, f);
    case DType::kBFloat16:
      return dense_as_logits ? over_rows_of<c10::BFloat16, c10::BFloat16>(rows, f)
                             : over_rows_of<c10::BFloat16, float>(rows, f);
    case DType::kFloat16:
      return dense_as_logits ? over_rows_of<c10::Half, c10::Half>(rows, f) : over_rows_of<c10::Half, float>(rows, f);
  }
}

void statistics_door(const Rows& rows, double* centred, double* statistics) {
  over_rows(rows, [&](auto& kernel, int64_t row) {
    Centred<double> c;
    Statistics<double> s;
    if (!kernel.ignored(row)) {
      c = kernel.collect(row);
      s = derive(c, rows.dense_target != nullptr);
    }
    std::memcpy(centred + row * kCentred, &c, sizeof c);
    for (int k = 0; k < kStatistics; ++k) statistics[k * rows.rows + row] = (&s.logprob)[k];
  });
}

// Steps 1 to 3 for one row; false if the row is ignored.
template <class K, class G>
bool objective_row(K& kernel, int64_t row, const Program& program, double* values, G* gradient, double* target_z) {
  const Rows& rows = kernel.in;
  if (kernel.ignored(row)) {
    for (int64_t k = 0; k < program.size + kFreeStatistics; ++k) values[k * rows.rows + row] = 0;
    *gradient = G();
    return false;
  }
  Statistics<double> partials;
  const Centred<double> c = kernel.collect(row);
  const Statistics<double> s = kernel.evaluate(row, c, program, values, partials);
  *gradient = kernel.narrow(chain(c, s, partials, rows.dense_target != nullptr, rows.class_weight != nullptr));
  *target_z = c.target;
  return true;
}

void objective_door(const Rows& rows, const Program& program, double* values, void* row_gradient) {
  over_rows(rows, [&](auto& kernel, int64_t row) {
    using A = typename std::decay_t<decltype(kernel)>::A;
    double target_z;
    objective_row(kernel, row, program, values, static_cast<RowGradient<A>*>(row_gradient) + row, &target_z);
  });
}

void fused_door(const Rows& rows, const Program& program, double* values, void* row_gradient, void* out) {
  over_rows(rows, [&](auto& kernel, int64_t row) {
    using K = std::decay_t<decltype(kernel)>;
    using T = std::remove_const_t<std::remove_pointer_t<decltype(kernel.logits(0))>>;
    auto* gradient = static_cast<RowGradient<typename K::A>*>(row_gradient) + row;
    T* to = static_cast<T*>(out) + row * rows.classes;
    double target_z = 0;
    if (objective_row(kernel, row, program, values, gradient, &target_z)) {
      kernel.write_from_scratch(row, *gradient, static_cast<typename K::A>(target_z), to);
    } else {
      std::memset(static_cast<void*>(to), 0, rows.classes * sizeof(T));
    }
  });
}

void chain_door(const Rows& rows, const double* centred, const double* partials, void* row_gradient) {
  over_rows(rows, [&](auto& kernel, int64_t row) {
    using A = typename std::decay_t<decltype(kernel)>::A;
    auto* out = static_cast<RowGradient<A>*>(row_gradient) + row;
    *out = RowGradient<A>();
    if (kernel.ignored(row)) return;
    Centred<double> c;
    Statistics<double> f;
    std::memcpy(static_cast<void*>(&c), centred + row * kCentred, sizeof c);
    for (int k = 0; k < kStatistics; ++k) (&f.logprob)[k] = partials[k * rows.rows + row];
    const bool has_dense = rows.dense_target != nullptr;
    *out = kernel.narrow(chain(c, derive(c, has_dense), f, has_dense, rows.class_weight != nullptr));
  });
}

void gradient_door(const Rows& rows, const void* row_gradient, const void* upstream, int64_t upstream_stride,
                   void* out) {
  over_rows(rows, [&](auto& kernel, int64_t row) {
    using K = std::decay_t<decltype(kernel)>;
    using A = typename K::A;
    using T = std::remove_const_t<std::remove_pointer_t<decltype(kernel.logits(0))>>;
    T* to = static_cast<T*>(out) + row * rows.classes;
    if (kernel.ignored(row)) {
      std::memset(static_cast<void*>(to), 0, rows.classes * sizeof(T));
      return;
    }
    const A u = static_cast<const A*>(upstream)[row * upstream_stride];
    kernel.write_from_logits(row, static_cast<const RowGradient<A>*>(row_gradient)[row], u, to);
  });
}

}  // namespace

#define OBJKERN_STRING_OF(x) #x
#define OBJKERN_STRING(x) OBJKERN_STRING_OF(x)
extern const Doors table;
const Doors table = {
    OBJKERN_STRING(OBJKERN_VARIANT), statistics_door, objective_door, chain_door, gradient_door, fused_door};

}  // namespace OBJKERN_VARIANT
}  // namespace objkern::cpu
