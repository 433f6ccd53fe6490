// One pass over aligned vector lists. The pieces go by value in the kernel's arguments, so that nothing
// is copied to the device first and a CUDA graph can replay the launch.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "../vector_list.h"
#include "launch.h"
#include "pack.cuh"
#include "sums.cuh"

namespace hg::cuda {

// Elements of which tiles are a multiple, so that packs start at the same places in all tiles of a piece.
constexpr int64_t kStrip = 2048;
// Blocks of a large pass: several waves on any device, and few enough partial sums for one block to add.
constexpr int64_t kBlocks = 4096;
// Kernel arguments end at 4 KB; the pass and its pointers need the rest.
constexpr int kTableBytes = 3840;

// Elements per block, and blocks (that is, partial sums) per row. Both depend on shapes alone, so that sums do too.
template <int N>
struct Tiling {
  int64_t tile, blocks = 0;

  Tiling(const AlignedPieces<N>& pieces, int64_t rows) {
    const int64_t strips = (pieces.numel() * rows + kBlocks * kStrip - 1) / (kBlocks * kStrip);
    tile = std::max<int64_t>(strips, 1) * kStrip;
    for (size_t i = 0; i < pieces.pieces().size(); ++i) blocks += tiles(pieces.piece_numel(i));
  }
  int64_t tiles(int64_t numel) const { return (numel + tile - 1) / tile; }
};

template <int N>
struct PieceTable {
  struct Piece {
    char* data[N];
    int64_t row_bytes[N];
    int64_t numel;
    int64_t first_block;
  };
  static constexpr int kCapacity = (kTableBytes - 40) / sizeof(Piece);

  Piece pieces[kCapacity];
  int64_t tile;
  int64_t blocks;         // of this launch, per row
  int64_t first_partial;  // blocks of the launches before it
  int64_t partials;       // blocks of all launches
  int count;

  // The piece whose tiles include `block`.
  __device__ __forceinline__ const Piece& find(int64_t block) const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (pieces[middle].first_block <= block ? low : high) = middle;
    }
    return pieces[low];
  }
};

// Runs `pass` over elements [first, last), W at a time. A thread loads U packs of every list before it uses
// the first, to keep enough bytes in flight.
template <int W, int U, class Pass>
__device__ __forceinline__ void sweep(const Pass& pass, const Cursor<Pass::kLists>& at, int64_t first, int64_t last,
                                      double* sums) {
  constexpr int kStep = kThreads * W;
  int64_t i = first + threadIdx.x * W;
#pragma unroll 1
  for (; i + (U - 1) * kStep < last; i += U * kStep) {
    typename Pass::template Items<W> items[U];
#pragma unroll
    for (int u = 0; u < U; ++u) pass.load(items[u], at, i + u * kStep);
#pragma unroll
    for (int u = 0; u < U; ++u) pass.update(items[u], at, i + u * kStep, sums);
  }
  if constexpr (U > 1) sweep<W, 1>(pass, at, i - threadIdx.x * W, last, sums);
}

// Block (x, y) runs tile x of every row y, y + gridDim.y, ...
template <class Pass>
__global__ void __launch_bounds__(kThreads, 2)
    list_pass(const __grid_constant__ PieceTable<Pass::kLists> table, Pass pass, int64_t rows, double* partial) {
  constexpr int N = Pass::kLists, S = Pass::kSums, W = Pass::kWidth;
  const auto& piece = table.find(blockIdx.x);
  const int64_t begin = (blockIdx.x - piece.first_block) * table.tile;
  const int64_t left = piece.numel - begin;
  const int64_t size = left < table.tile ? left : table.tile;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    if (!pass.enter(row)) continue;
    Cursor<N> at;
#pragma unroll
    for (int l = 0; l < N; ++l) at.data[l] = piece.data[l] + row * piece.row_bytes[l] + begin * Pass::item_size(l);

    // Elements before the first that starts a pack of list 0, then whether packs start there in all lists.
    const int64_t misplaced = reinterpret_cast<uintptr_t>(at.data[0]) / Pass::item_size(0) % W;
    const int64_t head = misplaced ? W - misplaced : 0;
    bool aligned = head < size;
#pragma unroll
    for (int l = 0; l < N; ++l)
      aligned &= reinterpret_cast<uintptr_t>(at.data[l] + head * Pass::item_size(l)) % (W * Pass::item_size(l)) == 0;
    const int64_t first = aligned ? head : 0;
    const int64_t last = aligned ? size - (size - head) % W : 0;

    double sums[S ? S : 1] = {};
    // Packs of many lists are enough bytes in flight, and all the registers there are.
    constexpr bool kMany = N > 5;
    sweep<W, kMany ? 1 : 2>(pass, at, first, last, sums);
    sweep<1, 1>(pass, at, 0, first, sums);
    sweep<1, kMany ? 1 : 4>(pass, at, last, size, sums);
    if constexpr (S > 0) {
      block_sum(sums);
      if (threadIdx.x == 0)
        for (int s = 0; s < S; ++s)
          partial[(row * table.partials + table.first_partial + blockIdx.x) * S + s] = sums[s];
    }
  }
}

inline unsigned grid_rows(int64_t rows) { return static_cast<unsigned>(std::min<int64_t>(rows, kMaxGridRows)); }

// Launches `pass` over all pieces. Pass::lists() says which lists of the pieces it reads.
template <class Pass, int M>
cudaError_t run_pass(const AlignedPieces<M>& pieces, const Tiling<M>& tiling, int64_t rows, const Pass& pass,
                     double* partial, cudaStream_t stream) {
  using Table = PieceTable<Pass::kLists>;
  const auto& all = pieces.pieces();
  Table table;
  table.tile = tiling.tile;
  table.partials = tiling.blocks;
  table.first_partial = 0;
  for (size_t next = 0; next < all.size(); table.first_partial += table.blocks) {
    table.blocks = 0;
    for (table.count = 0; table.count < Table::kCapacity && next < all.size(); ++table.count, ++next) {
      auto& piece = table.pieces[table.count];
      for (int l = 0; l < Pass::kLists; ++l) {
        piece.data[l] = all[next].data[Pass::lists()[l]];
        piece.row_bytes[l] = all[next].row_bytes[Pass::lists()[l]];
      }
      piece.numel = pieces.piece_numel(next);
      piece.first_block = table.blocks;
      table.blocks += tiling.tiles(piece.numel);
    }
    const dim3 grid(static_cast<unsigned>(table.blocks), grid_rows(rows));
    const cudaError_t error = launch(list_pass<Pass>, grid, kThreads, 0, stream, table, pass, rows, partial);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// Adds the partial sums of every row and lets `finish` update the row's scalars.
template <class Finish>
cudaError_t run_finish(int64_t rows, int64_t partials, const double* partial, const Finish& finish,
                       cudaStream_t stream) {
  return launch(finish_rows<Finish>, grid_rows(rows), kThreads, 0, stream, partial, partials, rows, finish);
}

// Calls f with a value of the state's type and one of the product's; the host function has checked the pair.
template <class F>
auto for_dtypes(DType state, DType product, const F& f) {
  if (state == DType::f64) return f(double{}, double{});
  if (product == DType::bf16) return f(float{}, __nv_bfloat16{});
  if (product == DType::f16) return f(float{}, __half{});
  return f(float{}, float{});
}

}  // namespace hg::cuda
