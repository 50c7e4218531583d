// Additive attention on every processor.
#include "additive_table.h"
#include "types.h"

// clang-format off: in this order
#include "set_portable.h"
#include "additive_set.inl"
#include "set_end.h"
// clang-format on

namespace seqkern {
const AdditiveTable& additive_portable() { return portable::kAdditiveTable; }
}  // namespace seqkern
