// Additive attention for one instruction set and every storage type; chosen as in every_type.inl.

namespace seqkern::SK_SET {
// clang-format off: each file builds on the one before
#include "simd.inl"
#include "gemm.inl"
#include "cells.inl"
#include "additive.inl"
#include "additive_gradient.inl"
#include "additive_forward.inl"
#include "additive_backward.inl"
// clang-format on

template <class S, class C>
constexpr AdditiveKernels kAdditiveEntry{
    AdditiveForwardPass<S, C>::scratch_bytes,  AdditiveForwardPass<S, C>::run,
    AdditiveBackwardPass<S, C>::scratch_bytes, AdditiveBackwardPass<S, C>::run,
    AdditiveBackwardPass<S, C>::add,           AdditiveBackwardPass<S, C>::write};
static constexpr AdditiveTable kAdditiveTable{
    {kAdditiveEntry<float, float>, kAdditiveEntry<double, double>, kAdditiveEntry<bf16, float>,
     kAdditiveEntry<f16, float>}};
}  // namespace seqkern::SK_SET
