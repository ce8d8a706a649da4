// The kernels over rows: collect, decide, write. Where a row's sums come together is all in which they differ.
//
//   clusters   a row for every cluster of blocks (of one block, where there are no clusters)
//
//        block 0          block 1          ...      global memory ──▶ tile in shared memory, if it stays
//     collect its tile  collect its tile            16 bytes a thread at a time
//        warps merge       warps merge              shuffles, then shared memory
//            └──── each reads the others' sums ──   distributed shared memory, in the order of ranks
//        epilogue          epilogue                 one thread; every block for itself
//     write its tile    write its tile              tile, or logits again ──▶ gradient
//
//   lanes      a row for 1 to 32 lanes of a warp, several rows a block, for few classes
//
// T is the type of the logits, G that of the gradient.
#pragma once

#include "affine.h"
#include "epilogue.h"

namespace objkern::cuda {

enum class Pass { kObjective, kReread, kResident, kStatistics };

// Blocks of 256 threads that a multiprocessor must hold at once, and so the registers of a thread: four leave 64, three
// 80, two 128, one 255. A resident row takes half of the shared memory at most, and is on its way all at once; a row
// that streams through registers needs more threads to keep as many bytes in flight.
constexpr int blocks_at_once(Depth depth, bool transform, bool doubles, Pass pass) {
  if (doubles) return 1;
  if (transform || depth == Depth::kFull) return 2;
  if (depth == Depth::kSquare && pass == Pass::kReread) return 2;
  return depth == Depth::kPlain && pass == Pass::kObjective ? 4 : 3;
}

// Copies columns [begin, end) of a row to the tile, which lies at the same alignment. A thread copies what it collects;
// the other blocks of the multiprocessor have work while it waits.
template <class T>
OBJKERN_DEVICE void copy_tile(const T* x, T* tile, int begin, int end, int thread, int threads) {
  const Walk w = walk(x, begin, end);
  constexpr int kVector = Element<T>::kVector;
  for (int v = thread; v < w.vectors; v += threads) copy_async(tile + w.body + v * kVector, x + w.body + v * kVector);
  close_copies();
  for (int j = w.begin + thread; j < w.body; j += threads) tile[j] = x[j];
  for (int j = w.body + w.vectors * kVector + thread; j < w.end; j += threads) tile[j] = x[j];
  copies_arrived<0>();
}

// Whether the classes of a row are summed up at all.
template <Depth kDepth, Pass kPass>
OBJKERN_DEVICE bool collects(const RowCall& call) {
  if (kDepth != Depth::kFull || kPass == Pass::kStatistics) return true;
  return call.program.with_parts || reads_logits(call.rows.reads);
}

template <class T, class G, Depth kDepth, bool kTransform, Pass kPass>
OBJKERN_KERNEL(kBlockThreads, blocks_at_once(kDepth, kTransform, sizeof(T) == 8, kPass))
cluster_kernel(OBJKERN_ARGUMENT RowCall call) {
  using A = Accumulation<T>;
  using S = Shared<A, kDepth>;
  S& shared = *reinterpret_cast<S*>(shared_memory());
  const Rows& rows = call.rows;
  const int thread = thread_index(), rank = cluster_rank(), ranks = cluster_size();
  const int64_t team = block_index() / ranks;
  const int begin = static_cast<int>(rank * call.tile < rows.classes ? rank * call.tile : rows.classes);
  const int end = static_cast<int>(begin + call.tile < rows.classes ? begin + call.tile : rows.classes);
  const Transform<A, kTransform> transform(rows, call.logit_scale);
  const bool reduced = kPass != Pass::kStatistics && call.program.reduction != Reduction::kNone;
  const int count = kPass == Pass::kStatistics ? 0 : quantities(call.program);

  if (kPass != Pass::kStatistics && thread < kWarp) share_scales(call, shared);
  if (reduced && thread < count) shared.values()[thread] = 0;

  for (int64_t row = team; row < rows.rows; row += call.teams) {
    const Label label(rows, row);
    const T* const x = static_cast<const T*>(rows.logits) + row * rows.row_stride;
    G* const gradient = static_cast<G*>(call.results.gradient) + row * rows.classes;
    if (label.ignored) {  // nothing is read; zeros are written
      if constexpr (kPass == Pass::kReread || kPass == Pass::kResident)
        write_zeros(gradient, begin, end, thread, kBlockThreads);
      if (rank == 0) {
        if constexpr (kPass == Pass::kStatistics) {
          if (thread == 0) store_no_statistics(call, row);
        } else {
          if (thread == 0) store_row_gradient(call, RowGradient<A>{}, row);
          if (!reduced && thread < count) store_value(call, thread, row, A(0));
        }
      }
      continue;
    }

    // On its way while the others are: nobody waits for it alone.
    const T own = thread == 0 && label.column >= 0 ? x[label.column] : T{};

    // The tile's elements stand where the row's do modulo 16 bytes, column `begin` among the first of them.
    const T* source = x;
    if constexpr (kPass == Pass::kResident) {
      T* const tile = reinterpret_cast<T*>(shared_memory() + tile_offset<A, kDepth>(count)) +
                      misalignment(x + begin) / static_cast<int>(sizeof(T)) - begin;
      copy_tile(x, tile, begin, end, thread, kBlockThreads);
      source = tile;
    }
    Collector<T, kDepth, kTransform, kPass != Pass::kResident> collector{rows, transform, row, label.column, {}};
    if (collects<kDepth, kPass>(call)) collector.collect(source, begin, end, thread, kBlockThreads);

    const Sums<A, kDepth> of_warp = merged_in_warp(collector.sums, kWarp);
    if (thread % kWarp == 0) shared.of_warp[thread / kWarp] = of_warp;
    block_sync();
    if (thread < kWarp) {
      constexpr int kWarps = kBlockThreads / kWarp;
      const Sums<A, kDepth> of_block =
          merged_in_warp(thread < kWarps ? shared.of_warp[thread] : Sums<A, kDepth>{}, kWarp);
      if (thread == 0) shared.of_block = of_block;
    }
    if (ranks > 1) {
      cluster_arrive();
      cluster_wait();
    }
    if (thread == 0) {
      Sums<A, kDepth> others = shared.of_block;
      if (ranks > 1) {
        others = *in_block(&shared.of_block, 0);
        for (int r = 1; r < ranks; ++r) others.merge(*in_block(&shared.of_block, r));
      }
      const A z = label.column < 0 ? A(-kInfinity) : transform(widen(own));
      const A weight = label_weight<A>(rows, label);
      Centred<A> c = centred(rows, others, label.column, z, weight);
      load_divergence<kDepth>(call, row, c);
      if constexpr (kPass == Pass::kStatistics) {
        if (rank == 0) store_statistics(call, c, label.bad, row);
      } else {
        const RowGradient<A> g =
            row_epilogue<kDepth>(call, shared.scale, c, weight, label.bad, [&](int quantity, A value) {
              if (rank != 0) return;
              if (reduced) {
                shared.values()[quantity] += static_cast<double>(value);
              } else {
                store_value(call, quantity, row, value);
              }
            });
        if (rank == 0) store_row_gradient(call, g, row);
        shared.gradient = g;
        shared.place = g.max_grad != A(0) ? others.first : -1;
      }
    }
    if (ranks > 1) cluster_arrive();  // the others' sums are read; before they change, all must have come here
    if constexpr (kPass == Pass::kReread || kPass == Pass::kResident) {
      block_sync();
      const Affine<T, G, kDepth, kTransform> affine(rows, transform, row, label.column, shared.place, A(1),
                                                    shared.gradient);
      affine.write(source, gradient, begin, end, thread, kBlockThreads);
    }
    if (ranks > 1) cluster_wait();
    block_sync();  // what is shared is used up
  }
  if (reduced && rank == 0) finish<A>(call, shared, team, 1);
}

template <class T, class G, Depth kDepth, bool kTransform, Pass kPass>
OBJKERN_KERNEL(kLanesThreads, blocks_at_once(kDepth, kTransform, sizeof(T) == 8, kPass))
lanes_kernel(OBJKERN_ARGUMENT RowCall call) {
  using A = Accumulation<T>;
  using S = Shared<A, kDepth>;
  S& shared = *reinterpret_cast<S*>(shared_memory());
  const Rows& rows = call.rows;
  const int thread = thread_index(), width = call.lanes, slots = kLanesThreads / width;
  const int slot = thread / width, lane = thread % width;
  const int64_t team = block_index();
  const Transform<A, kTransform> transform(rows, call.logit_scale);
  const bool reduced = kPass != Pass::kStatistics && call.program.reduction != Reduction::kNone;
  const int count = kPass == Pass::kStatistics ? 0 : quantities(call.program);

  if (kPass != Pass::kStatistics && thread < kWarp) share_scales(call, shared);
  if (reduced)
    for (int i = thread; i < count * slots; i += kLanesThreads) shared.values()[i] = 0;
  block_sync();

  // Every lane takes every turn, with a row or without, for the shuffles need all.
  for (int64_t first = team * slots; first < rows.rows; first += call.teams * slots) {
    const int64_t row = first + slot;
    const bool there = row < rows.rows;
    const Label label(rows, there ? row : 0);
    const bool counts = there && !label.ignored;
    const int end = counts && collects<kDepth, kPass>(call) ? static_cast<int>(rows.classes) : 0;
    const T* const x = static_cast<const T*>(rows.logits) + row * rows.row_stride;
    Collector<T, kDepth, kTransform, false> collector{rows, transform, row, label.column, {}};
    collector.collect(x, 0, end, lane, width);
    const int leader = thread % kWarp / width * width;
    const Sums<A, kDepth> others =
        merged_in_warp(collector.sums, width).each([leader](auto field) { return shuffle(field, leader); });
    if (!there) continue;

    G* const gradient = static_cast<G*>(call.results.gradient) + row * rows.classes;
    if (label.ignored) {
      if constexpr (kPass == Pass::kReread) write_zeros(gradient, 0, static_cast<int>(rows.classes), lane, width);
      if (lane != 0) continue;
      if constexpr (kPass == Pass::kStatistics) {
        store_no_statistics(call, row);
      } else {
        store_row_gradient(call, RowGradient<A>{}, row);
        for (int q = 0; !reduced && q < count; ++q) store_value(call, q, row, A(0));
      }
      continue;
    }
    const A z = label.column < 0 ? A(-kInfinity) : transform(widen(x[label.column]));
    const A weight = label_weight<A>(rows, label);
    Centred<A> c = centred(rows, others, label.column, z, weight);
    load_divergence<kDepth>(call, row, c);
    if constexpr (kPass == Pass::kStatistics) {
      if (lane == 0) store_statistics(call, c, label.bad, row);
    } else {
      const RowGradient<A> g =
          row_epilogue<kDepth>(call, shared.scale, c, weight, label.bad, [&](int quantity, A value) {
            if (lane != 0) return;
            if (reduced) {
              shared.values()[quantity * slots + slot] += static_cast<double>(value);
            } else {
              store_value(call, quantity, row, value);
            }
          });
      if (lane == 0) store_row_gradient(call, g, row);
      if constexpr (kPass == Pass::kReread) {
        const Affine<T, G, kDepth, kTransform> affine(rows, transform, row, label.column,
                                                      g.max_grad != A(0) ? others.first : -1, A(1), g);
        affine.write(x, gradient, 0, static_cast<int>(rows.classes), lane, width);  // also where nothing was collected
      }
    }
  }
  if (reduced) finish<A>(call, shared, team, slots);
}

}  // namespace objkern::cuda
