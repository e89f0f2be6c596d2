// The ranking families beyond pairs and likelihoods. In label order the items labelled below item i
// are those from end[i] on.
#pragma once

#include "cpu/list_group.h"

namespace prefkern {
namespace PK_ISA {

// l = sum_{y_i > y_j} max(0, c_ij - gap), or c_ij max(0, -gap); c_ij = scale (j - i) in label
// order.
PK_HOT inline double rank_hinge(const ListGroup& g) {
  const ListScratch& t = g.t;
  const ListOptions& o = g.call.options;
  const double step = o.per_item ? o.scale / double(g.count) : o.scale;
  vd loss{};
  for (int64_t i = 0; i < g.count && t.end[i] < g.count; ++i) {
    const vd own = splat(t.s[i]);
    vd pushed{};
    g.each(t.end[i], [&](int64_t v, vl lanes, vl inside) {
      const vd gap = own - load(t.s + v);
      const vd apart = splat(step) * __builtin_convertvector(lanes - i, vd);
      const auto active = inside & (o.product ? gap < vd{} : gap < apart);
      const vd value = o.product ? apart * -gap : apart - gap;
      const vd push = active ? (o.product ? apart : splat(1.0)) : vd{};
      loss += active ? value : vd{};
      pushed += push;
      store(t.u + v, load(t.u + v) + push);
    });
    t.u[i] -= sum_of(pushed);
  }
  return sum_of(loss);
}

// l = 1/(K-1) sum_i mu_i [softplus(-s_i) + c_i sum_{j from end[i]} softplus(s_j)], mu held
// constant.
PK_HOT inline double anchor(const ListGroup& g) {
  const ListScratch& t = g.t;
  const int64_t k = g.count;
  if (t.end[0] == k) return 0.0;
  double low = t.s[0], high = t.s[0];
  for (int64_t i = 1; i < k; ++i) {
    low = t.s[i] < low ? t.s[i] : low;
    high = t.s[i] > high ? t.s[i] : high;
  }
  double *mu = t.place, *push = t.gain;
  for (int64_t i = 0; i < round_up(k, g.L); ++i) mu[i] = push[i] = 0.0;
  for (int64_t i = 0; i + 1 < k; ++i) {
    mu[i] = (high > low ? (t.s[i] - low) / (high - low) : 1.0) / double(k - 1);
    if (t.end[i] < k)
      push[t.end[i]] += g.call.options.inner_mean ? mu[i] / double(k - t.end[i]) : mu[i];
  }
  for (int64_t i = 1; i < k; ++i) push[i] += push[i - 1];  // what each item weighs as a lower one
  vd loss{};
  g.each(0, [&](int64_t v, vl, vl inside) {
    const vd s = load(t.s + v), m = load(mu + v), p = load(push + v);
    const vd e = exp_negative(-magnitude(s)), r = splat(1.0) / (splat(1.0) + e),
             soft = log1p_unit(e);
    const vd up = s > vd{} ? r : e * r, down = s > vd{} ? e * r : r;  // sigmoid(s), sigmoid(-s)
    const vd value = m * (soft + (s < vd{} ? -s : vd{})) + p * (soft + (s > vd{} ? s : vd{}));
    loss += inside ? value : vd{};
    store(t.u + v, p * up - m * down);
  });
  return sum_of(loss);
}

// l = softplus(LSE(x over Y-) - LSE(x over Y+)), x = s + deviation |y - mean y|, Y+ = {y > mean y}.
PK_HOT inline double set_contrast(const ListGroup& g) {
  const ListScratch& t = g.t;
  const int64_t k = g.count;
  // A label that ties with the mean belongs to Y-. So the mean is that of the labels' precision: of
  // 0.9, 0.5 and 0.1 in fp32 it is 0.5, and not the 0.50000001 that their fp64 values give.
  double total = 0.0, lost_digits = 0.0;
  bool spread = false;
  for (int64_t i = 0; i < k; ++i) {
    const double sum = total + t.label[i], part = sum - total;
    lost_digits += (total - (sum - part)) + (t.label[i] - part);
    total = sum;
    spread = spread || t.label[i] != t.label[0];
    t.u[i] = 0.0;
  }
  double mean = (total + lost_digits) / double(k);
  if (g.call.type == Dtype::f32) mean = double(float(mean));
  double top[2] = {-pk_inf(), -pk_inf()};
  for (int64_t i = 0; i < k; ++i) {
    const double off = t.label[i] - mean;
    const int good = off > 0.0;
    t.s[i] = t.score[i] + g.call.options.deviation * (good ? off : -off);
    t.slot[i] = good;
    top[good] = t.s[i] > top[good] ? t.s[i] : top[good];
  }
  // A mean of equal labels may be off by rounding; a side must hold a real difference.
  if (!spread || top[1] == -pk_inf()) return 0.0;
  double sum[2] = {0.0, 0.0};
  for (int64_t i = 0; i < k; ++i) t.line[i] = t.s[i] - top[t.slot[i]];
  for (int64_t i = k; i % g.L != 0; ++i) t.line[i] = 0.0;
  for (int64_t v = 0; v < k; v += g.L) store(t.line + v, exp_negative(load(t.line + v)));
  for (int64_t i = 0; i < k; ++i) sum[t.slot[i]] += t.line[i];
  const double margin = __builtin_log(sum[1]) - __builtin_log(sum[0]) + (top[1] - top[0]);
  const double e = __builtin_exp(margin > 0.0 ? -margin : margin), r = 1.0 / (1.0 + e);
  const double lost = margin > 0.0 ? e * r : r;  // mass of Y-
  for (int64_t i = 0; i < k; ++i) {
    t.u[i] = (t.slot[i] ? -lost : lost) * t.line[i] / sum[t.slot[i]];
  }
  return (margin < 0.0 ? -margin : 0.0) + __builtin_log1p(e);
}

// l = -sum_i (G_i / Z) / log2(1 + r_i), r_i = 1 + sum_{j != i} sigmoid((s_j - s_i) / T).
PK_HOT inline double approx_ndcg(const ListGroup& g) {
  const ListScratch& t = g.t;
  if (t.end[0] == g.count) return 0.0;
  vd total{};
  g.each(0, [&](int64_t v, vl, vl inside) {
    const vd gain = exp2m1(load(t.y + v));
    store(t.gain + v, gain);
    total += inside ? gain * load(g.call.discount + 1 + v) : vd{};
  });
  const double ideal = sum_of(total);
  if (ideal == 0.0) return 0.0;
  const vd width = splat(g.call.options.temperature);
  const auto chance = [&](vd own, int64_t v, vd& e, vd& r) {
    const vd x = (load(t.s + v) - own) / width;
    e = exp_negative(-magnitude(x)), r = splat(1.0) / (splat(1.0) + e);
    return x;
  };
  for (int64_t i = 0; i < g.count; ++i) {
    vd ahead{};
    g.each(0, [&](int64_t v, vl lanes, vl inside) {
      vd e, r;
      const vd x = chance(splat(t.s[i]), v, e, r);
      ahead += inside & (lanes != vl{} + i) ? (x > vd{} ? r : e * r) : vd{};
    });
    t.place[i] = 1.0 + sum_of(ahead);
  }
  for (int64_t i = g.count; i % g.L != 0; ++i) t.place[i] = 1.0;
  vd loss{};
  g.each(0, [&](int64_t v, vl, vl inside) {
    const vd soft = load(t.place + v), log = log1p_positive(soft);
    const vd share = load(t.gain + v) / splat(ideal) * splat(kLn2);
    loss -= inside ? share / log : vd{};
    store(t.line + v, share / ((splat(1.0) + soft) * log * log));
  });
  for (int64_t i = 0; i < g.count; ++i) {
    vd sum{};
    g.each(0, [&](int64_t v, vl lanes, vl inside) {
      vd e, r;
      chance(splat(t.s[i]), v, e, r);
      const vd pull = (load(t.line + v) - splat(t.line[i])) * (e * r * r);
      sum += inside & (lanes != vl{} + i) ? pull : vd{};
    });
    t.u[i] = sum_of(sum) / g.call.options.temperature;
  }
  return sum_of(loss);
}

}  // namespace PK_ISA
}  // namespace prefkern
