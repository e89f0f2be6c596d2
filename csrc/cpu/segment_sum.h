// segment_sum on CPU: weighted sums over the tokens of each sequence, in float64.
#pragma once

#include <optional>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

namespace prefkern {

// values [m, N], weights [N] or [m, N] or none, cu_seqlens [S+1] int32 -> [m, S] float64.
torch::stable::Tensor segment_sum_fwd(const torch::stable::Tensor& values,
                                      const std::optional<torch::stable::Tensor>& weights,
                                      const torch::stable::Tensor& cu_seqlens);

// d_out [m, S] float64 -> (d_values [m, N] or [0], d_weights like weights or [0]).
std::tuple<torch::stable::Tensor, torch::stable::Tensor> segment_sum_bwd(
    const torch::stable::Tensor& d_out, const torch::stable::Tensor& values,
    const std::optional<torch::stable::Tensor>& weights, const torch::stable::Tensor& cu_seqlens,
    bool need_values, bool need_weights);

}  // namespace prefkern
