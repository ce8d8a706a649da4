// The sums over the classes of a row other than its target, as one thread collects them and as threads merge them.
#pragma once

#include "elements.h"

namespace objkern::cuda {

// Relative to their own maximum, as Centred of objective.h says; fields that a depth does not need stay 0 and cost
// nothing. −inf logits are in no sum but those of the weights.
template <class A, Depth kDepth>
struct Sums {
  A max = A(-kInfinity);
  A e = A(0);
  A et = A(0), t = A(0), classes = A(0);                  // from kEntropy on
  A zz = A(0);                                            // from kSquare on
  A dd = A(0), w = A(0), wt = A(0), q = A(0), qt = A(0);  // kFull
  int first = std::numeric_limits<int>::max();            // the first class that attains the maximum

  template <class F>
  OBJKERN_DEVICE Sums each(const F& f) const {  // f of every field that there is
    Sums out;
    out.max = f(max);
    out.e = f(e);
    if constexpr (kDepth >= Depth::kEntropy) {
      out.et = f(et);
      out.t = f(t);
      out.classes = f(classes);
    }
    if constexpr (kDepth >= Depth::kSquare) out.zz = f(zz);
    if constexpr (kDepth == Depth::kFull) {
      out.dd = f(dd);
      out.w = f(w);
      out.wt = f(wt);
      out.q = f(q);
      out.qt = f(qt);
    }
    out.first = f(first);
    return out;
  }

  // To a larger maximum; t = t_old + shift.
  OBJKERN_DEVICE void raise(A to) {
    if (max != A(-kInfinity)) {
      const A shift = larger(max - to, std::numeric_limits<A>::lowest()), factor = exp_nonpositive<A>(shift);
      if constexpr (kDepth >= Depth::kEntropy) {
        et = factor == A(0) ? A(0) : factor * (et + shift * e);
        t += classes * shift;
      }
      if constexpr (kDepth == Depth::kFull) {
        wt += w * shift;
        qt += q * shift;
      }
      e *= factor;
    }
    max = to;
  }

  OBJKERN_DEVICE void merge(const Sums& other_) {
    Sums other = other_;
    if (other.max > max) {
      raise(other.max);
      first = other.first;
    } else {
      if (max > other.max) {
        other.raise(max);
      } else {
        first = min(first, other.first);
      }
    }
    e += other.e;
    if constexpr (kDepth == Depth::kFull) {
      if (classes != A(0) && other.classes != A(0)) {
        const A apart = t / classes - other.t / other.classes;
        dd += apart * apart * classes * other.classes / (classes + other.classes);
      }
      dd += other.dd;
      w += other.w;
      wt += other.wt;
      q += other.q;
      qt += other.qt;
    }
    if constexpr (kDepth >= Depth::kEntropy) {
      et += other.et;
      t += other.t;
      classes += other.classes;
    }
    if constexpr (kDepth >= Depth::kSquare) zz += other.zz;
  }
};

// Merges over groups of `width` lanes (a power of two) of a warp; the first lane of each has the sum of its group.
template <class S>
OBJKERN_DEVICE S merged_in_warp(S sums, int width) {
  for (int step = width / 2; step > 0; step /= 2)
    sums.merge(sums.each([step](auto field) { return shuffle_xor(field, step); }));
  return sums;
}

// One thread's way through the classes of a row. kAhead: the next vectors are on their way from global memory while
// those before them are summed; shared memory is near enough without.
template <class T, Depth kDepth, bool kTransform, bool kAhead>
struct Collector {
  using A = Accumulation<T>;
  static constexpr int kVector = Element<T>::kVector;
  static constexpr int kAtOnce = kDepth == Depth::kFull ? 1 : 2;  // vectors in hand

  const Rows& rows;
  const Transform<A, kTransform> transform;
  const int64_t row;
  const int target;  // the column to leave out; −1: none
  Sums<A, kDepth> sums;

  // Columns [begin, end) of the row at x, the share of thread `thread` of `threads`.
  OBJKERN_DEVICE void collect(const T* x, int begin, int end, int thread, int threads) {
    const Walk w = walk(x, begin, end);
    for (int j = w.begin + thread; j < w.body; j += threads) add_one(x, j);
    const auto load = [&](int v, Words(&words)[kAtOnce]) {
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u)
        if (v + u * threads < w.vectors) words[u] = load128(x + w.body + (v + u * threads) * kVector);
    };
    Words next[kAtOnce];
    if constexpr (kAhead) load(thread, next);
    for (int v = thread; v < w.vectors; v += kAtOnce * threads) {
      Words words[kAtOnce];
      A z[kAtOnce * kVector];
      int start[kAtOnce];
      if constexpr (kAhead) {
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) words[u] = next[u];
        load(v + kAtOnce * threads, next);
      } else {
        load(v, words);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        start[u] = w.body + (v + u * threads) * kVector;
        A in_vector[kVector];
        unpack<T>(words[u], in_vector);
        const bool there = u == 0 || v + u * threads < w.vectors;
#pragma unroll
        for (int i = 0; i < kVector; ++i) z[u * kVector + i] = there ? transform(in_vector[i]) : A(-kInfinity);
        leave_out<kVector>(&z[u * kVector], start[u]);
      }
      add<kAtOnce, kVector>(z, start, w.end);
    }
    for (int j = w.body + w.vectors * kVector + thread; j < w.end; j += threads) add_one(x, j);
  }

  OBJKERN_DEVICE void add_one(const T* x, int j) {
    const int start[1] = {j};
    const A z[1] = {j == target ? A(-kInfinity) : transform(widen(x[j]))};
    add<1, 1>(z, start, j + 1);
  }

  template <int kCount>
  OBJKERN_DEVICE void leave_out(A* z, int start) const {
    if (static_cast<unsigned>(target - start) >= static_cast<unsigned>(kCount)) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (start + i == target) z[i] = A(-kInfinity);
  }

  // kRuns runs of kCount classes, the first of each at `start`. Columns from `end` on, and the target, hold −inf.
  template <int kRuns, int kCount>
  OBJKERN_DEVICE void add(const A (&z)[kRuns * kCount], const int (&start)[kRuns], int end) {
    constexpr int kAll = kRuns * kCount;
    A high = z[0];
#pragma unroll
    for (int k = 1; k < kAll; ++k) high = larger(high, z[k]);
    if (high > sums.max) {
      sums.raise(high);
#pragma unroll
      for (int k = kAll - 1; k >= 0; --k)
        if (z[k] == high) sums.first = start[k / kCount] + k % kCount;
    }
    const A base = sums.max == A(-kInfinity) ? A(0) : sums.max;  // −inf − (−inf) would be NaN
    if constexpr (kDepth == Depth::kPlain) {
#pragma unroll
      for (int k = 0; k < kAll; ++k) sums.e += exp_nonpositive<T>(z[k] - base);
    } else if constexpr (kDepth == Depth::kFull) {
      add_full<kRuns, kCount>(z, start, end, base);
    } else {
      A et = A(0), t = A(0);
#pragma unroll
      for (int k = 0; k < kAll; ++k) {
        const A t_k = z[k] - base, e_k = exp_nonpositive<T>(t_k);
        sums.e += e_k;  // of −inf it is 0
        et += e_k * t_k;
        t += t_k;
      }
      if (t > A(-kInfinity)) {
        sums.et += et;
        sums.t += t;
        sums.classes += A(kAll);
        if constexpr (kDepth >= Depth::kSquare) {
#pragma unroll
          for (int k = 0; k < kAll; ++k) sums.zz += z[k] * z[k];
        }
      } else {  // −inf among them, or NaN: again, with care
#pragma unroll
        for (int k = 0; k < kAll; ++k) {
          const bool out = z[k] == A(-kInfinity);
          const A t_k = larger(z[k] - base, std::numeric_limits<A>::lowest());
          sums.et += out ? A(0) : exp_nonpositive<T>(t_k) * t_k;
          sums.t += out ? A(0) : t_k;
          sums.classes += out ? A(0) : A(1);
          if constexpr (kDepth >= Depth::kSquare) sums.zz += out ? A(0) : z[k] * z[k];
        }
      }
    }
  }

  template <int kRuns, int kCount>
  OBJKERN_DEVICE void add_full(const A (&z)[kRuns * kCount], const int (&start)[kRuns], int end, A base) {
    constexpr int kAll = kRuns * kCount;
    const A* weight = static_cast<const A*>(rows.class_weight);
    const bool weighs = weight != nullptr || rows.dense_target != nullptr;
    A t = A(0), classes = A(0);
#pragma unroll
    for (int k = 0; k < kAll; ++k) {
      const int column = start[k / kCount] + k % kCount;
      const bool out = z[k] == A(-kInfinity), real = column < end && column != target;
      const A raw = z[k] - base, t_k = out ? A(0) : larger(raw, std::numeric_limits<A>::lowest());
      const A e_k = out ? A(0) : (raw == raw ? exp_nonpositive<T>(t_k) : raw);  // NaN, and +inf, which has no softmax
      sums.e += e_k;
      sums.et += e_k * t_k;
      sums.zz += out ? A(0) : z[k] * z[k];
      t += t_k;
      classes += out ? A(0) : A(1);
      // As numbers, −inf logits make these sums infinite, or NaN under a factor of 0, as they do in torch.
      if (!weighs || !real || (out && rows.masked)) continue;
      const A w = weight == nullptr ? A(1) : weight[column], t_w = out ? A(-kInfinity) : t_k;
      sums.w += w;
      sums.wt += w * t_w;
      if (rows.dense_target == nullptr) continue;
      const A q = element<A>(rows.dense_target, rows.dense_dtype, row * rows.dense_stride + column);
      sums.q += w * q;
      const bool lifted = out && rows.smoothed && q == A(0);  // the smoothed share stands in wt
      if (!lifted) sums.qt += w * q * t_w;
    }
    if ((rows.reads & kLogitVariance) != 0 && classes != A(0)) {
      const A mean = t / classes;
#pragma unroll
      for (int k = 0; k < kAll; ++k) {
        const A d = larger(z[k] - base, std::numeric_limits<A>::lowest()) - mean;
        if (z[k] != A(-kInfinity)) sums.dd += d * d;
      }
      if (sums.classes != A(0)) {
        const A apart = mean - sums.t / sums.classes;
        sums.dd += apart * apart * classes * sums.classes / (classes + sums.classes);
      }
    }
    sums.t += t;
    sums.classes += classes;
  }
};

// From the merged sums of a row to its centred sums; `z` is the target's logit, or −inf.
template <class A, Depth kDepth>
OBJKERN_DEVICE Centred<A> centred(const Rows& rows, const Sums<A, kDepth>& others, int target, A z, A weight) {
  const bool alone = others.max == A(-kInfinity), no_target = z == A(-kInfinity);
  const A own = target >= 0 ? A(1) : A(0), n = static_cast<A>(rows.classes);
  Centred<A> c;
  c.max = others.e != others.e ? others.e : alone ? A(0) : others.max;
  c.sum_e = others.e;
  c.sum_et = others.et;
  c.sum_t = others.t;
  c.sum_dd = others.dd;
  c.sum_zz = others.zz;
  c.target = z == A(kInfinity) ? std::numeric_limits<A>::quiet_NaN() : z;  // as for any other class of +inf
  const bool tie = z == others.max && others.first > target && !no_target;
  c.target_is_max =
      target >= 0 && others.e == others.e && c.target == c.target && (z > others.max || tie) ? A(1) : A(0);
  const bool infinite_terms = !rows.masked && others.classes + own != n;
  c.target_weight = target < 0 || (rows.masked && no_target) ? A(0) : weight;
  c.classes = rows.masked ? others.classes + (no_target ? A(0) : A(1)) : n;
  c.sum_w = rows.masked ? others.classes : n - own;
  c.sum_wt = infinite_terms ? A(-kInfinity) : c.sum_t;
  if (!rows.masked && alone && no_target) c.sum_e = std::numeric_limits<A>::quiet_NaN();
  if (kDepth == Depth::kFull && (rows.class_weight != nullptr || rows.dense_target != nullptr)) {
    c.sum_w = others.w;
    c.sum_wt = others.wt;
    c.sum_q = others.q;
    c.sum_qt = others.qt;
  }
  return c;
}

}  // namespace objkern::cuda
