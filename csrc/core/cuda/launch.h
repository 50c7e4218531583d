// What a binding calls of the CUDA kernels, without CUDA's own headers.
#pragma once
#include "core/cuda/plan.h"

namespace seqkern::cuda {

// The first of the candidates of which `device` says that it can run all blocks of a slice at the
// same time, how many slices it runs at once, 0 where there is none, and what its kernel needs
// allowed. Null, or what went wrong, which is no answer.
const char* choose_plan(Mode mode, Type type, int64_t H, bool backward, int device, Plan* plan,
                        int64_t* slices);

// Queue all steps on `stream` (a cudaStream_t) of `device`, which is to be the current one. Sizes
// and pointers are the caller's to check, `s.plan` and `s.slices` are choose_plan's of the same
// arguments. Null, or what went wrong.
const char* launch_forward(Mode mode, Type type, const ForwardCall& p, int device, void* stream);
const char* launch_backward(Mode mode, Type type, const BackwardCall& p, int device, void* stream);

}  // namespace seqkern::cuda
