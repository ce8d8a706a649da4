// Elementwise objectives:  nvcc -O3 -std=c++20 -arch=sm_90 --expt-relaxed-constexpr -c csrc/cuda/elementwise.cu
//
//   element_kernel   a vector of 16 bytes a thread at a time ──▶ values, gradient; sums of the block, for each term
//   reduce_kernel    one block: sums of the blocks, in their order ──▶ loss and parts
#include <algorithm>

#include "../elementwise.h"
#include "elements.h"

namespace objkern::cuda {
namespace {

constexpr int kElementThreads = 256;
#ifdef OBJKERN_EMULATED
constexpr int64_t kMostElementBlocks = 18, kElementsOfBlock = 100;  // so that the tests' few elements do
#else
constexpr int64_t kMostElementBlocks = 2048;
constexpr int64_t kElementsOfBlock = 8192;  // that are worth a block of their own
#endif

enum class Asked { kSums, kSumsAndGradient, kValues, kGradient };

struct ElementCall {
  Elements elements;
  Scalar logit_scale;
  Program program;
  const void* upstream = nullptr;  // of A; null: 1
  int64_t upstream_stride = 0;
  bool unless_one = false;
  bool vectors = false;  // prediction, target, upstream and gradient all begin at multiples of 16 bytes
  ElementResults results;
  int64_t blocks = 0;

  OBJKERN_DEVICE double* block_sums() const { return static_cast<double*>(results.workspace); }
};

// Coefficient over denominator of term k, and the denominator.
OBJKERN_DEVICE double denominator_of(const ElementCall& call) {
  const Program& program = call.program;
  if (program.has_normalizer) return number(program.normalizer);
  const bool nothing = call.elements.count == 0 && program.empty_zero;
  return program.reduction == Reduction::kMean && !nothing ? static_cast<double>(call.elements.count) : 1.0;
}
OBJKERN_DEVICE double coefficient_of(const ElementCall& call, int k) {
  const double factor = call.program.factors == nullptr ? 1.0 : call.program.factors[k];
  return call.program.terms[k].scale * factor;
}

// Numbers that repeat with a period; element `i` and those after it one by one.
template <class A>
struct Periodic {
  const A* numbers;
  int64_t period, place;

  OBJKERN_DEVICE Periodic(const void* p, int64_t period_, int64_t i)
      : numbers(static_cast<const A*>(p)), period(period_), place(p == nullptr || i < period_ ? i : i % period_) {}
  OBJKERN_DEVICE A next() {
    if (numbers == nullptr) return A(1);
    const A found = numbers[place];
    place = place + 1 == period ? 0 : place + 1;
    return found;
  }
};

// LogOdds of d, by the device's own approximations where they have float32's digits.
template <class T, class A>
OBJKERN_DEVICE LogOdds<A> log_odds_of(A d) {
  if constexpr (sizeof(A) == 8) {
    return LogOdds<A>(d);
  } else {
    const auto reciprocal = [](float x) {
      const float y = reciprocal_fast(x);
      return std::fma(y, std::fma(-x, y, 1.0f), y);
    };
    const float e = exp_nonpositive<T>(-std::fabs(d));
    const float s = e * reciprocal(2.0f + e), square = s * s;  // log(1 + e) = 2 atanh(e / (2 + e))
    float sum = 1.0f / 13;
#pragma unroll
    for (int k = 11; k >= 3; k -= 2) sum = std::fma(sum, square, 1.0f / static_cast<float>(k));
    LogOdds<A> found;
    found.set(d, 0.0f, std::fma(sum * square, s + s, s + s), e, reciprocal(1.0f + e));
    return found;
  }
}

template <int kVector, class A>
OBJKERN_DEVICE void write_vector(A* p, const A (&numbers)[kVector]) {
  constexpr int kWords = 16 / sizeof(A);
#pragma unroll
  for (int i = 0; i < kVector; i += kWords) {
    Words words;
    __builtin_memcpy(&words, numbers + i, sizeof words);
    store128_once(p + i, words);
  }
}

// Of a multiprocessor, which leaves 80 registers or 128.
template <class T>
constexpr int blocks_at_once(Asked asked, bool plain) {
  const bool little = asked == Asked::kSums || asked == Asked::kGradient || sizeof(T) == 4;
  return plain && little && sizeof(T) < 8 ? 3 : 2;
}

// T: the prediction; D: the target, T or the accumulation type. kPlain: nothing transforms the prediction, and there
// are no weights.
template <class T, class D, Asked kAsked, bool kPlain>
OBJKERN_KERNEL(kElementThreads, blocks_at_once<T>(kAsked, kPlain))
element_kernel(OBJKERN_ARGUMENT ElementCall call) {
  using A = Accumulation<T>;
  constexpr int kVector = Element<T>::kVector;
  const Elements& in = call.elements;
  const Program& program = call.program;
  const int thread = thread_index(), size = program.size;
  const A* const upstream = static_cast<const A*>(call.upstream);
  if (kAsked == Asked::kGradient && call.unless_one && upstream[0] == A(1)) return;
  constexpr bool kSums = kAsked == Asked::kSums || kAsked == Asked::kSumsAndGradient;
  constexpr bool kWrites = kAsked == Asked::kGradient || kAsked == Asked::kSumsAndGradient;

  // Of every thread and term the sum so far, and of every term the scale.
  double* const sums = reinterpret_cast<double*>(shared_memory());
  double* const scales = sums + (kSums ? size * kElementThreads : 0);
  const double denominator = denominator_of(call);
  for (int k = thread; k < size; k += kElementThreads) scales[k] = coefficient_of(call, k) / denominator;
  for (int k = 0; kSums && k < size; ++k) sums[k * kElementThreads + thread] = 0;
  block_sync();

  const Transform<A, !kPlain> transform(in, call.logit_scale);
  bool odds = false;
  for (int k = 0; k < size; ++k) odds |= reads_odds(static_cast<ElementKind>(program.terms[k].kind));
  const T* const x = static_cast<const T*>(in.input);
  const D* const y = static_cast<const D*>(in.target);
  T* const gradient = static_cast<T*>(call.results.gradient);

  const int64_t stride = static_cast<int64_t>(block_count()) * kElementThreads * kVector;
  const int64_t begin = (static_cast<int64_t>(block_index()) * kElementThreads + thread) * kVector;
  for (int64_t first = begin; first < in.count; first += stride) {
    const int there = static_cast<int>(first + kVector <= in.count ? kVector : in.count - first);
    const bool whole = call.vectors && there == kVector;
    A z[kVector] = {}, target[kVector] = {};
    if (whole) {
      read_vector<T, kVector>(x + first, z);
      if (y != nullptr) read_vector<D, kVector>(y + first, target);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (i < there) z[i] = widen(x[first + i]);
        if (i < there && y != nullptr) target[i] = widen(y[first + i]);
      }
    }
    ElementInputs<A> e[kVector];
    LogOdds<A> of_z[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      e[i].z = transform(z[i]);
      e[i].y = target[i];
      e[i].limits = in.limits;
    }
    if constexpr (!kPlain) {
      Periodic<A> weight(in.weight, in.weight_period, first), pos_weight(in.pos_weight, in.pos_weight_period, first);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        e[i].weight = weight.next();
        e[i].pos_weight = pos_weight.next();
      }
    }
    if (odds) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) of_z[i] = log_odds_of<T>(e[i].z);
    }

    A found[kVector] = {}, total[kVector] = {};
    for (int k = 0; k < size; ++k) {
      const A scale = static_cast<A>(scales[k]);
      A values[kVector];
      with_kind(static_cast<ElementKind>(program.terms[k].kind), [&]<ElementKind kKind>() {
#pragma unroll
        for (int i = 0; i < kVector; ++i)
          values[i] = element_value<A>(kKind, program.terms[k].parameter, e[i], of_z[i], scale, found[i]);
      });
      A sum = 0;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (i < there) sum += values[i];
        total[i] += scale * values[i];
        if (kAsked == Asked::kValues && i < there && call.results.parts != nullptr)
          static_cast<A*>(call.results.parts)[k * in.count + first + i] = values[i];
      }
      if constexpr (kSums) sums[k * kElementThreads + thread] += static_cast<double>(sum);
    }
    if constexpr (kAsked == Asked::kValues) {
      A* const loss = static_cast<A*>(call.results.loss) + first;
      if (whole) write_vector(loss, total);
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (!whole && i < there) loss[i] = total[i];
    }
    if constexpr (!kWrites) continue;
    A up[kVector];
    if (kAsked == Asked::kSumsAndGradient || call.upstream_stride == 0) {  // one number for all
#pragma unroll
      for (int i = 0; i < kVector; ++i) up[i] = kAsked == Asked::kSumsAndGradient ? A(1) : upstream[0];
    } else if (whole) {
      read_vector<A, kVector>(upstream + first, up);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) up[i] = i < there ? upstream[first + i] : A(1);
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) found[i] *= transform.slope(e[i].z) * up[i];
    if (whole) {
      store128_once(gradient + first, packed<T>(found));
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (i < there) gradient[first + i] = narrowed<T>(found[i]);
    }
  }
  if constexpr (!kSums) return;

  // A warp adds up a term at a time.
  block_sync();
  const int lane = thread % kWarp;
  for (int k = thread / kWarp; k < size; k += kElementThreads / kWarp) {
    double sum = 0;
    for (int i = lane; i < kElementThreads; i += kWarp) sum += sums[k * kElementThreads + i];
    for (int step = kWarp / 2; step > 0; step /= 2) sum += shuffle_xor(sum, step);
    if (lane == 0) call.block_sums()[k * call.blocks + block_index()] = sum;
  }
}

// One block; a warp adds up a term at a time.
template <class A>
OBJKERN_KERNEL(kElementThreads, 1)
reduce_kernel(OBJKERN_ARGUMENT ElementCall call) {
  const Program& program = call.program;
  const int thread = thread_index(), lane = thread % kWarp;
  double* const values = reinterpret_cast<double*>(shared_memory());
  const double denominator = denominator_of(call);
  for (int k = thread / kWarp; k < program.size; k += kElementThreads / kWarp) {
    double sum = 0;
    for (int64_t i = lane; i < call.blocks; i += kWarp) sum += call.block_sums()[k * call.blocks + i];
    for (int step = kWarp / 2; step > 0; step /= 2) sum += shuffle_xor(sum, step);
    if (lane == 0) values[k] = sum / denominator;
  }
  block_sync();
  if (thread != 0) return;
  double total = 0;
  for (int k = 0; k < program.size; ++k) {
    total += coefficient_of(call, k) * values[k];
    if (program.with_parts) static_cast<A*>(call.results.parts)[k] = static_cast<A>(values[k]);
  }
  *static_cast<A*>(call.results.loss) = static_cast<A>(total);
}

using ElementKernel = void (*)(ElementCall);

template <Asked kAsked, bool kPlain>
ElementKernel kernel_of_type(const Elements& in) {
  const bool same = in.target == nullptr || in.target_dtype == in.dtype;
  switch (in.dtype) {
    case DType::kFloat32:
      return &element_kernel<float, float, kAsked, kPlain>;
    case DType::kFloat64:  // for checks, not for speed: one serves all
      return &element_kernel<double, double, kAsked, false>;
    case DType::kBFloat16:
      return same ? &element_kernel<BFloat16, BFloat16, kAsked, kPlain>
                  : &element_kernel<BFloat16, float, kAsked, kPlain>;
    case DType::kFloat16:
      return same ? &element_kernel<Float16, Float16, kAsked, kPlain> : &element_kernel<Float16, float, kAsked, kPlain>;
  }
  return nullptr;
}

template <Asked kAsked>
ElementKernel kernel_for(const ElementCall& call) {
  const Elements& in = call.elements;
  const bool identity = call.logit_scale.pointer == nullptr && call.logit_scale.value == 1.0 && in.softcap == 0.0;
  const bool plain = identity && in.weight == nullptr && in.pos_weight == nullptr;
  return plain ? kernel_of_type<kAsked, true>(in) : kernel_of_type<kAsked, false>(in);
}

bool at_vector(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

ElementCall call_of(const Elements& in, const Scalar& logit_scale, const Program& program, const void* upstream,
                    int64_t upstream_stride, const ElementResults& results) {
  ElementCall call;
  call.elements = in;
  call.logit_scale = logit_scale;
  call.program = program;
  call.upstream = upstream;
  call.upstream_stride = upstream_stride;
  call.results = results;
  call.vectors = at_vector(in.input) && at_vector(in.target) && at_vector(results.gradient) &&
                 at_vector(results.loss) && (upstream_stride == 0 || at_vector(upstream));
  call.blocks = element_blocks(in);
  return call;
}

template <Asked kAsked>
Status run(const ElementCall& call, Stream stream) {
  const bool sums = kAsked == Asked::kSums || kAsked == Asked::kSumsAndGradient;
  const int64_t numbers = call.program.size * (sums ? 1 + kElementThreads : 1);
  return launch(kernel_for<kAsked>(call), Grid{call.blocks, kElementThreads, 1, 8 * std::max<int64_t>(numbers, 1)},
                stream, call);
}

}  // namespace

int64_t element_blocks(const Elements& in) {
  return std::clamp<int64_t>((in.count + kElementsOfBlock - 1) / kElementsOfBlock, 1, kMostElementBlocks);
}

Status elementwise(const Elements& in, const Scalar& logit_scale, const Program& program, const ElementResults& results,
                   Stream stream) {
  const ElementCall call = call_of(in, logit_scale, program, nullptr, 0, results);
  if (program.reduction == Reduction::kNone) return in.count == 0 ? kOk : run<Asked::kValues>(call, stream);
  const Status status =
      results.gradient == nullptr ? run<Asked::kSums>(call, stream) : run<Asked::kSumsAndGradient>(call, stream);
  if (status != kOk) return status;
  const ElementKernel reduce = in.dtype == DType::kFloat64 ? &reduce_kernel<double> : &reduce_kernel<float>;
  return launch(reduce, Grid{1, kElementThreads, 1, 8 * std::max<int64_t>(program.size, 1)}, stream, call);
}

Status elementwise_gradient(const Elements& in, const Scalar& logit_scale, const Program& program, const void* upstream,
                            int64_t upstream_stride, bool unless_one, void* gradient, Stream stream) {
  if (in.count == 0) return kOk;
  ElementResults results;
  results.gradient = gradient;
  ElementCall call = call_of(in, logit_scale, program, upstream, upstream_stride, results);
  call.unless_one = unless_one;
  return run<Asked::kGradient>(call, stream);
}

}  // namespace objkern::cuda
