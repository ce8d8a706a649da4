// The door of the CPU backend: plain pointers and sizes.
//
//   statistics   logits ─▶ centred sums and statistics of every row
//   objective    logits ─▶ values of the terms, and the coefficients of the row's gradient
//   fused        logits ─▶ the same and the gradient; a row's logits are read from memory once
//   chain        centred sums + ∂L/∂statistics ─▶ the coefficients of the row's gradient
//   gradient     logits + coefficients + upstream ─▶ the gradient
//   elementwise, elementwise_gradient   the same for elements, which need no coefficients
//
// The accumulation type is float32, and float64 for float64 logits. Centred sums, statistics and values are float64.
// Numbers of a row lie field by field: (fields, rows). Sums are taken over pieces of fixed size in a fixed order, so
// the result is bitwise the same for any number of threads.
#pragma once

#include <cstdint>

#include "../rows.h"

namespace objkern::cpu {

struct Program {
  const Term* terms = nullptr;
  int64_t size = 0;
  bool per_row = true;  // the values of every row or element; false: their sums over those that count
};

// Values of every element, of the accumulation type.
struct Unreduced {
  void* loss = nullptr;   // (count)
  void* parts = nullptr;  // (size, count), or none
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
  // values: (size + kFreeStatistics, rows) float64, or (size + kFreeStatistics) sums; the free ones only if asked for;
  // row_gradient: (kRowGradient, rows) of the accumulation type
  void (*objective)(const Rows&, const Program&, double* values, void* row_gradient);
  // gradient: (rows, classes) of dtype, contiguous
  void (*fused)(const Rows&, const Program&, double* values, void* row_gradient, void* gradient);
  // partials: (kStatistics, rows) float64, ∂L/∂statistics
  void (*chain)(const Rows&, const double* centred, const double* partials, void* row_gradient);
  // upstream: accumulation type, stride 0 for one number for all rows
  void (*gradient)(const Rows&, const void* row_gradient, const void* upstream, int64_t upstream_stride,
                   void* gradient);
  // sums: (size) float64, or `unreduced`; gradient: (count) of dtype under an upstream gradient of 1, or none
  void (*elementwise)(const Elements&, const Program&, double* sums, const Unreduced& unreduced, void* gradient);
  // upstream: accumulation type, stride 0 for one number or 1 for one for each element
  void (*elementwise_gradient)(const Elements&, const Program&, const void* upstream, int64_t upstream_stride,
                               void* gradient);
};

// The fastest set that this processor can run, or the one named by OBJKERN_CPU_CAPABILITY (default, avx2, avx512);
// null if the name is unknown, was not built, or cannot run here.
const Doors* doors();

}  // namespace objkern::cpu
