// The recurrent kernels with AVX2 and FMA.
#include "table.h"
#include "types.h"

#if defined(__x86_64__)
// clang-format off: in this order
#include "set_avx2.h"
#include "every_type.inl"
#include "set_end.h"
// clang-format on

namespace seqkern {
const KernelTable& table_avx2() { return avx2::kTable; }
}  // namespace seqkern
#endif
