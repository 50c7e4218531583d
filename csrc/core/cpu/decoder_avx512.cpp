// The attending decoder with AVX-512.
#include <immintrin.h>

#include "additive_table.h"
#include "decoder_table.h"
#include "types.h"

#if defined(__x86_64__)
// clang-format off: in this order
#include "set_avx512.h"
#include "decoder_set.inl"
#include "set_end.h"
// clang-format on

namespace seqkern {
const DecoderTable& decoder_avx512() { return avx512::kDecoderTable; }
}  // namespace seqkern
#endif
