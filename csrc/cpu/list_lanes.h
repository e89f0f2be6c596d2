// Several short groups at once, one per lane, where no label order is needed; pair and hinge.
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
      broken |= valid & (s[i] - s[i] != vd{});
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
    const vd margin = splat(call.options.margin);
    const bool hinge = call.family == ListFamily::hinge;
    vd loss{}, strict{};
    for (int64_t i = 1; i < items; ++i) {
      vd pushed{}, product{};  // product: of all (1 + e) of the row, less 1
      for (int64_t j = 0; j < i; ++j) {
        const auto over = y[i] > y[j], pair = over | (y[i] < y[j]);
        const vd gap = s[i] - s[j], x = over ? gap : -gap;
        vd push;
        if (hinge) {
          const auto active = pair & (x < margin);
          push = active ? splat(1.0) : vd{};
          loss += active ? margin - x : vd{};
        } else {
          const vd e = exp_negative(-magnitude(x)), r = splat(1.0) / (splat(1.0) + e);
          push = pair ? (x > vd{} ? e * r : r) : vd{};
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
        }
        strict += pair ? splat(1.0) : vd{};
        push = over ? push : -push;
        pushed += push;
        u[j] += push;
      }
      u[i] -= pushed;
      if (!Weighted && !hinge) loss += log1p_positive(product);
    }
    vd factor = splat(1.0);
    if (call.options.mean_pairs) factor = strict > vd{} ? splat(1.0) / strict : factor;
    if (call.options.scale_by_list_size) factor *= count;
    for (int64_t i = 0; i < items; ++i) u[i] *= factor;
    return loss * factor;
  }
};

}  // namespace PK_ISA
}  // namespace prefkern
