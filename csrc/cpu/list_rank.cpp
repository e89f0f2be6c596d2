#include "cpu/list_rank.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <utility>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "cpu/head_op.h"

namespace prefkern {
namespace {

using torch::headeronly::ScalarType;

// Entry past the largest group that kernels may read: a whole vector and one rank.
constexpr int64_t kDiscountSlack = 16;

template <class E>
E choose(const std::string& what, const std::string& value,
         std::initializer_list<std::pair<const char*, E>> names) {
  for (const auto& [name, meaning] : names) {
    if (value == name) return meaning;
  }
  STD_TORCH_CHECK(false, what, " has no choice '", value, "'; see prefkern.list_options.");
}

ListFamily parse_family(const std::string& family) {
  return choose<ListFamily>("family", family,
                            {{"pair", ListFamily::pair},
                             {"hinge", ListFamily::hinge},
                             {"plackett_luce", ListFamily::plackett_luce},
                             {"softmax", ListFamily::softmax},
                             {"pro", ListFamily::pro},
                             {"nca", ListFamily::nca},
                             {"rank_hinge", ListFamily::rank_hinge},
                             {"anchor", ListFamily::anchor},
                             {"set_contrast", ListFamily::set_contrast},
                             {"approx_ndcg", ListFamily::approx_ndcg}});
}

void set_option(ListOptions& o, const std::string& name, const std::string& value) {
  const auto either = [&](const char* yes, const char* no) {
    return choose<bool>(name, value, {{yes, true}, {no, false}});
  };
  if (name == "weights") {
    o.weights = choose<PairWeights>(name, value,
                                    {{"none", PairWeights::none},
                                     {"labeldiff", PairWeights::labeldiff},
                                     {"lambda", PairWeights::lambda}});
  } else if (name == "ties") {
    o.ties = choose<Ties>(
        name, value,
        {{"strict", Ties::strict}, {"stable", Ties::stable}, {"breslow", Ties::breslow}});
  } else if (name == "target") {
    o.target = choose<Target>(
        name, value, {{"softmax", Target::softmax}, {"sum", Target::sum}, {"none", Target::none}});
  } else if (name == "gain") {
    o.linear_gain = either("linear", "exp2");
  } else if (name == "log_base") {
    o.base2 = either("2", "e");
  } else if (name == "form") {
    o.dcg2 = either("dcg2", "dcg");
  } else if (name == "normalize") {
    o.normalize = either("1", "0");
  } else if (name == "rank_source") {
    o.rank_by_score = either("score", "label");
  } else if (name == "tie_rank") {
    o.tie_average = either("average", "position");
  } else if (name == "scale_by_list_size") {
    o.scale_by_list_size = either("1", "0");
  } else if (name == "pair_reduction") {
    o.mean_pairs = either("mean", "sum");
  } else if (name == "item_gain") {
    o.item_gain = either("exp2", "none");
  } else if (name == "mode") {
    o.product = either("product", "margin");
  } else if (name == "per_item") {
    o.per_item = either("1", "0");
  } else if (name == "inner") {
    o.inner_mean = either("mean", "sum");
  } else if (name == "topn") {
    o.topn = std::strtoll(value.c_str(), nullptr, 10);
  } else {
    double* number = name == "margin"        ? &o.margin
                     : name == "alpha"       ? &o.alpha
                     : name == "scale"       ? &o.scale
                     : name == "deviation"   ? &o.deviation
                     : name == "temperature" ? &o.temperature
                                             : nullptr;
    STD_TORCH_CHECK(number != nullptr, "list_rank has no option '", name,
                    "'; see prefkern.list_options.");
    *number = std::strtod(value.c_str(), nullptr);
  }
}

ListOptions parse_options(const std::string& text) {
  ListOptions options;
  size_t at = 0;
  while (at < text.size()) {
    const size_t end = std::min(text.find(';', at), text.size());
    const std::string item = text.substr(at, end - at);
    const size_t equals = item.find('=');
    STD_TORCH_CHECK(equals != std::string::npos, "options must be name=value joined by ';', got '",
                    text, "'.");
    set_option(options, item.substr(0, equals), item.substr(equals + 1));
    at = end + 1;
  }
  return options;
}

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
  }
  call.family = parse_family(family);
  call.options = parse_options(options);
  if (call.family == ListFamily::approx_ndcg) call.options.base2 = true;
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
