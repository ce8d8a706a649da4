// The arguments of the ops, parsed and checked: from boxed values to the plain structs that the kernels' doors take.
#pragma once

#include <ATen/ATen.h>
#include <ATen/ExpandUtils.h>
#include <ATen/core/ivalue.h>

#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "arguments.h"
#include "elementwise.h"
#include "objective.h"
#include "rows.h"

namespace objkern {

using at::Tensor;
using c10::IValue;

inline DType dtype_of(const Tensor& t) {
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

inline at::ScalarType accumulation_type(const Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// FSDP and offloading free the memory of a tensor that they keep. What is nowhere is not to be read as "there is none".
inline const Tensor& allocated(const char* name, const Tensor& t) {
  TORCH_CHECK_VALUE(t.numel() == 0 || t.storage().nbytes() > 0, "objkern: ", name,
                    ": its memory has been freed, as FSDP and offloading do between uses; make the call, and its "
                    "backward pass, where it is there");
  return t;
}

inline void check_allocated(const char* name, const std::optional<Tensor>& t) {
  if (t.has_value()) allocated(name, *t);
}

// Unit class stride; rows may lie anywhere.
inline Tensor with_unit_class_stride(const Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : t.contiguous();
}

// ---- arguments: the ops take them boxed, so that each list of them is read in one place ---------------------------

inline std::optional<Tensor> optional_tensor(const IValue& value) {
  return value.isNone() ? std::nullopt : std::optional<Tensor>(value.toTensor());
}

struct RowArguments {  // in the order of OBJKERN_ROW_ARGUMENTS
  Tensor logits;
  std::optional<Tensor> target, logit_scale, class_weight, reference;
  int64_t ignore_index;
  double softcap, temperature;
  bool masked;

  explicit RowArguments(c10::ArrayRef<IValue> a)
      : logits(a[kLogits].toTensor()),
        target(optional_tensor(a[kTarget])),
        logit_scale(optional_tensor(a[kLogitScale])),
        class_weight(optional_tensor(a[kClassWeight])),
        reference(optional_tensor(a[kReference])),
        ignore_index(a[4].toInt()),
        softcap(a[5].toDouble()),
        temperature(a[kReference + 1].toDouble()),
        masked(a[6].toBool()) {}

  // Those that are asked for and can be known.
  int64_t known(int64_t reads) const { return reference.has_value() ? reads : reads & ~int64_t{kDivergences}; }
};

// The terms and what is made of their values: the first two arguments and the last four, which begin at `rest`.
struct ProgramArguments {
  std::vector<Term> terms;  // `scale` is the coefficient as a number
  Reduction reduction;
  std::optional<Tensor> coefficient_tensor, normalizer;
  bool empty_zero, with_parts;

  ProgramArguments(c10::ArrayRef<IValue> a, int rest, int64_t kinds)
      : reduction(static_cast<Reduction>(a[kReduction].toInt())),
        coefficient_tensor(optional_tensor(a[rest])),
        normalizer(optional_tensor(a[rest + 1])),
        empty_zero(a[rest + 2].toBool()),
        with_parts(a[rest + 3].toBool()) {
    const auto numbers = a[kTerms].toDoubleVector();
    TORCH_CHECK(numbers.size() % 3 == 0, "objkern: terms: expected a kind, a parameter and a coefficient of each");
    for (size_t i = 0; i < numbers.size(); i += 3) {
      TORCH_CHECK(0 <= numbers[i] && numbers[i] < kinds && numbers[i] == std::floor(numbers[i]), "objkern: term kind ",
                  numbers[i], " is not known");
      terms.push_back({static_cast<int64_t>(numbers[i]), numbers[i + 1], numbers[i + 2]});
    }
    TORCH_CHECK(Reduction::kNone <= reduction && reduction <= Reduction::kSum,
                "objkern: reduction: expected 0, 1 or 2 but got ", a[kReduction].toInt());
    const auto size = static_cast<int64_t>(terms.size());
    check_allocated("normalizer", normalizer);
    TORCH_CHECK(!coefficient_tensor.has_value() || coefficient_tensor->sizes() == at::IntArrayRef{size},
                "objkern: coefficient_tensor: expected one coefficient for each of ", size, " terms");
    TORCH_CHECK(!normalizer.has_value() || normalizer->dim() == 0, "objkern: normalizer: expected a 0-dim tensor but ",
                "got ", normalizer->sizes());
  }
};

struct ObjectiveArguments : RowArguments, ProgramArguments {  // in the order of OBJKERN_OBJECTIVE_ARGUMENTS
  explicit ObjectiveArguments(c10::ArrayRef<IValue> a)
      : RowArguments(a.slice(kRows, kRowArguments)), ProgramArguments(a, kCoefficientTensor, kTermKinds) {
    TORCH_CHECK_VALUE(target.has_value() || (reads() & (kLogprob | kOtherLogprob)) == 0,
                      "objkern: target: a term needs one but got None");
    TORCH_CHECK_VALUE(reference.has_value() || (reads() & kDivergences) == 0,
                      "reference: KLDivergence needs one but got None");
  }

  int64_t reads() const {
    int64_t all = 0;
    for (const Term& term : terms) all |= reads_of(static_cast<TermKind>(term.kind), term.parameter);
    return all;
  }

  // How many fields of RowGradient their gradient has.
  int64_t row_gradient_fields() const {
    const bool dense = target.has_value() && target->scalar_type() != at::kLong;
    return objkern::row_gradient_fields(reads(), class_weight.has_value(), dense);
  }

  // A dense target has no zeros where label smoothing lifts them.
  bool smoothed() const {
    bool any = false;
    for (const Term& term : terms)
      any |= static_cast<TermKind>(term.kind) == TermKind::kCrossEntropy && term.parameter > 0;
    return any;
  }
};

struct ElementArguments : ProgramArguments {  // in the order of OBJKERN_ELEMENT_ARGUMENTS
  Tensor input;
  std::optional<Tensor> target, logit_scale, weight, pos_weight;
  double softcap;
  bool limits;

  explicit ElementArguments(c10::ArrayRef<IValue> a)
      : ProgramArguments(a, kElementCoefficients, kElementKinds),
        input(a[kInput].toTensor()),
        target(optional_tensor(a[kElementTarget])),
        logit_scale(optional_tensor(a[kElementScale])),
        weight(optional_tensor(a[kWeight])),
        pos_weight(optional_tensor(a[kPosWeight])),
        softcap(a[kPosWeight + 1].toDouble()),
        limits(a[kPosWeight + 2].toBool()) {
    TORCH_CHECK_VALUE(softcap >= 0, "objkern: softcap: expected a number >= 0 but got ", softcap);
  }
};

// A raw view of the elements, and tensors that live as long as it does. The logit scale is left to the backend.
struct ElementBatch {
  Elements elements;
  Tensor input, target, weight, pos_weight;

  explicit ElementBatch(const ElementArguments& in) : input(allocated("input", in.input).contiguous()) {
    check_allocated("target", in.target);
    check_allocated("weight", in.weight);
    check_allocated("pos_weight", in.pos_weight);
    check_allocated("logit_scale", in.logit_scale);
    elements.dtype = dtype_of(input);
    elements.input = input.const_data_ptr();
    elements.count = input.numel();
    elements.softcap = in.softcap;
    elements.limits = in.limits;
    const auto wide = accumulation_type(input);
    if (in.target.has_value()) {
      TORCH_CHECK(in.target->sizes() == input.sizes(), "objkern: target: expected the shape ", input.sizes(),
                  " but got ", in.target->sizes());
      const bool same = in.target->scalar_type() == input.scalar_type();
      target = (same ? *in.target : in.target->to(wide)).contiguous();
      elements.target = target.const_data_ptr();
      elements.target_dtype = dtype_of(target);
    }
    weight = repeated("weight", in.weight, elements.weight, elements.weight_period);
    pos_weight = repeated("pos_weight", in.pos_weight, elements.pos_weight, elements.pos_weight_period);
  }

 private:
  // Numbers that broadcast to the input: once if they repeat over its first dimensions, otherwise one for each element.
  Tensor repeated(const char* name, const std::optional<Tensor>& given, const void*& pointer, int64_t& period) const {
    if (!given.has_value() || elements.count == 0) return {};
    TORCH_CHECK_TYPE(!given->is_complex(), "objkern: ", name, ": expected real numbers");
    TORCH_CHECK(at::is_expandable_to(given->sizes(), input.sizes()), "objkern: ", name,
                ": expected a shape that broadcasts to ", input.sizes(), " but got ", given->sizes());
    Tensor numbers = given->to(accumulation_type(input));
    int64_t dim = 0;  // leading dimensions of size 1 repeat
    while (dim < numbers.dim() && numbers.size(dim) == 1) ++dim;
    const auto own = numbers.sizes().slice(dim);
    const bool repeats = own == input.sizes().slice(input.dim() - static_cast<int64_t>(own.size()));
    numbers = (repeats ? numbers : numbers.expand(input.sizes())).contiguous();
    pointer = numbers.const_data_ptr();
    period = numbers.numel();
    return numbers;
  }
};

// A raw view of the rows, and tensors that live as long as it does. The logit scale, a number that may lie on a
// device, is left to the backend.
struct Batch {
  Rows rows;
  Tensor logits, target, class_weight, reference;

  explicit Batch(const RowArguments& in, int64_t reads = kEverything) {
    TORCH_CHECK(in.logits.dim() == 2, "objkern: logits: expected (rows, classes) but got ", in.logits.sizes());
    allocated("logits", in.logits);
    for (const auto& [name, t] : {std::pair{"target", &in.target}, std::pair{"logit_scale", &in.logit_scale},
                                  std::pair{"class_weight", &in.class_weight}, std::pair{"reference", &in.reference}})
      check_allocated(name, *t);
    logits = with_unit_class_stride(in.logits);
    rows.dtype = dtype_of(logits);
    rows.logits = logits.const_data_ptr();
    rows.rows = logits.size(0);
    rows.classes = logits.size(1);
    rows.row_stride = logits.stride(0);
    rows.reads = in.known(reads);
    TORCH_CHECK(rows.classes > 0, "objkern: logits: expected at least one class but got ", in.logits.sizes());
    rows.ignore_index = in.ignore_index;
    rows.softcap = in.softcap;
    rows.masked = in.masked;
    TORCH_CHECK_VALUE(in.softcap >= 0, "objkern: softcap: expected a number >= 0 but got ", in.softcap);
    for (const auto& [name, t] : {std::pair{"target", &in.target}, std::pair{"logit_scale", &in.logit_scale},
                                  std::pair{"class_weight", &in.class_weight}, std::pair{"reference", &in.reference}})
      TORCH_CHECK_TYPE(!t->has_value() || !(*t)->is_complex(), "objkern: ", name, ": expected real numbers");
    TORCH_CHECK_VALUE(!in.logit_scale.has_value() || in.logit_scale->dim() == 0,
                      "objkern: logit_scale: expected a 0-dim tensor but got ", in.logit_scale->sizes());
    if (in.target.has_value() && in.target->scalar_type() == at::kLong) {
      TORCH_CHECK(in.target->dim() == 1 && in.target->size(0) == rows.rows, "objkern: target: expected (", rows.rows,
                  ") labels but got ", in.target->sizes());
      target = in.target->contiguous();
      rows.target = target.const_data_ptr<int64_t>();
    } else if (in.target.has_value()) {
      TORCH_CHECK(in.target->sizes() == logits.sizes(), "objkern: target: expected probabilities of shape ",
                  logits.sizes(), " but got ", in.target->sizes());
      target = as_read(*in.target);
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
    if (in.reference.has_value() && (rows.reads & kDivergences) != 0) {
      TORCH_CHECK_VALUE(in.masked, "objkern: reference: logits of −inf have to be excluded classes beside it");
      TORCH_CHECK_VALUE(in.temperature > 0, "objkern: temperature: expected a number > 0 but got ", in.temperature);
      TORCH_CHECK_VALUE(in.reference->sizes() == logits.sizes(), "objkern: reference: expected logits of shape ",
                        logits.sizes(), " but got ", in.reference->sizes());
      reference = as_read(*in.reference);
      rows.reference = reference.const_data_ptr();
      rows.reference_dtype = dtype_of(reference);
      rows.reference_stride = reference.stride(0);
      rows.temperature = in.temperature;
    }
  }

 private:
  // A (rows, classes) tensor beside the logits, of their type or the accumulation type.
  Tensor as_read(const Tensor& t) const {
    const bool same = t.scalar_type() == logits.scalar_type();
    return with_unit_class_stride(same ? t : t.to(accumulation_type(logits)));
  }
};

// ---- what an earlier op of the same call kept ---------------------------------------------------------------------

inline void check_row_gradient(const ObjectiveArguments& in, const Batch& batch, const Tensor& row_gradient) {
  TORCH_CHECK(row_gradient.is_contiguous() && row_gradient.dim() == 2 &&
                  row_gradient.size(0) == in.row_gradient_fields() && row_gradient.size(1) == batch.rows.rows &&
                  row_gradient.scalar_type() == accumulation_type(batch.logits),
              "objkern: row_gradient does not belong to these logits");
}

inline void check_gradient(const RowArguments& in, const Tensor& gradient, bool may_be_half) {
  const auto type = gradient.scalar_type();
  const bool half = (type == at::kHalf || type == at::kBFloat16) && in.logits.scalar_type() == at::kFloat;
  TORCH_CHECK(gradient.is_contiguous() && gradient.sizes() == in.logits.sizes() &&
                  (type == in.logits.scalar_type() || (may_be_half && half)),
              "objkern: gradient does not belong to these logits");
}

// Where a gradient goes: nowhere, to new memory, or to a tensor that is the last argument of an op's overload `into`.
enum class To { kNowhere, kNew, kGiven };

inline Tensor take_given(torch::jit::Stack* stack, To to) {
  return to == To::kGiven ? torch::jit::pop(*stack).toTensor() : Tensor();
}

// The kernels of a device, boxed functions of these names.
#define OBJKERN_IMPLEMENT(m)                                                                                         \
  m.impl("objective", torch::CppFunction::makeFromBoxedFunction<&objective>());                                      \
  m.impl("fused", torch::CppFunction::makeFromBoxedFunction<&fused<To::kNew>>());                                    \
  m.impl("fused.into", torch::CppFunction::makeFromBoxedFunction<&fused<To::kGiven>>());                             \
  m.impl("rescale", torch::CppFunction::makeFromBoxedFunction<&rescale>());                                          \
  m.impl("gradient", torch::CppFunction::makeFromBoxedFunction<&gradient<To::kNew>>());                              \
  m.impl("gradient.into", torch::CppFunction::makeFromBoxedFunction<&gradient<To::kGiven>>());                       \
  m.impl("statistics", torch::CppFunction::makeFromBoxedFunction<&statistics>());                                    \
  m.impl("statistics_gradient", torch::CppFunction::makeFromBoxedFunction<&statistics_gradient<To::kNew>>());        \
  m.impl("statistics_gradient.into", torch::CppFunction::makeFromBoxedFunction<&statistics_gradient<To::kGiven>>()); \
  m.impl("elementwise", torch::CppFunction::makeFromBoxedFunction<&elementwise<false>>());                           \
  m.impl("elementwise_fused", torch::CppFunction::makeFromBoxedFunction<&elementwise<true>>());                      \
  m.impl("elementwise_rescale", torch::CppFunction::makeFromBoxedFunction<&elementwise_rescale>());                  \
  m.impl("elementwise_gradient", torch::CppFunction::makeFromBoxedFunction<&elementwise_gradient>())

inline void check_partials(const Batch& batch, const Tensor& partials, const Tensor& centred) {
  const int64_t n = batch.rows.rows;
  TORCH_CHECK(centred.is_contiguous() && centred.dim() == 2 && centred.size(1) == n && centred.size(0) == kCentred &&
                  centred.scalar_type() == at::kDouble,
              "objkern: centred sums do not belong to these logits");
  TORCH_CHECK(partials.dim() == 2 && partials.size(0) == kStatistics && partials.size(1) == n,
              "objkern: partials: expected (", kStatistics, ", ", n, ") but got ", partials.sizes());
}

}  // namespace objkern
