// bf16 for a processor that multiplies bf16 itself; see every_type.inl.

namespace seqkern::SK_SET {
// clang-format off: each file builds on the one before
#include "simd.inl"
#include "gemm.inl"
#include "bf16.inl"
#include "cells.inl"
#include "forward.inl"
#include "kernels.inl"
#include "backward.inl"
// clang-format on

template <Mode M>
constexpr Kernels kEntry = Entry<bf16, bf16, float, M>::kernels;
static constexpr KernelTable kTable{
    {{},
     {},
     {kEntry<Mode::lstm>, kEntry<Mode::gru>, kEntry<Mode::rnn_tanh>, kEntry<Mode::rnn_relu>},
     {}}};
}  // namespace seqkern::SK_SET
