// Ops on tiles of logits: the kernels of prefkern/backends/tiled/epilogue.py, one op each.
//
// `numbers` are those of PARAMS there, `plan` is the text of a plan, `rounds_to` the code of the
// Dtype that a backward reads the policy's products rounded to (fp32: as they are).
#pragma once

#include <string>
#include <vector>

#include "cuda/tensors.h"

namespace prefkern {

void tile_fold(const Tensor& x, const OptTensor& xr, const OptTensor& xa, const OptTensor& adv,
               const OptTensor& bias, const OptTensor& ref_bias, const OptTensor& aux_bias,
               const Tensor& targets, const Tensor& fields, const Tensor& at, const OptTensor& keep,
               int64_t v0, int64_t chunk, int64_t ignore, bool small, int64_t rounds_to,
               const std::string& plan, const std::vector<double>& numbers);
void tile_fold_again(const Tensor& x, const Tensor& xr, const OptTensor& bias,
                     const OptTensor& ref_bias, const Tensor& targets, const Tensor& norms,
                     const Tensor& fields, int64_t v0, int64_t chunk, int64_t ignore,
                     const std::string& plan, const std::vector<double>& numbers);
// out [m, w] = the terms of FACTORS[which].
void tile_factor(const Tensor& x, const OptTensor& xr, const OptTensor& bias,
                 const OptTensor& ref_bias, const Tensor& targets, const Tensor& maxima,
                 const Tensor& out, int64_t v0, int64_t ignore, int64_t which,
                 const std::vector<double>& numbers);
// The fold of a tile, the maxima so far raised to its own, totals moved there (`moves`: there are
// any), out = the terms of the mass.
void tile_fold_frozen(const Tensor& x, const OptTensor& xr, const OptTensor& bias,
                      const OptTensor& ref_bias, const Tensor& targets, const Tensor& fields,
                      const Tensor& at, const Tensor& maxima, const Tensor& totals,
                      const Tensor& out, int64_t v0, int64_t chunk, int64_t ignore, bool small,
                      bool moves, bool log, bool gap, bool cross,
                      const std::vector<double>& numbers);
void tile_raise_rows(const Tensor& totals, const Tensor& shift, bool log, bool gap, bool cross);
// `rounds`: fp32 products are first rounded to dx's dtype.
void tile_gradient(const Tensor& x, const OptTensor& xr, const OptTensor& xa, const OptTensor& adv,
                   const OptTensor& bias, const OptTensor& ref_bias, const OptTensor& aux_bias,
                   const Tensor& targets, const Tensor& coefficients, const Tensor& dx, int64_t v0,
                   int64_t ignore, bool small, bool rounds, const std::vector<double>& numbers);

}  // namespace prefkern
