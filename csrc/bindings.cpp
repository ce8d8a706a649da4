// The ops' schemas. Their derivatives are in autograd.cpp, their kernels in bindings_cpu.cpp and bindings_cuda.cpp,
// over the arguments that batch.h parses; default_call.cpp is a short way to them. No other file sees a tensor. The
// pybind11 module at the end carries build facts, and scalar doors through which tests hold objective.h against
// terms.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "build_facts.h"
#include "cpu/buffers.h"
#include "cpu/kernels.h"
#include "default_call.h"
#include "objective.h"
#ifdef OBJKERN_HAS_CUDA
#include "cuda/kernels.h"
#endif

namespace objkern {

namespace {

// One set of ops for every family of kernels: `objkern` dispatches to the native ones of the logits' device,
// `objkern_triton` to those that objkern/triton registers.
void define_kernels(torch::Library& m) {
  m.def("objective(" OBJKERN_OBJECTIVE_ARGUMENTS ") -> (Tensor loss, Tensor parts, Tensor row_gradient)");
  m.def("fused(" OBJKERN_OBJECTIVE_ARGUMENTS ") -> (Tensor loss, Tensor parts, Tensor row_gradient, Tensor gradient)");
  // `.into`: the gradient goes to a tensor of the logits' dtype or, if they are float32, of a half-precision one.
  m.def("fused.into(" OBJKERN_OBJECTIVE_ARGUMENTS
        ", *, Tensor(a!) gradient) -> (Tensor loss, Tensor parts, Tensor row_gradient)");
  // Logits here may be those of a part of the vocabulary: a label outside of it is one of another part.
  m.def("gradient(Tensor upstream, Tensor row_gradient, bool unscaled, " OBJKERN_OBJECTIVE_ARGUMENTS ") -> Tensor");
  m.def("gradient.into(Tensor upstream, Tensor row_gradient, bool unscaled, " OBJKERN_OBJECTIVE_ARGUMENTS
        ", *, Tensor(a!) gradient) -> ()");
  // From the gradient of `fused`, which is that under an upstream gradient of 1, to that under `upstream`.
  m.def("rescale(Tensor(a!) gradient, Tensor upstream, Tensor row_gradient, " OBJKERN_OBJECTIVE_ARGUMENTS ") -> ()");
  m.def("statistics(" OBJKERN_ROW_ARGUMENTS ") -> (Tensor statistics, Tensor centred)");
  m.def("elementwise(" OBJKERN_ELEMENT_ARGUMENTS ") -> (Tensor loss, Tensor parts)");
  m.def("elementwise_fused(" OBJKERN_ELEMENT_ARGUMENTS ") -> (Tensor loss, Tensor parts, Tensor gradient)");
  m.def("elementwise_gradient(Tensor upstream, bool unscaled, " OBJKERN_ELEMENT_ARGUMENTS ") -> Tensor");
  m.def("elementwise_rescale(Tensor(a!) gradient, Tensor upstream, " OBJKERN_ELEMENT_ARGUMENTS ") -> ()");
  m.def("statistics_gradient(Tensor partials, Tensor centred, bool unscaled, " OBJKERN_ROW_ARGUMENTS ") -> Tensor");
  m.def("statistics_gradient.into(Tensor partials, Tensor centred, bool unscaled, " OBJKERN_ROW_ARGUMENTS
        ", *, Tensor(a!) gradient) -> ()");
}

}  // namespace

TORCH_LIBRARY(objkern_triton, m) {
  define_kernels(m);
}

TORCH_LIBRARY(objkern, m) {
  define_kernels(m);
  // A penalty on many parameters of one device, as objkern/penalties.py has it, where there are kernels for that.
#define OBJKERN_PENALTY "Tensor[] parameters, Tensor[] origins, Tensor[] weights, float l1, float l2"
  m.def("multi_penalty(" OBJKERN_PENALTY ") -> Tensor");
  m.def("multi_penalty_gradient(Tensor upstream, " OBJKERN_PENALTY ") -> Tensor[]");
  m.def("multi_penalty_accumulate_(Tensor(a!)[] gradients, Tensor upstream, " OBJKERN_PENALTY ") -> ()");
  // Derivatives through the reference, implemented in objkern/ops.py, for the differentiable arguments that `needed`
  // marks: logits, target, logit scale, reference and coefficients; in the second order the upstream gradient before
  // them.
  m.def("reference_gradient(Tensor upstream, bool[] needed, " OBJKERN_OBJECTIVE_ARGUMENTS ") -> Tensor[]");
  m.def("reference_second_order(Tensor grad, Tensor upstream, bool[] needed, " OBJKERN_OBJECTIVE_ARGUMENTS
        ") -> Tensor[]");
  m.def("reference_elementwise_gradient(Tensor upstream, bool[] needed, " OBJKERN_ELEMENT_ARGUMENTS ") -> Tensor[]");
  m.def("reference_elementwise_second_order(Tensor grad, Tensor upstream, bool[] needed, " OBJKERN_ELEMENT_ARGUMENTS
        ") -> Tensor[]");
  m.def("reference_statistics_gradient(Tensor partials, bool[] needed, " OBJKERN_ROW_ARGUMENTS ") -> Tensor[]");
  m.def("reference_statistics_second_order(Tensor grad, Tensor partials, bool[] needed, " OBJKERN_ROW_ARGUMENTS
        ") -> Tensor[]");
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

// None for a null pointer.
std::optional<std::string> text(const char* characters) {
  return characters == nullptr ? std::nullopt : std::optional<std::string>(characters);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Build facts and scalar doors of objkern's C++ core; tensors go through torch.ops.objkern.";
  static PyMethodDef of_default_call{"default_call",
                                     reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(default_call)),
                                     METH_FASTCALL, "The mean loss of a call without options; see default_call.h."};
  m.attr("default_call") = pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&of_default_call, nullptr));
  m.def("build_info", [] {
    pybind11::dict info;
    info["compiler"] = __VERSION__;
    info["torch"] = TORCH_VERSION;
    const cpu::Doors* doors = cpu::doors();
    info["cpu_capability"] = text(doors == nullptr ? nullptr : doors->name);
    info["cuda_archs"] = text(build_facts().cuda_archs);
    info["cuda_compiler"] = text(build_facts().cuda_compiler);
    return info;
  });
#ifdef OBJKERN_HAS_CUDA
  m.def(
      "cuda_support",
      [] {
        const cuda::Support support = cuda::support();
        return std::make_tuple(support.devices, text(support.reason));
      },
      "How many CUDA devices there are, and why there is none that could be used, or None.");
  m.def(
      "cuda_why_not", [](int device) { return text(cuda::why_not(device)); },
      "Why the kernels cannot run on the CUDA device, or None.");
  m.def(
      "force_cuda_plan",
      [](int cluster, bool resident, int lanes) {
        const cuda::Plan plan{cluster, resident, lanes};
        cuda::force_plan(&plan);
      },
      "Spread rows over the device like this from now on, whatever their size; for measurements and tests.");
  m.def("force_cuda_plan", [] { cuda::force_plan(nullptr); }, "Spread rows as csrc/cuda/doors.cu says.");
#endif
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
      "reads_of",
      [](int64_t kind, double parameter) {
        TORCH_CHECK(kind >= 0 && kind < kTermKinds, "objkern: term kind ", kind, " is not known");
        return reads_of(static_cast<TermKind>(kind), parameter);
      },
      "What a term reads, as bits of Reads.");
  m.def(
      "row_gradient_fields",
      [](const std::vector<double>& terms, bool weighted_classes, bool dense_target) {
        int64_t reads = 0;
        for (size_t i = 0; i + 2 < terms.size(); i += 3)
          reads |= reads_of(static_cast<TermKind>(terms[i]), terms[i + 1]);
        return row_gradient_fields(reads, weighted_classes, dense_target);
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
