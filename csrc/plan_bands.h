// Kernels that threads run without waiting for each other: whole runs of them by rows, or independent ones.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "plan.h"

namespace hg::plan {

int64_t elements(const std::vector<int64_t>& sizes);

// Of one run, roughly; a multiplication with its addition is one.
int64_t operations(const Kernel& kernel);

// Operations that a thread should have at least.
constexpr int64_t kGrain = 1 << 17;

// Kernels of which none mixes `rows` of what others write, so that every thread runs all of them for a band of rows.
class Bands {
 public:
  Bands(int64_t rows, std::vector<Kernel> kernels);

  int64_t rows() const { return rows_; }
  int64_t operations() const { return operations_; }
  const std::vector<Kernel>& kernels() const { return kernels_; }
  // The kernels on each of so many bands; made once.
  const std::vector<std::vector<Kernel>>& in(int64_t bands) const;

 private:
  struct Known {
    std::mutex mutex;
    std::map<int64_t, std::vector<std::vector<Kernel>>> bands;
  };

  int64_t rows_, operations_ = 0;
  std::vector<Kernel> kernels_;
  std::unique_ptr<Known> known_ = std::make_unique<Known>();
};

// Kernels that are independent of each other, each too small to be shared.
struct Tasks {
  explicit Tasks(std::vector<Kernel> kernels);

  std::vector<Kernel> kernels;
  int64_t operations = 0;
};

}  // namespace hg::plan
