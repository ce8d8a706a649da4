// The ops on CUDA tensors: memory, numbers that may lie on either side, and the way into csrc/cuda. Nothing here waits
// for the device. The tests compile this file for CPU tensors too, against the kernels' host emulation.
#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <vector>

#include "batch.h"
#include "cuda/kernels.h"
#ifndef OBJKERN_EMULATED
#include "stream.h"
#endif

#ifndef OBJKERN_CUDA_KEY
#define OBJKERN_CUDA_KEY CUDA
#endif

namespace objkern {
namespace {

using torch::jit::Stack;

void check(cuda::Status status) {
  TORCH_CHECK(status == cuda::kOk, "objkern: CUDA: ", cuda::message(status));
}

// A call on the device of a tensor and its current stream.
struct OnDevice {
  const Tensor input;
  const c10::DeviceGuard guard;
  cuda::Stream stream = nullptr;
  std::vector<Tensor> alive;  // what was converted for the kernels

  explicit OnDevice(const Tensor& input_) : input(input_), guard(input.device()) {
#ifndef OBJKERN_EMULATED
    stream = current_stream(input.device());
#endif
  }

  void check_device(const char* name, const std::optional<Tensor>& t) const {
    TORCH_CHECK_VALUE(!t.has_value() || t->device() == input.device(), "objkern: ", name, ": expected a tensor on ",
                      input.device(), ", as the logits, but got one on ", t->device());
  }

  // A 0-dim tensor: of the CPU as the number it is, of the device as a place to read it from.
  cuda::Scalar number(const char* name, const std::optional<Tensor>& t) {
    cuda::Scalar scalar;
    if (!t.has_value()) return scalar;
    if (t->device() != input.device() && t->is_cpu()) {
      scalar.value = t->item<double>();
      return scalar;
    }
    check_device(name, t);
    const bool float32 = t->scalar_type() == at::kFloat;
    alive.push_back(float32 ? *t : t->to(at::kDouble));
    scalar.pointer = alive.back().const_data_ptr();
    scalar.dtype = float32 ? DType::kFloat32 : DType::kFloat64;
    return scalar;
  }

  cuda::Program program(const ProgramArguments& in) {
    cuda::Program program;
    TORCH_CHECK_VALUE(in.terms.size() <= cuda::kMostTerms, "objkern: terms: expected at most ", cuda::kMostTerms,
                      " on a GPU but got ", in.terms.size());
    program.size = static_cast<int>(in.terms.size());
    std::copy(in.terms.begin(), in.terms.end(), program.terms);
    if (in.coefficient_tensor.has_value()) {
      alive.push_back(in.coefficient_tensor->to(at::kDouble).contiguous());
      const double* factors = alive.back().const_data_ptr<double>();
      if (alive.back().device() == input.device()) {
        program.factors = factors;
      } else {
        TORCH_CHECK_VALUE(alive.back().is_cpu(), "objkern: coefficient_tensor: expected it on ", input.device(),
                          " or the CPU but got it on ", alive.back().device());
        for (int k = 0; k < program.size; ++k) program.terms[k].scale *= factors[k];
      }
    }
    program.has_normalizer = in.normalizer.has_value();
    program.normalizer = number("normalizer", in.normalizer);
    program.reduction = in.reduction;
    program.empty_zero = in.empty_zero;
    program.with_parts = in.with_parts;
    return program;
  }

  at::TensorOptions options() const { return input.options().dtype(accumulation_type(input)); }
};

struct Launch : OnDevice {
  Batch batch;
  cuda::Scalar logit_scale;

  explicit Launch(const RowArguments& in, int64_t reads = kEverything) : OnDevice(in.logits), batch(in, reads) {
    TORCH_CHECK(batch.rows.classes < (int64_t{1} << 31), "objkern: logits: expected fewer than 2^31 classes but got ",
                batch.rows.classes);
    check_device("target", in.target);
    check_device("class weight", in.class_weight);
    check_device("reference", in.reference);
    logit_scale = number("logit_scale", in.logit_scale);
  }

  // What the comparison with the reference found, or nothing.
  Tensor divergence() const {
    const Rows& rows = batch.rows;
    if (rows.reference == nullptr) return {};
    const Tensor found = at::empty({kDivergence, rows.rows}, options());
    check(cuda::compare(rows, logit_scale, found.mutable_data_ptr(), stream));
    return found;
  }

  // The one that was given, or a new one.
  Tensor gradient(const RowArguments& in, const Tensor& given) {
    const Tensor out =
        given.defined() ? given : at::empty({batch.rows.rows, batch.rows.classes}, batch.logits.options());
    check_gradient(in, out, true);
    check_device("gradient", out);
    batch.rows.gradient_dtype = dtype_of(out);
    return out;
  }
};

void run_objective(Stack* stack, To to) {
  Tensor gradient = take_given(stack, to);
  const bool with_gradient = to != To::kNowhere;
  const ObjectiveArguments in(torch::jit::last(*stack, kObjectiveArguments));
  torch::jit::drop(*stack, kObjectiveArguments);
  TORCH_CHECK_VALUE(!with_gradient || in.reduction != Reduction::kNone,
                    "objkern: fused: the gradient of unreduced losses is only known in the backward pass");
  Launch call(in, in.reads());
  Rows& rows = call.batch.rows;
  rows.smoothed = in.smoothed();
  if (with_gradient) gradient = call.gradient(in, gradient);
  const cuda::Program program = call.program(in);
  const int numbers = in.with_parts ? 1 + program.size + kFreeStatistics : 1;
  const cuda::Plan plan = cuda::plan(rows, call.logit_scale, with_gradient, numbers);

  const int64_t n = rows.rows, parts_size = in.with_parts ? program.size + kFreeStatistics : 0;
  const auto options = call.options();
  Tensor loss, parts;
  if (in.reduction == Reduction::kNone) {
    loss = at::empty({n}, options);
    parts = at::empty({parts_size, n}, options);
  } else {
    loss = at::empty({}, options);
    parts = at::empty({in.with_parts ? parts_size + 1 : 0}, options);
  }
  const Tensor row_gradient = at::empty({in.row_gradient_fields(), n}, options);
  const Tensor workspace = at::empty({cuda::workspace_bytes(rows, program, plan)}, options.dtype(at::kByte));

  cuda::Results results;
  results.loss = loss.mutable_data_ptr();
  results.parts = in.with_parts ? parts.mutable_data_ptr() : nullptr;
  results.row_gradient = row_gradient.mutable_data_ptr();
  results.gradient = with_gradient ? gradient.mutable_data_ptr() : nullptr;
  results.workspace = workspace.mutable_data_ptr();
  const Tensor divergence = call.divergence();
  results.divergence = divergence.defined() ? divergence.const_data_ptr() : nullptr;
  check(cuda::objective(rows, call.logit_scale, program, plan, results, call.stream));
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

void write_gradient(Launch& call, const Tensor& row_gradient, const Tensor& upstream, bool unless_one,
                    const Tensor& out) {
  const Rows& rows = call.batch.rows;
  call.check_device("row_gradient", row_gradient);
  call.check_device("upstream", upstream);
  const Tensor u = allocated("upstream", upstream).to(accumulation_type(call.batch.logits));
  TORCH_CHECK(u.dim() == 0 || (u.dim() == 1 && u.size(0) == rows.rows), "objkern: upstream: expected () or (",
              rows.rows, ") but got ", u.sizes());
  check(cuda::gradient(rows, call.logit_scale, row_gradient.const_data_ptr(), u.const_data_ptr(),
                       u.dim() == 0 ? 0 : u.stride(0), unless_one, out.mutable_data_ptr(), call.stream));
}

template <To kTo>
void gradient(const c10::OperatorHandle&, Stack* stack) {
  const Tensor into = take_given(stack, kTo);
  const auto all = torch::jit::last(*stack, 3 + kObjectiveArguments);
  const Tensor upstream = all[0].toTensor(), row_gradient = all[1].toTensor();
  const bool unscaled = all[2].toBool();
  const ObjectiveArguments in(all.slice(3));
  torch::jit::drop(*stack, all.size());
  Launch call(in, in.reads());
  call.batch.rows.unscaled = unscaled;
  check_row_gradient(in, call.batch, row_gradient);
  const Tensor out = call.gradient(in, into);
  write_gradient(call, row_gradient, upstream, false, out);
  if (kTo == To::kNew) torch::jit::push(*stack, out);
}

// Computed anew from the logits unless `upstream` turns out to be 1, which the kernel finds out: as many bytes as
// scaling in place, no digit lost in half precision, no 0·∞, and nothing to wait for.
void rescale(const c10::OperatorHandle&, Stack* stack) {
  const auto all = torch::jit::last(*stack, 3 + kObjectiveArguments);
  const Tensor gradient = all[0].toTensor(), upstream = all[1].toTensor(), row_gradient = all[2].toTensor();
  const ObjectiveArguments in(all.slice(3));
  torch::jit::drop(*stack, all.size());
  Launch call(in, in.reads());
  check_row_gradient(in, call.batch, row_gradient);
  check_gradient(in, gradient, false);
  call.gradient(in, gradient);
  TORCH_CHECK(upstream.dim() == 0, "objkern: upstream: expected a 0-dim tensor but got ", upstream.sizes());
  write_gradient(call, row_gradient, upstream, true, gradient);
}

void statistics(const c10::OperatorHandle&, Stack* stack) {
  const RowArguments in(torch::jit::last(*stack, kRowArguments));
  torch::jit::drop(*stack, kRowArguments);
  const Launch call(in);
  const Rows& rows = call.batch.rows;
  const auto options = call.options().dtype(at::kDouble);
  const Tensor centred = at::empty({kCentred, rows.rows}, options), out = at::empty({kStatistics, rows.rows}, options);
  const Tensor divergence = call.divergence();
  check(cuda::statistics(rows, call.logit_scale, cuda::plan(rows, call.logit_scale, false, 0),
                         divergence.defined() ? divergence.const_data_ptr() : nullptr,
                         centred.mutable_data_ptr<double>(), out.mutable_data_ptr<double>(), call.stream));
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
  Launch call(in);
  call.batch.rows.unscaled = unscaled;
  check_partials(call.batch, partials, centred);
  call.check_device("partials", partials);
  call.check_device("centred", centred);
  const Tensor row_gradient = at::empty({kRowGradient, call.batch.rows.rows}, call.options());
  const Tensor f = partials.to(at::kDouble).contiguous();
  check(cuda::chain(call.batch.rows, centred.const_data_ptr<double>(), f.const_data_ptr<double>(),
                    row_gradient.mutable_data_ptr(), call.stream));
  const Tensor out = call.gradient(in, into);
  write_gradient(call, row_gradient, at::ones({}, call.options()), false, out);
  if (kTo == To::kNew) torch::jit::push(*stack, out);
}

// ---- elementwise objectives ---------------------------------------------------------------------------------------

struct ElementLaunch : OnDevice {
  ElementBatch batch;
  cuda::Scalar logit_scale;
  cuda::Program program;

  explicit ElementLaunch(const ElementArguments& in) : OnDevice(in.input), batch(in), program(OnDevice::program(in)) {
    check_device("target", in.target);
    check_device("weight", in.weight);
    check_device("pos_weight", in.pos_weight);
    logit_scale = number("logit_scale", in.logit_scale);
  }

  void write_gradient(const Tensor& upstream, bool unless_one, const Tensor& out) {
    check_device("upstream", upstream);
    const Tensor u = allocated("upstream", upstream).to(accumulation_type(input)).contiguous();
    TORCH_CHECK(u.dim() == 0 || u.sizes() == input.sizes(), "objkern: upstream: expected () or ", input.sizes(),
                " but got ", u.sizes());
    const int64_t stride = u.dim() == 0 && program.reduction != Reduction::kNone ? 0 : 1;
    check(cuda::elementwise_gradient(batch.elements, logit_scale, program, u.const_data_ptr(), stride, unless_one,
                                     out.mutable_data_ptr(), stream));
  }
};

template <bool kFused>
void elementwise(const c10::OperatorHandle&, Stack* stack) {
  const ElementArguments in(torch::jit::last(*stack, kElementArguments));
  torch::jit::drop(*stack, kElementArguments);
  const bool per_element = in.reduction == Reduction::kNone;
  TORCH_CHECK_VALUE(!kFused || !per_element,
                    "objkern: elementwise_fused: the gradient of unreduced losses is only known in the backward pass");
  ElementLaunch call(in);
  const auto options = call.options();
  std::vector<int64_t> sizes;
  if (per_element) sizes = call.input.sizes().vec();
  const Tensor loss = at::empty(sizes, options);
  sizes.insert(sizes.begin(), in.with_parts ? call.program.size : 0);
  const Tensor parts = at::empty(sizes, options);
  const Tensor gradient = kFused ? at::empty(call.input.sizes(), call.input.options()) : Tensor();
  const int64_t numbers = per_element ? 0 : cuda::element_blocks(call.batch.elements) * call.program.size;
  const Tensor workspace = at::empty({numbers}, options.dtype(at::kDouble));
  cuda::ElementResults results;
  results.loss = loss.mutable_data_ptr();
  results.parts = in.with_parts ? parts.mutable_data_ptr() : nullptr;
  results.gradient = kFused ? gradient.mutable_data_ptr() : nullptr;
  results.workspace = workspace.mutable_data_ptr();
  check(cuda::elementwise(call.batch.elements, call.logit_scale, call.program, results, call.stream));
  torch::jit::push(*stack, loss, parts);
  if (kFused) torch::jit::push(*stack, gradient);
}

void elementwise_gradient(const c10::OperatorHandle&, Stack* stack) {
  const auto all = torch::jit::last(*stack, 2 + kElementArguments);
  const Tensor upstream = all[0].toTensor();
  const bool unscaled = all[1].toBool();
  const ElementArguments in(all.slice(2));
  torch::jit::drop(*stack, all.size());
  ElementLaunch call(in);
  call.batch.elements.unscaled = unscaled;
  const Tensor out = at::empty(call.input.sizes(), call.input.options());
  call.write_gradient(upstream, false, out);
  torch::jit::push(*stack, out);
}

void elementwise_rescale(const c10::OperatorHandle&, Stack* stack) {
  const auto all = torch::jit::last(*stack, 2 + kElementArguments);
  const Tensor gradient = all[0].toTensor(), upstream = all[1].toTensor();
  const ElementArguments in(all.slice(2));
  torch::jit::drop(*stack, all.size());
  ElementLaunch call(in);
  TORCH_CHECK(upstream.dim() == 0, "objkern: upstream: expected a 0-dim tensor but got ", upstream.sizes());
  TORCH_CHECK(gradient.is_contiguous() && gradient.sizes() == call.input.sizes() &&
                  gradient.scalar_type() == call.input.scalar_type(),
              "objkern: gradient does not belong to this input");
  call.check_device("gradient", gradient);
  call.write_gradient(upstream, true, gradient);
}

// ---- penalties on parameters --------------------------------------------------------------------------------------

// Parameters with what stands beside them, in launches of a dtype each.
struct MultiPenalty : OnDevice {
  std::vector<cuda::Parameters> launches;

  MultiPenalty(at::TensorList parameters, at::TensorList origins, at::TensorList weights, at::TensorList gradients,
               double l1, double l2)
      : OnDevice(parameters.front()) {
    for (size_t k = 0; k < parameters.size(); ++k) {
      const Tensor& theta = parameters[k];
      const auto accumulation = accumulation_type(theta);
      cuda::Parameters own;
      own.dtype = own.origin_dtype = dtype_of(theta);
      own.l1 = l1, own.l2 = l2;
      cuda::Parameter one;
      one.count = theta.numel();
      one.theta = kept("parameters", theta, theta.scalar_type());
      if (!origins.empty()) {
        const auto type = origins[k].scalar_type() == theta.scalar_type() ? theta.scalar_type() : accumulation;
        one.origin = kept("origins", origins[k], type);
        own.origin_dtype = dtype_of(alive.back());
      }
      if (!weights.empty()) one.weight = kept("weights", weights[k], accumulation);
      if (!gradients.empty()) one.gradient = gradients[k].mutable_data_ptr();
      const bool fits = !launches.empty() && launches.back().dtype == own.dtype &&
                        launches.back().origin_dtype == own.origin_dtype &&
                        launches.back().size < cuda::kMostParameters;
      if (!fits) launches.push_back(own);
      launches.back().of[launches.back().size++] = one;
    }
  }

  const void* kept(const char* name, const Tensor& t, at::ScalarType type) {
    check_device(name, t);
    alive.push_back(allocated(name, t).to(type).contiguous());
    return alive.back().const_data_ptr();
  }

  void write_gradients(const Tensor& upstream, bool adds) {
    for (const cuda::Parameters& launch : launches) {
      alive.push_back(upstream.to(launch.dtype == DType::kFloat64 ? at::kDouble : at::kFloat));
      check(cuda::parameters_gradient(launch, alive.back().const_data_ptr(), adds, stream));
    }
  }
};

Tensor multi_penalty(at::TensorList parameters, at::TensorList origins, at::TensorList weights, double l1, double l2) {
  const MultiPenalty call(parameters, origins, weights, {}, l1, l2);
  int64_t blocks = 0;
  for (const cuda::Parameters& launch : call.launches) blocks += cuda::parameter_blocks(launch);
  const auto options = call.input.options().dtype(at::kDouble);
  const Tensor sums = at::empty({blocks}, options), value = at::empty({}, options);
  double* next = sums.mutable_data_ptr<double>();
  for (const cuda::Parameters& launch : call.launches) {
    check(cuda::parameters_sums(launch, next, call.stream));
    next += cuda::parameter_blocks(launch);
  }
  check(cuda::parameters_total(sums.const_data_ptr<double>(), blocks, value.mutable_data_ptr<double>(), call.stream));
  return value;
}

std::vector<Tensor> multi_penalty_gradient(const Tensor& upstream, at::TensorList parameters, at::TensorList origins,
                                           at::TensorList weights, double l1, double l2) {
  std::vector<Tensor> gradients;
  for (const Tensor& theta : parameters) gradients.push_back(at::empty(theta.sizes(), theta.options()));
  MultiPenalty(parameters, origins, weights, gradients, l1, l2).write_gradients(upstream, false);
  return gradients;
}

// To gradients that are contiguous, of the parameters' dtypes and sizes.
void multi_penalty_accumulate_(at::TensorList gradients, const Tensor& upstream, at::TensorList parameters,
                               at::TensorList origins, at::TensorList weights, double l1, double l2) {
  for (size_t k = 0; k < parameters.size(); ++k) {
    TORCH_CHECK(gradients[k].is_contiguous() && gradients[k].sizes() == parameters[k].sizes() &&
                    gradients[k].scalar_type() == parameters[k].scalar_type() &&
                    gradients[k].device() == parameters[k].device(),
                "objkern: gradients: expected contiguous ones, as the parameters are");
  }
  MultiPenalty(parameters, origins, weights, gradients, l1, l2).write_gradients(upstream, true);
}

}  // namespace

TORCH_LIBRARY_IMPL(objkern, OBJKERN_CUDA_KEY, m) {
  OBJKERN_IMPLEMENT(m);
  m.impl("multi_penalty", multi_penalty);
  m.impl("multi_penalty_gradient", multi_penalty_gradient);
  m.impl("multi_penalty_accumulate_", multi_penalty_accumulate_);
}

}  // namespace objkern
