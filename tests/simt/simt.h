// An emulator of the part of a GPU that the kernels use, for tests on the CPU: each thread of a
// block is a fiber; a warp's instructions and a block's barriers make fibers wait for one another.
// Blocks that are resident together (simt_team.h) take turns. Besides computing, it refuses what a
// GPU would do in silence:
//
// - memory outside the registered ranges, writes to what is read-only;
// - shared memory read before it was written, or while a copy into it is under way;
// - shared memory that two threads use, one of them writing, with no barrier between;
// - barriers and warp instructions that not all threads come to, or at different lines;
// - shared memory used while another block's store into it may be under way, such stores into a
//   block that has ended or onto a barrier that is not set up, and waits that nothing can end.
//
// Threads run in turn, or in an order drawn from a seed. Included by core/cuda/device.cuh.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/cpu/types.h"

namespace simt {

// Where a kernel called: the line of its source, as the reports name it.
struct Place {
  const char* file;
  int line;
  bool operator==(const Place& o) const { return line == o.line && !strcmp(file, o.file); }
  std::string text() const {
    const char* name = strrchr(file, '/');
    return std::string(name ? name + 1 : file) + ":" + std::to_string(line);
  }
};
// The last parameters of what a kernel calls, and the Place that they make.
// clang-format off
#define SIMT_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define SIMT_AT (simt::Place{file, line})
// clang-format on

struct Range {
  uintptr_t begin, end;
  bool writable;
};

struct Config {
  int grid_x = 1, grid_y = 1, threads = 32;
  int together = 1;  // consecutive blocks, x first, that run at the same time
  int64_t shared = 0;
  unsigned seed = 0;  // 0: threads in turn
  std::vector<Range> memory;
};

// Who last wrote and read two bytes of shared memory, and between which barriers.
struct Shadow {
  static constexpr int kMany = -2;
  int writer = -1, write_epoch = -1, reader = -1, read_epoch = -1;
  bool written = false, copying = false, incoming = false;
};

struct Copy {
  float* to;
  const float* from;
};

// A barrier of a block's shared memory that counts bytes.
struct Counter {
  int phases = 0;
  bool armed = false;
  int64_t bytes = 0;                            // expected less seen
  std::vector<std::pair<size_t, size_t>> seen;  // of this phase: where and how many
};

enum class Wait { none, barrier, warp, poll, team, done };

struct Thread {
  ucontext_t context;
  jmp_buf jump;
  bool started = false;
  int index = 0, epoch = 0;
  Wait wait = Wait::none;
  Place place{"", 0};
  void* operands = nullptr;
  std::vector<Copy> open;                 // copies since the last commit
  std::vector<std::vector<Copy>> groups;  // committed, the oldest first
};

class Team;

class Block {
 public:
  Block(const Config& c, int number, unsigned seed, Team* team)
      : config(c),
        x(number % c.grid_x),
        y(number / c.grid_x),
        team(team),
        random_(seed),
        shuffled_(c.seed != 0),
        threads_(c.threads) {
    shared.resize((c.shared + 15) / 16);
    shadow_.resize((c.shared + 1) / 2);
    for (int i = 0; i < c.threads; ++i) threads_[i].index = i;
  }

  const Config& config;
  const int x, y;
  Team* const team;
  struct alignas(16) Quad {
    char bytes[16];
  };
  std::vector<Quad> shared;
  std::map<size_t, Counter> counters;  // by their place in shared memory
  Thread* current = nullptr;
  std::string error;
  int resting = 0;  // rounds that the team passes it over

  // `stacks`: those of the team, from `first` on for this block.
  template <class Body>
  void start(const Body& body, std::vector<std::unique_ptr<char[]>>& stacks, size_t first) {
    body_ = [](const void* f) { (*static_cast<const Body*>(f))(); };
    argument_ = &body;
    for (size_t i = 0; i < threads_.size(); ++i) {
      if (stacks.size() <= first + i) stacks.emplace_back(new char[kStack]);
      getcontext(&threads_[i].context);
      threads_[i].context.uc_stack.ss_sp = stacks[first + i].get();
      threads_[i].context.uc_stack.ss_size = kStack;
      makecontext(&threads_[i].context, enter, 0);
    }
  }

  static Block*& running() {
    static Block* block = nullptr;
    return block;
  }

  [[noreturn]] void fail(const std::string& what, Place at) const {
    std::ostringstream out;
    out << at.text() << ": block (" << x << ", " << y << ") thread " << current->index << ": "
        << what;
    throw std::runtime_error(out.str());
  }

  // Every thread that can run, until it waits, or opens the barrier. Whether anything moved: a
  // thread that polls in vain has not.
  bool step() {
    running() = this;
    std::vector<Thread*> ready;
    for (Thread& t : threads_)
      if (t.wait == Wait::none || t.wait == Wait::poll) ready.push_back(&t);
    if (ready.empty()) return open_barrier();
    if (shuffled_) std::shuffle(ready.begin(), ready.end(), random_);
    bool moved = false;
    for (Thread* t : ready) {
      if (!error.empty() || (t->wait != Wait::none && t->wait != Wait::poll)) continue;
      const bool polled = t->wait == Wait::poll;
      t->wait = Wait::none;
      resume(*t);
      moved = moved || !polled || t->wait != Wait::poll;
    }
    return moved;
  }

  bool all(Wait wait) const {
    for (const Thread& t : threads_)
      if (t.wait != wait) return false;
    return true;
  }
  void release() {
    for (Thread& t : threads_) t.wait = Wait::none;
  }

  // Where the threads are that do not go on.
  std::string whereabouts() const {
    std::map<std::string, int> places;
    for (const Thread& t : threads_) {
      const char* at[] = {"running ",    "at the barrier ",           "at the warp instruction ",
                          "polling at ", "at the cluster's barrier ", "at the end"};
      ++places[at[int(t.wait)] + (t.wait == Wait::done ? "" : t.place.text())];
    }
    std::ostringstream out;
    out << "block (" << x << ", " << y << ") does not go on:";
    for (const auto& [place, count] : places) out << " " << count << " threads " << place << ";";
    return out.str();
  }

  // ---- waiting

  void barrier(Place at) {
    wait(Wait::barrier, at);
    ++current->epoch;
  }

  void poll(Place at) { wait(Wait::poll, at); }
  void team_barrier(Place at) {
    wait(Wait::team, at);
    ++current->epoch;
  }

  // A warp instruction: `compute` gets the operands of all 32 lanes, once.
  template <class Operands, class Compute>
  void together(Operands& mine, Place at, const Compute& compute) {
    Thread& me = *current;
    me.operands = &mine;
    const int first = me.index / 32 * 32;
    int arrived = 1;
    for (int i = first; i < first + 32; ++i) {
      const Thread& other = threads_[i];
      if (&other == &me || other.wait != Wait::warp) continue;
      if (!(other.place == at))
        fail("warp instruction, while thread " + std::to_string(i) + " waits at another, " +
                 other.place.text(),
             at);
      ++arrived;
    }
    if (arrived < 32) return wait(Wait::warp, at);
    Operands* lanes[32];
    for (int i = 0; i < 32; ++i) {
      lanes[i] = static_cast<Operands*>(threads_[first + i].operands);
      threads_[first + i].wait = Wait::none;
    }
    compute(lanes);
  }

  // ---- memory

  bool in_shared(const void* p) const {
    const uintptr_t base = reinterpret_cast<uintptr_t>(shared.data());
    return uintptr_t(p) >= base && uintptr_t(p) < base + config.shared;
  }

  void check(const void* p, size_t size, bool write, Place at) {
    const uintptr_t begin = uintptr_t(p);
    if (begin % (size < 16 ? size : 16)) fail("misaligned access", at);
    if (in_shared(p)) return check_shared(begin, size, write, at);
    for (const Range& r : config.memory)
      if (begin >= r.begin && begin + size <= r.end) {
        if (write && !r.writable) fail("write to read-only memory", at);
        return;
      }
    fail(write ? "write outside of memory" : "read outside of memory", at);
  }

  void copy(float* to, const float* from, Place at) {
    check(from, 4, false, at);
    if (!in_shared(to)) fail("copy to elsewhere than shared memory", at);
    check(to, 4, true, at);
    mark(to, true);
    current->open.push_back({to, from});
  }
  void commit() {
    current->groups.push_back(current->open);
    current->open.clear();
  }
  // Copies arrive as late as they may.
  void wait_copies(size_t pending) {
    auto& groups = current->groups;
    for (; groups.size() > pending; groups.erase(groups.begin()))
      for (const Copy& c : groups.front()) {
        *c.to = *c.from;
        mark(c.to, false);
      }
  }

  // ---- stores of other blocks

  size_t offset(const void* p) const {
    return uintptr_t(p) - reinterpret_cast<uintptr_t>(shared.data());
  }
  // From now on, until the barrier's phase ends.
  void expect_store(size_t to, size_t size) {
    for (size_t i = to / 2; i < (to + size) / 2; ++i) shadow_[i].incoming = true;
  }
  void arrive(Counter& counter) {
    if (!counter.armed || counter.bytes != 0) return;
    ++counter.phases, counter.armed = false;
    for (const auto& [to, size] : counter.seen)
      for (size_t i = to / 2; i < (to + size) / 2; ++i) {
        shadow_[i] = Shadow();
        shadow_[i].written = true;
      }
    counter.seen.clear();
  }

 private:
  static constexpr size_t kStack = 128 << 10;

  static void enter() {
    Block& b = *running();
    try {
      b.body_(b.argument_);
    } catch (const std::exception& e) {
      b.error = e.what();
    }
    b.current->wait = Wait::done;
    _longjmp(b.back_, 1);
  }

  void wait(Wait why, Place at) {
    Thread& me = *current;
    me.wait = why, me.place = at;
    if (_setjmp(me.jump) == 0) _longjmp(back_, 1);
  }

  void resume(Thread& t) {
    current = &t;
    if (_setjmp(back_) == 0) {
      if (t.started) _longjmp(t.jump, 1);
      t.started = true;
      setcontext(&t.context);
    }
  }

  bool open_barrier() {
    for (const Thread& t : threads_)
      if (t.wait != Wait::barrier || !(t.place == threads_[0].place)) return false;
    release();
    return true;
  }

  Shadow* shadow(const void* p) {
    return &shadow_[(uintptr_t(p) - reinterpret_cast<uintptr_t>(shared.data())) / 2];
  }
  void mark(const void* p, bool copying) {
    for (int i = 0; i < 2; ++i) shadow(p)[i].copying = copying;
  }

  void check_shared(uintptr_t begin, size_t size, bool write, Place at) {
    if (begin + size > reinterpret_cast<uintptr_t>(shared.data()) + config.shared)
      fail("access beyond shared memory", at);
    const int me = current->index, epoch = current->epoch;
    for (Shadow* s = shadow(reinterpret_cast<void*>(begin)); size > 0; ++s, size -= 2) {
      if (s->copying) fail("shared memory into which a copy is under way", at);
      if (s->incoming) fail("shared memory into which another block stores", at);
      if (!write && !s->written) fail("shared memory never written", at);
      if (s->write_epoch == epoch && s->writer != me)
        fail("shared memory that thread " + std::to_string(s->writer) +
                 " wrote since the last barrier",
             at);
      if (write && s->read_epoch == epoch && s->reader != me)
        fail("write to shared memory read by another thread since the last barrier", at);
      if (write) {
        s->written = true, s->writer = me, s->write_epoch = epoch;
      } else {
        s->reader = s->read_epoch == epoch && s->reader != me ? Shadow::kMany : me;
        s->read_epoch = epoch;
      }
    }
  }

  std::mt19937 random_;
  bool shuffled_;
  std::vector<Thread> threads_;
  std::vector<Shadow> shadow_;
  jmp_buf back_;
  void (*body_)(const void*) = nullptr;
  const void* argument_ = nullptr;
};

inline Block& block() { return *Block::running(); }

}  // namespace simt

#include "simt_team.h"

#include "simt_device.h"
