// Ranking losses that are likelihoods of choices: log sum exp of a set less one of its members.
#pragma once

#include "cpu/list_group.h"

namespace prefkern {
namespace PK_ISA {

struct ListChoices : ListGroup {
  explicit ListChoices(const ListGroup& g) : ListGroup(g) {}

  // What each stage adds, LSE(members) - own, once own = exp(own - top) and rest, the sum of the
  // other members' exponentials, are known: log(own + rest) + (top - own score). The greatest
  // member is off first, so small differences keep their digits; its own 1 stays out of the
  // logarithm.
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
};

}  // namespace PK_ISA
}  // namespace prefkern
