// The memory in which a call works.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace seqkern {

// One aligned block. A small one is kept by its thread for the next call of any kernel, so a thread
// may hold one Arena at a time.
class Arena {
 public:
  explicit Arena(int64_t bytes) {
    static thread_local std::unique_ptr<char, decltype(&std::free)> kept(nullptr, &std::free);
    static thread_local int64_t kept_bytes = 0;
    if (bytes > kKept) {
      own_.reset(allocate(bytes));
      base_ = own_.get();
      return;
    }
    if (bytes > kept_bytes) {
      kept.reset();
      kept_bytes = 0;
      kept.reset(allocate(bytes));
      kept_bytes = bytes;
    }
    base_ = kept.get();
  }
  char* base() const { return base_; }

 private:
  static constexpr int64_t kKept = 16 << 20;
  static char* allocate(int64_t bytes) {
    void* p = std::aligned_alloc(4096, size_t((bytes + 4095) / 4096 * 4096));
    if (!p) throw std::bad_alloc();
    return static_cast<char*>(p);
  }
  std::unique_ptr<char, decltype(&std::free)> own_{nullptr, &std::free};
  char* base_ = nullptr;
};

}  // namespace seqkern
