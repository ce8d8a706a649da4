// In the place of ATen's header: the same division of work, by threads that ThreadSanitizer knows. libgomp is not
// compiled for it, so that every parallel region of OpenMP's would look like a race.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace at {

inline std::atomic<int> number_of_threads{1};

inline int get_num_threads() {
  return number_of_threads;
}

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  thread_local bool inside = false;
  const int64_t size = end - begin;
  if (size <= 0) return;
  const int64_t tasks = inside ? 1 : std::min<int64_t>(get_num_threads(), (size + grain - 1) / grain);
  if (tasks == 1) return f(begin, end);
  const int64_t chunk = (size + tasks - 1) / tasks;
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += chunk) {
    threads.emplace_back([&f, first, last = std::min(first + chunk, end)] {
      inside = true;
      f(first, last);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace at
