// Additive attention with AVX-512.
#include <immintrin.h>

#include "additive_table.h"
#include "types.h"

#if defined(__x86_64__)
// clang-format off: in this order
#include "set_avx512.h"
#include "additive_set.inl"
#include "set_end.h"
// clang-format on

namespace seqkern {
const AdditiveTable& additive_avx512() { return avx512::kAdditiveTable; }
}  // namespace seqkern
#endif
