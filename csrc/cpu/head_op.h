// From tensors to HeadCall: what linear_logps and linear_divergence share.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

#include "cpu/kernels.h"
#include "stat_parse.h"

namespace prefkern {

using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // out, saved, cache, rows
using Three = std::tuple<Tensor, Tensor, Tensor>;         // d_hidden, d_weight, d_bias

Pool torch_pool();
Tensor empty_stats(const Tensor& like,
                   std::initializer_list<int64_t> sizes);  // fp32, fp64 for fp64
Head make_head(const Tensor& hidden, const Tensor& weight, const OptTensor& bias, int64_t vocab,
               double scale, std::optional<double> softcap, double temperature, const char* prefix);
void check_same_dtype(const Tensor& t, const char* name, const Tensor& like);
void check_done(bool done);

// Both directions of either op. `call` holds heads, targets, options; `models` is 1 or 2.
Four run_forward(HeadCall& call, const Tensor& hidden, const Tensor& targets,
                 const std::string& stats, int64_t cache_rows, bool frozen, int models);
struct Kept {
  Tensor d_out, out, saved, cache, rows;
};
Three run_backward(HeadCall& call, const Kept& kept, const Tensor& hidden, const Tensor& weight,
                   const OptTensor& bias, const Tensor& targets, const std::string& stats,
                   bool need_hidden, bool need_weight, bool need_bias, int models);

}  // namespace prefkern
