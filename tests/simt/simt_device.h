// The functions of core/cuda/device.cuh on the emulator.
#pragma once

namespace seqkern::device {

inline int thread_index() { return simt::block().current->index; }
inline int thread_count() { return simt::block().config.threads; }
inline int block_x() { return simt::block().x; }
inline int block_y() { return simt::block().y; }
inline void sync_threads(SIMT_PLACE) { simt::block().barrier(SIMT_AT); }
inline char* shared_memory() { return reinterpret_cast<char*>(simt::block().shared.data()); }

template <class X>
X load(const X* p, SIMT_PLACE) {
  simt::block().check(p, sizeof(X), false, SIMT_AT);
  return *p;
}
template <class X>
void store(X* p, X value, SIMT_PLACE) {
  simt::block().check(p, sizeof(X), true, SIMT_AT);
  *p = value;
}

inline void copy_async(float* shared, const float* global, SIMT_PLACE) {
  simt::block().copy(shared, global, SIMT_AT);
}
inline void commit_copies() { simt::block().commit(); }
template <int kPending>
void wait_copies() {
  simt::block().wait_copies(kPending);
}

// ---- memory of other blocks

constexpr bool kHasClusters = true;

inline uint64_t load_word(const uint64_t* p, SIMT_PLACE) {
  simt::block().check(p, 8, false, SIMT_AT);
  return *p;
}
inline void store_word(uint64_t* p, uint64_t word, SIMT_PLACE) {
  simt::block().check(p, 8, true, SIMT_AT);
  simt::block().team->store_word(p, word);
}
inline void pause(uint32_t, SIMT_PLACE) { simt::block().poll(SIMT_AT); }

inline void sync_cluster(SIMT_PLACE) { simt::block().team_barrier(SIMT_AT); }
inline simt::Counter& counter_of(const uint64_t* barrier, simt::Place at) {
  simt::Block& b = simt::block();
  const auto found = b.counters.find(b.offset(barrier));
  if (found == b.counters.end()) b.fail("a barrier that is not set up", at);
  return found->second;
}
inline void barrier_set_up(uint64_t* barrier, SIMT_PLACE) {
  simt::Block& b = simt::block();
  b.check(barrier, 8, true, SIMT_AT);
  b.counters[b.offset(barrier)] = {};
}
inline void barrier_expect(uint64_t* barrier, int bytes, SIMT_PLACE) {
  simt::Counter& counter = counter_of(barrier, SIMT_AT);
  if (counter.armed) simt::block().fail("a barrier armed twice in a phase", SIMT_AT);
  counter.armed = true, counter.bytes += bytes;
  simt::block().arrive(counter);
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity, SIMT_PLACE) {
  const simt::Counter& counter = counter_of(barrier, SIMT_AT);
  while (uint32_t(counter.phases) % 2 == parity) simt::block().poll(SIMT_AT);
}
inline void store_remote(Words4* to, const Words4& value, uint64_t* barrier, int rank, SIMT_PLACE) {
  simt::Block& b = simt::block();
  b.team->store_remote(b, to, value.v, barrier, rank, SIMT_AT);
}

inline float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline uint32_t bits_of(float x) { return to_bits(x); }
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return from_bits(uint32_t(x.bits) << 16); }
inline float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, e = x.bits >> 10 & 31, m = x.bits & 1023;
  if (e == 31) return from_bits(sign | 0x7f800000 | m << 13);
  const float value = e ? std::ldexp(float(m + 1024), int(e) - 25) : std::ldexp(float(m), -24);
  return sign ? -value : value;
}

inline void from_float(float& y, float x) { y = x; }
inline void from_float(bf16& y, float x) {
  const uint32_t bits = to_bits(x);
  y.bits = x != x ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void from_float(f16& y, float x) {
  const uint16_t sign = to_bits(x) >> 16 & 0x8000;
  const float a = std::fabs(x);
  if (x != x) {
    y.bits = 0x7fff;
  } else if (a >= 65520.0f) {
    y.bits = sign | 0x7c00;
  } else {
    // To a multiple of the spacing of half precision at a; nearbyint rounds ties to even.
    const int e = a < 0x1p-14f ? -24 : std::ilogb(a) - 10;
    const uint32_t steps = uint32_t(std::nearbyint(std::ldexp(a, -e)));
    y.bits = sign | uint16_t(e == -24 ? steps : (uint32_t(e + 24) << 10) + steps);
  }
}

inline float to_float(tf32 x) { return from_bits(x.bits); }
inline void from_float(tf32& y, float x) { y.bits = to_bits(x); }
inline tf32 operand(tf32 x) {
  const float value = from_bits(x.bits);
  if (value != value) return {0x7fffe000};
  if (std::isinf(value)) return x;
  return {(x.bits + 0x1000) & ~0x1fffu};
}

inline float exp(float x) { return std::exp(x); }
inline float tanh(float x) { return std::tanh(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }

struct MatrixOperands {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

template <class S>
float half_of(uint32_t word, int i) {
  return to_float(S{uint16_t(i ? word >> 16 : word)});
}

template <int K>
void add_products(const float (&a)[16][K], const float (&b)[K][8],
                  MatrixOperands* const lanes[32]) {
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      double sum = lanes[lane]->c[i];
      for (int k = 0; k < K; ++k)
        sum += double(a[lane / 4 + i / 2 * 8][k]) * b[k][lane % 4 * 2 + i % 2];
      lanes[lane]->c[i] = float(sum);
    }
}

// By PTX's tables for m16n8k16: lane 4 g + t holds of a the rows g, g + 8 and the columns 2 t,
// 2 t + 1, + 8; of b those rows and the column g; of c the rows g, g + 8, the columns 2 t, 2 t + 1.
template <class S>
void multiply_warp(MatrixOperands* const lanes[32]) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 8; ++i)
      a[g + i / 2 % 2 * 8][2 * t + i % 2 + i / 4 * 8] = half_of<S>(lanes[lane]->a[i / 2], i % 2);
    for (int i = 0; i < 4; ++i)
      b[2 * t + i % 2 + i / 2 * 8][g] = half_of<S>(lanes[lane]->b[i / 2], i % 2);
  }
  add_products<16>(a, b, lanes);
}

// Likewise for m16n8k8 of tf32: of a the rows g, g + 8 and the columns t, t + 4; of b those rows.
inline void multiply_warp_tf32(MatrixOperands* const lanes[32]) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 4] = from_bits(lanes[lane]->a[i]);
    for (int i = 0; i < 2; ++i) b[t + i * 4][g] = from_bits(lanes[lane]->b[i]);
  }
  add_products<8>(a, b, lanes);
}

template <class S>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, S, SIMT_PLACE) {
  MatrixOperands mine{c, a, {b0, b1}};
  if constexpr (sizeof(S) == 4) {
    // A GPU would cut these bits off: no `operand` rounded them.
    if ((a[0] | a[1] | a[2] | a[3] | b0 | b1) & 0x1fff)
      simt::block().fail("a tf32 of more than 11 bits in a product", SIMT_AT);
    simt::block().together(mine, SIMT_AT, multiply_warp_tf32);
  } else {
    simt::block().together(mine, SIMT_AT, multiply_warp<S>);
  }
}

}  // namespace seqkern::device
