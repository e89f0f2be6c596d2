#include "cuda/list_ops.h"

#include "cuda/list_rank.h"
#include "cuda/segment_sum.h"
#include "list_parse.h"

namespace prefkern {
namespace {

bool is_double(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double,
                  name, " must be float32 or float64; cast it first.");
  return t.scalar_type() == ScalarType::Double;
}

// Boundaries [n + 1]; their number of pieces n.
int64_t pieces(const Tensor& cu, const char* name) {
  check_dense(cu, name, {-1});
  check_type(cu, name, ScalarType::Int, "int32");
  STD_TORCH_CHECK(cu.size(0) >= 1, name, " must have at least one entry, got none.");
  return cu.size(0) - 1;
}

SegmentArgs segment_args(const Tensor& values, const OptTensor& weights, const Tensor& cu_seqlens) {
  SegmentArgs a;
  check_dense(values, "values", {-1, -1});
  a.m = values.size(0), a.n = values.size(1);
  a.doubles = is_double(values, "values");
  a.values = values.const_data_ptr();
  a.s = pieces(cu_seqlens, "cu_seqlens");
  a.cu = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  if (weights.has_value()) {
    a.weights_per_row = weights->dim() == 2;
    a.weights_per_row ? check_dense(*weights, "weights", {a.m, a.n})
                      : check_dense(*weights, "weights", {a.n});
    a.weight_doubles = is_double(*weights, "weights");
    a.weights = weights->const_data_ptr();
  }
  return a;
}

}  // namespace

std::tuple<Tensor, Tensor> cuda_list_rank(const Tensor& scores, const Tensor& labels,
                                          const Tensor& cu_groups, const OptTensor& topk,
                                          const std::string& family, const std::string& options) {
  ListArgs a;
  check_dense(scores, "scores", {-1});
  a.items = scores.size(0);
  a.doubles = is_double(scores, "scores");
  check_dense(labels, "labels", {a.items});
  STD_TORCH_CHECK(labels.scalar_type() == scores.scalar_type(),
                  "labels must have the dtype of scores.");
  a.groups = pieces(cu_groups, "cu_groups");
  a.cu = static_cast<const int32_t*>(cu_groups.const_data_ptr());
  if (topk.has_value()) {
    check_dense(*topk, "topk", {a.groups});
    a.topk = longs(*topk, "topk");
  }
  a.family = parse_list_family(family);
  a.options = parse_list_options(options);
  a.scores = scores.const_data_ptr();
  a.labels = labels.const_data_ptr();
  const OnDevice device(scores);
  Tensor loss = torch::stable::new_empty(scores, {a.groups});
  if (a.groups == 0) return {loss, torch::stable::new_zeros(scores, {a.items})};
  Tensor slope = torch::stable::empty_like(scores);
  Tensor scratch = torch::stable::new_empty(scores, {list_scratch(a)}, ScalarType::Byte);
  a.loss = loss.mutable_data_ptr();
  a.slope = slope.mutable_data_ptr();
  a.scratch = static_cast<unsigned char*>(scratch.mutable_data_ptr());
  list_rank(a, device.stream());
  return {loss, slope};
}

Tensor cuda_segment_sum(const Tensor& values, const OptTensor& weights, const Tensor& cu_seqlens) {
  SegmentArgs a = segment_args(values, weights, cu_seqlens);
  const OnDevice device(values);
  Tensor out = torch::stable::new_empty(values, {a.m, a.s}, ScalarType::Double);
  Tensor part = torch::stable::new_empty(values, {segment_part(a)}, ScalarType::Double);
  a.out = static_cast<double*>(out.mutable_data_ptr());
  a.part = static_cast<double*>(part.mutable_data_ptr());
  segment_forward(a, device.stream());
  return out;
}

std::tuple<Tensor, Tensor> cuda_segment_slopes(const Tensor& d_out, const Tensor& values,
                                               const OptTensor& weights, const Tensor& cu_seqlens,
                                               bool need_values, bool need_weights) {
  SegmentArgs a = segment_args(values, weights, cu_seqlens);
  check_dense(d_out, "d_out", {a.m, a.s});
  check_type(d_out, "d_out", ScalarType::Double, "float64");
  STD_TORCH_CHECK(weights.has_value() || !need_weights,
                  "a gradient for weights was asked for, but no weights were given.");
  const OnDevice device(values);
  // Without a sequence no kernel runs, and no token has a gradient.
  const auto like = [&](const Tensor& x) {
    Tensor made = torch::stable::empty_like(x);
    return a.s == 0 ? torch::stable::zero_(made) : made;
  };
  Tensor d_values = need_values ? like(values) : torch::stable::new_empty(values, {0});
  Tensor d_weights = need_weights
                         ? like(*weights)
                         : torch::stable::new_empty(weights.has_value() ? *weights : values, {0});
  a.d_out = static_cast<const double*>(d_out.const_data_ptr());
  a.d_values = need_values ? d_values.mutable_data_ptr() : nullptr;
  a.d_weights = need_weights ? d_weights.mutable_data_ptr() : nullptr;
  segment_backward(a, device.stream());
  return {d_values, d_weights};
}

}  // namespace prefkern
