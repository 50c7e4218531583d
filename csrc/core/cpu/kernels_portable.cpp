// The recurrent kernels on every processor.
#include "table.h"
#include "types.h"

// clang-format off: in this order
#include "set_portable.h"
#include "every_type.inl"
#include "set_end.h"
// clang-format on

namespace seqkern {
const KernelTable& table_portable() { return portable::kTable; }
}  // namespace seqkern
