// One step of a layer whose weights do not fit the thread blocks of a GPU: all but its products, in
// one launch. Included by nvcc and by the C++ compiler.
//
// Pointers are to device memory and S is the dtype of the call. Rows are contiguous and follow each
// other, but for those with a `_row`, the elements between two of them.
#pragma once
#include <cstdint>

#include "core/recurrent.h"

namespace seqkern::cuda {

struct StepForward {
  int64_t rows, H;
  int32_t relu;  // of the Elman cells: 0 tanh, 1 relu
  const float* gx;
  int64_t gx_row;           // W_ih x, G*H values a row
  const float* gh;          // W_hh h, (rows, G*H)
  const void *b_ih, *b_hh;  // S (G*H,) or null
  void* h;                  // S (rows, H): the state, before and after
  float* c;                 // (rows, H) likewise; of LSTM only
  void* y;                  // S: h once more, H values a row
  int64_t y_row;
  void *gates, *cells;  // S (rows, 4H), (rows, H), or null where nothing is kept
};

struct StepBackward {
  int64_t rows, H;
  int32_t relu;
  const void* dy;  // S, or null for zeros
  int64_t dy_row;
  const float* sums;  // W_hh^T dg of the step that the backward came from, (sum_rows, H)
  int64_t sum_rows;   // rows beyond, which end here, have no sum
  float *dh, *dc;     // (rows, H): the state of the backward, before and after; dc of LSTM only
  const void *gates, *cells;  // S, of the forward
  const void* before;         // S: c of LSTM, h of GRU of the step before, for `carried` rows
  int64_t before_row, carried;
  const void* initial;  // S (rows, H): c0 or h0, for the others
  const void* y;        // S: of RNN only
  int64_t y_row;
  void* dg;   // S (rows, columns*H), the gradients of the pre-activations
  void* dah;  // S (rows, G*H): of GRU only, those of dg that the recurrent product has
};

// Whether a thread may take 16 bytes at a time of everything, `size` bytes being a value of S.
inline bool whole_words(const StepForward& p, int64_t size) {
  const void* const pointers[] = {p.gx, p.gh, p.b_ih, p.b_hh, p.h, p.c, p.y, p.gates, p.cells};
  uint64_t all = uint64_t(p.gx_row * 4 | (p.y_row | p.H) * size);
  for (const void* pointer : pointers) all |= reinterpret_cast<uintptr_t>(pointer);
  return all % 16 == 0;
}
inline bool whole_words(const StepBackward& p, int64_t size) {
  const void* const pointers[] = {p.dy,     p.sums, p.dh,      p.dc, p.gates, p.cells,
                                  p.before, p.y,    p.initial, p.dg, p.dah};
  uint64_t all = uint64_t((p.dy_row | p.before_row | p.y_row | p.H) * size);
  for (const void* pointer : pointers) all |= reinterpret_cast<uintptr_t>(pointer);
  return all % 16 == 0;
}

// Whether the kernels were compiled for a device and its driver runs them. Null, or what went
// wrong, which is no answer.
const char* has_steps(int device, bool* found);

// Queue one step on `stream` (a cudaStream_t) of `device`, which is to be the current one. Sizes
// and pointers are the caller's to check. Null, or what went wrong.
const char* launch_step(Mode mode, Type type, const StepForward& p, int device, void* stream);
const char* launch_step(Mode mode, Type type, const StepBackward& p, int device, void* stream);

}  // namespace seqkern::cuda
