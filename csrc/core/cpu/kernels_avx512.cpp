// AVX-512: 64-byte vectors, 24 accumulators of 32 registers.
#include <immintrin.h>

#include "table.h"
#include "types.h"

#if defined(__x86_64__)
// Everything below is compiled for this set alone; headers stay above, so that no function they
// share with other files can be emitted with these instructions.
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")

#define SK_VBYTES 64
#define SK_ACC 24
#define SK_RCP14 1

namespace seqkern::avx512 {
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
}  // namespace seqkern::avx512

#pragma GCC pop_options

namespace seqkern {
const KernelTable& table_avx512() { return avx512::kTable; }
}  // namespace seqkern
#endif
