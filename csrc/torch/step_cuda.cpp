// One step of a recurrent layer on CUDA tensors, all but its products: what
// seqkern/ops/_recurrent_steps.py calls between two of them. Everything is checked again, since
// anyone can call torch.ops; the pointers go to csrc/core/cuda, on the current stream.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "core/cuda/step.h"
#include "cuda_stream.h"

namespace {

using namespace seqkern::binding;
using seqkern::Mode;
using seqkern::Type;

constexpr const char* kOp = "recurrent_step";

// Rows of a matrix that the kernels can read: where the first one is, and elements between two.
struct Matrix {
  void* data = nullptr;
  int64_t row = 0;
};

struct Call {
  const Tensor& like;  // of the call's dtype, on its device
  Mode mode;
  Type type;
  int32_t device;
  int64_t gates;

  Call(const Tensor& like_, const std::string& name)
      : like(like_),
        mode(mode_of(name, kOp)),
        type(type_of(like_, kOp, "h")),
        device(like_.get_device_index()),
        gates(seqkern::gates_of(mode)) {
    STD_TORCH_CHECK(type != Type::f64, "recurrent_step: float64 has no kernel");
  }

  bool lstm() const { return mode == Mode::lstm; }
  bool gru() const { return mode == Mode::gru; }
  bool rnn() const { return !lstm() && !gru(); }
  int64_t saved() const { return seqkern::saved_of(mode); }

  // Contiguous rows, `apart` where they need not follow each other.
  Matrix rows(const char* name, const Tensor& t, int64_t n, int64_t width, bool apart = false,
              bool single = false) const {
    expect_cuda(kOp, name, t, device);
    STD_TORCH_CHECK(t.scalar_type() == (single ? ScalarType::Float : like.scalar_type()),
                    "recurrent_step: ", name, " must have the dtype of ",
                    single ? "float32" : "the call");
    expect_sizes(kOp, name, t, {n, width});
    const bool side_by_side = width == 1 || t.stride(1) == 1;
    STD_TORCH_CHECK(
        side_by_side && (n < 2 || (apart ? t.stride(0) >= width : t.stride(0) == width)),
        "recurrent_step: ", name, " must have contiguous rows", apart ? "" : ", one after another");
    return {t.mutable_data_ptr(), n < 2 ? width : t.stride(0)};
  }
  void* floats(const char* name, const Tensor& t, int64_t n, int64_t width) const {
    return rows(name, t, n, width, false, true).data;
  }
  // Where `wanted`, what must be given; else what must not.
  Matrix given(const char* name, const Optional& t, bool wanted, int64_t n, int64_t width,
               bool apart = false, bool single = false) const {
    STD_TORCH_CHECK(t.has_value() == wanted, "recurrent_step: ", name, " must be ",
                    wanted ? "given" : "None", " for this mode");
    return wanted ? rows(name, *t, n, width, apart, single) : Matrix{};
  }
  const void* bias(const char* name, const Optional& t, int64_t H) const {
    if (!t) return nullptr;
    expect_cuda(kOp, name, *t, device);
    STD_TORCH_CHECK(t->is_contiguous() && t->scalar_type() == like.scalar_type(),
                    "recurrent_step: ", name, " must be contiguous and of h's dtype");
    expect_sizes(kOp, name, *t, {gates * H});
    return t->const_data_ptr();
  }

  template <class P>
  void launch(P& p) const {
    p.relu = mode == Mode::rnn_relu;
    const torch::stable::accelerator::DeviceGuard guard(device);
    const char* error = seqkern::cuda::launch_step(mode, type, p, device, current_stream(device));
    STD_TORCH_CHECK(!error, "recurrent_step: the launch failed: ", error ? error : "");
  }
};

void forward(Tensor gx, Tensor gh, Optional b_ih, Optional b_hh, Tensor h, Optional c, Tensor y,
             Optional gates, Optional cells, std::string mode) {
  const Call call(h, mode);
  STD_TORCH_CHECK(h.dim() == 2 && h.size(1) > 0, "recurrent_step: h must be (B, H), got ",
                  list(sizes_of(h)));
  const int64_t n = h.size(0), H = h.size(1);
  seqkern::cuda::StepForward p{};
  p.rows = n, p.H = H;
  const Matrix x = call.rows("gx", gx, n, call.gates * H, true, true);
  p.gx = static_cast<const float*>(x.data), p.gx_row = x.row;
  p.gh = static_cast<const float*>(call.floats("gh", gh, n, call.gates * H));
  STD_TORCH_CHECK(b_ih.has_value() == b_hh.has_value(),
                  "recurrent_step: b_ih and b_hh must both be given, or neither");
  p.b_ih = call.bias("b_ih", b_ih, H), p.b_hh = call.bias("b_hh", b_hh, H);
  p.h = call.rows("h", h, n, H).data;
  p.c = static_cast<float*>(call.given("c", c, call.lstm(), n, H, false, true).data);
  const Matrix out = call.rows("y", y, n, H, true);
  p.y = out.data, p.y_row = out.row;
  if (gates) p.gates = call.given("gates", gates, call.saved() > 0, n, call.saved() * H).data;
  if (cells) p.cells = call.given("cells", cells, call.lstm(), n, H).data;
  call.launch(p);
}

void backward(Optional dy, Optional sums, Tensor dh, Optional dc, Optional gates, Optional cells,
              Optional before, Optional initial, Optional y, Tensor dg, Optional dah,
              std::string mode) {
  const Call call(dg, mode);
  STD_TORCH_CHECK(dh.dim() == 2 && dh.size(1) > 0, "recurrent_step: dh must be (B, H), got ",
                  list(sizes_of(dh)));
  const int64_t n = dh.size(0), H = dh.size(1), saved = call.saved();
  seqkern::cuda::StepBackward p{};
  p.rows = n, p.H = H;
  const Matrix of_y = call.given("dy", dy, dy.has_value(), n, H, true);
  p.dy = of_y.data, p.dy_row = of_y.row;
  if (sums) {
    STD_TORCH_CHECK(sums->dim() == 2, "recurrent_step: sums must be (rows, H), got ",
                    list(sizes_of(*sums)));
    p.sum_rows = sums->size(0);
    p.sums = static_cast<const float*>(call.floats("sums", *sums, p.sum_rows, H));
  }
  p.dh = static_cast<float*>(call.floats("dh", dh, n, H));
  p.dc = static_cast<float*>(call.given("dc", dc, call.lstm(), n, H, false, true).data);
  p.gates = call.given("gates", gates, saved > 0, n, saved * H).data;
  p.cells = call.given("cells", cells, call.lstm(), n, H).data;
  const bool looks_back = !call.rnn();
  p.initial = call.given("initial", initial, looks_back, n, H).data;
  if (before && before->dim() == 2) p.carried = before->size(0);
  STD_TORCH_CHECK(p.carried <= n, "recurrent_step: before must have at most ", n, " rows, got ",
                  p.carried);
  const Matrix previous = call.given("before", before, looks_back, p.carried, H, true);
  p.before = previous.data, p.before_row = previous.row;
  const Matrix out = call.given("y", y, call.rnn(), n, H, true);
  p.y = out.data, p.y_row = out.row;
  p.dg = call.rows("dg", dg, n, (saved ? saved : 1) * H).data;
  p.dah = call.given("dah", dah, call.gru(), n, call.gates * H).data;
  call.launch(p);
}

bool built(int64_t device) {
  bool found = false;
  const char* error = seqkern::cuda::has_steps(int(device), &found);
  STD_TORCH_CHECK(!error, "recurrent_step: cuda:", device,
                  " does not say what was built for it: ", error ? error : "");
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqkern, m) {
  m.def(
      "recurrent_step(Tensor gx, Tensor gh, Tensor? b_ih, Tensor? b_hh, Tensor(a!) h,"
      " Tensor(b!)? c, Tensor(c!) y, Tensor(d!)? gates, Tensor(e!)? cells, str mode) -> ()");
  m.def(
      "recurrent_step_backward(Tensor? dy, Tensor? sums, Tensor(a!) dh, Tensor(b!)? dc,"
      " Tensor? gates, Tensor? cells, Tensor? before, Tensor? initial, Tensor? y, Tensor(c!) dg,"
      " Tensor(d!)? dah, str mode) -> ()");
  m.def("recurrent_step_built(int device) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(seqkern, CompositeExplicitAutograd, m) {
  m.impl("recurrent_step_built", TORCH_BOX(&built));
}

STABLE_TORCH_LIBRARY_IMPL(seqkern, CUDA, m) {
  m.impl("recurrent_step", TORCH_BOX(&forward));
  m.impl("recurrent_step_backward", TORCH_BOX(&backward));
}
