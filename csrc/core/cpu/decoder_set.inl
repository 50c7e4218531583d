// The attending decoder for one instruction set, every storage type and cell; chosen as in
// every_type.inl.

namespace seqkern::SK_SET {
// clang-format off: each file builds on the one before
#include "simd.inl"
#include "gemm.inl"
#include "cells.inl"
#include "additive.inl"
#include "additive_gradient.inl"
#include "additive_forward.inl"
#include "decoder.inl"
#include "decoder_backward.inl"
// clang-format on

template <class S, class C, Mode M>
constexpr DecoderKernels kDecoderEntry{DecoderForwardPass<S, C, M>::pass,
                                       DecoderBackwardPass<S, C, M>::pass,
                                       DecoderBackwardPass<S, C, M>::finish};
#define SK_ROW(S, C)                                                \
  {kDecoderEntry<S, C, Mode::lstm>, kDecoderEntry<S, C, Mode::gru>, \
   kDecoderEntry<S, C, Mode::rnn_tanh>, kDecoderEntry<S, C, Mode::rnn_relu>}
static constexpr DecoderTable kDecoderTable{
    {SK_ROW(float, float), SK_ROW(double, double), SK_ROW(bf16, float), SK_ROW(f16, float)}};
}  // namespace seqkern::SK_SET
