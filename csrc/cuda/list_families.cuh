// The ranking losses on a team (list_team.cuh): pair, plackett_luce, softmax.
//
// pair and plackett_luce in W = float for fp32 scores: a term of a pair is fp32 of a few ulp, sums
// and everything per item (ranks, discounts, gains, ideal DCG) are double. In double, a pair costs
// about 80 double instructions; a list of 16 would take four times the time of its memory traffic.
#pragma once

#include "cuda/list_team.cuh"

namespace prefkern {

// Slopes and loss of every group from the items' parts, times factor(t). A broken item makes the
// loss NaN and with it all slopes of the group.
template <class Team, class Part, class Slope, class Factor>
PK_DEVICE void finish_list(Team& m, const Part& part, const Slope& slope, const Factor& factor) {
  const auto loss = m.reduce(
      [&](int t, int i) { return broken(m.item(t, i)) ? pk_nan() : part(t, i); }, Add(), 0.0);
  m.put([&](int t, int i) { return loss[t] == loss[t] ? slope(t, i) * factor(t) : pk_nan(); },
        [&](int t) { return loss[t] * factor(t); });
}

struct ListPair {
  template <class W>
  struct Plain {
    ListItem<W> item;
  };
  template <class W>
  struct Placed {
    ListItem<W> item;
    ListCell<W> place;  // discount of the item's rank, or the rank itself (form dcg2)
    W gain;             // 2^label or 1, over the ideal DCG
  };
  struct Ranks {
    int by_source = 1, by_label = 1;
  };
  struct Tied {
    double total = 0.0;
    int count = 0;
  };

  template <class Team>
  PK_DEVICE static void run(Team& m) {
    using W = typename Team::Work;
    const ListOptions& o = m.a.options;
    if (o.weights == PairWeights::lambda) return exchange(m);
    const auto get = [&](int t, int i) { return Plain<W>{hidden(m.item(t, i))}; };
    if (o.weights == PairWeights::none) {
      fold(m, get, [](const Plain<W>&, const Plain<W>&, W) { return W(1); });
    } else {
      fold(m, get, [](const Plain<W>& a, const Plain<W>& c, W sign) {
        return sign == W(0) ? W(0) : pk_abs(a.item.label - c.item.label);
      });
    }
  }
  // The item with score 0 where there is none: it meets others in arithmetic, not only comparisons.
  template <class W>
  PK_DEVICE static ListItem<W> hidden(const ListItem<W>& x) {
    return {x.label == x.label ? x.score : W(0), x.label};
  }

  // weight(i, j, sign of y_i - y_j) times softplus(-(s_winner - s_loser)).
  template <class Team, class Get, class Weight>
  PK_DEVICE static void fold(Team& m, const Get& get, const Weight& weight) {
    using W = typename Team::Work;
    using Record = decltype(get(0, 0));
    const ListOptions& o = m.a.options;
    typename Team::template Column<double> loss(m, 2), u(m, 3), count(m, 4);
    m.pairs(
        get,
        [&](const Record& own, const Record& x, bool counts) {
          // 1: own wins; -1: x does; 0: no pair. Multiplied, not branched over: a warp waits for
          // its slowest lane anyway, and the scores of what is no item are 0.
          const W sign =
              !counts ? W(0) : W(own.item.label > x.item.label) - W(own.item.label < x.item.label);
          const W gap = sign * (own.item.score - x.item.score);  // winner less loser
          const W e = exp_of_negative(pk_abs(gap)), r = divide_near_one(W(1), W(1) + e);
          const W value = log1p_unit(e) + (gap < W(0) ? -gap : W(0));
          const W slope = gap > W(0) ? e * r : r, w = weight(own, x, sign);
          return PairTerm<W>{pk_abs(sign) * w * value, -(sign * w * slope), pk_abs(sign)};
        },
        [&](int t, int i, const PairSums& sums) {
          loss.at(t, i) = sums.loss, u.at(t, i) = sums.push, count.at(t, i) = sums.count;
        });
    typename Team::template Local<double> factor, by;
    m.b.each([&](int t) { factor[t] = 1.0; });
    if (o.mean_pairs) {
      by = m.reduce([&](int t, int i) { return count.at(t, i); }, Add(), 0.0);
      m.b.each([&](int t) { factor[t] = by[t] > 0.0 ? 1.0 / by[t] : 1.0; });
    }
    if (o.scale_by_list_size) {
      by = m.reduce([](int, int) { return 1.0; }, Add(), 0.0);
      m.b.each([&](int t) { factor[t] *= by[t]; });
    }
    finish_list(
        m, [&](int t, int i) { return loss.at(t, i); }, [&](int t, int i) { return u.at(t, i); },
        [&](int t) { return factor[t]; });
  }

  // Weights |G_i - G_j| |D_i - D_j|: what exchanging two items does to a DCG.
  template <class Team>
  PK_DEVICE static void exchange(Team& m) {
    using W = typename Team::Work;
    const ListOptions& o = m.a.options;
    typename Team::template Column<ListCell<W>> place(m, 0);
    typename Team::template Column<W> gain(m, 1);
    typename Team::template Column<double> best(m, 2), mean(m, 3);
    m.visit([&](int t, int i) { return m.item(t, i); }, Ranks(),
            [&](Ranks& r, int t, int i, int j, const ListItem<W>& x) {
              const ListItem<W> own = m.item(t, i);
              const W v = o.rank_by_score ? x.score : x.label;
              const W mine = o.rank_by_score ? own.score : own.label;
              r.by_source += int(v > mine || (v == mine && j < i));
              r.by_label += int(x.label > own.label || (x.label == own.label && j < i));
            },
            [&](int t, int i, const Ranks& r) {
              const double y = double(m.item(t, i).label);
              const double d = rank_discount(r.by_source, o.base2, o.topn);
              place.at(t, i) = list_cell(o.dcg2 ? double(r.by_source) : d, W());
              gain.at(t, i) = W(o.linear_gain ? 1.0 : pk_exp2(y));
              if (!o.normalize) return;
              best.at(t, i) =
                  (o.linear_gain ? y : exp2_gain(y)) * rank_discount(r.by_label, o.base2, o.topn);
            });
    if (o.tie_average) {
      struct At {
        ListItem<W> item;
        ListCell<W> place;
      };
      const auto source = [&](const ListItem<W>& x) { return o.rank_by_score ? x.score : x.label; };
      m.visit([&](int t, int i) { return At{m.item(t, i), place.at(t, i)}; }, Tied(),
              [&](Tied& r, int t, int i, int, const At& x) {
                if (source(x.item) != source(m.item(t, i))) return;
                r.total += whole(x.place), ++r.count;
              },
              [&](int t, int i, const Tied& r) {
                mean.at(t, i) = (r.total + whole(place.at(t, i))) / double(r.count + 1);
              });
      m.each([&](int t, int i) { place.at(t, i) = list_cell(mean.at(t, i), W()); });
    }
    if (o.normalize) {
      const auto ideal = m.reduce([&](int t, int i) { return best.at(t, i); }, Add(), 0.0);
      m.each([&](int t, int i) {
        const double g = o.linear_gain ? 1.0 : pk_exp2(double(m.item(t, i).label));
        gain.at(t, i) = W(g / (ideal[t] == 0.0 ? 1.0 : ideal[t]));
      });
    }
    fold(
        m,
        [&](int t, int i) {
          return Placed<W>{hidden(m.item(t, i)), place.at(t, i), gain.at(t, i)};
        },
        [&](const Placed<W>& a, const Placed<W>& c, W sign) {
          if (sign == W(0)) return W(0);
          // 2^y (1 - 2^-apart) of the higher label y: close labels do not cancel.
          const W apart = pk_abs(a.item.label - c.item.label);
          const W won = (sign > W(0) ? a.gain : c.gain) *
                        (o.linear_gain ? apart : -pk_expm1(apart * W(-kLog2)));
          const W cost = o.dcg2 ? step_cost(o, pk_abs(a.place.value - c.place.value))
                                : pk_abs(less(a.place, c.place));
          return cost == W(0) ? W(0) : won * cost;  // beyond topn, whatever the gain is
        });
  }
  // By how much the rank `steps` from the first has more than the next; two logarithms in double,
  // for an option that few ask for.
  template <class W>
  PK_DEVICE static W step_cost(const ListOptions& o, W steps) {
    const int64_t rank = int64_t(steps);
    return W(rank_discount(rank, o.base2, o.topn) - rank_discount(rank + 1, o.base2, o.topn));
  }
};

// l = sum over stages i of f_i (LSE of i's risk set - s_i), its derivative by shares of the stages:
// u_j = sum_{i != j} share_i exp(s_j - top_i) - share_j (sum of the others in j's set).
struct ListStages {
  template <class W>
  struct Risk {
    W top;  // greatest score among the others of the item's risk set
    int rank = 1;
  };
  template <class W>
  struct Stage {
    W label, top, share;  // share: the stage's factor over its set's exponentials; 0: no stage
  };

  template <class Team>
  PK_DEVICE static void run(Team& m) {
    using W = typename Team::Work;
    using Item = ListItem<W>;
    const ListOptions& o = m.a.options;
    typename Team::template Column<W> top(m, 0), share(m, 1);
    typename Team::template Column<double> loss(m, 2), u(m, 3);
    typename Team::template Column<int> rank(m, 4);
    const auto item = [&](int t, int i) { return m.item(t, i); };
    m.visit(
        item, Risk<W>{W(-pk_inf())},
        [&](Risk<W>& r, int t, int i, int j, const Item& x) {
          const Item own = m.item(t, i);
          const bool tied = x.label == own.label;
          r.rank += int(x.label > own.label || (tied && o.ties == Ties::stable && j < i));
          if (at_risk(o.ties, j, i, x.label, own.label) && x.score > r.top) r.top = x.score;
        },
        [&](int t, int i, const Risk<W>& r) {
          const W own = m.item(t, i).score;
          top.at(t, i) = r.top > own ? r.top : own, rank.at(t, i) = r.rank;
        });
    m.visit(
        item, 0.0,
        [&](double& rest, int t, int i, int j, const Item& x) {
          const W e = exp_of_negative(top.at(t, i) - x.score);
          rest += at_risk(o.ties, j, i, x.label, m.item(t, i).label) ? e : W(0);
        },
        [&](int t, int i, double rest) {
          const Item own = m.item(t, i);
          const double above = double(top.at(t, i)) - double(own.score);
          const double mine = exp_below(-above);
          const bool stage = m.a.topk == nullptr || rank.at(t, i) <= m.a.topk[m.group(t)];
          const double factor = !stage ? 0.0 : o.item_gain ? exp2_gain(double(own.label)) : 1.0;
          share.at(t, i) = W(factor / (mine + rest));
          u.at(t, i) = -(factor / (mine + rest)) * rest;
          loss.at(t, i) = stage ? factor * choice_loss(mine, rest, above) : 0.0;
        });
    m.visit(
        [&](int t, int i) { return Stage<W>{m.item(t, i).label, top.at(t, i), share.at(t, i)}; },
        0.0,
        [&](double& pushed, int t, int i, int j, const Stage<W>& x) {
          const Item own = m.item(t, i);
          const W e = x.share * exp_of_negative(x.top - own.score);
          const bool drawn = x.share != W(0) && at_risk(o.ties, i, j, own.label, x.label);
          pushed += drawn ? e : W(0);
        },
        [&](int t, int i, double pushed) { u.at(t, i) += pushed; });
    finish_list(
        m, [&](int t, int i) { return loss.at(t, i); }, [&](int t, int i) { return u.at(t, i); },
        [](int) { return 1.0; });
  }

  // Whether j is in the risk set of i.
  template <class W>
  PK_DEVICE static bool at_risk(Ties ties, int j, int i, W label, W own) {
    const bool with_ties = ties == Ties::breslow || (ties == Ties::stable && j > i);
    return label < own || (label == own && with_ties);
  }
};

// l = sum_i q_i (A - s_i), always in double: its terms are one per item.
struct ListSoftmax {
  struct Part {
    double e, q;  // e^(s - top), q before its division
  };
  struct Sums {
    double e = 0.0, q = 0.0, but_one = 0.0;  // but_one: without one of the greatest items
    bool left_out = false;
  };

  template <class Team>
  PK_DEVICE static void run(Team& m) {
    const ListOptions& o = m.a.options;
    const bool soft = o.target == Target::softmax;
    typename Team::template Column<double> e(m, 0), q(m, 1), loss(m, 2), u(m, 3);
    const auto top =
        m.reduce([&](int t, int i) { return m.item(t, i).score; }, Larger(), -pk_inf());
    typename Team::template Local<double> high;
    if (soft) {
      high =
          m.reduce([&](int t, int i) { return m.item(t, i).label / o.alpha; }, Larger(), -pk_inf());
    }
    m.each([&](int t, int i) {
      const ListItem<double> own = m.item(t, i);
      e.at(t, i) = exp_below(own.score - top[t]);
      q.at(t, i) = soft ? pk_exp(own.label / o.alpha - high[t]) : own.label;
    });
    // Sums of the others, formed without the subtraction 1 - c_i, which leaves no digit when one
    // item takes everything.
    m.visit(
        [&](int t, int i) {
          return m.item(t, i).label == m.item(t, i).label ? Part{e.at(t, i), q.at(t, i)}
                                                          : Part{0.0, 0.0};
        },
        Sums(),
        [](Sums& r, int, int, int, const Part& x) {
          r.e += x.e, r.q += x.q;
          if (!r.left_out && x.e == 1.0) {
            r.left_out = true;
          } else {
            r.but_one += x.e;
          }
        },
        [&](int t, int i, const Sums& r) {
          const double own_e = e.at(t, i), own_q = q.at(t, i);
          const double total = o.target == Target::none ? 1.0 : r.q + own_q;
          const double by = total > 0.0 ? 1.0 / total : 0.0;
          const double excess = own_e == 1.0 ? r.e : r.but_one + own_e;
          u.at(t, i) = (own_e * (r.q * by) - own_q * by * r.e) / (r.e + own_e);
          loss.at(t, i) = own_q * by * (pk_log1p(excess) + (top[t] - m.item(t, i).score));
        });
    finish_list(
        m, [&](int t, int i) { return loss.at(t, i); }, [&](int t, int i) { return u.at(t, i); },
        [](int) { return 1.0; });
  }
};

}  // namespace prefkern
