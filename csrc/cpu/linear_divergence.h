// linear_divergence on CPU: policy, reference and an optional third head in one sweep.
#pragma once

#include "cpu/head_op.h"

namespace prefkern {

Four linear_divergence_fwd(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                           const Tensor& ref_hidden, const Tensor& ref_weight,
                           const OptTensor& bias, const OptTensor& ref_bias,
                           const OptTensor& aux_hidden, const OptTensor& aux_weight,
                           const OptTensor& values, const OptTensor& values_index, double scale,
                           double ref_scale, std::optional<double> softcap,
                           std::optional<double> ref_softcap, double temperature,
                           double ref_temperature, int64_t ignore_index, const std::string& stats,
                           int64_t cache_rows, bool frozen);
Three linear_divergence_bwd(const Tensor& d_out, const Tensor& hidden, const Tensor& weight,
                            const Tensor& targets, const Tensor& ref_hidden,
                            const Tensor& ref_weight, const OptTensor& bias,
                            const OptTensor& ref_bias, const OptTensor& aux_hidden,
                            const OptTensor& aux_weight, const OptTensor& values,
                            const OptTensor& values_index, const Tensor& out, const Tensor& saved,
                            const Tensor& cache, const Tensor& rows, double scale, double ref_scale,
                            std::optional<double> softcap, std::optional<double> ref_softcap,
                            double temperature, double ref_temperature, int64_t ignore_index,
                            const std::string& stats, bool need_hidden, bool need_weight,
                            bool need_bias);

}  // namespace prefkern
