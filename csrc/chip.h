// What plans of kernels are made of: the chip, what not to use of it, and the plan with its reason. Torch-free.
#pragma once

#include <cstdlib>
#include <string>

namespace hg {

// What there is of a CUDA device; capability: 90 for 9.0.
struct Chip {
  int multiprocessors, shared_per_block, shared_per_multiprocessor, cooperative, capability;
};

// How an op runs, and why.
struct Plan {
  std::string path, reason;
};

// Whether HYPERGRAD_EXT_CUDA_WITHOUT, a list with commas, names this path: for measurements of one path against
// another, and for tests of the other.
inline bool without(const std::string& path) {
  const char* text = std::getenv("HYPERGRAD_EXT_CUDA_WITHOUT");
  return text && ("," + std::string(text) + ",").find("," + path + ",") != std::string::npos;
}

}  // namespace hg
