// The forward of one direction and one slice of the batch, all steps in one block.
#pragma once
#include "core/cuda/block_product.cuh"
#include "core/cuda/block_slice.cuh"
#include "core/cuda/cells.cuh"

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

template <Mode M, class S>
struct BlockForwardPass {
  using K = Cell<M>;
  static constexpr int G = K::kGates;

  const BlockForward& p;
  const Slice me;
  const ProjectionRing<G> ring;
  S* const states;  // two copies of h, (kSliceRows, row) each
  float h[4], c[4], bias[2][K::kColumns];

  SK_DEVICE BlockForwardPass(const BlockForward& p_, char* shared)
      : p(p_),
        me(p_.s),
        ring{reinterpret_cast<float*>(shared + p_.s.plan.weights + p_.s.plan.states) +
                 device::thread_index(),
             device::thread_count()},
        states(reinterpret_cast<S*>(shared + p_.s.plan.weights)) {}

  SK_DEVICE S* copy(int64_t step) const { return states + (step & 1) * kSliceRows * p.s.plan.row; }

  SK_DEVICE void prepare() {
    clear_states(states, p.s.plan);
    SK_UNROLL
    for (int i = 0; i < 2; ++i) {
      float b_ih[G], b_hh[G];
      SK_UNROLL
      for (int q = 0; q < G; ++q) {
        b_ih[q] = me.bias<S>(p.b_ih[me.d], q, i);
        b_hh[q] = me.bias<S>(p.b_hh[me.d], q, i);
      }
      K::join_bias(b_ih, b_hh, bias[i]);
    }
    SK_UNROLL
    for (int e = 0; e < 4; ++e) {
      h[e] = me.state<S>(p.h0, e);
      c[e] = K::kHasC ? me.state<S>(p.c0, e) : 0.0f;
    }
    for (int64_t step = 0; step < kStages; ++step) prefetch(step);
    device::sync_threads();  // the copies of h are zero everywhere before the first values
    SK_UNROLL
    for (int e = 0; e < 4; ++e) put(copy(0), e);
    device::sync_threads();
  }

  SK_DEVICE void put(S* to, int e) const {
    S value;
    device::from_float(value, h[e]);
    if (me.unit(e) < p.s.H) device::store(to + me.local_row(e) * p.s.plan.row + me.unit(e), value);
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

  SK_DEVICE void run(const Product<S, G, false>& product) {
    for (int64_t step = 0; step < me.steps; ++step) {
      const int64_t t = me.time(step);
      float gx[G][4], gh[G][4];
      product.run(copy(step), gh);
      // Only now, so that the projections take no registers during the product.
      device::wait_copies<kStages - 1>();
      SK_UNROLL
      for (int e = 0; e < 4; ++e) {
        SK_UNROLL
        for (int q = 0; q < G; ++q)
          gx[q][e] = me.alive(t, e) ? device::load(ring.at(step, q, e)) : 0;
      }
      prefetch(step + kStages);
      SK_UNROLL
      for (int e = 0; e < 4; ++e) {
        if (me.alive(t, e)) advance(t, e, gx, gh);
        put(copy(step + 1), e);
      }
      device::sync_threads();
    }
    SK_UNROLL
    for (int e = 0; e < 4; ++e) {
      me.put_state<S>(p.h_n, e, h[e]);
      if (K::kHasC) me.put_state<S>(p.c_n, e, c[e]);
    }
  }

  SK_DEVICE void advance(int64_t t, int e, const float (&gx)[G][4], const float (&gh)[G][4]) {
    float x[G], r[G], a[K::kColumns], saved[4];
    SK_UNROLL
    for (int q = 0; q < G; ++q) x[q] = gx[q][e], r[q] = gh[q][e];
    K::join(x, r, bias[e / 2], a);
    K::forward(a, h[e], c[e], saved, p.s.relu);
    S y;
    device::from_float(y, h[e]);
    h[e] = device::to_float(y);
    const int64_t H = p.s.H, n = me.offset(t) + me.row(e);
    device::store(static_cast<S*>(p.y) + (n * p.s.D + me.d) * H + me.unit(e), y);
    const int64_t kept = me.d * p.s.N + n;
    if (K::kSaved && p.gates) {
      SK_UNROLL
      for (int q = 0; q < 4; ++q) store_as<S>(p.gates, kept * 4 * H + q * H + me.unit(e), saved[q]);
    }
    if (K::kHasC && p.cells) store_as<S>(p.cells, kept * H + me.unit(e), c[e]);
  }
};

template <Mode M, class S>
SK_KERNEL(kMaxWarps * 32)
block_forward(const BlockForward p) {
  char* const shared = device::shared_memory();
  const int d = device::block_y();
  BlockForwardPass<M, S> pass(p, shared);
  const Product<S, Cell<M>::kGates, false> product(p.s.plan, p.w_hh[d], p.s.H, shared);
  pass.prepare();
  pass.run(product);
}

}  // namespace seqkern::cuda
