// The ops on CPU tensors: memory, reductions, and the way into csrc/cpu.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "batch.h"
#include "cpu/buffers.h"
#include "cpu/kernels.h"

namespace objkern {
namespace {

using torch::jit::Stack;

// Memory that is used again when the tensor dies.
struct ReusingAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = cpu::acquire_buffer(static_cast<int64_t>(bytes));
    TORCH_CHECK_WITH(OutOfMemoryError, memory != nullptr, "objkern: no memory for a gradient of ", bytes, " bytes");
    return {memory, memory, &cpu::return_buffer, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &cpu::return_buffer; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

Tensor new_gradient(const Tensor& like) {
  if (like.numel() * like.element_size() < cpu::kLeastReused) return at::empty(like.sizes(), like.options());
  static ReusingAllocator* const allocator = new ReusingAllocator;
  return at::detail::empty_generic(like.sizes(), allocator, c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   like.scalar_type(), std::nullopt);
}

// The one that was given, or a new one.
Tensor gradient_of(const RowArguments& in, const Tensor& given) {
  if (!given.defined()) return new_gradient(in.logits);
  check_gradient(in, given, false);
  return given;
}

const cpu::Doors& cpu_doors() {
  const cpu::Doors* doors = cpu::doors();
  TORCH_CHECK_VALUE(doors != nullptr, "OBJKERN_CPU_CAPABILITY: expected \"default\", or \"avx2\" or \"avx512\" where ",
                    "this build has it and this processor runs it, but got \"", std::getenv("OBJKERN_CPU_CAPABILITY"),
                    "\"");
  return *doors;
}

// On the CPU every number is at hand.
Batch batch_of(const RowArguments& in, int64_t reads = kEverything) {
  Batch batch(in, reads);
  if (in.logit_scale.has_value()) batch.rows.logit_scale = in.logit_scale->item<double>();
  return batch;
}

std::vector<Term> terms_of(const ProgramArguments& in) {
  std::vector<Term> terms = in.terms;
  if (!in.coefficient_tensor.has_value()) return terms;
  const Tensor factors = in.coefficient_tensor->to(at::kDouble).contiguous();
  for (size_t k = 0; k < terms.size(); ++k) terms[k].scale *= factors.const_data_ptr<double>()[k];
  return terms;
}

cpu::TargetSummary checked_targets(const Rows& rows) {
  const cpu::TargetSummary summary = cpu::summarize_targets(rows);
  TORCH_CHECK_INDEX(summary.bad_row < 0, "target: row ", summary.bad_row, " holds label ", rows.target[summary.bad_row],
                    ", which is neither in [0, ", rows.classes, ") nor ignore_index (", rows.ignore_index, ")");
  return summary;
}

// The denominators of a mean: cross-entropy divides by the weight of its labels, every other term by the number of
// rows that count; `normalizer` replaces both.
std::vector<double> denominators_of(const ObjectiveArguments& in, const cpu::TargetSummary& summary,
                                    bool class_labels) {
  const bool empty = summary.counted == 0 && in.empty_zero;
  std::vector<double> denominators(in.terms.size(), 1.0);
  for (size_t k = 0; k < in.terms.size(); ++k) {
    if (in.normalizer.has_value()) {
      denominators[k] = in.normalizer->item<double>();
    } else if (in.reduction == Reduction::kMean && !empty) {
      const bool weighted = static_cast<TermKind>(in.terms[k].kind) == TermKind::kCrossEntropy && class_labels;
      denominators[k] = weighted ? summary.weight_sum : static_cast<double>(summary.counted);
    }
  }
  return denominators;
}

template <class T>
Tensor filled(at::IntArrayRef sizes, c10::ScalarType type, const T& numbers) {  // at::tensor costs four times as much
  const Tensor t = at::empty(sizes, at::TensorOptions(type));
  if (type == at::kDouble) {
    std::copy(numbers.begin(), numbers.end(), t.mutable_data_ptr<double>());
  } else {
    std::copy(numbers.begin(), numbers.end(), t.mutable_data_ptr<float>());
  }
  return t;
}

// (loss, parts, row_gradient), and the gradient if it has no place yet.
void run_objective(Stack* stack, To to) {
  Tensor gradient = take_given(stack, to);
  const bool with_gradient = to != To::kNowhere;
  const ObjectiveArguments in(torch::jit::last(*stack, kObjectiveArguments));
  torch::jit::drop(*stack, kObjectiveArguments);
  TORCH_CHECK_VALUE(!with_gradient || in.reduction != Reduction::kNone,
                    "objkern: fused: the gradient of unreduced losses is only known in the backward pass");
  Batch batch = batch_of(in, in.reads());
  batch.rows.smoothed = in.smoothed();
  batch.rows.free_statistics = in.with_parts;
  const Rows& rows = batch.rows;
  const cpu::TargetSummary summary = checked_targets(rows);
  const int64_t n = rows.rows, size = static_cast<int64_t>(in.terms.size());
  const std::vector<double> denominators = denominators_of(in, summary, rows.target != nullptr);
  const std::vector<Term> weighted = terms_of(in);
  std::vector<Term> terms = weighted;
  for (int64_t k = 0; k < size; ++k) terms[k].scale /= denominators[k];
  const cpu::Program program{terms.data(), size, in.reduction == Reduction::kNone};

  const auto options = in.logits.options().dtype(accumulation_type(in.logits));
  const auto type = accumulation_type(in.logits);
  const Tensor values = at::empty({size + kFreeStatistics, program.per_row ? n : 1}, options.dtype(at::kDouble));
  const Tensor row_gradient = at::empty({in.row_gradient_fields(), n}, options);
  if (with_gradient) {
    gradient = gradient_of(in, gradient);
    cpu_doors().fused(rows, program, values.mutable_data_ptr<double>(), row_gradient.mutable_data_ptr(),
                      gradient.mutable_data_ptr());
  } else {
    cpu_doors().objective(rows, program, values.mutable_data_ptr<double>(), row_gradient.mutable_data_ptr());
  }

  const double* value = values.const_data_ptr<double>();
  Tensor loss, parts;
  if (in.reduction == Reduction::kNone) {
    loss = at::zeros({n}, options.dtype(at::kDouble));
    double* out = loss.mutable_data_ptr<double>();
    for (int64_t k = 0; k < size; ++k)
      for (int64_t i = 0; i < n; ++i) out[i] += program.terms[k].scale * value[k * n + i];
    loss = loss.to(type);
    parts = in.with_parts ? values.to(type) : at::empty({0, n}, options);
  } else {
    // Terms over their denominators, free statistics as means over the rows that count, and the number of those.
    std::vector<double> numbers;
    double total = 0;
    for (int64_t k = 0; k < size; ++k) {
      const double term = value[k] / denominators[k];
      total += weighted[k].scale * term;
      if (in.with_parts) numbers.push_back(term);
    }
    if (in.with_parts) {
      for (int64_t k = size; k < size + kFreeStatistics; ++k)
        numbers.push_back(value[k] / static_cast<double>(summary.counted));
      numbers.push_back(static_cast<double>(summary.counted));
    }
    loss = filled({}, type, std::array<double, 1>{total});
    parts = filled({static_cast<int64_t>(numbers.size())}, type, numbers);
  }
  torch::jit::push(*stack, loss, parts, row_gradient);
  if (to == To::kNew) torch::jit::push(*stack, gradient);
}

void objective(const c10::OperatorHandle&, Stack* stack) {
  run_objective(stack, To::kNowhere);
}

template <To kTo>
void fused(const c10::OperatorHandle&, Stack* stack) {
  run_objective(stack, kTo);
}

void write_gradient(const Batch& batch, const Tensor& row_gradient, const Tensor& upstream, const Tensor& out) {
  const Rows& rows = batch.rows;
  const Tensor u = allocated("upstream", upstream).to(accumulation_type(batch.logits));
  TORCH_CHECK(u.dim() == 0 || (u.dim() == 1 && u.size(0) == rows.rows), "objkern: upstream: expected () or (",
              rows.rows, ") but got ", u.sizes());
  cpu_doors().gradient(rows, row_gradient.const_data_ptr(), u.const_data_ptr(), u.dim() == 0 ? 0 : u.stride(0),
                       out.mutable_data_ptr());
}

// The arguments of `gradient` and `rescale` after the first: the batch, the kept row gradient and the upstream one.
struct GradientCall {
  ObjectiveArguments in;
  Batch batch;
  Tensor row_gradient;

  GradientCall(const Tensor& kept, c10::ArrayRef<IValue> arguments)
      : in(arguments), batch(batch_of(in, in.reads())), row_gradient(kept) {
    check_row_gradient(in, batch, row_gradient);
  }
};

template <To kTo>
void gradient(const c10::OperatorHandle&, Stack* stack) {
  const Tensor into = take_given(stack, kTo);
  const auto all = torch::jit::last(*stack, 3 + kObjectiveArguments);
  const Tensor upstream = all[0].toTensor();
  GradientCall call(all[1].toTensor(), all.slice(3));
  call.batch.rows.unscaled = all[2].toBool();
  torch::jit::drop(*stack, all.size());
  const Tensor out = gradient_of(call.in, into);
  write_gradient(call.batch, call.row_gradient, upstream, out);
  if (kTo == To::kNew) torch::jit::push(*stack, out);
}

// Where that loses no digits: half precision has been rounded already, and float16 may have underflowed; 0·∞ in an
// ignored row would be NaN.
bool scales_in_place(const Tensor& gradient, double factor) {
  const bool half = gradient.scalar_type() == at::kHalf || gradient.scalar_type() == at::kBFloat16;
  return !half && std::isfinite(factor);
}

void rescale(const c10::OperatorHandle&, Stack* stack) {
  const auto all = torch::jit::last(*stack, 3 + kObjectiveArguments);
  const Tensor gradient = all[0].toTensor(), upstream = all[1].toTensor();
  const double factor = upstream.item<double>();
  if (factor != 1.0 && scales_in_place(gradient, factor)) {
    gradient.mul_(upstream);
  } else if (factor != 1.0) {
    const GradientCall call(all[2].toTensor(), all.slice(3));
    check_gradient(call.in, gradient, false);
    write_gradient(call.batch, call.row_gradient, upstream, gradient);
  }
  torch::jit::drop(*stack, all.size());
}

void statistics(const c10::OperatorHandle&, Stack* stack) {
  const RowArguments in(torch::jit::last(*stack, kRowArguments));
  torch::jit::drop(*stack, kRowArguments);
  const Batch batch = batch_of(in);
  checked_targets(batch.rows);
  const auto options = in.logits.options().dtype(at::kDouble);
  const Tensor centred = at::empty({kCentred, batch.rows.rows}, options);
  const Tensor out = at::empty({kStatistics, batch.rows.rows}, options);
  cpu_doors().statistics(batch.rows, centred.mutable_data_ptr<double>(), out.mutable_data_ptr<double>());
  torch::jit::push(*stack, out, centred);
}

template <To kTo>
void statistics_gradient(const c10::OperatorHandle&, Stack* stack) {
  const Tensor into = take_given(stack, kTo);
  const auto all = torch::jit::last(*stack, 3 + kRowArguments);
  const Tensor partials = all[0].toTensor(), centred = all[1].toTensor();
  const bool unscaled = all[2].toBool();
  const RowArguments in(all.slice(3));
  torch::jit::drop(*stack, all.size());
  Batch batch = batch_of(in);
  batch.rows.unscaled = unscaled;
  const int64_t n = batch.rows.rows;
  check_partials(batch, partials, centred);
  const auto options = in.logits.options().dtype(accumulation_type(in.logits));
  const Tensor row_gradient = at::empty({kRowGradient, n}, options);
  const Tensor f = partials.to(at::kDouble).contiguous();
  cpu_doors().chain(batch.rows, centred.const_data_ptr<double>(), f.const_data_ptr<double>(),
                    row_gradient.mutable_data_ptr());
  const Tensor out = gradient_of(in, into);
  write_gradient(batch, row_gradient, at::ones({}, options), out);
  if (kTo == To::kNew) torch::jit::push(*stack, out);
}

// ---- elementwise objectives ---------------------------------------------------------------------------------------

// A call whose terms are weighed: coefficients over the denominator, which is the same for all of them.
struct ElementCall {
  ElementArguments in;
  ElementBatch batch;
  std::vector<Term> weighted, terms;
  double denominator = 1;

  explicit ElementCall(c10::ArrayRef<IValue> arguments)
      : in(arguments), batch(in), weighted(terms_of(in)), terms(weighted) {
    Elements& elements = batch.elements;
    if (in.logit_scale.has_value()) elements.logit_scale = in.logit_scale->item<double>();
    const bool empty = elements.count == 0 && in.empty_zero;
    if (in.normalizer.has_value()) {
      denominator = in.normalizer->item<double>();
    } else if (in.reduction == Reduction::kMean && !empty) {
      denominator = static_cast<double>(elements.count);
    }
    for (Term& term : terms) term.scale /= denominator;
  }

  cpu::Program program() const {
    return {terms.data(), static_cast<int64_t>(terms.size()), in.reduction == Reduction::kNone};
  }

  void write_gradient(const Tensor& upstream, const Tensor& out) const {
    const Tensor u = allocated("upstream", upstream).to(accumulation_type(batch.input)).contiguous();
    TORCH_CHECK(u.dim() == 0 || u.sizes() == batch.input.sizes(), "objkern: upstream: expected () or ",
                batch.input.sizes(), " but got ", u.sizes());
    const int64_t stride = upstream.dim() == 0 && in.reduction != Reduction::kNone ? 0 : 1;
    cpu_doors().elementwise_gradient(batch.elements, program(), u.const_data_ptr(), stride, out.mutable_data_ptr());
  }
};

template <bool kFused>
void elementwise(const c10::OperatorHandle&, Stack* stack) {
  const ElementCall call(torch::jit::last(*stack, kElementArguments));
  torch::jit::drop(*stack, kElementArguments);
  const cpu::Program program = call.program();
  TORCH_CHECK_VALUE(!kFused || !program.per_row,
                    "objkern: elementwise_fused: the gradient of unreduced losses is only known in the backward pass");
  const Tensor& input = call.batch.input;
  const auto type = accumulation_type(input);
  const auto options = input.options().dtype(type);
  const Tensor gradient = kFused ? new_gradient(input) : Tensor();
  Tensor loss, parts;
  if (program.per_row) {
    std::vector<int64_t> sizes = input.sizes().vec();
    loss = at::empty(sizes, options);
    sizes.insert(sizes.begin(), call.in.with_parts ? program.size : 0);
    parts = at::empty(sizes, options);
    const cpu::Unreduced unreduced{loss.mutable_data_ptr(), call.in.with_parts ? parts.mutable_data_ptr() : nullptr};
    cpu_doors().elementwise(call.batch.elements, program, nullptr, unreduced, nullptr);
  } else {
    std::vector<double> sums(program.size);
    cpu_doors().elementwise(call.batch.elements, program, sums.data(), {},
                            kFused ? gradient.mutable_data_ptr() : nullptr);
    double total = 0;
    for (int64_t k = 0; k < program.size; ++k) {
      sums[k] /= call.denominator;
      total += call.weighted[k].scale * sums[k];
    }
    loss = filled({}, type, std::array<double, 1>{total});
    parts = call.in.with_parts ? filled({program.size}, type, sums) : at::empty({0}, options);
  }
  torch::jit::push(*stack, loss, parts);
  if (kFused) torch::jit::push(*stack, gradient);
}

void elementwise_gradient(const c10::OperatorHandle&, Stack* stack) {
  const auto all = torch::jit::last(*stack, 2 + kElementArguments);
  const Tensor upstream = all[0].toTensor();
  ElementCall call(all.slice(2));
  call.batch.elements.unscaled = all[1].toBool();
  torch::jit::drop(*stack, all.size());
  const Tensor out = new_gradient(call.batch.input);
  call.write_gradient(upstream, out);
  torch::jit::push(*stack, out);
}

void elementwise_rescale(const c10::OperatorHandle&, Stack* stack) {
  const auto all = torch::jit::last(*stack, 2 + kElementArguments);
  const Tensor gradient = all[0].toTensor(), upstream = all[1].toTensor();
  if (const double factor = upstream.item<double>(); factor != 1.0 && scales_in_place(gradient, factor)) {
    gradient.mul_(upstream);
  } else if (factor != 1.0) {
    const ElementCall call(all.slice(2));
    TORCH_CHECK(gradient.is_contiguous() && gradient.sizes() == call.batch.input.sizes() &&
                    gradient.scalar_type() == call.batch.input.scalar_type(),
                "objkern: gradient does not belong to this input");
    call.write_gradient(upstream, gradient);
  }
  torch::jit::drop(*stack, all.size());
}

}  // namespace

TORCH_LIBRARY_IMPL(objkern, CPU, m) {
  OBJKERN_IMPLEMENT(m);
}

}  // namespace objkern
