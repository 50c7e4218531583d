// The decoder ops on CPU tensors: checks every size again, since anyone can call torch.ops, and
// hands pointers to csrc/core. The schemas are in seqkern/ops/decoder.py.
#include "core/decoder.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"

namespace {

using namespace seqkern::binding;
using seqkern::Mode;
using seqkern::TokenRows;

// The arguments of a call as they came.
struct Given {
  Tensor gates_x, h0;
  Optional c0;
  Tensor key, value;
  Optional k_lens;
  Tensor w_q;
  Optional b_q;
  Tensor v, w_c, w_hh;
  Optional b_hh;
  std::string mode;
};

// The checked arguments, and the copies that the pointers need.
struct Call {
  const char* op;
  seqkern::Decoder a{};
  Tensors kept;
  Tensor like;  // of the storage type
  ScalarType dtype, compute;

  Call(const char* name, const Given& g) : op(name), like(g.key) {
    kept.reserve(16);
    a.mode = mode_of(g.mode, op);
    expect_rank("gates_x", g.gates_x, 3, "(N, T, G*H)");
    expect_rank("key", g.key, 3, "(B, Tk, A)");
    expect_rank("value", g.value, 3, "(B, Tk, C)");
    expect_rank("h0", g.h0, 2, "(N, H)");
    dtype = g.key.scalar_type();
    a.type = type_of(g.key, op, "key");
    compute = dtype == ScalarType::Double ? dtype : ScalarType::Float;
    read_sizes(g);
    const int64_t N = a.rows(), n = a.gates();
    a.gates_x = take("gates_x", g.gates_x, {N, a.T, n}, compute);
    a.h0 = take("h0", g.h0, {N, a.H}, dtype);
    a.key = rows_of("key", g.key, {a.B, a.Tk, a.A});
    a.value = rows_of("value", g.value, {a.B, a.Tk, a.C});
    a.w_q = take("w_q", g.w_q, {a.A, a.H}, dtype);
    a.v = take("v", g.v, {a.A}, dtype);
    a.w_c = take("w_c", g.w_c, {n, a.C}, dtype);
    a.w_hh = take("w_hh", g.w_hh, {n, a.H}, dtype);
    a.b_q = take("b_q", g.b_q, {a.A}, dtype);
    a.b_hh = take("b_hh", g.b_hh, {n}, dtype);
    a.k_lens = static_cast<const int32_t*>(take("k_lens", g.k_lens, {a.B}, ScalarType::Int));
    STD_TORCH_CHECK(g.c0.has_value() == lstm(), op, ": c0 must ",
                    lstm() ? "be given for LSTM" : "be None but for LSTM");
    a.c0 = take("c0", g.c0, {N, a.H}, dtype);
    a.threads = int(torch::stable::get_num_threads());
  }

  bool lstm() const { return a.mode == Mode::lstm; }

  void read_sizes(const Given& g) {
    a.B = g.key.size(0), a.Tk = g.key.size(1), a.A = g.key.size(2), a.C = g.value.size(2);
    a.T = g.gates_x.size(1), a.H = g.h0.size(1);
    STD_TORCH_CHECK(a.H > 0 && a.A > 0 && a.C > 0, op, ": H, A and C must be at least 1, got ", a.H,
                    ", ", a.A, " and ", a.C);
    STD_TORCH_CHECK(a.T > 0, op, ": gates_x must hold at least one step, got ",
                    list(sizes_of(g.gates_x)));
    const int64_t N = g.h0.size(0);
    STD_TORCH_CHECK(a.B > 0 ? N % a.B == 0 : N == 0, op, ": h0 must have a multiple of B = ", a.B,
                    " rows, got ", N);
    a.K = a.B > 0 ? N / a.B : 0;
  }

  void expect_rank(const char* name, const Tensor& t, int64_t rank, const char* form) const {
    expect_cpu(op, name, t);
    STD_TORCH_CHECK(t.dim() == rank, op, ": ", name, " must be ", form, ", got ",
                    list(sizes_of(t)));
  }

  void expect(const char* name, const Tensor& t, Sizes sizes, ScalarType type) const {
    expect_cpu(op, name, t);
    const std::vector<int64_t> got = sizes_of(t);
    STD_TORCH_CHECK(got == std::vector<int64_t>(sizes), op, ": ", name, " must be ", list(sizes),
                    ", got ", list(got));
    STD_TORCH_CHECK(t.scalar_type() == type, op, ": ", name, " must have dtype ", int(type),
                    " beside a key of dtype ", int(dtype), ", got ", int(t.scalar_type()));
  }

  // A contiguous tensor's data; null where there is none.
  const void* take(const char* name, const Optional& t, Sizes sizes, ScalarType type) {
    if (!t) return nullptr;
    expect(name, *t, sizes, type);
    kept.push_back(t->is_contiguous() ? *t : torch::stable::contiguous(*t));
    return kept.back().const_data_ptr();
  }

  // The elements of a token have to lie side by side.
  TokenRows rows_of(const char* name, const Tensor& t, Sizes sizes) {
    expect(name, t, sizes, dtype);
    kept.push_back(t.size(2) > 1 && t.stride(2) != 1 ? torch::stable::contiguous(t) : t);
    return {kept.back().const_data_ptr(), kept.back().stride(0), kept.back().stride(1)};
  }

  Tensor empty(Sizes sizes) const { return seqkern::binding::empty(like, sizes); }
  Tensor none() const { return empty({0}); }
  Tensor empty_compute(Sizes sizes) const {
    return torch::stable::new_empty(like, std::vector<int64_t>(sizes), compute);
  }
};

struct Outputs {
  Tensor s, contexts, weights, c_n;
};

Outputs outputs_of(const Call& call, seqkern::DecoderForward& f) {
  const seqkern::Decoder& a = call.a;
  const int64_t N = a.rows();
  Outputs o{call.empty({N, a.T, a.H}), call.empty({N, a.T, a.C}), call.empty({N, a.T, a.Tk}),
            call.lstm() ? call.empty({N, a.H}) : call.none()};
  f.in = a;
  f.s = o.s.mutable_data_ptr();
  f.contexts = o.contexts.mutable_data_ptr();
  f.weights = o.weights.mutable_data_ptr();
  f.c_n = call.lstm() ? o.c_n.mutable_data_ptr() : nullptr;
  return o;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_decoder_inference(
    Tensor gates_x, Tensor h0, Optional c0, Tensor key, Tensor value, Optional k_lens, Tensor w_q,
    Optional b_q, Tensor v, Tensor w_c, Tensor w_hh, Optional b_hh, std::string mode) {
  const Call call("attention_decoder_inference",
                  {gates_x, h0, c0, key, value, k_lens, w_q, b_q, v, w_c, w_hh, b_hh, mode});
  seqkern::DecoderForward f{};
  const Outputs o = outputs_of(call, f);
  seqkern::decoder_forward(f);
  return {o.s, o.contexts, o.weights, o.c_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_decoder(
    Tensor gates_x, Tensor h0, Optional c0, Tensor key, Tensor value, Optional k_lens, Tensor w_q,
    Optional b_q, Tensor v, Tensor w_c, Tensor w_hh, Optional b_hh, std::string mode) {
  const Call call("attention_decoder",
                  {gates_x, h0, c0, key, value, k_lens, w_q, b_q, v, w_c, w_hh, b_hh, mode});
  const seqkern::Decoder& a = call.a;
  const int64_t N = a.rows(), saved = seqkern::saved_of(a.mode);
  seqkern::DecoderForward f{};
  const Outputs o = outputs_of(call, f);
  Tensor queries = call.empty_compute({N, a.T, a.A});
  Tensor gates = saved ? call.empty({N, a.T, saved * a.H}) : call.none();
  Tensor cells = call.lstm() ? call.empty({N, a.T, a.H}) : call.none();
  f.queries = queries.mutable_data_ptr();
  f.gates = saved ? gates.mutable_data_ptr() : nullptr;
  f.cells = call.lstm() ? cells.mutable_data_ptr() : nullptr;
  seqkern::decoder_forward(f);
  return {o.s, o.contexts, o.weights, o.c_n, queries, gates, cells};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_decoder_backward(
    Optional ds, Optional dcontexts, Optional dweights, Optional dc_n, Tensor s, Tensor contexts,
    Tensor weights, Tensor queries, Tensor gates, Tensor cells, Tensor gates_x, Tensor h0,
    Optional c0, Tensor key, Tensor value, Optional k_lens, Tensor w_q, Optional b_q, Tensor v,
    Tensor w_c, Tensor w_hh, Optional b_hh, std::string mode) {
  Call call("attention_decoder_backward",
            {gates_x, h0, c0, key, value, k_lens, w_q, b_q, v, w_c, w_hh, b_hh, mode});
  const seqkern::Decoder& a = call.a;
  const int64_t N = a.rows(), saved = seqkern::saved_of(a.mode), n = a.gates();
  seqkern::DecoderBackward b{};
  b.in = a;
  b.ds = call.take("ds", ds, {N, a.T, a.H}, call.dtype);
  b.dcontexts = call.take("dcontexts", dcontexts, {N, a.T, a.C}, call.dtype);
  b.dweights = call.take("dweights", dweights, {N, a.T, a.Tk}, call.dtype);
  b.s = call.take("s", s, {N, a.T, a.H}, call.dtype);
  call.expect("contexts", contexts, {N, a.T, a.C}, call.dtype);
  b.weights = call.take("weights", weights, {N, a.T, a.Tk}, call.dtype);
  b.queries = call.take("queries", queries, {N, a.T, a.A}, call.compute);
  if (saved) b.gates = call.take("gates", gates, {N, a.T, saved * a.H}, call.dtype);
  if (call.lstm()) {
    b.cells = call.take("cells", cells, {N, a.T, a.H}, call.dtype);
    b.dc_n = call.take("dc_n", dc_n, {N, a.H}, call.dtype);
  }
  Tensor dgates_x = call.empty_compute({N, a.T, n});
  Tensor dproducts = call.empty_compute({N, a.T, a.A + n});
  Tensor dh0 = call.empty({N, a.H}), dc0 = call.lstm() ? call.empty({N, a.H}) : call.none();
  Tensor dkey = call.empty({a.B, a.Tk, a.A}), dvalue = call.empty({a.B, a.Tk, a.C});
  Tensor dv = call.empty({a.A});
  b.dgates_x = dgates_x.mutable_data_ptr();
  b.dproducts = dproducts.mutable_data_ptr();
  b.dh0 = dh0.mutable_data_ptr();
  b.dc0 = call.lstm() ? dc0.mutable_data_ptr() : nullptr;
  b.dkey = dkey.mutable_data_ptr();
  b.dvalue = dvalue.mutable_data_ptr();
  b.dv = dv.mutable_data_ptr();
  seqkern::decoder_backward(b);
  return {dgates_x, dproducts, dh0, dc0, dkey, dvalue, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqkern, CPU, m) {
  m.impl("attention_decoder", TORCH_BOX(&attention_decoder));
  m.impl("attention_decoder_inference", TORCH_BOX(&attention_decoder_inference));
  m.impl("attention_decoder_backward", TORCH_BOX(&attention_decoder_backward));
}
