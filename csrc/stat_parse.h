// The text of a plan (prefkern/backends/plan.py, write_plan) to what kernels read:
// statistics;without gradient;flags;tensors, each joined by commas.
#pragma once

#include <charconv>
#include <string>
#include <string_view>
#include <vector>

#include <torch/headeronly/util/Exception.h>

#include "numerics/online.h"

namespace prefkern {

struct PlanText {
  StatPlan stats;
  bool exact = false, frozen = false;
  double tail = 0.0;           // mass of a row whose units the backward may skip
  bool sharded = false;        // a fifth part: other ranks hold the rest of the vocabulary
  std::vector<Input> tensors;  // in the order of the op's list
};

// Calls f(word) for the words of `text` between `separator`s; none for an empty text.
template <class F>
void each_word(std::string_view text, char separator, const F& f) {
  while (!text.empty()) {
    const size_t end = text.find(separator);
    f(text.substr(0, end));
    text = end == std::string_view::npos ? std::string_view{} : text.substr(end + 1);
  }
}

template <int n>
int find_name(const char* const (&names)[n], std::string_view word) {
  int k = 0;
  while (k < n && word != names[k]) ++k;
  return k;
}

inline double read_number(std::string_view text, std::string_view where) {
  double x = 0.0;
  const char *first = text.data(), *last = text.data() + text.size();
  // from_chars, unlike strtod, reads a decimal point whatever the locale says
  const auto read = std::from_chars(first, last, x);
  STD_TORCH_CHECK(read.ec == std::errc() && read.ptr == last, "the parameter of '",
                  std::string(where), "' is not a number.");
  return x;
}

inline StatPlan parse_stats(std::string_view stats) {
  StatPlan plan;
  each_word(stats, ',', [&](std::string_view item) {
    const size_t colon = item.find(':');
    const int kind = find_name(kStatNames, item.substr(0, colon));
    STD_TORCH_CHECK(kind < kStats && plan.slot[kind] < 0,
                    "statistics must be distinct names joined by commas, got '", std::string(item),
                    "'.");
    plan.slot[kind] = plan.count++;
    plan.moves[kind] = has_gradient(Stat(kind));
    if (colon == std::string_view::npos) return;
    plan.param[kind] = read_number(item.substr(colon + 1), item);
  });
  STD_TORCH_CHECK(!plan.has(Stat::bkl) || plan.of(Stat::bkl) >= 1.0,
                  "bkl needs a top set of at least 1, as in 'bkl:50'.");
  return plan;
}

inline void read_flag(PlanText& plan, std::string_view word) {
  if (word == "exact") {
    plan.exact = true;
  } else if (word == "frozen") {
    plan.frozen = true;
  } else if (word == "either") {  // the op's to choose
  } else {
    STD_TORCH_CHECK(word.substr(0, 5) == "tail:", "no flag '", std::string(word), "'.");
    plan.tail = read_number(word.substr(5), word);
    STD_TORCH_CHECK(plan.tail > 0.0 && plan.tail <= 1.0, "tail must be a mass in (0, 1], got '",
                    std::string(word), "'.");
  }
}

inline PlanText parse_plan(const std::string& text) {
  PlanText found;
  int part = 0;
  std::string_view rest = text;
  for (; part < 4; ++part) {
    size_t end = rest.find(';');
    if (part == 3 && end == std::string_view::npos) end = rest.size();
    STD_TORCH_CHECK(end != std::string_view::npos, "a plan must have four parts, got '", text,
                    "'.");
    found.sharded = part == 3 && end < rest.size();
    const std::string_view words = rest.substr(0, end);
    if (part == 0) found.stats = parse_stats(words);
    each_word(words, ',', [&](std::string_view word) {
      if (part == 1) {
        const int kind = find_name(kStatNames, word);
        STD_TORCH_CHECK(kind < kStats, "no statistic '", std::string(word), "'.");
        found.stats.moves[kind] = false;
      } else if (part == 2) {
        read_flag(found, word);
      } else if (part == 3) {
        const int input = find_name(kInputNames, word);
        STD_TORCH_CHECK(input < kInputs, "no tensor '", std::string(word), "'.");
        found.tensors.push_back(Input(input));
      }
    });
    rest = part < 3 ? rest.substr(end + 1) : std::string_view{};
  }
  return found;
}

inline FoldPlan fold_plan(const std::string& text, bool rounded) {
  const PlanText read = parse_plan(text);
  FoldPlan plan;
  plan.stats = read.stats;
  plan.rounded = rounded;
  for (const Input t : read.tensors) {
    plan.two = plan.two || t == Input::ref_hidden || t == Input::ref_logits;
    plan.third = plan.third || t == Input::aux_hidden;
  }
  plan.third = plan.third && plan.stats.has(Stat::ev);
  return plan;
}

}  // namespace prefkern
