// A batch of rows and how to read them, and the terms as kernels receive them: what the native backends' doors share.
// Plain pointers and sizes, no torch; strides count elements.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace objkern {

constexpr int kCentred = 21;        // fields of Centred
constexpr int kFreeStatistics = 3;  // lse, accuracy, target probability: what parts report beside the terms

enum class Reduction : int64_t { kNone, kMean, kSum };  // the order of objkern.batch.REDUCTIONS

struct Rows {
  const void* logits = nullptr;  // (rows, classes), class stride 1
  DType dtype = DType::kFloat32;
  int64_t rows = 0;
  int64_t classes = 0;
  int64_t row_stride = 0;

  const int64_t* target = nullptr;  // (rows), or none
  int64_t ignore_index = -100;
  const void* dense_target = nullptr;   // (rows, classes) of dense_dtype, class stride 1, or none
  DType dense_dtype = DType::kFloat32;  // the logits' type, or float32 (float64 beside float64 logits)
  int64_t dense_stride = 0;
  const void* class_weight = nullptr;       // (classes) of the accumulation type, or none
  const void* reference = nullptr;          // (rows, classes) logits of reference_dtype, class stride 1, or none
  DType reference_dtype = DType::kFloat32;  // the logits' type, or the accumulation type
  int64_t reference_stride = 0;
  double temperature = 1.0;  // of the divergence from the reference

  double logit_scale = 1.0;
  double softcap = 0.0;   // 0: none
  bool unscaled = false;  // the gradient is to s·x instead of x: what the gradient of the scale itself needs
  DType gradient_dtype = DType::kFloat32;  // in which the gradient is written
  bool smoothed = false;                   // a dense target has no zeros, because label smoothing lifts them
  bool masked = true;                      // −inf logits are excluded classes; false: they are numbers, as torch has it

  int64_t reads = 0;            // which statistics the objective reads, `Reads` of objective.h
  bool free_statistics = true;  // whether lse, accuracy and target probability are asked for beside the terms
};

// The elements of a prediction, and what stands beside each.
struct Elements {
  const void* input = nullptr;  // (count), contiguous
  DType dtype = DType::kFloat32;
  int64_t count = 0;

  const void* target = nullptr;          // (count) of target_dtype, or none, which is 0
  DType target_dtype = DType::kFloat32;  // the input's type, or the accumulation type
  // Of the accumulation type; element i has number i modulo `period`. None: 1.
  const void* weight = nullptr;
  const void* pos_weight = nullptr;
  int64_t weight_period = 0, pos_weight_period = 0;

  double logit_scale = 1.0;
  double softcap = 0.0;
  bool unscaled = false;  // as in Rows
  bool limits = true;     // see ElementInputs
};

struct Term {
  int64_t kind = 0;  // TermKind, or ElementKind
  double parameter = 0;
  double scale = 0;  // coefficient, over the denominator where that is known
};

}  // namespace objkern
