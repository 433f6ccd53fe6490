// The barriers of one block at which bulk copies arrive. A copy comes as late as the rules allow: when somebody waits
// for its phase. Who reads before reads what was there before.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace hg::emulator {

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

// Functions that can fail return what is wrong, or nothing.
class BulkBarriers {
 public:
  void clear() { barriers_.clear(); }

  std::string init(const void* barrier) {
    if (reinterpret_cast<uintptr_t>(barrier) % 8 != 0) return "a barrier for bulk copies is not aligned to 8 bytes";
    return barriers_.emplace(barrier, Barrier{}).second ? "" : "a barrier for bulk copies is made twice";
  }

  std::string expect(const void* barrier, size_t bytes) {
    const auto at = barriers_.find(barrier);
    if (at == barriers_.end()) return kNone;
    if (bytes >= size_t{1} << 20) return "a barrier for bulk copies counts less than 1 MiB";
    if (at->second.armed) return "a barrier for bulk copies is armed before anybody has waited for its phase";
    at->second.armed = true, at->second.expected = bytes;
    return "";
  }

  std::string copy(const Copy& copy, const void* barrier) {
    const auto at = barriers_.find(barrier);
    if (at == barriers_.end()) return kNone;
    const auto low = reinterpret_cast<uintptr_t>(copy.to) | reinterpret_cast<uintptr_t>(copy.from) | copy.bytes;
    if (low % 16 != 0 || copy.bytes == 0)
      return "a bulk copy of " + std::to_string(copy.bytes) + " bytes is not aligned to 16, or empty";
    at->second.sent += copy.bytes;
    at->second.copies.push_back(copy);
    return "";
  }

  // Whether the phase is over; ends it if it can be. Waiting for what comes after the next phase is a fault that the
  // chip would not notice: parities are alike.
  std::string try_wait(const void* barrier, unsigned parity, bool& over) {
    const auto at = barriers_.find(barrier);
    if (at == barriers_.end()) return kNone;
    Barrier& b = at->second;
    if (b.sent > b.expected && b.armed)
      return "a barrier for bulk copies expects " + std::to_string(b.expected) + " bytes, and more are sent";
    if (b.phase == parity && b.armed && b.sent == b.expected) {
      for (const Copy& c : b.copies) std::memcpy(c.to, c.from, c.bytes);
      b = Barrier{};
      b.phase = parity ^ 1;
    }
    over = b.phase != parity;
    return "";
  }

  // The block's memory is about to go.
  std::string end() const {
    for (const auto& [at, b] : barriers_)
      if (b.armed || b.sent > 0) return "a block ends with bulk copies under way";
    return "";
  }

 private:
  struct Barrier {
    unsigned phase = 0;
    bool armed = false;
    size_t expected = 0, sent = 0;
    std::vector<Copy> copies;
  };
  static constexpr const char* kNone = "no barrier for bulk copies has been made here";

  std::map<const void*, Barrier> barriers_;
};

}  // namespace hg::emulator
