// The scheduler of emulated threads. Every thread is a fiber with a stack of its own. One runs until it waits for
// others; then whoever may go on is drawn from a seeded sequence. A few clusters of blocks are under way at a time, in
// a drawn order. What cannot go on, or may not, ends the launch with a report.
//
// A missing barrier shows where one thread is far ahead of another, which equal chances seldom bring about: all would
// have to be unlucky for long. So in most launches threads, warps or blocks are of different haste, and the hasty ones
// run as far as they can before the others move at all. A warp that is drawn runs for a while, because its stacks are
// in the cache then.
#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "cuda/kernels.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace objkern::cuda::emulation {
namespace {

constexpr int kBadGrid = 9;  // cudaErrorInvalidConfiguration
const char* const kClusterWait = "cluster_wait";

// ---- memory that nobody may touch -----------------------------------------------------------------------------------

void forbid([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(p, bytes);
#endif
}
void allow([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(p, bytes);
#endif
}

// ---- fibers: stacks and the switch between them ---------------------------------------------------------------------

constexpr int kMostThreads = 3072;  // whose stacks are in use at a time, unless a cluster has more
constexpr size_t kPage = 4096;
constexpr size_t kStack = 128 * 1024;

struct Stack {
  char* bottom = nullptr;
  size_t bytes = 0;
  void* fake = nullptr;  // AddressSanitizer's
#ifdef __x86_64__
  void* top = nullptr;  // where the registers are
#else
  ucontext_t context;
#endif
};

#ifdef __x86_64__
// swapcontext would do, but asks the system to change the signal mask every time.
extern "C" void objkern_switch_stacks(void** from, void* to);
asm(R"(
.text
.type objkern_switch_stacks, @function
objkern_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size objkern_switch_stacks, .-objkern_switch_stacks
)");
#endif

Stack host;  // of the thread that launches; its bounds are learnt when it is first left

void arrived_on([[maybe_unused]] Stack& stack) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(stack.fake, &bottom, &bytes);
  if (host.bottom == nullptr) host.bottom = static_cast<char*>(const_cast<void*>(bottom)), host.bytes = bytes;
#endif
}

void switch_stacks(Stack& from, Stack& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake, to.bottom, to.bytes);
#endif
#ifdef __x86_64__
  objkern_switch_stacks(&from.top, to.top);
#else
  swapcontext(&from.context, &to.context);
#endif
  arrived_on(from);
}

// A switch to `stack` will begin with `entry`, which never returns.
void prepare(Stack& stack, void (*entry)(), [[maybe_unused]] size_t colour) {
  allow(stack.bottom, stack.bytes);
  stack.fake = nullptr;
#ifdef __x86_64__
  // Stacks lie a power of two apart; if their tops did too, they would share a few lines of the cache.
  auto* top = reinterpret_cast<void**>(stack.bottom + stack.bytes - 64 * (colour % 60));
  *--top = nullptr;  // where `entry` would return to
  *--top = reinterpret_cast<void*>(entry);
  stack.top = top - 6;  // registers
#else
  getcontext(&stack.context);
  stack.context.uc_stack.ss_sp = stack.bottom;
  stack.context.uc_stack.ss_size = stack.bytes;
  makecontext(&stack.context, entry, 0);
#endif
}

// ---- what runs ------------------------------------------------------------------------------------------------------

struct Copy {  // on its way to shared memory
  void* to;
  Words words;
  int64_t group;
};

struct Block;

struct Fiber {
  Stack stack;
  Place place;
  Block* block = nullptr;

  const char* waits_at = nullptr;  // null: does not wait
  Site site;
  bool ended = false;
  bool arrived = false;  // at the barrier of the cluster, and has not waited yet
  int64_t phase = 0;     // of that barrier, when it arrived
  std::vector<Copy> copies;
  int64_t groups = 0;  // closed so far
};

struct Barrier {
  int arrived = 0;
  Site site;
};

constexpr size_t kHastes = 3;

struct Warp {
  Fiber** fibers = nullptr;  // of its lanes
  size_t haste = 0;          // the lowest first
  uint32_t ready = 0;        // lanes that may go on
  uint32_t hasty = 0;        // lanes that do before the others
  bool listed = false;       // among the warps that have any
  Barrier barrier;
  int parity = 0;  // a quick lane gives its next value while a slow one still reads the last
  char values[2][kWarp][8];
};

struct Free {
  void operator()(char* p) const { std::free(p); }
};

struct Cluster;

struct Block {
  Cluster* cluster = nullptr;
  int live = 0;  // threads
  std::vector<Fiber*> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  std::unique_ptr<char, Free> memory;  // the shared memory between two fences
};

struct Cluster {
  std::vector<Block> blocks;
  int live = 0, arrived = 0;  // threads
  int64_t phase = 0;
};

struct Random {  // splitmix64
  uint64_t state = 0;
  uint64_t bits() {
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  size_t below(size_t count) { return static_cast<size_t>(((bits() >> 32) * count) >> 32); }
};

const char* environment(const char* name, const char* otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : text;
}

struct Settings {
  uint64_t seed = std::strtoull(environment("OBJKERN_EMULATION_SEED", "0"), nullptr, 10);
  Limits device{132, 233472, 232448, true};  // an H100
} settings;

enum class Haste { kEqual, kOfThreads, kOfWarps, kOfBlocks };

struct Launch {
  Grid grid;
  const std::function<void()>* thread = nullptr;
  std::vector<std::unique_ptr<Cluster>> clusters;  // under way
  std::vector<Warp*> ready[kHastes];
  Warp* warp = nullptr;  // drawn last
  Haste haste;
  Random random;
  bool to_host = false;  // a cluster ended, or everything does
  std::string failure;
} now;

std::vector<std::unique_ptr<Fiber>> fibers;  // all there ever were
std::vector<Fiber*> idle;
Fiber* current = nullptr;

uint64_t launches = 0;
Grid last_grid;
std::string last_failure;
std::mutex one_launch;

std::string text_of(Site site) {
  const std::string path = site.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(site.line());
}

bool same(Site a, Site b) {
  return a.line() == b.line() && (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

// The warp that goes on: of the hastiest, and often the same again.
Warp* drawn_warp() {
  for (size_t haste = 0; haste < kHastes; ++haste) {
    const Warp* last = now.warp;
    if (last != nullptr && last->haste == haste && last->ready != 0 && now.random.below(16) > 0) return now.warp;
    std::vector<Warp*>& ready = now.ready[haste];
    while (!ready.empty()) {
      std::swap(ready[now.random.below(ready.size())], ready.back());
      if (ready.back()->ready != 0) return ready.back();
      ready.back()->listed = false;
      ready.pop_back();
    }
  }
  return nullptr;
}

Fiber* drawn() {
  Warp* const warp = now.warp = drawn_warp();
  if (warp == nullptr) return nullptr;
  const uint32_t lanes = (warp->ready & warp->hasty) != 0 ? warp->ready & warp->hasty : warp->ready;
  const int from = static_cast<int>(now.random.below(kWarp));
  const int lane = (from + std::countr_zero(std::rotr(lanes, from))) % kWarp;
  warp->ready &= ~(1u << lane);
  return warp->fibers[lane];
}

void make_ready(Warp& warp, uint32_t lanes) {
  warp.ready |= lanes;
  if (warp.listed) return;
  warp.listed = true;
  now.ready[warp.haste].push_back(&warp);
}

Warp& warp_of(const Fiber& fiber) {
  return fiber.block->warps[static_cast<size_t>(fiber.place.thread / kWarp)];
}
uint32_t lane_bit(const Fiber& fiber) {
  return 1u << fiber.place.thread % kWarp;
}

// On with whoever is drawn; the host where nobody can, or where it has something to do.
void go_on(Stack& from) {
  Fiber* to = now.to_host ? nullptr : drawn();
  if (to == nullptr) return switch_stacks(from, host);
  current = to;
  here = &to->place;
  if (&to->stack != &from) switch_stacks(from, to->stack);
}

void wait_at(const char* what, Site site) {
  Fiber& fiber = *current;
  fiber.waits_at = what;
  fiber.site = site;
  go_on(fiber.stack);
  fiber.waits_at = nullptr;
}

// Whether this thread is the last of `count` to come.
bool last_at(Barrier& barrier, int count, const char* what, Site site) {
  if (barrier.arrived == 0) barrier.site = site;
  if (!same(barrier.site, site))
    fail(std::string("threads meet at different calls of ") + what + ", another at " + text_of(barrier.site), site);
  if (++barrier.arrived < count) return false;
  barrier.arrived = 0;
  return true;
}

// ---- blocks begin and end -------------------------------------------------------------------------------------------

constexpr size_t kFence = 1024;
constexpr char kFencePost = 0x55;

void end_block(Block& block) {
  const size_t bytes = static_cast<size_t>(now.grid.shared_bytes);
  char *fence = block.memory.get(), *shared = fence + kFence;
  allow(fence, bytes + 2 * kFence);
  for (size_t i = 0; i < kFence; ++i)
    if (fence[i] != kFencePost || shared[bytes + i] != kFencePost) fail("a store outside of shared memory", {});
  std::memset(shared, 0x7F, bytes);  // no other block of the cluster may read it from now on
  forbid(fence, bytes + 2 * kFence);
}

void end_thread() {
  Fiber& fiber = *current;
  if (!fiber.copies.empty()) fail("a thread ended before its asynchronous copies arrived", {});
  fiber.ended = true;
  if (--fiber.block->live == 0) end_block(*fiber.block);
  if (--fiber.block->cluster->live == 0) now.to_host = true;
}

void fiber_main() {
  arrived_on(current->stack);
  for (;;) {
    (*now.thread)();
    end_thread();
    go_on(current->stack);
  }
}

Fiber& idle_fiber() {
  if (idle.empty()) {
    fibers.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *fibers.back();
    void* memory =
        mmap(nullptr, kPage + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kPage, PROT_NONE);  // where a stack that grows too large ends
    fiber.stack.bottom = static_cast<char*>(memory) + kPage;
    fiber.stack.bytes = kStack;
    prepare(fiber.stack, &fiber_main, fibers.size());
    idle.push_back(&fiber);
  }
  Fiber& fiber = *idle.back();
  idle.pop_back();
  return fiber;
}

void start_block(Block& block, int64_t index, int rank) {
  const Grid& grid = now.grid;
  const size_t bytes = static_cast<size_t>(grid.shared_bytes), all = bytes + 2 * kFence;
  block.memory.reset(static_cast<char*>(std::aligned_alloc(128, (all + 127) / 128 * 128)));
  char *fence = block.memory.get(), *shared = fence + kFence;
  std::memset(fence, kFencePost, all);
  std::memset(shared, now.random.below(2) == 0 ? 0xFF : 0x7F, bytes);  // NaN, which a maximum overlooks, or huge
  forbid(fence, kFence);
  forbid(shared + bytes, kFence);
  block.live = grid.threads;
  block.warps.resize(static_cast<size_t>(grid.threads / kWarp));
  for (int i = 0; i < grid.threads; ++i) {
    Fiber& fiber = idle_fiber();
    fiber.place = {i, grid.threads, static_cast<int>(index), static_cast<int>(grid.blocks), rank, grid.cluster, shared};
    fiber.block = &block;
    fiber.ended = fiber.arrived = false;
    fiber.groups = 0;
    block.fibers.push_back(&fiber);
  }
  const size_t haste = now.random.below(kHastes);
  for (size_t i = 0; i < block.warps.size(); ++i) {
    Warp& warp = block.warps[i];
    warp.fibers = &block.fibers[i * kWarp];
    if (now.haste == Haste::kOfBlocks) warp.haste = haste;
    if (now.haste == Haste::kOfWarps) warp.haste = now.random.below(kHastes);
    if (now.haste == Haste::kOfThreads) warp.hasty = static_cast<uint32_t>(now.random.bits());
    make_ready(warp, ~0u);
  }
}

void start_cluster(int64_t first_block) {
  now.clusters.push_back(std::make_unique<Cluster>());
  Cluster& cluster = *now.clusters.back();
  cluster.blocks.resize(static_cast<size_t>(now.grid.cluster));
  cluster.live = now.grid.cluster * now.grid.threads;
  for (int rank = 0; rank < now.grid.cluster; ++rank) {
    Block& block = cluster.blocks[static_cast<size_t>(rank)];
    block.cluster = &cluster;
    start_block(block, first_block + rank, rank);
  }
}

void retire_ended_clusters() {
  now.warp = nullptr;
  for (auto& ready : now.ready) std::erase_if(ready, [](Warp* warp) { return !(warp->listed = warp->ready != 0); });
  for (auto& cluster : now.clusters) {
    if (cluster->live > 0) continue;
    for (Block& block : cluster->blocks) {
      idle.insert(idle.end(), block.fibers.begin(), block.fibers.end());
      allow(block.memory.get(), static_cast<size_t>(now.grid.shared_bytes) + 2 * kFence);
    }
    cluster.reset();
  }
  std::erase(now.clusters, nullptr);
}

// Nobody can go on: what the threads of the first block that has not ended are doing.
std::string standstill() {
  for (const auto& cluster : now.clusters) {
    for (const Block& block : cluster->blocks) {
      if (block.live == 0) continue;
      std::map<std::string, int> threads;
      for (const Fiber* fiber : block.fibers)
        ++threads[fiber->ended ? "ended"
                               : std::string("wait at ") + fiber->waits_at + " (" + text_of(fiber->site) + ")"];
      std::string text = "block " + std::to_string(block.fibers[0]->place.block) + " stands still:";
      for (const auto& [doing, count] : threads) text += " " + std::to_string(count) + " threads " + doing + ",";
      text.pop_back();
      return text;
    }
  }
  return "no thread is left";
}

std::string name_of(const void* kernel) {
  Dl_info info;
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr) return "a kernel";
  const std::unique_ptr<char, Free> name(abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr));
  return name ? name.get() : info.dli_sname;
}

}  // namespace

// ---- what kernels ask for -------------------------------------------------------------------------------------------

const Place* here = nullptr;

void fail(const std::string& why, Site site) {
  now.failure = "block " + std::to_string(here->block) + ", thread " + std::to_string(here->thread) + ": " + why;
  if (site.line() != 0) now.failure += " (" + text_of(site) + ")";
  switch_stacks(current->stack, host);
  std::abort();  // nobody comes back here
}

void block_sync(Site site) {
  Block& block = *current->block;
  if (!last_at(block.barrier, here->threads, "block_sync", site)) return wait_at("block_sync", site);
  for (Warp& warp : block.warps) make_ready(warp, ~0u);
  warp_of(*current).ready &= ~lane_bit(*current);  // this one runs
}

void exchange(void* value, size_t size, int from_lane, Site site) {
  const int lane = here->thread % kWarp;
  Warp& warp = warp_of(*current);
  auto& values = warp.values[warp.parity];
  std::memcpy(values[lane], value, size);
  if (last_at(warp.barrier, kWarp, "a shuffle", site)) {
    warp.parity ^= 1;
    make_ready(warp, ~lane_bit(*current));
  } else {
    wait_at("a shuffle", site);
  }
  std::memcpy(value, values[from_lane], size);
}

void cluster_arrive(Site site) {
  Fiber& fiber = *current;
  Cluster& cluster = *fiber.block->cluster;
  if (fiber.arrived) fail("cluster_arrive twice without cluster_wait", site);
  fiber.arrived = true;
  fiber.phase = cluster.phase;
  if (++cluster.arrived < here->threads * here->cluster) return;
  cluster.arrived = 0;
  ++cluster.phase;
  for (Block& block : cluster.blocks)
    for (Fiber* other : block.fibers)
      if (other->waits_at == kClusterWait) make_ready(warp_of(*other), lane_bit(*other));
}

void cluster_wait(Site site) {
  Fiber& fiber = *current;
  if (!fiber.arrived) fail("cluster_wait without cluster_arrive", site);
  if (fiber.phase == fiber.block->cluster->phase) wait_at(kClusterWait, site);
  fiber.arrived = false;
}

const char* in_block(const char* shared, int rank, Site site) {
  const int64_t offset = shared - here->shared;
  if (offset < 0 || offset >= now.grid.shared_bytes) fail("in_block of what is not in shared memory", site);
  if (rank < 0 || rank >= here->cluster)
    fail("in_block of rank " + std::to_string(rank) + " of " + std::to_string(here->cluster), site);
  const Block& block = current->block->cluster->blocks[static_cast<size_t>(rank)];
  if (block.live == 0) fail("in_block of rank " + std::to_string(rank) + ", which has ended", site);
  return block.memory.get() + kFence + offset;
}

void copy_async(void* shared, const void* global, Site site) {
  check_aligned(shared, "an asynchronous copy to", site);
  check_aligned(global, "an asynchronous copy from", site);
  const int64_t offset = static_cast<char*>(shared) - here->shared;
  if (offset < 0 || offset + 16 > now.grid.shared_bytes) fail("an asynchronous copy outside of shared memory", site);
  Copy copy{shared, {}, current->groups};
  std::memcpy(&copy.words, global, 16);
  std::memset(shared, 0xFF, 16);  // neither what was there nor what is to come
  current->copies.push_back(copy);
}

void close_copies() {
  ++current->groups;
}

void copies_arrived(int later) {
  const int64_t end = current->groups - later;
  std::erase_if(current->copies, [&](const Copy& copy) {
    if (copy.group < end) std::memcpy(copy.to, &copy.words, 16);
    return copy.group < end;
  });
}

void yield() {
  now.warp = nullptr;  // others, if there are any
  make_ready(warp_of(*current), lane_bit(*current));
  wait_at("a ticket", {});
}

// ---- launches -------------------------------------------------------------------------------------------------------

Limits limits() {
  return settings.device;
}

int run(const Grid& grid, const void* kernel, const std::function<void()>& thread) {
  const Limits device = limits();
  const bool fits = 0 < grid.blocks && grid.blocks < INT32_MAX && 0 < grid.threads && grid.threads <= 1024 &&
                    grid.threads % kWarp == 0 && 0 <= grid.shared_bytes &&
                    grid.shared_bytes <= device.shared_of_block && 1 <= grid.cluster &&
                    grid.cluster <= (device.clusters ? 8 : 1) && grid.blocks % grid.cluster == 0;
  if (!fits) return kBadGrid;

  const std::lock_guard<std::mutex> lock(one_launch);
  host = {};
  last_grid = grid;
  now.grid = grid;
  now.thread = &thread;
  now.random.state = settings.seed + (++launches << 32);
  now.failure.clear();
  now.haste = static_cast<Haste>(now.random.below(4));
  std::vector<int64_t> order;
  for (int64_t first = 0; first < grid.blocks; first += grid.cluster) order.push_back(first);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[now.random.below(i)]);
  const int64_t room = std::clamp<int64_t>(kMostThreads / (grid.threads * grid.cluster), 1, 3);
  const size_t at_once = 1 + now.random.below(static_cast<size_t>(room));
  size_t started = 0;
  do {
    now.to_host = false;
    while (now.clusters.size() < at_once && started < order.size()) start_cluster(order[started++]);
    if (drawn_warp() == nullptr) {
      now.failure = standstill();
    } else {
      go_on(host);
    }
    retire_ended_clusters();
  } while (now.failure.empty() && (started < order.size() || !now.clusters.empty()));
  here = nullptr;
  if (now.failure.empty()) return 0;

  last_failure = name_of(kernel) + ": " + now.failure;
  now.clusters.clear();
  for (auto& ready : now.ready) ready.clear();
  idle.clear();
  for (const auto& fiber : fibers) {  // wherever they are, they begin anew
    fiber->copies.clear();
    fiber->waits_at = nullptr;
    prepare(fiber->stack, &fiber_main, fibers.size());
    idle.push_back(fiber.get());
  }
  return kFailed;
}

const char* error_text(int status) {
  if (status == kFailed) return last_failure.c_str();
  return status == kBadGrid ? "invalid configuration of a launch" : "no error";
}

}  // namespace objkern::cuda::emulation

// ---- for the tests, which find these by name ------------------------------------------------------------------------

#define OBJKERN_DOOR extern "C" __attribute__((visibility("default")))

namespace emulation = objkern::cuda::emulation;

OBJKERN_DOOR void objkern_emulation_seed(uint64_t seed) {
  emulation::settings.seed = seed;
  emulation::launches = 0;
}

OBJKERN_DOOR void objkern_emulation_device(int multiprocessors, int64_t shared, int clusters) {
  emulation::settings.device = {multiprocessors, shared, shared - 1024, clusters != 0};
}

// Launches since the seed was set, and how the last was made.
OBJKERN_DOOR uint64_t objkern_emulation_launches() {
  return emulation::launches;
}
OBJKERN_DOOR void objkern_emulation_last_grid(int64_t* blocks_threads_cluster_shared) {
  const objkern::cuda::Grid& grid = emulation::last_grid;
  const int64_t numbers[] = {grid.blocks, grid.threads, grid.cluster, grid.shared_bytes};
  std::copy(numbers, numbers + 4, blocks_threads_cluster_shared);
}

OBJKERN_DOOR void objkern_emulation_force_plan(int cluster, int resident, int lanes) {
  const objkern::cuda::Plan plan{cluster, resident != 0, lanes};
  objkern::cuda::force_plan(cluster == 0 ? nullptr : &plan);
}
