// seqkern._stream: one time step of a stack of recurrent layers on packed weights, without the
// dispatcher and without allocating. Called by seqkern/stream.py, which owns all the memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "core/recurrent.h"

namespace py = pybind11;
using seqkern::Mode;
using seqkern::Type;

namespace {

Mode mode_of(const std::string& name) {
  if (name == "LSTM") return Mode::lstm;
  if (name == "GRU") return Mode::gru;
  if (name == "RNN_TANH") return Mode::rnn_tanh;
  if (name == "RNN_RELU") return Mode::rnn_relu;
  throw py::value_error("Engine: mode must be LSTM, GRU, RNN_TANH or RNN_RELU, got " + name);
}

Type type_of(const std::string& name) {
  if (name == "float32") return Type::f32;
  if (name == "float64") return Type::f64;
  if (name == "bfloat16") return Type::bf16;
  if (name == "float16") return Type::f16;
  throw py::value_error("Engine: dtype must be float32, float64, bfloat16 or float16, got " + name);
}

// A view of somebody's contiguous memory, kept alive with the engine.
struct View {
  py::buffer_info info;
  char* data() const { return static_cast<char*>(info.ptr); }
};

View view(const py::buffer& b, const std::string& name, int64_t elements, Type type,
          bool writable) {
  View v{b.request(writable)};
  const int64_t bytes = elements * seqkern::size_of(type);
  if (v.info.size * v.info.itemsize != bytes)
    throw py::value_error("Engine: " + name + " must hold " + std::to_string(bytes) +
                          " bytes, got " + std::to_string(v.info.size * v.info.itemsize));
  py::ssize_t expected = v.info.itemsize;
  for (py::ssize_t i = v.info.ndim; i-- > 0; expected *= v.info.shape[size_t(i)])
    if (v.info.shape[size_t(i)] > 1 && v.info.strides[size_t(i)] != expected)
      throw py::value_error("Engine: " + name + " must be contiguous");
  return v;
}

class Engine {
 public:
  // weights: for each layer the tensors of torch.nn's order; inputs[l] and outputs are the sizes of
  // layer l; h (layers, B, P) and c (layers, B, H) are read and written in place, y (layers, B, P).
  Engine(const std::string& mode, const std::string& dtype, int64_t batch, int64_t input,
         int64_t hidden, int64_t output, bool bias, bool proj,
         const std::vector<std::vector<py::buffer>>& weights, const py::buffer& h,
         const py::buffer& c, const py::buffer& y)
      : type_(type_of(dtype)), input_bytes_(batch * input * seqkern::size_of(type_)) {
    const Mode m = mode_of(mode);
    const int64_t layers = int64_t(weights.size()), G = seqkern::gates_of(m);
    if (batch < 1 || input < 0 || hidden < 1 || output < 1 || layers < 1)
      throw py::value_error("Engine: sizes must be positive");
    if (!proj && output != hidden) throw py::value_error("Engine: output must be hidden");
    const bool lstm = m == Mode::lstm;
    h_ = view(h, "h", layers * batch * output, type_, true);
    c_ = view(c, "c", lstm ? layers * batch * hidden : 0, type_, true);
    y_ = view(y, "y", layers * batch * output, type_, true);
    packed_.reserve(size_t(layers));
    for (int64_t l = 0; l < layers; ++l) {
      const int64_t inputs = l == 0 ? input : output;
      seqkern::Forward f{};
      f.shape = {m, type_, 1,    batch,   inputs,  hidden, output,
                 1, bias,  proj, nullptr, nullptr, batch};
      add_layer(f, weights[size_t(l)], G);
      const int64_t state = l * batch * output * seqkern::size_of(type_);
      f.x = l == 0 ? nullptr : forwards_.back().y;
      f.x_rows = {0, inputs};
      f.h0 = f.h_n = h_.data() + state;
      if (lstm) f.c0 = f.c_n = c_.data() + l * batch * hidden * seqkern::size_of(type_);
      f.y = y_.data() + state;
      f.threads = 1;
      forwards_.push_back(f);
    }
  }

  void step(const py::buffer& x) {
    const py::buffer_info info = x.request();
    if (info.size * info.itemsize != input_bytes_)
      throw py::value_error("Stream.step: x has the wrong number of bytes");
    step_address(reinterpret_cast<uintptr_t>(info.ptr));
  }

  // x at an address: the caller has checked dtype, size and contiguity.
  void step_address(uintptr_t x) {
    forwards_[0].x = reinterpret_cast<const void*>(x);
    for (const seqkern::Forward& f : forwards_) seqkern::recurrent_forward(f);
  }

 private:
  void add_layer(seqkern::Forward& f, const std::vector<py::buffer>& w, int64_t G) {
    const seqkern::Shape& s = f.shape;
    const size_t expected = size_t(2 + 2 * s.bias + s.proj);
    if (w.size() != expected)
      throw py::value_error("Engine: a layer must have " + std::to_string(expected) + " weights");
    std::vector<View> views;
    size_t at = 0;
    auto take = [&](bool exists, int64_t n) -> const void* {
      if (!exists) return nullptr;
      views.push_back(view(w[at], "weight " + std::to_string(at), n, type_, false));
      ++at;
      return views.back().data();
    };
    seqkern::Weights pointers;
    pointers.w_ih = take(true, G * s.H * s.I);
    pointers.w_hh = take(true, G * s.H * s.P);
    pointers.b_ih = take(s.bias, G * s.H);
    pointers.b_hh = take(s.bias, G * s.H);
    pointers.w_hr = take(s.proj, s.P * s.H);
    const seqkern::PackedSizes n = seqkern::packed_sizes(s);
    const int64_t sizes[4] = {n.ih, n.hh, n.hr, n.bias};
    int64_t total = 64;
    for (int64_t size : sizes) total += (size + 63) / 64 * 64;
    packed_.emplace_back(size_t(total));
    auto base = reinterpret_cast<uintptr_t>(packed_.back().data());
    base = (base + 63) / 64 * 64;
    void* part[4];
    for (int i = 0; i < 4; ++i) {
      part[i] = reinterpret_cast<void*>(base);
      base += uintptr_t((sizes[i] + 63) / 64 * 64);
    }
    seqkern::pack_weights(s, pointers, part[0], part[1], part[2], part[3]);
    f.packed[0] = {part[0], part[1], part[2], part[3]};
  }

  Type type_;
  int64_t input_bytes_;
  View h_, c_, y_;
  std::vector<std::vector<char>> packed_;
  std::vector<seqkern::Forward> forwards_;
};

}  // namespace

PYBIND11_MODULE(_stream, m) {
  m.doc() = "One time step of recurrent layers on packed weights; see seqkern.Stream.";
  py::class_<Engine>(m, "Engine")
      .def(py::init<const std::string&, const std::string&, int64_t, int64_t, int64_t, int64_t,
                    bool, bool, const std::vector<std::vector<py::buffer>>&, const py::buffer&,
                    const py::buffer&, const py::buffer&>())
      .def("step", &Engine::step)
      .def("step_address", &Engine::step_address);
}
