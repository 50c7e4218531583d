// Chooses the kernels of the attending decoder, divides the sources among the threads.
#include <omp.h>

#include <cstring>

#include "arena.h"
#include "decoder_table.h"

namespace seqkern {
namespace {

const DecoderKernels& kernels_of(const Decoder& a) {
  const int type = int(a.type), mode = int(a.mode);
#if defined(__x86_64__)
  const char* set = cpu_capability();
  if (std::strcmp(set, "avx2") == 0) return decoder_avx2().of[type][mode];
  if (std::strcmp(set, "portable") != 0) return decoder_avx512().of[type][mode];
#endif
  return decoder_portable().of[type][mode];
}

// Both parts of a pass, then `finish` on the shared workspace. Every thread goes through whole
// sources.
template <class Call, class Finish>
void run(const DecoderPass<Call>& pass, const Call& call, Finish finish) {
  const Decoder& a = call.in;
  const Workspace bytes = pass.workspace(call);
  int threads = a.threads < 1 || omp_in_parallel() ? 1 : a.threads;
  if (a.B < threads) threads = int(a.B < 1 ? 1 : a.B);
  const Arena arena(bytes.shared + threads * bytes.scratch);
  char* const shared = arena.base();
  char* const scratch = shared + bytes.shared;
  if (threads == 1) {
    pass.prepare(call, 0, 1, shared);
    pass.run(call, 0, a.B, shared, scratch);
    return finish(shared);
  }
#pragma omp parallel num_threads(threads)
  {
    // The runtime may give fewer threads than were asked for.
    const int64_t all = omp_get_num_threads(), me = omp_get_thread_num();
    pass.prepare(call, me, all, shared);
#pragma omp barrier
    pass.run(call, a.B * me / all, a.B * (me + 1) / all, shared, scratch + me * bytes.scratch);
  }
  finish(shared);
}

}  // namespace

void decoder_forward(const DecoderForward& f) {
  run(kernels_of(f.in).forward, f, [](char*) {});
}

void decoder_backward(const DecoderBackward& b) {
  const DecoderKernels& kernels = kernels_of(b.in);
  run(kernels.backward, b, [&](char* shared) { kernels.finish(b, shared); });
}

}  // namespace seqkern
