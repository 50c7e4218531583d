// Chooses the kernels, divides the threads, lays out the workspace, runs.
#include "../recurrent.h"

#include <omp.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "arena.h"
#include "table.h"

namespace seqkern {
namespace {

// Below this many recurrent weights per thread a step is shorter than waiting for another thread.
constexpr int64_t kUnitSplitWeights = 64 * 1024;
// Rows that a thread must have for splitting the rows to be worth its own pass over the weights.
constexpr int64_t kRowSplitRows = 4;
enum Capability { portable, avx2, avx512, avx512_bf16, amx, capabilities };
const char* const kNames[capabilities] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__)
// The processor's word for it (leaf 7: AMX-BF16, AMX-TILE), and the kernel's: a process has to ask
// for the tile registers before it may touch them.
bool amx_granted() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & (1u << 22)) || !(d & (1u << 24)))
    return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

bool available(int c) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (c == avx2) return has_avx2;
  if (c == avx512) return has_avx512;
  if (c == avx512_bf16) return has_avx512 && __builtin_cpu_supports("avx512bf16");
  if (c == amx) return has_avx512 && amx_granted();
#endif
  return c == portable;
}

int best() {
  int c = capabilities - 1;
  while (!available(c)) --c;
  return c;
}

int& current() {
  static int c = best();
  return c;
}

const Kernels& backward_kernels(const Shape& s) {
  const int type = int(s.type), mode = int(s.mode);
#if defined(__x86_64__)
  if (s.type == Type::bf16 && current() == amx) return table_amx().of[type][mode];
  if (s.type == Type::bf16 && current() == avx512_bf16) return table_avx512_bf16().of[type][mode];
  if (current() >= avx512) return table_avx512().of[type][mode];
  if (current() == avx2) return table_avx2().of[type][mode];
#endif
  return table_portable().of[type][mode];
}

// A forward with a projection keeps to products in fp32: its input (o tanh c) would be rounded once
// more on the way.
const Kernels& forward_kernels(const Shape& s) {
#if defined(__x86_64__)
  if (s.proj && current() >= avx512) return table_avx512().of[int(s.type)][int(s.mode)];
#endif
  return backward_kernels(s);
}

Split split(const Shape& s, int threads) {
  Split r{1, 1, false};
  if (s.D == 2 && threads > 1) r.teams = 2;
  const int each = threads / r.teams;
  const int64_t weights = gates_of(s.mode) * s.H * s.P;
  if (s.B >= each * kRowSplitRows)
    r.members = each;
  else if (weights >= each * kUnitSplitWeights)
    r.members = each, r.units = true;
  else
    r.members = int(s.B < each ? s.B : each);
  if (r.members < 1) r.members = 1;
  return r;
}

// Runs `part(member)` for every direction. Threads beyond the split stay idle.
template <class Workspaces, class Part>
void run(const Shape& s, int threads, Workspaces workspace_of, Part part) {
  if (threads < 1 || omp_in_parallel()) threads = 1;
  Split plan = split(s, threads);
  // The largest workspace of any member: shares differ by rounding only, rank 0 counts for all.
  Team teams[kMaxDirections];
  const Member probe{0, 0, plan.members, plan.units, nullptr, nullptr, nullptr};
  const Workspace w = workspace_of(probe);
  const int all = plan.teams * plan.members;
  Arena arena(s.D * w.shared + all * w.scratch);
  auto member = [&](int direction, int rank, int thread) {
    return Member{direction,
                  rank,
                  plan.members,
                  plan.units,
                  &teams[direction],
                  arena.base() + direction * w.shared,
                  arena.base() + s.D * w.shared + thread * w.scratch};
  };
  if (all == 1) {
    for (int d = 0; d < s.D; ++d) part(member(d, 0, 0));
    return;
  }
  int granted = 0;
#pragma omp parallel num_threads(all)
  {
    const int thread = omp_get_thread_num();
#pragma omp single
    granted = omp_get_num_threads();
    if (granted == all)
      for (int d = thread / plan.members; d < s.D; d += plan.teams)
        part(member(d, thread % plan.members, thread));
  }
  if (granted == all) return;
  plan = Split{1, 1, false};  // the runtime gave fewer threads than it promised
  for (int d = 0; d < s.D; ++d) part(member(d, 0, 0));
}

std::vector<int64_t> offsets_of(Shape& s) {
  std::vector<int64_t> offsets;
  if (!s.batch_sizes) return offsets;
  offsets.resize(size_t(s.T));
  int64_t n = 0;
  for (int64_t t = 0; t < s.T; ++t) {
    offsets[size_t(t)] = n;
    n += s.batch_sizes[t];
  }
  s.offsets = offsets.data();
  return offsets;
}

}  // namespace

void recurrent_forward(const Forward& given) {
  Forward f = given;
  if (f.shape.N == 0) return;
  const auto offsets = offsets_of(f.shape);
  const Kernels& k = forward_kernels(f.shape);
  run(
      f.shape, f.threads, [&](const Member& m) { return k.forward_workspace(f, m); },
      [&](const Member& m) { k.forward(f, m); });
}

void recurrent_backward(const Backward& given) {
  Backward b = given;
  const Shape& s = b.shape;
  if (s.N == 0) {  // no rows: the weights' gradients are zero, and nothing else exists
    const int64_t GH = gates_of(s.mode) * s.H, sizes[5] = {GH * s.I, GH * s.P, GH, GH, s.P * s.H};
    for (int64_t d = 0; d < s.D; ++d)
      for (int i = 0; i < 5; ++i)
        if (b.dw[d][i]) std::memset(b.dw[d][i], 0, size_t(sizes[i] * size_of(s.type)));
    return;
  }
  const auto offsets = offsets_of(b.shape);
  const Kernels& k = backward_kernels(s);
  std::unique_ptr<char[]> reverse;
  if (b.dx && s.D == 2) {
    reverse.reset(new char[size_t(s.N * s.I * size_of(s.type))]);
    b.dx_reverse = reverse.get();
  }
  run(
      s, b.threads, [&](const Member& m) { return k.backward_workspace(b, m); },
      [&](const Member& m) { k.backward(b, m); });
  if (reverse) k.add(b.dx, b.dx_reverse, s.N * s.I);
}

PackedSizes packed_sizes(const Shape& s) { return forward_kernels(s).packed_sizes(s); }

void pack_weights(const Shape& s, const Weights& w, void* ih, void* hh, void* hr, void* bias) {
  forward_kernels(s).pack(s, w, ih, hh, hr, bias);
}

const char* cpu_capability() { return kNames[current()]; }

void set_cpu_capability(const char* name) {
  for (int c = 0; c < capabilities; ++c)
    if (std::strcmp(name, kNames[c]) == 0) {
      if (!available(c))
        throw std::invalid_argument(std::string("set_cpu_capability: this processor has no ") +
                                    name);
      current() = c;
      return;
    }
  throw std::invalid_argument(
      std::string("set_cpu_capability: expected portable, avx2, avx512, avx512_bf16 or amx, got ") +
      name);
}

}  // namespace seqkern
