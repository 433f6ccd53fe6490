// A matrix product by matrix units on one thread, for those that share the work.
#pragma once

#include "panel_gemm.h"

namespace hg::cpu {

// Whether there are matrix units, and packing is little of the work of such a product.
bool split_suits(int64_t rows, int64_t columns, int64_t depth);

// Whether they are faster: rows or columns of the factors have to be dense besides.
bool split_suits(const Part<float>& part);

void multiply_split(const Part<float>& part);

}  // namespace hg::cpu
