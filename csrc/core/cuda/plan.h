// Recurrent layers on CUDA, all time steps in one launch: how a layer is spread over thread blocks,
// what that needs of the device, and the arguments of a launch. Included by nvcc and by the C++
// compiler.
//
// A slice of the batch and one direction is the work of one block, or of several that split the
// hidden units and pass h on after every step; in the backward dg, or parts of dh. A warp owns 16
// units for the whole sequence, or shares them with other warps that each take a part of k. W_hh
// stays in registers and shared memory over all steps, which bounds H.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "core/recurrent.h"

namespace seqkern::cuda {

constexpr int kSliceRows = 8;  // rows of the batch in a block: the columns of one product
constexpr int kWarpUnits = 16;
constexpr int kStages = 2;     // steps whose input projections are under way at once
constexpr int kTileWords = 8;  // of four bytes along k, in one product: 16 bf16 or f16, 8 tf32
constexpr int kTileBytes = 32 * 16;  // of a tile of the weights of one gate over a warp

// Warps of a block that has a slice to itself, so that each thread may have 168 registers, and of
// one that shares it, for 255: those that a thread needs besides weights are many, and fewer
// threads leave more for weights.
constexpr int kMaxWarps = 12, kTeamWarps = 8;
constexpr int kMaxCluster = 16;  // blocks

// How the blocks of a slice pass values on: not at all, through each other's shared memory, or
// through words in global memory.
enum class Skeleton : int { block = 0, cluster = 1, grid = 2 };

// The backward of a cluster (scatter.cuh) takes the units for which it has parts of sums in pairs
// of tiles. The weights of a pair for one tile of k are a chunk; so many chunks stay in registers.
constexpr int kPair = 2;
constexpr int held_chunks(int gates) { return gates == 4 ? 4 : gates == 3 ? 5 : 15; }

// Elsewhere: tiles of k whose weights stay in registers, for each of `gates` products on the tensor
// cores: what the other values of a step leave, or all that an Elman cell may need of one block.
constexpr int held_tiles(int gates, bool backward, bool alone) {
  if (alone) return gates == 4 ? (backward ? 3 : 4) : gates == 3 ? (backward ? 4 : 5) : kMaxWarps;
  return gates == 4 ? (backward ? 6 : 7) : gates == 3 ? (backward ? 8 : 9) : 24;
}

// What one warp does where several blocks share a slice, and several warps a group of units.
struct Part {
  int32_t group = 0;              // its units
  int32_t split = 0, splits = 1;  // which part of their sums and cells it has, of how many
  int32_t first = 0, count = 0;   // the tiles of k in that part; or the pairs of output tiles
  int32_t rest = 0;               // tiles or chunks of earlier warps that lie in shared memory
};

struct Plan {
  Skeleton skeleton = Skeleton::block;
  int32_t members = 1;   // blocks that share a slice
  int32_t groups = 0;    // of 16 units in a block
  int32_t units = 0;     // of a block
  int32_t warps = 0;     // of a block
  int32_t depth = 0;     // H padded to whole tiles, or to the units of all members
  int32_t width = 0;     // of k in a block: depth, or the block's own units
  int32_t tiles = 0;     // of k in width
  int32_t row = 0;       // elements between rows of h, or of dg, in shared memory
  int64_t weights = 0;   // bytes of W_hh in shared memory
  int64_t states = 0;    // bytes of the copies of h, or of dg
  int64_t ring = 0;      // bytes of the input projections under way
  int64_t partials = 0;  // bytes of the sums over parts of k, of warps or of members
  int32_t arriving = 0;  // bytes that a cluster's block gets for a step
  int64_t shared = 0;    // bytes in all, with a cluster's barriers
  int64_t words = 0;     // 8-byte words in global memory through which a grid's slice is passed on
  Part parts[kTeamWarps];  // of each warp, but not where a block is alone
};

// Gives all warps work: groups with a lower number may have one warp more than the others. Returns
// the tiles, or chunks, of all warps whose weights lie in shared memory.
inline int32_t share_out(Plan& p, bool scattered, int held) {
  const int32_t pairs = (p.members * p.groups + kPair - 1) / kPair;
  int32_t rest = 0;
  for (int warp = 0; warp < p.warps; ++warp) {
    Part& part = p.parts[warp];
    part.group = warp % p.groups, part.split = warp / p.groups;
    part.splits = (p.warps - part.group + p.groups - 1) / p.groups;
    const int32_t all = scattered ? pairs : p.tiles, parts = scattered ? p.warps : part.splits;
    const int32_t i = scattered ? warp : part.split;
    part.first = i * all / parts, part.count = (i + 1) * all / parts - part.first;
    part.rest = rest;
    rest += std::max((scattered ? p.tiles : 1) * part.count - held, 0);
  }
  return rest;
}

// The launch of the forward or the backward on blocks of 16 `groups` units; `shared` may exceed
// what a device has.
inline Plan plan_of(Skeleton skeleton, Mode mode, Type type, int64_t H, bool backward, int groups) {
  const int gates = gates_of(mode), size = size_of(type), rows = backward ? gates : 1;
  const bool alone = skeleton == Skeleton::block;
  const bool scattered = skeleton == Skeleton::cluster && backward;
  const int tile = kTileWords * 4 / size;
  Plan p;
  p.skeleton = skeleton, p.groups = groups, p.units = groups * kWarpUnits;
  p.members = alone ? 1 : int32_t((H + p.units - 1) / p.units);
  p.depth = alone ? int32_t((H + tile - 1) / tile * tile) : p.members * p.units;
  p.width = scattered ? p.units : p.depth, p.tiles = p.width / tile;
  // Uneven parts of k make room in more registers; fp32 has no weights there.
  const int most = type == Type::f32 ? kTeamWarps / groups * groups : kTeamWarps;
  p.warps = alone ? groups : scattered ? kTeamWarps : std::min(most, groups * p.tiles);
  // A row of h is 16 bytes more than a multiple of 32, which spreads eight rows over all banks.
  p.row = int32_t(rows * p.width + 16 / size);
  const int held = scattered ? held_chunks(gates) : held_tiles(gates, backward, alone);
  const int64_t rest = alone ? groups * std::max(p.tiles - held, 0) : share_out(p, scattered, held);
  p.weights = type == Type::f32 ? int64_t(groups) * gates * kWarpUnits * p.depth * size
                                : rest * (scattered ? kPair : 1) * gates * kTileBytes;
  // One copy is read while the next one fills; of a grid's, the words have the slots.
  p.states = (skeleton == Skeleton::grid ? 1ll : 2ll) * kSliceRows * p.row * size;
  const int64_t values = int64_t(groups) * 32 * 4 * sizeof(float);  // four for each thread
  p.ring = backward ? 0 : kStages * gates * values;
  p.partials = alone       ? 0
               : scattered ? 2 * p.members * values
                           : (p.parts[0].splits - 1) * (backward ? 1 : gates) * values;
  p.shared = p.weights + p.states + p.ring + p.partials;
  if (skeleton == Skeleton::cluster) {
    p.shared += 2 * sizeof(uint64_t);
    p.arriving =
        int32_t(scattered ? p.members * values : (p.members - 1ll) * p.units * kSliceRows * size);
  }
  if (skeleton == Skeleton::grid) p.words = 2ll * kSliceRows * rows * p.depth * size / 4;
  return p;
}

// One block for each slice, which is to have all units.
inline Plan block_plan(Mode mode, Type type, int64_t H, bool backward) {
  const int groups = int((H + kWarpUnits - 1) / kWarpUnits);
  return plan_of(Skeleton::block, mode, type, H, backward, groups);
}

// What a device has for a launch.
struct Card {
  int64_t shared = 0;  // bytes of a block (cudaDevAttrMaxSharedMemoryPerBlockOptin)
  int64_t blocks = 0;  // multiprocessors: a block of these kernels fills one
  bool clusters = false, grids = false;
};

// The plans of a layer that fit a card as far as their sizes say, in the order in which to try
// them: candidate number `i`, or false beyond the last. One block; the smallest clusters; the
// grid of fewest blocks, which leaves room for other slices. They depend on neither T nor B: the
// order of a sum, which differs between them, is a layer's own.
inline bool candidate(const Card& card, Mode mode, Type type, int64_t H, bool backward, int i,
                      Plan* plan) {
  if (type == Type::f64 || H < 1 || H > 1 << 20) return false;  // beyond any card
  const int64_t groups = (H + kWarpUnits - 1) / kWarpUnits;
  int found = 0;
  auto take = [&](Skeleton skeleton, int64_t each) {
    if (each > (skeleton == Skeleton::block ? kMaxWarps : kTeamWarps)) return false;
    *plan = plan_of(skeleton, mode, type, H, backward, int(each));
    return plan->shared <= card.shared && found++ == i;
  };
  if (take(Skeleton::block, groups)) return true;
  int64_t before = 0;  // of the cluster just tried
  for (int64_t n = 2; card.clusters && n <= kMaxCluster && n <= groups; ++n) {
    const int64_t each = (groups + n - 1) / n;
    if (each != before && take(Skeleton::cluster, each)) return true;
    before = each;
  }
  for (int64_t each = kTeamWarps; card.grids && each > 0; --each) {
    const int64_t members = (groups + each - 1) / each;
    if (members > 1 && members <= card.blocks && take(Skeleton::grid, each)) return true;
  }
  return false;
}

// What both passes know of the sequence. Row b of step t stands at (t * B + b), or at
// (offsets[t] + b) while t < lengths[b], of the rows of all steps.
struct Sequence {
  Plan plan;
  int64_t T, B, H, D, N;
  const int64_t* lengths;  // (B,) non-increasing, on the device, or null for a dense batch
  const int64_t* offsets;  // (T,) likewise
  int32_t relu;            // of the Elman cells: 0 tanh, 1 relu
  // Where several blocks share a slice: the first of the slices and directions that this launch
  // computes, direction d of slice i being number i * D + d, and the words of a grid, zero at the
  // start, `plan.words` for each.
  int32_t first;
  int64_t slices;  // how many of them run at once, in a grid
  uint64_t* words;
};

// Pointers to device memory; contiguous unless strides are named. S is the dtype of the call.
struct ForwardCall {
  Sequence s;
  // W_ih x: G*H values of row n and direction d, from n * gx_row + d * gx_direction on.
  const float* gx;
  int64_t gx_row, gx_direction;
  const void *h0, *c0;            // S (D, B, H); c0 of LSTM only
  const void* w_hh[2];            // S (G*H, H) of each direction
  const void *b_ih[2], *b_hh[2];  // S (G*H,) or null
  void *y, *h_n, *c_n;            // S (N, D*H), (D, B, H), (D, B, H)
  void *gates, *cells;            // S (D, N, 4H), (D, N, H), or null where nothing is kept
};

struct BackwardCall {
  Sequence s;
  const void *h0, *c0, *w_hh[2];
  const void *y, *gates, *cells;  // of the forward
  const void *dy, *dh_n, *dc_n;   // S, or null for zeros
  void* dg;                       // S (D, N, columns*H), the gradients of the pre-activations
  void *dh0, *dc0;                // S (D, B, H)
};

}  // namespace seqkern::cuda
