// An attending recurrent decoder on the CPU, all steps in one call, on raw pointers: what the torch
// binding calls.
//
//   q_i = W_q s_{i-1} + b_q,  a_i = softmax_j v . tanh(q_i + key_j),  c_i = sum_j a_ij value_j,
//   s_i = cell(gates_x_i + W_c c_i, W_hh s_{i-1} + b_hh, s_{i-1})
//
// Sizes, in the letters of the field: B sources of Tk positions, K rows that read each of them,
// N = B*K rows, row n reads source n / K; T steps, H hidden units, G gates, A units of the scores,
// C features of a value. Position j of source b exists where j < k_lens[b]; no other is read.
#pragma once
#include <cstdint>

#include "additive.h"
#include "recurrent.h"

namespace seqkern {

struct Decoder {
  Mode mode;
  Type type;  // the storage type; the compute type is fp64 for fp64, else fp32
  int64_t B, K, T, Tk, H, A, C;
  const void* gates_x;     // (N, T, G*H) in the compute type, contiguous
  const void *h0, *c0;     // (N, H); c0 for LSTM
  TokenRows key, value;    // (B, Tk, A) and (B, Tk, C)
  const int32_t* k_lens;   // (B,), clamped to [0, Tk] where it is read; null: Tk everywhere
  const void *w_q, *b_q;   // (A, H); (A,) or null
  const void* v;           // (A,)
  const void *w_c, *w_hh;  // (G*H, C), (G*H, H)
  const void* b_hh;        // (G*H,) or null
  int threads;

  int64_t rows() const { return B * K; }
  int64_t gates() const { return gates_of(mode) * H; }
};

// What each result points to is written whole. All are contiguous.
struct DecoderForward {
  Decoder in;
  void *s, *contexts, *weights;  // (N, T, H), (N, T, C), (N, T, Tk)
  void* c_n;                     // (N, H) for LSTM
  // Kept for a backward; all null where none follows.
  void* queries;  // (N, T, A) in the compute type
  void* gates;    // (N, T, saved*H)
  void* cells;    // (N, T, H) for LSTM
};

struct DecoderBackward {
  Decoder in;
  const void *ds, *dcontexts, *dweights, *dc_n;       // contiguous, or null for zeros
  const void *s, *weights, *queries, *gates, *cells;  // of the forward
  void *dgates_x, *dproducts;  // (N, T, G*H) and (N, T, A + G*H) in the compute type
  void *dh0, *dc0;             // dc0 for LSTM
  void *dkey, *dvalue, *dv;    // (B, Tk, A), (B, Tk, C), (A,)
};

// Both may throw std::bad_alloc; pointers and sizes are the caller's to check.
void decoder_forward(const DecoderForward& f);
void decoder_backward(const DecoderBackward& b);

}  // namespace seqkern
