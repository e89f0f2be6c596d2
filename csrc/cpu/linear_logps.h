// linear_logps on CPU: one model, statistics from hidden states and the head.
#pragma once

#include "cpu/head_op.h"

namespace prefkern {

Four linear_logps_fwd(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                      const OptTensor& bias, double scale, std::optional<double> softcap,
                      double temperature, int64_t ignore_index, const std::string& stats,
                      int64_t cache_rows, bool frozen);
Three linear_logps_bwd(const Tensor& d_out, const Tensor& hidden, const Tensor& weight,
                       const Tensor& targets, const OptTensor& bias, const Tensor& out,
                       const Tensor& saved, const Tensor& cache, const Tensor& rows, double scale,
                       std::optional<double> softcap, double temperature, int64_t ignore_index,
                       const std::string& stats, bool need_hidden, bool need_weight,
                       bool need_bias);

}  // namespace prefkern
