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

// ---- two blocks that are resident together: the first passes x on, the second writes y

uint64_t words[kThreads];

void pass_words(const float* x, float* y, uint64_t awaited) {
  const int i = thread_index();
  uint64_t word = 0;
  if (block_x() == 0) {
    store_word(words + i, uint64_t(1) << 32 | to_bits(load(x + i)));
    return;
  }
  while ((word = load_word(words + i)) >> 32 != awaited) pause(0);
  store(y + i, from_bits(uint32_t(word)));
}
void words_awaited(const float* x, float* y) { pass_words(x, y, 1); }
void words_that_never_come(const float* x, float* y) { pass_words(x, y, 2); }

Words4* fours() { return reinterpret_cast<Words4*>(shared_memory()); }
uint64_t* counter() { return reinterpret_cast<uint64_t*>(floats() + kThreads); }

void set_up(int bytes) {
  if (thread_index() == 0) barrier_set_up(counter()), barrier_expect(counter(), bytes);
  sync_cluster();
}
void send(const float* x) {
  const int i = thread_index();
  if (i >= kThreads / 4) return;
  Words4 four;
  for (int j = 0; j < 4; ++j) four.v[j] = to_bits(load(x + 4 * i + j));
  store_remote(fours() + i, four, counter(), 1);
}
void receive(float* y) {
  barrier_wait(counter(), 0);
  store(y + thread_index(), load(floats() + thread_index()));
}
void shared_memory_of_another(const float* x, float* y) {
  set_up(kThreads * 4);
  block_x() == 0 ? send(x) : receive(y);
}
void too_few_bytes(const float* x, float* y) {
  set_up(kThreads * 4 + 16);
  block_x() == 0 ? send(x) : receive(y);
}
void read_too_early(const float* x, float* y) {
  // More bytes than come before the first block has seen a word: so the phase cannot have ended.
  set_up(kThreads * 4 + 16);
  store(floats() + thread_index(), 0.0f);
  sync_cluster();
  if (block_x() == 0) {
    send(x);
    store_word(words + thread_index(), 1);
  } else {
    while (load_word(words + thread_index()) == 0) pause(0);
    store(y + thread_index(), load(floats() + thread_index()));
  }
}
void sent_to_the_ended(const float* x, float*) {
  set_up(kThreads * 4);
  if (block_x() == 0) send(x);
}
void sent_without_a_barrier(const float* x, float* y) {
  if (block_x() == 0) return send(x);
  sync_threads();
  store(y + thread_index(), 0.0f);
  for (int i = 0; i < 9; ++i) sync_threads();
}
void armed_twice(const float*, float*) {
  set_up(64);
  if (thread_index() == 0) barrier_expect(counter(), 64);
}
void waited_by_one_block(const float*, float*) {
  if (block_x() == 0) sync_cluster();
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
    words_awaited,
    words_that_never_come,
    shared_memory_of_another,
    too_few_bytes,
    read_too_early,
    sent_to_the_ended,
    sent_without_a_barrier,
    armed_twice,
    waited_by_one_block,
};

}  // namespace

// Kernel number `which` on x and y of 64 values, in one block or in two. Null, or what the emulator
// refused.
extern "C" const char* toy(int which, const float* x, float* y, unsigned seed, int blocks) {
  static std::string message;
  simt::Config c;
  c.grid_x = c.together = blocks;
  c.threads = kThreads, c.seed = seed;
  c.shared = kThreads * sizeof(float) + (blocks > 1) * sizeof(uint64_t);
  memset(words, 0, sizeof words);
  c.memory = {{uintptr_t(x), uintptr_t(x + kThreads), false},
              {uintptr_t(y), uintptr_t(y + kThreads), true},
              {uintptr_t(words), uintptr_t(words + kThreads), true}};
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
