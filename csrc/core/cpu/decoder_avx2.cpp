// The attending decoder with AVX2 and FMA.
#include "additive_table.h"
#include "decoder_table.h"
#include "types.h"

#if defined(__x86_64__)
// clang-format off: in this order
#include "set_avx2.h"
#include "decoder_set.inl"
#include "set_end.h"
// clang-format on

namespace seqkern {
const DecoderTable& decoder_avx2() { return avx2::kDecoderTable; }
}  // namespace seqkern
#endif
