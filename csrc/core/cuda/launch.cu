// What the device has room for, and the launches.
#include "core/cuda/launch.h"

#include <cuda_runtime.h>

#include "core/cuda/kernels.h"

namespace seqkern::cuda {
namespace {

const void* kernel_of(Skeleton skeleton, Mode mode, Type type, bool backward) {
  if (skeleton == Skeleton::block) return block_kernel(mode, type, backward);
  if (skeleton == Skeleton::cluster) return cluster_kernel(mode, type, backward);
  return grid_kernel(mode, type, backward);
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, which, device) == cudaSuccess ? value : 0;
}

// Launches of one kernel; `attributes` must not move.
struct Setting {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[1];

  Setting(const Plan& plan, int64_t slices, void* stream) {
    config.gridDim = dim3(unsigned(plan.members), unsigned(slices));
    config.blockDim = dim3(unsigned(plan.warps * 32));
    config.dynamicSmemBytes = size_t(plan.shared);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    if (plan.skeleton == Skeleton::cluster) {
      attributes[0].id = cudaLaunchAttributeClusterDimension;
      attributes[0].val.clusterDim.x = unsigned(plan.members);
      attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
      config.numAttrs = 1;
    } else if (plan.skeleton == Skeleton::grid) {
      attributes[0].id = cudaLaunchAttributeCooperative;
      attributes[0].val.cooperative = 1;
      config.numAttrs = 1;
    }
  }
  Setting(const Setting&) = delete;
};

// All threads of the process share a kernel's attributes on a device, which stay as they are set.
// So the shared memory is the most that there is, whatever the plan: what a smaller plan allowed
// would refuse the launch of a larger one that another thread is about to make.
cudaError_t allow(const void* kernel, const Plan& plan, int device) {
  const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error != cudaSuccess || plan.members <= 8 || plan.skeleton != Skeleton::cluster) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

// Whether an error is about the plan or the card, and will come again; memory that is full now is
// not.
bool refuses(cudaError_t error) {
  return error == cudaErrorInvalidValue || error == cudaErrorInvalidConfiguration ||
         error == cudaErrorInvalidClusterSize || error == cudaErrorInvalidDeviceFunction ||
         error == cudaErrorNoKernelImageForDevice || error == cudaErrorNotSupported ||
         error == cudaErrorLaunchOutOfResources;
}

// Slices that the current device computes at the same time; 0 where it cannot run even one.
cudaError_t slices_at_once(const void* kernel, const Plan& plan, int device, int64_t* slices) {
  int count = 0;
  *slices = 0;
  cudaError_t error = allow(kernel, plan, device);
  if (error == cudaSuccess && plan.skeleton == Skeleton::cluster) {
    // Compiled for older cards alone, the kernel has no body.
    cudaFuncAttributes compiled{};
    error = cudaFuncGetAttributes(&compiled, kernel);
    if (error == cudaSuccess && compiled.ptxVersion < 90) return cudaSuccess;
    const Setting one(plan, 1, nullptr);
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&count, kernel, &one.config);
  } else if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, plan.warps * 32,
                                                          size_t(plan.shared));
    count = count * attribute(cudaDevAttrMultiProcessorCount, device) / plan.members;
  }
  if (error == cudaSuccess)
    *slices = count;
  else
    cudaGetLastError();  // not to be found by the next who asks
  return refuses(error) ? cudaSuccess : error;
}

cudaError_t launch_all(const void* kernel, Sequence& s, void* arguments, void* stream) {
  const Plan& plan = s.plan;
  const int64_t slices = (s.B + kSliceRows - 1) / kSliceRows, jobs = slices * s.D;
  if (plan.skeleton == Skeleton::block) {
    Setting setting(plan, s.D, stream);
    setting.config.gridDim.x = unsigned(slices);
    return cudaLaunchKernelExC(&setting.config, kernel, &arguments);
  }
  // All blocks of a launch of a grid have to be resident, and a grid's axis y has 16 bits.
  int64_t most = 65535;
  if (plan.skeleton == Skeleton::grid && s.slices < most) most = s.slices;
  for (int64_t first = 0; first < jobs; first += most) {
    const int64_t now = jobs - first < most ? jobs - first : most;
    s.first = int32_t(first);
    if (plan.skeleton == Skeleton::grid) {
      // Steps count from 1.
      const cudaError_t error =
          cudaMemsetAsync(s.words, 0, size_t(plan.words * now) * sizeof(uint64_t),
                          static_cast<cudaStream_t>(stream));
      if (error != cudaSuccess) return error;
    }
    const Setting setting(plan, now, stream);
    if (const cudaError_t error = cudaLaunchKernelExC(&setting.config, kernel, &arguments))
      return error;
  }
  return cudaSuccess;
}

template <class Call>
const char* launch(bool backward, Mode mode, Type type, Call call, int device, void* stream) {
  const void* kernel = kernel_of(call.s.plan.skeleton, mode, type, backward);
  cudaError_t error = kernel ? cudaSuccess : cudaErrorInvalidValue;
  // This library has a CUDA runtime of its own, which the caller's guard may not have told.
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess && call.s.B > 0) error = launch_all(kernel, call.s, &call, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// What candidates are measured against.
Card card_of(int device) {
  Card card;
  card.shared = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  card.blocks = attribute(cudaDevAttrMultiProcessorCount, device);
  card.clusters = attribute(cudaDevAttrClusterLaunch, device) != 0;
  card.grids = attribute(cudaDevAttrCooperativeLaunch, device) != 0;
  return card;
}

}  // namespace

const char* launch_forward(Mode mode, Type type, const ForwardCall& p, int device, void* stream) {
  return launch(false, mode, type, p, device, stream);
}

const char* launch_backward(Mode mode, Type type, const BackwardCall& p, int device, void* stream) {
  return launch(true, mode, type, p, device, stream);
}

const char* choose_plan(Mode mode, Type type, int64_t H, bool backward, int device, Plan* plan,
                        int64_t* slices) {
  int before = 0;
  *slices = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const Card card = card_of(device);
  for (int i = 0; *slices == 0 && candidate(card, mode, type, H, backward, i, plan); ++i) {
    const void* kernel = kernel_of(plan->skeleton, mode, type, backward);
    error = slices_at_once(kernel, *plan, device, slices);
    if (error != cudaSuccess) break;
  }
  const cudaError_t back = cudaSetDevice(before);
  if (error == cudaSuccess) error = back;
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace seqkern::cuda
