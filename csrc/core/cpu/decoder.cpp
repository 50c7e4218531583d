// Chooses the kernels of the attending decoder, divides the sources among the threads.
#include <omp.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

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

using Block = std::unique_ptr<char, decltype(&std::free)>;

Block allocate(int64_t bytes) {
  void* p = std::aligned_alloc(64, size_t((bytes + 63) / 64 * 64));
  if (bytes > 0 && !p) throw std::bad_alloc();
  return {static_cast<char*>(p), &std::free};
}

// Both parts of a pass; returns the shared workspace. Every thread goes through whole sources.
template <class Call>
Block run(const DecoderPass<Call>& pass, const Call& call) {
  const Decoder& a = call.in;
  const Workspace bytes = pass.workspace(call);
  int threads = a.threads < 1 || omp_in_parallel() ? 1 : a.threads;
  if (a.B < threads) threads = int(a.B < 1 ? 1 : a.B);
  Block shared = allocate(bytes.shared);
  const Block scratch = allocate(threads * bytes.scratch);
  if (threads == 1) {
    pass.prepare(call, 0, 1, shared.get());
    pass.run(call, 0, a.B, shared.get(), scratch.get());
    return shared;
  }
#pragma omp parallel num_threads(threads)
  {
    // The runtime may give fewer threads than were asked for.
    const int64_t all = omp_get_num_threads(), me = omp_get_thread_num();
    pass.prepare(call, me, all, shared.get());
#pragma omp barrier
    pass.run(call, a.B * me / all, a.B * (me + 1) / all, shared.get(),
             scratch.get() + me * bytes.scratch);
  }
  return shared;
}

}  // namespace

void decoder_forward(const DecoderForward& f) { run(kernels_of(f.in).forward, f); }

void decoder_backward(const DecoderBackward& b) {
  const DecoderKernels& kernels = kernels_of(b.in);
  const Block shared = run(kernels.backward, b);
  kernels.finish(b, shared.get());
}

}  // namespace seqkern
