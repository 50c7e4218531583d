// The products with W_hh of the backward where a cluster shares a slice. A block has the weights of
// its own units' gates, multiplies them by its own dg, and so adds up its part of dh for the units
// of all members. Each part goes to the member that owns the units, which adds up what it gets. So
// dg stays where it was computed, and dh is all that travels.
//
// A warp takes 16 units at a time, two such tiles side by side, which share what is read of dg; the
// lanes hold sums as in product.cuh. The terms of a part are added in one order of k and gates, and
// the parts in the order of the members, for every row alike, whatever the batch.
#pragma once
#include "core/cuda/product.cuh"

namespace seqkern::cuda {

// The output tiles of a warp one after the other, and whose they are.
struct Outputs {
  const Plan& plan;
  int member, group;

  SK_DEVICE Outputs(const Plan& plan_, const Part& part)
      : plan(plan_),
        member(kPair * part.first / plan.groups),
        group(kPair * part.first % plan.groups) {}

  // Sends a part on, unless the last pair has one tile alone; clears it for the next tile.
  template <class X>
  SK_DEVICE void send(const X& exchange, int step, float (&sums)[4]) {
    if (member < plan.members) exchange.send(step, member, group, sums);
    if (++group == plan.groups) group = 0, ++member;
    SK_UNROLL
    for (int e = 0; e < 4; ++e) sums[e] = 0.0f;
  }
};

// Through the tensor cores. The first kHeld chunks of a warp stay in registers; the others in
// shared memory, in the order in which the lanes read them.
template <class S, int G>
struct Scatter {
  static constexpr int kHeld = held_chunks(G);
  static constexpr int kValues = 4 / sizeof(S);  // in a word

  const Plan& plan;
  const Part& part;
  uint32_t held[kHeld][kPair][G][4];
  device::Words4* rest;
  int chunks;

  SK_DEVICE Scatter(const Plan& plan_, const void* w, int H, char* shared)
      : plan(plan_),
        part(plan.parts[device::thread_index() / 32]),
        rest(reinterpret_cast<device::Words4*>(shared) + device::thread_index() % 32),
        chunks(part.count * plan.tiles) {
    rest += int64_t(part.rest) * kPair * G * 32;
    SK_UNROLL
    for (int c = 0; c < kHeld; ++c) {
      const int at = unforeseen(c, shared, plan);
      SK_UNROLL
      for (int i = 0; i < kPair * G; ++i) load(w, H, at, i / G, i % G, held[c][i / G][i % G]);
    }
    device::sync_threads();
    SK_NO_UNROLL
    for (int c = kHeld; c < chunks; ++c) {
      SK_NO_UNROLL
      for (int i = 0; i < kPair; ++i) {
        device::Words4 words[G];  // all on their way before the first is stored
        SK_UNROLL
        for (int q = 0; q < G; ++q) load(w, H, c, i, q, words[q].v);
        SK_UNROLL
        for (int q = 0; q < G; ++q) device::store(at(c, i, q), words[q]);
      }
    }
  }

  SK_DEVICE device::Words4* at(int chunk, int i, int q) const {
    return rest + ((chunk - kHeld) * kPair * G + i * G + q) * 32;
  }

  SK_DEVICE void load(const void* w, int H, int chunk, int i, int q, uint32_t (&a)[4]) const {
    const int output = (part.first + chunk / plan.tiles) * kPair + i;
    const int first = device::block_x() * plan.units / kValues;
    load_tile<S, true>(w, H, q, output * kWarpUnits + device::thread_index() % 32 / 4,
                       first + chunk % plan.tiles * kTileWords, a);
  }

  // `dg`: rows with the gates of the block's own units side by side; operands.
  template <class X>
  SK_DEVICE void run(const S* dg, const X& exchange, int step) const {
    const int lane = device::thread_index() % 32;
    const uint32_t* const b =
        reinterpret_cast<const uint32_t*>(dg) + lane / 4 * (plan.row / kValues) + lane % 4;
    Outputs outputs(plan, part);
    float sums[kPair][4] = {};
    int tile = 0;
    auto finish = [&] {
      if (++tile < plan.tiles) return;
      tile = 0;
      SK_UNROLL
      for (int i = 0; i < kPair; ++i) outputs.send(exchange, step, sums[i]);
    };
    SK_UNROLL
    for (int c = 0; c < kHeld; ++c) {
      if (c >= chunks) continue;
      add_chunk(b + tile * kTileWords, held[c], sums);
      finish();
    }
    SK_NO_UNROLL
    for (int c = kHeld; c < chunks; ++c) {
      uint32_t a[kPair][G][4];
      SK_UNROLL
      for (int i = 0; i < kPair * G; ++i) {
        const device::Words4 words = device::load(at(c, i / G, i % G));
        SK_UNROLL
        for (int j = 0; j < 4; ++j) a[i / G][i % G][j] = words.v[j];
      }
      add_chunk(b + tile * kTileWords, a, sums);
      finish();
    }
  }

  SK_DEVICE void add_chunk(const uint32_t* b, const uint32_t (&a)[kPair][G][4],
                           float (&sums)[kPair][4]) const {
    SK_UNROLL
    for (int q = 0; q < G; ++q) {
      const uint32_t* const words = b + q * (plan.units / kValues);
      const uint32_t b0 = device::load(words), b1 = device::load(words + 4);
      SK_UNROLL
      for (int i = 0; i < kPair; ++i) device::multiply_add(sums[i], a[i][q], b0, b1, S{});
    }
  }
};

// fp32 by fused multiply-adds, all weights in shared memory: for each output tile and gate, four k
// of the 16 units side by side.
template <int G>
struct Scatter<float, G> {
  const Plan& plan;
  const Part& part;
  device::Floats4* weights;  // of the warp
  int quads, count;          // of four k in a gate; of output tiles

  SK_DEVICE Scatter(const Plan& plan_, const void* w, int H, char* shared)
      : plan(plan_),
        part(plan.parts[device::thread_index() / 32]),
        weights(reinterpret_cast<device::Floats4*>(shared)),
        quads(plan.units / 4) {
    const int first = kPair * part.first, all = plan.members * plan.groups - first;
    count = all < kPair * part.count ? all : kPair * part.count;
    weights += int64_t(first) * G * quads * kWarpUnits;
    SK_NO_UNROLL
    for (int i = device::thread_index() % 32; i < count * G * quads * kWarpUnits; i += 32) {
      const int unit = i % kWarpUnits, quad = i / kWarpUnits % quads,
                q = i / kWarpUnits / quads % G;
      const int output = first + i / kWarpUnits / quads / G;
      device::Floats4 four;
      SK_UNROLL
      for (int j = 0; j < 4; ++j)
        four.v[j] = weight<float, true>(w, H, q, output * kWarpUnits + unit,
                                        device::block_x() * plan.units + quad * 4 + j);
      device::store(weights + i, four);
    }
  }

  template <class X>
  SK_DEVICE void run(const float* dg, const X& exchange, int step) const {
    const int lane = device::thread_index() % 32;
    const device::Floats4* x[2];
    SK_UNROLL
    for (int r = 0; r < 2; ++r)
      x[r] = reinterpret_cast<const device::Floats4*>(dg + (lane % 4 * 2 + r) * plan.row);
    const device::Floats4* a = weights + lane / 4;
    Outputs outputs(plan, part);
    float sums[4] = {};
    SK_NO_UNROLL
    for (int output = 0; output < count; ++output) {
      SK_NO_UNROLL
      for (int k = 0; k < G * quads; ++k, a += kWarpUnits)
        add_quad(device::load(a), device::load(a + 8),
                 {device::load(x[0] + k), device::load(x[1] + k)}, sums);
      outputs.send(exchange, step, sums);
    }
  }
};

}  // namespace seqkern::cuda
