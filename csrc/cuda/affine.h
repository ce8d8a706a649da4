// The gradient of a row: an affine form in e, t, z and the weights, whose coefficients the row epilogue found. It is
// written in the type G: that of the logits, or a half-precision one from float32 logits, as a GEMM after them wants
// it.
#pragma once

#include "beside.h"
#include "call.h"

namespace objkern::cuda {

template <class T, class G, Depth kDepth, bool kTransform>
struct Affine {
  using A = Accumulation<T>;
  static constexpr int kVector = Element<G>::kVector;           // elements that are stored together
  static constexpr int kLoads = kVector / Element<T>::kVector;  // 16-byte words that hold their logits
  static constexpr bool kFull = kDepth == Depth::kFull;
  static constexpr bool kOrdinary = !kTransform && (kDepth == Depth::kEntropy || kDepth == Depth::kSquare);
  static constexpr float kLeastExponent = -1e30f;

  const Rows& rows;
  const Transform<A, kTransform> transform;
  const int64_t row;
  const int target;  // −1: none
  const int place;   // of the maximum of the others, where its share of the gradient goes; −1: nowhere
  const A upstream;
  RowGradient<A> g;
  const ExpOver<T> exp_over;  // the temperature, beside a reference

  // The upstream gradient is folded into the coefficients, but for the full depth, which has too many.
  OBJKERN_DEVICE Affine(const Rows& rows_, const Transform<A, kTransform>& transform_, int64_t row_, int target_,
                        int place_, A upstream_, const RowGradient<A>& gradient)
      : rows(rows_),
        transform(transform_),
        row(row_),
        target(target_),
        place(place_),
        upstream(upstream_),
        g(gradient),
        exp_over(kFull && rows_.reference != nullptr ? rows_.temperature : 1.0) {
    if constexpr (!kFull) {
      g.exp_1 *= upstream;
      g.exp_t *= upstream;
      g.const_1 *= upstream;
      g.const_z *= upstream;
    }
  }

  // What a reference adds to the gradient of a class whose logits are z and r; finite where d is not. A NaN comes by e
  // or f.
  OBJKERN_DEVICE A share(A z, A r) const {
    const A t_r = r - g.max_r, t_z = z - g.max_z, e = exp_over(t_r), f = exp_over(t_z);
    if (g.of_pd == A(0)) return f * g.of_p + e * g.of_q;
    const A apart = far_apart(g.max_z, g.max_r) ? t_r - t_z : (r - z) - (g.max_r - g.max_z);
    const A d = smaller(larger(apart * exp_over.by, A(-kMostApart)), A(kMostApart));
    return f * (g.of_p + g.of_pd * d) + e * g.of_q;
  }
  OBJKERN_DEVICE A beside(int column) const {
    return kFull && rows.reference != nullptr ? Beside<T>{rows, row}.at(column) : A(0);
  }

  OBJKERN_DEVICE A at(A x, int column, A r) const {
    const A z = transform(x);
    const bool out = z == A(-kInfinity);
    if constexpr (kDepth == Depth::kPlain) return exp_nonpositive<T>(z - g.max) * g.exp_1 * transform.slope(z);
    // Kept finite: e is 0 there, and 0·∞ would be NaN.
    const A t = larger(z - g.max, std::numeric_limits<A>::lowest()), e = exp_nonpositive<T>(t);
    A d = e * (larger(t, A(kLeastExponent)) * g.exp_t + g.exp_1) + g.const_1;
    if constexpr (kDepth >= Depth::kSquare) d += g.const_z * (out ? A(0) : z);
    if constexpr (kFull) {
      const A* weight = static_cast<const A*>(rows.class_weight);
      const A w = weight == nullptr ? A(1) : weight[column];
      d += g.const_t * (out ? A(0) : t) + g.const_w * w;
      if (rows.dense_target != nullptr)
        d += g.const_q * w * element<A>(rows.dense_target, rows.dense_dtype, row * rows.dense_stride + column);
      if (rows.reference != nullptr && !out) d += share(z, r);
      if (column == place) d += g.max_grad;
      d *= upstream;
    }
    d *= transform.slope(z);
    return out && rows.masked ? A(0) : d;
  }

  // The same where no z is −∞ or absurdly far below the maximum, and nothing transforms the logits.
  OBJKERN_DEVICE A at_ordinary(A z) const {
    const A t = z - g.max, e = exp_nonpositive<T>(t);
    const A d = e * (t * g.exp_t + g.exp_1) + g.const_1;
    return kDepth >= Depth::kSquare ? d + g.const_z * z : d;
  }

  OBJKERN_DEVICE A at_target(A x, A r) const {
    const A z = transform(x);
    if (rows.masked && z == A(-kInfinity)) return A(0);
    A d = g.target_grad;
    if (kFull && rows.reference != nullptr) d += share(z, r);
    return d * upstream * transform.slope(z);
  }

  // Columns [begin, end) of the row at x, which may lie in shared memory, to those at `out`; the share of thread
  // `thread` of `threads`. Stores are aligned to `out`, whatever x is aligned to.
  OBJKERN_DEVICE void write(const T* x, G* out, int begin, int end, int thread, int threads) const {
    if constexpr (kFull) {
      if (is_share_alone()) return write_share(x, out, begin, end, thread, threads);
    }
    const int past = misalignment(x + begin + (16 - misalignment(out + begin)) % 16 / static_cast<int>(sizeof(G)));
    const Walk w = walk(out, begin, end, past != 0);
    for (int j = w.begin + thread; j < w.body; j += threads) write_one(x, out, j);
    for (int v = thread; v < w.vectors; v += 2 * threads) {
      const int first = w.body + v * kVector, second = first + threads * kVector;
      const bool both = v + threads < w.vectors;
      const Loaded words = load(x + first, past);
      const Loaded later = both ? load(x + second, past) : Loaded{};  // before anything is stored
      write_vector(words, out, first);
      if (both) write_vector(later, out, second);
    }
    for (int j = w.body + w.vectors * kVector + thread; j < w.end; j += threads) write_one(x, out, j);
  }

  // Whether the divergence from a reference is all that there is.
  OBJKERN_DEVICE bool is_share_alone() const {
    if (rows.reference == nullptr || !transform.is_identity()) return false;
    const A others[] = {g.target_grad, g.exp_1,   g.exp_t,   g.const_1, g.const_z,
                        g.const_t,     g.const_w, g.const_q, g.max_grad};
    bool zero = true;  // of a NaN it is not
#pragma unroll
    for (const A other : others) zero = zero && other == A(0);
    return zero && Beside<T>{rows, row}.same() != nullptr;
  }

  // As `write`, of the share alone: nothing in the loop but what it needs.
  OBJKERN_DEVICE void write_share(const T* x, G* out, int begin, int end, int thread, int threads) const {
    const T* const reference = Beside<T>{rows, row}.same();
    const int body = begin + (16 - misalignment(out + begin)) % 16 / static_cast<int>(sizeof(G));
    const int past = misalignment(x + body), past_r = misalignment(reference + body);
    const Walk w = walk(out, begin, end, (past | past_r) != 0);
    const auto one = [&](int j) {
      const A z = widen(x[j]);
      out[j] = narrowed<G>(z == A(-kInfinity) ? A(0) : share(z, widen(reference[j])) * upstream);
    };
    for (int j = w.begin + thread; j < w.body; j += threads) one(j);
    for (int v = thread; v < w.vectors; v += threads) {
      const int start = w.body + v * kVector;
      const Loaded of_z = load(x + start, past), of_r = load(reference + start, past_r);
      A z[kVector], r[kVector], d[kVector];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        unpack<T>(of_z.words[i], z + i * Element<T>::kVector);
        unpack<T>(of_r.words[i], r + i * Element<T>::kVector);
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) d[i] = z[i] == A(-kInfinity) ? A(0) : share(z[i], r[i]) * upstream;
      store128_once(out + start, packed<G>(d));
    }
    for (int j = w.body + w.vectors * kVector + thread; j < w.end; j += threads) one(j);
  }

  struct Loaded {
    Words words[kLoads];
  };

  static OBJKERN_DEVICE Loaded load(const T* x, int past) {
    Loaded found;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) found.words[i] = load128_across(x + i * Element<T>::kVector, past);
    return found;
  }

  OBJKERN_DEVICE void write_vector(const Loaded& loaded, G* out, int start) const {
    A z[kVector], d[kVector], r[kVector] = {};
    if constexpr (kFull)
      if (rows.reference != nullptr) Beside<T>{rows, row}.load(start, r);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) unpack<T>(loaded.words[i], z + i * Element<T>::kVector);
    bool ordinary = false;
    if constexpr (kOrdinary) {  // one comparison an element in place of three
      A low = z[0];
#pragma unroll
      for (int i = 1; i < kVector; ++i) low = std::fmin(low, z[i]);
      ordinary = low - g.max > A(kLeastExponent);
    }
    if (ordinary) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) d[i] = at_ordinary(z[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) d[i] = at(z[i], start + i, r[i]);
    }
    if (static_cast<unsigned>(target - start) < static_cast<unsigned>(kVector)) {
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (start + i == target) d[i] = at_target(z[i], r[i]);
    }
    store128_once(out + start, packed<G>(d));
  }

  OBJKERN_DEVICE void write_one(const T* x, G* out, int j) const {
    const A z = widen(x[j]);
    const A r = beside(j);
    out[j] = narrowed<G>(j == target ? at_target(z, r) : at(z, j, r));
  }
};

template <class T>
OBJKERN_DEVICE void write_zeros(T* out, int begin, int end, int thread, int threads) {
  const Walk w = walk(out, begin, end);
  constexpr int kVector = Element<T>::kVector;
  for (int j = w.begin + thread; j < w.body; j += threads) out[j] = narrowed<T>(0);
  for (int v = thread; v < w.vectors; v += threads) store128_once(out + w.body + v * kVector, Words{});
  for (int j = w.body + w.vectors * kVector + thread; j < w.end; j += threads) out[j] = narrowed<T>(0);
}

}  // namespace objkern::cuda
