// The attending decoder on every processor.
#include "additive_table.h"
#include "decoder_table.h"
#include "types.h"

// clang-format off: in this order
#include "set_portable.h"
#include "decoder_set.inl"
#include "set_end.h"
// clang-format on

namespace seqkern {
const DecoderTable& decoder_portable() { return portable::kDecoderTable; }
}  // namespace seqkern
