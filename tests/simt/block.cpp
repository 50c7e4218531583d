// The one-block recurrent kernels, as they ship, on the emulator; called through ctypes.
#include <type_traits>

#include "core/cuda/block_backward.cuh"
#include "core/cuda/block_forward.cuh"

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
};

std::string message;

BlockSequence sequence_of(Mode mode, Type type, const Sizes& z, const Tensor* t, bool backward) {
  BlockSequence s{};
  s.plan = block_plan(mode, type, z.H, backward);
  s.T = z.T, s.B = z.B, s.H = z.H, s.D = z.D, s.N = z.N;
  s.lengths = static_cast<const int64_t*>(t[0].data);
  s.offsets = static_cast<const int64_t*>(t[1].data);
  s.relu = mode == Mode::rnn_relu;
  return s;
}

simt::Config config_of(const BlockSequence& s, const Sizes& z, const Tensor* t, int count) {
  simt::Config c;
  c.grid_x = int((s.B + kSliceRows - 1) / kSliceRows), c.grid_y = int(s.D);
  c.threads = s.plan.warps * 32, c.shared = s.plan.shared, c.seed = unsigned(z.seed);
  for (int i = 0; i < count; ++i)
    if (t[i].data)
      c.memory.push_back(
          {uintptr_t(t[i].data), uintptr_t(t[i].data) + t[i].bytes, !!t[i].writable});
  return c;
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
extern "C" const char* block_forward(int mode, int type, const Sizes* z, const Tensor* t) {
  return report([&] {
    BlockForward p{};
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
      simt::launch(config, [&] { block_forward<m.value, decltype(s)>(p); });
    });
  });
}

// Tensors: lengths offsets h0 c0 w_hh[2] y gates cells dy dh_n dc_n dg dh0 dc0.
extern "C" const char* block_backward(int mode, int type, const Sizes* z, const Tensor* t) {
  return report([&] {
    BlockBackward p{};
    p.s = sequence_of(Mode(mode), Type(type), *z, t, true);
    p.h0 = t[2].data, p.c0 = t[3].data;
    p.w_hh[0] = t[4].data, p.w_hh[1] = t[5].data;
    p.y = t[6].data, p.gates = t[7].data, p.cells = t[8].data;
    p.dy = t[9].data, p.dh_n = t[10].data, p.dc_n = t[11].data;
    p.dg = t[12].data, p.dh0 = t[13].data, p.dc0 = t[14].data;
    const simt::Config config = config_of(p.s, *z, t, 15);
    with_types(Mode(mode), Type(type), [&](auto m, auto s) {
      simt::launch(config, [&] { block_backward<m.value, decltype(s)>(p); });
    });
  });
}

extern "C" int block_fits(int mode, int type, int64_t H, int64_t limit) {
  return fits_block(Mode(mode), Type(type), H, limit);
}
extern "C" int64_t block_shared(int mode, int type, int64_t H, int backward) {
  return block_plan(Mode(mode), Type(type), H, backward != 0).shared;
}
