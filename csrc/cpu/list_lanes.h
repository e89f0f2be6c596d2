// Several short groups at once, one per lane, where no label order is needed: pair, plackett_luce.
//
// A list of 16 leaves half of every vector of list_pairs.h empty and sorts for as long as it
// computes; here all lanes work. Items beyond a group's end are masked ones, label NaN, which no
// comparison lets into a pair.
#pragma once

#include "cpu/list_pairs.h"

namespace prefkern {
namespace PK_ISA {

constexpr int64_t kLaneItems = 32;  // longest group: 5 arrays of 32 vectors stay in L1

struct ListLanes {
  static constexpr int64_t L = Lanes<double>::L;
  const ListCall& call;
  const int64_t first;  // group of lane 0
  int64_t items = 0;    // of the longest group
  vd s[kLaneItems], y[kLaneItems], u[kLaneItems], place[kLaneItems], gain[kLaneItems];
  vd count{};
  vl broken{};
  ListLanes(const ListCall& c, int64_t g) : call(c), first(g) {}

  // Whether groups [first, first + L) are short, and alike enough for shared loops to pay.
  bool fits() {
    int64_t pairs = 0;
    for (int64_t k = 0; k < L; ++k) {
      const int64_t size = int64_t(call.cu[first + k + 1]) - call.cu[first + k];
      pairs += size * size;
      items = size > items ? size : items;
    }
    return items <= kLaneItems && 2 * pairs >= L * items * items;
  }

  template <class T>
  void read() {
    const double nan = __builtin_nan("");
    for (int64_t k = 0; k < L; ++k) {
      const int64_t start = call.cu[first + k], size = int64_t(call.cu[first + k + 1]) - start;
      const T* scores = static_cast<const T*>(call.scores) + start;
      const T* labels = static_cast<const T*>(call.labels) + start;
      for (int64_t i = 0; i < items; ++i) {
        y[i][k] = i < size ? double(labels[i]) : nan;
        s[i][k] = i < size ? double(scores[i]) : 0.0;
      }
    }
    for (int64_t i = 0; i < items; ++i) {
      const auto valid = y[i] == y[i];
      broken |= valid & ((s[i] - s[i] != vd{}) | (y[i] - y[i] != vd{}));
      count += valid ? splat(1.0) : vd{};
      u[i] = vd{};
    }
    // A group that is NaN anyway goes through the arithmetic as zeros.
    for (int64_t i = 0; i < items; ++i) s[i] = (y[i] == y[i]) & ~broken ? s[i] : vd{};
  }
  template <class T>
  void write(vd loss) const {
    const vd factor = broken ? splat(__builtin_nan("")) : splat(1.0);
    loss *= factor;
    for (int64_t k = 0; k < L; ++k) {
      const int64_t start = call.cu[first + k], size = int64_t(call.cu[first + k + 1]) - start;
      static_cast<T*>(call.loss)[first + k] = T(loss[k]);
      T* slope = static_cast<T*>(call.slope) + start;
      for (int64_t i = 0; i < size; ++i) {
        slope[i] = y[i][k] == y[i][k] ? T(u[i][k] * factor[k]) : T(0);
      }
    }
  }

  // 1-based ranks in descending order, equal ones by position, among items whose label is a number.
  void ranks(const vd* values, vd* out) const {
    for (int64_t i = 0; i < items; ++i) out[i] = splat(1.0);
    for (int64_t i = 1; i < items; ++i) {
      for (int64_t j = 0; j < i; ++j) {
        const auto both = (y[i] == y[i]) & (y[j] == y[j]);
        const auto later = values[i] > values[j];
        out[j] += both & later ? splat(1.0) : vd{};
        out[i] += both & ~later ? splat(1.0) : vd{};
      }
    }
  }
  vd discounts(vd rank) const {
    for (int64_t k = 0; k < L; ++k) rank[k] = call.discount[int64_t(rank[k])];
    return rank;
  }
  // Fills place and gain; the ideal DCG by which gains are divided, or 1.
  vd lambda() {
    const ListOptions& o = call.options;
    vd ideal = splat(1.0);
    if (o.normalize) {
      ranks(y, place);
      ideal = vd{};
      for (int64_t i = 0; i < items; ++i) {
        const vd g = o.linear_gain ? y[i] : exp2m1(y[i]);
        ideal += y[i] == y[i] ? g * discounts(place[i]) : vd{};
      }
      ideal = ideal == vd{} ? splat(1.0) : ideal;
    }
    ranks(o.rank_by_score ? s : y, place);
    for (int64_t i = 0; i < items; ++i) {
      place[i] = discounts(place[i]);
      gain[i] = o.linear_gain ? y[i] : exp2_any(y[i]);
    }
    return ideal;
  }
  PK_INLINE vd weight(int64_t i, int64_t j, vd gap, vd ideal) const {
    if (call.options.weights == PairWeights::labeldiff) return gap;
    const vd top = y[i] > y[j] ? gain[i] : gain[j];
    const vd won = call.options.linear_gain ? gap : top * -expm1_negative(gap * splat(-kLn2));
    return won / ideal * magnitude(place[i] - place[j]);
  }

  // l = sum over strict pairs of w value, with slope = -dl/d(winner less loser).
  template <bool Weighted>
  PK_HOT vd pairs() {
    const vd ideal =
        Weighted && call.options.weights == PairWeights::lambda ? lambda() : splat(1.0);
    vd loss{}, strict{};
    for (int64_t i = 1; i < items; ++i) {
      vd pushed{}, product{};  // product: of all (1 + e) of the row, less 1
      for (int64_t j = 0; j < i; ++j) {
        const auto over = y[i] > y[j], pair = over | (y[i] < y[j]);
        const vd gap = s[i] - s[j], x = over ? gap : -gap;
        const vd e = exp_negative(-magnitude(x)), r = splat(1.0) / (splat(1.0) + e);
        vd push = pair ? (x > vd{} ? e * r : r) : vd{};
        const vd linear = x < vd{} ? -x : vd{};
        if constexpr (Weighted) {
          const vd w = pair ? weight(i, j, magnitude(y[i] - y[j]), ideal) : vd{};
          push *= w;
          loss += pair ? w * (linear + log1p_unit(e)) : vd{};
        } else {
          // One logarithm per row: 31 factors of at most 2 stay far from overflow.
          const vd factor = pair ? e : vd{};
          product = fma(product, factor, product + factor);
          loss += pair ? linear : vd{};
        }
        strict += pair ? splat(1.0) : vd{};
        push = over ? push : -push;
        pushed += push;
        u[j] += push;
      }
      u[i] -= pushed;
      if (!Weighted) loss += log1p_positive(product);
    }
    vd factor = splat(1.0);
    if (call.options.mean_pairs) factor = strict > vd{} ? splat(1.0) / strict : factor;
    if (call.options.scale_by_list_size) factor *= count;
    for (int64_t i = 0; i < items; ++i) u[i] *= factor;
    return loss * factor;
  }
};

// Every unordered pair (i, j) of items costs one exponential, kept in `cell` for the derivative.
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
  PK_HOT vd plackett_luce() {
    const ListOptions& o = call.options;
    const bool stable = o.ties == Ties::stable;
    vd stages = splat(double(kLaneItems));
    for (int64_t k = 0; call.topk != nullptr && k < L; ++k)
      stages[k] = double(call.topk[first + k]);
    const auto earlier_wins = [&](int64_t i, int64_t j) {
      return stable ? y[j] >= y[i] : y[j] > y[i];
    };
    for (int64_t i = 0; i < items; ++i) top[i] = s[i], rest[i] = before[i] = vd{};
    each_pair([&](int64_t i, int64_t j, int64_t) {
      const auto of_j = earlier_wins(i, j), of_i = y[i] > y[j];
      top[j] = of_j & (s[i] > top[j]) ? s[i] : top[j];
      top[i] = of_i & (s[j] > top[i]) ? s[j] : top[i];
      before[i] += of_j ? splat(1.0) : vd{};
      before[j] += of_i ? splat(1.0) : vd{};
    });
    each_pair([&](int64_t i, int64_t j, int64_t k) {
      const auto of_j = earlier_wins(i, j), of_i = y[i] > y[j];
      const vd x = of_j ? s[i] - top[j] : s[j] - top[i];
      const vd e = of_j | of_i ? exp_negative(x) : vd{};
      cell[k] = e;
      rest[j] += of_j ? e : vd{};
      rest[i] += of_i ? e : vd{};
    });
    vd loss{};
    for (int64_t i = 0; i < items; ++i) {
      const auto stage = (y[i] == y[i]) & (before[i] < stages);
      const vd factor = o.item_gain ? exp2m1(y[i]) : splat(1.0);
      const vd own = exp_negative(s[i] - top[i]), sum = own + rest[i];
      const vd more = own == splat(1.0) ? rest[i] : sum - splat(1.0);
      const vd each_one = factor * (log1p_positive(more) + (top[i] - s[i]));
      loss += stage ? each_one : vd{};
      share[i] = stage ? factor / sum : vd{};
      u[i] = stage ? -(rest[i] * share[i]) : vd{};
    }
    each_pair([&](int64_t i, int64_t j, int64_t k) {
      const auto of_j = earlier_wins(i, j), of_i = y[i] > y[j];
      const vd d = cell[k] * (of_j ? share[j] : share[i]);
      u[i] += of_j ? d : vd{};
      u[j] += of_i ? d : vd{};
    });
    return loss;
  }
};

inline bool lanes_serve(const ListCall& call) {
  const ListOptions& o = call.options;
  switch (call.family) {
    case ListFamily::pair:
      return o.weights != PairWeights::lambda || !(o.dcg2 || o.tie_average);
    case ListFamily::plackett_luce:
      return o.ties != Ties::breslow;  // whose tied items are members of each other's stages
    case ListFamily::softmax:
      break;
  }
  return false;
}

// Groups [g, g + L). False where they are not for lanes: nothing is done then.
template <class T>
bool list_lanes(const ListCall& call, int64_t g) {
  ListLaneChoices lanes(call, g);
  if (!lanes.fits()) return false;
  lanes.read<T>();
  if (call.family == ListFamily::plackett_luce) {
    lanes.write<T>(lanes.plackett_luce());
  } else {
    const bool plain = call.options.weights == PairWeights::none;
    lanes.write<T>(plain ? lanes.pairs<false>() : lanes.pairs<true>());
  }
  return true;
}

}  // namespace PK_ISA
}  // namespace prefkern
