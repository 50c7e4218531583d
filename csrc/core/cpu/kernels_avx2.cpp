// AVX2 with FMA: 32-byte vectors, 12 accumulators of 16 registers.
#include "table.h"
#include "types.h"

#if defined(__x86_64__)
// Everything below is compiled for this set alone; headers stay above, so that no function they
// share with other files can be emitted with these instructions.
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,prefer-vector-width=256")

#define SK_VBYTES 32
#define SK_ACC 12

namespace seqkern::avx2 {
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
}  // namespace seqkern::avx2

#pragma GCC pop_options

namespace seqkern {
const KernelTable& table_avx2() { return avx2::kTable; }
}  // namespace seqkern
#endif
