// Packed weights: their layout, and the op that runs a dense layer on them without looking at the
// weights they come from.
#include "packed.h"

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <tuple>

namespace seqkern::binding {
namespace {

constexpr char kMagic[8] = {'s', 'e', 'q', 'k', 'e', 'r', 'n', 0};
constexpr int64_t kAlignment = 64;

// The first bytes of a packed tensor. Layouts differ between instruction sets without differing in
// size, so the set is part of it.
struct Header {
  char magic[8];
  char instructions[16];
  int64_t mode, type, I, H, P, D, proj;
};

Header header_of(const Shape& s) {
  Header h{};
  std::memcpy(h.magic, kMagic, sizeof(kMagic));
  std::strncpy(h.instructions, cpu_capability(), sizeof(h.instructions) - 1);
  h.mode = int64_t(s.mode), h.type = int64_t(s.type), h.proj = s.proj;
  h.I = s.I, h.H = s.H, h.P = s.P, h.D = s.D;
  return h;
}

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Where the parts of direction d begin, and, in `end`, where the last one ends.
struct Layout {
  int64_t ih[kMaxDirections], hh[kMaxDirections], hr[kMaxDirections], bias[kMaxDirections], end;

  explicit Layout(const Shape& s) : end(aligned(sizeof(Header))) {
    const PackedSizes sizes = packed_sizes(s);
    auto take = [&](int64_t bytes) {
      const int64_t at = end;
      end += aligned(bytes);
      return at;
    };
    for (int64_t d = 0; d < s.D; ++d) {
      ih[d] = take(sizes.ih), hh[d] = take(sizes.hh);
      hr[d] = take(sizes.hr), bias[d] = take(sizes.bias);
    }
  }
};

Header read_header(const char* op, const Tensor& packed) {
  Header h{};
  const bool bytes = packed.is_cpu() && packed.scalar_type() == ScalarType::Byte &&
                     packed.dim() == 1 && packed.is_contiguous();
  expect_memory(op, "packed", packed);
  if (bytes && packed.numel() >= int64_t(sizeof(h)))
    std::memcpy(&h, packed.const_data_ptr(), sizeof(h));
  STD_TORCH_CHECK(std::memcmp(h.magic, kMagic, sizeof(kMagic)) == 0, op,
                  ": packed must be what recurrent_pack returned");
  return h;
}

std::string told(const Header& h) {
  static const char* const modes[kModes] = {"LSTM", "GRU", "RNN_TANH", "RNN_RELU"};
  static const char* const types[kTypes] = {"float32", "float64", "bfloat16", "float16"};
  std::ostringstream out;
  out << modes[h.mode] << ' ' << types[h.type] << " I=" << h.I << " H=" << h.H << " P=" << h.P
      << " D=" << h.D << (h.proj ? " projected" : "") << " on "
      << std::string(h.instructions, strnlen(h.instructions, sizeof(h.instructions)));
  return out.str();
}

// The layer that a header tells of, with neither steps nor rows. A header can be forged, so nothing
// of it is taken that does not fit the tensor it stands in.
Shape shape_of(const char* op, const Tensor& packed) {
  const Header h = read_header(op, packed);
  const int64_t most = packed.numel();
  bool fits = h.mode >= 0 && h.mode < kModes && h.type >= 0 && h.type < kTypes && h.D >= 1 &&
              h.D <= kMaxDirections && h.H >= 1 && h.H <= most && h.P >= 1 && h.P <= most &&
              h.I >= 0 && h.I <= most && (h.proj == 0 || h.proj == 1);
  // In double, which does not overflow: no layout spends less than two bytes on a weight.
  fits = fits && 2.0 * double(h.H) * double(h.I + h.P) <= double(most);
  fits = fits && (h.proj ? h.mode == int64_t(Mode::lstm) : h.P == h.H);
  STD_TORCH_CHECK(fits, op, ": packed must be what recurrent_pack returned");
  STD_TORCH_CHECK(std::strncmp(h.instructions, cpu_capability(), sizeof(h.instructions)) == 0, op,
                  ": packed must be for ", cpu_capability(), ", got ", told(h));
  Shape s{};
  s.mode = Mode(h.mode), s.type = Type(h.type);
  s.I = h.I, s.H = h.H, s.P = h.P, s.D = h.D, s.proj = h.proj;
  STD_TORCH_CHECK(Layout(s).end == most, op, ": packed must hold ", Layout(s).end, " bytes for ",
                  told(h), ", got ", most);
  return s;
}

void point(const Tensor& packed, const Shape& s, Forward& f) {
  const Layout at(s);
  const char* base = static_cast<const char*>(packed.const_data_ptr());
  for (int64_t d = 0; d < s.D; ++d)
    f.packed[d] = {base + at.ih[d], base + at.hh[d], base + at.hr[d], base + at.bias[d]};
}

}  // namespace

Tensor make_packed(const Shape& s, const Weights* w, const Tensor& like) {
  const Layout at(s);
  Tensor packed = torch::stable::new_empty(like, std::vector<int64_t>{at.end}, ScalarType::Byte);
  char* base = static_cast<char*>(packed.mutable_data_ptr());
  const Header h = header_of(s);
  std::memcpy(base, &h, sizeof(h));
  for (int64_t d = 0; d < s.D; ++d)
    pack_weights(s, w[d], base + at.ih[d], base + at.hh[d], base + at.hr[d], base + at.bias[d]);
  return packed;
}

void use_packed(const char* op, const Tensor& packed, const Shape& s, Forward& f) {
  shape_of(op, packed);
  const Header h = read_header(op, packed), expected = header_of(s);
  STD_TORCH_CHECK(std::memcmp(&h, &expected, sizeof(h)) == 0, op, ": packed must be for ",
                  told(expected), ", got ", told(h));
  point(packed, s, f);
}

namespace {

// A state of the layer, or null for zeros.
const void* state(const char* op, const char* name, const Optional& given, const Tensor& x,
                  Sizes sizes, Optional& kept) {
  if (!given) return nullptr;
  kept = ready(op, name, *given, x);
  expect_sizes(op, name, *kept, sizes);
  return kept->const_data_ptr();
}

std::tuple<Tensor, Tensor, Tensor> recurrent_prepacked(Tensor x, Optional h0, Optional c0,
                                                       Tensor packed) {
  const char* op = "recurrent_prepacked";
  Forward f{};
  Shape& s = f.shape = shape_of(op, packed);
  STD_TORCH_CHECK(
      x.is_cpu() && type_of(x, op) == s.type && x.dim() == 3 && x.size(0) > 0 && x.size(2) == s.I,
      op, ": x must be (T, B, ", s.I, ") on the CPU with T at least 1, of the dtype of ",
      "the packed weights, got ", list(sizes_of(x)));
  s.T = x.size(0), s.B = x.size(1), s.N = s.T * s.B;
  const bool lstm = s.mode == Mode::lstm;
  STD_TORCH_CHECK(c0.has_value() == (lstm && h0.has_value()), op,
                  ": c0 must be given with h0 for LSTM, and else be None");
  point(packed, s, f);
  expect_memory(op, "x", x);
  if (s.I > 1 && x.stride(2) != 1) x = torch::stable::contiguous(x);
  Optional kept_h, kept_c;
  f.x = x.const_data_ptr();
  f.x_rows = {x.stride(0), x.stride(1)};
  f.h0 = state(op, "h0", h0, x, {s.D, s.B, s.P}, kept_h);
  f.c0 = state(op, "c0", c0, x, {s.D, s.B, s.H}, kept_c);
  Tensor y = empty(x, {s.T, s.B, s.D * s.P}), h_n = empty(x, {s.D, s.B, s.P});
  Tensor c_n = lstm ? empty(x, {s.D, s.B, s.H}) : empty(x, {0});
  f.y = y.mutable_data_ptr();
  f.h_n = h_n.mutable_data_ptr();
  f.c_n = lstm ? c_n.mutable_data_ptr() : nullptr;
  f.threads = int(torch::stable::get_num_threads());
  recurrent_forward(f);
  return {y, h_n, c_n};
}

}  // namespace
}  // namespace seqkern::binding

STABLE_TORCH_LIBRARY_IMPL(seqkern, CPU, m) {
  m.impl("recurrent_prepacked", TORCH_BOX(&seqkern::binding::recurrent_prepacked));
}
