// The head ops on CPU: fold, fold_again, unfold.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "cpu/record.h"

namespace prefkern {

using Tensors = std::vector<Tensor>;
using Numbers = std::vector<double>;

Pool torch_pool();
void check_done(bool done);

// (sums [FIELDS, M], at [AT, M], cache [kept_models, kept, V], factors [f, M, depth + rank] or [0],
// top [2, 1 or k, M] or [0], chunks [tail_models, C, M] or [0])
using Folded = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
Folded fold(const Tensors& tensors, const Numbers& numbers, const std::string& plan,
            int64_t ignore_index, int64_t kept);
Folded run_fold(Record& record, int64_t kept);

// norms [NORMS, M] -> [SECOND, M]
Tensor fold_again(const Tensors& tensors, const Numbers& numbers, const std::string& plan,
                  int64_t ignore_index, const Tensor& norms, const Tensor& cache);
Tensor run_fold_again(Record& record, const Tensor& norms, const Tensor& cache);

// coefficients [COEFFICIENTS, M] -> gradients of the policy's tensors that `needed` names; with a
// tail of the units of active [C, M], rows of the head begin with spread [C, depth + rank + 1]
Tensors unfold(const Tensors& tensors, const Numbers& numbers, const std::string& plan,
               int64_t ignore_index, const Tensor& coefficients, const Tensor& cache,
               const std::string& needed, const OptTensor& active, const OptTensor& spread);
Tensors run_unfold(Record& record, const Coefficients& coefficients, const Tensor& cache,
                   const std::string& needed);

// All of a forward in one op: fold, the second sweep where the plan has one, finish; the factors of
// a frozen head are normalised. Refuses labels outside [0, V). (out [n, M], saved [SAVED, M],
// cache, factors, chunks)
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
Results forward(const Tensors& tensors, const Numbers& numbers, const std::string& plan,
                int64_t ignore_index, int64_t kept);

// All of a backward: pull and unfold, or what takes its place under a frozen head.
Tensors backward(const Tensors& tensors, const Numbers& numbers, const std::string& plan,
                 int64_t ignore_index, const Tensor& d_out, const Tensor& out, const Tensor& saved,
                 const Tensor& cache, const Tensor& factors, const std::string& needed);

// Nanoseconds per logit of the epilogue alone, see EpilogueTimes: [forward, with entropy, backward,
// with entropy].
Tensor bench_epilogue(const Tensor& like, int64_t rows, int64_t cols, int64_t repeats);

}  // namespace prefkern
