// The doors: which kernel runs on which part of the device.  nvcc -O3 -std=c++20 -c csrc/cuda/doors.cu
//
// The launch table, for rows of V classes:
//
//   V ≤ 1024      2^k lanes a row, about 4 classes each, and whole warps from 128 classes on
//   more, fused   a cluster of 1, 2, 4 or 8 blocks a row (1 before sm_90): the smallest whose tiles fit twice into a
//                 multiprocessor's shared memory; else the row is read twice
//   more, other   a block a row
//
// with one exception: a gradient in another type than the logits' is written by clusters, whatever V.
//
// and where rows are few, the smallest cluster that gives every multiprocessor two blocks.
#include <algorithm>
#include <optional>

#include "table.h"

namespace objkern::cuda {
namespace {

constexpr int64_t kMostLaneClasses = 1024;
constexpr int kMostCluster = 8;            // that every device with clusters has
constexpr int64_t kReservedShared = 1024;  // bytes that the system takes of every block's
constexpr int64_t kLeastTile = 4096;       // columns worth a block of their own

std::optional<Plan>& forced() {
  static std::optional<Plan> plan;
  return plan;
}

// By the type of the logits, and that of the gradient.
const Table& table(const Rows& rows) {
  switch (rows.dtype) {
    case DType::kFloat32:
      return rows.gradient_dtype == DType::kBFloat16  ? table_float32_bfloat16()
             : rows.gradient_dtype == DType::kFloat16 ? table_float32_float16()
                                                      : table_float32();
    case DType::kFloat64:
      return table_float64();
    case DType::kBFloat16:
      return table_bfloat16();
    default:
      return table_float16();
  }
}

int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// The transform is on unless the scale is known to be 1 and there is no cap.
bool identity(const Rows& rows, const Scalar& logit_scale) {
  return logit_scale.pointer == nullptr && logit_scale.value == 1.0 && rows.softcap == 0.0;
}

Variant variant(const Rows& rows, const Scalar& logit_scale) {
  const Depth depth = depth_of(rows.reads, rows.class_weight != nullptr, rows.dense_target != nullptr);
  if (depth == Depth::kFull) return Variant::kFull;
  return identity(rows, logit_scale) ? static_cast<Variant>(depth) : Variant::kTransformed;
}

RowKernel row_kernel(const Rows& rows, const Scalar& logit_scale, const Plan& plan, bool writes) {
  const Table& kernels = table(rows);
  const int v = static_cast<int>(variant(rows, logit_scale));
  if (plan.lanes != 0) return kernels.lanes[v][writes ? 1 : 0];
  return kernels.clusters[v][!writes ? 0 : plan.resident ? 2 : 1];
}

int fields(const Rows& rows) {
  return row_gradient_fields(rows.reads, rows.class_weight != nullptr, rows.dense_target != nullptr);
}

int lanes_for(int64_t classes) {
  int lanes = 1;
  while (lanes < kWarp && 4 * lanes < classes) lanes *= 2;
  return lanes;
}

// Columns of each block of a cluster, a multiple of the vector.
int64_t tile_of(const Rows& rows, int cluster) {
  const int64_t vector = 16 / element_size(rows.dtype), columns = (rows.classes + cluster - 1) / cluster;
  return (columns + vector - 1) / vector * vector;
}

int64_t tile_bytes(const Rows& rows, int cluster) {
  return tile_of(rows, cluster) * element_size(rows.dtype) + 16;  // it may begin within 16 bytes
}

// Rows that a block, or a cluster of them, has at once.
int64_t slots_of(const Plan& plan) {
  return plan.lanes == 0 ? 1 : kLanesThreads / plan.lanes;
}

int64_t teams_of(const Rows& rows, const Plan& plan) {
  const int64_t slots = slots_of(plan);
  const int64_t most = plan.teams == 0 ? kMostRowTeams : std::min<int64_t>(plan.teams, kMostRowTeams);
  return std::clamp<int64_t>((rows.rows + slots - 1) / slots, 1, most);
}

RowCall call_of(const Rows& rows, const Scalar& logit_scale, const Plan& plan) {
  RowCall call;
  call.rows = rows;
  call.logit_scale = logit_scale;
  call.lanes = plan.lanes;
  call.teams = teams_of(rows, plan);
  call.tile = tile_of(rows, plan.cluster);
  return call;
}

Grid grid_of(const Rows& rows, const Plan& plan, int64_t teams, int64_t quantities) {
  const int64_t slots = slots_of(plan);
  const int64_t shared = table(rows).tile_offset(quantities * slots);
  if (plan.lanes != 0) return {teams, kLanesThreads, 1, shared};
  return {teams * plan.cluster, kBlockThreads, plan.cluster,
          shared + (plan.resident ? tile_bytes(rows, plan.cluster) : 0)};
}

// A kernel over rows, if what it asks for is there.
Status run(RowKernel kernel, const Grid& grid, Stream stream, const RowCall& call) {
  Limits limits;
  if (const Status status = read_limits(limits); status != kOk) return status;
  if (grid.shared_bytes > limits.shared_of_block || (grid.cluster > 1 && !limits.clusters)) return kPlanDoesNotFit;
  return launch(kernel, grid, stream, call);
}

}  // namespace

const char* message(Status status) {
  return status == kPlanDoesNotFit ? "the launch plan does not fit this device" : error_text(status);
}

Support support() {
  Support found;
  const Status status = count_devices(found.devices);
  if (status != kOk) {
    found.reason = message(status);
  } else if (found.devices == 0) {
    found.reason = "there is no CUDA device";
  }
  return found;
}

const char* why_not(int device) {
  const OnDevice guard(device);
  const Status status = loadable(table_float32().count);
  return status == kOk ? nullptr : message(status);
}

void force_plan(const Plan* plan) {
  forced() = plan == nullptr ? std::nullopt : std::optional<Plan>(*plan);
}

namespace {

// numbers: how many a block sums.
Plan spread(const Rows& rows, bool with_gradient, int numbers) {
  Plan found;
  if (forced().has_value()) {
    found = *forced();
    found.resident = found.resident && with_gradient && found.lanes == 0;
    return found;
  }
  const bool reads = numbers != 1 || reads_logits(rows.reads);
  if (!reads && !with_gradient) {
    found.lanes = 1;
    return found;
  }
  if (rows.classes <= kMostLaneClasses && !(with_gradient && rows.gradient_dtype != rows.dtype)) {
    found.lanes = lanes_for(rows.classes);
    return found;
  }
  Limits limits;
  if (read_limits(limits) != kOk) return found;  // the launch will say what is wrong
  const int most = limits.clusters ? kMostCluster : 1;
  const auto grow = [&](int cluster) {  // where rows are few
    while (cluster < most && cluster * rows.rows < 2 * limits.multiprocessors && rows.classes / cluster > kLeastTile)
      cluster *= 2;
    return cluster;
  };
  if (with_gradient && reads) {
    const int64_t offset = table(rows).tile_offset(0) + kReservedShared;
    const int64_t room = std::min(limits.shared_of_multiprocessor / 2, limits.shared_of_block + kReservedShared);
    for (int cluster = 1; cluster <= most; cluster *= 2) {
      if (offset + tile_bytes(rows, cluster) > room) continue;
      found.cluster = grow(cluster);
      found.resident = true;
      return found;
    }
  }
  found.cluster = grow(1);
  return found;
}

}  // namespace

Plan plan(const Rows& rows, const Scalar& logit_scale, bool with_gradient, int numbers) {
  Plan found = spread(rows, with_gradient, numbers);
  Limits limits;
  if (read_limits(limits) != kOk || (found.cluster > 1 && !limits.clusters)) return found;  // the launch will say
  const RowKernel kernel = row_kernel(rows, logit_scale, found, with_gradient);
  if (held_at_once(kernel, grid_of(rows, found, 1, numbers), found.teams) != kOk) found.teams = 0;
  return found;
}

int64_t workspace_bytes(const Rows& rows, const Program& program, const Plan& plan) {
  const bool reduced = program.reduction != Reduction::kNone;
  return static_cast<int64_t>(sizeof(Header)) + (reduced ? 8 * quantities(program) * teams_of(rows, plan) : 0);
}

Status compare(const Rows& rows, const Scalar& logit_scale, void* found, Stream stream) {
  if (rows.rows == 0) return kOk;
  const int threads = rows.classes <= kMostLaneClasses ? kWarp : kCompareThreads;
  const Grid grid{std::min<int64_t>(rows.rows, kMostRowTeams), threads, 1, static_cast<int64_t>(sizeof(CompareShared))};
  const auto& kernels = table(rows).compare[identity(rows, logit_scale) ? 0 : 1];
  return launch(kernels[(rows.reads & kReverseKl) != 0 ? 1 : 0], grid, stream, CompareCall{rows, logit_scale, found});
}

Status objective(const Rows& rows, const Scalar& logit_scale, const Program& program, const Plan& plan,
                 const Results& results, Stream stream) {
  RowCall call = call_of(rows, logit_scale, plan);
  call.program = program;
  call.results = results;
  call.divergence = results.divergence;
  call.fields = fields(rows);
  const Table& kernels = table(rows);
  if (program.reduction != Reduction::kNone) {
    const int64_t blocks = std::clamp<int64_t>((rows.rows + kLabelsOfCount - 1) / kLabelsOfCount, 1, kMostCounts);
    const Grid grid{blocks, kCountThreads, 1, static_cast<int64_t>(sizeof(Count)) * kCountThreads / kWarp};
    if (const Status status = launch(kernels.count, grid, stream, call); status != kOk) return status;
  } else if (rows.rows == 0) {
    return kOk;
  }
  return run(row_kernel(rows, logit_scale, plan, results.gradient != nullptr),
             grid_of(rows, plan, call.teams, quantities(program)), stream, call);
}

Status statistics(const Rows& rows, const Scalar& logit_scale, const Plan& plan, const void* divergence,
                  double* centred, double* statistics, Stream stream) {
  if (rows.rows == 0) return kOk;
  RowCall call = call_of(rows, logit_scale, plan);
  call.divergence = divergence;
  call.centred = centred;
  call.statistics = statistics;
  const Table& kernels = table(rows);
  return run(plan.lanes != 0 ? kernels.lanes_statistics : kernels.cluster_statistics,
             grid_of(rows, plan, call.teams, 0), stream, call);
}

Status chain(const Rows& rows, const double* centred, const double* partials, void* row_gradient, Stream stream) {
  if (rows.rows == 0) return kOk;
  const Grid grid{(rows.rows + kChainThreads - 1) / kChainThreads, kChainThreads, 1, 0};
  return launch(table(rows).chain, grid, stream, ChainCall{rows, centred, partials, row_gradient});
}

Status gradient(const Rows& rows, const Scalar& logit_scale, const void* row_gradient, const void* upstream,
                int64_t upstream_stride, bool unless_one, void* gradient, Stream stream) {
  if (rows.rows == 0) return kOk;
  const Variant v = variant(rows, logit_scale);
  GradientCall call;
  call.rows = rows;
  call.logit_scale = logit_scale;
  call.row_gradient = row_gradient;
  call.fields = fields(rows);
  call.upstream = upstream;
  call.upstream_stride = upstream_stride;
  call.unless_one = unless_one;
  call.gradient = gradient;
  if (rows.classes <= kMostLaneClasses) {
    call.lanes = lanes_for(rows.classes);
    const int64_t slots = kGradientThreads / call.lanes;
    call.items = (rows.rows + slots - 1) / slots;
  } else {
    call.segments = v == Variant::kFull || rows.dtype == DType::kFloat64 ? 1 : (rows.classes + kSegment - 1) / kSegment;
    call.items = rows.rows * call.segments;
  }
  Limits limits;
  if (const Status status = read_limits(limits); status != kOk) return status;
  // Every block that there is room for, and no more: where upstream is 1, they only come to leave.
  const int64_t blocks = std::min<int64_t>(call.items, int64_t{limits.multiprocessors} * kGradientBlocks);
  const Grid grid{blocks, kGradientThreads, 1, kGradientThreads / kWarp * static_cast<int64_t>(sizeof(int))};
  return launch(table(rows).gradient[static_cast<int>(v)], grid, stream, call);
}

}  // namespace objkern::cuda
