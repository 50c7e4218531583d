// The stream on which PyTorch queues work, without its CUDA headers.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "arguments.h"

// Weak, so that the library loads where torch has no CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace seqkern::binding {

inline void* current_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "recurrent: this torch has no CUDA streams");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

}  // namespace seqkern::binding
