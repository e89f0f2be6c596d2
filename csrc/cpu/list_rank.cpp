#include "cpu/list_rank.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "cpu/head_op.h"
#include "list_parse.h"

namespace prefkern {
namespace {

using torch::headeronly::ScalarType;

// Entry past the largest group that kernels may read: a whole vector and one rank.
constexpr int64_t kDiscountSlack = 16;

// 1 / log_b(1 + rank) by 1-based rank, 0 beyond topn. For dcg2, by how much the next rank has less.
std::vector<double> discounts(const ListOptions& o, int64_t longest) {
  std::vector<double> d(size_t(longest + kDiscountSlack), 0.0);
  const int64_t last = o.topn > 0 ? std::min<int64_t>(o.topn, longest + 1) : longest + 1;
  for (int64_t r = 1; r <= last; ++r)
    d[size_t(r)] = (o.base2 ? std::log(2.0) : 1.0) / std::log1p(double(r));
  for (int64_t r = 1; o.dcg2 && r <= longest; ++r) d[size_t(r)] -= d[size_t(r + 1)];
  return d;
}

}  // namespace

std::tuple<Tensor, Tensor> list_rank_fwd(const Tensor& scores, const Tensor& labels,
                                         const Tensor& cu_groups, const OptTensor& topk,
                                         const std::string& family, const std::string& options) {
  ListCall call;
  check_shape(scores, "scores", {-1});
  const int64_t items = scores.size(0);
  call.type = check_float(scores, "scores");
  STD_TORCH_CHECK(call.type == Dtype::f32 || call.type == Dtype::f64,
                  "scores must be float32 or float64.");
  check_shape(labels, "labels", {items});
  STD_TORCH_CHECK(labels.scalar_type() == scores.scalar_type(),
                  "labels must have the dtype of scores.");
  check_shape(cu_groups, "cu_groups", {-1});
  STD_TORCH_CHECK(cu_groups.scalar_type() == ScalarType::Int && cu_groups.size(0) >= 1,
                  "cu_groups must be int32 [G+1].");
  call.groups = cu_groups.size(0) - 1;
  call.cu = static_cast<const int32_t*>(cu_groups.const_data_ptr());
  STD_TORCH_CHECK(call.cu[0] == 0 && call.cu[call.groups] == items,
                  "cu_groups must start at 0 and end at S = ", items, ", got ", call.cu[0], " ... ",
                  call.cu[call.groups], ".");
  for (int64_t g = 0; g < call.groups; ++g) {
    const int64_t size = int64_t(call.cu[g + 1]) - call.cu[g];
    STD_TORCH_CHECK(size >= 0, "cu_groups must never decrease, got ", call.cu[g], " then ",
                    call.cu[g + 1], " at position ", g, ".");
    call.longest = std::max(call.longest, size);
  }
  if (topk.has_value()) {
    check_shape(*topk, "topk", {call.groups});
    check_long(*topk, "topk");
    call.topk = static_cast<const int64_t*>(topk->const_data_ptr());
    for (int64_t g = 0; g < call.groups; ++g) {
      STD_TORCH_CHECK(call.topk[g] >= 1, "topk must be >= 1, got ", call.topk[g], " for group ", g,
                      ".");
    }
  }
  call.family = parse_list_family(family);
  call.options = parse_list_options(options);
  const std::vector<double> discount = discounts(call.options, call.longest);
  call.discount = discount.data();
  call.scores = scores.const_data_ptr();
  call.labels = labels.const_data_ptr();
  Tensor loss = torch::stable::new_empty(scores, {call.groups});
  Tensor slope = torch::stable::empty_like(scores);
  call.loss = loss.mutable_data_ptr();
  call.slope = slope.mutable_data_ptr();
  call.pool = torch_pool();
  check_done(kernels().list_rank(call));
  return {loss, slope};
}

}  // namespace prefkern
