// Recurrent layers on CUDA, one thread block for each slice of the batch and direction: what a call
// needs of the device, and its arguments. Included by nvcc and by the C++ compiler.
//
// A warp owns 16 hidden units for the whole sequence and a block the units of the layer, so that
// h never leaves the block. W_hh stays in registers and shared memory over all steps. That bounds
// H; `plan_block` says by how much.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/recurrent.h"

namespace seqkern::cuda {

constexpr int kSliceRows = 8;  // rows of the batch in a block: the columns of one product
constexpr int kWarpUnits = 16;
constexpr int kStages = 2;  // steps whose input projections are under way at once
constexpr int kTile = 16;   // of k, in a product of 16-bit matrices

constexpr int kMaxWarps = 12;  // 384 threads, so that each may have 168 registers

// Tiles of k whose weights stay in registers, for each of `gates` products of 16-bit matrices: what
// the other values of a step leave, or all that an Elman cell may need.
constexpr int held_tiles(int gates, bool backward) {
  return gates == 4 ? (backward ? 3 : 4) : gates == 3 ? (backward ? 4 : 5) : kMaxWarps;
}

struct BlockPlan {
  int32_t warps = 0;    // of a block
  int32_t depth = 0;    // H padded to whole steps of a product
  int32_t row = 0;      // elements between rows of h, or of dg, in shared memory
  int64_t weights = 0;  // bytes of W_hh in shared memory
  int64_t states = 0;   // bytes of the two copies of h, or of dg
  int64_t shared = 0;   // bytes in all, with the input projections under way
};

// The launch of the forward or the backward; `shared` may exceed what a device has.
inline BlockPlan block_plan(Mode mode, Type type, int64_t H, bool backward) {
  const int gates = gates_of(mode), size = size_of(type);
  const bool half = size == 2;
  BlockPlan p;
  p.warps = int32_t((H + kWarpUnits - 1) / kWarpUnits);
  const int64_t unit = half ? kTile : 8;
  p.depth = int32_t((H + unit - 1) / unit * unit);
  // A row of h is 16 bytes more than a multiple of 32, which spreads eight rows over all banks.
  p.row = int32_t((backward ? gates : 1) * p.depth + (half ? 8 : 4));
  const int64_t tiles = p.depth / kTile - held_tiles(gates, backward);
  const int64_t fragment = 32 * 16;  // bytes of 16 x 16 weights over a warp
  p.weights = half ? int64_t(p.warps) * gates * (tiles > 0 ? tiles : 0) * fragment
                   : int64_t(p.warps) * gates * kWarpUnits * p.depth * size;
  p.states = 2ll * kSliceRows * p.row * size;
  const int64_t ring = backward ? 0 : int64_t(kStages) * p.warps * 32 * gates * 4 * sizeof(float);
  p.shared = p.weights + p.states + ring;
  return p;
}

// Whether forward and backward both fit a block with `shared_limit` bytes of shared memory
// (cudaDevAttrMaxSharedMemoryPerBlockOptin); P = H and a dtype of at most 32 bits.
inline bool fits_block(Mode mode, Type type, int64_t H, int64_t shared_limit) {
  if (type == Type::f64 || H < 1 || H > kMaxWarps * kWarpUnits) return false;
  return block_plan(mode, type, H, false).shared <= shared_limit &&
         block_plan(mode, type, H, true).shared <= shared_limit;
}

// What both passes know of the sequence. Row b of step t stands at (t * B + b), or at
// (offsets[t] + b) while t < lengths[b], of the rows of all steps.
struct BlockSequence {
  BlockPlan plan;
  int64_t T, B, H, D, N;
  const int64_t* lengths;  // (B,) non-increasing, on the device, or null for a dense batch
  const int64_t* offsets;  // (T,) likewise
  int32_t relu;            // of the Elman cells: 0 tanh, 1 relu
};

// Pointers to device memory; contiguous unless strides are named. S is the dtype of the call.
struct BlockForward {
  BlockSequence s;
  // W_ih x: G*H values of row n and direction d, from n * gx_row + d * gx_direction on.
  const float* gx;
  int64_t gx_row, gx_direction;
  const void *h0, *c0;            // S (D, B, H); c0 of LSTM only
  const void* w_hh[2];            // S (G*H, H) of each direction
  const void *b_ih[2], *b_hh[2];  // S (G*H,) or null
  void *y, *h_n, *c_n;            // S (N, D*H), (D, B, H), (D, B, H)
  void *gates, *cells;            // S (D, N, 4H), (D, N, H), or null where nothing is kept
};

struct BlockBackward {
  BlockSequence s;
  const void *h0, *c0, *w_hh[2];
  const void *y, *gates, *cells;  // of the forward
  const void *dy, *dh_n, *dc_n;   // S, or null for zeros
  void* dg;                       // S (D, N, columns*H), the gradients of the pre-activations
  void *dh0, *dc0;                // S (D, B, H)
};

}  // namespace seqkern::cuda
