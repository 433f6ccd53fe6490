// Uninitialised memory that starts at a cache line. A thread keeps a few large pieces that it gave back: an allocator
// returns such pieces to the system, which would hand them out again page by page, at the cost of a small product.
#pragma once

#include <cstdint>
#include <new>
#include <utility>

namespace hg::cpu {

class Memory {
 public:
  explicit Memory(int64_t bytes);
  Memory& operator=(Memory&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Memory();

  void* get() const { return data_; }

 private:
  static constexpr std::align_val_t kLine{64};
  static constexpr int64_t kLeast = 256 << 10;
#if defined(__SANITIZE_ADDRESS__)
  // None: the sanitizer shall see who uses memory that was given back, or more than was asked for.
  static constexpr int64_t kMost = 0;
#else
  static constexpr int64_t kMost = 32 << 20;
#endif

  struct Kept;

  Memory() = default;
  void swap(Memory& other) { std::swap(data_, other.data_), std::swap(bytes_, other.bytes_); }
  static Kept& kept();
  static bool& ending() {
    static thread_local bool is = false;
    return is;
  }

  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

// What a thread keeps until it ends.
struct Memory::Kept {
  Memory pieces[4];
  ~Kept() { ending() = true; }
};

inline Memory::Kept& Memory::kept() {
  static thread_local Kept kept;
  return kept;
}

inline Memory::Memory(int64_t bytes) {
  if (bytes >= kLeast && !ending())
    for (Memory& piece : kept().pieces)
      if (piece.bytes_ >= bytes && piece.bytes_ / 4 <= bytes) {
        swap(piece);
        return;
      }
  data_ = ::operator new(bytes, kLine), bytes_ = bytes;
}

inline Memory::~Memory() {
  // In place of a smaller one, which is released instead.
  if (bytes_ >= kLeast && bytes_ <= kMost && !ending())
    for (Memory& piece : kept().pieces)
      if (piece.bytes_ < bytes_) swap(piece);
  ::operator delete(data_, kLine);
}

template <class Real>
class Buffer {
 public:
  explicit Buffer(int64_t size) : memory_(size * static_cast<int64_t>(sizeof(Real))) {}
  Real* get() const { return static_cast<Real*>(memory_.get()); }

 private:
  Memory memory_;
};

}  // namespace hg::cpu
