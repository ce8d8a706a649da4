// The door of the CPU backend: plain pointers and sizes. Strides count elements.
//
//   statistics   logits ─▶ centred sums and statistics of every row
//   objective    logits ─▶ values of the terms, and the coefficients of the row's gradient
//   fused        logits ─▶ the same and the gradient; a row's logits are read from memory once
//   chain        centred sums + ∂L/∂statistics ─▶ the coefficients of the row's gradient
//   gradient     logits + coefficients + upstream ─▶ the gradient
//
// The accumulation type is float32, and float64 for float64 logits. Centred sums, statistics and values are float64.
// Numbers of a row lie field by field: (fields, rows). Sums are taken over pieces of fixed size in a fixed order, so
// the result is bitwise the same for any number of threads.
#pragma once

#include <cstdint>

#include "../dtypes.h"

namespace objkern::cpu {

constexpr int kCentred = 14;        // fields of Centred<double>
constexpr int kFreeStatistics = 3;  // lse, accuracy, target probability: what parts report beside the terms

// A batch of rows and how to read them.
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
  const void* class_weight = nullptr;  // (classes) of the accumulation type, or none

  double logit_scale = 1.0;
  double softcap = 0.0;   // 0: none
  bool unscaled = false;  // the gradient is to s·x instead of x: what the gradient of the scale itself needs
  bool smoothed = false;  // a dense target has no zeros, because label smoothing lifts them
  bool masked = true;     // −inf logits are excluded classes; false: they are numbers, as torch has it

  int64_t reads = 0;            // which statistics the objective reads, `Reads` of objective.h
  bool free_statistics = true;  // whether lse, accuracy and target probability are asked for beside the terms
};

struct Term {
  int64_t kind = 0;  // TermKind
  double parameter = 0;
  double scale = 0;  // coefficient over denominator
};

struct Program {
  const Term* terms = nullptr;
  int64_t size = 0;
  bool per_row = true;  // the values of every row; false: their sums over the rows that count
};

// What can be known of the targets before any logit is read.
struct TargetSummary {
  int64_t counted = 0;    // rows that are not ignored
  double weight_sum = 0;  // Σ w_y over them
  int64_t bad_row = -1;   // the first row whose label is neither ignored nor in [0, classes)
};
TargetSummary summarize_targets(const Rows& rows);

// Bytes of this machine's caches as the system reports them, or what is common where it reports nothing.
struct Caches {
  int64_t second;  // of one core
  int64_t last;    // shared
};
const Caches& caches();

struct Doors {
  const char* name;
  // Of labels [begin, end): how many are not ignored, and whether one of those is out of range.
  void (*scan)(const Rows&, int64_t begin, int64_t end, int64_t& counted, bool& bad);
  // centred: (kCentred, rows) float64; statistics: (kStatistics, rows) float64
  void (*statistics)(const Rows&, double* centred, double* statistics);
  // values: (size + kFreeStatistics, rows) float64, or (size + kFreeStatistics) sums;
  // row_gradient: (kRowGradient, rows) of the accumulation type
  void (*objective)(const Rows&, const Program&, double* values, void* row_gradient);
  // gradient: (rows, classes) of dtype, contiguous
  void (*fused)(const Rows&, const Program&, double* values, void* row_gradient, void* gradient);
  // partials: (kStatistics, rows) float64, ∂L/∂statistics
  void (*chain)(const Rows&, const double* centred, const double* partials, void* row_gradient);
  // upstream: accumulation type, stride 0 for one number for all rows
  void (*gradient)(const Rows&, const void* row_gradient, const void* upstream, int64_t upstream_stride,
                   void* gradient);
};

// The fastest set that this processor can run, or the one named by OBJKERN_CPU_CAPABILITY (default, avx2, avx512);
// null if the name is unknown, was not built, or cannot run here.
const Doors* doors();

}  // namespace objkern::cpu
