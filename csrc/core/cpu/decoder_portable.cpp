// The attending decoder for every processor: 16-byte vectors of the baseline instruction set.
#include "additive_table.h"
#include "decoder_table.h"
#include "types.h"

#define SK_SET portable
#define SK_VBYTES 16
#define SK_ACC 12

#include "decoder_set.inl"

namespace seqkern {
const DecoderTable& decoder_portable() { return portable::kDecoderTable; }
}  // namespace seqkern
