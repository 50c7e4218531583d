// For every processor: 16-byte vectors of the baseline instruction set, no fused multiply-add.
#include "table.h"
#include "types.h"

#define SK_SET portable
#define SK_VBYTES 16
#define SK_ACC 12

#include "every_type.inl"

namespace seqkern {
const KernelTable& table_portable() { return portable::kTable; }
}  // namespace seqkern
