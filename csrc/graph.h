// What a backward pass through a retained gradient graph depends on, found without making it: engines/linked.py.
#pragma once

#include <ATen/DimVector.h>
#include <ATen/core/Tensor.h>

#include <functional>
#include <string>
#include <tuple>
#include <vector>

namespace hg::plan {

// Where a tensor is and how it is laid out: tensors of equal place are the same numbers.
using Place = std::tuple<const void*, at::ScalarType, std::vector<int64_t>, std::vector<int64_t>>;
Place place_of(const at::Tensor& t);

// How often it was written to, as far as that is counted.
int64_t version_of(const at::Tensor& t);

// Dense numbers on the CPU, without a meaning of their own (no subclass, no transform, no lazy conjugate).
bool plain(const at::Tensor& t);

// Appends to a key.
void put(std::string& key, int64_t value);
void put_layout(std::string& key, const at::Tensor& t);

// A graph as torch's compiled autograd would see it: every node with all of its state.
struct Graph {
  // Seeds: what passes begin with.
  Graph(const std::vector<at::Tensor>& outputs, const std::vector<at::Tensor>& leaves,
        const std::vector<at::Tensor>& seeds = {});

  // Equal for two graphs if and only if passes from `outputs` to `leaves` make the same ops, as far as no op's result
  // decides about others, on saved tensors of the same layouts, the same ones at the same places in the graph.
  std::string key;
  std::vector<at::Tensor> tensors;  // that its nodes have saved, in an order that the key decides, and seeds
  std::string refusal;              // why there is no key

  // Whether it is as it was when it was looked at: nothing that it has saved was written to, and no node got hooks.
  bool current() const;

 private:
  void look(const std::vector<at::Tensor>& outputs, const std::vector<at::Tensor>& leaves,
            const std::vector<at::Tensor>& seeds);

  std::vector<int64_t> versions_;        // of tensors
  std::function<bool()> without_hooks_;  // looks at the nodes again
};

}  // namespace hg::plan
