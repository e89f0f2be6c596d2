// merge, norms, finish, pull: numbers per row on the CPU (numerics/finish.h over tensors).
#pragma once

#include <string>
#include <tuple>

#include "cpu/record.h"

namespace prefkern {

// fields [FIELDS, C, M] float or double, starts [C] int64 -> [FIELDS, M] double
Tensor merge(const Tensor& fields, const Tensor& starts, const std::string& plan, bool rounded);

// sums [FIELDS, M] double, top [2, M] double -> [NORMS, M] float, or double where `wide`
Tensor norms(const Tensor& sums, const OptTensor& top, bool wide);

// sums, at [AT, M], second [SECOND, M], top [2, M], teacher [N] (sum of its probabilities) double;
// targets [N] and rows [M] int64 -> (values [n, M] float or double, saved [SAVED, M] double)
std::tuple<Tensor, Tensor> finish(const Tensor& sums, const Tensor& at, const OptTensor& second,
                                  const OptTensor& top, const Tensor& targets,
                                  const OptTensor& rows, const OptTensor& teacher,
                                  int64_t ignore_index, int64_t vocabulary, const std::string& plan,
                                  bool rounded, bool wide);

// d_out, out [n, M] float or double, saved [SAVED, M] double -> [COEFFICIENTS, M] in out's dtype
Tensor pull(const Tensor& d_out, const Tensor& out, const Tensor& saved, const Tensor& targets,
            const OptTensor& rows, int64_t ignore_index, double slope, const std::string& plan);

// The same for a record, close together: what the plan pulls with, slot by slot. The tensor holds
// the numbers.
std::tuple<Tensor, Coefficients> pull_close(const Record& record, int64_t ignore_index,
                                            const Tensor& d_out, const Tensor& out,
                                            const Tensor& saved);

}  // namespace prefkern
