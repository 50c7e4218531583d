// The steps of a recurrent layer on CUDA tensors: what seqkern/ops/_recurrent_block.py calls
// between its products. Everything is checked again, since anyone can call torch.ops; the pointers
// go to the launches of csrc/core/cuda, on the current stream of the tensors' device.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "core/cuda/launch.h"
#include "cuda_stream.h"

namespace {

using namespace seqkern::binding;
using seqkern::Mode;
using seqkern::Type;
using torch::stable::new_empty;

constexpr const char* kOp = "recurrent_block";

const void* data(const Optional& t) { return t ? t->const_data_ptr() : nullptr; }

int32_t device_of(const Tensor& h0) {
  STD_TORCH_CHECK(h0.is_cuda(), "recurrent_block: h0 must be on a CUDA device");
  return h0.get_device_index();
}

struct Room {
  seqkern::cuda::Plan plan;
  int64_t slices = 0;  // at once; 0 where a device has no room for one
};

// What a device allows does not change, and asking it takes microseconds. An error is no answer.
Room room_of(Mode mode, Type type, int64_t hidden, bool backward, int32_t device) {
  static std::mutex lock;
  static std::map<std::tuple<Mode, Type, int64_t, bool, int32_t>, Room> known;
  const std::lock_guard<std::mutex> guard(lock);
  const std::tuple key{mode, type, hidden, backward, device};
  if (const auto found = known.find(key); found != known.end()) return found->second;
  Room room;
  const char* error =
      seqkern::cuda::choose_plan(mode, type, hidden, backward, device, &room.plan, &room.slices);
  STD_TORCH_CHECK(!error, "recurrent_block: cuda:", device,
                  " does not say what it has room for: ", error ? error : "");
  return known[key] = room;
}

// The checked arguments that forward and backward share, and the tensors that their pointers need.
struct Call {
  Mode mode;
  Type type;
  Tensor h0;
  int32_t device;
  int64_t gates, steps = 0, rows = 0;
  seqkern::cuda::Sequence s{};
  Optional lengths;  // on the device, then the offsets
  Optional words;
  torch::stable::accelerator::DeviceGuard guard;

  Call(const Tensor& h0_, const Optional& c0, const Optional& batch_sizes, int64_t n,
       const Tensors& w_hh, const std::string& name, bool tf32, bool backward)
      : mode(mode_of(name, kOp)),
        type(tf32 ? Type::tf32 : type_of(h0_, kOp, "h0")),
        h0(h0_),
        device(device_of(h0_)),
        gates(seqkern::gates_of(mode)),
        guard(device) {
    STD_TORCH_CHECK(h0.dim() == 3 && (h0.size(0) == 1 || h0.size(0) == 2) && h0.size(2) > 0,
                    "recurrent_block: h0 must be (D, B, H) with D 1 or 2 and H at least 1, got ",
                    list(sizes_of(h0)));
    STD_TORCH_CHECK(!tf32 || h0.scalar_type() == ScalarType::Float,
                    "recurrent_block: tf32 is for float32 tensors");
    s.D = h0.size(0), s.B = h0.size(1), s.H = h0.size(2), s.N = n;
    s.relu = mode == Mode::rnn_relu;
    take("h0", h0, {s.D, s.B, s.H});
    STD_TORCH_CHECK(c0.has_value() == (mode == Mode::lstm), "recurrent_block: c0 must ",
                    mode == Mode::lstm ? "be given for LSTM" : "be None but for LSTM");
    if (c0) take("c0", *c0, {s.D, s.B, s.H});
    each("w_hh", w_hh, {gates * s.H, s.H});
    const Room room = room_of(mode, type, s.H, backward, device);
    STD_TORCH_CHECK(room.slices > 0, "recurrent_block: H = ", s.H, " has no room on cuda:", device);
    s.plan = room.plan, s.slices = room.slices;
    read_sequence(batch_sizes);
    // A grid's words carry the step in 32 bits, and slices are counted in as many.
    STD_TORCH_CHECK(s.T < 2147483647 && s.B < 2147483647,
                    "recurrent_block: T and B must have 31 bits, got ", s.T, " and ", s.B);
    if (s.plan.words == 0) return;
    const int64_t jobs = (s.B + seqkern::cuda::kSliceRows - 1) / seqkern::cuda::kSliceRows * s.D;
    words = new_empty(h0, {s.plan.words * std::min(s.slices, jobs)}, ScalarType::Long);
    s.words = static_cast<uint64_t*>(words->mutable_data_ptr());
  }

  // Of h0's dtype and device, contiguous, and of these sizes.
  const void* take(const char* name, const Tensor& t, Sizes sizes) const {
    expect_cuda(kOp, name, t, device);
    STD_TORCH_CHECK(t.scalar_type() == h0.scalar_type(), "recurrent_block: ", name,
                    " must have the dtype of h0");
    STD_TORCH_CHECK(t.is_contiguous(), "recurrent_block: ", name, " must be contiguous");
    expect_sizes(kOp, name, t, sizes);
    return t.const_data_ptr();
  }
  const void* take(const char* name, const Optional& t, Sizes sizes) const {
    return t ? take(name, *t, sizes) : nullptr;
  }
  void each(const char* name, const Tensors& tensors, Sizes sizes) const {
    STD_TORCH_CHECK(int64_t(tensors.size()) == s.D, "recurrent_block: ", name, " must hold ", s.D,
                    " tensors, got ", int64_t(tensors.size()));
    for (const Tensor& t : tensors) take(name, t, sizes);
  }

  void read_sequence(const Optional& given) {
    if (!given) {
      STD_TORCH_CHECK(s.B == 0 ? s.N == 0 : s.N > 0 && s.N % s.B == 0, "recurrent_block: ", s.N,
                      " rows are not whole steps of B = ", s.B);
      s.T = s.B ? s.N / s.B : 0;
      return;
    }
    STD_TORCH_CHECK(given->is_cpu() && given->dim() == 1 && given->size(0) > 0 &&
                        given->scalar_type() == ScalarType::Long && given->is_contiguous(),
                    "recurrent_block: batch_sizes must be (T,) int64 on the CPU, contiguous");
    expect_memory(kOp, "batch_sizes", *given);
    s.T = given->size(0);
    const int64_t* sizes = static_cast<const int64_t*>(given->const_data_ptr());
    const Tensor host = new_empty(*given, {s.B + s.T});
    int64_t* length = static_cast<int64_t*>(host.mutable_data_ptr());
    int64_t rows = 0, before = s.B;
    for (int64_t t = 0; t < s.T; ++t) {
      const int64_t n = sizes[t];
      STD_TORCH_CHECK(n >= 1 && n <= before && (t > 0 || n == s.B),
                      "recurrent_block: batch_sizes must start with B = ", s.B,
                      " and never grow or reach 0, got ", n, " at ", t);
      for (int64_t b = n; b < before; ++b) length[b] = t;
      length[s.B + t] = rows;
      rows += n, before = n;
    }
    for (int64_t b = 0; b < before; ++b) length[b] = s.T;
    STD_TORCH_CHECK(rows == s.N, "recurrent_block: batch_sizes stand for ", rows, " rows, not ",
                    s.N);
    lengths = new_empty(h0, {s.B + s.T}, ScalarType::Long);
    torch::stable::copy_(*lengths, host);
    s.lengths = static_cast<const int64_t*>(lengths->const_data_ptr());
    s.offsets = s.lengths + s.B;
  }

  Tensor empty(std::vector<int64_t> sizes) const { return new_empty(h0, sizes); }
};

void launched(const char* error) {
  STD_TORCH_CHECK(!error, "recurrent_block: the launch failed: ", error ? error : "");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(Tensor gx, Optional batch_sizes,
                                                           Tensor h0, Optional c0, Tensors w_hh,
                                                           Tensors b_ih, Tensors b_hh,
                                                           std::string mode, bool save, bool tf32) {
  STD_TORCH_CHECK(gx.dim() == 2, "recurrent_block: gx must be (N, D*G*H), got ",
                  list(sizes_of(gx)));
  const Call call(h0, c0, batch_sizes, gx.size(0), w_hh, mode, tf32, false);
  const seqkern::cuda::Sequence& s = call.s;
  const int64_t width = call.gates * s.H, saved = save ? seqkern::saved_of(call.mode) : 0;
  const bool lstm = call.mode == Mode::lstm;
  expect_cuda(kOp, "gx", gx, call.device);
  STD_TORCH_CHECK(gx.scalar_type() == ScalarType::Float && gx.is_contiguous(),
                  "recurrent_block: gx must be float32, contiguous");
  expect_sizes(kOp, "gx", gx, {s.N, s.D * width});
  STD_TORCH_CHECK(b_ih.size() == b_hh.size(), "recurrent_block: b_ih and b_hh must both be given");
  if (!b_ih.empty()) call.each("b_ih", b_ih, {width}), call.each("b_hh", b_hh, {width});
  Tensor y = call.empty({s.N, s.D * s.H}), h_n = call.empty({s.D, s.B, s.H});
  Tensor c_n = lstm ? call.empty({s.D, s.B, s.H}) : call.empty({0});
  Tensor gates = saved ? call.empty({s.D, s.N, saved * s.H}) : call.empty({0});
  Tensor cells = saved && lstm ? call.empty({s.D, s.N, s.H}) : call.empty({0});
  seqkern::cuda::ForwardCall p{};
  p.s = s;
  p.gx = static_cast<const float*>(gx.const_data_ptr());
  p.gx_row = s.D * width, p.gx_direction = width;
  p.h0 = h0.const_data_ptr(), p.c0 = data(c0);
  for (size_t d = 0; d < size_t(s.D); ++d) {
    p.w_hh[d] = w_hh[d].const_data_ptr();
    if (b_ih.empty()) continue;
    p.b_ih[d] = b_ih[d].const_data_ptr(), p.b_hh[d] = b_hh[d].const_data_ptr();
  }
  p.y = y.mutable_data_ptr(), p.h_n = h_n.mutable_data_ptr();
  p.c_n = lstm ? c_n.mutable_data_ptr() : nullptr;
  p.gates = saved ? gates.mutable_data_ptr() : nullptr;
  p.cells = saved && lstm ? cells.mutable_data_ptr() : nullptr;
  launched(seqkern::cuda::launch_forward(call.mode, call.type, p, call.device,
                                         current_stream(call.device)));
  return {y, h_n, c_n, gates, cells};
}

std::tuple<Tensor, Tensor, Tensor> backward(Optional dy, Optional dh_n, Optional dc_n,
                                            Optional batch_sizes, Tensor h0, Optional c0,
                                            Tensors w_hh, Tensor y, Tensor gates, Tensor cells,
                                            std::string mode, bool tf32) {
  STD_TORCH_CHECK(y.dim() == 2, "recurrent_block: y must be (N, D*H), got ", list(sizes_of(y)));
  const Call call(h0, c0, batch_sizes, y.size(0), w_hh, mode, tf32, true);
  const seqkern::cuda::Sequence& s = call.s;
  const bool lstm = call.mode == Mode::lstm;
  const int64_t saved = seqkern::saved_of(call.mode), columns = saved ? saved : 1;
  Tensor dg = call.empty({s.D, s.N, columns * s.H}), dh0 = call.empty({s.D, s.B, s.H});
  Tensor dc0 = lstm ? call.empty({s.D, s.B, s.H}) : call.empty({0});
  seqkern::cuda::BackwardCall p{};
  p.s = s;
  p.h0 = h0.const_data_ptr(), p.c0 = data(c0);
  for (size_t d = 0; d < size_t(s.D); ++d) p.w_hh[d] = w_hh[d].const_data_ptr();
  p.y = call.take("y", y, {s.N, s.D * s.H});
  if (saved) p.gates = call.take("gates", gates, {s.D, s.N, saved * s.H});
  if (lstm) p.cells = call.take("cells", cells, {s.D, s.N, s.H});
  p.dy = call.take("dy", dy, {s.N, s.D * s.H});
  p.dh_n = call.take("dh_n", dh_n, {s.D, s.B, s.H});
  if (lstm) p.dc_n = call.take("dc_n", dc_n, {s.D, s.B, s.H});
  p.dg = dg.mutable_data_ptr(), p.dh0 = dh0.mutable_data_ptr();
  p.dc0 = lstm ? dc0.mutable_data_ptr() : nullptr;
  launched(seqkern::cuda::launch_backward(call.mode, call.type, p, call.device,
                                          current_stream(call.device)));
  return {dg, dh0, dc0};
}

// By which skeleton the forward or the backward of a layer of `hidden` units runs on a device, such
// as "cluster of 12"; "" where it does not. What matters of the products is "float32", "tf32" or
// "16 bit".
std::string room_in_words(std::string mode, std::string products, int64_t hidden, bool backward,
                          int64_t device) {
  STD_TORCH_CHECK(products == "float32" || products == "tf32" || products == "16 bit",
                  "recurrent_block: products must be \"float32\", \"tf32\" or \"16 bit\", got \"",
                  products, "\"");
  const Type type = products == "tf32"      ? Type::tf32
                    : products == "float32" ? Type::f32
                                            : Type::bf16;
  const Room room = room_of(mode_of(mode, kOp), type, hidden, backward, int32_t(device));
  if (room.slices == 0) return "";
  const char* names[] = {"block", "cluster", "grid"};
  const std::string name = names[int(room.plan.skeleton)];
  return room.plan.members > 1 ? name + " of " + std::to_string(room.plan.members) : name;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqkern, m) {
  m.def(
      "recurrent_block(Tensor gx, Tensor? batch_sizes, Tensor h0, Tensor? c0, Tensor[] w_hh,"
      " Tensor[] b_ih, Tensor[] b_hh, str mode, bool save, bool tf32)"
      " -> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)");
  m.def(
      "recurrent_block_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? batch_sizes,"
      " Tensor h0, Tensor? c0, Tensor[] w_hh, Tensor y, Tensor gates, Tensor cells, str mode,"
      " bool tf32)"
      " -> (Tensor dg, Tensor dh0, Tensor dc0)");
  m.def(
      "recurrent_block_room(str mode, str products, int hidden, bool backward, int device) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(seqkern, CompositeExplicitAutograd, m) {
  m.impl("recurrent_block_room", TORCH_BOX(&room_in_words));
}

STABLE_TORCH_LIBRARY_IMPL(seqkern, CUDA, m) {
  m.impl("recurrent_block", TORCH_BOX(&forward));
  m.impl("recurrent_block_backward", TORCH_BOX(&backward));
}
