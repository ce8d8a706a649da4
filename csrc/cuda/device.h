// What the hardware gives, under names of our own: threads, shared memory, clusters, 16-byte accesses, half precision.
// Kernels use nothing else of CUDA, so that the tests can run them on a CPU: with OBJKERN_EMULATED the same names come
// from tests/emulation/emulated_device.h, where every thread is a fiber.
#pragma once

#include <cstdint>
#include <limits>

namespace objkern::cuda {

struct alignas(16) Words {  // 16 bytes, the widest access there is
  uint32_t w[4];
};
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

constexpr int kWarp = 32;

// How a kernel is launched. `cluster` neighbouring blocks form a cluster; the number of blocks is a multiple of it.
struct Grid {
  int64_t blocks;
  int threads;
  int cluster;
  int64_t shared_bytes;  // dynamic shared memory of a block
};

struct Limits {
  int multiprocessors = 0;
  int64_t shared_of_multiprocessor = 0, shared_of_block = 0;  // bytes
  bool clusters = false;
};

}  // namespace objkern::cuda

#ifdef OBJKERN_EMULATED
#include "emulated_device.h"
#else

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>

#define OBJKERN_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define OBJKERN_ARGUMENT const __grid_constant__  // of a kernel: stays where it is, even if indexed
#define OBJKERN_DEVICE __device__ __forceinline__
#define OBJKERN_HOST_DEVICE __host__ __device__ inline

namespace objkern::cuda {

// ---- where a thread is ------------------------------------------------------------------------------------------

OBJKERN_DEVICE int thread_index() {
  return static_cast<int>(threadIdx.x);
}
OBJKERN_DEVICE int block_threads() {
  return static_cast<int>(blockDim.x);
}
OBJKERN_DEVICE int block_index() {
  return static_cast<int>(blockIdx.x);
}
OBJKERN_DEVICE int block_count() {
  return static_cast<int>(gridDim.x);
}

OBJKERN_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char shared[];
  return shared;
}

OBJKERN_DEVICE void block_sync() {
  __syncthreads();
}

// ---- warps: every lane takes part ---------------------------------------------------------------------------------

template <class V>
OBJKERN_DEVICE V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class V>
OBJKERN_DEVICE V shuffle(V value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// ---- clusters -----------------------------------------------------------------------------------------------------
// A barrier in two halves. What a block wrote to shared memory before it arrives, the others see after they waited.

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
OBJKERN_DEVICE int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
OBJKERN_DEVICE int cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
}
OBJKERN_DEVICE void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
OBJKERN_DEVICE void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The same object in the shared memory of another block of the cluster.
template <class V>
OBJKERN_DEVICE const V* in_block(const V* shared, int rank) {
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(reinterpret_cast<uint64_t>(shared)), "r"(rank));
  return reinterpret_cast<const V*>(address);
}
#else  // before sm_90 there are none
OBJKERN_DEVICE int cluster_rank() {
  return 0;
}
OBJKERN_DEVICE int cluster_size() {
  return 1;
}
OBJKERN_DEVICE void cluster_arrive() {}
OBJKERN_DEVICE void cluster_wait() {}
template <class V>
OBJKERN_DEVICE const V* in_block(const V* shared, int) {
  return shared;
}
#endif

// ---- memory -------------------------------------------------------------------------------------------------------
// Addresses are multiples of 16 (of 4 for `copy_async` of 4 bytes). `once`: what is not used again soon.

OBJKERN_DEVICE Words load128(const void* p) {
  const uint4 v = *static_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
OBJKERN_DEVICE Words load128_once(const void* p) {
  const uint4 v = __ldcs(static_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}
OBJKERN_DEVICE void store128_once(void* p, const Words& v) {
  __stcs(static_cast<uint4*>(p), make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]));
}

// From global to shared memory without waiting. A thread sees what it copied itself after `copies_arrived`; `kLater`
// groups, each closed by `close_copies`, may still be on their way.
OBJKERN_DEVICE void copy_async(void* shared, const void* global) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
OBJKERN_DEVICE void close_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kLater>
OBJKERN_DEVICE void copies_arrived() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLater) : "memory");
}

// What other blocks wrote, past this multiprocessor's own cache.
OBJKERN_DEVICE double load_shared_by_blocks(const double* p) {
  return __ldcg(p);
}

// How many came before. What a thread wrote before it took a ticket is seen by whoever takes a later one.
OBJKERN_DEVICE uint32_t take_ticket(uint32_t* counter) {
  __threadfence();
  const uint32_t ticket = atomicAdd(counter, 1u);
  __threadfence();
  return ticket;
}

// ---- numbers ------------------------------------------------------------------------------------------------------

OBJKERN_DEVICE float exp2_fast(float x) {  // 2 units in the last place; below 2⁻¹²⁶ it is 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

OBJKERN_DEVICE float reciprocal_fast(float x) {  // a unit in the last place, of numbers between 2⁻¹²⁶ and 2¹²⁶
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

OBJKERN_DEVICE float widen(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
OBJKERN_DEVICE float widen(Float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
// Both of a word, the first out of its low half.
OBJKERN_DEVICE void widen_pair(BFloat16*, uint32_t word, float& first, float& second) {
  first = __uint_as_float(word << 16);
  second = __uint_as_float(word & 0xffff0000u);
}
OBJKERN_DEVICE void widen_pair(Float16*, uint32_t word, float& first, float& second) {
  first = widen(Float16{static_cast<uint16_t>(word)});
  second = widen(Float16{static_cast<uint16_t>(word >> 16)});
}
OBJKERN_DEVICE float widen(float x) {
  return x;
}
OBJKERN_DEVICE double widen(double x) {
  return x;
}

// Two neighbours in one word, rounded to the nearest; the first in the low half.
OBJKERN_DEVICE uint32_t pack(BFloat16*, float first, float second) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}
OBJKERN_DEVICE uint32_t pack(Float16*, float first, float second) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}

// The bits of `high:low` from bit 8·bytes on.
OBJKERN_DEVICE uint32_t shifted_bytes(uint32_t low, uint32_t high, int bytes) {
  return __funnelshift_r(low, high, static_cast<uint32_t>(8 * bytes));
}

// ---- launches (host) ------------------------------------------------------------------------------------------------

struct LaunchOptions {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};

  LaunchOptions(const Grid& grid, void* stream) {
    config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
    config.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    if (grid.cluster > 1) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
      config.attrs = &attribute;
      config.numAttrs = 1;
    }
  }
  LaunchOptions(const LaunchOptions&) = delete;  // it points into itself
};

template <class Call>
int launch(void (*kernel)(Call), const Grid& grid, void* stream, const Call& call) {
  if (grid.shared_bytes > 48 * 1024) {
    const cudaError_t status =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(grid.shared_bytes));
    if (status != cudaSuccess) return status;
  }
  LaunchOptions options(grid, stream);
  void* arguments[] = {const_cast<Call*>(&call)};
  const cudaError_t status = cudaLaunchKernelExC(&options.config, reinterpret_cast<const void*>(kernel), arguments);
  if (status != cudaSuccess) cudaGetLastError();  // it is told here, and no later call shall be blamed
  return status;
}

// ---- the device (host) ----------------------------------------------------------------------------------------------

inline int count_devices(int& count) {
  count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) count = 0;  // without a driver it is left unwritten
  return status;
}

// Blocks, or clusters of them, that the current device holds at once. Asked once for each kernel and shape of block.
template <class Call>
int held_at_once(void (*kernel)(Call), const Grid& grid, int64_t& held) {
  int device = 0, multiprocessors = 0, found = 0;
  int status = cudaGetDevice(&device);
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int, int, int64_t>, int64_t> known;
  const void* const function = reinterpret_cast<const void*>(kernel);
  const std::lock_guard<std::mutex> lock(mutex);
  int64_t& entry = known[{device, function, grid.threads, grid.cluster, grid.shared_bytes}];
  if (entry == 0 && status == cudaSuccess) {
    if (grid.shared_bytes > 48 * 1024)
      status = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(grid.shared_bytes));
    if (status != cudaSuccess) return status;
    if (grid.cluster > 1) {
      LaunchOptions options(grid, nullptr);
      status = cudaOccupancyMaxActiveClusters(&found, function, &options.config);
      multiprocessors = 1;
    } else {
      status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found, function, grid.threads,
                                                             static_cast<size_t>(grid.shared_bytes));
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    }
    if (status != cudaSuccess) cudaGetLastError();
    entry = int64_t{found} * multiprocessors;
  }
  held = entry;
  return status;
}

// Of the current device, which is asked once.
inline int read_limits(Limits& limits) {
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  static std::mutex mutex;
  static std::map<int, Limits> known;
  const std::lock_guard<std::mutex> lock(mutex);
  Limits& found = known[device];
  const auto read = [&](cudaDeviceAttr attribute) {
    int value = 0;
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&value, attribute, device);
    return value;
  };
  if (found.multiprocessors == 0) {
    found.shared_of_multiprocessor = read(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    found.shared_of_block = read(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    found.clusters = read(cudaDevAttrComputeCapabilityMajor) >= 9;
    found.multiprocessors = read(cudaDevAttrMultiProcessorCount);
  }
  limits = found;
  return status;
}

// Whether this build holds machine code (or PTX) of the kernel for the current device.
template <class Call>
int loadable(void (*kernel)(Call)) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
}

inline const char* error_text(int status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

// Makes another device the current one as long as it lives.
struct OnDevice {
  int before = 0;
  explicit OnDevice(int device) {
    cudaGetDevice(&before);
    cudaSetDevice(device);
  }
  ~OnDevice() { cudaSetDevice(before); }
};

}  // namespace objkern::cuda

#endif  // OBJKERN_EMULATED
