// Ops on tiles of logits: the kernels of prefkern/backends/tiled/epilogue.py, one op each, and logits_logps.
//
// `numbers` are those of PARAMS there: factor, top, ref_factor, ref_top, slope, alpha, renyi, mix,
// jsd. `stats` are comma-joined statistic names. `working` is the code of a Dtype.
#pragma once

#include <tuple>
#include <vector>

#include "cuda/tensors.h"

namespace prefkern {

void tile_fold(const Tensor& z, const OptTensor& zr, const OptTensor& za, const OptTensor& adv,
               const OptTensor& bias, const OptTensor& ref_bias, const Tensor& targets,
               const Tensor& fields, const Tensor& at_target, const OptTensor& keep,
               const OptTensor& ref_keep, int64_t v0, int64_t chunk, bool small, bool rounds,
               int64_t working, const std::string& stats, const std::vector<double>& numbers);
void tile_second(const Tensor& z, const Tensor& zr, const OptTensor& bias,
                 const OptTensor& ref_bias, const Tensor& targets, const Tensor& norms,
                 const Tensor& fields, int64_t v0, int64_t chunk, int64_t working,
                 const std::string& stats, const std::vector<double>& numbers);
void tile_seen(const Tensor& zr, const OptTensor& ref_bias, const Tensor& out, int64_t v0,
               int64_t working, const std::vector<double>& numbers);
void tile_factors(const Tensor& z, const OptTensor& zr, const OptTensor& bias,
                  const OptTensor& ref_bias, const Tensor& targets, const Tensor& maxima,
                  const OptTensor& mass, const OptTensor& log, const OptTensor& ref,
                  const OptTensor& cross, int64_t v0, const std::vector<double>& numbers);
void tile_raise_rows(const Tensor& totals, const Tensor& shift, bool log, bool ref, bool cross);
void tile_gradient(const Tensor& z, const OptTensor& zr, const OptTensor& za, const OptTensor& adv,
                   const OptTensor& bias, const OptTensor& ref_bias, const Tensor& targets,
                   const Tensor& coefficients, const Tensor& dx, int64_t v0, bool small,
                   const std::vector<double>& numbers);

// `top` [2, N]: threshold and index of bkl's top set, where asked for.
std::tuple<Tensor, Tensor> logits_fwd(const Tensor& logits, const Tensor& targets,
                                      const OptTensor& ref_logits, const OptTensor& top,
                                      double temperature, int64_t ignore_index,
                                      const std::string& stats);
Tensor logits_bwd(const Tensor& d_out, const Tensor& logits, const Tensor& targets,
                  const OptTensor& ref_logits, const Tensor& out, const Tensor& saved,
                  double temperature, int64_t ignore_index, const std::string& stats);

}  // namespace prefkern
