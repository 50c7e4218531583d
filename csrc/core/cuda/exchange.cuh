// How the blocks that share a slice pass on what each computed of h, or of dg: rows of a copy in
// shared memory, of which every block fills the columns of its own units and gets all others. In
// the backward of a cluster dg stays where it is, and parts of dh travel (scatter.cuh), for an LSTM
// in 16 bits half as many bytes. A grid would gain nothing from that: every part has to be written
// and read in words, each for one block alone, so those bytes would be the same for such an LSTM,
// and four times as many for an Elman cell.
//
// No block waits for all to arrive: each waits for the values themselves. tests/protocols has both
// protocols as models, of which every order is tried: nobody can be two steps ahead of another,
// since a step needs what the slowest computed in the one before, and a block passes on only after
// a barrier behind its own reads. So two slots for each value are enough, and what arrives last is
// waited for, so that a block may end while the others go on.
//
// `send`, and then `receive` (of parts `await`), are called by all threads after a barrier, with
// steps 1, 2, ...; R is how many rows of `depth` values lie side by side in a row of the copy: one
// of h, one of dg for each gate. All threads see all values after the second; what can wait stands
// between the two. `prepare` comes before the first of them, and after the copies were cleared:
// others may store into them from then on.
#pragma once
#include "core/cuda/device.cuh"
#include "core/cuda/plan.h"

namespace seqkern::cuda {

// One block has all units.
struct Alone {
  static constexpr bool kParts = false, kExists = true, kScatters = false;
  static constexpr int kWarps = kMaxWarps;
  static constexpr int kCopies = 2;
  SK_DEVICE Alone(const Sequence&, char*) {}
  SK_DEVICE void prepare() const {}
};

// Through global memory, in words of which one half is the value and the other the step: a reader
// polls the values themselves, and each word is written whole.
struct Grid {
  static constexpr bool kParts = true, kExists = true, kScatters = false;
  static constexpr int kWarps = kTeamWarps;
  // One, since the words have the slots: the block reads it and refills it between barriers.
  static constexpr int kCopies = 1;
  static constexpr int kAtOnce = 8;  // words under way in a thread

  const Plan& plan;
  uint64_t* const words;

  SK_DEVICE Grid(const Sequence& s, char*)
      : plan(s.plan), words(s.words + device::block_y() * s.plan.words) {}

  SK_DEVICE void prepare() const {}

  // Word and place of a column of four bytes: eight rows of a column are 64 bytes side by side, and
  // the banks of a warp's four columns differ.
  SK_DEVICE static int at(int column, int row) { return column * kSliceRows + row; }
  template <class S>
  SK_DEVICE uint32_t* place(S* copy, int column, int row) const {
    return reinterpret_cast<uint32_t*>(copy + row * plan.row) + column;
  }

  SK_DEVICE uint64_t* slot(int step) const { return words + (step & 1) * (plan.words / 2); }

  template <class S, int R>
  SK_DEVICE void send(S* copy, int step) const {
    constexpr int kValues = 4 / sizeof(S);
    const int thread = device::thread_index(), row = thread % kSliceRows;
    const int columns = plan.depth / kValues, own = plan.units / kValues;
    const int first = device::block_x() * own, stride = device::thread_count() / kSliceRows;
    const uint64_t tag = uint64_t(uint32_t(step)) << 32;
    SK_NO_UNROLL
    for (int r = 0; r < R; ++r)
      for (int i = thread / kSliceRows; i < own; i += stride) {
        const int column = r * columns + first + i;
        device::store_word(slot(step) + at(column, row),
                           tag | device::load(place(copy, column, row)));
      }
  }

  template <class S, int R>
  SK_DEVICE void receive(S* copy, int step) const {
    constexpr int kValues = 4 / sizeof(S);
    const int thread = device::thread_index(), row = thread % kSliceRows;
    const int columns = plan.depth / kValues, others = columns - plan.units / kValues;
    const int stride = device::thread_count() / kSliceRows;
    SK_NO_UNROLL
    for (int r = 0; r < R; ++r)
      for (int i = thread / kSliceRows; i < others; i += kAtOnce * stride)
        collect(copy, slot(step) + at(r * columns, row), r * columns, row, i, stride,
                uint32_t(step));
    device::sync_threads();
  }

  // Up to kAtOnce words of the other blocks, column i of them first; again those that have not
  // come.
  template <class S>
  SK_DEVICE void collect(S* copy, const uint64_t* from, int before, int row, int i, int stride,
                         uint32_t tag) const {
    constexpr int kValues = 4 / sizeof(S);
    const int own = plan.units / kValues, first = device::block_x() * own;
    const int others = plan.depth / kValues - own;
    auto column = [&](int j) {
      const int other = i + j * stride;
      return other < first ? other : other + own;
    };
    uint64_t word[kAtOnce];
    SK_UNROLL
    for (int j = 0; j < kAtOnce; ++j)  // beyond the last there is nothing to come
      word[j] = i + j * stride < others ? 0 : uint64_t(tag) << 32;
    bool all = false;
    for (uint32_t looks = 0; !all; ++looks) {
      all = true;
      SK_UNROLL
      for (int j = 0; j < kAtOnce; ++j)
        if (word[j] >> 32 != tag) word[j] = device::load_word(from + at(column(j), 0));
      SK_UNROLL
      for (int j = 0; j < kAtOnce; ++j)
        if (word[j] >> 32 != tag) all = false;
      if (!all) device::pause(looks);
    }
    SK_UNROLL
    for (int j = 0; j < kAtOnce; ++j)
      if (i + j * stride < others)
        device::store(place(copy, before + column(j), row), uint32_t(word[j]));
  }
};

// Through the shared memory of a cluster: each block stores into that of the others, and the stores
// count themselves on a barrier there. There are two copies of what arrives, with a barrier each.
// In the forward that is h, which everyone gets; in the backward every member sends every one,
// itself included, a part of the sums for the units of the latter.
struct Cluster {
  static constexpr bool kParts = true, kExists = device::kHasClusters, kScatters = true;
  static constexpr int kWarps = kTeamWarps;
  static constexpr int kCopies = 2;

  const Plan& plan;
  uint64_t* const barriers;  // one for each copy
  float* const parts;        // (2, members, groups, 32, 4), four values of a lane

  SK_DEVICE Cluster(const Sequence& s, char* shared)
      : plan(s.plan),
        barriers(reinterpret_cast<uint64_t*>(shared + s.plan.shared) - 2),
        parts(reinterpret_cast<float*>(shared + s.plan.weights + s.plan.states)) {}

  SK_DEVICE void prepare() const {
    if (device::thread_index() == 0) {
      for (int i = 0; i < 2; ++i) device::barrier_set_up(barriers + i);
      for (int i = 0; i < 2; ++i) device::barrier_expect(barriers + i, plan.arriving);
    }
    device::sync_cluster();
  }

  // Until all of a step has arrived.
  SK_DEVICE void await(int step) const {
    uint64_t* const barrier = barriers + (step & 1);
    device::barrier_wait(barrier, uint32_t((step - 1) / 2 & 1));
    if (device::thread_index() == 0) device::barrier_expect(barrier, plan.arriving);
  }

  template <class S, int R>
  SK_DEVICE void send(S* copy, int step) const {
    static_assert(R == 1, "the backward sends parts of sums");
    constexpr int kValues = 16 / sizeof(S);
    const int lane = device::thread_index() % 32, row = lane % kSliceRows;
    const int warp = device::thread_index() / 32, warps = device::thread_count() / 32;
    const int me = device::block_x(), units = plan.units;
    SK_NO_UNROLL
    for (int other = warp; other < plan.members; other += warps) {
      if (other == me) continue;
      for (int i = lane / kSliceRows * kValues; i < units; i += 32 / kSliceRows * kValues) {
        auto* const four =
            reinterpret_cast<device::Words4*>(copy + row * plan.row + me * units + i);
        device::store_remote(four, device::load(four), barriers + (step & 1), other);
      }
    }
  }
  template <class S, int R>
  SK_DEVICE void receive(S*, int step) const {
    await(step);
  }

  SK_DEVICE float* slot(int step, int member, int group) const {
    const int which = (int(step & 1) * plan.members + member) * plan.groups + group;
    return parts + (which * 32 + device::thread_index() % 32) * 4;
  }
  // A lane's values are turned by this, so that those of one kind lie in different banks.
  SK_DEVICE static int turn() { return device::thread_index() % 32 / 8; }

  // A warp's sums for the units of one group of `member`, by all of its lanes.
  SK_DEVICE void send(int step, int member, int group, const float (&sums)[4]) const {
    uint32_t once[4];
    device::Words4 words;
    SK_UNROLL
    for (int i = 0; i < 4; ++i) once[i] = device::bits_of(turn() & 1 ? sums[(i + 3) % 4] : sums[i]);
    SK_UNROLL
    for (int i = 0; i < 4; ++i) words.v[i] = turn() & 2 ? once[(i + 2) % 4] : once[i];
    device::store_remote(reinterpret_cast<device::Words4*>(slot(step, device::block_x(), group)),
                         words, barriers + (step & 1), member);
  }

  // Value e of what `member` sent for a group of this block, after await().
  SK_DEVICE float part(int step, int member, int group, int e) const {
    return device::load(slot(step, member, group) + (e + turn()) % 4);
  }
};

}  // namespace seqkern::cuda
