// From run-time dtypes and instruction set to the compiled body.
#pragma once

#include "half.h"
#include "isa.h"
#include "lanes.h"
#include "list_loop.h"

namespace hg::cpu {

// The function for a state dtype and a product dtype; the host function has checked the pair.
template <template <class, class> class Body, class... Args>
auto for_dtypes(DType state, DType product) -> void (*)(Args...) {
  if (state == DType::f64) return ForIsa<Body<double, double>, Args...>::get();
  if (product == DType::bf16) return ForIsa<Body<float, BFloat16>, Args...>::get();
  if (product == DType::f16) return ForIsa<Body<float, Float16>, Args...>::get();
  return ForIsa<Body<float, float>, Args...>::get();
}

}  // namespace hg::cpu
