// The derivatives of the ops, for every backend. Written once, over boxed arguments: an op whose arguments are
// x_1, ..., x_n and whose results are (y, ..., kept) has a gradient op of (∂L/∂y, kept, unscaled, x_1, ..., x_n) ↦
// ∂L/∂logits.
//
//   objective, fused  ── ObjectiveBackward ──▶ gradient             ── GradientBackward ──▶ reference_second_order
//   statistics        ── StatisticsBackward ─▶ statistics_gradient  ── GradientBackward ──▶ reference_second_order
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

// The ops that a backward pass calls: those of the family of the forward op, and the reference, which all share.
struct Family {
  c10::OperatorHandle gradient, rescale, statistics_gradient;
  c10::OperatorHandle reference_gradient = find("objkern::reference_gradient"),
                      reference_second_order = find("objkern::reference_second_order"),
                      reference_statistics_gradient = find("objkern::reference_statistics_gradient"),
                      reference_statistics_second_order = find("objkern::reference_statistics_second_order");

  explicit Family(const std::string& name)
      : gradient(find(name + "::gradient")),
        rescale(find(name + "::rescale")),
        statistics_gradient(find(name + "::statistics_gradient")) {}

  static const Family& of(const c10::OperatorHandle& op) {
    static const Family native("objkern"), triton("objkern_triton");
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

// The places of the differentiable arguments.
const std::vector<int> objective_places{kRows + kLogits, kRows + kTarget, kRows + kLogitScale, kCoefficientTensor};
const std::vector<int> statistics_places{kLogits, kTarget, kLogitScale};

constexpr int kBeforeArguments = 3;  // in a gradient op: ∂L/∂y, which is differentiable too, kept, unscaled

std::vector<int> in_gradient_op(const std::vector<int>& places) {
  std::vector<int> found{0};
  for (const int place : places) found.push_back(kBeforeArguments + place);
  return found;
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
  const c10::OperatorHandle& second_order;

  GradientBackward(c10::ArrayRef<IValue> arguments_, const std::vector<int>& places,
                   const c10::OperatorHandle& second_order_)
      : RowsBackward(arguments_, places), second_order(second_order_) {}

  std::string name() const override { return "GradientBackward"; }

  variable_list apply(variable_list&& grads) override {
    if (!grads[0].defined()) return variable_list(differentiable.size());
    const std::lock_guard<std::mutex> lock(mutex_);
    Stack saved;
    arguments.append_to(saved);
    return through_reference(second_order, {IValue(grads[0]), saved[0]},
                             c10::ArrayRef<IValue>(saved).slice(kBeforeArguments), needed());
  }
};

// The derivatives of objective, fused and statistics.
struct ForwardBackward : RowsBackward {
  SavedVariable kept;
  const c10::OperatorHandle& gradient_op;
  const c10::OperatorHandle& reference_op;

  ForwardBackward(c10::ArrayRef<IValue> arguments_, const std::vector<int>& places,
                  const c10::OperatorHandle& gradient_op_, const c10::OperatorHandle& reference_op_)
      : RowsBackward(arguments_, places), gradient_op(gradient_op_), reference_op(reference_op_) {}

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
    reference[1] = need[1];  // the target
    if (std::find(reference.begin(), reference.end(), true) != reference.end()) {
      found = through_reference(reference_op, {IValue(upstream)}, inputs, reference);
    }
    // Unpacked once: a checkpoint computes what it unpacks anew, and refuses to do so twice.
    const bool to_logits = need[0] && !reference[0], to_scale = need[2] && !reference[2];
    const Tensor kept_ = to_logits || to_scale ? kept.unpack() : Tensor();
    if (to_logits) found[0] = finished_gradient(upstream, kept_, inputs);
    if (to_logits && !found[0].defined()) found[0] = gradient(upstream, kept_, inputs, false);
    if (to_scale) {
      const int rows = differentiable[0] - kLogits;
      const Tensor logits = inputs[rows + kLogits].toTensor();
      const bool doubles = logits.scalar_type() == at::kDouble;
      Stack wide = inputs;  // summed before it is rounded
      wide[rows + kLogits] = logits.to(doubles ? at::kDouble : at::kFloat);
      found[2] = scale_gradient(gradient(upstream, kept_, wide, true), logits, inputs[rows + kLogitScale].toTensor());
    }
    if (need.size() > 3 && need[3] && !reference[3]) found[3] = coefficient_gradient(upstream, inputs);
    return found;
  }

  Tensor gradient(const Tensor& upstream, const Tensor& kept_, const Stack& inputs, bool unscaled) const {
    Stack stack;
    stack.reserve(kBeforeArguments + inputs.size());
    torch::jit::push(stack, upstream, kept_, unscaled);
    stack.insert(stack.end(), inputs.begin(), inputs.end());
    gradient_op.callBoxed(stack);
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

  const c10::OperatorHandle& rescale_op;

  ObjectiveBackward(c10::ArrayRef<IValue> arguments_, const Family& family)
      : ForwardBackward(arguments_, objective_places, family.gradient, family.reference_gradient),
        rescale_op(family.rescale) {}

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
    Stack stack{IValue(gradient), IValue(upstream), IValue(row_gradient)};
    stack.insert(stack.end(), inputs.begin(), inputs.end());
    const at::AutoDispatchBelowADInplaceOrView guard;
    rescale_op.callBoxed(stack);
    return gradient;
  }

  bool coefficients_need_gradient() const { return next_edge(3).is_valid(); }

  // d loss / d coefficient is the term itself.
  Tensor coefficient_gradient(const Tensor& upstream, const Stack& inputs) override {
    const std::vector<double> terms = inputs[kTerms].toDoubleVector();
    const Tensor values = parts.unpack();
    std::vector<Tensor> found;
    for (size_t k = 0; 3 * k < terms.size(); ++k) {
      const Tensor own = values.select(0, static_cast<int64_t>(k)).to(at::kDouble) * upstream * terms[3 * k + 2];
      found.push_back(upstream.dim() == 0 ? own : own.sum());
    }
    return at::stack(found).to(inputs[kCoefficientTensor].toTensor().device());
  }

  void release_variables() override {
    ForwardBackward::release_variables();
    const std::lock_guard<std::mutex> lock(mutex_);
    parts.reset_data();
    finished.reset();
  }
};

struct StatisticsBackward final : ForwardBackward {
  StatisticsBackward(c10::ArrayRef<IValue> arguments_, const Family& family)
      : ForwardBackward(arguments_, statistics_places, family.statistics_gradient,
                        family.reference_statistics_gradient) {}

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
void forward_op(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack, const std::vector<int>& places,
                const F& record) {
  const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
  if (!requires_grad(arguments, places, op)) return call_below(op, keys, stack);
  auto node = make_node<N>(arguments, Family::of(op));
  call_below(op, keys, stack);
  const auto results = torch::jit::last(*stack, op.schema().returns().size());
  torch::autograd::set_history(results[0].toTensor(), node);
  record(*node, results);
}

void objective(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  forward_op<ObjectiveBackward>(
      op, keys, stack, objective_places, [](ObjectiveBackward& node, c10::ArrayRef<IValue> results) {
        TORCH_CHECK_VALUE(
            !node.coefficients_need_gradient() || results[1].toTensor().size(0) != 0,
            "objkern: coefficient_tensor requires a gradient, which is made of the parts: pass with_parts");
        node.parts = SavedVariable(results[1].toTensor(), false);
        node.kept = SavedVariable(results[2].toTensor(), false);
        if (results.size() > 3) node.finished = results[3].toTensor();
      });
}

void statistics(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  forward_op<StatisticsBackward>(op, keys, stack, statistics_places,
                                 [](StatisticsBackward& node, c10::ArrayRef<IValue> results) {
                                   node.kept = SavedVariable(results[1].toTensor(), false);
                                 });
}

void gradient_op(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack, const std::vector<int>& places,
                 const c10::OperatorHandle& second_order) {
  const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
  if (!requires_grad(arguments, places, op)) return call_below(op, keys, stack);
  TORCH_CHECK_NOT_IMPLEMENTED(!arguments[2].toBool(), op.schema().name(), ": no second derivative of `unscaled`");
  auto node = make_node<GradientBackward>(arguments, places, second_order);
  call_below(op, keys, stack);
  torch::autograd::set_history(stack->back().toTensor(), node);
}

void gradient(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  static const std::vector<int> places = in_gradient_op(objective_places);
  gradient_op(op, keys, stack, places, Family::of(op).reference_second_order);
}

void statistics_gradient(const c10::OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  static const std::vector<int> places = in_gradient_op(statistics_places);
  gradient_op(op, keys, stack, places, Family::of(op).reference_statistics_second_order);
}

void register_derivatives(torch::Library& m) {
  m.impl("objective", torch::CppFunction::makeFromBoxedFunction<&objective>());
  m.impl("fused", torch::CppFunction::makeFromBoxedFunction<&objective>());
  m.impl("statistics", torch::CppFunction::makeFromBoxedFunction<&statistics>());
  m.impl("gradient", torch::CppFunction::makeFromBoxedFunction<&gradient>());
  m.impl("statistics_gradient", torch::CppFunction::makeFromBoxedFunction<&statistics_gradient>());
}

}  // namespace

TORCH_LIBRARY_IMPL(objkern, Autograd, m) {
  register_derivatives(m);
}

TORCH_LIBRARY_IMPL(objkern_triton, Autograd, m) {
  register_derivatives(m);
}

}  // namespace objkern
