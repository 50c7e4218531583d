// The entry points that launch.cu chooses from; each skeleton is compiled by itself.
#pragma once
#include "core/cuda/plan.h"

namespace seqkern::cuda {

// Null for a dtype that the kernels do not take.
const void* block_kernel(Mode mode, Type type, bool backward);
const void* cluster_kernel(Mode mode, Type type, bool backward);
const void* grid_kernel(Mode mode, Type type, bool backward);

}  // namespace seqkern::cuda
