// The record of a call (prefkern/backends/contract.py): tensors, numbers and the text of a plan ->
// HeadCall, with everything checked that kernels index by.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "cpu/kernels.h"
#include "stat_parse.h"

namespace prefkern {

using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

// A HeadCall and what it points to.
struct Record {
  HeadCall call;
  PlanText plan;
  std::vector<int64_t> live;
  std::vector<int64_t> picked, picked_at;
  const Tensor* tensor[kInputs] = {};  // null where the call has none

  // `tensors` must outlive it.
  Record(const std::vector<Tensor>& tensors, const std::vector<double>& numbers,
         const std::string& plan, int64_t ignore_index);
  Record(const Record&) = delete;
  Record& operator=(const Record&) = delete;

  const Tensor& operator[](Input k) const { return *tensor[int(k)]; }
  bool has(Input k) const { return tensor[int(k)] != nullptr; }
  // Units of a backward: active [C, M] bool, spread [C, depth + rank + 1] or none.
  void pick(const Tensor& active, const OptTensor& spread);
  // What new tensors are made like.
  const Tensor& like() const { return *tensor[int(Input::targets)]; }
  bool wide() const { return call.working == Dtype::f64; }  // fold type float64
  int64_t depth() const { return call.model[0].depth + call.model[0].rank; }

 private:
  void take(const std::vector<Tensor>& tensors);
  void read_model(int i, const std::vector<double>& numbers);
  void read_values();
  void find_live(int64_t ignore_index);
  void check_stats() const;
};

// targets [N] and rows [M] int64, checked: kernels read targets[rows[i]].
void check_rows(const Tensor& targets, const OptTensor& rows);

}  // namespace prefkern
