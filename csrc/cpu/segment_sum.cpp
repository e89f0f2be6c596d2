#include "cpu/segment_sum.h"

#include <algorithm>
#include <cstdint>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace prefkern {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Below this many elements a second thread costs more than it saves (about 10 us of work).
constexpr int64_t kGrain = 16384;

// One call's arguments as raw numbers. A stride of 0 reads one row of weights for every statistic.
struct Problem {
  int64_t m = 0, n = 0, s = 0;
  const int32_t* cu = nullptr;
  int64_t weight_stride = 0;
  bool has_weights = false;
};

bool is_float(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float;
}

void check_values(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU; move it with .cpu().");
  STD_TORCH_CHECK(is_float(t) || t.scalar_type() == ScalarType::Double, name,
                  " must be float32 or float64; cast it first.");
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous; call .contiguous() first.");
}

Problem check_problem(const Tensor& values, const std::optional<Tensor>& weights,
                      const Tensor& cu_seqlens) {
  check_values(values, "values");
  STD_TORCH_CHECK(values.dim() == 2, "values must be [m, N], got ", values.dim(),
                  " dimensions; stack the statistics as rows.");
  STD_TORCH_CHECK(cu_seqlens.is_cpu() && cu_seqlens.scalar_type() == ScalarType::Int &&
                      cu_seqlens.dim() == 1 && cu_seqlens.numel() >= 1 &&
                      cu_seqlens.is_contiguous(),
                  "cu_seqlens must be a contiguous int32 tensor [S+1] on the CPU.");
  Problem p;
  p.m = values.size(0);
  p.n = values.size(1);
  p.s = cu_seqlens.numel() - 1;
  p.cu = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  STD_TORCH_CHECK(p.cu[0] == 0 && p.cu[p.s] == p.n,
                  "cu_seqlens must start at 0 and end at N = ", p.n, ", got ", p.cu[0], " ... ",
                  p.cu[p.s], ".");
  for (int64_t i = 0; i < p.s; ++i) {
    STD_TORCH_CHECK(p.cu[i] <= p.cu[i + 1], "cu_seqlens must never decrease, got ", p.cu[i],
                    " then ", p.cu[i + 1], " at position ", i, ".");
  }
  if (weights.has_value()) {
    check_values(*weights, "weights");
    p.has_weights = true;
    const bool shared = weights->dim() == 1 && weights->size(0) == p.n;
    const bool each = weights->dim() == 2 && weights->size(0) == p.m && weights->size(1) == p.n;
    STD_TORCH_CHECK(shared || each, "weights must be [N] = [", p.n, "] or [m, N] = [", p.m, ", ",
                    p.n, "] to match values.");
    p.weight_stride = each ? p.n : 0;
  }
  return p;
}

// Four partial sums in a fixed order: fast, and the same bits for any number of threads.
template <class Term>
double sum_range(int64_t begin, int64_t end, const Term& term) {
  double part[4] = {0.0, 0.0, 0.0, 0.0};
  int64_t i = begin;
  for (; i + 4 <= end; i += 4) {
    for (int64_t k = 0; k < 4; ++k) part[k] += term(i + k);
  }
  for (; i < end; ++i) part[0] += term(i);
  return (part[0] + part[1]) + (part[2] + part[3]);
}

template <class V, class W>
void forward(const Problem& p, const V* values, const W* weights, double* out) {
  // One (statistic, sequence) sum belongs to one thread.
  const int64_t mean_length = p.n / std::max<int64_t>(p.s, 1) + 1;
  const int64_t grain = std::max<int64_t>(1, kGrain / mean_length);
  torch::stable::parallel_for(0, p.m * p.s, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / p.s, seq = item % p.s;
      const V* v = values + row * p.n;
      if (p.has_weights) {
        const W* w = weights + row * p.weight_stride;
        out[item] = sum_range(p.cu[seq], p.cu[seq + 1], [&](int64_t i) {
          return w[i] == W(0) ? 0.0 : double(v[i]) * double(w[i]);  // weight 0 hides any value
        });
      } else {
        out[item] = sum_range(p.cu[seq], p.cu[seq + 1], [&](int64_t i) { return double(v[i]); });
      }
    }
  });
}

template <class V, class W>
void backward(const Problem& p, const double* d_out, const V* values, const W* weights, V* d_values,
              W* d_weights) {
  // Tokens are split among threads, so that one long sequence is shared too; a token's gradient is
  // written by one thread.
  torch::stable::parallel_for(0, p.n, kGrain, [&](int64_t begin, int64_t end) {
    // The last sequence that starts at or before `begin`; empty ones before it are stepped over.
    int64_t seq = std::upper_bound(p.cu, p.cu + p.s + 1, begin) - p.cu - 1;
    for (int64_t i = begin; i < end; ++i) {
      while (p.cu[seq + 1] <= i) ++seq;
      double shared = 0.0;  // gradient of a weight that serves every statistic
      for (int64_t row = 0; row < p.m; ++row) {
        const double d = d_out[row * p.s + seq];
        if (d_values != nullptr) {
          const double w = p.has_weights ? double(weights[row * p.weight_stride + i]) : 1.0;
          d_values[row * p.n + i] = V(d * w);
        }
        if (d_weights != nullptr) {
          const double grad = d == 0.0 ? 0.0 : d * double(values[row * p.n + i]);
          if (p.weight_stride != 0) {
            d_weights[row * p.n + i] = W(grad);
          } else {
            shared += grad;
          }
        }
      }
      if (d_weights != nullptr && p.weight_stride == 0) d_weights[i] = W(shared);
    }
  });
}

// Calls body(V{}, W{}) with the element types of values and weights.
template <class Body>
void dispatch(const Tensor& values, const std::optional<Tensor>& weights, const Body& body) {
  const bool v32 = is_float(values);
  const bool w32 = weights.has_value() ? is_float(*weights) : v32;
  if (v32 && w32) return body(float{}, float{});
  if (v32) return body(float{}, double{});
  if (w32) return body(double{}, float{});
  return body(double{}, double{});
}

}  // namespace

Tensor segment_sum_fwd(const Tensor& values, const std::optional<Tensor>& weights,
                       const Tensor& cu_seqlens) {
  const Problem p = check_problem(values, weights, cu_seqlens);
  Tensor out = torch::stable::new_empty(values, {p.m, p.s}, ScalarType::Double);
  dispatch(values, weights, [&](auto v, auto w) {
    using V = decltype(v);
    using W = decltype(w);
    forward<V, W>(p, static_cast<const V*>(values.const_data_ptr()),
                  p.has_weights ? static_cast<const W*>(weights->const_data_ptr()) : nullptr,
                  static_cast<double*>(out.mutable_data_ptr()));
  });
  return out;
}

std::tuple<Tensor, Tensor> segment_sum_bwd(const Tensor& d_out, const Tensor& values,
                                           const std::optional<Tensor>& weights,
                                           const Tensor& cu_seqlens, bool need_values,
                                           bool need_weights) {
  const Problem p = check_problem(values, weights, cu_seqlens);
  check_values(d_out, "d_out");
  STD_TORCH_CHECK(d_out.scalar_type() == ScalarType::Double && d_out.dim() == 2 &&
                      d_out.size(0) == p.m && d_out.size(1) == p.s,
                  "d_out must be float64 [m, S] = [", p.m, ", ", p.s, "].");
  STD_TORCH_CHECK(p.has_weights || !need_weights,
                  "a gradient for weights was asked for, but no weights were given.");
  Tensor d_values =
      need_values ? torch::stable::empty_like(values) : torch::stable::new_empty(values, {0});
  Tensor d_weights = need_weights
                         ? torch::stable::empty_like(*weights)
                         : torch::stable::new_empty(p.has_weights ? *weights : values, {0});
  dispatch(values, weights, [&](auto v, auto w) {
    using V = decltype(v);
    using W = decltype(w);
    backward<V, W>(p, static_cast<const double*>(d_out.const_data_ptr()),
                   static_cast<const V*>(values.const_data_ptr()),
                   p.has_weights ? static_cast<const W*>(weights->const_data_ptr()) : nullptr,
                   need_values ? static_cast<V*>(d_values.mutable_data_ptr()) : nullptr,
                   need_weights ? static_cast<W*>(d_weights.mutable_data_ptr()) : nullptr);
  });
  return {d_values, d_weights};
}

}  // namespace prefkern
