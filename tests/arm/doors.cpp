// The doors of csrc/cpu/kernels.h across a pipe, so that the library of this machine runs the kernels of another.
//
// Compiled twice. For this machine it is the table of kernels of a library, each of which sends its arguments to a
// child process and waits for the results. For aarch64 it is that child: it runs the real kernels, under qemu-user, on
// what it reads. Structs go as they are, for both machines lay them out alike, and after them what their pointers point
// to.
//
//   g++ -shared ... doors.cpp            the client, beside the objects of csrc/bindings*.cpp
//   aarch64-linux-gnu-g++ doors.cpp ...  the child, beside those of csrc/cpu
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "objective.h"
#ifdef __aarch64__
#include <ATen/Parallel.h>
#include <omp.h>

#include <utility>
#endif

namespace objkern::cpu {
namespace {

static_assert(sizeof(void*) == 8 && sizeof(Rows) == 176 && sizeof(Elements) == 96, "laid out alike on both machines");

enum class Call : int64_t { kScan, kStatistics, kObjective, kFused, kChain, kGradient, kElementwise, kElementGradient };

int64_t size_of(DType type) {
  return type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : 2;
}

int64_t wide(DType type) {  // of the accumulation type
  return type == DType::kFloat64 ? 8 : 4;
}

int64_t matrix(const Rows& in, int64_t stride, DType type) {
  return in.rows == 0 ? 0 : ((in.rows - 1) * stride + in.classes) * size_of(type);
}

int64_t gradient_bytes(const Rows& in) {
  return in.rows * in.classes * size_of(in.dtype);
}

int64_t row_gradient_bytes(const Rows& in) {
  return row_gradient_fields(in.reads, in.class_weight != nullptr, in.dense_target != nullptr) * in.rows *
         wide(in.dtype);
}

int64_t value_bytes(const Rows& in, const Program& program) {
  return (program.size + kFreeStatistics) * (program.per_row ? in.rows : 1) * 8;
}

int64_t upstream_bytes(int64_t rows, int64_t stride, DType type) {
  return rows == 0 ? 0 : ((rows - 1) * stride + 1) * wide(type);
}

struct Pipe {
  int in = 0, out = 1;

  void write(const void* from, int64_t bytes) const {
    for (auto p = static_cast<const char*>(from); bytes > 0;) {
      const ssize_t done = ::write(out, p, bytes);
      if (done <= 0) throw std::runtime_error("the process that runs the kernels of the other machine is gone");
      p += done, bytes -= done;
    }
  }
  bool read(void* to, int64_t bytes) const {
    for (auto p = static_cast<char*>(to); bytes > 0;) {
      const ssize_t done = ::read(in, p, bytes);
      if (done <= 0) return false;
      p += done, bytes -= done;
    }
    return true;
  }
  void must_read(void* to, int64_t bytes) const {
    if (!read(to, bytes)) throw std::runtime_error("the process that runs the kernels of the other machine is gone");
  }
  template <class T>
  void put(const T& value) const {
    write(&value, sizeof(T));
  }
  template <class T>
  T get() const {
    T value;
    must_read(&value, sizeof(T));
    return value;
  }
};

}  // namespace

#ifndef __aarch64__
// ---- the client -------------------------------------------------------------------------------------------------

namespace {

struct Child : Pipe {
  std::mutex one_at_a_time;  // kernels are called from several threads

  Child() {
    const char* const command = std::getenv("OBJKERN_ARM_KERNELS");
    int to[2], from[2];
    if (command == nullptr || pipe(to) != 0 || pipe(from) != 0)
      throw std::runtime_error("OBJKERN_ARM_KERNELS: expected the command that runs the kernels");
    if (fork() == 0) {
      dup2(to[0], 0), dup2(from[1], 1);
      for (const int end : {to[0], to[1], from[0], from[1]}) close(end);
      execl("/bin/sh", "sh", "-c", command, nullptr);
      _exit(127);
    }
    close(to[0]), close(from[1]);
    in = from[0], out = to[1];
  }

  void send(const void* from, int64_t bytes) const {
    const bool there = from != nullptr;
    put(there);
    if (!there) return;
    put(bytes);
    put(static_cast<int64_t>(reinterpret_cast<uintptr_t>(from) % 64));  // kernels look at alignment
    write(from, bytes);
  }
  void send(const Rows& in) const {
    put(in);
    send(in.logits, matrix(in, in.row_stride, in.dtype));
    send(in.target, in.rows * 8);
    send(in.dense_target, matrix(in, in.dense_stride, in.dense_dtype));
    send(in.class_weight, in.classes * wide(in.dtype));
    send(in.reference, matrix(in, in.reference_stride, in.reference_dtype));
  }
  void send(const Elements& in) const {
    put(in);
    send(in.input, in.count * size_of(in.dtype));
    send(in.target, in.count * size_of(in.target_dtype));
    send(in.weight, in.weight_period * wide(in.dtype));
    send(in.pos_weight, in.pos_weight_period * wide(in.dtype));
  }
  void send(const Program& program) const {
    put(program);
    send(program.terms, program.size * static_cast<int64_t>(sizeof(Term)));
  }
};

Child& child() {
  static Child* const started = new Child;  // ends with its standard input
  return *started;
}

// One call: `ask` sends its arguments, and what comes back goes to the places that are there.
struct Place {
  void* to;
  int64_t bytes;
};
template <class F>
void call(Call which, const F& ask, std::initializer_list<Place> results) {
  Child& c = child();
  const std::lock_guard<std::mutex> lock(c.one_at_a_time);
  c.put(which);
  ask(c);
  for (const Place& place : results) {
    c.put(place.to != nullptr);
    if (place.to == nullptr) continue;
    c.put(place.bytes);
    c.put(static_cast<int64_t>(reinterpret_cast<uintptr_t>(place.to) % 64));
  }
  for (const Place& place : results)
    if (place.to != nullptr) c.must_read(place.to, place.bytes);
}

void scan(const Rows& in, int64_t begin, int64_t end, int64_t& counted, bool& bad) {
  Rows labels = in;
  labels.logits = labels.dense_target = labels.class_weight = labels.reference = nullptr;
  call(Call::kScan,
       [&](const Child& c) {
         c.send(labels), c.put(begin), c.put(end);
         c.send(&counted, 8), c.send(&bad, 1);
       },
       {{&counted, 8}, {&bad, 1}});
}

void statistics(const Rows& in, double* centred, double* found) {
  call(Call::kStatistics, [&](const Child& c) { c.send(in); },
       {{centred, kCentred * in.rows * 8}, {found, kStatistics * in.rows * 8}});
}

void objective(const Rows& in, const Program& program, double* values, void* row_gradient) {
  call(Call::kObjective, [&](const Child& c) { c.send(in), c.send(program); },
       {{values, value_bytes(in, program)}, {row_gradient, row_gradient_bytes(in)}});
}

void fused(const Rows& in, const Program& program, double* values, void* row_gradient, void* gradient) {
  call(Call::kFused, [&](const Child& c) { c.send(in), c.send(program); },
       {{values, value_bytes(in, program)}, {row_gradient, row_gradient_bytes(in)}, {gradient, gradient_bytes(in)}});
}

void chain(const Rows& in, const double* centred, const double* partials, void* row_gradient) {
  call(Call::kChain,
       [&](const Child& c) {
         c.send(in), c.send(centred, kCentred * in.rows * 8), c.send(partials, kStatistics * in.rows * 8);
       },
       {{row_gradient, kRowGradient * in.rows * wide(in.dtype)}});
}

void gradient(const Rows& in, const void* row_gradient, const void* upstream, int64_t stride, void* found) {
  call(Call::kGradient,
       [&](const Child& c) {
         c.send(in), c.send(row_gradient, row_gradient_bytes(in));
         c.send(upstream, upstream_bytes(in.rows, stride, in.dtype)), c.put(stride);
       },
       {{found, gradient_bytes(in)}});
}

void elementwise(const Elements& in, const Program& program, double* sums, const Unreduced& unreduced, void* gradient) {
  call(Call::kElementwise, [&](const Child& c) { c.send(in), c.send(program); },
       {{sums, program.size * 8},
        {unreduced.loss, in.count * wide(in.dtype)},
        {unreduced.parts, program.size * in.count * wide(in.dtype)},
        {gradient, in.count * size_of(in.dtype)}});
}

void elementwise_gradient(const Elements& in, const Program& program, const void* upstream, int64_t stride,
                          void* gradient) {
  call(Call::kElementGradient,
       [&](const Child& c) {
         c.send(in), c.send(program);
         c.send(upstream, upstream_bytes(in.count, stride, in.dtype)), c.put(stride);
       },
       {{gradient, in.count * size_of(in.dtype)}});
}

}  // namespace

inline namespace baseline {
extern const Doors table;
const Doors table{"aarch64, emulated", &scan,        &statistics,          &objective, &fused, &chain,
                  &gradient,           &elementwise, &elementwise_gradient};
}  // namespace baseline

#else
// ---- the child --------------------------------------------------------------------------------------------------

namespace {

// Memory at the same place of a cache line as on the other side; null where there is none there.
class Buffer {
 public:
  int64_t bytes = 0;

  char* reserve(const Pipe& pipe) {
    if (!pipe.get<bool>()) return nullptr;
    bytes = pipe.get<int64_t>();
    const auto place = static_cast<uintptr_t>(pipe.get<int64_t>());
    memory_.resize(bytes + 128);
    const auto first = reinterpret_cast<uintptr_t>(memory_.data());
    start_ = memory_.data() + (64 - first % 64) + place;
    return start_;
  }
  char* receive(const Pipe& pipe) {
    if (reserve(pipe) != nullptr) pipe.must_read(start_, bytes);
    return start_;
  }
  void reply(const Pipe& pipe) const {
    if (start_ != nullptr) pipe.write(start_, bytes);
  }

 private:
  std::vector<char> memory_;
  char* start_ = nullptr;
};

struct RowsCall {
  Rows rows;
  Buffer logits, target, dense, weight, reference;

  explicit RowsCall(const Pipe& pipe) : rows(pipe.get<Rows>()) {
    rows.logits = logits.receive(pipe);
    rows.target = reinterpret_cast<const int64_t*>(target.receive(pipe));
    rows.dense_target = dense.receive(pipe);
    rows.class_weight = weight.receive(pipe);
    rows.reference = reference.receive(pipe);
  }
};

struct ElementsCall {
  Elements elements;
  Buffer input, target, weight, pos_weight;

  explicit ElementsCall(const Pipe& pipe) : elements(pipe.get<Elements>()) {
    elements.input = input.receive(pipe);
    elements.target = target.receive(pipe);
    elements.weight = weight.receive(pipe);
    elements.pos_weight = pos_weight.receive(pipe);
  }
};

struct ProgramCall {
  Program program;
  Buffer terms;

  explicit ProgramCall(const Pipe& pipe) : program(pipe.get<Program>()) {
    program.terms = reinterpret_cast<const Term*>(terms.receive(pipe));
  }
};

double* doubles(char* p) {
  return reinterpret_cast<double*>(p);
}

void serve(const Pipe& pipe, Call which) {
  const Doors& kernels = *doors();
  Buffer a, b, c, d;  // results, in order
  switch (which) {
    case Call::kScan: {
      const RowsCall in(pipe);
      const auto begin = pipe.get<int64_t>(), end = pipe.get<int64_t>();
      Buffer count_before, bad_before;
      auto counted = *reinterpret_cast<int64_t*>(count_before.receive(pipe));
      auto bad = *reinterpret_cast<bool*>(bad_before.receive(pipe));
      char *const to_count = a.reserve(pipe), *const to_bad = b.reserve(pipe);
      kernels.scan(in.rows, begin, end, counted, bad);
      std::memcpy(to_count, &counted, sizeof(counted));
      std::memcpy(to_bad, &bad, sizeof(bad));
      break;
    }
    case Call::kStatistics: {
      const RowsCall in(pipe);
      double *const centred = doubles(a.reserve(pipe)), *const found = doubles(b.reserve(pipe));
      kernels.statistics(in.rows, centred, found);
      break;
    }
    case Call::kObjective: {
      const RowsCall in(pipe);
      const ProgramCall by(pipe);
      double* const values = doubles(a.reserve(pipe));
      kernels.objective(in.rows, by.program, values, b.reserve(pipe));
      break;
    }
    case Call::kFused: {
      const RowsCall in(pipe);
      const ProgramCall by(pipe);
      double* const values = doubles(a.reserve(pipe));
      char *const row_gradient = b.reserve(pipe), *const gradient = c.reserve(pipe);
      kernels.fused(in.rows, by.program, values, row_gradient, gradient);
      break;
    }
    case Call::kChain: {
      const RowsCall in(pipe);
      Buffer centred, partials;
      const double *const of_centred = doubles(centred.receive(pipe)), *const f = doubles(partials.receive(pipe));
      kernels.chain(in.rows, of_centred, f, a.reserve(pipe));
      break;
    }
    case Call::kGradient: {
      const RowsCall in(pipe);
      Buffer row_gradient, upstream;
      const char *const kept = row_gradient.receive(pipe), *const u = upstream.receive(pipe);
      const auto stride = pipe.get<int64_t>();
      kernels.gradient(in.rows, kept, u, stride, a.reserve(pipe));
      break;
    }
    case Call::kElementwise: {
      const ElementsCall in(pipe);
      const ProgramCall by(pipe);
      double* const sums = doubles(a.reserve(pipe));
      char *const loss = b.reserve(pipe), *const parts = c.reserve(pipe), *const gradient = d.reserve(pipe);
      kernels.elementwise(in.elements, by.program, sums, {loss, parts}, gradient);
      break;
    }
    case Call::kElementGradient: {
      const ElementsCall in(pipe);
      const ProgramCall by(pipe);
      Buffer upstream;
      const char* const u = upstream.receive(pipe);
      const auto stride = pipe.get<int64_t>();
      kernels.elementwise_gradient(in.elements, by.program, u, stride, a.reserve(pipe));
      break;
    }
  }
  for (const Buffer* const result : {&a, &b, &c, &d}) result->reply(pipe);
}

}  // namespace
#endif

}  // namespace objkern::cpu

#ifdef __aarch64__

// What at::parallel_for asks of torch's library, on OpenMP, as ATen/ParallelOpenMP.cpp has it.
namespace {
thread_local int thread_number = 0;
thread_local bool parallel_region = false;
}  // namespace

namespace at {
void init_num_threads() {}
int get_num_threads() {
  return omp_get_max_threads();
}
int get_thread_num() {
  return thread_number;
}
bool in_parallel_region() {
  return parallel_region || omp_in_parallel() != 0;
}
namespace internal {
void set_thread_num(int number) {
  thread_number = number;
}
}  // namespace internal
}  // namespace at

namespace c10 {
ParallelGuard::ParallelGuard(bool state) : previous_state_(std::exchange(parallel_region, state)) {}
ParallelGuard::~ParallelGuard() {
  parallel_region = previous_state_;
}
}  // namespace c10

int main() {
  const objkern::cpu::Pipe pipe;
  objkern::cpu::Call which;
  while (pipe.read(&which, sizeof(which))) objkern::cpu::serve(pipe, which);
  return 0;
}

#endif
