// What one instruction set offers for the attending decoder, by storage type and cell.
#pragma once
#include "../decoder.h"
#include "team.h"

namespace seqkern {

// Every pass has two parts: `prepare` fills the workspace that all threads share, in shares that
// may run side by side; then `run` takes sources [begin, end), each thread with scratch of its own.
template <class Call>
struct DecoderPass {
  Workspace (*workspace)(const Call&);
  void (*prepare)(const Call&, int64_t part, int64_t parts, char* shared);
  void (*run)(const Call&, int64_t begin, int64_t end, char* shared, char* scratch);
};

struct DecoderKernels {
  DecoderPass<DecoderForward> forward;
  DecoderPass<DecoderBackward> backward;
  void (*finish)(const DecoderBackward&, char* shared);  // after all sources
};

struct DecoderTable {
  DecoderKernels of[kTypes][kModes];
};

const DecoderTable& decoder_portable();
#if defined(__x86_64__)
const DecoderTable& decoder_avx2();
const DecoderTable& decoder_avx512();
#endif

}  // namespace seqkern
