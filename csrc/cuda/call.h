// What a kernel receives with its launch, and how its shared memory and its workspace are laid out.
#pragma once

#include "elements.h"
#include "sums.h"

namespace objkern::cuda {

constexpr int kBlockThreads = 256;    // of a kernel whose blocks, or clusters of blocks, have a row each
constexpr int kLanesThreads = 256;    // of a kernel whose blocks have several rows
constexpr int kCountThreads = 256;    // of the kernel that counts labels
constexpr int kMostCounts = 128;      // blocks of that kernel
constexpr int kLabelsOfCount = 2048;  // labels of each, if that are not too few for many rows
// Clusters, or blocks of several rows; each takes rows in turn beyond that.
#ifdef OBJKERN_EMULATED
constexpr int kMostRowTeams = 80;  // so that the tests' rows do
#else
constexpr int kMostRowTeams = 1 << 15;
#endif

struct Count {
  double rows, weight;
};

// The part of the workspace that is not the teams' sums.
struct alignas(16) Header {
  uint32_t ticket;
  uint32_t counts;  // how many there are of
  Count count[kMostCounts];
};

struct RowCall {
  Rows rows;
  Scalar logit_scale;
  Program program;
  Results results;
  int fields = 0;     // of RowGradient, of the objective's own depth
  int lanes = 0;      // that share a row, or 0
  int64_t teams = 0;  // clusters, or blocks of several rows
  int64_t tile = 0;   // columns of a block of the cluster
  double* centred = nullptr;
  double* statistics = nullptr;
  const void* divergence = nullptr;  // (kDivergence, rows) of A, if there is a reference

  OBJKERN_DEVICE Header* header() const { return static_cast<Header*>(results.workspace); }
  OBJKERN_DEVICE double* team_sums() const { return reinterpret_cast<double*>(header() + 1); }
};

// Numbers that a block sums over its rows: the loss, and with parts the terms and the free statistics.
OBJKERN_HOST_DEVICE int quantities(const Program& program) {
  return program.with_parts ? 1 + program.size + kFreeStatistics : 1;
}

// Whether an objective reads anything of a row of logits but what a reference tells of it.
OBJKERN_HOST_DEVICE bool reads_logits(int64_t reads) {
  return (reads & ~int64_t{kDivergences}) != 0;
}

// What the threads of a block share. `values` has quantities × slots numbers, and the tile comes last.
template <class A, Depth kDepth>
struct alignas(128) Shared {
  double scale[kMostTerms];  // coefficient over denominator
  double denominator[kMostTerms];
  double counted;
  Sums<A, kDepth> of_warp[kBlockThreads / kWarp];
  Sums<A, kDepth> of_block;
  RowGradient<A> gradient;
  int place;  // of the maximum
  bool last;  // this block is the last to finish

  OBJKERN_DEVICE double* values() { return reinterpret_cast<double*>(this + 1); }
};

// Bytes from the beginning of shared memory to the tile; `numbers` is quantities × slots.
template <class A, Depth kDepth>
OBJKERN_HOST_DEVICE int64_t tile_offset(int64_t numbers) {
  const int64_t least = kBlockThreads / kWarp;  // `finish` uses them too
  return (static_cast<int64_t>(sizeof(Shared<A, kDepth>)) + 8 * (numbers > least ? numbers : least) + 127) / 128 * 128;
}

}  // namespace objkern::cuda
