// What the bindings share: checks of tensors, each refusing by name, and new tensors.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "core/recurrent.h"

namespace seqkern::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using Sizes = std::initializer_list<int64_t>;

template <class Range>
inline std::string list(const Range& sizes) {
  std::ostringstream out;
  out << '(';
  bool first = true;
  for (int64_t n : sizes) {
    if (!first) out << ", ";
    first = false;
    out << n;
  }
  out << ')';
  return out.str();
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < t.dim(); ++i) sizes.push_back(t.size(i));
  return sizes;
}

// That t has memory for all its elements: a sharded parameter gives its own back between two uses.
inline void expect_memory(const char* op, const char* name, const Tensor& t) {
  if (t.numel() == 0) return;
  int64_t held, last = t.storage_offset();
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &held));
  for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  const int64_t needed = (last + 1) * int64_t(t.element_size());
  STD_TORCH_CHECK(needed <= held, op, ": ", name, " must have ", needed,
                  " bytes of memory for its elements, got ", held);
}

inline void expect_cpu(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, " must be on the CPU");
  expect_memory(op, name, t);
}

inline void expect_cuda(const char* op, const char* name, const Tensor& t, int32_t device) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == device, op, ": ", name,
                  " must be on cuda:", device);
  expect_memory(op, name, t);
}

inline void expect_sizes(const char* op, const char* name, const Tensor& t, Sizes expected) {
  bool same = t.dim() == int64_t(expected.size());
  int64_t i = 0;
  for (int64_t n : expected) same = same && t.size(i++) == n;
  STD_TORCH_CHECK(same, op, ": ", name, " must be ", list(expected), ", got ", list(sizes_of(t)));
}

inline Mode mode_of(const std::string& name, const char* op = "recurrent") {
  if (name == "LSTM") return Mode::lstm;
  if (name == "GRU") return Mode::gru;
  if (name == "RNN_TANH") return Mode::rnn_tanh;
  STD_TORCH_CHECK(name == "RNN_RELU", op, ": mode must be LSTM, GRU, RNN_TANH or RNN_RELU, got ",
                  name);
  return Mode::rnn_relu;
}

inline Type type_of(const Tensor& t, const char* op = "recurrent", const char* name = "x") {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Type::f32;
    case ScalarType::Double:
      return Type::f64;
    case ScalarType::BFloat16:
      return Type::bf16;
    case ScalarType::Half:
      return Type::f16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name,
                      " must be float32, float64, bfloat16 or float16, got dtype ",
                      int(t.scalar_type()));
  }
}

// A CPU tensor of x's dtype, contiguous.
inline Tensor ready(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  expect_cpu(op, name, t);
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), op, ": ", name, " must have the dtype of x");
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// A contiguous tensor of like's dtype. Straight through the C interface: a call of the dispatcher
// costs a microsecond more.
inline Tensor empty(const Tensor& like, Sizes sizes) {
  int64_t strides[3], stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes.begin()[i] > 1 ? sizes.begin()[i] : 1;
  }
  AtenTensorHandle handle;
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), strides,
                                                  dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

}  // namespace seqkern::binding
