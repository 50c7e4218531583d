// As set_avx512.h, for every processor: 16-byte vectors of the baseline instruction set, no fused
// multiply-add.

#pragma GCC push_options

#define SK_SET portable
#define SK_VBYTES 16
#define SK_ACC 12
