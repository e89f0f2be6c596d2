// list_rank and segment_sum on CUDA tensors; signatures as those of the native CPU ops.
#pragma once

#include <tuple>

#include "cuda/tensors.h"

namespace prefkern {

// scores and labels [S] float32 or float64 (labels NaN where masked), cu_groups [G+1] int32, topk
// [G] int64 or none -> (loss [G], d loss / d scores [S]). Boundaries are the caller's promise:
// reading them here would wait for the device.
std::tuple<Tensor, Tensor> cuda_list_rank(const Tensor& scores, const Tensor& labels,
                                          const Tensor& cu_groups, const OptTensor& topk,
                                          const std::string& family, const std::string& options);

// values [m, N], weights [N] or [m, N] or none, cu_seqlens [S+1] int32 -> [m, S] float64.
Tensor cuda_segment_sum(const Tensor& values, const OptTensor& weights, const Tensor& cu_seqlens);

// d_out [m, S] float64 -> (d_values [m, N] or [0], d_weights like weights or [0]).
std::tuple<Tensor, Tensor> cuda_segment_slopes(const Tensor& d_out, const Tensor& values,
                                               const OptTensor& weights, const Tensor& cu_seqlens,
                                               bool need_values, bool need_weights);

}  // namespace prefkern
