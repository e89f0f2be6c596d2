// Several short groups at once, one per lane: plackett_luce, pro and approx_ndcg.
//
// Every unordered pair (i, j) of items costs one exponential, kept in `cell` for the derivative.
#pragma once

#include "cpu/list_lanes.h"

namespace prefkern {
namespace PK_ISA {

struct ListLaneChoices : ListLanes {
  vd top[kLaneItems], share[kLaneItems], rest[kLaneItems], before[kLaneItems];
  vd cell[kLaneItems * (kLaneItems - 1) / 2];
  using ListLanes::ListLanes;

  // body(i, j, k): pair number k, j < i.
  template <class Body>
  PK_INLINE void each_pair(const Body& body) {
    int64_t k = 0;
    for (int64_t i = 1; i < items; ++i) {
      for (int64_t j = 0; j < i; ++j, ++k) body(i, j, k);
    }
  }

  // Stages of list_choices.h without label order: of a pair, the item of the higher label is the
  // stage and the other one of its members. `stable`: the earlier one of two equal labels.
  template <bool Pro>
  PK_HOT vd choices() {
    const ListOptions& o = call.options;
    const bool stable = Pro || o.ties == Ties::stable;
    vd low = splat(pk_inf()), high = -low, stages = splat(double(kLaneItems));
    for (int64_t i = 0; i < items; ++i) low = y[i] < low ? y[i] : low;
    for (int64_t i = 0; i < items; ++i) high = y[i] > high ? y[i] : high;
    for (int64_t k = 0; call.topk != nullptr && k < L; ++k)
      stages[k] = double(call.topk[first + k]);
    const auto mine = [&](int64_t i) { return Pro ? (y[i] - low) * s[i] : s[i]; };
    const auto member = [&](int64_t stage, int64_t item) {
      return Pro ? (y[stage] - y[item]) * s[item] : s[item];
    };
    const auto earlier_wins = [&](int64_t i, int64_t j) {
      return stable ? y[j] >= y[i] : y[j] > y[i];
    };
    for (int64_t i = 0; i < items; ++i) top[i] = mine(i), rest[i] = before[i] = vd{};
    each_pair([&](int64_t i, int64_t j, int64_t) {
      const auto of_j = earlier_wins(i, j), of_i = y[i] > y[j];
      const vd at_j = member(j, i), at_i = member(i, j);
      top[j] = of_j & (at_j > top[j]) ? at_j : top[j];
      top[i] = of_i & (at_i > top[i]) ? at_i : top[i];
      before[i] += of_j ? splat(1.0) : vd{};
      before[j] += of_i ? splat(1.0) : vd{};
    });
    each_pair([&](int64_t i, int64_t j, int64_t k) {
      const auto of_j = earlier_wins(i, j), of_i = y[i] > y[j];
      const vd x = of_j ? member(j, i) - top[j] : member(i, j) - top[i];
      const vd e = of_j | of_i ? exp_negative(x) : vd{};
      cell[k] = e;
      rest[j] += of_j ? e : vd{};
      rest[i] += of_i ? e : vd{};
    });
    vd loss{};
    for (int64_t i = 0; i < items; ++i) {
      const auto last = Pro ? (before[i] < count - splat(1.0)) & (high > low) : before[i] < stages;
      const auto stage = (y[i] == y[i]) & last;
      const vd factor = o.item_gain ? exp2m1(y[i]) : splat(1.0);
      const vd own = exp_negative(mine(i) - top[i]), sum = own + rest[i];
      const vd more = own == splat(1.0) ? rest[i] : sum - splat(1.0);
      const vd each_one = factor * (log1p_positive(more) + (top[i] - mine(i)));
      loss += stage ? each_one : vd{};
      share[i] = stage ? factor / sum : vd{};
      const vd width = Pro ? y[i] - low : splat(1.0);
      u[i] = stage ? -width * (rest[i] * share[i]) : vd{};
    }
    each_pair([&](int64_t i, int64_t j, int64_t k) {
      const auto of_j = earlier_wins(i, j), of_i = y[i] > y[j];
      vd d = cell[k] * (of_j ? share[j] : share[i]);
      if constexpr (Pro) d *= magnitude(y[i] - y[j]);
      u[i] += of_j ? d : vd{};
      u[j] += of_i ? d : vd{};
    });
    return loss;
  }

  PK_HOT vd approx_ndcg() {
    vd low = splat(pk_inf()), high = -low, ideal{};
    vd* soft = rest;
    vd* pull = share;
    ranks(y, place);
    for (int64_t i = 0; i < items; ++i) {
      low = y[i] < low ? y[i] : low;
      high = y[i] > high ? y[i] : high;
      gain[i] = y[i] == y[i] ? exp2m1(y[i]) : vd{};
      ideal += gain[i] * discounts(place[i]);
      soft[i] = splat(1.0);
    }
    const auto real = (high > low) & (ideal != vd{});
    const vd width = splat(call.options.temperature);
    each_pair([&](int64_t i, int64_t j, int64_t k) {
      const auto both = (y[i] == y[i]) & (y[j] == y[j]);
      const vd x = (s[i] - s[j]) / width;
      const vd e = exp_negative(-magnitude(x)), r = splat(1.0) / (splat(1.0) + e);
      soft[j] += both ? (x > vd{} ? r : e * r) : vd{};
      soft[i] += both ? (x > vd{} ? e * r : r) : vd{};
      cell[k] = both ? e * r * r : vd{};
    });
    vd loss{};
    for (int64_t i = 0; i < items; ++i) {
      const vd log = log1p_positive(soft[i]);
      const vd part = real ? gain[i] / ideal * splat(kLn2) : vd{};
      loss -= part / log;
      pull[i] = part / ((splat(1.0) + soft[i]) * log * log);
    }
    each_pair([&](int64_t i, int64_t j, int64_t k) {
      const vd d = cell[k] * (pull[j] - pull[i]) / width;
      u[i] += d;
      u[j] -= d;
    });
    return loss;
  }
};

inline bool lanes_serve(const ListCall& call) {
  const ListOptions& o = call.options;
  switch (call.family) {
    case ListFamily::hinge:
    case ListFamily::pro:
    case ListFamily::approx_ndcg:
      return true;
    case ListFamily::plackett_luce:
      return o.ties != Ties::breslow;  // whose tied items are members of each other's stages
    case ListFamily::pair:
      return o.weights != PairWeights::lambda || !(o.dcg2 || o.tie_average);
    default:
      return false;
  }
}

// Groups [g, g + L). False where they are not for lanes: nothing is done then.
template <class T>
bool list_lanes(const ListCall& call, int64_t g) {
  ListLaneChoices lanes(call, g);
  if (!lanes.fits()) return false;
  lanes.read<T>();
  vd loss;
  switch (call.family) {
    case ListFamily::pro:
      loss = lanes.choices<true>();
      break;
    case ListFamily::plackett_luce:
      loss = lanes.choices<false>();
      break;
    case ListFamily::approx_ndcg:
      loss = lanes.approx_ndcg();
      break;
    default:
      const bool plain =
          call.family == ListFamily::hinge || call.options.weights == PairWeights::none;
      loss = plain ? lanes.pairs<false>() : lanes.pairs<true>();
  }
  lanes.write<T>(loss);
  return true;
}

}  // namespace PK_ISA
}  // namespace prefkern
