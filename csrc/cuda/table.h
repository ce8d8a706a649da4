// The kernels of one dtype, as the doors choose among them. Each dtype is a file of its own, because each compiles for
// a while: rows_float32.cu, and rows_float32_bfloat16.cu where the gradient has another dtype, ...
#pragma once

#include "compare_kernel.h"
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
  void (*compare[2][2])(CompareCall);  // by transform, and whether KL(p ‖ q) is read
  void (*chain)(ChainCall);
  int64_t (*tile_offset)(int64_t numbers);  // of the variant that shares most
};

template <class T, class G, Depth kDepth, bool kTransform>
void set_writers(Table& table, Variant v) {
  const int i = static_cast<int>(v);
  table.clusters[i][1] = &cluster_kernel<T, G, kDepth, kTransform, Pass::kReread>;
  table.clusters[i][2] = &cluster_kernel<T, G, kDepth, kTransform, Pass::kResident>;
  table.gradient[i] = &gradient_kernel<T, G, kDepth, kTransform>;
}

template <class T>
Table table_of() {
  using A = Accumulation<T>;
  Table table = {};
  const auto variant = [&]<Depth kDepth, bool kTransform>(Variant v) {
    const int i = static_cast<int>(v);
    table.clusters[i][0] = &cluster_kernel<T, T, kDepth, kTransform, Pass::kObjective>;
    table.lanes[i][0] = &lanes_kernel<T, T, kDepth, kTransform, Pass::kObjective>;
    table.lanes[i][1] = &lanes_kernel<T, T, kDepth, kTransform, Pass::kReread>;
    set_writers<T, T, kDepth, kTransform>(table, v);
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
  table.cluster_statistics = &cluster_kernel<T, T, Depth::kFull, true, Pass::kStatistics>;
  table.lanes_statistics = &lanes_kernel<T, T, Depth::kFull, true, Pass::kStatistics>;
  table.count = &count_kernel<A>;
  constexpr bool kOne = sizeof(T) == 8;  // as above
  table.compare[0][0] = &compare_kernel<T, kOne, kOne>;
  table.compare[0][1] = &compare_kernel<T, kOne, true>;
  table.compare[1][0] = table.compare[1][1] = &compare_kernel<T, true, true>;
  table.chain = &chain_kernel<A>;
  table.tile_offset = &tile_offset<A, Depth::kFull>;
  return table;
}

// What is the same and what is not where the gradient of T's logits is written in the narrower G. GEMMs surround these
// kernels, so the variant for squares serves entropies too, and whole blocks serve rows of any length.
template <class G, class T = float>
Table table_of_narrow_gradient(const Table& table_of_logits) {
  Table table = table_of_logits;
  set_writers<T, G, Depth::kPlain, false>(table, Variant::kPlain);
  set_writers<T, G, Depth::kSquare, false>(table, Variant::kSquare);
  set_writers<T, G, Depth::kSquare, false>(table, Variant::kEntropy);
  set_writers<T, G, Depth::kSquare, true>(table, Variant::kTransformed);
  set_writers<T, G, Depth::kFull, true>(table, Variant::kFull);
  for (int v = 0; v < kVariants; ++v) table.lanes[v][1] = nullptr;
  return table;
}

const Table& table_float32();
const Table& table_float32_bfloat16();
const Table& table_float32_float16();
const Table& table_float64();
const Table& table_bfloat16();
const Table& table_float16();

}  // namespace objkern::cuda
