// Products of a bound plan on one thread's memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <vector>

#include "plan_host.h"

namespace hg::plan {

class Lane {
 public:
  // Plan, constants and numbers are the bound plan's, and stay where they are.
  Lane(const Plan& plan, const std::vector<at::Tensor>& constants, const std::vector<double>& numbers);

  // v: where the parts of a vector are; out: where the product goes.
  void run(const std::vector<char*>& v, char* out);

 private:
  template <class Real>
  void run_as();
  void call(const Aten& aten);
  c10::IValue value(const Argument& a);
  at::Tensor tensor(const Argument& a);

  const Plan& plan_;
  const std::vector<at::Tensor>& constants_;
  const std::vector<double>& numbers_;
  at::Tensor arena_;
  std::vector<at::Tensor> dynamic_, views_;
  std::vector<void*> slots_;
};

}  // namespace hg::plan
