// From the sums of a row to its statistics, and from their gradients to the coefficients of the
// logit gradient. backends/eager/finish.py has the same in PyTorch; nothing else knows a statistic.
#pragma once

#include "numerics/online.h"

namespace prefkern {

// What the row's numbers are made of beside its sums.
struct RowContext {
  double at[kAts] = {};          // the target's logits, sum_k q_k z_k of a teacher
  double second[kSeconds] = {};  // sums of the second sweep
  double teacher = 0;            // sum_k q_k
  double top_value = 0, top_index = -1;
  int64_t target = 0, vocab = 0;
  PK_HD double operator[](At k) const { return at[int(k)]; }
  PK_HD double operator[](Second k) const { return second[int(k)]; }
};

// log S_a = log sum_v r^a p^(1-a). The maxima cancel, so that only sums of order 1 are left; 0
// exactly where the models are equal, since then every part of each difference is the same number.
PK_HD double log_overlap(const RowSums& s, Blend which, double a) {
  const double log_s = pk_log(s.pol.sum);
  return (lse_value(s.blend[which]) - log_s) - a * (pk_log(s.ref.sum) - log_s);
}

// The statistics of one row: put(stat, value) for those the plan asks for.
template <class Put>
PK_HD void finish_row(const RowSums& s, const RowContext& c, const FoldPlan& fold, const Put& put) {
  const StatPlan& plan = fold.stats;
  const double log_s = pk_log(s.pol.sum), lse = safe_max(s.pol.max) + log_s;
  const double bad = lse - lse;  // 0, or NaN for a row with a NaN or +inf logit
  // A target that no column has gives NaN, never a plausible number.
  const double none = c.target >= 0 && c.target < c.vocab ? 0.0 : pk_nan();
  const auto give = [&](Stat k, double value) {
    if (plan.has(k)) put(k, value + none);
  };
  // zy - max first: both are logits of the row, so their difference is exact where it matters.
  const double x = c[At::zy] - safe_max(s.pol.max);
  give(Stat::logp, x - log_s);
  give(Stat::lse, lse);
  give(Stat::zy, c[At::zy] + bad);
  give(Stat::ent, log_s - s.x / s.pol.sum);
  give(Stat::col, pk_log(s.sq) - 2.0 * log_s);
  give(Stat::top1, (s.top == c.target ? 1.0 : 0.0) + bad);
  give(Stat::zmean, s.z_sum / (s.z_count > 0.0 ? s.z_count : 1.0) + bad);
  give(Stat::xent, c[At::taught] - c.teacher * lse);
  const double log_sr = pk_log(s.ref.sum);
  give(Stat::ev, s.adv / s.pol.sum + (fold.third ? log_sr - pk_log(s.aux.sum) : 0.0));
  if (!fold.two) return;
  const double xr = c[At::ref_zy] - safe_max(s.ref.max);
  give(Stat::ref_logp, xr - log_sr);
  give(Stat::ref_lse, safe_max(s.ref.max) + log_sr);
  give(Stat::fkl, s.ref_cross / s.ref.sum + (log_s - log_sr));
  give(Stat::rkl, s.pol_cross / s.pol.sum + (log_sr - log_s));
  if (plan.has(Stat::alpha)) {
    const double a = plan.of(Stat::alpha);
    give(Stat::alpha, -pk_expm1(log_overlap(s, kAlphaBlend, a)) / (a * (1.0 - a)));
  }
  if (plan.has(Stat::renyi)) {
    const double a = plan.of(Stat::renyi);
    give(Stat::renyi, log_overlap(s, kRenyiBlend, a) / (a - 1.0));
  }
  if (plan.has(Stat::mix)) {
    const double b = plan.of(Stat::mix);
    // A target without probability in either model has none in the blend (and -inf - -inf is no
    // number).
    const bool gone = x == -pk_inf() || xr == -pk_inf();
    const double u = b == 0.0 ? x : b == 1.0 ? xr : gone ? -pk_inf() : x + b * (xr - x);
    const OnlineLse& m = s.blend[kMixBlend];
    give(Stat::mix, (u - safe_max(m.max)) - pk_log(m.sum) + bad + (log_sr - log_sr));
  }
  if (plan.has(Stat::jsd)) {
    const double b = plan.of(Stat::jsd);
    give(Stat::jsd, b * c[Second::kl_ref] + (1.0 - b) * c[Second::kl_pol]);
  }
  give(Stat::tv, 0.5 * c[Second::tv]);
  if (plan.has(Stat::bkl)) {
    const double gap = pk_log(c[Second::rest_ref]) - pk_log(c[Second::rest_pol]);
    give(Stat::bkl, c[Second::top_kl] + weighted(c[Second::rest_ref], gap));
  }
}

// What the backward reads of a row: put(saved, value). A one-model call keeps the first few.
template <class Put>
PK_HD void save_row(const RowSums& s, const RowContext& c, const FoldPlan& fold, const Put& put) {
  const StatPlan& plan = fold.stats;
  put(Saved::lse, lse_value(fold.rounded ? s.rounded : s.pol));
  put(Saved::zy, c[At::zy]);
  put(Saved::teacher, c.teacher);
  if (!fold.two) return;
  put(Saved::ref_lse, lse_value(s.ref));
  put(Saved::aux_lse, fold.third ? lse_value(s.aux) : 0.0);
  put(Saved::jsd_kl, plan.has(Stat::jsd) ? c[Second::kl_pol] : 0.0);
  put(Saved::tv_mean, plan.has(Stat::tv) ? c[Second::tv_mean] : 0.0);
  const bool bkl = plan.has(Stat::bkl);
  put(Saved::rest_ref, bkl ? c[Second::rest_ref] : 0.0);
  put(Saved::rest_pol, bkl ? c[Second::rest_pol] : 0.0);
  put(Saved::top_value, bkl ? c.top_value : 0.0);
  put(Saved::top_index, bkl ? c.top_index : 0.0);
  put(Saved::mix_shift, plan.has(Stat::mix) ? log_overlap(s, kMixBlend, plan.of(Stat::mix)) : 0.0);
}

// Coefficients of the logit gradient of one row, float64; `low` parts are split off at the end.
struct RowCoefficients {
  double c[kCoefs] = {};
  PK_HD double& operator[](Coef k) { return c[int(k)]; }
  PK_HD double operator[](Coef k) const { return c[int(k)]; }
};

// Whether pull_row may give a coefficient anything but 0.
PK_HD bool pulls(const StatPlan& p, Coef k) {
  switch (k) {
    case Coef::lse:
    case Coef::lse_low:
    case Coef::a0:
      return true;
    case Coef::e:
      return p.grows(Stat::logp) || p.grows(Stat::zy) || p.grows(Stat::mix);
    case Coef::ent:
    case Coef::ent_value:
      return p.grows(Stat::ent);
    case Coef::col:
    case Coef::col_value:
      return p.grows(Stat::col);
    case Coef::teach:
      return p.grows(Stat::xent);
    case Coef::ref_lse:
    case Coef::ref_lse_low:
      return reads_reference(p) || p.grows(Stat::ev);
    case Coef::fkl:
      return p.grows(Stat::fkl);
    case Coef::rkl:
    case Coef::rkl_value:
      return p.grows(Stat::rkl);
    case Coef::ev:
    case Coef::ev_value:
    case Coef::aux_lse:
    case Coef::aux_lse_low:
      return p.grows(Stat::ev);
    case Coef::alpha:
      return p.grows(Stat::alpha);
    case Coef::renyi:
    case Coef::renyi_shift:
      return p.grows(Stat::renyi);
    case Coef::mix:
    case Coef::mix_shift:
      return p.grows(Stat::mix);
    case Coef::jsd:
    case Coef::jsd_kl:
      return p.grows(Stat::jsd);
    case Coef::tv:
    case Coef::tv_mean:
      return p.grows(Stat::tv);
    case Coef::bkl:
    case Coef::bkl_ratio:
    case Coef::top_value:
    case Coef::top_index:
      return p.grows(Stat::bkl);
  }
  return false;
}

// up(stat): its gradient; out(stat): its value; saved(row): what the forward kept. `slope` is
// dz/dx's constant factor.
template <class Up, class Out, class Kept>
PK_HD RowCoefficients pull_row(const StatPlan& plan, double slope, const Up& up, const Out& out,
                               const Kept& saved) {
  RowCoefficients g;
  const auto c = [&](Stat k) { return slope * up(k); };
  g[Coef::lse] = saved(Saved::lse);
  g[Coef::ref_lse] = saved(Saved::ref_lse);
  g[Coef::aux_lse] = saved(Saved::aux_lse);
  if (plan.grows(Stat::logp)) {
    g[Coef::e] += c(Stat::logp);
    g[Coef::a0] -= c(Stat::logp);
  }
  if (plan.grows(Stat::lse)) g[Coef::a0] += c(Stat::lse);
  if (plan.grows(Stat::zy)) g[Coef::e] += c(Stat::zy);
  if (plan.grows(Stat::ent)) {
    g[Coef::ent] = -c(Stat::ent);
    g[Coef::ent_value] = out(Stat::ent);
  }
  if (plan.grows(Stat::col)) {
    g[Coef::col_value] = pk_exp(out(Stat::col));
    g[Coef::col] = 2.0 * c(Stat::col) / g[Coef::col_value];
  }
  if (plan.grows(Stat::xent)) {
    g[Coef::teach] = c(Stat::xent);
    g[Coef::a0] -= c(Stat::xent) * saved(Saved::teacher);
  }
  if (plan.grows(Stat::fkl)) g[Coef::fkl] = c(Stat::fkl);
  if (plan.grows(Stat::rkl)) {
    g[Coef::rkl] = c(Stat::rkl);
    g[Coef::rkl_value] = out(Stat::rkl);
  }
  if (plan.grows(Stat::ev)) {
    g[Coef::ev] = c(Stat::ev);
    g[Coef::ev_value] = out(Stat::ev);
  }
  if (plan.grows(Stat::alpha)) {
    const double a = plan.of(Stat::alpha);
    g[Coef::a0] -= c(Stat::alpha) * (1.0 - a) * out(Stat::alpha);  // (S_a - 1) / a
    g[Coef::alpha] = -c(Stat::alpha) / a;
  }
  if (plan.grows(Stat::renyi)) {
    g[Coef::renyi] = -c(Stat::renyi);
    g[Coef::renyi_shift] = (plan.of(Stat::renyi) - 1.0) * out(Stat::renyi);  // log S_a
  }
  if (plan.grows(Stat::mix)) {
    const double b = plan.of(Stat::mix);
    g[Coef::e] += (1.0 - b) * c(Stat::mix);
    g[Coef::a0] -= (1.0 - b) * c(Stat::mix);
    g[Coef::mix] = -(1.0 - b) * c(Stat::mix);
    g[Coef::mix_shift] = saved(Saved::mix_shift);
  }
  if (plan.grows(Stat::jsd)) {
    g[Coef::jsd] = (1.0 - plan.of(Stat::jsd)) * c(Stat::jsd);
    g[Coef::jsd_kl] = saved(Saved::jsd_kl);
  }
  if (plan.grows(Stat::tv)) {
    g[Coef::tv] = 0.5 * c(Stat::tv);
    g[Coef::tv_mean] = saved(Saved::tv_mean);
  }
  if (plan.grows(Stat::bkl)) {
    const double rest = saved(Saved::rest_pol);
    g[Coef::bkl] = c(Stat::bkl);
    g[Coef::bkl_ratio] = rest > 0.0 ? saved(Saved::rest_ref) / rest : 0.0;
    g[Coef::top_value] = saved(Saved::top_value);
    g[Coef::top_index] = saved(Saved::top_index);
  }
  return g;
}

// Stores coefficients in the fold dtype: put(coefficient, value). The three normalisers come in two
// parts, high + low, so that z - lse loses nothing to a large lse.
template <class T, class Put>
PK_HD void store_coefficients(const RowCoefficients& g, const Put& put) {
  for (int i = 0; i < kCoefs; ++i) {
    const Coef k = Coef(i);
    if (k == Coef::lse_low || k == Coef::ref_lse_low || k == Coef::aux_lse_low) continue;
    const T high = T(g.c[i]);
    put(k, high);
    if (k == Coef::lse || k == Coef::ref_lse || k == Coef::aux_lse) {
      const double rest = g.c[i] - double(high);
      put(Coef(i + 1), rest == rest ? T(rest) : T(0));  // no low part of an infinity
    }
  }
}

}  // namespace prefkern
