// Every instance of a step's kernels, and their launch.
#include "core/cuda/step.cuh"

#include <cuda_runtime.h>

namespace seqkern::cuda {
namespace {

template <Mode M, class S, int V>
const void* kernel(const StepForward&) {
  return reinterpret_cast<const void*>(&step_forward<M, S, V>);
}
template <Mode M, class S, int V>
const void* kernel(const StepBackward&) {
  return reinterpret_cast<const void*>(&step_backward<M, S, V>);
}

template <class S, int V, class Call>
const void* of_mode(Mode mode, const Call& p) {
  if (mode == Mode::lstm) return kernel<Mode::lstm, S, V>(p);
  if (mode == Mode::gru) return kernel<Mode::gru, S, V>(p);
  return kernel<Mode::rnn_tanh, S, V>(p);
}

template <class S, class Call>
const void* of_width(Mode mode, bool wide, const Call& p) {
  return wide ? of_mode<S, 16 / sizeof(S)>(mode, p) : of_mode<S, 1>(mode, p);
}

template <class Call>
const char* launch(Mode mode, Type type, Call p, int device, void* stream) {
  if (p.rows == 0) return nullptr;
  const int64_t size = size_of(type);
  const bool wide = whole_words(p, size);
  const void* kernel = type == Type::f32    ? of_width<float>(mode, wide, p)
                       : type == Type::bf16 ? of_width<bf16>(mode, wide, p)
                       : type == Type::f16  ? of_width<f16>(mode, wide, p)
                                            : nullptr;
  const int64_t threads = p.rows * (wide ? p.H * size / 16 : p.H);
  const int64_t blocks = (threads + kStepThreads - 1) / kStepThreads;
  const bool countable = blocks * kStepThreads <= UINT32_MAX;
  cudaError_t error = kernel && countable ? cudaSuccess : cudaErrorInvalidValue;
  // This library has a CUDA runtime of its own, which the caller's guard may not have told.
  if (error == cudaSuccess) error = cudaSetDevice(device);
  void* arguments[] = {&p};
  if (error == cudaSuccess)
    error = cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(kStepThreads), arguments, 0,
                             static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* has_steps(int device, bool* found) {
  int before = 0;
  cudaFuncAttributes compiled{};
  *found = false;
  cudaError_t error = cudaGetDevice(&before);
  // PyTorch brings a runtime of its own, which may be older than this library's and go with the
  // driver that is there.
  if (error == cudaErrorInsufficientDriver) return nullptr;
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  error = cudaFuncGetAttributes(&compiled, kernel<Mode::lstm, float, 1>(StepForward{}));
  *found = error == cudaSuccess;
  if (!*found) cudaGetLastError();  // not to be found by the next who asks
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction)
    error = cudaSuccess;
  const cudaError_t back = cudaSetDevice(before);
  if (error == cudaSuccess) error = back;
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* launch_step(Mode mode, Type type, const StepForward& p, int device, void* stream) {
  return launch(mode, type, p, device, stream);
}

const char* launch_step(Mode mode, Type type, const StepBackward& p, int device, void* stream) {
  return launch(mode, type, p, device, stream);
}

}  // namespace seqkern::cuda
