// Blocks anywhere on the device for each slice.
#include "core/cuda/instances.cuh"

namespace seqkern::cuda {

const void* grid_kernel(Mode mode, Type type, bool backward) {
  return instance_of<Grid>(mode, type, backward);
}

}  // namespace seqkern::cuda
