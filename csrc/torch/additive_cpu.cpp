// The additive attention ops on CPU tensors: checks every size again, since anyone can call
// torch.ops, and hands pointers to csrc/core. The schemas are in seqkern/ops/_additive_ops.py.
#include "core/additive.h"

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
using seqkern::PairRows;
using seqkern::TokenRows;
using seqkern::Type;

// The checked arguments that both ops share, and the copies that the pointers need.
struct Call {
  const char* op;
  seqkern::Additive a{};
  Tensor query, key, value, v;
  Optional mask, bias, k_lens;

  Call(const char* name, const Tensor& query_, const Tensor& key_, const Tensor& value_,
       const Tensor& v_, const Optional& mask_, const Optional& bias_, const Optional& k_lens_,
       double scale)
      : op(name), query(query_), key(key_), value(value_), v(v_) {
    expect_rank("query", query, "(B, Tq, D)");
    expect_rank("key", key, "(B, Tk, D)");
    expect_rank("value", value, "(B, Tk, Dv)");
    a.type = type_of(query, op, "query");
    a.B = query.size(0), a.Tq = query.size(1), a.D = query.size(2);
    a.Tk = key.size(1), a.Dv = value.size(2);
    STD_TORCH_CHECK(a.D > 0, op, ": query must have D > 0, got ", list(sizes_of(query)));
    STD_TORCH_CHECK(a.Dv > 0, op, ": value must have Dv > 0, got ", list(sizes_of(value)));
    expect("key", key, {a.B, a.Tk, a.D}, query.scalar_type());
    expect("value", value, {a.B, a.Tk, a.Dv}, query.scalar_type());
    expect("v", v, {a.D}, query.scalar_type());
    a.query = rows_of(query), a.key = rows_of(key), a.value = rows_of(value);
    v = dense(v);
    a.v = v.const_data_ptr();
    if (mask_) {
      mask = *mask_;
      STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, op,
                      ": mask must be boolean; bias is for the rest");
      a.mask = pairs_of("mask", *mask);
    }
    if (bias_) {
      bias = *bias_;
      const auto dtype = bias->scalar_type();
      STD_TORCH_CHECK(dtype == query.scalar_type() || dtype == ScalarType::Float, op,
                      ": bias must have the dtype of query or float32, got dtype ", int(dtype));
      a.bias = pairs_of("bias", *bias);
      a.bias_type = type_of(*bias, op, "bias");
    }
    if (k_lens_) {
      expect("k_lens", *k_lens_, {a.B}, ScalarType::Int);
      k_lens = dense(*k_lens_);
      a.k_lens = static_cast<const int32_t*>(k_lens->const_data_ptr());
    }
    a.scale = scale;
    a.threads = int(torch::stable::get_num_threads());
  }

  void expect_rank(const char* name, const Tensor& t, const char* form) const {
    expect_cpu(op, name, t);
    STD_TORCH_CHECK(t.dim() == 3, op, ": ", name, " must be ", form, ", got ", list(sizes_of(t)));
  }

  void expect(const char* name, const Tensor& t, Sizes sizes, ScalarType dtype) const {
    expect_cpu(op, name, t);
    const std::vector<int64_t> got = sizes_of(t);
    STD_TORCH_CHECK(got == std::vector<int64_t>(sizes), op, ": ", name, " must be ", list(sizes),
                    ", got ", list(got));
    STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " must have dtype ", int(dtype),
                    ", got ", int(t.scalar_type()));
  }

  // Contiguous and, unlike what says so of a tensor of one element, with unit strides.
  static Tensor dense(const Tensor& t) {
    return t.is_contiguous() ? t : torch::stable::contiguous(t);
  }

  // The elements of a token have to lie side by side.
  static TokenRows rows_of(Tensor& t) {
    if (t.size(2) > 1 && t.stride(2) != 1) t = torch::stable::contiguous(t);
    return {t.const_data_ptr(), t.stride(0), t.stride(1)};
  }

  PairRows pairs_of(const char* name, const Tensor& t) const {
    expect_rank(name, t, "3-D");
    const int64_t full[3] = {a.B, a.Tq, a.Tk};
    int64_t stride[3];
    for (int i = 0; i < 3; ++i) {
      STD_TORCH_CHECK(t.size(i) == 1 || t.size(i) == full[i], op, ": ", name, " must broadcast to ",
                      list(Sizes{a.B, a.Tq, a.Tk}), ", got ", list(sizes_of(t)));
      stride[i] = t.size(i) == 1 ? 0 : t.stride(i);
    }
    return {t.const_data_ptr(), stride[0], stride[1], stride[2]};
  }

  ScalarType lse_type() const {
    return a.type == Type::f64 ? ScalarType::Double : ScalarType::Float;
  }
  Tensor empty(Sizes sizes) const { return seqkern::binding::empty(query, sizes); }
  Tensor none() const { return empty({0}); }
};

std::tuple<Tensor, Tensor, Tensor> additive_attention(Tensor query, Tensor key, Tensor value,
                                                      Tensor v, Optional mask, Optional bias,
                                                      Optional k_lens, double scale,
                                                      bool need_weights) {
  const Call call("additive_attention", query, key, value, v, mask, bias, k_lens, scale);
  const seqkern::Additive& a = call.a;
  Tensor o = call.empty({a.B, a.Tq, a.Dv});
  Tensor weights = need_weights ? call.empty({a.B, a.Tq, a.Tk}) : call.none();
  Tensor lse = torch::stable::new_empty(query, std::vector<int64_t>{a.B, a.Tq}, call.lse_type());
  seqkern::AdditiveForward f{};
  f.in = a;
  f.o = o.mutable_data_ptr();
  f.weights = need_weights ? weights.mutable_data_ptr() : nullptr;
  f.lse = lse.mutable_data_ptr();
  seqkern::additive_forward(f);
  return {o, weights, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> additive_attention_backward(
    Tensor d_o, Optional dweights, Optional dlse, Tensor o, Tensor lse, Tensor query, Tensor key,
    Tensor value, Tensor v, Optional mask, Optional bias, Optional k_lens, double scale,
    bool need_dq, bool need_dk, bool need_dvalue, bool need_dv, bool need_dbias) {
  const Call call("additive_attention_backward", query, key, value, v, mask, bias, k_lens, scale);
  const seqkern::Additive& a = call.a;
  const ScalarType dtype = query.scalar_type();
  Tensors kept;
  kept.reserve(8);
  auto take = [&](const char* name, const Tensor& t, Sizes sizes, ScalarType type) {
    call.expect(name, t, sizes, type);
    kept.push_back(Call::dense(t));
    return kept.back().const_data_ptr();
  };
  seqkern::AdditiveBackward b{};
  b.in = a;
  b.d_o = take("do", d_o, {a.B, a.Tq, a.Dv}, dtype);
  if (dweights) b.dweights = take("dweights", *dweights, {a.B, a.Tq, a.Tk}, dtype);
  if (dlse) b.dlse = take("dlse", *dlse, {a.B, a.Tq}, call.lse_type());
  take("o", o, {a.B, a.Tq, a.Dv}, dtype);
  b.lse = take("lse", lse, {a.B, a.Tq}, call.lse_type());
  auto result = [&](bool needed, void*& pointer, Sizes sizes) {
    if (!needed) return call.none();
    Tensor t = call.empty(sizes);
    pointer = t.mutable_data_ptr();
    return t;
  };
  Tensor dquery = result(need_dq, b.dquery, {a.B, a.Tq, a.D});
  Tensor dkey = result(need_dk, b.dkey, {a.B, a.Tk, a.D});
  Tensor dvalue = result(need_dvalue, b.dvalue, {a.B, a.Tk, a.Dv});
  Tensor dv = result(need_dv, b.dv, {a.D});
  Tensor dbias = call.none();
  if (need_dbias && bias) {
    dbias = seqkern::binding::empty(*bias, {bias->size(0), bias->size(1), bias->size(2)});
    b.dbias = dbias.mutable_data_ptr();
    for (int i = 0; i < 3; ++i) b.bias_sizes[i] = bias->size(i);
  }
  seqkern::additive_backward(b);
  return {dquery, dkey, dvalue, dv, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqkern, CPU, m) {
  m.impl("additive_attention", TORCH_BOX(&additive_attention));
  m.impl("additive_attention_backward", TORCH_BOX(&additive_attention_backward));
}
