// The derivatives of the ops, for every backend. Written once, over boxed arguments: an op whose arguments are
// x_1, ..., x_n and whose results are (y, ..., kept) has a gradient op of (∂L/∂y, kept, unscaled, x_1, ..., x_n) ↦
// ∂L/∂x of the logits. Elementwise ops keep nothing.
//
//   objective, fused               ─▶ gradient              ─▶ reference_second_order
//   elementwise, elementwise_fused ─▶ elementwise_gradient  ─▶ reference_elementwise_second_order
//   statistics                     ─▶ statistics_gradient   ─▶ reference_statistics_second_order
//
// First derivatives to logits, logit scale and coefficients run in kernels. Derivatives to probability targets, and
// second derivatives, are taken through the reference (objkern/reference.py), which torch can differentiate.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "arguments.h"

namespace objkern {
namespace {

using at::Tensor;
using c10::IValue;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;
using torch::jit::Stack;
using NodePointer = std::decay_t<decltype(std::declval<torch::autograd::Edge>().function)>;

// torch 2.13 counts a node's references in the node; torch before it has shared_ptr.
template <class N, class... Arguments>
auto make_node(Arguments&&... arguments) {
  if constexpr (std::is_same_v<NodePointer, std::shared_ptr<Node>>) {
    return std::make_shared<N>(std::forward<Arguments>(arguments)...);
  } else {
    return c10::make_intrusive<N>(std::forward<Arguments>(arguments)...);
  }
}

Tensor tensor_or_undefined(const IValue& value) {
  return value.isTensor() ? value.toTensor() : Tensor();
}

c10::OperatorHandle find(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "");
}

// A kind of op: the ops that its backward pass calls, and the places of its differentiable arguments, which begin with
// logits, target and logit scale. What has no kernel for its derivative, anything but the logits, their scale and the
// coefficients, goes through the reference backend.
constexpr size_t kToLogits = 0, kToScale = 2;

struct Kind {
  const char *gradient, *rescale, *reference_gradient, *reference_second_order;
  int kept;  // which result the gradient op takes; −1: none
  std::vector<int> places;
  size_t coefficients;  // in `places`; past them: none

  bool has_kernel(size_t place) const { return place == kToLogits || place == kToScale || place == coefficients; }
};

const Kind objective_kind{
    "gradient",
    "rescale",
    "reference_gradient",
    "reference_second_order",
    2,
    {kRows + kLogits, kRows + kTarget, kRows + kLogitScale, kRows + kReference, kCoefficientTensor},
    4};
const Kind elementwise_kind{"elementwise_gradient",
                            "elementwise_rescale",
                            "reference_elementwise_gradient",
                            "reference_elementwise_second_order",
                            -1,
                            {kInput, kElementTarget, kElementScale, kWeight, kPosWeight, kElementCoefficients},
                            5};
const Kind statistics_kind{"statistics_gradient",
                           nullptr,
                           "reference_statistics_gradient",
                           "reference_statistics_second_order",
                           1,
                           {kLogits, kTarget, kLogitScale, kReference},
                           4};

// The ops of a kind in the family of the forward op; all families share the reference.
struct Ops {
  const Kind& kind;
  c10::OperatorHandle gradient, rescale, reference_gradient, reference_second_order;

  Ops(const std::string& family, const Kind& kind_)
      : kind(kind_),
        gradient(find(family + "::" + kind.gradient)),
        rescale(find(family + "::" + (kind.rescale == nullptr ? kind.gradient : kind.rescale))),
        reference_gradient(find(std::string("objkern::") + kind.reference_gradient)),
        reference_second_order(find(std::string("objkern::") + kind.reference_second_order)) {}

  int before_arguments() const { return kind.kept < 0 ? 2 : 3; }  // in the gradient op: ∂L/∂y, kept, unscaled

  std::vector<int> places_in_gradient_op() const {  // ∂L/∂y is differentiable too
    std::vector<int> found{0};
    for (const int place : kind.places) found.push_back(before_arguments() + place);
    return found;
  }

  template <const Kind& kKind>
  static const Ops& of(const c10::OperatorHandle& op) {
    static const Ops native("objkern", kKind), triton("objkern_triton", kKind);
    return op.schema().name().rfind("objkern::", 0) == 0 ? native : triton;
  }
};

// The arguments of a call, kept for its backward pass.
class SavedArguments {
 public:
  explicit SavedArguments(c10::ArrayRef<IValue> arguments) : values_(arguments.vec()) {
    tensors_.reserve(arguments.size());
    for (IValue& value : values_) {
      if (!value.isTensor()) continue;
      tensors_.emplace_back(value.toTensor(), /*is_output=*/false);
      value = place_of_tensor;
    }
  }

  void append_to(Stack& stack) const {
    stack.reserve(stack.size() + values_.size());
    auto tensor = tensors_.begin();
    for (const IValue& value : values_) {
      if (value.isTensor()) {
        stack.emplace_back((tensor++)->unpack());
      } else {
        stack.push_back(value);
      }
    }
  }

  void reset() {
    for (SavedVariable& tensor : tensors_) tensor.reset_data();
  }

 private:
  inline static const IValue place_of_tensor{Tensor()};
  std::vector<IValue> values_;
  std::vector<SavedVariable> tensors_;
};

bool is_tracing(const Tensor& t) {  // its numbers are not there to look at, or stand for others
  return t.is_meta() || t.key_set().has_any(c10::DispatchKeySet(
                            {c10::DispatchKey::Python, c10::DispatchKey::Functionalize, c10::DispatchKey::Batched,
                             c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::FuncTorchBatched}));
}

// dL/ds = Σ dL/d(s·x) x; what has no gradient (an excluded class, an ignored row) may be infinite.
Tensor scale_gradient(const Tensor& to_scaled, const Tensor& logits, const Tensor& scale) {
  return at::where(to_scaled == 0, to_scaled, to_scaled * logits).sum().to(scale.options());
}

// Gradients through the reference, for the differentiable arguments that `needed` marks; undefined for the others.
variable_list through_reference(const c10::OperatorHandle& op, Stack stack, c10::ArrayRef<IValue> arguments,
                                const std::vector<bool>& needed) {
  c10::List<bool> mask;
  for (const bool need : needed) mask.push_back(need);
  stack.emplace_back(mask);
  stack.insert(stack.end(), arguments.begin(), arguments.end());
  op.callBoxed(stack);
  const auto found = stack.back().toTensorVector();
  variable_list gradients(needed.size());
  for (size_t i = 0, next = 0; i < needed.size(); ++i)
    if (needed[i]) gradients[i] = found.at(next++);
  return gradients;
}

// What the backward passes of all the ops share: saved arguments, and one result that is differentiable.
struct RowsBackward : Node {
  SavedArguments arguments;
  const std::vector<int>& differentiable;  // places in the arguments

  RowsBackward(c10::ArrayRef<IValue> arguments_, const std::vector<int>& places)
      : arguments(arguments_), differentiable(places) {
    torch::autograd::edge_list edges;
    edges.reserve(places.size());
    for (const int place : differentiable) {
      const Tensor t = tensor_or_undefined(arguments_[place]);
      edges.push_back(t.defined() && t.requires_grad() ? torch::autograd::impl::gradient_edge(t)
                                                       : torch::autograd::Edge());
    }
    set_next_edges(std::move(edges));
  }

  std::vector<bool> needed() const {
    std::vector<bool> mask;
    for (size_t i = 0; i < differentiable.size(); ++i) mask.push_back(task_should_compute_output(i));
    return mask;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    arguments.reset();
  }
};

// The derivatives of a gradient op of (∂L/∂y, kept, unscaled, arguments...).
struct GradientBackward final : RowsBackward {
  const Ops& ops;

  GradientBackward(c10::ArrayRef<IValue> arguments_, const std::vector<int>& places, const Ops& ops_)
      : RowsBackward(arguments_, places), ops(ops_) {}

  std::string name() const override { return "GradientBackward"; }

  variable_list apply(variable_list&& grads) override {
    if (!grads[0].defined()) return variable_list(differentiable.size());
    const std::lock_guard<std::mutex> lock(mutex_);
    Stack saved;
    arguments.append_to(saved);
    return through_reference(ops.reference_second_order, {IValue(grads[0]), saved[0]},
                             c10::ArrayRef<IValue>(saved).slice(ops.before_arguments()), needed());
  }
};

// The derivatives of a forward op.
struct ForwardBackward : RowsBackward {
  SavedVariable kept;
  const Ops& ops;

  ForwardBackward(c10::ArrayRef<IValue> arguments_, const Ops& ops_)
      : RowsBackward(arguments_, ops_.kind.places), ops(ops_) {}

  // What differs: a gradient that is there already, and the coefficients.
  virtual Tensor finished_gradient(const Tensor&, const Tensor&, const Stack&) { return {}; }
  virtual Tensor coefficient_gradient(const Tensor&, const Stack&) { return {}; }

  variable_list apply(variable_list&& grads) override {
    variable_list found(differentiable.size());
    if (!grads[0].defined()) return found;
    const std::lock_guard<std::mutex> lock(mutex_);
    const Tensor upstream = grads[0];
    Stack inputs;
    arguments.append_to(inputs);
    std::vector<bool> need = needed();
    // A gradient that can be differentiated again comes from the reference, but for the common case: the gradient op
    // of the logits has a derivative of its own.
    const bool only_logits = std::find(need.begin() + 1, need.end(), true) == need.end();
    std::vector<bool> reference = need;
    if (!at::GradMode::is_enabled() || only_logits) reference.assign(need.size(), false);
    for (size_t i = 0; i < need.size(); ++i)
      if (!ops.kind.has_kernel(i)) reference[i] = need[i];
    if (std::find(reference.begin(), reference.end(), true) != reference.end()) {
      found = through_reference(ops.reference_gradient, {IValue(upstream)}, inputs, reference);
    }
    // Unpacked once: a checkpoint computes what it unpacks anew, and refuses to do so twice.
    const bool to_logits = need[kToLogits] && !reference[kToLogits], to_scale = need[kToScale] && !reference[kToScale];
    const Tensor kept_ = (to_logits || to_scale) && ops.kind.kept >= 0 ? kept.unpack() : Tensor();
    if (to_logits) found[kToLogits] = finished_gradient(upstream, kept_, inputs);
    if (to_logits && !found[kToLogits].defined()) found[kToLogits] = gradient(upstream, kept_, inputs, false);
    if (to_scale) {
      const Tensor logits = inputs[differentiable[kToLogits]].toTensor();
      const bool doubles = logits.scalar_type() == at::kDouble;
      Stack wide = inputs;  // summed before it is rounded
      wide[differentiable[kToLogits]] = logits.to(doubles ? at::kDouble : at::kFloat);
      found[kToScale] =
          scale_gradient(gradient(upstream, kept_, wide, true), logits, inputs[differentiable[kToScale]].toTensor());
    }
    const size_t coefficients = ops.kind.coefficients;
    if (coefficients < need.size() && need[coefficients] && !reference[coefficients])
      found[coefficients] = coefficient_gradient(upstream, inputs);
    return found;
  }

  Tensor gradient(const Tensor& upstream, const Tensor& kept_, const Stack& inputs, bool unscaled) const {
    Stack stack;
    stack.reserve(ops.before_arguments() + inputs.size());
    stack.emplace_back(upstream);
    if (ops.kind.kept >= 0) stack.emplace_back(kept_);
    stack.emplace_back(unscaled);
    stack.insert(stack.end(), inputs.begin(), inputs.end());
    ops.gradient.callBoxed(stack);
    return stack.back().toTensor();
  }

  void release_variables() override {
    RowsBackward::release_variables();
    const std::lock_guard<std::mutex> lock(mutex_);
    kept.reset_data();
  }
};

struct ObjectiveBackward final : ForwardBackward {
  SavedVariable parts;
  Tensor finished;  // by the forward pass; handed over once, a second backward pass computes its own

  using ForwardBackward::ForwardBackward;

  std::string name() const override { return "ObjectiveBackward"; }

  // In place, and then undefined if whoever called the op by hand holds the gradient too.
  Tensor finished_gradient(const Tensor& upstream, const Tensor& row_gradient, const Stack& inputs) override {
    if (!finished.defined() || at::GradMode::is_enabled()) return {};
    const Tensor gradient = std::exchange(finished, Tensor());
    if (is_tracing(gradient) || is_tracing(upstream)) {
      const bool half = gradient.scalar_type() == at::kHalf || gradient.scalar_type() == at::kBFloat16;
      return half ? Tensor() : gradient * upstream;  // rounded already, half precision would lose digits
    }
    if (!torch::autograd::impl::is_tensor_stealable(gradient)) return {};  // its Python object counts as an owner too
    Stack stack{IValue(gradient), IValue(upstream)};
    if (ops.kind.kept >= 0) stack.emplace_back(row_gradient);
    stack.insert(stack.end(), inputs.begin(), inputs.end());
    const at::AutoDispatchBelowADInplaceOrView guard;
    ops.rescale.callBoxed(stack);
    return gradient;
  }

  bool coefficients_need_gradient() const { return next_edge(ops.kind.coefficients).is_valid(); }

  // d loss / d coefficient is the term itself.
  Tensor coefficient_gradient(const Tensor& upstream, const Stack& inputs) override {
    const std::vector<double> terms = inputs[kTerms].toDoubleVector();
    const Tensor values = parts.unpack();
    std::vector<Tensor> found;
    for (size_t k = 0; 3 * k < terms.size(); ++k) {
      const Tensor own = values.select(0, static_cast<int64_t>(k)).to(at::kDouble) * upstream * terms[3 * k + 2];
      found.push_back(upstream.dim() == 0 ? own : own.sum());
    }
    return at::stack(found).to(inputs[differentiable[ops.kind.coefficients]].toTensor().device());
  }

  void release_variables() override {
    ForwardBackward::release_variables();
    const std::lock_guard<std::mutex> lock(mutex_);
    parts.reset_data();
    finished.reset();
  }
};

struct StatisticsBackward final : ForwardBackward {
  using ForwardBackward::ForwardBackward;
  std::string name() const override { return "StatisticsBackward"; }
};

// ---- the ops at the autograd key ----------------------------------------------------------------------------------

bool requires_grad(c10::ArrayRef<IValue> arguments, const std::vector<int>& places, const c10::OperatorHandle& op) {
  bool any = false;
  for (const int place : places) {
    if (!arguments[place].isTensor()) continue;
    const Tensor& t = arguments[place].toTensor();
    TORCH_CHECK_NOT_IMPLEMENTED(!torch::autograd::isFwGradDefined(t), op.schema().name(),
                                ": forward-mode derivatives are not implemented; use reverse mode, or "
                                "backend=\"reference\"");
    any |= t.requires_grad();
  }
  return any && at::GradMode::is_enabled();
}

void call_below(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

// `record(node, results)` fills the node of N with what the results hold.
template <class N, class F>
void forward_op(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack, const Ops& ops,
                const F& record) {
  const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
  if (!requires_grad(arguments, ops.kind.places, op)) return call_below(op, keys, stack);
  auto node = make_node<N>(arguments, ops);
  call_below(op, keys, stack);
  const auto results = torch::jit::last(*stack, op.schema().returns().size());
  torch::autograd::set_history(results[0].toTensor(), node);
  if (ops.kind.kept >= 0) node->kept = SavedVariable(results[ops.kind.kept].toTensor(), false);
  record(*node, results);
}

template <const Kind& kKind>
void objective(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  forward_op<ObjectiveBackward>(
      op, keys, stack, Ops::of<kKind>(op), [](ObjectiveBackward& node, c10::ArrayRef<IValue> results) {
        TORCH_CHECK_VALUE(
            !node.coefficients_need_gradient() || results[1].toTensor().size(0) != 0,
            "objkern: coefficient_tensor requires a gradient, which is made of the parts: pass with_parts");
        node.parts = SavedVariable(results[1].toTensor(), false);
        const size_t gradient = kKind.kept < 0 ? 2 : 3;  // of the fused op
        if (results.size() > gradient) node.finished = results[gradient].toTensor();
      });
}

void statistics(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  forward_op<StatisticsBackward>(op, keys, stack, Ops::of<statistics_kind>(op),
                                 [](StatisticsBackward&, c10::ArrayRef<IValue>) {});
}

template <const Kind& kKind>
void gradient_op(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  const Ops& ops = Ops::of<kKind>(op);
  static const std::vector<int> places = ops.places_in_gradient_op();
  const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
  if (!requires_grad(arguments, places, op)) return call_below(op, keys, stack);
  TORCH_CHECK_NOT_IMPLEMENTED(!arguments[ops.before_arguments() - 1].toBool(), op.schema().name(),
                              ": no second derivative of `unscaled`");
  auto node = make_node<GradientBackward>(arguments, places, ops);
  call_below(op, keys, stack);
  torch::autograd::set_history(stack->back().toTensor(), node);
}

void register_derivatives(torch::Library& m) {
  using torch::CppFunction;
  m.impl("objective", CppFunction::makeFromBoxedFunction<&objective<objective_kind>>());
  m.impl("fused", CppFunction::makeFromBoxedFunction<&objective<objective_kind>>());
  m.impl("gradient", CppFunction::makeFromBoxedFunction<&gradient_op<objective_kind>>());
  m.impl("elementwise", CppFunction::makeFromBoxedFunction<&objective<elementwise_kind>>());
  m.impl("elementwise_fused", CppFunction::makeFromBoxedFunction<&objective<elementwise_kind>>());
  m.impl("elementwise_gradient", CppFunction::makeFromBoxedFunction<&gradient_op<elementwise_kind>>());
  m.impl("statistics", CppFunction::makeFromBoxedFunction<&statistics>());
  m.impl("statistics_gradient", CppFunction::makeFromBoxedFunction<&gradient_op<statistics_kind>>());
}

}  // namespace

TORCH_LIBRARY_IMPL(objkern, Autograd, m) {
  register_derivatives(m);
}

TORCH_LIBRARY_IMPL(objkern_triton, Autograd, m) {
  register_derivatives(m);
}

}  // namespace objkern
