// The recurrent kernels, as they ship, on the emulator; called through ctypes.
#include <type_traits>

#include "core/cuda/backward.cuh"
#include "core/cuda/forward.cuh"
#include "core/cuda/step.cuh"

namespace {

using namespace seqkern;
using namespace seqkern::cuda;

// A tensor of the call: memory that the kernel may touch. Null data where there is none.
struct Tensor {
  void* data;
  int64_t bytes;
  int64_t writable;
};

struct Sizes {
  int64_t T, B, H, D, N, gx_row, gx_direction, seed;
  int64_t skeleton, groups;  // a Skeleton, and how many units / 16 its blocks have
  int64_t blocks;            // that fit the device together
};

std::string message;

Sequence sequence_of(Mode mode, Type type, const Sizes& z, const Tensor* t, bool backward) {
  Sequence s{};
  s.plan = Skeleton(z.skeleton) == Skeleton::block
               ? block_plan(mode, type, z.H, backward)
               : plan_of(Skeleton(z.skeleton), mode, type, z.H, backward, int(z.groups));
  s.T = z.T, s.B = z.B, s.H = z.H, s.D = z.D, s.N = z.N;
  s.lengths = static_cast<const int64_t*>(t[0].data);
  s.offsets = static_cast<const int64_t*>(t[1].data);
  s.relu = mode == Mode::rnn_relu;
  return s;
}

// A launch that may touch these tensors.
simt::Config memory_of(const Tensor* t, int count, int64_t seed) {
  simt::Config c;
  c.seed = unsigned(seed);
  for (int i = 0; i < count; ++i)
    if (t[i].data)
      c.memory.push_back(
          {uintptr_t(t[i].data), uintptr_t(t[i].data) + t[i].bytes, !!t[i].writable});
  return c;
}

simt::Config config_of(const Sequence& s, const Sizes& z, const Tensor* t, int count) {
  simt::Config c = memory_of(t, count, z.seed);
  c.threads = s.plan.warps * 32, c.shared = s.plan.shared;
  return c;
}

template <class X>
struct Of {
  using type = X;
};

// Launches as launch.cu does: f(Of<X>) runs the kernel with that exchange.
template <class Call, class F>
void launch_all(Call& p, simt::Config c, const Sizes& z, const F& f) {
  const Plan& plan = p.s.plan;
  const int64_t slices = (p.s.B + kSliceRows - 1) / kSliceRows, jobs = slices * p.s.D;
  if (plan.skeleton == Skeleton::block) {
    c.grid_x = int(slices), c.grid_y = int(p.s.D);
    return simt::launch(c, [&] { f(Of<Alone>{}); });
  }
  c.grid_x = plan.members;
  if (plan.skeleton == Skeleton::cluster) {
    c.grid_y = int(jobs), c.together = plan.members;
    return simt::launch(c, [&] { f(Of<Cluster>{}); });
  }
  const int64_t most = z.blocks / plan.members;
  for (int64_t first = 0; first < jobs; first += most) {
    p.s.first = int32_t(first);
    c.grid_y = int(std::min(most, jobs - first)), c.together = c.grid_x * c.grid_y;
    std::vector<uint64_t> words(plan.words * c.grid_y);
    p.s.words = words.data();
    simt::Config with = c;
    with.memory.push_back({uintptr_t(words.data()), uintptr_t(words.data() + words.size()), true});
    simt::launch(with, [&] { f(Of<Grid>{}); });
  }
}

template <class Body>
const char* report(const Body& body) {
  try {
    body();
    return nullptr;
  } catch (const std::exception& e) {
    message = e.what();
    return message.c_str();
  }
}

// Calls f with the Cell's mode and a value of the storage type.
template <class F>
void with_types(Mode mode, Type type, const F& f) {
  auto typed = [&](auto m) {
    if (type == Type::f32) f(m, float{});
    if (type == Type::tf32) f(m, tf32{});
    if (type == Type::bf16) f(m, bf16{});
    if (type == Type::f16) f(m, f16{});
  };
  if (mode == Mode::lstm)
    typed(std::integral_constant<Mode, Mode::lstm>{});
  else if (mode == Mode::gru)
    typed(std::integral_constant<Mode, Mode::gru>{});
  else
    typed(std::integral_constant<Mode, Mode::rnn_tanh>{});
}

}  // namespace

// Tensors: lengths offsets gx h0 c0 w_hh[2] b_ih[2] b_hh[2] y h_n c_n gates cells. Null, or what
// the emulator refused.
extern "C" const char* run_forward(int mode, int type, const Sizes* z, const Tensor* t) {
  return report([&] {
    ForwardCall p{};
    p.s = sequence_of(Mode(mode), Type(type), *z, t, false);
    p.gx = static_cast<const float*>(t[2].data);
    p.gx_row = z->gx_row, p.gx_direction = z->gx_direction;
    p.h0 = t[3].data, p.c0 = t[4].data;
    for (int d = 0; d < 2; ++d)
      p.w_hh[d] = t[5 + d].data, p.b_ih[d] = t[7 + d].data, p.b_hh[d] = t[9 + d].data;
    p.y = t[11].data, p.h_n = t[12].data, p.c_n = t[13].data;
    p.gates = t[14].data, p.cells = t[15].data;
    const simt::Config config = config_of(p.s, *z, t, 16);
    with_types(Mode(mode), Type(type), [&](auto m, auto s) {
      launch_all(p, config, *z, [&](auto x) {
        recurrent_forward<m.value, decltype(s), typename decltype(x)::type>(p);
      });
    });
  });
}

// Tensors: lengths offsets h0 c0 w_hh[2] y gates cells dy dh_n dc_n dg dh0 dc0.
extern "C" const char* run_backward(int mode, int type, const Sizes* z, const Tensor* t) {
  return report([&] {
    BackwardCall p{};
    p.s = sequence_of(Mode(mode), Type(type), *z, t, true);
    p.h0 = t[2].data, p.c0 = t[3].data;
    p.w_hh[0] = t[4].data, p.w_hh[1] = t[5].data;
    p.y = t[6].data, p.gates = t[7].data, p.cells = t[8].data;
    p.dy = t[9].data, p.dh_n = t[10].data, p.dc_n = t[11].data;
    p.dg = t[12].data, p.dh0 = t[13].data, p.dc0 = t[14].data;
    const simt::Config config = config_of(p.s, *z, t, 15);
    with_types(Mode(mode), Type(type), [&](auto m, auto s) {
      launch_all(p, config, *z, [&](auto x) {
        recurrent_backward<m.value, decltype(s), typename decltype(x)::type>(p);
      });
    });
  });
}

// As step.cu launches them: f(wide) runs the kernel that takes 16 bytes at a time, or single
// values.
template <class Call, class F>
void launch_step(const Call& p, int64_t size, simt::Config c, const F& f) {
  const bool wide = whole_words(p, size);
  const int64_t threads = p.rows * (wide ? p.H * size / 16 : p.H);
  c.threads = kStepThreads, c.grid_x = int((threads + kStepThreads - 1) / kStepThreads);
  c.grid_y = 1;
  if (p.rows > 0) simt::launch(c, [&] { f(wide); });
}

// Tensors: gx gh b_ih b_hh h c y gates cells. Sizes: rows H gx_row y_row seed.
extern "C" const char* run_step(int mode, int type, const int64_t* z, const Tensor* t) {
  return report([&] {
    StepForward p{};
    p.rows = z[0], p.H = z[1], p.gx_row = z[2], p.y_row = z[3],
    p.relu = Mode(mode) == Mode::rnn_relu;
    p.gx = static_cast<const float*>(t[0].data), p.gh = static_cast<const float*>(t[1].data);
    p.b_ih = t[2].data, p.b_hh = t[3].data, p.h = t[4].data, p.c = static_cast<float*>(t[5].data);
    p.y = t[6].data, p.gates = t[7].data, p.cells = t[8].data;
    with_types(Mode(mode), Type(type), [&](auto m, auto s) {
      using S = decltype(s);
      launch_step(p, sizeof(S), memory_of(t, 9, z[4]), [&](bool wide) {
        wide ? step_forward<m.value, S, 16 / sizeof(S)>(p) : step_forward<m.value, S, 1>(p);
      });
    });
  });
}

// Tensors: dy sums dh dc gates cells before initial y dg dah. Sizes: rows H dy_row sum_rows
// before_row carried y_row seed.
extern "C" const char* run_step_backward(int mode, int type, const int64_t* z, const Tensor* t) {
  return report([&] {
    StepBackward p{};
    p.rows = z[0], p.H = z[1], p.dy_row = z[2], p.sum_rows = z[3], p.before_row = z[4];
    p.carried = z[5], p.y_row = z[6], p.relu = Mode(mode) == Mode::rnn_relu;
    p.dy = t[0].data, p.sums = static_cast<const float*>(t[1].data);
    p.dh = static_cast<float*>(t[2].data), p.dc = static_cast<float*>(t[3].data);
    p.gates = t[4].data, p.cells = t[5].data, p.before = t[6].data, p.initial = t[7].data;
    p.y = t[8].data, p.dg = t[9].data, p.dah = t[10].data;
    with_types(Mode(mode), Type(type), [&](auto m, auto s) {
      using S = decltype(s);
      launch_step(p, sizeof(S), memory_of(t, 11, z[7]), [&](bool wide) {
        wide ? step_backward<m.value, S, 16 / sizeof(S)>(p) : step_backward<m.value, S, 1>(p);
      });
    });
  });
}

extern "C" int block_fits(int mode, int type, int64_t H, int64_t limit) {
  Card card;
  card.shared = limit;
  Plan plan;
  return candidate(card, Mode(mode), Type(type), H, false, 0, &plan) &&
         candidate(card, Mode(mode), Type(type), H, true, 0, &plan);
}

// Candidate number `i` for a card, as skeleton, members, groups, warps, bytes of shared memory and
// words; 0 beyond the last.
extern "C" int plan_on(int mode, int type, int64_t H, int backward, int64_t shared, int64_t blocks,
                       int clusters, int i, int64_t* out) {
  Card card;
  card.shared = shared, card.blocks = blocks, card.clusters = clusters, card.grids = true;
  Plan p;
  if (!candidate(card, Mode(mode), Type(type), H, backward, i, &p)) return 0;
  const int64_t found[] = {int64_t(p.skeleton), p.members, p.groups, p.warps, p.shared, p.words};
  std::copy(found, found + 6, out);
  return 1;
}
