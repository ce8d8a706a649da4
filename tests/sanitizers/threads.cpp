// The CPU kernels' doors, called from several threads at once on the same logits, each call itself divided among
// threads. What each call finds is what one thread finds, bit for bit; that nothing else is shared, ThreadSanitizer
// tells. test_sanitizers.py compiles it.
#include <ATen/Parallel.h>

#include <cstdio>
#include <cstring>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/buffers.h"
#include "cpu/kernels.h"
#include "elementwise.h"
#include "objective.h"

using namespace objkern;

namespace {

constexpr int kCallers = 3, kThreads = 3;
using Bytes = std::vector<unsigned char>;

struct Shape {
  int64_t rows, classes;
  const char* why;
};
// One for each way that rows are handed out, with enough work for several tasks each.
constexpr Shape kShapes[] = {
    {9000, 9, "narrow rows, one per lane"},
    {700, 130, "rows by tiles"},
    {3, 70000, "few long rows, each in segments"},
};

int failures = 0;
std::mutex reporting;

void expect(bool right, const std::string& what) {
  if (right) return;
  const std::lock_guard<std::mutex> lock(reporting);
  ++failures;
  std::printf("not what one thread finds: %s\n", what.c_str());
}

template <class T>
Bytes bytes_of(const std::vector<T>& numbers) {
  Bytes bytes(numbers.size() * sizeof(T));
  std::memcpy(bytes.data(), numbers.data(), bytes.size());
  return bytes;
}

// Rows of float32 or float64 logits with labels, some of them ignored, class weights and a reference.
template <class A>
struct Batch {
  std::vector<A> logits, reference, class_weight, upstream;
  std::vector<int64_t> target;
  Rows rows;

  Batch(const Shape& shape, bool with_reference) {
    std::mt19937_64 random(7);
    std::normal_distribution<double> normal(0.0, 3.0);
    const auto draw = [&](int64_t count) {
      std::vector<A> numbers(count);
      for (A& number : numbers) number = static_cast<A>(normal(random));
      return numbers;
    };
    logits = draw(shape.rows * shape.classes);
    if (with_reference) reference = draw(shape.rows * shape.classes);
    upstream = draw(shape.rows);
    class_weight.assign(shape.classes, A(0.5));
    for (int64_t row = 0; row < shape.rows; ++row)
      target.push_back(row % 5 == 4 ? -100 : static_cast<int64_t>(random() % shape.classes));
    rows.dtype = rows.dense_dtype = rows.reference_dtype = rows.gradient_dtype =
        sizeof(A) == 8 ? DType::kFloat64 : DType::kFloat32;
    rows.logits = logits.data();
    rows.rows = shape.rows;
    rows.classes = rows.row_stride = rows.reference_stride = shape.classes;
    rows.target = target.data();
    rows.class_weight = class_weight.data();
    rows.reference = with_reference ? reference.data() : nullptr;
  }
};

// Everything that the doors give for a batch.
template <class A>
std::vector<Bytes> through_all_doors(const Batch<A>& batch) {
  const cpu::Doors& doors = *cpu::doors();
  const Rows& in = batch.rows;
  const bool compares = in.reference != nullptr;
  const std::vector<Term> terms = [&] {
    std::vector<Term> some{{static_cast<int64_t>(TermKind::kCrossEntropy), 0.1, 1.0},
                           {static_cast<int64_t>(TermKind::kEntropy), 0.0, -0.1},
                           {static_cast<int64_t>(TermKind::kLogitL2), 0.0, 0.01}};
    if (compares) some.push_back({static_cast<int64_t>(TermKind::kForwardKl), 1.0, 0.5});
    return some;
  }();
  std::vector<Bytes> found;

  const cpu::TargetSummary summary = cpu::summarize_targets(in);
  found.push_back(bytes_of(std::vector<double>{static_cast<double>(summary.counted), summary.weight_sum}));

  for (const bool per_row : {false, true}) {
    Rows some = in;
    some.reads = 0;
    for (const Term& term : terms) some.reads |= reads_of(static_cast<TermKind>(term.kind), term.parameter);
    const cpu::Program program{terms.data(), static_cast<int64_t>(terms.size()), per_row};
    std::vector<double> values((program.size + kFreeStatistics) * (per_row ? in.rows : 1));
    std::vector<A> row_gradient(kRowGradient * in.rows), gradient(in.rows * in.classes);
    doors.objective(some, program, values.data(), row_gradient.data());
    doors.gradient(some, row_gradient.data(), batch.upstream.data(), 1, gradient.data());
    found.insert(found.end(), {bytes_of(values), bytes_of(gradient)});
    doors.fused(some, program, values.data(), row_gradient.data(), gradient.data());
    found.insert(found.end(), {bytes_of(values), bytes_of(gradient)});
  }

  Rows all = in;
  all.reads = compares ? kEverything : kEverything & ~kDivergences;
  std::vector<double> centred(kCentred * in.rows), statistics(kStatistics * in.rows),
      partials(kStatistics * in.rows, 0.3);
  std::vector<A> row_gradient(kRowGradient * in.rows), gradient(in.rows * in.classes);
  doors.statistics(all, centred.data(), statistics.data());
  doors.chain(all, centred.data(), partials.data(), row_gradient.data());
  const A one(1);
  doors.gradient(all, row_gradient.data(), &one, 0, gradient.data());
  found.insert(found.end(), {bytes_of(statistics), bytes_of(gradient)});

  Elements elements;
  elements.input = in.logits;
  elements.target = compares ? in.reference : in.logits;
  elements.dtype = elements.target_dtype = in.dtype;
  elements.count = in.rows * in.classes;
  elements.weight = batch.class_weight.data();
  elements.weight_period = in.classes;
  const Term of_elements[] = {{static_cast<int64_t>(ElementKind::kBernoulliEntropy), 0.0, 1.0},
                              {static_cast<int64_t>(ElementKind::kHuber), 0.5, 1.0}};
  std::vector<double> sums(2);
  doors.elementwise(elements, {of_elements, 2, false}, sums.data(), {}, gradient.data());
  found.insert(found.end(), {bytes_of(sums), bytes_of(gradient)});
  doors.elementwise_gradient(elements, {of_elements, 2, false}, &one, 0, gradient.data());
  found.push_back(bytes_of(gradient));
  return found;
}

template <class F>
void by_all_callers(const F& f) {
  std::vector<std::thread> callers;
  for (int caller = 0; caller < kCallers; ++caller) callers.emplace_back([&f, caller] { f(caller); });
  for (std::thread& caller : callers) caller.join();
}

template <class A>
void kernels(const Shape& shape, bool with_reference) {
  const Batch<A> batch(shape, with_reference);
  at::number_of_threads = 1;
  const std::vector<Bytes> alone = through_all_doors(batch);
  at::number_of_threads = kThreads;
  by_all_callers([&](int) {
    const std::vector<Bytes> found = through_all_doors(batch);
    for (size_t i = 0; i < alone.size(); ++i)
      expect(found[i] == alone[i], std::string(shape.why) + ", result " + std::to_string(i));
  });
}

// Gradients of several threads, handed over to others, and the limit changed meanwhile.
void buffers() {
  std::mutex lock;
  std::vector<std::pair<unsigned char*, unsigned char>> left;
  by_all_callers([&](int caller) {
    for (int step = 0; step < 300; ++step) {
      const int64_t bytes = cpu::kLeastReused + 4096 * ((step * 7 + caller) % 5);
      auto* const mine = static_cast<unsigned char*>(cpu::acquire_buffer(bytes));
      const auto mark = static_cast<unsigned char>(1 + caller + step % 50);
      mine[0] = mine[bytes - 1] = mark;
      std::pair<unsigned char*, unsigned char> old{nullptr, 0};
      {
        const std::lock_guard<std::mutex> guard(lock);
        left.emplace_back(mine, mark);
        if (left.size() > 4) {
          old = left.front();
          left.erase(left.begin());
        }
      }
      if (old.first != nullptr) {
        expect(old.first[0] == old.second, "a buffer");
        cpu::return_buffer(old.first);
      }
      if (step % 37 == 0) cpu::set_buffer_limit(step % 2 ? 0 : int64_t{64} << 20);
      if (step % 53 == 0) cpu::release_buffers();
      expect(cpu::kept_bytes() >= 0 && cpu::buffer_limit() >= 0, "what is kept");
    }
  });
  for (const auto& each : left) cpu::return_buffer(each.first);
  cpu::release_buffers();
}

}  // namespace

int main() {
  // The choice of kernels and the sizes of the caches are made once, by whoever comes first.
  by_all_callers([](int) { expect(cpu::doors() != nullptr && cpu::caches().last > 0, "the choice of kernels"); });
  for (const Shape& shape : kShapes) {
    kernels<float>(shape, false);
    kernels<float>(shape, true);
    kernels<double>(shape, true);
  }
  buffers();
  std::printf("%s kernels: %d results differ\n", cpu::doors()->name, failures);
  return failures == 0 ? 0 : 1;
}
