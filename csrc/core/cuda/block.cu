// Every instance of the one-block kernels, and their launches.
#include <cuda_runtime.h>

#include "core/cuda/block_backward.cuh"
#include "core/cuda/block_forward.cuh"
#include "core/cuda/launch.h"

namespace seqkern::cuda {
namespace {

template <template <Mode, class> class Kernel, Mode M>
auto of_type(Type type) -> decltype(Kernel<M, float>::get()) {
  switch (type) {
    case Type::f32:
      return Kernel<M, float>::get();
    case Type::bf16:
      return Kernel<M, bf16>::get();
    case Type::f16:
      return Kernel<M, f16>::get();
    default:
      return nullptr;
  }
}

template <template <Mode, class> class Kernel>
auto kernel_of(Mode mode, Type type) -> decltype(Kernel<Mode::lstm, float>::get()) {
  if (mode == Mode::lstm) return of_type<Kernel, Mode::lstm>(type);
  if (mode == Mode::gru) return of_type<Kernel, Mode::gru>(type);
  return of_type<Kernel, Mode::rnn_tanh>(type);
}

template <Mode M, class S>
struct ForwardKernel {
  static auto get() { return &block_forward<M, S>; }
};
template <Mode M, class S>
struct BackwardKernel {
  static auto get() { return &block_backward<M, S>; }
};

template <class Arguments>
cudaError_t launch(void (*kernel)(Arguments), const Arguments& p, int device, void* stream) {
  if (!kernel) return cudaErrorInvalidValue;
  const BlockSequence& s = p.s;
  if (s.B == 0) return cudaSuccess;
  // This library has a CUDA runtime of its own, which the caller's guard may not have told.
  if (const cudaError_t error = cudaSetDevice(device)) return error;
  // Asked for at every launch: the attribute belongs to the device that is current now.
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(s.plan.shared));
  if (error != cudaSuccess) return error;
  const dim3 grid(unsigned((s.B + kSliceRows - 1) / kSliceRows), unsigned(s.D));
  kernel<<<grid, s.plan.warps * 32, size_t(s.plan.shared), static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}

const char* words(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* launch_block_forward(Mode mode, Type type, const BlockForward& p, int device,
                                 void* stream) {
  return words(launch(kernel_of<ForwardKernel>(mode, type), p, device, stream));
}

const char* launch_block_backward(Mode mode, Type type, const BlockBackward& p, int device,
                                  void* stream) {
  return words(launch(kernel_of<BackwardKernel>(mode, type), p, device, stream));
}

int64_t block_shared_limit(int device) {
  int bytes = 0;
  const auto error =
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return error == cudaSuccess ? bytes : 0;
}

}  // namespace seqkern::cuda
