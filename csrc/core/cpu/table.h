// What one instruction set offers: a table of kernels by storage type and cell.
#pragma once
#include "../recurrent.h"
#include "team.h"

namespace seqkern {

struct Kernels {
  Workspace (*forward_workspace)(const Forward&, const Member&);
  void (*forward)(const Forward&, const Member&);
  PackedSizes (*packed_sizes)(const Shape&);
  void (*pack)(const Shape&, const Weights&, void* ih, void* hh, void* hr, void* bias);
  Workspace (*backward_workspace)(const Backward&, const Member&);
  void (*backward)(const Backward&, const Member&);
  void (*add)(void* sum, const void* other, int64_t n);  // sum += other, in the storage type
};

struct KernelTable {
  Kernels of[kTypes][kModes];
};

const KernelTable& table_portable();
#if defined(__x86_64__)
const KernelTable& table_avx2();
const KernelTable& table_avx512();
// bf16 alone; the rest is null.
const KernelTable& table_avx512_bf16();
const KernelTable& table_amx();
#endif

}  // namespace seqkern
