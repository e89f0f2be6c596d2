// logits_logps on CPU: the statistics where logits already exist.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/tensor.h>

namespace prefkern {

std::tuple<torch::stable::Tensor, torch::stable::Tensor> logits_logps_fwd(
    const torch::stable::Tensor& logits, const torch::stable::Tensor& targets,
    const std::optional<torch::stable::Tensor>& ref_logits, double temperature,
    int64_t ignore_index, const std::string& stats);

torch::stable::Tensor logits_logps_bwd(const torch::stable::Tensor& d_out,
                                       const torch::stable::Tensor& logits,
                                       const torch::stable::Tensor& targets,
                                       const std::optional<torch::stable::Tensor>& ref_logits,
                                       const torch::stable::Tensor& out,
                                       const torch::stable::Tensor& saved, double temperature,
                                       int64_t ignore_index, const std::string& stats);

// Nanoseconds per logit of the epilogue alone, see EpilogueTimes: [forward, with entropy, backward,
// with entropy].
torch::stable::Tensor bench_epilogue(const torch::stable::Tensor& like, int64_t rows, int64_t cols,
                                     int64_t repeats);

}  // namespace prefkern
