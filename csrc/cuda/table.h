// The kernels of one dtype, as the doors choose among them. Each dtype is a file of its own, because each compiles for
// a while: rows_float32.cu, ...
#pragma once

#include "gradient_kernels.h"
#include "row_kernels.h"

namespace objkern::cuda {

// What a kernel is compiled for. Each serves every shallower objective too, so the transform of the logits, which costs
// more than the terms, needs two variants and not four.
enum class Variant { kPlain, kEntropy, kSquare, kTransformed, kFull };
constexpr int kVariants = 5;

using RowKernel = void (*)(RowCall);
using GradientKernel = void (*)(GradientCall);

// Every dtype is compiled into the tables below; doors.cu picks by Variant and Pass.
struct Table {
  RowKernel clusters[kVariants][3];  // by Pass: objective, reread, resident
  RowKernel lanes[kVariants][2];     // objective, reread
  RowKernel cluster_statistics, lanes_statistics;
  GradientKernel gradient[kVariants];
  RowKernel count;
  void (*chain)(ChainCall);
  int64_t (*tile_offset)(int64_t numbers);  // of the variant that shares most
};

template <class T>
Table table_of() {
  using A = Accumulation<T>;
  Table table = {};
  const auto variant = [&]<Depth kDepth, bool kTransform>(Variant v) {
    const int i = static_cast<int>(v);
    table.clusters[i][0] = &cluster_kernel<T, kDepth, kTransform, Pass::kObjective>;
    table.clusters[i][1] = &cluster_kernel<T, kDepth, kTransform, Pass::kReread>;
    table.clusters[i][2] = &cluster_kernel<T, kDepth, kTransform, Pass::kResident>;
    table.lanes[i][0] = &lanes_kernel<T, kDepth, kTransform, Pass::kObjective>;
    table.lanes[i][1] = &lanes_kernel<T, kDepth, kTransform, Pass::kReread>;
    table.gradient[i] = &gradient_kernel<T, kDepth, kTransform>;
  };
  if constexpr (sizeof(T) == 8) {  // for checks, not for speed: one variant serves all
    for (int v = 0; v < kVariants; ++v) variant.template operator()<Depth::kFull, true>(static_cast<Variant>(v));
  } else {
    variant.template operator()<Depth::kPlain, false>(Variant::kPlain);
    variant.template operator()<Depth::kEntropy, false>(Variant::kEntropy);
    variant.template operator()<Depth::kSquare, false>(Variant::kSquare);
    variant.template operator()<Depth::kSquare, true>(Variant::kTransformed);
    variant.template operator()<Depth::kFull, true>(Variant::kFull);
  }
  table.cluster_statistics = &cluster_kernel<T, Depth::kFull, true, Pass::kStatistics>;
  table.lanes_statistics = &lanes_kernel<T, Depth::kFull, true, Pass::kStatistics>;
  table.count = &count_kernel<A>;
  table.chain = &chain_kernel<A>;
  table.tile_offset = &tile_offset<A, Depth::kFull>;
  return table;
}

const Table& table_float32();
const Table& table_float64();
const Table& table_bfloat16();
const Table& table_float16();

}  // namespace objkern::cuda
