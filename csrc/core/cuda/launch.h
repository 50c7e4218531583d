// What a binding calls of the CUDA kernels, without CUDA's own headers.
#pragma once
#include "core/cuda/block.h"

namespace seqkern::cuda {

// Queue all steps on `stream` (a cudaStream_t) of `device`, which is to be the current one. Sizes
// and pointers are the caller's to check, `s.plan` is block_plan's of the same arguments. Null, or
// what went wrong.
const char* launch_block_forward(Mode mode, Type type, const BlockForward& p, int device,
                                 void* stream);
const char* launch_block_backward(Mode mode, Type type, const BlockBackward& p, int device,
                                  void* stream);

// Bytes of shared memory that a block may have on this device; 0 where it cannot be asked.
int64_t block_shared_limit(int device);

}  // namespace seqkern::cuda
