// The recurrent kernels with AVX-512.
#include <immintrin.h>

#include "table.h"
#include "types.h"

#if defined(__x86_64__)
// clang-format off: in this order
#include "set_avx512.h"
#include "every_type.inl"
#include "set_end.h"
// clang-format on

namespace seqkern {
const KernelTable& table_avx512() { return avx512::kTable; }
}  // namespace seqkern
#endif
