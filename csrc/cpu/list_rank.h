// list_rank on CPU: ranking losses of ragged groups and their derivatives.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

namespace prefkern {

// scores and labels [S] float32 or float64 (labels NaN where masked), cu_groups [G+1] int32, topk
// [G] int64 or none; options as prefkern.backends.list_options.pack writes them -> (loss [G], d
// loss / d scores [S]).
std::tuple<torch::stable::Tensor, torch::stable::Tensor> list_rank_fwd(
    const torch::stable::Tensor& scores, const torch::stable::Tensor& labels,
    const torch::stable::Tensor& cu_groups, const std::optional<torch::stable::Tensor>& topk,
    const std::string& family, const std::string& options);

}  // namespace prefkern
