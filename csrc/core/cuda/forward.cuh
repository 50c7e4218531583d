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
  int threads;

  SK_DEVICE float* at(int64_t step, int q, int e) const {
    return mine + (int64_t(step % kStages) * G * 4 + q * 4 + e) * threads;
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
        ring{reinterpret_cast<float*>(shared + p_.s.plan.weights + p_.s.plan.states) + me.place(),
             me.places()},
        states(reinterpret_cast<S*>(shared + p_.s.plan.weights)) {}

  SK_DEVICE S* copy(int64_t step) const {
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
    for (int64_t step = 0; step < kStages; ++step) prefetch(step);
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
    if (me.mine(e))
      device::store(to + me.local_row(e) * p.s.plan.row + me.unit(e), device::operand(value));
  }

  // One group of copies for each step, also where there is nothing to copy: the waits count groups.
  SK_DEVICE void prefetch(int64_t step) const {
    if (step < me.steps) {
      const int64_t t = me.time(step);
      SK_UNROLL
      for (int e = 0; e < 4; ++e) {
        if (!me.alive(t, e)) continue;
        const float* from =
            p.gx + (me.offset(t) + me.row(e)) * p.gx_row + me.d * p.gx_direction + me.unit(e);
        SK_UNROLL
        for (int q = 0; q < G; ++q) device::copy_async(ring.at(step, q, e), from + q * p.s.H);
      }
    }
    device::commit_copies();
  }

  SK_DEVICE void run(const Product<S, G, false, X::kParts>& product, const X& exchange) {
    for (int64_t step = 0; step < me.steps; ++step) {
      const int64_t t = me.time(step);
      float gx[G][4], gh[G][4];
      product.run(copy(step), gh);
      if constexpr (X::kParts) add_partials<G>(me, partials(), gh);
      // Only now, so that the projections take no registers during the product.
      device::wait_copies<kStages - 1>();
      SK_UNROLL
      for (int e = 0; e < 4; ++e) {
        SK_UNROLL
        for (int q = 0; q < G; ++q)
          gx[q][e] = me.alive(t, e) ? device::load(ring.at(step, q, e)) : 0;
      }
      float saved[4][4];
      SK_UNROLL
      for (int e = 0; e < 4; ++e) {
        if (me.alive(t, e)) advance(e, gx, gh, saved[e]);
        put(copy(step + 1), e);
      }
      device::sync_threads();
      const bool more = step + 1 < me.steps;
      if constexpr (X::kParts)
        if (more) exchange.template send<S, 1>(copy(step + 1), step + 1);
      // What nobody waits for, while h is under way.
      SK_UNROLL
      for (int e = 0; e < 4; ++e)
        if (me.alive(t, e)) keep(t, e, saved[e]);
      prefetch(step + kStages);
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

  SK_DEVICE void advance(int e, const float (&gx)[G][4], const float (&gh)[G][4], float* saved) {
    float x[G], r[G], a[K::kColumns];
    SK_UNROLL
    for (int q = 0; q < G; ++q) x[q] = gx[q][e], r[q] = gh[q][e];
    K::join(x, r, bias[e / 2], a);
    K::forward(a, h[e], c[e], saved, p.s.relu);
    S y;
    device::from_float(y, h[e]);
    h[e] = device::to_float(y);
  }

  // Stores y and what the backward reads.
  SK_DEVICE void keep(int64_t t, int e, const float* saved) const {
    const int64_t H = p.s.H, n = me.offset(t) + me.row(e);
    store_as<S>(p.y, (n * p.s.D + me.d) * H + me.unit(e), h[e]);
    const int64_t kept = me.d * p.s.N + n;
    if (K::kSaved && p.gates) {
      SK_UNROLL
      for (int q = 0; q < 4; ++q) store_as<S>(p.gates, kept * 4 * H + q * H + me.unit(e), saved[q]);
    }
    if (K::kHasC && p.cells) store_as<S>(p.cells, kept * H + me.unit(e), c[e]);
  }
};

template <Mode M, class S, class X>
SK_KERNEL(X::kWarps * 32)
recurrent_forward(const ForwardCall p) {
  if constexpr (X::kExists) {
    char* const shared = device::shared_memory();
    const int d = direction_of<X::kParts>(p.s);
    const Product<S, Cell<M>::kGates, false, X::kParts> product(p.s.plan, p.w_hh[d], p.s.H, shared);
    const X exchange(p.s, shared);
    ForwardPass<M, S, X> pass(p, shared);
    pass.prepare();
    exchange.prepare();
    pass.run(product, exchange);
  }
}

}  // namespace seqkern::cuda
