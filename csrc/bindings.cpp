// The only file that sees tensors: op schemas, checks, memory, and the way into the backends. The pybind11 module at
// the end carries no tensor: build facts, and scalar doors through which tests hold objective.h against terms.py.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include <array>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/buffers.h"
#include "cpu/kernels.h"
#include "objective.h"

namespace objkern {
namespace {

using at::Tensor;
using OptionalTensor = const std::optional<Tensor>&;

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

double scalar_or(OptionalTensor t, double otherwise) {
  return t.has_value() ? t->item<double>() : otherwise;
}

// Tensors that live as long as the raw view of them does.
struct Batch {
  cpu::Rows rows;
  Tensor logits, target, class_weight;

  Batch(const Tensor& logits_, OptionalTensor target_, OptionalTensor class_weight_, OptionalTensor logit_scale,
        int64_t ignore_index, double softcap, bool masked) {
    TORCH_CHECK(logits_.dim() == 2, "objkern: logits: expected (rows, classes) but got ", logits_.sizes());
    logits = with_unit_class_stride(logits_);
    rows.dtype = dtype_of(logits);
    rows.logits = logits.const_data_ptr();
    rows.rows = logits.size(0);
    rows.classes = logits.size(1);
    rows.row_stride = logits.stride(0);
    TORCH_CHECK(rows.classes > 0, "objkern: logits: expected at least one class but got ", logits_.sizes());
    rows.ignore_index = ignore_index;
    rows.softcap = softcap;
    rows.masked = masked;
    rows.logit_scale = scalar_or(logit_scale, 1.0);
    if (target_.has_value() && target_->scalar_type() == at::kLong) {
      TORCH_CHECK(target_->dim() == 1 && target_->size(0) == rows.rows, "objkern: target: expected (", rows.rows,
                  ") labels but got ", target_->sizes());
      target = target_->contiguous();
      rows.target = target.const_data_ptr<int64_t>();
    } else if (target_.has_value()) {
      TORCH_CHECK(target_->sizes() == logits.sizes(), "objkern: target: expected probabilities of shape ",
                  logits.sizes(), " but got ", target_->sizes());
      const bool same = target_->scalar_type() == logits.scalar_type();
      target = with_unit_class_stride(same ? *target_ : target_->to(accumulation_type(logits)));
      rows.dense_target = target.const_data_ptr();
      rows.dense_dtype = dtype_of(target);
      rows.dense_stride = target.stride(0);
    }
    if (class_weight_.has_value()) {
      TORCH_CHECK(class_weight_->dim() == 1 && class_weight_->size(0) == rows.classes,
                  "objkern: class weight: expected (", rows.classes, ") but got ", class_weight_->sizes());
      class_weight = class_weight_->to(accumulation_type(logits)).contiguous();
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

// The coefficients over their denominators. Cross-entropy's mean divides by the weight of its labels, every other
// term by the number of rows that count; `normalizer` replaces both.
std::vector<cpu::Term> program_of(const cpu::Rows& rows, const cpu::TargetSummary& summary, at::IntArrayRef terms,
                                  at::ArrayRef<double> parameters, const std::vector<double>& coefficients,
                                  std::optional<double> normalizer, Reduction reduction, bool empty_zero,
                                  std::vector<double>& denominators) {
  const bool empty = summary.counted == 0 && empty_zero;
  std::vector<cpu::Term> program(terms.size());
  denominators.assign(terms.size(), 1.0);
  for (size_t k = 0; k < terms.size(); ++k) {
    TORCH_CHECK(0 <= terms[k] && terms[k] < kTermKinds, "objkern: term kind ", terms[k], " is not known");
    if (normalizer.has_value()) {
      denominators[k] = *normalizer;
    } else if (reduction == Reduction::kMean && !empty) {
      const bool weighted = static_cast<TermKind>(terms[k]) == TermKind::kCrossEntropy && rows.target != nullptr;
      denominators[k] = weighted ? summary.weight_sum : static_cast<double>(summary.counted);
    }
    program[k] = {terms[k], parameters[k], coefficients[k] / denominators[k]};
  }
  return program;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> run_objective(const Tensor& logits, OptionalTensor target,
                                                         OptionalTensor class_weight, OptionalTensor coefficient_tensor,
                                                         OptionalTensor normalizer, OptionalTensor logit_scale,
                                                         at::IntArrayRef terms, at::ArrayRef<double> parameters,
                                                         at::ArrayRef<double> coefficients, int64_t reduction_,
                                                         int64_t ignore_index, double softcap, bool masked,
                                                         bool empty_zero, bool with_gradient) {
  TORCH_CHECK(0 <= reduction_ && reduction_ <= 2, "objkern: reduction: expected 0, 1 or 2 but got ", reduction_);
  TORCH_CHECK(terms.size() == parameters.size() && terms.size() == coefficients.size(),
              "objkern: expected a parameter and a coefficient for each of ", terms.size(), " terms");
  TORCH_CHECK(!coefficient_tensor.has_value() ||
                  coefficient_tensor->sizes() == at::IntArrayRef{static_cast<int64_t>(terms.size())},
              "objkern: coefficient_tensor: expected one coefficient for each of ", terms.size(), " terms");
  const auto reduction = static_cast<Reduction>(reduction_);
  Batch batch(logits, target, class_weight, logit_scale, ignore_index, softcap, masked);
  for (size_t k = 0; k < terms.size(); ++k) {
    batch.rows.reads |= reads_of(static_cast<TermKind>(terms[k]), parameters[k]);
    batch.rows.smoothed |= static_cast<TermKind>(terms[k]) == TermKind::kCrossEntropy && parameters[k] > 0;
  }
  const bool with_free_statistics = true;  // lse, accuracy and target probability, which only `parts` reports
  batch.rows.free_statistics = with_free_statistics;
  const cpu::Rows& rows = batch.rows;
  const cpu::TargetSummary summary = checked_targets(rows);
  const int64_t n = rows.rows, size = static_cast<int64_t>(terms.size());

  std::vector<double> scale(coefficients.begin(), coefficients.end());
  if (coefficient_tensor.has_value()) {
    const Tensor c = coefficient_tensor->to(at::kDouble).contiguous();
    for (int64_t k = 0; k < size; ++k) scale[k] *= c.const_data_ptr<double>()[k];
  }
  std::vector<double> denominators;
  const std::optional<double> divisor =
      normalizer.has_value() ? std::optional<double>(normalizer->item<double>()) : std::nullopt;
  const auto terms_of_rows =
      program_of(rows, summary, terms, parameters, scale, divisor, reduction, empty_zero, denominators);
  const cpu::Program program{terms_of_rows.data(), size, reduction == Reduction::kNone};

  const auto options = logits.options().dtype(accumulation_type(logits));
  const Tensor values =
      at::empty({size + cpu::kFreeStatistics, program.per_row ? n : 1}, logits.options().dtype(at::kDouble));
  const Tensor row_gradient = at::empty({kRowGradient, n}, options);
  Tensor gradient = at::empty({0}, logits.options());
  if (with_gradient) {
    gradient = empty_gradient(rows, logits);
    cpu_doors().fused(rows, program, values.mutable_data_ptr<double>(), row_gradient.mutable_data_ptr(),
                      gradient.mutable_data_ptr());
  } else {
    cpu_doors().objective(rows, program, values.mutable_data_ptr<double>(), row_gradient.mutable_data_ptr());
  }

  const double* value = values.const_data_ptr<double>();
  if (reduction == Reduction::kNone) {
    const Tensor loss = at::zeros({n}, options.dtype(at::kDouble));
    double* out = loss.mutable_data_ptr<double>();
    for (int64_t k = 0; k < size; ++k)
      for (int64_t i = 0; i < n; ++i) out[i] += program.terms[k].scale * value[k * n + i];
    return {loss.to(options.dtype()), values.to(options.dtype()), row_gradient, gradient};
  }
  // Terms over their denominators, free statistics as means over the rows that count, and the number of those.
  std::vector<double> parts(size + cpu::kFreeStatistics + 1);
  double total = 0;
  for (int64_t k = 0; k < size; ++k) {
    parts[k] = value[k] / denominators[k];
    total += scale[k] * parts[k];
  }
  for (int64_t k = size; k < size + cpu::kFreeStatistics; ++k)
    parts[k] = value[k] / static_cast<double>(summary.counted);
  parts.back() = static_cast<double>(summary.counted);
  return {at::scalar_tensor(total, options), at::tensor(parts, options), row_gradient, gradient};
}

std::tuple<Tensor, Tensor, Tensor> objective(const Tensor& logits, OptionalTensor target, OptionalTensor class_weight,
                                             OptionalTensor coefficient_tensor, OptionalTensor normalizer,
                                             OptionalTensor logit_scale, at::IntArrayRef terms,
                                             at::ArrayRef<double> parameters, at::ArrayRef<double> coefficients,
                                             int64_t reduction, int64_t ignore_index, double softcap, bool masked,
                                             bool empty_zero) {
  auto [loss, parts, row_gradient, gradient] =
      run_objective(logits, target, class_weight, coefficient_tensor, normalizer, logit_scale, terms, parameters,
                    coefficients, reduction, ignore_index, softcap, masked, empty_zero, false);
  return {loss, parts, row_gradient};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fused(const Tensor& logits, OptionalTensor target,
                                                 OptionalTensor class_weight, OptionalTensor coefficient_tensor,
                                                 OptionalTensor normalizer, OptionalTensor logit_scale,
                                                 at::IntArrayRef terms, at::ArrayRef<double> parameters,
                                                 at::ArrayRef<double> coefficients, int64_t reduction,
                                                 int64_t ignore_index, double softcap, bool masked, bool empty_zero) {
  return run_objective(logits, target, class_weight, coefficient_tensor, normalizer, logit_scale, terms, parameters,
                       coefficients, reduction, ignore_index, softcap, masked, empty_zero, true);
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

Tensor gradient(const Tensor& upstream, const Tensor& row_gradient, const Tensor& logits, OptionalTensor target,
                OptionalTensor class_weight, OptionalTensor logit_scale, int64_t ignore_index, double softcap,
                bool masked, bool unscaled, int64_t reads) {
  Batch batch(logits, target, class_weight, logit_scale, ignore_index, softcap, masked);
  batch.rows.unscaled = unscaled;
  batch.rows.reads = reads;
  TORCH_CHECK(row_gradient.is_contiguous() && row_gradient.size(1) == batch.rows.rows &&
                  row_gradient.size(0) == kRowGradient && row_gradient.scalar_type() == accumulation_type(logits),
              "objkern: row_gradient does not belong to these logits");
  checked_targets(batch.rows);
  return write_gradient(batch, row_gradient, upstream);
}

std::tuple<Tensor, Tensor> statistics(const Tensor& logits, OptionalTensor target, OptionalTensor class_weight,
                                      OptionalTensor logit_scale, int64_t ignore_index, double softcap, bool masked) {
  Batch batch(logits, target, class_weight, logit_scale, ignore_index, softcap, masked);
  batch.rows.reads = kEverything;
  checked_targets(batch.rows);
  const auto options = logits.options().dtype(at::kDouble);
  const Tensor centred = at::empty({cpu::kCentred, batch.rows.rows}, options);
  const Tensor out = at::empty({kStatistics, batch.rows.rows}, options);
  cpu_doors().statistics(batch.rows, centred.mutable_data_ptr<double>(), out.mutable_data_ptr<double>());
  return {out, centred};
}

Tensor statistics_gradient(const Tensor& partials, const Tensor& centred, const Tensor& logits, OptionalTensor target,
                           OptionalTensor class_weight, OptionalTensor logit_scale, int64_t ignore_index,
                           double softcap, bool masked, bool unscaled) {
  Batch batch(logits, target, class_weight, logit_scale, ignore_index, softcap, masked);
  batch.rows.unscaled = unscaled;
  batch.rows.reads = kEverything;
  TORCH_CHECK(centred.is_contiguous() && centred.size(1) == batch.rows.rows && centred.size(0) == cpu::kCentred,
              "objkern: centred sums do not belong to these logits");
  TORCH_CHECK(partials.dim() == 2 && partials.size(0) == kStatistics && partials.size(1) == batch.rows.rows,
              "objkern: partials: expected (", kStatistics, ", ", batch.rows.rows, ") but got ", partials.sizes());
  checked_targets(batch.rows);
  const auto options = logits.options().dtype(accumulation_type(logits));
  const Tensor row_gradient = at::empty({kRowGradient, batch.rows.rows}, options);
  const Tensor f = partials.to(at::kDouble).contiguous();
  cpu_doors().chain(batch.rows, centred.const_data_ptr<double>(), f.const_data_ptr<double>(),
                    row_gradient.mutable_data_ptr());
  return write_gradient(batch, row_gradient, at::ones({}, options));
}

}  // namespace

TORCH_LIBRARY(objkern, m) {
  // Inputs common to all: logits (N, V); target (N) int64 labels or (N, V) probabilities; class_weight (V).
#define OBJKERN_OBJECTIVE_INPUTS                                                                                  \
  "(Tensor logits, Tensor? target, Tensor? class_weight, Tensor? coefficient_tensor, Tensor? normalizer, "        \
  "Tensor? logit_scale, int[] terms, float[] parameters, float[] coefficients, int reduction, int ignore_index, " \
  "float softcap, bool masked, bool empty_zero)"
#define OBJKERN_ROW_INPUTS                                                                                           \
  "Tensor logits, Tensor? target, Tensor? class_weight, Tensor? logit_scale, int ignore_index, float softcap, bool " \
  "masked"
  m.def("objective" OBJKERN_OBJECTIVE_INPUTS " -> (Tensor loss, Tensor parts, Tensor row_gradient)");
  m.def("fused" OBJKERN_OBJECTIVE_INPUTS " -> (Tensor loss, Tensor parts, Tensor row_gradient, Tensor gradient)");
  m.def("gradient(Tensor upstream, Tensor row_gradient, " OBJKERN_ROW_INPUTS ", bool unscaled, int reads) -> Tensor");
  m.def("statistics(" OBJKERN_ROW_INPUTS ") -> (Tensor statistics, Tensor centred)");
  m.def("statistics_gradient(Tensor partials, Tensor centred, " OBJKERN_ROW_INPUTS ", bool unscaled) -> Tensor");
}

TORCH_LIBRARY_IMPL(objkern, CPU, m) {
  m.impl("objective", &objective);
  m.impl("fused", &fused);
  m.impl("gradient", &gradient);
  m.impl("statistics", &statistics);
  m.impl("statistics_gradient", &statistics_gradient);
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
      "reads",
      [](const std::vector<std::pair<int64_t, double>>& terms) {
        int64_t reads = 0;
        for (const auto& [kind, parameter] : terms) reads |= reads_of(static_cast<TermKind>(kind), parameter);
        return reads;
      },
      "Which statistics the terms (kind, parameter) read, as bits in the order of Statistics.");
  m.def(
      "derive",
      [](const std::vector<double>& centred, bool dense_target) {
        const auto c = struct_from<Centred<double>>(centred);
        return fields_of(derive(c, Odds<double>(c), dense_target));
      },
      "The statistics of a row from its centred sums.");
}

}  // namespace objkern
