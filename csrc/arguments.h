// The arguments that the ops share, in the order of their schemas. Passing one costs a quarter of a microsecond, so
// what is seldom needed has a default and comes last.
//
//   Row arguments     how to read a batch of rows: logits (N, V); target (N) int64 labels or (N, V) probabilities;
//                     logit_scale (); class_weight (V); reference (N, V) logits; ...
//   Elements          a prediction of any shape and what stands beside each of its elements: target; weight and
//                     pos_weight, which broadcast; ...
//   Objective         what to make of them: terms, a (kind, parameter, coefficient) for each; the reduction; the row
//                     arguments; coefficient_tensor (terms), which multiplies the coefficients; normalizer (); ...
#pragma once

#define OBJKERN_ROW_ARGUMENTS                                                                                        \
  "Tensor logits, Tensor? target=None, Tensor? logit_scale=None, Tensor? class_weight=None, int ignore_index=-100, " \
  "float softcap=0, bool masked=True, Tensor? reference=None, float temperature=1"
#define OBJKERN_OBJECTIVE_ARGUMENTS                      \
  "float[] terms, int reduction, " OBJKERN_ROW_ARGUMENTS \
  ", Tensor? coefficient_tensor=None, Tensor? normalizer=None, bool empty_zero=False, bool with_parts=False"
#define OBJKERN_ELEMENT_ARGUMENTS                                                               \
  "float[] terms, int reduction, Tensor input, Tensor? target=None, Tensor? logit_scale=None, " \
  "Tensor? weight=None, Tensor? pos_weight=None, float softcap=0, bool limits=True, "           \
  "Tensor? coefficient_tensor=None, Tensor? normalizer=None, bool empty_zero=False, bool with_parts=False"

namespace objkern {

// Places in the row arguments, and in the objective's, whose row arguments begin at kRows.
constexpr int kLogits = 0, kTarget = 1, kLogitScale = 2, kClassWeight = 3, kReference = 7, kRowArguments = 9;
constexpr int kTerms = 0, kReduction = 1, kRows = 2, kCoefficientTensor = kRows + kRowArguments;
constexpr int kMasked = kRows + 6;
constexpr int kObjectiveArguments = kCoefficientTensor + 4;
// In the arguments of an elementwise objective, which begin as the objective's do.
constexpr int kInput = 2, kElementTarget = 3, kElementScale = 4, kWeight = 5, kPosWeight = 6;
constexpr int kElementCoefficients = 9, kElementArguments = 13;

}  // namespace objkern
