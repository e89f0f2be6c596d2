// Ranking losses over pairs of items: pair, hinge, rank_hinge, approx_ndcg.
//
// W = float for fp32 scores: a pair's loss and slope are fp32 terms of a few ulp, their sums and
// everything per item (ranks, discounts, gains, ideal DCG) are double. In double, a pair costs
// about 80 double instructions; a list of 16 would take four times the time of its memory traffic.
#pragma once

#include "cuda/list_group.cuh"

namespace prefkern {

// The pairs of a group are added up by link(rows, i, j, apart, gap, value, slope): i is labelled
// `apart` > 0 above j, gap = s_i - s_j, slope = -dl/dgap >= 0. Then finish(rows, i, loss, u) for
// every valid item, with the losses of pairs that the item's thread has visited, and dl/ds_i.

// Loss of the pair (i, j) and what it adds to dl/ds_i, the opposite of what it adds to dl/ds_j.
template <class W>
struct PairTerm {
  W loss, push;
};
template <class W, class Link>
PK_DEVICE PairTerm<W> pair_term(const ListRows<W>& rows, int i, const ListItem<W>& own, int j,
                                const ListItem<W>& other, const Link& link) {
  const bool wins = other.label < own.label;
  if (!wins && !(other.label > own.label)) return {W(0), W(0)};
  const W apart = wins ? own.label - other.label : other.label - own.label;
  const W gap = wins ? own.score - other.score : other.score - own.score;
  W value = 0, slope = 0;
  link(rows, wins ? i : j, wins ? j : i, apart, gap, value, slope);
  return {value, wins ? -slope : slope};
}

// Every item visits all others, so that each pair is evaluated from both sides.
template <class W, class Threads, class Link, class Finish>
PK_DEVICE void fold_pairs_twice(const ListFrame<W, Threads>& f, const Link& link,
                                const Finish& finish) {
  f.each([&](const ListRows<W>& rows, int i) {
    const ListItem<W> own = rows.item(i);
    double loss = 0.0, u = 0.0;
    for (int first = 0; first < rows.count; first += kListChunk) {
      const int last = first + kListChunk < rows.count ? first + kListChunk : rows.count;
      W value = 0, push = 0;
      for (int j = first; j < last; ++j) {
        const ListItem<W> other = rows.item(j);
        const PairTerm<W> term = pair_term(rows, i, own, j, other, link);
        value += other.label < own.label ? term.loss : W(0);
        push += term.push;
      }
      loss += double(value);
      u += double(push);
    }
    finish(rows, i, loss, u);
  });
}

// Each pair once, for packed groups in float: item i visits the items i + 1 ... i + K/2 (mod K) and
// leaves what they are pushed by in shared memory, two steps to a cell; after a barrier every item
// collects its own.
template <class Threads, class Link, class Finish>
PK_DEVICE void fold_pairs_once(const ListFrame<float, Threads>& f, const Link& link,
                               const Finish& finish) {
  typename Threads::template Local<double> loss, u;
  // Steps of item i; only the first half of an even group takes the step of half its size.
  const auto steps = [](int i, int k) { return 2 * i < k ? k / 2 : (k - 1) / 2; };
  f.b.each([&](int t) { loss[t] = 0.0, u[t] = 0.0; });
  for (int from = 0; 4 * from + 2 <= f.longest; from += kListCells) {
    f.b.each([&](int t) {
      const ListRows<float> rows = f.rows_of(t);
      if (rows.count == 0) return;
      const int i = t - rows.begin, k = rows.count, mine = steps(i, k);
      const ListItem<float> own = f.items_here.get(t);
      float value = 0, push = 0;
      int step = 2 * from + 1, j = i + step < k ? i + step : i + step - k;
      const auto visit = [&] {
        PairTerm<float> term{0, 0};
        if (step <= mine) {
          term = pair_term(rows, i, own, j, f.items_here.get(rows.begin + j), link);
        }
        value += term.loss;
        push += term.push;
        ++step, j = j + 1 < k ? j + 1 : 0;
        return term.push;
      };
      for (int cell = 0; cell < kListCells && 4 * (from + cell) + 2 <= k; ++cell) {
        const float one = visit(), two = visit();
        f.pushes.put(cell * kListThreads + t, {one, two});
      }
      loss[t] += double(value);
      u[t] += double(push);
    });
    f.b.sync();
    f.b.each([&](int t) {
      const ListRows<float> rows = f.rows_of(t);
      const int i = t - rows.begin, k = rows.count;
      float push = 0;
      for (int cell = 0; cell < kListCells && 4 * (from + cell) + 2 <= k; ++cell) {
        const int step = 2 * (from + cell) + 1;
        const int one = i - step < 0 ? i - step + k : i - step;
        const int two = one == 0 ? k - 1 : one - 1;
        const int first = cell * kListThreads + rows.begin;
        push += f.pushes.get(first + one).value;
        push += f.pushes.get(first + two).rest;
      }
      u[t] -= double(push);
    });
    f.b.sync();
  }
  f.each([&](const ListRows<float>& rows, int i) {
    finish(rows, i, loss[rows.begin + i], u[rows.begin + i]);
  });
}

template <class W, class Threads, class Link, class Finish>
PK_DEVICE void fold_pairs(const ListFrame<W, Threads>& f, const Link& link, const Finish& finish) {
  if constexpr (sizeof(W) == 4) {
    if (f.packed) return fold_pairs_once(f, link, finish);
  }
  fold_pairs_twice(f, link, finish);
}

// What the exchange of two items does to a DCG, before the pairs are visited.
//   place  discount of an item's rank, or (form dcg2) the rank itself
//   value  form dcg2: by how much rank k + 1 has less than rank k
//   gain   2^label or 1, over the ideal DCG
template <class W, class Threads>
PK_DEVICE void prepare_exchange(const ListFrame<W, Threads>& f) {
  const ListOptions& o = f.args.options;
  f.each([&](const ListRows<W>& rows, int i) {
    const int rank = o.rank_by_score ? rows.score_rank(i) : rows.label_rank(i);
    const double y = double(rows.item(i).label);
    if (o.dcg2) {
      rows.set_place(i, double(rank));
      // The entry of the distance rank - 1; ranks are all of 1 to the number of valid items.
      rows.set_value(
          rank - 1,
          rank == 1 ? 0.0 : rank_discount(rank - 1, o.base2, 0) - rank_discount(rank, o.base2, 0));
    } else if (o.tie_average) {
      rows.set_value(i, rank_discount(rank, o.base2, o.topn));
    } else {
      rows.set_place(i, rank_discount(rank, o.base2, o.topn));
    }
    if (o.normalize) {
      const int best = o.rank_by_score ? rows.label_rank(i) : rank;
      rows.set_term(i, (o.linear_gain ? y : exp2_gain(y)) * rank_discount(best, o.base2, o.topn));
    } else {
      rows.set_gain(i, o.linear_gain ? 1.0 : pk_exp2(y));
    }
  });
  if (o.tie_average) {
    f.each([&](const ListRows<W>& rows, int i) {
      const ListItem<W> own = rows.item(i);
      double total = 0.0;
      int tied = 0;
      rows.each([&](int j, const ListItem<W>& x) {
        if (o.rank_by_score ? x.score == own.score : x.label == own.label) {
          total += whole(rows.value(j));
          ++tied;
        }
      });
      rows.set_place(i, total / double(tied));
    });
  }
  if (o.normalize) {
    f.each([&](const ListRows<W>& rows, int i) {
      double ideal = 0.0;
      rows.each([&](int j, const ListItem<W>&) { ideal += rows.term(j); });
      const double y = double(rows.item(i).label);
      rows.set_gain(i, (o.linear_gain ? 1.0 : pk_exp2(y)) / (ideal == 0.0 ? 1.0 : ideal));
    });
  }
}

// Weight of the pair (i, j), labelled `apart` > 0 apart: 2^y_i (1 - 2^-apart), so that close labels
// do not cancel, times the difference of the discounts.
template <class W>
PK_DEVICE W exchange_weight(const ListOptions& o, const ListRows<W>& rows, int i, int j, W apart) {
  const W gain = rows.gain(i).value * (o.linear_gain ? apart : -pk_expm1(apart * W(-kLog2)));
  const ListCell<W> a = rows.place(i), c = rows.place(j);
  const W cost = o.dcg2 ? rows.value(int(pk_abs(a.value - c.value))).value : pk_abs(less(a, c));
  return cost == W(0) ? W(0) : gain * cost;  // beyond topn, whatever the gain is
}

template <class W, class Threads>
PK_DEVICE void fold_pair_family(const ListFrame<W, Threads>& f) {
  const ListOptions& o = f.args.options;
  const bool hinge = f.args.family == ListFamily::hinge;
  const PairWeights weights = hinge ? PairWeights::none : o.weights;
  if (o.mean_pairs) {
    f.each([&](const ListRows<W>& rows, int i) {
      const W own = rows.item(i).label;
      int wins = 0;
      rows.each([&](int, const ListItem<W>& x) { wins += int(x.label < own); });
      rows.set_tally(i, wins);
    });
  }
  if (weights == PairWeights::lambda) prepare_exchange(f);
  const auto finish = [&](const ListRows<W>& rows, int i, double loss, double u) {
    double factor = 1.0;
    if (o.mean_pairs) {
      int64_t pairs = 0;
      rows.each([&](int j, const ListItem<W>&) { pairs += rows.tally(j); });
      factor = pairs > 0 ? 1.0 / double(pairs) : 1.0;
    }
    if (o.scale_by_list_size) factor *= double(rows.valid());
    rows.set_term(i, loss * factor);
    f.put_slope(rows, i, u * factor);
  };
  if (hinge) {
    const W margin = W(o.margin);
    fold_pairs(
        f,
        [&](const ListRows<W>&, int, int, W, W gap, W& value, W& slope) {
          const bool active = gap < margin;
          value = active ? margin - gap : W(0), slope = active ? W(1) : W(0);
        },
        finish);
  } else if (weights == PairWeights::none) {
    fold_pairs(
        f,
        [&](const ListRows<W>&, int, int, W, W gap, W& value, W& slope) {
          const Logistic<W> x = logistic(gap);
          value = x.loss, slope = x.down;
        },
        finish);
  } else {
    fold_pairs(
        f,
        [&](const ListRows<W>& rows, int i, int j, W apart, W gap, W& value, W& slope) {
          const W w =
              weights == PairWeights::labeldiff ? apart : exchange_weight(o, rows, i, j, apart);
          const Logistic<W> x = logistic(gap);
          value = w * x.loss, slope = w * x.down;
        },
        finish);
  }
}

// l = sum_{y_i > y_j} max(0, c_ij - gap), or c_ij max(0, -gap); c_ij = scale (rank j - rank i).
template <class W, class Threads>
PK_DEVICE void fold_rank_hinge(const ListFrame<W, Threads>& f) {
  const ListOptions& o = f.args.options;
  f.each([&](const ListRows<W>& rows, int i) {
    const double step = o.per_item ? o.scale / double(rows.valid()) : o.scale;
    rows.set_place(i, step * double(rows.label_rank(i)));
  });
  fold_pairs(
      f,
      [&](const ListRows<W>& rows, int i, int j, W, W gap, W& value, W& slope) {
        const W apart = less(rows.place(j), rows.place(i));
        const bool active = o.product ? gap < W(0) : gap < apart;
        value = !active ? W(0) : o.product ? apart * -gap : apart - gap;
        slope = !active ? W(0) : o.product ? apart : W(1);
      },
      [&](const ListRows<W>& rows, int i, double loss, double u) {
        rows.set_term(i, loss);
        f.put_slope(rows, i, u);
      });
}

// l = -sum_i (G_i / Z) / log2(1 + r_i), r_i = 1 + sum_{j != i} sigmoid((s_j - s_i) / T).
template <class W, class Threads>
PK_DEVICE void fold_approx_ndcg(const ListFrame<W, Threads>& f) {
  const W by = W(1.0 / f.args.options.temperature);
  f.each([&](const ListRows<W>& rows, int i) {
    const ListItem<W> own = rows.item(i);
    const double gain = exp2_gain(double(own.label));
    rows.set_term(i, gain * rank_discount(rows.label_rank(i), true, 0));
    rows.set_value(i, 1.0 + rows.sum([&](int j, const ListItem<W>& x) {
      return j == i ? W(0) : logistic((x.score - own.score) * by).up;
    }));
  });
  f.each([&](const ListRows<W>& rows, int i) {
    const ListItem<W> own = rows.item(i);
    double ideal = 0.0;
    bool differ = false;
    rows.each([&](int j, const ListItem<W>& x) {
      ideal += rows.term(j);
      differ = differ || x.label != own.label;
    });
    const double gain = exp2_gain(double(own.label));
    const double share = !differ || ideal == 0.0 ? 0.0 : gain / ideal * kLog2;
    const double soft = whole(rows.value(i)), log = pk_log1p(soft);
    rows.set_gain(i, share / log);
    rows.set_place(i, share / ((1.0 + soft) * log * log));
  });
  f.each([&](const ListRows<W>& rows, int i) {
    const ListItem<W> own = rows.item(i);
    const ListCell<W> pull = rows.place(i);
    const double u = rows.sum([&](int j, const ListItem<W>& x) {
      if (j == i) return W(0);
      const Logistic<W> chance = logistic((x.score - own.score) * by);
      return less(rows.place(j), pull) * (chance.up * chance.down);
    });
    rows.set_term(i, -whole(rows.gain(i)));
    f.put_slope(rows, i, u / f.args.options.temperature);
  });
}

struct ListPairs {
  template <class W, class Threads>
  PK_DEVICE static void run(const ListFrame<W, Threads>& f) {
    switch (f.args.family) {
      case ListFamily::rank_hinge:
        return fold_rank_hinge(f);
      case ListFamily::approx_ndcg:
        return fold_approx_ndcg(f);
      default:
        return fold_pair_family(f);
    }
  }
};

}  // namespace prefkern
