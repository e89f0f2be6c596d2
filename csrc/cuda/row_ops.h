// merge, norms, finish, pull: numbers per row as ops, with the schemas of cpu/arithmetic.h.
#pragma once

#include <string>
#include <tuple>

#include "cuda/tensors.h"

namespace prefkern {

// fields [F, C, M] float or double, of which the plan's fields are there; starts [C] int64 ->
// [FIELDS, M] double
Tensor cuda_merge(const Tensor& fields, const Tensor& starts, const std::string& plan,
                  bool rounded);

// sums [FIELDS, M] double, top [2, M] double -> [NORMS, M] float, or double where `wide`
Tensor cuda_norms(const Tensor& sums, const OptTensor& top, bool wide);

// sums, at [AT, M], second [SECOND, M], top [2, M], teacher [N] double; targets [N] and rows [M]
// int64 -> (values [n, M] float or double, saved [SAVED, M] double)
std::tuple<Tensor, Tensor> cuda_finish(const Tensor& sums, const Tensor& at,
                                       const OptTensor& second, const OptTensor& top,
                                       const Tensor& targets, const OptTensor& rows,
                                       const OptTensor& teacher, int64_t ignore_index,
                                       int64_t vocabulary, const std::string& plan, bool rounded,
                                       bool wide);

// d_out, out [n, M] float or double, saved [SAVED, M] double -> [COEFFICIENTS, M] in out's dtype
Tensor cuda_pull(const Tensor& d_out, const Tensor& out, const Tensor& saved, const Tensor& targets,
                 const OptTensor& rows, int64_t ignore_index, double slope,
                 const std::string& plan);

}  // namespace prefkern
