// error_sum on CPU: prediction errors reduced per sample and segment, in float64.
#pragma once

#include <optional>
#include <string>

#include <torch/csrc/stable/tensor.h>

namespace prefkern {

// pred, target, ref [B, O, F, I], segments [F] int32 (negative: left out) or none; stats are names
// joined by commas -> [n, B, num_segments] float64.
torch::stable::Tensor error_sum_fwd(const torch::stable::Tensor& pred,
                                    const torch::stable::Tensor& target,
                                    const std::optional<torch::stable::Tensor>& ref,
                                    const std::optional<torch::stable::Tensor>& segments,
                                    int64_t num_segments, const std::string& stats);

// d_out [n, B, num_segments] float64 -> d_pred like pred.
torch::stable::Tensor error_sum_bwd(const torch::stable::Tensor& d_out,
                                    const torch::stable::Tensor& pred,
                                    const torch::stable::Tensor& target,
                                    const std::optional<torch::stable::Tensor>& ref,
                                    const std::optional<torch::stable::Tensor>& segments,
                                    const std::string& stats);

}  // namespace prefkern
