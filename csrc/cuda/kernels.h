// The door of the CUDA backend: plain pointers and sizes, and a stream. No torch; plain nvcc compiles it anywhere.
//
//   compare      logits and those of a reference ─▶ the divergence of every row
//   objective    logits ─▶ the loss, and the coefficients of every row's gradient
//   fused        logits ─▶ the same and the gradient; where a row fits in shared memory it is read once
//   statistics   logits ─▶ centred sums and statistics of every row
//   chain        centred sums + ∂L/∂statistics ─▶ the coefficients of the row's gradient
//   gradient     logits + coefficients + upstream ─▶ the gradient; or nothing at all where upstream is 1 already
//   elementwise, elementwise_gradient   the same for elements, which need no coefficients
//   parameters_...                      a penalty on many parameters, some of them a launch
//
// Every pointer is to device memory. A door launches on the current device and the stream it is given, waits for
// nothing, allocates nothing, and reads no number back, so that a CUDA graph can capture it. The accumulation type A is
// float32, and float64 for float64 logits. Sums are merged in a fixed order: the same build on the same device gives
// the same bits. A label that is neither ignored nor in [0, classes) is never used to read: its row becomes NaN. To
// `chain` and `gradient` it is the label of a class elsewhere, for they may see a part of the vocabulary; what was kept
// of a bad row is NaN already.
//
// gradient_dtype is the logits' dtype, or bfloat16 or float16 for float32 logits.
#pragma once

#include <cstdint>

#include "../rows.h"

namespace objkern::cuda {

using Stream = void*;  // cudaStream_t
using Status = int;    // cudaError_t, or one of these

constexpr Status kOk = 0;
constexpr Status kPlanDoesNotFit = -1;  // a forced one, or a device without shared memory to speak of

const char* message(Status status);

// A number that the host knows, or a float32 or float64 on the device.
struct Scalar {
  const void* pointer = nullptr;  // null: `value`
  DType dtype = DType::kFloat64;
  double value = 1.0;
};

constexpr int kMostTerms = 64;  // they travel with the launch, whose arguments have room for 4 KB

struct Program {
  Term terms[kMostTerms];
  int size = 0;
  const double* factors = nullptr;  // (size), multiply the coefficients, or none
  Scalar normalizer;
  bool has_normalizer = false;
  Reduction reduction = Reduction::kMean;
  bool empty_zero = false;
  bool with_parts = false;
};

// How the rows of a batch are spread over the device; see plan.h.
struct Plan {
  int cluster = 1;        // blocks that share a row
  bool resident = false;  // the row's tile stays in shared memory between the two passes
  int lanes = 0;          // lanes that share a row, several rows a block; 0: whole blocks
  int64_t teams = 0;      // clusters, or blocks of several rows, that the device holds at once; 0: whatever there is
};

// What is there at all. A null reason means that the kernels run on the device.
struct Support {
  int devices = 0;
  const char* reason = nullptr;
};
Support support();
const char* why_not(int device);

// For the current device. `numbers`: how many a block sums.
Plan plan(const Rows& rows, const Scalar& logit_scale, bool with_gradient, int numbers);
void force_plan(const Plan* plan);  // from now on, for measurements and tests; null: no longer
int64_t workspace_bytes(const Rows& rows, const Program& program, const Plan& plan);

struct Results {
  void* loss = nullptr;              // () or (rows) of A
  void* parts = nullptr;             // (size + kFreeStatistics + 1) or (size + kFreeStatistics, rows) of A, or none
  void* row_gradient = nullptr;      // (fields of the depth, rows) of A
  void* gradient = nullptr;          // (rows, classes) of gradient_dtype, contiguous; null: not asked for
  void* workspace = nullptr;         // workspace_bytes, aligned to 16
  const void* divergence = nullptr;  // what `compare` found, if there is a reference
};

// found: (kDivergence, rows) of A; of ignored rows nothing
Status compare(const Rows& rows, const Scalar& logit_scale, void* found, Stream stream);
Status objective(const Rows& rows, const Scalar& logit_scale, const Program& program, const Plan& plan,
                 const Results& results, Stream stream);
// centred: (kCentred, rows) float64; statistics: (kStatistics, rows) float64
Status statistics(const Rows& rows, const Scalar& logit_scale, const Plan& plan, const void* divergence,
                  double* centred, double* statistics, Stream stream);
// partials: (kStatistics, rows) float64, ∂L/∂statistics; row_gradient: (kRowGradient, rows) of A
Status chain(const Rows& rows, const double* centred, const double* partials, void* row_gradient, Stream stream);
// upstream: of A, stride 0 for one number for all rows. `unless_one`: leave the gradient as it is if that number is 1.
Status gradient(const Rows& rows, const Scalar& logit_scale, const void* row_gradient, const void* upstream,
                int64_t upstream_stride, bool unless_one, void* gradient, Stream stream);

// ---- elementwise objectives ---------------------------------------------------------------------------------------

struct ElementResults {
  void* loss = nullptr;       // () or (count) of A
  void* parts = nullptr;      // (size) or (size, count) of A, or none
  void* gradient = nullptr;   // (count) of dtype; null: not asked for
  void* workspace = nullptr;  // element_blocks × size float64, where the loss is reduced
};

int64_t element_blocks(const Elements& in);
Status elementwise(const Elements& in, const Scalar& logit_scale, const Program& program, const ElementResults& results,
                   Stream stream);
// upstream: of A, stride 0 or 1; `unless_one` as in `gradient`
Status elementwise_gradient(const Elements& in, const Scalar& logit_scale, const Program& program, const void* upstream,
                            int64_t upstream_stride, bool unless_one, void* gradient, Stream stream);

// ---- penalties on parameters --------------------------------------------------------------------------------------

struct Parameter {
  const void* theta = nullptr;   // (count) of the parameters' dtype, contiguous
  const void* origin = nullptr;  // (count) of origin_dtype, or none, which is 0
  const void* weight = nullptr;  // (count) of the accumulation type, or none, which is 1
  void* gradient = nullptr;      // (count) of the parameters' dtype
  int64_t count = 0;
  bool vectors = false;  // all of them begin at multiples of 16 bytes; found by the doors
};

constexpr int kMostParameters = 64;  // of a launch; a power of two

struct Parameters {
  Parameter of[kMostParameters];
  int size = 0;
  DType dtype = DType::kFloat32, origin_dtype = DType::kFloat32;
  double l1 = 0.0, l2 = 0.0;
};

int64_t parameter_blocks(const Parameters& in);
// sums: (parameter_blocks), of this launch; then the total of those of all launches
Status parameters_sums(const Parameters& in, double* sums, Stream stream);
Status parameters_total(const double* sums, int64_t count, double* value, Stream stream);
// upstream: of the accumulation type. `adds`: to the gradient that is there, rounded once.
Status parameters_gradient(const Parameters& in, const void* upstream, bool adds, Stream stream);

}  // namespace objkern::cuda
