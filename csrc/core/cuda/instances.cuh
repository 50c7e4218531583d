// Every instance of the kernels with one way of exchange, as entry points of a launch.
#pragma once
#include "core/cuda/backward.cuh"
#include "core/cuda/forward.cuh"
#include "core/cuda/kernels.h"

namespace seqkern::cuda {

template <class X, Mode M, class S>
const void* instance(bool backward) {
  if (backward) return reinterpret_cast<const void*>(&recurrent_backward<M, S, X>);
  return reinterpret_cast<const void*>(&recurrent_forward<M, S, X>);
}

template <class X, Mode M>
const void* instance_of(Type type, bool backward) {
  if (type == Type::f32) return instance<X, M, float>(backward);
  if (type == Type::tf32) return instance<X, M, tf32>(backward);
  if (type == Type::bf16) return instance<X, M, bf16>(backward);
  return type == Type::f16 ? instance<X, M, f16>(backward) : nullptr;
}

template <class X>
const void* instance_of(Mode mode, Type type, bool backward) {
  if (mode == Mode::lstm) return instance_of<X, Mode::lstm>(type, backward);
  if (mode == Mode::gru) return instance_of<X, Mode::gru>(type, backward);
  return instance_of<X, Mode::rnn_tanh>(type, backward);
}

}  // namespace seqkern::cuda
