// The recurrent ops on CPU tensors: checks every size again, since anyone can call torch.ops, and
// hands pointers to the kernels of csrc/core. The schemas are in seqkern/ops/recurrent.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "core/recurrent.h"
#include "packed.h"

namespace {

using namespace seqkern::binding;
using seqkern::Mode;

// The checked arguments of a call, and the contiguous copies that its pointers need.
struct Call {
  const char* op;
  seqkern::Shape shape{};
  Tensor x, h0;
  Optional c0, batch_sizes;
  seqkern::Rows rows;
  Tensors weights;
  seqkern::Weights w[seqkern::kMaxDirections]{};

  Call(const char* name, const Tensor& x_, const Optional& batch_sizes_, const Tensor& h0_,
       const Optional& c0_, const Tensors& weights_, const std::string& mode)
      : op(name), x(x_) {
    seqkern::Shape& s = shape;
    s.mode = mode_of(mode, op);
    expect_cpu(op, "x", x);
    s.type = type_of(x, op);
    h0 = ready(op, "h0", h0_, x);
    STD_TORCH_CHECK(h0.dim() == 3 && (h0.size(0) == 1 || h0.size(0) == 2), op,
                    ": h0 must be (D, B, P) with D 1 or 2, got ", list(sizes_of(h0)));
    s.D = h0.size(0), s.B = h0.size(1), s.P = h0.size(2);
    read_sequence(batch_sizes_);
    read_weights(weights_);
    STD_TORCH_CHECK(c0_.has_value() == (s.mode == Mode::lstm), op, ": c0 must ",
                    s.mode == Mode::lstm ? "be given for LSTM" : "be None but for LSTM");
    if (c0_) {
      c0 = ready(op, "c0", *c0_, x);
      expect_sizes(op, "c0", *c0, {s.D, s.B, s.H});
    }
  }

  void read_sequence(const Optional& given) {
    seqkern::Shape& s = shape;
    if (!given) {
      STD_TORCH_CHECK(x.dim() == 3 && x.size(1) == s.B && x.size(0) > 0, op, ": x must be (T, ",
                      s.B, ", I) with T at least 1, got ", list(sizes_of(x)));
      s.T = x.size(0), s.I = x.size(2), s.N = s.T * s.B;
    } else {
      STD_TORCH_CHECK(given->is_cpu() && given->dim() == 1 && given->size(0) > 0 &&
                          given->scalar_type() == ScalarType::Long,
                      op, ": batch_sizes must be (T,) int64 on the CPU, T at least 1");
      expect_memory(op, "batch_sizes", *given);
      batch_sizes = given->is_contiguous() ? *given : torch::stable::contiguous(*given);
      s.T = batch_sizes->size(0);
      s.batch_sizes = static_cast<const int64_t*>(batch_sizes->const_data_ptr());
      int64_t before = s.B;
      for (int64_t t = 0; t < s.T; ++t) {
        const int64_t n = s.batch_sizes[t];
        STD_TORCH_CHECK(n >= 1 && n <= before && (t > 0 || n == s.B), op,
                        ": batch_sizes must start with B = ", s.B,
                        " and never grow or reach 0, got ", n, " at ", t);
        s.N += n, before = n;
      }
      STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == s.N, op, ": x must be (", s.N,
                      ", I) for these batch_sizes, got ", list(sizes_of(x)));
      s.I = x.size(1);
    }
    if (s.I > 1 && x.stride(x.dim() - 1) != 1) x = torch::stable::contiguous(x);
    rows.row = x.stride(x.dim() - 2);
    rows.step = given ? 0 : x.stride(0);
  }

  void read_weights(const Tensors& given) {
    seqkern::Shape& s = shape;
    const int64_t each = s.D > 0 ? int64_t(given.size()) / s.D : 0;
    STD_TORCH_CHECK(each >= 2 && each <= 5 && each * s.D == int64_t(given.size()), op,
                    ": weights must hold 2 to 5 tensors for each of ", s.D, " directions, got ",
                    int64_t(given.size()));
    s.bias = each >= 4, s.proj = each == 3 || each == 5;
    STD_TORCH_CHECK(!s.proj || s.mode == Mode::lstm, op, ": only LSTM takes a projection");
    const int64_t G = seqkern::gates_of(s.mode);
    STD_TORCH_CHECK(given[0].dim() == 2 && given[0].size(0) % G == 0 && given[0].size(0) > 0, op,
                    ": w_ih must be (", G, "*H, ", s.I, "), got ", list(sizes_of(given[0])));
    s.H = given[0].size(0) / G;
    STD_TORCH_CHECK(s.proj || s.P == s.H, op, ": h0 must be (D, B, H) with H = ", s.H, ", got ",
                    list(sizes_of(h0)));
    for (int64_t d = 0; d < s.D; ++d) {
      const void* p[5] = {};
      int64_t at = d * each;
      auto take = [&](int slot, const char* name, Sizes sizes) {
        weights.push_back(ready(op, name, given[size_t(at++)], x));
        expect_sizes(op, name, weights.back(), sizes);
        p[slot] = weights.back().const_data_ptr();
      };
      take(0, "w_ih", {G * s.H, s.I});
      take(1, "w_hh", {G * s.H, s.P});
      if (s.bias) take(2, "b_ih", {G * s.H}), take(3, "b_hh", {G * s.H});
      if (s.proj) take(4, "w_hr", {s.P, s.H});
      w[d] = {p[0], p[1], p[2], p[3], p[4]};
    }
  }

  Tensor empty(Sizes sizes) const { return seqkern::binding::empty(x, sizes); }
  Tensor none() const { return empty({0}); }
  Tensor output() const {
    return shape.batch_sizes ? empty({shape.N, shape.D * shape.P})
                             : empty({shape.T, shape.B, shape.D * shape.P});
  }
};

struct Outputs {
  Tensor y, h_n, c_n;
};

// Points f at the arguments and at new outputs.
Outputs prepare(const Call& call, seqkern::Forward& f) {
  const seqkern::Shape& s = call.shape;
  const bool lstm = s.mode == Mode::lstm;
  Outputs o{call.output(), call.empty({s.D, s.B, s.P}),
            lstm ? call.empty({s.D, s.B, s.H}) : call.none()};
  f.shape = s;
  f.x = call.x.const_data_ptr();
  f.x_rows = call.rows;
  f.h0 = call.h0.const_data_ptr();
  f.c0 = call.c0 ? call.c0->const_data_ptr() : nullptr;
  for (int64_t d = 0; d < s.D; ++d) f.w[d] = call.w[d];
  f.threads = int(torch::stable::get_num_threads());
  f.y = o.y.mutable_data_ptr();
  f.h_n = o.h_n.mutable_data_ptr();
  f.c_n = lstm ? o.c_n.mutable_data_ptr() : nullptr;
  return o;
}

std::tuple<Tensor, Tensor, Tensor> recurrent_inference(Tensor x, Optional batch_sizes, Tensor h0,
                                                       Optional c0, Tensors weights, Tensors packed,
                                                       std::string mode) {
  const Call call("recurrent_inference", x, batch_sizes, h0, c0, weights, mode);
  seqkern::Forward f{};
  const Outputs o = prepare(call, f);
  if (!packed.empty()) {
    STD_TORCH_CHECK(packed.size() == 1, "recurrent_inference: packed must hold 1 tensor, got ",
                    int64_t(packed.size()));
    use_packed("recurrent_inference", packed[0], call.shape, f);
  }
  seqkern::recurrent_forward(f);
  return {o.y, o.h_n, o.c_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> recurrent(Tensor x, Optional batch_sizes,
                                                             Tensor h0, Optional c0,
                                                             Tensors weights, std::string mode) {
  const Call call("recurrent", x, batch_sizes, h0, c0, weights, mode);
  const seqkern::Shape& s = call.shape;
  seqkern::Forward f{};
  const Outputs o = prepare(call, f);
  const int64_t saved = seqkern::saved_of(s.mode);
  Tensor gates = saved ? call.empty({s.D, s.N, saved * s.H}) : call.none();
  Tensor cells = s.mode == Mode::lstm ? call.empty({s.D, s.N, s.H}) : call.none();
  f.gates = saved ? gates.mutable_data_ptr() : nullptr;
  f.cells = s.mode == Mode::lstm ? cells.mutable_data_ptr() : nullptr;
  seqkern::recurrent_forward(f);
  return {o.y, o.h_n, o.c_n, gates, cells};
}

// A gradient of an output, or what the forward saved: contiguous and of the right size, or null.
const void* gradient(const char* name, const Optional& given, const Call& call, Sizes sizes,
                     Tensors& kept) {
  if (!given) return nullptr;
  kept.push_back(ready(call.op, name, *given, call.x));
  expect_sizes(call.op, name, kept.back(), sizes);
  return kept.back().const_data_ptr();
}

std::tuple<Tensor, Tensor, Tensor, Tensors> recurrent_backward(
    Optional dy, Optional dh_n, Optional dc_n, Tensor x, Optional batch_sizes, Tensor h0,
    Optional c0, Tensors weights, Tensor y, Tensor gates, Tensor cells, std::string mode,
    bool need_dx, bool need_dw) {
  const Call call("recurrent_backward", x, batch_sizes, h0, c0, weights, mode);
  const seqkern::Shape& s = call.shape;
  const bool lstm = s.mode == Mode::lstm;
  const int64_t saved = seqkern::saved_of(s.mode);
  Tensors kept;
  kept.reserve(8);
  auto dense = [&](const char* name, const Optional& t) {
    return s.batch_sizes ? gradient(name, t, call, {s.N, s.D * s.P}, kept)
                         : gradient(name, t, call, {s.T, s.B, s.D * s.P}, kept);
  };
  seqkern::Backward b{};
  b.shape = s;
  b.x = call.x.const_data_ptr();
  b.x_rows = call.rows;
  b.h0 = call.h0.const_data_ptr();
  b.c0 = call.c0 ? call.c0->const_data_ptr() : nullptr;
  b.y = dense("y", y);
  if (saved) b.gates = gradient("gates", gates, call, {s.D, s.N, saved * s.H}, kept);
  if (lstm) b.cells = gradient("cells", cells, call, {s.D, s.N, s.H}, kept);
  b.dy = dense("dy", dy);
  b.dh_n = gradient("dh_n", dh_n, call, {s.D, s.B, s.P}, kept);
  if (lstm) b.dc_n = gradient("dc_n", dc_n, call, {s.D, s.B, s.H}, kept);
  Tensor dx = need_dx ? torch::stable::new_empty(x, sizes_of(x)) : call.none();
  Tensor dh0 = call.empty({s.D, s.B, s.P}), dc0 = lstm ? call.empty({s.D, s.B, s.H}) : call.none();
  b.dx = need_dx ? dx.mutable_data_ptr() : nullptr;
  b.dh0 = dh0.mutable_data_ptr();
  b.dc0 = lstm ? dc0.mutable_data_ptr() : nullptr;
  b.need_dw = need_dw;
  Tensors dw;
  size_t at = 0;
  for (int64_t d = 0; d < s.D; ++d) {
    b.w[d] = call.w[d];
    const bool exists[5] = {true, true, s.bias, s.bias, s.proj};
    for (int i = 0; need_dw && i < 5; ++i)
      if (exists[i]) {
        dw.push_back(torch::stable::new_empty(x, sizes_of(weights[at++])));
        b.dw[d][i] = dw.back().mutable_data_ptr();
      }
  }
  b.threads = int(torch::stable::get_num_threads());
  seqkern::recurrent_backward(b);
  return {dx, dh0, dc0, dw};
}

// What recurrent_inference and recurrent_prepacked read in the place of the weights, as one tensor.
Tensors recurrent_pack(Tensors weights, std::string mode, int64_t directions) {
  const int64_t D = directions;
  STD_TORCH_CHECK(D == 1 || D == 2, "recurrent_pack: directions must be 1 or 2, got ", D);
  const size_t each = weights.size() / size_t(D);
  STD_TORCH_CHECK(each >= 2 && weights[0].dim() == 2 && weights[1].dim() == 2,
                  "recurrent_pack: weights must begin with w_ih (G*H, I) and w_hh (G*H, P)");
  const Tensor h0 =
      torch::stable::new_empty(weights[0], std::vector<int64_t>{D, 0, weights[1].size(1)});
  const Tensor x =
      torch::stable::new_empty(weights[0], std::vector<int64_t>{1, 0, weights[0].size(1)});
  Optional c0;
  if (mode == "LSTM")
    c0 = torch::stable::new_empty(weights[0], std::vector<int64_t>{D, 0, weights[0].size(0) / 4});
  const Call call("recurrent_pack", x, {}, h0, c0, weights, mode);
  return {make_packed(call.shape, call.w, x)};
}

std::string cpu_capability() { return seqkern::cpu_capability(); }
void set_cpu_capability(std::string name) { seqkern::set_cpu_capability(name.c_str()); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqkern, m) {
  m.def("cpu_capability() -> str");
  m.def("set_cpu_capability(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(seqkern, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
  m.impl("set_cpu_capability", TORCH_BOX(&set_cpu_capability));
}

STABLE_TORCH_LIBRARY_IMPL(seqkern, CPU, m) {
  m.impl("recurrent", TORCH_BOX(&recurrent));
  m.impl("recurrent_inference", TORCH_BOX(&recurrent_inference));
  m.impl("recurrent_backward", TORCH_BOX(&recurrent_backward));
  m.impl("recurrent_pack", TORCH_BOX(&recurrent_pack));
}
