// Penalties on many parameters at once:  nvcc -O3 -std=c++20 -arch=sm_90 --expt-relaxed-constexpr -c
// csrc/cuda/parameters.cu
//
//   d = θ − θ₀     value  Σ l1·|d| + ½·l2·F·d²     gradient  l1·sign(d) + l2·F·d
//
//   parameters   │ θ 0        │ θ 1 │ θ 2              │ ...   as many as fit into a launch's arguments
//   blocks       │ 0 │ 1 │ 2  │ 3   │ 4 │ 5 │ 6 │ 7    │ ...   a share of one parameter each ──▶ its sum, or gradient
//   total_kernel one block: the sums of the blocks, in their order ──▶ value
#include <algorithm>

#include "elements.h"

namespace objkern::cuda {
namespace {

constexpr int kParameterThreads = 256;
#ifdef OBJKERN_EMULATED
constexpr int64_t kOfBlock = 128;  // elements, a multiple of every vector, so that the tests' few have several blocks
#else
constexpr int64_t kOfBlock = 1 << 14;
#endif

int64_t blocks_of(const Parameter& parameter) {
  return (parameter.count + kOfBlock - 1) / kOfBlock;
}

struct ParametersCall {
  Parameters in;
  int first[kMostParameters];  // block of each
  double* sums = nullptr;      // of the blocks of this launch
  const void* upstream = nullptr;
  bool adds = false;  // to the gradient that is there
};

enum class Of { kValue, kGradient };

// Of what the threads of a block found; whole in thread 0.
OBJKERN_DEVICE double sum_of_block(double own) {
  double* const of_warps = reinterpret_cast<double*>(shared_memory());
  const int thread = thread_index();
  for (int step = kWarp / 2; step > 0; step /= 2) own += shuffle_xor(own, step);
  if (thread % kWarp == 0) of_warps[thread / kWarp] = own;
  block_sync();
  if (thread == 0)
    for (int warp = 1; warp < kParameterThreads / kWarp; ++warp) own += of_warps[warp];
  return own;
}

// T: θ; D: θ₀, T or the accumulation type.
template <class T, class D, Of kOf>
OBJKERN_KERNEL(kParameterThreads, 2)
parameters_kernel(OBJKERN_ARGUMENT ParametersCall call) {
  using A = Accumulation<T>;
  constexpr int kVector = Element<T>::kVector;
  const int block = static_cast<int>(block_index()), thread = thread_index();
  int k = 0;
  for (int step = kMostParameters / 2; step > 0; step /= 2)
    if (k + step < call.in.size && call.first[k + step] <= block) k += step;
  const Parameter& own = call.in.of[k];
  const int64_t begin = (block - call.first[k]) * kOfBlock;
  const int64_t end = begin + kOfBlock < own.count ? begin + kOfBlock : own.count;
  const T* const theta = static_cast<const T*>(own.theta);
  const D* const origin = static_cast<const D*>(own.origin);
  const A* const weight = static_cast<const A*>(own.weight);
  T* const gradient = static_cast<T*>(own.gradient);
  const A l1 = static_cast<A>(call.in.l1), l2 = static_cast<A>(call.in.l2);
  const A upstream = kOf == Of::kGradient ? *static_cast<const A*>(call.upstream) : A(1);

  // One element: its value goes to `sum`, or its share of the gradient is returned.
  const auto one = [&](A t, A from, A f, A& sum) {
    const A d = t - from;
    if constexpr (kOf == Of::kValue) {
      sum += l1 * std::fabs(d) + A(0.5) * l2 * f * d * d;
      return A(0);
    } else {
      const A sign = d > A(0) ? A(1) : d < A(0) ? A(-1) : d;  // of a NaN a NaN
      return (l1 * sign + l2 * f * d) * upstream;
    }
  };

  double total = 0;
  const int64_t whole = own.vectors ? begin + (end - begin) / kVector * kVector : begin;
  for (int64_t i = begin + thread * kVector; i < whole; i += kParameterThreads * kVector) {
    A t[kVector], from[kVector] = {}, f[kVector], there[kVector] = {}, sum = A(0);
#pragma unroll
    for (int v = 0; v < kVector; ++v) f[v] = A(1);
    read_vector<T, kVector>(theta + i, t);
    if (origin != nullptr) read_vector<D, kVector>(origin + i, from);
    if (weight != nullptr) read_vector<A, kVector>(weight + i, f);
    if (kOf == Of::kGradient && call.adds) read_vector<T, kVector>(gradient + i, there);
#pragma unroll
    for (int v = 0; v < kVector; ++v) there[v] += one(t[v], from[v], f[v], sum);
    if constexpr (kOf == Of::kGradient) store128_once(gradient + i, packed<T>(there));
    total += static_cast<double>(sum);
  }
  for (int64_t i = whole + thread; i < end; i += kParameterThreads) {
    A sum = A(0);
    const A found = one(widen(theta[i]), origin == nullptr ? A(0) : static_cast<A>(widen(origin[i])),
                        weight == nullptr ? A(1) : weight[i], sum);
    if constexpr (kOf == Of::kGradient) gradient[i] = narrowed<T>(call.adds ? widen(gradient[i]) + found : found);
    total += static_cast<double>(sum);
  }
  if constexpr (kOf == Of::kValue) {
    total = sum_of_block(total);
    if (thread == 0) call.sums[block] = total;
  }
}

struct TotalCall {
  const double* sums;
  int64_t count;
  double* value;
};

OBJKERN_KERNEL(kParameterThreads, 1)
total_kernel(OBJKERN_ARGUMENT TotalCall call) {
  const int thread = thread_index();
  double total = 0;
  for (int64_t i = thread; i < call.count; i += kParameterThreads) total += call.sums[i];
  total = sum_of_block(total);
  if (thread == 0) *call.value = total;
}

using ParametersKernel = void (*)(ParametersCall);

template <Of kOf>
ParametersKernel kernel_for(const Parameters& in) {
  const bool same = in.origin_dtype == in.dtype;
  switch (in.dtype) {
    case DType::kFloat32:
      return &parameters_kernel<float, float, kOf>;
    case DType::kFloat64:
      return &parameters_kernel<double, double, kOf>;
    case DType::kBFloat16:
      return same ? &parameters_kernel<BFloat16, BFloat16, kOf> : &parameters_kernel<BFloat16, float, kOf>;
    case DType::kFloat16:
      return same ? &parameters_kernel<Float16, Float16, kOf> : &parameters_kernel<Float16, float, kOf>;
  }
  return nullptr;
}

constexpr int64_t kSharedBytes = 8 * kParameterThreads / kWarp;

// Numbers the blocks; returns how many there are.
int64_t number_blocks(ParametersCall& call) {
  int64_t blocks = 0;
  for (int k = 0; k < call.in.size; ++k) {
    call.first[k] = static_cast<int>(blocks);
    blocks += blocks_of(call.in.of[k]);
    Parameter& own = call.in.of[k];
    own.vectors = true;
    for (const void* p : {own.theta, own.origin, own.weight, static_cast<const void*>(own.gradient)})
      own.vectors = own.vectors && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  }
  return blocks;
}

}  // namespace

int64_t parameter_blocks(const Parameters& in) {
  int64_t blocks = 0;
  for (int k = 0; k < in.size; ++k) blocks += blocks_of(in.of[k]);
  return blocks;
}

Status parameters_sums(const Parameters& in, double* sums, Stream stream) {
  ParametersCall call;
  call.in = in;
  call.sums = sums;
  const int64_t blocks = number_blocks(call);
  if (blocks == 0) return kOk;
  return launch(kernel_for<Of::kValue>(in), Grid{blocks, kParameterThreads, 1, kSharedBytes}, stream, call);
}

Status parameters_total(const double* sums, int64_t count, double* value, Stream stream) {
  return launch(&total_kernel, Grid{1, kParameterThreads, 1, kSharedBytes}, stream, TotalCall{sums, count, value});
}

Status parameters_gradient(const Parameters& in, const void* upstream, bool adds, Stream stream) {
  ParametersCall call;
  call.in = in;
  call.upstream = upstream;
  call.adds = adds;
  const int64_t blocks = number_blocks(call);
  if (blocks == 0) return kOk;
  return launch(kernel_for<Of::kGradient>(in), Grid{blocks, kParameterThreads, 1, kSharedBytes}, stream, call);
}

}  // namespace objkern::cuda
