// AVX-512: 64-byte vectors, 24 accumulators of 32 registers.
#include <immintrin.h>

#include "table.h"
#include "types.h"

#if defined(__x86_64__)
// Everything below is compiled for this set alone; headers stay above, so that no function they
// share with other files can be emitted with these instructions.
// The intrinsics of GCC 12 pass an undefined vector where a mask makes it unread.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")

#define SK_VBYTES 64
#define SK_ACC 24
#define SK_AVX512 1

namespace seqkern::avx512 {
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
}  // namespace seqkern::avx512

#pragma GCC pop_options

namespace seqkern {
const KernelTable& table_avx512() { return avx512::kTable; }
}  // namespace seqkern
#endif
