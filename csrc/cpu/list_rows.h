// Ranking losses of ragged groups: value and derivative of each group in one pass, fp64 inside.
//
// Items of a group are put in label order first (by counting, no comparison sort), so that "labelled
// below item i" is a suffix of the group, and row i visits that suffix in whole vectors. Row i owns
// its part of the loss; derivatives are summed in the group's own memory. A group is worked on by one
// thread in a fixed order: the same bits for any number of threads.
#pragma once

#include "cpu/double_math.h"
#include "cpu/tiles.h"

namespace prefkern {
namespace PK_ISA {

constexpr int64_t kListUnit = 32;  // groups handed to a thread at a time

// Working memory of one group, one number per item; `size` is the largest group in whole vectors.
struct ListScratch {
  double *score, *label;            // as stored, masked items left out
  double *s, *y, *u;                // in label order: score, label, derivative
  double *place, *gain;             // of lambda weights: discount or rank; 2^label
  double *line, *above, *log_of;    // one row; running maxima; arguments of the logarithms
  int64_t *item, *origin, *slot, *end;  // index of an item; the same in label order; its rank; end of its tied block
  void layout(Arena& a, int64_t size) {
    double** const numbers[] = {&score, &label, &s, &y, &u, &place, &gain, &line, &above, &log_of};
    int64_t** const indices[] = {&item, &origin, &slot, &end};
    for (double** p : numbers) *p = a.take<double>(size);
    for (int64_t** p : indices) *p = a.take<int64_t>(size);
  }
};

PK_INLINE vl lanes_from(int64_t first) {
  vl v;
  for (int i = 0; i < Lanes<double>::L; ++i) v[i] = first + i;
  return v;
}
PK_INLINE double sum_of(vd v) {
  return fold_lanes(v, [](double a, double b) { return a + b; });
}
PK_INLINE double max_of(vd v) {
  return fold_lanes(v, [](double a, double b) { return a > b ? a : b; });
}

// One group whose valid items are in `score`, `label` [count].
struct ListGroup {
  static constexpr int64_t L = Lanes<double>::L;
  const ListCall& call;
  const ListScratch& t;
  int64_t count = 0;
  int64_t stages = 0;  // plackett_luce

  // body(v, lanes, inside) over the whole vectors that hold items [begin, count); `inside` marks them.
  template <class Body>
  PK_INLINE void each(int64_t begin, const Body& body) const {
    const vl last = vl{} + count, first = vl{} + begin;
    for (int64_t v = begin / L * L; v < count; v += L) {
      const vl lanes = lanes_from(0) + v;
      body(v, lanes, (lanes >= first) & (lanes < last));
    }
  }

  // 0-based ranks in descending order, equal values by position. `values` is padded with NaN.
  void ranks(const double* values, int64_t* out) const {
    for (int64_t v = 0; v < count; v += L) {
      const vd own = load(values + v);
      const vl lanes = lanes_from(0) + v;
      vl ahead{};
      for (int64_t j = 0; j < count; ++j) {
        const vd other = splat(values[j]);
        ahead -= (other > own) | ((other == own) & (vl{} + j < lanes));
      }
      std::memcpy(out + v, &ahead, sizeof ahead);
    }
  }
  void pad(double* values) const {
    for (int64_t i = count; i % L != 0; ++i) values[i] = __builtin_nan("");
  }

  void sort() const {
    pad(t.label);
    ranks(t.label, t.slot);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t r = t.slot[i];
      t.s[r] = t.score[i], t.y[r] = t.label[i], t.origin[r] = t.item[i];
    }
    for (int64_t i = count; i % L != 0; ++i) t.s[i] = t.y[i] = 0.0;
    for (int64_t i = 0; i < round_up(count, L); ++i) t.u[i] = 0.0;
    for (int64_t i = count; i-- > 0;) {
      t.end[i] = i + 1 < count && t.y[i + 1] == t.y[i] ? t.end[i + 1] : i + 1;
    }
  }

  // ---- pairs ----------------------------------------------------------------------------------

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
      for (int64_t i = 0; i < count; ++i) t.place[i] = o.dcg2 ? double(i + 1) : call.discount[i + 1];
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

  // l = sum over pairs of value, u by slope = -dl/d(s_i - s_j) >= 0; Link gives both from the gap.
  template <class Link, class Weight>
  PK_INLINE double fold_pairs(const Link& link, const Weight& weight) const {
    const ListOptions& o = call.options;
    vd loss{};
    int64_t pairs = 0;
    for (int64_t i = 0; i < count && t.end[i] < count; ++i) {
      pairs += count - t.end[i];
      const vd own = splat(t.s[i]);
      vd pushed{};
      each(t.end[i], [&](int64_t v, vl, vl inside) {
        vd value, slope;
        link(own - load(t.s + v), value, slope);
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
  struct Logistic {
    PK_INLINE void operator()(vd gap, vd& value, vd& slope) const {
      const vd e = exp_negative(-magnitude(gap)), r = splat(1.0) / (splat(1.0) + e);
      slope = gap > vd{} ? e * r : r;
      value = (gap < vd{} ? -gap : vd{}) + log1p_unit(e);
    }
  };
  struct Hinge {
    double margin;
    PK_INLINE void operator()(vd gap, vd& value, vd& slope) const {
      const auto active = gap < splat(margin);
      value = active ? splat(margin) - gap : vd{};
      slope = active ? splat(1.0) : vd{};
    }
  };
  PK_HOT double pair_plain() const {
    return fold_pairs(Logistic{}, One{});
  }
  PK_HOT double pair_weighted() const {
    PairWeight weight{*this, call.options.weights};
    if (weight.kind == PairWeights::lambda) {
      places();
      gains();
      weight.ideal = ideal();
    }
    return fold_pairs(Logistic{}, weight);
  }
  PK_HOT double hinge() const {
    return fold_pairs(Hinge{call.options.margin}, One{});
  }

  // ---- competitions: log sum exp of a set less one of its members -----------------------------

  // What each stage adds, LSE(members) - own, once own = exp(own - top) and rest, the sum of the other
  // members' exponentials, are known: log(own + rest) + (top - own score). The greatest member is off
  // first, so small differences keep their digits; its own 1 stays out of the logarithm.
  void note(int64_t i, double own, double rest, double offset) const {
    t.log_of[i] = own == 1.0 ? rest : own + rest - 1.0;
    t.above[i] = offset;
  }
  double noted(int64_t rows, const double* factor) const {
    for (int64_t i = rows; i % L != 0; ++i) t.log_of[i] = 0.0;
    vd total{};
    for (int64_t v = 0; v < rows; v += L) {
      const vl lanes = lanes_from(0) + v;
      const vd each_one = log1p_positive(load(t.log_of + v)) + load(t.above + v);
      const vd scaled = factor == nullptr ? each_one : each_one * load(factor + v);
      total += lanes < vl{} + rows ? scaled : vd{};
    }
    return sum_of(total);
  }
  static double exp_of(double x) { return x == 0.0 ? 1.0 : __builtin_exp(x); }

  PK_HOT double plackett_luce() const {
    const ListOptions& o = call.options;
    const bool gained = o.item_gain;
    if (gained) {
      for (int64_t v = 0; v < count; v += L) store(t.gain + v, exp2m1(load(t.y + v)));
    }
    for (int64_t i = count; i-- > 0;) {  // greatest score from i on
      t.place[i] = i + 1 < count && t.place[i + 1] > t.s[i] ? t.place[i + 1] : t.s[i];
    }
    int64_t rows = 0, block = 0;
    for (; rows < count; ++rows) {
      const int64_t i = rows;
      if (i > 0 && t.y[i] != t.y[i - 1]) block = i;
      if ((o.ties == Ties::stable ? i : block) >= stages) break;
      const int64_t begin = o.ties == Ties::stable ? i : o.ties == Ties::breslow ? block : t.end[i];
      double top = begin < count ? t.place[begin] : t.s[i];
      top = top > t.s[i] ? top : t.s[i];
      vd rest{};
      each(begin, [&](int64_t v, vl lanes, vl inside) {
        const vl other = inside & (lanes != vl{} + i);
        const vd e = other ? exp_negative(load(t.s + v) - splat(top)) : vd{};
        store(t.line + v, e);
        rest += e;
      });
      const double others = sum_of(rest), own = exp_of(t.s[i] - top);
      note(i, own, others, top - t.s[i]);
      const double share = (gained ? t.gain[i] : 1.0) / (own + others);
      for (int64_t v = begin / L * L; v < count; v += L) {
        store(t.u + v, fma(load(t.line + v), splat(share), load(t.u + v)));
      }
      t.u[i] -= others * share;
    }
    return noted(rows, gained ? t.gain : nullptr);
  }

  PK_HOT double pro() const {
    if (t.end[0] == count) return 0.0;
    for (int64_t i = 0; i + 1 < count; ++i) {
      const double widest = t.y[i] - t.y[count - 1], own_value = widest * t.s[i];
      vd highest = splat(own_value);
      each(i + 1, [&](int64_t v, vl, vl inside) {
        const vd value = (splat(t.y[i]) - load(t.y + v)) * load(t.s + v);
        store(t.line + v, value);
        highest = inside & (value > highest) ? value : highest;
      });
      const double top = max_of(highest);
      vd rest{};
      each(i + 1, [&](int64_t v, vl, vl inside) {
        const vd e = inside ? exp_negative(load(t.line + v) - splat(top)) : vd{};
        store(t.line + v, e);
        rest += e;
      });
      const double others = sum_of(rest), own = exp_of(own_value - top);
      note(i, own, others, top - own_value);
      const double share = 1.0 / (own + others);
      for (int64_t v = (i + 1) / L * L; v < count; v += L) {
        const vd factor = (splat(t.y[i]) - load(t.y + v)) * splat(share);
        store(t.u + v, fma(load(t.line + v), factor, load(t.u + v)));
      }
      t.u[i] -= widest * (others * share);
    }
    return noted(count - 1, nullptr);
  }

  // ---- one pass over the items ----------------------------------------------------------------

  // out[i] = exp(value_i / alpha - max): not yet divided by the sum, which is returned.
  double shares(const double* value, double alpha, double* out) const {
    double top = -pk_inf();
    for (int64_t i = 0; i < count; ++i) top = value[i] / alpha > top ? value[i] / alpha : top;
    vd total{};
    each(0, [&](int64_t v, vl, vl inside) {
      const vd e = inside ? exp_negative(load(value + v) / splat(alpha) - splat(top)) : vd{};
      store(out + v, e);
      total += e;
    });
    return sum_of(total);
  }

  // Targets q in `gain`.
  void targets() const {
    const Target kind = call.options.target;
    double total = 1.0;
    if (kind == Target::softmax) {
      total = shares(t.label, call.options.alpha, t.gain);
    } else {
      std::memcpy(t.gain, t.label, size_t(count) * sizeof(double));
      if (kind == Target::sum) {
        total = 0.0;
        for (int64_t i = 0; i < count; ++i) total += t.label[i];
      }
    }
    for (int64_t i = 0; i < count; ++i) t.gain[i] = total > 0.0 ? t.gain[i] / total : 0.0;
  }

  PK_HOT double softmax() const {
    for (int64_t i = count; i % L != 0; ++i) t.score[i] = t.label[i] = 0.0;
    targets();
    const double total = shares(t.score, 1.0, t.line);
    int64_t best = 0;
    for (int64_t i = 1; i < count; ++i) best = t.score[i] > t.score[best] ? i : best;
    // u_j = c_j (sum of the other q) - q_j (sum of the other c). The sums are formed without the
    // subtraction 1 - c_j, which leaves no digit when one item takes everything.
    double q = 0.0, c = 0.0;
    for (int64_t i = 0; i < count; ++i) {
      t.s[i] = q, t.y[i] = c;
      q += t.gain[i], c += t.line[i];
    }
    q = c = 0.0;
    double others = 0.0;  // of the best item
    for (int64_t i = count; i-- > 0;) {
      const double other_q = t.s[i] + q, other_c = t.y[i] + c;
      if (i == best) others = other_c;
      q += t.gain[i], c += t.line[i];
      t.u[i] = (t.line[i] * other_q - t.gain[i] * other_c) / total;
    }
    const double excess = __builtin_log1p(others);
    double loss = 0.0;
    for (int64_t i = 0; i < count; ++i) loss += t.gain[i] * (excess + (t.score[best] - t.score[i]));
    return loss;
  }

  PK_HOT double nca() const {
    for (int64_t i = count; i % L != 0; ++i) t.score[i] = t.label[i] = 0.0;
    const double total = shares(t.label, call.options.alpha, t.gain);
    const vd share = splat(1.0 / double(count));
    vd loss{};
    each(0, [&](int64_t v, vl, vl inside) {
      const vd s = load(t.score + v), q = load(t.gain + v) / splat(total);
      const vd e = exp_negative(-magnitude(s)), r = splat(1.0) / (splat(1.0) + e), soft = log1p_unit(e);
      const vd up = s > vd{} ? r : e * r, down = s > vd{} ? e * r : r;  // sigmoid(s), sigmoid(-s)
      const vd value = q * (soft + (s < vd{} ? -s : vd{})) + share * (soft + (s > vd{} ? s : vd{}));
      loss += inside ? value : vd{};
      store(t.u + v, share * up - q * down);
    });
    return sum_of(loss);
  }

  // Loss; derivatives in u, of the items origin (or item, where nothing was sorted).
  double run() const {
    switch (call.family) {
      case ListFamily::softmax: return softmax();
      case ListFamily::nca: return nca();
      default: break;
    }
    sort();
    switch (call.family) {
      case ListFamily::hinge: return hinge();
      case ListFamily::plackett_luce: return plackett_luce();
      case ListFamily::pro: return pro();
      default: return call.options.weights == PairWeights::none ? pair_plain() : pair_weighted();
    }
  }
};

template <class T>
void list_group(const ListCall& call, const ListScratch& t, int64_t g) {
  const T* scores = static_cast<const T*>(call.scores);
  const T* labels = static_cast<const T*>(call.labels);
  T* slope = static_cast<T*>(call.slope);
  ListGroup group{call, t};
  bool finite = true;
  for (int64_t i = call.cu[g]; i < call.cu[g + 1]; ++i) {
    if (labels[i] != labels[i]) {
      slope[i] = T(0);
      continue;
    }
    const double s = double(scores[i]);
    finite = finite && s - s == 0.0;
    t.score[group.count] = s, t.label[group.count] = double(labels[i]), t.item[group.count] = i;
    ++group.count;
  }
  const int64_t k = group.count;
  double loss = 0.0;
  const int64_t* order = t.item;
  if (!finite) {
    // Never hidden: the whole group is NaN, and no other group is touched.
    loss = __builtin_nan("");
    for (int64_t i = 0; i < k; ++i) t.u[i] = loss;
  } else if (k > 0) {
    group.stages = call.topk == nullptr || call.topk[g] > k ? k : call.topk[g];
    loss = group.run();
    if (call.family != ListFamily::softmax && call.family != ListFamily::nca) order = t.origin;
  }
  static_cast<T*>(call.loss)[g] = T(loss);
  for (int64_t i = 0; i < k; ++i) slope[order[i]] = T(t.u[i]);
}

// False when working memory could not be had.
inline bool list_rank(const ListCall& call) {
  const int64_t units = (call.groups + kListUnit - 1) / kListUnit;
  const int64_t threads = units < call.pool.threads ? units : call.pool.threads;
  const int64_t size = round_up(call.longest, Lanes<double>::L) + Lanes<double>::L;
  if (units == 0) return true;
  Memory memory;
  ListScratch* scratch = nullptr;
  const auto layout = [&](Arena& a) {
    ListScratch* all = a.take<ListScratch>(threads);
    scratch = all;
    for (int64_t i = 0; i < threads; ++i) {
      ListScratch one;
      one.layout(a, size);
      if (all != nullptr) all[i] = one;
    }
  };
  if (!memory.place(layout)) return false;
  parallel(call.pool, units, [&](int64_t unit, int thread) {
    const int64_t last = (unit + 1) * kListUnit < call.groups ? (unit + 1) * kListUnit : call.groups;
    for (int64_t g = unit * kListUnit; g < last; ++g) {
      if (call.type == Dtype::f64) list_group<double>(call, scratch[thread], g);
      else list_group<float>(call, scratch[thread], g);
    }
  });
  return true;
}

}  // namespace PK_ISA
}  // namespace prefkern
