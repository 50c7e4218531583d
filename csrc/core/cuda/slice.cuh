// Where a thread's four values, two units of two rows, stand in the tensors of a call.
#pragma once
#include "core/cuda/product.cuh"

namespace seqkern::cuda {

template <class S>
SK_DEVICE float load_as(const void* p, int64_t at) {
  return device::to_float(device::load(static_cast<const S*>(p) + at));
}
template <class S>
SK_DEVICE void store_as(void* p, int64_t at, float value) {
  S stored;
  device::from_float(stored, value);
  device::store(static_cast<S*>(p) + at, stored);
}

template <bool kParts>
SK_DEVICE int direction_of(const Sequence& s) {
  return kParts ? (s.first + device::block_y()) % int(s.D) : device::block_y();
}

// Rows are sorted by length, so that a slice ends with its first row. The forward of direction 1
// begins at the slice's last step, where perhaps not all of its rows are alive yet.
//
// kParts: where several warps share a group of units, each element has one of them that knows its
// state and computes its cell.
//
// T and B have 31 bits (recurrent_cuda.cpp sees to that), so that steps and rows are int; what
// counts the elements of a tensor is not.
template <bool kParts>
struct Slice {
  const Sequence& s;
  const Lane lane;
  const int d;
  int first, steps;
  int length[4];  // of the row of each element; 0 where it is not this thread's, or does not exist

  SK_DEVICE explicit Slice(const Sequence& s_)
      : s(s_), lane(this_lane<kParts>(s_.plan)), d(direction_of<kParts>(s_)) {
    first = kParts ? (s.first + device::block_y()) / int(s.D) : device::block_x();
    first *= kSliceRows;
    steps = int(s.lengths ? device::load(s.lengths + first) : s.T);
    SK_UNROLL
    for (int e = 0; e < 4; ++e)
      length[e] = int(!exists(e) ? 0 : s.lengths ? device::load(s.lengths + row(e)) : s.T);
  }

  SK_DEVICE int unit(int e) const { return lane.unit + e / 2 * 8; }
  SK_DEVICE int local_row(int e) const { return lane.row + e % 2; }
  SK_DEVICE int row(int e) const { return first + local_row(e); }
  SK_DEVICE int owner(int e) const { return e * lane.splits / 4; }
  SK_DEVICE bool owns(int e) const { return !kParts || owner(e) == lane.split; }
  SK_DEVICE bool mine(int e) const { return unit(e) < s.H && owns(e); }
  SK_DEVICE bool exists(int e) const { return row(e) < s.B && mine(e); }
  SK_DEVICE bool alive(int t, int e) const { return t < length[e]; }
  // Where a value of this thread's units and rows stands, of `each` such for a group, the lanes
  // side by side: the same for the threads of all parts.
  SK_DEVICE int place(int each) const { return lane.group * each * 32 + lane.lane; }

  SK_DEVICE int time(int step) const { return d == 0 ? step : steps - 1 - step; }
  // Of element 0 at time t, among the rows of all steps; those of element 1 are the next.
  SK_DEVICE int64_t row_at(int t) const {
    return (s.offsets ? device::load(s.offsets + t) : t * s.B) + row(0);
  }
  // Between element e and element 0, in a tensor whose rows are so far apart.
  SK_DEVICE int64_t beside(int e, int64_t apart) const { return e % 2 * apart + e / 2 * 8; }

  // Of a (D, B, H) tensor, or 0 where it is null or the value does not exist.
  template <class S>
  SK_DEVICE float state(const void* p, int e) const {
    return p && exists(e) ? load_as<S>(p, (d * s.B + row(e)) * s.H + unit(e)) : 0.0f;
  }
  template <class S>
  SK_DEVICE void put_state(void* p, int e, float value) const {
    if (exists(e)) store_as<S>(p, (d * s.B + row(e)) * s.H + unit(e), value);
  }
  // Of unit(2 i) and gate q.
  template <class S>
  SK_DEVICE float bias(const void* p, int q, int i) const {
    return p && unit(2 * i) < s.H ? load_as<S>(p, q * s.H + unit(2 * i)) : 0.0f;
  }
};

// Zeros in all copies, padding included, which the products read: 0 times what happened to be
// there could be NaN.
template <class S>
SK_DEVICE void clear_states(S* states, const Plan& plan) {
  S zero;
  device::from_float(zero, 0.0f);
  const int count = int(plan.states / int64_t(sizeof(S)));
  for (int i = device::thread_index(); i < count; i += device::thread_count())
    device::store(states + i, zero);
}

// Adds up the sums of the warps that share a group of units, in the order of k, for the owner of
// each element. All threads of the block come here.
template <int V>
SK_DEVICE void add_partials(const Slice<true>& me, float* partials, float (&sums)[V][4]) {
  // The owner of an element hands nothing over.
  float* const mine = partials + me.place(V * 4);
  auto at = [&](int split, int v, int e) {
    const int part = split - (split > me.owner(e));
    return mine + part * me.s.plan.groups * V * 4 * 32 + (v * 4 + e) * 32;
  };
  SK_UNROLL
  for (int e = 0; e < 4; ++e) {
    if (me.owns(e)) continue;
    SK_UNROLL
    for (int v = 0; v < V; ++v) device::store(at(me.lane.split, v, e), sums[v][e]);
  }
  device::sync_threads();
  SK_UNROLL
  for (int e = 0; e < 4; ++e) {
    if (!me.owns(e)) continue;
    float total[V] = {};
    SK_NO_UNROLL
    for (int split = 0; split < me.lane.splits; ++split) {
      SK_UNROLL
      for (int v = 0; v < V; ++v)
        total[v] += split == me.lane.split ? sums[v][e] : device::load(at(split, v, e));
    }
    SK_UNROLL
    for (int v = 0; v < V; ++v) sums[v][e] = total[v];
  }
}

}  // namespace seqkern::cuda
