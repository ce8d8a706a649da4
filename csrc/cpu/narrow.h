// Rows of few classes (token and sequence classification): several rows per vector, one in each lane, so that nothing
// is wasted on tails. A group of rows is turned on its side, classes outermost; then every step is a loop over classes.
#pragma once

#include <cstddef>

#include "kernels.h"
#include "tile.h"
#include "vectors.h"

namespace objkern::cpu {
inline namespace OBJKERN_VARIANT {
namespace {

// Up to so many classes rows are collected side by side: beyond, a row fills vectors by itself, and turning rows costs
// more than the sums across lanes that it saves. Measured: 192 with 16 lanes, about 100 with 8.
constexpr int64_t kNarrow = 12 * Vec<float>::size();

inline bool narrow(const Rows& in) {
  return in.classes <= kNarrow && in.reference == nullptr;
}

// The gradient has no sums, and turns twice, so that it pays only where a row is no longer than two vectors.
inline bool narrow_gradient(const Rows& in, int64_t element_size) {
  return in.classes * element_size <= 128 && in.reference == nullptr;
}

#ifdef CPU_CAPABILITY_AVX512
// A square of 16 × 16, in four rounds of shuffles; fewer rows and columns by masks.
inline void transpose_square(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                             int64_t to_stride) {
  const __mmask16 some_columns = (1u << columns) - 1, some_rows = (1u << rows) - 1;
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_maskz_loadu_ps(i < rows ? some_columns : 0, from + i * from_stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // then a[i + c] holds columns c, 4 + c, 8 + c, 12 + c of four rows
    for (int c = 0; c < 2; ++c) {
      const __m512d x = _mm512_castps_pd(b[i + c]), y = _mm512_castps_pd(b[i + 2 + c]);
      a[i + 2 * c] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
      a[i + 2 * c + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
  }
  for (int c = 0; c < 4; ++c) {
    const __m512 even_top = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88),
                 odd_top = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd);
    const __m512 even_low = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88),
                 odd_low = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
    b[c] = _mm512_shuffle_f32x4(even_top, even_low, 0x88);
    b[4 + c] = _mm512_shuffle_f32x4(odd_top, odd_low, 0x88);
    b[8 + c] = _mm512_shuffle_f32x4(even_top, even_low, 0xdd);
    b[12 + c] = _mm512_shuffle_f32x4(odd_top, odd_low, 0xdd);
  }
  for (int j = 0; j < 16; ++j)
    if (j < columns) _mm512_mask_storeu_ps(to + j * to_stride, some_rows, b[j]);
}
#endif

// to[j][i] = from[i][j] for rows × columns elements, in registers where that is written down: squares of 16 with masks,
// or ATen's of 8, where the last columns (or rows) that fill no square are done together with some that were.
template <class A>
void transpose(const A* from, int64_t from_stride, int64_t rows, int64_t columns, A* to, int64_t to_stride) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<A, float>) {
    for (int64_t i = 0; i < rows; i += 16)
      for (int64_t j = 0; j < columns; j += 16)
        transpose_square(from + i * from_stride + j, from_stride, std::min<int64_t>(rows - i, 16),
                         std::min<int64_t>(columns - j, 16), to + j * to_stride + i, to_stride);
    return;
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<A, float>) {
    if (rows >= 8 && columns >= 8) {
      for (int64_t i = 0; i < rows; i = i + 8 < rows ? std::min(i + 8, rows - 8) : rows)
        for (int64_t j = 0; j < columns; j = j + 8 < columns ? std::min(j + 8, columns - 8) : columns)
          at::vec::transpose_mxn<float, 8, 8>(from + i * from_stride + j, from_stride, to + j * to_stride + i,
                                              to_stride);
      return;
    }
  }
#endif
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) to[j * to_stride + i] = from[i * from_stride + j];
}

// T: the logits; D: the dense target, T or the accumulation type.
template <class T, class D>
struct Narrow {
  using A = typename Walk<T>::A;
  using V = Vec<A>;
  static constexpr int64_t kLanes = V::size();

  const Rows& in;
  const Transform<A> transform;
  const int64_t n;
  const Depth depth;
  const A* const weight;
  alignas(64) A z[kNarrow][kLanes];                       // of the group in hand
  alignas(64) A q[kNarrow][kLanes];                       // its dense target
  alignas(64) A labels[kLanes];                           // −1: no target, or an ignored row
  alignas(64) A wide[kNarrow * kLanes + Walk<T>::kPack];  // rows of a narrower type, converted
  Tile tile;                                              // what was collected of the group; every lane, every time
  bool any_ignored = false;

  explicit Narrow(const Rows& rows)
      : in(rows),
        transform(rows.logit_scale, rows.softcap, rows.unscaled),
        n(rows.classes),
        depth(depth_of(rows)),
        weight(static_cast<const A*>(rows.class_weight)) {}

  // Rows [row, row + count), count ≤ kLanes; the lanes past them hold zeros.
  void load(int64_t row, int64_t count) {
    any_ignored = false;
    for (int64_t lane = 0; lane < kLanes; ++lane) labels[lane] = A(-1);
    for (int64_t lane = 0; in.target != nullptr && lane < count; ++lane) {
      const int64_t y = in.target[row + lane];
      any_ignored |= y == in.ignore_index;
      labels[lane] = y == in.ignore_index ? A(-1) : static_cast<A>(y);
    }
    turn(static_cast<const T*>(in.logits) + row * in.row_stride, in.row_stride, count, z);
    if (in.dense_target != nullptr)
      turn(static_cast<const D*>(in.dense_target) + row * in.dense_stride, in.dense_stride, count, q);
    if (transform.identity) return;
    for (int64_t j = 0; j < n; ++j) transform(V::loadu(z[j])).store(z[j]);
  }

  // `count` rows at x as columns of `to`.
  template <class E>
  void turn(const E* x, int64_t stride, int64_t count, A (&to)[kNarrow][kLanes]) {
    if (count < kLanes) std::fill(to[0], to[0] + n * kLanes, A(0));
    if constexpr (std::is_same_v<E, A>) {
      transpose(x, stride, count, n, to[0], kLanes);
    } else {  // converted first, in one piece if the rows follow each other
      const bool one_piece = stride == n;
      const int64_t size = one_piece ? count * n : n;
      for (int64_t lane = 0; lane < (one_piece ? 1 : count); ++lane) {
        typename Walk<T>::Pack v;
        for (int64_t j = 0; j < size; j += Walk<T>::kPack) {
          Walk<T>::load(x + lane * stride + j, std::min(Walk<T>::kPack, size - j), 0.0f, v);
          for (int k = 0; k < Walk<T>::kVectors; ++k) v[k].store(wide + lane * n + j + k * kLanes);
        }
      }
      transpose(wide, n, count, n, to[0], kLanes);
    }
  }

  void collect(int64_t row, int64_t count) {
    load(row, count);
    switch (depth) {
      case Depth::kPlain:
        return collect_at<Depth::kPlain>();
      case Depth::kEntropy:
        return collect_at<Depth::kEntropy>();
      case Depth::kSquare:
        return collect_at<Depth::kSquare>();
      case Depth::kFull:
        return collect_at<Depth::kFull>();
    }
  }

  template <Depth kDepth>
  void collect_at() {
    constexpr bool kCounts = kDepth >= Depth::kEntropy;
    const V zero(A(0)), one(A(1)), low = minus_inf<A>(), y = V::loadu(labels);
    // The maximum of the others, and of those before the target: ties go to the first.
    const bool first_maximum = in.free_statistics || (in.reads & kMaxLogit) != 0;
    V target = low, before = low, high = low;
    for (int64_t j = 0; j < n; ++j) {
      const V v = V::loadu(z[j]), class_j(static_cast<A>(j)), own = y == class_j;
      const V others = V::blendv(v, low, own);
      target = V::blendv(target, v, own);
      high = at::vec::clamp_min(others, high);
      if (first_maximum) before = V::blendv(before, at::vec::clamp_min(v, before), class_j < y);
    }
    const V alone = is_minus_inf(high), max = V::blendv(high, zero, alone);

    V e_sum = zero, et_sum = zero, t_sum = zero, zz_sum = zero, found = zero;
    for (int64_t j = 0; j < n; ++j) {
      const V v = V::blendv(V::loadu(z[j]), low, y == V(static_cast<A>(j)));
      if constexpr (!kCounts) {
        e_sum = e_sum + exp_nonpositive(v - max);
      } else {
        const V out = is_minus_inf(v), t = V::blendv(difference(v, max), zero, out);
        const V e = V::blendv(exp_nonpositive(t), zero, out), finite = V::blendv(v, zero, out);
        e_sum = e_sum + e;
        et_sum = at::vec::fmadd(e, t, et_sum);
        t_sum = t_sum + t;
        if constexpr (kDepth >= Depth::kSquare) zz_sum = at::vec::fmadd(finite, finite, zz_sum);
        found = found + V::blendv(one, zero, out);
      }
    }
    V spread = zero;
    if constexpr (kDepth == Depth::kFull) {
      const V mean = V::blendv(t_sum / found, zero, found == zero);
      for (int64_t j = 0; j < n; ++j) {
        const V v = V::blendv(V::loadu(z[j]), low, y == V(static_cast<A>(j)));
        const V d = V::blendv(difference(v, max) - mean, zero, is_minus_inf(v));
        spread = at::vec::fmadd(d, d, spread);
      }
    }

    // The sums over class weights and a dense target. As numbers, −inf logits make them infinite, or NaN under a factor
    // of 0, as they do in torch.
    V w_sum = zero, wt_sum = zero, q_sum = zero, qt_sum = zero;
    const bool weighs = kDepth == Depth::kFull && (weight != nullptr || in.dense_target != nullptr);
    for (int64_t j = 0; weighs && j < n; ++j) {
      const V mine = y == V(static_cast<A>(j)), v = V::blendv(V::loadu(z[j]), low, mine), out = is_minus_inf(v);
      const V left_out = in.masked ? out : mine, infinite = V::blendv(out, zero, left_out);
      const V t = V::blendv(V::blendv(difference(v, max), low, infinite), zero, left_out);
      const V w = V::blendv(V(weight == nullptr ? A(1) : weight[j]), zero, left_out);
      w_sum = w_sum + w;
      wt_sum = at::vec::fmadd(w, t, wt_sum);
      if (in.dense_target == nullptr) continue;
      const V q_j = V::loadu(q[j]), share = w * q_j;
      q_sum = q_sum + share;
      const V lifted = V::blendv(zero, q_j == zero, infinite);  // the smoothed share stands in wt_sum
      qt_sum = at::vec::fmadd(share, in.smoothed ? V::blendv(t, zero, lifted) : t, qt_sum);
    }

    const V no_target = is_minus_inf(target), own = V::blendv(one, zero, y < zero), all(static_cast<A>(n));
    Centred<V> c;
    c.max = V::blendv(e_sum, max, e_sum == e_sum);  // NaN, should a comparison have lost it
    c.sum_e = e_sum;
    c.sum_et = et_sum;
    c.sum_t = t_sum;
    c.sum_dd = spread;
    c.sum_zz = zz_sum;
    // A logit of +inf has no softmax: NaN, as for any other class.
    c.target =
        V::blendv(target, V(std::numeric_limits<A>::quiet_NaN()), target == V(std::numeric_limits<A>::infinity()));
    const V tie = V::blendv(one, zero, before == high);
    c.target_is_max = V::blendv(V::blendv(V::blendv(zero, tie, target == high), one, high < target), zero, y < zero);
    c.target_is_max = V::blendv(zero, c.target_is_max, c.target == c.target);
    if (in.masked) {
      c.target_weight = V::blendv(own, zero, no_target);
      c.classes = found + V::blendv(one, zero, no_target);
      c.sum_w = found;
      c.sum_wt = t_sum;
    } else {  // as numbers, −inf logits make Σ log p_j infinite, and a row of nothing else has no softmax
      c.target_weight = own;
      c.classes = all;
      c.sum_w = all - own;
      c.sum_wt = kCounts ? V::blendv(low, t_sum, found + own == all) : zero;
      const V none = V::blendv(zero, one, alone) * V::blendv(zero, one, no_target);
      c.sum_e = V::blendv(e_sum, V(std::numeric_limits<A>::quiet_NaN()), none == one);
    }
    if (weighs) {
      c.sum_w = w_sum;
      c.sum_wt = wt_sum;
      c.sum_q = q_sum;
      c.sum_qt = qt_sum;
      if (weight != nullptr && in.target != nullptr) {
        alignas(64) A of_labels[kLanes];
        for (int64_t lane = 0; lane < kLanes; ++lane)
          of_labels[lane] = labels[lane] < 0 ? A(0) : weight[static_cast<int64_t>(labels[lane])];
        c.target_weight = c.target_weight * V::loadu(of_labels);
      }
    }
    constexpr int kFields = offsetof(Centred<double>, reference) / sizeof(double);
    for (int k = 0; k < kFields; ++k) store_as((&c.max)[k], tile.field[k]);
  }

  // The gradient of rows [row, row + count), which `load` has in hand.
  void write(int64_t row, int64_t count, const A* row_gradient, const A* upstream, int64_t stride, T* gradient) {
    RowGradient<V> g;
    alignas(64) A lanes[kLanes] = {};
    const int fields = row_gradient_fields(in);
    for (int k = 0; k < fields; ++k) {
      const A* from = row_gradient + k * in.rows + row;
      std::copy(from, from + count, lanes);
      (&g.max)[k] = V::loadu(lanes);
    }
    for (int64_t lane = 0; lane < count; ++lane) lanes[lane] = upstream[lane * stride];
    const V u = V::loadu(lanes), y = V::loadu(labels), zero(A(0));
    const bool capped = transform.cap != A(0);
    V unplaced(A(1));  // the maximum's share goes to its first place among the others
    for (int64_t j = 0; j < n; ++j) {
      const V v = V::loadu(z[j]), own = y == V(static_cast<A>(j)), out = is_minus_inf(v);
      const V t = clamp_exponent(v - g.max), e = exp_nonpositive(t);
      V d = e * g.exp_1;
      if (depth != Depth::kPlain) {
        const V finite = V::blendv(v, zero, out), linear = V::blendv(difference(v, g.max), zero, out);
        d = e * at::vec::fmadd(g.exp_t, t, g.exp_1) + g.const_1 + g.const_z * finite + g.const_t * linear;
        if (depth == Depth::kFull) {
          const V here = V::blendv(V::blendv(zero, unplaced, v == g.max), zero, own);
          d = at::vec::fmadd(g.max_grad, here, d);
          unplaced = unplaced - here;
          const V w(weight == nullptr ? A(1) : weight[j]);
          d = at::vec::fmadd(g.const_w, w, d);
          if (in.dense_target != nullptr) d = at::vec::fmadd(g.const_q * w, V::loadu(q[j]), d);
        }
      }
      d = V::blendv(d, g.target_grad, own);
      d = d * u;
      if (capped) d = d * V::blendv(transform.slope(v), V(transform.gain), out);
      if (in.masked) d = V::blendv(d, zero, out);
      if (!capped && transform.gain != A(1)) d = d * V(transform.gain);
      d.store(z[j]);
    }
    T* to = gradient + row * n;
    if constexpr (std::is_same_v<T, A>) {
      transpose(z[0], kLanes, n, count, to, n);
    } else {
      transpose(z[0], kLanes, n, count, wide, n);
      typename Walk<T>::Pack v;
      for (int64_t j = 0; j < count * n; j += Walk<T>::kPack) {
        for (int k = 0; k < Walk<T>::kVectors; ++k) v[k] = V::loadu(wide + j + k * kLanes);
        Walk<T>::store(to + j, std::min(Walk<T>::kPack, count * n - j), v);
      }
    }
    for (int64_t lane = 0; any_ignored && lane < count; ++lane)
      if (ignored(in, row + lane)) std::fill(to + lane * n, to + (lane + 1) * n, T(0));
  }
};

}  // namespace
}  // namespace OBJKERN_VARIANT
}  // namespace objkern::cpu
