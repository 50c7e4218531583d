// Small kernels that the emulator has to compute, or to refuse: what its own tests call.
#include "core/cuda/device.cuh"

namespace {

using namespace seqkern;
using namespace seqkern::device;

constexpr int kThreads = 64;

float* floats() { return reinterpret_cast<float*>(shared_memory()); }

// Each thread passes its value to the next one.
void pass_on(const float* x, float* y) {
  const int i = thread_index();
  store(floats() + i, load(x + i));
  sync_threads();
  store(y + i, load(floats() + (i + 1) % kThreads));
}
void pass_on_without_barrier(const float* x, float* y) {
  const int i = thread_index();
  store(floats() + i, load(x + i));
  store(y + i, load(floats() + (i + 1) % kThreads));
}
void overwrite_what_is_read(const float* x, float* y) {
  pass_on(x, y);
  store(floats() + thread_index(), 0.0f);
}
void read_unwritten(const float*, float* y) { store(y + thread_index(), load(floats())); }
void read_beyond(const float* x, float* y) {
  store(y + thread_index(), load(x + thread_index() + 1));
}
void write_beyond_shared(const float*, float*) { store(floats() + kThreads, 0.0f); }
void write_input(const float* x, float*) { store(const_cast<float*>(x), 0.0f); }
void barrier_of_some(const float*, float*) {
  if (thread_index() < 40) sync_threads();
}
void barriers_apart(const float*, float*) {
  if (thread_index() < 32)
    sync_threads();
  else
    sync_threads();
}
void copy_with_wait(const float* x, float* y) {
  const int i = thread_index();
  copy_async(floats() + i, x + i);
  commit_copies();
  wait_copies<0>();
  store(y + i, load(floats() + i));
}
void copy_without_wait(const float* x, float* y) {
  const int i = thread_index();
  copy_async(floats() + i, x + i);
  commit_copies();
  wait_copies<1>();
  store(y + i, load(floats() + i));
}
void copied_by_another(const float* x, float* y) {
  const int i = thread_index();
  copy_async(floats() + i, x + i);
  commit_copies();
  wait_copies<0>();
  store(y + i, load(floats() + (i ^ 1)));
}
void product_of_some(const float*, float* y) {
  float c[4] = {};
  const uint32_t a[4] = {};
  if (thread_index() != 5) multiply_add(c, a, 0, 0, bf16{});
  store(y + thread_index(), c[0]);
}
void products_apart(const float*, float* y) {
  float c[4] = {};
  const uint32_t a[4] = {};
  if (thread_index() % 2)
    multiply_add(c, a, 0, 0, bf16{});
  else
    multiply_add(c, a, 0, 0, bf16{});
  store(y + thread_index(), c[0]);
}

using Kernel = void (*)(const float*, float*);
constexpr Kernel kKernels[] = {
    pass_on,
    pass_on_without_barrier,
    overwrite_what_is_read,
    read_unwritten,
    read_beyond,
    write_beyond_shared,
    write_input,
    barrier_of_some,
    barriers_apart,
    copy_with_wait,
    copy_without_wait,
    copied_by_another,
    product_of_some,
    products_apart,
};

}  // namespace

// Kernel number `which` on x and y of 64 values. Null, or what the emulator refused.
extern "C" const char* toy(int which, const float* x, float* y, unsigned seed) {
  static std::string message;
  simt::Config c;
  c.threads = kThreads, c.shared = kThreads * sizeof(float), c.seed = seed;
  c.memory = {{uintptr_t(x), uintptr_t(x + kThreads), false},
              {uintptr_t(y), uintptr_t(y + kThreads), true}};
  try {
    simt::launch(c, [&] { kKernels[which](x, y); });
    return nullptr;
  } catch (const std::exception& e) {
    message = e.what();
    return message.c_str();
  }
}

// Both conversions of n values: to 16 bits and back.
extern "C" void through_half(const float* x, float* as_bf16, float* as_f16, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    bf16 b;
    f16 h;
    from_float(b, x[i]);
    from_float(h, x[i]);
    as_bf16[i] = to_float(b), as_f16[i] = to_float(h);
  }
}
