// The forward of bf16 for a processor that multiplies bf16 itself; see every_type.inl.

namespace seqkern::SK_SET {
// clang-format off: each file builds on the one before
#include "simd.inl"
#include "gemm.inl"
#include "bf16.inl"
#include "cells.inl"
#include "forward.inl"
#include "kernels.inl"
// clang-format on

template <Mode M>
constexpr Kernels kForward = ForwardEntry<bf16, bf16, float, M>::kernels;
static constexpr KernelTable kTable{{{},
                                     {},
                                     {kForward<Mode::lstm>, kForward<Mode::gru>,
                                      kForward<Mode::rnn_tanh>, kForward<Mode::rnn_relu>},
                                     {}}};
}  // namespace seqkern::SK_SET
