// The attending decoder with AVX2 and FMA: 32-byte vectors.
#include "additive_table.h"
#include "decoder_table.h"
#include "types.h"

#if defined(__x86_64__)
// Everything below is compiled for this set alone; headers stay above, so that no function they
// share with other files can be emitted with these instructions.
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,prefer-vector-width=256")

#define SK_SET avx2
#define SK_VBYTES 32
#define SK_ACC 12

#include "decoder_set.inl"

#pragma GCC pop_options

namespace seqkern {
const DecoderTable& decoder_avx2() { return avx2::kDecoderTable; }
}  // namespace seqkern
#endif
