// An emulator of the part of a GPU that the kernels use, for tests on the CPU: each thread of a
// block is a fiber; a warp's instructions and a block's barriers make fibers wait for one another.
// Besides computing, it refuses what a GPU would do in silence:
//
// - memory outside the registered ranges, writes to what is read-only;
// - shared memory read before it was written, or while a copy into it is under way;
// - shared memory that two threads use, one of them writing, with no barrier between;
// - barriers and warp instructions that not all threads come to, or at different lines.
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
  int64_t shared = 0;
  unsigned seed = 0;  // 0: threads in turn
  std::vector<Range> memory;
};

// Who last wrote and read two bytes of shared memory, and between which barriers.
struct Shadow {
  static constexpr int kMany = -2;
  int writer = -1, write_epoch = -1, reader = -1, read_epoch = -1;
  bool written = false, copying = false;
};

struct Copy {
  float* to;
  const float* from;
};

enum class Wait { none, barrier, warp, done };

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

class Block {
 public:
  Block(const Config& c, int x, int y, unsigned seed)
      : config(c), x(x), y(y), random_(seed), shuffled_(c.seed != 0), threads_(c.threads) {
    shared.resize((c.shared + 15) / 16);
    shadow_.resize((c.shared + 1) / 2);
    for (int i = 0; i < c.threads; ++i) threads_[i].index = i;
  }

  const Config& config;
  const int x, y;
  struct alignas(16) Quad {
    char bytes[16];
  };
  std::vector<Quad> shared;
  Thread* current = nullptr;

  template <class Body>
  void run(const Body& body) {
    static std::vector<std::unique_ptr<char[]>> stacks;  // kept between blocks
    body_ = [](const void* f) { (*static_cast<const Body*>(f))(); };
    argument_ = &body;
    for (size_t i = 0; i < threads_.size(); ++i) {
      if (stacks.size() <= i) stacks.emplace_back(new char[kStack]);
      getcontext(&threads_[i].context);
      threads_[i].context.uc_stack.ss_sp = stacks[i].get();
      threads_[i].context.uc_stack.ss_size = kStack;
      makecontext(&threads_[i].context, enter, 0);
    }
    running() = this;
    while (error_.empty() && step_all()) {
    }
    running() = nullptr;
    if (!error_.empty()) throw std::runtime_error(error_);
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

  // ---- waiting

  void barrier(Place at) {
    wait(Wait::barrier, at);
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

 private:
  static constexpr size_t kStack = 128 << 10;

  static void enter() {
    Block& b = *running();
    try {
      b.body_(b.argument_);
    } catch (const std::exception& e) {
      b.error_ = e.what();
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

  // Every thread that can run, until it waits; then opens the barrier. False at the end.
  bool step_all() {
    std::vector<Thread*> ready;
    for (Thread& t : threads_)
      if (t.wait == Wait::none) ready.push_back(&t);
    if (ready.empty()) return open_barrier();
    if (shuffled_) std::shuffle(ready.begin(), ready.end(), random_);
    for (Thread* t : ready)
      if (error_.empty() && t->wait == Wait::none) resume(*t);
    return true;
  }

  bool open_barrier() {
    size_t waiting = 0, done = 0;
    bool same = true;
    for (const Thread& t : threads_) {
      waiting += t.wait == Wait::barrier;
      done += t.wait == Wait::done;
      same = same && (t.wait != Wait::barrier || t.place == threads_[0].place);
    }
    if (done == threads_.size()) return false;
    if (waiting == threads_.size() && same) {
      for (Thread& t : threads_) t.wait = Wait::none;
      return true;
    }
    std::map<std::string, int> places;
    for (const Thread& t : threads_)
      ++places[t.wait == Wait::done      ? "at the end"
               : t.wait == Wait::barrier ? "at the barrier " + t.place.text()
                                         : "at the warp instruction " + t.place.text()];
    std::ostringstream out;
    out << "block (" << x << ", " << y << ") does not go on:";
    for (const auto& [place, count] : places) out << " " << count << " threads " << place << ";";
    error_ = out.str();
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
  std::string error_;
};

// Runs body() as every thread of every block, block after block.
template <class Body>
void launch(const Config& config, const Body& body) {
  std::vector<int> order(size_t(config.grid_x) * config.grid_y);
  for (size_t i = 0; i < order.size(); ++i) order[i] = int(i);
  std::mt19937 random(config.seed);
  if (config.seed) std::shuffle(order.begin(), order.end(), random);
  for (int i : order) Block(config, i % config.grid_x, i / config.grid_x, random()).run(body);
}

inline Block& block() { return *Block::running(); }

}  // namespace simt

#include "simt_device.h"
