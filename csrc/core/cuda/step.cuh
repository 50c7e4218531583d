// The cell of every unit of every row of one step: V units to a thread, 16 bytes of the call's
// dtype, or one where the sizes do not allow that.
#pragma once
#include "core/cuda/cells.cuh"
#include "core/cuda/step.h"

namespace seqkern::cuda {

constexpr int kStepThreads = 256;

// Value i of a word of memory.
template <class S>
SK_DEVICE float value_of(uint32_t word, int i) {
  if constexpr (sizeof(S) == 4)
    return device::to_float(tf32{word});
  else
    return device::to_float(S{uint16_t(word >> 16 * i)});
}
template <class S>
SK_DEVICE uint32_t word_of(const float* x) {
  if constexpr (sizeof(S) == 4) {
    tf32 word;
    device::from_float(word, x[0]);
    return word.bits;
  } else {
    S low, high;
    device::from_float(low, x[0]), device::from_float(high, x[1]);
    return low.bits | uint32_t(high.bits) << 16;
  }
}

template <class S, int V>
SK_DEVICE void read(const void* p, int64_t at, float (&x)[V]) {
  const S* const from = static_cast<const S*>(p) + at;
  if constexpr (V == 1) {
    x[0] = device::to_float(device::load(from));
  } else {
    constexpr int kValues = 4 / sizeof(S);
    SK_UNROLL
    for (int i = 0; i < V; i += 4 * kValues) {
      const auto words = device::load(reinterpret_cast<const device::Words4*>(from + i));
      SK_UNROLL
      for (int j = 0; j < 4 * kValues; ++j)
        x[i + j] = value_of<S>(words.v[j / kValues], j % kValues);
    }
  }
}
template <class S, int V>
SK_DEVICE void write(void* p, int64_t at, const float (&x)[V]) {
  S* const to = static_cast<S*>(p) + at;
  if constexpr (V == 1) {
    S value;
    device::from_float(value, x[0]);
    device::store(to, value);
  } else {
    constexpr int kValues = 4 / sizeof(S);
    SK_UNROLL
    for (int i = 0; i < V; i += 4 * kValues) {
      device::Words4 words;
      SK_UNROLL
      for (int j = 0; j < 4; ++j) words.v[j] = word_of<S>(x + i + j * kValues);
      device::store(reinterpret_cast<device::Words4*>(to + i), words);
    }
  }
}

// Where a thread's units stand; `row` is beyond the last for threads without any.
template <int V>
struct Place {
  int64_t row, unit;
  SK_DEVICE explicit Place(int64_t H) {
    // In 32 bits, which the launch makes sure of: a division of 64 would be a call.
    const uint32_t i = uint32_t(device::block_x()) * kStepThreads + device::thread_index();
    const uint32_t each = uint32_t(H / V);
    row = i / each, unit = int64_t(i % each) * V;
  }
};

template <Mode M, class S, int V>
SK_KERNEL(kStepThreads)
step_forward(const StepForward p) {
  using K = Cell<M>;
  constexpr int G = K::kGates;
  const Place<V> me(p.H);
  if (me.row >= p.rows) return;
  const int64_t H = p.H, at = me.row * H + me.unit;
  float x[G][V], r[G][V], b_ih[G][V] = {}, b_hh[G][V] = {}, h[V], c[V] = {}, kept[4][V];
  SK_UNROLL
  for (int q = 0; q < G; ++q) {
    read<float>(p.gx, me.row * p.gx_row + q * H + me.unit, x[q]);
    read<float>(p.gh, (me.row * G + q) * H + me.unit, r[q]);
    if (p.b_ih) read<S>(p.b_ih, q * H + me.unit, b_ih[q]);
    if (p.b_hh) read<S>(p.b_hh, q * H + me.unit, b_hh[q]);
  }
  read<S>(p.h, at, h);
  if constexpr (K::kHasC) read<float>(p.c, at, c);
  SK_UNROLL
  for (int i = 0; i < V; ++i) {
    float gx[G], gh[G], of_x[G], of_h[G], bias[K::kColumns], a[K::kColumns], saved[4] = {};
    SK_UNROLL
    for (int q = 0; q < G; ++q)
      gx[q] = x[q][i], gh[q] = r[q][i], of_x[q] = b_ih[q][i], of_h[q] = b_hh[q][i];
    K::join_bias(of_x, of_h, bias);
    K::join(gx, gh, bias, a);
    K::forward(a, h[i], c[i], saved, p.relu);
    SK_UNROLL
    for (int q = 0; q < 4; ++q) kept[q][i] = saved[q];
  }
  write<S>(p.h, at, h);
  write<S>(p.y, me.row * p.y_row + me.unit, h);
  if constexpr (K::kHasC) {
    write<float>(p.c, at, c);
    if (p.cells) write<S>(p.cells, at, c);
  }
  if constexpr (K::kSaved > 0) {
    SK_UNROLL
    for (int q = 0; q < K::kSaved; ++q)
      if (p.gates) write<S>(p.gates, (me.row * K::kSaved + q) * H + me.unit, kept[q]);
  }
}

template <Mode M, class S, int V>
SK_KERNEL(kStepThreads)
step_backward(const StepBackward p) {
  using K = Cell<M>;
  constexpr int G = K::kGates, C = K::kColumns;
  const Place<V> me(p.H);
  if (me.row >= p.rows) return;
  const int64_t H = p.H, at = me.row * H + me.unit;
  float dy[V] = {}, sums[V] = {}, dh[V], dc[V] = {}, kept[4][V] = {}, c[V] = {}, before[V] = {};
  float y[V] = {}, dg[C][V];
  if (p.dy) read<S>(p.dy, me.row * p.dy_row + me.unit, dy);
  if (me.row < p.sum_rows) read<float>(p.sums, at, sums);
  read<float>(p.dh, at, dh);
  SK_UNROLL
  for (int q = 0; q < K::kSaved; ++q)
    read<S>(p.gates, (me.row * K::kSaved + q) * H + me.unit, kept[q]);
  if constexpr (K::kHasC) read<float>(p.dc, at, dc), read<S>(p.cells, at, c);
  if constexpr (K::kHasC || K::kReadsH) {
    if (me.row < p.carried)
      read<S>(p.before, me.row * p.before_row + me.unit, before);
    else
      read<S>(p.initial, at, before);
  }
  if constexpr (K::kReadsY) read<S>(p.y, me.row * p.y_row + me.unit, y);
  SK_UNROLL
  for (int i = 0; i < V; ++i) {
    float columns[C];
    CellGradient k{};
    SK_UNROLL
    for (int q = 0; q < 4; ++q) k.saved[q] = kept[q][i];
    k.c = c[i], k.c_prev = k.h_prev = before[i], k.y = y[i];
    k.dh = dh[i] + sums[i] + dy[i], k.dc = dc[i];
    K::backward(k, columns, p.relu);
    dh[i] = k.dh, dc[i] = k.dc;
    SK_UNROLL
    for (int q = 0; q < C; ++q) dg[q][i] = columns[q];
  }
  write<float>(p.dh, at, dh);
  if constexpr (K::kHasC) write<float>(p.dc, at, dc);
  SK_UNROLL
  for (int q = 0; q < C; ++q) write<S>(p.dg, (me.row * C + q) * H + me.unit, dg[q]);
  if constexpr (C != G) {
    SK_UNROLL
    for (int q = 0; q < G; ++q) write<S>(p.dah, (me.row * G + q) * H + me.unit, dg[K::column(q)]);
  }
}

}  // namespace seqkern::cuda
