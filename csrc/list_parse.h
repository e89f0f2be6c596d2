// The text form of list_rank's family and options, as prefkern.backends.list_options.pack writes
// it.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>
#include <utility>

#include <torch/headeronly/util/Exception.h>

#include "list_options.h"
#include "number_parse.h"

namespace prefkern {

template <class E>
E choose_named(const std::string& what, const std::string& value,
               std::initializer_list<std::pair<const char*, E>> names) {
  for (const auto& [name, meaning] : names) {
    if (value == name) return meaning;
  }
  STD_TORCH_CHECK(false, what, " has no choice '", value, "'; see prefkern.backends.list_options.");
}

inline ListFamily parse_list_family(const std::string& family) {
  return choose_named<ListFamily>("family", family,
                                  {{"pair", ListFamily::pair},
                                   {"plackett_luce", ListFamily::plackett_luce},
                                   {"softmax", ListFamily::softmax}});
}

inline void set_list_option(ListOptions& o, const std::string& name, const std::string& value) {
  const auto either = [&](const char* yes, const char* no) {
    return choose_named<bool>(name, value, {{yes, true}, {no, false}});
  };
  if (name == "weights") {
    o.weights = choose_named<PairWeights>(name, value,
                                          {{"none", PairWeights::none},
                                           {"labeldiff", PairWeights::labeldiff},
                                           {"lambda", PairWeights::lambda}});
  } else if (name == "ties") {
    o.ties = choose_named<Ties>(
        name, value,
        {{"strict", Ties::strict}, {"stable", Ties::stable}, {"breslow", Ties::breslow}});
  } else if (name == "target") {
    o.target = choose_named<Target>(
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
  } else if (name == "topn") {
    o.topn = parse_number<int64_t>(name, value);
    STD_TORCH_CHECK(o.topn >= 0, "topn must be >= 0 (0 is no limit), got ", value, ".");
  } else {
    STD_TORCH_CHECK(name == "alpha", "list_rank has no option '", name,
                    "'; see prefkern.backends.list_options.");
    o.alpha = parse_number<double>(name, value);
    STD_TORCH_CHECK(o.alpha > 0.0, "alpha must be > 0, got ", value, ".");
  }
}

inline ListOptions parse_list_options(const std::string& text) {
  ListOptions options;
  size_t at = 0;
  while (at < text.size()) {
    const size_t end = std::min(text.find(';', at), text.size());
    const std::string item = text.substr(at, end - at);
    const size_t equals = item.find('=');
    STD_TORCH_CHECK(equals != std::string::npos, "options must be name=value joined by ';', got '",
                    text, "'.");
    set_list_option(options, item.substr(0, equals), item.substr(equals + 1));
    at = end + 1;
  }
  return options;
}

}  // namespace prefkern
