// What one instruction set offers for additive attention, by storage type.
#pragma once
#include "../additive.h"

namespace seqkern {

// Queries that are worked on at once: their scores over all keys lie in a thread's scratch.
constexpr int64_t kAdditiveBlock = 128;

struct AdditiveKernels {
  int64_t (*forward_scratch)(const AdditiveForward&);  // bytes a thread
  // Blocks [begin, end) of queries; block n is of row n / blocks of the batch.
  void (*forward)(const AdditiveForward&, int64_t begin, int64_t end, char* scratch);
  int64_t (*backward_scratch)(const AdditiveBackward&);
  // Row b of the batch. Its share of dv, and of dbias where the bias is broadcast over the batch,
  // goes to buffers of the compute type, so that the caller adds up rows in their order.
  void (*backward)(const AdditiveBackward&, int64_t b, void* dv, void* dbias, char* scratch);
  void (*add)(void* total, const void* share, int64_t n);  // compute type
  void (*store)(void* to, Type type, const void* from, int64_t n);
};

struct AdditiveTable {
  AdditiveKernels of[kTypes];
};

const AdditiveTable& additive_portable();
#if defined(__x86_64__)
const AdditiveTable& additive_avx2();
const AdditiveTable& additive_avx512();
#endif

}  // namespace seqkern
