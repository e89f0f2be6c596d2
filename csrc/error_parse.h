// The statistics of error_sum, read from their comma-joined names.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <string>

#include <torch/headeronly/util/Exception.h>

namespace prefkern {

// Call: what the kernels of a device take; the fields have the same names everywhere.
template <class Call>
void parse_error_stats(Call& call, const std::string& stats) {
  size_t at = 0;
  while (at <= stats.size()) {
    const size_t end = std::min(stats.find(',', at), stats.size());
    const std::string item = stats.substr(at, end - at), name = item.substr(0, item.find(':'));
    int* slot = name == "err"       ? &call.err
                : name == "ref_err" ? &call.ref_err
                : name == "dot"     ? &call.dot
                : name == "huber"   ? &call.huber_slot
                                    : nullptr;
    STD_TORCH_CHECK(slot != nullptr && *slot < 0,
                    "stats must be distinct names among err, ref_err, dot and huber:c, got '",
                    stats, "'.");
    *slot = int(call.stats++);
    if (slot == &call.huber_slot) {
      call.huber = item.size() > 6 ? std::strtod(item.c_str() + 6, nullptr) : 0.0;
      STD_TORCH_CHECK(call.huber > 0.0, "huber needs a width > 0, as in 'huber:0.001', got '", item,
                      "'.");
    }
    at = end + 1;
  }
}

}  // namespace prefkern
