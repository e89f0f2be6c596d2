// Statistic names such as "logp,jsd:0.5" to the plan that kernels read.
#pragma once

#include <cstdlib>
#include <string>

#include <torch/headeronly/util/Exception.h>

#include "numerics/stats.h"

namespace prefkern {

inline StatPlan parse_plan(const std::string& stats) {
  static const char* const kNames[kStatCount] = {
      "logp", "lse", "zy",  "ent",   "col",   "top1", "zmean", "ref_logp", "ref_lse",
      "fkl",  "rkl", "jsd", "alpha", "renyi", "tv",   "bkl",   "mix",      "ev"};
  StatPlan plan;
  size_t at = 0;
  while (at <= stats.size()) {
    size_t end = stats.find(',', at);
    if (end == std::string::npos) end = stats.size();
    const std::string item = stats.substr(at, end - at);
    const size_t colon = item.find(':');
    const std::string name = item.substr(0, colon);
    int kind = 0;
    while (kind < kStatCount && name != kNames[kind]) ++kind;
    STD_TORCH_CHECK(kind < kStatCount && plan.slot[kind] < 0,
                    "stats must be distinct statistic names joined by commas, got '", item, "'.");
    plan.slot[kind] = plan.count++;
    if (colon != std::string::npos)
      plan.param[kind] = std::strtod(item.c_str() + colon + 1, nullptr);
    at = end + 1;
  }
  STD_TORCH_CHECK(!plan.has(kBkl) || plan.param[kBkl] >= 1.0,
                  "bkl needs a top set of at least 1, as in 'bkl:50'.");
  return plan;
}

}  // namespace prefkern
