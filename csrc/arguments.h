// The arguments that the ops share, in the order of their schemas.
//
//   Row arguments     how to read a batch of rows: logits (N, V); target (N) int64 labels or (N, V) probabilities;
//                     logit_scale (); class_weight (V); ...
//   Objective         what to make of them: coefficient_tensor (terms), normalizer (), the terms, the reduction
#pragma once

#define OBJKERN_ROW_ARGUMENTS                                                                                        \
  "Tensor logits, Tensor? target, Tensor? logit_scale, Tensor? class_weight, int ignore_index, float softcap, bool " \
  "masked"
#define OBJKERN_OBJECTIVE_ARGUMENTS                                                                               \
  OBJKERN_ROW_ARGUMENTS                                                                                           \
  ", Tensor? coefficient_tensor, Tensor? normalizer, int[] terms, float[] parameters, float[] coefficients, int " \
  "reduction, bool empty_zero, bool with_parts"

namespace objkern {

// The places of the differentiable arguments.
constexpr int kLogits = 0, kTarget = 1, kLogitScale = 2, kCoefficientTensor = 7;
// And of what their derivatives read.
constexpr int kCoefficients = 11;
constexpr int kRowArguments = 7, kObjectiveArguments = 15;

}  // namespace objkern
