// Everything of one instruction set, for every storage type. The file that includes this has chosen
// the set by a `#pragma GCC target` and by SK_SET (its name), SK_VBYTES (bytes of a vector) and
// SK_ACC (accumulators of a tile).

namespace seqkern::SK_SET {
// clang-format off: each file builds on the one before
#include "simd.inl"
#include "gemm.inl"
#include "cells.inl"
#include "forward.inl"
#include "kernels.inl"
#include "backward.inl"
// clang-format on

template <class S, class C, Mode M>
constexpr Kernels kEntry = Entry<S, C, C, M>::kernels;
#define SK_ROW(S, C)                                                                \
  {kEntry<S, C, Mode::lstm>, kEntry<S, C, Mode::gru>, kEntry<S, C, Mode::rnn_tanh>, \
   kEntry<S, C, Mode::rnn_relu>}
static constexpr KernelTable kTable{
    {SK_ROW(float, float), SK_ROW(double, double), SK_ROW(bf16, float), SK_ROW(f16, float)}};
}  // namespace seqkern::SK_SET
