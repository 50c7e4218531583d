// For every processor: 16-byte vectors of the baseline instruction set, no fused multiply-add.
#include "table.h"
#include "types.h"

#define SK_VBYTES 16
#define SK_ACC 12

namespace seqkern::portable {
// clang-format off: each file builds on the one before
#include "simd.inl"
#include "gemm.inl"
#include "cells.inl"
#include "forward.inl"
#include "kernels.inl"
#include "backward.inl"
// clang-format on

template <class S, class C, Mode M>
constexpr Kernels kEntry = Entry<S, C, M>::kernels;
#define SK_ROW(S, C)                                                                \
  {kEntry<S, C, Mode::lstm>, kEntry<S, C, Mode::gru>, kEntry<S, C, Mode::rnn_tanh>, \
   kEntry<S, C, Mode::rnn_relu>}
static constexpr KernelTable kTable{
    {SK_ROW(float, float), SK_ROW(double, double), SK_ROW(bf16, float), SK_ROW(f16, float)}};
}  // namespace seqkern::portable

namespace seqkern {
const KernelTable& table_portable() { return portable::kTable; }
}  // namespace seqkern
