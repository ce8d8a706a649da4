// The ops: schemas, checks, memory, and the way into the backends. No file but this and autograd.cpp sees a tensor.
// The pybind11 module at the end carries none: build facts, and scalar doors through which tests hold objective.h
// against terms.py.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include <array>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cpu/buffers.h"
#include "cpu/kernels.h"
#include "objective.h"

namespace objkern {
namespace {

using at::Tensor;
using c10::IValue;
using torch::jit::Stack;

enum class Reduction : int64_t { kNone, kMean, kSum };  // the order of objkern.ops.REDUCTIONS

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, "objkern: expected float32, float64, bfloat16 or float16 but got ", t.scalar_type());
  }
}

at::ScalarType accumulation_type(const Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Unit class stride; rows may lie anywhere.
Tensor with_unit_class_stride(const Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : t.contiguous();
}

// ---- arguments: the ops take them boxed, so that each list of them is read in one place ---------------------------

std::optional<Tensor> optional_tensor(const IValue& value) {
  return value.isNone() ? std::nullopt : std::optional<Tensor>(value.toTensor());
}

struct RowArguments {  // in the order of OBJKERN_ROW_ARGUMENTS
  Tensor logits;
  std::optional<Tensor> target, logit_scale, class_weight;
  int64_t ignore_index;
  double softcap;
  bool masked;

  explicit RowArguments(c10::ArrayRef<IValue> a)
      : logits(a[kLogits].toTensor()),
        target(optional_tensor(a[kTarget])),
        logit_scale(optional_tensor(a[kLogitScale])),
        class_weight(optional_tensor(a[kClassWeight])),
        ignore_index(a[4].toInt()),
        softcap(a[5].toDouble()),
        masked(a[6].toBool()) {}
};

struct ObjectiveArguments : RowArguments {  // in the order of OBJKERN_OBJECTIVE_ARGUMENTS
  std::vector<cpu::Term> terms;             // with `scale` as their coefficient
  Reduction reduction;
  std::optional<Tensor> coefficient_tensor, normalizer;
  bool empty_zero, with_parts;

  explicit ObjectiveArguments(c10::ArrayRef<IValue> a)
      : RowArguments(a.slice(kRows, kRowArguments)),
        reduction(static_cast<Reduction>(a[kReduction].toInt())),
        coefficient_tensor(optional_tensor(a[kCoefficientTensor])),
        normalizer(optional_tensor(a[kCoefficientTensor + 1])),
        empty_zero(a[kCoefficientTensor + 2].toBool()),
        with_parts(a[kCoefficientTensor + 3].toBool()) {
    const auto numbers = a[kTerms].toDoubleVector();
    TORCH_CHECK(numbers.size() % 3 == 0, "objkern: terms: expected a kind, a parameter and a coefficient of each");
    for (size_t i = 0; i < numbers.size(); i += 3) {
      TORCH_CHECK(0 <= numbers[i] && numbers[i] < kTermKinds && numbers[i] == std::floor(numbers[i]),
                  "objkern: term kind ", numbers[i], " is not known");
      terms.push_back({static_cast<int64_t>(numbers[i]), numbers[i + 1], numbers[i + 2]});
    }
    TORCH_CHECK(Reduction::kNone <= reduction && reduction <= Reduction::kSum,
                "objkern: reduction: expected 0, 1 or 2 but got ", a[kReduction].toInt());
    TORCH_CHECK_VALUE(target.has_value() || (reads() & (kLogprob | kOtherLogprob)) == 0,
                      "objkern: target: a term needs one but got None");
    if (!coefficient_tensor.has_value()) return;
    const auto size = static_cast<int64_t>(terms.size());
    TORCH_CHECK(coefficient_tensor->sizes() == at::IntArrayRef{size},
                "objkern: coefficient_tensor: expected one coefficient for each of ", size, " terms");
    const Tensor c = coefficient_tensor->to(at::kDouble).contiguous();
    for (int64_t k = 0; k < size; ++k) terms[k].scale *= c.const_data_ptr<double>()[k];
  }

  int64_t reads() const {
    int64_t all = 0;
    for (const cpu::Term& term : terms) all |= reads_of(static_cast<TermKind>(term.kind), term.parameter);
    return all;
  }

  // How many fields of RowGradient their gradient has.
  int64_t row_gradient_fields() const {
    const bool dense = target.has_value() && target->scalar_type() != at::kLong;
    return kFieldsOfDepth[static_cast<int>(depth_of(reads(), class_weight.has_value(), dense))];
  }

  // A dense target has no zeros where label smoothing lifts them.
  bool smoothed() const {
    bool any = false;
    for (const cpu::Term& term : terms)
      any |= static_cast<TermKind>(term.kind) == TermKind::kCrossEntropy && term.parameter > 0;
    return any;
  }
};

// Tensors that live as long as the raw view of them does.
struct Batch {
  cpu::Rows rows;
  Tensor logits, target, class_weight;

  explicit Batch(const RowArguments& in, int64_t reads = kEverything) {
    TORCH_CHECK(in.logits.dim() == 2, "objkern: logits: expected (rows, classes) but got ", in.logits.sizes());
    logits = with_unit_class_stride(in.logits);
    rows.dtype = dtype_of(logits);
    rows.logits = logits.const_data_ptr();
    rows.rows = logits.size(0);
    rows.classes = logits.size(1);
    rows.row_stride = logits.stride(0);
    rows.reads = reads;
    TORCH_CHECK(rows.classes > 0, "objkern: logits: expected at least one class but got ", in.logits.sizes());
    rows.ignore_index = in.ignore_index;
    rows.softcap = in.softcap;
    rows.masked = in.masked;
    TORCH_CHECK_VALUE(in.softcap >= 0, "objkern: softcap: expected a number >= 0 but got ", in.softcap);
    for (const auto& [name, t] : {std::pair{"target", &in.target}, std::pair{"logit_scale", &in.logit_scale},
                                  std::pair{"class_weight", &in.class_weight}})
      TORCH_CHECK_TYPE(!t->has_value() || !(*t)->is_complex(), "objkern: ", name, ": expected real numbers");
    TORCH_CHECK_VALUE(!in.logit_scale.has_value() || in.logit_scale->dim() == 0,
                      "objkern: logit_scale: expected a 0-dim tensor but got ", in.logit_scale->sizes());
    rows.logit_scale = in.logit_scale.has_value() ? in.logit_scale->item<double>() : 1.0;
    if (in.target.has_value() && in.target->scalar_type() == at::kLong) {
      TORCH_CHECK(in.target->dim() == 1 && in.target->size(0) == rows.rows, "objkern: target: expected (", rows.rows,
                  ") labels but got ", in.target->sizes());
      target = in.target->contiguous();
      rows.target = target.const_data_ptr<int64_t>();
    } else if (in.target.has_value()) {
      TORCH_CHECK(in.target->sizes() == logits.sizes(), "objkern: target: expected probabilities of shape ",
                  logits.sizes(), " but got ", in.target->sizes());
      const bool same = in.target->scalar_type() == logits.scalar_type();
      target = with_unit_class_stride(same ? *in.target : in.target->to(accumulation_type(logits)));
      rows.dense_target = target.const_data_ptr();
      rows.dense_dtype = dtype_of(target);
      rows.dense_stride = target.stride(0);
    }
    if (in.class_weight.has_value()) {
      TORCH_CHECK(in.class_weight->dim() == 1 && in.class_weight->size(0) == rows.classes,
                  "objkern: class weight: expected (", rows.classes, ") but got ", in.class_weight->sizes());
      class_weight = in.class_weight->to(accumulation_type(logits)).contiguous();
      rows.class_weight = class_weight.const_data_ptr();
    }
  }
};

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

Tensor empty_gradient(const cpu::Rows& rows, const Tensor& logits) {
  const std::array<int64_t, 2> sizes{rows.rows, rows.classes};
  if (rows.rows * rows.classes * logits.element_size() < cpu::kLeastReused) return at::empty(sizes, logits.options());
  static ReusingAllocator* const allocator = new ReusingAllocator;
  return at::detail::empty_generic(sizes, allocator, c10::DispatchKeySet(c10::DispatchKey::CPU), logits.scalar_type(),
                                   std::nullopt);
}

const cpu::Doors& cpu_doors() {
  const cpu::Doors* doors = cpu::doors();
  TORCH_CHECK_VALUE(doors != nullptr, "OBJKERN_CPU_CAPABILITY: expected \"default\", or \"avx2\" or \"avx512\" where ",
                    "this build has it and this processor runs it, but got \"", std::getenv("OBJKERN_CPU_CAPABILITY"),
                    "\"");
  return *doors;
}

cpu::TargetSummary checked_targets(const cpu::Rows& rows) {
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

// (loss, parts, row_gradient), and the gradient if asked for.
void run_objective(Stack* stack, bool with_gradient) {
  const ObjectiveArguments in(torch::jit::last(*stack, kObjectiveArguments));
  torch::jit::drop(*stack, kObjectiveArguments);
  TORCH_CHECK_VALUE(!with_gradient || in.reduction != Reduction::kNone,
                    "objkern: fused: the gradient of unreduced losses is only known in the backward pass");
  Batch batch(in, in.reads());
  batch.rows.smoothed = in.smoothed();
  batch.rows.free_statistics = in.with_parts;
  const cpu::Rows& rows = batch.rows;
  const cpu::TargetSummary summary = checked_targets(rows);
  const int64_t n = rows.rows, size = static_cast<int64_t>(in.terms.size());
  const std::vector<double> denominators = denominators_of(in, summary, rows.target != nullptr);
  std::vector<cpu::Term> terms = in.terms;
  for (int64_t k = 0; k < size; ++k) terms[k].scale /= denominators[k];
  const cpu::Program program{terms.data(), size, in.reduction == Reduction::kNone};

  const auto options = in.logits.options().dtype(accumulation_type(in.logits));
  const auto type = accumulation_type(in.logits);
  const Tensor values = at::empty({size + cpu::kFreeStatistics, program.per_row ? n : 1}, options.dtype(at::kDouble));
  const Tensor row_gradient = at::empty({in.row_gradient_fields(), n}, options);
  Tensor gradient;
  if (with_gradient) {
    gradient = empty_gradient(rows, in.logits);
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
      total += in.terms[k].scale * term;
      if (in.with_parts) numbers.push_back(term);
    }
    if (in.with_parts) {
      for (int64_t k = size; k < size + cpu::kFreeStatistics; ++k)
        numbers.push_back(value[k] / static_cast<double>(summary.counted));
      numbers.push_back(static_cast<double>(summary.counted));
    }
    loss = filled({}, type, std::array<double, 1>{total});
    parts = filled({static_cast<int64_t>(numbers.size())}, type, numbers);
  }
  torch::jit::push(*stack, loss, parts, row_gradient);
  if (with_gradient) torch::jit::push(*stack, gradient);
}

void objective(const c10::OperatorHandle&, Stack* stack) {
  run_objective(stack, false);
}

void fused(const c10::OperatorHandle&, Stack* stack) {
  run_objective(stack, true);
}

Tensor write_gradient(const Batch& batch, const Tensor& row_gradient, const Tensor& upstream) {
  const cpu::Rows& rows = batch.rows;
  const Tensor u = upstream.to(accumulation_type(batch.logits));
  TORCH_CHECK(u.dim() == 0 || (u.dim() == 1 && u.size(0) == rows.rows), "objkern: upstream: expected () or (",
              rows.rows, ") but got ", u.sizes());
  const Tensor out = empty_gradient(rows, batch.logits);
  cpu_doors().gradient(rows, row_gradient.const_data_ptr(), u.const_data_ptr(), u.dim() == 0 ? 0 : u.stride(0),
                       out.mutable_data_ptr());
  return out;
}

void gradient(const c10::OperatorHandle&, Stack* stack) {
  const auto all = torch::jit::last(*stack, 3 + kObjectiveArguments);
  const Tensor upstream = all[0].toTensor(), row_gradient = all[1].toTensor();
  const bool unscaled = all[2].toBool();
  const ObjectiveArguments in(all.slice(3));
  torch::jit::drop(*stack, all.size());
  Batch batch(in, in.reads());
  batch.rows.unscaled = unscaled;
  TORCH_CHECK(row_gradient.is_contiguous() && row_gradient.dim() == 2 &&
                  row_gradient.size(0) == in.row_gradient_fields() && row_gradient.size(1) == batch.rows.rows &&
                  row_gradient.scalar_type() == accumulation_type(batch.logits),
              "objkern: row_gradient does not belong to these logits");
  checked_targets(batch.rows);
  torch::jit::push(*stack, write_gradient(batch, row_gradient, upstream));
}

void statistics(const c10::OperatorHandle&, Stack* stack) {
  const RowArguments in(torch::jit::last(*stack, kRowArguments));
  torch::jit::drop(*stack, kRowArguments);
  const Batch batch(in);
  checked_targets(batch.rows);
  const auto options = in.logits.options().dtype(at::kDouble);
  const Tensor centred = at::empty({cpu::kCentred, batch.rows.rows}, options);
  const Tensor out = at::empty({kStatistics, batch.rows.rows}, options);
  cpu_doors().statistics(batch.rows, centred.mutable_data_ptr<double>(), out.mutable_data_ptr<double>());
  torch::jit::push(*stack, out, centred);
}

void statistics_gradient(const c10::OperatorHandle&, Stack* stack) {
  const auto all = torch::jit::last(*stack, 3 + kRowArguments);
  const Tensor partials = all[0].toTensor(), centred = all[1].toTensor();
  const bool unscaled = all[2].toBool();
  const RowArguments in(all.slice(3));
  torch::jit::drop(*stack, all.size());
  Batch batch(in);
  batch.rows.unscaled = unscaled;
  const int64_t n = batch.rows.rows;
  TORCH_CHECK(centred.is_contiguous() && centred.dim() == 2 && centred.size(1) == n &&
                  centred.size(0) == cpu::kCentred && centred.scalar_type() == at::kDouble,
              "objkern: centred sums do not belong to these logits");
  TORCH_CHECK(partials.dim() == 2 && partials.size(0) == kStatistics && partials.size(1) == n,
              "objkern: partials: expected (", kStatistics, ", ", n, ") but got ", partials.sizes());
  checked_targets(batch.rows);
  const auto options = in.logits.options().dtype(accumulation_type(in.logits));
  const Tensor row_gradient = at::empty({kRowGradient, n}, options);
  const Tensor f = partials.to(at::kDouble).contiguous();
  cpu_doors().chain(batch.rows, centred.const_data_ptr<double>(), f.const_data_ptr<double>(),
                    row_gradient.mutable_data_ptr());
  torch::jit::push(*stack, write_gradient(batch, row_gradient, at::ones({}, options)));
}

}  // namespace

TORCH_LIBRARY(objkern, m) {
  m.def("objective(" OBJKERN_OBJECTIVE_ARGUMENTS ") -> (Tensor loss, Tensor parts, Tensor row_gradient)");
  m.def("fused(" OBJKERN_OBJECTIVE_ARGUMENTS ") -> (Tensor loss, Tensor parts, Tensor row_gradient, Tensor gradient)");
  m.def("gradient(Tensor upstream, Tensor row_gradient, bool unscaled, " OBJKERN_OBJECTIVE_ARGUMENTS ") -> Tensor");
  m.def("statistics(" OBJKERN_ROW_ARGUMENTS ") -> (Tensor statistics, Tensor centred)");
  m.def("statistics_gradient(Tensor partials, Tensor centred, bool unscaled, " OBJKERN_ROW_ARGUMENTS ") -> Tensor");
  // Derivatives through the reference, implemented in objkern/ops.py, for the differentiable arguments that `needed`
  // marks: logits, target, logit scale and coefficients; in the second order the upstream gradient before them.
  m.def("reference_gradient(Tensor upstream, bool[] needed, " OBJKERN_OBJECTIVE_ARGUMENTS ") -> Tensor[]");
  m.def("reference_second_order(Tensor grad, Tensor upstream, bool[] needed, " OBJKERN_OBJECTIVE_ARGUMENTS
        ") -> Tensor[]");
  m.def("reference_statistics_gradient(Tensor partials, bool[] needed, " OBJKERN_ROW_ARGUMENTS ") -> Tensor[]");
  m.def("reference_statistics_second_order(Tensor grad, Tensor partials, bool[] needed, " OBJKERN_ROW_ARGUMENTS
        ") -> Tensor[]");
}

TORCH_LIBRARY_IMPL(objkern, CPU, m) {
  m.impl("objective", torch::CppFunction::makeFromBoxedFunction<&objective>());
  m.impl("fused", torch::CppFunction::makeFromBoxedFunction<&fused>());
  m.impl("gradient", torch::CppFunction::makeFromBoxedFunction<&gradient>());
  m.impl("statistics", torch::CppFunction::makeFromBoxedFunction<&statistics>());
  m.impl("statistics_gradient", torch::CppFunction::makeFromBoxedFunction<&statistics_gradient>());
}

// ---- scalar doors -----------------------------------------------------------------------------------------------

template <class S>
S struct_from(const std::vector<double>& fields) {
  S s;
  TORCH_CHECK(fields.size() * sizeof(double) == sizeof(S), "expected ", sizeof(S) / sizeof(double), " numbers but got ",
              fields.size());
  std::memcpy(static_cast<void*>(&s), fields.data(), sizeof(S));
  return s;
}

template <class S>
std::vector<double> fields_of(const S& s) {
  const double* first = reinterpret_cast<const double*>(&s);
  return {first, first + sizeof(S) / sizeof(double)};
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Build facts and scalar doors of objkern's C++ core; tensors go through torch.ops.objkern.";
  m.def("build_info", [] {
    pybind11::dict info;
    info["compiler"] = __VERSION__;
    info["torch"] = TORCH_VERSION;
    const cpu::Doors* doors = cpu::doors();
    info["cpu_capability"] = doors == nullptr ? pybind11::object(pybind11::none()) : pybind11::str(doors->name);
    return info;
  });
  m.def(
      "term",
      [](int64_t kind, double parameter, double row_weight, const std::vector<double>& statistics) {
        Statistics<double> partials;
        const double value = term_value(static_cast<TermKind>(kind), parameter, row_weight, 1.0,
                                        struct_from<Statistics<double>>(statistics), partials);
        return std::make_tuple(value, fields_of(partials));
      },
      "The value of a term and its partial derivatives to the statistics of a row.");
  m.def("release_buffers", &cpu::release_buffers, "Give the kept gradient buffers back to the system.");
  m.def("kept_bytes", &cpu::kept_bytes, "Bytes of gradient buffers kept for the next call.");
  m.def("buffer_limit", &cpu::buffer_limit);
  m.def("set_buffer_limit", &cpu::set_buffer_limit);
  m.def(
      "row_gradient_fields",
      [](const std::vector<double>& terms, bool weighted_classes, bool dense_target) {
        int64_t reads = 0;
        for (size_t i = 0; i + 2 < terms.size(); i += 3)
          reads |= reads_of(static_cast<TermKind>(terms[i]), terms[i + 1]);
        return kFieldsOfDepth[static_cast<int>(depth_of(reads, weighted_classes, dense_target))];
      },
      "How many numbers a row keeps for its gradient under the terms (kind, parameter, coefficient).");
  m.def(
      "derive",
      [](const std::vector<double>& centred, bool dense_target) {
        const auto c = struct_from<Centred<double>>(centred);
        return fields_of(derive(c, Odds<double>(c), dense_target));
      },
      "The statistics of a row from its centred sums.");
}

}  // namespace objkern
