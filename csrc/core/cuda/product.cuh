// The products with W_hh of one warp: 16 hidden units, the 8 rows of the slice, each gate; over all
// of k, or over its part of it where several warps share the units.
//
// Lane 4 u + r of a warp holds, in every array of four, the units u and u + 8 for the rows 2 r and
// 2 r + 1: [0] (u, 2r), [1] (u, 2r + 1), [2] (u + 8, 2r), [3] (u + 8, 2r + 1). That is how PTX lays
// down the accumulators of m16n8k16 and m16n8k8, and the other product follows it, so that all
// gates of a unit meet in one thread and the cell needs no exchange.
//
// Forward: sums[q] = W_hh[q] h, k over the units. Backward (kTransposed): sums[q] = W_hh[q]^T
// dg[q], whose total over q is the gradient of h. The terms of a sum are added in the order of k,
// and the parts of k in theirs, for every row alike, whatever the batch.
#pragma once
#include "core/cuda/device.cuh"
#include "core/cuda/plan.h"

namespace seqkern::cuda {

struct Lane {
  int lane, group, split, splits;  // the warp's units, and which part of k it takes, of how many
  int unit, row;                   // of the layer and of the slice, of element [0]
  int tile, tiles;                 // that part: the first of its tiles, and how many
};

// kParts: several blocks share a slice, and several warps a group of units.
template <bool kParts>
SK_DEVICE Lane this_lane(const Plan& plan) {
  const int warp = device::thread_index() / 32, lane = device::thread_index() % 32;
  Lane me{lane, warp, 0, 1, warp * kWarpUnits + lane / 4, lane % 4 * 2, 0, plan.tiles};
  if (kParts) {
    const Part& part = plan.parts[warp];
    me.group = part.group, me.split = part.split, me.splits = part.splits;
    me.unit = (device::block_x() * plan.groups + part.group) * kWarpUnits + lane / 4;
    me.tile = part.first, me.tiles = part.count;
  }
  return me;
}

// The weight between output `unit` and input k of gate q; 0 beyond the matrix. What blocks keep for
// a whole sequence has far fewer than 2^31 values.
template <class S, bool kTransposed>
SK_DEVICE S weight(const void* w, int H, int q, int unit, int k) {
  S zero;
  device::from_float(zero, 0.0f);
  if (unit >= H || k >= H) return zero;
  const int at = kTransposed ? (q * H + k) * H + unit : (q * H + unit) * H + k;
  return device::load(static_cast<const S*>(w) + at);
}

// Whether rows of W_hh begin at whole words of two values.
SK_DEVICE bool whole_words(const void* w, int H) {
  return H % 2 == 0 && reinterpret_cast<uintptr_t>(w) % 4 == 0;
}

// A lane's words of the weights of gate q between output units `unit`, `unit` + 8, ... of a warp
// and one tile of k, which begins at word `first` of four bytes: operands.
template <class S, bool kTransposed>
SK_DEVICE void load_tile(const void* w, int H, int q, int unit, int first, uint32_t (&a)[4]) {
  constexpr int kValues = 4 / sizeof(S);
  const bool whole = kValues == 2 && !kTransposed && whole_words(w, H);
  SK_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int k = (first + device::thread_index() % 4 + i / 2 * 4) * kValues;
    const int of = unit + i % 2 * 8;
    if constexpr (kValues == 1) {
      a[i] = device::operand(weight<S, kTransposed>(w, H, q, of, k)).bits;
    } else if (whole) {
      const bool inside = of < H && k < H;
      a[i] =
          inside ? device::load(static_cast<const uint32_t*>(w) + ((q * H + of) * H + k) / 2) : 0;
    } else {
      const S low = weight<S, kTransposed>(w, H, q, of, k);
      const S high = weight<S, kTransposed>(w, H, q, of, k + 1);
      a[i] = low.bits | uint32_t(high.bits) << 16;
    }
  }
}

// The number of the next tile by way of shared memory: the compiler, which unrolls the loop, would
// else compute the addresses of all tiles beforehand, in registers that spill. The memory is that
// of the states, which are not there yet.
SK_DEVICE int unforeseen(int tile, char* shared, const Plan& plan) {
  int* const slot = reinterpret_cast<int*>(shared + plan.weights);
  device::sync_threads();
  if (device::thread_index() == 0) device::store(slot, tile);
  device::sync_threads();
  return device::load(slot);
}

// Through the tensor cores. The first kHeld tiles of k stay in registers; the others in shared
// memory, in the order in which the lanes read them, 16 bytes at a time.
template <class S, int G, bool kTransposed, bool kParts>
struct Product {
  static constexpr int kHeld = held_tiles(G, kTransposed, !kParts);
  static constexpr int kValues = 4 / sizeof(S);  // in a word

  uint32_t held[kHeld][G][4];
  device::Words4* rest;
  int tiles, apart, row;  // words between the gates of a row of dg, and between rows
  Lane me;

  SK_DEVICE Product(const Plan& plan, const void* w, int H, char* shared)
      : apart(plan.depth / kValues), row(plan.row / kValues), me(this_lane<kParts>(plan)) {
    tiles = me.tiles;
    const int before = kParts ? plan.parts[device::thread_index() / 32].rest
                              : me.group * (tiles > kHeld ? tiles - kHeld : 0);
    rest = reinterpret_cast<device::Words4*>(shared + int64_t(before) * G * kTileBytes) + me.lane;
    SK_UNROLL
    for (int tile = 0; tile < kHeld; ++tile) {
      const int at = kParts ? unforeseen(tile, shared, plan) : tile;
      SK_UNROLL
      for (int q = 0; q < G; ++q) load(w, H, q, at, held[tile][q]);
    }
    if (kParts) device::sync_threads();
    SK_NO_UNROLL
    for (int tile = kHeld; tile < tiles; ++tile) {
      device::Words4 words[G];  // all on their way before the first is stored
      SK_UNROLL
      for (int q = 0; q < G; ++q) load(w, H, q, tile, words[q].v);
      SK_UNROLL
      for (int q = 0; q < G; ++q) device::store(rest + ((tile - kHeld) * G + q) * 32, words[q]);
    }
  }

  SK_DEVICE void load(const void* w, int H, int q, int tile, uint32_t (&a)[4]) const {
    load_tile<S, kTransposed>(w, H, q, me.unit, (me.tile + tile) * kTileWords, a);
  }

  // `b`: the rows of h, or of dg with the gates side by side, `depth` apart; operands.
  SK_DEVICE void run(const S* b, float (&sums)[G][4]) const {
    const uint32_t* const mine = reinterpret_cast<const uint32_t*>(b) + me.lane / 4 * row +
                                 me.tile * kTileWords + me.lane % 4;
    SK_UNROLL
    for (int q = 0; q < G; ++q) {
      SK_UNROLL
      for (int e = 0; e < 4; ++e) sums[q][e] = 0.0f;
    }
    SK_UNROLL
    for (int tile = 0; tile < kHeld; ++tile)
      if (tile < tiles) add_tile(mine + tile * kTileWords, held[tile], sums);
    SK_NO_UNROLL
    for (int tile = kHeld; tile < tiles; ++tile) {
      uint32_t a[G][4];
      SK_UNROLL
      for (int q = 0; q < G; ++q) {
        const device::Words4 words = device::load(rest + ((tile - kHeld) * G + q) * 32);
        SK_UNROLL
        for (int i = 0; i < 4; ++i) a[q][i] = words.v[i];
      }
      add_tile(mine + tile * kTileWords, a, sums);
    }
  }

  SK_DEVICE void add_tile(const uint32_t* b, const uint32_t (&a)[G][4], float (&sums)[G][4]) const {
    uint32_t b0 = 0, b1 = 0;
    SK_UNROLL
    for (int q = 0; q < G; ++q) {
      if (q == 0 || kTransposed) {
        const uint32_t* const words = b + (kTransposed ? q * apart : 0);
        b0 = device::load(words), b1 = device::load(words + 4);
      }
      device::multiply_add(sums[q], a[q], b0, b1, S{});
    }
  }
};

// Four k of a lane's two units and two rows in fp32.
SK_DEVICE void add_quad(const device::Floats4& low, const device::Floats4& high,
                        const device::Floats4 (&x)[2], float (&sums)[4]) {
  SK_UNROLL
  for (int j = 0; j < 4; ++j) {
    SK_UNROLL
    for (int r = 0; r < 2; ++r) {
      sums[r] = device::fused(low.v[j], x[r].v[j], sums[r]);
      sums[2 + r] = device::fused(high.v[j], x[r].v[j], sums[2 + r]);
    }
  }
}

// fp32 by fused multiply-adds, all weights in shared memory: for each warp and gate, four k of
// the 16 units side by side.
template <int G, bool kTransposed, bool kParts>
struct Product<float, G, kTransposed, kParts> {
  const device::Floats4* weights;
  int depth, row, quads, first;  // of four k: of this warp, and where those begin
  Lane me;

  SK_DEVICE Product(const Plan& plan, const void* w, int H, char* shared)
      : depth(plan.depth), row(plan.row), me(this_lane<kParts>(plan)) {
    quads = me.tiles * (kTileWords / 4), first = me.tile * (kTileWords / 4);
    device::Floats4* mine = reinterpret_cast<device::Floats4*>(shared) +
                            G * kWarpUnits * (int64_t(me.group) * (depth / 4) + first);
    SK_NO_UNROLL
    for (int i = me.lane; i < G * quads * kWarpUnits; i += 32) {
      const int unit = i % kWarpUnits, k = (first + i / kWarpUnits % quads) * 4;
      device::Floats4 four;
      SK_UNROLL
      for (int j = 0; j < 4; ++j)
        four.v[j] = weight<float, kTransposed>(w, H, i / kWarpUnits / quads,
                                               me.unit - me.lane / 4 + unit, k + j);
      device::store(mine + i, four);
    }
    weights = mine + me.lane / 4;
  }

  SK_DEVICE void run(const float* b, float (&sums)[G][4]) const {
    const device::Floats4* rows[2] = {
        reinterpret_cast<const device::Floats4*>(b + me.row * row) + first,
        reinterpret_cast<const device::Floats4*>(b + (me.row + 1) * row) + first};
    SK_UNROLL
    for (int q = 0; q < G; ++q) {
      SK_UNROLL
      for (int e = 0; e < 4; ++e) sums[q][e] = 0.0f;
    }
    SK_NO_UNROLL
    for (int k = 0; k < quads; ++k) {
      device::Floats4 x[2];
      SK_UNROLL
      for (int q = 0; q < G; ++q) {
        if (q == 0 || kTransposed)
          for (int r = 0; r < 2; ++r)
            x[r] = device::load(rows[r] + (kTransposed ? q * (depth / 4) : 0) + k);
        add_quad(device::load(weights + (q * quads + k) * kWarpUnits),
                 device::load(weights + (q * quads + k) * kWarpUnits + 8), x, sums[q]);
      }
    }
  }
};

}  // namespace seqkern::cuda
