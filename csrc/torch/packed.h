// Packed weights of one layer as one tensor of bytes, in the order of the kernels, headed by what
// they were packed for.
#pragma once
#include <string>

#include "arguments.h"

namespace seqkern::binding {

// `w` holds the weights of every direction; `like` is any CPU tensor.
Tensor make_packed(const Shape& s, const Weights* w, const Tensor& like);

// Points f at the weights in `packed`, which must have been packed for s and this processor.
void use_packed(const char* op, const Tensor& packed, const Shape& s, Forward& f);

}  // namespace seqkern::binding
