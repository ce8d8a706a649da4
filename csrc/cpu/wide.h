// Rows that fill vectors by themselves. A row is collected in segments, whose sums merge in order; a segment in one
// pass over blocks of vectors, relative to the largest logit so far.
//
// The target's own logit is left out by taking −inf for it; its gradient is a scalar of the epilogue.
#pragma once

#include <vector>

#include "kernels.h"
#include "reference.h"
#include "tile.h"
#include "vectors.h"

namespace objkern::cpu {
inline namespace OBJKERN_VARIANT {
namespace {

// Elements that are summed in the accumulation type before they join float64 sums: no more than 1024 a lane, for each
// addition rounds, and no more than the cache keeps. With the four lanes of NEON 8192 would cost half a digit.
constexpr int64_t kSegment = std::min<int64_t>(8192, 1024 * Vec<float>::size());

// Whether logits and gradient outgrow the last-level cache, so that little of the gradient would still be in it when
// somebody reads it. Below three quarters of it, the reader gains more from the cache than the writer from going past
// it.
inline bool gradient_passes_caches(const Rows& in, int64_t element_size) {
  return 4 * (2 * in.rows * in.classes * element_size) >= 3 * caches().last;
}

// T: the logits; D: the dense target, T or the accumulation type.
template <class T, class D>
struct Wide {
  using W = Walk<T>;
  using A = typename W::A;
  using V = Vec<A>;
  using Element = T;

  // Classes whose maximum is compared with the running one at once, and whose exponentials overlap. AVX-512 and NEON
  // have 32 registers for them.
  static constexpr int kVectors = Vec<float>::size() == 8 ? 4 : 8, kPacks = kVectors / W::kVectors;
  static constexpr int64_t kBlock = kVectors * W::kLanes;
  struct Block {
    typename W::Pack pack[kPacks];
    const V& operator[](int i) const { return pack[i / W::kVectors][i % W::kVectors]; }
  };

  const Rows& in;
  const Transform<A> transform;
  const int64_t n;
  const A* const weight;
  const Depth depth, of_sums;  // which are none of a divergence
  const bool past_caches;      // how the gradient is stored
  std::vector<A> scratch;      // z of a segment, where it is not the logit itself
  Reference<T> reference;

  // e of the rows in hand, for a gradient that is written while they are in the cache: exp is the dearest step of both.
  // Block by block as they were summed, relative to the largest logit by then.
  std::vector<A> kept_e, kept_top;

  explicit Wide(const Rows& rows)
      : in(rows),
        transform(rows.logit_scale, rows.softcap, rows.unscaled),
        n(rows.classes),
        weight(static_cast<const A*>(rows.class_weight)),
        depth(depth_of(rows)),
        of_sums(
            objkern::depth_of(rows.reads & ~int64_t{kDivergences}, weight != nullptr, rows.dense_target != nullptr)),
        past_caches(gradient_passes_caches(rows, sizeof(T))),
        reference(rows, transform) {}

  const T* logits(int64_t row) const { return static_cast<const T*>(in.logits) + row * in.row_stride; }
  const D* dense(int64_t row) const { return static_cast<const D*>(in.dense_target) + row * in.dense_stride; }
  A target_z(int64_t row) const {
    const int64_t y = label(in, row);
    return y < 0 ? -std::numeric_limits<A>::infinity() : transform(static_cast<A>(logits(row)[y]));
  }

  int64_t segments() const { return (n + kSegment - 1) / kSegment; }
  int64_t blocks() const { return (n + kBlock - 1) / kBlock; }

  // Whether e can be kept, and with the logits stays in the second-level cache, for so many rows.
  bool can_keep(int64_t rows) const {
    const int64_t bytes = rows * n * static_cast<int64_t>(sizeof(T) + sizeof(A));
    return transform.identity && depth != Depth::kFull && 4 * bytes <= 3 * caches().second;
  }
  void keep(int64_t rows) {
    kept_e.resize(rows * blocks() * kBlock);
    kept_top.resize(rows * blocks());
  }

  // Sums over a segment of z, whose element `hole` (if it is one of them) is left out. `lane`: which of the kept rows.
  Piece collect_segment(int64_t row, int64_t segment, int64_t lane) {
    if ((in.reads & ~int64_t{kDivergences}) == 0 && !in.free_statistics) return {};  // nobody asks
    const int64_t begin = segment * kSegment, count = std::min(kSegment, n - begin), hole = label(in, row) - begin;
    const T* x = logits(row) + begin;
    if (!kept_e.empty()) return at_depth<true>(x, count, hole, lane * blocks() + begin / kBlock);
    if (transform.identity) return at_depth<false>(x, count, hole, 0);
    scratch.resize(kSegment);
    typename W::Pack v;
    for (int64_t j = 0; j < count; j += W::kPack) {
      W::load(x + j, std::min(W::kPack, count - j), -std::numeric_limits<float>::infinity(), v);
      for (int k = 0; k < W::kVectors; ++k) transform(v[k]).store(scratch.data() + j + k * W::kLanes);
    }
    return at_depth<false>(static_cast<const A*>(scratch.data()), count, hole, 0);
  }

  // The sums beside the reference, over the same segment.
  DivergenceSums<double> compare_segment(int64_t row, int64_t segment) {
    if (in.reference == nullptr) return {};
    return reference.collect(logits(row), row, segment * kSegment, std::min((segment + 1) * kSegment, n));
  }

  template <bool kKeep, class E>
  Piece at_depth(const E* z, int64_t count, int64_t hole, int64_t block) {
    switch (of_sums) {
      case Depth::kPlain:
        return sums<Depth::kPlain, kKeep>(z, count, hole, block);
      case Depth::kEntropy:
        return sums<Depth::kEntropy, kKeep>(z, count, hole, block);
      case Depth::kSquare:
        return sums<Depth::kSquare, kKeep>(z, count, hole, block);
      case Depth::kFull:
        return sums<Depth::kFull, false>(z, count, hole, block);
    }
    return {};
  }

  // −inf in the place of class `hole` of a pack, counted from the pack's first class.
  template <class E>
  static void punch(typename W::Pack& v, int64_t hole) {
    const V at(static_cast<A>(hole));
    for (int k = 0; k < W::kVectors; ++k) v[k] = V::blendv(v[k], minus_inf<A>(), W::template place<E>(k) == at);
  }

  static bool holds(int64_t block, int64_t hole) {
    return static_cast<uint64_t>(hole - block) < static_cast<uint64_t>(kBlock);
  }

  // A block of z with −inf at the hole and past the end.
  template <class E>
  static void take_block(const E* z, int64_t j, int64_t count, int64_t hole, Block& block) {
    if (count - j >= kBlock) [[likely]] {
      for (int i = 0; i < kPacks; ++i) W::take(z + j + i * W::kPack, block.pack[i]);
    } else {
      for (int i = 0; i < kPacks; ++i)
        W::take(z + j + i * W::kPack, count - j - i * W::kPack, -std::numeric_limits<float>::infinity(), block.pack[i]);
    }
    if (holds(j, hole)) [[unlikely]]
      punch<E>(block.pack[(hole - j) / W::kPack], (hole - j) % W::kPack);
  }

  // The sums so far, relative to the largest z so far.
  template <Depth kDepth>
  struct Running {
    static constexpr bool kCounts = kDepth >= Depth::kEntropy, kSquares = kDepth >= Depth::kSquare;
    // Every addition to a sum rounds, and the four lanes of NEON take twice as many as eight: a block is summed first.
    static constexpr bool kFewLanes = sizeof(A) == 4 && W::kLanes < 8;
    A top = std::numeric_limits<A>::lowest();  // not −inf: −inf − (−inf) would be NaN
    V max{top}, e{A(0)}, et{A(0)}, t{A(0)}, zz{A(0)};
    double t_shift = 0;  // what Σ t lacks, because its terms were taken relative to smaller maxima
    int64_t whole = 0;   // classes of blocks without −inf; with those in `found`, all that count
    V found{A(0)};

    double counted() const { return static_cast<double>(whole) + horizontal_sum(found); }

    // To the maximum of a larger block; t = t_old + shift. It happens about log(blocks) times in a row.
    [[gnu::noinline]] void raise(A to) {
      if (top == std::numeric_limits<A>::lowest() && !(horizontal_max(e) > 0)) {  // nothing to rescale yet
        top = to;
        max = V(to);
        return;
      }
      const V shift(top - to), factor = exp_nonpositive(shift);
      if constexpr (kCounts) {
        const V gone = factor == V(A(0));  // 0·(−inf) would be NaN
        et = V::blendv(factor * at::vec::fmadd(shift, e, et), V(A(0)), gone);
        if (counted() > 0) t_shift += (static_cast<double>(top) - static_cast<double>(to)) * counted();
      }
      e = e * factor;
      top = to;
      max = V(to);
    }

    V add(const V& v) {
      const V t_ = v - max, e_ = exp_nonpositive(t_);
      e = e + e_;
      if constexpr (kCounts) {
        et = at::vec::fmadd(e_, t_, et);
        t = t + t_;
      }
      if constexpr (kSquares) zz = at::vec::fmadd(v, v, zz);
      return e_;
    }

    V add_without_minus_inf(const V& v) {
      const V out = is_minus_inf(v), zero(A(0));
      const V t_ = V::blendv(difference(v, max), zero, out), e_ = V::blendv(exp_nonpositive(t_), zero, out);
      const V finite = V::blendv(v, zero, out);
      e = e + e_;
      et = at::vec::fmadd(e_, t_, et);
      t = t + t_;
      zz = at::vec::fmadd(finite, finite, zz);
      found = found + V::blendv(V(A(1)), zero, out);
      return e_;
    }

    // A NaN may get lost in the maximum; it comes back in the sum. `careful`: there may be −inf in the block.
    template <bool kKeep>
    void add(const Block& block, bool careful, [[maybe_unused]] A* keep) {
      const auto done = [&](int i, const V& e_) {
        if constexpr (kKeep) e_.store(keep + i * W::kLanes);
      };
      V high = block[0];
      for (int i = 1; i < kVectors; ++i) high = at::vec::clamp_min(block[i], high);
      if (any_above(high, max)) [[unlikely]]
        raise(horizontal_max(high));
      [[maybe_unused]] const V e_before = e, et_before = et, t_before = t, zz_before = zz;
      if constexpr (kFewLanes) e = et = t = zz = V(A(0));
      if (kCounts && careful) [[unlikely]] {
        for (int i = 0; i < kVectors; ++i) done(i, add_without_minus_inf(block[i]));
      } else {
        if constexpr (kCounts) whole += kBlock;
        for (int i = 0; i < kVectors; ++i) done(i, add(block[i]));
      }
      if constexpr (kFewLanes) {
        e = e_before + e;
        et = et_before + et;
        t = t_before + t;
        zz = zz_before + zz;
      }
    }
  };

  // The sums over a segment. Where −inf must not count, only the blocks of the hole and of the end look for it; should
  // it turn up elsewhere, it shows in Σ t and the segment is done again, with care.
  template <Depth kDepth, bool kKeep, class E>
  Piece sums(const E* z, int64_t count, int64_t hole, int64_t first_block, bool careful = false) {
    Running<kDepth> sum;
    Block block;
    A* const keep = kKeep ? kept_e.data() + first_block * kBlock : nullptr;
    for (int64_t j = 0; j < count; j += kBlock) {
      take_block(z, j, count, hole, block);
      sum.template add<kKeep>(block, careful || holds(j, hole) || count - j < kBlock, kKeep ? keep + j : nullptr);
      if constexpr (kKeep) kept_top[first_block + j / kBlock] = sum.top;
    }
    if constexpr (kDepth >= Depth::kEntropy)
      if (!careful && !std::isfinite(horizontal_sum(sum.t))) [[unlikely]]
        return sums<kDepth, kKeep>(z, count, hole, first_block, true);
    Piece piece;
    piece.max = sum.top;
    piece.sum_e = horizontal_sum(sum.e);
    if (piece.max == std::numeric_limits<A>::lowest() && piece.sum_e == 0) return {};  // nothing but −inf
    piece.classes = 1;                                                                 // not empty
    if constexpr (kDepth >= Depth::kEntropy) {
      piece.sum_et = horizontal_sum(sum.et);
      piece.sum_t = horizontal_sum(sum.t) + sum.t_shift;
      piece.classes = sum.counted();
    }
    if constexpr (kDepth >= Depth::kSquare) piece.sum_zz = horizontal_sum(sum.zz);
    if constexpr (kDepth == Depth::kFull) {  // a second pass: the spread about the mean, which is known only now
      const V mean(static_cast<A>(piece.sum_t / piece.classes)), zero(A(0));
      V spread(A(0));
      for (int64_t j = 0; j < count; j += kBlock) {
        take_block(z, j, count, hole, block);
        for (int i = 0; i < kVectors; ++i) {
          const V d = V::blendv(difference(block[i], sum.max) - mean, zero, is_minus_inf(block[i]));
          spread = at::vec::fmadd(d, d, spread);
        }
      }
      piece.sum_dd = horizontal_sum(spread);
    }
    return piece;
  }

  // ---- a whole row ----------------------------------------------------------------------------------------------

  // From the merged pieces of a row to its centred sums.
  Centred<double> centre(int64_t row, const Piece& others, const DivergenceSums<double>& beside) const {
    const int64_t y = label(in, row);
    const bool alone = others.classes == 0;
    Centred<double> c;
    c.max = std::isnan(others.sum_e) ? others.sum_e : others.max;
    c.sum_e = others.sum_e;
    c.sum_et = others.sum_et;
    c.sum_t = others.sum_t;
    c.sum_dd = others.sum_dd;
    c.sum_zz = others.sum_zz;
    const double z = target_z(row);
    c.target = z == kInfinity ? std::numeric_limits<double>::quiet_NaN() : z;  // as for any other class of +inf
    const bool no_target = z == -kInfinity;
    if (y >= 0 && !no_target && !std::isnan(c.target) && !std::isnan(others.sum_e))
      c.target_is_max = alone || z > others.max || (z == others.max && first_other_of(row, others.max) > y);
    const double own = y >= 0;
    const bool infinite_terms = !in.masked && others.classes + own != static_cast<double>(n);
    c.target_weight = y < 0 || (in.masked && no_target) ? 0.0 : label_weight<A>(in, row);
    c.classes = in.masked ? others.classes + !no_target : static_cast<double>(n);
    c.sum_w = in.masked ? others.classes : static_cast<double>(n) - own;
    // As numbers, −inf logits make Σ log p_j infinite, and a row of nothing else has no softmax.
    c.sum_wt = infinite_terms ? -kInfinity : c.sum_t;
    if (!in.masked && alone && no_target) c.sum_e = std::numeric_limits<double>::quiet_NaN();
    if (weight != nullptr || in.dense_target != nullptr) add_weighted(c, row, infinite_terms);
    if (in.reference != nullptr) c.reference = divergence(beside, 1.0 / in.temperature);
    return c;
  }

  // The sums over class weights and a dense target. With `infinite_terms`, −inf logits are numbers: they make the sum
  // infinite, or NaN under a factor of 0, as they do in torch.
  void add_weighted(Centred<double>& c, int64_t row, bool infinite_terms) const {
    const int64_t y = label(in, row);
    const T* x = logits(row);
    const D* q_row = in.dense_target == nullptr ? nullptr : dense(row);
    const V m(static_cast<A>(c.max)), zero(A(0)), one(A(1));
    double sum_w = 0, sum_wt = 0, sum_q = 0, sum_qt = 0;
    for (int64_t begin = 0; begin < n; begin += kSegment) {
      V w_sum(A(0)), wt_sum(A(0)), q_sum(A(0)), qt_sum(A(0));
      const int64_t end = std::min(begin + kSegment, n);
      for (int64_t j = begin; j < end; j += W::kPack) {
        const int64_t count = std::min(W::kPack, end - j);
        typename W::Pack v, w, q;
        W::load(x + j, count, -std::numeric_limits<float>::infinity(), v);
        if (y >= j && y < j + count) punch<A>(v, y - j);
        for (int k = 0; k < W::kVectors; ++k) w[k] = one;
        if (weight != nullptr) W::load(weight + j, count, 0.0f, w);
        if (q_row != nullptr) W::load(q_row + j, count, 0.0f, q);
        for (int k = 0; k < W::kVectors; ++k) {
          const V z = transform(v[k]), out = is_minus_inf(z);
          const V t = V::blendv(difference(z, m), zero, out), wk = V::blendv(w[k], zero, out);
          w_sum = w_sum + wk;
          wt_sum = at::vec::fmadd(wk, t, wt_sum);
          if (q_row != nullptr) {
            q_sum = at::vec::fmadd(wk, q[k], q_sum);
            qt_sum = at::vec::fmadd(wk * q[k], t, qt_sum);
          }
        }
      }
      sum_w += horizontal_sum(w_sum);
      sum_wt += horizontal_sum(wt_sum);
      sum_q += horizontal_sum(q_sum);
      sum_qt += horizontal_sum(qt_sum);
    }
    for (int64_t j = 0; infinite_terms && j < n; ++j) {
      if (j == y || static_cast<A>(x[j]) != -std::numeric_limits<A>::infinity()) continue;
      const double w = weight == nullptr ? 1.0 : static_cast<double>(weight[j]);
      const double q = q_row == nullptr ? 0.0 : static_cast<double>(q_row[j]);
      sum_w += w;
      sum_wt += w * -kInfinity;
      sum_q += w * q;
      const bool lifted = in.smoothed && q == 0;  // the smoothed share stands in sum_wt
      if (q_row != nullptr && !lifted) sum_qt += w * q * -kInfinity;
    }
    c.sum_w = sum_w;
    c.sum_wt = sum_wt;
    c.sum_q = sum_q;
    c.sum_qt = sum_qt;
  }

  // ---- the gradient ---------------------------------------------------------------------------------------------

  RowGradient<A> coefficients(const A* row_gradient, int64_t row) const {
    RowGradient<A> g;
    for (int k = 0; k < row_gradient_fields(in); ++k) (&g.max)[k] = canonical(row_gradient[k * in.rows + row]);
    return g;
  }

  // Classes [begin, end) of a row's gradient; begin is a multiple of the pack. `lane`: which of the kept rows.
  void write(int64_t row, const RowGradient<A>& g, A upstream, int64_t begin, int64_t end, T* out, int64_t lane) const {
    const auto simple = [&]<Depth kDepth>() {
      if (kept_e.empty()) {
        write_simple<kDepth>(row, g, upstream, begin, end, out);
      } else {
        write_kept<kDepth>(row, lane, g, out);
      }
    };
    switch (depth) {
      case Depth::kPlain:
        simple.template operator()<Depth::kPlain>();
        break;
      case Depth::kEntropy:
        simple.template operator()<Depth::kEntropy>();
        break;
      case Depth::kSquare:
        simple.template operator()<Depth::kSquare>();
        break;
      case Depth::kFull:
        if (is_share_alone(g)) {
          write_share(row, g, upstream, begin, end, out);
          return;
        }
        write_full(row, g, upstream, begin, end, out);
        break;
    }
    const int64_t y = label(in, row);
    if (y >= begin && y < end) {
      const A z = target_z(row);
      const bool excluded = in.masked && z == -std::numeric_limits<A>::infinity();
      const A share = in.reference == nullptr ? A(0) : reference.share_at(g, z, row, y);
      out[y] = excluded ? T(0) : static_cast<T>((g.target_grad + share) * upstream * transform.slope(z));
    }
    if (depth == Depth::kFull && g.max_grad != 0) {
      // The subgradient of the maximum goes to its first place among the others, where t = 0 and e = 1.
      const int64_t place = first_other_of(row, g.max);
      if (place < begin || place >= end) return;
      const A w = weight == nullptr ? A(1) : weight[place];
      A d = g.exp_1 + g.const_1 + g.const_z * g.max + g.max_grad + g.const_w * w;
      if (in.dense_target != nullptr) d += g.const_q * w * static_cast<A>(dense(row)[place]);
      if (in.reference != nullptr) d += reference.share_at(g, g.max, row, place);
      out[place] = static_cast<T>(d * upstream * transform.slope(g.max));
    }
  }

  int64_t first_other_of(int64_t row, double z) const {
    const T* x = logits(row);
    const int64_t y = label(in, row);
    int64_t j = 0;
    while (j < n && (j == y || !(static_cast<double>(transform(static_cast<A>(x[j]))) == z))) ++j;
    return j;
  }

  // Without weights and dense targets; the upstream gradient is folded into the coefficients.
  template <Depth kDepth>
  void write_simple(int64_t row, const RowGradient<A>& g, A upstream, int64_t begin, int64_t end, T* out) const {
    const A gain = transform.cap == A(0) ? upstream * transform.gain : upstream;
    const V m(g.max), exp_1(g.exp_1 * gain), exp_t(g.exp_t * gain), const_1(g.const_1 * gain),
        const_z(g.const_z * gain);
    const T* x = logits(row);
    const bool plain = transform.identity;
    // `careful`: there may be −inf, or logits so far below the maximum that e is 0.
    const auto step = [&]<bool careful>(typename W::Pack& v) {
      for (int k = 0; k < W::kVectors; ++k) {
        const V z = plain ? v[k] : transform(v[k]);
        V d;
        if constexpr (kDepth == Depth::kPlain) {
          d = exp_nonpositive(z - m) * exp_1;
        } else {
          const V t = careful ? clamp_exponent(z - m) : z - m, e = exp_nonpositive<!careful>(t);
          d = at::vec::fmadd(e, at::vec::fmadd(exp_t, t, exp_1), const_1);
          if constexpr (kDepth == Depth::kSquare) d = at::vec::fmadd(const_z, z, d);
        }
        if (transform.cap != A(0)) d = d * V::blendv(transform.slope(z), V(transform.gain), is_minus_inf(z));
        // As a number, −inf has no probability and no square: what is left is the constant.
        if constexpr (kDepth != Depth::kPlain)
          if constexpr (careful)
            if (in.masked) d = zero_at_minus_inf(d, z);
        v[k] = d;
      }
    };
    const auto some = [&](int64_t j, int64_t count) {
      typename W::Pack v;
      W::take(x + j, count, 0.0f, v);
      step.template operator()<true>(v);
      store_first(out + j, count, W::packed(v));
    };
    // The first few elements by themselves, so that the stores after them do not straddle two cache lines. For packs of
    // 16 and an output 3 elements short of a boundary: 3, then 16 at a time, then what is left.
    const int64_t head = std::min(W::to_boundary(out + begin), end - begin);
    if (head > 0) some(begin, head);
    int64_t j = begin + head;
    const V floor(plain ? g.max + A(kLeastExponent) : std::numeric_limits<A>::infinity());
    for (; j + kBlock <= end; j += kBlock) {
      Block block;
      take_block(x, j, end, -1, block);
      bool careful = false;
      if constexpr (kDepth != Depth::kPlain) {
        V low = block[0];
        for (int i = 1; i < kVectors; ++i) low = at::vec::clamp_max(block[i], low);
        careful = any_above(floor, low);
      }
      if (careful) [[unlikely]] {
        for (auto& pack : block.pack) step.template operator()<true>(pack);
      } else {
        for (auto& pack : block.pack) step.template operator()<false>(pack);
      }
      for (int i = 0; i < kPacks; ++i) {
        T* const to = out + j + i * W::kPack;
        if (past_caches) {
          store_past_caches(to, W::packed(block.pack[i]));
        } else {
          W::packed(block.pack[i]).store(to);
        }
      }
    }
    for (; j + W::kPack <= end; j += W::kPack) some(j, W::kPack);
    if (j < end) some(j, end - j);
  }

  // A whole row from the e that its sums left, under an upstream gradient of 1.
  template <Depth kDepth>
  void write_kept(int64_t row, int64_t lane, const RowGradient<A>& g, T* out) const {
    const V m(g.max), const_1(g.const_1), const_z(g.const_z), floor(g.max + A(kLeastExponent));
    const T* x = logits(row);
    const bool past = past_caches && W::to_boundary(out) == 0;
    A top = std::numeric_limits<A>::quiet_NaN();
    V exp_1(A(0)), exp_t(A(0));
    for (int64_t j = 0, b = lane * blocks(); j < n; j += kBlock, ++b) {
      if (!(kept_top[b] == top)) [[unlikely]] {  // e is relative to this, and the row's maximum may be larger
        top = kept_top[b];
        const V factor = exp_nonpositive(V(top - g.max));
        exp_1 = V(g.exp_1) * factor;
        exp_t = V(g.exp_t) * factor;
      }
      const A* const e = kept_e.data() + b * kBlock;
      Block block;
      bool careful = false;
      if constexpr (kDepth != Depth::kPlain) {
        take_block(x, j, n, -1, block);
        V low = block[0];
        for (int i = 1; i < kVectors; ++i) low = at::vec::clamp_max(block[i], low);
        careful = any_above(floor, low);
      }
      for (int i = 0; i < kPacks; ++i) {
        typename W::Pack d;
        for (int k = 0; k < W::kVectors; ++k) {
          const V e_ = V::loadu(e + (i * W::kVectors + k) * W::kLanes);
          if constexpr (kDepth == Depth::kPlain) {
            d[k] = e_ * exp_1;
          } else {
            const V z = block.pack[i][k], t = careful ? clamp_exponent(z - m) : z - m;
            d[k] = at::vec::fmadd(e_, at::vec::fmadd(exp_t, t, exp_1), const_1);
            if constexpr (kDepth == Depth::kSquare) d[k] = at::vec::fmadd(const_z, z, d[k]);
            if (careful && in.masked) d[k] = zero_at_minus_inf(d[k], z);
          }
        }
        T* const to = out + j + i * W::kPack;
        const int64_t count = n - j - i * W::kPack;
        if (past && count >= W::kPack) {
          store_past_caches(to, W::packed(d));
        } else if (count > 0) {
          store_first(to, count, W::packed(d));
        }
      }
    }
  }

  // Whether the objective is a divergence and nothing else.
  bool is_share_alone(const RowGradient<A>& g) const {
    const A others[] = {g.target_grad, g.exp_1,   g.exp_t,   g.const_1, g.const_z,
                        g.const_t,     g.const_w, g.const_q, g.max_grad};
    return in.reference != nullptr && std::all_of(std::begin(others), std::end(others), [](A x) { return x == A(0); });
  }

  void write_share(int64_t row, const RowGradient<A>& g, A upstream, int64_t begin, int64_t end, T* out) const {
    if (g.of_pd == A(0)) {
      write_share_of<true>(row, g, upstream, begin, end, out);
    } else {
      write_share_of<false>(row, g, upstream, begin, end, out);
    }
  }

  // The upstream gradient is folded into the coefficients.
  template <bool kForwardAlone>
  void write_share_of(int64_t row, const RowGradient<A>& g, A upstream, int64_t begin, int64_t end, T* out) const {
    const T* const x = logits(row);
    const bool capped = transform.cap != A(0);
    const auto share = reference.share(g, capped ? upstream : upstream * transform.gain);
    const V zero(A(0));
    typename W::Pack z, r;
    const auto gradients = [&]() __attribute__((always_inline)) {
      for (int k = 0; k < W::kVectors; ++k) {
        const V out_of = is_minus_inf(z[k]);
        V d = share.template of<kForwardAlone>(z[k], r[k]);
        if (capped) [[unlikely]]
          d = d * transform.slope(V::blendv(z[k], zero, out_of));
        z[k] = V::blendv(d, zero, out_of);
      }
    };
    if (in.reference_dtype != in.dtype) {
      for (int64_t j = begin; j < end; j += W::kPack) {
        const int64_t count = std::min(W::kPack, end - j);
        reference.load_both(x, row, j, count, z, r);
        gradients();
        W::store(out + j, count, z);
      }
      return;
    }
    const auto some = [&](int64_t j, int64_t count) __attribute__((always_inline)) {
      reference.load_both(x, row, j, count, z, r);
      gradients();
      store_first(out + j, count, W::packed(z));
    };
    const int64_t head = std::min(W::to_boundary(out + begin), end - begin);
    if (head != 0) some(begin, head);
    const T* const beside = reference.of_row(row);
    int64_t j = begin + head;
    for (; j + W::kPack <= end; j += W::kPack) {
      W::take(x + j, z);
      W::take(beside + j, r);
      if (!transform.identity) [[unlikely]]
        for (int k = 0; k < W::kVectors; ++k) z[k] = transform(z[k]);
      gradients();
      if (past_caches) {
        store_past_caches(out + j, W::packed(z));
      } else {
        W::packed(z).store(out + j);
      }
    }
    if (j < end) some(j, end - j);
  }

  void write_full(int64_t row, const RowGradient<A>& g, A upstream, int64_t begin, int64_t end, T* out) const {
    const T* x = logits(row);
    const D* q_row = in.dense_target == nullptr ? nullptr : dense(row);
    const V m(g.max), u(upstream), zero(A(0)), one(A(1));
    const auto share = reference.share(g, A(1));
    for (int64_t j = begin; j < end; j += W::kPack) {
      const int64_t count = std::min(W::kPack, end - j);
      typename W::Pack v, w, q, r;
      W::load(x + j, count, 0.0f, v);
      if (in.reference != nullptr) reference.load(row, j, count, r);
      for (int k = 0; k < W::kVectors; ++k) w[k] = one;
      if (weight != nullptr) W::load(weight + j, count, 0.0f, w);
      if (q_row != nullptr) W::load(q_row + j, count, 0.0f, q);
      for (int k = 0; k < W::kVectors; ++k) {
        const V z = transform(v[k]), out_of = is_minus_inf(z), finite = V::blendv(z, zero, out_of);
        const V t = V::blendv(difference(z, m), zero, out_of), e = V::blendv(exp_nonpositive(t), zero, out_of);
        V d = e * at::vec::fmadd(V(g.exp_t), clamp_exponent(t), V(g.exp_1));
        d = d + at::vec::fmadd(V(g.const_t), t, V(g.const_1)) + V(g.const_z) * finite + V(g.const_w) * w[k];
        if (q_row != nullptr) d = at::vec::fmadd(V(g.const_q) * w[k], q[k], d);
        if (in.reference != nullptr) d = d + share(z, r[k]);
        d = d * u * transform.slope(finite);
        v[k] = in.masked ? V::blendv(d, zero, out_of) : d;
      }
      W::store(out + j, count, v);
    }
  }
};

}  // namespace
}  // namespace OBJKERN_VARIANT
}  // namespace objkern::cpu
