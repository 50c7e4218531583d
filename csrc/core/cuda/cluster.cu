// A cluster of blocks for each slice.
#include "core/cuda/instances.cuh"

namespace seqkern::cuda {

const void* cluster_kernel(Mode mode, Type type, bool backward) {
  return instance_of<Cluster>(mode, type, backward);
}

}  // namespace seqkern::cuda
