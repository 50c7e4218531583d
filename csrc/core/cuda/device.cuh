// What kernels ask of the machine: indices, barriers, asynchronous copies, the memory of other
// blocks, products of matrices, conversions. nvcc compiles this to instructions; any other compiler
// gets the same functions from an emulator (simt.h, on the include path of the tests), so that the
// text of a kernel is one.
#pragma once
#include <cstdint>

#include "core/cpu/types.h"

#ifdef __CUDACC__
#define SK_DEVICE __device__ __forceinline__
// At most `threads` threads in a block, one block on a multiprocessor.
#define SK_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define SK_UNROLL _Pragma("unroll")
#define SK_NO_UNROLL _Pragma("unroll 1")
#else
#define SK_DEVICE inline
#define SK_KERNEL(threads) inline void
#define SK_UNROLL
#define SK_NO_UNROLL
#endif

namespace seqkern::device {

struct alignas(16) Words4 {
  uint32_t v[4];
};
struct alignas(16) Floats4 {
  float v[4];
};

}  // namespace seqkern::device

#ifndef __CUDACC__
#include "simt.h"
#else

namespace seqkern::device {

SK_DEVICE int thread_index() { return threadIdx.x; }
SK_DEVICE int thread_count() { return blockDim.x; }
SK_DEVICE int block_x() { return blockIdx.x; }
SK_DEVICE int block_y() { return blockIdx.y; }
SK_DEVICE void sync_threads() { __syncthreads(); }

// The block's shared memory, of the size given at the launch.
SK_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

template <class X>
SK_DEVICE X load(const X* p) {
  return *p;
}
template <class X>
SK_DEVICE void store(X* p, X value) {
  *p = value;
}

// Copies 4 bytes from global to shared memory. They are there for this thread after
// wait_copies<n>(), with at most n later calls of commit_copies().
SK_DEVICE void copy_async(float* shared, const float* global) {
  const uint32_t to = uint32_t(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(global) : "memory");
}
SK_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
SK_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// c += a b over a warp: a is 16 x 16, b 16 x 8, c 16 x 8, spread over the lanes as PTX lays down
// for mma.m16n8k16. Of tf32, a is 16 x 8 and b 8 x 8, as for mma.m16n8k8.
SK_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
SK_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, f16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

SK_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, tf32) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Words of global memory that other blocks write and read meanwhile: each whole, in no order.
SK_DEVICE uint64_t load_word(const uint64_t* p) {
  uint64_t word;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(word) : "l"(p) : "memory");
  return word;
}
SK_DEVICE void store_word(uint64_t* p, uint64_t word) {
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(p), "l"(word) : "memory");
}
// Nothing ends a wait for what never comes. With -DSEQKERN_SPIN_LIMIT, say by NVCC_APPEND_FLAGS for
// a first run on a card, a kernel that has looked so often is stopped, and its launch fails.
SK_DEVICE void end_spin([[maybe_unused]] uint32_t looks) {
#ifdef SEQKERN_SPIN_LIMIT
  if (looks >> 24) __trap();
#endif
}
// Between two looks at what another block writes, the first of them number 0.
SK_DEVICE void pause(uint32_t looks) { end_spin(looks); }

// Clusters of blocks, along x: from compute capability 9.0 on.
#if __CUDA_ARCH__ >= 900
constexpr bool kHasClusters = true;
#else
constexpr bool kHasClusters = false;
#endif

SK_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// All threads of the cluster. What they wrote before it is seen after it.
SK_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// A barrier in the block's shared memory, of phases that end when one barrier_expect and all bytes
// that it names were seen. By one thread, before a sync_cluster().
SK_DEVICE void barrier_set_up(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
SK_DEVICE void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Until the phase of this parity has ended; phases count from 0. The order is that of the block,
// which its own shared memory needs; .acquire.cluster would drop the L1 cache besides.
SK_DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t ended = 0;
  for (uint32_t looks = 0; !ended; ++looks) {
    end_spin(looks);
    asm volatile(
        "{ .reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}
// Stores into the shared memory of another block of the cluster, at this block's addresses: `value`
// at `to`, then 16 bytes are seen by `barrier`.
SK_DEVICE void store_remote(Words4* to, const Words4& value, uint64_t* barrier, int block) {
  uint32_t there, counted;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(to)), "r"(block));
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(counted)
      : "r"(shared_address(barrier)), "r"(block));
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 "
      "[%0], {%1, %2, %3, %4}, [%5];" ::"r"(there),
      "r"(value.v[0]), "r"(value.v[1]), "r"(value.v[2]), "r"(value.v[3]), "r"(counted)
      : "memory");
}

SK_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
SK_DEVICE float to_float(float x) { return x; }
SK_DEVICE float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
SK_DEVICE float to_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
SK_DEVICE float to_float(tf32 x) { return __uint_as_float(x.bits); }
// Rounded to the nearest, ties to even.
SK_DEVICE void from_float(float& y, float x) { y = x; }
SK_DEVICE void from_float(bf16& y, float x) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
}
SK_DEVICE void from_float(f16& y, float x) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
}

// In memory a tf32 is a whole float; a product takes what `operand` makes of it, rounded to the
// nearest, ties away from zero, where it would cut off the bits by itself.
SK_DEVICE void from_float(tf32& y, float x) { y.bits = __float_as_uint(x); }
SK_DEVICE tf32 operand(tf32 x) {
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(x.bits) : "f"(__uint_as_float(x.bits)));
  return x;
}

// CUDA's own, without --use_fast_math: at most 2 units in the last place off, NaN kept.
SK_DEVICE float exp(float x) { return expf(x); }
SK_DEVICE float tanh(float x) { return tanhf(x); }
// 1 unit in the last place off; 0 for infinity. Division proper would call a function for some x.
SK_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SK_DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }

}  // namespace seqkern::device
#endif

namespace seqkern::device {

// What is no tf32 goes into a product as it is.
template <class S>
SK_DEVICE S operand(S x) {
  return x;
}

}  // namespace seqkern::device
