// How the threads of one call divide the work, and how they wait for each other.
#pragma once
#include <sched.h>

#include <cstdint>

#include "../recurrent.h"

namespace seqkern {

// Threads first take a direction each; inside a direction they split the rows (no waiting), or, for
// few rows and large weights, the hidden units: each thread's weights then stay in its own cache
// and the threads meet once a step.
struct Split {
  int teams;    // directions that run side by side
  int members;  // threads of a team
  bool units;   // members split the hidden units instead of the rows
};

// Tells the processor that this is a waiting loop, where it has an instruction for that.
inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// A barrier for the members of a team. It yields after a while: with more threads than free
// processors a member may wait for one that is not running.
struct alignas(64) Team {
  int arrived = 0;
  alignas(64) int round = 0;

  void wait(int members) {
    if (members == 1) return;
    const int now = __atomic_load_n(&round, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == members) {
      __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&round, now + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int polls = 0; __atomic_load_n(&round, __ATOMIC_ACQUIRE) == now; ++polls) {
      if (polls < 4096)
        relax();
      else
        sched_yield();
    }
  }
};

// One thread's part of a call.
struct Member {
  int direction, rank, members;
  bool units;
  Team* team;
  char* shared;   // workspace of the direction
  char* scratch;  // workspace of this thread

  void wait() const { team->wait(members); }
};

struct Workspace {
  int64_t shared;   // bytes per direction
  int64_t scratch;  // bytes per thread
};

// The rows that a member handles: first, first + stride, ... so that the long and the short
// sequences of a sorted ragged batch are shared out evenly.
struct RowShare {
  int64_t first, stride;

  int64_t of(int64_t n) const { return n <= first ? 0 : (n - first + stride - 1) / stride; }
  int64_t operator[](int64_t i) const { return first + i * stride; }
};

}  // namespace seqkern
