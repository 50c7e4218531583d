// For every processor: 16-byte vectors of the baseline instruction set, no fused multiply-add.
#include "table.h"
#include "types.h"


#define SK_VBYTES 16
#define SK_ACC 12

namespace seqkern::portable {
#include "simd.inl"
// clang-format off: each file builds on the one before
#include "gemm.inl"
#include "cells.inl"
#include "forward.inl"
#include "backward.inl"
#include "kernels.inl"
// clang-format on

#define SK_ROW(S, C)                                                                         \
  {                                                                                          \
    Entry<S, C, C, Mode::lstm>::kernels, Entry<S, C, C, Mode::gru>::kernels,                 \
        Entry<S, C, C, Mode::rnn_tanh>::kernels, Entry<S, C, C, Mode::rnn_relu>::kernels     \
  }
static constexpr KernelTable kTable{
    {SK_ROW(float, float), SK_ROW(double, double), SK_ROW(bf16, float), SK_ROW(f16, float)}};
}  // namespace seqkern::portable

namespace seqkern {
const KernelTable& table_portable() { return portable::kTable; }
}  // namespace seqkern
