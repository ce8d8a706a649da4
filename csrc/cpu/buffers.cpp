#include "buffers.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace objkern::cpu {
namespace {

constexpr int64_t kPage = 4096;
constexpr size_t kMostKept = 2;
constexpr int64_t kMostRoom = 4;  // a buffer serves requests down to a quarter of its size

int64_t default_limit() {
  const long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGE_SIZE);
  return pages > 0 && size > 0 ? int64_t{pages} * size / 8 : int64_t{1} << 30;
}

struct Buffers {
  struct Buffer {
    void* memory;
    int64_t bytes;
  };
  std::mutex mutex;
  std::vector<Buffer> kept;                  // by size, ascending
  std::unordered_map<void*, int64_t> given;  // what callers hold
  int64_t limit = default_limit();

  int64_t bytes() const {
    int64_t total = 0;
    for (const Buffer& b : kept) total += b.bytes;
    return total;
  }

  // The smallest go first: the largest serves every later request.
  void shrink_to(int64_t most_bytes, size_t most_buffers) {
    while (!kept.empty() && (kept.size() > most_buffers || bytes() > most_bytes)) {
      drop_smallest();
    }
  }

  void drop_smallest() {
    std::free(kept.front().memory);
    kept.erase(kept.begin());
  }
};

// Never destroyed: tensors may outlive every static object.
Buffers& buffers() {
  static Buffers* const all = new Buffers;
  return *all;
}

}  // namespace

void* acquire_buffer(int64_t bytes) {
  Buffers& all = buffers();
  const std::lock_guard<std::mutex> lock(all.mutex);
  // Not one that is far too large: a small tensor that lives long would hold it.
  const auto fits = std::find_if(all.kept.begin(), all.kept.end(),
                                 [&](const auto& b) { return b.bytes >= bytes && b.bytes / kMostRoom <= bytes; });
  Buffers::Buffer buffer;
  if (fits != all.kept.end()) {
    buffer = *fits;
    all.kept.erase(fits);
  } else {
    // What is too small now would only be held beside the new one.
    while (!all.kept.empty() && all.kept.front().bytes < bytes) all.drop_smallest();
    buffer.bytes = (bytes + kPage - 1) / kPage * kPage;
    buffer.memory = std::aligned_alloc(kPage, buffer.bytes);
    if (buffer.memory == nullptr) return nullptr;
  }
  all.given.emplace(buffer.memory, buffer.bytes);
  return buffer.memory;
}

void return_buffer(void* memory) {
  if (memory == nullptr) return;
  Buffers& all = buffers();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.given.find(memory);
  const Buffers::Buffer buffer{memory, found->second};
  all.given.erase(found);
  all.kept.insert(std::upper_bound(all.kept.begin(), all.kept.end(), buffer,
                                   [](const auto& a, const auto& b) { return a.bytes < b.bytes; }),
                  buffer);
  all.shrink_to(all.limit, kMostKept);
}

void release_buffers() {
  Buffers& all = buffers();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.shrink_to(0, 0);
}

int64_t kept_bytes() {
  Buffers& all = buffers();
  const std::lock_guard<std::mutex> lock(all.mutex);
  return all.bytes();
}

int64_t buffer_limit() {
  Buffers& all = buffers();
  const std::lock_guard<std::mutex> lock(all.mutex);
  return all.limit;
}

void set_buffer_limit(int64_t bytes) {
  Buffers& all = buffers();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.limit = std::max<int64_t>(bytes, 0);
  all.shrink_to(all.limit, kMostKept);
}

}  // namespace objkern::cpu
