// How the blocks that share a slice pass on what each computed of h, or of dg: rows of a copy in
// shared memory, of which every block fills the columns of its own units and gets all others.
//
// No block waits for all to arrive: each waits for the values themselves. tests/protocols has both
// protocols as models, of which every order is tried: nobody can be two steps ahead of another,
// since a step needs what the slowest computed in the one before, and a block passes on only after
// a barrier behind its own reads. So two slots for each value are enough, and what arrives last is
// waited for, so that a block may end while the others go on.
//
// `pass` is called by all threads after a barrier, with steps 1, 2, ...; R is how many rows of
// `depth` values lie side by side in a row of the copy: one of h, one of dg for each gate. All
// threads see all values after it. `prepare` comes before the first `pass`, and after the copies
// were cleared: others may store into them from then on.
#pragma once
#include "core/cuda/device.cuh"
#include "core/cuda/plan.h"

namespace seqkern::cuda {

// One block has all units.
struct Alone {
  static constexpr bool kParts = false, kExists = true;
  static constexpr int kWarps = kMaxWarps;
  static constexpr int kCopies = 2;
  SK_DEVICE Alone(const Sequence&, char*) {}
  template <class S, int R>
  SK_DEVICE void prepare() const {}
};

// Through global memory, in words of which one half is the value and the other the step: a reader
// polls the values themselves, and each word is written whole.
struct Grid {
  static constexpr bool kParts = true, kExists = true;
  static constexpr int kWarps = kTeamWarps;
  // One, since the words have the slots: the block reads it and refills it between barriers.
  static constexpr int kCopies = 1;
  static constexpr int kAtOnce = 4;  // words under way in a thread

  const Plan& plan;
  uint64_t* const words;

  SK_DEVICE Grid(const Sequence& s, char*)
      : plan(s.plan), words(s.words + device::block_y() * s.plan.words) {}

  template <class S, int R>
  SK_DEVICE void prepare() const {}

  // Word and place of a column of four bytes: eight rows of a column are 64 bytes side by side, and
  // the banks of a warp's four columns differ.
  SK_DEVICE static int64_t at(int64_t column, int row) { return column * kSliceRows + row; }
  template <class S>
  SK_DEVICE uint32_t* place(S* copy, int64_t column, int row) const {
    return reinterpret_cast<uint32_t*>(copy + row * plan.row) + column;
  }

  template <class S, int R>
  SK_DEVICE void pass(S* copy, int64_t step) const {
    constexpr int kValues = 4 / sizeof(S);
    const int thread = device::thread_index(), row = thread % kSliceRows;
    const int columns = plan.depth / kValues, own = plan.units / kValues;
    const int first = device::block_x() * own, stride = device::thread_count() / kSliceRows;
    uint64_t* const slot = words + (step & 1) * (plan.words / 2);
    const uint64_t tag = uint64_t(uint32_t(step)) << 32;
    SK_NO_UNROLL
    for (int r = 0; r < R; ++r)
      for (int i = thread / kSliceRows; i < own; i += stride) {
        const int column = r * columns + first + i;
        device::store_word(slot + at(column, row), tag | device::load(place(copy, column, row)));
      }
    SK_NO_UNROLL
    for (int r = 0; r < R; ++r)
      for (int i = thread / kSliceRows; i < columns - own; i += kAtOnce * stride)
        collect(copy, slot + at(r * columns, row), r * columns, row, i, stride, tag >> 32);
    device::sync_threads();
  }

  // Up to kAtOnce words of the other blocks, column i of them first; again until all have come.
  template <class S>
  SK_DEVICE void collect(S* copy, const uint64_t* from, int before, int row, int i, int stride,
                         uint64_t tag) const {
    constexpr int kValues = 4 / sizeof(S);
    const int own = plan.units / kValues, first = device::block_x() * own;
    const int others = plan.depth / kValues - own;
    int column[kAtOnce];
    SK_UNROLL
    for (int j = 0; j < kAtOnce; ++j) {
      const int other = i + j * stride;
      column[j] = other >= others ? -1 : other < first ? other : other + own;
    }
    uint64_t word[kAtOnce];
    for (bool all = false; !all;) {
      all = true;
      SK_UNROLL
      for (int j = 0; j < kAtOnce; ++j) {
        if (column[j] < 0) continue;
        word[j] = device::load_word(from + at(column[j], 0));
      }
      SK_UNROLL
      for (int j = 0; j < kAtOnce; ++j)
        if (column[j] >= 0 && word[j] >> 32 != tag) all = false;
      if (!all) device::pause();
    }
    SK_UNROLL
    for (int j = 0; j < kAtOnce; ++j)
      if (column[j] >= 0) device::store(place(copy, before + column[j], row), uint32_t(word[j]));
  }
};

// Through the shared memory of a cluster: each block stores into the copies of the others, and the
// stores count themselves on a barrier there.
struct Cluster {
  static constexpr bool kParts = true, kExists = device::kHasClusters;
  static constexpr int kWarps = kTeamWarps;
  static constexpr int kCopies = 2;

  const Plan& plan;
  uint64_t* const barriers;  // one for each copy

  SK_DEVICE Cluster(const Sequence& s, char* shared)
      : plan(s.plan), barriers(reinterpret_cast<uint64_t*>(shared + s.plan.shared) - 2) {}

  template <class S, int R>
  SK_DEVICE void prepare() const {
    if (device::thread_index() == 0) {
      for (int i = 0; i < 2; ++i) device::barrier_set_up(barriers + i);
      for (int i = 0; i < 2; ++i) device::barrier_expect(barriers + i, bytes<S, R>());
    }
    device::sync_cluster();
  }

  // Of the other blocks, for each step.
  template <class S, int R>
  SK_DEVICE int bytes() const {
    return (plan.members - 1) * plan.units * kSliceRows * R * int(sizeof(S));
  }

  template <class S, int R>
  SK_DEVICE void pass(S* copy, int64_t step) const {
    constexpr int kValues = 16 / sizeof(S);
    const int lane = device::thread_index() % 32, row = lane % kSliceRows;
    const int warp = device::thread_index() / 32, warps = device::thread_count() / 32;
    const int me = device::block_x(), units = plan.units;
    uint64_t* const barrier = barriers + (step & 1);
    SK_NO_UNROLL
    for (int other = warp; other < plan.members; other += warps) {
      if (other == me) continue;
      SK_NO_UNROLL
      for (int r = 0; r < R; ++r)
        for (int i = lane / kSliceRows * kValues; i < units; i += 32 / kSliceRows * kValues) {
          S* const at = copy + row * plan.row + r * plan.depth + me * units + i;
          auto* const four = reinterpret_cast<device::Words4*>(at);
          device::store_remote(four, device::load(four), barrier, other);
        }
    }
    device::barrier_wait(barrier, uint32_t((step - 1) / 2 & 1));
    if (device::thread_index() == 0) device::barrier_expect(barrier, bytes<S, R>());
  }
};

}  // namespace seqkern::cuda
