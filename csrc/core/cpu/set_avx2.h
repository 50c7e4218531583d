// As set_avx512.h, for AVX2 with FMA: 32-byte vectors, 12 accumulators of 16 registers.

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,prefer-vector-width=256")

#define SK_SET avx2
#define SK_VBYTES 32
#define SK_ACC 12
