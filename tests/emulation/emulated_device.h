// csrc/cuda/device.h on a CPU: the same names, where a thread is a fiber that runs until it must wait for others. The
// scheduler is in emulation.cpp; what it proves and what not is told in __init__.py.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <source_location>
#include <string>
#include <type_traits>

#define OBJKERN_KERNEL(threads, blocks) void
#define OBJKERN_ARGUMENT const
#define OBJKERN_DEVICE inline
#define OBJKERN_HOST_DEVICE inline

namespace objkern::cuda {

using std::max;
using std::min;

namespace emulation {

using Site = std::source_location;  // of a call in a kernel, for reports

struct Place {
  int thread = 0, threads = 0, block = 0, blocks = 0, rank = 0, cluster = 1;
  char* shared = nullptr;
};
extern const Place* here;  // of the fiber that runs

// Ends the launch; `launch` returns kFailed, and `error_text` says why.
[[noreturn]] void fail(const std::string& why, Site site);

constexpr int kFailed = 719;  // cudaErrorLaunchFailure

int run(const Grid& grid, const void* kernel, const std::function<void()>& thread);
void block_sync(Site site);
void exchange(void* value, size_t size, int from_lane, Site site);
void cluster_arrive(Site site);
void cluster_wait(Site site);
const char* in_block(const char* shared, int rank, Site site);
void copy_async(void* shared, const void* global, Site site);
void close_copies();
void copies_arrived(int later);
void yield();
Limits limits();
const char* error_text(int status);

inline void check_aligned(const void* p, const char* what, Site site) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) fail(std::string(what) + " an address that is no multiple of 16", site);
}

}  // namespace emulation

// ---- where a thread is ------------------------------------------------------------------------------------------

inline int thread_index() {
  return emulation::here->thread;
}
inline int block_threads() {
  return emulation::here->threads;
}
inline int block_index() {
  return emulation::here->block;
}
inline int block_count() {
  return emulation::here->blocks;
}
inline char* shared_memory() {
  return emulation::here->shared;
}
inline void block_sync(emulation::Site site = emulation::Site::current()) {
  emulation::block_sync(site);
}

// ---- warps --------------------------------------------------------------------------------------------------------

template <class V>
V shuffle(V value, int lane, emulation::Site site = emulation::Site::current()) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8);
  emulation::exchange(&value, sizeof(V), lane % kWarp, site);
  return value;
}
template <class V>
V shuffle_xor(V value, int mask, emulation::Site site = emulation::Site::current()) {
  return cuda::shuffle(value, (thread_index() % kWarp) ^ mask, site);
}

// ---- clusters -----------------------------------------------------------------------------------------------------

inline int cluster_rank() {
  return emulation::here->rank;
}
inline int cluster_size() {
  return emulation::here->cluster;
}
inline void cluster_arrive(emulation::Site site = emulation::Site::current()) {
  emulation::cluster_arrive(site);
}
inline void cluster_wait(emulation::Site site = emulation::Site::current()) {
  emulation::cluster_wait(site);
}
template <class V>
const V* in_block(const V* shared, int rank, emulation::Site site = emulation::Site::current()) {
  return reinterpret_cast<const V*>(emulation::in_block(reinterpret_cast<const char*>(shared), rank, site));
}

// ---- memory -------------------------------------------------------------------------------------------------------

inline Words load128(const void* p, emulation::Site site = emulation::Site::current()) {
  emulation::check_aligned(p, "a load of 16 bytes from", site);
  Words words;
  std::memcpy(&words, p, sizeof(words));
  return words;
}
inline Words load128_once(const void* p, emulation::Site site = emulation::Site::current()) {
  return load128(p, site);
}
inline void store128_once(void* p, const Words& words, emulation::Site site = emulation::Site::current()) {
  emulation::check_aligned(p, "a store of 16 bytes to", site);
  std::memcpy(p, &words, sizeof(words));
}

inline void copy_async(void* shared, const void* global, emulation::Site site = emulation::Site::current()) {
  emulation::copy_async(shared, global, site);
}
inline void close_copies() {
  emulation::close_copies();
}
template <int kLater>
void copies_arrived() {
  emulation::copies_arrived(kLater);
}

inline double load_shared_by_blocks(const double* p) {
  return *p;
}

inline uint32_t take_ticket(uint32_t* counter) {  // other blocks may get ahead both before and after
  emulation::yield();
  const uint32_t ticket = (*counter)++;
  emulation::yield();
  return ticket;
}

using std::max;  // CUDA has them in the global namespace
using std::min;

// ---- numbers ------------------------------------------------------------------------------------------------------

inline float float_from_bits(uint32_t bits) {
  return std::bit_cast<float>(bits);
}
inline uint32_t bits_of_float(float x) {
  return std::bit_cast<uint32_t>(x);
}

inline float exp2_fast(float x) {
  const float y = static_cast<float>(std::exp2(static_cast<double>(x)));
  return y < std::numeric_limits<float>::min() ? 0.0f : y;  // NaN stays
}

inline float reciprocal_fast(float x) {
  return 1.0f / x;
}

inline float widen(BFloat16 x) {
  return float_from_bits(static_cast<uint32_t>(x.bits) << 16);
}
inline float widen(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = (x.bits >> 10) & 31, fraction = x.bits & 1023;
  if (exponent == 0) return std::copysign(std::ldexp(static_cast<float>(fraction), -24), float_from_bits(sign));
  return float_from_bits(sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13);
}
template <class T>
void widen_pair(T*, uint32_t word, float& first, float& second) {
  first = widen(T{static_cast<uint16_t>(word)});
  second = widen(T{static_cast<uint16_t>(word >> 16)});
}
inline float widen(float x) {
  return x;
}
inline double widen(double x) {
  return x;
}

namespace emulation {

// To the nearest, ties to even; any NaN becomes that of the instruction.
inline uint32_t narrow(BFloat16, float x) {
  if (std::isnan(x)) return 0x7FFF;
  const uint32_t bits = bits_of_float(x);
  return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}
inline uint32_t narrow(Float16, float x) {
  if (std::isnan(x)) return 0x7FFF;
  const uint32_t sign = (bits_of_float(x) >> 16) & 0x8000, bits = bits_of_float(std::fabs(x));
  if (std::fabs(x) >= 65520.0f) return sign | 0x7C00;  // halfway to what would come after the largest
  // 2⁻²⁴, the step of the subnormals, is that of the floats at 1/2.
  if (std::fabs(x) < 0x1p-14f) return sign | (bits_of_float(std::fabs(x) + 0.5f) - bits_of_float(0.5f));
  return sign | (bits + 0xFFF + ((bits >> 13) & 1) - (112u << 23)) >> 13;
}

}  // namespace emulation

template <class Half>
uint32_t pack(Half*, float first, float second) {
  return emulation::narrow(Half(), first) | emulation::narrow(Half(), second) << 16;
}

inline uint32_t shifted_bytes(uint32_t low, uint32_t high, int bytes) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (8 * bytes % 32));
}

// ---- launches and the device (host) ---------------------------------------------------------------------------------

template <class Call>
int launch(void (*kernel)(Call), const Grid& grid, void* /*stream*/, const Call& call) {
  static_assert(std::is_trivially_copyable_v<Call>);
  static_assert(sizeof(Call) <= 4096);
  return emulation::run(grid, reinterpret_cast<const void*>(kernel), [&] { kernel(call); });
}

inline int count_devices(int& count) {
  count = 1;
  return 0;
}
template <class Call>
int held_at_once(void (*)(Call), const Grid&, int64_t& held) {
  held = max(emulation::limits().multiprocessors / 40, 1);  // few, so that the tests' few rows take turns
  return 0;
}
inline int read_limits(Limits& limits) {
  limits = emulation::limits();
  return 0;
}
template <class Call>
int loadable(void (*)(Call)) {
  return 0;
}
inline const char* error_text(int status) {
  return emulation::error_text(status);
}
struct OnDevice {
  explicit OnDevice(int) {}
  ~OnDevice() {}  // so that one that only stands there is not called unused
};

}  // namespace objkern::cuda
