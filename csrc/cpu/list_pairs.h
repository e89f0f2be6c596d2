// Ranking losses that are sums over the strict pairs of a group, label order first.
#pragma once

#include "cpu/list_group.h"

namespace prefkern {
namespace PK_ISA {

struct ListPairs : ListGroup {
  explicit ListPairs(const ListGroup& g) : ListGroup(g) {}

  // Discounts (or ranks, for the form dcg2) of the items in label order.
  void places() const {
    const ListOptions& o = call.options;
    if (o.rank_by_score) {
      pad(t.score);
      ranks(t.score, t.end);  // `end` is written again below
      for (int64_t i = 0; i < count; ++i) {
        const int64_t r = t.end[i] + 1;
        t.place[t.slot[i]] = o.dcg2 ? double(r) : call.discount[r];
      }
      for (int64_t i = count; i-- > 0;) {
        t.end[i] = i + 1 < count && t.y[i + 1] == t.y[i] ? t.end[i + 1] : i + 1;
      }
    } else {
      for (int64_t i = 0; i < count; ++i)
        t.place[i] = o.dcg2 ? double(i + 1) : call.discount[i + 1];
    }
    for (int64_t i = count; i % L != 0; ++i) t.place[i] = 0.0;
    if (!o.tie_average) return;
    const double* source = o.rank_by_score ? t.s : t.y;
    for (int64_t i = 0; i < count; ++i) {
      vd total{}, tied{};
      const vd own = splat(source[i]);
      each(0, [&](int64_t v, vl, vl inside) {
        const vl same = (load(source + v) == own) & inside;
        total += same ? load(t.place + v) : vd{};
        tied += same ? splat(1.0) : vd{};
      });
      t.line[i] = sum_of(total) / sum_of(tied);
    }
    std::memcpy(t.place, t.line, size_t(count) * sizeof(double));
  }

  void gains() const {
    for (int64_t v = 0; v < count; v += L) {
      const vd y = load(t.y + v);
      store(t.gain + v, call.options.linear_gain ? y : exp2_any(y));
    }
  }
  double ideal() const {
    if (!call.options.normalize) return 1.0;
    vd total{};
    each(0, [&](int64_t v, vl, vl inside) {
      const vd y = load(t.y + v);
      const vd gain = call.options.linear_gain ? y : exp2m1(y);
      total += inside ? gain * load(call.discount + 1 + v) : vd{};
    });
    const double sum = sum_of(total);
    return sum == 0.0 ? 1.0 : sum;
  }

  // Weights of the pairs of row i, one per lane.
  struct PairWeight {
    const ListGroup& g;
    PairWeights kind;
    double ideal = 1.0;
    PK_INLINE vd operator()(int64_t i, int64_t v) const {
      if (kind == PairWeights::none) return splat(1.0);
      const vd gap = splat(g.t.y[i]) - load(g.t.y + v);
      if (kind == PairWeights::labeldiff) return gap;
      const ListOptions& o = g.call.options;
      // 2^y_i (1 - 2^-(y_i - y_j)): close labels do not cancel.
      vd gain = o.linear_gain ? gap : splat(g.t.gain[i]) * -expm1_negative(gap * splat(-kLn2));
      if (o.normalize) gain = gain / splat(ideal);
      vd cost = splat(g.t.place[i]) - load(g.t.place + v);
      if (o.dcg2) {
        // Lanes that are no pair read any entry.
        const vd apart = below(above(magnitude(cost), 1.0), double(g.count));
        const vl at = (vl)(apart + splat(kRound)) - (vl)splat(kRound);
        for (int k = 0; k < L; ++k) cost[k] = g.call.discount[at[k]];
      }
      return gain * magnitude(cost);
    }
  };

  // l = sum over pairs of w softplus(-gap), u by w sigmoid(-gap) = -dl/d(s_i - s_j).
  template <class Weight>
  PK_INLINE double fold_pairs(const Weight& weight) const {
    const ListOptions& o = call.options;
    vd loss{};
    int64_t pairs = 0;
    for (int64_t i = 0; i < count && t.end[i] < count; ++i) {
      pairs += count - t.end[i];
      const vd own = splat(t.s[i]);
      vd pushed{};
      each(t.end[i], [&](int64_t v, vl, vl inside) {
        const vd gap = own - load(t.s + v);
        const vd e = exp_negative(-magnitude(gap)), r = splat(1.0) / (splat(1.0) + e);
        const vd slope = gap > vd{} ? e * r : r;
        const vd value = (gap < vd{} ? -gap : vd{}) + log1p_unit(e);
        const vd w = weight(i, v);
        loss += inside ? w * value : vd{};
        const vd push = inside ? w * slope : vd{};
        pushed += push;
        store(t.u + v, load(t.u + v) + push);
      });
      t.u[i] -= sum_of(pushed);
    }
    double factor = o.mean_pairs && pairs > 0 ? 1.0 / double(pairs) : 1.0;
    if (o.scale_by_list_size) factor *= double(count);
    if (factor != 1.0) {
      for (int64_t i = 0; i < count; ++i) t.u[i] *= factor;
    }
    return sum_of(loss) * factor;
  }

  struct One {
    PK_INLINE vd operator()(int64_t, int64_t) const { return splat(1.0); }
  };
  PK_HOT double pair_plain() const { return fold_pairs(One{}); }
  PK_HOT double pair_weighted() const {
    PairWeight weight{*this, call.options.weights};
    if (weight.kind == PairWeights::lambda) {
      places();
      gains();
      weight.ideal = ideal();
    }
    return fold_pairs(weight);
  }
};

}  // namespace PK_ISA
}  // namespace prefkern
