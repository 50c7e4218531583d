// The backward of one direction and one slice of the batch, all steps, in the opposite order of the
// forward. It finds the gradients of the pre-activations, dg, and those of the initial
// states; dx, dW and db are products and sums over the rows of dg afterwards.
#pragma once
#include <type_traits>

#include "core/cuda/cells.cuh"
#include "core/cuda/exchange.cuh"
#include "core/cuda/product.cuh"
#include "core/cuda/scatter.cuh"
#include "core/cuda/slice.cuh"

namespace seqkern::cuda {

// X: how the blocks that share the slice exchange dg, or parts of dh.
template <Mode M, class S, class X>
struct BackwardPass {
  using K = Cell<M>;
  static constexpr int G = K::kGates;
  using Products = std::conditional_t<X::kScatters, Scatter<S, G>, Product<S, G, true, X::kParts>>;

  // What a step reads of one unit of one row, on its way from global memory.
  struct Kept {
    S gates[4], c, c_prev, h_prev, y, dy;
  };

  const BackwardCall& p;
  const Slice<X::kParts> me;
  S* const states;  // copies of dg, (kSliceRows, row) each, the gates `width` apart
  float dh[4], dc[4];

  SK_DEVICE BackwardPass(const BackwardCall& p_, char* shared)
      : p(p_), me(p_.s), states(reinterpret_cast<S*>(shared + p_.s.plan.weights)) {}

  SK_DEVICE S* copy(int step) const {
    return states + step % X::kCopies * kSliceRows * p.s.plan.row;
  }

  // The step of the forward that the backward comes to as `step`.
  SK_DEVICE int time(int step) const { return me.time(me.steps - 1 - step); }

  // Where element 0 stands in what has `each` values of a unit for direction and row, and where in
  // y, which has row and direction.
  SK_DEVICE int64_t in_rows_of(int64_t n, int each) const {
    return (me.d * p.s.N + n) * (each * int(p.s.H)) + me.unit(0);
  }
  SK_DEVICE int64_t in_y(int64_t n) const {
    return n * (p.s.D * p.s.H) + me.d * p.s.H + me.unit(0);
  }

  SK_DEVICE void fetch(int step, Kept (&kept)[4]) const {
    if (step >= me.steps) return;
    const int t = time(step), before = me.d == 0 ? t - 1 : t + 1, H = int(p.s.H);
    const int64_t n = me.row_at(t), row = p.s.D * p.s.H;
    const int64_t in_state = (me.d * p.s.B + me.row(0)) * H + me.unit(0);
    // Where there is no step before, nothing is read of it.
    const int64_t n_prev = me.row_at(before < 0 || before >= me.steps ? t : before);
    auto read = [](const void* from, int64_t i) {
      return device::load(static_cast<const S*>(from) + i);
    };
    SK_UNROLL
    for (int e = 0; e < 4; ++e) {
      if (!me.alive(t, e)) continue;
      Kept& k = kept[e];
      const int64_t in_rows = me.beside(e, H), in_y_rows = me.beside(e, row);
      const bool carried = unsigned(before) < unsigned(me.length[e]);
      if (K::kSaved) {
        SK_UNROLL
        for (int q = 0; q < 4; ++q)
          k.gates[q] = read(p.gates, in_rows_of(n, 4) + me.beside(e, 4 * H) + q * H);
      }
      if (K::kHasC) {
        k.c = read(p.cells, in_rows_of(n, 1) + in_rows);
        k.c_prev =
            read(carried ? p.cells : p.c0, (carried ? in_rows_of(n_prev, 1) : in_state) + in_rows);
      }
      if (K::kReadsH)
        k.h_prev =
            read(carried ? p.y : p.h0, carried ? in_y(n_prev) + in_y_rows : in_state + in_rows);
      if (K::kReadsY) k.y = read(p.y, in_y(n) + in_y_rows);
      if (p.dy)
        k.dy = read(p.dy, in_y(n) + in_y_rows);
      else
        device::from_float(k.dy, 0.0f);
    }
  }

  SK_DEVICE void prepare() {
    clear_states(states, p.s.plan);
    SK_UNROLL
    for (int e = 0; e < 4; ++e) {
      dh[e] = me.template state<S>(p.dh_n, e);
      dc[e] = K::kHasC ? me.template state<S>(p.dc_n, e) : 0.0f;
    }
    device::sync_threads();
  }

  // dh += W_hh^T dg of the step before; dead rows have dg = 0 and keep what they had.
  SK_DEVICE void recur(const Products& product, const X& exchange, int step) {
    if constexpr (X::kScatters)
      return add_parts(exchange, step);
    else
      add_products(product, step);
  }

  SK_DEVICE void add_parts(const X& exchange, int step) {
    float total[4] = {};
    exchange.await(step);
    for (int member = 0; member < p.s.plan.members; ++member) {
      SK_UNROLL
      for (int e = 0; e < 4; ++e)
        if (me.owns(e)) total[e] += exchange.part(step, member, me.lane.group, e);
    }
    SK_UNROLL
    for (int e = 0; e < 4; ++e) dh[e] += total[e];
  }

  SK_DEVICE void add_products(const Products& product, int step) {
    float sums[G][4];
    product.run(copy(step), sums);
    if constexpr (X::kParts) {
      float total[1][4] = {};
      SK_UNROLL
      for (int e = 0; e < 4; ++e) {
        SK_UNROLL
        for (int q = 0; q < G; ++q) total[0][e] += sums[q][e];
      }
      char* const partials = reinterpret_cast<char*>(states) + p.s.plan.states;
      add_partials<1>(me, reinterpret_cast<float*>(partials), total);
      SK_UNROLL
      for (int e = 0; e < 4; ++e) dh[e] += total[0][e];
    } else {
      SK_UNROLL
      for (int e = 0; e < 4; ++e) {
        SK_UNROLL
        for (int q = 0; q < G; ++q) dh[e] += sums[q][e];
      }
    }
  }

  SK_DEVICE void run(const Products& product, const X& exchange) {
    Kept next[4] = {};
    fetch(0, next);
    for (int step = 0; step < me.steps; ++step) {
      const int t = time(step);
      S dg[4][K::kColumns];
      if constexpr (X::kParts) {
        if (step > 0) recur(product, exchange, step);
        SK_UNROLL
        for (int e = 0; e < 4; ++e)
          if (me.owns(e)) retreat(me.alive(t, e), e, next[e], copy(step + 1), dg[e]);
      } else {
        Kept now[4];
        SK_UNROLL
        for (int e = 0; e < 4; ++e) now[e] = next[e];
        fetch(step + 1, next);
        if (step > 0) recur(product, exchange, step);
        SK_UNROLL
        for (int e = 0; e < 4; ++e) retreat(me.alive(t, e), e, now[e], copy(step + 1), dg[e]);
      }
      device::sync_threads();
      if constexpr (X::kScatters)
        product.run(copy(step + 1), exchange, step + 1);
      else if constexpr (X::kParts)
        exchange.template send<S, G>(copy(step + 1), step + 1);
      // What nobody waits for, while dg or the parts of dh are under way.
      keep(t, dg);
      // The exchange takes about as long as memory does, so that one step's values are enough.
      if constexpr (X::kParts) fetch(step + 1, next);
      if constexpr (X::kParts && !X::kScatters)
        exchange.template receive<S, G>(copy(step + 1), step + 1);
    }
    recur(product, exchange, me.steps);
    SK_UNROLL
    for (int e = 0; e < 4; ++e) {
      me.template put_state<S>(p.dh0, e, dh[e]);
      if (K::kHasC) me.template put_state<S>(p.dc0, e, dc[e]);
    }
  }

  // Without a branch, as the forward: what is not alive has dg = 0 and keeps its gradients.
  SK_DEVICE void retreat(bool alive, int e, const Kept& kept, S* to, S* dg) {
    float found[K::kColumns];
    step_cell(alive, kept, e, found);
    SK_UNROLL
    for (int q = 0; q < K::kColumns; ++q) device::from_float(dg[q], alive ? found[q] : 0.0f);
    if (me.length[e] == 0) return;
    SK_UNROLL
    for (int gate = 0; gate < G; ++gate)
      device::store(to + me.local_row(e) * p.s.plan.row + gate * p.s.plan.width + column(e),
                    device::operand(dg[K::column(gate)]));
  }

  SK_DEVICE void keep(int t, const S (&dg)[4][K::kColumns]) const {
    const int H = int(p.s.H);
    S* const to = static_cast<S*>(p.dg) + in_rows_of(me.row_at(t), K::kColumns);
    SK_UNROLL
    for (int e = 0; e < 4; ++e) {
      if (!me.alive(t, e)) continue;
      SK_UNROLL
      for (int q = 0; q < K::kColumns; ++q)
        device::store(to + me.beside(e, K::kColumns * H) + q * H, dg[e][q]);
    }
  }

  // Of a unit in a copy.
  SK_DEVICE int column(int e) const {
    return me.unit(e) - (X::kScatters ? device::block_x() * p.s.plan.units : 0);
  }

  SK_DEVICE void step_cell(bool alive, const Kept& kept, int e, float* dg) {
    CellGradient k{};
    if (K::kSaved) {
      SK_UNROLL
      for (int q = 0; q < 4; ++q) k.saved[q] = device::to_float(kept.gates[q]);
    }
    if (K::kHasC) k.c = device::to_float(kept.c), k.c_prev = device::to_float(kept.c_prev);
    if (K::kReadsH) k.h_prev = device::to_float(kept.h_prev);
    if (K::kReadsY) k.y = device::to_float(kept.y);
    k.dh = dh[e] + device::to_float(kept.dy);
    k.dc = dc[e];
    K::backward(k, dg, p.s.relu);
    dh[e] = alive ? k.dh : dh[e];
    dc[e] = alive ? k.dc : dc[e];
  }
};

template <Mode M, class S, class X>
SK_KERNEL(X::kWarps * 32)
recurrent_backward(const BackwardCall p) {
  if constexpr (X::kExists) {
    char* const shared = device::shared_memory();
    const int d = direction_of<X::kParts>(p.s);
    const typename BackwardPass<M, S, X>::Products product(p.s.plan, p.w_hh[d], int(p.s.H), shared);
    const X exchange(p.s, shared);
    BackwardPass<M, S, X> pass(p, shared);
    pass.prepare();
    exchange.prepare();
    pass.run(product, exchange);
  }
}

}  // namespace seqkern::cuda
