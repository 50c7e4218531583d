// From here to set_end.h, code is for AVX-512 alone: 64-byte vectors, 24 accumulators of 32
// registers. Headers stay above, so that no function they share with other files can be emitted
// with these instructions. No guard: a file includes it where its kernels begin.

// The intrinsics of GCC 12 pass an undefined vector where a mask makes it unread.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")

#define SK_SET avx512
#define SK_VBYTES 64
#define SK_ACC 24
#define SK_AVX512 1
