// The attending decoder with AVX-512: 64-byte vectors.
#include <immintrin.h>

#include "additive_table.h"
#include "decoder_table.h"
#include "types.h"

#if defined(__x86_64__)
// Everything below is compiled for this set alone; headers stay above, so that no function they
// share with other files can be emitted with these instructions.
// The intrinsics of GCC 12 pass an undefined vector where a mask makes it unread.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")

#define SK_SET avx512
#define SK_VBYTES 64
#define SK_ACC 24
#define SK_AVX512 1

#include "decoder_set.inl"

#pragma GCC pop_options

namespace seqkern {
const DecoderTable& decoder_avx512() { return avx512::kDecoderTable; }
}  // namespace seqkern
#endif
