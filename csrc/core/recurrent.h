// The CPU recurrent kernels on raw pointers: what the torch binding and the streaming engine call.
//
// One call runs one layer, in one or two directions, over all time steps. Sizes, in the letters of
// the field: T steps, B rows, I inputs, H hidden units, P outputs of a unit (proj_size, else H),
// G gates (LSTM i f g o, GRU r z n, RNN one), D directions, N = sum of the rows of all steps.
#pragma once
#include <cstddef>
#include <cstdint>

namespace seqkern {

enum class Mode : int { lstm = 0, gru = 1, rnn_tanh = 2, rnn_relu = 3 };
// tf32 is f32 in memory, of which products take the first 11 bits: on CUDA alone, so that the
// tables of the CPU's kernels have kTypes entries without it.
enum class Type : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3, tf32 = 4 };
constexpr int kModes = 4, kTypes = 4, kMaxDirections = 2;

inline int gates_of(Mode m) { return m == Mode::lstm ? 4 : m == Mode::gru ? 3 : 1; }
// Columns that the backward needs per unit: LSTM i f g o; GRU r z n and W_hn h + b_hn; RNN none.
inline int saved_of(Mode m) { return m == Mode::lstm || m == Mode::gru ? 4 : 0; }
inline int size_of(Type t) {
  return t == Type::f64 ? 8 : t == Type::bf16 || t == Type::f16 ? 2 : 4;
}

// Where the inputs lie: row b of step t at base + t * step + b * row for a dense sequence, and at
// base + (offset(t) + b) * row for a packed one (batch_sizes set).
struct Rows {
  int64_t step = 0;  // elements between steps
  int64_t row = 0;   // elements between rows
};

struct Shape {
  Mode mode;
  Type type;
  int64_t T, B, I, H, P, D;
  bool bias, proj;
  const int64_t* batch_sizes;  // (T,) non-increasing and >= 1, or null when every step has B rows
  const int64_t* offsets;      // (T,) rows before step t; null where batch_sizes is
  int64_t N;                   // rows of all steps

  int64_t rows(int64_t t) const { return batch_sizes ? batch_sizes[t] : B; }
  int64_t offset(int64_t t) const { return batch_sizes ? offsets[t] : t * B; }
};

// The weights of one direction as they lie in memory, contiguous; null where there is none.
struct Weights {
  const void* w_ih;  // (G*H, I)
  const void* w_hh;  // (G*H, P)
  const void* b_ih;  // (G*H,)
  const void* b_hh;  // (G*H,)
  const void* w_hr;  // (P, H)
};

// Weights in the order in which the kernels of one instruction set read them.
struct Packed {
  const void* ih = nullptr;    // panels of w_ih
  const void* hh = nullptr;    // panels of w_hh
  const void* hr = nullptr;    // panels of w_hr
  const void* bias = nullptr;  // the sum of both biases, or both where a cell keeps them apart
};
struct PackedSizes {
  int64_t ih, hh, hr, bias;  // bytes
};

struct Forward {
  Shape shape;
  const void* x;  // (T, B, I) by `x_rows`, or (N, I)
  Rows x_rows;
  const void* h0;  // (D, B, P), or null for zeros
  const void* c0;  // (D, B, H) for LSTM, or null for zeros
  Weights w[kMaxDirections];
  Packed packed[kMaxDirections];  // all null: packed for this call
  void* y;                        // (T, B, D*P) or (N, D*P), contiguous
  void* h_n;                      // (D, B, P)
  void* c_n;                      // (D, B, H) or null
  void* gates;                    // (D, N, saved*H), or null: nothing is kept for a backward
  void* cells;                    // (D, N, H) for LSTM, or null
  int threads;
};

struct Backward {
  Shape shape;
  const void* x;
  Rows x_rows;
  const void *h0, *c0;
  Weights w[kMaxDirections];
  const void *y, *gates, *cells;  // of the forward
  const void *dy, *dh_n, *dc_n;   // contiguous, or null for zero
  void* dx;                       // x's shape, contiguous, or null when not needed
  void* dx_reverse;               // filled in by recurrent_backward
  void *dh0, *dc0;                // dc0 null when not LSTM
  bool need_dw;                   // not told by the pointers: that of an empty matrix is null
  void* dw[kMaxDirections][5];    // w_ih, w_hh, b_ih, b_hh, w_hr
  int threads;
};

// Every function below may throw std::bad_alloc and std::invalid_argument; pointers and sizes are
// the caller's to check. The forward writes y, h_n, c_n whole; the backward every non-null result.
void recurrent_forward(const Forward& f);
void recurrent_backward(const Backward& b);

// Sizes and filling of packed weights for the instruction set in use now.
PackedSizes packed_sizes(const Shape& s);
void pack_weights(const Shape& s, const Weights& w, void* ih, void* hh, void* hr, void* bias);

// "amx", "avx512_bf16", "avx512", "avx2" or "portable": what the processor allows, or what was set.
const char* cpu_capability();
// For tests and comparisons; throws std::invalid_argument when this processor lacks `name`.
void set_cpu_capability(const char* name);

}  // namespace seqkern
