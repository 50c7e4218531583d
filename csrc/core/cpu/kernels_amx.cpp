// AMX: bf16 by tiles.
#include <immintrin.h>

#include "table.h"
#include "types.h"

#if defined(__x86_64__)
// See set_avx512.h for why the headers stay above.
// The intrinsics of GCC 12 pass an undefined vector where a mask makes it unread.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512,amx-tile,amx-bf16")

#define SK_SET amx
#define SK_VBYTES 64
#define SK_ACC 24
#define SK_AVX512 1
#define SK_AMX 1

#include "only_bf16.inl"

#include "set_end.h"

namespace seqkern {
const KernelTable& table_amx() { return amx::kTable; }
}  // namespace seqkern
#endif
