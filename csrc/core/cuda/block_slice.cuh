// Where a thread's four values, two units of two rows, stand in the tensors of a call.
#pragma once
#include "core/cuda/block_product.cuh"

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

// Rows are sorted by length, so that a slice ends with its first row. The forward of direction 1
// begins at the slice's last step, where perhaps not all of its rows are alive yet.
struct Slice {
  const BlockSequence& s;
  const Lane lane;
  const int d;
  int64_t first, steps, length[2];

  SK_DEVICE explicit Slice(const BlockSequence& s_)
      : s(s_),
        lane(this_lane()),
        d(device::block_y()),
        first(int64_t(device::block_x()) * kSliceRows) {
    steps = s.lengths ? device::load(s.lengths + first) : s.T;
    SK_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int64_t b = first + lane.row + i;
      length[i] = b >= s.B ? 0 : s.lengths ? device::load(s.lengths + b) : s.T;
    }
  }

  SK_DEVICE int64_t unit(int e) const { return lane.unit + e / 2 * 8; }
  SK_DEVICE int local_row(int e) const { return lane.row + e % 2; }
  SK_DEVICE int64_t row(int e) const { return first + local_row(e); }
  SK_DEVICE bool exists(int e) const { return row(e) < s.B && unit(e) < s.H; }
  SK_DEVICE bool alive(int64_t t, int e) const { return t < length[e % 2] && unit(e) < s.H; }

  SK_DEVICE int64_t time(int64_t step) const { return d == 0 ? step : steps - 1 - step; }
  SK_DEVICE int64_t offset(int64_t t) const {
    return s.offsets ? device::load(s.offsets + t) : t * s.B;
  }

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

// Zeros in both copies, padding included, which the products read: 0 times what happened to be
// there could be NaN.
template <class S>
SK_DEVICE void clear_states(S* states, const BlockPlan& plan) {
  S zero;
  device::from_float(zero, 0.0f);
  for (int i = device::thread_index(); i < 2 * kSliceRows * plan.row; i += device::thread_count())
    device::store(states + i, zero);
}

}  // namespace seqkern::cuda
