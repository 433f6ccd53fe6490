// Uninitialised memory that starts at a cache line.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace hg::cpu {

template <class Real>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(static_cast<Real*>(::operator new(size * sizeof(Real), kLine))) {}
  Real* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(Real* data) const { ::operator delete(data, kLine); }
  };
  std::unique_ptr<Real, Free> data_;
};

}  // namespace hg::cpu
