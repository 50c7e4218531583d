// Additive attention on the CPU, on raw pointers: what the torch binding calls.
//
//   s_ij = scale * sum_d v_d tanh(q_id + k_jd) + bias_ij,  w = softmax_j(s),  o_i = sum_j w_ij
//   value_j
//
// Sizes, in the letters of the field: B rows of the batch, Tq queries, Tk keys, D units of the
// scores, Dv of a value. Key j of row b exists where j < k_lens[b]; no other is read.
#pragma once
#include <cstdint>

#include "recurrent.h"

namespace seqkern {

// Rows (B, T, last): token t of row b at p + b * batch + t * row, its elements side by side.
struct TokenRows {
  const void* p;
  int64_t batch, row;  // in elements
};

// Something for each pair (B, Tq, Tk); strides in elements, 0 where it is broadcast.
struct PairRows {
  const void* p;  // null: absent
  int64_t batch, query, key;
};

struct Additive {
  Type type;  // of query, key, value and v
  int64_t B, Tq, Tk, D, Dv;
  TokenRows query, key, value;
  const void* v;          // (D,) contiguous
  PairRows mask;          // of bool: whether the pair takes part
  PairRows bias;          // added to the scores; -inf leaves the pair out
  Type bias_type;         // `type` or f32
  const int32_t* k_lens;  // (B,), clamped to [0, Tk] where it is read; null: Tk everywhere
  double scale;
  int threads;
};

// What each result points to is written whole.
struct AdditiveForward {
  Additive in;
  void* o;        // (B, Tq, Dv) contiguous
  void* weights;  // (B, Tq, Tk) contiguous, or null
  void* lse;      // (B, Tq) in the compute type: fp64 for fp64, else fp32
};

struct AdditiveBackward {
  Additive in;
  const void* d_o;                    // (B, Tq, Dv) contiguous
  const void* dweights;               // (B, Tq, Tk) contiguous, or null for zeros
  const void* dlse;                   // (B, Tq) contiguous, or null for zeros
  const void* lse;                    // of the forward
  void *dquery, *dkey, *dvalue, *dv;  // contiguous, or null where not needed
  void* dbias;                        // contiguous, of the bias's own sizes and type, or null
  int64_t bias_sizes[3];              // 1, or B, Tq and Tk
};

// Both may throw std::bad_alloc; pointers and sizes are the caller's to check.
void additive_forward(const AdditiveForward& f);
void additive_backward(const AdditiveBackward& b);

}  // namespace seqkern
