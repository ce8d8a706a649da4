// The short way from Python to the ops, for the call that most are: class labels, and every option left at its default.
// Checking such a call in Python and boxing it by its schema costs the host as much again as all the rest of a small
// forward pass. What is in any way unusual is left to the general way, which also knows what to say of a bad argument.
#include "default_call.h"

#include <ATen/ATen.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <optional>

#include "arguments.h"
#include "rows.h"

namespace objkern {
namespace {

using at::Tensor;
using c10::IValue;

bool usual(const Tensor& logits, const Tensor& target) {
  const at::ScalarType type = logits.scalar_type();
  return (type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble) &&
         logits.dim() == 2 && target.dim() == 1 && target.scalar_type() == at::kLong && logits.size(1) > 0 &&
         target.size(0) == logits.size(0) && target.device() == logits.device() && logits.layout() == at::kStrided &&
         target.layout() == at::kStrided;
}

bool same_objects(PyObject* given, PyObject* defaults) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(given); ++i)
    if (PyTuple_GET_ITEM(given, i) != PyTuple_GET_ITEM(defaults, i)) return false;
  return true;
}

std::optional<c10::List<double>> numbers(PyObject* list) {
  c10::List<double> found;
  found.reserve(PyList_GET_SIZE(list));
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
    PyObject* const number = PyList_GET_ITEM(list, i);
    if (PyFloat_CheckExact(number)) {
      found.push_back(PyFloat_AS_DOUBLE(number));
    } else if (PyLong_CheckExact(number)) {
      found.push_back(PyLong_AsDouble(number));
      if (PyErr_Occurred()) throw python_error();
    } else {
      return std::nullopt;
    }
  }
  return found;
}

}  // namespace

PyObject* default_call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 7 && PyList_CheckExact(arguments[3]) && PyTuple_CheckExact(arguments[5]) &&
                  PyTuple_CheckExact(arguments[6]) && PyTuple_GET_SIZE(arguments[5]) == PyTuple_GET_SIZE(arguments[6]),
              "default_call: expected (triton, logits, target, terms, masked, options, defaults)");
  if (!THPVariable_CheckExact(arguments[1]) || !THPVariable_CheckExact(arguments[2]) ||
      !same_objects(arguments[5], arguments[6]) || at::impl::torch_function_mode_enabled() ||
      c10::impl::dispatch_mode_enabled())
    Py_RETURN_NONE;
  const Tensor &logits = THPVariable_Unpack(arguments[1]), &target = THPVariable_Unpack(arguments[2]);
  if (!usual(logits, target)) Py_RETURN_NONE;
  auto terms = numbers(arguments[3]);
  if (!terms.has_value()) Py_RETURN_NONE;

  static const auto find = [](const char* name) { return c10::Dispatcher::singleton().findSchemaOrThrow(name, ""); };
  static const c10::OperatorHandle native = find("objkern::objective"), triton = find("objkern_triton::objective");
  const c10::OperatorHandle& op = arguments[0] == Py_True ? triton : native;
  torch::jit::Stack stack;
  stack.reserve(kObjectiveArguments);
  torch::jit::push(stack, std::move(*terms), static_cast<int64_t>(Reduction::kMean), logits, target);
  const auto& all = op.schema().arguments();
  for (size_t i = stack.size(); i < all.size(); ++i) stack.push_back(*all[i].default_value());
  stack[kMasked] = arguments[4] == Py_True;
  {
    pybind11::gil_scoped_release without_the_lock;
    op.callBoxed(stack);
  }
  return THPVariable_Wrap(std::move(stack[0]).toTensor());
  END_HANDLE_TH_ERRORS
}

}  // namespace objkern
