// Chooses the kernels of additive attention, divides the work among the threads, adds up what rows
// of the batch share.
#include <omp.h>

#include <cstring>

#include "additive_table.h"
#include "arena.h"

namespace seqkern {
namespace {

const AdditiveKernels& kernels_of(Type type) {
#if defined(__x86_64__)
  const char* set = cpu_capability();
  if (std::strcmp(set, "avx2") == 0) return additive_avx2().of[int(type)];
  if (std::strcmp(set, "portable") != 0) return additive_avx512().of[int(type)];
#endif
  return additive_portable().of[int(type)];
}

// part(first, last, thread) for equal shares of [0, items), each on a thread of its own.
template <class Part>
void share_out(int64_t items, int threads, Part part) {
  if (threads < 2 || omp_in_parallel()) return part(0, items, 0);
#pragma omp parallel num_threads(threads)
  {
    // The runtime may give fewer threads than were asked for.
    const int64_t all = omp_get_num_threads(), me = omp_get_thread_num();
    part(items * me / all, items * (me + 1) / all, int(me));
  }
}

int threads_for(int64_t items, int threads) {
  if (threads < 1 || omp_in_parallel()) return 1;
  return int(items < threads ? items : threads);
}

}  // namespace

void additive_forward(const AdditiveForward& f) {
  const int64_t blocks = f.in.B * ((f.in.Tq + kAdditiveBlock - 1) / kAdditiveBlock);
  if (blocks == 0) return;
  const AdditiveKernels& kernels = kernels_of(f.in.type);
  const int threads = threads_for(blocks, f.in.threads);
  const int64_t each = kernels.forward_scratch(f);
  const Arena arena(threads * each);
  share_out(blocks, threads, [&](int64_t begin, int64_t end, int thread) {
    kernels.forward(f, begin, end, arena.base() + thread * each);
  });
}

void additive_backward(const AdditiveBackward& b) {
  const Additive& a = b.in;
  const AdditiveKernels& kernels = kernels_of(a.type);
  const int64_t size = a.type == Type::f64 ? 8 : 4;
  const bool shared_bias = b.dbias && b.bias_sizes[0] == 1;
  const int64_t bias = shared_bias ? b.bias_sizes[1] * b.bias_sizes[2] : 0, row = a.D + bias;
  const int threads = threads_for(a.B, a.threads);
  const int64_t each = kernels.backward_scratch(b);
  // Rows of the batch go in waves: their shares are added in the order of the rows, and only one
  // wave of shares exists at a time.
  const int64_t wave = bias ? threads : a.B;
  const Arena arena(threads * each + (wave + 1) * row * size);
  char* const shares = arena.base() + threads * each;
  char* const total = shares + wave * row * size;
  std::memset(total, 0, size_t(row * size));
  for (int64_t first = 0; first < a.B; first += wave) {
    const int64_t n = a.B - first < wave ? a.B - first : wave;
    share_out(n, int(n < threads ? n : threads), [&](int64_t begin, int64_t end, int thread) {
      for (int64_t i = begin; i < end; ++i) {
        char* share = shares + i * row * size;
        kernels.backward(b, first + i, share, share + a.D * size, arena.base() + thread * each);
      }
    });
    for (int64_t i = 0; i < n; ++i) kernels.add(total, shares + i * row * size, row);
  }
  if (b.dv) kernels.store(b.dv, a.type, total, a.D);
  if (shared_bias) kernels.store(b.dbias, a.bias_type, total + a.D * size, bias);
}

}  // namespace seqkern
