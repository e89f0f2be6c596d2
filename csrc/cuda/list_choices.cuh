// Ranking losses over choices and single items: plackett_luce (in W), and in double softmax, pro,
// nca, anchor and set_contrast, whose exponents are products or shares of labels.
#pragma once

#include "cuda/list_group.cuh"

namespace prefkern {

// Columns between the phases: place the greatest score of an item's risk set, value its stage's
// factor over the set's exponentials (0: no stage), gain what its own stage pulls it by.
struct ListStages {
  template <class W, class Threads>
  PK_DEVICE static void run(const ListFrame<W, Threads>& f) {
    const ListOptions& o = f.args.options;
    f.each([&](const ListRows<W>& rows, int i) {
      const ListItem<W> own = rows.item(i);
      W top = own.score;
      int rank = 1, valid = 0;
      rows.each([&](int j, const ListItem<W>& x) {
        ++valid;
        const bool tied = x.label == own.label;
        rank += int(x.label > own.label || (tied && o.ties == Ties::stable && j < i));
        if (at_risk(o.ties, j, i, x, own) && x.score > top) top = x.score;
      });
      const int64_t stages = f.args.topk == nullptr ? valid : f.args.topk[rows.group];
      double share = 0.0, pull = 0.0;
      if (rank <= stages) {
        const double rest = rows.sum([&](int j, const ListItem<W>& x) {
          return j != i && at_risk(o.ties, j, i, x, own) ? pk_exp(x.score - top) : W(0);
        });
        const double above = double(top) - double(own.score), mine = exp_below(-above);
        const double factor = o.item_gain ? exp2_gain(double(own.label)) : 1.0;
        share = factor / (mine + rest);
        pull = share * rest;
        rows.set_term(i, factor * choice_loss(mine, rest, above));
      }
      rows.set_place(i, double(top));
      rows.set_value(i, share);
      rows.set_gain(i, pull);
    });
    f.each([&](const ListRows<W>& rows, int i) {
      const ListItem<W> own = rows.item(i);
      const double pushed = rows.sum([&](int j, const ListItem<W>& x) {
        const W share = rows.value(j).value;
        if (j == i || share == W(0) || !at_risk(o.ties, i, j, own, x)) return W(0);
        return share * pk_exp(own.score - rows.place(j).value);
      });
      f.put_slope(rows, i, pushed - whole(rows.gain(i)));
    });
  }

  // Whether j is in the risk set of i.
  template <class W>
  PK_DEVICE static bool at_risk(Ties ties, int j, int i, const ListItem<W>& x,
                                const ListItem<W>& own) {
    const bool with_ties = ties == Ties::breslow || (ties == Ties::stable ? j >= i : j == i);
    return x.label < own.label || (x.label == own.label && with_ties);
  }
};

struct ListSingles {
  using Rows = ListRows<double>;
  using Item = ListItem<double>;

  template <class Threads>
  PK_DEVICE static void run(const ListFrame<double, Threads>& f) {
    switch (f.args.family) {
      case ListFamily::softmax:
        return softmax(f);
      case ListFamily::nca:
        return nca(f);
      case ListFamily::anchor:
        return anchor(f);
      case ListFamily::set_contrast:
        return set_contrast(f);
      default:
        return pro(f);
    }
  }

  PK_DEVICE static double greatest_label(const Rows& rows, double alpha) {
    double top = -pk_inf();
    rows.each([&](int, const Item& x) { top = x.label / alpha > top ? x.label / alpha : top; });
    return top;
  }

  // l = sum_i q_i (A - s_i). value: e^(s - top), gain: q before its division, place: top - s.
  template <class Threads>
  PK_DEVICE static void softmax(const ListFrame<double, Threads>& f) {
    const ListOptions& o = f.args.options;
    f.each([&](const Rows& rows, int i) {
      const Item own = rows.item(i);
      double top = own.score;
      rows.each([&](int, const Item& x) { top = x.score > top ? x.score : top; });
      rows.set_value(i, exp_below(own.score - top));
      rows.set_place(i, top - own.score);
      rows.set_gain(i, o.target == Target::softmax
                           ? pk_exp(own.label / o.alpha - greatest_label(rows, o.alpha))
                           : own.label);
    });
    f.each([&](const Rows& rows, int i) {
      // Sums of the others, formed without the subtraction 1 - c_i, which leaves no digit when one
      // item takes everything; `excess` leaves out the first of the greatest items.
      double q = 0.0, c = 0.0, excess = 0.0;
      bool left_out = false;
      rows.each([&](int j, const Item&) {
        const double e = rows.value(j).value;
        if (j != i) q += rows.gain(j).value, c += e;
        if (!left_out && e == 1.0) {
          left_out = true;
        } else {
          excess += e;
        }
      });
      const double own_q = rows.gain(i).value, own_c = rows.value(i).value;
      double total = q + own_q;
      if (o.target == Target::none) total = 1.0;
      const double by = total > 0.0 ? 1.0 / total : 0.0;
      f.put_slope(rows, i, (own_c * (q * by) - own_q * by * c) / (c + own_c));
      rows.set_term(i, own_q * by * (pk_log1p(excess) + rows.place(i).value));
    });
  }

  // l = -sum_i q_i log sigmoid(s_i) - 1/K sum_i log sigmoid(-s_i). value: q before its division.
  template <class Threads>
  PK_DEVICE static void nca(const ListFrame<double, Threads>& f) {
    const double alpha = f.args.options.alpha;
    f.each([&](const Rows& rows, int i) {
      rows.set_value(i, pk_exp(rows.item(i).label / alpha - greatest_label(rows, alpha)));
    });
    f.each([&](const Rows& rows, int i) {
      double total = 0.0;
      int valid = 0;
      rows.each([&](int j, const Item&) { total += rows.value(j).value, ++valid; });
      single(f, rows, i, rows.value(i).value / total, 1.0 / double(valid));
    });
  }

  // above softplus(-s) + below softplus(s), and its slope.
  template <class Threads>
  PK_DEVICE static void single(const ListFrame<double, Threads>& f, const Rows& rows, int i,
                               double above, double below) {
    const double s = rows.item(i).score;
    const Logistic<double> x = logistic(s);
    const double other = (s > 0.0 ? s : 0.0) + (x.loss - (s < 0.0 ? -s : 0.0));
    rows.set_term(i, above * x.loss + below * other);
    f.put_slope(rows, i, below * x.up - above * x.down);
  }

  // place: mu_i / (K - 1), 0 for the last item in label order; value: what it adds to lower items.
  template <class Threads>
  PK_DEVICE static void anchor(const ListFrame<double, Threads>& f) {
    f.each([&](const Rows& rows, int i) {
      const Item own = rows.item(i);
      double low = own.score, high = own.score;
      int valid = 0, lower = 0, rank = 1;
      bool differ = false;
      rows.each([&](int j, const Item& x) {
        ++valid;
        low = x.score < low ? x.score : low, high = x.score > high ? x.score : high;
        lower += int(x.label < own.label);
        rank += int(x.label > own.label || (x.label == own.label && j < i));
        differ = differ || x.label != own.label;
      });
      double mu = 0.0;
      if (differ && rank < valid) {
        mu = (high > low ? (own.score - low) / (high - low) : 1.0) / double(valid - 1);
      }
      rows.set_place(i, mu);
      rows.set_value(i, f.args.options.inner_mean && lower > 0 ? mu / double(lower) : mu);
    });
    f.each([&](const Rows& rows, int i) {
      const double own = rows.item(i).label;
      double push = 0.0;
      rows.each([&](int j, const Item& x) { push += x.label > own ? rows.value(j).value : 0.0; });
      single(f, rows, i, rows.place(i).value, push);
    });
  }

  // l = softplus(LSE(x over Y-) - LSE(x over Y+)), x = s + deviation |y - mean y|, Y+ = {y > mean}.
  // value: x; place: 1 in Y+; gain: e^(x - top of its side).
  template <class Threads>
  PK_DEVICE static void set_contrast(const ListFrame<double, Threads>& f) {
    f.each([&](const Rows& rows, int i) {
      // A label that ties with the mean belongs to Y-. So the mean is that of the labels'
      // precision: of 0.9, 0.5 and 0.1 in fp32 it is 0.5, and not the 0.50000001 of their fp64
      // values.
      double total = 0.0, lost = 0.0;
      int valid = 0;
      rows.each([&](int, const Item& x) {
        const double sum = total + x.label, part = sum - total;
        lost += (total - (sum - part)) + (x.label - part);
        total = sum, ++valid;
      });
      double mean = (total + lost) / double(valid);
      if (!f.args.doubles) mean = double(float(mean));
      const Item own = rows.item(i);
      rows.set_value(i, own.score + f.args.options.deviation * pk_abs(own.label - mean));
      rows.set_place(i, own.label > mean ? 1.0 : 0.0);
    });
    f.each([&](const Rows& rows, int i) {
      const double side = rows.place(i).value;
      double top = rows.value(i).value;
      rows.each([&](int j, const Item&) {
        if (rows.place(j).value == side && rows.value(j).value > top) top = rows.value(j).value;
      });
      rows.set_gain(i, exp_below(rows.value(i).value - top));
    });
    f.each([&](const Rows& rows, int i) {
      const double label = rows.item(i).label;
      double good = 0.0, bad = 0.0, good_top = -pk_inf(), bad_top = -pk_inf();
      bool differ = false;
      int first = -1;
      rows.each([&](int j, const Item& x) {
        if (first < 0) first = j;
        differ = differ || x.label != label;
        const bool in_good = rows.place(j).value != 0.0;
        const double e = rows.gain(j).value, at = rows.value(j).value;
        good += in_good ? e : 0.0, bad += in_good ? 0.0 : e;
        if (in_good && at > good_top) good_top = at;
        if (!in_good && at > bad_top) bad_top = at;
      });
      double u = 0.0, loss = 0.0;
      // A mean of equal labels may be off by rounding; a side must hold a real difference.
      if (differ && good > 0.0) {
        const Logistic<double> won = logistic(pk_log(good) - pk_log(bad) + (good_top - bad_top));
        const bool in_good = rows.place(i).value != 0.0;
        u = (in_good ? -won.down : won.down) * rows.gain(i).value / (in_good ? good : bad);
        loss = i == first ? won.loss : 0.0;
      }
      f.put_slope(rows, i, u);
      rows.set_term(i, loss);
    });
  }

  // l = sum over ranks k of LSE(M_k s_k, {m_ki s_i}) - M_k s_k, m_ki = y_k - y_i, M_k = max_i m_ki,
  // i ranked after k. place: top of stage k, value: 1 over its exponentials, gain: the others' sum.
  template <class Threads>
  PK_DEVICE static void pro(const ListFrame<double, Threads>& f) {
    f.each([&](const Rows& rows, int i) {
      const Item own = rows.item(i);
      double least = own.label;
      bool differ = false, last = true;
      rows.each([&](int j, const Item& x) {
        least = x.label < least ? x.label : least;
        differ = differ || x.label != own.label;
        last = last && !after(j, i, x, own);
      });
      double share = 0.0, rest = 0.0;
      if (differ && !last) {
        const double own_value = (own.label - least) * own.score;
        double top = own_value;
        rows.each([&](int j, const Item& x) {
          const double at = (own.label - x.label) * x.score;
          if (after(j, i, x, own) && at > top) top = at;
        });
        rows.each([&](int j, const Item& x) {
          if (after(j, i, x, own)) rest += pk_exp((own.label - x.label) * x.score - top);
        });
        const double mine = exp_below(own_value - top);
        share = 1.0 / (mine + rest);
        rows.set_place(i, top);
        rows.set_term(i, choice_loss(mine, rest, top - own_value));
      }
      rows.set_value(i, share);
      rows.set_gain(i, (own.label - least) * (rest * share));
    });
    f.each([&](const Rows& rows, int i) {
      const Item own = rows.item(i);
      double pushed = 0.0;
      rows.each([&](int j, const Item& x) {
        const double share = rows.value(j).value, factor = x.label - own.label;
        if (share != 0.0 && after(i, j, own, x)) {
          pushed += factor * (share * pk_exp(factor * own.score - rows.place(j).value));
        }
      });
      f.put_slope(rows, i, pushed - rows.gain(i).value);
    });
  }
  // Whether j is ranked after i by label.
  PK_DEVICE static bool after(int j, int i, const Item& x, const Item& own) {
    return x.label < own.label || (x.label == own.label && j > i);
  }
};

}  // namespace prefkern
