// The forward of one direction and one slice of the batch, all steps.
#pragma once
#include "core/cuda/cells.cuh"
#include "core/cuda/exchange.cuh"
#include "core/cuda/product.cuh"
#include "core/cuda/slice.cuh"

namespace seqkern::cuda {

// Input projections on their way from global memory, kStages steps ahead: every thread copies what
// it will read itself, so no barrier is needed for them.
template <int G>
struct ProjectionRing {
  float* mine;
  int stage;  // floats of a step

  SK_DEVICE float* at(unsigned step, int q, int e) const {
    return mine + int(step % kStages) * stage + (q * 4 + e) * 32;
  }
};

// X: how the blocks that share the slice exchange h.
template <Mode M, class S, class X>
struct ForwardPass {
  using K = Cell<M>;
  static constexpr int G = K::kGates;

  const ForwardCall& p;
  const Slice<X::kParts> me;
  const ProjectionRing<G> ring;
  S* const states;  // copies of h, (kSliceRows, row) each
  float h[4], c[4], bias[2][K::kColumns];

  SK_DEVICE ForwardPass(const ForwardCall& p_, char* shared)
      : p(p_),
        me(p_.s),
        ring{reinterpret_cast<float*>(shared + p_.s.plan.weights + p_.s.plan.states) +
                 me.place(G * 4),
             p_.s.plan.groups * G * 4 * 32},
        states(reinterpret_cast<S*>(shared + p_.s.plan.weights)) {}

  SK_DEVICE S* copy(int step) const {
    return states + step % X::kCopies * kSliceRows * p.s.plan.row;
  }

  SK_DEVICE void prepare() {
    clear_states(states, p.s.plan);
    SK_UNROLL
    for (int i = 0; i < 2; ++i) {
      float b_ih[G], b_hh[G];
      SK_UNROLL
      for (int q = 0; q < G; ++q) {
        b_ih[q] = me.template bias<S>(p.b_ih[me.d], q, i);
        b_hh[q] = me.template bias<S>(p.b_hh[me.d], q, i);
      }
      K::join_bias(b_ih, b_hh, bias[i]);
    }
    SK_UNROLL
    for (int e = 0; e < 4; ++e) {
      h[e] = me.template state<S>(p.h0, e);
      c[e] = K::kHasC ? me.template state<S>(p.c0, e) : 0.0f;
    }
    for (unsigned step = 0; step < kStages; ++step) prefetch(step);
    device::sync_threads();  // the copies of h are zero everywhere before the first values
    if (X::kParts)
      put_all();
    else
      SK_UNROLL for (int e = 0; e < 4; ++e) put(copy(0), e);
    device::sync_threads();
  }

  // h0 of all units, which nobody has to pass on.
  SK_DEVICE void put_all() const {
    const int64_t H = p.s.H;
    SK_NO_UNROLL
    for (int row = 0; row < kSliceRows && me.first + row < p.s.B; ++row) {
      const S* const from = static_cast<const S*>(p.h0) + (me.d * p.s.B + me.first + row) * H;
      for (int unit = device::thread_index(); unit < H; unit += device::thread_count())
        device::store(copy(0) + row * p.s.plan.row + unit,
                      device::operand(device::load(from + unit)));
    }
  }

  SK_DEVICE void put(S* to, int e) const {
    S value;
    device::from_float(value, h[e]);
    if (me.length[e] > 0)
      device::store(to + me.local_row(e) * p.s.plan.row + me.unit(e), device::operand(value));
  }

  // One group of copies for each step, also where there is nothing to copy: the waits count groups.
  SK_DEVICE void prefetch(unsigned step) const {
    if (step < unsigned(me.steps)) {
      const int t = me.time(int(step)), H = int(p.s.H);
      const float* const from = p.gx + me.row_at(t) * p.gx_row + me.d * p.gx_direction + me.unit(0);
      SK_UNROLL
      for (int e = 0; e < 4; ++e) {
        if (!me.alive(t, e)) continue;
        SK_UNROLL
        for (int q = 0; q < G; ++q)
          device::copy_async(ring.at(step, q, e), from + me.beside(e, p.gx_row) + q * H);
      }
    }
    device::commit_copies();
  }

  SK_DEVICE void run(const Product<S, G, false, X::kParts>& product, const X& exchange) {
    for (int step = 0; step < me.steps; ++step) {
      const int t = me.time(step);
      float gh[G][4];
      product.run(copy(step), gh);
      if constexpr (X::kParts) add_partials<G>(me, partials(), gh);
      // Only now, so that the projections take no registers during the product.
      device::wait_copies<kStages - 1>();
      float saved[4][4];
      SK_UNROLL
      for (int e = 0; e < 4; ++e)
        if (me.owns(e)) advance(step, me.alive(t, e), e, gh, saved[e]);
      SK_UNROLL
      for (int e = 0; e < 4; ++e) put(copy(step + 1), e);
      device::sync_threads();
      const bool more = step + 1 < me.steps;
      if constexpr (X::kParts)
        if (more) exchange.template send<S, 1>(copy(step + 1), step + 1);
      // What nobody waits for, while h is under way.
      keep(t, saved);
      prefetch(unsigned(step) + kStages);
      if constexpr (X::kParts)
        if (more) exchange.template receive<S, 1>(copy(step + 1), step + 1);
    }
    SK_UNROLL
    for (int e = 0; e < 4; ++e) {
      me.template put_state<S>(p.h_n, e, h[e]);
      if (K::kHasC) me.template put_state<S>(p.c_n, e, c[e]);
    }
  }

  SK_DEVICE float* partials() const {
    return reinterpret_cast<float*>(reinterpret_cast<char*>(states) + p.s.plan.states +
                                    p.s.plan.ring);
  }

  // The cell without a branch, so that a thread's four are computed side by side: what is not alive
  // finds something too, and keeps what it had.
  SK_DEVICE void advance(int step, bool alive, int e, const float (&gh)[G][4], float* saved) {
    float x[G], r[G], a[K::kColumns], next_h = h[e], next_c = c[e];
    SK_UNROLL
    for (int q = 0; q < G; ++q)
      x[q] = alive ? device::load(ring.at(step, q, e)) : 0.0f, r[q] = gh[q][e];
    K::join(x, r, bias[e / 2], a);
    K::forward(a, next_h, next_c, saved, p.s.relu);
    S y;
    device::from_float(y, next_h);
    h[e] = alive ? device::to_float(y) : h[e];
    c[e] = alive ? next_c : c[e];
  }

  // Stores y and what the backward reads.
  SK_DEVICE void keep(int t, const float (&saved)[4][4]) const {
    const int H = int(p.s.H), unit = me.unit(0);
    const int64_t n = me.row_at(t), kept = me.d * p.s.N + n, row = p.s.D * p.s.H;
    const int64_t y = n * row + me.d * H + unit, cells = kept * H + unit;
    const int64_t gates = kept * (4 * H) + unit;
    SK_UNROLL
    for (int e = 0; e < 4; ++e) {
      if (!me.alive(t, e)) continue;
      store_as<S>(p.y, y + me.beside(e, row), h[e]);
      if (K::kSaved && p.gates) {
        SK_UNROLL
        for (int q = 0; q < 4; ++q)
          store_as<S>(p.gates, gates + me.beside(e, 4 * H) + q * H, saved[e][q]);
      }
      if (K::kHasC && p.cells) store_as<S>(p.cells, cells + me.beside(e, H), c[e]);
    }
  }
};

template <Mode M, class S, class X>
SK_KERNEL(X::kWarps * 32)
recurrent_forward(const ForwardCall p) {
  if constexpr (X::kExists) {
    char* const shared = device::shared_memory();
    const int d = direction_of<X::kParts>(p.s);
    const Product<S, Cell<M>::kGates, false, X::kParts> product(p.s.plan, p.w_hh[d], int(p.s.H),
                                                                shared);
    const X exchange(p.s, shared);
    ForwardPass<M, S, X> pass(p, shared);
    pass.prepare();
    exchange.prepare();
    pass.run(product, exchange);
  }
}

}  // namespace seqkern::cuda
