// Storage types without arithmetic, and what every instruction set's file needs before its pragma.
#pragma once
#include <cstddef>
#include <cstdint>

namespace seqkern {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct tf32 {
  uint32_t bits;  // of a float
};

}  // namespace seqkern
